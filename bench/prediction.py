"""Prediction: masks of a dense image to run-length encodings, and fields of many tiles, beside
torchvision's pasting.

All of it is CPU work, also with a GPU. The model is a stand-in, and its time does not count.
"""

from typing import Any

import numpy as np
import psutil
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from bench import measure
from bench.measure import NAN, Call, Pair, Row, verdict
from bench.scenes import CELLS_PER_PX, dense_label_maps, dense_target, detections_of
from cellseg_helpers.cells import encode_mask
from cellseg_helpers.inference import paste_in_boxes, predict

HEIGHT, WIDTH, DETECTIONS, MANY = 1760, 1771, 200, 1000
THRESHOLD = 0.5
SAME_IOU = 0.95
SIDES_PX = (1000, 2500, 5000)
REPEATS, FIELD_REPEATS = 3, 5
FREE_MEMORY_SHARE, TIME_LIMIT_S = 0.8, 5  # of the peer in its largest field
TILE_PX, OVERLAP_PX = 512, 128
Rles = list[dict[str, Any]]


def paste_and_encode(masks: Tensor, boxes: Tensor, height: int, width: int) -> Rles:
    """As torchvision's COCO evaluation does it, with ``>=`` in place of ``>``."""
    pasted = paste_masks_in_image(masks[:, None], boxes, (height, width)) >= THRESHOLD
    return [coco_mask.encode(np.asfortranarray(mask[0].byte().numpy())) for mask in pasted]


def plain(rle: dict[str, Any]) -> tuple[tuple[int, ...], str]:
    """Size and counts as str; pycocotools' are bytes."""
    counts = rle["counts"]
    return tuple(rle["size"]), counts if isinstance(counts, str) else counts.decode()


def same_cells(ours: Rles, theirs: Rles) -> str:
    """How many RLEs are the same, in any order. In a tile, float32 rounds a box's position
    otherwise, so that a pixel at an edge may differ.
    """
    known = set(map(plain, theirs))
    others = [rle for rle in ours if plain(rle) not in known]
    found = f"{len(ours) - len(others)} of {len(ours)} RLEs the same"
    iou = 1.0
    if others:
        iou = coco_mask.iou(others, theirs, [0] * len(theirs)).max(1).min()
        found += f", the others' IoU {iou:.3f} or more (float32 in a tile)"
    same = len(ours) == len(theirs) and iou > SAME_IOU
    return verdict(same, f"{found}, peer has {len(theirs)}")


def masks_to_rles(detections: int) -> Pair:
    """An image's detections, from the model's masks (float32 [N, 28, 28]) to encodings; the peer
    takes ``DETECTIONS`` at a time.
    """
    label_maps = dense_label_maps(HEIGHT, detections)
    label_maps = np.pad(label_maps, ((0, 0), (0, 0), (0, WIDTH - HEIGHT)))
    found = detections_of(dense_target(label_maps))
    tensors = (found["masks"], found["boxes"])

    def compare(ours: Rles, theirs: Rles) -> str:
        found = same_cells(ours, theirs)
        return verdict(list(map(plain, ours)) == list(map(plain, theirs)), found)

    def ours() -> Rles:
        masks = paste_in_boxes(*tensors, HEIGHT, WIDTH, THRESHOLD)
        return [encode_mask(mask, HEIGHT, WIDTH) for mask in masks]

    def peer() -> Rles:
        parts = zip(*(tensor.split(DETECTIONS) for tensor in tensors), strict=True)
        return [rle for part in parts for rle in paste_and_encode(*part, HEIGHT, WIDTH)]

    return Pair(ours, peer, compare)


class ReadsColours(nn.Module):
    """A model that finds the cells whose ids the colours are, 65,536 R + 256 G + B."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        colours = [(image.numpy() * 255).round().astype(np.int32) for image in images]
        ids = [(red << 16 | green << 8 | blue)[None] for red, green, blue in colours]
        return [detections_of(dense_target(label_map)) for label_map in ids]


class Remembers(ReadsColours):
    """Looks at a field's tiles once; with ``repeat``, later passes give the same in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.repeat = [], False

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        self.found.append(self.found.pop(0) if self.repeat else super().forward(images))
        return self.found[-1]


