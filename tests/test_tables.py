import json

import numpy as np
import pandas as pd
import pytest
from scenes import disc, result, truth_of

from cellseg_helpers.data.labels import CLASS_NAMES
from cellseg_helpers.metrics import match_detections
from cellseg_helpers.runs import load_run
from study import tables


class Dataset:
    """Two images of 10 x 10 px: in the first a lymphocyte of 4 px at the border, in the second two
    cells of 9 px.
    """

    patients = ["p1", "p2"]
    counts = np.array([[0, 1, 0, 0], [1, 0, 0, 1]])

    def __len__(self):
        return 2

    def __iter__(self):
        from cellseg_helpers.data.hw3 import CellImage

        maps = np.zeros((2, 4, 10, 10), np.int32)
        maps[0, 1, 0:2, 3:5] = 5
        maps[1, 0, 2:5, 2:5] = 1
        maps[1, 3, 6:9, 6:9] = 1
        return iter(
            CellImage(f"i{n}", f"p{n + 1}", np.zeros((3, 10, 10), np.uint8), maps[n])
            for n in range(2)
        )


def test_instances_are_listed_with_size_and_border():
    table = tables.instance_table(Dataset())
    assert table["class"].tolist() == ["lymphocyte", "epithelial", "macrophage"]
    assert table["size_px"].tolist() == [2, 3, 3]
    assert table["touches_border"].tolist() == [True, False, False]
    assert table["patient"].tolist() == ["p1", "p2", "p2"]


def test_patients_are_summed():
    table = tables.patient_summary(Dataset())
    assert list(table.columns) == ["images", "cells", *CLASS_NAMES]
    assert table.loc["p2"].tolist() == [1, 2, 1, 0, 0, 1]
    unknown = Dataset()
    unknown.patients = [None, None]
    assert tables.patient_summary(unknown).empty


def test_an_image_is_chosen_by_its_classes_or_its_number():
    assert tables.choose_image(Dataset()) == 1
    assert tables.choose_image(Dataset(), 0) == 0
    with pytest.raises(ValueError, match="image_number is 2, but the data have 2 images"):
        tables.choose_image(Dataset(), 2)


def test_the_split_is_told_in_a_sentence_with_its_warning():
    split = {
        "kind": "random",
        "train": ["a", "b"],
        "validation": ["c"],
        "warning": "patients are unknown",
    }
    text = tables.describe_split(split)
    assert (
        text
        == "random split (by image): 2 training and 1 validation images. Warning: patients are unknown."
    )


def test_a_saved_table_carries_its_context_in_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TABLES", str(tmp_path))
    table = pd.DataFrame({"AP": [0.5, np.nan]}, index=pd.Index(["a", "b"], name="class"))
    path = tables.save_table(table, "t", scale="quick", data="drawn", split="patient")
    assert path.read_text().splitlines() == [
        "scale,data,split,class,AP",
        "quick,drawn,patient,a,0.5",
        "quick,drawn,patient,b,",
    ]


def test_the_map_is_read_from_the_notebooks_first_cells(tmp_path):
    told = {"Question": "why?", "Reads": "`a`", "Writes": "b", "Takes": "long"}
    first = {
        "source": [
            "# 07 Title\n",
            "\n",
            *(f"- **{key}:** {value}\n" for key, value in told.items()),
        ]
    }
    (tmp_path / "07_why.ipynb").write_text(json.dumps({"cells": [first]}))
    row = tables.notebook_map(tmp_path).loc["07_why"].to_dict()
    assert row == {"question": "why?", "reads": "a", "writes": "b", "takes": "long"}


def test_affected_detections_are_the_surest_of_the_given_rows():
    masks = [disc(20, 20, 8), disc(60, 20, 8), disc(60, 60, 8)]
    detections = [
        result(1, 2, score, mask) for score, mask in zip((0.3, 0.9, 0.6), masks, strict=True)
    ]
    matches = match_detections(truth_of([(1, 2, masks[0]), (1, 2, masks[2])]), detections)
    table = tables.affected_detections(matches, [0, 2], 5)
    assert table.index.tolist() == [2, 0]
    assert table[["class", "score", "kind"]].to_numpy().tolist() == [
        ["lymphocyte", 0.6, "right"],
        ["lymphocyte", 0.3, "right"],
    ]
    assert tables.affected_detections(matches, [1], 5)["kind"].tolist() == ["wrong"]
    assert tables.affected_detections(matches, [], 5).empty


def test_annotations_are_of_all_images_or_else_of_the_runs_own():
    run = load_run("outputs/reference/quick_run")
    annotated, told = tables.annotations_of_run(run)
    assert told == "All 48 annotated images of the data 'drawn'." and len(annotated["images"]) == 48
    gone = run._replace(settings=run.settings | {"data": "outputs/no_such_data"})
    annotated, told = tables.annotations_of_run(gone)
    assert (
        annotated is run.truth
        and told.startswith("Only the 12 validation images: ")
        and "no_such_data" in told
    )


def test_the_data_set_beside_report_cs(tmp_path):
    (tmp_path / "test_release").mkdir()
    (tmp_path / "test_release" / "a.tif").touch()
    folder, coco = (
        tables.dataset_summary(Dataset(), str(place))["here"]
        for place in (tmp_path, tmp_path / "annotations.json")
    )
    assert folder[["classes", "labelled images", "unlabelled images"]].tolist() == ["3", "2", "1"]
    assert (
        coco["unlabelled images"] == "1" and "COCO" in coco["format"] and "TIFF" in folder["format"]
    )
