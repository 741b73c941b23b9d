"""Post-processing step by step: parameters chosen on one half of the images, each step's effect
judged on the other. No torch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cellseg_helpers import postprocess
from cellseg_helpers.cells import Cells
from cellseg_helpers.metrics import match_detections
from cellseg_helpers.resampling import Half, compare, count_scores, draw_images, resampled_scores
from cellseg_helpers.thresholds import choose_thresholds

LEAST_GAIN = 0.001  # of panoptic quality on the choosing half, for a step to be carried on


class Step(NamedTuple):
    """One step of post-processing; ``apply`` gives new cells from cells and one of the options."""

    name: str
    apply: Callable[[Cells, Any], Cells]
    options: Sequence[Any] | Callable[[Half], Sequence[Any]]  # or made from the choosing half
    required: bool = False  # carried on even where it does not help
    replaces: tuple[str, ...] = ()  # names of earlier steps that it stands in for


Chain = list[tuple[Step, Any]]  # steps with their chosen options, in the order of application


class Ablation(NamedTuple):
    """What ``ablate`` found.

    Attributes:
        steps: one row a step: step, option (the chosen one), PQ_before, PQ_after (on the choosing
            half), carried.
        effects: one row a step and score on the judging half: step, then as ``resampling.compare``;
            ``before`` is what the carried steps before it gave, ``after`` what it made of that.
        total: as ``resampling.compare``, of the detections as predicted and after all carried
            steps.
        chain: the carried steps.
    """

    steps: pd.DataFrame
    effects: pd.DataFrame
    total: pd.DataFrame
    chain: Chain


def steps_of_report_e(
    size_factors: Sequence[tuple[float, float]],
    score_thresholds: Sequence[float],
    radii_px: Sequence[int],
    smoothing_px: Sequence[float],
    nms_iou_thresholds: Sequence[float],
    visible_shares: Sequence[float],
) -> list[Step]:
    """Report E's steps and two that users need in the end, in the order in which they are applied.

    Scores first: one threshold for all classes; instead of it one for each class; instead of both
    size-aware scores (``size_factors`` of ``postprocess.adjust_scores_by_size``) with thresholds
    chosen for them. Then masks: closing and opening (``radii_px``), holes, largest component,
    smoothing (sigma). Then overlaps: mask NMS across classes, each pixel to one cell (the least
    share of a mask that must stay visible). All arguments but the first are options to choose from.
    """
    adjust = partial(postprocess.adjust_scores_by_size, factors=size_factors)
    by_class = postprocess.apply_class_thresholds

    def limits(half: Half) -> list[dict[int, float]]:
        matches = match_detections(*half)
        best = choose_thresholds(matches, score_thresholds)
        return [{class_id: best[name] for class_id, name in matches.class_names.items()}]

    def limits_of_adjusted(half: Half) -> list[dict[int, float]]:
        return limits(half._replace(detections=adjust(half.detections)))

    def cut_adjusted(cells: Cells, least: dict[int, float]) -> Cells:
        return by_class(adjust(cells), least)

    one, several = "one threshold", "class thresholds"
    return [
        Step(one, lambda cells, least: cells[cells.scores >= least], score_thresholds),
        Step(several, by_class, limits, replaces=(one,)),
        Step("size-aware scores", cut_adjusted, limits_of_adjusted, replaces=(one, several)),
        Step("closing", postprocess.close_masks, radii_px),
        Step("opening", postprocess.open_masks, radii_px),
        Step("hole filling", lambda cells, _: postprocess.fill_holes(cells), [None]),
        Step("largest component", lambda c, _: postprocess.keep_largest_component(c), [None]),
        Step("smoothing", postprocess.smooth_masks, smoothing_px),
        Step("mask NMS", postprocess.mask_nms, nms_iou_thresholds),
        Step("each pixel to one cell", postprocess.resolve_overlaps, visible_shares, required=True),
    ]


def ablate(
    choosing: Half, judging: Half, steps: Sequence[Step], resamples: int, seed: int
) -> Ablation:
    """Add steps one by one; ``resamples`` and ``seed`` are of the bootstrap on the judging half.

    How it works, for each step: 1. Its option is the one of best panoptic quality (mean over
    classes) on the choosing half after the steps carried on so far; the first of equal ones. 2. It
    is carried on if it raises that quality by ``LEAST_GAIN`` or more, or is required. 3. Its effect
    on the judging half is measured in any case.
    """
    weights = draw_images(len(judging.truth["images"]), resamples, seed)
    first = before = resampled_scores(*judging, weights)
    quality, chain, rows, effects = panoptic_quality(choosing), [], [], []
    for step in steps:
        base = [(earlier, option) for earlier, option in chain if earlier.name not in step.replaces]
        start = choosing._replace(detections=apply_chain(choosing.detections, base))
        options = step.options(start) if callable(step.options) else step.options
        tried = [step.apply(start.detections, option) for option in options]
        qualities = [panoptic_quality(start._replace(detections=cells)) for cells in tried]
        best = 0 if np.isnan(qualities).all() else int(np.nanargmax(qualities))
        judged = apply_chain(judging.detections, [*base, (step, options[best])])
        after = resampled_scores(judging.truth, judged, weights)
        carried = step.required or qualities[best] >= quality + LEAST_GAIN
        row = {"step": step.name, "option": options[best], "PQ_before": quality}
        rows.append(row | {"PQ_after": qualities[best], "carried": carried})
        effects.append(compare(before, after).assign(step=step.name))
        if carried:
            chain, before, quality = [*base, (step, options[best])], after, qualities[best]
    table = pd.concat(effects, ignore_index=True)
    table = table[["step", *table.columns.drop("step")]]
    return Ablation(pd.DataFrame(rows).set_index("step"), table, compare(first, before), chain)


def apply_chain(cells: Cells, chain: Chain) -> Cells:
    """The cells after these steps, in their order."""
    for step, option in chain:
        cells = step.apply(cells, option)
    return cells


def panoptic_quality(half: Half) -> float:
    """Panoptic quality at IoU 0.5, mean over the classes that have a cell; NaN without a cell."""
    matches = match_detections(*half)
    return count_scores(matches, np.ones((1, len(matches.image_ids)))).values["PQ", "all"].item()
