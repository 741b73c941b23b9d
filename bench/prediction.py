"""Prediction: masks of a dense image to run-length encodings, and fields of many tiles, against
torchvision's pasting.

All of it is CPU work, also where there is a GPU. The model is a stand-in, and its time is not
counted.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import psutil
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from bench.measure import (
    MEGABYTE,
    NOT_RUN,
    Call,
    Pair,
    Row,
    alone,
    medians_in_turn,
    side_by_side,
    time_and_memory,
    verdict,
)
from bench.scenes import CELLS_PER_PX, dense_label_maps, dense_target, detections_of
from cellseg_helpers.data.labels import encode_box_masks
from cellseg_helpers.inference import paste_in_boxes, predict

HEIGHT, WIDTH, DETECTIONS, MANY = 1760, 1771, 200, 1000
THRESHOLD = 0.5
SAME_IOU = 0.95
SIDES_PX = (1000, 2500, 5000)
REPEATS, FIELD_REPEATS = 3, 5
SHARE_OF_FREE_MEMORY, TIME_LIMIT_S = 0.8, 5  # of the peer in its largest field
TILE_PX, OVERLAP_PX = 512, 128
Rles = list[dict[str, Any]]


def paste_and_encode(found: dict[str, Tensor], height: int, width: int) -> Rles:
    """As torchvision's COCO evaluation does it, but for ``>=`` in place of ``>``."""
    masks = (
        paste_masks_in_image(found["masks"][:, None], found["boxes"], (height, width)) >= THRESHOLD
    )
    return [coco_mask.encode(np.asfortranarray(mask[0].numpy().astype(np.uint8))) for mask in masks]


def same_rles(ours: Rles, theirs: Rles) -> str:
    """How many are the same, pair by pair."""
    same = sum(
        one == other for one, other in zip(map(plain, ours), map(plain, theirs), strict=False)
    )
    return verdict(
        same == len(ours) == len(theirs),
        f"{same} of {len(ours)} RLEs the same, peer has {len(theirs)}",
    )


def same_cells(ours: Rles, theirs: Rles) -> str:
    """How many are the same, in any order. A pixel at an edge may differ: in a tile, float32 rounds
    a box's place otherwise.
    """
    known = set(map(plain, theirs))
    others = [rle for rle in ours if plain(rle) not in known]
    iou = coco_mask.iou(others, theirs, [0] * len(theirs)).max(1).min() if others else 1.0
    told = f", the others' IoU {iou:.3f} or more (float32 in a tile)" if others else ""
    found = f"{len(ours) - len(others)} of {len(ours)} RLEs the same{told}, peer has {len(theirs)}"
    return verdict(len(ours) == len(theirs) and iou > SAME_IOU, found)


def plain(rle: dict[str, Any]) -> tuple[tuple[int, ...], str]:
    """Size and counts; pycocotools' are bytes."""
    counts = rle["counts"]
    return tuple(rle["size"]), counts.decode() if isinstance(counts, bytes) else counts


def masks_to_rles(detections: int) -> Pair:
    """An image's detections, from the model's masks (float32 [N, 28, 28]) to encodings; the peer
    takes ``DETECTIONS`` at a time.
    """
    label_maps = np.pad(dense_label_maps(HEIGHT, detections), ((0, 0), (0, 0), (0, WIDTH - HEIGHT)))
    found = detections_of(dense_target(label_maps))
    sizes = [(HEIGHT, WIDTH)] * detections
    parts = [
        {name: found[name][at : at + DETECTIONS] for name in ("masks", "boxes")}
        for at in range(0, detections, DETECTIONS)
    ]
    return Pair(
        lambda: encode_box_masks(
            paste_in_boxes(found["masks"], found["boxes"], HEIGHT, WIDTH, THRESHOLD), sizes
        ),
        lambda: [rle for part in parts for rle in paste_and_encode(part, HEIGHT, WIDTH)],
        same_rles,
    )


class ReadsColours(nn.Module):
    """A model that finds the cells whose ids the colours are, 65,536 R + 256 G + B."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        colours = [(image.numpy() * 255).round().astype(np.int32) for image in images]
        return [
            detections_of(dense_target((red << 16 | green << 8 | blue)[None]))
            for red, green, blue in colours
        ]


class Remembers(ReadsColours):
    """It looks at a field's tiles once; after ``repeat``, every pass over them gives the same again
    and takes no time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[dict[str, Tensor]]] = []
        self.repeated: Iterator[list[dict[str, Tensor]]] | None = None

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        if self.repeated:
            return next(self.repeated)
        self.found.append(super().forward(images))
        return self.found[-1]

    def repeat(self) -> None:
        self.repeated = cycle(self.found)


