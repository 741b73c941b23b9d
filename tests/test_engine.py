"""Training: same seed, same numbers; killed and resumed, the same weights; what goes wrong ends in
a sentence.

``CELLSEG_KILL_POINTS=10 pytest tests/test_engine.py -k random_moments`` kills ten runs instead of
three.
"""

import json
import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_training
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from tiny_training import build_tiny, history_without_clock, tiny_settings
from torch import nn

from cellseg_helpers import devices, engine, runs
from cellseg_helpers.config import ROOT, RunConfig
from cellseg_helpers.data import cache as cache_module
from cellseg_helpers.data.drawn import draw_dataset, draw_tissue
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.data.samples import make_target
from cellseg_helpers.devices import AutocastPrecision, make_fabric
from cellseg_helpers.engine import (
    LOSSES,
    TrainingError,
    best_epoch,
    fit,
    make_schedulers,
    stopped_early,
)
from cellseg_helpers.inference import count_run_parameters, predict_run
from cellseg_helpers.model.build import build_model, count_parameters
from cellseg_helpers.runs import RunError, load_checkpoint, load_run, read_json, write_json

KILL_POINTS = int(os.environ.get("CELLSEG_KILL_POINTS", 3))
ALONE = multiprocessing.get_context("forkserver")
ALONE.set_forkserver_preload(["cellseg_helpers.engine"])
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Six drawn images of six patients, 48 to 94 px a side."""
    folder = tmp_path_factory.mktemp("tissue") / "drawn"
    draw_dataset(folder, num_train=6, num_test=0, image_size_px=(64, 72))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def tiny(tmp_path, cache, monkeypatch):
    """``fit`` builds the tiny model and keeps its files in the test's folder."""
    monkeypatch.setattr(runs, "RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(cache_module, "CACHE", cache)
    monkeypatch.setattr(engine, "build_model", build_tiny)


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """The same weights, optimizer, scores and history, bit for bit; only the clock's columns may
    differ.
    """
    for name in ("best.safetensors", "detections.json", "metrics.json", "truth.json", "split.json"):
        assert (run_dir / name).read_bytes() == (expected / name).read_bytes(), name
    pd.testing.assert_frame_equal(
        history_without_clock(run_dir), history_without_clock(expected), check_exact=True
    )
    mine, theirs = load_checkpoint(run_dir / "last.pt"), load_checkpoint(expected / "last.pt")
    torch.testing.assert_close(mine["model"], theirs["model"], rtol=0, atol=0)
    torch.testing.assert_close(
        mine["optimizer"]["state"], theirs["optimizer"]["state"], rtol=0, atol=0
    )
    assert (
        mine["per_step_schedule"] == theirs["per_step_schedule"]
        and mine["plateau"] == theirs["plateau"]
    )
    assert not list(run_dir.glob(".*"))


# One run


def test_a_run_leaves_a_whole_run_folder(data):
    seen = []
    run_dir = fit(tiny_settings(data), on_epoch=lambda history: seen.append(len(history)))
    assert seen == [1, 2, 3]
    assert {file.name for file in run_dir.iterdir()} == {
        "settings.json", "provenance.json", "split.json", "truth.json", "history.csv",
        "last.pt", "best.safetensors", "detections.json", "metrics.json", "finished.json",
    }  # fmt: skip
    run = load_run(run_dir)
    history = run.history
    assert history.columns.tolist() == [
        "epoch", "learning_rate", "loss", *LOSSES, "train_minutes", "cpu_minutes",
        "validation_loss", "validation_ap50", "peak_memory_bytes",
    ]  # fmt: skip
    assert history["epoch"].tolist() == [1, 2, 3]
    assert history["loss"].tolist() == pytest.approx(history[list(LOSSES)].sum(axis=1).tolist())
    assert history["train_minutes"].is_monotonic_increasing and (history["cpu_minutes"] > 0).all()
    assert len(run.truth["images"]) == len(run.split["validation"]) == 2
    assert [image["file_name"] for image in run.truth["images"]] == run.split["validation"]
    assert len(run.detections) and set(run.detections.image_ids.tolist()) <= {1, 2}
    best = history["validation_ap50"].to_numpy().argmax()
    assert run.metrics["coco_dense"]["summary"]["AP50"] == history["validation_ap50"][best]


def test_the_best_weights_are_those_of_the_best_epoch(data, monkeypatch):
    """With a constant rate, a run of two epochs is the first two of a run of three."""
    losses = iter([3.0, 1.0, 2.0] + [3.0, 1.0])
    monkeypatch.setattr(engine, "validation_loss", lambda *args: next(losses))
    changes = {"scheduler": "none", "monitor": "validation_loss"}
    three = fit(tiny_settings(data, run_name="three", **changes))
    two = fit(tiny_settings(data, run_name="two", epochs=2, **changes))
    best, last = load_file(three / "best.safetensors"), load_checkpoint(three / "last.pt")["model"]
    torch.testing.assert_close(
        best, dict(load_checkpoint(two / "last.pt")["model"]), rtol=0, atol=0
    )
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_the_same_seed_gives_the_same_numbers_with_and_without_workers(data):
    alone = fit(tiny_settings(data, run_name="alone", augmentation="flips_turns_stain"))
    torch.manual_seed(99)
    workers = fit(
        tiny_settings(data, run_name="workers", augmentation="flips_turns_stain", num_workers=2)
    )
    assert_same_run(workers, alone)
    other = fit(tiny_settings(data, run_name="other", augmentation="flips_turns_stain", seed=1))
    assert not history_without_clock(other).equals(history_without_clock(alone))


def test_training_lowers_the_loss(data):
    history = load_run(
        fit(tiny_settings(data, epochs=1, steps_per_epoch=25, learning_rate=5e-3))
    ).history
    untrained = load_run(
        fit(
            tiny_settings(
                data, run_name="untrained", epochs=1, steps_per_epoch=1, learning_rate=1e-9
            )
        )
    ).history
    assert history["validation_loss"][0] < 0.9 * untrained["validation_loss"][0]


def test_the_real_model_trains(data, monkeypatch):
    monkeypatch.setattr(engine, "build_model", build_model)
    run_dir = fit(
        tiny_settings(
            data,
            epochs=1,
            optimizer="sgd",
            momentum=0.0,
            learning_rate=1e-3,
            precision="bf16-mixed",
        )
    )
    history = load_run(run_dir).history
    assert history[list(LOSSES)].notna().all(axis=None) and 0 < history["loss"][0] < 10
    torch.manual_seed(0)
    before, after = build_model(RunConfig()).state_dict(), load_file(run_dir / "best.safetensors")
    assert before.keys() == after.keys()
    assert all(
        not torch.equal(before[name], after[name])
        for name in ("backbone.body.conv1.weight", "rpn.head.cls_logits.weight")
    )
    with pytest.raises(
        TrainingError,
        match="training stopped: .*loss_classifier = (nan|inf).* in a batch of images",
    ):
        fit(
            tiny_settings(
                data,
                run_name="wild",
                learning_rate=1e30,
                warmup_steps=0,
                gradient_clip_norm=0.0,
                steps_per_epoch=4,
            )
        )


# Predicting with a finished run


def validation_images(run_dir: Path) -> list[np.ndarray]:
    settings = load_run(run_dir).settings
    dataset = open_dataset(settings["data"])
    return [
        dataset[dataset.image_ids.index(image["file_name"])].image
        for image in load_run(run_dir).truth["images"]
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16-mixed"},
        {"weights": "partial", "tile_size_px": 48, "tile_overlap_px": 16, "mask_threshold": 0.4},
    ],
    ids=["no_weights", "partial_weights"],
)
def test_a_finished_run_predicts_what_its_validation_found(data, tmp_path, monkeypatch, changes):
    """Partial weights leave a network of frozen and trained norms."""
    monkeypatch.setattr(engine, "build_model", build_model)
    if "weights" in changes:
        body = build_model(RunConfig()).backbone.body.state_dict()
        save_file(
            {name: tensor for name, tensor in body.items() if not name.startswith("layer3")},
            tmp_path / "partial.safetensors",
        )
        changes = changes | {"weights": str(tmp_path / "partial.safetensors")}
    run_dir = fit(
        tiny_settings(data, epochs=1, learning_rate=1e-4, box_score_thresh=0.0, **changes)
    )
    (tmp_path / "partial.safetensors").unlink(missing_ok=True)
    (run_dir / "last.pt").unlink()
    images = validation_images(run_dir)
    expected = read_json(run_dir / "detections.json")
    assert len(expected) > 3
    assert predict_run(run_dir, images).to_coco() == expected
    numbered = predict_run(run_dir, images[::-1], [12, 11]).to_coco()
    assert sorted(numbered, key=lambda detection: detection["image_id"]) == [
        detection | {"image_id": detection["image_id"] + 10} for detection in expected
    ]


