"""Training on a GPU: images a second and how busy the GPU is, with two workers, against
torchvision's reference training loop.

Ours is trained by the package's ``train_epoch``, torchvision's Mask R-CNN by the loop of its
references/detection/engine.py; both by samples, batches, losses and precision that are the same,
without clipping. The peer gets more than the reference gives it: bytes to copy in place of floats,
and anchors in 32 bit (``train_reference``). Each measurement has a process of its own:

    python -m bench.gpu 512 2 ours        side of the crops, px; batch; one of WAYS
    python -m bench.gpu                   all of them, each row as soon as it is measured

prints images a second, and of the time, in %, the share in which the loop waits for a batch and the
share in which the GPU works. Ours asks for a batch while the GPU still has the last step to do, so
that it may wait and the GPU not.
"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from bench.measure import ROOT, Row, times_less
from bench.scenes import dense_image, dense_label_maps, with_dense_masks
from bench.training import (
    AS_TORCHVISION,
    CELLS,
    DEVICE,
    SIDE_PX,
    give_images,
    our_model,
    torchvision_model,
)
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.augment import RECIPES, augment
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.samples import EpochSampler, SampleKey, TrainingSet
from cellseg_helpers.devices import make_fabric, resolve_precision
from cellseg_helpers.engine import (
    make_loader,
    make_optimizer,
    make_schedulers,
    to_device,
    train_epoch,
)

SIDES_PX, BATCHES = (512, 1024), (2, 4, 8, 16)
VARIANTS = {
    "channels_first": "channels first",
    "compiled": "compiled backbone",
    "augmented_on_gpu": "augmentation on the GPU",
    "float32": "32 bit",
}
WAYS = ("ours", "peer", *VARIANTS)
VARIANTS_SIDE_PX, VARIANTS_BATCH = 1024, 4
RECIPE = "flips_turns_stain"  # of params/full.yaml
WORKERS = 2
AHEAD = 2 * WORKERS  # batches that the workers prepare ahead
WARM_UP, TIMED, PROFILED = (
    5 * AHEAD,
    40,
    3,
)  # steps; what was prepared ahead is used up before the time counts
LEAST_TIMED, PART_LIMIT_S = (
    2,
    25,
)  # the warm-up and the timed steps end sooner where they take longer than this
PROCESS_LIMIT_S = 240
CLASS = 2**32  # class_id * CLASS + id: both in an int64
NAN = float("nan")


class Measured(NamedTuple):
    images_per_s: float
    waiting: float  # %
    working: float  # %
    failure: str = ""


class Scenes:
    """What ``TrainingSet`` needs of a data set: a few dense drawn images."""

    def __init__(self, side_px: int, images: int = 4):
        cells = round(CELLS * side_px**2 / SIDE_PX**2)
        label_maps = [dense_label_maps(side_px, cells, seed=seed) for seed in range(images)]
        self.images = [
            CellImage(str(seed), None, dense_image(maps, seed), maps)
            for seed, maps in enumerate(label_maps)
        ]
        self.counts = np.array([maps.max((1, 2)) for maps in label_maps])

    def __getitem__(self, index: int) -> CellImage:
        return self.images[index]


class WithDenseMasks(Dataset):
    """The samples of ``TrainingSet`` as torchvision's Mask R-CNN takes them."""

    def __init__(self, samples: TrainingSet):
        self.samples = samples

    def __getitem__(self, key: SampleKey):
        image, target = self.samples[key]
        return image, with_dense_masks(target)


class Crops(Dataset):
    """The samples of ``TrainingSet`` before ``augment_on_device``."""

    def __init__(self, samples: TrainingSet):
        self.samples = samples

    def __getitem__(self, key: SampleKey):
        image, label_maps, image_id, (model_seed, recipe_seed) = self.samples.draw_crop(key)
        return image, {
            "label_maps": label_maps,
            "image_id": image_id,
            "seed": model_seed,
            "recipe_seed": recipe_seed,
        }


