from dataclasses import replace

import numpy as np
import pytest
from scenes import CLASS_NAMES, disc, result, truth_of

from cellseg_helpers import resampling
from cellseg_helpers.cells import Cells
from cellseg_helpers.metrics import (
    count_matches,
    dense_max_dets,
    match_detections,
    score_coco,
    summarize,
)
from cellseg_helpers.runs import RunError

MASKS = [
    disc(x, y, r)
    for x, y, r in ((15, 15, 6), (45, 15, 8), (80, 40, 20), (20, 60, 18), (100, 80, 7), (60, 80, 6))
]


def scene(images: int = 12, seed: int = 0, shift: float = 2.0, missed: float = 0.2):
    """Every image holds six cells of three classes; found with a shift, some missed, with some
    finds of nothing.
    """
    rng = np.random.default_rng(seed)
    cells, detections = [], []
    for image_id in range(1, images + 1):
        for n, mask in enumerate(MASKS):
            cells.append((image_id, 1 + n % 3, mask))
            if rng.random() > missed:
                x, y, r = [
                    (15, 15, 6),
                    (45, 15, 8),
                    (80, 40, 20),
                    (20, 60, 18),
                    (100, 80, 7),
                    (60, 80, 6),
                ][n]
                moved = disc(x + rng.normal(0, shift), y + rng.normal(0, shift), r)
                detections.append(result(image_id, 1 + n % 3, float(rng.uniform(0.3, 1)), moved))
        detections.append(
            result(image_id, int(rng.integers(1, 4)), float(rng.uniform(0, 0.7)), disc(60, 50, 5))
        )
    return truth_of(cells, images), Cells.from_coco(detections)


def of_patients(truth, names):
    images = [image | {"patient": name} for image, name in zip(truth["images"], names, strict=True)]
    return truth | {"images": images}


def test_halves_hold_every_image_once_and_no_patient_twice():
    truth, detections = scene()
    truth = of_patients(truth, [f"p{i % 4}" for i in range(12)])
    first, second, told = resampling.halve(truth, detections, 0)
    ids = [{image["id"] for image in half.truth["images"]} for half in (first, second)]
    assert ids[0] | ids[1] == set(range(1, 13)) and not ids[0] & ids[1] and len(ids[0]) == 6
    patients = [{image["patient"] for image in half.truth["images"]} for half in (first, second)]
    assert not patients[0] & patients[1]
    assert (
        told
        == "6 images of 2 patients to choose on and 6 images of 2 patients to judge on (no patient in both)."
    )
    for half, images in zip((first, second), ids, strict=True):
        assert (
            set(half.detections.image_ids.tolist())
            == images
            == {row["image_id"] for row in half.truth["annotations"]}
        )
    assert len(first.detections) + len(second.detections) == len(detections)
    assert "drawn by image" in resampling.halve(scene()[0], detections, 0)[2]


def test_one_image_cannot_be_halved():
    with pytest.raises(
        ValueError, match="1 image is too few to choose on one half and judge on the other"
    ):
        resampling.halve(*scene(images=1), 0)


def test_the_first_scores_are_those_of_the_images_themselves():
    truth, detections = scene()
    scores = resampling.resampled_scores(
        truth, detections, resampling.draw_images(12, 20, 0)
    ).values
    summary = summarize(score_coco(truth, detections, dense_max_dets(truth)))
    for metric in ("AP50", "AP75"):
        assert scores[metric, "all"][0] == pytest.approx(summary[metric], abs=1e-12)
    matches = match_detections(truth, detections)
    for name, count in count_matches(matches).items():
        for metric, value in (
            ("precision", count.precision),
            ("recall", count.recall),
            ("F1", count.f1),
        ):
            np.testing.assert_equal(scores[metric, name][0], value)
    assert all(len(values) == 21 for values in scores.values())
    assert {of for metric, of in scores if metric == "AP50"} == {
        "all",
        *CLASS_NAMES,
        "small",
        "medium",
        "large",
    }


