import json

import numpy as np
import pandas as pd

from cellseg_helpers.runs import load_run
from study import tables


class Dataset:
    """The counts of two images, of which ``dataset_summary`` asks nothing else."""

    counts = np.array([[0, 1, 0, 0], [1, 0, 0, 1]])

    def __len__(self):
        return 2


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
