"""What the benchmarks call a peak, a ratio, the same, and a busy GPU."""

import math
import subprocess
import sys
import time
from itertools import count

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from bench import __main__ as bench_main
from bench import gpu, loading, measure
from bench.prediction import masks_to_rles
from bench.scenes import dense_scene, with_dense_masks
from bench.training import torchvision_model
from cellseg_helpers.config import ROOT
from cellseg_helpers.data.labels import find_boxes
from cellseg_helpers.data.samples import SampleKey, TrainingSet, collate, make_target

BYTES = 50_000_000


@pytest.mark.parametrize("times", [1, 3])
def test_peak_is_what_a_call_holds_at_once(times) -> None:
    """In a process of its own, as the benchmarks measure it: another one may have freed memory left
    to use.
    """
    call = f"lambda: [len(np.ones({BYTES}, np.uint8)) for _ in range({times})]"
    code = f"import numpy as np\nfrom bench.measure import peak_bytes\nprint(peak_bytes({call}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == pytest.approx(BYTES, abs=5e6)


def test_memory_of_a_pair_in_a_process_of_its_own() -> None:
    """200 masks as run-length encodings, of an image of 3 megapixels: far less than one dense mask
    each, 623 MB.
    """
    assert 0.5 < measure.alone("ours", masks_to_rles, 200).megabytes < 50
    with pytest.raises(AttributeError, match="no_such_side"):
        measure.alone("no_such_side", masks_to_rles, 200)


def holders(seconds: float, megabytes: int) -> measure.Pair:
    """Ours holds that many MB and gives the number of its call, the peer holds ten times as many
    for at least ``seconds``.
    """
    calls = count(1)

    def hold(many: int) -> int:
        return len(np.ones(many * 10**6, np.uint8)) and next(calls)

    def peer() -> int:
        time.sleep(seconds)
        return hold(10 * megabytes)

    return measure.Pair(lambda: hold(megabytes), peer, compare)


def compare(ours: int, peer: int) -> str:
    return measure.verdict(ours == peer, f"{ours} and {peer}")


@pytest.mark.parametrize("pixels", [np.zeros((9, 8), np.uint8), np.zeros((9, 8, 3), np.uint16)])
def test_loading_names_an_image_that_its_peer_cannot_read(pixels, tmp_path, monkeypatch) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "train" / "a" / "image.tif", pixels)
    monkeypatch.setenv("BENCH_SAMPLE", str(tmp_path))
    only = (
        r"a/image\.tif: the peer reads RGB of 8 bits a channel only; name a folder of such images"
    )
    with pytest.raises(ValueError, match=only):
        next(loading.tiff_samples())


@pytest.mark.parametrize("repeat_peer", [True, False])
def test_sides_are_each_in_a_process_of_their_own(repeat_peer) -> None:
    """The results that are compared are of each side's first call; a warm peer is not timed with a
    call that was its first.
    """
    ours, peer, alike = measure.side_by_side(holders, 0.2, 20, repeats=3, repeat_peer=repeat_peer)
    assert alike == "1 and 1"
    assert ours.megabytes == pytest.approx(20, abs=5) and peer.megabytes == pytest.approx(
        200, abs=5
    )
    assert ours.seconds < 0.2 <= peer.seconds < 2 and ours.cpu_seconds < 0.2


def test_pair_that_differs_is_called_so_side_by_side() -> None:
    _, _, alike = measure.side_by_side(differing, repeats=0)
    assert alike == "OTHER: 1 and 2"


def differing() -> measure.Pair:
    return measure.Pair(lambda: 1, lambda: 2, compare)


def test_benchmark_that_fails_leaves_a_row_that_says_so() -> None:
    (row,) = bench_main.run("no_such_benchmark")
    assert row["note"].startswith("failed: ModuleNotFoundError")
    assert "no_such_benchmark" in row["note"]
    assert math.isnan(row["ours"]) and not row["identical"]


def test_ratio_to_nothing_measured_is_nan() -> None:
    assert measure.row("time", 2.0, 6.0, "s")["ratio"] == 3.0
    assert measure.row("speed", 6.0, 2.0, "images/s", more_is_better=True)["ratio"] == 3.0
    for ours in (0.0, -1.0):
        assert math.isnan(measure.row("time", ours, 6.0, "s")["ratio"])


def test_other_results_are_called_so() -> None:
    assert measure.verdict(True, "5 of 5") == "5 of 5"
    assert measure.verdict(False, "4 of 5") == "OTHER: 4 of 5"


def test_work_side_by_side_on_a_gpu_counts_once() -> None:
    assert gpu.covered([(6, 8), (0, 2), (1, 3), (7, 7.5)]) == 5
    assert gpu.covered([]) == 0


