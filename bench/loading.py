"""An epoch of training samples, from the image folder to targets: ``TrainingSet`` beside tifffile
and a mask stack.

Both sides give whole images (uint8 [3, H, W]), boxes (float32 [N, 4]) and labels (int64 [N]), one
sample after the other in one process. The peer is the usual dataset of torchvision's detection
tutorial: one boolean mask for each value of a class file.
"""

import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from bench.measure import Pair, Row, alone, less, medians_in_turn, seconds, verdict
from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.data.cache import CellDataset
from cellseg_helpers.data.hw3 import locate_data, open_dataset
from cellseg_helpers.data.samples import SampleKey, TrainingSet

Sample = tuple[Tensor, Tensor, Tensor]  # image, boxes, labels
exhaust = partial(deque, maxlen=0)


def folder() -> Path:
    """The folder of real images or, if none is named, of drawn ones."""
    return locate_data(os.environ.get("BENCH_SAMPLE") or "drawn")[0]


def cached_samples(dataset: CellDataset) -> Iterator[Sample]:
    """Every image once, whole and not augmented."""
    whole = {"crop_size_px": 0, "class_balance": 0.0, "augmentation": "none", "seed": 0}
    samples = TrainingSet(dataset, list(range(len(dataset))), **whole)
    for index in range(len(dataset)):
        image, target = samples[SampleKey(epoch=0, position=index, image_index=index)]
        yield image, target["boxes"], target["labels"]


def first_samples() -> Iterator[Sample]:
    """``cached_samples`` of a data set that was never opened before."""
    with tempfile.TemporaryDirectory() as cache:
        yield from cached_samples(open_dataset(folder(), cache_dir=Path(cache)))


def tiff_samples() -> Iterator[Sample]:
    """Every image once, its files read anew."""
    for path in sorted((folder() / "train").iterdir()):
        pixels = tifffile.imread(path / "image.tif")
        if pixels.dtype != np.uint8 or pixels.ndim != 3:
            only = "the peer reads RGB of 8 bits a channel only; name a folder of such images"
            raise ValueError(f"{path / 'image.tif'}: {only}")
        image = torch.from_numpy(pixels[..., :3]).permute(2, 0, 1).contiguous()
        masks, labels = [], []
        for label in range(1, len(CLASS_NAMES) + 1):
            if (path / f"class{label}.tif").exists():
                label_map = tifffile.imread(path / f"class{label}.tif").astype(np.int32)
                ids = np.unique(label_map[label_map > 0])
                masks.append(label_map == ids[:, None, None])
                labels += [label] * len(ids)
        yield image, masks_to_boxes(torch.from_numpy(np.concatenate(masks))), torch.tensor(labels)


def compare(ours: Iterable[Sample], peer: Iterable[Sample]) -> str:
    """masks_to_boxes ends a box at its last pixel, the package one pixel further."""
    alike, images, cells = True, 0, 0
    for (image, boxes, labels), theirs in zip(ours, peer, strict=True):
        tables = (labels, boxes), (theirs[2], theirs[1] + torch.tensor([0, 0, 1, 1]))
        table, peer_table = (sorted(torch.column_stack(each).tolist()) for each in tables)
        alike &= torch.equal(image, theirs[0]) and table == peer_table
        images, cells = images + 1, cells + len(labels)
    found = f"{images} images, {cells} boxes and labels compared (masks_to_boxes + 1 px)"
    return verdict(alike, found)


def first_epoch() -> Pair:
    sides = (lambda: exhaust(first_samples()), lambda: exhaust(tiff_samples()))
    return Pair(*sides, lambda ours, peer: "")


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as cache:
        dataset = open_dataset(folder(), cache_dir=Path(cache))
        peer_samples = []
        peer = len(dataset) / seconds(lambda: peer_samples.extend(tiff_samples()))
        same = compare(cached_samples(dataset), peer_samples)
        calls = (first_epoch().ours, lambda: exhaust(cached_samples(dataset)))
        first, warm = (len(dataset) / taken for taken in medians_in_turn(calls, repeats=3))
    memory = [alone(side, first_epoch).megabytes for side in ("ours", "peer")]
    kind = "drawn" if folder().name == "drawn" else "real"
    note = f"{len(dataset)} {kind} images, whole, not augmented, one process; "
    note += "peer: a boolean mask a cell, every epoch anew"
    decoding = f"goal 3x; with decoding into the cache; {note}"
    later = f"goal 20x; any later epoch; {note}"
    return [
        Row("load: first epoch", first, peer, "images/s", first / peer, same, decoding),
        Row("load: warm", warm, peer, "images/s", warm / peer, same, later),
        less("load: memory", *memory, "MB", same, f"peak that a first epoch adds; {note}"),
    ]
