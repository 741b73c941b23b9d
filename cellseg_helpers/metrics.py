"""Scores of detections against truth, a COCO data set: average precision, curves, matches.

hotcoco evaluates and matches; its oracle in the tests is pycocotools. What it lacks stands in this
file: average precision of resampled images, and counts by image. No torch.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import pandas as pd
from pycocotools import mask as coco_mask

from cellseg_helpers.cells import Cells

COCO_MAX_DETS = (1, 10, 100)
COCO_IOUS = np.linspace(0.5, 0.95, 10)
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_AREAS_PX = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}


class CocoScores(NamedTuple):
    """COCO's evaluation of masks at T = 10 IoU thresholds (``COCO_IOUS``), R = 101 recalls
    (``COCO_RECALLS``), K classes, A = 4 mask areas (all, then ``COCO_AREAS_PX``), M limits.

    Attributes:
        precision: float64 [T, R, K, A, M]; NaN where no cell is annotated.
        recall: float64 [T, K, A, M], the largest that is reached; NaN likewise.
        class_names: K names.
        max_dets: of each image and class so many detections count, the highest-scored.
    """

    precision: np.ndarray
    recall: np.ndarray
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
    """Counts of images (as ``Matches.image_ids``) and classes, int64 [I, K]; ``iou_sum`` of the
    matched pairs, float64 [I, K].
    """

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    iou_sum: np.ndarray


def check_detections(truth: dict[str, Any], detections: Cells) -> None:
    """Raises a ``ValueError`` for the first detection that does not fit the truth."""
    if not truth["images"]:
        raise ValueError("the truth holds no image: there is nothing to score detections against")
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
    classes = list(_class_names(truth))
    columns = (detections.image_ids, detections.labels, detections.sizes, detections.scores)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for row, (image_id, class_id, size, score) in enumerate(rows):
        own_size = sizes.get(image_id)
        if not own_size:
            fault = f"image {image_id}, which the truth does not have: are both of one split?"
        elif class_id not in classes:
            fault = f"class {class_id}; the truth has the classes {classes}"
        elif size != own_size:
            fault = (
                f"size {size}, its image {image_id} of {own_size} (height, width): "
                "predict at the original image's size"
            )
        elif not math.isfinite(score):
            fault = f"score {score}"
        else:
            continue
        raise ValueError(f"detection {row} is of {fault}")


def dense_max_dets(truth: dict[str, Any]) -> tuple[int, int, int]:
    """COCO's limits, the last raised to the cells of the fullest image, rounded up to hundreds.

    It depends on the truth alone, so that all models on one split are scored with the same limit.
    """
    cells = pd.Series([cell["image_id"] for cell in truth["annotations"]]).value_counts()
    return (*COCO_MAX_DETS[:2], 100 * math.ceil(cells.max() / 100) if len(cells) else 100)


def score_coco(
    truth: dict[str, Any], detections: Cells, max_dets: Sequence[int] = COCO_MAX_DETS
) -> CocoScores:
    """COCO's mask evaluation, by hotcoco (the numbers are pycocotools').

    A detection's area is its mask's. (pycocotools takes the box's if a result has a ``bbox``, which
    moves false positives between the area ranges; so boxes are left out.)

    Raises:
        ValueError: a detection does not fit the truth, or ``max_dets`` does not rise from above 0.
    """
    if not len(max_dets) or (np.diff(max_dets, prepend=0) <= 0).any():
        rule = f"it must be rising numbers above 0 such as {COCO_MAX_DETS}"
        raise ValueError(f"max_dets is {tuple(max_dets)}; {rule}")
    limits = [int(limit) for limit in max_dets]
    evaluation = _evaluate(truth, detections, detections.to_rles(), max_dets=limits)
    evaluation.accumulate()
    arrays = [evaluation.eval[name] for name in ("precision", "recall")]
    precision, recall = (np.where(array < 0, np.nan, array) for array in arrays)
    return CocoScores(precision, recall, list(_class_names(truth).values()), tuple(limits))


def at_max_dets(scores: CocoScores, max_dets: Sequence[int]) -> CocoScores:
    """The same scores with some of their ``max_dets`` only."""
    limits = [scores.max_dets.index(limit) for limit in max_dets]
    precision, recall = scores.precision[..., limits], scores.recall[..., limits]
    return scores._replace(precision=precision, recall=recall, max_dets=tuple(max_dets))


def summarize(scores: CocoScores) -> dict[str, float]:
    """COCO's 12 lines: AP, AP50, AP75, APs, APm, APl, AR at each of ``max_dets`` (AR1, AR10,
    AR100), ARs, ARm, ARl.

    AP is the mean precision over recalls, classes and IoU thresholds (AP50, AP75: one threshold),
    AR the mean recall over classes and IoU thresholds; all but the first two AR at the last of
    ``max_dets``. Classes without a cell do not count; NaN where none is left.
    """
    precision, recall, areas = scores.precision[..., -1], scores.recall, ("s", "m", "l")
    lines = {"AP": precision[..., 0], "AP50": precision[0, ..., 0], "AP75": precision[5, ..., 0]}
    lines |= {f"AP{area}": precision[..., a] for a, area in enumerate(areas, 1)}
    lines |= {f"AR{limit}": recall[:, :, 0, m] for m, limit in enumerate(scores.max_dets)}
    lines |= {f"AR{area}": recall[:, :, a, -1] for a, area in enumerate(areas, 1)}
    defined = {name: values[~np.isnan(values)] for name, values in lines.items()}
    return {n: float(values.mean()) if len(values) else math.nan for n, values in defined.items()}


def average_precision_per_class(scores: CocoScores) -> pd.DataFrame:
    """AP, AP50 and AP75 of each class (rows), all areas, at the last of ``max_dets``; NaN for a
    class without a cell.
    """
    rows = {}
    for k, name in enumerate(scores.class_names):
        of_class = {"precision": scores.precision[:, :, [k]], "recall": scores.recall[:, [k]]}
        rows[name] = summarize(scores._replace(**of_class))
    return pd.DataFrame(rows).T[["AP", "AP50", "AP75"]].rename_axis("class")


def precision_recall_curves(scores: CocoScores, iou_threshold: float = 0.5) -> pd.DataFrame:
    """The curve behind each class's average precision, all areas, at the last of ``max_dets``.

    Returns:
        101 rows a class: class, recall (0, 0.01 .. 1), precision (the largest at this recall or
        beyond, 0 where it is not reached, NaN for a class without a cell).

    Raises:
        ValueError: ``iou_threshold`` is none of ``COCO_IOUS``.
    """
    near = np.isclose(COCO_IOUS, iou_threshold)
    if not near.any():
        known = COCO_IOUS.round(2).tolist()
        raise ValueError(f"iou_threshold is {iou_threshold}; COCO evaluates at {known}")
    names = np.repeat(scores.class_names, len(COCO_RECALLS))
    recall = np.tile(COCO_RECALLS, len(scores.class_names))
    precision = scores.precision[near.argmax(), :, :, 0, -1].T.ravel()
    return pd.DataFrame({"class": names, "recall": recall, "precision": precision})


def match_detections(
    truth: dict[str, Any],
    detections: Cells,
    iou_threshold: float = 0.5,
    area_range_px: tuple[float, float] = (0, math.inf),
) -> Matches:
    """COCO's greedy matching of detections to cells of their image and class, by hotcoco.

    From the highest score down, each detection takes the cell of largest mask IoU that is still
    free, if this IoU is at least ``iou_threshold`` (``evaluateImg`` of pycocotools). A match
    depends on no lower-scored detection, so one table serves every score threshold.

    Args:
        truth: COCO data set with RLE masks.
        detections: of the truth's images.
        iou_threshold: the least mask IoU of a match.
        area_range_px: least and greatest mask area of the cells that count, both included; a
            detection takes a cell outside it only where none inside is free.

    Raises:
        ValueError: a detection does not fit the truth, or ``iou_threshold`` is not in (0, 1].
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; it must be above 0 and at most 1")
    cells, rles = truth["annotations"], detections.to_rles()
    limits = {"max_dets": [max(len(detections), 1)], "iou_thrs": [iou_threshold]}
    limits |= {"area_rng": [list(area_range_px)], "area_rng_lbl": ["counted"]}
    evaluation = _evaluate(truth, detections, rles, **limits)
    mask_of = {cell["id"]: cell["segmentation"] for cell in cells}
    matched, counted = np.zeros((2, len(detections)), bool)
    truth_id, iou = np.zeros(len(detections), int), np.zeros(len(detections))
    for part in filter(None, evaluation.eval_imgs):  # of one image and class
        rows, cell_ids = np.array(part["dtIds"], int) - 1, part["gtIds"]
        counted[rows] = np.logical_not(part["dtIgnore"][0])
        if len(rows) and cell_ids:
            matched[rows], truth_id[rows] = part["dtMatched"][0], part["dtMatches"][0]
            masks = [rles[row] for row in rows], [mask_of[cell_id] for cell_id in cell_ids]
            ious = coco_mask.iou(*masks, [0] * len(cell_ids))
            own = pd.Index(cell_ids).get_indexer(truth_id[rows])
            column = np.where(matched[rows], own, ious.argmax(1))
            iou[rows] = ious[np.arange(len(rows)), column]
    found = {"image_id": detections.image_ids, "class_id": detections.labels}
    found |= {"score": detections.scores, "area_px": detections.area_px}
    found |= {"matched": matched, "iou": iou}
    found |= {"truth_id": pd.Series(truth_id, dtype="Int64").where(matched), "counted": counted}
    columns = {"image_id": "image_id", "category_id": "class_id", "area": "area_px"}
    truths = pd.DataFrame(cells, columns=["id", *columns], dtype=int).set_index("id")
    truths = truths.rename(columns=columns).rename_axis("truth_id")
    finders = pd.DataFrame({"score": detections.scores, "detection": range(len(detections))})
    truths = truths.join(finders[matched].set_index(truth_id[matched]))
    truths["counted"] = truths["area_px"].between(*area_range_px)
    truths = truths.astype({"detection": "Int64"})
    image_ids = [image["id"] for image in truth["images"]]
    return Matches(pd.DataFrame(found), truths, _class_names(truth), iou_threshold, image_ids)


