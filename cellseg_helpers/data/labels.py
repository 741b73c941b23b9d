"""Label maps and instances: boxes, areas, border contact, run-length encoding. numpy and scipy, no
torch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
        touches_border: bool [N], the box reaches an edge of the image.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    area_px: np.ndarray
    touches_border: np.ndarray


def find_boxes(label_maps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``boxes``, ``labels`` and ``ids`` of ``find_instances``.

    One pass of scipy's ``find_objects`` over each map. The oracle is a mask for each of
    ``np.unique``'s ids and torchvision's ``masks_to_boxes`` (which ends a box 1 px earlier).
    """
    rows = [
        (x.start, y.start, x.stop, y.stop, class_id, instance_id)
        for class_id, label_map in enumerate(label_maps, 1)
        for instance_id, (y, x) in _places(label_map)
    ]
    table = np.array(rows, np.int64).reshape(-1, 6)
    return table[:, :4].astype(np.float32), table[:, 4], table[:, 5].astype(np.int32)


def find_instances(label_maps: np.ndarray) -> Instances:
    """The instances of K label maps (int [K, H, W], 0 = background)."""
    height, width = label_maps.shape[1:]
    boxes, labels, ids = find_boxes(label_maps)
    areas_px = [
        np.bincount(label_map.ravel())[ids[labels == k]]
        for k, label_map in enumerate(label_maps, 1)
    ]
    return Instances(
        boxes=boxes,
        labels=labels,
        ids=ids,
        area_px=np.concatenate(areas_px).astype(np.int64),
        touches_border=(boxes[:, :2] == 0).any(1)
        | (boxes[:, 2] == width)
        | (boxes[:, 3] == height),
    )


def find_cells(label_maps: np.ndarray, image_id: int = 1) -> Cells:
    """The instances of K label maps (int [K, H, W], 0 = background) as ``Cells``, by class, then
    id.
    """
    boxes, labels, ids = find_boxes(label_maps)
    rows = np.column_stack([labels - 1, ids, boxes.astype(np.int64)]).tolist()
    masks = [BoxMask(label_maps[k, y1:y2, x1:x2] == i, x1, y1) for k, i, x1, y1, x2, y2 in rows]
    return Cells.of_image(*label_maps.shape[1:], labels, masks, boxes=boxes, image_id=image_id)


def _places(label_map: np.ndarray) -> list[tuple[int, tuple[slice, slice]]]:
    return [
        (instance_id, place)
        for instance_id, place in enumerate(ndimage.find_objects(label_map), 1)
        if place
    ]


def connected_components(label_map: np.ndarray) -> np.ndarray:
    """8-connected components of ``label_map != 0`` (any ids) as int32 [H, W], numbered from 1 row
    by row.
    """
    return ndimage.label(label_map != 0, structure=np.ones((3, 3)), output=np.int32)[0]


def drop_small_instances(label_maps: np.ndarray, min_instance_area_px: int) -> np.ndarray:
    """Label maps (int [K, H, W]) without the instances of fewer than ``min_instance_area_px``
    pixels; 0 or 1 keeps all.
    """
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

    The work grows with the box, not with the image; the result equals ``pycocotools.mask.encode``
    of the full image.

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
    return encode_box_masks([(mask, x0, y0)], [(height, width)])[0]


