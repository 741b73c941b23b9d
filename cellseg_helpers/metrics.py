"""Scores of detections (a list of COCO results) against truth (a COCO data set): average precision,
curves, matches. No torch.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import pandas as pd
from pycocotools import mask as coco_mask

COCO_MAX_DETS = (1, 10, 100)
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_AREAS_PX = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}


class CocoScores(NamedTuple):
    """COCO's evaluation of masks; NaN where there is no truth to find.

    T = 10 IoU thresholds (0.50, 0.55 .. 0.95), R = 101 recalls (0, 0.01 .. 1), K classes, A = 4
    area ranges (all, under 32^2, 32^2 to 96^2, above: px^2 of the mask in the original image), M
    limits of detections.

    Attributes:
        precision: float64 [T, R, K, A, M].
        recall: float64 [T, K, A, M], the largest that is reached.
        score: float64 [T, R, K, A, M], of the detection at which this recall is reached; 0 where it
            is not.
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


def check_detections(truth: dict[str, Any], detections: list[dict[str, Any]]) -> None:
    """Raises a ``ValueError`` for the first detection that does not belong to ``truth`` or is no
    COCO result with an RLE mask.
    """
    if not truth["images"]:
        raise ValueError("the truth holds no image: there is nothing to score detections against")
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
    class_ids = {category["id"] for category in truth["categories"]}
    for row, detection in enumerate(detections):
        missing = {"image_id", "category_id", "score", "segmentation"} - set(detection)
        if missing:
            raise ValueError(
                f"detection {row} has no {', '.join(sorted(missing))}; it must be a COCO result with a mask"
            )
        image_id, class_id, segmentation = (
            detection["image_id"],
            detection["category_id"],
            detection["segmentation"],
        )
        if image_id not in sizes:
            raise ValueError(
                f"detection {row} is of image {image_id}, which the truth does not have: are both of one split?"
            )
        if class_id not in class_ids:
            raise ValueError(
                f"detection {row} is of class {class_id}; the truth has the classes {sorted(class_ids)}"
            )
        if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
            raise ValueError(
                f"the segmentation of detection {row} is no run-length encoding (a dict of size and counts)"
            )
        if list(segmentation["size"]) != sizes[image_id]:
            raise ValueError(
                f"the mask of detection {row} is of size {list(segmentation['size'])}, its image {image_id} of {sizes[image_id]} "
                "(height, width): predict at the original image's size"
            )
        if not math.isfinite(detection["score"]):
            raise ValueError(f"the score of detection {row} is {detection['score']}")


def dense_max_dets(truth: dict[str, Any]) -> tuple[int, int, int]:
    """COCO's limits with the last raised to the fullest image's number of cells, rounded up to a
    multiple of 100.

    It depends on the truth alone, so that all models on one split are scored with the same limit.
    """
    fullest = max(
        np.unique([cell["image_id"] for cell in truth["annotations"]], return_counts=True)[1],
        default=0,
    )
    return (*COCO_MAX_DETS[:2], max(100, 100 * math.ceil(fullest / 100)))


def score_coco(
    truth: dict[str, Any], detections: list[dict[str, Any]], max_dets: Sequence[int] = COCO_MAX_DETS
) -> CocoScores:
    """COCO's mask evaluation, by hotcoco (the numbers are pycocotools').

    A detection's area is its mask's. (pycocotools takes the box's if a result has a ``bbox``, which
    moves false positives between the area ranges; so boxes are left out here.)

    Raises:
        ValueError: a detection does not fit the truth (``check_detections``), or ``max_dets`` does
            not rise from above 0.
    """
    check_detections(truth, detections)
    if not len(max_dets) or (np.diff(max_dets, prepend=0) <= 0).any():
        raise ValueError(
            f"max_dets is {tuple(max_dets)}; it must be rising numbers above 0 such as {COCO_MAX_DETS}"
        )
    fields = ("image_id", "category_id", "score", "segmentation")
    coco = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(
        coco, coco.load_res([{key: row[key] for key in fields} for row in detections]), "segm"
    )
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


