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

SAME_CELL_IOU = 0.5  # least IoU of a cell's masks from two tiles, in the area of both
TILES_PER_BATCH = 4


def predict(
    model: nn.Module,
    image: np.ndarray | Tensor,
    tile_size_px: int = 0,
    tile_overlap_px: int = 128,
    mask_threshold: float = 0.5,
    image_id: int = 1,
) -> Cells:
    """The cells that ``model`` finds in an image, by descending score, with the boxes it predicts.

    No mask of the image's size is made: memory grows with the area of the detections' boxes. With
    tiles, the model needs memory only for a few tiles at once. Detections whose mask has no pixel
    at ``mask_threshold`` are left out. See ``merge_tiles`` for how the tiles' cells are combined.

    Args:
        model: in evaluation mode it takes a list of float32 [3, H, W] images in 0..1 and gives a
            dict for each: boxes float32 [N, 4] px, labels int64 [N], scores float32 [N], masks
            float32 [N, 28, 28] in 0..1, inside the box. Its mode is restored afterwards. Its
            attribute ``mask_geometry``, else "torchvision", is passed to ``paste_in_boxes``.
        image: uint8 [3, H, W].
        tile_size_px: side of the square tiles; 0 = the whole image at once.
        tile_overlap_px: neighbouring tiles share at least this much. Best a little more than a
            large cell's diameter: a still larger cell may have to be joined from pieces.
        mask_threshold: pixels of at least this probability belong to the cell (``>=``, as in
            detectron2 and in the documentation of torchvision's Mask R-CNN).
        image_id: given to all cells.

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
    cells_of_tiles = _predict_tiles(model, image, tiles, mask_threshold)
    cells = merge_tiles(cells_of_tiles, tiles, height, width, tile_overlap_px)
    cells = cells[np.argsort(-cells.scores, kind="stable")]
    return replace(cells, image_ids=np.full(len(cells), image_id))


def predict_run(
    run_dir: str | Path, images: Sequence[np.ndarray], image_ids: Sequence[int] | None = None
) -> Cells:
    """The cells that a finished run finds in images. As in its validation, the weights are those of
    the best epoch; tiles and precision are the same. A GPU is used if the machine has one.

    Args:
        run_dir: the run folder.
        images: uint8 [3, H, W], RGB.
        image_ids: one for each image; by default they count from 1.

    Raises:
        RunError: the folder does not exist, has no weights, or has files that cannot be used.
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
    """The number of trainable parameters of a run, by its settings; needs no weights.

    Raises:
        RunError: no such folder, or a missing or damaged ``settings.json``.
    """
    with torch.device("meta"):
        return count_parameters(rebuild_model(_config_of(run_dir)))


def _config_of(run_dir: str | Path) -> RunConfig:
    """A run's settings; a RunError if they cannot be read."""
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
    """Binary masks of an image's detections, each stored in its own box.

    ``exact``: a pixel has the mask's value at the pixel's centre, by bilinear interpolation with
    zeros outside the box, as in detectron2's ``paste_masks_in_image``. In units of mask bins, the
    centre of pixel i lies at ``(i + 1/2 - x1) / (x2 - x1) * M``, the centre of bin b at b + 1/2.

    ``torchvision``: the same pixels as from ``paste_masks_in_image`` of its ``roi_heads``, which
    pads the mask by one bin, enlarges the box in proportion, cuts its corners to integers and
    interpolates without aligned corners. A box outside the image gives an empty mask.

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
        resized = functional.interpolate(mask[None], size, mode="bilinear", align_corners=False)
        inside = resized[0, 0, top - y1 : bottom - y1, left - x1 : right - x1] >= mask_threshold
        pasted.append(BoxMask.around(inside.numpy(), left, top))
    return pasted


def _paste_exactly(
    mask: Tensor, box: Tensor, height: int, width: int, mask_threshold: float
) -> BoxMask:
    """One detection's mask by the geometry ``exact`` of ``paste_in_boxes``. Bilinear interpolation
    is separable: weights along y times mask times weights along x.
    """
    x0_y0, weights, bin_centres = [], [], torch.arange(len(mask)) + 0.5
    for box_start, box_end, side in zip(box[:2], box[2:], (width, height), strict=True):
        half_bin = (box_end - box_start) / len(mask) / 2
        first = int((box_start - half_bin).floor().clamp(0, side))
        last = int((box_end + half_bin).ceil().clamp(first, side))
        pixel_centres = torch.arange(first, last) + 0.5
        in_bins = (pixel_centres - box_start) / (box_end - box_start) * len(mask)
        weights.append((1 - (in_bins[:, None] - bin_centres).abs()).clamp(min=0))
        x0_y0.append(first)
    inside = weights[1] @ mask @ weights[0].T >= mask_threshold
    return BoxMask.around(inside.numpy(), *x0_y0)


def lay_tiles(height: int, width: int, tile_size_px: int, tile_overlap_px: int) -> np.ndarray:
    """Tiles of equal size that cover an image: int64 [T, 4], x1, y1, x2, y2 px. Neighbours share at
    least ``tile_overlap_px``. An image side of at most ``tile_size_px`` is not divided; with
    ``tile_size_px`` 0 no side is.

    >>> lay_tiles(100, 160, tile_size_px=100, tile_overlap_px=40).tolist()
    [[0, 0, 100, 100], [60, 0, 160, 100]]
    """
    rows, columns = (_starts(length, tile_size_px, tile_overlap_px) for length in (height, width))
    tile_height, tile_width = (min(length, tile_size_px or length) for length in (height, width))
    return np.array([(x, y, x + tile_width, y + tile_height) for y in rows for x in columns])


def _starts(length: int, tile_size_px: int, tile_overlap_px: int) -> list[int]:
    """Where the tiles along an image side of ``length`` px start, evenly spaced."""
    if tile_size_px == 0 or length <= tile_size_px:
        return [0]
    gaps = -(-(length - tile_size_px) // (tile_size_px - tile_overlap_px))
    return [gap * (length - tile_size_px) // gaps for gap in range(gaps + 1)]


@torch.inference_mode()
def _predict_tiles(
    model: nn.Module, image: Tensor, tiles: np.ndarray, mask_threshold: float
) -> list[Cells]:
    """The cells that the model finds in each tile, in the image's coordinates."""
    pasting = mask_threshold, getattr(model, "mask_geometry", "torchvision")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    was_training = {module: module.training for module in model.modules()}
    cells_of_tiles = []
    model.eval()
    try:
        for first in range(0, len(tiles), TILES_PER_BATCH):
            batch = tiles[first : first + TILES_PER_BATCH].tolist()
            crops = [image[:, y1:y2, x1:x2].to(device).float() / 255 for x1, y1, x2, y2 in batch]
            cells_of_tiles += [
                _in_image(output, tile, image.shape[1:], pasting)
                for output, tile in zip(model(crops), batch, strict=True)
            ]
    finally:
        for module, training in was_training.items():
            module.training = training
    return cells_of_tiles


