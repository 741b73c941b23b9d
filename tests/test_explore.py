import numpy as np
import pandas as pd
import pytest
from ipywidgets import IntSlider
from matplotlib.figure import Figure
from scenes import disc, result, truth_of

from cellseg_helpers import explore
from cellseg_helpers.cells import CLASS_NAMES, Cells
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.metrics import match_detections


class Dataset:
    """Two images of 10 x 10 px: in the first a lymphocyte of 4 px at the border, in the second two
    cells of 9 px.
    """

    patients = ["p1", "p2"]
    counts = np.array([[0, 1, 0, 0], [1, 0, 0, 1]])

    def __len__(self):
        return 2

    def __iter__(self):
        maps = np.zeros((2, 4, 10, 10), np.int32)
        maps[0, 1, 0:2, 3:5] = 5
        maps[1, 0, 2:5, 2:5] = 1
        maps[1, 3, 6:9, 6:9] = 1
        image = np.zeros((3, 10, 10), np.uint8)
        return iter(CellImage(f"i{n}", f"p{n + 1}", image, maps[n]) for n in range(2))


def test_the_picture_follows_the_controls():
    drawn = []

    def draw(number: int) -> Figure:
        drawn.append(number)
        figure = Figure(figsize=(1, 1))
        figure.text(0.5, 0.5, str(number))
        return figure

    slider = IntSlider(2, 0, 9)
    box = explore.interact(draw, number=slider)
    picture = box.children[-1]
    before = bytes(picture.value)
    assert drawn == [2] and before.startswith(b"\x89PNG")
    slider.value = 7
    assert drawn == [2, 7] and bytes(picture.value) != before and box.children[0] is slider


def test_the_slider_starts_at_the_given_threshold():
    masks = [disc(20, 20, 8), disc(60, 20, 8)]
    truth = truth_of([(1, 2, masks[0])])
    detections = Cells.from_coco([result(1, 2, 0.9, masks[0]), result(1, 2, 0.4, masks[1])])
    image = CellImage("a", None, np.zeros((3, 90, 110), np.uint8), np.zeros((4, 90, 110), np.int32))
    box = explore.threshold_slider(
        [image],
        Cells.from_coco(truth["annotations"]),
        detections,
        match_detections(truth, detections),
        0.3,
    )
    threshold, number, picture = box.children
    assert (threshold.value, number.min, number.max) == (0.3, 1, 1)
    before = bytes(picture.value)
    threshold.value = 0.8
    assert bytes(picture.value) != before


def test_instances_are_listed_with_size_and_border():
    table = explore.instance_table(Dataset())
    assert table["class"].tolist() == ["lymphocyte", "epithelial", "macrophage"]
    assert table["size_px"].tolist() == [2, 3, 3]
    assert table["touches_border"].tolist() == [True, False, False]
    assert table["patient"].tolist() == ["p1", "p2", "p2"]


def test_patients_are_summed():
    table = explore.patient_summary(Dataset())
    assert list(table.columns) == ["images", "cells", *CLASS_NAMES]
    assert table.loc["p2"].tolist() == [1, 2, 1, 0, 0, 1]
    unknown = Dataset()
    unknown.patients = [None, None]
    assert explore.patient_summary(unknown).empty


def test_an_image_is_chosen_by_its_classes_or_its_number():
    assert explore.choose_image(Dataset()) == 1
    assert explore.choose_image(Dataset(), 0) == 0
    with pytest.raises(ValueError, match="image_number is 2, but the data have 2 images"):
        explore.choose_image(Dataset(), 2)


def test_the_nearest_anchor_is_nearest_by_ratio():
    columns = {"class": "epithelial", "size_px": [23.0], "image_id": "a", "touches_border": False}
    table = explore.class_summary(pd.DataFrame(columns), [16, 32])
    assert table.loc["epithelial", "nearest_anchor_px"] == 32  # 32/23 < 23/16
    assert np.isnan(table.loc["neutrophil", "nearest_anchor_px"])
    assert table.loc["neutrophil", "cells"] == 0


def test_the_split_is_described_in_a_sentence_with_its_warning():
    split = {
        "kind": "random",
        "train": ["a", "b"],
        "validation": ["c"],
        "warning": "patients are unknown",
    }
    assert explore.describe_split(split) == (
        "random split (by image): 2 training and 1 validation images. "
        "Warning: patients are unknown."
    )


def test_affected_detections_are_the_highest_scored_of_the_given_rows():
    masks = [disc(20, 20, 8), disc(60, 20, 8), disc(60, 60, 8)]
    rows = zip((0.3, 0.9, 0.6), masks, strict=True)
    detections = Cells.from_coco([result(1, 2, score, mask) for score, mask in rows])
    matches = match_detections(truth_of([(1, 2, masks[0]), (1, 2, masks[2])]), detections)
    table = explore.affected_detections(matches, [0, 2], 5)
    assert table.index.tolist() == [2, 0]
    assert table[["class", "score", "kind"]].to_numpy().tolist() == [
        ["lymphocyte", 0.6, "right"],
        ["lymphocyte", 0.3, "right"],
    ]
    assert explore.affected_detections(matches, [1], 5)["kind"].tolist() == ["wrong"]
    assert explore.affected_detections(matches, [], 5).empty
