"""Scores of detections against truth, a COCO data set: average precision, curves, matches.

hotcoco evaluates and matches; its oracle in the tests is pycocotools. What it lacks stands in this
file: average precision of resampled images, and counts by image. No torch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import pandas as pd
from pycocotools import mask as coco_mask

from cellseg_helpers.cells import Cells

COCO_MAX_DETS = (1, 10, 100)
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_AREAS_PX = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}


class CocoScores(NamedTuple):
    """COCO's evaluation of masks; NaN where no cell is annotated.

    T = 10 IoU thresholds (0.50, 0.55 .. 0.95), R = 101 recalls (0, 0.01 .. 1), K classes, A = 4
    area ranges (all, under 32^2, 32^2 to 96^2, above: px^2 of the mask in the original image), M
    limits of detections.

    Attributes:
        precision: float64 [T, R, K, A, M].
        recall: float64 [T, K, A, M], the largest that is reached.
        score: float64 [T, R, K, A, M], of the detection that reaches this recall, 0 where none
            does.
        iou_thresholds: float64 [T].
        recalls: float64 [R].
        class_names: K names.
        max_dets: M limits: of each image and class only so many detections, the highest-scored, are
            counted.
    """

    precision: np.ndarray
    recall: np.ndarray
    score: np.ndarray
    iou_thresholds: np.ndarray
    recalls: np.ndarray
    class_names: list[str]
    max_dets: tuple[int, ...]


class Matches(NamedTuple):
    """Which detection found which cell at one IoU threshold.

    Attributes:
        detections: one row a detection, in the given order: image_id, class_id, score, area_px,
            matched (bool), iou (with the cell it matched, otherwise the largest with any cell of
            its image and class), truth_id (missing if unmatched), counted (False where an area
            range leaves it out: it matched a cell outside, or none and lies outside itself).
        truths: one row a cell, indexed by annotation id: image_id, class_id, area_px, score (of the
            detection that matched it, NaN if none), detection (its row, missing if none), counted
            (in the area range).
        class_names: names by class id.
        iou_threshold: the least IoU of a match.
        image_ids: of the truth, in its order.
    """

    detections: pd.DataFrame
    truths: pd.DataFrame
    class_names: dict[int, str]
    iou_threshold: float
    image_ids: list[int]


class Counts(NamedTuple):
    """True and false positives, false negatives, and their ratios; a ratio of nothing is NaN."""

    tp: int
    fp: int
    fn: int
    precision: float
    recall: float
    f1: float


class ImageCounts(NamedTuple):
    """Counts of I images (rows, as ``Matches.image_ids``) and K classes (columns, as
    ``Matches.class_names``).

    Attributes:
        tp: int [I, K].
        fp: int [I, K].
        fn: int [I, K].
        iou_sum: float64 [I, K], of the matched pairs.
    """

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    iou_sum: np.ndarray


def check_detections(truth: Mapping[str, Any], detections: Cells) -> None:
    """Raises a ``ValueError`` for the first detection that does not fit ``truth``: its image, its
    class, its image's size, or a score that is no number.
    """
    if not truth["images"]:
        raise ValueError("the truth holds no image: there is nothing to score detections against")
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
    class_ids = sorted(category["id"] for category in truth["categories"])
    columns = (detections.image_ids, detections.labels, detections.sizes, detections.scores)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for row, (image_id, class_id, size, score) in enumerate(rows):
        if image_id not in sizes:
            raise ValueError(
                f"detection {row} is of image {image_id}, which the truth does not have: "
                "are both of one split?"
            )
        if class_id not in class_ids:
            raise ValueError(
                f"detection {row} is of class {class_id}; the truth has the classes {class_ids}"
            )
        if size != sizes[image_id]:
            raise ValueError(
                f"the mask of detection {row} is of size {size}, its image {image_id} of "
                f"{sizes[image_id]} (height, width): predict at the original image's size"
            )
        if not math.isfinite(score):
            raise ValueError(f"the score of detection {row} is {score}")


def dense_max_dets(truth: Mapping[str, Any]) -> tuple[int, int, int]:
    """COCO's limits with the last raised to the fullest image's number of cells, rounded up to a
    multiple of 100.

    It depends on the truth alone, so that all models on one split are scored with the same limit.
    """
    cells = pd.Series([cell["image_id"] for cell in truth["annotations"]]).value_counts()
    return (*COCO_MAX_DETS[:2], max(100, 100 * math.ceil(cells.max() / 100) if len(cells) else 0))


def score_coco(
    truth: dict[str, Any], detections: Cells, max_dets: Sequence[int] = COCO_MAX_DETS
) -> CocoScores:
    """COCO's mask evaluation, by hotcoco (the numbers are pycocotools').

    A detection's area is its mask's. (pycocotools takes the box's if a result has a ``bbox``, which
    moves false positives between the area ranges; so boxes are left out.)

    Raises:
        ValueError: a detection does not fit the truth (``check_detections``), or ``max_dets`` does
            not rise from above 0.
    """
    if not len(max_dets) or (np.diff(max_dets, prepend=0) <= 0).any():
        raise ValueError(
            f"max_dets is {tuple(max_dets)}; it must be rising numbers above 0 "
            f"such as {COCO_MAX_DETS}"
        )
    evaluation = _evaluation(truth, detections, detections.to_rles())
    evaluation.params.max_dets = [int(limit) for limit in max_dets]
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall, score = (evaluation.eval[key] for key in ("precision", "recall", "scores"))
    names = _class_names(truth)
    return CocoScores(
        precision=np.where(precision < 0, np.nan, precision),
        recall=np.where(recall < 0, np.nan, recall),
        score=np.where(precision < 0, np.nan, score),
        iou_thresholds=np.array(evaluation.params.iou_thrs),
        recalls=np.array(evaluation.params.rec_thrs),
        class_names=[names[class_id] for class_id in evaluation.params.cat_ids],
        max_dets=tuple(evaluation.params.max_dets),
    )


def _evaluation(
    truth: dict[str, Any], detections: Cells, rles: list[dict[str, Any]]
) -> hotcoco.COCOeval:
    """hotcoco's evaluation, to be configured and run; detection ids are rows + 1."""
    check_detections(truth, detections)
    columns = (detections.image_ids, detections.labels, detections.scores)
    rows = zip(*(column.tolist() for column in columns), rles, strict=True)
    names = ("image_id", "category_id", "score", "segmentation")
    coco = hotcoco.COCO(truth)
    found = coco.load_res([dict(zip(names, row, strict=True)) for row in rows])
    return hotcoco.COCOeval(coco, found, "segm")


