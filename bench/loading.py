"""One epoch of training samples, from the image folder to targets: ``TrainingSet`` against tifffile
and a mask stack.

Both sides give whole images (uint8 [3, H, W]), boxes (float32 [N, 4]) and labels (int64 [N]), one
sample after the other in one process. The peer is the usual dataset of torchvision's detection
tutorial: one boolean mask for each value of a class file.
"""

import os
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from bench.measure import Pair, Row, alone, medians_in_turn, seconds, times_less, verdict
from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import resolve_path
from cellseg_helpers.data.cache import CellDataset
from cellseg_helpers.data.hw3 import locate_data, open_dataset
from cellseg_helpers.data.samples import SampleKey, TrainingSet

Sample = tuple[Tensor, Tensor, Tensor]  # image, boxes, labels


def folder() -> Path:
    """The folder of real images, or, where none is named, of drawn ones."""
    real = os.environ.get("BENCH_SAMPLE")
    return resolve_path(real) if real else locate_data("drawn")[0]


def cached_samples(dataset: CellDataset) -> Iterator[Sample]:
    """Every image once, whole and not augmented."""
    samples = TrainingSet(
        dataset,
        list(range(len(dataset))),
        crop_size_px=0,
        class_balance=0.0,
        augmentation="none",
        seed=0,
    )
    for index in range(len(dataset)):
        image, target = samples[SampleKey(epoch=0, position=index, image_index=index)]
        yield image, target["boxes"], target["labels"]


def first_samples() -> Iterator[Sample]:
    """``cached_samples`` of a data set that was never opened before."""
    with tempfile.TemporaryDirectory() as cache:
        yield from cached_samples(open_dataset(folder(), cache_dir=Path(cache)))


def tiff_samples() -> Iterator[Sample]:
    """Every image once, its files read anew."""
    for place in sorted((folder() / "train").iterdir()):
        pixels = tifffile.imread(place / "image.tif")
        if pixels.dtype != np.uint8 or pixels.ndim != 3:
            raise ValueError(
                f"{place / 'image.tif'}: the peer reads RGB of 8 bits a channel only; name a folder of such images"
            )
        image = torch.from_numpy(pixels[..., :3]).permute(2, 0, 1).contiguous()
        masks, labels = [], []
        for label in range(1, len(CLASS_NAMES) + 1):
            if (place / f"class{label}.tif").exists():
                label_map = tifffile.imread(place / f"class{label}.tif").astype(np.int32)
                ids = np.unique(label_map[label_map > 0])
                masks.append(label_map == ids[:, None, None])
                labels += [label] * len(ids)
        yield image, masks_to_boxes(torch.from_numpy(np.concatenate(masks))), torch.tensor(labels)


def compare(ours: Iterator[Sample], peer: Iterator[Sample]) -> str:
    """masks_to_boxes ends a box at its last pixel, the package one pixel further, where it has the
    cell's true extent.
    """
    alike, images, cells = True, 0, 0
    for (image, boxes, labels), (peer_image, peer_boxes, peer_labels) in zip(
        ours, peer, strict=True
    ):
        table = torch.column_stack([labels, boxes]).tolist()
        peer_table = torch.column_stack(
            [peer_labels, peer_boxes + torch.tensor([0, 0, 1, 1])]
        ).tolist()
        alike &= torch.equal(image, peer_image) and sorted(table) == sorted(peer_table)
        images, cells = images + 1, cells + len(labels)
    return verdict(
        alike, f"{images} images, {cells} boxes and labels compared (masks_to_boxes + 1 px)"
    )


def exhaust(samples: Iterator[Sample]) -> None:
    deque(samples, maxlen=0)


def first_epoch() -> Pair:
    return Pair(
        lambda: exhaust(first_samples()), lambda: exhaust(tiff_samples()), lambda ours, peer: ""
    )


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as cache:
        dataset = open_dataset(folder(), cache_dir=Path(cache))
        peer_samples = []
        peer = len(dataset) / seconds(lambda: peer_samples.extend(tiff_samples()))
        alike = compare(cached_samples(dataset), peer_samples)
        calls = (first_epoch().ours, lambda: exhaust(cached_samples(dataset)))
        first, warm = (len(dataset) / taken for taken in medians_in_turn(calls, repeats=3))
    data = "drawn" if folder().name == "drawn" else "real"
    note = f"{len(dataset)} {data} images, whole, not augmented, one process; peer: a boolean mask a cell, every epoch anew"
    first_mb, peer_mb = (alone(side, first_epoch).megabytes for side in ("ours", "peer"))
    memory = times_less(first_mb, peer_mb)
    return [
        Row(
            "load: first epoch",
            first,
            peer,
            "images/s",
            first / peer,
            alike,
            f"goal 3x; with decoding into the cache; {note}",
        ),
        Row(
            "load: warm",
            warm,
            peer,
            "images/s",
            warm / peer,
            alike,
            f"goal 20x; any later epoch; {note}",
        ),
        Row(
            "load: memory",
            first_mb,
            peer_mb,
            "MB",
            memory,
            alike,
            f"peak that a first epoch adds; {note}",
        ),
    ]
