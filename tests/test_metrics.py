import contextlib
import copy
import io
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scenes import CLASS_NAMES, HEIGHT, WIDTH, disc, result, truth_of

from cellseg_helpers.cells import Cells
from cellseg_helpers.metrics import (
    COCO_AREAS_PX,
    average_precision,
    check_detections,
    class_table,
    count_by_image,
    count_matches,
    dense_max_dets,
    evaluate,
    limit_detections,
    match_detections,
    precision_recall_curves,
    score_coco,
    summarize,
    summary_table,
)


@st.composite
def scenes(draw, classes=(1, 2, 3, 4)):
    """Truth, and detections near it and anywhere; many equal scores, absent classes, empty images."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images = draw(st.integers(1, 4))
    crowding, noise = draw(st.integers(0, 25)), draw(st.floats(0, 0.4))
    digits = draw(st.sampled_from([1, 2, 17]))
    cells, detections = [], []
    for image_id in range(1, images + 1):
        places = []
        for _ in range(rng.integers(0, crowding + 1)):
            place = rng.uniform((0, 0, 1), (WIDTH, HEIGHT, rng.choice([8, 20, 60])))
            class_id = int(rng.choice(classes[:-1]))
            places.append((place, class_id))
            cells.append((image_id, class_id, disc(*place)))
        for _ in range(rng.integers(0, crowding + 8)):
            place, class_id = rng.uniform((0, 0, 1), (WIDTH, HEIGHT, 20)), int(rng.choice(classes))
            if places and rng.random() < 0.8:
                place, class_id = places[rng.integers(len(places))]
                place = place * [1, 1, rng.normal(1, noise)] + [
                    *rng.normal(0, noise * place[2], 2),
                    0,
                ]
            detections.append(
                result(image_id, class_id, float(round(rng.random(), digits)), disc(*place))
            )
    return truth_of([cell for cell in cells if coco_mask.area(cell[2])], images), detections


def by_pycocotools(
    truth: dict, detections: list[dict], max_dets=(1, 10, 100), iou_thresholds=None
) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        coco, found = COCO(), COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        masks_only = [
            {key: value for key, value in row.items() if key != "bbox"}
            for row in copy.deepcopy(detections)
        ]
        if masks_only:
            found = coco.loadRes(masks_only)
        else:
            found.dataset = {**copy.deepcopy(truth), "annotations": []}
            found.createIndex()
        evaluation = COCOeval(coco, found, "segm")
        evaluation.params.maxDets = list(max_dets)
        if iou_thresholds:
            evaluation.params.iouThrs = np.array(iou_thresholds)
        evaluation.evaluate()
        evaluation.accumulate()
        if tuple(max_dets) == (1, 10, 100) and not iou_thresholds:
            evaluation.summarize()
    return evaluation


def with_nan(values) -> np.ndarray:
    values = np.asarray(values, float)
    return np.where(values == -1, np.nan, values)


@settings(deadline=None, max_examples=40)
@given(scenes())
def test_the_twelve_lines_equal_pycocotools(scene):
    truth, detections = scene
    summary = summarize(score_coco(truth, Cells.from_coco(detections)))
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    assert list(summary) == names
    np.testing.assert_array_equal(
        list(summary.values()), with_nan(by_pycocotools(truth, detections).stats)
    )


@settings(deadline=None, max_examples=30)
@given(scenes(), st.sampled_from([(1, 2, 5), (1, 10, 800), (3, 7, 20)]))
def test_curves_equal_pycocotools_at_any_max_dets(scene, max_dets):
    truth, detections = scene
    scores = score_coco(truth, Cells.from_coco(detections), max_dets)
    expected = by_pycocotools(truth, detections, max_dets).eval
    np.testing.assert_array_equal(scores.precision, with_nan(expected["precision"]))
    np.testing.assert_array_equal(scores.recall, with_nan(expected["recall"]))
    for k, name in enumerate(CLASS_NAMES):
        of_class = summarize(scores, class_name=name)
        for column, thresholds in (("AP", slice(None)), ("AP50", 0), ("AP75", 5)):
            values = expected["precision"][thresholds, :, k, 0, -1]
            expected_mean = np.nan if (values == -1).all() else values.mean()
            np.testing.assert_equal(of_class[column], expected_mean)
    curves = precision_recall_curves(scores, 0.9)
    assert curves.columns.tolist() == ["class", "recall", "precision"]
    np.testing.assert_array_equal(
        curves["precision"], with_nan(expected["precision"][8, :, :, 0, -1].T.ravel())
    )
    np.testing.assert_array_equal(curves["recall"][:101], np.linspace(0, 1, 101))


@settings(deadline=None, max_examples=60)
@given(scenes(), st.sampled_from([0.1, 0.5, 0.75, 1.0]))
def test_matches_equal_pycocotools(scene, iou_threshold):
    truth, detections = scene
    matches = match_detections(truth, Cells.from_coco(detections), iou_threshold)
    expected = {}
    for part in by_pycocotools(truth, detections, (1, 10, 10_000), [iou_threshold]).evalImgs:
        if part and part["aRng"] == [0, 1e10]:
            expected |= dict(
                zip(part["dtIds"], part["dtMatches"][0].astype(int).tolist(), strict=True)
            )
    found = matches.detections["truth_id"].fillna(0).tolist()
    assert found == [expected[row] for row in range(1, len(detections) + 1)]
    assert matches.detections["matched"].tolist() == [bool(number) for number in found]

    assert matches.detections["area_px"].tolist() == [
        int(coco_mask.area(row["segmentation"])) for row in detections
    ]
    for row, (detection, table_row) in enumerate(
        zip(detections, matches.detections.itertuples(), strict=True)
    ):
        place = (table_row.image_id, table_row.class_id)
        rivals = [
            cell
            for cell in truth["annotations"]
            if (cell["image_id"], cell["category_id"]) == place
        ]
        if table_row.matched:
            rivals = [truth["annotations"][table_row.truth_id - 1]]
            assert matches.truths.loc[table_row.truth_id, "detection"] == row
            assert matches.truths.loc[table_row.truth_id, "score"] == detection["score"]
        ious = coco_mask.iou(
            [detection["segmentation"]],
            [cell["segmentation"] for cell in rivals],
            [0] * len(rivals),
        )
        assert table_row.iou == np.max(ious, initial=0)
    assert matches.truths["detection"].notna().sum() == matches.detections["matched"].sum()


@settings(deadline=None, max_examples=30)
@given(scenes(), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_counts_equal_pycocotools_on_the_kept_detections(scene, score_threshold):
    truth, detections = scene
    counts = count_matches(match_detections(truth, Cells.from_coco(detections)), score_threshold)
    kept = [detection for detection in detections if detection["score"] >= score_threshold]
    tp, fp, fn = (dict.fromkeys(CLASS_NAMES, 0) for _ in range(3))
    for part in by_pycocotools(truth, kept, (1, 10, 10_000), [0.5]).evalImgs:
        if part and part["aRng"] == [0, 1e10]:
            name = CLASS_NAMES[part["category_id"] - 1]
            tp[name] += int((part["dtMatches"] > 0).sum())
            fp[name] += int((part["dtMatches"] == 0).sum())
            fn[name] += int((part["gtMatches"] == 0).sum())
    assert list(counts) == ["all", *CLASS_NAMES]
    assert {name: counts[name][:3] for name in CLASS_NAMES} == {
        name: (tp[name], fp[name], fn[name]) for name in CLASS_NAMES
    }
    assert counts["all"][:3] == tuple(sum(values.values()) for values in (tp, fp, fn))


@settings(deadline=None, max_examples=40)
@given(scenes(), st.sampled_from([0.5, 0.75]), st.sampled_from([3, 100]))
def test_average_precision_by_area_equals_pycocotools(scene, iou_threshold, max_dets):
    truth, detections = scene
    expected = by_pycocotools(truth, detections, (1, 2, max_dets), [iou_threshold]).eval[
        "precision"
    ][0, :, :, :, -1]
    for area, limits in enumerate([(0, math.inf), *COCO_AREAS_PX.values()]):
        matches = match_detections(truth, Cells.from_coco(detections), iou_threshold, limits)
        found = average_precision(limit_detections(matches, max_dets))
        np.testing.assert_allclose(
            found[0], with_nan(expected[:, :, area].mean(0)), rtol=0, atol=1e-12
        )


@settings(deadline=None, max_examples=40)
@given(scenes(), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_a_weighted_image_counts_as_if_it_stood_there_more_often(scene, times):
    truth, detections = scene
    spread = np.linspace(0, 1e-6, max(len(detections), 1))  # no two scores equal
    detections = [
        row | {"score": row["score"] * 0.9 + more}
        for row, more in zip(detections, spread, strict=False)
    ]
    times = times[: len(truth["images"])]
    copies = [
        (image["id"], number)
        for image, n in zip(truth["images"], times, strict=True)
        for number in range(n)
    ]
    images, cells, found = [], [], []
    for new, (old, _) in enumerate(copies, 1):
        images.append({**truth["images"][old - 1], "id": new})
        cells += [
            {**row, "image_id": new} for row in truth["annotations"] if row["image_id"] == old
        ]
        found += [{**row, "image_id": new} for row in detections if row["image_id"] == old]
    cells = [{**row, "id": number} for number, row in enumerate(cells, 1)]
    weighted = average_precision(
        match_detections(truth, Cells.from_coco(detections)), [np.ones(len(times)), times]
    )
    assert weighted.shape == (2, 4)
    if images:
        written_out = by_pycocotools(
            {**truth, "images": images, "annotations": cells}, found, (1, 2, 100), [0.5]
        )
        expected = with_nan(written_out.eval["precision"][0, :, :, 0, -1].mean(0))
        np.testing.assert_allclose(weighted[1], expected, rtol=0, atol=1e-12)
    else:
        assert np.isnan(weighted[1]).all()


def test_a_cell_outside_the_area_range_neither_counts_nor_costs():
    small, large = disc(20, 20, 5), disc(70, 50, 25)
    truth = truth_of([(1, 1, small), (1, 1, large)])
    detections = [
        result(1, 1, 0.9, large),
        result(1, 1, 0.8, small),
        result(1, 1, 0.7, disc(100, 10, 5)),
    ]
    matches = match_detections(
        truth, Cells.from_coco(detections), area_range_px=COCO_AREAS_PX["medium"]
    )
    assert matches.truths["counted"].tolist() == [False, True]
    assert matches.detections["counted"].tolist() == [True, False, False]
    assert count_matches(matches)["all"][:3] == (1, 0, 0)
    assert count_matches(
        match_detections(truth, Cells.from_coco(detections), area_range_px=COCO_AREAS_PX["small"])
    )["all"][:3] == (1, 1, 0)


def test_counts_by_image_add_up():
    cells = [(1, 1, disc(20, 20, 10)), (1, 2, disc(60, 20, 10)), (3, 1, disc(20, 60, 10))]
    detections = [
        result(1, 1, 0.9, disc(21, 20, 10)),
        result(2, 1, 0.8, disc(20, 20, 10)),
        result(3, 1, 0.2, disc(20, 60, 10)),
    ]
    tp, fp, fn, iou_sum = count_by_image(
        match_detections(truth_of(cells, images=3), Cells.from_coco(detections)), 0.5
    )
    assert tp.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert fp.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert fn.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    iou = coco_mask.iou([detections[0]["segmentation"]], [cells[0][2]], [0])[0, 0]
    assert iou_sum[0, 0] == iou and iou_sum.sum() == iou


def three_discs() -> tuple[dict, list[dict]]:
    """Four cells; two found exactly, one by a shifted disc, one missed; a second find of the first,
    and one find in the void.
    """
    masks = [disc(20, 20, 10), disc(60, 20, 10), disc(20, 60, 10), disc(90, 70, 8)]
    truth = truth_of([(1, 1, masks[0]), (1, 1, masks[1]), (1, 2, masks[2]), (1, 2, masks[3])])
    detections = [
        result(1, 1, 0.6, masks[0]),
        result(1, 1, 0.9, disc(21, 20, 10)),
        result(1, 1, 0.8, disc(69, 20, 10)),
        result(1, 2, 0.7, masks[2]),
        result(1, 3, 0.3, disc(90, 20, 5)),
    ]
    return truth, detections


def known_scene() -> tuple[dict, Cells]:
    truth, detections = three_discs()
    return truth, Cells.from_coco(detections)


def test_a_known_scene_is_matched():
    truth, detections = three_discs()
    matches = match_detections(truth, Cells.from_coco(detections))
    table = matches.detections
    assert table["matched"].tolist() == [False, True, False, True, False]
    assert table["truth_id"].isna().tolist() == [True, False, True, False, True]
    assert table["truth_id"].dropna().tolist() == [1, 3]
    assert table["image_id"].tolist() == [1] * 5 and table["class_id"].tolist() == [1, 1, 1, 2, 3]
    assert (
        table["iou"][0] == 1
        and 0.8 < table["iou"][1] < 1
        and 0.2 < table["iou"][2] < 0.5
        and table["iou"][4] == 0
    )
    assert matches.truths.index.tolist() == [1, 2, 3, 4]
    assert matches.truths["detection"].isna().tolist() == [False, True, False, True]
    assert matches.truths["score"].tolist()[::2] == [0.9, 0.7]
    assert matches.truths["area_px"].tolist() == [cell["area"] for cell in truth["annotations"]]


def test_a_known_scene_is_counted():
    matches = match_detections(*known_scene())
    counts = count_matches(matches)
    assert counts["epithelial"] == (1, 2, 1, 1 / 3, 1 / 2, 2 / 5)
    assert counts["lymphocyte"] == (1, 0, 1, 1.0, 1 / 2, 2 / 3)
    assert counts["all"] == (2, 3, 2, 2 / 5, 1 / 2, 4 / 9)
    assert (
        counts["neutrophil"][:4] == (0, 1, 0, 0.0)
        and math.isnan(counts["neutrophil"].recall)
        and counts["neutrophil"].f1 == 0
    )
    assert all(math.isnan(ratio) for ratio in counts["macrophage"][3:])
    assert count_matches(matches, 0.7)["all"][:3] == (2, 1, 2)
    assert count_matches(matches, 0.95)["all"][:3] == (0, 0, 4)
    assert (
        math.isnan(count_matches(matches, 0.95)["all"].precision)
        and count_matches(matches, 0.95)["all"].recall == 0
    )


def test_a_detection_at_the_iou_threshold_matches():
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]

    def columns(stop):
        rle = coco_mask.encode(np.asfortranarray(((xs < stop) & (ys < 10)).astype(np.uint8)))
        return {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}

    truth, detections = truth_of([(1, 1, columns(20))]), [result(1, 1, 0.5, columns(10))]
    assert match_detections(truth, Cells.from_coco(detections), 0.5).detections[
        "matched"
    ].tolist() == [True]
    assert match_detections(truth, Cells.from_coco(detections), 0.501).detections[
        "matched"
    ].tolist() == [False]


def test_a_perfect_result_scores_one():
    truth, _ = three_discs()
    detections = [
        result(1, cell["category_id"], 0.9, cell["segmentation"]) for cell in truth["annotations"]
    ]
    metrics = evaluate(truth, Cells.from_coco(detections))
    assert (
        metrics["coco"]["summary"]["AP"]
        == metrics["coco_dense"]["summary"]["AP50"]
        == pytest.approx(1)
    )
    assert metrics["at_threshold"]["all"]["f1"] == 1
    assert math.isnan(metrics["coco"]["per_class"]["neutrophil"]["AP50"])
    assert math.isnan(metrics["coco"]["summary"]["APm"])


def test_detections_are_as_large_as_their_masks_not_their_boxes():
    """A false positive of 900 px in a box of 64 x 64: small by its mask, medium by its box."""
    truth = truth_of([(1, 1, disc(20, 20, 10)), (1, 1, disc(60, 50, 25))])
    false_positive = result(1, 1, 0.95, disc(85, 20, 16))
    false_positive["bbox"] = [40, 0, 64, 64]
    hits = [result(1, 1, 0.9, cell["segmentation"]) for cell in truth["annotations"]]
    summary = summarize(score_coco(truth, Cells.from_coco([false_positive, *hits])))
    assert summary["APm"] == pytest.approx(1) and summary["APs"] == pytest.approx(0.5)


def test_empty_detections_score_zero():
    truth, _ = three_discs()
    metrics = evaluate(truth, Cells.empty())
    assert (
        metrics["coco"]["summary"]["AP50"] == 0
        and metrics["coco"]["per_class"]["epithelial"]["AP"] == 0
    )
    assert metrics["at_threshold"]["all"] | {"precision": None} == {
        "tp": 0, "fp": 0, "fn": 4, "precision": None, "recall": 0, "f1": 0,
    }  # fmt: skip
    matches = match_detections(truth, Cells.empty())
    assert (
        matches.detections.empty
        and matches.truths["detection"].isna().all()
        and matches.truths["score"].isna().all()
    )


def test_empty_truth_is_undefined_and_all_detections_are_false():
    _, detections = three_discs()
    metrics = evaluate(truth_of([]), Cells.from_coco(detections))
    assert all(math.isnan(value) for value in metrics["coco"]["summary"].values())
    assert (
        metrics["at_threshold"]["all"]["fp"] == 4
        and metrics["at_threshold"]["all"]["precision"] == 0
    )
    assert math.isnan(metrics["at_threshold"]["all"]["recall"])
    assert (
        not match_detections(truth_of([]), Cells.from_coco(detections)).detections["matched"].any()
    )
    assert evaluate(truth_of([]), Cells.empty())["cells"] == 0


def test_nothing_is_changed_in_the_input():
    truth, detections = three_discs()
    before = copy.deepcopy(truth)
    cells = Cells.from_coco(detections)
    evaluate(truth, cells)
    assert truth == before and cells.to_coco() == Cells.from_coco(detections).to_coco()


@pytest.mark.parametrize(
    "cells, expected", [(0, 100), (5, 100), (100, 100), (101, 200), (772, 800)]
)
def test_dense_max_dets_hold_the_fullest_image(cells, expected):
    mask = disc(20, 20, 3)
    truth = truth_of(
        [(2, 1 + number % 4, mask) for number in range(cells)] + [(1, 1, mask)] * min(cells, 3),
        images=2,
    )
    assert dense_max_dets(truth) == (1, 10, expected)


def test_dense_images_need_dense_max_dets():
    masks = [disc(4 + 5 * column, 4 + 5 * row, 2) for row in range(16) for column in range(20)]
    truth = truth_of([(1, 1, mask) for mask in masks[:150]])
    detections = [result(1, 1, 0.9, mask) for mask in masks]
    metrics = evaluate(truth, Cells.from_coco(detections))
    assert metrics["detections"] == 320 and metrics["at_threshold"]["all"]["fp"] == 170
    assert metrics["coco_dense"]["max_dets"] == [1, 10, 200]
    assert metrics["coco"]["summary"]["AR100"] == pytest.approx(100 / 150)
    assert metrics["coco"]["summary"] == summarize(score_coco(truth, Cells.from_coco(detections)))
    assert metrics["coco_dense"]["summary"] == summarize(
        score_coco(truth, Cells.from_coco(detections), (1, 10, 200))
    )
    assert (
        metrics["coco_dense"]["summary"]["AR200"]
        == metrics["coco_dense"]["summary"]["AP"]
        == pytest.approx(1)
    )


def test_tables_for_a_notebook():
    metrics = evaluate(*known_scene())
    summary, classes = summary_table(metrics), class_table(metrics)
    assert summary.index.tolist() == [
        "AP",
        "AP50",
        "AP75",
        "APs",
        "APm",
        "APl",
        "AR1",
        "AR10",
        "AR",
        "ARs",
        "ARm",
        "ARl",
    ]
    assert summary.columns.tolist() == ["maxDets 100"]
    assert summary.loc["AP50", "maxDets 100"] == metrics["coco"]["summary"]["AP50"]
    assert classes.index.tolist() == ["all", *CLASS_NAMES]
    assert classes.columns.tolist() == [
        "AP",
        "AP50",
        "AP75",
        "tp",
        "fp",
        "fn",
        "precision",
        "recall",
        "f1",
    ]
    assert classes.loc["epithelial", "tp"] == 1 and pd.isna(classes.loc["macrophage", "AP"])


FAULTS = [
    ({"image_id": 7}, "detection 1 is of image 7, which the truth does not have"),
    ({"category_id": 9}, r"detection 1 is of class 9; the truth has the classes \[1, 2, 3, 4\]"),
    (
        {"segmentation": {"size": [50, 60], "counts": "0"}},
        r"detection 1 is of size \[50, 60\], its image 1 of \[90, 110\]",
    ),
    ({"score": math.nan}, "detection 1 is of score nan"),
]


@pytest.mark.parametrize("change, message", FAULTS)
def test_detections_that_do_not_fit_the_truth_are_explained(change, message):
    truth, detections = three_discs()
    detections[1] |= change
    for function in (check_detections, evaluate, match_detections, score_coco):
        with pytest.raises(ValueError, match=message):
            function(truth, Cells.from_coco(detections))


def test_other_faults_are_explained():
    truth, detections = three_discs()
    with pytest.raises(ValueError, match="holds no image"):
        evaluate(truth | {"images": [], "annotations": []}, Cells.empty())
    with pytest.raises(ValueError, match="iou_threshold is 0"):
        match_detections(truth, Cells.from_coco(detections), 0)
    for max_dets in ((100, 10, 1), (0, 1), (1, 1), ()):
        with pytest.raises(ValueError, match="max_dets is .*rising numbers"):
            score_coco(truth, Cells.from_coco(detections), max_dets)
    with pytest.raises(ValueError, match=r"iou_threshold is 0.52; COCO evaluates at \[0.5, 0.55"):
        precision_recall_curves(score_coco(truth, Cells.from_coco(detections)), 0.52)


def test_no_torch_at_import():
    code = "import sys, cellseg_helpers.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
