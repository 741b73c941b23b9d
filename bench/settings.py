"""What torch's own switches do to a training step: ``python -m bench.settings`` writes
``outputs/bench_settings.csv``.

A step is that of a ResNet-50 on two 256 px crops of the drawn images that are not smaller, from
loading to the optimizer's step, otherwise as the package trains, but at a small learning rate; the
order of channels also on a dense image. Every setting starts from the same weights; epochs of a few
steps are run in turn. The loss that is compared is that of the second step: later ones let rounding
grow, from random weights.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from bench.machine import save_table
from bench.measure import ROOT, seconds
from bench.scenes import dense_image, dense_label_maps
from bench.training import (
    CELLS,
    SCENE,
    SEED,
    SIDE_PX,
    give_images,
    our_model,
    scene_target,
    stepper,
)
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.data.samples import EpochSampler, TrainingSet
from cellseg_helpers.engine import make_loader, make_optimizer, to_device
from cellseg_helpers.model.build import build_model

CONFIG = RunConfig(backbone="resnet50", crop_size_px=256, precision="32", learning_rate=1e-5)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS, ROUNDS = 4, 4
THREADS = torch.get_num_threads()


class Setting(NamedTuple):
    """One change to the baseline."""

    name: str
    note: str = ""
    order: torch.memory_format | None = None  # of the images' channels; None: the package's own
    compiled: bool = False
    fused: bool = True
    bf16: bool = False
    threads: int = THREADS
    workers: int = 0
    dense: bool = False  # an image of 1024 px with 772 cells, nothing loaded


SETTINGS = (
    Setting(
        "baseline",
        f"channels last, 32 bit, fused optimizer, no worker, {THREADS} threads, {DEVICE.type}",
    ),
    Setting("channels first", order=torch.contiguous_format),
    Setting(
        "compiled backbone", "torch.compile; its compilation is not in the time", compiled=True
    ),
    Setting("optimizer not fused", fused=False),
    *(Setting(f"{n} threads", threads=n) for n in (1, 2) if n != THREADS and DEVICE.type == "cpu"),
    *(Setting(f"{n} workers", workers=n) for n in (1, 2)),
    *(
        Setting(f"1 thread, {n} workers", "of two cores one for the samples", threads=1, workers=n)
        for n in (1, 2)
    ),
    Setting("bf16 autocast", bf16=True),
)
DENSE = (
    Setting("dense image", f"{SCENE}, SGD; channels last", dense=True),
    Setting("dense image, channels first", dense=True, order=torch.contiguous_format),
)


def make_epoch(setting: Setting) -> Callable[[], float]:
    """A function that trains for ``STEPS`` steps and gives the second one's loss."""
    if setting.dense:
        return make_dense_epoch(setting)
    torch.manual_seed(0)
    config = replace(CONFIG, num_workers=setting.workers)
    dataset = open_dataset(config.data)
    indices = np.flatnonzero(dataset.sizes.min(1) >= config.crop_size_px).tolist()
    samples = TrainingSet(
        dataset,
        indices,
        config.crop_size_px,
        config.class_balance,
        config.augmentation,
        config.seed,
    )
    loader = make_loader(
        samples, config, EpochSampler(indices, STEPS * config.batch_size, config.seed)
    )
    model = build_model(config).to(DEVICE).train()
    if setting.order:
        give_images(model, setting.order)
    optimizer = make_optimizer(
        model, config if setting.fused else replace(config, precision="16-mixed")
    )  # which fuses none
    if setting.compiled:
        model.backbone.compile()

    def epoch() -> float:
        torch.set_num_threads(setting.threads)
        losses = []
        for batch in loader:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=setting.bf16):
                loss = sum(model(*to_device(*batch, DEVICE)).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[1]

    return epoch


def make_dense_epoch(setting: Setting) -> Callable[[], float]:
    label_maps = dense_label_maps(SIDE_PX, CELLS)
    model = our_model()
    if setting.order:
        give_images(model, setting.order)
    take_step = stepper(model, torch.from_numpy(dense_image(label_maps)).to(DEVICE) / 255)
    target = scene_target(CELLS) | {"seed": SEED}
    return lambda: [sum(take_step(target).values()) for _ in range(STEPS)][1]


def main() -> None:
    begun = time.monotonic()
    table = pd.concat([compare(SETTINGS, ROUNDS), compare(DENSE, 1)])
    save_table(
        table, ROOT / "outputs" / "bench_settings.csv", {"total": round(time.monotonic() - begun)}
    )
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))


def compare(settings: Sequence[Setting], rounds: int) -> pd.DataFrame:
    """Times and losses of settings, beside the first one's."""
    epochs, second_losses, failed = {}, {}, {}
    for setting in settings:
        try:
            epochs[setting] = make_epoch(setting)
            second_losses[setting] = epochs[setting]()
        except Exception as error:
            if not setting.compiled:
                raise
            epochs.pop(setting)
            failed[setting] = f"not to be had here: {' '.join(str(error).split())[:120]}"
    times = {setting: [] for setting in epochs}
    for _ in range(rounds):
        for setting, epoch in epochs.items():
            times[setting].append(seconds(epoch))
    milliseconds = {
        setting: 1000 * statistics.median(taken) / STEPS for setting, taken in times.items()
    }
    baseline = settings[0]
    return pd.DataFrame(
        {
            "setting": setting.name,
            "ms_per_step": milliseconds.get(setting, math.nan),
            "times_faster": milliseconds[baseline] / milliseconds.get(setting, math.nan),
            "loss_difference": abs(second_losses.get(setting, math.nan) - second_losses[baseline]),
            "note": failed.get(setting, setting.note),
        }
        for setting in settings
    )


if __name__ == "__main__":
    main()
