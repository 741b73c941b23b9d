"""The study as jobs, one papermill run each. Snakemake orders them (``Snakefile``); here is what
starts and ends them.

    python -m cellseg_helpers.jobs study|plan --data drawn --scale quick --seeds 1     what `make
    study` and `make plan` call python -m cellseg_helpers.jobs run NOTEBOOK OUTPUT ...
    one job: a notebook with its parameters python -m cellseg_helpers.jobs page NOTEBOOK PAGE
    an executed notebook as an HTML page

Nothing outlives the study (on Linux): make, Snakemake, the job and its kernel each die with the one
above, whatever ended that one, SIGKILL included. What they had open is whole or absent, so the same
command goes on from there.
"""

import argparse
import csv
import ctypes
import fcntl
import importlib.util
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import yaml

from cellseg_helpers.config import ROOT, RunConfig, resolve_path
from study import runs as study

LOCK = "outputs/.study.lock"
COLUMNS = ("job", "ended", "seconds", "start_seconds", "cpu_seconds", "peak_memory_bytes", "error")
ERROR_LENGTH = 600
TOLD_ELSEWHERE = ("CalledProcessError", "At least one job did not complete successfully")
TABLE_RULES = ("tables", "findings", "page")
NOTHING_TO_DO = "Nothing to do: everything is there, and newer than what it comes from."
PR_SET_PDEATHSIG = 1
KERNEL_OPTIONS = [
    "--IPKernelApp.log_level=CRITICAL",
    # With its own threshold, Python looks for garbage a thousand times while torch is imported: a
    # sixth of the time to the first cell.
    "--IPKernelApp.exec_lines=import gc; gc.set_threshold(10_000); del gc",
    "--IPKernelApp.exec_lines=from cellseg_helpers.jobs import end_forks_too; end_forks_too(); del end_forks_too",
]


class StudyError(ValueError):
    """A study that cannot start, in a sentence for the user."""


