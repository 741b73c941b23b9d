"""Fast and small, side by side with the usual ways: ``make bench`` writes ``outputs/bench.csv`` and
prints it.

    python -m bench [NAME ...] [--out outputs/bench.csv] [--sample FOLDER]

Each benchmark is a module of this folder with a function ``rows()``; each runs in a process of its
own. ``--sample`` is a folder of real images in the HW3 layout; without it the embedded drawn tissue
stands in, and the note says so. The exit code is 1 where a benchmark failed, or two sides did not
give the same.
"""

import argparse
import sys
import time
from pathlib import Path

import pandas as pd

from bench.machine import save_table
from bench.measure import ROOT, Row, fresh_process, rows_of
from cellseg_helpers.config import resolve_path

BENCHMARKS = (
    "loading",
    "augmentation",
    "training",
    "prediction",
    "evaluation",
    "study",
    "startup",
    "gpu",
)


def run(name: str, sample: str) -> list[Row]:
    """The rows of one benchmark, from a process of its own; a row that says why where it failed."""
    try:
        with fresh_process() as process:
            return process.submit(rows_of, name, sample).result()
    except Exception as error:  # whatever one benchmark fails of, the others go on
        return [
            Row(
                name,
                float("nan"),
                float("nan"),
                "",
                float("nan"),
                "",
                f"failed: {type(error).__name__}: {error}",
            )
        ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench.csv")
    parser.add_argument(
        "--sample", default="", metavar="FOLDER", help="it holds train/; default: drawn images"
    )
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
    save_table(table, given.out, taken | {"total": round(time.monotonic() - started, 1)})
    shown = table.assign(
        identical=table["identical"].str.slice(0, 40), note=table["note"].str.slice(0, 60)
    )
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    return int(
        any(row.note.startswith("failed") or row.identical.startswith("OTHER") for row in rows)
    )


if __name__ == "__main__":
    sys.exit(main())
