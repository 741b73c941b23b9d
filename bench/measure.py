"""The harness of all benchmarks: two ways to the same result, each in a fresh process, called in
turn; their times, peak memory and results; the table, and the machine that it was measured on.
"""

import ctypes
import importlib
import math
import multiprocessing
import os
import pickle
import statistics
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
    """A line of ``outputs/bench.csv``."""

    benchmark: str
    ours: float
    peer: float
    unit: str
    ratio: float  # how many times better ours is
    identical: str  # see ``verdict``
    note: str


class Pair(NamedTuple):
    """Two functions without arguments that give the same result."""

    ours: Callable[[], Any]
    peer: Callable[[], Any]
    compare: Callable[[Any, Any], str]  # both results -> a ``verdict``
    device: str = "cpu"  # or ``cuda``, where both work


class Call(NamedTuple):
    """Wall and CPU seconds of a call, and the megabytes that it adds at its peak."""

    seconds: float = NAN
    cpu_seconds: float = NAN
    megabytes: float = NAN


def times_less(ours: float, peer: float) -> float:
    """NaN if ours is too small to be measured."""
    return peer / ours if ours > 0 else NAN


def less(
    name: str, ours: float, peer: float, unit: str, identical: str = "", note: str = ""
) -> Row:
    """A row of something of which less is better, such as seconds."""
    return Row(name, ours, peer, unit, times_less(ours, peer), identical, note)


def time_and_memory(
    name: str, measured: tuple[Call, Call, str], note: str, time_goal: str = "", peak_goal: str = ""
) -> list[Row]:
    """Two rows of what ``side_by_side`` found."""
    ours, peer, identical = measured
    time_note, peak_note = ("; ".join(filter(None, (g, note))) for g in (time_goal, peak_goal))
    return [
        less(f"{name}: time", ours.seconds, peer.seconds, "s", identical, time_note),
        less(f"{name}: memory", ours.megabytes, peer.megabytes, "MB", identical, peak_note),
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
    those of the first call. A slow peer (``repeat_peer`` False) is called once.

    ``make`` is a module's function; with ``arguments`` it makes the pair, once in each process.
    """
    made = (make, *arguments)
    with fresh_process() as ours, fresh_process() as peer:
        sides = {"ours": ours, "peer": peer}
        wait([process.submit(_pair, *made) for process in sides.values()])
        firsts, results = zip(
            *(process.submit(_first_call, side, *made).result() for side, process in sides.items()),
            strict=True,
        )
        identical = ours.submit(_compare, *results, *made).result()
        calls = {"ours": [], "peer": []}
        for _ in range(repeats):
            for side in sides if repeat_peer else ["ours"]:
                calls[side].append(sides[side].submit(_next_call, side, *made).result())
    return *map(_median, firsts, calls.values()), identical


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
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
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
    mark_kb = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
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
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, float_format="%.4g")
    found = provenance()
    machine = {
        "code_version": found["code_version"],
        "cpu": found["machine"]["processor"],
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": found["machine"]["gpu"] or "none",
        "python": found["python"],
        **{name: version(name) for name in PACKAGES},
        "date": date.today().isoformat(),
    }
    write_json(path.with_suffix(".json"), machine | {"seconds": seconds})
