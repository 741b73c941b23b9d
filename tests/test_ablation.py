import numpy as np
import pytest
from scenes import disc, result, truth_of

from cellseg_helpers.cells import Cells
from cellseg_helpers.postprocess import mask_nms
from cellseg_helpers.resampling import halve
from study import ablation
from study.ablation import (
    Step,
    ablate,
    apply_chain,
    panoptic_quality,
    steps_of_report_e,
)

PLACES = [(15, 15), (45, 15), (75, 15), (15, 60), (45, 60), (80, 60)]


def scene(images: int = 12):
    """Six cells an image, each found exactly; each also by a low-scored detection of another class,
    and each image has a find of nothing with a low score."""
    cells, detections = [], []
    rng = np.random.default_rng(0)
    for image_id in range(1, images + 1):
        for n, (x, y) in enumerate(PLACES):
            class_id = 1 + n % 2
            mask = disc(x + float(rng.uniform(-2, 2)), y, 9)
            cells.append((image_id, class_id, mask))
            detections.append(result(image_id, class_id, float(rng.uniform(0.6, 1)), mask))
            detections.append(result(image_id, 3 - class_id, float(rng.uniform(0.55, 0.6)), mask))
        detections.append(result(image_id, 1, float(rng.uniform(0.05, 0.2)), disc(100, 80, 6)))
    return truth_of(cells, images), Cells.from_coco(detections)


@pytest.fixture(scope="module")
def halves():
    return halve(*scene(), 0)[:2]


def drop_above(detections, score):
    return detections[detections.scores < score]


def test_a_step_that_helps_is_carried_on_and_one_that_harms_is_not(halves):
    steps = [
        Step("doubles", mask_nms, [0.9, 0.5]),
        Step("harm", drop_above, [0.8]),
        Step("nothing", lambda detections, _: detections, [None]),
        Step("needed", drop_above, [0.99], required=True),
    ]
    found = ablate(*halves, steps, 200, 0)
    assert found.steps["carried"].tolist() == [True, False, False, True]
    assert found.steps.loc["doubles", "option"] == 0.9  # of equally good ones the first
    assert [step.name for step, _ in found.chain] == ["doubles", "needed"]
    of_all = found.effects[found.effects["of"] == "all"].set_index(["step", "metric"])
    assert of_all.loc[("doubles", "precision"), "verdict"] == "better"
    assert of_all.loc[("doubles", "recall"), "verdict"] == "unchanged"
    assert (
        of_all.loc[("harm", "recall"), "verdict"]
        == of_all.loc[("harm", "PQ"), "verdict"]
        == "worse"
    )
    assert (of_all.loc["nothing", "verdict"] == "unchanged").all()
    # a step is measured from what was carried on, not from the step above it
    assert of_all.loc[("nothing", "recall"), "before"] == of_all.loc[("doubles", "recall"), "after"]


def test_the_best_option_is_that_of_the_choosing_half(halves):
    choosing, judging = halves
    harmful_first = Step(
        "cut",
        lambda detections, score: detections[detections.scores >= score],
        [0.99, 0.6, 0.0],
    )
    found = ablate(choosing, judging, [harmful_first], 10, 0)
    qualities = [
        panoptic_quality(choosing._replace(detections=harmful_first.apply(choosing.detections, o)))
        for o in (0.99, 0.6, 0.0)
    ]
    assert found.steps.loc["cut", "option"] == 0.6 and found.steps.loc["cut", "PQ_after"] == max(
        qualities
    )
    assert found.steps.loc["cut", "PQ_before"] == qualities[2]


def test_the_total_is_the_chain_applied(halves):
    choosing, judging = halves
    steps = steps_of_report_e(
        [(0.01, 1.15), (0.05, 1.1)], [0.1, 0.3, 0.5], [1, 2], [1.0], [0.5], [0.25]
    )
    assert [step.name for step in steps] == [
        "one threshold", "class thresholds", "size-aware scores", "closing", "opening", "hole filling", "largest component", "smoothing", "mask NMS",
        "each pixel to one cell",
    ]  # fmt: skip
    found = ablate(choosing, judging, steps, 50, 0)
    assert [step.name for step, _ in found.chain] == [
        "one threshold",
        "mask NMS",
        "each pixel to one cell",
    ]
    assert found.steps.loc["one threshold", "option"] == 0.3
    assert found.steps.loc["class thresholds", "option"] == {
        1: 0.3,
        2: 0.1,
        3: 0.3,
        4: 0.3,
    }  # no better than one
    final = judging._replace(detections=apply_chain(judging.detections, found.chain))
    total = found.total.set_index(["metric", "of"]).loc["PQ", "all"]
    assert total["before"] == panoptic_quality(judging) and total["after"] == panoptic_quality(
        final
    )
    assert total["after"] == 1.0 and total["verdict"] == "better"


def test_size_aware_scores_help_where_small_cells_score_too_low():
    """Small cells score 0.3 and large false finds 0.32: no threshold parts them before small boxes
    are lifted above.
    """
    small, large = [disc(x, 20, 3) for x in (15, 45, 75)], disc(60, 60, 20)
    cells = [(image_id, 1, mask) for image_id in range(1, 13) for mask in small]
    detections = [result(image_id, 1, 0.30, mask) for image_id, _, mask in cells]
    detections += [result(image_id, 1, 0.32, large) for image_id in range(1, 13)]
    choosing, judging, _ = halve(truth_of(cells, 12), Cells.from_coco(detections), 0)
    steps = steps_of_report_e([(0.02, 1.5)], [0.1, 0.31, 0.4], [1], [1.0], [0.5], [0.25])[:3]
    found = ablate(choosing, judging, steps, 50, 0)
    assert found.steps["carried"].tolist() == [False, False, True]
    assert [step.name for step, _ in found.chain] == ["size-aware scores"]
    assert found.steps.loc["size-aware scores", "PQ_after"] == 1.0
    effect = found.effects.query(
        "step == 'size-aware scores' and of == 'all' and metric == 'precision'"
    ).iloc[0]
    assert (effect["before"], effect["after"], effect["verdict"]) == (0.75, 1.0, "better")
    assert (
        panoptic_quality(judging._replace(detections=apply_chain(judging.detections, found.chain)))
        == 1.0
    )


def test_inputs_are_left_alone(halves):
    before = halves[0].detections.to_coco()
    ablation.ablate(*halves, [Step("doubles", mask_nms, [0.5])], 5, 0)
    assert halves[0].detections.to_coco() == before
