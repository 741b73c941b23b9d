import numpy as np
import pandas as pd
import pytest
from scenes import CLASS_NAMES, disc, result, truth_of

from cellseg_helpers import thresholds
from cellseg_helpers.cells import Cells
from cellseg_helpers.metrics import average_precision, count_matches, match_detections

FAR = [disc(x, y, 6) for y in (15, 45, 75) for x in (15, 45, 75, 95)]
GRID = [0.1, 0.3, 0.5, 0.7, 0.9]


def simulated(
    images: int, seed: int, right=lambda rng: rng.beta(4, 2), wrong=lambda rng: rng.beta(2, 4)
):
    """Images of up to six cells of two classes; each is found or not, and as many detections find
    nothing.
    """
    rng = np.random.default_rng(seed)
    cells, detections = [], []
    for image_id in range(1, images + 1):
        for place in rng.permutation(12)[: rng.integers(2, 12)]:
            class_id = int(rng.integers(1, 3))
            if place % 2:
                cells.append((image_id, class_id, FAR[place]))
                if rng.random() < 0.8:
                    detections.append(result(image_id, class_id, float(right(rng)), FAR[place]))
            else:
                detections.append(result(image_id, class_id, float(wrong(rng)), FAR[place]))
    return truth_of(cells, images), Cells.from_coco(detections)


@pytest.fixture(scope="module")
def scene():
    return simulated(30, 0)


@pytest.fixture(scope="module")
def matches(scene):
    return match_detections(*scene)


def test_kept_matches_are_the_matches_of_the_kept_detections(scene, matches):
    truth, detections = scene
    limits = {"epithelial": 0.3, "lymphocyte": 0.6, "neutrophil": 0.0, "macrophage": 1.0}
    kept = thresholds.keep_scores(matches, limits)
    left = detections[detections.scores >= np.array(list(limits.values()))[detections.labels - 1]]
    again = match_detections(truth, left)
    assert 0 < len(left) < len(detections)
    pd.testing.assert_frame_equal(kept.detections.reset_index(drop=True), again.detections)
    pd.testing.assert_series_equal(kept.truths["score"], again.truths["score"])
    assert kept.truths["detection"].notna().tolist() == again.truths["detection"].notna().tolist()
    with pytest.raises(
        ValueError, match="score_thresholds has no value for lymphocyte, neutrophil, macrophage"
    ):
        thresholds.keep_scores(matches, {"epithelial": 0.5})


def test_the_table_counts_and_scores_what_is_kept(matches):
    by_class = dict(zip(CLASS_NAMES, (0.2, 0.6, 0.5, 0.5), strict=True))
    table = thresholds.threshold_table(
        matches, {"keep all": 0, "by class": by_class}, 100
    ).set_index(["strategy", "class"])
    kept = thresholds.keep_scores(matches, by_class)
    for strategy, part in (("keep all", matches), ("by class", kept)):
        for name, count in count_matches(part).items():
            row = table.loc[strategy, name]
            assert tuple(row[["tp", "fp", "fn"]]) == count[:3]
            np.testing.assert_equal(row[["precision", "recall", "F1"]].tolist(), list(count[3:]))
            assert row["detections"] == count.tp + count.fp
        averages = average_precision(part)[0]
        np.testing.assert_array_equal(table.loc[strategy, "AP50"].iloc[1:], averages)
        assert table.loc[(strategy, "all"), "AP50"] == np.nanmean(averages)
    assert table.loc[("by class", "epithelial"), "score_threshold"] == 0.2
    assert np.isnan(table.loc[("by class", "all"), "score_threshold"])


def test_average_precision_never_rises_with_the_threshold(matches):
    table = thresholds.sweep(matches, GRID, 100)
    falls = (
        table.pivot(index="score_threshold", columns="class", values="AP50")[
            ["all", "epithelial", "lymphocyte"]
        ]
        .diff()
        .iloc[1:]
    )
    assert (falls <= 0).all().all() and (falls < 0).any().all()


