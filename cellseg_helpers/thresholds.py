"""Score thresholds: what each of them gives, which to choose, how much better a choice looks on the
images that it was made on, and how far scores are probabilities.

All functions take the result of ``metrics.match_detections``. One matching serves every threshold,
since the match of a detection does not depend on detections with lower scores. Reliability is also
computed from the matches, which the other analyses share; hotcoco's ``calibration`` would need its
evaluation object instead. Needs no torch.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from cellseg_helpers.metrics import Matches, average_precision, count_by_image, count_matches

CRITERIA = ("F1", "count")
Thresholds = float | Mapping[str, float]  # one for all classes, or one for each class name


def keep_scores(matches: Matches, score_thresholds: Thresholds) -> Matches:
    """Keep the detections that score at least the threshold; cells matched by others are missed.

    Raises:
        ValueError: a class has no threshold.
    """
    thresholds = _thresholds_by_class(matches, score_thresholds)
    by_class_id = dict(zip(matches.class_names, thresholds, strict=True))
    detections, truths = matches.detections, matches.truths
    missed = ~(truths["score"] >= truths["class_id"].map(by_class_id))
    columns = {name: truths[name].mask(missed) for name in ("score", "detection")}
    remaining = detections[detections["score"] >= detections["class_id"].map(by_class_id)]
    return matches._replace(detections=remaining, truths=truths.assign(**columns))


def threshold_table(
    matches: Matches, strategies: Mapping[str, Thresholds], max_dets: int
) -> pd.DataFrame:
    """Compute counts and scores with the thresholds of each strategy.

    Returns:
        One row per strategy and class (``all`` first): strategy, class, score_threshold (NaN for
        ``all`` if the classes' thresholds differ), detections, AP50 (or another AP, at the matches'
        IoU threshold; at ``max_dets``), tp, fp, fn, precision, recall, F1.
    """
    tables = []
    for strategy, score_thresholds in strategies.items():
        thresholds = _thresholds_by_class(matches, score_thresholds)
        shared = thresholds[0] if len(set(thresholds)) == 1 else np.nan
        remaining = keep_scores(matches, score_thresholds)
        averages = pd.Series(average_precision(remaining, max_dets=max_dets)[0])
        counts = count_matches(remaining)
        table = pd.DataFrame(counts.values()).rename(columns={"f1": "F1"})
        columns = {"strategy": strategy, "class": list(counts)}
        columns |= {
            "score_threshold": [shared, *thresholds],
            "detections": table["tp"] + table["fp"],
        }
        columns[f"AP{round(100 * matches.iou_threshold)}"] = [averages.mean(), *averages]
        tables.append(pd.DataFrame(columns).join(table))
    return pd.concat(tables, ignore_index=True)


def sweep(matches: Matches, score_thresholds: Sequence[float], max_dets: int) -> pd.DataFrame:
    """Make the ``threshold_table`` of several thresholds, each one used for all classes."""
    strategies = {f"{threshold:g}": threshold for threshold in score_thresholds}
    return threshold_table(matches, strategies, max_dets).drop(columns="strategy")


def count_by_threshold(matches: Matches, score_thresholds: Sequence[float]) -> np.ndarray:
    """Count true positives, false positives and false negatives at each of T score thresholds:
    float64 [3, I, K, T], images and classes as in ``metrics.count_by_image``.
    """
    counts = [count_by_image(matches, threshold)[:3] for threshold in score_thresholds]
    return np.stack(counts, axis=-1)


def choose_thresholds(
    matches: Matches, score_thresholds: Sequence[float], criterion: str = "F1"
) -> dict[str, float]:
    """Choose the best threshold for each class (by name); of equally good ones the lowest.

    ``criterion`` is ``F1`` (a class without a cell gets the threshold that is best for all classes
    together), or ``count``: the smallest mean over images of |predicted - annotated cells|.

    Raises:
        ValueError: an unknown criterion, or no threshold.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; one of {', '.join(CRITERIA)}")
    if not len(score_thresholds):
        raise ValueError("score_thresholds is empty; give at least one to choose from")
    rising = np.sort(np.asarray(score_thresholds, float))
    counts = count_by_threshold(matches, rising)
    if criterion == "F1":
        best = _best_f1(counts.sum(1))
    else:
        _, fp, fn = counts  # predicted - annotated cells = fp - fn
        best = np.abs(fp - fn).sum(0).argmin(-1)
    return dict(zip(matches.class_names.values(), rising[best].tolist(), strict=True))