def encode_box_masks(
    masks: Sequence[tuple[np.ndarray, int, int]], sizes: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """``encode_box_mask`` of N masks, at once and so much faster than one by one; its oracle is
    pycocotools' ``encode`` of whole masks.

    The boxes lie one behind another in one line of pixels, column after column, in which a run
    starts and ends where two neighbours differ. Pixel i of a box h px high (h + 1 with the empty
    pixel that ends each column's runs) stands in the image, H px high, at ``(x0 + i div h) H + y0 +
    i mod h``, COCO's order of pixels (``rleEncode`` of the COCO API's maskApi.c).

    Args:
        masks: mask (bool [h, w]), x0, y0 of each, as ``decode_in_boxes`` gives them.
        sizes: height, width of each mask's image, px.

    Raises:
        ValueError: a mask reaches outside its image.
    """
    box_height, box_width, x0, y0 = (
        np.array([(*mask.shape, x0, y0) for mask, x0, y0 in masks], np.int64).reshape(-1, 4).T
    )
    height, width = np.array(sizes, np.int64).reshape(-1, 2).T
    outside = (x0 < 0) | (y0 < 0) | (y0 + box_height > height) | (x0 + box_width > width)
    if outside.any():
        row = outside.argmax()
        box = f"a {box_height[row]} x {box_width[row]} px mask at x {x0[row]}, y {y0[row]}"
        raise ValueError(f"{box} reaches outside its {height[row]} x {width[row]} px image")
    # One line of pixels, column after column. An empty pixel ends a run behind every column, unless
    # the run goes on at the top of the next: where the mask is as high as its image.
    pitch = box_height + (box_height < height)
    bounds = np.cumsum(np.append(1, box_width * pitch + 1))
    pixels = np.zeros(bounds[-1], bool)
    for (mask, _, _), first, step in zip(masks, bounds[:-1].tolist(), pitch.tolist(), strict=True):
        rows, columns = mask.shape
        pixels[first : first + columns * step].reshape(columns, step)[:, :rows] = mask.T
    changes = np.flatnonzero(np.diff(pixels)) + 1
    starts, run_lengths = changes[::2], changes[1::2] - changes[::2]
    runs = np.diff(np.searchsorted(starts, bounds))
    owner = np.repeat(np.arange(len(masks)), runs)
    column, row = np.divmod(starts - bounds[owner], pitch[owner])
    starts = (column + x0[owner]) * height[owner] + row + y0[owner]
    edges = np.insert(
        np.column_stack([starts, starts + run_lengths]).ravel(), 2 * np.cumsum(runs), height * width
    )
    counts = _write_counts(edges, 2 * runs + 1)
    return [
        {"size": [h, w], "counts": text}
        for h, w, text in zip(height.tolist(), width.tolist(), counts, strict=True)
    ]


def encode_instances(label_maps: np.ndarray, instances: Instances) -> list[dict[str, Any]]:
    """The RLE of each of ``instances`` (as ``find_instances`` gives them) of ``label_maps`` (int
    [K, H, W]).
    """
    height, width = label_maps.shape[1:]
    rows = np.column_stack(
        [instances.boxes.astype(np.int64), instances.labels, instances.ids]
    ).tolist()
    masks = [
        (label_maps[class_id - 1, y1:y2, x1:x2] == instance_id, x1, y1)
        for x1, y1, x2, y2, class_id, instance_id in rows
    ]
    return encode_box_masks(masks, [(height, width)] * len(masks))


def decode_in_box(rle: dict[str, Any]) -> tuple[np.ndarray, int, int]:
    """The mask of an RLE inside its tight box; the full image is never made.

    Args:
        rle: ``{"size": [height, width], "counts": str or bytes}``.

    Returns:
        mask bool [h, w], x0, y0: the box's first column and row, px. An empty mask has shape (0, 0)
        and stands at 0, 0.
    """
    return decode_in_boxes([rle])[0]


def decode_in_boxes(rles: Sequence[dict[str, Any]]) -> list[tuple[np.ndarray, int, int]]:
    """``decode_in_box`` of N RLEs, at once and so much faster than one by one; the masks are views
    of one buffer.

    A mask is the running sum of +1 at each run's first pixel and -1 behind its last (``rleDecode``
    of the COCO API's maskApi.c), over the pixels of its box alone: pixel p of an image H px high is
    in a box h px high at ``(p div H - x0) h + p mod H - y0``. The oracle is pycocotools' ``decode``
    of the whole image, cut to the box.
    """
    height = np.array([rle["size"][0] for rle in rles], np.int64)
    starts, ends, runs = _read_counts([rle["counts"] for rle in rles])
    x0, y0, box_width, box_height = _tight_boxes(starts, ends, runs, height).T
    bounds = np.append(0, np.cumsum(box_width * box_height))
    origin, pitch, image_height = np.repeat(
        [bounds[:-1] - x0 * box_height - y0, box_height, height], runs, axis=1
    )
    (x_first, y_first), (x_last, y_last) = (
        np.divmod(starts, image_height),
        np.divmod(ends - 1, image_height),
    )
    steps = np.zeros(bounds[-1] + 1, np.int8)
    steps[x_first * pitch + y_first + origin] += 1
    steps[x_last * pitch + y_last + origin + 1] -= 1
    pixels = np.cumsum(steps, dtype=np.int8).view(bool)
    boxes = np.column_stack([bounds[:-1], bounds[1:], box_width, box_height, x0, y0]).tolist()
    return [
        (pixels[start:end].reshape(columns, rows).T, x, y)
        for start, end, columns, rows, x, y in boxes
    ]


def mask_boxes(rles: Sequence[dict[str, Any]]) -> np.ndarray:
    """The tight boxes of N RLEs: int64 [N, 4], x, y, width, height, px; all 0 for an empty mask.
    Oracle: the decoded masks' extents.

    Runs go down the columns: a box's left and right are the columns of its first and last run, its
    top and bottom the extremes of all runs, of which one that reaches into the next column spans
    all rows.
    """
    starts, ends, runs = _read_counts([rle["counts"] for rle in rles])
    return _tight_boxes(starts, ends, runs, np.array([rle["size"][0] for rle in rles], np.int64))


def _tight_boxes(
    starts: np.ndarray, ends: np.ndarray, runs: np.ndarray, height: np.ndarray
) -> np.ndarray:
    """``mask_boxes`` from the runs, as ``_read_counts`` gives them, and the images' heights (int64
    [N]).
    """
    image_height = np.repeat(height, runs)
    (x_first, y_first), (x_last, y_last) = (
        np.divmod(starts, image_height),
        np.divmod(ends - 1, image_height),
    )
    spans_columns = x_first != x_last
    boxes = np.zeros((len(runs), 4), np.int64)
    full = runs > 0
    first = (np.cumsum(runs) - runs)[full]
    if len(first):
        left, top = x_first[first], np.minimum.reduceat(np.where(spans_columns, 0, y_first), first)
        right = x_last[first + runs[full] - 1] + 1
        bottom = np.maximum.reduceat(np.where(spans_columns, image_height - 1, y_last), first) + 1
        boxes[full] = np.column_stack([left, top, right - left, bottom - top])
    return boxes


# COCO's compressed counts: the lengths of a mask's runs, background and mask in turn, column after
# column. From the fourth on, a number is the difference to the one two before it. Each number is
# written in groups of 5 bits, lowest first, as characters from "0" on; 32 marks that more groups
# follow, 16 in the last group that the number is negative (``rleToString`` and ``rleFrString`` of
# the COCO API's maskApi.c).


def _write_counts(edges: np.ndarray, edge_counts: np.ndarray) -> list[str]:
    """The compressed counts of N masks.

    Args:
        edges: int64 [E], mask after mask: the first pixel of its first run, the one behind this
            run, .., the image's pixels.
        edge_counts: int64 [N], how many of them are each mask's.
    """
    last = np.cumsum(edge_counts) - 1
    first = last + 1 - edge_counts
    counts = np.diff(edges, prepend=0)
    counts[first] = edges[first]
    later = np.flatnonzero(np.arange(len(edges)) - np.repeat(first, edge_counts) > 2)
    numbers = counts.copy()
    numbers[later] -= counts[later - 2]
    lengths = 1 + np.searchsorted(
        16 << 5 * np.arange(12), np.where(numbers < 0, ~numbers, numbers), side="right"
    )
    lengths[last[counts[last] == 0]] = 0  # no background behind the last run: no number
    stops = np.cumsum(lengths)
    group = np.arange(lengths.sum()) - np.repeat(stops - lengths, lengths)
    more = group + 1 < np.repeat(lengths, lengths)
    characters = 48 + 32 * more + ((np.repeat(numbers, lengths) >> 5 * group) & 31)
    text = characters.astype(np.uint8).tobytes().decode("ascii")
    bounds = [0, *stops[last].tolist()]
    return [text[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]


def _read_counts(texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs of N masks from their compressed counts, without runs of no pixel.

    Returns:
        starts and ends, int64 [R]: first pixel of a run, one past its last, mask after mask; int64
        [N]: each mask's runs.
    """
    lengths, rows = run_lengths(texts)
    ends = _cumsum_within(lengths.sum(axis=1), rows)
    starts, full = ends - lengths[:, 1], lengths[:, 1] > 0
    return (
        starts[full],
        ends[full],
        np.bincount(np.repeat(np.arange(len(rows)), rows)[full], minlength=len(rows)),
    )


def run_lengths(texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of N masks' runs from their compressed counts, which are taken to be well-formed:
    COCO's ``rleFrString``, see above.

    Returns:
        int64 [R, 2]: background, then mask, px, row after row and mask after mask; int64 [N]: each
        mask's rows.
    """
    encoded = [text.encode("ascii") if isinstance(text, str) else text for text in texts]
    groups = np.frombuffer(b"".join(encoded), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(groups < 32)
    first = np.append(0, last + 1)[:-1]
    shifts = 5 * (np.arange(len(groups)) - np.repeat(first, last - first + 1))
    numbers = np.add.reduceat((groups & 31) << shifts, first) if len(last) else last
    numbers -= ((groups[last] >> 4) & 1) << (shifts[last] + 5)

    number_counts = np.diff(np.searchsorted(last, np.cumsum([0, *map(len, encoded)])))
    odd = (
        number_counts % 2 == 1
    )  # background ends the image: a run of no pixel behind it makes rows of background, mask
    rows = (number_counts + odd) // 2
    lengths = np.insert(numbers, np.cumsum(number_counts)[odd], 0).reshape(-1, 2)
    first_row, last_row = (np.cumsum(rows) - rows)[rows > 0], np.cumsum(rows)[odd] - 1
    background = lengths[first_row, 0]
    lengths[first_row, 0] = 0
    lengths = _cumsum_within(lengths, rows)
    lengths[first_row, 0] = background
    lengths[last_row, 1] = 0
    return lengths, rows


def _cumsum_within(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums down the rows of ``values`` (int64 [R, ..]) that begin anew with each mask (``counts``
    int64 [N], its rows).
    """
    sums = np.cumsum(values, axis=0)
    before = np.concatenate([np.zeros_like(values[:1]), sums])[np.cumsum(counts) - counts]
    return sums - np.repeat(before, counts, axis=0)
