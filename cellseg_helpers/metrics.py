"""Scores of detections: matches with the truth, precision, recall and COCO's average precision.

The truth is a COCO data set (a dict). hotcoco evaluates and matches; the tests compare it with
pycocotools. No torch.
"""

import math
from collections.abc import Sequence
from itertools import starmap
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import pandas as pd
from pycocotools import mask as coco_mask

from cellseg_helpers.cells import Cells

COCO_MAX_DETS = (1, 10, 100)  # limits of detections per image and class
COCO_IOUS = np.linspace(0.5, 0.95, 10)
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_AREAS_PX = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}


class CocoScores(NamedTuple):
    """COCO's evaluation of masks, for T = 10 IoU thresholds (``COCO_IOUS``), R = 101 recalls
    (``COCO_RECALLS``), K classes, A = 4 mask areas (all, then ``COCO_AREAS_PX``), M limits.

    Attributes:
        precision: float64 [T, R, K, A, M]; NaN where no cell is annotated.
        recall: float64 [T, K, A, M], the largest recall reached; NaN where no cell is annotated.
        class_names: K names.
        max_dets: M limits: numbers of highest-scored detections that count per image and class.
    """

    precision: np.ndarray
    recall: np.ndarray
    class_names: list[str]
    max_dets: tuple[int, ...]


class Matches(NamedTuple):
    """Which detection matches which cell at one IoU threshold.

    Attributes:
        detections: one row per detection, in the given order: image_id, class_id, score, area_px,
            matched (bool), iou (with the cell it matched, otherwise the largest with any cell of
            its image and class), truth_id (missing if unmatched), counted (False if it matched a
            cell outside the area range, or matched no cell and its own area is outside the range).
        truths: one row per cell, by annotation id: image_id, class_id, area_px, score and detection
            (score and row of the detection that matched it; missing if none), counted (whether its
            area is in the range).
        class_names: names by class id.
        iou_threshold: the least IoU of a match.
        image_ids: all images of the truth, in its order.
    """

    detections: pd.DataFrame
    truths: pd.DataFrame
    class_names: dict[int, str]
    iou_threshold: float
    image_ids: list[int]


class Counts(NamedTuple):
    """True positives, false positives, false negatives, and their ratios (NaN for 0 / 0)."""

    tp: int
    fp: int
    fn: int
    precision: float
    recall: float
    f1: float


def check_detections(truth: dict[str, Any], detections: Cells) -> None:
    """Raise a ``ValueError`` for the first detection that does not fit the truth."""
    if not truth["images"]:
        raise ValueError("the truth holds no image: there is nothing to score detections against")
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
    classes = list(_class_names(truth))
    columns = (detections.image_ids, detections.labels, detections.sizes, detections.scores)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for row, (image_id, class_id, size, score) in enumerate(rows):
        image_size = sizes.get(image_id)
        if not image_size:
            fault = f"image {image_id}, which the truth does not have: are both of one split?"
        elif class_id not in classes:
            fault = f"class {class_id}; the truth has the classes {classes}"
        elif size != image_size:
            fault = f"size {size}, its image {image_id} of {image_size} (height, width): "
            fault += "predict at the original image's size"
        elif not math.isfinite(score):
            fault = f"score {score}"
        else:
            continue
        raise ValueError(f"detection {row} is of {fault}")


def dense_max_dets(truth: dict[str, Any]) -> tuple[int, int, int]:
    """COCO's limits (1, 10, 100), the last raised to the number of cells in the fullest image,
    rounded up to a multiple of 100.
    """
    counts = pd.Series([cell["image_id"] for cell in truth["annotations"]]).value_counts()
    return (*COCO_MAX_DETS[:2], 100 * math.ceil(counts.max() / 100) if len(counts) else 100)


def score_coco(
    truth: dict[str, Any], detections: Cells, max_dets: Sequence[int] = COCO_MAX_DETS
) -> CocoScores:
    """COCO's mask evaluation, by hotcoco. The results equal those of pycocotools for detections
    without a ``bbox`` (if there is one, pycocotools uses the box's area as the mask's).

    Raises:
        ValueError: a detection does not fit the truth, or ``max_dets`` are not rising and above 0.
    """
    if not len(max_dets) or (np.diff(max_dets, prepend=0) <= 0).any():
        rule = f"it must be rising numbers above 0 such as {COCO_MAX_DETS}"
        raise ValueError(f"max_dets is {tuple(max_dets)}; {rule}")
    evaluation = _evaluate(truth, detections, max_dets=list(max_dets))
    evaluation.accumulate()
    arrays = [evaluation.eval[name] for name in ("precision", "recall")]
    precision, recall = (np.where(array < 0, np.nan, array) for array in arrays)
    return CocoScores(precision, recall, list(_class_names(truth).values()), tuple(max_dets))