def test_trainable_parameters_are_counted_without_weights(data, monkeypatch):
    run_dir = fit(tiny_settings(data, epochs=1, steps_per_epoch=1))
    (run_dir / "best.safetensors").unlink()
    settings = read_json(run_dir / "settings.json")
    assert count_run_parameters(run_dir) == count_parameters(build_model(RunConfig()))
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("downloaded")
    )
    write_json(
        run_dir / "settings.json",
        settings | {"weights": "imagenet", "trainable_backbone_layers": 2},
    )
    body = RunConfig(weights="none", trainable_backbone_layers=2)
    frozen = [
        parameter.numel()
        for name, parameter in build_model(body).backbone.body.named_parameters()
        if name.startswith(("conv1", "layer1", "layer2")) or "bn" in name or "downsample.1" in name
    ]
    assert count_run_parameters(run_dir) == count_parameters(build_model(body)) - sum(frozen)


def test_a_run_that_cannot_predict_says_why(data):
    run_dir = fit(tiny_settings(data, epochs=1, steps_per_epoch=1))
    with pytest.raises(
        RunError, match="cannot predict: the weights do not fit a model of these settings"
    ):
        predict_run(run_dir, [])
    (run_dir / "best.safetensors").write_bytes(b"half a file")
    with pytest.raises(
        RunError, match="cannot predict: weights file .*best.safetensors cannot be read"
    ):
        predict_run(run_dir, [])
    (run_dir / "best.safetensors").unlink()
    with pytest.raises(
        RunError,
        match="run_dir .* has no weights \\(best.safetensors\\); give a run folder that has them",
    ):
        predict_run(run_dir, [])
    write_json(
        run_dir / "settings.json", read_json(run_dir / "settings.json") | {"backbone": "resnet19"}
    )
    with pytest.raises(
        RunError, match="has settings that cannot be used \\(unknown backbone 'resnet19'"
    ):
        count_run_parameters(run_dir)
    (run_dir / "settings.json").unlink()
    with pytest.raises(RunError, match="has no settings.json; give the folder of a run"):
        count_run_parameters(run_dir)