def _in_image(
    output: dict[str, Tensor], tile: list[int], size: tuple[int, int], pasting: tuple[float, str]
) -> Cells:
    """A tile's detections, without those of empty masks, as cells of an image of ``size``."""
    x1, y1, x2, y2 = tile
    height, width = y2 - y1, x2 - x1
    names = ("boxes", "labels", "scores", "masks")
    boxes, labels, scores, masks = (output[name].cpu() for name in names)
    boxes, scores = boxes.float(), scores.float().numpy()
    in_tile = paste_in_boxes(masks.float(), boxes, height, width, *pasting)
    in_image = [BoxMask(mask, x + x1, y + y1) for mask, x, y in in_tile]
    boxes = clip_boxes_to_image(boxes, (height, width)) + torch.tensor([x1, y1, x1, y1])
    cells = Cells.of_image(*size, labels.numpy(), in_image, scores, boxes.numpy())
    return cells[np.array([mask.mask.size > 0 for mask in in_image], bool)]


def merge_tiles(
    cells_of_tiles: list[Cells], tiles: np.ndarray, height: int, width: int, tile_overlap_px: int
) -> Cells:
    """Merge the cells found in overlapping tiles, so that each cell of the image is listed once.

    A cell's margin is the distance from its box to the nearest edge of its tile that is not an edge
    of the image. A cell is cut if its margin is under an eighth of the overlap. Two cells of
    different tiles are the same if their masks have an IoU of ``SAME_CELL_IOU`` or more in the area
    that both tiles cover, whatever their classes.

    How it works:
        1. Drop a cut cell whose box lies at least a quarter of the overlap inside another tile:
           that tile contains the whole area, so its result counts, even if it found no cell.
        2. Of uncut cells that are the same, keep the one with the largest margin: its tile shows
           the most of its surroundings. Keeping the highest score would favour false detections,
           which have two chances where tiles overlap.
        3. Drop a cut cell that is the same as an uncut one that is left.
        4. Join the remaining cut cells that are the same (no tile contains them whole): class and
           score of the highest-scored one, union of their masks, box around their boxes.

    Cells of one tile never remove each other: the model's own non-maximum suppression has done so.
    Tests compare the result, for cells whole in some tile, with a prediction of the whole image.

    Args:
        cells_of_tiles: the cells of each tile, in the image's coordinates.
        tiles: int [T, 4], x1, y1, x2, y2 px.
        height: of the image, px.
        width: of the image, px.
        tile_overlap_px: the least overlap of neighbouring tiles.
    """
    if len(tiles) == 1:
        return cells_of_tiles[0]
    cells = Cells.concatenate(cells_of_tiles)
    tile_of = np.repeat(np.arange(len(tiles)), [len(of_tile) for of_tile in cells_of_tiles])
    margin = _margin(cells.boxes, tiles[tile_of], height, width)
    cut = margin < tile_overlap_px / 8
    overlapping = np.argwhere(np.triu(_intersecting(tiles, tiles), k=1))

    dropped = np.zeros(len(cells), bool)  # by step 1
    for one, other in np.concatenate([overlapping, overlapping[:, ::-1]]):
        rows = np.flatnonzero(cut & (tile_of == one))
        inside = _margin(cells.boxes[rows], tiles[[other]], height, width)
        dropped[rows] |= inside >= tile_overlap_px / 4

    rows_of = [np.flatnonzero((tile_of == tile) & ~dropped) for tile in range(len(tiles))]
    boxes, pairs = cells.mask_boxes, []
    for one, other in overlapping:
        area = _intersection(tiles[one], tiles[other])
        pairs += _same_cells(cells.masks, boxes, rows_of[one], rows_of[other], area)
    rows, others = np.array(pairs, np.int64).reshape(-1, 2).T
    ones = np.ones(len(pairs), bool)
    same = sparse.csr_array((ones, (rows, others)), shape=(len(cells), len(cells)))
    same = same + same.T

    stays = np.zeros(len(cells), bool)
    for row in np.lexsort([-cells.scores, -margin]):  # step 2, the largest margin first
        neighbours = same.indices[same.indptr[row] : same.indptr[row + 1]]
        stays[row] = not (cut[row] or stays[neighbours].any())
    pieces = np.flatnonzero(cut & ~dropped & ~(same @ stays))  # what steps 1 and 3 leave
    count, group_of = sparse.csgraph.connected_components(same[pieces][:, pieces], directed=False)
    joined = [_join(cells, pieces[group_of == group], tile_of) for group in range(count)]
    return Cells.concatenate([cells[stays], *joined])