def at_max_dets(scores: CocoScores, max_dets: Sequence[int]) -> CocoScores:
    """The same scores with some of their ``max_dets`` only."""
    limits = [scores.max_dets.index(limit) for limit in max_dets]
    parts = {name: getattr(scores, name)[..., limits] for name in ("precision", "recall", "score")}
    return scores._replace(**parts, max_dets=tuple(max_dets))


def summarize(scores: CocoScores) -> dict[str, float]:
    """COCO's 12 lines: AP, AP50, AP75, APs, APm, APl, AR at each of ``max_dets`` (AR1, AR10,
    AR100), ARs, ARm, ARl.

    AP is the mean precision over recalls, classes and IoU thresholds (AP50, AP75: one threshold),
    AR the mean recall over classes and IoU thresholds; all but the first two AR at the last of
    ``max_dets``. Classes without a cell do not count; NaN where none is left.
    """
    precision, areas = scores.precision[..., -1], ("s", "m", "l")
    lines = {"AP": precision[..., 0]}
    lines |= {f"AP{100 * t:.0f}": precision[_index(scores, t), ..., 0] for t in (0.5, 0.75)}
    lines |= {f"AP{area}": precision[..., a] for a, area in enumerate(areas, 1)}
    lines |= {f"AR{limit}": scores.recall[:, :, 0, m] for m, limit in enumerate(scores.max_dets)}
    lines |= {f"AR{area}": scores.recall[:, :, a, -1] for a, area in enumerate(areas, 1)}
    return {name: _mean(values) for name, values in lines.items()}


