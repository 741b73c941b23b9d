"""Outlines of masks along their pixels' edges, as polygons with holes. numpy and scipy."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy import ndimage

MASKS_PER_STRIP = 200

Ring = list[tuple[int, int]]
Polygon = list[Ring]


def pixel_outlines(masks: Sequence[tuple[np.ndarray, int, int]]) -> list[list[Polygon]]:
    """The polygons of each mask: one for each 4-connected piece, none for an empty mask.

    Args:
        masks: mask (bool [h, w]), x0, y0 of each, as ``decode_in_boxes`` gives them.

    Returns:
        Of each mask its polygons, of each polygon its rings, the outer one first, then its holes;
        of each ring the corners (x, y) in px, the first one again at the end. Pixel (0, 0) covers 0
        to 1. Outer rings have a positive area (by the shoelace formula), holes a negative one. No
        ring touches itself, and two touch at single points only.
    """
    polygons: list[list[Polygon]] = []
    for first in range(0, len(masks), MASKS_PER_STRIP):
        polygons += _outline(masks[first : first + MASKS_PER_STRIP])
    return polygons


def _outline(masks: Sequence[tuple[np.ndarray, int, int]]) -> list[list[Polygon]]:
    """The masks stand side by side in a strip, with background between them. A ring is made of
    turns: corners of pixels where it changes from along a row to along a column or back. In a row
    (or column) of corners, turns 1 and 2, 3 and 4 .. are the ends of a straight piece, so that each
    turn has one successor. The cell is always on the same side of its ring.
    """
    lefts = np.cumsum([1] + [mask.shape[1] + 1 for mask, _, _ in masks])
    strip = np.zeros((max(mask.shape[0] for mask, _, _ in masks) + 2, lefts[-1]), bool)
    for (mask, _, _), left in zip(masks, lefts.tolist(), strict=False):
        strip[1 : 1 + mask.shape[0], left : left + mask.shape[1]] = mask
    pieces = ndimage.label(strip)[0]  # 4-connected

    rows, columns = strip.shape[0] - 1, strip.shape[1] - 1
    turns = []
    for south, east in product((0, 1), repeat=2):
        around = [(south, east), (south, 1 - east), (1 - south, east), (1 - south, 1 - east)]
        pixel, beside, below, opposite = (strip[y : y + rows, x : x + columns] for y, x in around)
        y, x = np.nonzero((pixel != beside) & (pixel != below) & (pixel | opposite))
        inside = pixel[y, x]
        piece = pieces[y + south, x + np.where(inside, east, 1 - east)]
        turns.append(
            np.stack(
                [
                    y,
                    x,
                    np.full_like(y, south),
                    np.full_like(y, east),
                    inside ^ (south != east),
                    piece,
                ]
            )
        )
    y, x, south, east, leaves_along_row, piece = np.concatenate(turns, axis=1)
    ends = [np.lexsort([east, x, y]).reshape(-1, 2), np.lexsort([south, y, x]).reshape(-1, 2)]
    along_row, along_column = (np.empty(len(y), int), np.empty(len(y), int))
    for successor, pairs in zip((along_row, along_column), ends, strict=True):
        successor[pairs] = pairs[:, ::-1]
    successor = np.where(leaves_along_row, along_row, along_column).tolist()

    owner = np.searchsorted(lefts - 1, x, side="right") - 1
    offsets = np.array(
        [(x0 - left + 1, y0) for (_, x0, y0), left in zip(masks, lefts.tolist(), strict=False)]
    )
    points = list(
        zip((x + offsets[owner, 0]).tolist(), (y + offsets[owner, 1]).tolist(), strict=True)
    )
    rings_of: dict[tuple[int, int], list[Ring]] = defaultdict(list)
    left_over = bytearray(b"\1" * len(points))
    for start, key in enumerate(zip(owner.tolist(), piece.tolist(), strict=True)):
        ring, turn = [], start
        while left_over[turn]:
            left_over[turn] = 0
            ring.append(points[turn])
            turn = successor[turn]
        if ring:
            rings_of[key] += _split(ring)
    polygons: list[list[Polygon]] = [[] for _ in masks]
    for (row, _), rings in sorted(rings_of.items()):
        rings.sort(key=min)  # the outer one reaches farthest to the left
        polygons[row].append([[*ring, ring[0]] for ring in rings])
    return polygons


def _split(ring: Ring) -> list[Ring]:
    """The rings that meet where one comes back to a point."""
    if len(set(ring)) == len(ring):
        return [ring]
    path, rings = [], []
    for point in ring:
        if point in path:
            first = path.index(point)
            rings.append(path[first:])
            del path[first:]
        path.append(point)
    return [*rings, path]
