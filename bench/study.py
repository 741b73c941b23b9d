"""Where the wall time of a quick training goes: the share of a job of the study spent outside the
network's forward and backward.

The job is the study's own (``jobs run`` on ``02_train``, with one thread), from the start of its
process to its end; in ``make bench`` one, alone on the machine. Its notebook is a copy with a cell
in front, ``install()``, and one behind, ``save()``: they time the package's calls from outside. The
network is the model's whole forward (with proposals, matching and NMS), in training and in
prediction, and the backward.

    python -m bench.study        all training jobs of the quick study, one for each core at a time,
    into outputs/bench_study.csv
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from bench.machine import save_table
from bench.measure import ROOT, Row, seconds
from cellseg_helpers.config import resolve_path
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.runs import RUNS
from study.runs import parameter_files, run_keys, settings

NETWORK = ("forward", "backward")
SCALE, DATA, SEED = "quick", "drawn", 0
KEY = "c/final"  # the job that stands for them in `make bench`
TABLES = "outputs/tables"
PARTS_FILE = "BENCH_PARTS"  # environment variable: where the kernel's ``save`` writes
ONE_THREAD = {
    f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")
}  # as Snakefile's rule train


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


PARTS = Parts()


def install() -> None:
    """The notebook's first cell: time the parts of the training that follows."""
    from lightning_fabric import Fabric
    from torch import optim
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    from cellseg_helpers import engine, plots
    from cellseg_helpers.model import build

    for owner, names, part in (
        (build.LabelMapMaskRCNN, ["forward"], "forward"),
        (Fabric, ["backward"], "backward"),
        (Fabric, ["clip_gradients"], "optimizer"),
        (optim.AdamW, ["step"], "optimizer"),  # of every run of this scale
        (_BaseDataLoaderIter, ["__next__"], "samples"),
        (engine, ["open_data", "split_dataset", "to_coco"], "data"),
        (engine, ["build_model", "make_fabric", "make_optimizer"], "building"),
        (build, ["build_model"], "building"),
        (engine, ["predict_images"], "pasting, tiles and RLE"),
        (engine, ["evaluate"], "evaluation"),
        (
            engine,
            [
                "start_run",
                "save_checkpoint",
                "save_weights",
                "write_json",
                "write_text",
            ],
            "saving",
        ),
        (
            plots,
            ["training_curves", "loss_parts", "truth_beside_predictions"],
            "figures, without their drawing",
        ),
    ):
        for name in names:
            PARTS.time(owner, name, part)
    PARTS.seconds["installed"] = time.time()


def save() -> None:
    """The notebook's last cell."""
    Path(os.environ[PARTS_FILE]).write_text(json.dumps(PARTS.seconds))


def run_job(key: str, folder: Path) -> dict[str, float]:
    """Seconds of each part of the job of a run, and ``total``; nothing that it writes is left
    outside of ``folder``.
    """
    notebook = nbformat.read(ROOT / "notebooks" / "02_train.ipynb", as_version=4)
    first, last = (
        nbformat.v4.new_code_cell(f"import bench.study\n\nbench.study.{name}()")
        for name in ("install", "save")
    )
    notebook.cells = [first, *notebook.cells, last]
    nbformat.write(notebook, folder / "02_train.ipynb")
    name = f"bench-{os.getpid()}-{key.replace('/', '-')}"
    command = [
        sys.executable,
        "-m",
        "cellseg_helpers.jobs",
        "run",
        folder / "02_train.ipynb",
        folder / f"{name}.ipynb",
    ]
    command += [
        "--log",
        folder / "jobs.csv",
        "--gpu",
        "--train",
        "-f",
        *parameter_files(key, SCALE),
    ]
    command += [
        "-r",
        "data",
        DATA,
        "-r",
        "run_name",
        name,
        "-p",
        "seed",
        SEED,
        "-p",
        "keep_checkpoint",
        "false",
    ]
    ours = {
        PARTS_FILE: str(folder / "parts.json"),
        "PYTHONPATH": str(ROOT),
        "STUDY_PROCESS": str(os.getpid()),
    }
    try:
        begun = time.time()
        subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | ONE_THREAD | ours,
            check=True,
            stdout=sys.stderr,
        )
        total = time.time() - begun
    finally:
        clean_up(name)
    parts = json.loads((folder / "parts.json").read_text())
    parts["start, papermill and imports"] = parts.pop("installed") - begun
    return parts | {"other": total - sum(parts.values()), "total": total}


def clean_up(run_name: str) -> None:
    """Remove the run's folder and table, and what then is empty."""
    shutil.rmtree(resolve_path(RUNS) / run_name, ignore_errors=True)
    (resolve_path(TABLES) / f"02_{run_name}.csv").unlink(missing_ok=True)
    for folder in (RUNS, TABLES):
        with suppress(OSError):
            resolve_path(folder).rmdir()


def measure(key: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return run_job(key, Path(folder))


def share_outside(parts: Any) -> Any:
    """%; of a dictionary of seconds, or of a table with a row for each job."""
    return 100 - 100 * sum(parts[part] for part in NETWORK) / parts["total"]


def rows() -> list[Row]:
    config = settings(KEY, SCALE, DATA, SEED)
    open_dataset(config.data)  # drawn and decoded once for all the study's trainings
    parts = measure(KEY)
    outside, total = share_outside(parts), parts.pop("total")
    listed = ", ".join(
        f"{part} {100 * taken / total:.1f}"
        for part, taken in sorted(parts.items(), key=lambda item: -item[1])
    )
    note = (
        f"goal < 25 %; one run of {KEY}, {config.epochs} x {config.steps_per_epoch} steps, one thread, "
        f"{total:.0f} s from the job's start to its end; of it, in %: {listed}; what remains is imports and the memory-bound optimizer; "
        "tried: imports without torch._dynamo, clipping inside the optimizer, forked kernels, and more (bench/README.md)"
    )
    nan = float("nan")
    return [
        Row("study: share of a training job outside the network", outside, nan, "%", nan, "", note)
    ]


def main() -> None:
    begun = time.monotonic()
    open_dataset(DATA)
    keys = run_keys(SCALE)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        table = pd.DataFrame(pool.map(measure, keys), index=pd.Index(keys, name="run"))
    table.loc["all"] = table.sum()
    table.insert(0, "outside_percent", share_outside(table))
    save_table(
        table.reset_index(),
        ROOT / "outputs" / "bench_study.csv",
        {"total": round(time.monotonic() - begun)},
    )
    print(table.round(1).to_string())


if __name__ == "__main__":
    main()
