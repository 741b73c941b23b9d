"""Where the wall time of a quick training goes: the share spent outside the network's forward and backward.

    python -m bench.study        one training; prints the seconds of its parts as JSON

The training is report C's at the study's quick size, in a process of its own from the interpreter's start, its run in a temporary
folder. The network is the model's whole forward (with proposals, matching and NMS), in training and in prediction, and the
backward. The package is not changed: calls are timed from outside.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

import psutil

from bench.measure import ROOT, Row, seconds
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.readers import open_dataset
from cellseg_helpers.study import settings

NETWORK = ("forward", "backward")
KEY = "c/final"


class Parts:
    """Seconds of wall time of named parts of a program, each without the parts that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # of each call under way: what the parts that it called took

    def time(self, owner: Any, name: str, part: str) -> None:
        """From now on, ``owner.name(...)`` counts as ``part``."""
        call = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            results: list[Any] = []
            self._inner.append(0.0)
            try:
                taken = seconds(lambda: results.append(call(*arguments, **named)))
            finally:
                inner = self._inner.pop()
            self.seconds[part] += taken - inner
            self._inner[-1] += taken
            return results[0]

        setattr(owner, name, timed)


def quick_settings() -> RunConfig:
    return settings(KEY, "quick", "drawn", seed=0)


def train() -> dict[str, float]:
    """Seconds of each part of this process's life up to the end of a training, and ``total``."""
    from lightning_fabric import Fabric
    from torch import optim
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    from cellseg_helpers import engine, runs
    from cellseg_helpers.model.build import LabelMapMaskRCNN

    started = psutil.Process().create_time()
    parts = Parts()
    parts.seconds["start and imports"] = time.time() - started
    for owner, names, part in (
        (LabelMapMaskRCNN, ["forward"], "forward"),
        (Fabric, ["backward"], "backward"),
        (Fabric, ["clip_gradients"], "optimizer"),
        ({"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD}[quick_settings().optimizer], ["step"], "optimizer"),
        (_BaseDataLoaderIter, ["__next__"], "samples"),
        (engine, ["open_data", "split_dataset", "to_coco"], "data"),
        (engine, ["build_model", "make_fabric", "make_optimizer"], "building"),
        (engine, ["predict_images"], "pasting, tiles and RLE"),
        (engine, ["evaluate"], "evaluation"),
        (engine, ["start_run", "save_checkpoint", "save_weights", "save_metrics", "write_json", "write_text"], "saving"),
    ):
        for name in names:
            parts.time(owner, name, part)
    with tempfile.TemporaryDirectory() as folder:
        runs.RUNS = folder
        engine.fit(quick_settings())
    total = time.time() - started
    return parts.seconds | {"other": total - sum(parts.seconds.values()), "total": total}


def rows() -> list[Row]:
    config = quick_settings()
    open_dataset(config.data)  # drawn and decoded once for all the study's trainings
    done = subprocess.run([sys.executable, "-m", "bench.study"], cwd=ROOT, capture_output=True, text=True, check=True)
    parts = json.loads(done.stdout.splitlines()[-1])
    total = parts.pop("total")
    shares = {part: 100 * taken / total for part, taken in sorted(parts.items(), key=lambda item: -item[1])}
    outside = sum(share for part, share in shares.items() if part not in NETWORK)
    listed = ", ".join(f"{part} {share:.1f}" for part, share in shares.items())
    size = f"{KEY}, {config.epochs} x {config.steps_per_epoch} steps, {total:.0f} s in all"
    nan = float("nan")
    return [Row("study: share outside the network", outside, nan, "%", nan, "", f"goal < 25 %; of it, in %: {listed}; {size}")]


if __name__ == "__main__":
    print(json.dumps(train()))