# Resume


class Interrupt(Exception):
    pass


def interrupt_after(epoch: int):
    def on_epoch(history: pd.DataFrame) -> None:
        if len(history) == epoch:
            raise Interrupt

    return on_epoch


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "scheduler": "cosine"},
        {
            "optimizer": "sgd",
            "scheduler": "plateau",
            "plateau_patience": 1,
            "monitor": "validation_loss",
            "num_workers": 1,
        },
        {"optimizer": "adam", "scheduler": "none", "warmup_steps": 0, "precision": "bf16-mixed"},
    ],
    ids=lambda changes: changes["optimizer"],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(data, changes):
    whole = fit(tiny_settings(data, run_name="whole", **changes))
    config = tiny_settings(data, run_name="parts", **changes)
    for epoch in (1, 2):
        with pytest.raises(Interrupt):
            fit(config, on_epoch=interrupt_after(epoch))
    assert_same_run(fit(config), whole)


def test_a_finished_run_is_not_trained_again(data):
    run_dir = fit(tiny_settings(data))
    before = {file.name: file.read_bytes() for file in run_dir.iterdir()}
    fit(tiny_settings(data), on_epoch=lambda history: pytest.fail("trained again"))
    assert {file.name: file.read_bytes() for file in run_dir.iterdir()} == before


def test_another_configuration_is_refused_before_any_work(data, monkeypatch):
    fit(tiny_settings(data, epochs=1))
    monkeypatch.setattr(engine, "build_model", lambda config: pytest.fail("built a model"))
    with pytest.raises(RunError, match="epochs was 1, is 2; learning_rate was 0.001, is 0.01"):
        fit(tiny_settings(data, epochs=2, learning_rate=1e-2))


def test_a_checkpoint_of_another_run_is_refused(data):
    mine, other = (
        fit(tiny_settings(data, epochs=1)),
        fit(tiny_settings(data, epochs=1, run_name="other", seed=5)),
    )
    (mine / "last.pt").write_bytes((other / "last.pt").read_bytes())
    with pytest.raises(
        RunError,
        match="checkpoint .*last.pt is of a run with other settings \\(seed was 5, is 0\\); delete it",
    ):
        fit(tiny_settings(data, epochs=1))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"].popitem(),
        lambda c: c.pop("optimizer"),
        lambda c: c["optimizer"].clear(),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(data, change):
    run_dir = fit(tiny_settings(data, epochs=1))
    checkpoint = load_checkpoint(run_dir / "last.pt")
    change(checkpoint)
    torch.save(checkpoint, run_dir / "last.pt")
    with pytest.raises(
        RunError, match="checkpoint .*last.pt does not fit this run .*; delete it to train anew"
    ):
        fit(tiny_settings(data, epochs=1))


@pytest.mark.parametrize("name", ["metrics.json", "provenance.json"])
def test_a_run_that_lost_a_file_says_so(data, name):
    run_dir = fit(tiny_settings(data, epochs=1))
    (run_dir / name).unlink()
    with pytest.raises(RunError, match=f"has lost .*{name}.*; delete that folder to train anew"):
        fit(tiny_settings(data, epochs=1))


def test_going_on_leaves_the_provenance_of_the_start(data):
    run_dir = fit(tiny_settings(data, epochs=1))
    before = json.loads((run_dir / "provenance.json").read_text()) | {"code_version": "older"}
    (run_dir / "provenance.json").write_text(json.dumps(before))
    fit(tiny_settings(data, epochs=1))
    assert json.loads((run_dir / "provenance.json").read_text()) == before


def test_a_damaged_checkpoint_is_named(data):
    run_dir = fit(tiny_settings(data, epochs=1))
    (run_dir / "last.pt").write_bytes((run_dir / "last.pt").read_bytes()[:1000])
    with pytest.raises(
        RunError, match="checkpoint .*last.pt cannot be read .*; delete it to train anew"
    ):
        fit(tiny_settings(data, epochs=1))


