"""Prediction: an image to detections with run-length encoded masks, in one piece or in overlapping
tiles.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks
from torchvision.ops import clip_boxes_to_image
from tqdm import tqdm

from cellseg_helpers.cells import BoxMask, Cells
from cellseg_helpers.config import RunConfig, resolve_path
from cellseg_helpers.devices import accelerator_of, explaining_errors, make_fabric
from cellseg_helpers.model.backbones import read_weights
from cellseg_helpers.model.build import count_parameters, rebuild_model
from cellseg_helpers.runs import RunError, read_json

SAME_CELL_IOU = 0.5  # of two masks, in the region that both tiles see
TILES_PER_BATCH = 4


def predict(
    model: nn.Module,
    image: np.ndarray | Tensor,
    tile_size_px: int = 0,
    tile_overlap_px: int = 128,
    mask_threshold: float = 0.5,
    image_id: int = 1,
) -> Cells:
    """The cells that ``model`` finds in an image.

    Memory grows with the detections' boxes: no mask of the image's size is made. With tiles it is
    bounded by a few tiles and the detections. Cells whose mask has no pixel at
    ``mask_threshold`` are left out. How tiles become one image: ``merge_tiles``.

    Args:
        model: in evaluation mode it takes a list of float32 [3, H, W] images in 0..1 and gives a
            dict for each: boxes float32 [N, 4] px, labels int64 [N], scores float32 [N], masks
            float32 [N, 28, 28] in 0..1, inside the box. Its mode is the same afterwards.
        image: uint8 [3, H, W].
        tile_size_px: side of the square tiles; 0 = the whole image at once.
        tile_overlap_px: neighbouring tiles share at least this much. Best a little more than a
            large cell's diameter: a larger cell may have to be put together from pieces.
        mask_threshold: pixels of at least this probability belong to the cell (``>=``, as in
            detectron2 and in the documentation of torchvision's Mask R-CNN).

        image_id: of the cells.

    Returns:
        Cells by descending score; their boxes are the model's.

    Raises:
        ValueError: the image or a parameter is not as above.
    """
    image = (
        image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    )  # a cached image is read-only
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(
            f"predict takes a uint8 image of shape [3, H, W], not {image.dtype} {list(image.shape)}"
        )
    if not 0 < mask_threshold <= 1:
        raise ValueError(f"mask_threshold is {mask_threshold}; it must be above 0 and at most 1")
    if tile_size_px and not 0 < tile_overlap_px < tile_size_px:
        raise ValueError(
            f"tile_size_px is {tile_size_px} and tile_overlap_px {tile_overlap_px}; the overlap must be above 0 and below the "
            "tile's size (tile_size_px = 0 predicts the image in one piece)"
        )
    height, width = image.shape[1:]
    tiles = lay_tiles(height, width, tile_size_px, tile_overlap_px)
    found = merge_tiles(
        _detect(model, image, tiles, mask_threshold), tiles, height, width, tile_overlap_px
    )
    return replace(
        found[np.argsort(-found.scores, kind="stable")], image_ids=np.full(len(found), image_id)
    )


def predict_run(
    run_dir: str | Path, images: Sequence[np.ndarray], image_ids: Sequence[int] | None = None
) -> Cells:
    """The cells that a finished run finds in images, as its validation did: weights of the best
    epoch, same tiles and precision. A GPU is used if the machine has one.

    Args:
        run_dir: the run folder.
        images: uint8 [3, H, W], RGB.
        image_ids: one for each image; by default they count from 1.

    Raises:
        RunError: no such folder, no weights in it, or files of it that cannot be used.
        TrainingError: no memory left.
    """
    config = replace(_config_of(run_dir), accelerator="auto", devices=1)
    if config.precision == "16-mixed" and accelerator_of(config) == "cpu":
        config = replace(config, precision="32")
    path = resolve_path(run_dir) / "best.safetensors"
    if not path.exists():
        advice = "give a run folder that has them, or train one with notebooks/02_train.ipynb"
        raise RunError(f"run_dir {run_dir} has no weights (best.safetensors); {advice}")
    fabric = make_fabric(config)
    try:
        model = rebuild_model(config, read_weights(path)).to(fabric.device)
    except ValueError as error:
        raise RunError(f"run_dir {run_dir} cannot predict: {error}") from None
    tiling = (config.tile_size_px, config.tile_overlap_px, config.mask_threshold)
    numbered = zip(image_ids or range(1, len(images) + 1), images, strict=True)
    with explaining_errors(), fabric.autocast():
        return Cells.concatenate(
            predict(model, image, *tiling, image_id)
            for image_id, image in tqdm(numbered, "predicting", total=len(images), unit="image")
        )


def count_run_parameters(run_dir: str | Path) -> int:
    """Trainable parameters of a run, by its settings; its weights are not needed.

    Raises:
        RunError: no such folder, or a missing or damaged ``settings.json``.
    """
    with torch.device("meta"):
        return count_parameters(rebuild_model(_config_of(run_dir)))


def _config_of(run_dir: str | Path) -> RunConfig:
    try:
        return RunConfig.from_dict(read_json(resolve_path(run_dir) / "settings.json"))
    except FileNotFoundError:
        raise RunError(
            f"run_dir {run_dir} has no settings.json; give the folder of a run"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise RunError(
            f"run_dir {run_dir} has settings that cannot be used ({error}); give the folder of "
            "another run"
        ) from None


def paste_in_boxes(
    masks: Tensor, boxes: Tensor, height: int, width: int, mask_threshold: float = 0.5
) -> list[BoxMask]:
    """Binary masks of an image's detections, each in its own box.

    Pixel for pixel ``paste_masks_in_image(masks, boxes, (height, width)) >= mask_threshold`` of
    ``torchvision.models.detection.roi_heads`` (mask padded by one, box grown likewise and cut to
    integers, bilinear interpolation without aligned corners, clipped to the image), without the N
    images that it makes. A box outside the image gives an empty mask.

    Args:
        masks: float32 [N, M, M] on the CPU, probabilities inside the box.
        boxes: float32 [N, 4] on the CPU, x1, y1, x2, y2 px.
        height: of the image, px.
        width: of the image, px.
        mask_threshold: above 0; a pixel of this probability or more belongs to the mask.
    """
    padded, scale = expand_masks(masks[:, None], padding=1)
    corners = expand_boxes(boxes, scale).to(torch.int64).tolist()
    return [
        _paste(mask, *corner, height, width, mask_threshold)
        for mask, corner in zip(padded, corners, strict=True)
    ]


def _paste(
    mask: Tensor, x1: int, y1: int, x2: int, y2: int, height: int, width: int, mask_threshold: float
) -> BoxMask:
    top, bottom, left, right = max(y1, 0), min(y2 + 1, height), max(x1, 0), min(x2 + 1, width)
    if bottom <= top or right <= left:
        return BoxMask(np.zeros((0, 0), bool), 0, 0)
    size = (y2 - y1 + 1, x2 - x1 + 1)
    pasted = functional.interpolate(mask[None], size=size, mode="bilinear", align_corners=False)[
        0, 0
    ]
    return BoxMask(
        (pasted[top - y1 : bottom - y1, left - x1 : right - x1] >= mask_threshold).numpy(),
        left,
        top,
    )


def lay_tiles(height: int, width: int, tile_size_px: int, tile_overlap_px: int) -> np.ndarray:
    """Tiles of equal size that cover an image and share at least ``tile_overlap_px``: int64 [T, 4],
    x1, y1, x2, y2 px.

    An image side of at most ``tile_size_px`` is not cut; ``tile_size_px`` 0 cuts neither.
    """
    rows, columns = (_starts(length, tile_size_px, tile_overlap_px) for length in (height, width))
    tile_height, tile_width = (min(length, tile_size_px or length) for length in (height, width))
    return np.array([(x, y, x + tile_width, y + tile_height) for y in rows for x in columns])


def _starts(length: int, tile_size_px: int, tile_overlap_px: int) -> list[int]:
    if tile_size_px == 0 or length <= tile_size_px:
        return [0]
    gaps = -(-(length - tile_size_px) // (tile_size_px - tile_overlap_px))
    return [gap * (length - tile_size_px) // gaps for gap in range(gaps + 1)]


@torch.inference_mode()
def _detect(
    model: nn.Module, image: Tensor, tiles: np.ndarray, mask_threshold: float
) -> list[Cells]:
    """What the model finds in each tile, in the image's coordinates."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    found = []
    model.eval()
    try:
        for first in range(0, len(tiles), TILES_PER_BATCH):
            batch = tiles[first : first + TILES_PER_BATCH]
            outputs = model(
                [image[:, y1:y2, x1:x2].to(device).float() / 255 for x1, y1, x2, y2 in batch]
            )
            found += [
                _in_image(output, tile, image.shape[1:], mask_threshold)
                for output, tile in zip(outputs, batch, strict=True)
            ]
    finally:
        for module, training in modes.items():
            module.training = training
    return found


def _in_image(
    output: dict[str, Tensor], tile: np.ndarray, size: tuple[int, int], mask_threshold: float
) -> Cells:
    x1, y1, x2, y2 = tile.tolist()
    height, width = y2 - y1, x2 - x1
    boxes, labels, scores, masks = (
        output[name].cpu() for name in ("boxes", "labels", "scores", "masks")
    )
    boxes = boxes.float()
    placed = [
        BoxMask(mask, x + x1, y + y1)
        for mask, x, y in paste_in_boxes(masks.float(), boxes, height, width, mask_threshold)
    ]
    clipped = clip_boxes_to_image(boxes, (height, width)) + torch.tensor([x1, y1, x1, y1])
    scores = scores.float().numpy()
    found = Cells.of_image(*size, labels.numpy(), placed, scores, clipped.numpy())
    return found[np.array([mask.mask.any() for mask in placed], bool)]


def merge_tiles(
    found: list[Cells], tiles: np.ndarray, height: int, width: int, tile_overlap_px: int
) -> Cells:
    """One list of detections from those of overlapping tiles, each cell once.

    A detection's margin is the distance from its box to the nearest edge of its tile that is not an
    edge of the image; one with a margin under an eighth of the overlap counts as cut. Two
    detections of different tiles are the same cell where their masks have an IoU of
    ``SAME_CELL_IOU`` or more in the region that both tiles see, whatever their classes (there a
    cell has one outline, also when the rest of it is cut away). Then

    1. a cut detection goes where another tile has its place with a margin of a quarter of the
       overlap or more: that tile sees the place better, and its verdict counts, also if it is "no
       cell";
    2. of uncut detections of one cell the one with the largest margin stays: it has the most
       context (the one with the highest score would favour false detections at seams, which get two
       chances);
    3. a cut detection goes where it is the same cell as one that stays;
    4. cut detections of one cell, which no tile sees whole, become one: class and score of the
       highest-scored, the union of the masks, the box around the boxes.

    Cells of one tile never remove each other: that is the model's own non-maximum suppression.
    The oracle is the whole image at once, where each cell is whole in some tile
    (``tests/test_oracles.py``).

    Args:
        found: the detections of each tile, in the image's coordinates.
        tiles: int [T, 4], x1, y1, x2, y2 px.
        height: of the image, px.
        width: of the image, px.
        tile_overlap_px: the least overlap of neighbouring tiles.
    """
    if len(tiles) == 1:
        return found[0]
    cells = Cells.concatenate(found)
    tile_of = np.repeat(np.arange(len(tiles)), [len(part.masks) for part in found])
    rows_of = np.split(np.arange(len(tile_of)), np.searchsorted(tile_of, np.arange(1, len(tiles))))
    overlaps = np.argwhere(np.triu(_intersecting(tiles, tiles), k=1))
    margin = np.concatenate(
        [_margin(part.boxes, tile, height, width) for part, tile in zip(found, tiles, strict=True)]
    )
    cut = margin < tile_overlap_px / 8

    better_seen = np.zeros(len(margin), bool)
    for one, other in np.concatenate([overlaps, overlaps[:, ::-1]]):
        rows = rows_of[one][cut[rows_of[one]]]
        better_seen[rows] |= (
            _margin(cells.boxes[rows], tiles[other], height, width) >= tile_overlap_px / 4
        )

    rows_of = [rows[~better_seen[rows]] for rows in rows_of]
    extents = np.array([_extent(mask) for mask in cells.masks]).reshape(-1, 4)
    same_cell: list[set[int]] = [set() for _ in margin]
    for one, other in overlaps:
        region = _intersection(tiles[one], tiles[other])
        for a, b in _same_cell_pairs(cells.masks, extents, rows_of[one], rows_of[other], region):
            same_cell[a].add(b)
            same_cell[b].add(a)

    stays: set[int] = set()
    for row in np.lexsort([-cells.scores, -margin]).tolist():
        if not cut[row] and not stays & same_cell[row]:
            stays.add(row)
    pieces = {
        row for row in np.flatnonzero(cut & ~better_seen).tolist() if not stays & same_cell[row]
    }
    stitched = [_stitch(cells, group, tile_of) for group in _connected(pieces, same_cell)]
    return Cells.concatenate([cells[sorted(stays)], *stitched])


def _margin(boxes: np.ndarray, tile: np.ndarray, height: int, width: int) -> np.ndarray:
    """Distance [N] px of each box from the nearest edge of the tile that is not the image's;
    negative if the box crosses it.
    """
    inner = np.array([tile[0] > 0, tile[1] > 0, tile[2] < width, tile[3] < height])
    distances = np.concatenate([boxes[:, :2] - tile[:2], tile[2:] - boxes[:, 2:]], axis=1)
    return np.where(inner, distances, np.inf).min(axis=1)


def _intersection(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])],
        axis=-1,
    )


