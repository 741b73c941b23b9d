"""Compare the number of cells at the image border with the number expected by chance, and drop
detections at the border. Needs no torch.

How many are expected: 1. An annotator who ignores the border finds a cell of a given size equally
often at every position of its box. 2. So each cell that lies wholly inside its image stands for
``positions at the border / positions inside`` cells of its size at the border. 3. The sum of these
weights is the expected number (edge correction of Miles, "On the elimination of edge effects in
planar sampling", 1974, and Lantuejoul, "On the estimation of mean values in individual analysis of
particles", 1980).

Only boxes are used. In a corner of the image, the box of a round cell can be visible while the cell
is not; this makes the expected number too high, by about 5 % of cell width / image width. Cells too
large to lie inside their image do not contribute to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cellseg_helpers.cells import CLASS_NAMES, Cells

BORDER_MARGIN_PX = 2  # masks within this distance of an edge are at the border: many stop short
Images = Sequence[Mapping[str, Any]]  # of a COCO data set
Z_95 = 1.96  # 95 % of a normal distribution lie within this many standard deviations


def border_contact(
    cells: Cells,
    images: Images,
    border_margin_px: int = 0,
    virtual: bool = False,
    inset_px: int = 32,
    min_visible_px: int = 3,
) -> pd.DataFrame:
    """Compare the number of cells at the image border with the number expected by chance.

    ``virtual=True`` is a negative control: it counts cells at an imaginary border, ``inset_px``
    inside the real one, unknown to annotators. Cells and positions at the real one are left out.

    The interval is that of a Poisson process: ``at_border - expected`` has the variance ``sum of
    weight * (1 + weight)``. Cells cluster, so this variance is multiplied by a dispersion
    (quasi-Poisson; McCullagh and Nelder, "Generalized linear models", 1989). It is measured at the
    virtual border: the sum over images of ``(at_border - expected)^2``, divided by the sum of their
    variances, and at least 1. It is too small for a few images with cells in large clusters.

    Args:
        cells: annotations or detections; the tight boxes of their masks are used.
        images: of a COCO data set; images with a side under ``3 * inset_px`` are left out, since in
            them one cell would stand for many.
        border_margin_px: a cell is at the border if its box ends at most this far from an edge.
        inset_px: about a cell's width, so that similar numbers of cells cross the two borders.
        min_visible_px: a cell is left out if the visible part of its box is smaller than this in
            either direction: nobody could recognise it.

    Returns:
        One row for ``all`` and each class. cells: how many are counted. at_border: how many of them
        are at the border. expected, low, high: the number at the border by chance, and its 95 %
        interval. ratio: at_border / expected, NaN if 0 are expected. dispersion. verdict: ``fewer
        than by chance``, ``as by chance``, ``more than by chance``, or ``cannot tell`` if the
        interval begins at 0 and ``at_border`` does not exceed it, or if 0 are expected.

    Raises:
        ValueError: a cell of an unknown image or class, or a setting out of range.
    """
    if inset_px < 1 or min_visible_px < 1:
        raise ValueError(
            f"inset_px is {inset_px} and min_visible_px {min_visible_px}; both must be at least 1"
        )
    settings = border_margin_px, inset_px, min_visible_px
    by_image = _contact_by_image(cells, images, virtual, *settings)
    counted, at_border, expected, variance = by_image.sum(axis=1)
    _, at_virtual, expected_virtual, variances = _contact_by_image(cells, images, True, *settings)
    squares = (at_virtual - expected_virtual) ** 2
    # divide sums: an image whose cells are all at the border has variance 0
    dispersion = np.fmax(_ratio(squares.sum(axis=0), variances.sum(axis=0)), 1)
    half_width = Z_95 * np.sqrt(dispersion * variance)
    low, high = np.maximum(expected - half_width, 0), expected + half_width
    verdict = np.where(at_border < low, "fewer than by chance", "as by chance")
    verdict = np.where(low == 0, "cannot tell", verdict)
    verdict = np.where((expected > 0) & (at_border > high), "more than by chance", verdict)
    columns = {"cells": counted.astype(int), "at_border": at_border.astype(int)}
    columns |= {"expected": expected, "low": low, "high": high}
    columns |= {"ratio": _ratio(at_border, expected), "dispersion": dispersion, "verdict": verdict}
    return pd.DataFrame(columns, index=pd.Index(["all", *CLASS_NAMES], name="class"))


def near_border(cells: Cells, border_margin_px: float = 0, by: str = "box") -> np.ndarray:
    """Find the cells within ``border_margin_px`` of an edge of their image: bool [N].

    ``by="box"`` uses the model's box; by rounding, it may end just short of the image's edge.
    ``by="mask"`` uses the mask's tight box. Empty boxes are not near the border.

    Raises:
        ValueError: a negative margin, or an unknown ``by``.
    """
    if by not in ("box", "mask"):
        choices = "'box' (the model's box) or 'mask' (the mask's tight box)"
        raise ValueError(f"by is {by!r}; it must be {choices}")
    boxes = cells.boxes if by == "box" else cells.mask_boxes
    starts, stops = boxes[:, :2], boxes[:, 2:]
    return _near(starts, stops, cells.sizes[:, ::-1], border_margin_px) & (stops > starts).all(1)


def drop_border_detections(
    detections: Cells, border_margin_px: float = 0, by: str = "box"
) -> Cells:
    """Drop the detections that are ``near_border``."""
    return detections[~near_border(detections, border_margin_px, by)]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole``, NaN where ``whole`` is not above 0."""
    return part / np.where(whole > 0, whole, np.nan)


