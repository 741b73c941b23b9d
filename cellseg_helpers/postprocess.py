"""What may be done to detections before they count: score rules, mask refinement, one mask a cell,
one cell a pixel. No torch.

Detections are COCO results: dicts of ``image_id``, ``category_id`` (the class id), ``score``,
``bbox`` [x, y, width, height] px, ``segmentation`` (an RLE of the image's size) and whatever else
they carry. Each function takes a list of them and returns a list in the same order; it changes
neither the list nor its dicts, and what it leaves as it is, it passes on as the same dict. Where a
mask changed, ``bbox`` is its tight box. A result without any pixel (left) is dropped by all
functions that change masks.

Refinement (opening to smoothing) works on each mask alone, as on an endless plane: what is outside
the image is background, and the result is cut to the image. So closing takes no pixel away at the
image's edge, and a bay that the edge closes is no hole. No mask grows out of its tight box.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage

from cellseg_helpers.data.labels import connected_components, decode_in_boxes, encode_box_masks

MASKS_PER_BATCH = 1000
PIXELS_PER_STACK = 2**22
STACK_STEP_PX = 8  # masks whose sides are equal after rounding up to it share a stack


def adjust_scores_by_size(
    detections: list[dict[str, Any]], factors: Sequence[tuple[float, float]]
) -> list[dict[str, Any]]:
    """Report E's size-aware adjustment: small boxes get their score times a factor, at most 1.

    Args:
        detections: COCO results.
        factors: (share, factor) pairs, smallest share first; the first whose share of the image's
            area is above the box's area counts. Report E's are ``[(0.01, 1.15), (0.05, 1.10)]``;
            none changes nothing.

    Raises:
        ValueError: the shares do not rise within (0, 1], or a factor is not above 0.
    """
    in_pairs = all(np.shape(pair) == (2,) for pair in factors)
    pairs = np.array(factors if in_pairs else [], float).reshape(-1, 2)
    shares, multipliers = pairs.T
    valid = (
        (np.diff(shares, prepend=0) > 0)
        & (shares <= 1)
        & (multipliers > 0)
        & (multipliers < math.inf)
    )
    if not in_pairs or not valid.all():
        allowed = "it must be pairs whose shares rise from above 0 to at most 1 and whose factors are above 0"
        raise ValueError(f"factors is {factors}; {allowed}, as in [(0.01, 1.15), (0.05, 1.10)]")
    adjusted = []
    for detection in detections:
        share_of_image = math.prod(detection["bbox"][2:]) / math.prod(
            detection["segmentation"]["size"]
        )
        factor = next((factor for share, factor in pairs.tolist() if share_of_image < share), 1)
        adjusted.append(
            detection
            if factor == 1
            else {**detection, "score": min(1.0, detection["score"] * factor)}
        )
    return adjusted


def apply_class_thresholds(
    detections: list[dict[str, Any]], score_thresholds: Mapping[int, float]
) -> list[dict[str, Any]]:
    """The detections that score at least their class's threshold.

    Args:
        detections: COCO results.
        score_thresholds: class id -> threshold in 0..1; 0 keeps the whole class.

    Raises:
        ValueError: a threshold is not in 0..1, or there are detections of a class without one.
    """
    for class_id, score_threshold in score_thresholds.items():
        _check_share(f"score_thresholds[{class_id}]", score_threshold)
    missing = sorted({detection["category_id"] for detection in detections} - set(score_thresholds))
    if missing:
        given = sorted(score_thresholds)
        raise ValueError(
            f"score_thresholds has nothing for class {missing[0]}, of which there are detections; it has {given}"
        )
    return [
        detection
        for detection in detections
        if detection["score"] >= score_thresholds[detection["category_id"]]
    ]


def open_masks(detections: list[dict[str, Any]], radius_px: float) -> list[dict[str, Any]]:
    """Masks without what is too narrow for a disk of ``radius_px`` (morphological opening; 0
    changes nothing).

    The disk holds the pixels at a distance of at most ``radius_px`` from its centre. Masks without
    room for one are dropped.

    Raises:
        ValueError: ``radius_px`` is below 0 or not finite.
    """
    _check_length("radius_px", radius_px)
    return _change_masks(
        detections,
        lambda stack: _dilate(_erode(stack, radius_px), radius_px),
        math.floor(radius_px),
    )


def close_masks(detections: list[dict[str, Any]], radius_px: float) -> list[dict[str, Any]]:
    """Masks with gaps and bays filled that no disk of ``radius_px`` enters (morphological closing;
    0 changes nothing).

    The disk is that of ``open_masks``. No mask loses a pixel.

    Raises:
        ValueError: ``radius_px`` is below 0 or not finite.
    """
    _check_length("radius_px", radius_px)
    return _change_masks(
        detections,
        lambda stack: _erode(_dilate(stack, radius_px), radius_px),
        math.floor(radius_px),
    )


def fill_holes(detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Masks with the background filled that they enclose: from which no path over pixels' sides
    leads out.
    """
    return _change_masks(detections, _fill)


