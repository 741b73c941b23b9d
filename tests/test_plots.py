import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from cellseg_helpers import plots, thresholds
from cellseg_helpers.borders import border_contact
from cellseg_helpers.cells import CLASS_NAMES, BoxMask, Cells
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.labels import find_cells
from cellseg_helpers.explore import confident_mistakes
from cellseg_helpers.metrics import (
    count_matches,
    match_detections,
    precision_recall_curves,
    score_coco,
)
from cellseg_helpers.postprocess import close_masks, mask_nms
from cellseg_helpers.resampling import Half
from study import figures
from study.ablation import Step, ablate


@pytest.fixture
def cell_image() -> CellImage:
    """40 x 30 px with two touching epithelial squares of 10 px and a lymphocyte of 6 px."""
    label_maps = np.zeros((4, 30, 40), np.int32)
    label_maps[0, 5:15, 5:15] = 1
    label_maps[0, 5:15, 15:25] = 7
    label_maps[1, 20:26, 30:36] = 3
    return CellImage("tissue-0001", None, np.full((3, 30, 40), 200, np.uint8), label_maps)


@pytest.fixture
def truth(cell_image) -> dict:
    return to_coco([cell_image])


@pytest.fixture
def annotated(truth) -> Cells:
    return Cells.from_coco(truth["annotations"])


@pytest.fixture
def detections() -> Cells:
    squares = [  # x, y, side, class, score
        (5, 5, 10, 1, 0.9),  # right
        (5, 6, 10, 1, 0.8),  # the same cell again
        (15, 5, 10, 3, 0.7),  # a cell of another class
        (33, 20, 6, 2, 0.6),  # half beside its cell: IoU 1/3; 1 px from the border
        (0, 24, 6, 4, 0.5),  # no cell, at the border
    ]
    masks = [BoxMask(np.ones((side, side), bool), x, y) for x, y, side, _, _ in squares]
    labels, scores = np.array(squares).T[3:]
    return Cells.of_image(30, 40, labels, masks, scores)


def test_an_outline_runs_around_its_pixels():
    lines = plots.outlines(BoxMask(np.ones((4, 3), bool), 0, 2))
    assert len(lines) == 1
    assert lines[0].min(0).tolist() == [-0.5, 1.5] and lines[0].max(0).tolist() == [2.5, 5.5]


def test_each_instance_has_a_colour_of_its_own(cell_image):
    picture = plots.colour_instances(find_cells(cell_image.label_maps), 30, 40).transpose(1, 2, 0)
    colours, areas = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    assert sorted(areas) == [36, 100, 100, 30 * 40 - 236]
    assert (colours[areas.argmax()] == 0).all()


def test_the_map_of_one_class_holds_that_class_alone(cell_image):
    picture = np.asarray(
        plots.image_beside_instances(cell_image, "lymphocyte").axes[1].images[0].get_array()
    )
    assert np.argwhere(picture.any(2)).min(0).tolist() == [20, 30]
    with pytest.raises(ValueError, match="unknown class_name 'lymphocite'"):
        plots.image_beside_instances(cell_image, "lymphocite")


def test_class_colours_are_four_and_far_apart():
    assert tuple(plots.CLASS_COLORS) == CLASS_NAMES
    colours = np.array([to_rgb(colour) for colour in plots.CLASS_COLORS.values()])
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=2)
    assert distances[~np.eye(4, dtype=bool)].min() > 0.25


def test_mistakes_are_told_apart(truth, detections):
    matches = match_detections(truth, detections)
    table = confident_mistakes(truth, detections, matches, 8)
    assert table["kind"].to_dict() == {
        1: "found twice",
        2: "wrong class",
        3: "poor outline",
        4: "no annotated cell",
    }
    assert table["at_border"].tolist() == [False, False, True, True]
    assert table["iou"][3] == pytest.approx(1 / 3) and table["iou_other_class"][2] == 1
    assert confident_mistakes(truth, detections, matches, 2).index.tolist() == [1, 2]
    assert confident_mistakes(truth, Cells.empty(), match_detections(truth, Cells.empty()), 2).empty


