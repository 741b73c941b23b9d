"""Two ways to the same result, side by side: each in a fresh process, which gives its peak memory,
and called in turn.
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
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).parents[1]
MEGABYTE = 1e6


class Pair(NamedTuple):
    """Two functions without arguments that give the same, each called many times.

    ``identical`` compares what they gave, in words; ``device``: ``cpu`` or ``cuda``, where both
    work and take their memory.
    """

    ours: Callable[[], Any]
    peer: Callable[[], Any]
    identical: Callable[[Any, Any], str]
    device: str = "cpu"


MakePair = Callable[..., Pair]


class Call(NamedTuple):
    """Seconds of a call on the wall and of CPU, and the MB that it added at its peak."""

    seconds: float
    cpu_seconds: float
    megabytes: float


NOT_RUN = Call(math.nan, math.nan, math.nan)


class Row(NamedTuple):
    """A line of ``outputs/bench.csv``; ``ratio``: how many times better ours is; ``identical``: see
    ``verdict``.
    """

    benchmark: str
    ours: float
    peer: float
    unit: str
    ratio: float
    identical: str
    note: str


def medians_in_turn(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each call; they are made in turn, ``repeats`` times over."""
    taken = [[seconds(call) for call in calls] for _ in range(repeats)]
    return [statistics.median(of_call) for of_call in zip(*taken, strict=True)]


def times_less(ours: float, peer: float) -> float:
    """How many times less seconds or bytes ours takes; NaN where it takes none that can be
    measured.
    """
    return peer / ours if ours > 0 else math.nan


def time_and_memory(
    name: str, measured: tuple[Call, Call, str], time_note: str, memory_note: str
) -> list[Row]:
    """Two rows of what ``side_by_side`` found."""
    ours, peer, alike = measured
    return [
        Row(
            f"{name}: time",
            ours.seconds,
            peer.seconds,
            "s",
            times_less(ours.seconds, peer.seconds),
            alike,
            time_note,
        ),
        Row(
            f"{name}: memory",
            ours.megabytes,
            peer.megabytes,
            "MB",
            times_less(ours.megabytes, peer.megabytes),
            alike,
            memory_note,
        ),
    ]


def verdict(same: bool, found: str) -> str:
    """What a comparison found; where the results are not the same, it begins with OTHER, and ``make
    bench`` fails.
    """
    return found if same else f"OTHER: {found}"


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call; on a GPU until its work is done."""
    begun = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - begun


def side_by_side(
    make: MakePair, *arguments: Any, repeats: int, repeat_peer: bool = True
) -> tuple[Call, Call, str]:
    """Ours, the peer, and how alike their results are; each side works in a fresh process of its
    own while the other waits.

    The first call of each is a warm-up, gives the results that are compared, and tells what a call
    adds at its peak to its process's memory (on a GPU: to the tensors on it). Times are medians of
    ``repeats`` further calls, made in turn. Such a process is forked from one that has imported
    torch and the package and done nothing else.

    Args:
        make: a module's function; with these ``arguments`` it makes the pair, once in each process.
        repeats: of each side.
        repeat_peer: ``False`` for a slow peer: it is called once, without a warm-up.
    """
    made = (make, *arguments)
    with fresh_process() as ours, fresh_process() as peer:
        wait([process.submit(prepare, *made) for process in (ours, peer)])
        first, result = ours.submit(first_call, "ours", *made).result()
        peer_first, peer_result = peer.submit(first_call, "peer", *made).result()
        identical = ours.submit(compare, result, peer_result, *made).result()
        taken, peer_taken = [], []
        for _ in range(repeats):
            taken.append(ours.submit(next_call, "ours", *made).result())
            if repeat_peer:
                peer_taken.append(peer.submit(next_call, "peer", *made).result())
    return median(first, taken), median(peer_first, peer_taken), identical


def alone(side: str, make: MakePair, *arguments: Any, repeats: int = 0) -> Call:
    """One side, ``ours`` or ``peer``, as in ``side_by_side``."""
    with fresh_process() as process:
        first, _ = process.submit(first_call, side, make, *arguments).result()
        return median(
            first,
            [process.submit(next_call, side, make, *arguments).result() for _ in range(repeats)],
        )


def fresh_process() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.scenes"])
    return ProcessPoolExecutor(1, context)


@cache
def pair_of(make: MakePair, *arguments: Any) -> Pair:
    """Made once in each process."""
    return make(*arguments)


def prepare(*made: Any) -> None:
    pair_of(*made)


def first_call(side: str, *made: Any) -> tuple[Call, bytes]:
    """With its memory, and its pickled result."""
    pair, results = pair_of(*made), []
    call = getattr(pair, side)
    begun, cpu_begun = time.perf_counter(), time.process_time()
    peak = peak_bytes(lambda: results.append(call()), pair.device)
    taken = Call(time.perf_counter() - begun, time.process_time() - cpu_begun, peak / MEGABYTE)
    return taken, pickle.dumps(results[0])


def next_call(side: str, *made: Any) -> Call:
    """Without its memory."""
    call, cpu_begun = getattr(pair_of(*made), side), time.process_time()
    return Call(seconds(call), time.process_time() - cpu_begun, math.nan)


def compare(ours: bytes, peer: bytes, *made: Any) -> str:
    return pair_of(*made).identical(pickle.loads(ours), pickle.loads(peer))


def median(first: Call, further: Sequence[Call]) -> Call:
    """Median times of the further calls, of the first where there are none; the first's memory."""
    wall, cpu, _ = zip(*(further or [first]), strict=True)
    return Call(statistics.median(wall), statistics.median(cpu), first.megabytes)


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """What a call adds at its peak to this process's memory, by Linux's resident high-water mark,
    or to the tensors on a GPU.
    """
    if device == "cuda":
        torch = sys.modules["torch"]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(
        0
    )  # else the call could use again what was freed before it (malloc_trim(3))
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the mark falls to what is resident now (proc(5))
    before = psutil.Process().memory_info().rss
    call()
    mark = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return max(0, int(mark.split()[1]) * 1024 - before)


def rows_of(benchmark: str, sample: str) -> list[Row]:
    """The rows of a benchmark, a module of this folder; ``sample``: of real images, for
    ``loading``.
    """
    os.environ["BENCH_SAMPLE"] = sample
    return importlib.import_module(f"bench.{benchmark}").rows()


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()