def average_precision_per_class(scores: CocoScores) -> pd.DataFrame:
    """AP, AP50 and AP75 of each class (rows), all areas, at the last of ``max_dets``; NaN for a
    class without a cell.
    """
    parts = {"AP": slice(None), "AP50": _index(scores, 0.5), "AP75": _index(scores, 0.75)}
    classes = range(len(scores.class_names))
    columns = {
        name: [_mean(scores.precision[part, :, k, 0, -1]) for k in classes]
        for name, part in parts.items()
    }
    return pd.DataFrame(columns, index=pd.Index(scores.class_names, name="class"))


def precision_recall_curves(scores: CocoScores, iou_threshold: float = 0.5) -> pd.DataFrame:
    """The curve behind each class's average precision, all areas, at the last of ``max_dets``.

    Returns:
        101 rows a class: class, recall (0, 0.01 .. 1), precision (the largest at this recall or
        beyond, 0 where it is not reached, NaN for a class without a cell), score (at which this
        recall is reached).

    Raises:
        ValueError: ``iou_threshold`` is none of ``scores.iou_thresholds``.
    """
    index, classes = _index(scores, iou_threshold), len(scores.class_names)
    return pd.DataFrame(
        {
            "class": np.repeat(scores.class_names, len(scores.recalls)),
            "recall": np.tile(scores.recalls, classes),
            "precision": scores.precision[index, :, :, 0, -1].T.ravel(),
            "score": scores.score[index, :, :, 0, -1].T.ravel(),
        }
    )