def analysis_figures(cell_image, truth, detections):
    annotated = Cells.from_coco(truth["annotations"])
    matches = match_detections(truth, detections)
    reliability = thresholds.reliability(matches)
    contact = border_contact(annotated, truth["images"], inset_px=8)
    halves = [Half(truth, detections)] * 2
    steps = [Step("closing", close_masks, [1]), Step("mask NMS", mask_nms, [0.5])]
    found = ablate(*halves, steps, 5, 0)
    return [
        plots.score_histograms(matches),
        plots.threshold_sweep(thresholds.sweep(matches, [0.2, 0.5], 100)),
        plots.reliability_diagram(reliability, thresholds.expected_calibration_error(reliability)),
        plots.predicted_against_true_counts(
            {
                "one": thresholds.cell_counts(matches, 0.5),
                "other": thresholds.cell_counts(matches, 0),
            }
        ),
        plots.border_contact(
            {
                "annotated": contact,
                "none": border_contact(Cells.empty(), truth["images"], inset_px=8),
            }
        ),
        plots.border_strip(cell_image, annotated, detections[3:], "predicted"),
        figures.step_effects(found.effects, found.steps, ["AP50", "F1"]),
        plots.before_and_after(
            cell_image,
            detections,
            np.minimum(cell_image.label_maps[0], 2).astype(np.uint16),
            ["epithelial"] * 2,
        ),
        plots.contact_sheet([cell_image.image] * 5, list("abcde"), [detections] * 5),
    ]


def test_a_point_stands_where_its_number_says():
    table = pd.DataFrame(
        {
            "expected": [10.0, 0.0],
            "at_border": [5, 0],
            "low": [4.0, 0.0],
            "high": [16.0, 0.0],
            "ratio": [0.5, np.nan],
        },
        index=["all", "epithelial"],
    )
    (ax,) = plots.border_contact({"annotated": table}).axes
    points = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "o"]
    assert points == [[[0.5, 0]]]
    (bar,) = ax.patches
    assert (bar.get_x(), bar.get_width()) == pytest.approx((0.4, 1.2))


def test_a_label_image_has_its_classes_colours_and_dark_borders():
    labels = np.zeros((12, 12), np.uint16)
    labels[2:7, 2:7], labels[2:7, 7:11] = 1, 2
    cell_image = CellImage(
        "a", None, np.zeros((3, 12, 12), np.uint8), labels[None].astype(np.int32)
    )
    picture = np.asarray(
        plots.before_and_after(cell_image, Cells.empty(), labels, ["neutrophil", "macrophage"])
        .axes[2]
        .images[0]
        .get_array()
    )
    assert picture[4, 4].tolist() == list(to_rgb(plots.CLASS_COLORS["neutrophil"]))
    assert picture[4, 9].tolist() == list(to_rgb(plots.CLASS_COLORS["macrophage"]))
    assert not picture[4, 6].any() and not picture[4, 7].any() and not picture[0, 0].any()


def test_of_a_large_image_a_window_inside_it_is_shown(detections):
    large = CellImage(
        "a", None, np.zeros((3, 700, 900), np.uint8), np.zeros((4, 700, 900), np.int32)
    )
    mask = BoxMask(np.ones((10, 20), bool), 880, 690)
    corner = Cells.of_image(700, 900, [1], [mask], np.array([1.0]))
    ax = plots.border_strip(
        large, Cells.empty(), Cells.concatenate([corner, detections[[1]]]), "predicted"
    ).axes[1]
    assert ax.get_xlim() == (900 - 320 - 0.5, 899.5) and ax.get_ylim() == (699.5, 700 - 320 - 0.5)


