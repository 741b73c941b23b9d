"""Run one notebook as a job, by papermill, if asked for on a GPU that no other job uses.

    python -m cellseg_helpers.jobs NOTEBOOK LOG OUTPUT [-f FILES] [-r NAME TEXT] [-p NAME VALUE]

The Snakefile calls this command for every notebook of the study. On Linux, no process outlives a
killed study: a job ends when Snakemake does, its kernel when the job does, and the kernel's worker
processes when the kernel does, even after SIGKILL.
"""

import argparse
import ctypes
import fcntl
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

import yaml

from cellseg_helpers.config import ROOT, RunConfig

PR_SET_PDEATHSIG = 1  # an option of Linux's prctl: the signal to get when the parent ends


def end_with(parent: int) -> None:
    """On Linux, end this process when its parent (a process id) ends, or now if it has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before prctl was called
            os._exit(1)


def end_forks_too() -> None:
    """From now on, every forked process ends when this one does (by ``end_with``). A DataLoader
    worker also watches its parent, but does not notice one that ended before its first check.
    """
    parent = {}
    os.register_at_fork(
        before=lambda: parent.update(id=os.getpid()), after_in_child=lambda: end_with(parent["id"])
    )


def hold(path: Path) -> TextIO | None:
    """Lock a file until it is closed or this process ends; None if another process has a lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    file.close()
    return None


def gpus() -> list[str]:
    """List the GPUs: those in ``CUDA_VISIBLE_DEVICES`` if it is set, else all of ``nvidia-smi``."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    lines = subprocess.getoutput("nvidia-smi -L").splitlines()  # or an error message
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in lines))]


def memory_mb() -> int:
    """The machine's memory, in MiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def take_gpu() -> TextIO | None:
    """Wait for a GPU that no other job of this user uses (under Slurm: one that it was given),
    and make it the only one that this process sees. Returns the lock of the GPU, to be closed at
    the end of the job, or None if there is no GPU.
    """
    if not (names := gpus()):
        return None
    owner = f"{os.getuid()}-{os.environ.get('SLURM_JOB_ID', '')}"
    for tries in itertools.count():
        for name in names:
            if lock := hold(Path(tempfile.gettempdir()) / f"cellseg-gpu-{owner}-{name}.lock"):
                os.environ["CUDA_VISIBLE_DEVICES"] = name
                return lock
        if tries == 0:
            print("All GPUs are in use; this job waits for one.", flush=True)
        time.sleep(1)


def run(
    notebook: Path, log: Path, output: Path, parameters: dict[str, Any],
    gpu: bool = False, rename_other: bool = False, page: Path | None = None,
) -> str:  # fmt: skip
    """Execute a notebook by papermill, in ``notebooks/``.

    The notebook is written to ``log`` while it runs, and copied to ``output`` when every cell has
    run without an error; ``page`` is an HTML file to write then, without the code. With ``gpu``,
    the job waits for a free GPU; otherwise it uses none. With ``rename_other``, an existing run
    folder of this name that has other settings or images is renamed first.

    Returns "", or a sentence on what went wrong.
    """
    while not (lock := hold(output.with_name(f".{output.stem}.lock"))):
        time.sleep(1)  # Slurm may still run this job of a killed study
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with lock, take_gpu() or nullcontext():
        if rename_other:
            _rename_other_run(parameters)
        error = _execute(notebook, log, parameters)
        if page and not error:
            from nbconvert import HTMLExporter

            without = {"exclude_input": True, "exclude_output_prompt": True}
            html, _ = HTMLExporter(embed_images=True, **without).from_filename(str(log))
            page.write_text(html, encoding="utf-8")
        if not error:
            shutil.copyfile(log, output)
    return error


def describe_failure(log: Path) -> str:
    """Say in a sentence why the notebook ``log`` stopped."""
    cells = json.loads(log.read_text(encoding="utf-8"))["cells"]
    for output in itertools.chain.from_iterable(cell.get("outputs", []) for cell in cells):
        if "ename" in output:
            return _error_sentence(output["ename"], output["evalue"])
    return "it was ended from outside, perhaps because memory ran out"


def _error_sentence(name: str, text: str) -> str:
    return textwrap.shorten(f"{name}: {text}" if text.strip() else name, 600, placeholder=" ...")


def _rename_other_run(parameters: dict[str, Any]) -> None:
    """Rename the run folder of these parameters if it is of other settings or images."""
    from cellseg_helpers.runs import rename_other_run

    with suppress(ValueError):  # a wrong setting, which the notebook will report
        if old := rename_other_run(RunConfig.from_dict(parameters)):
            print(f"The run had other settings or images before; it is now {old.name}.", flush=True)


def _execute(notebook: Path, log: Path, parameters: dict[str, Any]) -> str:
    """Execute a notebook, written to ``log``; returns "", or a sentence on what went wrong."""
    sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema works without; 0.9 s to import
    logging.getLogger("papermill").setLevel(logging.ERROR)  # notebooks check their parameters
    import papermill
    from traitlets.config import Config

    startup = "from cellseg_helpers.jobs import end_forks_too, end_with; "
    startup += f"end_with({os.getpid()}); end_forks_too(); del end_forks_too, end_with"
    kernel = ["--IPKernelApp.log_level=CRITICAL", f"--IPKernelApp.exec_lines={startup}"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cellseg-") as folder:
        # Kernels that start together could choose the same TCP port, so these use socket files.
        sockets = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
        options = {"config": Config(KernelManager=sockets), "extra_arguments": kernel}
        options |= {"cwd": ROOT / "notebooks", "progress_bar": False}
        options["shutdown_kernel"] = "immediate"
        try:
            papermill.execute_notebook(notebook, log, parameters, **options)
        except papermill.PapermillExecutionError as error:
            return _error_sentence(error.ename, error.evalue)
        except Exception as error:
            return _error_sentence(type(error).__name__, str(error))
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cellseg_helpers.jobs")
    for name in ("notebook", "log", "output"):
        parser.add_argument(name, type=Path)
    pair = {"nargs": 2, "action": "append", "default": []}
    parser.add_argument("-f", dest="files", nargs="+", default=[], help="a later file wins")
    parser.add_argument("-r", dest="raw", metavar=("NAME", "TEXT"), **pair)
    parser.add_argument("-p", dest="typed", metavar=("NAME", "VALUE"), **pair)
    parser.add_argument("--gpu", action="store_true", help="wait for a GPU of its own")
    parser.add_argument("--rename-other", action="store_true", help="rename a differing run")
    parser.add_argument("--page", type=Path, help="write an HTML page, without code")
    given = vars(parser.parse_args(arguments))

    if parent := os.environ.get("STUDY_PROCESS"):
        end_with(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    parameters: dict[str, Any] = {}
    for file in given.pop("files"):
        parameters |= yaml.safe_load(Path(file).read_text()) or {}
    parameters |= given.pop("raw")
    parameters |= {name: yaml.safe_load(value) for name, value in given.pop("typed")}
    if error := run(**given, parameters=parameters):
        message = f"{given['output'].stem} failed: {error} (all of it in {given['log']})"
        print(message, file=sys.stderr, flush=True)
    return bool(error)


if __name__ == "__main__":
    sys.exit(main())