def test_panoptic_quality_of_a_known_scene():
    truth = truth_of([(1, 1, MASKS[0]), (1, 1, MASKS[1])])
    detections = Cells.from_coco([result(1, 1, 0.9, MASKS[0]), result(1, 1, 0.8, MASKS[4])])
    scores = resampling.resampled_scores(truth, detections, resampling.draw_images(1, 0, 0)).values
    assert scores["PQ", "epithelial"] == scores["PQ", "all"] == [1 / (1 + 0.5 + 0.5)]
    assert np.isnan(scores["PQ", "lymphocyte"]).all()


def test_bootstrap_samples_have_as_many_images():
    drawn = resampling.draw_images(7, 200, 3)
    assert drawn.shape == (201, 7) and (drawn[0] == 1).all() and (drawn.sum(1) == 7).all()
    assert (drawn == resampling.draw_images(7, 200, 3)).all() and (
        drawn != resampling.draw_images(7, 200, 4)
    ).any()


def verdicts(before, after):
    weights = resampling.draw_images(12, 300, 0)
    truth = scene()[0]
    table = resampling.compare(
        resampling.resampled_scores(truth, before, weights),
        resampling.resampled_scores(truth, after, weights),
    )
    return table.set_index(["metric", "of"])


def test_a_planted_effect_is_found_in_both_directions():
    good, poor = scene(missed=0.1)[1], scene(missed=0.5)[1]
    table = verdicts(poor, good)
    row = table.loc["recall", "all"]
    assert row["verdict"] == "better" and 0 < row["low"] < row["difference"] < row["high"]
    assert row["difference"] == pytest.approx(row["after"] - row["before"])
    assert verdicts(good, poor).loc[("recall", "all"), "verdict"] == "worse"
    assert verdicts(good, poor).loc[("AP50", "all"), "verdict"] == "worse"


def test_no_effect_is_not_found():
    first = scene(seed=1)[1]
    assert set(verdicts(first, first)["verdict"]) <= {"unchanged", "cannot tell"}
    assert verdicts(first, first).loc[("AP50", "all"), "verdict"] == "unchanged"
    found = [
        verdicts(first, scene(seed=seed)[1]).loc[("recall", "all"), "verdict"]
        for seed in range(2, 12)
    ]
    assert found.count("cannot tell") >= 8


@pytest.mark.parametrize("images", [6, 12])
def test_noise_is_seldom_taken_for_an_effect(images):
    """Two detectors of the same rates, of which 5 % should be told apart; so few images give a
    little more.
    """
    truth, weights = scene(images)[0], resampling.draw_images(images, 1000, 0)
    scores = [
        resampling.count_scores(match_detections(truth, scene(images, seed)[1]), weights)
        for seed in range(1, 161)
    ]
    told = [
        resampling.compare(*scores[n : n + 2])
        .query("metric == 'F1' and of == 'all'")["verdict"]
        .item()
        for n in range(0, 160, 2)
    ]
    assert told.count("cannot tell") >= 0.88 * len(told)


def test_few_images_have_no_interval():
    truth, detections = scene(images=4)
    weights = resampling.draw_images(4, 100, 0)
    before, after = (
        resampling.resampled_scores(truth, found, weights) for found in (detections[:3], detections)
    )
    table = resampling.compare(before, after).query("metric == 'recall' and of == 'all'")
    assert table["low"].isna().all() and table["verdict"].tolist() == ["cannot tell"]


def test_the_interval_reaches_farther_out_for_fewer_images():
    values = np.random.default_rng(0).normal(size=100_000)
    assert resampling.interval(values, 10_000) == pytest.approx((-1.96, 1.96), abs=0.05)
    assert resampling.interval(values, 6) == pytest.approx(
        (-2.816, 2.816), abs=0.2
    )  # sqrt(6 / 5) * 2.571


def test_a_class_in_one_image_has_no_interval():
    truth, detections = scene()
    lone = truth_of(
        [
            *[
                (row["image_id"], row["category_id"], row["segmentation"])
                for row in truth["annotations"]
            ],
            (1, 4, MASKS[5]),
        ],
        12,
    )
    weights = resampling.draw_images(12, 300, 0)
    before = resampling.resampled_scores(lone, detections, weights)
    more = Cells.from_coco([result(1, 4, 0.9, MASKS[5])])
    after = resampling.resampled_scores(lone, Cells.concatenate([detections, more]), weights)
    row = resampling.compare(before, after).set_index(["metric", "of"]).loc["recall", "macrophage"]
    assert row["difference"] == 1 and np.isnan(row["low"]) and row["verdict"] == "cannot tell"