def at_max_dets(scores: CocoScores, max_dets: Sequence[int]) -> CocoScores:
    """The same scores with some of their ``max_dets`` only."""
    places = [scores.max_dets.index(limit) for limit in max_dets]
    return scores._replace(
        precision=scores.precision[..., places],
        recall=scores.recall[..., places],
        score=scores.score[..., places],
        max_dets=tuple(max_dets),
    )


def summarize(scores: CocoScores) -> dict[str, float]:
    """COCO's 12 lines: AP, AP50, AP75, APs, APm, APl, AR at each of ``max_dets`` (AR1, AR10,
    AR100), ARs, ARm, ARl.

    AP is the mean precision over recalls, classes and IoU thresholds (AP50, AP75: one threshold),
    AR the mean recall over classes and IoU thresholds; all but the first two AR at the last of
    ``max_dets``. Classes without truth do not count; NaN where none is left.
    """
    areas = {"": 0, "s": 1, "m": 2, "l": 3}
    averages = {
        "AP": _mean(scores.precision[:, :, :, 0, -1]),
        "AP50": _mean(scores.precision[_threshold_index(scores, 0.5), :, :, 0, -1]),
        "AP75": _mean(scores.precision[_threshold_index(scores, 0.75), :, :, 0, -1]),
    }
    averages |= {
        f"AP{area}": _mean(scores.precision[:, :, :, index, -1])
        for area, index in areas.items()
        if area
    }
    averages |= {
        f"AR{limit}": _mean(scores.recall[:, :, 0, index])
        for index, limit in enumerate(scores.max_dets)
    }
    return averages | {
        f"AR{area}": _mean(scores.recall[:, :, index, -1]) for area, index in areas.items() if area
    }


def average_precision_per_class(scores: CocoScores) -> pd.DataFrame:
    """AP, AP50 and AP75 of each class (rows), all areas, at the last of ``max_dets``; NaN for a
    class without truth.
    """
    precision = scores.precision[:, :, :, 0, -1]
    rows = {"AP": precision.reshape(-1, precision.shape[2])}
    rows |= {
        name: precision[_threshold_index(scores, iou)]
        for name, iou in (("AP50", 0.5), ("AP75", 0.75))
    }
    columns = {
        name: [_mean(values[:, k]) for k in range(values.shape[1])] for name, values in rows.items()
    }
    return pd.DataFrame(columns, index=pd.Index(scores.class_names, name="class"))


def precision_recall_curves(scores: CocoScores, iou_threshold: float = 0.5) -> pd.DataFrame:
    """The curve behind each class's average precision, all areas, at the last of ``max_dets``.

    Returns:
        101 rows a class: class, recall (0, 0.01 .. 1), precision (the largest at this recall or
        beyond, 0 where it is not reached, NaN for a class without truth), score (at which this
        recall is reached).

    Raises:
        ValueError: ``iou_threshold`` is none of ``scores.iou_thresholds``.
    """
    index = _threshold_index(scores, iou_threshold)
    curves = [
        pd.DataFrame(
            {
                "class": name,
                "recall": scores.recalls,
                "precision": scores.precision[index, :, k, 0, -1],
                "score": scores.score[index, :, k, 0, -1],
            }
        )
        for k, name in enumerate(scores.class_names)
    ]
    return pd.concat(curves, ignore_index=True)


