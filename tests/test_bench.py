"""What the benchmarks call a peak, a ratio, the same, and a busy GPU."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bench import gpu, measure
from bench.scenes import dense_image, dense_label_maps
from cellseg_helpers.config import ROOT
from cellseg_helpers.data.labels import find_boxes
from cellseg_helpers.data.recipes import RECIPES, augment
from cellseg_helpers.data.transforms import make_target

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


def test_work_side_by_side_on_a_gpu_counts_once() -> None:
    assert gpu.covered_us([(6, 8), (0, 2), (1, 3), (7, 7.5)]) == 5
    assert gpu.covered_us([]) == 0


@given(
    label_maps=arrays(
        np.int32, st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 0, 0, 1, 2, 5, 65_000])
    )
)
@settings(max_examples=100, deadline=None)
def test_boxes_made_on_the_device_are_find_boxes(label_maps) -> None:
    made = gpu.boxes_there(torch.from_numpy(label_maps).to(gpu.DEVICE))
    for name, expected in zip(("boxes", "labels", "ids"), find_boxes(label_maps), strict=True):
        torch.testing.assert_close(made[name].cpu(), torch.from_numpy(expected), rtol=0, atol=0)


def test_crops_augmented_on_the_device_are_those_of_the_workers() -> None:
    label_maps = torch.from_numpy(dense_label_maps(96, 20))
    image = torch.from_numpy(dense_image(label_maps.numpy()))
    [augmented], [target] = gpu.augment_there(([image], [make_target(label_maps) | {"seed": 3}]))
    expected_image, expected_maps = augment(image, label_maps, RECIPES[gpu.RECIPE], 3)
    assert (expected_image != image).any()
    torch.testing.assert_close(augmented.cpu(), expected_image, rtol=0, atol=1)  # rounding of the colours
    for name, expected in make_target(expected_maps).items():
        torch.testing.assert_close(target[name].cpu(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["ours", "peer", "augmented_there"])
def test_training_for_the_gpus_table_runs_to_its_end(way, monkeypatch) -> None:
    """On the device at hand, a CPU too: its operations then count as the device's work."""
    for name, steps in (("WARM_UP", 1), ("STEPS", 2), ("PROFILED", 1), ("AHEAD", 1)):
        monkeypatch.setattr(gpu, name, steps)
    speed, waiting, busy = gpu.train(64, 1, way)
    assert speed > 0 and 0 <= waiting < 100 and 0 < busy
