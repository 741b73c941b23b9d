"""Halves of a run's images to choose on and to judge on, and intervals of scores by bootstrap over images. No torch."""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student_t

from cellseg_helpers.analysis.metrics import (
    COCO_AREAS_PX,
    Matches,
    average_precision,
    count_by_image,
    dense_max_dets,
    match_detections,
)
from cellseg_helpers.data.splits import make_split

FEWEST_IMAGES = 5  # fewer cannot tell how much images differ
ALIKE = 1e-4  # smaller differences of two scores count as none


class Scores(NamedTuple):
    """Scores of some images and of bootstrap samples of them.

    Attributes:
        values: (metric, of) -> float64 [1 + B]; ``of`` is ``all``, a class or an area.
        images: of -> in how many images such a cell stands; for ``all`` the number of images.
    """

    values: dict[tuple[str, str], np.ndarray]
    images: dict[str, int]


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
    if len(images) < 2:
        raise ValueError(f"{len(images)} image is too few to choose on one half and judge on the other; take a run with two or more")
    place = {image["id"]: i for i, image in enumerate(images)}
    classes = {category["id"]: k for k, category in enumerate(truth["categories"])}
    counts = np.zeros((len(images), len(classes)), int)
    for cell in truth["annotations"]:
        counts[place[cell["image_id"]], classes[cell["category_id"]]] += 1
    drawn = make_split([str(image["id"]) for image in images], counts, [image.get("patient") for image in images], split, 0.5, seed)
    first, second = (part_of(truth, detections, {int(image_id) for image_id in side}) for side in (drawn.train, drawn.validation))
    rule = "no patient in both" if drawn.kind == "patient" else "drawn by image"
    sides = [f"{len(half.truth['images'])} images{_patients(half)}" for half in (first, second)]
    return first, second, f"{sides[0]} to choose on and {sides[1]} to judge on ({rule})."


def _patients(half: Half) -> str:
    patients = {image.get("patient") for image in half.truth["images"]}
    return "" if None in patients else f" of {len(patients)} patient{'s' if len(patients) > 1 else ''}"


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
        Metrics: AP50, AP75 (COCO's, at the dense ``maxDets``), precision, recall, F1 and PQ at
        mask IoU 0.5. ``of``: ``all``, each class, and for AP50 the areas small, medium and large. AP and PQ of ``all`` are means
        over the classes that have a cell, precision, recall and F1 of ``all`` are of the added counts. PQ is panoptic quality, the
        sum of the matched pairs' IoU / (tp + fp / 2 + fn / 2) (Kirillov et al., "Panoptic segmentation", 2019), here of the counts
        of all images together. NaN where nothing is to be found.
    """
    limit = dense_max_dets(truth)[-1]
    matches = match_detections(truth, detections, 0.5)
    values = _with_mean("AP50", matches, average_precision(matches, image_weights, limit))
    at75 = match_detections(truth, detections, 0.75)
    values |= _with_mean("AP75", at75, average_precision(at75, image_weights, limit))
    counts = count_scores(matches, image_weights, score_threshold)
    images = dict(counts.images)
    for area, limits in COCO_AREAS_PX.items():
        of_area = match_detections(truth, detections, 0.5, limits)
        values["AP50", area] = _mean_of_defined(average_precision(of_area, image_weights, limit))
        images[area] = of_area.truths.loc[of_area.truths["counted"], "image_id"].nunique()
    return Scores(values | counts.values, images)


def count_scores(matches: Matches, image_weights: np.ndarray, score_threshold: float = 0.0) -> Scores:
    """Precision, recall, F1 and PQ as in ``resampled_scores``, of the detections that score at least ``score_threshold``."""
    by_image = count_by_image(matches, score_threshold)
    holds = (by_image.tp + by_image.fn > 0).sum(0).tolist()
    tp, fp, fn, iou_sum = (image_weights @ table for table in by_image)
    with np.errstate(invalid="ignore", divide="ignore"):
        pq = np.where(tp + fn > 0, iou_sum / (tp + fp / 2 + fn / 2), np.nan)
        tp, fp, fn = (np.column_stack([table.sum(1), table]) for table in (tp, fp, fn))
        ratios = {"precision": tp / (tp + fp), "recall": tp / (tp + fn), "F1": 2 * tp / (2 * tp + fp + fn)}
    names = ("all", *matches.class_names.values())
    values = {(metric, name): ratio[:, k] for metric, ratio in ratios.items() for k, name in enumerate(names)}
    images = dict(zip(names, (len(matches.image_ids), *holds), strict=True))
    return Scores(values | _with_mean("PQ", matches, pq), images)


def compare(before: Scores, after: Scores) -> pd.DataFrame:
    """What changed between two sets of scores of the same images, with 95 % intervals of the paired differences (``interval``).

    Args:
        before: of ``resampled_scores``.
        after: of the same ``image_weights``.

    Returns:
        One row a metric and class: metric, of, before, after, difference, low, high, verdict. The verdict is ``better`` or
        ``worse`` where the interval leaves out 0, ``unchanged`` where nothing differs by 0.0001, else ``cannot tell``.
    """
    rows = []
    for key, old in before.values.items():
        new = after.values[key]
        low, high = interval((new - old)[1:], before.images[key[1]])
        rows.append((*key, old[0], new[0], new[0] - old[0], low, high, _verdict(new[0] - old[0], low, high)))
    return pd.DataFrame(rows, columns=["metric", "of", "before", "after", "difference", "low", "high", "verdict"])


def interval(values: np.ndarray, images: int) -> tuple[float, float]:
    """The expanded percentile interval (95 %) of bootstrap values; NaN for fewer than five images.

    A bootstrap sample of n images varies less than n new images would. So the percentiles are taken farther out, at
    Phi(-sqrt(n / (n - 1)) t), with t the 2.5 % point of Student's distribution of n - 1 degrees of freedom (Hesterberg, "What
    teachers should know about the bootstrap", 2015).
    """
    defined = values[~np.isnan(values)]
    if images < FEWEST_IMAGES or not len(defined):
        return math.nan, math.nan
    tail = 100 * norm.cdf(math.sqrt(images / (images - 1)) * student_t.ppf(0.025, images - 1))
    return tuple(np.percentile(defined, (tail, 100 - tail)).tolist())


def _verdict(difference: float, low: float, high: float) -> str:
    if abs(difference) < ALIKE and not (abs(low) >= ALIKE or abs(high) >= ALIKE):  # an end may be NaN
        return "unchanged"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "cannot tell"


def _with_mean(metric: str, matches: Matches, per_class: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    names = matches.class_names.values()
    scores = {(metric, "all"): _mean_of_defined(per_class)}
    return scores | {(metric, name): per_class[:, k] for k, name in enumerate(names)}


def _mean_of_defined(per_class: np.ndarray) -> np.ndarray:
    """The mean of each row's defined values, NaN where none is."""
    defined = ~np.isnan(per_class)
    with np.errstate(invalid="ignore"):
        return np.where(defined, per_class, 0).sum(1) / defined.sum(1)
