"""Halves of a run's images to choose on and to judge on; intervals of scores by bootstrap over
images or patients. No torch.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student_t

from cellseg_helpers.cells import Cells
from cellseg_helpers.data.splits import make_split
from cellseg_helpers.metrics import (
    COCO_AREAS_PX,
    Matches,
    average_precision,
    count_by_image,
    dense_max_dets,
    match_detections,
)
from cellseg_helpers.runs import RunError, read_json, write_json

FEWEST_IMAGES = 5  # fewer cannot tell how much images differ
ALIKE = 1e-4  # smaller differences of two scores count as none
RESAMPLES = 1000  # bootstrap samples of a saved score
DRAW_SEED = 0  # of these samples
DIGITS = 6  # of a saved score
COCO_IOUS = np.linspace(0.5, 0.95, 10)


class Scores(NamedTuple):
    """Scores of some images and of bootstrap samples of them.

    Attributes:
        values: (metric, of) -> float64 [1 + B]; ``of`` is ``all``, a class or an area.
        images: of -> in how many images such a cell stands; for ``all`` the number of images.
    """

    values: dict[tuple[str, str], np.ndarray]
    images: dict[str, int]


class Draw(NamedTuple):
    """Bootstrap samples of the images of a truth.

    Attributes:
        weights: int [1 + B, I], how often each image stands in each; the first row is the images
            themselves.
        unit: what was drawn: ``images`` or ``patients``, of which all images are drawn together.
        units: number of these.
    """

    weights: np.ndarray
    unit: str
    units: int


class SavedScores(NamedTuple):
    """A run's AP50 with its bootstrap values, as ``scores.json`` holds it.

    Attributes:
        max_dets: the dense limit.
        unit: what was drawn, ``images`` or ``patients``.
        units: number of these.
        names: of the validation images, in the order of the truth.
        resamples: number B of bootstrap samples.
        seed: of these.
        AP50: 1 + B values in [0, 1], mean over the classes that have a cell; the first is the run's
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


def halve(
    truth: dict[str, Any], detections: Cells, seed: int, split: str = "auto"
) -> tuple[Half, Half, str]:
    """Two halves of the images with about the same share of every class, and a sentence about them.

    Args:
        truth: COCO data set.
        detections: of its images.
        seed: of the draw.
        split: ``patient`` (none in both halves), ``random`` (by image), or ``auto``: by patient
            where every image's is known.

    Raises:
        ValueError: as ``splits.make_split``; fewer than two images (or patients).
    """
    images = truth["images"]
    if len(images) < 2:
        raise ValueError(
            f"{len(images)} image is too few to choose on one half and judge on the other; take a run with two or more"
        )
    place = {image["id"]: i for i, image in enumerate(images)}
    classes = {category["id"]: k for k, category in enumerate(truth["categories"])}
    counts = np.zeros((len(images), len(classes)), int)
    for cell in truth["annotations"]:
        counts[place[cell["image_id"]], classes[cell["category_id"]]] += 1
    drawn = make_split(
        [str(image["id"]) for image in images],
        counts,
        [image.get("patient") for image in images],
        split,
        0.5,
        seed,
    )
    first, second = (
        part_of(truth, detections, {int(image_id) for image_id in side})
        for side in (drawn.train, drawn.validation)
    )
    rule = "no patient in both" if drawn.kind == "patient" else "drawn by image"
    sides = [f"{len(half.truth['images'])} images{_patients(half)}" for half in (first, second)]
    return first, second, f"{sides[0]} to choose on and {sides[1]} to judge on ({rule})."


def _patients(half: Half) -> str:
    patients = {image.get("patient") for image in half.truth["images"]}
    return (
        "" if None in patients else f" of {len(patients)} patient{'s' if len(patients) > 1 else ''}"
    )


def part_of(truth: dict[str, Any], detections: Cells, image_ids: set[int]) -> Half:
    """The truth and the detections of some images."""
    images = [image for image in truth["images"] if image["id"] in image_ids]
    cells = [cell for cell in truth["annotations"] if cell["image_id"] in image_ids]
    found = detections[np.isin(detections.image_ids, sorted(image_ids))]
    return Half({**truth, "images": images, "annotations": cells}, found)


