"""The harness of all benchmarks: two ways to the same result, each called in a fresh process, in
turn; their times, peak memory and results; and the table with the machine that it was measured on.
"""

import ctypes
import importlib
import math
import multiprocessing
import os
import pickle
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import psutil

from cellseg_helpers.runs import provenance, write_json

NAN = math.nan
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-image", "pycocotools", "hotcoco")
PACKAGES += ("tifffile", "imagecodecs")


class Row(NamedTuple):
    """A line of ``outputs/bench.csv``.

    ``ratio``: how many times better ours is; ``identical``: see ``verdict``.
    """

    benchmark: str
    ours: float
    peer: float
    unit: str
    ratio: float
    identical: str
    note: str


class Pair(NamedTuple):
    """Two functions without arguments that give the same result.

    ``compare``: both results -> a ``verdict``; ``device``: ``cpu`` or ``cuda``, where both work.
    """

    ours: Callable[[], Any]
    peer: Callable[[], Any]
    compare: Callable[[Any, Any], str]
    device: str = "cpu"


class Call(NamedTuple):
    """Wall and CPU seconds of a call, and the megabytes that it adds at its peak."""

    seconds: float
    cpu_seconds: float
    megabytes: float


NOT_RUN = Call(NAN, NAN, NAN)


def less(
    name: str, ours: float, peer: float, unit: str, identical: str = "", note: str = ""
) -> Row:
    """A row of something of which less is better, such as seconds."""
    return Row(name, ours, peer, unit, times_less(ours, peer), identical, note)


def times_less(ours: float, peer: float) -> float:
    """NaN if ours is too small to be measured."""
    return peer / ours if ours > 0 else NAN


def time_and_memory(
    name: str,
    measured: tuple[Call, Call, str],
    note: str,
    time_goal: str = "",
    memory_goal: str = "",
) -> list[Row]:
    """Two rows of what ``side_by_side`` found."""
    ours, peer, identical = measured
    time_note, memory_note = ("; ".join(filter(None, (g, note))) for g in (time_goal, memory_goal))
    return [
        less(f"{name}: time", ours.seconds, peer.seconds, "s", identical, time_note),
        less(f"{name}: memory", ours.megabytes, peer.megabytes, "MB", identical, memory_note),
    ]


def verdict(same: bool, found: str) -> str:
    """What a comparison found; with OTHER in front if the results differ: ``make bench`` fails."""
    return found if same else f"OTHER: {found}"


def side_by_side(
    make: Callable[..., Pair], *arguments: Any, repeats: int, repeat_peer: bool = True
) -> tuple[Call, Call, str]:
    """Ours, the peer, and the verdict on their results.

    How it works: 1. Each side gets a fresh process, forked from one that has only imported torch
    and the package. 2. The first call of each is a warm-up; it gives the results that are compared,
    and the memory. 3. Times are medians of ``repeats`` further calls, made in turn; without any,
    those of the first call.

    Args:
        make: a module's function; with ``arguments`` it makes the pair, once in each process.
        repeats: further calls of each side.
        repeat_peer: False for a slow peer: it is called once.
    """
    made = (make, *arguments)
    with fresh_process() as ours, fresh_process() as peer:
        wait([process.submit(_pair, *made) for process in (ours, peer)])
        first, result = ours.submit(_first_call, "ours", *made).result()
        peer_first, peer_result = peer.submit(_first_call, "peer", *made).result()
        identical = ours.submit(_compare, result, peer_result, *made).result()
        calls, peer_calls = [], []
        for _ in range(repeats):
            calls.append(ours.submit(_next_call, "ours", *made).result())
            if repeat_peer:
                peer_calls.append(peer.submit(_next_call, "peer", *made).result())
    return _median(first, calls), _median(peer_first, peer_calls), identical


def alone(side: str, make: Callable[..., Pair], *arguments: Any) -> Call:
    """The first call of one side, ``ours`` or ``peer``, as in ``side_by_side``."""
    with fresh_process() as process:
        return process.submit(_first_call, side, make, *arguments).result()[0]


def fresh_process() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.scenes"])
    return ProcessPoolExecutor(1, context)


@cache
def _pair(make: Callable[..., Pair], *arguments: Any) -> Pair:
    return make(*arguments)


def _first_call(side: str, *made: Any) -> tuple[Call, bytes]:
    pair, results = _pair(*made), []
    call = getattr(pair, side)
    begun, cpu_begun = time.perf_counter(), time.process_time()
    peak = peak_bytes(lambda: results.append(call()), pair.device)
    taken = Call(time.perf_counter() - begun, time.process_time() - cpu_begun, peak / 1e6)
    return taken, pickle.dumps(results[0])


def _next_call(side: str, *made: Any) -> Call:
    call, cpu_begun = getattr(_pair(*made), side), time.process_time()
    return Call(seconds(call), time.process_time() - cpu_begun, NAN)


def _compare(ours: bytes, peer: bytes, *made: Any) -> str:
    return _pair(*made).compare(pickle.loads(ours), pickle.loads(peer))


def _median(first: Call, further: Sequence[Call]) -> Call:
    wall, cpu, _ = zip(*(further or [first]), strict=True)
    return Call(statistics.median(wall), statistics.median(cpu), first.megabytes)


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of a call; on a GPU until its work is done."""
    begun = time.perf_counter()
    call()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def medians_in_turn(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each call; they are made in turn, ``repeats`` times over."""
    taken = [[seconds(call) for call in calls] for _ in range(repeats)]
    return [statistics.median(of_call) for of_call in zip(*taken, strict=True)]


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """What a call adds at its peak to this process's memory (Linux's resident high-water mark), or
    to the tensors on a GPU.
    """
    if device == "cuda":
        torch = sys.modules["torch"]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # else the call could use memory that was freed before it
    Path("/proc/self/clear_refs").write_text("5")  # lowers the mark to what is resident (proc(5))
    before = psutil.Process().memory_info().rss
    call()
    status = Path("/proc/self/status").read_text()
    mark_kb = int(status.split("VmHWM:")[1].split()[0])
    return max(0, mark_kb * 1024 - before)


def run(benchmark: str, sample: str = "") -> list[Row]:
    """The rows of a benchmark (a module of this folder with a function ``rows``), from a process of
    its own; after an error a row that names it.
    """
    try:
        with fresh_process() as process:
            return process.submit(_rows, benchmark, sample).result()
    except Exception as error:  # the other benchmarks go on
        note = f"failed: {type(error).__name__}: {error}"
        return [less(benchmark, NAN, NAN, "", note=note)]


def _rows(benchmark: str, sample: str) -> list[Row]:
    os.environ["BENCH_SAMPLE"] = sample
    return importlib.import_module(f"bench.{benchmark}").rows()


def save_table(table: pd.DataFrame, path: Path, seconds: dict[str, float]) -> None:
    """A table as CSV, with four digits, and beside it, as JSON, the machine, the versions and the
    seconds that it took.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, float_format="%.4g")
    with fresh_process() as process:  # it has imported torch
        machine = process.submit(_machine).result()
    write_json(path.with_suffix(".json"), machine | {"seconds": seconds})


def _machine() -> dict[str, Any]:
    import torch

    gpu = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "code_version": provenance()["code_version"],
        "cpu": names[0] if names else "",
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu or "none",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "date": date.today().isoformat(),
    }
