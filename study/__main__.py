"""The command behind `make study` and `make plan`: check its arguments, lock, call Snakemake.

    python -m study run|plan --data drawn --scale quick --seeds 1

All jobs end when this process does, even after SIGKILL (``cellseg_helpers.jobs``); the same command
continues where they stopped.
"""

import argparse
import importlib.util
import io
import os
import re
import signal
import sys
import textwrap
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pandas as pd
import yaml

from cellseg_helpers import jobs
from cellseg_helpers.config import ROOT, resolve_path
from study.runs import run_keys, settings, study_name

LOCK = ROOT / "outputs/.study.lock"
OPTIONS = {  # of the command line: default and help
    "data": ("drawn", "drawn, a COCO file, or a folder that holds train/"),
    "scale": ("quick", "quick, sample or full"),
    "seeds": (1, "every training is done with the seeds 0 to SEEDS - 1"),
    "profile": ("", "a folder under profiles/ with Snakemake's options for a cluster"),
    "jobs": (0, "processors, or, with a profile, jobs at a time; 0: all, or as the profile says"),
}


class StudyError(ValueError):
    """The study cannot start; the message is for the user."""


def run_study(name: str, options: list[str]) -> bool:
    """Run every job of a study whose results are missing or out of date; if one fails, make the
    tables from the runs that succeeded. Returns whether every job succeeded.

    Raises:
        StudyError: another study runs in this folder.
    """
    start_s = time.time()
    if not (lock := jobs.hold(LOCK)):
        other = f"another study runs in this folder (process {LOCK.read_text()})"
        raise StudyError(f"{other}; wait for it or stop it")
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()

    quiet = ["--quiet", "host", "reason"]
    succeeded = _snakemake([*options, *quiet])
    if not succeeded and any((ROOT / "outputs/runs").glob(f"{name}-*/scores.json")):
        print("\nThe tables of the runs that succeeded; an empty cell has its reason.", flush=True)
        rules = ["tables", "findings"]
        _snakemake([*options, "partial=1", *quiet, "--allowed-rules", *rules, "--", *rules])
    logs, notebooks = ROOT / "outputs/logs" / name, ROOT / "outputs/notebooks" / name
    _write_times(logs, ROOT / "outputs" / f"{name}-times.csv")
    if succeeded:
        print(
            f"\nThe reports' tables, as a page: outputs/{name}.html"
            f"\nTime and memory of each job:    outputs/{name}-times.csv"
            f"\nExecuted notebooks:             outputs/notebooks/{name}"
        )
        return True
    print("\nWhat does not depend on these failures is done:")
    for log in sorted(logs.rglob("*.ipynb")):
        if log.stat().st_mtime >= start_s and not (notebooks / log.relative_to(logs)).exists():
            print(f"- {_job_name(log, logs)}: {jobs.describe_failure(log)}")
    print("The same command goes on from here.", flush=True)
    return False


def plan_study(options: list[str]) -> bool:
    """Print every job that ``run_study`` would run, and why, one per line."""
    output = io.StringIO()
    with redirect_stderr(output), redirect_stdout(output):
        succeeded = _snakemake([*options, "--dry-run", "--quiet", "host"])
    planned = re.findall(r"^Job \d+: (.+)\nReason: (.+)$", output.getvalue(), re.MULTILINE)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback after `make plan | head`
    if not succeeded or not planned:
        print(output.getvalue().strip())
        return succeeded
    print(f"{len(planned)} jobs would run:")
    for name, reason in sorted(planned):
        print(f"{name:<60}  {textwrap.shorten(reason, 100, placeholder=' ...')}")
    return True


def _options(data: str, scale: str, seeds: int, profile: str, cores: int) -> list[str]:
    """Check the arguments and make Snakemake's options of them. The last option is ``--config``, so
    that the caller can append values to it.
    """
    source = resolve_path(data)
    is_coco = source.suffix == ".json" and source.is_file()
    if seeds < 1:
        raise StudyError(f"SEEDS is {seeds}, but must be at least 1")
    if cores < 0:
        raise StudyError(f"JOBS is {cores}, but must be at least 1, or 0 for all")
    if not (data == "drawn" or is_coco or (source / "train").is_dir()):
        no_data = f"DATA={data} is no folder that holds train/"
        raise StudyError(f"{no_data}; README.md says what must be in it")
    for key in run_keys():
        try:
            settings(key, scale, data, 0)
        except ValueError as error:
            raise StudyError(f"run {key}: {error}") from None
    options = ["--snakefile", ROOT / "Snakefile", "--directory", ROOT]
    options += ["--workflow-profile", ROOT / "profiles/default"]
    if profile:
        _check_profile(profile)
        options += ["--profile", ROOT / "profiles" / profile]
        options += ["--jobs", cores] if cores else []
    else:
        options += ["--cores", cores or len(os.sched_getaffinity(0))]
        options += ["--resources", f"gpu={len(jobs.gpus())}", f"mem_mb={jobs.memory_mb()}"]
    options += ["--config", f"data={data}", f"scale={scale}", f"seeds={seeds}"]
    return [str(option) for option in options]


def _check_profile(profile: str) -> None:  # raises StudyError
    file = ROOT / "profiles" / profile / "config.yaml"
    if not file.exists():
        missing = f"PROFILE={profile} has no {file.relative_to(ROOT)}"
        raise StudyError(f"{missing}; `make study PROFILE=slurm` is for Slurm")
    plugin = f"snakemake-executor-plugin-{yaml.safe_load(file.read_text())['executor']}"
    if not importlib.util.find_spec(plugin.replace("-", "_")):
        raise StudyError(
            f"PROFILE={profile} needs {plugin}, which is not installed; install it: "
            ".venv/bin/uv pip install --python .venv/bin/python --constraints requirements.txt "
            f"--group {profile}"
        )


def _snakemake(options: list[str]) -> bool:
    """Call Snakemake and return whether it succeeded."""
    from snakemake import cli

    try:
        cli.main(options)
    except SystemExit as ended:
        return not ended.code
    return True


def _job_name(log: Path, logs: Path) -> str:  # such as "02_train <run>" or "01_explore_data"
    return " ".join(log.relative_to(logs).with_suffix("").parts)


def _write_times(logs: Path, table: Path) -> None:
    """Write a table of each job's time and memory (Snakemake's ``benchmark`` files), print sums."""
    files = sorted(logs.rglob("*.tsv"))
    if not files:
        return
    times = pd.concat([pd.read_csv(file, sep="\t").tail(1) for file in files], ignore_index=True)
    times.insert(0, "job", [_job_name(file, logs) for file in files])
    times.to_csv(table, index=False)
    of_notebook = times.groupby(times["job"].str.split().str[0].rename("notebook"))
    totals = of_notebook.agg({"job": "size", "s": "sum", "cpu_time": "sum", "max_rss": "max"})
    sums = totals.set_axis(["jobs", "minutes", "cpu_minutes", "most_MB"], axis=1)
    sums[["minutes", "cpu_minutes"]] /= 60
    print(f"\n{sums.round(1).to_string()}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m study", description="The five reports' study.")
    parser.add_argument("command", choices=["run", "plan"])
    for name, (value, about) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=about)
    given = parser.parse_args(arguments)
    if "MAKELEVEL" in os.environ:
        jobs.end_with(os.getppid())
    try:
        options = _options(*(getattr(given, name) for name in OPTIONS))
        if given.command == "plan":
            return not plan_study(options)
        return not run_study(study_name(given.scale, given.data), options)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