def draw_images(images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image stands in each bootstrap sample: int [1 + resamples, images]; the first
    row is the images themselves.
    """
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), resamples)
    return np.concatenate([np.ones((1, images), int), drawn])


def draw_units(truth: dict[str, Any], resamples: int = RESAMPLES, seed: int = DRAW_SEED) -> Draw:
    """Bootstrap samples of patients where every image's is known and there are five or more of
    them, else of images.

    Images of one patient are alike, so that samples of images would vary too little.
    """
    patients = [image.get("patient") for image in truth["images"]]
    names = sorted(set(patients) - {None})
    if None in patients or len(names) < FEWEST_IMAGES:
        return Draw(draw_images(len(patients), resamples, seed), "images", len(patients))
    place = [names.index(patient) for patient in patients]
    return Draw(draw_images(len(names), resamples, seed)[:, place], "patients", len(names))


def bootstrap_ap50(
    truth: dict[str, Any], detections: Cells, image_weights: np.ndarray
) -> np.ndarray:
    """AP50 at the dense ``maxDets``, mean over classes that have a cell, of each row of weights:
    float64 [1 + B], 6 digits.

    Each is pycocotools' AP50 of the images written out as often as the row's weights say, from one
    matching of all of them.
    """
    per_class = average_precision(
        match_detections(truth, detections, 0.5), image_weights, dense_max_dets(truth)[-1]
    )
    return _mean_of_defined(per_class).round(DIGITS)


def score_run(truth: dict[str, Any], detections: Cells) -> SavedScores:
    """What ``scores.json`` holds; the same truth and detections give the same values."""
    draw = draw_units(truth)
    values = bootstrap_ap50(truth, detections, draw.weights).tolist()
    names = [image["file_name"] for image in truth["images"]]
    ap50 = [None if math.isnan(value) else value for value in values]
    return SavedScores(
        dense_max_dets(truth)[-1], draw.unit, draw.units, names, RESAMPLES, DRAW_SEED, ap50
    )


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
    truth: dict[str, Any],
    detections: Cells,
    image_weights: np.ndarray,
    max_dets: tuple[int, int, int],
) -> dict[str, np.ndarray]:
    """COCO's 12 lines of each row of weights.

    Args:
        truth: COCO data set.
        detections: of its images.
        image_weights: [1 + B, I], as of ``draw_units``.
        max_dets: three rising limits; the last is of all lines but the first two AR.

    Returns:
        The names of ``metrics.summarize`` -> float64 [1 + B]; NaN where no such cell is.
    """
    average, recall = {}, {}
    for area, limits in {
        "": (0, math.inf),
        **{name[0]: limits for name, limits in COCO_AREAS_PX.items()},
    }.items():
        of_ious = [match_detections(truth, detections, iou, limits) for iou in COCO_IOUS]
        average[area] = [
            _mean_of_defined(average_precision(matches, image_weights, max_dets[-1]))
            for matches in of_ious
        ]
        for limit in max_dets if not area else max_dets[-1:]:
            recall[area or limit] = np.mean(
                [_mean_recall(matches, image_weights, limit) for matches in of_ious], axis=0
            )
    lines = {f"AP{area}": np.mean(of_ious, axis=0) for area, of_ious in average.items()}
    lines |= {"AP50": average[""][0], "AP75": average[""][5]}
    lines |= {f"AR{name}": values for name, values in recall.items()}
    order = (
        "AP",
        "AP50",
        "AP75",
        "APs",
        "APm",
        "APl",
        *(f"AR{limit}" for limit in max_dets),
        "ARs",
        "ARm",
        "ARl",
    )
    return {name: lines[name] for name in order}


def resampled_scores(
    truth: dict[str, Any],
    detections: Cells,
    image_weights: np.ndarray,
    score_threshold: float = 0.0,
) -> Scores:
    """Scores of detections, as they are and of bootstrap samples of their images.

    Args:
        truth: COCO data set.
        detections: of its images.
        image_weights: of ``draw_images``, [1 + B, I].
        score_threshold: of the detections that count for precision, recall, F1 and PQ.

    Returns:
        Metrics: AP50, AP75 (COCO's, at the dense ``maxDets``), precision, recall, F1 and PQ at
        mask IoU 0.5. ``of``: ``all``, each class, and for AP50 the areas small, medium and large.
        AP and PQ of ``all`` are means over the classes that have a cell, precision, recall and F1
        of ``all`` are of the added counts. PQ is panoptic quality, the sum of the matched pairs'
        IoU / (tp + fp / 2 + fn / 2) (Kirillov et al., "Panoptic segmentation", 2019), here of the
        counts of all images together. NaN where nothing is to be found.
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


def count_scores(
    matches: Matches, image_weights: np.ndarray, score_threshold: float = 0.0
) -> Scores:
    """Precision, recall, F1 and PQ as in ``resampled_scores``, of the detections that score at
    least ``score_threshold``.
    """
    by_image = count_by_image(matches, score_threshold)
    holds = (by_image.tp + by_image.fn > 0).sum(0).tolist()
    tp, fp, fn, iou_sum = (image_weights @ table for table in by_image)
    with np.errstate(invalid="ignore", divide="ignore"):
        pq = np.where(tp + fn > 0, iou_sum / (tp + fp / 2 + fn / 2), np.nan)
        tp, fp, fn = (np.column_stack([table.sum(1), table]) for table in (tp, fp, fn))
        ratios = {
            "precision": tp / (tp + fp),
            "recall": tp / (tp + fn),
            "F1": 2 * tp / (2 * tp + fp + fn),
        }
    names = ("all", *matches.class_names.values())
    values = {
        (metric, name): ratio[:, k]
        for metric, ratio in ratios.items()
        for k, name in enumerate(names)
    }
    images = dict(zip(names, (len(matches.image_ids), *holds), strict=True))
    return Scores(values | _with_mean("PQ", matches, pq), images)


def compare(before: Scores, after: Scores) -> pd.DataFrame:
    """What changed between two sets of scores of the same images, with 95 % intervals of the paired
    differences (``interval``).

    Args:
        before: of ``resampled_scores``.
        after: of the same ``image_weights``.

    Returns:
        One row a metric and class: metric, of, before, after, difference, low, high, verdict. The
        verdict is ``better`` or ``worse`` where the interval leaves out 0, ``unchanged`` where
        nothing differs by 0.0001, else ``cannot tell``.
    """
    rows = []
    for key, old in before.values.items():
        new = after.values[key]
        low, high = interval((new - old)[1:], before.images[key[1]])
        rows.append(
            (*key, old[0], new[0], new[0] - old[0], low, high, _verdict(new[0] - old[0], low, high))
        )
    return pd.DataFrame(
        rows, columns=["metric", "of", "before", "after", "difference", "low", "high", "verdict"]
    )


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


def _verdict(difference: float, low: float, high: float) -> str:
    if abs(difference) < ALIKE and not (
        abs(low) >= ALIKE or abs(high) >= ALIKE
    ):  # an end may be NaN
        return "unchanged"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "cannot tell"


def _with_mean(
    metric: str, matches: Matches, per_class: np.ndarray
) -> dict[tuple[str, str], np.ndarray]:
    names = matches.class_names.values()
    scores = {(metric, "all"): _mean_of_defined(per_class)}
    return scores | {(metric, name): per_class[:, k] for k, name in enumerate(names)}


def _mean_recall(matches: Matches, image_weights: np.ndarray, max_dets: int) -> np.ndarray:
    """Recall of the highest-scored ``max_dets`` detections of each image and class, mean over the
    classes: float64 [1 + B].
    """
    table = matches.detections
    ranked = (
        table.sort_values("score", ascending=False, kind="stable")
        .groupby(["image_id", "class_id"])
        .cumcount()
    )
    counts = count_by_image(
        matches._replace(detections=table[ranked.reindex(table.index) < max_dets])
    )
    found, cells = image_weights @ counts.tp, image_weights @ (counts.tp + counts.fn)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _mean_of_defined(np.where(cells > 0, found / cells, np.nan))


def _mean_of_defined(per_class: np.ndarray) -> np.ndarray:
    """The mean of each row's defined values, NaN where none is."""
    defined = ~np.isnan(per_class)
    with np.errstate(invalid="ignore"):
        return np.where(defined, per_class, 0).sum(1) / defined.sum(1)
