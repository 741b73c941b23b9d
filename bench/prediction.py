"""Prediction: masks of a dense image to run-length encodings, and fields of many tiles, against torchvision's pasting.

All of it is CPU work, also where there is a GPU. The model is a stand-in, and its time is not counted.
"""

import math
import statistics
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from bench.measure import Pair, Row, megabytes, seconds, seconds_in_turn
from bench.scenes import CELLS_PER_PX, dense_label_maps, dense_target, detections_of
from cellseg_helpers.data.labels import encode_box_masks
from cellseg_helpers.inference import paste_in_boxes, predict

HEIGHT, WIDTH, DETECTIONS, MANY = 1760, 1771, 200, 1000
THRESHOLD = 0.5
SIDES_PX = (1000, 2000, 3500, 5000)
TILE_PX, OVERLAP_PX = 512, 128
Rles = list[dict[str, Any]]


def paste_and_encode(found: dict[str, Tensor], height: int, width: int) -> Rles:
    """As torchvision's COCO evaluation does it, but for ``>=`` in place of ``>``."""
    masks = paste_masks_in_image(found["masks"][:, None], found["boxes"], (height, width)) >= THRESHOLD
    return [coco_mask.encode(np.asfortranarray(mask[0].numpy().astype(np.uint8))) for mask in masks]


def same_rles(ours: Rles, theirs: Rles) -> str:
    """How many of ours the peer has, in any order."""
    counts = {rle["counts"].decode() for rle in theirs}
    return f"{sum(rle['counts'] in counts for rle in ours)} of {len(ours)} RLEs the same, peer has {len(theirs)}"


def masks_to_rles(detections: int = DETECTIONS) -> Pair:
    """An image's detections, from the model's masks (float32 [N, 28, 28]) to encodings."""
    label_maps = np.pad(dense_label_maps(HEIGHT, detections), ((0, 0), (0, 0), (0, WIDTH - HEIGHT)))
    found = detections_of(dense_target(label_maps))
    sizes = [(HEIGHT, WIDTH)] * detections
    return Pair(
        lambda: encode_box_masks(paste_in_boxes(found["masks"], found["boxes"], HEIGHT, WIDTH, THRESHOLD), sizes),
        lambda: paste_and_encode(found, HEIGHT, WIDTH),
        same_rles,
    )


class ReadsColours(nn.Module):
    """A model that finds the cells whose ids the colours are, 65,536 R + 256 G + B; ``seconds``: what it has taken."""

    seconds = 0.0

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        begun = time.perf_counter()
        colours = [(image.numpy() * 255).round().astype(np.int32) for image in images]
        found = [detections_of(dense_target((red << 16 | green << 8 | blue)[None])) for red, green, blue in colours]
        self.seconds += time.perf_counter() - begun
        return found


def field(side_px: int, model: nn.Module | None = None) -> Pair:
    """A square field of cells, from an image to encodings: ours in tiles, the peer pasting masks as large as the field."""
    label_map = dense_label_maps(side_px, round(CELLS_PER_PX * side_px**2), num_classes=1)[0]
    image = torch.from_numpy(np.stack([label_map >> 16, label_map >> 8 & 255, label_map & 255]).astype(np.uint8))
    found = detections_of(dense_target(label_map[None]))
    del label_map
    return Pair(
        lambda: [cell["segmentation"] for cell in predict(model or ReadsColours(), image, TILE_PX, OVERLAP_PX, THRESHOLD)],
        lambda: paste_and_encode(found, side_px, side_px),
        same_rles,
    )


def seconds_of_field(side_px: int, repeats: int) -> float:
    """Median seconds of ours, without the model's."""
    model, taken = ReadsColours(), []
    ours = field(side_px, model).ours
    for _ in range(repeats):
        before = model.seconds
        taken.append(seconds(ours) - (model.seconds - before))
    return statistics.median(taken)


smallest_field, largest_field = partial(field, SIDES_PX[0]), partial(field, SIDES_PX[-1])


def rows() -> list[Row]:
    return [*rows_of_an_image(), *rows_of_fields()]


def rows_of_an_image() -> list[Row]:
    ours, peer, alike = seconds_in_turn(masks_to_rles(), repeats=3)
    ours_mb, peer_mb = (megabytes("bench.prediction:masks_to_rles", side) for side in ("ours", "peer"))
    note = f"{DETECTIONS} drawn cells, {HEIGHT} x {WIDTH} px; paste_masks_in_image, threshold, pycocotools' encode"
    many_cells = masks_to_rles(MANY)
    many = statistics.median(seconds(many_cells.ours) for _ in range(3))
    does_not_fit = f"{MANY} drawn cells; peer not run: its float masks alone are {4e-9 * MANY * HEIGHT * WIDTH:.1f} GB"
    return [
        Row("prediction to RLE: time", ours, peer, "s", peer / ours, alike, f"goal 20x; {note}"),
        Row("prediction to RLE: memory", ours_mb, peer_mb, "MB", peer_mb / ours_mb, alike, f"goal 50x; {note}"),
        Row(f"prediction to RLE, {MANY} cells: time", many, math.nan, "s", math.nan, "", does_not_fit),
    ]


def rows_of_fields() -> list[Row]:
    small, large = SIDES_PX[0], SIDES_PX[-1]
    _, peer, alike = seconds_in_turn(smallest_field(), repeats=1)
    per_megapixel = {side: seconds_of_field(side, 3 if side < large else 1) / side**2 * 1e6 for side in SIDES_PX}
    peer_per_megapixel = {small: peer / small**2 * 1e6}
    note = (
        f"{TILE_PX} px tiles, {CELLS_PER_PX * 1e6:.0f} drawn cells a megapixel, the model's time left out; peer: in one piece"
    )
    found = []
    for side, ours in per_megapixel.items():
        peer = peer_per_megapixel.get(side, math.nan)
        same = alike if side == small else ""
        found.append(Row(f"field of {side} px: time a megapixel", ours, peer, "s", peer / ours, same, note))
    growth = per_megapixel[large] / per_megapixel[small]
    note = f"goal 1: time a megapixel at {large} px over that at {small} px"
    found.append(Row("field: growth of time a megapixel", growth, math.nan, "x", math.nan, "", note))
    ours_mb, peer_mb = (megabytes("bench.prediction:smallest_field", side) for side in ("ours", "peer"))
    fits = small * (8000 / peer_mb) ** 0.25
    note = f"stand-in model included; the peer's grows with the square of the area: 8 GB would hold about {fits:.0f} px"
    found.append(Row(f"field of {small} px: memory", ours_mb, peer_mb, "MB", peer_mb / ours_mb, alike, note))
    ours_mb = megabytes("bench.prediction:largest_field", "ours")
    cells = CELLS_PER_PX * large**2
    note = f"peer not run: its float masks alone would be {4e-9 * cells * large**2:.0f} GB"
    return [*found, Row(f"field of {large} px: memory", ours_mb, math.nan, "MB", math.nan, "", note)]
