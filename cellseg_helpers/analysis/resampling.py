"""Halves of a run's images to choose on and to judge on, and intervals of scores by bootstrap over images. No torch."""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cellseg_helpers.analysis.metrics import (
    COCO_AREAS_PX,
    Matches,
    average_precision,
    count_by_image,
    dense_max_dets,
    match_detections,
)
from cellseg_helpers.data.splits import make_split

Scores = dict[tuple[str, str], np.ndarray]
INTERVAL = (2.5, 97.5)  # percentiles
MOST = 0.95  # share of the bootstrap samples in which a score must be defined
ALIKE = 1e-9  # below it, a difference of two scores is rounding


class Half(NamedTuple):
    """Some images of a run: its truth and its detections, image ids as they were."""

    truth: dict[str, Any]
    detections: list[dict[str, Any]]


def halve(
    truth: dict[str, Any], detections: list[dict[str, Any]], seed: int, split: str = "auto"
) -> tuple[Half, Half, str]:
    """Two halves of the images with about the same share of every class, and a sentence about them.

    Args:
        truth: COCO data set.
        detections: COCO results.
        seed: of the draw.
        split: ``patient`` (none in both halves), ``random`` (by image), or ``auto``: by patient where every image's is known.

    Raises:
        ValueError: as ``splits.make_split``; fewer than two images (or patients).
    """
    images = truth["images"]
    place = {image["id"]: i for i, image in enumerate(images)}
    classes = {category["id"]: k for k, category in enumerate(truth["categories"])}
    counts = np.zeros((len(images), len(classes)), int)
    for cell in truth["annotations"]:
        counts[place[cell["image_id"]], classes[cell["category_id"]]] += 1
    drawn = make_split([str(image["id"]) for image in images], counts, [image.get("patient") for image in images], split, 0.5, seed)
    first, second = (part_of(truth, detections, {int(image_id) for image_id in side}) for side in (drawn.train, drawn.validation))
    rule = "no patient in both" if drawn.kind == "patient" else "drawn by image"
    return first, second, f"{len(drawn.train)} images to choose on and {len(drawn.validation)} to judge on ({rule})."


def part_of(truth: dict[str, Any], detections: list[dict[str, Any]], image_ids: set[int]) -> Half:
    """The truth and the detections of some images."""
    images = [image for image in truth["images"] if image["id"] in image_ids]
    cells = [cell for cell in truth["annotations"] if cell["image_id"] in image_ids]
    kept = [detection for detection in detections if detection["image_id"] in image_ids]
    return Half({**truth, "images": images, "annotations": cells}, kept)


def draw_images(images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image stands in each bootstrap sample: int [1 + resamples, images]; the first row is the images themselves."""
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), resamples)
    return np.concatenate([np.ones((1, images), int), drawn])


def resampled_scores(
    truth: dict[str, Any], detections: list[dict[str, Any]], image_weights: np.ndarray, score_threshold: float = 0.0
) -> Scores:
    """Scores of detections, as they are and of bootstrap samples of their images.

    Args:
        truth: COCO data set.
        detections: COCO results.
        image_weights: of ``draw_images``, [1 + B, I].
        score_threshold: of the detections that count for precision, recall, F1 and PQ.

    Returns:
        (metric, of) -> float64 [1 + B]. Metrics: AP50, AP75 (COCO's, at the dense ``maxDets``), precision, recall, F1 and PQ at
        mask IoU 0.5. ``of``: ``all``, each class, and for AP50 the areas small, medium and large. AP and PQ of ``all`` are means
        over the classes that have a cell, precision, recall and F1 of ``all`` are of the added counts. PQ is panoptic quality, the
        sum of the matched pairs' IoU / (tp + fp / 2 + fn / 2) (Kirillov et al., "Panoptic segmentation", 2019), the measure of the
        MoNuSAC challenge. NaN where nothing is to be found.
    """
    limit = dense_max_dets(truth)[-1]
    matches = match_detections(truth, detections, 0.5)
    scores = _with_mean("AP50", matches, average_precision(matches, image_weights, limit))
    at75 = match_detections(truth, detections, 0.75)
    scores |= _with_mean("AP75", at75, average_precision(at75, image_weights, limit))
    for area, limits in COCO_AREAS_PX.items():
        of_area = match_detections(truth, detections, 0.5, limits)
        scores["AP50", area] = _mean_of_defined(average_precision(of_area, image_weights, limit))
    return scores | count_scores(matches, image_weights, score_threshold)


def count_scores(matches: Matches, image_weights: np.ndarray, score_threshold: float = 0.0) -> Scores:
    """Precision, recall, F1 and PQ as in ``resampled_scores``, of the detections that score at least ``score_threshold``."""
    tp, fp, fn, iou_sum = (image_weights @ table for table in count_by_image(matches, score_threshold))
    with np.errstate(invalid="ignore", divide="ignore"):
        pq = np.where(tp + fn > 0, iou_sum / (tp + fp / 2 + fn / 2), np.nan)
        tp, fp, fn = (np.column_stack([table.sum(1), table]) for table in (tp, fp, fn))
        ratios = {"precision": tp / (tp + fp), "recall": tp / (tp + fn), "F1": 2 * tp / (2 * tp + fp + fn)}
    names = ("all", *matches.class_names.values())
    scores = {(metric, name): values[:, k] for metric, values in ratios.items() for k, name in enumerate(names)}
    return scores | _with_mean("PQ", matches, pq)


def compare(before: Scores, after: Scores) -> pd.DataFrame:
    """What changed between two sets of scores of the same images, with 95 % percentile intervals of the paired differences.

    Args:
        before: of ``resampled_scores``.
        after: of the same ``image_weights``.

    Returns:
        One row a metric and class: metric, of, before, after, difference, low, high, verdict. The verdict is ``better`` or
        ``worse`` where the interval leaves out 0, ``unchanged`` where no sample differs, else ``cannot tell``.
    """
    rows = []
    for key in before:
        difference = after[key] - before[key]
        low, high = interval(difference[1:])
        rows.append((*key, before[key][0], after[key][0], difference[0], low, high, _verdict(difference[0], low, high)))
    return pd.DataFrame(rows, columns=["metric", "of", "before", "after", "difference", "low", "high", "verdict"])


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile; NaN where over 5 % of the values are undefined.

    Such is a class that stands in fewer than about three images: so few cannot tell how much images differ.
    """
    defined = values[~np.isnan(values)]
    enough = len(defined) >= MOST * len(values) > 0
    return tuple(np.percentile(defined, INTERVAL).tolist()) if enough else (math.nan, math.nan)


def _verdict(difference: float, low: float, high: float) -> str:
    if abs(difference) < ALIKE and abs(low) < ALIKE and abs(high) < ALIKE:
        return "unchanged"
    if low > ALIKE:
        return "better"
    return "worse" if high < -ALIKE else "cannot tell"


def _with_mean(metric: str, matches: Matches, per_class: np.ndarray) -> Scores:
    names = matches.class_names.values()
    scores = {(metric, "all"): _mean_of_defined(per_class)}
    return scores | {(metric, name): per_class[:, k] for k, name in enumerate(names)}


def _mean_of_defined(per_class: np.ndarray) -> np.ndarray:
    """The mean of each row's defined values, NaN where none is."""
    defined = ~np.isnan(per_class)
    with np.errstate(invalid="ignore"):
        return np.where(defined, per_class, 0).sum(1) / defined.sum(1)
