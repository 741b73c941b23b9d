"""Label maps and the instances in them: boxes, areas, border contact. numpy and scipy, no torch."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from cellseg_helpers.cells import BoxMask, Cells


class Instances(NamedTuple):
    """The N instances of one image, ordered by class, then id.

    Attributes:
        boxes: float32 [N, 4], x1, y1, x2, y2 px; x2 and y2 are one past the last pixel.
        labels: int64 [N], class ids 1..K.
        ids: int32 [N], the instance's value in its class's label map.
        area_px: int64 [N], pixels of the mask.
        touches_border: bool [N], whether the box reaches an edge of the image.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    area_px: np.ndarray
    touches_border: np.ndarray


def find_boxes(label_maps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``boxes``, ``labels`` and ``ids`` of ``find_instances``.

    One pass of scipy's ``find_objects`` over each map. The tests compare it with torchvision's
    ``masks_to_boxes`` of one mask per id (whose boxes end 1 px earlier).
    """
    rows = []
    for class_id, label_map in enumerate(label_maps, 1):
        for instance_id, slices in enumerate(ndimage.find_objects(label_map), 1):
            if slices:  # None: no pixel has this id
                y, x = slices
                rows.append((x.start, y.start, x.stop, y.stop, class_id, instance_id))
    table = np.array(rows, np.int64).reshape(-1, 6)
    return table[:, :4].astype(np.float32), table[:, 4], table[:, 5].astype(np.int32)


def find_instances(label_maps: np.ndarray) -> Instances:
    """The instances of K label maps (int [K, H, W], 0 = background).

    >>> find_instances(np.array([[[0, 7, 7], [0, 7, 0]]])).boxes.tolist()
    [[1.0, 0.0, 3.0, 2.0]]
    """
    height, width = label_maps.shape[1:]
    boxes, labels, ids = find_boxes(label_maps)
    areas_by_id = [np.bincount(label_map.ravel()) for label_map in label_maps]
    areas_px = np.concatenate([areas[ids[labels == k]] for k, areas in enumerate(areas_by_id, 1)])
    at_border = (boxes[:, :2] == 0).any(1) | (boxes[:, 2:] == (width, height)).any(1)
    return Instances(boxes, labels, ids, areas_px.astype(np.int64), at_border)


def find_cells(label_maps: np.ndarray, image_id: int = 1) -> Cells:
    """The instances of K label maps (int [K, H, W]) as ``Cells``, ordered by class, then id."""
    boxes, labels, ids = find_boxes(label_maps)
    rows = np.column_stack([labels - 1, ids, boxes.astype(np.int64)]).tolist()
    masks = [BoxMask(label_maps[k, y1:y2, x1:x2] == i, x1, y1) for k, i, x1, y1, x2, y2 in rows]
    return Cells.of_image(*label_maps.shape[1:], labels, masks, boxes=boxes, image_id=image_id)


def connected_components(label_map: np.ndarray) -> np.ndarray:
    """8-connected components of ``label_map != 0``: int32 [H, W], numbered from 1 row by row."""
    return ndimage.label(label_map != 0, structure=np.ones((3, 3)), output=np.int32)[0]


def drop_small_instances(label_maps: np.ndarray, min_instance_area_px: int) -> np.ndarray:
    """Label maps (int [K, H, W]) with instances under ``min_instance_area_px`` pixels removed."""
    if min_instance_area_px <= 1:
        return label_maps
    remaining = label_maps.copy()
    for label_map in remaining:
        is_small = np.bincount(label_map.ravel()) < min_instance_area_px  # by id
        label_map[is_small[label_map]] = 0
    return remaining