def match_detections(
    truth: dict[str, Any],
    detections: Cells,
    iou_threshold: float = 0.5,
    area_range_px: tuple[float, float] = (0, math.inf),
) -> Matches:
    """COCO's greedy matching of detections to cells of their image and class, by hotcoco.

    From the highest score down, each detection takes the cell of largest mask IoU that is still
    free, if this IoU is at least ``iou_threshold`` (``evaluateImg`` of pycocotools). A match
    depends on no lower-scored detection, so one table serves every score threshold: see
    ``count_matches``.

    Args:
        truth: COCO data set with RLE masks.
        detections: of the truth's images.
        iou_threshold: the least mask IoU of a match.
        area_range_px: least and greatest mask area of the cells that count, both included; a
            detection takes a cell outside it only where none inside is free.

    Raises:
        ValueError: a detection does not fit the truth (``check_detections``), or ``iou_threshold``
            is not in (0, 1].
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; it must be above 0 and at most 1")
    rles = detections.to_rles()
    evaluation = _evaluation(truth, detections, rles)
    evaluation.params.max_dets = [max(len(detections), 1)]
    evaluation.params.iou_thrs = [iou_threshold]
    evaluation.params.area_rng = [list(area_range_px)]
    evaluation.params.area_rng_lbl = ["counted"]
    evaluation.evaluate()
    cells = truth["annotations"]
    mask_of = {cell["id"]: cell["segmentation"] for cell in cells}
    matched, counted = np.zeros((2, len(detections)), bool)
    truth_id, iou = np.zeros(len(detections), int), np.zeros(len(detections))
    for part in filter(None, evaluation.eval_imgs):  # one an image and class
        rows, cell_ids = np.array(part["dtIds"], int) - 1, part["gtIds"]
        counted[rows] = np.logical_not(part["dtIgnore"][0])
        if len(rows) and cell_ids:
            matched[rows], truth_id[rows] = part["dtMatched"][0], part["dtMatches"][0]
            masks = [rles[row] for row in rows], [mask_of[cell_id] for cell_id in cell_ids]
            ious = coco_mask.iou(*masks, [0] * len(cell_ids))
            own = pd.Index(cell_ids).get_indexer(truth_id[rows])
            column = np.where(matched[rows], own, ious.argmax(1))
            iou[rows] = ious[np.arange(len(rows)), column]
    found = pd.DataFrame(
        {
            "image_id": detections.image_ids,
            "class_id": detections.labels,
            "score": detections.scores,
            "area_px": detections.area_px,
            "matched": matched,
            "iou": iou,
            "truth_id": pd.Series(truth_id, dtype="Int64").where(matched),
            "counted": counted,
        }
    )
    columns = {"image_id": "image_id", "category_id": "class_id", "area": "area_px"}
    truths = pd.DataFrame(cells, columns=["id", *columns], dtype=int).set_index("id")
    truths = truths.rename(columns=columns).rename_axis("truth_id")
    finders = pd.DataFrame({"score": detections.scores, "detection": range(len(detections))})
    truths = truths.join(finders[matched].set_index(truth_id[matched]))
    truths = truths.astype({"detection": "Int64"})
    truths["counted"] = truths["area_px"].between(*area_range_px)
    image_ids = [image["id"] for image in truth["images"]]
    return Matches(found, truths, _class_names(truth), iou_threshold, image_ids)


def count_matches(matches: Matches, score_threshold: float = 0.0) -> dict[str, Counts]:
    """Precision, recall and F1 of the detections that score at least ``score_threshold``:
    ``"all"``, then each class by its name.

    ``"all"`` adds up the counts of the classes.
    """
    totals = np.stack(count_by_image(matches, score_threshold)[:3]).sum(axis=1)  # [3, K]
    totals = np.column_stack([totals.sum(axis=1), totals]).T.tolist()
    names = ("all", *matches.class_names.values())
    return {name: _counts(*total) for name, total in zip(names, totals, strict=True)}


def count_by_image(matches: Matches, score_threshold: float = 0.0) -> ImageCounts:
    """What ``count_matches`` adds up: the counts of each image and class."""
    found = matches.detections.query("counted and score >= @score_threshold")
    right = found[found["matched"]]
    tp = _tally(matches, right).astype(int)
    fp = _tally(matches, found).astype(int) - tp
    fn = _tally(matches, matches.truths[matches.truths["counted"]]).astype(int) - tp
    return ImageCounts(tp, fp, fn, _tally(matches, right, "iou"))


def average_precision(
    matches: Matches, image_weights: np.ndarray | None = None, max_dets: int | None = None
) -> np.ndarray:
    """COCO's average precision of each class at the matches' IoU threshold, of any resampling of
    the images.

    Equals COCO's average precision, the oracle, on a data set in which image i is repeated
    weight[i] times (but for the order of equal scores).

    Args:
        matches: of ``match_detections``.
        image_weights: number [B, I], one row a resampling, one column an image of
            ``matches.image_ids``; None = all once.
        max_dets: of each image and class only so many detections, the highest-scored, are counted;
            None = all.

    Returns:
        float64 [B, K], classes in the order of ``matches.class_names``; NaN for a class without a
        cell.
    """
    images = len(matches.image_ids)
    weights = np.ones((1, images)) if image_weights is None else np.asarray(image_weights, float)
    table = matches.detections.assign(image=_image_index(matches, matches.detections))
    table = table.sort_values(["score", "image"], ascending=[False, True], kind="stable")
    if max_dets is not None:
        table = table[table.groupby(["image_id", "class_id"]).cumcount() < max_dets]
    table = table[table["counted"]]
    cells = weights @ _tally(matches, matches.truths[matches.truths["counted"]])
    columns = []
    for k, class_id in enumerate(matches.class_names):
        found = table[table["class_id"] == class_id]
        image, matched = found["image"].to_numpy(), found["matched"].to_numpy()
        columns.append(_weighted_precision(weights, cells[:, k], image, matched))
    return np.stack(columns, axis=1)


def _weighted_precision(
    weights: np.ndarray, cells: np.ndarray, image: np.ndarray, matched: np.ndarray
) -> np.ndarray:
    """Mean over COCO's 101 recalls of the largest precision at this recall or beyond.

    Args:
        weights: float64 [B, I].
        cells: float64 [B], the weighted number of cells.
        image: int [D], column of each detection's image, by descending score.
        matched: bool [D].

    Returns:
        float64 [B], NaN where there are no cells.
    """
    average = np.where(cells > 0, 0.0, np.nan)
    hits = np.flatnonzero(matched)  # the precision is largest where a cell was just found
    for row in np.flatnonzero((cells > 0) & bool(len(hits))):
        weight = weights[row, image]
        found = np.cumsum(weight[hits])
        precision = found / (np.cumsum(weight)[hits] + np.spacing(1))
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
        average[row] = envelope[np.searchsorted(found / cells[row], COCO_RECALLS)].mean()
    return average


def evaluate(
    truth: dict[str, Any],
    detections: Cells,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
) -> dict[str, Any]:
    """Everything that a run's ``metrics.json`` holds.

    Args:
        truth: COCO data set with RLE masks.
        detections: of the truth's images; may be empty.
        score_threshold: for precision, recall and F1; 0 takes all detections.
        iou_threshold: for precision, recall and F1.

    Returns:
        ``images``, ``cells``, ``detections``: numbers of them. ``coco`` and ``coco_dense``:
        ``max_dets`` (the usual 1, 10, 100; ``dense_max_dets``), ``summary`` (the 12 lines),
        ``per_class`` (AP, AP50, AP75 by class name). ``at_threshold``: ``score_threshold``,
        ``iou_threshold``, ``all`` and ``per_class`` (tp, fp, fn, precision, recall, f1). Undefined
        is NaN.

    Raises:
        ValueError: as ``match_detections``.
    """
    matches = match_detections(truth, detections, iou_threshold)
    counts = {name: c._asdict() for name, c in count_matches(matches, score_threshold).items()}
    dense = dense_max_dets(truth)
    scores = score_coco(truth, detections, sorted({*COCO_MAX_DETS, *dense}))
    return {
        "images": len(truth["images"]),
        "cells": len(truth["annotations"]),
        "detections": len(detections),
        "coco": _coco_section(at_max_dets(scores, COCO_MAX_DETS)),
        "coco_dense": _coco_section(at_max_dets(scores, dense)),
        "at_threshold": {
            "score_threshold": score_threshold,
            "iou_threshold": iou_threshold,
            "all": counts.pop("all"),
            "per_class": counts,
        },
    }


def _coco_section(scores: CocoScores) -> dict[str, Any]:
    return {
        "max_dets": list(scores.max_dets),
        "summary": summarize(scores),
        "per_class": average_precision_per_class(scores).to_dict(orient="index"),
    }


def summary_table(metrics: dict[str, Any]) -> pd.DataFrame:
    """The 12 lines (rows; AR is the one at the largest limit) with the usual and with the dense
    ``max_dets`` (columns).
    """
    columns = {}
    for section in (metrics["coco"], metrics["coco_dense"]):
        last = section["max_dets"][-1]
        columns[f"maxDets {last}"] = pd.Series(section["summary"]).rename({f"AR{last}": "AR"})
    return pd.DataFrame(columns).rename_axis("metric")


def class_table(metrics: dict[str, Any]) -> pd.DataFrame:
    """All classes together and each class (rows): AP, AP50, AP75 at the dense ``max_dets``; tp ..
    f1 at the chosen thresholds.
    """
    section, at = metrics["coco_dense"], metrics["at_threshold"]
    averages = {"all": section["summary"]} | section["per_class"]
    counts = {"all": at["all"]} | at["per_class"]
    rows = {name: averages[name] | counts[name] for name in averages}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")
    return table[["AP", "AP50", "AP75", *Counts._fields]]


def _class_names(truth: dict[str, Any]) -> dict[int, str]:
    return dict(sorted((category["id"], category["name"]) for category in truth["categories"]))


def _index(scores: CocoScores, iou_threshold: float) -> int:
    near = np.isclose(scores.iou_thresholds, iou_threshold)
    if not near.any():
        known = scores.iou_thresholds.round(2).tolist()
        raise ValueError(f"iou_threshold is {iou_threshold}; COCO evaluates at {known}")
    return int(near.argmax())


def _mean(values: np.ndarray) -> float:
    """The mean of what is defined, NaN if nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def _image_index(matches: Matches, table: pd.DataFrame) -> np.ndarray:
    return pd.Index(matches.image_ids).get_indexer(table["image_id"])


def _tally(matches: Matches, table: pd.DataFrame, column: str | None = None) -> np.ndarray:
    """Rows, or the sum of a column, of each image and class: float64 [I, K]."""
    classes = pd.Index(list(matches.class_names))
    shape = len(matches.image_ids), len(classes)
    index = _image_index(matches, table), classes.get_indexer(table["class_id"])
    totals = np.zeros(shape)
    np.add.at(totals, index, table[column] if column else 1)
    return totals


def _counts(tp: int, fp: int, fn: int) -> Counts:
    def ratio(part: int, whole: int) -> float:
        return part / whole if whole else math.nan

    return Counts(
        tp, fp, fn, ratio(tp, tp + fp), ratio(tp, tp + fn), ratio(2 * tp, 2 * tp + fp + fn)
    )
