"""Post-processing of detections: change scores, refine masks, keep one detection per cell, and give
each pixel to one cell. Needs no torch.

Each function takes ``Cells`` and returns ``Cells`` in the same order; a setting out of its range
raises ``ValueError``. Functions that change masks also update the boxes and drop empty masks.

Refinement (``open_masks`` to ``smooth_masks``) treats each mask by itself and everything outside
the image as background. So closing removes no pixel at the image's edge, and a bay that only the
edge closes is not a hole. No mask grows beyond its tight box.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from scipy import ndimage

from cellseg_helpers.cells import BoxMask, Cells, mask_iou


def adjust_scores_by_size(cells: Cells, factors: Sequence[tuple[float, float]]) -> Cells:
    """Multiply the scores of small boxes by a factor; no score becomes larger than 1.

    ``factors`` are (share, factor) pairs: a box that covers less than ``share`` of its image gets
    the factor of the smallest such share. Shares rise within (0, 1]; factors are above 0.
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
    pair_of_box = np.searchsorted(shares, box_area_px / cells.sizes.prod(1), side="right")
    scores = cells.scores * np.append(multipliers, 1)[pair_of_box]  # larger than every share: 1
    return replace(cells, scores=np.minimum(scores, 1))


def apply_class_thresholds(cells: Cells, score_thresholds: Mapping[int, float]) -> Cells:
    """Keep the cells that score at least the threshold of their class (class id -> 0..1).

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
    """Remove the parts of masks that are too narrow for a disk (morphological opening).

    The disk holds all pixels within ``radius_px`` of its centre; radius 0 changes nothing.
    """
    disk = _disk(radius_px)
    return _change_masks(cells, lambda mask: ndimage.binary_opening(mask, disk))


def close_masks(cells: Cells, radius_px: float) -> Cells:
    """Fill the gaps and bays of masks that are too narrow for the disk of ``open_masks``
    (morphological closing). No mask loses a pixel.
    """
    disk = _disk(radius_px)
    margin_px = len(disk) // 2  # the disk must find background around the mask
    return _change_masks(cells, lambda mask: ndimage.binary_closing(mask, disk), margin_px)


def fill_holes(cells: Cells) -> Cells:
    """Fill the holes of masks: background that is not 4-connected to the outside of the mask."""
    return _change_masks(cells, ndimage.binary_fill_holes)


def keep_largest_component(cells: Cells) -> Cells:
    """Reduce masks to their largest 8-connected component; of equally large ones the leftmost."""
    return _change_masks(cells, _largest_component)


def smooth_masks(cells: Cells, sigma_px: float) -> Cells:
    """Blur masks by a Gaussian (0 outside, cut off at 4 ``sigma_px``) and keep the pixels of at
    least 0.5. This rounds corners and removes narrow parts; small masks may vanish.
    """
    _check_length("sigma_px", sigma_px)
    blur = partial(ndimage.gaussian_filter, sigma=sigma_px, output=float, mode="constant")
    return _change_masks(cells, lambda mask: blur(mask) >= 0.5)


def mask_nms(cells: Cells, iou_threshold: float) -> Cells:
    """Suppress duplicates by the IoU of masks, across classes. (Mask R-CNN itself compares boxes,
    and only within a class, so that one cell may be detected as two classes.)

    From the highest score down (of equal scores the earlier first), a cell is dropped if the IoU of
    its mask with one that stays is above ``iou_threshold``. 0: none overlap; 1: none are dropped.
    """
    _check_share("iou_threshold", iou_threshold)
    stays = np.ones(len(cells), bool)
    for rows in _rows_by_image(cells):
        of_image = cells[rows]
        iou = mask_iou(of_image, of_image)  # both sides share the encoded masks
        for rank, row in enumerate(rows):
            if stays[row]:
                stays[rows[rank + 1 :]] &= iou[rank, rank + 1 :] <= iou_threshold
    return cells[stays]


def resolve_overlaps(cells: Cells, min_visible_share: float) -> Cells:
    """Give each pixel of an image to at most one cell, across classes.

    From the highest score down (of equal scores the earlier first), a cell gets the largest
    8-connected component (of equal ones the leftmost) of those pixels of its mask that are still
    free. If that is less than ``min_visible_share`` of the mask, the cell is dropped. All pixels
    that it does not get remain free for cells of lower scores.
    """
    _check_share("min_visible_share", min_visible_share)
    changed = {}
    for rows in _rows_by_image(cells):
        taken = np.zeros(cells.sizes[rows[0]], bool)
        for row in rows:
            mask, x0, y0 = cells.masks[row]
            taken_in_box = taken[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]  # a view
            visible = mask & ~taken_in_box
            if (visible != mask).any():
                visible = _largest_component(visible)
                visible &= visible.sum() / mask.sum() >= min_visible_share
                changed[row] = BoxMask.around(visible, x0, y0)
            taken_in_box |= visible
    return cells.with_masks(changed)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be at least 0 and at most 1")


def _check_length(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be a finite number of pixels, at least 0")


def _rows_by_image(cells: Cells) -> Iterator[np.ndarray]:
    """For each image, the rows of its cells by descending score."""
    order = np.argsort(-cells.scores, kind="stable")
    for image_id in np.unique(cells.image_ids):
        yield order[cells.image_ids[order] == image_id]


def _change_masks(
    cells: Cells, change: Callable[[np.ndarray], np.ndarray], margin_px: int = 0
) -> Cells:
    """Apply ``change`` to each mask in its box, padded by ``margin_px`` of background."""
    changed = {}
    for row, (mask, x0, y0) in enumerate(cells.masks):
        before = np.pad(mask, margin_px)
        after = change(before)
        if (after != before).any():
            changed[row] = BoxMask.around(after, x0 - margin_px, y0 - margin_px)
    return cells.with_masks(changed)


def _disk(radius_px: float) -> np.ndarray:
    """The pixels within ``radius_px`` of the centre pixel: bool, square."""
    _check_length("radius_px", radius_px)
    reach = math.floor(radius_px)
    offsets = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return (offsets**2).sum(axis=0) <= radius_px**2


def _largest_component(mask: np.ndarray) -> np.ndarray:
    # ``label`` counts row by row, in the transposed mask thus from left to right
    components, _ = ndimage.label(mask.T, np.ones((3, 3)))
    return (components == np.bincount(components.ravel(), minlength=2)[1:].argmax() + 1).T
