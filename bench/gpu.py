"""Training on a GPU: images a second, and how busy the GPU is, with two workers, beside
torchvision's reference training loop. ``bench/README.md`` says how it is measured. Each row is
printed as soon as it is there.
"""

import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import TimeoutError
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from tqdm import tqdm

from bench import training
from bench.measure import NAN, Row, fresh_process, now, row
from bench.scenes import dense_scene, with_dense_masks
from bench.training import AS_TORCHVISION, CELLS, DEVICE, SIDE_PX
from cellseg_helpers import engine
from cellseg_helpers.config import RunConfig, one_line
from cellseg_helpers.data.augment import RECIPES, augment
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.samples import EpochSampler, SampleKey, TrainingSet
from cellseg_helpers.devices import make_fabric, resolve_precision

SIDES_PX, BATCHES = (512, 1024), (2, 4, 8, 16)
VARIANTS = {  # of ours, at one size
    "channels_first": "channels first", "compiled": "compiled backbone",
    "augmented_on_gpu": "augmentation on the GPU", "float32": "32 bit",
}  # fmt: skip
VARIANTS_AT = (1024, 4)  # side px, batch
RECIPE = "flips_turns_stain"  # of params/full.yaml
WORKERS = 2
AHEAD = 2 * WORKERS  # batches that the workers prepare ahead; the warm-up uses them up
WARM_UP, TIMED, PROFILED = 5 * AHEAD, 40, 3  # steps
LEAST_TIMED, PART_LIMIT_S = 2, 25  # warm-up and timed steps end after so many seconds
PROCESS_LIMIT_S = 240
CLASS = 2**32  # class_id * CLASS + id: both in an int64
Batch = tuple[list[Tensor], list[dict[str, Any]]]  # images, targets


class Measured(NamedTuple):
    """Of the steps of a training: their speed, and shares of their time."""

    images_per_s: float = NAN
    waiting: float = NAN  # %
    working: float = NAN  # %
    failure: str = ""


class Scenes(list):
    """Dense drawn images, as a data set for ``TrainingSet``."""

    def __init__(self, side_px: int, images: int = 4):
        cells = round(CELLS * side_px**2 / SIDE_PX**2)
        for seed in range(images):
            image, label_maps = dense_scene(side_px, cells, seed)
            self.append(CellImage(str(seed), None, image.numpy(), label_maps.numpy()))
        self.counts = [image.label_maps.max((1, 2)) for image in self]


class WithDenseMasks(TrainingSet):
    """Its samples as torchvision's Mask R-CNN takes them."""

    def __getitem__(self, key: SampleKey):
        image, target = super().__getitem__(key)
        return image, with_dense_masks(target)


class Crops(TrainingSet):
    """Its samples before ``augment_on_device``."""

    def __getitem__(self, key: SampleKey):
        image, *drawn, seeds = self.draw_crop(key)
        names = ("label_maps", "image_id", "seed", "recipe_seed")
        return image, dict(zip(names, [*drawn, *seeds], strict=True))