def test_counts_by_threshold_count(matches):
    unsorted = [0.5, 0.0, 0.9, 0.5]
    tp, fp, fn = thresholds.count_by_threshold(matches, unsorted)
    found = matches.detections
    for t, limit in enumerate(unsorted):
        for image_id in (1, 7, 30):
            for class_id in (1, 2, 3):
                here = found[
                    (found["image_id"] == image_id)
                    & (found["class_id"] == class_id)
                    & (found["score"] >= limit)
                ]
                assert (tp + fp)[image_id - 1, class_id - 1, t] == len(here)
                assert tp[image_id - 1, class_id - 1, t] == here["matched"].sum()
    assert ((tp + fn).sum((0, 1)) == len(matches.truths)).all()


def test_the_best_threshold_of_a_known_scene():
    cells = [(1, 1, FAR[0]), (1, 1, FAR[1]), (1, 2, FAR[2])]
    found = [(1, 0.9, 0), (1, 0.6, 1), (1, 0.4, 4), (1, 0.3, 5), (2, 0.2, 2), (2, 0.05, 7)]
    matches = match_detections(
        truth_of(cells),
        Cells.from_coco([result(1, k, score, FAR[place]) for k, score, place in found]),
    )
    best = thresholds.choose_thresholds(matches, [0.7, 0.1, 0.5, 0.3])
    for_all = 0.5  # F1 4/5; 0.1: 6/8
    assert best == {
        "epithelial": 0.5,
        "lymphocyte": 0.1,
        "neutrophil": for_all,
        "macrophage": for_all,
    }
    assert thresholds.choose_thresholds(matches, [0.1, 0.35, 0.5], "count")["epithelial"] == 0.5
    with pytest.raises(ValueError, match="unknown criterion 'f2'; one of F1, count"):
        thresholds.choose_thresholds(matches, GRID, "f2")
    with pytest.raises(ValueError, match="score_thresholds is empty"):
        thresholds.choose_thresholds(matches, [])


def test_the_best_count_is_the_nearest_per_image():
    cells = [(1, 1, FAR[0]), (2, 1, FAR[0]), (2, 1, FAR[1])]
    scores = {1: (0.9, 0.8, 0.4), 2: (0.7,)}
    detections = [
        result(i, 1, s, FAR[4 + n]) for i, many in scores.items() for n, s in enumerate(many)
    ]
    matches = match_detections(truth_of(cells, 2), Cells.from_coco(detections))
    # 0.3: 3 and 1 for 1 and 2 cells; 0.5: 2 and 1; 0.85: 1 and 0
    assert thresholds.choose_thresholds(matches, [0.3, 0.5, 0.85], "count")["epithelial"] == 0.5
    counts = thresholds.cell_counts(
        matches, dict(zip(CLASS_NAMES, (0.5, 0.1, 0.1, 0.1), strict=True))
    )
    assert counts[counts["class"] == "epithelial"][
        ["image_id", "cells", "predicted"]
    ].to_numpy().tolist() == [[1, 1, 2], [2, 2, 1]]
    error = thresholds.counting_error(counts).loc["epithelial"]
    assert error.tolist() == [3, 3, 1, 0]


def test_choosing_on_noise_flatters_and_gains_nothing():
    """Scores that say nothing: what a choice claims on its own images is chance."""
    truth, detections = simulated(8, 3, *[lambda rng: rng.uniform(0, 1)] * 2)
    table = thresholds.optimism(match_detections(truth, detections), GRID, 0.1, 200, 0)
    assert (table.loc[["epithelial", "lymphocyte"], "optimism"] > 0.005).all()
    assert (table.loc[["epithelial", "lymphocyte"], "real"] < 0.005).all()
    assert table.loc["macrophage"].isna()["claimed"] and table.loc["macrophage", "halvings"] == 0


def test_a_real_gain_is_found_on_both_halves():
    truth, detections = simulated(
        40, 4, lambda rng: rng.uniform(0.55, 1), lambda rng: rng.uniform(0, 0.45)
    )
    table = thresholds.optimism(match_detections(truth, detections), GRID, 0.1, 100, 0)
    row = table.loc["epithelial"]
    assert row["claimed"] > 0.15 and row["real"] > 0.15 and abs(row["optimism"]) < 0.02