def _near(starts: np.ndarray, stops: np.ndarray, sides: np.ndarray, margin_px: float) -> np.ndarray:
    """Find the boxes that end at most ``margin_px`` from an edge of their image: bool [N]."""
    if margin_px < 0:
        raise ValueError(f"border_margin_px is {margin_px}; it must be 0 or more")
    return ((starts <= margin_px) | (stops >= sides - margin_px)).any(axis=1)


def _contact_by_image(
    cells: Cells, images: Images, virtual: bool, margin_px: int, inset_px: int, min_visible_px: int
) -> np.ndarray:
    """For each image and class (``all`` first), the number of counted cells, how many of them are
    at the border, how many are expected at it, and the variance: float64 [4, I, 1 + K].

    Along a side of L px, at least m px of a box of s px are visible at L + s - 2m + 1 positions. At
    L - 2d - s - 1 positions, the box lies more than d px from both ends. A virtual border shortens
    L by its inset at both ends; positions within d of the real border are then left out.
    """
    rows = pd.Index([image["id"] for image in images]).get_indexer(cells.image_ids)
    if (rows < 0).any():
        fault = f"a cell is of image {cells.image_ids[rows < 0].min()}"
        raise ValueError(f"{fault}, which the images do not have: are both of one split?")
    if not np.isin(cells.labels, range(1, len(CLASS_NAMES) + 1)).all():
        ids = np.unique(cells.labels).tolist()
        raise ValueError(f"cells are of the classes {ids}; only 1..{len(CLASS_NAMES)} are known")
    sides, boxes = cells.sizes[:, ::-1].astype(float), cells.mask_boxes.astype(float)
    starts, stops = boxes[:, :2], boxes[:, 2:]
    inset, lengths = inset_px if virtual else 0, stops - starts
    visible = np.minimum(stops, sides - inset) - np.maximum(starts, inset)
    counted = (visible >= min_visible_px).all(axis=1) & (sides >= 3 * inset_px).all(axis=1)
    at_border = _near(starts, stops, sides, margin_px + inset)
    positions = sides - 2 * inset + lengths - 2 * min_visible_px + 1  # where it would be counted
    inside = sides - 2 * inset - 2 * margin_px - lengths - 1  # of these, not at the border
    if virtual:
        counted &= ~_near(starts, stops, sides, margin_px)
        positions = np.minimum(positions, sides - 2 * margin_px - lengths - 1)
    weight = _ratio(positions.prod(axis=1), inside.prod(axis=1)) - 1
    weight = np.where(counted & ~at_border, weight, 0)
    totals = np.zeros((4, len(images), len(CLASS_NAMES)))
    for total, value in zip(totals, (1, at_border, weight, weight * (1 + weight)), strict=True):
        np.add.at(total, (rows, cells.labels - 1), counted * value)
    return np.concatenate([totals.sum(axis=2, keepdims=True), totals], axis=2)
