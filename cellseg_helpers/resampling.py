"""Two halves of a run's images (settings are chosen on one and tested on the other), and intervals
of scores by bootstrap over images or patients. No torch.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student_t

from cellseg_helpers import metrics
from cellseg_helpers.cells import Cells
from cellseg_helpers.data.splits import make_split
from cellseg_helpers.runs import RunError, read_json, write_json

FEWEST_IMAGES = 5  # (or patients) fewer do not show how much they vary
ALIKE = 1e-4  # smaller differences of two scores count as none
RESAMPLES = 1000  # bootstrap samples of a saved score
SEED = 0  # of these samples


class Scores(NamedTuple):
    """Scores on some images and on B bootstrap samples of them.

    Attributes:
        values: (metric, group) -> float64 [1 + B], the first on the images themselves. A group is
            ``all``, a class or an area.
        images: group -> number of images that hold such a cell; ``all`` -> number of all images.
    """

    values: dict[tuple[str, str], np.ndarray]
    images: dict[str, int]


class Draw(NamedTuple):
    """B bootstrap samples of the I images of a truth.

    Attributes:
        weights: int [1 + B, I], how often each image occurs in each sample; row 0 is all ones.
        unit: what was sampled: ``images``, or ``patients`` with all their images.
        units: number of images or patients.
    """

    weights: np.ndarray
    unit: str
    units: int


class SavedScores(NamedTuple):
    """A run's AP50 and its bootstrap values, as ``scores.json`` holds them.

    Attributes:
        max_dets: the limit of detections: the last one of ``metrics.dense_max_dets``.
        unit, units: as in ``Draw``.
        names: the validation images' file names, in the order of the truth.
        resamples, seed: number B of bootstrap samples, and the seed that drew them.
        AP50: 1 + B values in 0..1, means over the classes that have a cell; the first is the run's
            own; None for a sample without any cell.
    """

    max_dets: int
    unit: str
    units: int
    names: list[str]
    resamples: int
    seed: int
    AP50: list[float | None]


class Half(NamedTuple):
    """Some images of a run: their truth and detections, with the run's image ids."""

    truth: dict[str, Any]
    detections: Cells


def halve(truth: dict[str, Any], detections: Cells, seed: int) -> tuple[Half, Half, str]:
    """Two random halves of the images with about the same share of every class, and a sentence
    about them. No patient is in both if every image's patient is known and there are several.

    Raises:
        ValueError: fewer than two images.
    """
    images = truth["images"]
    if len(images) < 2:
        raise ValueError(
            f"{len(images)} image is too few to choose on one half and judge on the other; "
            "take a run with two or more"
        )
    ids = [image["id"] for image in images]
    classes = [category["id"] for category in truth["categories"]]
    cells = pd.DataFrame(truth["annotations"], columns=["image_id", "category_id"])
    counts = pd.crosstab(cells["image_id"], cells["category_id"])
    counts = counts.reindex(index=ids, columns=classes, fill_value=0).to_numpy(int)
    patients = [image.get("patient") for image in images]
    split = make_split([str(number) for number in ids], counts, patients, "auto", 0.5, seed)
    halves, sizes = [], []
    for names in (split.train, split.validation):
        half_ids = {int(name) for name in names}
        images = [image for image in truth["images"] if image["id"] in half_ids]
        cells = [cell for cell in truth["annotations"] if cell["image_id"] in half_ids]
        detected = detections[np.isin(detections.image_ids, list(half_ids))]
        halves.append(Half({**truth, "images": images, "annotations": cells}, detected))
        size, patients = f"{len(images)} images", {image.get("patient") for image in images}
        if None not in patients:
            size += f" of {len(patients)} patient{'s' if len(patients) > 1 else ''}"
        sizes.append(size)
    rule = "no patient in both" if split.kind == "patient" else "drawn by image"
    return *halves, f"{sizes[0]} to choose on and {sizes[1]} to judge on ({rule})."