# Killed


def start(folder: Path, config: RunConfig, *arguments, **more):
    process = ALONE.Process(
        target=tiny_training.train_in_process,
        args=(folder, config.to_dict(), *arguments),
        kwargs=more,
    )
    process.start()
    return process


def finish(folder: Path, config: RunConfig, *arguments) -> Path:
    process = start(folder, config, *arguments)
    process.join(600)
    assert process.exitcode == 0
    return folder / "runs" / config.run_name


def cpu_seconds(pid: int) -> float:
    """Processor time of a process, which other programs on the machine do not stretch as they do
    the clock's.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kill_at(process, seconds: float) -> bool:
    """SIGKILL a process once it has used this much processor time; False where it ended before."""
    with suppress(FileNotFoundError, ProcessLookupError):  # it ended just now
        while cpu_seconds(process.pid) < seconds:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> tuple[Path, float]:
    """The run folder of a whole run, and its processor seconds."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_dir = finish(folder, tiny_settings(data))
    return run_dir, read_json(folder / "finished.json")["cpu_seconds"]


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs Linux: reads processor time from /proc"
)
@pytest.mark.parametrize("point", range(KILL_POINTS))
def test_killed_at_random_moments_a_run_ends_as_an_uninterrupted_one(
    data, tmp_path, uninterrupted, point
):
    expected, seconds = uninterrupted
    moment = seconds * random.uniform(0.05, 0.9)
    killed = kill_at(start(tmp_path, tiny_settings(data)), moment)
    history = tmp_path / "runs" / "tiny" / "history.csv"
    epochs = len(pd.read_csv(history)) if history.exists() else 0
    print(
        f"killed after {moment:.2f} of {seconds:.2f} s, in epoch {epochs + 1}"
        if killed
        else f"ended before {moment:.2f} s"
    )
    assert_same_run(finish(tmp_path, tiny_settings(data)), expected)


@pytest.mark.parametrize(
    ("file", "nth", "epochs"), [("last.pt", 2, 1), ("last.pt", 1, 0), ("best.safetensors", 1, 0)]
)
def test_killed_in_the_middle_of_a_save_a_run_ends_as_an_uninterrupted_one(
    data, tmp_path, uninterrupted, file, nth, epochs
):
    process = start(tmp_path, tiny_settings(data), "tiny", file, nth)
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    run_dir = tmp_path / "runs" / "tiny"
    (half,) = run_dir.glob(f".{file}.*/{file}")
    assert half.stat().st_size > 1000
    if epochs:
        assert len(load_checkpoint(run_dir / "last.pt")["history"]) == epochs
    else:
        assert not (run_dir / file).exists()
    assert_same_run(finish(tmp_path, tiny_settings(data)), uninterrupted[0])


# What goes wrong


def poison_after(steps: int, monkeypatch) -> None:
    """Images turn into NaN after this many batches, those of validation included."""
    batches, to_device = [], engine.to_device

    def poisoned(images, targets, device):
        images, targets = to_device(images, targets, device)
        batches.append(len(images))
        return [image * math.nan for image in images] if len(batches) > steps else images, targets

    monkeypatch.setattr(engine, "to_device", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(data, monkeypatch):
    expected = fit(tiny_settings(data, run_name="expected"))
    config = tiny_settings(data)
    with monkeypatch.context() as patch:
        poison_after(
            4, patch
        )  # two training steps and one validation batch make an epoch: the second of epoch 2
        with pytest.raises(TrainingError) as caught:
            fit(config)
    message = str(caught.value)
    assert "training stopped: loss_objectness = nan, " in message and "loss_mask" in message
    assert "the last epoch's checkpoint is kept" in message and "learning_rate" in message
    run_dir = expected.parent / "tiny"
    named = message.split("in a batch of images ")[1].split(";")[0].split(", ")
    assert len(named) == 2 and set(named) <= set(read_json(run_dir / "split.json")["train"])
    assert len(load_checkpoint(run_dir / "last.pt")["history"]) == 1
    assert_same_run(fit(config), expected)


def test_weights_that_the_last_step_spoilt_reach_no_checkpoint(data, monkeypatch):
    """A gradient that overflows in the second epoch's last step: its loss is finite, the weights
    after it are not.
    """

    def build(config: RunConfig) -> nn.Module:
        model, steps = build_tiny(config), []

        def overflow(gradient: torch.Tensor) -> torch.Tensor:
            steps.append(1)
            return gradient * math.inf if len(steps) == 4 else gradient

        model.roi_heads.box_predictor.cls_score.bias.register_hook(overflow)
        return model

    expected = fit(tiny_settings(data, run_name="expected"))
    config = tiny_settings(data)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "build_model", build)
        with pytest.raises(TrainingError, match="training stopped: loss_.* = nan"):
            fit(config)
    run_dir = expected.parent / "tiny"
    assert len(load_checkpoint(run_dir / "last.pt")["history"]) == 1
    assert len(load_run(run_dir).history) == 1
    assert_same_run(fit(config), expected)


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    MemoryError(),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    RuntimeError(
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 20.0 GiB for an array with shape (9,)"
    ),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    ),
]


