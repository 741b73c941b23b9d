"""A Mask R-CNN small enough to train in a second, and the settings for it; run by the tests, also
in processes of their own.
"""

import io
import os
import signal
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from cellseg_helpers import engine, runs
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data import cache
from cellseg_helpers.model.build import LabelMapMaskRCNN
from cellseg_helpers.runs import read_json, write_json

CLOCK_COLUMNS = ["train_minutes", "cpu_minutes", "peak_memory_bytes"]
CHANNELS = 16


class TinyPyramid(nn.Module):
    """Five levels of 16 channels at strides 4 to 64."""

    out_channels = CHANNELS

    def __init__(self, norm: type[nn.Module]):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 4, 4), norm(CHANNELS), nn.ReLU())
        self.down = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 2, 2) for _ in range(3))

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        levels = [self.stem(x)]
        for down in self.down:
            levels.append(down(levels[-1]).relu())
        return OrderedDict(
            zip(
                ["0", "1", "2", "3", "pool"], [*levels, F.max_pool2d(levels[-1], 1, 2)], strict=True
            )
        )


def build_tiny(config: RunConfig, norm: type[nn.Module] = nn.Identity) -> LabelMapMaskRCNN:
    """In place of ``build_model``: the same parts with 16 channels, and without norms unless one is
    given.
    """
    sizes = tuple((size,) for size in config.anchor_sizes)
    return LabelMapMaskRCNN(
        config,
        TinyPyramid(norm),
        AnchorGenerator(sizes, (config.anchor_ratios,) * 5),
        box_head=TwoMLPHead(CHANNELS * 7**2, 16),
        box_predictor=FastRCNNPredictor(16, 5),
        mask_head=MaskRCNNHeads(CHANNELS, [CHANNELS], 1),
        mask_predictor=MaskRCNNPredictor(CHANNELS, CHANNELS, 5),
        rpn_head=RPNHead(CHANNELS, len(config.anchor_ratios)),
    )


def build_tiny_with_norm(config: RunConfig) -> LabelMapMaskRCNN:
    return build_tiny(config, nn.BatchNorm2d)


BUILDERS = {"tiny": build_tiny, "tiny_with_norm": build_tiny_with_norm}


def tiny_settings(data: Path, **changes: Any) -> RunConfig:
    """Three epochs of two steps with two crops of 64 px each."""
    return RunConfig(
        **{
            "data": str(data),
            "run_name": "tiny",
            "crop_size_px": 64,
            "batch_size": 2,
            "epochs": 3,
            "steps_per_epoch": 2,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "rpn_batch_size_per_image": 32,
            "rpn_post_nms_top_n_train": 50,
            "rpn_post_nms_top_n_test": 50,
            "box_batch_size_per_image": 16,
            "mask_batch_size_per_image": 4,
            "detections_per_image": 5,
            "accelerator": "cpu",
            "precision": "32",
            **changes,
        }
    )


def history_without_clock(run_dir: Path) -> pd.DataFrame:
    return pd.read_csv(run_dir / "history.csv").drop(columns=CLOCK_COLUMNS)


def train_in_process(
    folder: Path,
    settings: dict[str, Any],
    builder: str = "tiny",
    die_in: str = "",
    nth: int = 0,
    environment: dict[str, str] | None = None,
) -> None:
    """``fit`` in a process of its own, with its files under ``folder``; ``die_in``: see
    ``die_in_the_middle_of``.
    """
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    runs.RUNS, cache.CACHE, engine.build_model = (
        str(folder / "runs"),
        folder / "cache",
        BUILDERS[builder],
    )
    if die_in:
        die_in_the_middle_of(die_in, nth)
    model = remember_model()
    engine.fit(RunConfig.from_dict(settings))
    write_json(folder / "finished.json", {"cpu_seconds": time.process_time()})
    torch.save(model[0].state_dict(), folder / f"rank{os.environ.get('RANK', 0)}.pt")


def remember_model() -> list[nn.Module]:
    """A list that will hold the model of the next ``fit``."""
    built, build = [], engine.build_model

    def build_and_remember(config: RunConfig) -> nn.Module:
        built.append(build(config))
        return built[0]

    engine.build_model = build_and_remember
    return built


def die_in_the_middle_of(save: str, nth: int) -> None:
    """The nth checkpoint or weights file from now on is written by half, and then the process is
    killed by SIGKILL.
    """
    import safetensors.torch

    calls = []

    def half(whole: bytes, path: Path) -> None:
        calls.append(path)
        Path(path).write_bytes(whole if len(calls) < nth else whole[: len(whole) // 2])
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    save_to_buffer = torch.save

    def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
        buffer = io.BytesIO()
        save_to_buffer(checkpoint, buffer)
        half(buffer.getvalue(), path)

    if save == "last.pt":
        torch.save = save_checkpoint
    else:
        safetensors.torch.save_file = lambda tensors, path: half(
            safetensors.torch.save(tensors), path
        )


if __name__ == "__main__":
    train_in_process(
        Path(sys.argv[1]), read_json(Path(sys.argv[1]) / "settings.json"), *sys.argv[2:]
    )
