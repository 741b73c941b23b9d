"""Label maps and instances: boxes, areas, border contact, run-length encoding. numpy, scipy and pycocotools, no torch."""

from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage

CLASS_NAMES = ("epithelial", "lymphocyte", "neutrophil", "macrophage")  # class_id k is CLASS_NAMES[k - 1]


class Instances(NamedTuple):
    """The N instances of one image, ordered by class, then id.

    Attributes:
        boxes: float32 [N, 4], x1, y1, x2, y2 px; x2 and y2 are one past the last pixel.
        labels: int64 [N], class ids 1..K.
        ids: int32 [N], the instance's value in its class's label map.
        area_px: int64 [N], pixels of the mask.
        touches_border: bool [N], the box reaches an edge of the image.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    area_px: np.ndarray
    touches_border: np.ndarray


def find_instances(label_maps: np.ndarray) -> Instances:
    """The instances of K label maps (int [K, H, W], 0 = background)."""
    height, width = label_maps.shape[1:]
    rows = [
        (x.start, y.start, x.stop, y.stop, class_id, instance_id)
        for class_id, label_map in enumerate(label_maps, 1)
        for instance_id, (y, x) in _places(label_map)
    ]
    table = np.array(rows, np.int64).reshape(-1, 6)
    boxes, labels, ids = table[:, :4], table[:, 4], table[:, 5]
    areas_px = [np.bincount(label_map.ravel())[ids[labels == k]] for k, label_map in enumerate(label_maps, 1)]
    return Instances(
        boxes=boxes.astype(np.float32),
        labels=labels,
        ids=ids.astype(np.int32),
        area_px=np.concatenate(areas_px).astype(np.int64),
        touches_border=(boxes[:, :2] == 0).any(1) | (boxes[:, 2] == width) | (boxes[:, 3] == height),
    )


def _places(label_map: np.ndarray) -> list[tuple[int, tuple[slice, slice]]]:
    return [(instance_id, place) for instance_id, place in enumerate(ndimage.find_objects(label_map), 1) if place]


def connected_components(label_map: np.ndarray) -> np.ndarray:
    """8-connected components of ``label_map != 0`` (any ids) as int32 [H, W], numbered from 1 row by row."""
    return ndimage.label(label_map != 0, structure=np.ones((3, 3)), output=np.int32)[0]


def drop_small_instances(label_maps: np.ndarray, min_instance_area_px: int) -> np.ndarray:
    """Label maps (int [K, H, W]) without the instances of fewer than ``min_instance_area_px`` pixels; 0 or 1 keeps all."""
    if min_instance_area_px <= 1:
        return label_maps
    kept = np.empty_like(label_maps)
    for label_map, output in zip(label_maps, kept, strict=True):
        ids = np.arange(int(label_map.max(initial=0)) + 1, dtype=label_map.dtype)
        ids[np.bincount(label_map.ravel(), minlength=len(ids)) < min_instance_area_px] = 0
        output[...] = ids[label_map]
    return kept


def encode_box_mask(mask: np.ndarray, x0: int, y0: int, height: int, width: int) -> dict[str, Any]:
    """COCO run-length encoding of a mask that stands at (x0, y0) in an otherwise empty image.

    The work grows with the box, not with the image; the result equals ``pycocotools.mask.encode`` of the full image.

    Args:
        mask: bool [h, w], wholly inside the image.
        x0: column of the mask's left edge, px.
        y0: row of the mask's top edge, px.
        height: of the image, px.
        width: of the image, px.

    Returns:
        ``{"size": [height, width], "counts": str}``.

    Raises:
        ValueError: the mask reaches outside the image.
    """
    if x0 < 0 or y0 < 0 or y0 + mask.shape[0] > height or x0 + mask.shape[1] > width:
        box = f"a {mask.shape[0]} x {mask.shape[1]} px mask at x {x0}, y {y0}"
        raise ValueError(f"{box} reaches outside its {height} x {width} px image")
    steps = np.diff(np.pad(mask.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, ends = (((column + x0) * height + row + y0) for column, row in (np.nonzero(steps == 1), np.nonzero(steps == -1)))
    joins = starts[1:] == ends[:-1]  # a run to the bottom of a column goes on at the top of the next
    starts, ends = starts[np.append(True, ~joins)[: len(starts)]], ends[np.append(~joins, True)[: len(ends)]]
    edges = np.column_stack([starts, ends]).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)
    if len(edges) and edges[-1] == height * width:
        counts = counts[:-1]
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [int(height), int(width)], "counts": rle["counts"].decode("ascii")}


def encode_instances(label_maps: np.ndarray, instances: Instances) -> list[dict[str, Any]]:
    """The RLE of each of ``instances`` (as ``find_instances`` gives them) of ``label_maps`` (int [K, H, W])."""
    height, width = label_maps.shape[1:]
    rows = np.column_stack([instances.boxes.astype(np.int64), instances.labels, instances.ids]).tolist()
    return [
        encode_box_mask(label_maps[class_id - 1, y1:y2, x1:x2] == instance_id, x1, y1, height, width)
        for x1, y1, x2, y2, class_id, instance_id in rows
    ]


def decode_in_box(rle: dict[str, Any]) -> tuple[np.ndarray, int, int]:
    """The mask of an RLE inside its tight box; the full image is never made.

    Args:
        rle: ``{"size": [height, width], "counts": str or bytes}``.

    Returns:
        mask bool [h, w], x0, y0: the box's first column and row, px. An empty mask has shape (0, 0) and stands at 0, 0.
    """
    height = rle["size"][0]
    edges = np.cumsum(_run_lengths(rle["counts"]))
    starts, ends = edges[: len(edges) // 2 * 2 : 2], edges[1::2]
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not len(starts):
        return np.zeros((0, 0), bool), 0, 0
    (x_first, y_first), (x_last, y_last) = np.divmod(starts, height), np.divmod(ends - 1, height)
    spans_columns = (x_first != x_last).any()
    x0, x1 = int(x_first[0]), int(x_last[-1])
    y0, y1 = (0, height - 1) if spans_columns else (int(y_first.min()), int(y_last.max()))
    box_height, box_width = y1 - y0 + 1, x1 - x0 + 1
    steps = np.zeros(box_height * box_width + 1, np.int8)
    steps[(x_first - x0) * box_height + y_first - y0] += 1
    steps[(x_last - x0) * box_height + y_last - y0 + 1] -= 1
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool).reshape(box_width, box_height).T, x0, y0


def _run_lengths(counts: str | bytes) -> np.ndarray:
    """Run lengths int64 of COCO's compressed counts.

    Each number is written in groups of 5 bits, lowest first, as characters from "0" on; 32 marks that more groups follow, 16
    in the last group that the number is negative. From the fourth on, a number is the difference to the run two before it
    (``rleToString`` of the COCO API's maskApi.c).
    """
    groups = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(groups < 32)
    first = np.append(0, last[:-1] + 1)
    shifts = 5 * (np.arange(len(groups)) - np.repeat(first, last - first + 1))
    numbers = np.add.reduceat((groups & 31) << shifts, first) if len(last) else np.zeros(0, np.int64)
    numbers -= ((groups[last] >> 4) & 1) << (shifts[last] + 5)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