def summarize(
    scores: CocoScores, max_dets: Sequence[int] | None = None, class_name: str | None = None
) -> dict[str, float]:
    """COCO's 12 summary lines: AP, AP50, AP75, APs, APm, APl, AR at each of ``max_dets`` (AR1,
    AR10, AR100), ARs, ARm, ARl.

    AP is the mean precision over recalls, classes and IoU thresholds (AP50, AP75: one threshold),
    AR the mean recall over classes and IoU thresholds. NaN where no cell is annotated.

    Args:
        max_dets: three rising limits of ``scores``. The first two are used only for AR1 and AR10,
            the third for every other line. None: all limits of ``scores``.
        class_name: the class to summarise; None: the mean over the classes that have a cell.
    """
    max_dets, areas = max_dets or scores.max_dets, ("s", "m", "l")
    limits = [scores.max_dets.index(limit) for limit in max_dets]
    classes = [k for k, name in enumerate(scores.class_names) if class_name in (None, name)]
    precision = scores.precision[:, :, classes][..., limits[-1]]  # [T, R, classes, A]
    recall = scores.recall[:, classes][..., limits]  # [T, classes, A, limits]
    lines = {"AP": precision[..., 0], "AP50": precision[0, ..., 0], "AP75": precision[5, ..., 0]}
    lines |= {f"AP{area}": precision[..., column] for column, area in enumerate(areas, 1)}
    lines |= {f"AR{limit}": recall[:, :, 0, column] for column, limit in enumerate(max_dets)}
    lines |= {f"AR{area}": recall[:, :, column, -1] for column, area in enumerate(areas, 1)}
    lines = {name: values[~np.isnan(values)] for name, values in lines.items()}
    return {line: float(one.mean()) if len(one) else math.nan for line, one in lines.items()}


def precision_recall_curves(scores: CocoScores, iou_threshold: float = 0.5) -> pd.DataFrame:
    """The precision-recall curve of each class, for all areas and the last of ``max_dets``.

    Returns:
        101 rows per class: class, recall (0, 0.01 .. 1), precision (the largest at this recall or
        above; 0 if the recall is not reached, NaN for a class without a cell).

    Raises:
        ValueError: ``iou_threshold`` is none of ``COCO_IOUS``.
    """
    is_threshold = np.isclose(COCO_IOUS, iou_threshold)
    if not is_threshold.any():
        known = COCO_IOUS.round(2).tolist()
        raise ValueError(f"iou_threshold is {iou_threshold}; COCO evaluates at {known}")
    names = np.repeat(scores.class_names, len(COCO_RECALLS))
    recall = np.tile(COCO_RECALLS, len(scores.class_names))
    precision = scores.precision[is_threshold.argmax(), :, :, 0, -1].T.ravel()
    return pd.DataFrame({"class": names, "recall": recall, "precision": precision})


