"""How well anchors fit the cells, with anchors at their grid positions; and sizes that fit."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.data.cache import CellDataset
from cellseg_helpers.data.labels import find_boxes

LEVELS, STRIDE_PX = 5, 4  # levels of the feature pyramid; stride of its first level


def cell_boxes(dataset: CellDataset, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [N, 4], px, and labels int64 [N] of all cells in some images."""
    of_images = [find_boxes(dataset[index].label_maps)[:2] for index in indices]
    return tuple(np.concatenate(parts) for parts in zip(*of_images, strict=True))


def best_anchor_iou(
    boxes: np.ndarray, sizes: Sequence[float], ratios: Sequence[float], stride_px: int = STRIDE_PX
) -> np.ndarray:
    """The highest IoU of each box with any anchor of a feature pyramid: float64 [N].

    torchvision's anchors (``AnchorGenerator``) have a height of ``size * sqrt(ratio)`` and a width
    of ``size / sqrt(ratio)``, rounded to even numbers, and lie at every multiple of their level's
    stride. Among anchors of equal shape, the one with the nearest centre fits best.

    Args:
        boxes: float [N, 4], x1, y1, x2, y2 px, in images resized for the model.
        sizes: px, the same number for each of the five levels, as in ``RunConfig.anchor_sizes``.
        ratios: height / width; each is used with every size.
        stride_px: of the first level; it doubles from level to level.

    >>> best_anchor_iou(np.array([[2, 0, 18, 16]]), [16, 32, 64, 128, 256], [1]).round(2).tolist()
    [0.78]
    """
    strides = np.repeat(stride_px * 2 ** np.arange(LEVELS), len(sizes) // LEVELS)
    size, roots = np.asarray(sizes, float)[:, None], np.sqrt(ratios)
    widths_heights = np.stack([size / roots, size * roots], -1)  # [sizes, ratios, 2]
    anchors = 2 * np.round(widths_heights / 2)
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    best_iou = np.zeros(len(boxes))
    for stride, of_size in zip(strides, anchors, strict=True):
        offset = np.abs(centres - stride * np.round(centres / stride))
        for anchor in of_size:
            reach = (sides + anchor) / 2 - offset
            shared = np.minimum(np.minimum(sides, anchor), reach).clip(min=0).prod(1)
            best_iou = np.maximum(best_iou, shared / (sides.prod(1) + anchor.prod() - shared))
    return best_iou


def fit_anchor_sizes(
    boxes: np.ndarray, labels: np.ndarray, ratios: Sequence[float], stride_px: int = STRIDE_PX
) -> tuple[float, ...]:
    """The ten sizes, two per level and each sqrt(2) times the one before, that fit the cells best.

    Smallest sizes from 2 to 16 strides are tried. The best one gives the largest share of cells,
    averaged over classes, an anchor with an IoU of at least 0.7 (a positive by the RPN's default).
    """
    tried = [
        tuple((smallest * 2 ** (np.arange(2 * LEVELS) / 2)).round(1).tolist())
        for smallest in stride_px * 2 ** np.arange(1, 4.01, 0.25)
    ]
    fits = [best_anchor_iou(boxes, sizes, ratios, stride_px) >= 0.7 for sizes in tried]
    shares = [np.mean([fit[labels == label].mean() for label in np.unique(labels)]) for fit in fits]
    return tried[int(np.argmax(shares))]


def anchor_fit(
    boxes: np.ndarray, labels: np.ndarray, sizes: Sequence[float], ratios: Sequence[float]
) -> pd.DataFrame:
    """The shares of cells with an anchor at an IoU of at least 0.5 and of at least 0.7, for each
    class and for all classes together (``all``).
    """
    iou = pd.Series(best_anchor_iou(boxes, sizes, ratios))
    of_class = iou.groupby(np.array(CLASS_NAMES)[labels - 1])
    rows = {name: of_class.get_group(name) for name in CLASS_NAMES if name in of_class.groups}
    shares = {
        name: {f"IoU ≥ {least}": (values >= least).mean() for least in (0.5, 0.7)}
        for name, values in (rows | {"all": iou}).items()
    }
    return pd.DataFrame(shares).T.rename_axis("class")