def die_with(parent: int | None = None) -> None:
    """Have the kernel end this process by SIGKILL when the thread that started it ends. Linux only;
    elsewhere it does nothing.

    Args:
        parent: process id of the parent; where that one is gone already, this process ends at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        os._exit(1)


def end_forks_too() -> None:
    """Have processes that are forked from this one ``die_with`` it.

    A DataLoader's worker looks for its parent's end itself, but only if that comes after its own
    first look.
    """
    parent = {}
    os.register_at_fork(
        before=lambda: parent.update(id=os.getpid()), after_in_child=lambda: die_with(parent["id"])
    )


def hold(path: Path) -> TextIO | None:
    """A lock file that is held until the returned file is closed or its process ends; None where
    another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def gpus() -> list[str]:
    """The GPUs that jobs may take: those of ``CUDA_VISIBLE_DEVICES`` where it is set, else all that
    ``nvidia-smi`` lists.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part.strip() for part in named.split(",") if part.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    return [
        str(number) for number, _ in enumerate(line for line in listed if line.startswith("GPU "))
    ]


def memory_mb() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def take_gpu() -> TextIO | None:
    """Wait for a GPU that no other job has, and make it the only one that this job sees; None where
    there is no GPU.

    The lock files are the machine's, so that two studies on it don't share a GPU either; a Slurm
    job has the GPUs it was given.
    """
    names, waited = gpus(), False
    owner = f"{os.getuid()}-{os.environ.get('SLURM_JOB_ID', '')}"
    while names:
        for name in names:
            if taken := hold(Path(tempfile.gettempdir()) / f"cellseg-gpu-{owner}-{name}.lock"):
                os.environ["CUDA_VISIBLE_DEVICES"] = name
                return taken
        if not waited:
            print("All GPUs are taken; this job waits for one.", flush=True)
        waited = True
        time.sleep(1)
    return None


def job_name(notebook: Path, output: Path) -> str:
    """What a job is called: ``02_train <run>``, or, where a notebook runs once,
    ``01_explore_data``.
    """
    return " ".join(dict.fromkeys([notebook.stem, output.stem]))


def run(
    notebook: Path,
    output: Path,
    parameters: dict[str, Any],
    log: Path | None = None,
    gpu: bool = False,
    train: bool = False,
) -> str:
    """Execute a notebook by papermill, in ``notebooks/``.

    While it runs, the notebook so far is ``<output>.running.ipynb``; it becomes ``output`` when
    every cell has run, or ``<output>.failed.ipynb``.

    Args:
        parameters: name -> value, for the parameters cell.
        log: CSV file that gets one row (``COLUMNS``): seconds on the wall, of them until the first
            cell had imported, and of CPU.
        gpu: wait for a GPU of its own; otherwise the notebook sees none.
        train: set a run folder of other settings aside first (``runs.set_aside_other_run``); at
            the end write ``trained.json`` there, the row of ``log``.

    Returns:
        What went wrong, as a sentence, or "".
    """
    begun, job = time.time(), job_name(notebook, output)
    running, failed = output.with_suffix(".running.ipynb"), output.with_suffix(".failed.ipynb")
    while not (lock := hold(output.with_name(f".{output.stem}.lock"))):
        time.sleep(1)  # a job of a killed study that Slurm goes on with
    taken = take_gpu() if gpu else os.environ.update(CUDA_VISIBLE_DEVICES="")
    if train and (aside := _set_aside(parameters)):
        print(
            f"{job}: the run had other settings before; that one is now {_short(aside)}.",
            flush=True,
        )
    executed, error = _execute(notebook, running, parameters)
    if error:
        if running.exists():
            running.replace(failed)
            error += f" (all of it in {_short(failed)})"
        print(f"{job} failed: {error}", file=sys.stderr, flush=True)
    else:
        running.replace(output)
        failed.unlink(missing_ok=True)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    imported = _first_cell_ended(executed) if executed else begun
    row = {
        "job": job,
        "ended": datetime.now().isoformat(timespec="seconds"),
        "seconds": round(time.time() - begun, 1),
        "start_seconds": round(imported - begun, 1),
        "cpu_seconds": round(sum(each.ru_utime + each.ru_stime for each in used), 1),
        "peak_memory_bytes": max(each.ru_maxrss for each in used) * 1024,
        "error": error,
    }
    if log:
        _append(log, row)
    if train and not error:
        from cellseg_helpers.runs import RUNS

        run_dir = resolve_path(RUNS) / parameters["run_name"]
        (run_dir / "trained.json").write_text(json.dumps(row, indent=1) + "\n")
    for file in (taken, lock):
        if file:
            file.close()
    return error


def _set_aside(parameters: dict[str, Any]) -> Path | None:
    try:
        config = RunConfig.from_dict(parameters)
    except ValueError:
        return None  # the notebook says it
    from cellseg_helpers.runs import set_aside_other_run

    return set_aside_other_run(config)


def _execute(notebook: Path, running: Path, parameters: dict[str, Any]) -> tuple[Any, str]:
    _skip_slow_imports()
    logging.getLogger("papermill").setLevel(
        logging.ERROR
    )  # of a parameter that no cell has, the notebooks say more
    import papermill
    from jupyter_client import AsyncKernelManager

    class KernelManager(AsyncKernelManager):
        """Its kernel ends with this job. They talk over files: kernels that start together could
        pick the same free TCP port.
        """

        def __init__(self, **kwargs):
            super().__init__(transport="ipc", connection_file=f"{sockets}/kernel.json", **kwargs)

        async def start_kernel(self, **kwargs):
            return await super().start_kernel(preexec_fn=partial(die_with, os.getpid()), **kwargs)

    running.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cellseg-") as sockets:
        try:
            executed = papermill.execute_notebook(
                notebook, running, parameters, cwd=ROOT / "notebooks", progress_bar=False, kernel_manager_class=KernelManager,
                shutdown_kernel="immediate", extra_arguments=KERNEL_OPTIONS,
            )  # fmt: skip
        except papermill.PapermillExecutionError as error:
            return None, _sentence(error.ename, error.evalue)
        except Exception as error:
            return None, _sentence(type(error).__name__, str(error))
    return executed, ""


def _skip_slow_imports() -> None:
    """What papermill and nbconvert would load and notebooks don't need: jsonschema's grammar, 2 s;
    pyarrow for Hadoop's files, 0.15 s.
    """
    for name in ("rfc3987_syntax", "pyarrow"):
        sys.modules.setdefault(name, None)


def _sentence(name: str, text: str) -> str:
    words = f"{name}: {' '.join(text.split())}" if text.strip() else name
    return words if len(words) <= ERROR_LENGTH else words[:ERROR_LENGTH] + " ..."


def _short(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _first_cell_ended(executed: Any) -> float:
    """Unix time at which the first code cell, the imports, had run."""
    first = next(cell for cell in executed.cells if cell.cell_type == "code")
    return datetime.fromisoformat(first.metadata.papermill.end_time).astimezone().timestamp()


def _append(log: Path, row: dict[str, Any]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, COLUMNS)
        if not os.fstat(file.fileno()).st_size:
            writer.writeheader()
        writer.writerow(row)


PAGE_STYLE = ".dataframe tbody th { white-space: nowrap } .jp-RenderedHTMLCommon .dataframe { font-size: 11px }"


def page(notebook: Path, output: Path) -> None:
    """An executed notebook as one HTML file: text, tables and pictures, without the code."""
    _skip_slow_imports()
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter(
        exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True, embed_images=True
    ).from_filename(str(notebook))
    html = html.replace("</head>", f"<style>{PAGE_STYLE}</style></head>", 1)
    temporary = output.with_suffix(".part")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(output)


def run_study(
    data: str, scale: str, seeds: int, profile: str = "", jobs: int = 0, plan: bool = False
) -> bool:
    """Run every job that is missing or out of date, or list them.

    Args:
        data: "drawn" or a folder that holds ``train/``.
        scale: quick, sample or full.
        seeds: every training is done with the seeds 0 to ``seeds`` - 1.
        profile: a folder under ``profiles/`` with Snakemake's options for a cluster; "" runs here.
        jobs: processors to use, or, with a profile, jobs at the same time; 0: all, or as many as
            the profile says.
        plan: only say what would run and why.

    Returns:
        Whether every job succeeded.

    Raises:
        StudyError: the study cannot start.
    """
    name = _check(data, scale, seeds, profile, jobs)
    lock = None if plan else hold(ROOT / LOCK)
    if not lock and not plan:
        raise StudyError(
            f"another study runs in this folder (process {(ROOT / LOCK).read_text()}); wait for it or stop it"
        )
    if lock:
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()

    options = [
        "--snakefile",
        ROOT / "Snakefile",
        "--directory",
        ROOT,
        "--workflow-profile",
        ROOT / "profiles" / "default",
    ]
    options += ["--config", f"data={data}", f"scale={scale}", f"seeds={seeds}"]
    if profile:
        options += ["--profile", ROOT / "profiles" / profile, *(["--jobs", jobs] if jobs else [])]
    else:
        options += [
            "--cores",
            jobs or len(os.sched_getaffinity(0)),
            "--resources",
            f"gpu={len(gpus())}",
            f"mem_mb={memory_mb()}",
        ]
    reporter, log = _Reporter(plan), ROOT / "outputs" / f"{name}-snakemake.log"
    log.parent.mkdir(exist_ok=True)
    with (
        open(os.devnull if plan else log, "w") as file,
        redirect_stderr(file),
        redirect_stdout(file if plan else sys.stdout),
    ):
        succeeded = _snakemake([*map(str, options), *(["--dry-run"] if plan else [])], reporter)
        if reporter.failed and any((ROOT / "outputs/runs").glob(f"{name}-*/scores.json")):
            print(
                "\nThe tables of the runs that are there; an empty cell has its reason.", flush=True
            )
            options.insert(options.index("--config") + 1, "partial=1")
            _snakemake(
                [*map(str, options), "--allowed-rules", *TABLE_RULES, "--", *TABLE_RULES], reporter
            )
    if plan:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `make plan | head`
        reporter.print_plan()
    else:
        if succeeded and not reporter.jobs:
            print(NOTHING_TO_DO)
        rows = _rows(name, reporter.begun)
        _print_times(rows)
        _print_end(name, succeeded, rows, reporter, log)
    return succeeded


def _check(data: str, scale: str, seeds: int, profile: str, jobs: int) -> str:
    if seeds < 1:
        raise StudyError(f"SEEDS is {seeds}, but must be at least 1")
    if jobs < 0:
        raise StudyError(f"JOBS is {jobs}, but must be at least 1, or 0 for all")
    place = resolve_path(data)
    if (
        data != "drawn"
        and not (place / "train").is_dir()
        and not (place.suffix == ".json" and place.is_file())
    ):
        raise StudyError(
            f"DATA={data} is no folder that holds train/; README.md says what must be in it"
        )
    for key in study.run_keys():
        try:
            study.settings(key, scale, data, 0)
        except ValueError as error:
            raise StudyError(f"run {key}: {error}") from None
    if profile:
        file = ROOT / "profiles" / profile / "config.yaml"
        if not file.exists():
            raise StudyError(
                f"PROFILE={profile} has no {file.relative_to(ROOT)}; `make study PROFILE=slurm` is for Slurm"
            )
        plugin = f"snakemake-executor-plugin-{yaml.safe_load(file.read_text())['executor']}"
        if not importlib.util.find_spec(plugin.replace("-", "_")):
            raise StudyError(
                f"PROFILE={profile} needs {plugin}, which is not installed; "
                f"install it: .venv/bin/uv pip install --python .venv/bin/python --constraints requirements.txt --group {profile}"
            )
    return study.study_name(scale, data)


def _snakemake(options: list[str], reporter: "_Reporter") -> bool:
    from snakemake import cli
    from snakemake.logging import logger

    logger.addFilter(reporter)
    try:
        cli.main(options)
    except SystemExit as ended:
        return not ended.code
    finally:
        logger.removeFilter(reporter)


class _Reporter:
    """Sits on Snakemake's log and says in short lines what happens; all of it goes on into the log."""

    def __init__(self, plan: bool) -> None:
        self.plan, self.begun = plan, time.time()
        self.jobs: dict[int, tuple[str, str]] = {}  # job id -> name, why it runs
        self.started: dict[int, float] = {}
        self.finished: list[int] = []
        self.failed: list[str] = []
        self.errors: list[str] = []

    def filter(self, record: Any) -> bool:
        from snakemake_interface_logger_plugins.common import LogEvent

        event = getattr(record, "event", None)
        if event == LogEvent.JOB_INFO and record.rule_name != "all":
            executed = next((Path(file) for file in record.output if file.endswith(".ipynb")), None)
            name = job_name(Path(record.input[0]), executed) if executed else record.rule_name
            self.jobs[record.jobid], self.started[record.jobid] = (
                (name, str(record.reason)),
                time.time(),
            )
        elif event == LogEvent.RUN_INFO and not self.plan:
            kinds = ", ".join(
                f"{number} {rule}"
                for rule, number in record.stats.items()
                if rule not in ("all", "total")
            )
            print(
                f"{record.stats['total'] - record.stats.get('all', 0)} jobs: {kinds}.", flush=True
            )
        elif event == LogEvent.JOB_FINISHED:
            self.finished.append(record.job_id)
        elif event == LogEvent.PROGRESS and self.finished[-1] in self.jobs:
            last, total = (
                self.finished[-1],
                record.total - 1,
            )  # without "all", which has nothing to do
            name, seconds = self.jobs[last][0], time.time() - self.started[last]
            print(
                f"{record.done} of {total} jobs done, {total - record.done} left: {name} ({_duration(seconds)})",
                flush=True,
            )
        elif event == LogEvent.JOB_ERROR:
            self.failed.append(self.jobs[record.jobid][0])
        elif event == LogEvent.ERROR and not any(
            words in record.getMessage() for words in TOLD_ELSEWHERE
        ):
            self.errors.append(record.getMessage())
        return True

    def print_plan(self) -> None:
        if not self.jobs:
            print(
                *self.errors
                or ["Nothing to do: every table is there, and newer than what it comes from."],
                sep="\n",
            )
            return
        kinds = Counter(name.split()[0] for name, _ in sorted(self.jobs.values()))
        print(
            f"{len(self.jobs)} jobs would run: {', '.join(f'{number} {kind}' for kind, number in kinds.items())}."
        )
        width = max(len(name) for name, _ in self.jobs.values())
        for name, reason in sorted(self.jobs.values()):
            print(f"{name:{width}}  {'; '.join(map(_first_only, reason.split('; ')))}")