def count_matches(matches: Matches, score_threshold: float = 0.0) -> dict[str, Counts]:
    """Precision, recall and F1 of the detections that score at least ``score_threshold``: of
    ``"all"`` (the counts of the classes added up), then of each class by its name.
    """

    def ratio(part: int, whole: int) -> float:
        return part / whole if whole else math.nan

    totals = np.stack(count_by_image(matches, score_threshold)[:3]).sum(axis=1)  # [3, K]
    totals = np.column_stack([totals.sum(axis=1), totals]).T.tolist()
    ratios = [
        (ratio(tp, tp + fp), ratio(tp, tp + fn), ratio(2 * tp, 2 * tp + fp + fn))
        for tp, fp, fn in totals
    ]
    names = ("all", *matches.class_names.values())
    return {name: Counts(*n, *r) for name, n, r in zip(names, totals, ratios, strict=True)}


def count_by_image(matches: Matches, score_threshold: float = 0.0) -> ImageCounts:
    """What ``count_matches`` adds up: the counts of each image and class."""
    table = matches.detections
    found = table[table["counted"] & (table["score"] >= score_threshold)]
    right = found[found["matched"]]
    tp = _tally(matches, right).astype(int)
    fp = _tally(matches, found).astype(int) - tp
    fn = _tally(matches, matches.truths[matches.truths["counted"]]).astype(int) - tp
    return ImageCounts(tp, fp, fn, _tally(matches, right, "iou"))