def test_nothing_found_is_no_error():
    truth = scene()[0]
    scores = resampling.resampled_scores(
        truth, Cells.empty(), resampling.draw_images(12, 5, 0)
    ).values
    assert (scores["AP50", "all"] == 0).all() and np.isnan(scores["precision", "all"]).all()


def test_patients_are_drawn_where_five_are_known():
    truth = scene()[0]
    draw = resampling.draw_units(of_patients(truth, [f"p{i % 5}" for i in range(12)]), 50, 3)
    assert (
        (draw.unit, draw.units) == ("patients", 5)
        and draw.weights.shape == (51, 12)
        and (draw.weights[0] == 1).all()
    )
    by_patient = [draw.weights[:, [i for i in range(12) if i % 5 == k]] for k in range(5)]
    assert all((weights == weights[:, :1]).all() for weights in by_patient)
    assert (sum(weights[:, 0] for weights in by_patient) == 5).all()
    for names in ([f"p{i % 4}" for i in range(12)], [None, *(f"p{i}" for i in range(11))]):
        few = resampling.draw_units(of_patients(truth, names), 50, 3)
        assert (few.unit, few.units) == ("images", 12) and (
            few.weights == resampling.draw_images(12, 50, 3)
        ).all()


def test_saved_scores_come_back(tmp_path):
    truth, detections = scene()
    scores = resampling.score_run(truth, detections)
    resampling.save_scores(scores, tmp_path / "scores.json")
    assert (
        resampling.load_scores(tmp_path / "scores.json")
        == scores
        == resampling.score_run(truth, detections)
    )
    whole = resampling.resampled_scores(
        truth, detections, resampling.draw_images(12, 1000, 0)
    ).values["AP50", "all"]
    np.testing.assert_allclose(scores.AP50, whole, atol=1e-6)
    assert scores.names == [f"image{i}" for i in range(1, 13)] and (scores.unit, scores.units) == (
        "images",
        12,
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"max_dets": 100}'])
def test_damaged_scores_are_refused(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(RunError, match="scores.json"):
        resampling.load_scores(tmp_path / "scores.json")


def test_the_12_lines_of_the_images_themselves_are_cocos():
    truth, detections = scene()
    detections = replace(detections, scores=detections.scores.round(1))  # equal scores too
    lines = resampling.bootstrap_summary(
        truth, detections, resampling.draw_images(12, 3, 0), (1, 2, 100)
    )
    summary = summarize(score_coco(truth, detections, (1, 2, 100)))
    assert list(lines) == list(summary)
    for name, value in summary.items():
        np.testing.assert_allclose(lines[name][0], value, atol=1e-12)
        assert lines[name].shape == (4,)


def test_the_12_lines_of_a_bootstrap_sample_are_cocos_of_its_images_written_out():
    truth, detections = scene()
    weights = resampling.draw_images(12, 3, 0)
    ids = np.repeat(np.arange(1, 13), weights[2]).tolist()

    def written_out(rows):
        return [
            row | {"image_id": new}
            for new, old in enumerate(ids, 1)
            for row in rows
            if row["image_id"] == old
        ]

    images = [truth["images"][old - 1] | {"id": new} for new, old in enumerate(ids, 1)]
    cells = [
        cell | {"id": number} for number, cell in enumerate(written_out(truth["annotations"]), 1)
    ]
    summary = summarize(
        score_coco(
            truth | {"images": images, "annotations": cells},
            Cells.from_coco(written_out(detections.to_coco())),
            (1, 2, 100),
        )
    )
    lines = resampling.bootstrap_summary(truth, detections, weights, (1, 2, 100))
    for name, value in summary.items():
        np.testing.assert_allclose(lines[name][2], value, atol=1e-12)