@given(
    label_maps=arrays(
        np.int32,
        st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
        elements=st.sampled_from([0, 0, 0, 1, 2, 5, 65_000]),
    )
)
@settings(max_examples=100, deadline=None)
def test_boxes_made_on_the_device_are_find_boxes(label_maps) -> None:
    made = gpu.boxes_on_device(torch.from_numpy(label_maps).to(gpu.DEVICE))
    for name, expected in zip(("boxes", "labels", "ids"), find_boxes(label_maps), strict=True):
        torch.testing.assert_close(made[name].cpu(), torch.from_numpy(expected), rtol=0, atol=0)


def test_crops_augmented_on_the_device_are_the_workers_samples() -> None:
    scenes = gpu.Scenes(256)
    drawing = (scenes, [0, 1, 2, 3], 128, 0.5, gpu.RECIPE, 3, True)
    samples = TrainingSet(*drawing)
    keys = [SampleKey(0, position, position % 4) for position in range(8)]
    expected_images, expected = collate([samples[key] for key in keys])
    images, targets = gpu.augment_on_device(collate([gpu.Crops(*drawing)[key] for key in keys]))
    assert sum(len(target["boxes"]) for target in expected) > 40
    for image, expected_image in zip(images, expected_images, strict=True):
        differs = (
            image.cpu().int() - expected_image.int()
        ).abs() > 1  # the colours may be rounded otherwise
        assert differs.float().mean() < 1e-3
    for target, expected_target in zip(targets, expected, strict=True):
        assert target.keys() == expected_target.keys()
        for name, value in expected_target.items():
            found = target[name]
            assert (
                torch.equal(found.cpu(), value)
                if isinstance(value, torch.Tensor)
                else found == value
            )


@pytest.mark.parametrize("way", ["ours", "peer", "channels_first", "augmented_on_gpu", "float32"])
def test_training_for_the_gpus_table_runs_to_its_end(way, monkeypatch) -> None:
    """On the device at hand, a CPU too: its operations then count as the device's work."""
    for name, steps in (("WARM_UP", 1), ("TIMED", 2), ("PROFILED", 1), ("AHEAD", 1)):
        monkeypatch.setattr(gpu, name, steps)
    measured = gpu.train(64, 1, way)
    assert measured.images_per_s > 0 and 0 <= measured.waiting < 100 and measured.working > 0


def test_reference_loop_finds_the_masks_of_over_256_cells_in_bfloat16(monkeypatch) -> None:
    """torchvision's own, under autocast, takes the numbers of cells as bfloat16, which are exact to
    256.
    """
    seen = []

    def project(masks, boxes, match, size):
        seen.append((boxes.dtype, match.max().item()))
        return project_masks_on_boxes(masks, boxes, match, size)

    monkeypatch.setattr("torchvision.models.detection.roi_heads.project_masks_on_boxes", project)
    image, label_maps = dense_scene(256, 300)
    target = with_dense_masks(make_target(label_maps))
    model = torchvision_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    gpu.train_reference(model, optimizer, schedule, [([image], [target])], mixed=True)
    assert seen and all(dtype == torch.float32 for dtype, _ in seen) and seen[0][1] > 256


def test_training_in_a_process_of_its_own_says_why_it_failed(monkeypatch) -> None:
    failed = gpu.measure(0, 1, "ours")
    assert failed.failure.startswith("ours failed: ") and math.isnan(failed.working)
    monkeypatch.setattr(gpu, "PROCESS_LIMIT_S", 0.1)
    assert gpu.measure(64, 1, "ours").failure == "ours took over 0.1 s"


def test_rows_of_a_gpu_say_what_failed(capsys) -> None:
    failed = gpu.Measured(failure="peer failed: OutOfMemoryError: CUDA out of memory")
    table = gpu.rows_of(512, 2, "", gpu.Measured(8.0, 0.0, 0.0), failed)
    assert [row["ours"] for row in table] == [8.0, 0.0, 0.0]
    for row in table:
        assert math.isnan(row["ratio"])
        assert row["note"].endswith("peer failed: OutOfMemoryError: CUDA out of memory")
    assert "8.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("identical", "note", "code"),
    [("5 of 5", "", 0), ("OTHER: 4 of 5", "", 1), ("", "failed: no memory", 1)],
)
def test_bench_writes_its_table_and_fails_where_results_differ(
    identical, note, code, tmp_path, monkeypatch, capsys
) -> None:
    row = measure.row("a thing", 1.0, 20.0, "s", identical, note)
    monkeypatch.setattr(bench_main, "run", lambda name: [row])
    monkeypatch.setattr(sys, "argv", ["bench", "prediction", "--out", str(tmp_path / "bench.csv")])
    assert bench_main.main() == code
    (written,) = pd.read_csv(tmp_path / "bench.csv", keep_default_na=False).to_dict("records")
    assert written == row
    assert "a thing" in capsys.readouterr().out and (tmp_path / "bench.json").exists()
