"""Scores of detections against the truth, a COCO data set: average precision, curves, matches.

hotcoco evaluates and matches; its oracle in the tests is pycocotools. No torch.
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
        max_dets: M limits; of each image and class so many detections of highest score count.
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
            its image and class), truth_id (missing if unmatched), counted (False if it matched a
            cell outside the area range, or none and lies outside itself).
        truths: one row a cell, by annotation id: image_id, class_id, area_px, score and detection
            (of the detection that matched it, score and row; missing if none), counted (in the
            area range).
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
            fault = f"size {size}, its image {image_id} of {own_size} (height, width): "
            fault += "predict at the original image's size"
        elif not math.isfinite(score):
            fault = f"score {score}"
        else:
            continue
        raise ValueError(f"detection {row} is of {fault}")


def dense_max_dets(truth: dict[str, Any]) -> tuple[int, int, int]:
    """COCO's limits, the last raised to the cells of the fullest image, rounded up to hundreds."""
    cells = pd.Series([cell["image_id"] for cell in truth["annotations"]]).value_counts()
    return (*COCO_MAX_DETS[:2], 100 * math.ceil(cells.max() / 100) if len(cells) else 100)


def score_coco(
    truth: dict[str, Any], detections: Cells, max_dets: Sequence[int] = COCO_MAX_DETS
) -> CocoScores:
    """COCO's mask evaluation, by hotcoco. The numbers are pycocotools' for results without a
    ``bbox`` (with one, it takes the box's area for the mask's).

    Raises:
        ValueError: a detection does not fit the truth, or ``max_dets`` does not rise from above 0.
    """
    if not len(max_dets) or (np.diff(max_dets, prepend=0) <= 0).any():
        rule = f"it must be rising numbers above 0 such as {COCO_MAX_DETS}"
        raise ValueError(f"max_dets is {tuple(max_dets)}; {rule}")
    evaluation, _ = _evaluate(truth, detections, max_dets=list(max_dets))
    evaluation.accumulate()
    arrays = [evaluation.eval[name] for name in ("precision", "recall")]
    precision, recall = (np.where(array < 0, np.nan, array) for array in arrays)
    return CocoScores(precision, recall, list(_class_names(truth).values()), tuple(max_dets))


def summarize(
    scores: CocoScores, max_dets: Sequence[int] | None = None, class_name: str | None = None
) -> dict[str, float]:
    """COCO's 12 lines: AP, AP50, AP75, APs, APm, APl, AR at each of ``max_dets`` (AR1, AR10,
    AR100), ARs, ARm, ARl.

    AP is the mean precision over recalls, classes and IoU thresholds (AP50, AP75: one threshold),
    AR the mean recall over classes and IoU thresholds. NaN where no cell is annotated.

    Args:
        max_dets: three of the scores' limits, the last of all lines but AR1 and AR10; None = all.
        class_name: the class of the lines; None = all that have a cell.
    """
    max_dets, areas = max_dets or scores.max_dets, ("s", "m", "l")
    limits = [scores.max_dets.index(limit) for limit in max_dets]
    classes = [k for k, name in enumerate(scores.class_names) if class_name in (None, name)]
    precision, recall = scores.precision[:, :, classes], scores.recall[:, classes]
    precision, recall = precision[..., limits[-1]], recall[..., limits]
    lines = {"AP": precision[..., 0], "AP50": precision[0, ..., 0], "AP75": precision[5, ..., 0]}
    lines |= {f"AP{area}": precision[..., a] for a, area in enumerate(areas, 1)}
    lines |= {f"AR{limit}": recall[:, :, 0, m] for m, limit in enumerate(max_dets)}
    lines |= {f"AR{area}": recall[:, :, a, -1] for a, area in enumerate(areas, 1)}
    defined = {name: values[~np.isnan(values)] for name, values in lines.items()}
    return {n: float(values.mean()) if len(values) else math.nan for n, values in defined.items()}


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

    ``area_range_px`` are the least and the greatest mask area of the cells that count; a detection
    takes a cell outside only where none inside is free.

    Raises:
        ValueError: a detection does not fit the truth, or ``iou_threshold`` is not in (0, 1].
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; it must be above 0 and at most 1")
    limits = {"max_dets": [max(len(detections), 1)], "iou_thrs": [iou_threshold]}
    limits |= {"area_rng": [list(area_range_px)], "area_rng_lbl": ["counted"]}
    evaluation, rles = _evaluate(truth, detections, **limits)
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
            own = pd.Index(cell_ids).get_indexer(truth_id[rows])
            iou[rows] = ious[range(len(rows)), np.where(matched[rows], own, ious.argmax(1))]
    found = {"image_id": detections.image_ids, "class_id": detections.labels}
    found |= {"score": detections.scores, "area_px": detections.area_px}
    found |= {"matched": matched, "iou": iou}
    found |= {"truth_id": pd.Series(truth_id, dtype="Int64").where(matched), "counted": counted}
    keys = ["id", "image_id", "category_id", "area"]
    truths = pd.DataFrame(truth["annotations"], columns=keys, dtype=int)
    truths.columns = ["truth_id", "image_id", "class_id", "area_px"]
    finders = pd.DataFrame({"score": detections.scores, "detection": range(len(detections))})
    truths = truths.set_index("truth_id").join(finders[matched].set_index(truth_id[matched]))
    truths = truths.assign(counted=truths["area_px"].between(*area_range_px))
    truths = truths.astype({"detection": "Int64"})
    image_ids = [image["id"] for image in truth["images"]]
    return Matches(pd.DataFrame(found), truths, _class_names(truth), iou_threshold, image_ids)