def match_detections(
    truth: dict[str, Any],
    detections: list[dict[str, Any]],
    iou_threshold: float = 0.5,
    area_range_px: tuple[float, float] = (0, math.inf),
) -> Matches:
    """COCO's greedy matching of detections to cells of their image and class.

    From the highest score down, each detection takes the cell of largest mask IoU that is still
    free, if this IoU is at least ``iou_threshold`` (``evaluateImg`` of pycocotools). A match
    depends on no lower-scored detection, so one table serves every score threshold: see
    ``count_matches``.

    Args:
        truth: COCO data set with RLE masks.
        detections: COCO results with RLE masks of the image's size.
        iou_threshold: the least mask IoU of a match.
        area_range_px: least and greatest mask area of the cells that count, both included; a
            detection takes a cell outside it only where none inside is free.

    Raises:
        ValueError: a detection does not fit the truth (``check_detections``), or ``iou_threshold``
            is not in (0, 1].
    """
    check_detections(truth, detections)
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; it must be above 0 and at most 1")
    cells = truth["annotations"]
    cell_area_px = np.array([cell["area"] for cell in cells], int)
    cell_counts = _within(cell_area_px, area_range_px)
    score = np.array([detection["score"] for detection in detections], float)
    partner = np.full(len(detections), -1)
    best_iou = np.zeros(len(detections))
    cells_of, detections_of = _rows_by_image_and_class(cells), _rows_by_image_and_class(detections)
    for key in detections_of.keys() & cells_of.keys():
        rows = np.array(detections_of[key])[np.argsort(-score[detections_of[key]], kind="stable")]
        iou = _mask_iou([detections[row] for row in rows], [cells[row] for row in cells_of[key]])
        taken = _match_greedily(iou, iou_threshold, cell_counts[cells_of[key]])
        best_iou[rows] = np.where(taken >= 0, iou[np.arange(len(rows)), taken], iou.max(axis=1))
        partner[rows] = np.where(taken >= 0, np.array(cells_of[key])[taken], -1)

    matched = partner >= 0
    finder = np.full(len(cells), -1)
    finder[partner[matched]] = np.flatnonzero(matched)
    found = finder >= 0
    truth_ids = np.array([cell["id"] for cell in cells], int)
    area_px = _areas(detections)
    counted = _within(area_px, area_range_px)
    counted[matched] = cell_counts[partner[matched]]
    detection_table = pd.DataFrame(
        {
            **_columns(detections),
            "score": score,
            "area_px": area_px,
            "matched": matched,
            "iou": best_iou,
            "truth_id": _nullable(truth_ids[partner] if len(cells) else partner, matched),
            "counted": counted,
        }
    )
    truth_table = pd.DataFrame(
        {
            **_columns(cells),
            "area_px": cell_area_px,
            "score": np.where(found, score[finder], np.nan)
            if len(detections)
            else np.full(len(cells), np.nan),
            "detection": _nullable(finder, found),
            "counted": cell_counts,
        },
        index=pd.Index(truth_ids, name="truth_id"),
    )
    image_ids = [image["id"] for image in truth["images"]]
    return Matches(detection_table, truth_table, _class_names(truth), iou_threshold, image_ids)


def count_matches(matches: Matches, score_threshold: float = 0.0) -> dict[str, Counts]:
    """Precision, recall and F1 of the detections that score at least ``score_threshold``:
    ``"all"``, then each class by its name.

    ``"all"`` adds up the counts of the classes.
    """
    counts = count_by_image(matches, score_threshold)
    totals = np.stack([counts.tp, counts.fp, counts.fn]).sum(axis=1)  # [3, K]
    per_class = {
        name: _counts(*totals[:, k].tolist()) for k, name in enumerate(matches.class_names.values())
    }
    return {"all": _counts(*totals.sum(axis=1).tolist())} | per_class


def count_by_image(matches: Matches, score_threshold: float = 0.0) -> ImageCounts:
    """What ``count_matches`` adds up: the counts of each image and class."""
    found = matches.detections[
        matches.detections["counted"] & (matches.detections["score"] >= score_threshold)
    ]
    tp = _tally(matches, found[found["matched"]])
    cells = _tally(matches, matches.truths[matches.truths["counted"]])
    iou_sum = _tally(matches, found[found["matched"]], "iou")
    return ImageCounts(
        tp.astype(int), (_tally(matches, found) - tp).astype(int), (cells - tp).astype(int), iou_sum
    )