def test_optimism_equals_choosing_and_judging_by_hand(matches):
    """One halving, both directions, written out."""
    table = thresholds.optimism(matches, GRID, 0.5, 1, 5)
    order = np.random.default_rng(5).permuted(np.arange(30)[None], axis=1)[0]
    halves = [[i + 1 for i in range(30) if (order[i] < 15) == side] for side in (True, False)]

    def f1(image_ids, limits):
        kept = thresholds.keep_scores(matches, limits)
        part = kept._replace(
            detections=kept.detections[kept.detections["image_id"].isin(image_ids)],
            truths=kept.truths[kept.truths["image_id"].isin(image_ids)],
        )
        return count_matches(part)["all"].f1

    claimed, real = [], []
    for here, there in (halves, halves[::-1]):
        part = matches._replace(
            detections=matches.detections[matches.detections["image_id"].isin(here)],
            truths=matches.truths[matches.truths["image_id"].isin(here)],
        )
        limits = thresholds.choose_thresholds(part, GRID)
        claimed.append(f1(here, limits) - f1(here, 0.5))
        real.append(f1(there, limits) - f1(there, 0.5))
    assert table.loc["all", ["claimed", "real"]].tolist() == pytest.approx(
        [np.mean(claimed), np.mean(real)]
    )
    assert table.loc["all", "halvings"] == 2
    with pytest.raises(
        ValueError, match="optimism needs two images, one halving and one threshold at least"
    ):
        thresholds.optimism(matches, GRID, 0.5, 0, 0)


def test_separation_is_the_chance_to_rank_right():
    found = [(0.9, 0), (0.6, 5), (0.6, 1), (0.2, 6)]
    matches = match_detections(
        truth_of([(1, 1, FAR[0]), (1, 1, FAR[1])]),
        Cells.from_coco([result(1, 1, score, FAR[place]) for score, place in found]),
    )
    table = thresholds.separation(matches)
    assert table.loc["epithelial"].tolist() == [2, 2, (1 + 1 + 0.5 + 1) / 4]
    assert np.isnan(table.loc["lymphocyte", "AUROC"])


def test_scores_that_are_probabilities_are_calibrated_and_others_not():
    rng = np.random.default_rng(0)
    score = rng.uniform(0, 1, 40_000)
    table = match_detections(*simulated(1, 0))
    rows = pd.DataFrame({"score": score, "matched": rng.random(len(score)) < score, "class_id": 1})
    honest = thresholds.reliability(table._replace(detections=rows), 10)
    proud = thresholds.reliability(table._replace(detections=rows.assign(score=np.sqrt(score))), 10)
    assert honest[honest["class"] == "epithelial"]["detections"].sum() == len(score)
    assert thresholds.expected_calibration_error(honest)["all"] < 0.01
    assert thresholds.expected_calibration_error(proud)["all"] == pytest.approx(
        2 / 3 - 1 / 2, abs=0.01
    )  # mean of sqrt(u) - u


def test_bins_hold_their_lower_edge():
    detections = [result(1, 1, score, FAR[n]) for n, score in enumerate((0.0, 0.2, 0.5, 1.0))]
    table = thresholds.reliability(
        match_detections(truth_of([(1, 1, FAR[0])]), Cells.from_coco(detections)), 2
    )
    assert table[table["class"] == "all"][
        ["bin", "detections", "matched_share"]
    ].to_numpy().tolist() == [[0, 2, 0.5], [0.5, 2, 0]]
    with pytest.raises(ValueError, match="bins is 0"):
        thresholds.reliability(match_detections(truth_of([]), Cells.empty()), 0)


def test_nothing_to_score_is_no_error():
    matches = match_detections(truth_of([], images=2), Cells.empty())
    assert (
        thresholds.threshold_table(matches, {"keep all": 0}, 100)["detections"].tolist() == [0] * 5
    )
    assert thresholds.reliability(matches).empty
    assert thresholds.expected_calibration_error(thresholds.reliability(matches)).empty
    assert thresholds.separation(matches)["AUROC"].isna().all()
    assert set(thresholds.choose_thresholds(matches, GRID).values()) == {0.1}
    assert thresholds.optimism(matches, GRID, 0.5, 3, 0)["halvings"].tolist() == [0] * 5
    assert (
        thresholds.counting_error(thresholds.cell_counts(matches, 0.5))["mean_error"].tolist()
        == [0] * 4
    )