def count_matches(matches: Matches, score_threshold: float = 0.0) -> dict[str, Counts]:
    """Precision, recall and F1 of the detections that score at least ``score_threshold``: of
    ``"all"`` (the counts of the classes added up), then of each class by its name.
    """
    counts = count_by_image(matches, score_threshold)[:3].sum(1).astype(int)
    tp, fp, fn = counts = np.column_stack([counts.sum(1), counts])
    with np.errstate(invalid="ignore"):
        ratios = np.stack([tp / (tp + fp), tp / (tp + fn), 2 * tp / (2 * tp + fp + fn)])
    rows = zip(*counts.tolist(), *ratios.tolist(), strict=True)
    return dict(zip(("all", *matches.class_names.values()), starmap(Counts, rows), strict=True))


def count_by_image(matches: Matches, score_threshold: float = 0.0) -> np.ndarray:
    """True positives, false positives, false negatives and the sum of the matched pairs' IoU, of
    the detections that score at least ``score_threshold``: float64 [4, I, K], images in the order
    of ``matches.image_ids``, classes of ``matches.class_names``.
    """
    table = matches.detections
    found = table[table["counted"] & (table["score"] >= score_threshold)]
    right = found[found["matched"]]
    tp, cells = _tally(matches, right), _tally(matches, matches.truths.query("counted"))
    return np.stack([tp, _tally(matches, found) - tp, cells - tp, _tally(matches, right, "iou")])


def limit_detections(matches: Matches, max_dets: int) -> Matches:
    """The matches of the ``max_dets`` highest-scored detections of each image and class."""
    table = matches.detections.sort_values("score", ascending=False, kind="stable")
    rank = table.groupby(["image_id", "class_id"]).cumcount().sort_index()
    return matches._replace(detections=matches.detections[rank < max_dets])


def average_precision(
    matches: Matches, image_weights: np.ndarray | None = None, max_dets: int | None = None
) -> np.ndarray:
    """COCO's average precision of each class at the matches' IoU threshold, of any resampling of
    the images.

    Equals COCO's average precision, the oracle, on a data set in which image i is repeated
    ``weight[i]`` times (but for the order of equal scores).

    Args:
        image_weights: [B, I], a row a resampling, a column an image; None = each image once.
        max_dets: of each image and class so many detections of highest score count; None = all.

    Returns:
        float64 [B, K], classes as ``matches.class_names``; NaN for a class without a cell.
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
    """Everything that a run's ``metrics.json`` holds; undefined is NaN.

    Args:
        score_threshold, iou_threshold: for precision, recall and F1; 0 takes all detections.

    Returns:
        ``images``, ``cells``, ``detections``: numbers of them. ``coco`` and ``coco_dense``:
        ``max_dets`` (the usual 1, 10, 100; ``dense_max_dets``), ``summary`` (the 12 lines),
        ``per_class`` (AP, AP50, AP75 by class name). ``at_threshold``: ``score_threshold``,
        ``iou_threshold``, ``all`` and ``per_class`` (tp, fp, fn, precision, recall, f1).
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
        lines = {k: summarize(scores, limits, k) for k in scores.class_names}
        per_class = {k: {ap: lines[k][ap] for ap in ("AP", "AP50", "AP75")} for k in lines}
        summary = summarize(scores, limits)
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
    truth: dict[str, Any], detections: Cells, **parameters: Any
) -> tuple[hotcoco.COCOeval, list[dict[str, Any]]]:
    """hotcoco's evaluation with some ``params`` set, where a detection's id is its row + 1; and the
    detections' RLEs.
    """
    check_detections(truth, detections)
    results = [{key: row[key] for key in row if key != "bbox"} for row in detections.to_coco()]
    coco = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(coco, coco.load_res(results), "segm")
    for name, value in parameters.items():
        setattr(evaluation.params, name, value)
    evaluation.evaluate()
    return evaluation, [row["segmentation"] for row in results]


def _class_names(truth: dict[str, Any]) -> dict[int, str]:
    return dict(sorted((category["id"], category["name"]) for category in truth["categories"]))


def _tally(matches: Matches, table: pd.DataFrame, column: str | None = None) -> np.ndarray:
    """Rows, or the sum of a column, of each image and class: float64 [I, K]."""
    totals = np.zeros((len(matches.image_ids), len(matches.class_names)))
    image = pd.Index(matches.image_ids).get_indexer(table["image_id"])
    class_index = pd.Index(list(matches.class_names)).get_indexer(table["class_id"])
    np.add.at(totals, (image, class_index), table[column] if column else 1)
    return totals