def _intersecting(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [N, M]: the boxes (int [N, 4] and [M, 4]) share at least one pixel."""
    common = _intersection(boxes[:, None], others[None])
    return (common[..., 2:] > common[..., :2]).all(axis=-1)


def _same_cell_pairs(
    masks: list[BoxMask],
    extents: np.ndarray,
    rows: np.ndarray,
    others: np.ndarray,
    region: np.ndarray,
) -> list[tuple[int, int]]:
    """The pairs of ``rows`` x ``others`` whose masks reach an IoU of ``SAME_CELL_IOU`` inside
    ``region``.
    """
    inside, other_inside = (
        _intersection(extents[rows], region),
        _intersection(extents[others], region),
    )
    pairs = []
    for i, j in np.argwhere(_intersecting(inside, other_inside)):
        a, b = int(rows[i]), int(others[j])
        common = _intersection(inside[i], other_inside[j])
        shared = np.count_nonzero(_crop(masks[a], common) & _crop(masks[b], common))
        united = (
            np.count_nonzero(_crop(masks[a], inside[i]))
            + np.count_nonzero(_crop(masks[b], other_inside[j]))
            - shared
        )
        if shared and shared >= SAME_CELL_IOU * united:
            pairs.append((a, b))
    return pairs


def _extent(mask: BoxMask) -> tuple[int, int, int, int]:
    return mask.x0, mask.y0, mask.x0 + mask.mask.shape[1], mask.y0 + mask.mask.shape[0]


def _crop(mask: BoxMask, window: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = window - np.array([mask.x0, mask.y0, mask.x0, mask.y0])
    return mask.mask[y1:y2, x1:x2]


def _connected(rows: set[int], neighbours: list[set[int]]) -> list[list[int]]:
    """The connected components of a graph, restricted to ``rows``."""
    components, rows = [], set(rows)
    for start in sorted(rows):
        component, reached = [], {start} & rows
        while reached:
            rows -= reached
            component += sorted(reached)
            reached = set().union(*(neighbours[row] for row in reached)) & rows
        if component:
            components.append(component)
    return components


def _stitch(cells: Cells, rows: list[int], tile_of: np.ndarray) -> Cells:
    """One detection from the pieces of a cell: from each tile its best piece of the class that has
    the highest score.
    """
    head = max(rows, key=lambda row: cells.scores[row])
    worst_first = sorted(
        rows, key=lambda row: (cells.labels[row] == cells.labels[head], cells.scores[row])
    )
    pieces = list({tile_of[row]: row for row in worst_first}.values())
    boxes = cells.boxes[pieces]
    extents = np.array([_extent(cells.masks[row]) for row in pieces])
    (x1, y1), (x2, y2) = extents[:, :2].min(axis=0), extents[:, 2:].max(axis=0)
    united = np.zeros((y2 - y1, x2 - x1), bool)
    for row, (left, top, right, bottom) in zip(pieces, extents - [x1, y1, x1, y1], strict=True):
        united[top:bottom, left:right] |= cells.masks[row].mask
    box = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    mask = BoxMask(united, int(x1), int(y1))
    return replace(cells[[head]], boxes=box[None], masks=[mask])