class Watch:
    """The batches of a loader, and what the loop that takes them is like; to ``train_epoch`` it is
    the progress bar, too.

    Steps are warm-up, then timed, then profiled; after those, there are no more batches.
    """

    def __init__(self, loader: DataLoader, prepare: Callable[[Any], Any]):
        self.loader, self.prepare = loader, prepare
        self.part, self.parts, self.steps, self.waited_s = (
            "",
            iter(("warm-up", "timed", "profiled", "ended")),
            0,
            0.0,
        )
        self.profiler = profile(
            activities=[ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU]
        )
        self._next_part()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while self.part != "ended":
            asked = time.perf_counter()
            batch = next(batches)
            self.waited_s += time.perf_counter() - asked
            yield self.prepare(batch)

    def update(self) -> None:
        """A step has ended."""
        self.steps += 1
        late = time.perf_counter() - self.begun > PART_LIMIT_S
        most = {"warm-up": WARM_UP, "timed": TIMED, "profiled": PROFILED}[self.part]
        least = {"warm-up": AHEAD + 1, "timed": LEAST_TIMED, "profiled": PROFILED}[self.part]
        if self.steps == most or (late and self.steps >= least):
            self._next_part()

    def set_postfix(self, *_: Any, **__: Any) -> None:
        pass

    def _next_part(self) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        if self.part == "timed":
            self.timed_s, self.timed_steps, self.timed_waiting_s = (
                time.perf_counter() - self.begun,
                self.steps,
                self.waited_s,
            )
            self.profiler.start()
        if self.part == "profiled":
            self.profiler.stop()
        self.part, self.begun, self.steps, self.waited_s = (
            next(self.parts),
            time.perf_counter(),
            0,
            0.0,
        )

    def measured(self, batch_size: int) -> Measured:
        """``working``: kernels and copies of a profiled step, over the time of one that is not; the
        profiler's own time is left out.
        """
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in self.profiler.events()
            if event.device_type.name.lower() == DEVICE.type and not event.is_user_annotation
        ]
        working_s_per_step = covered(spans) / 1e6 / PROFILED if spans else NAN
        s_per_step = self.timed_s / self.timed_steps
        return Measured(
            batch_size / s_per_step,
            100 * self.timed_waiting_s / self.timed_s,
            100 * working_s_per_step / s_per_step,
        )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of some spans: what runs side by side counts once."""
    total, reached = 0.0, -np.inf
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return float(total)


def train(side_px: int, batch_size: int, way: str) -> Measured:
    config = RunConfig(
        backbone="resnet50", batch_size=batch_size, num_workers=WORKERS, crop_size_px=side_px, augmentation=RECIPE,
        gradient_clip_norm=0.0, precision="32" if way == "float32" else "auto", **AS_TORCHVISION,
    )  # fmt: skip
    scenes = Scenes(side_px + side_px // 8)
    indices = list(range(len(scenes.images)))
    samples = TrainingSet(
        scenes, indices, side_px, config.class_balance, RECIPE, config.seed, config.drop_cut_cells
    )
    read = {"peer": WithDenseMasks, "augmented_on_gpu": Crops}.get(way, lambda samples: samples)(
        samples
    )
    steps = WARM_UP + TIMED + PROFILED + AHEAD  # the workers are busy to the last step
    sampler = EpochSampler(indices, steps * batch_size, config.seed, batch_size=batch_size)
    loader = make_loader(read, config, sampler)
    if way == "peer":
        loader.pin_memory = False  # as in the reference; masks of 13 GB, of a batch of 16 at 1024 px, would take long to pin
    watch = Watch(loader, augment_on_device if way == "augmented_on_gpu" else lambda batch: batch)
    model = torchvision_model() if way == "peer" else our_model()
    optimizer = make_optimizer(model, config)
    schedule, _ = make_schedulers(optimizer, config, steps)
    if way == "peer":
        train_reference(
            model, optimizer, schedule, watch, resolve_precision(config) == "bf16-mixed"
        )
    else:
        if way == "channels_first":
            give_images(model, torch.contiguous_format)
        if way == "compiled":
            model.backbone.compile()
        fabric = make_fabric(config)
        model, optimizer = fabric.setup(model, optimizer)
        train_epoch(fabric, model, optimizer, schedule, watch, config, watch)
    return watch.measured(batch_size)


def train_reference(model: nn.Module, optimizer, schedule, batches: Watch, mixed: bool) -> None:
    """torchvision's reference loop, which reads the losses before the backward and again after the
    step.

    Its RPN predicts, and puts its anchors, in 32 bit, as ours: under autocast they would be in
    bfloat16, pixels off, and with them the numbers of the cells by which ``project_masks_on_boxes``
    finds a mask, wrong from 257 on and past the last mask at times.
    """
    model.rpn.head.register_forward_hook(
        lambda _, inputs, output: tuple([level.float() for level in levels] for levels in output)
    )
    model.rpn.anchor_generator.register_forward_pre_hook(
        lambda _, inputs: (
            inputs[0],
            [level.new_empty(0, *level.shape[2:], dtype=torch.float32) for level in inputs[1]],
        )
    )
    model.train()
    for images, targets in batches:
        images, targets = to_device(images, targets, DEVICE)
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
        batches.update()


def augment_on_device(batch: tuple[list[Tensor], list[dict]]) -> tuple[list[Tensor], list[dict]]:
    """A batch of crops augmented on the device, by what the workers do otherwise, and their targets
    made there.
    """
    images, targets = [], []
    for image, drawn in zip(*batch, strict=True):
        image, label_maps = (
            tensor.to(DEVICE, non_blocking=True) for tensor in (image, drawn["label_maps"])
        )
        image, label_maps = augment(image, label_maps, RECIPES[RECIPE], drawn["recipe_seed"])
        images.append(image)
        targets.append(
            boxes_on_device(label_maps)
            | {"label_maps": label_maps, "image_id": drawn["image_id"], "seed": drawn["seed"]}
        )
    return images, targets


def boxes_on_device(label_maps: Tensor) -> dict[str, Tensor]:
    """``labels.find_boxes`` of label maps on a device: boxes float32 [N, 4], labels int64 [N], ids
    int32 [N].
    """
    class_index, y, x = label_maps.nonzero().unbind(1)
    keys, cell = torch.unique(
        class_index * CLASS + label_maps[class_index, y, x], return_inverse=True
    )
    places, cell = torch.stack([x, y], 1), cell[:, None].expand(-1, 2)
    first, last = (
        places.new_zeros(len(keys), 2).scatter_reduce(0, cell, places, how, include_self=False)
        for how in ("amin", "amax")
    )
    return {
        "boxes": torch.cat([first, last + 1], 1).float(),
        "labels": keys // CLASS + 1,
        "ids": (keys % CLASS).int(),
    }


def measure(side_px: int, batch_size: int, way: str) -> Measured:
    """``train`` in a fresh process; where it did not end well, such as for lack of memory,
    ``failure`` says why.
    """
    command = [sys.executable, "-m", "bench.gpu", str(side_px), str(batch_size), way]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return Measured(NAN, NAN, NAN, f"{way} took over {PROCESS_LIMIT_S} s")
    if done.returncode:
        return Measured(NAN, NAN, NAN, f"{way} failed: {reason(done.returncode, done.stderr)}")
    return Measured(*map(float, done.stdout.split()[-3:]))


def reason(returncode: int, stderr: str) -> str:
    if returncode < 0:
        return signal.Signals(-returncode).name
    lines = stderr.strip().splitlines()
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (errors or lines or [f"exit status {returncode}"])[-1][:120]


def rows() -> list[Row]:
    if DEVICE.type != "cuda":
        note = "not measured: torch finds no CUDA GPU; goals: 95 % busy with two workers, twice the images/s of torchvision's loop"
        return [Row("GPU training", NAN, NAN, "", NAN, "", note)]
    table, ours = [], {}
    for side_px in SIDES_PX:
        for batch_size in BATCHES:
            ours[side_px, batch_size] = measure(side_px, batch_size, "ours")
            table += rows_of(
                side_px,
                batch_size,
                "",
                ours[side_px, batch_size],
                measure(side_px, batch_size, "peer"),
            )
    for way, name in VARIANTS.items():
        variant = measure(VARIANTS_SIDE_PX, VARIANTS_BATCH, way)
        table += rows_of(
            VARIANTS_SIDE_PX,
            VARIANTS_BATCH,
            f", {name}",
            variant,
            ours[VARIANTS_SIDE_PX, VARIANTS_BATCH],
        )
    return table


def rows_of(
    side_px: int, batch_size: int, variant: str, ours: Measured, peer: Measured
) -> list[Row]:
    cells = round(CELLS * side_px**2 / SIDE_PX**2)
    name = f"GPU training, {side_px} px, batch {batch_size}{variant}"
    note = (
        f"{'peer: ours without; ' if variant else 'goals: 2x the images/s, 95 % working; '}ResNet-50, {resolve_precision(RunConfig())}, "
        f"up to {cells} drawn cells an image, {RECIPE}, {WORKERS} workers, {TIMED} steps, fewer where they take over {PART_LIMIT_S} s"
    )
    note = "; ".join(text for text in (note, ours.failure, peer.failure) if text)
    speed, waiting, working = ours.images_per_s, ours.waiting, ours.working
    table = [
        Row(
            f"{name}: speed",
            speed,
            peer.images_per_s,
            "images/s",
            times_less(peer.images_per_s, speed),
            "",
            note,
        ),
        Row(
            f"{name}: waiting for the loader",
            waiting,
            peer.waiting,
            "%",
            times_less(waiting, peer.waiting),
            "",
            note,
        ),
        Row(
            f"{name}: GPU works",
            working,
            peer.working,
            "%",
            times_less(peer.working, working),
            "",
            note,
        ),
    ]
    print(
        *table, sep="\n", file=sys.stderr, flush=True
    )  # what is measured stays, whatever comes after
    return table


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(*rows(), sep="\n")
        sys.exit()
    _, side, batch, chosen = sys.argv
    if chosen not in WAYS:
        sys.exit(f"{chosen!r} is none of {', '.join(WAYS)}")
    print(*train(int(side), int(batch), chosen)[:3], flush=True)
