"""Add post-processing step by step: choose the options of each step on one half of the images, and
measure the effect of the step on the other half. Needs no torch.
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

LEAST_GAIN = 0.001  # in panoptic quality on the choosing half; a step with a lower one is left out


class Step(NamedTuple):
    """One step of post-processing, such as opening, and the options to choose from (radii)."""

    name: str
    apply: Callable[[Cells, Any], Cells]  # (cells, option) -> new cells
    options: Sequence[Any] | Callable[[Half], Sequence[Any]]  # or a function of the choosing half
    required: bool = False  # carried on even if it does not help
    replaces: tuple[str, ...] = ()  # names of earlier steps that are removed if it is carried on


Chain = list[tuple[Step, Any]]  # steps with their chosen options, in the order of application


class Ablation(NamedTuple):
    """The results of ``ablate``.

    Attributes:
        steps: one row per step: step, option (the chosen one), PQ_before, PQ_after (on the choosing
            half), carried (whether it is carried on, that is, applied before the later steps).
        effects: one row per step and score on the judging half: step, then the columns of
            ``resampling.compare``: before and after the step is added to those carried on so far.
        total: ``resampling.compare`` between the detections as predicted and after all steps that
            were carried on.
        chain: the steps that were carried on.
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
    """List report E's steps and two that a segmentation needs in the end, in order of application.

    Scores: one threshold for all classes; instead, one for each class; instead of both, size-aware
    scores (``size_factors`` as in ``postprocess.adjust_scores_by_size``) with thresholds chosen for
    them. Masks: closing and opening (``radii_px``), hole filling, largest component, smoothing
    (``smoothing_px``: sigma). Overlaps: mask NMS across classes; each pixel to one cell
    (``visible_shares``). All arguments but the first are options to choose from.
    """
    adjust = partial(postprocess.adjust_scores_by_size, factors=size_factors)
    by_class = postprocess.apply_class_thresholds

    def best_thresholds(half: Half) -> list[dict[int, float]]:
        matches = match_detections(*half)
        best = choose_thresholds(matches, score_thresholds)
        return [{class_id: best[name] for class_id, name in matches.class_names.items()}]

    def best_for_adjusted(half: Half) -> list[dict[int, float]]:
        return best_thresholds(half._replace(detections=adjust(half.detections)))

    def size_aware(cells: Cells, thresholds: dict[int, float]) -> Cells:
        return by_class(adjust(cells), thresholds)

    one, several = "one threshold", "class thresholds"
    return [
        Step(one, lambda cells, threshold: cells[cells.scores >= threshold], score_thresholds),
        Step(several, by_class, best_thresholds, replaces=(one,)),
        Step("size-aware scores", size_aware, best_for_adjusted, replaces=(one, several)),
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
    """Add steps one by one; ``resamples`` and ``seed`` are for the bootstrap on the judging half.

    How it works, for each step: 1. Each option is tried on the choosing half after the steps
    carried on so far. The option with the best panoptic quality (mean over classes) is chosen; of
    equal ones the first. 2. The step is carried on if it raises this quality by at least
    ``LEAST_GAIN``, or if it is required. 3. Its effect is measured on the judging half either way.
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
        detections = apply_chain(judging.detections, [*base, (step, options[best])])
        after = resampled_scores(judging.truth, detections, weights)
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
    """Apply the steps of a chain in their order."""
    for step, option in chain:
        cells = step.apply(cells, option)
    return cells


def panoptic_quality(half: Half) -> float:
    """Panoptic quality at IoU 0.5, averaged over the classes with cells; NaN if there are none."""
    matches = match_detections(*half)
    return count_scores(matches, np.ones((1, len(matches.image_ids)))).values["PQ", "all"].item()
