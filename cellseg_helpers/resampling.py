"""Halves of a run's images, to choose on and to judge on; intervals of scores by bootstrap over
images or patients. No torch.
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

FEWEST_IMAGES = 5  # fewer cannot tell how much images differ
ALIKE = 1e-4  # smaller differences of two scores count as none
RESAMPLES = 1000  # bootstrap samples of a saved score
DRAW_SEED = 0  # of these samples


class Scores(NamedTuple):
    """Scores of some images and of B bootstrap samples of them.

    Attributes:
        values: (metric, of) -> float64 [1 + B]; ``of`` is ``all``, a class or an area.
        images: of -> number of images that hold such a cell; for ``all`` of all images.
    """

    values: dict[tuple[str, str], np.ndarray]
    images: dict[str, int]


class Draw(NamedTuple):
    """Bootstrap samples of the I images of a truth.

    Attributes:
        weights: int [1 + B, I], how often each image stands in each; first the images themselves.
        unit: what was drawn: ``images``, or ``patients`` with all their images.
        units: number of these.
    """

    weights: np.ndarray
    unit: str
    units: int


class SavedScores(NamedTuple):
    """A run's AP50 and its bootstrap values, as ``scores.json`` holds them.

    Attributes:
        max_dets: the dense limit.
        unit, units: as of ``Draw``.
        names: of the validation images, in the order of the truth.
        resamples, seed: B bootstrap samples, and of what seed.
        AP50: 1 + B values in 0..1, mean over the classes that have a cell; the first is the run's
            own; None without a cell.
    """

    max_dets: int
    unit: str
    units: int
    names: list[str]
    resamples: int
    seed: int
    AP50: list[float | None]


class Half(NamedTuple):
    """Some images of a run: its truth and its detections, image ids as they were."""

    truth: dict[str, Any]
    detections: Cells


def halve(truth: dict[str, Any], detections: Cells, seed: int) -> tuple[Half, Half, str]:
    """Two random halves of the images with about the same share of every class, and a sentence
    about them. No patient is in both, if every image's patient is known and there are several.

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
    drawn = make_split([str(number) for number in ids], counts, patients, "auto", 0.5, seed)
    halves, sizes = [], []
    for names in (drawn.train, drawn.validation):
        inside = {int(name) for name in names}
        images = [image for image in truth["images"] if image["id"] in inside]
        cells = [cell for cell in truth["annotations"] if cell["image_id"] in inside]
        found = detections[np.isin(detections.image_ids, list(inside))]
        halves.append(Half({**truth, "images": images, "annotations": cells}, found))
        size, patients = f"{len(images)} images", {image.get("patient") for image in images}
        if None not in patients:
            size += f" of {len(patients)} patient{'s' if len(patients) > 1 else ''}"
        sizes.append(size)
    rule = "no patient in both" if drawn.kind == "patient" else "drawn by image"
    return *halves, f"{sizes[0]} to choose on and {sizes[1]} to judge on ({rule})."