def _first_only(reason: str) -> str:
    """Snakemake's ``why: file, file, ...`` as ``why: file and n more``."""
    why, _, files = reason.partition(": ")
    first, *others = files.split(", ")
    return f"{why}: {first}{f' and {len(others)} more' * bool(others)}"[:200]


def _rows(name: str, since: float) -> list[dict[str, str]]:
    try:
        with (ROOT / "outputs" / f"{name}-jobs.csv").open(newline="") as file:
            return [
                row
                for row in csv.DictReader(file)
                if datetime.fromisoformat(row["ended"]).timestamp() >= since - 1
            ]
    except FileNotFoundError:
        return []


def _print_times(rows: list[dict[str, str]]) -> None:
    kinds: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        kinds.setdefault(row["job"].split()[0], []).append(row)
    if kinds:
        print(
            f"\n{'notebook':22}{'jobs':>6}{'minutes':>10}{'starting':>10}{'CPU':>8}   (minutes, all jobs together)"
        )
    for kind, of_kind in sorted(kinds.items()):
        minutes = [
            sum(float(row[column]) for row in of_kind) / 60
            for column in ("seconds", "start_seconds", "cpu_seconds")
        ]
        print(f"{kind:22}{len(of_kind):>6}{minutes[0]:>10.1f}{minutes[1]:>10.1f}{minutes[2]:>8.1f}")