def field(side_px: int, model: nn.Module | None = None) -> Pair:
    """A square field of cells, from an image to encodings: ours in tiles, the peer pasting masks as
    large as the field.
    """
    label_map = dense_label_maps(side_px, round(CELLS_PER_PX * side_px**2), num_classes=1)[0]
    image = torch.from_numpy(
        np.stack([label_map >> 16, label_map >> 8 & 255, label_map & 255]).astype(np.uint8)
    )
    found = detections_of(dense_target(label_map[None]))
    del label_map
    return Pair(
        lambda: predict(model or ReadsColours(), image, TILE_PX, OVERLAP_PX, THRESHOLD).to_rles(),
        lambda: paste_and_encode(found, side_px, side_px),
        same_cells,
    )


def seconds_of_fields(sides_px: Sequence[int]) -> dict[int, float]:
    """Median seconds of ours for each side after a warm-up, without the model's; the fields are
    taken in turn.
    """
    calls = []
    for side in sides_px:
        model = Remembers()
        calls.append(field(side, model).ours)
        calls[-1]()
        model.repeat()
    return dict(zip(sides_px, medians_in_turn(calls, FIELD_REPEATS), strict=True))


def largest_side_px(side_px: int, peer: Call) -> int:
    """The largest field that the peer can do in the free memory and in the time; both grow with the
    side's 4th power.
    """
    free_mb = SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available / MEGABYTE
    return 100 * int(
        side_px / 100 * min(free_mb / peer.megabytes, TIME_LIMIT_S / peer.seconds) ** 0.25
    )


def rows() -> list[Row]:
    return [*rows_of_an_image(), *rows_of_fields()]


def rows_of_an_image() -> list[Row]:
    note = f"{DETECTIONS} drawn cells, {HEIGHT} x {WIDTH} px; paste_masks_in_image, threshold, pycocotools' encode"
    masks_gb = 4e-9 * MANY * HEIGHT * WIDTH
    in_parts = f"{MANY} drawn cells; peer: {DETECTIONS} at a time, one call, as the float masks of all are {masks_gb:.1f} GB"
    measured = side_by_side(masks_to_rles, DETECTIONS, repeats=REPEATS)
    many = side_by_side(masks_to_rles, MANY, repeats=REPEATS, repeat_peer=False)
    return [
        *time_and_memory("prediction to RLE", measured, f"goal 20x; {note}", f"goal 50x; {note}"),
        *time_and_memory(f"prediction to RLE, {MANY} cells", many, in_parts, in_parts),
    ]


def rows_of_fields() -> list[Row]:
    small, named, large = SIDES_PX
    found = {small: side_by_side(field, small, repeats=REPEATS)}
    most = largest_side_px(small, found[small][1])
    found[most] = side_by_side(field, most, repeats=0)
    found |= {side: (alone("ours", field, side), NOT_RUN, "") for side in (named, large)}
    taken = seconds_of_fields(sorted(found))
    peers = {
        small: f"in one piece, median of {REPEATS}",
        most: f"in one piece, one call: the largest field for this machine's free memory and {TIME_LIMIT_S} s",
    }
    growth = taken[large] / taken[small] * (small / large) ** 2
    linear = f"goal 1: time a megapixel at {large} px over that at {small} px"
    table = [Row("field: growth of time a megapixel", growth, math.nan, "x", math.nan, "", linear)]
    for side, (ours, peer, alike) in sorted(found.items()):
        cells = round(CELLS_PER_PX * side**2)
        not_run = f"not run: its float masks alone are {4e-9 * cells * side**2:.0f} GB"
        note = f"{TILE_PX} px tiles, {cells} drawn cells; peer: {peers.get(side, not_run)}"
        time = f"{1e6 * taken[side] / side**2:.3f} s a megapixel, the model's time left out; {note}"
        memory = f"goal: bounded by a few tiles and the detections; stand-in model included; {note}"
        table += time_and_memory(
            f"field of {side} px", (ours._replace(seconds=taken[side]), peer, alike), time, memory
        )
    return table
