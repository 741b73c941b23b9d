import json

import numpy as np
import pandas as pd

from study import tables


class Dataset:
    """The counts of two images, of which ``dataset_summary`` asks nothing else."""

    counts = np.array([[0, 1, 0, 0], [1, 0, 0, 1]])

    def __len__(self):
        return 2


def test_the_map_is_read_from_the_notebooks_first_cells(tmp_path):
    facts = {"Question": "why?", "Reads": "`a`", "Writes": "b", "Takes": "long"}
    first = {
        "source": [
            "# 07 Title\n",
            "\n",
            *(f"- **{key}:** {value}\n" for key, value in facts.items()),
        ]
    }
    (tmp_path / "07_why.ipynb").write_text(json.dumps({"cells": [first]}))
    row = tables.notebook_map(tmp_path).loc["07_why"].to_dict()
    assert row == {"question": "why?", "reads": "a", "writes": "b", "takes": "long"}


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


def test_a_page_formats_numbers_empties_and_verdicts():
    table = pd.DataFrame(
        {"reported": [0.3336, "chosen"], "low_end": [0.12345, np.nan], "parameters": [2e6, 3e6]},
        index=pd.Index(["a", "b"], name="row"),
    )
    table["verdict"] = ["over <a>: the opposite holds here", ""]
    html = tables.page(table, "t", wide=["verdict"]).data
    assert ">0.3336<" in html and ">chosen<" in html and ">0.123<" in html and ">2.0 M<" in html
    assert (
        "over &lt;a&gt;: <b>the opposite holds here</b>" in html
        and ">low end<" in html
        and ">row<" in html
    )
    assert "nan" not in html and "min-width: 15em" in html
    assert html == tables.page(table, "t", wide=["verdict"]).data