def raising(error: Exception):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["training", "prediction"])
def test_out_of_memory_ends_in_a_sentence(data, monkeypatch, where, error):
    if where == "training":
        monkeypatch.setattr(tiny_training.LabelMapMaskRCNN, "forward", raising(error))
    else:
        monkeypatch.setattr(engine, "predict", raising(error))
    with pytest.raises(TrainingError) as caught:
        fit(tiny_settings(data))
    message = str(caught.value)
    assert message.startswith("out of memory") and "\n" not in message
    assert all(
        name in message
        for name in (
            "batch_size",
            "crop_size_px",
            "tile_size_px",
            "bf16-mixed",
            "rpn_post_nms_top_n_train",
        )
    )
    names = RunConfig().to_dict().keys()
    assert {word.strip("(),;") for word in message.split() if "_" in word} <= names


def test_a_batch_too_small_for_its_norms_is_explained(data, monkeypatch):
    monkeypatch.setattr(engine, "build_model", build_model)
    changes = {"crop_size_px": 32, "batch_size": 1, "steps_per_epoch": 1}
    with pytest.raises(
        TrainingError, match="too small for the batch norms .*; raise batch_size or crop_size_px$"
    ):
        fit(tiny_settings(data, epochs=1, **changes))


def test_precision_is_saved_as_it_was(data):
    run_dir = fit(tiny_settings(data, epochs=1, precision="auto"))
    assert load_run(run_dir).settings["precision"] in ("32", "bf16-mixed")


def test_another_error_is_not_taken_for_a_lack_of_memory(data, monkeypatch):
    monkeypatch.setattr(
        tiny_training.LabelMapMaskRCNN, "forward", raising(RuntimeError("shapes do not match"))
    )
    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        fit(tiny_settings(data))
    assert not isinstance(caught.value, TrainingError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_devices_that_this_machine_lacks_are_named():
    with pytest.raises(
        ValueError,
        match="devices is 1, but this machine has 0 GPUs that torch can use; .*accelerator 'cpu'",
    ):
        make_fabric(RunConfig(accelerator="cuda"))
    with pytest.raises(ValueError, match="'16-mixed' needs a GPU"):
        make_fabric(RunConfig(precision="16-mixed"))


# Mixed precision


def test_mixed_precision_leaves_images_and_boxes_whole(data, monkeypatch):
    """bfloat16 has 8 bits: 257 would be read as 256."""
    given, computed = set(), set()

    def remember(module: nn.Module, inputs: tuple) -> None:
        images, targets = (*inputs, [])[:2]
        given.update(tensor.dtype for tensor in [*images, *(target["boxes"] for target in targets)])

    def build(config: RunConfig) -> nn.Module:
        model = build_tiny(config)
        model.register_forward_pre_hook(remember)
        model.roi_heads.box_head.fc6.register_forward_hook(
            lambda module, inputs, output: computed.add(output.dtype)
        )
        return model

    monkeypatch.setattr(engine, "build_model", build)
    fit(tiny_settings(data, epochs=1, precision="bf16-mixed"))
    assert given == {torch.float32} and computed == {torch.bfloat16}


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_half_precision_with_loss_scaling_clips_and_resumes(data, monkeypatch, optimizer):
    """As on a GPU, where 16-mixed belongs, but on the CPU."""

    def half_precision(config: RunConfig) -> Fabric:
        return Fabric(accelerator="cpu", plugins=AutocastPrecision("16-mixed", "cpu"))

    monkeypatch.setattr(engine, "make_fabric", half_precision)
    changes = {
        "accelerator": "cuda",
        "precision": "16-mixed",
        "optimizer": optimizer,
        "gradient_clip_norm": 0.5,
    }
    whole = fit(tiny_settings(data, run_name="whole", **changes))
    config = tiny_settings(data, **changes)
    with pytest.raises(Interrupt):
        fit(config, on_epoch=interrupt_after(1))
    assert load_checkpoint(whole.parent / "tiny" / "last.pt")["precision"]["scale"] > 1
    assert_same_run(fit(config), whole)


# Schedules, best epoch, early stopping


def rates(steps_per_epoch: int, **changes) -> list[float]:
    """The learning rate of each training step."""
    config = RunConfig(learning_rate=0.1, **changes)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    per_step, _ = make_schedulers(optimizer, config, steps_per_epoch)
    used = []
    for _ in range(config.epochs * steps_per_epoch):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        per_step.step()
    return [*used, optimizer.param_groups[0]["lr"]]


def test_warm_up_rises_to_the_learning_rate_and_stays():
    found = rates(5, epochs=2, scheduler="none", warmup_steps=4)
    assert found == pytest.approx([0.025, 0.04375, 0.0625, 0.08125, *[0.1] * 7])
    assert rates(5, epochs=2, scheduler="none", warmup_steps=0) == pytest.approx([0.1] * 11)
    assert rates(3, epochs=1, scheduler="none", warmup_steps=30)[-1] < 0.02


def test_cosine_falls_from_the_learning_rate_to_the_least():
    found = rates(5, epochs=4, scheduler="cosine", warmup_steps=4, min_learning_rate=0.01)
    assert found[:5] == pytest.approx([0.025, 0.04375, 0.0625, 0.08125, 0.1])
    assert found[4:] == pytest.approx(
        [0.01 + 0.09 * (1 + math.cos(math.pi * step / 16)) / 2 for step in range(17)]
    )
    without = rates(5, epochs=4, scheduler="cosine", warmup_steps=0)
    assert without == pytest.approx(
        [0.1 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(21)]
    )


def test_the_plateau_lowers_the_rate_after_patience(data, monkeypatch):
    """No epoch after the first is better: patience 1 forgives the second, so the third's end lowers
    the rate.
    """
    monkeypatch.setattr(engine, "validation_loss", lambda *args: 1.0)
    changes = {
        "scheduler": "plateau",
        "monitor": "validation_loss",
        "plateau_patience": 1,
        "plateau_factor": 0.5,
    }
    history = load_run(
        fit(tiny_settings(data, epochs=6, min_learning_rate=3e-4, **changes))
    ).history
    assert history["learning_rate"].tolist() == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 3e-4])


