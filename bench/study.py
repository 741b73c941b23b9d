"""Where the wall time of a quick training goes: the share of a job of the study that is spent
outside the network's forward and backward.

The job is the study's own (``cellseg_helpers.jobs`` on ``02_train``, with one thread), from the
start of its process to its end; in ``make bench`` one, alone on the machine. A first cell of its
notebook's copy, ``install()``, times the package's calls from outside, and a last one saves them.
The network is the model's whole forward, in training and in prediction, and the backward.

    python -m bench.study        all training jobs of the quick study, one a core, into
                                 outputs/bench_study.csv
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
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from bench.measure import NAN, Row, now, row, save_table
from cellseg_helpers.config import ROOT
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.runs import RUNS, TABLES
from study.runs import parameter_files, run_keys, settings

SCALE, DATA, SEED = "quick", "drawn", 0
KEY = "c/final"  # the job that `make bench` runs
PARTS: dict[str, float] = defaultdict(float)  # wall seconds of each, without parts that it calls
_inner = [0.0]  # of each call in progress: seconds of the parts that it called


def time_part(owner: Any, name: str, part: str) -> None:
    """From now on, ``owner.name(...)`` counts as ``part``."""
    call = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        _inner.append(0.0)
        begun = now()
        try:
            return call(*arguments, **named)
        finally:
            taken = now() - begun
            PARTS[part] += taken - _inner.pop()
            _inner[-1] += taken

    setattr(owner, name, timed)


def install() -> None:
    """The notebook's first cell: time the parts of the training that follows."""
    from lightning_fabric import Fabric
    from torch import optim
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    from cellseg_helpers import engine, plots
    from cellseg_helpers.model import build

    figures = "training_curves loss_parts truth_beside_predictions"
    for owner, names, part in (
        (build.LabelMapMaskRCNN, "forward", "forward"),
        (Fabric, "backward", "backward"),
        (Fabric, "clip_gradients", "optimizer"),
        (optim.AdamW, "step", "optimizer"),  # of every run of this scale
        (_BaseDataLoaderIter, "__next__", "samples"),
        (engine, "open_data split_dataset to_coco", "data"),
        (engine, "build_model make_fabric make_optimizer", "building"),
        (build, "build_model", "building"),
        (engine, "predict_images", "pasting, tiles and RLE"),
        (engine, "evaluate", "evaluation"),
        (engine, "start_run save_checkpoint save_weights write_json write_text", "saving"),
        (plots, figures, "figures, without their drawing"),
    ):
        for name in names.split():
            time_part(owner, name, part)
    PARTS["installed"] = time.time()


def measure(key: str) -> dict[str, float]:
    """Seconds of each part of the job of a run, and ``total``; removes all that it writes."""
    name = f"bench-{os.getpid()}-{key.replace('/', '-')}"
    with tempfile.TemporaryDirectory() as folder:
        files = ("02_train.ipynb", "log.ipynb", "out.ipynb", "parts.json")
        *notebooks, parts_file = (f"{folder}/{file}" for file in files)
        notebook = nbformat.read(ROOT / "notebooks" / "02_train.ipynb", as_version=4)
        install = "from bench import study as bench_study\n\nbench_study.install()"
        save = f"import json\n\njson.dump(bench_study.PARTS, open({parts_file!r}, 'w'))"
        first, last = map(nbformat.v4.new_code_cell, (install, save))
        notebook.cells = [first, *notebook.cells, last]
        nbformat.write(notebook, notebooks[0])
        command = [sys.executable, "-m", "cellseg_helpers.jobs", *notebooks, "--gpu"]
        command += ["-f", *map(str, parameter_files(key, SCALE))]
        command += f"-r data {DATA} -r run_name {name}".split()
        command += f"-p seed {SEED} -p keep_checkpoint false".split()
        ours = {"PYTHONPATH": str(ROOT), "STUDY_PROCESS": str(os.getpid())}
        for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
            ours[f"{library}_NUM_THREADS"] = "1"  # as Snakemake without a GPU
        begun = time.time()
        try:
            subprocess.run(command, cwd=ROOT, env=os.environ | ours, check=True, stdout=sys.stderr)
            total = time.time() - begun
        finally:
            shutil.rmtree(ROOT / RUNS / name, ignore_errors=True)
            (ROOT / TABLES / f"02_{name}.csv").unlink(missing_ok=True)
        parts = json.loads(Path(parts_file).read_text())
    parts["start, papermill and imports"] = parts.pop("installed") - begun
    return parts | {"other": total - sum(parts.values()), "total": total}


def share_outside(parts: Any) -> Any:
    """% of the time outside forward and backward: of one job's parts, or of a table of jobs."""
    return 100 - 100 * (parts["forward"] + parts["backward"]) / parts["total"]


def rows() -> list[Row]:
    config = settings(KEY, SCALE, DATA, SEED)
    open_dataset(config.data)  # drawn and decoded once for all the study's trainings
    parts = measure(KEY)
    outside, total = share_outside(parts), parts.pop("total")
    shares = pd.Series(parts).sort_values(ascending=False) * 100 / total
    listed = ", ".join(f"{part} {share:.1f}" for part, share in shares.items())
    note = f"goal < 25 %; one run of {KEY}, {config.epochs} x {config.steps_per_epoch} steps, one "
    note += f"thread, {total:.0f} s from the job's start to its end; of it, in %: {listed}; what "
    note += "remains is imports and the memory-bound optimizer; tried: see bench/README.md"
    return [row("study: share of a training job outside the network", outside, NAN, "%", note=note)]


def main() -> None:
    begun = time.monotonic()
    open_dataset(DATA)
    keys = run_keys(SCALE)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        table = pd.DataFrame(pool.map(measure, keys), index=pd.Index(keys, name="run"))
    table.loc["all"] = table.sum()
    table.insert(0, "outside_percent", share_outside(table))
    total = {"total": round(time.monotonic() - begun)}
    save_table(table.reset_index(), ROOT / "outputs" / "bench_study.csv", total)


if __name__ == "__main__":
    main()
