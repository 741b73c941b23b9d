"""Prediction: masks of a dense image to run-length encodings, and fields of many tiles, beside
torchvision's pasting.

All of it is CPU work, also with a GPU. The model is a stand-in, and its time does not count.
"""

import os
from collections.abc import Iterable
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import psutil
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.roi_heads import paste_masks_in_image

from bench import measure
from bench.measure import NAN, Call, Pair, Row, row, side_by_side, time_and_memory, verdict
from bench.scenes import CELLS_PER_PX, dense_label_maps, perfect_detections
from cellseg_helpers.cells import encode_mask
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.inference import paste_in_boxes, predict
from study.mask_geometry import mask_ceilings

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
    rles = [coco_mask.encode(np.asfortranarray(mask[0].byte().numpy())) for mask in pasted]
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles]


def same_cells(ours: Rles, theirs: Rles) -> str:
    """How many RLEs are the same, in any order. In a tile, float32 rounds a box's position
    otherwise, so that a pixel at an edge may differ.
    """
    others = [rle for rle in ours if rle not in theirs]
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
    label_maps = functional.pad(dense_label_maps(HEIGHT, detections), (0, WIDTH - HEIGHT))
    found = perfect_detections(label_maps)
    tensors = (found["masks"], found["boxes"])

    def ours() -> Rles:
        masks = paste_in_boxes(*tensors, HEIGHT, WIDTH, THRESHOLD)
        return [encode_mask(mask, HEIGHT, WIDTH) for mask in masks]

    def peer() -> Rles:
        parts = zip(*(tensor.split(DETECTIONS) for tensor in tensors), strict=True)
        return [rle for part in parts for rle in paste_and_encode(*part, HEIGHT, WIDTH)]

    return Pair(ours, peer, lambda ours, peer: verdict(ours == peer, same_cells(ours, peer)))


class ReadsColours(nn.Module):
    """A model that finds the cells whose ids the colours are, 65,536 R + 256 G + B."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        colours = [(image * 255).round().int() for image in images]
        ids = [(red << 16 | green << 8 | blue)[None] for red, green, blue in colours]
        return [perfect_detections(label_map) for label_map in ids]


def field(side_px: int, model: nn.Module | None = None) -> Pair:
    """A square field of cells, from an image to encodings: ours in tiles, the peer pasting masks as
    large as the field.
    """
    label_maps = dense_label_maps(side_px, round(CELLS_PER_PX * side_px**2), classes=1)
    image = torch.cat([label_maps >> 16, label_maps >> 8 & 255, label_maps & 255]).byte()
    found = perfect_detections(label_maps)
    model = model or ReadsColours()
    return Pair(
        lambda: predict(model, image, TILE_PX, OVERLAP_PX, THRESHOLD).rles,
        lambda: paste_and_encode(found["masks"], found["boxes"], side_px, side_px),
        same_cells,
    )


def seconds_of_fields(sides_px: Iterable[int]) -> list[float]:
    """Median seconds of ours for each side, without the model's; the fields are taken in turn."""
    calls = []
    for side in sides_px:
        model, outputs = ReadsColours(), []
        calls.append(field(side, model).ours)
        hook = model.register_forward_hook(lambda *call, outputs=outputs: outputs.append(call[-1]))
        calls[-1]()
        hook.remove()
        model.forward = partial(next, cycle(outputs))  # the same outputs again, in no time
    return measure.medians_in_turn(calls, FIELD_REPEATS)


def rows() -> list[Row]:
    few = side_by_side(masks_to_rles, DETECTIONS, repeats=REPEATS)
    many = side_by_side(masks_to_rles, MANY, repeats=REPEATS, repeat_peer=False)
    note = f"{DETECTIONS} drawn cells, {HEIGHT} x {WIDTH} px; "
    note += "paste_masks_in_image, threshold, pycocotools' encode"
    many_note = f"{MANY} drawn cells; peer: {DETECTIONS} at a time, one call, as the float masks "
    many_note += f"of all are {4e-9 * MANY * HEIGHT * WIDTH:.1f} GB"
    return [
        *time_and_memory("prediction to RLE", few, note, "goal 20x", "goal 50x"),
        *time_and_memory(f"prediction to RLE, {MANY} cells", many, many_note),
        *rows_of_fields(),
        row_of_ceilings(),
    ]


def row_of_ceilings() -> Row:
    dataset = open_dataset(os.environ.get("BENCH_SAMPLE") or "drawn")
    ceilings = mask_ceilings(dataset)
    ours, peer = ceilings["exact"], ceilings["torchvision"]
    note = f"goal 0.99; worst class of perfect targets, {dataset.name}; by class, ours and peer: "
    note += ", ".join(f"{name} {ours[name]:.3f} {peer[name]:.3f}" for name in ours.index)
    worst = ours.min(), peer.min()
    return row("mask geometry: ceiling of AP", *worst, "AP", note=note, more_is_better=True)


def rows_of_fields() -> list[Row]:
    """The peer's largest field is the one that it can do in the free memory and in the time; both
    grow with the side's 4th power.
    """
    small, named, large = SIDES_PX
    found = {small: side_by_side(field, small, repeats=REPEATS)}
    peer = found[small][1]
    free_mb = FREE_MEMORY_SHARE * psutil.virtual_memory().available / 1e6
    times = min(free_mb / peer.megabytes, TIME_LIMIT_S / peer.seconds)
    most = 100 * int(small / 100 * times**0.25)
    found[most] = side_by_side(field, most, repeats=0)
    found |= {side: (measure.alone("ours", field, side), Call(), "") for side in (named, large)}
    taken = dict(zip(found, seconds_of_fields(found), strict=True))
    limits = f"this machine's free memory and {TIME_LIMIT_S} s"
    peers = {small: f"in one piece, median of {REPEATS}"}
    peers[most] = f"in one piece, one call: the largest field for {limits}"
    growth = taken[large] / taken[small] * (small / large) ** 2
    linear = f"goal 1: time a megapixel at {large} px over that at {small} px"
    table = [row("field: growth of time a megapixel", growth, NAN, "x", note=linear)]
    for side, (ours, peer, identical) in sorted(found.items()):
        cells = round(CELLS_PER_PX * side**2)
        not_run = f"not run: its float masks alone are {4e-9 * cells * side**2:.0f} GB"
        note = f"{TILE_PX} px tiles, {cells} drawn cells; peer: {peers.get(side, not_run)}"
        rate = f"{1e6 * taken[side] / side**2:.3f} s a megapixel, the model's time left out"
        bounded = "goal: bounded by a few tiles and the detections; stand-in model included"
        measured = (ours._replace(seconds=taken[side]), peer, identical)
        table += time_and_memory(f"field of {side} px", measured, note, rate, bounded)
    return table
