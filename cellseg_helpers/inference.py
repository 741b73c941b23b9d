"""Prediction: the cells of an image, found in the whole image at once or in overlapping tiles."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
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
from cellseg_helpers.model.views import with_views
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
    """The cells that ``model`` finds in an image, by descending score; their boxes are the model's.

    Memory grows with the detections' boxes: no mask of the image's size is made. With tiles it is
    bounded by a few tiles and the detections. Detections whose mask has no pixel at
    ``mask_threshold`` are left out. ``merge_tiles`` says how tiles become one image.

    Args:
        model: in evaluation mode it takes a list of float32 [3, H, W] images in 0..1 and gives a
            dict for each: boxes float32 [N, 4] px, labels int64 [N], scores float32 [N], masks
            float32 [N, 28, 28] in 0..1, inside the box. Its mode is the same afterwards. If it has
            a ``mask_geometry``, masks become pixels as that says, else as in torchvision.
        image: uint8 [3, H, W].
        tile_size_px: side of the square tiles; 0 = the whole image at once.
        tile_overlap_px: neighbouring tiles share at least this much. Best a little more than a
            large cell's diameter: a larger cell may have to be put together from pieces.
        mask_threshold: pixels of at least this probability belong to the cell (``>=``, as in
            detectron2 and in the documentation of torchvision's Mask R-CNN).
        image_id: of the cells.

    Raises:
        ValueError: the image or a parameter is not as above.
    """
    if not isinstance(image, Tensor):
        image = torch.from_numpy(np.array(image))  # a copy: a cached image is read-only
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(
            f"predict takes a uint8 image of shape [3, H, W], not {image.dtype} {list(image.shape)}"
        )
    if not 0 < mask_threshold <= 1:
        raise ValueError(f"mask_threshold is {mask_threshold}; it must be above 0 and at most 1")
    if tile_size_px and not 0 < tile_overlap_px < tile_size_px:
        raise ValueError(
            f"tile_size_px is {tile_size_px} and tile_overlap_px {tile_overlap_px}; the overlap "
            "must be above 0 and below the tile's size (tile_size_px = 0 predicts the image in one "
            "piece)"
        )
    height, width = image.shape[1:]
    tiles = lay_tiles(height, width, tile_size_px, tile_overlap_px)
    found = _predict_tiles(model, image, tiles, mask_threshold)
    cells = merge_tiles(found, tiles, height, width, tile_overlap_px)
    cells = cells[np.argsort(-cells.scores, kind="stable")]
    return replace(cells, image_ids=np.full(len(cells), image_id))


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
        model = with_views(model, config)
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
    masks: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    mask_threshold: float = 0.5,
    mask_geometry: str = "torchvision",
) -> list[BoxMask]:
    """Binary masks of an image's detections, each in its own box.

    ``exact``: a pixel takes the mask's value at the pixel's centre, by bilinear interpolation with
    zeros outside the box, as in detectron2's ``paste_masks_in_image``. With bins of the box as the
    unit, pixel i lies at ``(i + 1/2 - x1) / (x2 - x1) * M``, bin b at ``b + 1/2``.

    ``torchvision``: pixel for pixel ``paste_masks_in_image`` of its ``roi_heads`` (mask padded by
    one, box grown likewise and cut to integers, bilinear interpolation without aligned corners).
    Both clip to the image and make no mask of its size. A box outside the image gives an empty one.

    Args:
        masks: float32 [N, M, M] on the CPU, probabilities inside the box.
        boxes: float32 [N, 4] on the CPU, x1, y1, x2, y2 px.
        height: of the image, px.
        width: of the image, px.
        mask_threshold: above 0; a pixel of this probability or more belongs to the mask.
        mask_geometry: exact or torchvision.
    """
    if mask_geometry == "exact":
        return [
            _paste_exactly(mask, box, height, width, mask_threshold)
            for mask, box in zip(masks, boxes, strict=True)
        ]
    padded, scale = expand_masks(masks[:, None], padding=1)
    pasted = []
    for mask, corners in zip(padded, expand_boxes(boxes, scale).to(torch.int64), strict=True):
        x1, y1, x2, y2 = corners.tolist()
        top, bottom, left, right = max(y1, 0), min(y2 + 1, height), max(x1, 0), min(x2 + 1, width)
        if bottom <= top or right <= left:
            pasted.append(BoxMask(np.zeros((0, 0), bool), 0, 0))
            continue
        size = (y2 - y1 + 1, x2 - x1 + 1)
        grown = functional.interpolate(mask[None], size, mode="bilinear", align_corners=False)
        inside = grown[0, 0, top - y1 : bottom - y1, left - x1 : right - x1] >= mask_threshold
        pasted.append(BoxMask.around(inside.numpy(), left, top))
    return pasted


def _paste_exactly(
    mask: Tensor, box: Tensor, height: int, width: int, mask_threshold: float
) -> BoxMask:
    firsts, weights, bins = [], [], torch.arange(len(mask)) + 0.5
    for start, end, length in zip(box[:2], box[2:], (width, height), strict=True):
        half_bin = (end - start) / len(mask) / 2
        first = int((start - half_bin).floor().clamp(0, length))
        last = int((end + half_bin).ceil().clamp(first, length))
        pixels = (torch.arange(first, last) + 0.5 - start) / (end - start) * len(mask)
        weights.append((1 - (pixels[:, None] - bins).abs()).clamp(min=0))
        firsts.append(first)
    inside = weights[1] @ mask @ weights[0].T >= mask_threshold
    return BoxMask.around(inside.numpy(), *firsts)


def lay_tiles(height: int, width: int, tile_size_px: int, tile_overlap_px: int) -> np.ndarray:
    """Tiles of equal size that cover an image and share at least ``tile_overlap_px``: int64 [T, 4],
    x1, y1, x2, y2 px.

    An image side of at most ``tile_size_px`` is not cut; ``tile_size_px`` 0 cuts neither.

    >>> lay_tiles(100, 160, tile_size_px=100, tile_overlap_px=40).tolist()
    [[0, 0, 100, 100], [60, 0, 160, 100]]
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
def _predict_tiles(
    model: nn.Module, image: Tensor, tiles: np.ndarray, mask_threshold: float
) -> list[Cells]:
    """What the model finds in each tile, in the image's coordinates."""
    pasting = mask_threshold, getattr(model, "mask_geometry", "torchvision")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    found = []
    model.eval()
    try:
        for first in range(0, len(tiles), TILES_PER_BATCH):
            batch = tiles[first : first + TILES_PER_BATCH].tolist()
            views = [image[:, y1:y2, x1:x2].to(device).float() / 255 for x1, y1, x2, y2 in batch]
            found += [
                _in_image(output, tile, image.shape[1:], pasting)
                for output, tile in zip(model(views), batch, strict=True)
            ]
    finally:
        for module, training in modes.items():
            module.training = training
    return found


def _in_image(
    output: dict[str, Tensor], tile: list[int], size: tuple[int, int], pasting: tuple[float, str]
) -> Cells:
    """A tile's detections as cells of the image, of ``size``; empty masks are left out."""
    x1, y1, x2, y2 = tile
    height, width = y2 - y1, x2 - x1
    names = ("boxes", "labels", "scores", "masks")
    boxes, labels, scores, masks = (output[name].cpu() for name in names)
    boxes, scores = boxes.float(), scores.float().numpy()
    pasted = paste_in_boxes(masks.float(), boxes, height, width, *pasting)
    placed = [BoxMask(mask, x + x1, y + y1) for mask, x, y in pasted]
    boxes = clip_boxes_to_image(boxes, (height, width)) + torch.tensor([x1, y1, x1, y1])
    cells = Cells.of_image(*size, labels.numpy(), placed, scores, boxes.numpy())
    return cells[np.array([mask.mask.size > 0 for mask in placed], bool)]


def merge_tiles(
    found: list[Cells], tiles: np.ndarray, height: int, width: int, tile_overlap_px: int
) -> Cells:
    """The cells of an image, each once, from those of overlapping tiles.

    A cell's margin is the distance from its box to the nearest edge of its tile that is not an edge
    of the image. A cell is cut if its margin is under an eighth of the overlap. Two cells of
    different tiles are the same if their masks have an IoU of ``SAME_CELL_IOU`` or more in the area
    that both tiles see, whatever their classes.

    How it works:
        1. Drop a cut cell whose box lies at least a quarter of the overlap inside another tile:
           that tile sees the whole area and decides, also if it found no cell.
        2. Of uncut cells that are the same, the one with the largest margin stays: its tile saw the
           most around it. The highest score would favour false detections, which have two chances
           where tiles overlap.
        3. Drop a cut cell that is the same as one that stays.
        4. Join the other cut cells that are the same, which no tile sees whole: class and score of
           the highest-scored one, the union of their masks, the box around their boxes.

    Cells of one tile never remove each other: the model's own non-maximum suppression has done so.
    The oracle is the whole image at once, if each cell is whole in some tile
    (``tests/test_oracles.py``).

    Args:
        found: the cells of each tile, in the image's coordinates.
        tiles: int [T, 4], x1, y1, x2, y2 px.
        height: of the image, px.
        width: of the image, px.
        tile_overlap_px: the least overlap of neighbouring tiles.
    """
    if len(tiles) == 1:
        return found[0]
    cells = Cells.concatenate(found)
    tile_of = np.repeat(np.arange(len(tiles)), [len(part) for part in found])
    margin = _margin(cells.boxes, tiles[tile_of], height, width)
    cut = margin < tile_overlap_px / 8
    overlapping = np.argwhere(np.triu(_intersecting(tiles, tiles), k=1))

    better_seen = np.zeros(len(cells), bool)
    for one, other in np.concatenate([overlapping, overlapping[:, ::-1]]):
        rows = np.flatnonzero(cut & (tile_of == one))
        inside = _margin(cells.boxes[rows], tiles[[other]], height, width)
        better_seen[rows] |= inside >= tile_overlap_px / 4

    rows_of = [np.flatnonzero((tile_of == tile) & ~better_seen) for tile in range(len(tiles))]
    boxes, pairs = cells.mask_boxes, []
    for one, other in overlapping:
        area = _intersection(tiles[one], tiles[other])
        pairs += _same_cells(cells.masks, boxes, rows_of[one], rows_of[other], area)
    rows, others = np.array(pairs, np.int64).reshape(-1, 2).T
    ones = np.ones(len(pairs), bool)
    same = sparse.csr_array((ones, (rows, others)), shape=(len(cells), len(cells)))
    same = same + same.T

    stays = np.zeros(len(cells), bool)
    for row in np.lexsort([-cells.scores, -margin]):
        neighbours = same.indices[same.indptr[row] : same.indptr[row + 1]]
        stays[row] = not (cut[row] or stays[neighbours].any())
    pieces = np.flatnonzero(cut & ~better_seen & ~(same @ stays))
    count, group_of = sparse.csgraph.connected_components(same[pieces][:, pieces], directed=False)
    joined = [_join(cells, pieces[group_of == group], tile_of) for group in range(count)]
    return Cells.concatenate([cells[stays], *joined])


def _margin(boxes: np.ndarray, tiles: np.ndarray, height: int, width: int) -> np.ndarray:
    """Distance [N] px of boxes [N, 4] from the nearest edge of their tiles [N or 1, 4] that is not
    the image's; negative if the box crosses it.
    """
    is_inner = np.hstack([tiles[:, :2] > 0, tiles[:, 2:] < [width, height]])
    distances = np.hstack([boxes[:, :2] - tiles[:, :2], tiles[:, 2:] - boxes[:, 2:]])
    return np.where(is_inner, distances, np.inf).min(axis=1)


def _intersection(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    corners = (
        np.maximum(boxes[..., :2], others[..., :2]),
        np.minimum(boxes[..., 2:], others[..., 2:]),
    )
    return np.concatenate(corners, axis=-1)


def _intersecting(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [N, M]: the boxes (int [N, 4] and [M, 4]) share at least one pixel."""
    common = _intersection(boxes[:, None], others[None])
    return (common[..., 2:] > common[..., :2]).all(axis=-1)


def _same_cells(
    masks: list[BoxMask], boxes: np.ndarray, rows: np.ndarray, others: np.ndarray, area: np.ndarray
) -> list[tuple[int, int]]:
    """The pairs of ``rows`` x ``others`` with a mask IoU of ``SAME_CELL_IOU`` or more in ``area``
    (x1, y1, x2, y2 px).
    """
    inside, other_inside = _intersection(boxes[rows], area), _intersection(boxes[others], area)
    pairs = []
    for i, j in np.argwhere(_intersecting(inside, other_inside)):
        mask, other = masks[rows[i]], masks[others[j]]
        common = _intersection(inside[i], other_inside[j])
        shared = np.count_nonzero(_crop(mask, common) & _crop(other, common))
        sizes = [_crop(mask, inside[i]), _crop(other, other_inside[j])]
        united = sum(map(np.count_nonzero, sizes)) - shared
        if shared and shared >= SAME_CELL_IOU * united:
            pairs.append((rows[i], others[j]))
    return pairs


def _crop(mask: BoxMask, window: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = window - [mask.x0, mask.y0, mask.x0, mask.y0]
    return mask.mask[y1:y2, x1:x2]


def _join(cells: Cells, rows: np.ndarray, tile_of: np.ndarray) -> Cells:
    """One cell from its pieces, one from each tile: its highest-scored piece of the class
    of the highest-scored piece or, without one of that class, its highest-scored piece.
    """
    head = rows[np.argmax(cells.scores[rows])]
    best_last = rows[np.lexsort([cells.scores[rows], cells.labels[rows] == cells.labels[head]])]
    pieces = cells[list({tile_of[row]: row for row in best_last}.values())]
    (x1, y1), (x2, y2) = pieces.mask_boxes[:, :2].min(0), pieces.mask_boxes[:, 2:].max(0)
    united = np.zeros((y2 - y1, x2 - x1), bool)
    for mask, x, y in pieces.masks:
        united[y - y1 :, x - x1 :][: mask.shape[0], : mask.shape[1]] |= mask
    box = np.concatenate([pieces.boxes[:, :2].min(0), pieces.boxes[:, 2:].max(0)])
    mask = BoxMask(united, int(x1), int(y1))
    return replace(cells[[head]], boxes=box[None], masks=[mask])
