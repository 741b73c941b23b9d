"""Score thresholds: what each does, which to choose, how much a choice flatters itself, and how far
scores are probabilities.

All functions take the table of ``metrics.match_detections``: a match depends on no lower-scored
detection, so one matching serves every threshold. No torch.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from cellseg_helpers.metrics import Matches, average_precision, count_matches

CRITERIA = ("F1", "count")


class CountsByThreshold(NamedTuple):
    """Counts of I images, K classes and T score thresholds.

    Attributes:
        found: int [I, K, T], detections that score at least the threshold.
        tp: int [I, K, T], those of them that are matched.
        cells: int [I, K].
    """

    found: np.ndarray
    tp: np.ndarray
    cells: np.ndarray


def keep_scores(matches: Matches, score_thresholds: float | Mapping[str, float]) -> Matches:
    """The matches of the detections that score at least the threshold, one for all or one for each
    class name.

    Raises:
        ValueError: a class has no threshold.
    """
    thresholds = _by_class(matches, score_thresholds)
    by_id = dict(zip(matches.class_names, thresholds, strict=True))
    kept = matches.detections["score"] >= matches.detections["class_id"].map(by_id)
    lost = ~(matches.truths["score"] >= matches.truths["class_id"].map(by_id))
    truths = matches.truths.assign(
        score=matches.truths["score"].mask(lost),
        detection=matches.truths["detection"].mask(lost, pd.NA),
    )
    return matches._replace(detections=matches.detections[kept], truths=truths)


def threshold_table(
    matches: Matches, strategies: Mapping[str, float | Mapping[str, float]], max_dets: int
) -> pd.DataFrame:
    """What each strategy's thresholds give: detections kept, average precision at the matches' IoU,
    precision, recall, F1.

    Args:
        matches: of the detections.
        strategies: name -> one threshold, or one for each class name.
        max_dets: of the average precision.

    Returns:
        One row a strategy and class (``all`` first): strategy, class, score_threshold, detections,
        AP50 (by the matches' IoU), tp, fp, fn, precision, recall, F1.
    """
    column = f"AP{round(100 * matches.iou_threshold)}"
    rows = []
    for strategy, score_thresholds in strategies.items():
        kept = keep_scores(matches, score_thresholds)
        thresholds = _by_class(matches, score_thresholds)
        averages = average_precision(kept, max_dets=max_dets)[0]
        average = np.nanmean(averages) if not np.isnan(averages).all() else np.nan
        shared = thresholds[0] if len(set(thresholds)) == 1 else np.nan
        for (name, count), threshold, ap in zip(
            count_matches(kept).items(), (shared, *thresholds), (average, *averages), strict=True
        ):
            ratios = {"precision": count.precision, "recall": count.recall, "F1": count.f1}
            rows.append(
                {
                    "strategy": strategy,
                    "class": name,
                    "score_threshold": threshold,
                    "detections": count.tp + count.fp,
                    column: ap,
                }
                | {"tp": count.tp, "fp": count.fp, "fn": count.fn}
                | ratios
            )
    return pd.DataFrame(rows)


def sweep(matches: Matches, score_thresholds: Sequence[float], max_dets: int) -> pd.DataFrame:
    """``threshold_table`` of one threshold for all classes after another, without the column
    ``strategy``.
    """
    return threshold_table(matches, {f"{t:g}": t for t in score_thresholds}, max_dets).drop(
        columns="strategy"
    )


def count_by_threshold(matches: Matches, score_thresholds: Sequence[float]) -> CountsByThreshold:
    """Detections, matched detections and cells of each image, class and threshold.

    Each row counts once, at the number of thresholds that its score reaches; those at threshold t
    are the sum of all that reach t or more. The same as ``keep_scores`` at each threshold, its
    oracle.
    """
    images, classes, steps = len(matches.image_ids), len(matches.class_names), len(score_thresholds)
    order = np.argsort(score_thresholds)

    def table(rows: pd.DataFrame, reached: np.ndarray) -> np.ndarray:
        """int [I, K, T + 1]: rows by how many thresholds they reach."""
        image = pd.Index(matches.image_ids).get_indexer(rows["image_id"])
        class_place = pd.Index(list(matches.class_names)).get_indexer(rows["class_id"])
        place = (image * classes + class_place) * (steps + 1) + reached
        return np.bincount(place, minlength=images * classes * (steps + 1)).reshape(
            images, classes, steps + 1
        )

    def at_least(rows: pd.DataFrame) -> np.ndarray:
        reached = np.searchsorted(np.asarray(score_thresholds)[order], rows["score"], side="right")
        counts = table(rows, reached)[..., ::-1].cumsum(-1)[..., -2::-1]
        return counts[..., np.argsort(order)]

    found = matches.detections
    cells = table(matches.truths, np.zeros(len(matches.truths), int))[..., 0]
    return CountsByThreshold(at_least(found), at_least(found[found["matched"]]), cells)


def choose_thresholds(
    matches: Matches, score_thresholds: Sequence[float], criterion: str = "F1"
) -> dict[str, float]:
    """The best of some thresholds for each class name; of equally good ones the lowest.

    Args:
        matches: of the images to choose on.
        score_thresholds: to choose from.
        criterion: ``F1`` (a class without a cell gets the threshold that is best for all classes
            together), or ``count``: the smallest mean over images of |predicted - true number of
            cells|.

    Raises:
        ValueError: an unknown criterion, or no threshold.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; one of {', '.join(CRITERIA)}")
    if not len(score_thresholds):
        raise ValueError("score_thresholds is empty; give at least one to choose from")
    rising = sorted(score_thresholds)
    counts = count_by_threshold(matches, rising)
    if criterion == "count":
        best = np.abs(counts.found - counts.cells[..., None]).sum(0).argmin(-1)
    else:
        best = _best_f1(*(table.sum(0) for table in counts))
    return {
        name: float(rising[k]) for name, k in zip(matches.class_names.values(), best, strict=True)
    }


def optimism(
    matches: Matches,
    score_thresholds: Sequence[float],
    score_threshold: float,
    halvings: int,
    seed: int,
) -> pd.DataFrame:
    """How much F1 a choice of class thresholds seems to gain over one shared threshold, and how
    much it gains on other images.

    The images are halved at random many times; the thresholds of best F1 are chosen on one half,
    and their gain over the shared threshold is measured on that half (claimed) and on the other
    (real). A gain that is claimed and not real is optimism: the choice followed the chance in its
    own images.

    Args:
        matches: of all images.
        score_thresholds: to choose from.
        score_threshold: the shared one.
        halvings: number of random halvings; each serves twice, either half choosing once.
        seed: of the halvings.

    Returns:
        By class, ``all`` first (its counts added over the classes): claimed, real, optimism (their
        means over the halvings), low, high (the middle 95 % of the optimism), halvings (choices
        made where both halves hold the class).

    Raises:
        ValueError: fewer than two images, no halving, or no threshold.
    """
    if len(matches.image_ids) < 2 or halvings < 1 or not len(score_thresholds):
        raise ValueError(
            f"optimism needs two images, one halving and one threshold at least, not {len(matches.image_ids)} images, "
            f"{halvings} halvings and {len(score_thresholds)} thresholds"
        )
    images = len(matches.image_ids)
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(images), (halvings, 1)), axis=1)
    chooses = np.concatenate([order < images // 2, order >= images // 2]).astype(int)
    counts = count_by_threshold(matches, [*sorted(score_thresholds), score_threshold])
    here, there = (
        CountsByThreshold(*(np.tensordot(half, table, 1) for table in counts))
        for half in (chooses, 1 - chooses)
    )
    best = _best_f1(here.found[..., :-1], here.tp[..., :-1], here.cells)
    claimed, real = (_gain(half, best) for half in (here, there))
    rows = {}
    for k, name in enumerate(("all", *matches.class_names.values())):
        gains = np.column_stack([claimed[:, k], real[:, k], claimed[:, k] - real[:, k]])
        gains = gains[~np.isnan(gains).any(1)]
        means = gains.mean(0) if len(gains) else np.full(3, np.nan)
        ends = np.percentile(gains[:, 2], [2.5, 97.5]) if len(gains) else (np.nan, np.nan)
        rows[name] = (*means, *ends, len(gains))
    columns = ["claimed", "real", "optimism", "low", "high", "halvings"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("class")


def _gain(counts: CountsByThreshold, best: np.ndarray) -> np.ndarray:
    """F1 at the thresholds of places ``best`` [H, K] minus F1 at the last one: float64 [H, 1 + K],
    NaN without a cell.
    """

    def with_all(table: np.ndarray) -> np.ndarray:
        return np.column_stack([table.sum(1), table])

    chosen = [
        with_all(np.take_along_axis(table, best[..., None], -1)[..., 0])
        for table in (counts.found, counts.tp)
    ]
    shared = [with_all(table[..., -1]) for table in (counts.found, counts.tp)]
    cells = with_all(counts.cells)
    return np.where(cells > 0, _f1(*chosen, cells) - _f1(*shared, cells), np.nan)


def separation(matches: Matches) -> pd.DataFrame:
    """How well scores tell matched from unmatched detections, by class and ``all``.

    ``AUROC`` is the chance that a matched detection scores above an unmatched one (equal scores
    count half): 0.5 tells nothing, 1 is perfect (Mann and Whitney's U / (n1 n2)); NaN where one
    kind is missing.
    """
    rows = {}
    for name, found in _classes(matches):
        matched = found["matched"].to_numpy()
        right, wrong = int(matched.sum()), int((~matched).sum())
        above = rankdata(found["score"])[matched].sum() - right * (right + 1) / 2
        rows[name] = {
            "matched": right,
            "unmatched": wrong,
            "AUROC": above / (right * wrong) if right and wrong else np.nan,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def reliability(matches: Matches, bins: int = 10) -> pd.DataFrame:
    """Of detections of about one score, the share that is matched, by class and ``all``.

    Args:
        matches: of the detections.
        bins: of equal width from 0 to 1; an edge belongs to the bin above it.

    Returns:
        One row a class and filled bin: class, bin (its lower edge), detections, mean_score,
        matched_share.

    Raises:
        ValueError: ``bins`` is under 1.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1")
    edges = np.linspace(0, 1, bins + 1)
    parts = []
    for name, found in _classes(matches):
        place = np.minimum(np.searchsorted(edges, found["score"], side="right") - 1, bins - 1)
        groups = found.groupby(place)
        table = groups.agg(
            detections=("score", "size"),
            mean_score=("score", "mean"),
            matched_share=("matched", "mean"),
        )
        parts.append(table.assign(bin=edges[table.index], **{"class": name}))
    return pd.concat(parts, ignore_index=True)[
        ["class", "bin", "detections", "mean_score", "matched_share"]
    ]


def expected_calibration_error(table: pd.DataFrame) -> pd.Series:
    """Mean distance of score and matched share over the detections, by class, of a table of
    ``reliability``.

    Guo et al., "On calibration of modern neural networks", 2017, equation 3. 0 = scores are
    probabilities.
    """
    distance = (table["mean_score"] - table["matched_share"]).abs() * table["detections"]
    sums = (
        table.assign(distance=distance)
        .groupby("class", sort=False)[["distance", "detections"]]
        .sum()
    )
    return (sums["distance"] / sums["detections"]).rename("ECE")


def cell_counts(matches: Matches, score_thresholds: float | Mapping[str, float]) -> pd.DataFrame:
    """One row an image and class: image_id, class, cells (annotated), predicted (detections of at
    least the threshold).
    """
    thresholds = _by_class(matches, score_thresholds)
    counts = count_by_threshold(matches, thresholds)
    classes = np.arange(len(thresholds))
    return pd.DataFrame(
        {
            "image_id": np.repeat(matches.image_ids, len(thresholds)),
            "class": np.tile(list(matches.class_names.values()), len(matches.image_ids)),
            "cells": counts.cells.ravel(),
            "predicted": counts.found[:, classes, classes].ravel(),
        }
    )


def counting_error(counts: pd.DataFrame) -> pd.DataFrame:
    """By class of a table of ``cell_counts``: cells, predicted, mean_error (over images, of
    |predicted - cells|), bias (of predicted
    - cells)."""
    difference = counts["predicted"] - counts["cells"]
    table = counts.assign(mean_error=difference.abs(), bias=difference).groupby("class", sort=False)
    return table.agg({"cells": "sum", "predicted": "sum", "mean_error": "mean", "bias": "mean"})


def _by_class(matches: Matches, score_thresholds: float | Mapping[str, float]) -> list[float]:
    names = list(matches.class_names.values())
    if not isinstance(score_thresholds, Mapping):
        return [float(score_thresholds)] * len(names)
    missing = [name for name in names if name not in score_thresholds]
    if missing:
        raise ValueError(
            f"score_thresholds has no value for {', '.join(missing)}; give one for each class"
        )
    return [float(score_thresholds[name]) for name in names]


def _classes(matches: Matches) -> list[tuple[str, pd.DataFrame]]:
    found = matches.detections
    return [
        ("all", found),
        *((name, found[found["class_id"] == k]) for k, name in matches.class_names.items()),
    ]


def _best_f1(found: np.ndarray, tp: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Place int [..., K] of the threshold of best F1 of each class (found, tp [..., K, T], cells
    [..., K]); a class without a cell takes the best for all classes together."""
    for_all = _f1(found.sum(-2), tp.sum(-2), cells.sum(-1)[..., None]).argmax(-1)[..., None]
    return np.where(cells > 0, _f1(found, tp, cells[..., None]).argmax(-1), for_all)


def _f1(found: np.ndarray, tp: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """2 tp / (found + cells), 0 where there is neither."""
    return 2 * tp / np.maximum(found + cells, 1)