class Watch:
    """The batches of a loader for warm-up, timed and profiled steps; then ``measured`` is known. A
    step ends when the loop asks for the next batch.
    """

    def __init__(self, loader: DataLoader, prepare: Callable[[Batch], Batch] | None):
        self.loader, self.prepare = loader, prepare

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        yield from self._steps(batches, AHEAD + 1, WARM_UP)
        s_per_step, waiting = yield from self._steps(batches, LEAST_TIMED, TIMED)
        with profile(activities=[getattr(ProfilerActivity, DEVICE.type.upper())]) as profiler:
            yield from self._steps(batches, PROFILED, PROFILED)
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type.name.lower() == DEVICE.type and not event.is_user_annotation
        ]
        # of the time of a step without the profiler, whose own time does not count
        working = 100 * covered(spans) / 1e6 / PROFILED / s_per_step if spans else NAN
        self.measured = Measured(self.loader.batch_size / s_per_step, waiting, working)

    def _steps(self, batches: Iterator[Batch], least: int, most: int) -> Iterator[Batch]:
        """Returns seconds a step, and the share of them, in %, spent in waiting for a batch."""
        steps, waited_s, begun = 0, 0.0, time.perf_counter()
        while steps < least or (steps < most and time.perf_counter() - begun <= PART_LIMIT_S):
            asked = time.perf_counter()
            batch = next(batches)
            waited_s += time.perf_counter() - asked
            yield self.prepare(batch) if self.prepare else batch
            steps += 1
        taken_s = now() - begun
        return taken_s / steps, 100 * waited_s / taken_s


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of some spans: what runs at the same time counts once."""
    total, reached = 0.0, -np.inf
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return float(total)


def train(side_px: int, batch_size: int, way: str) -> Measured:
    """Train ``ours``, ``peer`` or one of ``VARIANTS``; neither side clips gradients."""
    precision = "32" if way == "float32" else "auto"
    given = {"batch_size": batch_size, "num_workers": WORKERS, "gradient_clip_norm": 0.0}
    config = RunConfig(precision=precision, **given, **AS_TORCHVISION)
    scenes = Scenes(side_px + side_px // 8)
    indices = list(range(len(scenes)))
    drawing = (side_px, config.class_balance, RECIPE, config.seed, config.drop_cut_cells)
    kind = {"peer": WithDenseMasks, "augmented_on_gpu": Crops}.get(way, TrainingSet)
    steps = WARM_UP + TIMED + PROFILED + AHEAD  # the workers are busy to the last step
    sampler = EpochSampler(indices, steps * batch_size, config.seed, batch_size=batch_size)
    loader = engine.make_loader(kind(scenes, indices, *drawing), config, sampler)
    watch = Watch(loader, augment_on_device if way == "augmented_on_gpu" else None)
    model = training.torchvision_model() if way == "peer" else training.our_model()
    optimizer = engine.make_optimizer(model, config)
    schedule, _ = engine.make_schedulers(optimizer, config, steps)
    if way == "peer":
        # As in the reference; masks of 13 GB, of a batch of 16 at 1024 px, would take long to pin.
        loader.pin_memory = False
        mixed = resolve_precision(config) == "bf16-mixed"
        train_reference(model, optimizer, schedule, watch, mixed)
        return watch.measured
    if way == "channels_first":
        training.give_images(model, torch.contiguous_format)
    if way == "compiled":
        model.backbone.compile()
    fabric = make_fabric(config)
    model, optimizer = fabric.setup(model, optimizer)
    engine.train_epoch(fabric, model, optimizer, schedule, watch, config, tqdm(disable=True))
    return watch.measured


def train_reference(model: nn.Module, optimizer, schedule, batches: Iterable, mixed: bool) -> None:
    """The loop of torchvision's references/detection/engine.py, which reads the losses before the
    backward and again after the step; it copies bytes to the GPU, not floats.

    Its RPN predicts and makes its anchors in 32 bit, as ours: under autocast they would be in
    bfloat16, pixels off. So would be the numbers of the cells by which ``project_masks_on_boxes``
    finds a mask: wrong from 257 on, and at times behind the last mask.
    """
    model.rpn.head.register_forward_hook(
        lambda head, levels, found: tuple([level.float() for level in kind] for kind in found)
    )
    model.rpn.anchor_generator.register_forward_pre_hook(
        lambda generator, inputs: (inputs[0], [level[:0].float() for level in inputs[1]])
    )
    model.train()
    for images, targets in batches:
        images, targets = engine.to_device(images, targets, DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mixed):
            losses = model(images, targets)
        total = sum(losses.values())
        if not np.isfinite(total.item()):
            raise ValueError(f"losses that are not finite: {losses}")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        for loss in (total, *losses.values()):
            loss.item()


def augment_on_device(batch: Batch) -> Batch:
    """Augment a batch of ``Crops`` on the device, as the workers do otherwise; make its targets."""
    images, targets = [], []
    for image, drawn in zip(*batch, strict=True):
        crop = (tensor.to(DEVICE, non_blocking=True) for tensor in (image, drawn["label_maps"]))
        image, label_maps = augment(*crop, RECIPES[RECIPE], drawn.pop("recipe_seed"))
        images.append(image)
        targets.append(drawn | boxes_on_device(label_maps) | {"label_maps": label_maps})
    return images, targets


def boxes_on_device(label_maps: Tensor) -> dict[str, Tensor]:
    """``labels.find_boxes`` on a device: boxes float32 [N, 4], labels int64 [N], ids int32 [N]."""
    class_index, y, x = label_maps.nonzero().unbind(1)
    keys = class_index * CLASS + label_maps[class_index, y, x]
    keys, cell = torch.unique(keys, return_inverse=True)
    pixels, cell = torch.stack([x, y], 1), cell[:, None].expand(-1, 2)
    first, last = (
        pixels.new_zeros(len(keys), 2).scatter_reduce(0, cell, pixels, how, include_self=False)
        for how in ("amin", "amax")
    )
    boxes = torch.cat([first, last + 1], 1).float()
    return {"boxes": boxes, "labels": keys // CLASS + 1, "ids": (keys % CLASS).int()}


def measure(side_px: int, batch_size: int, way: str) -> Measured:
    """``train`` in a fresh process; ``failure``: why it broke off, such as for memory or time."""
    with fresh_process() as process:
        try:
            return process.submit(train, side_px, batch_size, way).result(PROCESS_LIMIT_S)
        except TimeoutError:
            for child in multiprocessing.active_children():
                child.kill()
            return Measured(failure=f"{way} took over {PROCESS_LIMIT_S} s")
        except Exception as error:
            return Measured(failure=f"{way} failed: {type(error).__name__}: {one_line(error)}")


def rows() -> list[Row]:
    if DEVICE.type != "cuda":
        note = "not measured: torch finds no CUDA GPU; "
        note += "goals: 95 % busy with two workers, twice the images/s of torchvision's loop"
        return [row("GPU training", NAN, NAN, "", note=note)]
    table, ours = [], {}
    for at in itertools.product(SIDES_PX, BATCHES):
        ours[at] = measure(*at, "ours")
        table += rows_of(*at, "", ours[at], measure(*at, "peer"))
    for way, name in VARIANTS.items():
        variant = measure(*VARIANTS_AT, way)
        table += rows_of(*VARIANTS_AT, f", {name}", variant, ours[VARIANTS_AT])
    return table


def rows_of(side_px: int, batch_size: int, way: str, ours: Measured, peer: Measured) -> list[Row]:
    """Three rows; ``way`` is what a variant of ours adds to their names, else ""."""
    compared = "peer: ours without" if way else "goals: 2x the images/s, 95 % working"
    cells = round(CELLS * side_px**2 / SIDE_PX**2)
    note = f"{compared}; ResNet-50, {resolve_precision(RunConfig())}, up to {cells} drawn cells an "
    note += f"image, {RECIPE}, {WORKERS} workers, {TIMED} steps, fewer where they take over "
    note += f"{PART_LIMIT_S} s"
    note = "; ".join(filter(None, (note, ours.failure, peer.failure)))
    quantities = ("speed", "images/s"), ("waiting for the loader", "%"), ("GPU works", "%")
    table = []
    for (what, unit), mine, theirs in zip(quantities, ours[:3], peer[:3], strict=True):
        name = f"GPU training, {side_px} px, batch {batch_size}{way}: {what}"
        more = what != "waiting for the loader"
        table.append(row(name, mine, theirs, unit, note=note, more_is_better=more))
    print(*table, sep="\n", file=sys.stderr, flush=True)
    return table
