"""The run folder: whole files or none, runs that are not mixed, and clear words for damaged ones."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cellseg_helpers import runs
from cellseg_helpers.cells import Cells
from cellseg_helpers.config import ROOT, RunConfig
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.metrics import evaluate
from cellseg_helpers.runs import (
    RunError,
    annotations_of_run,
    context_of,
    images_of_run,
    load_checkpoint,
    load_run,
    read_json,
    rename_other_run,
    save_checkpoint,
    save_table,
    save_weights,
    start_run,
    write_json,
    write_text,
)

SPLIT = {"kind": "patient", "train": ["a"], "validation": ["b"], "warning": ""}
FINGERPRINT = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def runs_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def truth() -> dict:
    label_maps = np.zeros((4, 20, 30), np.int32)
    label_maps[1, 3:9, 4:11] = 5
    return to_coco([CellImage("b", "p", np.zeros((3, 20, 30), np.uint8), label_maps)])


DONE = RunConfig(run_name="done")


def finished_run(config=DONE):
    run_dir = start_run(config, FINGERPRINT, SPLIT, truth())
    cell = truth()["annotations"][0]
    detections = [
        {key: cell[key] for key in ("image_id", "category_id", "bbox", "segmentation")}
        | {"score": 0.9}
    ]
    write_json(run_dir / "detections.json", detections)
    metrics = evaluate(truth(), Cells.from_coco(detections))
    write_json(run_dir / "metrics.json", metrics)
    write_text(
        run_dir / "history.csv",
        pd.DataFrame({"epoch": [1, 2], "loss": [2.0, 1.5]}).to_csv(index=False),
    )
    return run_dir


WRITERS = {
    "text": lambda path, fail: write_text(path, Fails() if fail else "new"),
    "json": lambda path, fail: write_json(path, {"a": float("inf") if fail else 1}),
    "checkpoint": lambda path, fail: save_checkpoint(
        path, {"a": Fails() if fail else torch.ones(100_000)}
    ),
    "weights": lambda path, fail: save_weights(
        path, {"a": torch.ones(100_000), "b": Fails() if fail else torch.ones(1)}
    ),
}


class Fails:
    """Cannot be written: neither text, nor pickled, nor a tensor."""

    def __reduce__(self):
        raise OSError("no space left on device")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, kind):
    path = tmp_path / "folder" / "file"
    WRITERS[kind](path, False)
    before = path.read_bytes()
    with pytest.raises(Exception):  # noqa: B017 the writers fail each in its own way
        WRITERS[kind](path, True)
    assert path.read_bytes() == before and len(before) > 2
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    WRITERS[kind](path, False)
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_interrupt_in_the_middle_of_a_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"a": torch.ones(3)})

    def interrupted(checkpoint, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"a": torch.zeros(3)})
    assert torch.equal(load_checkpoint(path)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_survives_bit_for_bit(tmp_path):
    checkpoint = {
        "model": {"a": torch.randn(5)},
        "history": [{"epoch": 1, "loss": 0.1}],
        "plateau": {"best": float("inf")},
    }
    save_checkpoint(tmp_path / "last.pt", checkpoint)
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(loaded["model"]["a"], checkpoint["model"]["a"])
    assert (loaded["history"], loaded["plateau"]) == (checkpoint["history"], checkpoint["plateau"])


class Runs:
    """A checkpoint that would run code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("content", ["nothing", "text", "half", "code"])