def limit_detections(matches: Matches, max_dets: int) -> Matches:
    """The matches of the ``max_dets`` highest-scored detections of each image and class."""
    table = matches.detections.sort_values("score", ascending=False, kind="stable")
    rank = table.groupby(["image_id", "class_id"]).cumcount().sort_index()
    return matches._replace(detections=matches.detections[rank < max_dets])


def average_precision(matches: Matches, image_weights: np.ndarray | None = None) -> np.ndarray:
    """COCO's average precision of each class at the matches' IoU threshold, of any resampling of
    the images.

    Equals COCO's average precision, the oracle, on a data set in which image i is repeated
    ``weight[i]`` times (but for the order of equal scores).

    Args:
        matches: of ``match_detections``, or of ``limit_detections``.
        image_weights: number [B, I], one row a resampling, one column an image of
            ``matches.image_ids``; None = all once.

    Returns:
        float64 [B, K], classes in the order of ``matches.class_names``; NaN for a class without a
        cell.
    """
    images = len(matches.image_ids)
    weights = np.ones((1, images)) if image_weights is None else np.asarray(image_weights, float)
    table = matches.detections[matches.detections["counted"]]
    table = table.assign(image=_indices(matches.image_ids, table["image_id"]))
    table = table.sort_values(["score", "image"], ascending=[False, True], kind="stable")
    cells = weights @ _tally(matches, matches.truths[matches.truths["counted"]])
    average = np.where(cells > 0, 0.0, np.nan)
    for k, class_id in enumerate(matches.class_names):
        of_class = table[table["class_id"] == class_id]
        image, hits = of_class["image"].to_numpy(), np.flatnonzero(of_class["matched"])
        for row in np.flatnonzero(cells[:, k] > 0) if len(hits) else ():
            weight = weights[row, image]
            found = np.cumsum(weight[hits])  # the precision is largest where a cell was just found
            precision = found / (np.cumsum(weight)[hits] + np.spacing(1))
            envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
            at_recalls = np.searchsorted(found / cells[row, k], COCO_RECALLS)
            average[row, k] = envelope[at_recalls].mean()
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
    """
    matches = match_detections(truth, detections, iou_threshold)
    counts = {name: c._asdict() for name, c in count_matches(matches, score_threshold).items()}
    at = {"score_threshold": score_threshold, "iou_threshold": iou_threshold}
    at |= {"all": counts.pop("all"), "per_class": counts}
    found = {"images": len(truth["images"]), "cells": len(truth["annotations"])}
    found |= {"detections": len(detections)}
    dense = dense_max_dets(truth)
    scores = score_coco(truth, detections, sorted({*COCO_MAX_DETS, *dense}))
    for name, limits in (("coco", COCO_MAX_DETS), ("coco_dense", dense)):
        limited = at_max_dets(scores, limits)
        per_class = average_precision_per_class(limited).to_dict(orient="index")
        summary = summarize(limited)
        found[name] = {"max_dets": list(limits), "summary": summary, "per_class": per_class}
    return found | {"at_threshold": at}


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
    rows = {name: averages[name] | counts[name] for name in counts}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")
    return table[["AP", "AP50", "AP75", *at["all"]]]


def _evaluate(
    truth: dict[str, Any], detections: Cells, rles: list[dict[str, Any]], **parameters: Any
) -> hotcoco.COCOeval:
    """hotcoco's evaluation with some ``params`` set; a detection's id is its row + 1."""
    check_detections(truth, detections)
    columns = (detections.image_ids, detections.labels, detections.scores)
    rows = zip(*(column.tolist() for column in columns), rles, strict=True)
    names = ("image_id", "category_id", "score", "segmentation")
    coco = hotcoco.COCO(truth)
    found = coco.load_res([dict(zip(names, row, strict=True)) for row in rows])
    evaluation = hotcoco.COCOeval(coco, found, "segm")
    for name, value in parameters.items():
        setattr(evaluation.params, name, value)
    evaluation.evaluate()
    return evaluation


def _class_names(truth: dict[str, Any]) -> dict[int, str]:
    return dict(sorted((category["id"], category["name"]) for category in truth["categories"]))


def _indices(values: Sequence[int], column: pd.Series) -> np.ndarray:
    return pd.Index(list(values)).get_indexer(column)


def _tally(matches: Matches, table: pd.DataFrame, column: str | None = None) -> np.ndarray:
    """Rows, or the sum of a column, of each image and class: float64 [I, K]."""
    image = _indices(matches.image_ids, table["image_id"])
    class_index = _indices(matches.class_names, table["class_id"])
    totals = np.zeros((len(matches.image_ids), len(matches.class_names)))
    np.add.at(totals, (image, class_index), table[column] if column else 1)
    return totals
