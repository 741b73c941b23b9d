"""Post-processing of detections: score rules, mask refinement, one mask a cell, one cell a pixel.
No torch.

Each function takes ``Cells`` and returns ``Cells`` in the same order; a setting out of its range is
a ``ValueError``. Functions that change masks set the box to the new mask's and drop empty masks.

Refinement (opening to smoothing) takes each mask alone, and what is outside the image as
background: closing takes no pixel away at the image's edge, and a bay that the edge closes is no
hole. No mask grows out of its tight box.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from scipy import ndimage

from cellseg_helpers.cells import BoxMask, Cells, mask_iou


def adjust_scores_by_size(cells: Cells, factors: Sequence[tuple[float, float]]) -> Cells:
    """Scores of small boxes times a factor, at most 1.

    ``factors`` are (share, factor) pairs: a box of less than ``share`` of its image's area gets the
    factor of the smallest such share. Shares rise within (0, 1], factors are above 0.
    """
    in_pairs = all(np.shape(pair) == (2,) for pair in factors)
    shares, multipliers = np.array(factors if in_pairs else [], float).reshape(-1, 2).T
    rising = (np.diff(shares, prepend=0) > 0).all() and (shares <= 1).all()
    if not (in_pairs and rising and ((multipliers > 0) & (multipliers < math.inf)).all()):
        raise ValueError(
            f"factors is {factors}; it must be pairs whose shares rise from above 0 to at most 1 "
            "and whose factors are above 0, as in [(0.01, 1.15), (0.05, 1.10)]"
        )
    box_area_px = (cells.boxes[:, 2:] - cells.boxes[:, :2]).prod(1)
    pair = np.searchsorted(shares, box_area_px / cells.sizes.prod(1), side="right")
    scores = cells.scores * np.append(multipliers, 1)[pair]
    return replace(cells, scores=np.minimum(scores, 1))


def apply_class_thresholds(cells: Cells, score_thresholds: Mapping[int, float]) -> Cells:
    """The cells that score at least their class's threshold (class id -> 0..1).

    Raises:
        ValueError: a threshold out of its range, or cells of a class without one.
    """
    for class_id, score_threshold in score_thresholds.items():
        _check_share(f"score_thresholds[{class_id}]", score_threshold)
    labels = cells.labels.tolist()
    missing = sorted(set(labels) - set(score_thresholds))
    if missing:
        raise ValueError(
            f"score_thresholds has nothing for class {missing[0]}, but there are detections of it; "
            f"it has {sorted(score_thresholds)}"
        )
    return cells[cells.scores >= [score_thresholds[class_id] for class_id in labels]]


def open_masks(cells: Cells, radius_px: float) -> Cells:
    """Masks without what is too narrow for a disk of ``radius_px`` (morphological opening).

    The disk holds the pixels at most ``radius_px`` from its centre; 0 changes nothing.
    """
    disk = _disk(radius_px)
    return _change_masks(cells, lambda mask: ndimage.binary_opening(mask, disk))


def close_masks(cells: Cells, radius_px: float) -> Cells:
    """Masks with gaps and bays filled that ``open_masks``' disk does not enter (morphological
    closing). No mask loses a pixel.
    """
    disk = _disk(radius_px)
    margin_px = len(disk) // 2  # the disk must find background around the mask
    return _change_masks(cells, lambda mask: ndimage.binary_closing(mask, disk), margin_px)


def fill_holes(cells: Cells) -> Cells:
    """Masks with the background filled from which no path over pixels' sides leads out."""
    return _change_masks(cells, ndimage.binary_fill_holes)


def keep_largest_component(cells: Cells) -> Cells:
    """Masks cut down to their largest 8-connected component; of equal ones the leftmost stays."""
    return _change_masks(cells, _largest_component)


def smooth_masks(cells: Cells, sigma_px: float) -> Cells:
    """Masks blurred by a Gaussian (0 outside, cut at 4 ``sigma_px``) and taken where that is at
    least 0.5. It rounds corners and removes what is narrow; small masks may vanish.
    """
    _check_length("sigma_px", sigma_px)
    blur = partial(ndimage.gaussian_filter, sigma=sigma_px, output=float, mode="constant")
    return _change_masks(cells, lambda mask: blur(mask) >= 0.5)


def mask_nms(cells: Cells, iou_threshold: float) -> Cells:
    """Non-maximum suppression by masks, across classes. (Mask R-CNN's own is by boxes and within a
    class, so that one cell may be found as two classes.)

    From the highest score down (of equal scores the earlier first), a cell is dropped if its mask's
    IoU with one that stays is above ``iou_threshold``. 0 leaves no two that overlap, 1 drops none.
    """
    _check_share("iou_threshold", iou_threshold)
    stays = np.ones(len(cells), bool)
    for rows in _rows_by_image(cells):
        iou = mask_iou(cells[rows], cells[rows])
        for rank, row in enumerate(rows):
            if stays[row]:
                stays[rows[rank + 1 :]] &= iou[rank, rank + 1 :] <= iou_threshold
    return cells[stays]


def resolve_overlaps(cells: Cells, min_visible_share: float) -> Cells:
    """Each pixel of an image to one cell, across classes.

    From the highest score down (of equal scores the earlier first), a cell gets the pixels of its
    mask that no cell before it has, of them the largest 8-connected component (of equal ones the
    leftmost). If that is less than ``min_visible_share`` of its mask, it is dropped; its pixels and
    cut off fragments are free for lower scores.
    """
    _check_share("min_visible_share", min_visible_share)
    changed = {}
    for rows in _rows_by_image(cells):
        taken = np.zeros(cells.sizes[rows[0]], bool)
        for row in rows:
            mask, x0, y0 = cells.masks[row]
            under = taken[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
            visible = mask & ~under
            if (visible != mask).any():
                visible = _largest_component(visible)
                visible &= visible.sum() / mask.sum() >= min_visible_share
                changed[row] = BoxMask.around(visible, x0, y0)
            under |= visible
    return cells.with_masks(changed)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be at least 0 and at most 1")


def _check_length(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be a finite number of pixels, at least 0")


def _rows_by_image(cells: Cells) -> Iterator[np.ndarray]:
    """Each image's rows by descending score."""
    order = np.argsort(-cells.scores, kind="stable")
    for image_id in np.unique(cells.image_ids):
        yield order[cells.image_ids[order] == image_id]


def _change_masks(
    cells: Cells, change: Callable[[np.ndarray], np.ndarray], margin_px: int = 0
) -> Cells:
    """Cells with each mask, in its box and a margin of background, changed."""
    changed = {}
    for row, (mask, x0, y0) in enumerate(cells.masks):
        before = np.pad(mask, margin_px)
        after = change(before)
        if (after != before).any():
            changed[row] = BoxMask.around(after, x0 - margin_px, y0 - margin_px)
    return cells.with_masks(changed)


def _disk(radius_px: float) -> np.ndarray:
    _check_length("radius_px", radius_px)
    reach = math.floor(radius_px)
    offsets = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return (offsets**2).sum(axis=0) <= radius_px**2


def _largest_component(mask: np.ndarray) -> np.ndarray:
    components, _ = ndimage.label(mask.T, np.ones((3, 3)))
    return (components == np.bincount(components.ravel(), minlength=2)[1:].argmax() + 1).T