def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"a": torch.ones(1000)})
    whole = path.read_bytes()
    path.write_bytes(
        {"nothing": b"", "text": b"hello\nworld", "half": whole[: len(whole) // 2], "code": b""}[
            content
        ]
    )
    if content == "code":
        torch.save({"a": Runs(str(tmp_path / "ran"))}, path)
    with pytest.raises(
        RunError,
        match=f"^checkpoint {re.escape(str(path))} cannot be read \\([^\n]+\\); delete it to train anew$",
    ):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_run_folder_holds_settings_split_truth_and_provenance(runs_folder):
    config = RunConfig(epochs=3)
    run_dir = start_run(config, FINGERPRINT, SPLIT, truth())
    assert run_dir == runs_folder / config.named().run_name
    assert RunConfig.from_dict(read_json(run_dir / "settings.json")) == config.named()
    assert read_json(run_dir / "split.json") == SPLIT
    assert read_json(run_dir / "truth.json") == truth()
    provenance = read_json(run_dir / "provenance.json")
    assert provenance["data_fingerprint"] == FINGERPRINT
    assert provenance["packages"]["torch"] == torch.__version__.split("+")[0]
    assert set(provenance["packages"]) == set(runs.PACKAGES)
    assert {"code_version", "python", "machine"} <= provenance.keys() and provenance["machine"][
        "cpu_count"
    ] > 0


def test_a_run_goes_on_in_its_folder(runs_folder):
    first = start_run(RunConfig(run_name="a"), FINGERPRINT, SPLIT, truth())
    assert start_run(RunConfig(run_name="a", num_workers=4), FINGERPRINT, SPLIT, truth()) == first


def test_what_a_killed_run_left_half_written_is_removed():
    run_dir = start_run(RunConfig(run_name="a"), FINGERPRINT, SPLIT, truth())
    for name in (".last.pt.abc/last.pt", ".best.safetensors.xyz/best.safetensors"):
        (run_dir / name).parent.mkdir()
        (run_dir / name).write_text("half")
        (run_dir / Path(name).name).write_text("whole")
    start_run(RunConfig(run_name="a"), FINGERPRINT, SPLIT, truth())
    assert (run_dir / "last.pt").exists() and (run_dir / "best.safetensors").exists()
    assert not list(run_dir.glob(".*"))


def test_another_run_in_the_folder_is_refused_with_the_differing_fields():
    run_dir = start_run(RunConfig(run_name="a", epochs=8), FINGERPRINT, SPLIT, truth())
    before = {file.name: file.read_bytes() for file in run_dir.iterdir()}
    with pytest.raises(RunError) as caught:
        start_run(
            RunConfig(run_name="a", epochs=9, anchor_ratios=[1.0]), FINGERPRINT, SPLIT, truth()
        )
    message = str(caught.value)
    assert (
        "epochs was 8, is 9" in message and "anchor_ratios was [0.5, 1.0, 2.0], is [1.0]" in message
    )
    assert (
        str(run_dir) in message
        and "run_name" in message
        and "batch_size" not in message
        and "fingerprint" not in message
    )
    with pytest.raises(RunError, match="data_fingerprint was '0123456789ab', is 'ffffffffffff'"):
        start_run(RunConfig(run_name="a", epochs=8), "f" * 64, SPLIT, truth())
    assert {file.name: file.read_bytes() for file in run_dir.iterdir()} == before


def test_a_finished_run_is_read_back():
    run = load_run(finished_run())
    assert run.settings["run_name"] == "done" and run.split == SPLIT and run.truth == truth()
    assert run.metrics["coco"]["summary"]["AP50"] == pytest.approx(1.0)
    assert np.isnan(run.metrics["coco"]["summary"]["APl"])
    assert run.history["loss"].tolist() == [2.0, 1.5] and run.detections.scores.tolist() == [0.9]
    assert run.provenance["data_fingerprint"] == FINGERPRINT


def test_a_run_is_read_without_torch():
    code = "import sys; from cellseg_helpers.runs import load_run; load_run(sys.argv[1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, finished_run()], cwd=ROOT).returncode == 0


def test_a_run_folder_that_does_not_exist_is_named():
    with pytest.raises(
        RunError,
        match="run_dir outputs/runs/none-such does not exist; train one with notebooks/02_train",
    ):
        load_run("outputs/runs/none-such")


@pytest.mark.parametrize(
    "name",
    ["settings.json", "split.json", "truth.json", "detections.json", "metrics.json", "history.csv"],
)
def test_an_unfinished_run_is_named_with_the_missing_file(name):
    run_dir = finished_run()
    (run_dir / name).unlink()
    with pytest.raises(RunError, match=f"run_dir .*done has no {name}: the run has not finished"):
        load_run(run_dir)


@pytest.mark.parametrize(
    "name", ["settings.json", "detections.json", "metrics.json", "history.csv"]
)
@pytest.mark.parametrize(
    "content", [b"", b'{"a": ', b"\xff\xfe\x00"], ids=["nothing", "half", "binary"]
)
def test_a_damaged_run_is_named_in_one_sentence(name, content):
    run_dir = finished_run()
    (run_dir / name).write_bytes(content)
    if (name, content) == ("history.csv", b'{"a": '):
        content = b'epoch,loss\n1,"2.0\n'
        (run_dir / name).write_bytes(content)
    with pytest.raises(
        RunError,
        match=f"^[^\n]*{re.escape(name)}[^\n]*run again|{re.escape(name)}[^\n]*run 02_train again",
    ):
        len(load_run(run_dir).detections)


def test_json_holds_null_for_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5], "b": (np.float64("nan"), "nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5], "b": [None, "nan"]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("inf")})
    write_json(tmp_path / "a.json", [1, 2])
    assert (tmp_path / "a.json").read_text() == "[1, 2]\n"


def test_a_saved_table_carries_its_context_in_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "TABLES", str(tmp_path))
    table = pd.DataFrame({"AP": [0.5, np.nan]}, index=pd.Index(["a", "b"], name="class"))
    path = save_table(table, "t", scale="quick", data="drawn", split="patient")
    assert path.read_text().splitlines() == [
        "scale,data,split,class,AP",
        "quick,drawn,patient,a,0.5",
        "quick,drawn,patient,b,",
    ]