def keep_largest_component(detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Masks cut down to their largest 8-connected component; of equal ones the leftmost stays."""
    return _change_masks(detections, _largest_components)


def smooth_masks(detections: list[dict[str, Any]], sigma_px: float) -> list[dict[str, Any]]:
    """Masks blurred by a Gaussian (0 outside, cut at 4 ``sigma_px``) and taken where that is at
    least 0.5.

    It rounds corners and removes what is narrow, so that small masks may vanish. A ``sigma_px`` of
    0 changes nothing.

    Raises:
        ValueError: ``sigma_px`` is below 0 or not finite.
    """
    _check_length("sigma_px", sigma_px)

    def smooth(stack: np.ndarray) -> np.ndarray:
        """scipy's ``gaussian_filter``, its oracle: a Gaussian is separable, so ``G_x mask G_y``,
        the filter of a unit matrix each.
        """
        along_x, along_y = (
            ndimage.gaussian_filter(np.eye(size), (sigma_px, 0), mode="constant")
            for size in stack.shape[1:]
        )
        return along_x @ stack @ along_y >= 0.5

    return _change_masks(detections, smooth)


def mask_nms(detections: list[dict[str, Any]], iou_threshold: float) -> list[dict[str, Any]]:
    """The detections without those that lie on a higher-scored one: non-maximum suppression by
    masks, across classes.

    Mask R-CNN's own is by boxes and within a class, so that it may leave one cell under two
    classes. From the highest score down (of equal scores the earlier first), a detection is dropped
    if its mask's IoU with one that is kept is above ``iou_threshold``. 0 keeps no two that overlap,
    1 keeps all.

    Raises:
        ValueError: ``iou_threshold`` is not in 0..1.
    """
    _check_share("iou_threshold", iou_threshold)
    kept = []
    for rows in _rows_by_image(detections):
        kept_here = []
        for first in range(0, len(rows), MASKS_PER_BATCH):
            batch = rows[first : first + MASKS_PER_BATCH]
            too_near = _mask_iou(detections, batch, kept_here + batch) > iou_threshold
            free = ~too_near[:, : len(kept_here)].any(axis=1)
            for i, near in enumerate(too_near[:, len(kept_here) :]):
                if free[i]:
                    kept_here.append(batch[i])
                    free &= ~near
        kept += kept_here
    return [detections[row] for row in sorted(kept)]


def resolve_overlaps(
    detections: list[dict[str, Any]], min_visible_share: float
) -> list[dict[str, Any]]:
    """Each pixel to one cell: the masks of an image are disjoint afterwards, across classes too.

    From the highest score down (of equal scores the earlier first), a cell gets the pixels of its
    mask that no cell before it has, of them the largest 8-connected component (of equal ones the
    leftmost). If that is less than ``min_visible_share`` of its mask, it is dropped; its pixels and
    cut off fragments are free for lower scores.

    Raises:
        ValueError: ``min_visible_share`` is not in 0..1.
    """
    _check_share("min_visible_share", min_visible_share)
    results = list(detections)
    for rows in _rows_by_image(detections):
        taken = np.zeros(detections[rows[0]]["segmentation"]["size"], bool, order="F")
        changed = {}
        for row, (mask, x0, y0) in zip(
            rows, decode_in_boxes([detections[row]["segmentation"] for row in rows]), strict=True
        ):
            place = taken[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
            visible = mask & ~place
            area_px, visible_px = np.count_nonzero(mask), np.count_nonzero(visible)
            if 0 < visible_px < area_px:
                visible = _largest_components(visible.T[None])[0].T
                visible &= np.count_nonzero(visible) / area_px >= min_visible_share
            if visible_px < max(area_px, 1):
                changed[row] = visible, x0, y0
            place |= visible
        _replace_masks(results, changed)
    return [result for result in results if result is not None]


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be at least 0 and at most 1")


def _check_length(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be a finite number of pixels, at least 0")


def _rows_by_image(detections: list[dict[str, Any]]) -> list[list[int]]:
    """Each image's rows by descending score."""
    rows = defaultdict(list)
    for row in np.argsort(
        [-detection["score"] for detection in detections], kind="stable"
    ).tolist():
        rows[detections[row]["image_id"]].append(row)
    return list(rows.values())


def _mask_iou(detections: list[dict[str, Any]], rows: list[int], others: list[int]) -> np.ndarray:
    """float64 [rows, others]."""
    masks, other_masks = (
        [detections[row]["segmentation"] for row in part] for part in (rows, others)
    )
    return coco_mask.iou(masks, other_masks, [0] * len(others))


def _change_masks(
    detections: list[dict[str, Any]], change: Callable[[np.ndarray], np.ndarray], margin_px: int = 0
) -> list[dict[str, Any]]:
    """Detections with changed masks.

    Args:
        detections: COCO results.
        change: bool [N, w, h] -> bool [N, w, h]: N masks, each transposed in a plane of its own
            with at least ``margin_px`` and 1 px of background on every side. What it makes of the
            margin is ignored.
        margin_px: what ``change`` needs.
    """
    margin_px = max(margin_px, 1)
    results = list(detections)
    for first in range(0, len(detections), MASKS_PER_BATCH):
        masks = decode_in_boxes(
            [detection["segmentation"] for detection in detections[first : first + MASKS_PER_BATCH]]
        )
        changed = {first + i: masks[i] for i in range(len(masks)) if not masks[i][0].size}
        for rows, stack in _stack_masks(masks, margin_px):
            inside = (slice(None), slice(margin_px, -margin_px), slice(margin_px, -margin_px))
            before, after = stack[inside], change(stack)[inside]
            for i in np.flatnonzero((before != after).any(axis=(1, 2))).tolist():
                mask, x0, y0 = masks[rows[i]]
                changed[first + rows[i]] = after[i, : mask.shape[1], : mask.shape[0]].T, x0, y0
        _replace_masks(results, changed)
    return [result for result in results if result is not None]


def _stack_masks(
    masks: list[tuple[np.ndarray, int, int]], margin_px: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Rows of masks of like size, and their stack as ``change`` of ``_change_masks`` takes it;
    empty masks are left out.
    """
    shapes = np.array([mask.T.shape for mask, _, _ in masks])
    planes = -(-shapes // STACK_STEP_PX) * STACK_STEP_PX + 2 * margin_px
    for width, height in np.unique(planes[shapes.all(axis=1)], axis=0).tolist():
        alike = np.flatnonzero((planes == (width, height)).all(axis=1)).tolist()
        step = max(1, PIXELS_PER_STACK // (width * height))
        for rows in (alike[first : first + step] for first in range(0, len(alike), step)):
            stack = np.zeros((len(rows), width, height), bool)
            for plane, row in zip(stack, rows, strict=True):
                mask = masks[row][0].T
                plane[
                    margin_px : margin_px + mask.shape[0], margin_px : margin_px + mask.shape[1]
                ] = mask
            yield rows, stack


def _replace_masks(
    results: list[dict[str, Any] | None], masks: dict[int, tuple[np.ndarray, int, int]]
) -> None:
    """Puts new results with these masks at their rows of ``results``, None where a mask is empty."""
    rles = encode_box_masks(
        list(masks.values()), [results[row]["segmentation"]["size"] for row in masks]
    )
    boxes = coco_mask.toBbox(rles).tolist() if rles else []
    for row, rle, box in zip(masks, rles, boxes, strict=True):
        results[row] = {**results[row], "bbox": box, "segmentation": rle} if box[2] else None


def _dilate(stack: np.ndarray, radius_px: float) -> np.ndarray:
    return _combine_in_disk(stack, radius_px, np.logical_or)


def _erode(stack: np.ndarray, radius_px: float) -> np.ndarray:
    return _combine_in_disk(stack, radius_px, np.logical_and)


def _combine_in_disk(stack: np.ndarray, radius_px: float, combine: np.ufunc) -> np.ndarray:
    """Each pixel combined with those at a distance of at most ``radius_px``; in a margin also with
    those of other rows.

    Dilation is the union of the mask shifted by every offset of a disk, erosion the intersection
    (Serra, Image Analysis and Mathematical Morphology, 1982); a shift by (dx, dy) is one by ``dx h
    + dy`` in the line of all pixels. The oracles are skimage's ``closing`` and ``opening`` of each
    mask (``tests/test_postprocess.py``).
    """
    reach = math.floor(radius_px)
    offsets = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    dx, dy = offsets[:, (offsets**2).sum(axis=0) <= radius_px**2]
    shifts = dx * stack.shape[2] + dy
    pixels, combined = stack.ravel(), stack.flatten()
    for shift in shifts[shifts > 0].tolist():
        combine(combined[shift:], pixels[:-shift], out=combined[shift:])
        combine(combined[:-shift], pixels[shift:], out=combined[:-shift])
    return combined.reshape(stack.shape)


def _fill(stack: np.ndarray) -> np.ndarray:
    """scipy's ``binary_fill_holes`` of each plane, its oracle: what is not connected with the
    outside is filled.
    """
    background, _ = ndimage.label(~stack.reshape(-1, stack.shape[2]))
    return (
        background.reshape(stack.shape) != 1
    )  # the margins join all planes' outsides to one component, the first


def _largest_components(stack: np.ndarray) -> np.ndarray:
    """Of each plane, none of which is empty; of more than one plane the margins are needed. Oracle:
    ``measure.label``, mask by mask.
    """
    components = connected_components(stack.reshape(-1, stack.shape[2])).reshape(stack.shape)
    areas_px = np.bincount(components.ravel())
    if len(areas_px) == len(stack) + 1:
        return stack
    areas_px[0] = 0
    plane = np.searchsorted(
        components.max(axis=(1, 2)), np.arange(len(areas_px))
    )  # ids rise from plane to plane
    largest_last = np.argsort(-areas_px, kind="stable")[::-1]
    largest = np.zeros(len(stack), int)
    largest[plane[largest_last]] = largest_last
    return (components != 0) & (components == largest[:, None, None])
