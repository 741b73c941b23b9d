"""An epoch of training samples, from the image folder to targets: ``TrainingSet`` beside the usual
dataset of torchvision's detection tutorial, tifffile and one boolean mask for each value of a class
file. Samples are whole images and come one after the other in one process.
"""

import os
import tempfile
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from bench.measure import Pair, Row, medians_in_turn, row, side_by_side, verdict
from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.data.cache import CellDataset
from cellseg_helpers.data.hw3 import locate_data, open_dataset
from cellseg_helpers.data.samples import SampleKey, TrainingSet

# image uint8 [3, H, W], boxes float32 [N, 4], labels int64 [N]
Sample = tuple[Tensor, Tensor, Tensor]
exhaust = partial(deque, maxlen=0)


def folder() -> Path:
    """The folder of real images or, if none is named, of drawn ones."""
    return locate_data(os.environ.get("BENCH_SAMPLE") or "drawn")[0]


def cached_samples(dataset: CellDataset) -> Iterator[Sample]:
    """Every image once, whole and not augmented."""
    samples = TrainingSet(dataset, range(len(dataset)), 0, 0.0, "none", seed=0)
    for index in samples.indices:
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


def compare(ours: deque, peer: deque) -> str:
    """Compare the samples of new epochs: the timed ones keep none. ``masks_to_boxes`` ends a box at
    its last pixel, the package one pixel further.
    """
    alike, images, cells = True, 0, 0
    for (image, boxes, labels), theirs in zip(first_samples(), tiff_samples(), strict=True):
        tables = (labels, boxes), (theirs[2], theirs[1] + torch.tensor([0, 0, 1, 1]))
        table, peer_table = (sorted(torch.column_stack(each).tolist()) for each in tables)
        alike &= torch.equal(image, theirs[0]) and table == peer_table
        images, cells = images + 1, cells + len(labels)
    found = f"{images} images, {cells} boxes and labels compared (masks_to_boxes + 1 px)"
    return verdict(alike, found)


def first_epoch() -> Pair:
    """An epoch of which no sample is kept."""
    return Pair(lambda: exhaust(first_samples()), lambda: exhaust(tiff_samples()), compare)


def rows() -> list[Row]:
    ours, peer, same = side_by_side(first_epoch, repeats=3, repeat_peer=False)
    with tempfile.TemporaryDirectory() as cache:
        dataset = open_dataset(folder(), cache_dir=Path(cache))
        [warm_s] = medians_in_turn([lambda: exhaust(cached_samples(dataset))], repeats=3)
    count = len(dataset)
    first, warm, slow = count / ours.seconds, count / warm_s, count / peer.seconds
    kind = "drawn" if folder().name == "drawn" else "real"
    note = f"{count} {kind} images, whole, not augmented, one process; "
    note += "peer: a boolean mask a cell, every epoch anew"
    decoding = f"goal 3x; with decoding into the cache; {note}"
    later = f"goal 20x; any later epoch; {note}"
    memory = (ours.megabytes, peer.megabytes, "MB", same, f"peak that a first epoch adds; {note}")
    return [
        row("load: first epoch", first, slow, "images/s", same, decoding, more_is_better=True),
        row("load: warm", warm, slow, "images/s", same, later, more_is_better=True),
        row("load: memory", *memory),
    ]