def test_annotations_are_of_all_images_or_else_of_the_runs_own():
    run = load_run("outputs/reference/quick_run")
    cells, images, sentence = annotations_of_run(run)
    assert sentence == "All 48 annotated images of the data 'drawn'."
    assert [image["id"] for image in images] == np.unique(cells.image_ids).tolist()
    assert len(images) == 48 and len(cells) == open_dataset("drawn").counts.sum()
    gone = replace(run, settings=run.settings | {"data": "outputs/no_such_data"})
    cells, images, sentence = annotations_of_run(gone)
    assert (
        images is run.truth["images"]
        and len(cells) == len(run.truth["annotations"])
        and sentence.startswith("Only the 12 validation images: ")
        and "no_such_data" in sentence
    )


def test_pictures_are_of_the_images_that_the_run_was_scored_on():
    run = load_run("outputs/reference/quick_run")
    images, sentence = images_of_run(run)
    assert [image.image_id for image in images] == run.split["validation"]
    assert sentence.startswith("Pictures are from the data 'drawn'")
    cells = [{**cell, "area": cell["area"] + 1} for cell in run.truth["annotations"]]
    changed = replace(run, truth=run.truth | {"annotations": cells})
    none, sentence = images_of_run(changed)
    assert none == [] and "no longer those that this run was scored on" in sentence


def test_the_context_of_a_run():
    run = load_run("outputs/reference/quick_run")
    assert context_of(run) == {
        "scale": "quick",
        "data": "drawn",
        "split": "patient, validation side",
        "maxDets": run.metrics["coco_dense"]["max_dets"][-1],
    }
    listed = replace(run, settings=run.settings | {"data": "a/b/annotations.json"})
    assert context_of(listed)["data"] == "b/annotations.json"


def test_a_run_of_other_settings_or_images_is_renamed(tmp_path):
    config = RunConfig(run_name="a", anchor_sizes="auto")
    folder = tmp_path / "runs" / config.run_name
    folder.mkdir(parents=True)
    assert rename_other_run(config) is None

    def write(settings: RunConfig, fingerprint: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings.to_dict()))
        (folder / "provenance.json").write_text(json.dumps({"data_fingerprint": fingerprint}))

    fingerprint = open_dataset("drawn").fingerprint
    sizes = RunConfig().anchor_sizes
    write(replace(config, precision="bf16-mixed", anchor_sizes=sizes), fingerprint)  # what auto was
    assert rename_other_run(config) is None
    write(replace(config, epochs=7), fingerprint)
    assert rename_other_run(config).name == f"{config.run_name}.old-1"
    write(config, "other images")
    assert rename_other_run(config).name == f"{config.run_name}.old-2"
    assert not folder.exists()
