"""Two ways to the same result, side by side: time in turn in one process, peak memory of one call in a fresh process each.

    python -m bench.measure bench.training:mask_targets ours|peer        one call; prints the bytes it added at its peak
"""

import ctypes
import importlib
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).parents[1]
MEGABYTE = 1e6


class Pair(NamedTuple):
    """Two functions without arguments that give the same, each called many times.

    ``identical`` compares what they gave, in words; ``device``: ``cpu`` or ``cuda``, where both work and take their memory.
    """

    ours: Callable[[], Any]
    peer: Callable[[], Any]
    identical: Callable[[Any, Any], str]
    device: str = "cpu"


class Row(NamedTuple):
    """A line of ``outputs/bench.csv``; ``ratio``: how many times better ours is; ``identical``: see ``verdict``."""

    benchmark: str
    ours: float
    peer: float
    unit: str
    ratio: float
    identical: str
    note: str


def seconds_in_turn(pair: Pair, repeats: int) -> tuple[float, float, str]:
    """Median seconds of ours and of the peer, called in turn, and how alike their results are."""
    identical = pair.identical(pair.ours(), pair.peer())
    ours, peer = medians_in_turn((pair.ours, pair.peer), repeats)
    return ours, peer, identical


def medians_in_turn(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each call; they are made in turn, ``repeats`` times over."""
    taken = [[seconds(call) for call in calls] for _ in range(repeats)]
    return [statistics.median(of_call) for of_call in zip(*taken, strict=True)]


def times_less(ours: float, peer: float) -> float:
    """How many times less seconds or bytes ours takes; NaN where it takes none that can be measured."""
    return peer / ours if ours > 0 else math.nan


def verdict(same: bool, found: str) -> str:
    """What a comparison found; where the results are not the same, it begins with OTHER, and ``make bench`` fails."""
    return found if same else f"OTHER: {found}"


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call; on a GPU until its work is done."""
    begun = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - begun


def megabytes(pair: str, side: str) -> float:
    """MB that one call adds at its peak to its process's memory (on a GPU: to the tensors on it), in a fresh process.

    The process is forked from one that has imported torch and the package, and done nothing else.

    Args:
        pair: ``module:function`` that makes a ``Pair``.
        side: ``ours`` or ``peer``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.scenes"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(added_bytes, pair, side).result() / MEGABYTE


def both_megabytes(pair: str) -> tuple[float, float]:
    """``megabytes`` of ours and of the peer, one after the other."""
    return megabytes(pair, "ours"), megabytes(pair, "peer")


def added_bytes(pair: str, side: str) -> int:
    """``peak_bytes`` of one call of a side of a pair, named as in ``megabytes``, in this process."""
    module, function = pair.split(":")
    measured: Pair = getattr(importlib.import_module(module), function)()
    return peak_bytes(getattr(measured, side), measured.device)


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """What a call adds at its peak to this process's memory, by Linux's resident high-water mark, or to the tensors on a GPU."""
    if device == "cuda":
        torch = sys.modules["torch"]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # else the call could use again what was freed before it (malloc_trim(3))
    Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now (proc(5))
    before = psutil.Process().memory_info().rss
    call()
    mark = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return max(0, int(mark.split()[1]) * 1024 - before)


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(added_bytes(*sys.argv[1:]))
