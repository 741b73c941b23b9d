"""One notebook as a job: papermill, a GPU of its own, and an end with the process that started it.

    python -m cellseg_helpers.jobs NOTEBOOK LOG OUTPUT [-f FILES] [-r NAME TEXT] [-p NAME VALUE]

The Snakefile calls this command for every notebook of the study. On Linux, nothing outlives a
killed study: a job ends with Snakemake, its kernel with the job, and the kernel's worker processes
with the kernel, SIGKILL included.
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

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with(parent: int) -> None:
    """On Linux, end this process by SIGKILL when its parent (a process id) ends or has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def end_forks_too() -> None:
    """Every process forked from this one will ``end_with`` it. (A DataLoader's worker looks for its
    parent's end, too, but misses an end before its first look.)
    """
    parent = {}
    os.register_at_fork(
        before=lambda: parent.update(id=os.getpid()), after_in_child=lambda: end_with(parent["id"])
    )


def hold(path: Path) -> TextIO | None:
    """Lock a file until it is closed or its process ends; None if another process has locked it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    file.close()
    return None


def gpus() -> list[str]:
    """The GPUs for jobs: of ``CUDA_VISIBLE_DEVICES`` if it is set, else all of ``nvidia-smi``."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    listed = subprocess.getoutput("nvidia-smi -L").splitlines()  # or why there are none
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed))]


def memory_mb() -> int:
    """The machine's memory, in MiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def take_gpu() -> TextIO | None:
    """Wait for a GPU that no other job of this user uses (a Slurm job: of those that it was given),
    and make it the only one that this job sees. Gives its lock, to be closed at the end of the job;
    None if there is no GPU.
    """
    if not (names := gpus()):
        return None
    owner = f"{os.getuid()}-{os.environ.get('SLURM_JOB_ID', '')}"
    for tries in itertools.count():
        for name in names:
            if taken := hold(Path(tempfile.gettempdir()) / f"cellseg-gpu-{owner}-{name}.lock"):
                os.environ["CUDA_VISIBLE_DEVICES"] = name
                return taken
        if tries == 0:
            print("All GPUs are in use; this job waits for one.", flush=True)
        time.sleep(1)


def run(
    notebook: Path, log: Path, output: Path, parameters: dict[str, Any],
    gpu: bool = False, set_aside: bool = False, page: Path | None = None,
) -> str:  # fmt: skip
    """Execute a notebook by papermill, in ``notebooks/``; what went wrong, as a sentence, or "".

    The notebook is written to ``log`` while it runs, and copied to ``output`` when every cell has
    run without an error; ``page`` is an HTML file to write, without the code. With ``gpu``, the job
    waits for a GPU of its own; otherwise it sees none. With ``set_aside``, a run folder of this
    name that has other settings or images is renamed before.
    """
    while not (lock := hold(output.with_name(f".{output.stem}.lock"))):
        time.sleep(1)  # Slurm may still run this job of a killed study
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with lock, take_gpu() or nullcontext():
        if set_aside:
            _set_aside(parameters)
        error = _execute(notebook, log, parameters)
        if page and not error:
            from nbconvert import HTMLExporter

            hidden = {"exclude_input": True, "exclude_output_prompt": True}
            html, _ = HTMLExporter(embed_images=True, **hidden).from_filename(str(log))
            page.write_text(html, encoding="utf-8")
        if not error:
            shutil.copyfile(log, output)
    return error


def describe_failure(log: Path) -> str:
    """Why a notebook stopped, as a sentence."""
    cells = json.loads(log.read_text(encoding="utf-8"))["cells"]
    for output in itertools.chain.from_iterable(cell.get("outputs", []) for cell in cells):
        if "ename" in output:
            return _sentence(output["ename"], output["evalue"])
    return "it was ended from outside, perhaps because memory ran out"


def _sentence(name: str, text: str) -> str:
    return textwrap.shorten(f"{name}: {text}" if text.strip() else name, 600, placeholder=" ...")


def _set_aside(parameters: dict[str, Any]) -> None:
    from cellseg_helpers.runs import set_aside_other_run

    with suppress(ValueError):  # of settings; the notebook says what is wrong
        if old := set_aside_other_run(RunConfig.from_dict(parameters)):
            print(f"The run had other settings or images before; it is now {old.name}.", flush=True)


def _execute(notebook: Path, log: Path, parameters: dict[str, Any]) -> str:
    sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema does without; 0.9 s of each job
    logging.getLogger("papermill").setLevel(logging.ERROR)  # notebooks check their parameters
    import papermill
    from traitlets.config import Config

    first = "from cellseg_helpers.jobs import end_forks_too, end_with; "
    first += f"end_with({os.getpid()}); end_forks_too(); del end_forks_too, end_with"
    kernel = ["--IPKernelApp.log_level=CRITICAL", f"--IPKernelApp.exec_lines={first}"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cellseg-") as folder:
        # Kernels that start together could choose the same free TCP port; these talk over files.
        sockets = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
        options = {"config": Config(KernelManager=sockets), "extra_arguments": kernel}
        options |= {"cwd": ROOT / "notebooks", "progress_bar": False}
        options["shutdown_kernel"] = "immediate"
        try:
            papermill.execute_notebook(notebook, log, parameters, **options)
        except papermill.PapermillExecutionError as error:
            return _sentence(error.ename, error.evalue)
        except Exception as error:
            return _sentence(type(error).__name__, str(error))
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cellseg_helpers.jobs")
    for path in ("notebook", "log", "output"):
        parser.add_argument(path, type=Path)
    pair = {"nargs": 2, "action": "append", "default": []}
    parser.add_argument("-f", dest="files", nargs="+", default=[], help="a later file wins")
    parser.add_argument("-r", dest="raw", metavar=("NAME", "TEXT"), **pair)
    parser.add_argument("-p", dest="typed", metavar=("NAME", "VALUE"), **pair)
    parser.add_argument("--gpu", action="store_true", help="wait for a GPU of its own")
    parser.add_argument("--set-aside", action="store_true", help="rename a run of other settings")
    parser.add_argument("--page", type=Path, help="write an HTML page, without code")
    given = vars(parser.parse_args(arguments))

    if parent := os.environ.get("STUDY_PROCESS"):
        end_with(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
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