def field(side_px: int, model: nn.Module | None = None) -> Pair:
    """A square field of cells, from an image to encodings: ours in tiles, the peer pasting masks as
    large as the field.
    """
    label_map = dense_label_maps(side_px, round(CELLS_PER_PX * side_px**2), num_classes=1)[0]
    colours = np.stack([label_map >> 16, label_map >> 8 & 255, label_map & 255])
    image = torch.from_numpy(colours.astype(np.uint8))
    found = detections_of(dense_target(label_map[None]))
    model = model or ReadsColours()
    return Pair(
        lambda: predict(model, image, TILE_PX, OVERLAP_PX, THRESHOLD).to_rles(),
        lambda: paste_and_encode(found["masks"], found["boxes"], side_px, side_px),
        same_cells,
    )


def seconds_of_fields(sides_px: list[int]) -> dict[int, float]:
    """Median seconds of ours for each side, without the model's; the fields are taken in turn."""
    calls = []
    for side in sides_px:
        model = Remembers()
        calls.append(field(side, model).ours)
        calls[-1]()
        model.repeat = True
    return dict(zip(sides_px, measure.medians_in_turn(calls, FIELD_REPEATS), strict=True))


def largest_side_px(side_px: int, peer: Call) -> int:
    """The largest field that the peer can do in the free memory and in the time; both grow with the
    side's 4th power.
    """
    free_mb = FREE_MEMORY_SHARE * psutil.virtual_memory().available / 1e6
    times = min(free_mb / peer.megabytes, TIME_LIMIT_S / peer.seconds)
    return 100 * int(side_px / 100 * times**0.25)


def rows() -> list[Row]:
    few = measure.side_by_side(masks_to_rles, DETECTIONS, repeats=REPEATS)
    many = measure.side_by_side(masks_to_rles, MANY, repeats=REPEATS, repeat_peer=False)
    note = f"{DETECTIONS} drawn cells, {HEIGHT} x {WIDTH} px; "
    note += "paste_masks_in_image, threshold, pycocotools' encode"
    many_note = (
        f"{MANY} drawn cells; peer: {DETECTIONS} at a time, one call, as the float masks of all "
        f"are {4e-9 * MANY * HEIGHT * WIDTH:.1f} GB"
    )
    return [
        *measure.time_and_memory("prediction to RLE", few, note, "goal 20x", "goal 50x"),
        *measure.time_and_memory(f"prediction to RLE, {MANY} cells", many, many_note),
        *rows_of_fields(),
    ]


def rows_of_fields() -> list[Row]:
    small, named, large = SIDES_PX
    found = {small: measure.side_by_side(field, small, repeats=REPEATS)}
    most = largest_side_px(small, found[small][1])
    found[most] = measure.side_by_side(field, most, repeats=0)
    found |= {side: (measure.alone("ours", field, side), Call(), "") for side in (named, large)}
    taken = seconds_of_fields(sorted(found))
    limits = f"this machine's free memory and {TIME_LIMIT_S} s"
    peers = {
        small: f"in one piece, median of {REPEATS}",
        most: f"in one piece, one call: the largest field for {limits}",
    }
    growth = taken[large] / taken[small] * (small / large) ** 2
    linear = f"goal 1: time a megapixel at {large} px over that at {small} px"
    table = [Row("field: growth of time a megapixel", growth, NAN, "x", NAN, "", linear)]
    for side, (ours, peer, identical) in sorted(found.items()):
        cells = round(CELLS_PER_PX * side**2)
        not_run = f"not run: its float masks alone are {4e-9 * cells * side**2:.0f} GB"
        note = f"{TILE_PX} px tiles, {cells} drawn cells; peer: {peers.get(side, not_run)}"
        rate = f"{1e6 * taken[side] / side**2:.3f} s a megapixel, the model's time left out"
        bounded = "goal: bounded by a few tiles and the detections; stand-in model included"
        measured = (ours._replace(seconds=taken[side]), peer, identical)
        table += measure.time_and_memory(f"field of {side} px", measured, note, rate, bounded)
    return table
