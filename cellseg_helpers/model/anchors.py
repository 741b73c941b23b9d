"""How well anchors fit cells, at the places where they lie on the grid; sizes that fit."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.data.cache import CellDataset
from cellseg_helpers.data.labels import find_boxes

LEVELS, STRIDE_PX = 5, 4  # of the feature pyramid; its first level's stride


def cell_boxes(dataset: CellDataset, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """``boxes`` float32 [N, 4], px, and ``labels`` int64 [N] of the cells of some images."""
    found = [find_boxes(dataset[index].label_maps)[:2] for index in indices]
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def best_anchor_iou(
    boxes: np.ndarray, sizes: Sequence[float], ratios: Sequence[float], stride_px: int = STRIDE_PX
) -> np.ndarray:
    """The IoU of each box with the anchor of a feature pyramid that fits it best: float64 [N].

    torchvision's anchors (``AnchorGenerator``) have a height of ``size * sqrt(ratio)`` and a width
    of ``size / sqrt(ratio)``, rounded to even numbers, and lie at every multiple of their level's
    stride. Of equal anchors the one with the nearest centre fits best.

    Args:
        boxes: float [N, 4], x1, y1, x2, y2 px, of images in the size that the model sees.
        sizes: px, as many for each of the five levels, as ``RunConfig.anchor_sizes``.
        ratios: height / width, for every size.
        stride_px: of the first level; each other has twice the one before.

    >>> best_anchor_iou(np.array([[2, 0, 18, 16]]), [16, 32, 64, 128, 256], [1]).round(2).tolist()
    [0.78]
    """
    strides = np.repeat(stride_px * 2 ** np.arange(LEVELS), len(sizes) // LEVELS)
    size, root = np.asarray(sizes, float)[:, None], np.sqrt(ratios)
    anchors = 2 * np.round(np.stack([size / root, size * root], -1) / 2)  # [S, R, (width, height)]
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    best = np.zeros(len(boxes))
    for stride, of_size in zip(strides, anchors, strict=True):
        offset = np.abs(centres - stride * np.round(centres / stride))
        for anchor in of_size:
            reach = (sides + anchor) / 2 - offset
            shared = np.minimum(np.minimum(sides, anchor), reach).clip(min=0).prod(1)
            best = np.maximum(best, shared / (sides.prod(1) + anchor.prod() - shared))
    return best


def fit_anchor_sizes(
    boxes: np.ndarray, labels: np.ndarray, ratios: Sequence[float], stride_px: int = STRIDE_PX
) -> tuple[float, ...]:
    """Ten sizes, two a level, each sqrt(2) times the one before, that fit the cells best.

    Of smallest sizes from 2 to 16 strides, the one with the largest share of cells that have an
    anchor at an IoU of 0.7 or more (by which the RPN learns them), averaged over the classes.
    """
    tried = [
        tuple((smallest * 2 ** (np.arange(2 * LEVELS) / 2)).round(1).tolist())
        for smallest in stride_px * 2 ** np.arange(1, 4.01, 0.25)
    ]
    fits = [best_anchor_iou(boxes, sizes, ratios, stride_px) >= 0.7 for sizes in tried]
    shares = [np.mean([fit[labels == k].mean() for k in np.unique(labels)]) for fit in fits]
    return tried[int(np.argmax(shares))]


def anchor_fit(
    boxes: np.ndarray, labels: np.ndarray, sizes: Sequence[float], ratios: Sequence[float]
) -> pd.DataFrame:
    """Per class, and over all cells: the share of cells with an anchor at an IoU of at least 0.5,
    and of at least 0.7.
    """
    iou = pd.Series(best_anchor_iou(boxes, sizes, ratios))
    of_class = iou.groupby(np.array(CLASS_NAMES)[labels - 1])
    rows = {name: of_class.get_group(name) for name in CLASS_NAMES if name in of_class.groups}
    shares = {
        name: {f"IoU ≥ {least}": (values >= least).mean() for least in (0.5, 0.7)}
        for name, values in (rows | {"all": iou}).items()
    }
    return pd.DataFrame(shares).T.rename_axis("class")