def average_precision(
    matches: Matches, image_weights: np.ndarray | None = None, max_dets: int | None = None
) -> np.ndarray:
    """COCO's average precision of each class at the matches' IoU threshold, of any resampling of
    the images.

    An image of weight 2 counts as if it stood in the data twice, one of weight 0 as if it were
    absent; the result is the same number that COCO's evaluation, the oracle, gives of the images
    written out (but for the order of equal scores).

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
    weights = (
        np.ones((1, len(matches.image_ids)))
        if image_weights is None
        else np.asarray(image_weights, float)
    )
    table = matches.detections
    place = _image_places(matches, table)
    order = np.lexsort([place, -table["score"]])
    if max_dets is not None:
        ranked = table.iloc[order].groupby(["image_id", "class_id"]).cumcount().to_numpy()
        order = order[ranked < max_dets]
    order = order[table["counted"].to_numpy()[order]]
    class_id, matched = table["class_id"].to_numpy()[order], table["matched"].to_numpy()[order]
    cells = weights @ _tally(matches, matches.truths[matches.truths["counted"]])
    columns = [
        _weighted_precision(
            weights, cells[:, k], place[order[class_id == number]], matched[class_id == number]
        )
        for k, number in enumerate(matches.class_names)
    ]
    return np.stack(columns, axis=1)


def _weighted_precision(
    weights: np.ndarray, cells: np.ndarray, place: np.ndarray, matched: np.ndarray
) -> np.ndarray:
    """Mean over COCO's 101 recalls of the largest precision at this recall or beyond: float64 [B],
    detections by descending score.
    """
    average = np.where(cells > 0, 0.0, np.nan)
    hits = np.flatnonzero(matched)  # the precision is largest where a cell was just found
    for row in np.flatnonzero((cells > 0) & bool(len(hits))):
        weight = weights[row, place]
        found = np.cumsum(weight[hits])
        precision = found / (np.cumsum(weight)[hits] + np.spacing(1))
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
        average[row] = envelope[np.searchsorted(found / cells[row], COCO_RECALLS)].mean()
    return average


def evaluate(
    truth: dict[str, Any],
    detections: list[dict[str, Any]],
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
) -> dict[str, Any]:
    """Everything that a run's ``metrics.json`` holds.

    Args:
        truth: COCO data set with RLE masks.
        detections: COCO results with RLE masks of the image's size; may be empty.
        score_threshold: for precision, recall and F1; 0 keeps all detections.
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
    counts = count_matches(match_detections(truth, detections, iou_threshold), score_threshold)
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
            "all": counts["all"]._asdict(),
            "per_class": {name: count._asdict() for name, count in counts.items() if name != "all"},
        },
    }


def summary_table(metrics: dict[str, Any]) -> pd.DataFrame:
    """The 12 lines (rows; AR is the one at the largest limit) with the usual and with the dense
    ``max_dets`` (columns).
    """
    columns = {}
    for section in (metrics["coco"], metrics["coco_dense"]):
        last = section["max_dets"][-1]
        columns[f"maxDets {last}"] = {
            "AR" if key == f"AR{last}" else key: value for key, value in section["summary"].items()
        }
    return pd.DataFrame(columns).rename_axis("metric")


def class_table(metrics: dict[str, Any]) -> pd.DataFrame:
    """All classes together and each class (rows): AP, AP50, AP75 at the dense ``max_dets``; tp ..
    f1 at the chosen thresholds.
    """
    section, at = metrics["coco_dense"], metrics["at_threshold"]
    averages = {"all": {key: section["summary"][key] for key in ("AP", "AP50", "AP75")}} | section[
        "per_class"
    ]
    counts = {"all": at["all"]} | at["per_class"]
    table = pd.DataFrame.from_dict(
        {name: averages[name] | counts[name] for name in averages}, orient="index"
    )
    return table.rename_axis("class")


