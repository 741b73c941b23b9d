"""What torch's own switches do to a training step: ``python -m bench.settings`` writes
``outputs/bench_settings.csv``.

A step is that of a ResNet-50 on two 256 px crops of drawn images, from loading to the optimizer's
step, as the package trains but at a small learning rate; the order of channels also on a dense
image. Every setting starts from the same weights; epochs of a few steps are run in turn. The loss
that is compared is that of the second step: later ones let rounding grow, from random weights.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from bench import training
from bench.measure import medians_in_turn, save_table
from bench.training import CELLS, DEVICE, SCENE, SEED
from cellseg_helpers.config import ROOT, RunConfig, one_line
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.data.samples import EpochSampler, TrainingSet
from cellseg_helpers.engine import make_loader, make_optimizer, to_device
from cellseg_helpers.model.build import build_model

CONFIG = RunConfig(backbone="resnet50", crop_size_px=256, precision="32", learning_rate=1e-5)
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


BASELINE = f"channels last, 32 bit, fused optimizer, no worker, {THREADS} threads, {DEVICE.type}"
SETTINGS = [
    Setting("baseline", BASELINE),
    Setting("channels first", order=torch.contiguous_format),
    Setting("compiled backbone", "its compilation is not in the time", compiled=True),
    Setting("optimizer not fused", fused=False),
    *(Setting(f"{n} threads", threads=n) for n in (1, 2) if n != THREADS and DEVICE.type == "cpu"),
    *(Setting(f"{n} workers", workers=n) for n in (1, 2)),
    *(Setting(f"1 thread, {n} workers", threads=1, workers=n) for n in (1, 2)),
    Setting("bf16 autocast", bf16=True),
]
DENSE = [
    Setting("dense image", f"{SCENE}, SGD; channels last", dense=True),
    Setting("dense image, channels first", dense=True, order=torch.contiguous_format),
]


def make_epoch(setting: Setting) -> Callable[[], float]:
    """A function that trains for ``STEPS`` steps and gives the second one's loss."""
    torch.manual_seed(0)
    config = replace(CONFIG, num_workers=setting.workers)
    model = training.our_model() if setting.dense else build_model(config).to(DEVICE).train()
    if setting.order:
        training.give_images(model, setting.order)
    if setting.dense:
        target = training.scene_target(CELLS) | {"seed": SEED}
        take_step = training.stepper(model, training.scene_image(CELLS))
        return lambda: [sum(take_step(target).values()) for _ in range(STEPS)][1]
    dataset = open_dataset(config.data)
    indices = np.flatnonzero(dataset.sizes.min(1) >= config.crop_size_px).tolist()
    drawing = (config.crop_size_px, config.class_balance, config.augmentation, config.seed)
    samples = TrainingSet(dataset, indices, *drawing)
    sampler = EpochSampler(indices, STEPS * config.batch_size, config.seed)
    loader = make_loader(samples, config, sampler)
    unfused = replace(config, precision="16-mixed")  # with which the package fuses no optimizer
    optimizer = make_optimizer(model, config if setting.fused else unfused)
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


def compare(settings: Sequence[Setting], rounds: int) -> pd.DataFrame:
    """Times and losses of settings, beside the first one's."""
    notes, losses, epochs = {}, {}, {}
    for setting in settings:
        notes[setting.name] = setting.note
        try:
            epoch = make_epoch(setting)
            losses[setting.name] = epoch()
            epochs[setting.name] = epoch
        except Exception as error:
            if not setting.compiled:
                raise
            notes[setting.name] = f"not possible here: {one_line(error)}"
    medians = medians_in_turn(list(epochs.values()), rounds)
    milliseconds = 1000 / STEPS * pd.Series(medians, index=list(epochs))
    columns = {"ms_per_step": milliseconds, "times_faster": milliseconds.iloc[0] / milliseconds}
    columns["loss_difference"] = (pd.Series(losses) - losses[settings[0].name]).abs()
    table = pd.DataFrame(columns, index=list(notes)).assign(note=pd.Series(notes))
    return table.rename_axis("setting").reset_index()


def main() -> None:
    begun = time.monotonic()
    table = pd.concat([compare(SETTINGS, ROUNDS), compare(DENSE, 1)])
    seconds = {"total": round(time.monotonic() - begun)}
    save_table(table, ROOT / "outputs" / "bench_settings.csv", seconds)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))


if __name__ == "__main__":
    main()
