"""Training on a GPU: images a second and how busy the GPU is, with two workers, against torchvision's reference training loop.

Same samples, batches, losses and precision; the peer's samples hold dense masks. Each measurement has a process of its own:

    python -m bench.gpu 512 2 ours|peer|channels_first|compiled|augmented_there        side of the crops, px, batch, and what trains

prints images a second, the share of the time spent in waiting for the next batch, and the share in which the GPU computes or
copies, %. The last three are ours with its images in that order, its backbone compiled, and its crops augmented on the GPU.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from bench.measure import ROOT, Row, times_less
from bench.scenes import dense_image, dense_label_maps, with_dense_masks
from bench.training import AS_TORCHVISION, CELLS, DEVICE, SIDE_PX, give_images, our_model, torchvision_model
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.readers import CellImage
from cellseg_helpers.data.recipes import RECIPES, augment
from cellseg_helpers.data.transforms import EpochSampler, TrainingSet
from cellseg_helpers.engine import make_fabric, make_loader, make_optimizer, make_schedulers, resolve_precision, to_device, train_epoch

SIDES_PX, BATCHES = (512, 1024), (2, 4, 8, 16)
RECIPE = "flips_turns_stain"  # of params/full.yaml
VARIANTS = {"channels_first": "channels first", "compiled": "compiled backbone", "augmented_there": "augmentation on the GPU"}
VARIANTS_SIDE_PX, VARIANTS_BATCH = 1024, 4
WORKERS = 2
AHEAD = 2 * WORKERS  # batches that the workers prepare ahead
WARM_UP, STEPS, PROFILED = AHEAD + 2, 20, 5
TIME_LIMIT_S = 180
NAN = float("nan")


class Scenes:
    """What ``TrainingSet`` needs of a data set: a few dense drawn images."""

    def __init__(self, side_px: int, images: int = 4):
        cells = round(CELLS * side_px**2 / SIDE_PX**2)
        label_maps = [dense_label_maps(side_px, cells, seed=seed) for seed in range(images)]
        self.images = [CellImage(str(seed), None, dense_image(maps, seed), maps) for seed, maps in enumerate(label_maps)]
        self.counts = np.array([maps.max((1, 2)) for maps in label_maps])

    def __getitem__(self, index: int) -> CellImage:
        return self.images[index]


class WithDenseMasks(Dataset):
    """The samples of ``TrainingSet`` as torchvision's Mask R-CNN takes them."""

    def __init__(self, samples: TrainingSet):
        self.samples = samples

    def __getitem__(self, key):
        image, target = self.samples[key]
        return image, with_dense_masks(target)


class Watch:
    """Hands on a loader's first batches, and measures the loop that takes them; to ``train_epoch`` it is its progress bar, too."""

    def __init__(self, loader: DataLoader, prepare: Callable[[Any], Any] | None = None):
        self.loader, self.prepare, self.waited, self.steps = loader, prepare, 0.0, 0
        self.begun = self.taken = NAN
        activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
        self.profiler = profile(activities=[activity])

    def __len__(self) -> int:
        return WARM_UP + STEPS + PROFILED

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        for _ in range(len(self)):
            asked = time.perf_counter()
            batch = next(batches)
            if WARM_UP <= self.steps < WARM_UP + STEPS:
                self.waited += time.perf_counter() - asked
            yield self.prepare(batch) if self.prepare else batch

    def set_postfix(self, *_: Any, **__: Any) -> None:
        pass

    def update(self) -> None:
        """A step has ended."""
        self.steps += 1
        if self.steps == WARM_UP:
            synchronize()
            self.begun = time.perf_counter()
        elif self.steps == WARM_UP + STEPS:
            synchronize()
            self.taken = time.perf_counter() - self.begun
            self.profiler.start()
        elif self.steps == len(self):
            synchronize()
            self.profiler.stop()

    def shares(self) -> tuple[float, float]:
        """Of the timed steps, %: waiting for a batch; work on the device, whose seconds a step are those of the profiled steps."""
        working = covered_us(
            (event.time_range.start, event.time_range.end)
            for event in self.profiler.events()
            if event.device_type.name.lower() == DEVICE.type and not event.is_user_annotation
        )
        return 100 * self.waited / self.taken, 100 * working / 1e6 / PROFILED * STEPS / self.taken


