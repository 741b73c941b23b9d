"""Fast and small, side by side with the usual ways: ``make bench`` writes ``outputs/bench.csv`` and prints it.

    python -m bench [NAME ...] [--out outputs/bench.csv] [--sample FOLDER]

Each benchmark is a module of this folder with a function ``rows()``; each runs in a process of its own. ``--sample`` is a folder
of real images in the HW3 layout; without it the embedded drawn tissue stands in, and the note says so. The exit code is 1 where a
benchmark failed, or two sides did not give the same.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from bench.measure import ROOT, Row
from cellseg_helpers.config import resolve_path
from cellseg_helpers.runs import provenance

BENCHMARKS = ("loading", "augmentation", "training", "prediction", "evaluation", "study", "startup", "gpu")
PACKAGES = (
    "torch", "torchvision", "numpy", "scipy", "scikit-image", "pycocotools", "hotcoco", "tifffile", "imagecodecs",
)  # fmt: skip
CALL = "import importlib, json, sys; print(json.dumps(importlib.import_module('bench.' + sys.argv[1]).rows()))"


def run(name: str, sample: str) -> list[Row]:
    """The rows of one benchmark, from a process of its own; a row that says why where it failed."""
    environment = os.environ | {"BENCH_SAMPLE": sample}
    done = subprocess.run([sys.executable, "-c", CALL, name], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended by {-done.returncode}"])[-1]
        return [Row(name, float("nan"), float("nan"), "", float("nan"), "", f"failed: {last}")]
    return [Row(*row) for row in json.loads(done.stdout.splitlines()[-1])]


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    import torch

    listed = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "code_version": provenance()["code_version"],
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": listed or "none",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "date": datetime.now().date().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench.csv")
    parser.add_argument("--sample", default="", metavar="FOLDER", help="it holds train/; default: drawn images")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if given.sample and not (resolve_path(given.sample) / "train").is_dir():
        parser.error(f"{given.sample} is no folder that holds train/")
    started = time.monotonic()
    rows: list[Row] = []
    taken: dict[str, float] = {}
    for name in given.names or BENCHMARKS:
        begun = time.monotonic()
        rows += run(name, given.sample)
        taken[name] = round(time.monotonic() - begun, 1)
        print(f"{name}: {taken[name]:.0f} s", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows, columns=Row._fields)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(given.out, index=False, float_format="%.4g")
    record = machine() | {"seconds": taken | {"total": round(time.monotonic() - started, 1)}}
    given.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    shown = table.assign(identical=table["identical"].str.slice(0, 40), note=table["note"].str.slice(0, 60))
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    return int(any(row.note.startswith("failed") or row.identical.startswith("OTHER") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