def optimism(
    matches: Matches,
    score_thresholds: Sequence[float],
    score_threshold: float,
    halvings: int,
    seed: int,
) -> pd.DataFrame:
    """Estimate how much larger the F1 gain of class thresholds is on the images used to choose them
    than on other images.

    How it works: 1. The images are halved at random many times. 2. On one half, the threshold of
    best F1 is chosen for each class. 3. The gain in F1 over one threshold shared by all classes is
    measured on that half (claimed) and on the other half (real). Their difference is the optimism.

    Args:
        score_thresholds: those to choose from.
        score_threshold: the shared one.
        halvings: number of random halvings; each half is used once for choosing.

    Returns:
        One row per class, ``all`` first (counts added over the classes): claimed, real, optimism
        (means over the halvings), low, high (limits of the middle 95 % of the optimism), halvings
        (number of choices where both halves hold the class).

    Raises:
        ValueError: fewer than two images, no halving, or no threshold.
    """
    images = len(matches.image_ids)
    if images < 2 or halvings < 1 or not len(score_thresholds):
        raise ValueError(
            "optimism needs two images, one halving and one threshold at least, not "
            f"{images} images, {halvings} halvings and {len(score_thresholds)} thresholds"
        )
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(images), (halvings, 1)), axis=1)
    chooses = np.concatenate([order < images // 2, order >= images // 2])  # [2 * halvings, I]
    counts = count_by_threshold(matches, [*sorted(score_thresholds), score_threshold])
    choosing, others = (np.einsum("hi,cikt->chkt", half, counts) for half in (chooses, ~chooses))
    best = _best_f1(choosing[..., :-1])
    claimed, real = _gain(choosing, best), _gain(others, best)
    gains = np.stack([claimed, real, claimed - real], axis=-1)  # [2 * halvings, 1 + K, 3]
    rows = {}
    for k, name in enumerate(("all", *matches.class_names.values())):
        table = pd.DataFrame(gains[:, k], columns=["claimed", "real", "optimism"]).dropna()
        low, high = table["optimism"].quantile([0.025, 0.975])
        rows[name] = {**table.mean(), "low": low, "high": high, "halvings": len(table)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def _gain(counts: np.ndarray, best: np.ndarray) -> np.ndarray:
    """F1 at the class thresholds of index ``best`` [H, K] minus F1 at the last threshold, from
    counts [3, H, K, T]: float64 [H, 1 + K], all classes together first, NaN without a cell.
    """
    chosen = np.take_along_axis(counts, best[None, ..., None], axis=-1)[..., 0]
    chosen, shared = (
        np.concatenate([part.sum(-1, keepdims=True), part], axis=-1)
        for part in (chosen, counts[..., -1])
    )
    cells = chosen[0] + chosen[2]
    return np.where(cells > 0, _f1(chosen) - _f1(shared), np.nan)


def separation(matches: Matches) -> pd.DataFrame:
    """Measure how well scores separate matched from unmatched detections, by class and ``all``.

    ``AUROC`` is the probability that a matched detection scores above an unmatched one (equal
    scores count half): 0.5 for scores at random, 1 for perfect separation; NaN if there are no
    matched or no unmatched detections. It is computed as Mann and Whitney's U / (n1 n2).
    """
    rows = {}
    for name, detections in _detections_by_class(matches).items():
        is_match = detections["matched"]
        matched, unmatched = int(is_match.sum()), int((~is_match).sum())
        u = rankdata(detections["score"])[is_match].sum() - matched * (matched + 1) / 2
        auroc = u / (matched * unmatched) if matched and unmatched else np.nan
        rows[name] = {"matched": matched, "unmatched": unmatched, "AUROC": auroc}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def reliability(matches: Matches, bins: int = 10) -> pd.DataFrame:
    """The share of matched detections in each score bin, for each class and for all classes
    together (``all``). Bins have equal widths from 0 to 1; an edge belongs to the bin above it.

    Returns:
        One row for each class and non-empty bin: class, bin (its lower edge), detections,
        mean_score, matched_share.

    Raises:
        ValueError: ``bins`` is under 1.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1")
    edges = np.linspace(0, 1, bins + 1)
    columns = {"detections": ("score", "size"), "mean_score": ("score", "mean")}
    columns |= {"matched_share": ("matched", "mean")}
    tables = {}
    for name, detections in _detections_by_class(matches).items():
        bins_of = np.searchsorted(edges[1:-1], detections["score"], side="right")
        tables[name] = detections.groupby(edges[bins_of]).agg(**columns)  # score 1: the last bin
    return pd.concat(tables, names=["class", "bin"]).reset_index()


def expected_calibration_error(table: pd.DataFrame) -> pd.Series:
    """Average |mean_score - matched_share| over the bins of a ``reliability`` table, by class; bins
    weigh as many as they have detections. 0: scores are probabilities.

    Guo et al., "On calibration of modern neural networks", 2017, equation 3.
    """
    weighted = (table["mean_score"] - table["matched_share"]).abs() * table["detections"]
    groups = table.assign(weighted=weighted).groupby("class", sort=False)
    return (groups["weighted"].sum() / groups["detections"].sum()).rename("ECE")


def cell_counts(matches: Matches, score_thresholds: Thresholds) -> pd.DataFrame:
    """Count the cells of each image and class. One row for each: image_id, class, cells
    (annotated), predicted (detections that score at least the threshold).
    """
    tp, fp, fn = count_by_image(keep_scores(matches, score_thresholds))[:3].astype(int)
    levels = [matches.image_ids, list(matches.class_names.values())]
    index = pd.MultiIndex.from_product(levels, names=["image_id", "class"])
    columns = {"cells": (tp + fn).ravel(), "predicted": (tp + fp).ravel()}
    return pd.DataFrame(columns, index).reset_index()


def counting_error(counts: pd.DataFrame) -> pd.DataFrame:
    """Summarise a ``cell_counts`` table by class: cells, predicted (sums over images), mean_error
    (mean of |predicted - cells| over images), bias (mean of predicted - cells).
    """
    difference = counts["predicted"] - counts["cells"]
    table = counts.assign(mean_error=difference.abs(), bias=difference).groupby("class", sort=False)
    return table.agg({"cells": "sum", "predicted": "sum", "mean_error": "mean", "bias": "mean"})


def _thresholds_by_class(matches: Matches, score_thresholds: Thresholds) -> list[float]:
    """The threshold of each class, in the order of ``class_names``."""
    names = list(matches.class_names.values())
    if not isinstance(score_thresholds, Mapping):
        return [float(score_thresholds)] * len(names)
    missing = ", ".join(name for name in names if name not in score_thresholds)
    if missing:
        raise ValueError(f"score_thresholds has no value for {missing}; give one for each class")
    return [float(score_thresholds[name]) for name in names]


def _detections_by_class(matches: Matches) -> dict[str, pd.DataFrame]:
    groups = {"all": matches.detections}
    for class_id, name in matches.class_names.items():
        groups[name] = matches.detections[matches.detections["class_id"] == class_id]
    return groups


def _best_f1(counts: np.ndarray) -> np.ndarray:
    """The index of the threshold with the best F1 for each class: int [..., K], from counts
    [3, ..., K, T]. A class without a cell gets the one that is best for all classes together.
    """
    cells = (counts[0] + counts[2])[..., 0]
    for_all = _f1(counts.sum(-2)).argmax(-1)[..., None]
    return np.where(cells > 0, _f1(counts).argmax(-1), for_all)


def _f1(counts: np.ndarray) -> np.ndarray:
    """2 tp / (2 tp + fp + fn), or 0 where all counts are 0; the first axis holds tp, fp, fn."""
    tp, fp, fn = counts
    return 2 * tp / np.maximum(2 * tp + fp + fn, 1)
