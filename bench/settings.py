"""What torch's own switches do to a training step: ``python -m bench.settings`` writes
``outputs/bench_settings.csv``.

A step is that of a ResNet-50 on two 256 px crops of drawn images, from loading to the optimizer's
step, as the package trains but at a small learning rate; the order of channels also on a dense
image. Every setting starts from the same weights; epochs of a few steps are run in turn. The loss
that is compared is that of the second step: later ones let rounding grow, from random weights.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from bench import training
from bench.measure import medians_in_turn, save_table
from bench.training import DEVICE, SCENE
from cellseg_helpers.config import ROOT, RunConfig, one_line
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.data.samples import EpochSampler
from cellseg_helpers.engine import make_loader, make_optimizer, make_samples, to_device
from cellseg_helpers.model.build import build_model

CONFIG = RunConfig(backbone="resnet50", crop_size_px=256, precision="32", learning_rate=1e-5)
STEPS, ROUNDS = 4, 4
THREADS = torch.get_num_threads()
SETTINGS: dict[str, dict[str, Any]] = {  # the arguments of ``make_epoch``
    "baseline": {},
    "channels first": {"order": torch.contiguous_format},
    "compiled backbone": {"compiled": True},
    "optimizer not fused": {"fused": False},
    **{f"{n} threads": {"threads": n} for n in (1, 2) if n != THREADS and DEVICE.type == "cpu"},
    **{f"{n} workers": {"workers": n} for n in (1, 2)},
    **{f"1 thread, {n} workers": {"threads": 1, "workers": n} for n in (1, 2)},
    "bf16 autocast": {"bf16": True},
}
DENSE = {
    "dense image": {"dense": True},
    "dense image, channels first": {"dense": True, "order": torch.contiguous_format},
}
NOTES = {
    "baseline": "channels last, 32 bit, fused optimizer, no worker, "
    f"{THREADS} threads, {DEVICE.type}",
    "compiled backbone": "torch.compile; its compilation is not in the time",
    "1 thread, 1 workers": "of two cores one for the samples",
    "1 thread, 2 workers": "of two cores one for the samples",
    "dense image": f"{SCENE}, SGD; channels last",
}


def make_epoch(
    order=None, compiled=False, fused=True, bf16=False, threads=THREADS, workers=0, dense=False
) -> Callable[[], float]:
    """A function that trains for ``STEPS`` steps and gives the second one's loss.

    Args:
        order: memory format of the images; None: the package's own.
        dense: train on the scene of ``bench.training`` and load nothing.
    """
    torch.manual_seed(0)
    config = replace(CONFIG, num_workers=workers)
    model = training.our_model() if dense else build_model(config).to(DEVICE).train()
    if order:
        training.give_images(model, order)
    if dense:
        step = training.stepper(model, *training.scene())
        return lambda: [sum(step().values()) for _ in range(STEPS)][1]
    if compiled:
        model.backbone.compile()
    dataset = open_dataset(config.data)
    indices = np.flatnonzero(dataset.sizes.min(1) >= config.crop_size_px).tolist()
    sampler = EpochSampler(indices, STEPS * config.batch_size, config.seed)
    loader = make_loader(make_samples(dataset, indices, config), config, sampler)
    # with 16-mixed the package fuses no optimizer
    optimizer = make_optimizer(model, config if fused else replace(config, precision="16-mixed"))

    def epoch() -> float:
        torch.set_num_threads(threads)
        losses = []
        for batch in loader:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                loss = sum(model(*to_device(*batch, DEVICE)).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[1]

    return epoch


def compare(settings: dict[str, dict[str, Any]], rounds: int) -> pd.DataFrame:
    """Times and losses of settings, beside the first one's."""
    epochs, losses, notes = {}, {}, {name: NOTES.get(name) for name in settings}
    for name, arguments in settings.items():
        try:
            epoch = make_epoch(**arguments)
            losses[name], epochs[name] = epoch(), epoch
        except Exception as error:
            if "compiled" not in arguments:
                raise
            notes[name] = f"not possible here: {one_line(error)}"
    times = medians_in_turn(list(epochs.values()), rounds)
    table = pd.DataFrame(index=pd.Index(settings, name="setting"))
    table["ms_per_step"] = pd.Series(times, index=list(epochs)) * 1000 / STEPS
    table["times_faster"] = table["ms_per_step"].iloc[0] / table["ms_per_step"]
    table["loss_difference"] = (pd.Series(losses) - next(iter(losses.values()))).abs()
    return table.assign(note=pd.Series(notes)).reset_index()


def main() -> None:
    begun = time.monotonic()
    table = pd.concat([compare(SETTINGS, ROUNDS), compare(DENSE, 1)])
    seconds = {"total": round(time.monotonic() - begun)}
    save_table(table, ROOT / "outputs" / "bench_settings.csv", seconds)


if __name__ == "__main__":
    main()
