"""Training on a GPU: images a second and the share of the time that it waits for two workers, against torchvision's Mask R-CNN.

Same samples, batches, losses and precision; the peer's samples hold dense masks. Each measurement has a process of its own:

    python -m bench.gpu 512 2 ours|peer        side of the crops, px, and batch; prints images a second and the share, %
"""

import subprocess
import sys
import time

import numpy as np
import torch
from torch.utils.data import Dataset

from bench.measure import ROOT, Row
from bench.scenes import dense_image, dense_label_maps, with_dense_masks
from bench.training import AS_TORCHVISION, CELLS, DEVICE, SIDE_PX, paired_models
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.readers import CellImage
from cellseg_helpers.data.transforms import EpochSampler, TrainingSet
from cellseg_helpers.engine import make_loader, make_optimizer, resolve_precision, to_device

SIDES_PX, BATCHES = (512, 1024), (2, 8, 16)
WARM_UP, STEPS = 2, 6
TIME_LIMIT_S = 120


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


def train(side_px: int, batch_size: int, peer: bool) -> tuple[float, float]:
    """Images a second, and the share of the time spent waiting for the next batch, %."""
    config = RunConfig(backbone="resnet50", batch_size=batch_size, num_workers=2, crop_size_px=side_px, **AS_TORCHVISION)
    scenes = Scenes(side_px + side_px // 8)
    indices = list(range(len(scenes.images)))
    samples = TrainingSet(
        scenes, indices, side_px, config.class_balance, config.augmentation, config.seed, config.drop_cut_cells
    )
    sampler = EpochSampler(indices, (WARM_UP + STEPS) * batch_size, config.seed, batch_size=batch_size)
    batches = iter(make_loader(WithDenseMasks(samples) if peer else samples, config, sampler))
    model = paired_models()[peer]
    optimizer = make_optimizer(model, config)
    mixed = resolve_precision(config) == "bf16-mixed"
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


def measure(side_px: int, batch_size: int, side: str) -> tuple[float, float, str]:
    """``train`` in a fresh process; (nan, nan) and the reason where it did not end well, such as for lack of memory."""
    command = [sys.executable, "-m", "bench.gpu", str(side_px), str(batch_size), side]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        return float("nan"), float("nan"), f"{side} took over {TIME_LIMIT_S} s"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended by {-done.returncode}"])[-1]
        return float("nan"), float("nan"), f"{side} failed: {reason[:120]}"
    speed, share = map(float, done.stdout.split()[-2:])
    return speed, share, ""


def rows() -> list[Row]:
    if DEVICE.type != "cuda":
        return []
    precision = resolve_precision(RunConfig())
    found = []
    for side_px in SIDES_PX:
        for batch_size in BATCHES:
            speed, share, failed = measure(side_px, batch_size, "ours")
            peer_speed, peer_share, peer_failed = measure(side_px, batch_size, "peer")
            cells = round(CELLS * side_px**2 / SIDE_PX**2)
            note = f"ResNet-50, {precision}, about {cells} drawn cells an image, two workers"
            note = "; ".join(text for text in (note, failed, peer_failed) if text)
            name = f"GPU training, {side_px} px, batch {batch_size}"
            found.append(Row(f"{name}: speed", speed, peer_speed, "images/s", speed / peer_speed, "", note))
            found.append(Row(f"{name}: waiting for the loader", share, peer_share, "%", peer_share / share, "", note))
    return found


if __name__ == "__main__":
    print(*train(int(sys.argv[1]), int(sys.argv[2]), peer=sys.argv[3] == "peer"))
