"""The comparison of systems over folds, with trainings of a few steps on drawn tissue."""

import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import save_file
from torchvision.models import resnet18

from cellseg_helpers.data.hw3 import locate_data, open_dataset
from tools import compare_folds


def test_systems_are_trained_on_the_same_folds_and_once(tmp_path, monkeypatch, capsys):
    drawn, data = locate_data("drawn")[0], tmp_path / "data"
    dataset = open_dataset("drawn")
    chosen = np.argsort(-(dataset.counts > 0).sum(1), kind="stable")[:4]
    for row in chosen:
        image_id = dataset.image_ids[row]
        shutil.copytree(drawn / "train" / image_id, data / "train" / image_id)
    patients = [f"{dataset.image_ids[row]},p{number}" for number, row in enumerate(chosen)]
    (data / "patients.csv").write_text("\n".join(["image_id,patient", *patients]))
    weights, out = tmp_path / "resnet18.safetensors", tmp_path / "out"
    save_file(resnet18(weights=None).state_dict(), weights)
    (tmp_path / "tiny.yaml").write_text("{crop_size_px: 64, head_width: 16, box_score_thresh: 0.3}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("cellseg_helpers.runs.RUNS", str(tmp_path / "runs"))
    command = ["compare_folds", "plain_torchvision", f"tiny={tmp_path / 'tiny.yaml'}"]
    command += ["--data", str(data), "--weights", str(weights), "--out", str(out), "--folds", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--minutes", "0.02", "--steps-per-minute", "100"])
    compare_folds.main()
    table = pd.read_csv(out)
    assert table[["system", "fold"]].to_numpy().tolist() == [
        ["plain_torchvision", 0], ["tiny", 0], ["plain_torchvision", 1], ["tiny", 1],
    ]  # fmt: skip
    assert (table["steps"] > 0).all() and (table["minutes"] > 0).all()
    assert table.groupby("fold")["maxDets"].nunique().eq(1).all()
    assert table[["AP50", "AP", "AP75", "macrophage_AP50"]].notna().all(axis=None)
    before = out.read_bytes()
    monkeypatch.setattr(compare_folds, "train", lambda *task: pytest.fail("trained again"))
    compare_folds.main()
    assert out.read_bytes() == before
