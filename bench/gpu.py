"""Training on a GPU: images a second and the share of the time that it waits for two workers, against torchvision's Mask R-CNN.

Same samples, batches, losses and precision; the peer's samples hold dense masks. Each measurement has a process of its own:

    python -m bench.gpu 512 2 ours|peer|channels_first|compiled        side of the crops, px, batch, and what trains

prints images a second and the share, %; the last two are ours with its images in that order, and ours with its backbone compiled.
"""

import subprocess
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from bench.measure import ROOT, Row, times_less
from bench.scenes import dense_image, dense_label_maps, with_dense_masks
from bench.training import AS_TORCHVISION, CELLS, DEVICE, SIDE_PX, give_images, our_model, torchvision_model
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.readers import CellImage
from cellseg_helpers.data.transforms import EpochSampler, TrainingSet
from cellseg_helpers.engine import make_loader, make_optimizer, resolve_precision, to_device

SIDES_PX, BATCHES = (512, 1024), (2, 4, 8, 16)
VARIANTS = {"channels_first": "channels first", "compiled": "compiled backbone"}
VARIANTS_SIDE_PX, VARIANTS_BATCH = 1024, 4
WORKERS = 2
AHEAD = 2 * WORKERS  # batches that the workers prepare ahead
WARM_UP, STEPS = AHEAD + 2, 20
TIME_LIMIT_S = 180


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


def make_model(way: str) -> nn.Module:
    model = torchvision_model() if way == "peer" else our_model()
    if way == "channels_first":
        give_images(model, torch.contiguous_format)
    if way == "compiled":
        model.backbone.compile()
    return model


def train(side_px: int, batch_size: int, way: str) -> tuple[float, float]:
    """Images a second, and the share of the time spent in waiting for the next batch, %."""
    config = RunConfig(backbone="resnet50", batch_size=batch_size, num_workers=WORKERS, crop_size_px=side_px, **AS_TORCHVISION)
    scenes = Scenes(side_px + side_px // 8)
    indices = list(range(len(scenes.images)))
    samples = TrainingSet(
        scenes, indices, side_px, config.class_balance, config.augmentation, config.seed, config.drop_cut_cells
    )
    length = (WARM_UP + STEPS + AHEAD) * batch_size  # the workers are busy to the last step that is timed
    sampler = EpochSampler(indices, length, config.seed, batch_size=batch_size)
    model = make_model(way)
    optimizer = make_optimizer(model, config)
    mixed = resolve_precision(config) == "bf16-mixed"
    batches = iter(make_loader(WithDenseMasks(samples) if way == "peer" else samples, config, sampler))
    begun = waited = 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            synchronize()
            begun, waited = time.perf_counter(), 0.0
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        images, targets = to_device(*batch, DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mixed):
            loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        synchronize()
    taken = time.perf_counter() - begun
    return STEPS * batch_size / taken, 100 * waited / taken


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure(side_px: int, batch_size: int, way: str) -> tuple[float, float, str]:
    """``train`` in a fresh process; (nan, nan) and the reason where it did not end well, such as for lack of memory."""
    command = [sys.executable, "-m", "bench.gpu", str(side_px), str(batch_size), way]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        return float("nan"), float("nan"), f"{way} took over {TIME_LIMIT_S} s"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended by {-done.returncode}"])[-1]
        return float("nan"), float("nan"), f"{way} failed: {reason[:120]}"
    speed, share = map(float, done.stdout.split()[-2:])
    return speed, share, ""


def rows() -> list[Row]:
    if DEVICE.type != "cuda":
        return []
    table, ours = [], {}
    for side_px in SIDES_PX:
        for batch_size in BATCHES:
            ours[side_px, batch_size] = measure(side_px, batch_size, "ours")
            peer = measure(side_px, batch_size, "peer")
            table += two_rows(side_px, batch_size, "", ours[side_px, batch_size], peer, "goal 2x; ")
    size = VARIANTS_SIDE_PX, VARIANTS_BATCH
    for way, name in VARIANTS.items():
        table += two_rows(*size, f", {name}", measure(*size, way), ours[size], "peer: ours without; ")
    return table


def two_rows(
    side_px: int, batch_size: int, name: str, ours: tuple[float, float, str], peer: tuple[float, float, str], goal: str
) -> list[Row]:
    cells = round(CELLS * side_px**2 / SIDE_PX**2)
    note = f"ResNet-50, {resolve_precision(RunConfig())}, about {cells} drawn cells an image, {WORKERS} workers, {STEPS} steps"
    note = "; ".join(text for text in (note, ours[2], peer[2]) if text)
    name = f"GPU training, {side_px} px, batch {batch_size}{name}"
    less = times_less(ours[1], peer[1])
    return [
        Row(f"{name}: speed", ours[0], peer[0], "images/s", ours[0] / peer[0], "", goal + note),
        Row(f"{name}: waiting for the loader", ours[1], peer[1], "%", less, "", f"goal: 5 % or less; {note}"),
    ]


if __name__ == "__main__":
    print(*train(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