def draw_images(images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image stands in each bootstrap sample: int [1 + resamples, images]; the first
    row is the images themselves.

    >>> draw_images(images=4, resamples=2, seed=0)
    array([[1, 1, 1, 1],
           [1, 0, 0, 3],
           [0, 2, 2, 0]])
    """
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), resamples)
    return np.concatenate([np.ones((1, images), int), drawn])


def draw_units(truth: dict[str, Any], resamples: int = RESAMPLES, seed: int = DRAW_SEED) -> Draw:
    """Bootstrap samples of patients where every image's is known and there are five or more of
    them, else of images. (Images of one patient are alike: samples of images vary too little.)
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
    """AP50 at the dense ``maxDets``, mean over classes that have a cell, of each row of weights:
    float64 [1 + B], 6 digits.

    Equals AP50 on a data set in which image i is repeated ``weight[i]`` times, from one matching.
    """
    matches, limit = metrics.match_detections(truth, detections), metrics.dense_max_dets(truth)[-1]
    return _mean_of_defined(metrics.average_precision(matches, image_weights, limit)).round(6)


def score_run(truth: dict[str, Any], detections: Cells) -> SavedScores:
    """What ``scores.json`` holds; the same truth and detections give the same values."""
    draw, limit = draw_units(truth), metrics.dense_max_dets(truth)[-1]
    values = bootstrap_ap50(truth, detections, draw.weights).tolist()
    values = [None if math.isnan(value) else value for value in values]
    names = [image["file_name"] for image in truth["images"]]
    return SavedScores(limit, draw.unit, draw.units, names, RESAMPLES, DRAW_SEED, values)


def save_scores(scores: SavedScores, path: Path) -> None:
    """Write a run's ``scores.json``, whole or not at all."""
    write_json(path, scores._asdict(), indent=None)


def load_scores(path: Path) -> SavedScores:
    """Read a run's ``scores.json``.

    Raises:
        FileNotFoundError: there is none.
        RunError: not readable, or not what ``save_scores`` writes.
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
    """COCO's 12 lines, by the names of ``metrics.summarize``, of each row of weights, [1 + B, I]:
    float64 [1 + B]; NaN without such a cell.

    ``max_dets`` are three rising limits; the last is of all lines but the first two AR.
    """
    areas_px = ((0, math.inf), *metrics.COCO_AREAS_PX.values())
    average, recall = {}, {}
    for area, area_px in zip(("", "s", "m", "l"), areas_px, strict=True):
        of_ious = [
            metrics.match_detections(truth, detections, iou, area_px) for iou in metrics.COCO_IOUS
        ]
        per_class = [metrics.average_precision(m, image_weights, max_dets[-1]) for m in of_ious]
        average[f"AP{area}"] = _mean_of_defined(np.stack(per_class))
        for limit in max_dets[-1:] if area else max_dets:
            limited = [metrics.limit_detections(matches, limit) for matches in of_ious]
            recalls = [_mean_recall(matches, image_weights) for matches in limited]
            recall[f"AR{area or limit}"] = np.mean(recalls, axis=0)
    means = {name: of_ious.mean(0) for name, of_ious in average.items()}
    lines = {"AP": means.pop("AP"), "AP50": average["AP"][0], "AP75": average["AP"][5]}
    return lines | means | recall


def resampled_scores(
    truth: dict[str, Any], detections: Cells, image_weights: np.ndarray, score_threshold: float = 0
) -> Scores:
    """Scores of detections, as they are and of bootstrap samples of their images.

    Args:
        image_weights: of ``draw_images``, [1 + B, I].
        score_threshold: of the detections that count for precision, recall, F1 and PQ.

    Returns:
        Metrics: AP50, AP75 (COCO's, at the dense ``maxDets``), precision, recall, F1 and PQ at
        mask IoU 0.5. ``of``: ``all``, each class, and for AP50 the areas small, medium and large.
        AP and PQ of ``all`` are means over the classes that have a cell, precision, recall and F1
        of ``all`` are of the added counts. PQ is panoptic quality, the sum of the matched pairs'
        IoU / (tp + fp / 2 + fn / 2) (Kirillov et al., "Panoptic segmentation", 2019), of the counts
        of all images together. NaN where nothing is to be found.
    """
    limit = metrics.dense_max_dets(truth)[-1]
    matches, at_75 = (metrics.match_detections(truth, detections, iou) for iou in (0.5, 0.75))
    values, images = count_scores(matches, image_weights, score_threshold)
    averages = {}
    for metric, found in {"AP50": matches, "AP75": at_75}.items():
        per_class = metrics.average_precision(found, image_weights, limit)
        averages |= _with_mean(metric, matches, per_class)
    for area, area_px in metrics.COCO_AREAS_PX.items():
        of_area = metrics.match_detections(truth, detections, 0.5, area_px)
        per_class = metrics.average_precision(of_area, image_weights, limit)
        averages["AP50", area] = _mean_of_defined(per_class)
        images[area] = of_area.truths.query("counted")["image_id"].nunique()
    return Scores(averages | values, images)


def count_scores(
    matches: metrics.Matches, image_weights: np.ndarray, score_threshold: float = 0.0
) -> Scores:
    """Precision, recall, F1 and PQ as in ``resampled_scores``, of the detections that score at
    least ``score_threshold``.
    """
    counts = metrics.count_by_image(matches, score_threshold)
    names = ("all", *matches.class_names.values())
    holds = (counts[0] + counts[2] > 0).sum(0).tolist()
    images = dict(zip(names, (len(matches.image_ids), *holds), strict=True))
    tp, fp, fn, iou_sum = image_weights @ counts
    with np.errstate(invalid="ignore", divide="ignore"):
        pq = np.where(tp + fn > 0, iou_sum / (tp + fp / 2 + fn / 2), np.nan)
        tp, fp, fn = (np.column_stack([table.sum(1), table]) for table in (tp, fp, fn))
        ratios = {"precision": tp / (tp + fp), "recall": tp / (tp + fn)}
        ratios["F1"] = 2 * tp / (2 * tp + fp + fn)
    values = {(metric, n): of[:, k] for metric, of in ratios.items() for k, n in enumerate(names)}
    return Scores(values | _with_mean("PQ", matches, pq), images)


def compare(before: Scores, after: Scores) -> pd.DataFrame:
    """What changed between two sets of scores of the same images and weights, with 95 % intervals
    of the paired differences (``interval``).

    Returns:
        One row a metric and class: metric, of, before, after, difference, low, high, verdict. The
        verdict is ``better`` or ``worse`` where the interval leaves out 0, ``unchanged`` where
        nothing differs by 0.0001, else ``cannot tell``.
    """
    rows = []
    for (metric, of), old in before.values.items():
        new = after.values[metric, of]
        low, high = interval((new - old)[1:], before.images[of])
        rows.append((metric, of, old[0], new[0], new[0] - old[0], low, high))
    columns = ["metric", "of", "before", "after", "difference", "low", "high"]
    table = pd.DataFrame(rows, columns=columns)
    moved = (table[["low", "high"]].abs() >= ALIKE).any(axis=1)  # False where an end is NaN
    alike = (table["difference"].abs() < ALIKE) & ~moved
    verdicts = {"unchanged": alike, "better": table["low"] > 0, "worse": table["high"] < 0}
    return table.assign(verdict=np.select(list(verdicts.values()), list(verdicts), "cannot tell"))


def interval(values: np.ndarray, images: int) -> tuple[float, float]:
    """The expanded percentile interval (95 %) of bootstrap values; NaN for fewer than five images.

    A bootstrap sample of n images varies less than n new images would. So the percentiles are taken
    farther out, at Phi(-sqrt(n / (n - 1)) t), with t the 2.5 % point of Student's distribution of n
    - 1 degrees of freedom (Hesterberg, "What teachers should know about the bootstrap", 2015).
    """
    defined = values[~np.isnan(values)]
    if images < FEWEST_IMAGES or not len(defined):
        return math.nan, math.nan
    tail = 100 * norm.cdf(math.sqrt(images / (images - 1)) * student_t.ppf(0.025, images - 1))
    return tuple(np.percentile(defined, (tail, 100 - tail)).tolist())


def _with_mean(
    metric: str, matches: metrics.Matches, per_class: np.ndarray
) -> dict[tuple[str, str], np.ndarray]:
    columns = zip(matches.class_names.values(), per_class.T, strict=True)
    return {(metric, "all"): _mean_of_defined(per_class)} | {(metric, n): v for n, v in columns}


def _mean_recall(matches: metrics.Matches, image_weights: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that have a cell: float64 [1 + B]."""
    tp, _, fn, _ = image_weights @ metrics.count_by_image(matches)
    with np.errstate(invalid="ignore"):
        return _mean_of_defined(tp / (tp + fn))


def _mean_of_defined(per_class: np.ndarray) -> np.ndarray:
    """The mean of the defined values along the last axis, NaN where none is."""
    return np.ma.masked_invalid(per_class).mean(-1).filled(np.nan)
