"""Are as many cells at the image border as expected by chance? And a filter that drops detections
at the border. No torch.

How many are expected: 1. An annotator who ignores the border finds a cell of a given size equally
often at every position of its box. 2. So each cell that lies wholly inside its image stands for
``positions at the border / positions inside`` cells of its size at the border. 3. The sum of these
weights is the expected number (edge correction of Miles, "On the elimination of edge effects in
planar sampling", 1974, and Lantuejoul, "On the estimation of mean values in individual analysis of
particles", 1980).

Only boxes are used. In a corner of the image a round cell's box can be visible while the cell is
not, so the expected number is too high by about 5 % of cell width / image width. Cells too large to
lie inside their image do not count in it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cellseg_helpers.cells import CLASS_NAMES, Cells

BORDER_MARGIN_PX = 2  # a mask that ends this far from an edge is at the border: outlines stop short
Images = Sequence[Mapping[str, Any]]  # of a COCO data set
Z_95 = 1.96  # a normal distribution holds 95 % within so many standard deviations


def border_contact(
    cells: Cells,
    images: Images,
    border_margin_px: int = 0,
    virtual: bool = False,
    inset_px: int = 32,
    min_visible_px: int = 3,
) -> pd.DataFrame:
    """Cells at the image border, and the number expected if annotators (or the model) ignored it.

    ``virtual=True`` is the negative control: a border that nobody saw, ``inset_px`` inside the
    image's own. Cells and positions at the image's own border do not count in it.

    The interval is that of a Poisson process: ``at_border - expected`` has the variance ``sum of
    weight * (1 + weight)``. Cells cluster, so this variance is multiplied by a dispersion
    (quasi-Poisson; McCullagh and Nelder, "Generalized linear models", 1989), measured at the
    virtual border: the sum over images of the squared difference, divided by its variance, at least
    1. A few images with cells in large clusters give too small a dispersion.

    Args:
        cells: annotations or detections, taken by the tight boxes of their masks.
        images: of a COCO data set; images with a side under ``3 * inset_px`` are left out, since in
            them one cell would stand for many.
        border_margin_px: a cell whose box ends this far from an edge is at the border.
        inset_px: about a cell's width, so that as many cells cross both borders.
        min_visible_px: a cell with a smaller visible part of its box, in either direction, does not
            count: nobody could recognise it.

    Returns:
        Rows ``all`` and each class. cells: those that count. at_border: how many of them are at the
        border. expected, low, high: their number by chance, with its 95 % interval. ratio:
        at_border / expected, NaN if none is expected. dispersion. verdict: ``fewer than by
        chance``, ``as by chance``, ``more than by chance``; ``cannot tell`` if the interval begins
        at 0 and ``at_border`` does not exceed it, or if none is expected.

    Raises:
        ValueError: a cell of an unknown image or class, or a setting out of range.
    """
    if inset_px < 1 or min_visible_px < 1:
        raise ValueError(
            f"inset_px is {inset_px} and min_visible_px {min_visible_px}; both must be at least 1"
        )
    settings = border_margin_px, inset_px, min_visible_px
    counted, at_border, expected, variance = _contact(cells, images, virtual, *settings).sum(1)
    _, found, by_chance, variances = _contact(cells, images, True, *settings)
    # a ratio of sums, since an image with cells only at the border has no variance
    squares = ((found - by_chance) ** 2).sum(axis=0)
    dispersion = np.fmax(_ratio(squares, variances.sum(axis=0)), 1)
    reach = Z_95 * np.sqrt(dispersion * variance)
    low, high = np.maximum(expected - reach, 0), expected + reach
    verdict = np.where(at_border < low, "fewer than by chance", "as by chance")
    verdict = np.where(low == 0, "cannot tell", verdict)
    verdict = np.where((expected > 0) & (at_border > high), "more than by chance", verdict)
    columns = {"cells": counted.astype(int), "at_border": at_border.astype(int)}
    columns |= {"expected": expected, "low": low, "high": high}
    columns |= {"ratio": _ratio(at_border, expected), "dispersion": dispersion, "verdict": verdict}
    return pd.DataFrame(columns, index=pd.Index(["all", *CLASS_NAMES], name="class"))


def near_border(cells: Cells, border_margin_px: float = 0, by: str = "box") -> np.ndarray:
    """Which cells come within ``border_margin_px`` of an edge of their image: bool [N].

    ``by="box"`` takes the model's box; by rounding, it may end just short of the image's edge.
    ``by="mask"`` takes the mask's tight box. An empty box is near no border.

    Raises:
        ValueError: a negative margin, or an unknown ``by``.
    """
    if by not in ("box", "mask"):
        kinds = "'box' (the model's box) or 'mask' (the mask's tight box)"
        raise ValueError(f"by is {by!r}; it must be {kinds}")
    boxes = cells.boxes if by == "box" else cells.mask_boxes
    starts, stops = boxes[:, :2], boxes[:, 2:]
    return _near(starts, stops, cells.sizes[:, ::-1], border_margin_px) & (stops > starts).all(1)


def drop_border_detections(
    detections: Cells, border_margin_px: float = 0, by: str = "box"
) -> Cells:
    """The detections that are not ``near_border``."""
    return detections[~near_border(detections, border_margin_px, by)]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.where(whole > 0, whole, np.nan)


def _near(starts: np.ndarray, stops: np.ndarray, sides: np.ndarray, margin_px: float) -> np.ndarray:
    """Which boxes end ``margin_px`` or less from an edge of their image: bool [N]."""
    if margin_px < 0:
        raise ValueError(f"border_margin_px is {margin_px}; it must be 0 or more")
    return ((starts <= margin_px) | (stops >= sides - margin_px)).any(axis=1)


def _contact(
    cells: Cells, images: Images, virtual: bool, margin_px: int, inset_px: int, min_visible_px: int
) -> np.ndarray:
    """Numbers of cells that count, of those at the border and of those expected at the border, and
    the variance: float64 [4, I images, all and K classes].

    Along a side of L px, a box of s px shows at least m px of itself at L + s - 2m + 1 positions,
    and lies further than d from both ends at L - 2d - s - 1. A virtual border shortens L by its
    inset at both ends; only positions further than d from the image's own border count in it.
    """
    rows = pd.Index([image["id"] for image in images]).get_indexer(cells.image_ids)
    if (rows < 0).any():
        fault = f"a cell is of image {cells.image_ids[rows < 0].min()}"
        raise ValueError(f"{fault}, which the images do not have: are both of one split?")
    if not np.isin(cells.labels, range(1, len(CLASS_NAMES) + 1)).all():
        found = np.unique(cells.labels).tolist()
        raise ValueError(f"cells are of the classes {found}; only 1..{len(CLASS_NAMES)} are known")
    sides, boxes = cells.sizes[:, ::-1].astype(float), cells.mask_boxes.astype(float)
    starts, stops = boxes[:, :2], boxes[:, 2:]
    inset, lengths = inset_px if virtual else 0, stops - starts
    visible = np.minimum(stops, sides - inset) - np.maximum(starts, inset)
    counted = (visible >= min_visible_px).all(axis=1) & (sides >= 3 * inset_px).all(axis=1)
    at_border = _near(starts, stops, sides, margin_px + inset)
    counting = sides - 2 * inset + lengths - 2 * min_visible_px + 1  # positions along each side
    inside = sides - 2 * inset - 2 * margin_px - lengths - 1
    if virtual:
        counted &= ~_near(starts, stops, sides, margin_px)
        counting = np.minimum(counting, sides - 2 * margin_px - lengths - 1)
    weight = _ratio(counting.prod(axis=1), inside.prod(axis=1)) - 1
    weight = np.where(counted & ~at_border, weight, 0)
    totals = np.zeros((4, len(images), len(CLASS_NAMES)))
    for total, value in zip(totals, (1, at_border, weight, weight * (1 + weight)), strict=True):
        np.add.at(total, (rows, cells.labels - 1), counted * value)
    return np.concatenate([totals.sum(axis=2, keepdims=True), totals], axis=2)