def save_metrics(metrics: dict[str, Any], path: str | Path) -> None:
    """Writes ``evaluate``'s result as JSON, NaN as null; a file that is there is replaced at once,
    never half.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(
        json.dumps(_replace(metrics, _null_for_nan), indent=1, allow_nan=False) + "\n",
        encoding="utf-8",
    )
    os.replace(partial, path)


def load_metrics(path: str | Path) -> dict[str, Any]:
    """Reads what ``save_metrics`` wrote, null as NaN."""
    return _replace(
        json.loads(Path(path).read_text(encoding="utf-8")),
        lambda value: math.nan if value is None else value,
    )


def _coco_section(scores: CocoScores) -> dict[str, Any]:
    return {
        "max_dets": list(scores.max_dets),
        "summary": summarize(scores),
        "per_class": average_precision_per_class(scores).to_dict(orient="index"),
    }


def _class_names(truth: dict[str, Any]) -> dict[int, str]:
    return {
        category["id"]: category["name"]
        for category in sorted(truth["categories"], key=lambda category: category["id"])
    }


def _threshold_index(scores: CocoScores, iou_threshold: float) -> int:
    (places,) = np.nonzero(np.isclose(scores.iou_thresholds, iou_threshold))
    if not len(places):
        raise ValueError(
            f"iou_threshold is {iou_threshold}; COCO evaluates at {scores.iou_thresholds.round(2).tolist()}"
        )
    return int(places[0])


def _mean(values: np.ndarray) -> float:
    """The mean of what is defined, NaN if nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def _rows_by_image_and_class(annotations: list[dict[str, Any]]) -> dict[tuple[int, int], list[int]]:
    rows = defaultdict(list)
    for row, annotation in enumerate(annotations):
        rows[annotation["image_id"], annotation["category_id"]].append(row)
    return rows


def _mask_iou(detections: list[dict[str, Any]], cells: list[dict[str, Any]]) -> np.ndarray:
    """float64 [D, G]."""
    return coco_mask.iou(
        [row["segmentation"] for row in detections],
        [row["segmentation"] for row in cells],
        [0] * len(cells),
    )


def _match_greedily(iou: np.ndarray, iou_threshold: float, counts: np.ndarray) -> np.ndarray:
    """Column int [D] that each row takes, -1 = none; the rows choose in turn, first among the
    columns that count (bool [G]), then among the others, and of equal columns take the last."""
    iou_threshold = min(iou_threshold, 1 - 1e-10)
    taken = np.full(len(iou), -1)
    groups = [
        (columns, iou[:, columns])
        for columns in (np.flatnonzero(counts), np.flatnonzero(~counts))
        if len(columns)
    ]
    for row in np.flatnonzero((iou >= iou_threshold).any(axis=1)):
        for columns, free in groups:
            column = free.shape[1] - 1 - int(free[row, ::-1].argmax())
            if free[row, column] >= iou_threshold:
                taken[row] = columns[column]
                free[:, column] = -1
                break
    return taken


def _within(area_px: np.ndarray, area_range_px: tuple[float, float]) -> np.ndarray:
    return (area_px >= area_range_px[0]) & (area_px <= area_range_px[1])


def _image_places(matches: Matches, table: pd.DataFrame) -> np.ndarray:
    return pd.Index(matches.image_ids).get_indexer(table["image_id"])


def _tally(matches: Matches, table: pd.DataFrame, column: str | None = None) -> np.ndarray:
    """Rows, or the sum of a column, of each image and class: float64 [I, K]."""
    images, classes = len(matches.image_ids), len(matches.class_names)
    place = _image_places(matches, table) * classes + pd.Index(
        list(matches.class_names)
    ).get_indexer(table["class_id"])
    return (
        np.bincount(place, table[column] if column else None, images * classes)
        .reshape(images, classes)
        .astype(float)
    )


def _columns(annotations: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {
        "image_id": np.array([annotation["image_id"] for annotation in annotations], int),
        "class_id": np.array([annotation["category_id"] for annotation in annotations], int),
    }


def _areas(detections: list[dict[str, Any]]) -> np.ndarray:
    """Mask pixels of each, int64. One call a mask: pycocotools 2.0.11 with numpy 2 overflows on
    lists of more than 255.
    """
    return np.array(
        [coco_mask.area(detection["segmentation"]) for detection in detections], np.int64
    )


def _nullable(values: np.ndarray, present: np.ndarray) -> pd.arrays.IntegerArray:
    return pd.arrays.IntegerArray(values.astype(np.int64), ~present)


def _counts(tp: int, fp: int, fn: int) -> Counts:
    return Counts(
        tp, fp, fn, _ratio(tp, tp + fp), _ratio(tp, tp + fn), _ratio(2 * tp, 2 * tp + fp + fn)
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _null_for_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _replace(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested dicts and lists with each leaf changed."""
    if isinstance(tree, dict):
        return {key: _replace(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_replace(value, change) for value in tree]
    return change(tree)
