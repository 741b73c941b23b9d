"""The harness of all benchmarks: two ways to the same result, each in a process of its own, called
in turn; their times, peak memory and results; the table, and the machine that it was measured on.
"""

import ctypes
import importlib
import math
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import psutil
import torch

from cellseg_helpers.runs import provenance, write_json

NAN = math.nan
Row = dict[str, Any]


class Pair(NamedTuple):
    """Two functions without arguments that give the same result."""

    ours: Callable[[], Any]
    peer: Callable[[], Any]
    compare: Callable[[Any, Any], str]  # both results -> a ``verdict``
    device: str = "cpu"  # or ``cuda``, where both work


class Call(NamedTuple):
    """Wall and CPU seconds of a call, the megabytes that it adds at its peak, and its result."""

    seconds: float = NAN
    cpu_seconds: float = NAN
    megabytes: float = NAN
    result: bytes = b""  # pickled


def row(
    name: str, ours: float, peer: float, unit: str, identical="", note="", more_is_better=False
) -> Row:
    """A line of the table. ``ratio``: how many times better ours is; NaN if that cannot be said.
    ``identical`` is a ``verdict``.
    """
    better, worse = (peer, ours) if more_is_better else (ours, peer)
    numbers = {"ours": ours, "peer": peer, "unit": unit, "ratio": NAN}
    if better > 0:
        numbers["ratio"] = worse / better
    return {"benchmark": name, **numbers, "identical": identical, "note": note}


def time_and_memory(
    name: str, measured: tuple[Call, Call, str], note: str, time_goal: str = "", peak_goal: str = ""
) -> list[Row]:
    """Two rows of what ``side_by_side`` found."""
    ours, peer, identical = measured
    time_note, peak_note = (f"{goal}; {note}" if goal else note for goal in (time_goal, peak_goal))
    return [
        row(f"{name}: time", ours.seconds, peer.seconds, "s", identical, time_note),
        row(f"{name}: memory", ours.megabytes, peer.megabytes, "MB", identical, peak_note),
    ]


def verdict(same: bool, found: str) -> str:
    """What a comparison found; OTHER in front, where results differ, has ``make bench`` fail."""
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
    calls: dict[str, list[Call]] = {"ours": [], "peer": []}
    with fresh_process() as ours, fresh_process() as peer:
        for number in range(repeats + 1):
            for side, process in (("ours", ours), ("peer", peer)):
                if number == 0 or side == "ours" or repeat_peer:
                    future = process.submit(_call, side, number == 0, make, *arguments)
                    calls[side].append(future.result())
        results = [first.result for first, *_ in calls.values()]
        identical = ours.submit(_compare, *results, make, *arguments).result()
    return *map(_median, calls.values()), identical


def alone(side: str, make: Callable[..., Pair], *arguments: Any) -> Call:
    """The first call of one side, ``ours`` or ``peer``, as in ``side_by_side``."""
    with fresh_process() as process:
        return process.submit(_call, side, True, make, *arguments).result()


def fresh_process() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.scenes"])
    return ProcessPoolExecutor(1, context)


@cache
def _pair(make: Callable[..., Pair], *arguments: Any) -> Pair:
    return make(*arguments)


def _call(side: str, is_first: bool, make: Callable[..., Pair], *arguments: Any) -> Call:
    """One call; the first one gives its memory and its result, too."""
    pair, results = _pair(make, *arguments), []
    call = getattr(pair, side)
    begun, cpu_begun = now(), time.process_time()
    if not is_first:
        call()
        return Call(now() - begun, time.process_time() - cpu_begun)
    peak = peak_bytes(lambda: results.append(call()), pair.device)
    taken = (now() - begun, time.process_time() - cpu_begun)
    return Call(*taken, peak / 1e6, pickle.dumps(results[0]))


def _compare(ours: bytes, peer: bytes, make: Callable[..., Pair], *arguments: Any) -> str:
    return _pair(make, *arguments).compare(pickle.loads(ours), pickle.loads(peer))


def _median(calls: list[Call]) -> Call:
    """The medians of the calls behind the first, if there are any; the first one's memory."""
    seconds = np.median([call[:2] for call in calls[1:] or calls], axis=0)
    return Call(*seconds.tolist(), calls[0].megabytes)


def now() -> float:
    """Seconds by the clock, once a GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of a call."""
    begun = now()
    call()
    return now() - begun


def medians_in_turn(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each call; they are made in turn, ``repeats`` times over."""
    taken = [[seconds(call) for call in calls] for _ in range(repeats)]
    return np.median(taken, axis=0).tolist()


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """What a call adds at its peak to this process's memory (Linux's resident high-water mark), or
    to the tensors on a GPU.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # else the call could use memory that was freed before it
    Path("/proc/self/clear_refs").write_text("5")  # lowers the mark to what is resident (proc(5))
    before = psutil.Process().memory_info().rss
    call()
    mark_kb = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return max(0, mark_kb * 1024 - before)


def run(benchmark: str) -> list[Row]:
    """The rows of a benchmark (a module of this folder with a function ``rows``), from a process of
    its own; after an error a row that names it.
    """
    try:
        with fresh_process() as process:
            return process.submit(_rows, benchmark).result()
    except Exception as error:  # the other benchmarks go on
        return [row(benchmark, NAN, NAN, "", note=f"failed: {type(error).__name__}: {error}")]


def _rows(benchmark: str) -> list[Row]:
    return importlib.import_module(f"bench.{benchmark}").rows()


def save_table(table: pd.DataFrame, path: Path, seconds: dict[str, float]) -> None:
    """Print a table and write it as CSV, with four digits; beside it, as JSON, the code, the
    machine, the versions and the seconds that it took.
    """
    digits = "{:.4g}".format
    print(table.to_string(index=False, float_format=digits, max_colwidth=60))
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, float_format=digits)
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "date": date.today().isoformat(),
    }
    write_json(path.with_suffix(".json"), provenance() | machine | {"seconds": seconds})