def covered_us(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of some intervals: what runs side by side counts once."""
    total, reached = 0.0, -np.inf
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return float(total)


def make_model(way: str) -> nn.Module:
    model = torchvision_model() if way == "peer" else our_model()
    if way == "channels_first":
        give_images(model, torch.contiguous_format)
    if way == "compiled":
        model.backbone.compile()
    return model


def train(side_px: int, batch_size: int, way: str) -> tuple[float, float, float]:
    """Images a second; the shares of the time, %, in which the loop waits for the next batch and the GPU works."""
    config = RunConfig(
        backbone="resnet50", batch_size=batch_size, num_workers=WORKERS, crop_size_px=side_px, augmentation=RECIPE,
        gradient_clip_norm=0.0, **AS_TORCHVISION,
    )  # fmt: skip
    scenes = Scenes(side_px + side_px // 8)
    indices = list(range(len(scenes.images)))
    recipe = "none" if way == "augmented_there" else config.augmentation
    samples = TrainingSet(scenes, indices, side_px, config.class_balance, recipe, config.seed, config.drop_cut_cells)
    length = (WARM_UP + STEPS + PROFILED + AHEAD) * batch_size  # the workers are busy to the last step that is timed
    sampler = EpochSampler(indices, length, config.seed, batch_size=batch_size)
    loader = make_loader(WithDenseMasks(samples) if way == "peer" else samples, config, sampler)
    watch = Watch(loader, augment_there if way == "augmented_there" else None)
    model = make_model(way)
    optimizer = make_optimizer(model, config)
    schedule, _ = make_schedulers(optimizer, config, len(watch))
    if way == "peer":
        reference_epoch(model, optimizer, schedule, watch, resolve_precision(config) == "bf16-mixed")
    else:
        fabric = make_fabric(config)
        model, optimizer = fabric.setup(model, optimizer)
        train_epoch(fabric, model, optimizer, schedule, watch, config, watch)
    return STEPS * batch_size / watch.taken, *watch.shares()


def reference_epoch(model: nn.Module, optimizer, schedule, batches: Watch, mixed: bool) -> None:
    """The loop of torchvision's references/detection/engine.py: the losses are read before the backward, and again after the step."""
    model.train()
    for images, targets in batches:
        images, targets = to_device(images, targets, DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mixed):
            losses = model(images, targets)
        total = sum(losses.values())
        assert np.isfinite(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        [loss.item() for loss in (total, *losses.values())]
        batches.update()


def augment_there(batch: tuple[list[Tensor], list[dict]]) -> tuple[list[Tensor], list[dict]]:
    """A batch of crops augmented on the device, by what the workers do otherwise, and their targets made there."""
    images, targets = [], []
    for image, target in zip(*batch, strict=True):
        label_maps = target["label_maps"].to(DEVICE, non_blocking=True)
        image, label_maps = augment(image.to(DEVICE, non_blocking=True), label_maps, RECIPES[RECIPE], target["seed"])
        images.append(image)
        targets.append(target | boxes_there(label_maps) | {"label_maps": label_maps})
    return images, targets


def boxes_there(label_maps: Tensor) -> dict[str, Tensor]:
    """``labels.find_boxes`` of label maps on a device: boxes float32 [N, 4], labels int64 [N], ids int32 [N]."""
    places = label_maps.nonzero()  # of every cell's pixels: class, row, column
    cells, cell = torch.unique(places[:, 0] * 2**32 + label_maps[tuple(places.T)], return_inverse=True)
    cell, pixels = cell[:, None].expand(-1, 2), places[:, [2, 1]]
    first = pixels.new_zeros(len(cells), 2).scatter_reduce(0, cell, pixels, "amin", include_self=False)
    last = pixels.new_zeros(len(cells), 2).scatter_reduce(0, cell, pixels, "amax", include_self=False)
    return {"boxes": torch.cat([first, last + 1], 1).float(), "labels": cells // 2**32 + 1, "ids": (cells % 2**32).int()}


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure(side_px: int, batch_size: int, way: str) -> tuple[float, float, float, str]:
    """``train`` in a fresh process; three nan and the reason where it did not end well, such as for lack of memory."""
    command = [sys.executable, "-m", "bench.gpu", str(side_px), str(batch_size), way]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        return NAN, NAN, NAN, f"{way} took over {TIME_LIMIT_S} s"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended by {-done.returncode}"])[-1]
        return NAN, NAN, NAN, f"{way} failed: {reason[:120]}"
    return *map(float, done.stdout.split()[-3:]), ""


def rows() -> list[Row]:
    if DEVICE.type != "cuda":
        return []
    table, ours = [], {}
    for side_px in SIDES_PX:
        for batch_size in BATCHES:
            ours[side_px, batch_size] = measure(side_px, batch_size, "ours")
            peer = measure(side_px, batch_size, "peer")
            table += rows_of(side_px, batch_size, "", ours[side_px, batch_size], peer, "goal 2x; ")
    size = VARIANTS_SIDE_PX, VARIANTS_BATCH
    for way, name in VARIANTS.items():
        table += rows_of(*size, f", {name}", measure(*size, way), ours[size], "peer: ours without; ")
    return table


def rows_of(
    side_px: int, batch_size: int, name: str, ours: tuple[float, float, float, str], peer: tuple[float, float, float, str], goal: str
) -> list[Row]:
    cells = round(CELLS * side_px**2 / SIDE_PX**2)
    note = f"ResNet-50, {resolve_precision(RunConfig())}, about {cells} drawn cells an image, {RECIPE}, {WORKERS} workers, {STEPS} steps"
    note = "; ".join(text for text in (note, ours[3], peer[3]) if text)
    name = f"GPU training, {side_px} px, batch {batch_size}{name}"
    less = times_less(ours[1], peer[1])
    return [
        Row(f"{name}: speed", ours[0], peer[0], "images/s", ours[0] / peer[0], "", goal + note),
        Row(f"{name}: waiting for the loader", ours[1], peer[1], "%", less, "", f"goal: 5 % or less; {note}"),
        Row(f"{name}: GPU busy", ours[2], peer[2], "%", ours[2] / peer[2], "", f"goal 95 %; {PROFILED} steps profiled; {note}"),
    ]


if __name__ == "__main__":
    print(*train(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
