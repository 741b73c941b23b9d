"""Post-processing step by step: parameters chosen on one half of the images, each step's effect
judged on the other. No torch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cellseg_helpers import postprocess
from cellseg_helpers.cells import Cells
from cellseg_helpers.metrics import match_detections
from cellseg_helpers.resampling import (
    Half,
    compare,
    count_scores,
    draw_images,
    resampled_scores,
)
from cellseg_helpers.thresholds import choose_thresholds

LEAST_GAIN = 0.001  # of panoptic quality on the choosing half, for a step to be carried on


class Step(NamedTuple):
    """One step of post-processing.

    Attributes:
        name: as tables show it.
        apply: takes detections and one of the options, gives new detections.
        options: to choose from, or a function that makes them from the half to choose on; [None]
            for a step without parameter.
        required: it is carried on even where it does not help.
        replaces: names of earlier steps in whose place it stands, before all later ones.
    """

    name: str
    apply: Callable[[Cells, Any], Cells]
    options: Sequence[Any] | Callable[[Half], Sequence[Any]]
    required: bool = False
    replaces: tuple[str, ...] = ()


class Ablation(NamedTuple):
    """What ``ablate`` found.

    Attributes:
        steps: one row a step in its order: step, option (the chosen one), PQ_before, PQ_after (on
            the choosing half), carried.
        effects: one row a step and score on the judging half: step, then as ``resampling.compare``;
            ``before`` is what the carried steps before it gave, ``after`` what it made of that.
        total: as ``resampling.compare``, from the detections as predicted to those after all
            carried steps.
        recipe: the carried steps and their options.
    """

    steps: pd.DataFrame
    effects: pd.DataFrame
    total: pd.DataFrame
    recipe: list[tuple[Step, Any]]


def steps_of_report_e(
    size_factors: Sequence[tuple[float, float]],
    score_thresholds: Sequence[float],
    radii_px: Sequence[int],
    smoothing_px: Sequence[float],
    nms_iou_thresholds: Sequence[float],
    visible_shares: Sequence[float],
) -> list[Step]:
    """Report E's steps and two that users need in the end, in the order in which they are applied.

    Scores first: one threshold for all classes; in its place one for each class; in their place
    size-aware scores with thresholds chosen for them (a threshold is what makes a changed score
    count, and report E adjusts first). Then masks (closing, opening, holes, largest component,
    smoothing), then what masks do to one another (mask NMS across classes, each pixel to one cell).

    Args:
        size_factors: of ``postprocess.adjust_scores_by_size``.
        score_thresholds: to choose one for all, or for each class, from.
        radii_px: of closing and opening, to choose from.
        smoothing_px: sigma of the smoothing, to choose from.
        nms_iou_thresholds: of the mask NMS, to choose from.
        visible_shares: least share of a mask that must be left over, to choose from.
    """

    def adjust(detections: Cells) -> Cells:
        return postprocess.adjust_scores_by_size(detections, size_factors)

    return [
        Step("one threshold", _keep_from, score_thresholds),
        Step(
            "class thresholds",
            postprocess.apply_class_thresholds,
            lambda half: [_class_thresholds(half, score_thresholds)],
            replaces=("one threshold",),
        ),
        Step(
            "size-aware scores",
            lambda detections, limits: postprocess.apply_class_thresholds(
                adjust(detections), limits
            ),
            lambda half: [
                _class_thresholds(
                    half._replace(detections=adjust(half.detections)), score_thresholds
                )
            ],
            replaces=("one threshold", "class thresholds"),
        ),
        Step("closing", postprocess.close_masks, radii_px),
        Step("opening", postprocess.open_masks, radii_px),
        Step("hole filling", _without_option(postprocess.fill_holes), [None]),
        Step("largest component", _without_option(postprocess.keep_largest_component), [None]),
        Step("smoothing", postprocess.smooth_masks, smoothing_px),
        Step("mask NMS", postprocess.mask_nms, nms_iou_thresholds),
        Step("each pixel to one cell", postprocess.resolve_overlaps, visible_shares, required=True),
    ]


def ablate(
    choosing: Half, judging: Half, steps: Sequence[Step], resamples: int, seed: int
) -> Ablation:
    """Add steps one by one.

    A step's option is the one of best panoptic quality (mean over classes) on the choosing half,
    the first of equal ones. The step is carried on where it raises that quality there by
    ``LEAST_GAIN`` or more, or is required; its effect on the judging half is measured in any case,
    against the steps carried on so far.

    Args:
        choosing: the half that options are chosen on.
        judging: the half that effects are measured on.
        steps: in the order of application.
        resamples: bootstrap samples of the judging half's images.
        seed: of the samples.
    """
    weights = draw_images(len(judging.truth["images"]), resamples, seed)
    first = before = resampled_scores(*judging, weights)
    quality = panoptic_quality(choosing)
    now, now_judging = choosing, judging
    rows, effects, recipe = [], [], []
    for step in steps:
        kept, base, base_judging = recipe, now, now_judging
        if step.replaces:
            kept = [
                (earlier, option) for earlier, option in recipe if earlier.name not in step.replaces
            ]
            base, base_judging = (
                half._replace(detections=apply_recipe(half.detections, kept))
                for half in (choosing, judging)
            )
        options = step.options(base) if callable(step.options) else step.options
        tried = [
            base._replace(detections=step.apply(base.detections, option)) for option in options
        ]
        qualities = [panoptic_quality(half) for half in tried]
        best = int(np.nanargmax(qualities)) if not np.isnan(qualities).all() else 0
        carried = step.required or qualities[best] >= quality + LEAST_GAIN
        rows.append((step.name, options[best], quality, qualities[best], carried))
        judged = base_judging._replace(
            detections=step.apply(base_judging.detections, options[best])
        )
        after = resampled_scores(*judged, weights)
        effects.append(compare(before, after).assign(step=step.name))
        if carried:
            now, now_judging, before, quality = tried[best], judged, after, qualities[best]
            recipe = [*kept, (step, options[best])]
    table = pd.concat(effects, ignore_index=True)
    return Ablation(
        steps=pd.DataFrame(
            rows, columns=["step", "option", "PQ_before", "PQ_after", "carried"]
        ).set_index("step"),
        effects=table[["step", *table.columns.drop("step")]],
        total=compare(first, before),
        recipe=recipe,
    )


def apply_recipe(detections: Cells, recipe: Sequence[tuple[Step, Any]]) -> Cells:
    """The carried steps of an ablation, in their order."""
    for step, option in recipe:
        detections = step.apply(detections, option)
    return detections


def panoptic_quality(half: Half) -> float:
    """Panoptic quality at IoU 0.5, mean over the classes that have a cell; NaN without a cell."""
    matches = match_detections(*half)
    return float(count_scores(matches, np.ones((1, len(matches.image_ids)))).values["PQ", "all"][0])


def _keep_from(detections: Cells, score_threshold: float) -> Cells:
    return detections[detections.scores >= score_threshold]


def _class_thresholds(half: Half, score_thresholds: Sequence[float]) -> dict[int, float]:
    matches = match_detections(*half)
    by_name = choose_thresholds(matches, score_thresholds)
    return {class_id: by_name[name] for class_id, name in matches.class_names.items()}


def _without_option(
    apply: Callable[[Cells], Cells],
) -> Callable[[Cells, None], Cells]:
    return lambda detections, _: apply(detections)
