"""``bench/measure.py``: what it calls a peak, a ratio and the same."""

import math
import subprocess
import sys

import pytest

from bench import measure
from cellseg_helpers.config import ROOT

BYTES = 50_000_000


@pytest.mark.parametrize("times", [1, 3])
def test_peak_is_what_a_call_holds_at_once(times) -> None:
    """In a process of its own, as the benchmarks measure it: another one may have freed memory left to use."""
    call = f"lambda: [len(np.ones({BYTES}, np.uint8)) for _ in range({times})]"
    code = f"import numpy as np\nfrom bench.measure import peak_bytes\nprint(peak_bytes({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(BYTES, abs=5e6)


def test_ratio_to_nothing_measured_is_nan() -> None:
    assert measure.times_less(2.0, 6.0) == 3.0
    assert math.isnan(measure.times_less(0.0, 6.0)) and math.isnan(measure.times_less(-1.0, 6.0))


def test_other_results_are_called_so() -> None:
    assert measure.verdict(True, "5 of 5") == "5 of 5"
    assert measure.verdict(False, "4 of 5") == "OTHER: 4 of 5"