def draw_images(images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image occurs in each bootstrap sample: int [1 + resamples, images]. The first
    row is all ones: the images themselves.

    >>> draw_images(images=4, resamples=2, seed=0)
    array([[1, 1, 1, 1],
           [1, 0, 0, 3],
           [0, 2, 2, 0]])
    """
    rng, chances = np.random.default_rng(seed), np.full(images, 1 / images)
    return np.concatenate([np.ones((1, images), int), rng.multinomial(images, chances, resamples)])


def draw_units(truth: dict[str, Any], resamples: int = RESAMPLES, seed: int = SEED) -> Draw:
    """Bootstrap samples of patients if every image's patient is known and there are five or more;
    otherwise of images. (Images of one patient are alike: samples of images vary too little.)
    """
    patients = [image.get("patient") for image in truth["images"]]
    names = sorted(set(patients) - {None})
    if None in patients or len(names) < FEWEST_IMAGES:
        return Draw(draw_images(len(patients), resamples, seed), "images", len(patients))
    columns = [names.index(patient) for patient in patients]
    return Draw(draw_images(len(names), resamples, seed)[:, columns], "patients", len(names))


def bootstrap_ap50(
    truth: dict[str, Any], detections: Cells, image_weights: np.ndarray
) -> np.ndarray:
    """AP50 for each row of weights [1 + B, I], as the mean over the classes that have a cell, at
    the last limit of ``metrics.dense_max_dets``: float64 [1 + B], rounded to 6 digits.

    Equals AP50 on a data set in which image i is repeated ``weight[i]`` times.
    """
    matches, limit = metrics.match_detections(truth, detections), metrics.dense_max_dets(truth)[-1]
    return _mean_of_defined(metrics.average_precision(matches, image_weights, limit)).round(6)


def score_run(truth: dict[str, Any], detections: Cells) -> SavedScores:
    """A run's AP50 and its bootstrap values; equal truth and detections give equal values."""
    draw, limit = draw_units(truth), metrics.dense_max_dets(truth)[-1]
    values = bootstrap_ap50(truth, detections, draw.weights).tolist()
    values = [None if math.isnan(value) else value for value in values]
    names = [image["file_name"] for image in truth["images"]]
    return SavedScores(limit, draw.unit, draw.units, names, RESAMPLES, SEED, values)


def save_scores(scores: SavedScores, path: Path) -> None:
    """Write a run's ``scores.json``, whole or not at all."""
    write_json(path, scores._asdict(), indent=None)


def load_scores(path: Path) -> SavedScores:
    """Read a run's ``scores.json``.

    Raises:
        FileNotFoundError: there is no such file.
        RunError: it cannot be read, or does not hold what ``save_scores`` writes.
    """
    try:
        scores = SavedScores(**read_json(path))
        if len(scores.AP50) == 1 + scores.resamples:
            return scores
    except TypeError:
        pass
    raise RunError(f"{path} does not hold the scores of a run; delete it and run 03_evaluate again")


def bootstrap_summary(
    truth: dict[str, Any], detections: Cells, image_weights: np.ndarray, max_dets: Sequence[int]
) -> dict[str, np.ndarray]:
    """COCO's 12 summary lines, named as in ``metrics.summarize``, on the images and on B bootstrap
    samples of them: each float64 [1 + B]; NaN where no cell is annotated.

    ``image_weights``: [1 + B, I], as ``Draw.weights``. ``max_dets``: three rising limits, used as
    in ``metrics.summarize``.
    """
    areas_px = ((0, math.inf), *metrics.COCO_AREAS_PX.values())
    average, recall = {}, {}
    for area, area_px in zip(("", "s", "m", "l"), areas_px, strict=True):
        at_ious = [
            metrics.match_detections(truth, detections, iou, area_px) for iou in metrics.COCO_IOUS
        ]
        per_class = [metrics.average_precision(m, image_weights, max_dets[-1]) for m in at_ious]
        average[f"AP{area}"] = _mean_of_defined(np.stack(per_class))
        limits = max_dets[-1:] if area else max_dets
        for limit in limits:
            limited = [metrics.limit_detections(matches, limit) for matches in at_ious]
            recalls = [_mean_recall(matches, image_weights) for matches in limited]
            recall[f"AR{area or limit}"] = np.mean(recalls, axis=0)
    # By area [IoU thresholds 0.5, 0.55 .. 0.95, 1 + B]: row 0 is AP50, row 5 AP75.
    means = {name: by_iou.mean(0) for name, by_iou in average.items()}
    lines = {"AP": means.pop("AP"), "AP50": average["AP"][0], "AP75": average["AP"][5]}
    return lines | means | recall


def resampled_scores(
    truth: dict[str, Any], detections: Cells, image_weights: np.ndarray, score_threshold: float = 0
) -> Scores:
    """Scores of detections on the images and on bootstrap samples of them.

    Args:
        image_weights: [1 + B, I], from ``draw_images``.
        score_threshold: precision, recall, F1 and PQ count the detections with at least this score.

    Returns:
        Metrics: AP50 and AP75 (COCO's, at the last limit of ``metrics.dense_max_dets``); precision,
        recall, F1 and PQ at mask IoU 0.5. Groups: ``all``, each class, and for AP50 the areas
        small, medium and large. For ``all``, AP and PQ are means over the classes that have a cell;
        precision, recall and F1 come from the sums of the classes' counts. PQ is panoptic quality,
        the sum of the matched pairs' IoU / (tp + fp / 2 + fn / 2) (Kirillov et al., "Panoptic
        segmentation", 2019), from the sums over all images. Undefined values are NaN.
    """
    limit = metrics.dense_max_dets(truth)[-1]
    at_50, at_75 = (metrics.match_detections(truth, detections, iou) for iou in (0.5, 0.75))
    values, images = count_scores(at_50, image_weights, score_threshold)
    averages = {}
    for metric, matches in {"AP50": at_50, "AP75": at_75}.items():
        per_class = metrics.average_precision(matches, image_weights, limit)
        averages |= _with_mean(metric, matches, per_class)
    for area, area_px in metrics.COCO_AREAS_PX.items():
        matches = metrics.match_detections(truth, detections, 0.5, area_px)
        per_class = metrics.average_precision(matches, image_weights, limit)
        averages["AP50", area] = _mean_of_defined(per_class)
        images[area] = matches.truths.query("counted")["image_id"].nunique()
    return Scores(averages | values, images)


def count_scores(
    matches: metrics.Matches, image_weights: np.ndarray, score_threshold: float = 0.0
) -> Scores:
    """Precision, recall, F1 and PQ as in ``resampled_scores``, of the detections that score at
    least ``score_threshold``.
    """
    counts = metrics.count_by_image(matches, score_threshold)
    names = ("all", *matches.class_names.values())  # the columns of the ratios below
    images_of_class = (counts[0] + counts[2] > 0).sum(0).tolist()  # tp + fn: the class's cells
    images = dict(zip(names, (len(matches.image_ids), *images_of_class), strict=True))
    tp, fp, fn, iou_sum = image_weights @ counts
    with np.errstate(invalid="ignore", divide="ignore"):
        pq = np.where(tp + fn > 0, iou_sum / (tp + fp / 2 + fn / 2), np.nan)
        tp, fp, fn = (np.column_stack([table.sum(1), table]) for table in (tp, fp, fn))
        ratios = {"precision": tp / (tp + fp), "recall": tp / (tp + fn)}
        ratios["F1"] = 2 * tp / (2 * tp + fp + fn)
    values = {}
    for metric, ratio in ratios.items():
        values |= {(metric, name): column for name, column in zip(names, ratio.T, strict=True)}
    return Scores(values | _with_mean("PQ", matches, pq), images)


def compare(before: Scores, after: Scores) -> pd.DataFrame:
    """Compare two sets of scores of the same images and weights, with 95 % intervals of the paired
    differences (``interval``).

    Returns:
        One row per metric and group: metric, of (the group), before, after, difference, low, high,
        verdict. The verdict is ``unchanged`` if difference, low and high are all within 0.0001 of
        0; else ``better`` or ``worse`` if the interval leaves out 0; else ``cannot tell``.
    """
    rows = []
    for (metric, group), old in before.values.items():
        new = after.values[metric, group]
        low, high = interval((new - old)[1:], before.images[group])
        rows.append((metric, group, old[0], new[0], new[0] - old[0], low, high))
    columns = ["metric", "of", "before", "after", "difference", "low", "high"]
    table = pd.DataFrame(rows, columns=columns)
    moved = (table[["low", "high"]].abs() >= ALIKE).any(axis=1)  # False where an end is NaN
    alike = (table["difference"].abs() < ALIKE) & ~moved
    verdicts = {"unchanged": alike, "better": table["low"] > 0, "worse": table["high"] < 0}
    return table.assign(verdict=np.select(list(verdicts.values()), list(verdicts), "cannot tell"))


def interval(values: np.ndarray, images: int) -> tuple[float, float]:
    """The expanded percentile interval (95 %) of bootstrap values; NaN for fewer than five images.

    Bootstrap samples of n images vary less than samples of n new images would. Therefore wider
    percentiles are taken, Phi(sqrt(n / (n - 1)) t) and its complement, where t is the 2.5 % point
    of Student's distribution with n - 1 degrees of freedom (Hesterberg, "What teachers should know
    about the bootstrap", 2015).
    """
    defined = values[~np.isnan(values)]
    if images < FEWEST_IMAGES or not len(defined):
        return math.nan, math.nan
    tail = 100 * norm.cdf(math.sqrt(images / (images - 1)) * student_t.ppf(0.025, images - 1))
    return tuple(np.percentile(defined, (tail, 100 - tail)).tolist())


def _with_mean(
    metric: str, matches: metrics.Matches, per_class: np.ndarray
) -> dict[tuple[str, str], np.ndarray]:
    """A metric's values [1 + B, K] by (metric, class name), and their mean as (metric, "all")."""
    columns = zip(matches.class_names.values(), per_class.T, strict=True)
    return {(metric, "all"): _mean_of_defined(per_class)} | {(metric, n): v for n, v in columns}


def _mean_recall(matches: metrics.Matches, image_weights: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that have a cell: float64 [1 + B]."""
    tp, _, fn, _ = image_weights @ metrics.count_by_image(matches)
    with np.errstate(invalid="ignore"):
        return _mean_of_defined(tp / (tp + fn))


def _mean_of_defined(per_class: np.ndarray) -> np.ndarray:
    """The mean along the last axis of the values that are not NaN; NaN if all are."""
    return np.ma.masked_invalid(per_class).mean(-1).filled(np.nan)
