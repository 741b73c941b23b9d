"""Fast and small, side by side with the usual ways: ``make bench`` writes ``outputs/bench.csv`` and prints it.

    python -m bench [NAME ...] [--out outputs/bench.csv] [--sample outputs/sample]

Each benchmark is a module of this folder with a function ``rows()``; each runs in a process of its own. ``--sample`` is a folder
of real images in the HW3 layout; without it the embedded drawn tissue stands in, and the note says so.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from bench.measure import ROOT, Row

BENCHMARKS = ("loading", "augmentation", "training", "prediction", "evaluation", "study", "startup", "gpu")
CALL = "import importlib, json, sys; print(json.dumps(importlib.import_module('bench.' + sys.argv[1]).rows()))"


def run(name: str, sample: str) -> list[Row]:
    """The rows of one benchmark, from a process of its own; a row that says why where it failed."""
    environment = os.environ | {"BENCH_SAMPLE": sample}
    done = subprocess.run([sys.executable, "-c", CALL, name], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended by {-done.returncode}"])[-1]
        return [Row(name, float("nan"), float("nan"), "", float("nan"), "", f"failed: {last}")]
    return [Row(*row) for row in json.loads(done.stdout.splitlines()[-1])]


def machine() -> dict[str, str]:
    """Where and with what this was measured."""
    names = ("torch", "torchvision", "numpy", "pycocotools")
    listed = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "gpu": listed or "none",
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "date": datetime.now().date().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench.csv")
    parser.add_argument("--sample", default="outputs/sample")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    rows: list[Row] = []
    for name in given.names or BENCHMARKS:
        begun = datetime.now()
        rows += run(name, given.sample)
        print(f"{name}: {(datetime.now() - begun).total_seconds():.0f} s", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(given.out, index=False, float_format="%.4g")
    given.out.with_suffix(".json").write_text(json.dumps(machine(), indent=1) + "\n")
    shown = table.assign(identical=table["identical"].str.slice(0, 40), note=table["note"].str.slice(0, 60))
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    return int(table["note"].str.startswith("failed").any())


if __name__ == "__main__":
    sys.exit(main())