def test_the_plateau_waits_while_the_monitored_value_improves(data, monkeypatch):
    values = iter([3.0, 2.0, 1.0, 0.5])
    monkeypatch.setattr(engine, "validation_loss", lambda *args: next(values))
    changes = {"scheduler": "plateau", "monitor": "validation_loss", "plateau_patience": 1}
    history = load_run(fit(tiny_settings(data, epochs=4, **changes))).history
    assert history["learning_rate"].tolist() == pytest.approx([1e-3] * 4)


def rows(monitor: str, values: list) -> list[dict]:
    return [{"validation_loss": 1.0, monitor: value} for value in values]


@pytest.mark.parametrize(
    ("monitor", "values", "best"),
    [
        ("validation_ap50", [0.1, 0.3, 0.2], 1),
        ("validation_loss", [0.1, 0.3, 0.2], 0),
        ("loss", [3.0, 2.0, 1.0], 2),
        ("validation_ap50", [0.3, 0.3], 0),
        ("validation_loss", [math.nan, 5.0, None], 1),
        ("validation_ap50", [math.nan, 0.0], 1),
        ("validation_ap50", [math.nan, math.nan], 0),
    ],
)
def test_the_best_epoch_is_the_first_with_the_best_value(monitor, values, best):
    assert best_epoch(rows(monitor, values), RunConfig(monitor=monitor)) == best


def test_early_stopping_counts_epochs_since_the_best():
    config = RunConfig(monitor="loss", early_stopping_patience=2)
    assert not stopped_early([], config)
    assert not stopped_early(rows("loss", [3.0, 1.0, 2.0]), config)
    assert stopped_early(rows("loss", [3.0, 1.0, 2.0, 1.0]), config)
    assert not stopped_early(rows("loss", [1.0] * 50), RunConfig(monitor="loss"))


def test_early_stopping_ends_the_run_and_keeps_it_ended(data, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 1.5, 0.5])
    monkeypatch.setattr(engine, "validation_loss", lambda *args: next(values))
    config = tiny_settings(data, epochs=8, monitor="validation_loss", early_stopping_patience=2)
    run_dir = fit(config)
    assert load_run(run_dir).history["validation_loss"].tolist() == [3.0, 1.0, 2.0, 1.5]
    fit(config, on_epoch=lambda history: pytest.fail("trained on"))


def test_validation_every_second_epoch_and_after_the_last(data):
    run_dir = fit(tiny_settings(data, epochs=5, validation_every_epochs=2))
    history = load_run(run_dir).history
    assert history["validation_loss"].notna().tolist() == [False, True, False, True, True]
    assert history["validation_ap50"].notna().tolist() == [False, True, False, True, True]


@pytest.mark.parametrize("seconds", [0, devices.CHECKPOINT_EVERY_S])
def test_a_run_killed_before_its_first_validation_goes_on(data, monkeypatch, seconds):
    """A short epoch that was not validated leaves a checkpoint only where some time has passed
    since the last.
    """
    monkeypatch.setattr(devices, "CHECKPOINT_EVERY_S", seconds)
    changes = {"validation_every_epochs": 3, "keep_every_epoch": True}
    whole = fit(tiny_settings(data, run_name="whole", **changes))
    with pytest.raises(Interrupt):
        fit(tiny_settings(data, **changes), on_epoch=interrupt_after(1))
    assert (whole.parent / "tiny" / "last.pt").exists() == (not seconds)
    run_dir = fit(tiny_settings(data, **changes))
    assert_same_run(run_dir, whole)
    kept = [load_file(run_dir / f"epoch_{epoch}.safetensors") for epoch in (1, 2, 3)]
    torch.testing.assert_close(
        kept[-1], dict(load_checkpoint(run_dir / "last.pt")["model"]), rtol=0, atol=0
    )
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