def _margin(boxes: np.ndarray, tiles: np.ndarray, height: int, width: int) -> np.ndarray:
    """The distance [N] px from each box [N, 4] to the nearest edge of its tile [N or 1, 4] that is
    not an edge of the image; negative if the box crosses that edge.
    """
    is_inner = np.hstack([tiles[:, :2] > 0, tiles[:, 2:] < [width, height]])
    distances = np.hstack([boxes[:, :2] - tiles[:, :2], tiles[:, 2:] - boxes[:, 2:]])
    return np.where(is_inner, distances, np.inf).min(axis=1)


def _intersection(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The common area of two boxes, as a box; x2 <= x1 or y2 <= y1 if they share none."""
    corners = (
        np.maximum(boxes[..., :2], others[..., :2]),
        np.minimum(boxes[..., 2:], others[..., 2:]),
    )
    return np.concatenate(corners, axis=-1)


def _intersecting(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether two boxes share at least one pixel: bool [N, M] for int boxes [N, 4] and [M, 4]."""
    common = _intersection(boxes[:, None], others[None])
    return (common[..., 2:] > common[..., :2]).all(axis=-1)


def _same_cells(
    masks: list[BoxMask], boxes: np.ndarray, rows: np.ndarray, others: np.ndarray, area: np.ndarray
) -> list[tuple[int, int]]:
    """The pairs of one of ``rows`` and one of ``others`` whose masks have an IoU of at least
    ``SAME_CELL_IOU`` within ``area`` (x1, y1, x2, y2 px).
    """
    inside, other_inside = _intersection(boxes[rows], area), _intersection(boxes[others], area)
    pairs = []
    for i, j in np.argwhere(_intersecting(inside, other_inside)):
        mask, other = masks[rows[i]], masks[others[j]]
        common = _intersection(inside[i], other_inside[j])
        shared = np.count_nonzero(_crop(mask, common) & _crop(other, common))
        in_area = _crop(mask, inside[i]), _crop(other, other_inside[j])
        united = sum(map(np.count_nonzero, in_area)) - shared
        if shared and shared >= SAME_CELL_IOU * united:
            pairs.append((rows[i], others[j]))
    return pairs


def _crop(mask: BoxMask, window: np.ndarray) -> np.ndarray:
    """The part of a mask inside ``window``, which lies within the mask's box."""
    x1, y1, x2, y2 = window - [mask.x0, mask.y0, mask.x0, mask.y0]
    return mask.mask[y1:y2, x1:x2]


def _join(cells: Cells, rows: np.ndarray, tile_of: np.ndarray) -> Cells:
    """Join the pieces of one cell. Its class and score are those of the highest-scored piece. Each
    tile gives one piece: its highest-scored one of that class or, if it has none, of any class.
    """
    best = rows[np.argmax(cells.scores[rows])]
    best_last = rows[np.lexsort([cells.scores[rows], cells.labels[rows] == cells.labels[best]])]
    best_of_tile = {tile_of[row]: row for row in best_last}  # later rows replace earlier ones
    pieces = cells[list(best_of_tile.values())]
    (x1, y1), (x2, y2) = pieces.mask_boxes[:, :2].min(0), pieces.mask_boxes[:, 2:].max(0)
    united = np.zeros((y2 - y1, x2 - x1), bool)
    for mask, x, y in pieces.masks:
        united[y - y1 :, x - x1 :][: mask.shape[0], : mask.shape[1]] |= mask
    box = np.concatenate([pieces.boxes[:, :2].min(0), pieces.boxes[:, 2:].max(0)])
    mask = BoxMask(united, int(x1), int(y1))
    return replace(cells[[best]], boxes=box[None], masks=[mask])