def test_steps_that_are_not_carried_on_are_hollow():
    columns = ["step", "metric", "of", "difference", "low", "high"]
    effects = pd.DataFrame(
        [("a", "PQ", "all", 0.1, 0.05, 0.2), ("b", "PQ", "all", -0.1, -0.2, 0.0)], columns=columns
    )
    steps = pd.DataFrame({"carried": [True, False]}, index=["a", "b"])
    (ax,) = figures.step_effects(effects, steps, ["PQ"]).axes
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [dot.get_xydata().tolist() for dot in dots] == [[[0.1, 0]], [[-0.1, 1]]]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, True]


def test_every_figure_draws_and_stays_closed(cell_image, truth, annotated, detections):
    matches, coco = match_detections(truth, detections), score_coco(truth, detections)
    history = pd.DataFrame(
        {
            "epoch": [1, 2],
            "loss": [2.0, 1.0],
            "validation_loss": [2.0, np.nan],
            "validation_ap50": [0.1, 0.2],
        }
    )
    history = history.assign(**dict.fromkeys(plots.LOSS_LABELS, 0.2))
    curves, counts = precision_recall_curves(coco), count_matches(matches, 0.5)
    drawn = [
        plots.image_beside_instances(cell_image, "lymphocyte", "all"),
        plots.sizes_against_anchors({"epithelial": pd.Series(dtype=float)}, {"anchors": [8, 16]}),
        plots.training_curves(history),
        plots.loss_parts(history),
        plots.truth_beside_predictions([cell_image], [annotated], [detections], 0.5),
        plots.precision_recall(curves, {0: count_matches(matches), 0.5: counts}),
        plots.crops(
            confident_mistakes(truth, detections, matches, 5), [cell_image], annotated, detections
        ),
        plots.found_and_missed(cell_image, 1, annotated, detections, matches, 0.5),
        plots.found_and_missed(
            cell_image, 1, annotated, Cells.empty(), match_detections(truth, Cells.empty()), 0.5
        ),
        *analysis_figures(cell_image, truth, detections),
        *analysis_figures(cell_image, truth, Cells.empty()),
    ]
    for fig in drawn:
        png = io.BytesIO()
        fig.savefig(png, bbox_inches="tight")  # as a notebook shows it
        assert plt.imread(io.BytesIO(png.getvalue())).shape[1] >= 900
    assert not plt.get_fignums()


def test_missed_cells_and_wrong_detections_are_counted_in_the_titles(
    cell_image, truth, annotated, detections
):
    left, right = plots.found_and_missed(
        cell_image, 1, annotated, detections, match_detections(truth, detections), 0.65
    ).axes
    assert left.get_title() == "3 annotated, 2 missed (dashed)"
    assert right.get_title() == "3 detections, 2 wrong (dashed)"


def test_a_ratio_of_nothing_is_a_dash_in_the_title(cell_image, truth, annotated, detections):
    title = plots.found_and_missed(
        cell_image, 1, annotated, detections, match_detections(truth, detections), 1.0
    ).get_suptitle()
    name = cell_image.image_id[:8]
    assert title == (f"image {name} at score ≥ 1.00; all images: precision –, recall 0.00, F1 0.00")


def test_a_live_picture_is_drawn_at_once_and_then_seldom(monkeypatch):
    clock, drawn = [0.0], []
    monkeypatch.setattr(plots.time, "monotonic", lambda: clock[0])
    draw = plots.seldom(drawn.append)
    for clock[0], history in [
        (0.0, "first"),
        (29.0, "soon"),
        (31.0, "later"),
        (60.0, "soon again"),
    ]:
        draw(history)
    assert drawn == ["first", "later"]


def test_a_figure_is_shown_with_its_alternative_text(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *args, **kwargs: shown.append(kwargs))
    plots.show(plt.Figure(), "one dot")
    (only,) = shown
    assert only["metadata"] == {"image/png": {"alt": "one dot"}}