def match_detections(
    truth: dict[str, Any],
    detections: Cells,
    iou_threshold: float = 0.5,
    area_range_px: tuple[float, float] = (0, math.inf),
) -> Matches:
    """COCO's greedy matching of detections to cells of their image and class, by hotcoco.

    From the highest score down, each detection is matched to the unmatched cell with which it has
    the largest mask IoU, if that is at least ``iou_threshold`` (``evaluateImg`` of pycocotools).
    Lower-scored detections do not change a match, so these matches serve for every score threshold.

    ``area_range_px``: least and greatest mask area of the cells that count; a detection is matched
    to a cell outside this range only if no unmatched cell inside it reaches ``iou_threshold``.

    Raises:
        ValueError: a detection does not fit the truth, or ``iou_threshold`` is not in (0, 1].
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; it must be above 0 and at most 1")
    parameters = {"max_dets": [max(len(detections), 1)], "iou_thrs": [iou_threshold]}
    parameters |= {"area_rng": [list(area_range_px)], "area_rng_lbl": ["counted"]}
    evaluation, rles = _evaluate(truth, detections, **parameters), detections.rles
    mask_of = {cell["id"]: cell["segmentation"] for cell in truth["annotations"]}
    matched, counted = np.zeros((2, len(detections)), bool)
    truth_id, iou = np.zeros(len(detections), int), np.zeros(len(detections))
    for part in filter(None, evaluation.eval_imgs):  # of one image and class
        rows, cell_ids = np.array(part["dtIds"], int) - 1, part["gtIds"]
        counted[rows] = np.logical_not(part["dtIgnore"][0])
        if len(rows) and cell_ids:
            matched[rows], truth_id[rows] = part["dtMatched"][0], part["dtMatches"][0]
            masks = [rles[row] for row in rows], [mask_of[cell_id] for cell_id in cell_ids]
            ious = coco_mask.iou(*masks, [0] * len(cell_ids))
            of_match = pd.Index(cell_ids).get_indexer(truth_id[rows])
            iou[rows] = ious[range(len(rows)), np.where(matched[rows], of_match, ious.argmax(1))]
    table = {"image_id": detections.image_ids, "class_id": detections.labels}
    table |= {"score": detections.scores, "area_px": detections.area_px}
    table |= {"matched": matched, "iou": iou}
    table |= {"truth_id": pd.Series(truth_id, dtype="Int64").where(matched), "counted": counted}
    keys = ["id", "image_id", "category_id", "area"]
    truths = pd.DataFrame(truth["annotations"], columns=keys, dtype=int)
    truths.columns = ["truth_id", "image_id", "class_id", "area_px"]
    matchers = pd.DataFrame({"score": detections.scores, "detection": range(len(detections))})
    truths = truths.set_index("truth_id").join(matchers[matched].set_index(truth_id[matched]))
    truths = truths.assign(counted=truths["area_px"].between(*area_range_px))
    truths = truths.astype({"detection": "Int64"})
    image_ids = [image["id"] for image in truth["images"]]
    return Matches(pd.DataFrame(table), truths, _class_names(truth), iou_threshold, image_ids)


def count_matches(matches: Matches, score_threshold: float = 0.0) -> dict[str, Counts]:
    """Precision, recall and F1 of the detections that score at least ``score_threshold``: for
    ``"all"`` (from the sums of the classes' counts), then for each class, by its name.
    """
    by_class = count_by_image(matches, score_threshold)[:3].sum(1).astype(int)
    counts = tp, fp, fn = np.column_stack([by_class.sum(1), by_class])  # column 0: all classes
    with np.errstate(invalid="ignore"):
        ratios = np.stack([tp / (tp + fp), tp / (tp + fn), 2 * tp / (2 * tp + fp + fn)])
    rows = zip(*counts.tolist(), *ratios.tolist(), strict=True)
    return dict(zip(("all", *matches.class_names.values()), starmap(Counts, rows), strict=True))


def count_by_image(matches: Matches, score_threshold: float = 0.0) -> np.ndarray:
    """True positives, false positives, false negatives and the sum of the matched pairs' IoU, for
    the detections that score at least ``score_threshold``: float64 [4, I, K], images in the order
    of ``matches.image_ids``, classes in that of ``matches.class_names``.
    """
    table = matches.detections
    positives = table[table["counted"] & (table["score"] >= score_threshold)]
    hits = positives[positives["matched"]]
    tp, cells = _tally(matches, hits), _tally(matches, matches.truths.query("counted"))
    fp, fn = _tally(matches, positives) - tp, cells - tp
    return np.stack([tp, fp, fn, _tally(matches, hits, "iou")])


def limit_detections(matches: Matches, max_dets: int) -> Matches:
    """The matches of the ``max_dets`` highest-scored detections of each image and class."""
    table = matches.detections.sort_values("score", ascending=False, kind="stable")
    rank = table.groupby(["image_id", "class_id"]).cumcount().sort_index()
    return matches._replace(detections=matches.detections[rank < max_dets])


def average_precision(
    matches: Matches, image_weights: np.ndarray | None = None, max_dets: int | None = None
) -> np.ndarray:
    """COCO's average precision of each class at the matches' IoU threshold, for B resamplings of
    the images.

    Equals COCO's average precision on a data set in which image i is repeated ``weight[i]`` times
    (except for the order of equal scores); the tests compare them.

    Args:
        image_weights: [B, I], one row per resampling, one column per image; None: each image once.
        max_dets: number of highest-scored detections that count per image and class; None: all.

    Returns:
        float64 [B, K], classes as in ``matches.class_names``; NaN for a class without a cell.
    """
    if max_dets is not None:
        matches = limit_detections(matches, max_dets)
    images = len(matches.image_ids)
    weights = np.ones((1, images)) if image_weights is None else np.asarray(image_weights, float)
    table = matches.detections[matches.detections["counted"]]
    table = table.assign(image=pd.Index(matches.image_ids).get_indexer(table["image_id"]))
    table = table.sort_values(["score", "image"], ascending=[False, True], kind="stable")
    cells = weights @ _tally(matches, matches.truths[matches.truths["counted"]])
    average = np.where(cells > 0, 0.0, np.nan)
    for k, class_id in enumerate(matches.class_names):
        of_class = table[table["class_id"] == class_id]
        image, hits = of_class["image"].to_numpy(), np.flatnonzero(of_class["matched"])
        for row in np.flatnonzero(cells[:, k] > 0):
            weight = weights[row, image]
            tp = np.cumsum(weight[hits])  # at each hit: only there can precision be largest
            precision = tp / (np.cumsum(weight)[hits] + np.spacing(1))
            envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
            at_recalls = np.searchsorted(tp / cells[row, k], COCO_RECALLS)
            average[row, k] = envelope[at_recalls].mean()
    return average


def evaluate(
    truth: dict[str, Any],
    detections: Cells,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
) -> dict[str, Any]:
    """Everything that a run's ``metrics.json`` holds; undefined values are NaN.

    Args:
        score_threshold: of the detections that count for precision, recall and F1; 0: all.
        iou_threshold: of their matches.

    Returns:
        ``images``, ``cells``, ``detections``: their numbers. ``coco`` (with COCO's limits) and
        ``coco_dense`` (with ``dense_max_dets``): ``max_dets``, ``summary`` (the 12 lines),
        ``per_class`` (AP, AP50, AP75 by class name). ``at_threshold``: ``score_threshold``,
        ``iou_threshold``, ``all`` and ``per_class`` (tp, fp, fn, precision, recall, f1).
    """
    matches = match_detections(truth, detections, iou_threshold)
    per_class = {k: row._asdict() for k, row in count_matches(matches, score_threshold).items()}
    at_threshold = {"score_threshold": score_threshold, "iou_threshold": iou_threshold}
    at_threshold |= {"all": per_class.pop("all"), "per_class": per_class}
    result = {"images": len(truth["images"]), "cells": len(truth["annotations"])}
    result |= {"detections": len(detections)}
    raised = dense_max_dets(truth)
    scores = score_coco(truth, detections, sorted({*COCO_MAX_DETS, *raised}))
    for section, limits in (("coco", COCO_MAX_DETS), ("coco_dense", raised)):
        lines = {name: summarize(scores, limits, name) for name in scores.class_names}
        per_class = {k: {ap: lines[k][ap] for ap in ("AP", "AP50", "AP75")} for k in lines}
        summary = summarize(scores, limits)
        result[section] = {"max_dets": list(limits), "summary": summary, "per_class": per_class}
    return result | {"at_threshold": at_threshold}


def summary_table(metrics: dict[str, Any]) -> pd.DataFrame:
    """The 12 summary lines of ``metrics.json`` (rows; ``AR`` is at the largest limit) with COCO's
    limits and with the raised ones of ``dense_max_dets`` (columns).
    """
    columns = {}
    for section in (metrics["coco"], metrics["coco_dense"]):
        last = section["max_dets"][-1]
        columns[f"maxDets {last}"] = pd.Series(section["summary"]).rename({f"AR{last}": "AR"})
    return pd.DataFrame(columns).rename_axis("metric")


def class_table(metrics: dict[str, Any]) -> pd.DataFrame:
    """One row for all classes together and one per class: AP, AP50, AP75 with the raised limits of
    ``dense_max_dets``; tp, fp, fn, precision, recall and f1 at the chosen thresholds.
    """
    section, at_threshold = metrics["coco_dense"], metrics["at_threshold"]
    averages = {"all": section["summary"]} | section["per_class"]
    counts = {"all": at_threshold["all"]} | at_threshold["per_class"]
    rows = {name: averages[name] | counts[name] for name in counts}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")
    return table[["AP", "AP50", "AP75", *at_threshold["all"]]]


def _evaluate(truth: dict[str, Any], detections: Cells, **parameters: Any) -> hotcoco.COCOeval:
    """Evaluate with hotcoco, with some of its ``params`` set; a detection's id is its row + 1."""
    check_detections(truth, detections)
    # With a bbox, the box's area would be used as the mask's.
    results = [{key: row[key] for key in row if key != "bbox"} for row in detections.to_coco()]
    coco = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(coco, coco.load_res(results), "segm")
    for name, value in parameters.items():
        setattr(evaluation.params, name, value)
    evaluation.evaluate()
    return evaluation


def _class_names(truth: dict[str, Any]) -> dict[int, str]:
    return dict(sorted((category["id"], category["name"]) for category in truth["categories"]))


def _tally(matches: Matches, table: pd.DataFrame, column: str | None = None) -> np.ndarray:
    """The number of rows, or the sum of a column, for each image and class: float64 [I, K]."""
    totals = np.zeros((len(matches.image_ids), len(matches.class_names)))
    image_index = pd.Index(matches.image_ids).get_indexer(table["image_id"])
    class_index = pd.Index(list(matches.class_names)).get_indexer(table["class_id"])
    np.add.at(totals, (image_index, class_index), table[column] if column else 1)
    return totals
