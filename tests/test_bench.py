"""``bench/measure.py``: what it calls a peak, a ratio and the same."""

import importlib.util
import math

import numpy as np
import pytest

from cellseg_helpers.config import ROOT

BYTES = 50_000_000


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("measure", ROOT / "bench" / "measure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_peak_is_what_a_call_holds_at_once(measure) -> None:
    assert measure.peak_bytes(lambda: np.ones(BYTES, np.uint8)) == pytest.approx(BYTES, abs=5e6)


def test_what_a_call_gives_back_counts_once(measure) -> None:
    def call() -> None:
        for _ in range(3):
            np.ones(BYTES, np.uint8)

    assert measure.peak_bytes(call) == pytest.approx(BYTES, abs=5e6)


def test_ratio_to_nothing_measured_is_nan(measure) -> None:
    assert measure.times_less(2.0, 6.0) == 3.0
    assert math.isnan(measure.times_less(0.0, 6.0)) and math.isnan(measure.times_less(-1.0, 6.0))


def test_other_results_are_called_so(measure) -> None:
    assert measure.verdict(True, "5 of 5") == "5 of 5"
    assert measure.verdict(False, "4 of 5") == "OTHER: 4 of 5"
