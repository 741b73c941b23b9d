"""Speed and memory beside the usual ways: ``make bench`` writes ``outputs/bench.csv``.

Each benchmark is a module of this folder with a function ``rows``. The exit code is 1 if one failed
or two sides gave different results.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import pandas as pd

from bench.measure import run, save_table
from cellseg_helpers.config import ROOT, resolve_path

BENCHMARKS = ("loading", "augmentation", "training", "prediction", "evaluation", "study")
BENCHMARKS += ("startup", "gpu")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    names = ", ".join(BENCHMARKS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {names}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench.csv")
    sample = "of real images in the HW3 layout; default: drawn tissue"
    parser.add_argument("--sample", default="", metavar="FOLDER", help=sample)
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {names}")
    if given.sample and not (resolve_path(given.sample) / "train").is_dir():
        parser.error(f"{given.sample} is no folder that holds train/")
    os.environ["BENCH_SAMPLE"] = given.sample
    rows, seconds = [], {}
    for name in given.names or BENCHMARKS:
        begun = time.monotonic()
        rows += run(name)
        seconds[name] = round(time.monotonic() - begun, 1)
        print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    save_table(table, given.out, seconds | {"total": round(sum(seconds.values()), 1)})
    failed = table["note"].str.startswith("failed") | table["identical"].str.startswith("OTHER")
    return int(failed.any())


if __name__ == "__main__":
    sys.exit(main())