def _print_end(
    name: str, succeeded: bool, rows: list[dict[str, str]], reporter: _Reporter, log: Path
) -> None:
    print()
    if not succeeded:
        told = {row["job"]: row["error"] for row in rows if row["error"]}
        failures = [
            f"{job}: {told.get(job, 'it was ended from outside, perhaps for want of memory')}"
            for job in reporter.failed
        ]
        failures += reporter.errors
        print(
            f"{len(failures)} failures; what does not depend on them is done:",
            *failures,
            sep="\n- ",
        )
        print(
            f"\nSnakemake's own log: {log.relative_to(ROOT)}. The same command goes on from here.",
            flush=True,
        )
        return
    print(f"The reports' tables, as a page: outputs/{name}.html")
    print("Tables:                         outputs/tables/")
    print(f"Executed notebooks:             outputs/notebooks/{name}/")
    print(f"Runs:                           outputs/runs/{name}-*/")
    print(f"Time of each job:               outputs/{name}-jobs.csv", flush=True)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.1f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def stop(number: int, frame: Any) -> None:
    """Signal handler of a study that runs here: end at once; the jobs die with this process."""
    print("\nStopped. The same command goes on from here.", flush=True)
    os._exit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cellseg_helpers.jobs", description="The study as jobs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("study", "plan"):
        command = commands.add_parser(name)
        command.add_argument("--data", default="drawn")
        command.add_argument("--scale", default="quick")
        command.add_argument("--seeds", type=int, default=1)
        command.add_argument("--profile", default="")
        command.add_argument("--jobs", type=int, default=0)
    command = commands.add_parser("run")
    command.add_argument("notebook", type=Path)
    command.add_argument("output", type=Path)
    command.add_argument(
        "-f", dest="files", nargs="+", default=[], help="parameter files; a later one wins"
    )
    command.add_argument("-r", dest="raw", nargs=2, action="append", default=[], help="NAME TEXT")
    command.add_argument(
        "-p", dest="typed", nargs=2, action="append", default=[], help="NAME VALUE"
    )
    command.add_argument("--log", type=Path)
    command.add_argument("--gpu", action="store_true")
    command.add_argument("--train", action="store_true")
    command = commands.add_parser("page")
    command.add_argument("notebook", type=Path)
    command.add_argument("output", type=Path)
    given = parser.parse_args(arguments)

    if given.command in ("study", "plan"):
        if "MAKELEVEL" in os.environ:
            die_with()
        try:
            return not run_study(
                given.data,
                given.scale,
                given.seeds,
                given.profile,
                given.jobs,
                given.command == "plan",
            )
        except StudyError as error:
            print(error, file=sys.stderr)
            return 2
    die_with(int(os.environ.get("STUDY_PROCESS", 0)))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
    if given.command == "page":
        page(given.notebook, given.output)
        return 0
    parameters: dict[str, Any] = {}
    for file in given.files:
        parameters |= yaml.safe_load(Path(file).read_text()) or {}
    parameters |= dict(given.raw) | {name: yaml.safe_load(value) for name, value in given.typed}
    return bool(run(given.notebook, given.output, parameters, given.log, given.gpu, given.train))


if __name__ == "__main__":
    sys.exit(main())
