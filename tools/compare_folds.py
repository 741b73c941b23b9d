"""Systems on the same folds by patient: runs of this package beside the plain torchvision script.

    python -m tools.compare_folds plain_torchvision own=params/sample.yaml+params/own.yaml \
        --data outputs/sample --weights WEIGHTS --minutes 20 --jobs 2

A system is ``plain_torchvision``, or ``name=file+file``: a run with these parameter files. Each
training is a process of one thread and takes about ``--minutes`` of its processor; a run takes as
many steps as fit into that at ``--steps-per-minute``. It is scored after its last step. Rows are
appended to ``--out`` as they come; what it holds is not trained again:

    system, fold, seed, minutes, steps, AP50, AP, AP75, <class>_AP50 ..., maxDets, code, processor

Scores are mask AP at the dense maxDets of the fold, by ``metrics.evaluate`` for all systems.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cellseg_helpers import runs
from cellseg_helpers.cells import Cells
from cellseg_helpers.config import ROOT, RunConfig, resolve_path
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.engine import fit, open_data, split_dataset
from cellseg_helpers.jobs import end_with
from cellseg_helpers.metrics import evaluate
from cellseg_helpers.runs import load_run, provenance, write_json, write_text

PLAIN = "plain_torchvision"
KEY = ["system", "fold", "seed"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="+", metavar="SYSTEM")
    parser.add_argument("--data", required=True, help="folder in the HW3 layout")
    parser.add_argument("--weights", required=True, help="of the backbone, .safetensors")
    parser.add_argument("--out", type=Path, default="outputs/comparison.csv")
    parser.add_argument("--minutes", type=float, default=20, help="of the processor, a training")
    parser.add_argument("--steps-per-minute", type=float, default=30, help="of a run")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    given = parser.parse_args()
    out = resolve_path(given.out)
    table = pd.read_csv(out) if out.exists() else pd.DataFrame(columns=KEY)
    done = set(table[KEY].itertuples(index=False, name=None))
    todo = [
        (system, *part)
        for *part, system in itertools.product(range(given.folds), given.seeds, given.systems)
        if (system.split("=")[0], *part) not in done
    ]
    context = multiprocessing.get_context("spawn")
    endings = {"initializer": end_with, "initargs": (os.getpid(),)}  # no training outlives this
    with ProcessPoolExecutor(given.jobs, mp_context=context, **endings) as pool:
        train_all = map if given.jobs == 1 else pool.map
        for row in train_all(train, todo, itertools.repeat(given)):
            table = pd.concat([table, pd.DataFrame([row])], ignore_index=True)
            write_text(out, table.to_csv(index=False, float_format="%.4f"))
            print(pd.Series(row).to_string(), "\n", flush=True)


def train(task: tuple[str, int, int], given: argparse.Namespace) -> dict[str, Any]:
    """Train one system on one fold with one seed: its row."""
    torch.set_num_threads(1)
    (system, fold, seed), name = task, task[0].split("=")[0]
    settings = {"data": given.data, "weights": given.weights, "split": "patient", "seed": seed}
    settings |= {"folds": given.folds, "fold": fold, "epochs": 1}
    settings |= {"run_name": f"folds-{name}-{given.minutes:g}min-fold{fold}-seed{seed}"}
    settings |= {"steps_per_epoch": round(given.minutes * given.steps_per_minute)}
    if name == PLAIN:
        scores, trained = train_plain(RunConfig(**settings), given.minutes)
    else:
        files = system.removeprefix(f"{name}=").split("+")
        run = load_run(fit(replace(RunConfig.from_yaml(*files), **settings)))
        scores = run.metrics
        minutes = run.history["cpu_minutes"].iloc[-1]
        trained = {"minutes": minutes, "steps": settings["steps_per_epoch"]}
    dense, code = scores["coco_dense"], provenance()
    row = dict(zip(KEY, (name, fold, seed), strict=True)) | trained
    row |= {ap: dense["summary"][ap] for ap in ("AP50", "AP", "AP75")}
    row |= {f"{k}_AP50": of_class["AP50"] for k, of_class in dense["per_class"].items()}
    row |= {"maxDets": dense["max_dets"][-1], "code": code["code_version"]}
    return row | {"processor": code["machine"]["processor"]}


def train_plain(config: RunConfig, minutes: float) -> tuple[dict[str, Any], dict[str, float]]:
    """Scores of ``tools.plain_torchvision`` on a run's split, and its minutes and steps."""
    dataset, scored = open_data(config)
    _, validation, split = split_dataset(scored, config)
    folder = resolve_path(runs.RUNS) / config.run_name
    write_json(folder / "split.json", split)
    data, weights = resolve_path(config.data), resolve_path(config.weights)
    command = [sys.executable, "-m", "tools.plain_torchvision", data, folder / "split.json"]
    command += [weights, folder, "--cpu-minutes", minutes, "--seed", config.seed]
    command += ["--rois-per-image", 128]  # torchvision's 512 halves its steps
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    detections = Cells.from_coco(json.loads((folder / "detections.json").read_text()))
    truth = to_coco(scored[i] for i in validation)
    metrics = json.loads((folder / "metrics.json").read_text())
    trained = {"minutes": metrics["cpu_minutes"], "steps": metrics["steps"]}
    return evaluate(truth, detections, 0.5, 0.5), trained


if __name__ == "__main__":
    main()