@pytest.mark.parametrize("updates", [False, True])
def test_norms_learn_from_validation_images_only_where_told(data, monkeypatch, updates):
    monkeypatch.setattr(engine, "build_model", tiny_training.build_tiny_with_norm)
    seen = []
    validation_loss = engine.validation_loss

    def watched(fabric, model, *rest):
        before = {
            name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name
        }
        loss = validation_loss(fabric, model, *rest)
        seen.append(
            any(
                not torch.equal(before[name], buffer)
                for name, buffer in model.named_buffers()
                if name in before
            )
        )
        return loss

    monkeypatch.setattr(engine, "validation_loss", watched)
    fit(tiny_settings(data, epochs=2, validation_updates_norms=updates))
    assert seen == [updates, updates]


def test_truth_is_read_as_told_whatever_the_training_reads(data):
    pieces = fit(
        tiny_settings(
            data, epochs=1, instance_reading="connected_components", min_instance_area_px=150
        )
    )
    cells = fit(tiny_settings(data, epochs=1, run_name="cells"))
    for name in ("truth.json", "split.json"):
        assert (pieces / name).read_bytes() == (cells / name).read_bytes()
    assert (
        history_without_clock(pieces)["loss"].tolist()
        != history_without_clock(cells)["loss"].tolist()
    )


def test_training_with_boxes_that_miss_the_last_pixel(data):
    label_maps = torch.zeros(4, 8, 8, dtype=torch.int32)
    label_maps[0, 1:4, 2:7], label_maps[1, 5, :3] = 1, 2
    target = make_target(label_maps, boxes_miss_last_pixel=True)
    assert target["boxes"].tolist() == [[2, 1, 6, 3]] and target["labels"].tolist() == [1]
    assert make_target(label_maps)["boxes"].tolist() == [[2, 1, 7, 4], [0, 5, 3, 6]]
    short = fit(tiny_settings(data, epochs=1, boxes_miss_last_pixel=True))
    assert (
        history_without_clock(short)["loss"].tolist()
        != history_without_clock(fit(tiny_settings(data, epochs=1, run_name="whole")))[
            "loss"
        ].tolist()
    )


def test_statistics_of_the_training_images_normalise(data):
    config = tiny_settings(data, epochs=1, normalization="data")
    run_dir = fit(config)
    dataset, scored = engine.open_data(config)
    mean, std = engine.image_statistics(dataset, engine.split_dataset(scored, config)[0])
    weights = load_file(run_dir / "best.safetensors")
    torch.testing.assert_close(weights["transform.image_mean"], torch.tensor(mean))
    torch.testing.assert_close(weights["transform.image_std"], torch.tensor(std))


def test_a_finished_run_without_its_checkpoint_stays_as_it_is(data):
    run_dir = fit(tiny_settings(data))
    (run_dir / "last.pt").unlink()
    before = {file.name: file.read_bytes() for file in run_dir.iterdir()}
    fit(tiny_settings(data), on_epoch=lambda history: pytest.fail("trained again"))
    assert {file.name: file.read_bytes() for file in run_dir.iterdir()} == before
    finished = read_json(run_dir / "finished.json")
    assert finished["epochs"] == 3 and not finished["stopped_early"] and finished["parameters"] > 0


@pytest.mark.parametrize(
    "changes", [{}, {"epochs": 9, "early_stopping_patience": 1, "monitor": "validation_loss"}]
)
def test_a_checkpoint_that_is_not_kept_is_there_until_the_run_has_ended(data, monkeypatch, changes):
    """Killed in between, the run goes on from it and ends the same; a finished one stays as it is."""
    losses = iter([2.0, 1.0, 3.0] * 3)
    if changes:
        monkeypatch.setattr(engine, "validation_loss", lambda *args: next(losses))
    kept = fit(tiny_settings(data, run_name="kept", **changes))
    unkept = tiny_settings(data, keep_checkpoint=False, **changes)
    run_dir = kept.parent / "tiny"
    for epoch in (1, 2):
        with pytest.raises(Interrupt):
            fit(unkept, on_epoch=interrupt_after(epoch))
        assert len(load_checkpoint(run_dir / "last.pt")["history"]) == epoch
    assert (
        fit(unkept) == run_dir
        and not (run_dir / "last.pt").exists()
        and not list(run_dir.glob(".*"))
    )
    for name in ("best.safetensors", "detections.json", "metrics.json"):
        assert (run_dir / name).read_bytes() == (kept / name).read_bytes(), name
    pd.testing.assert_frame_equal(
        history_without_clock(run_dir), history_without_clock(kept), check_exact=True
    )
    fit(unkept, on_epoch=lambda history: pytest.fail("trained again"))
    assert (
        len(history_without_clock(run_dir)) == 3
        and read_json(run_dir / "finished.json")["epochs"] == 3
    )


def test_the_last_checkpoint_is_not_written_where_it_would_not_be_kept(data, monkeypatch):
    saved = []
    monkeypatch.setattr(
        engine, "save_checkpoint", lambda path, checkpoint: saved.append(len(checkpoint["history"]))
    )
    fit(tiny_settings(data, keep_checkpoint=False))
    assert saved == [1, 2]


# Two processes


# every positive box takes part in the mask loss, so that the processes' counts differ
TOGETHER = {
    "optimizer": "sgd",
    "learning_rate": 1e-2,
    "scheduler": "none",
    "mask_batch_size_per_image": 0,
}


def test_two_processes_give_the_losses_of_one_with_the_same_global_batch(data, tmp_path):
    alone = fit(tiny_settings(data, run_name="alone", batch_size=4, **TOGETHER))
    write_json(
        tmp_path / "settings.json",
        tiny_settings(data, batch_size=2, devices=2, **TOGETHER).to_dict(),
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, tiny_training.__file__, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = tmp_path / "runs" / "tiny"
    expected, found = history_without_clock(alone), history_without_clock(together)
    pd.testing.assert_frame_equal(
        found.drop(columns="validation_ap50"), expected.drop(columns="validation_ap50"), rtol=1e-5
    )
    assert (
        read_json(together / "metrics.json")["detections"]
        == read_json(alone / "metrics.json")["detections"]
        > 0
    )
    mine, theirs = load_file(together / "best.safetensors"), load_file(alone / "best.safetensors")
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        torch.load(tmp_path / "rank0.pt"), torch.load(tmp_path / "rank1.pt"), rtol=0, atol=0
    )


def test_two_processes_keep_one_model_where_norms_see_other_images(data, tmp_path):
    """Norm statistics differ between processes; the validation loss, and the rate that follows it,
    may not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    changes = {
        "scheduler": "plateau",
        "monitor": "validation_loss",
        "plateau_patience": 1,
        "learning_rate": 0.1,
    }
    config = tiny_settings(data, batch_size=2, devices=2, **(TOGETHER | changes))
    shared = {
        "TORCHELASTIC_RUN_ID": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    environments = [shared | {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0"} for rank in "01"]
    processes = [
        start(tmp_path, config, "tiny_with_norm", environment=environment)
        for environment in environments
    ]
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0]
    torch.testing.assert_close(
        torch.load(tmp_path / "rank0.pt"), torch.load(tmp_path / "rank1.pt"), rtol=0, atol=0
    )


# On a GPU


@pytest.mark.parametrize(
    "precision", ["32", "16-mixed", "bf16-mixed"], ids=["fp32", "fp16", "bf16"]
)
class TestOnAGpu:
    pytestmark = gpu

    def settings(self, data: Path, precision: str, **changes) -> RunConfig:
        return tiny_settings(data, accelerator="cuda", precision=precision, **changes)

    def test_the_real_model_trains(self, data, precision, monkeypatch):
        monkeypatch.setattr(engine, "build_model", build_model)
        changes = {"epochs": 1, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 1e-4}
        history = load_run(fit(self.settings(data, precision, **changes))).history
        assert 0 < history["loss"][0] < 10 and history["peak_memory_bytes"][0] > 2**20

    def test_an_interrupted_run_goes_on(self, data, precision):
        """Kernels that add in no fixed order keep a GPU from giving the same bits twice."""
        whole = history_without_clock(fit(self.settings(data, precision, run_name="whole")))
        config = self.settings(data, precision)
        with pytest.raises(Interrupt):
            fit(config, on_epoch=interrupt_after(1))
        parts = history_without_clock(fit(config))
        assert parts["epoch"].tolist() == [1, 2, 3]
        assert parts["learning_rate"].tolist() == whole["learning_rate"].tolist()
        assert parts["loss"].tolist() == pytest.approx(whole["loss"].tolist(), rel=0.05)

    def test_losses_are_those_of_the_cpu(self, precision, monkeypatch):
        """The same weights and samples; boxes at the edge of a threshold may fall on the other
        side.
        """
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        torch.manual_seed(0)
        model = build_model(RunConfig(mask_batch_size_per_image=0)).train()
        image, label_maps = draw_tissue(np.random.default_rng(3), 128, 128)
        target = make_target(torch.from_numpy(label_maps)) | {"seed": 1}
        image = torch.from_numpy(image).float() / 255
        expected = model([image], [target])
        model.cuda()
        moved = {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in target.items()
        }
        types = {"32": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
        with torch.autocast(
            "cuda", dtype=types[precision] or torch.float16, enabled=precision != "32"
        ):
            found = model([image.cuda()], [moved])
        for name in LOSSES:
            tolerance = 0.01 if precision == "32" else 0.1
            assert found[name].item() == pytest.approx(
                expected[name].item(), rel=tolerance, abs=tolerance / 10
            ), name
