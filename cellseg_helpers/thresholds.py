"""Score thresholds: what each does, which to choose, how optimistic it is to judge a choice on the
images that made it, and how far scores are probabilities.

All functions take the table of ``metrics.match_detections``: a match depends on no lower-scored
detection, so one matching serves every threshold. No torch.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from cellseg_helpers.metrics import Matches, average_precision, count_by_image, count_matches

CRITERIA = ("F1", "count")
Thresholds = float | Mapping[str, float]  # one for all classes, or one for each class name


def keep_scores(matches: Matches, score_thresholds: Thresholds) -> Matches:
    """The matches of the detections that score at least the threshold.

    Raises:
        ValueError: a class has no threshold.
    """
    least = dict(zip(matches.class_names, _by_class(matches, score_thresholds), strict=True))
    found, truths = matches.detections, matches.truths
    lost = ~(truths["score"] >= truths["class_id"].map(least))
    columns = {name: truths[name].mask(lost) for name in ("score", "detection")}
    kept = found[found["score"] >= found["class_id"].map(least)]
    return matches._replace(detections=kept, truths=truths.assign(**columns))


def threshold_table(
    matches: Matches, strategies: Mapping[str, Thresholds], max_dets: int
) -> pd.DataFrame:
    """What the thresholds of each strategy give.

    Returns:
        One row a strategy and class (``all`` first): strategy, class, score_threshold (NaN where
        the classes' differ), detections, AP50 (by the matches' IoU, at ``max_dets``), tp, fp, fn,
        precision, recall, F1.
    """
    tables = []
    for strategy, score_thresholds in strategies.items():
        thresholds = _by_class(matches, score_thresholds)
        shared = thresholds[0] if len(set(thresholds)) == 1 else np.nan
        kept = keep_scores(matches, score_thresholds)
        averages = pd.Series(average_precision(kept, max_dets=max_dets)[0])
        counts = count_matches(kept)
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
    """``threshold_table`` of one threshold for all classes after another, without ``strategy``."""
    strategies = {f"{threshold:g}": threshold for threshold in score_thresholds}
    return threshold_table(matches, strategies, max_dets).drop(columns="strategy")


def count_by_threshold(matches: Matches, score_thresholds: Sequence[float]) -> np.ndarray:
    """True positives, false positives and false negatives of the detections that score at least
    each of T thresholds: float64 [3, I, K, T], images and classes as in ``metrics.count_by_image``.
    """
    counts = [count_by_image(matches, threshold)[:3] for threshold in score_thresholds]
    return np.stack(counts, axis=-1)


def choose_thresholds(
    matches: Matches, score_thresholds: Sequence[float], criterion: str = "F1"
) -> dict[str, float]:
    """The best of some thresholds for each class name; of equally good ones the lowest.

    ``criterion`` is ``F1`` (a class without a cell gets the threshold that is best for all classes
    together), or ``count``: the smallest mean over images of |predicted - true number of cells|.

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
        _, fp, fn = counts
        best = np.abs(fp - fn).sum(0).argmin(-1)
    return dict(zip(matches.class_names.values(), rising[best].tolist(), strict=True))


def optimism(
    matches: Matches,
    score_thresholds: Sequence[float],
    score_threshold: float,
    halvings: int,
    seed: int,
) -> pd.DataFrame:
    """How much more F1 class thresholds seem to gain on the images that chose them than they gain
    on others.

    How it works: 1. The images are halved at random many times. 2. On one half, each class gets its
    threshold of best F1. 3. The gain in F1 over one shared threshold is measured on that half
    (claimed) and on the other (real). Their difference is the optimism.

    Args:
        score_thresholds: to choose from.
        score_threshold: the shared one.
        halvings: number of random halvings; either half chooses once.

    Returns:
        By class, ``all`` first (its counts added over the classes): claimed, real, optimism (their
        means over the halvings), low, high (the middle 95 % of the optimism), halvings (choices
        made where both halves hold the class).

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
    choosing, judging = (np.einsum("hi,cikt->chkt", half, counts) for half in (chooses, ~chooses))
    best = _best_f1(choosing[..., :-1])
    claimed, real = _gain(choosing, best), _gain(judging, best)
    gains = np.stack([claimed, real, claimed - real], axis=-1)  # [2 * halvings, 1 + K, 3]
    rows = {}
    for k, name in enumerate(("all", *matches.class_names.values())):
        table = pd.DataFrame(gains[:, k], columns=["claimed", "real", "optimism"]).dropna()
        low, high = table["optimism"].quantile([0.025, 0.975])
        rows[name] = {**table.mean(), "low": low, "high": high, "halvings": len(table)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def _gain(counts: np.ndarray, best: np.ndarray) -> np.ndarray:
    """F1 at each class's threshold, by its index ``best`` [H, K], minus F1 at the last threshold,
    of counts [3, H, K, T]: float64 [H, 1 + K], all classes first; NaN without a cell.
    """
    chosen = np.take_along_axis(counts, best[None, ..., None], axis=-1)[..., 0]
    chosen, shared = (
        np.concatenate([part.sum(-1, keepdims=True), part], axis=-1)
        for part in (chosen, counts[..., -1])
    )
    cells = chosen[0] + chosen[2]
    return np.where(cells > 0, _f1(chosen) - _f1(shared), np.nan)


def separation(matches: Matches) -> pd.DataFrame:
    """How well scores tell matched from unmatched detections, by class and ``all``.

    ``AUROC`` is the chance that a matched detection scores above an unmatched one (equal scores
    count half): 0.5 tells nothing, 1 is perfect (Mann and Whitney's U / (n1 n2)); NaN where one
    kind is missing.
    """
    rows = {}
    for name, found in _classes(matches).items():
        right, wrong = int(found["matched"].sum()), int((~found["matched"]).sum())
        above = rankdata(found["score"])[found["matched"]].sum() - right * (right + 1) / 2
        share = above / (right * wrong) if right and wrong else np.nan
        rows[name] = {"matched": right, "unmatched": wrong, "AUROC": share}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def reliability(matches: Matches, bins: int = 10) -> pd.DataFrame:
    """Of the detections in each bin of scores, the share that is matched, by class and ``all``. The
    bins are of equal width from 0 to 1; an edge belongs to the bin above it.

    Returns:
        One row a class and filled bin: class, bin (its lower edge), detections, mean_score,
        matched_share.

    Raises:
        ValueError: ``bins`` is under 1.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1")
    edges = np.linspace(0, 1, bins + 1)
    columns = {"detections": ("score", "size"), "mean_score": ("score", "mean")}
    columns |= {"matched_share": ("matched", "mean")}
    tables = {}
    for name, found in _classes(matches).items():
        lower = edges[np.searchsorted(edges[1:-1], found["score"], side="right")]
        tables[name] = found.groupby(lower).agg(**columns)
    return pd.concat(tables, names=["class", "bin"]).reset_index()


def expected_calibration_error(table: pd.DataFrame) -> pd.Series:
    """Mean distance of score and matched share over the detections, by class, of a table of
    ``reliability``; 0 = scores are probabilities.

    Guo et al., "On calibration of modern neural networks", 2017, equation 3.
    """
    distance = (table["mean_score"] - table["matched_share"]).abs() * table["detections"]
    groups = table.assign(distance=distance).groupby("class", sort=False)
    return (groups["distance"].sum() / groups["detections"].sum()).rename("ECE")


def cell_counts(matches: Matches, score_thresholds: Thresholds) -> pd.DataFrame:
    """One row an image and class: image_id, class, cells (annotated), predicted (detections of at
    least the threshold).
    """
    tp, fp, fn = count_by_image(keep_scores(matches, score_thresholds))[:3].astype(int)
    places = [matches.image_ids, list(matches.class_names.values())]
    index = pd.MultiIndex.from_product(places, names=["image_id", "class"])
    columns = {"cells": (tp + fn).ravel(), "predicted": (tp + fp).ravel()}
    return pd.DataFrame(columns, index).reset_index()


def counting_error(counts: pd.DataFrame) -> pd.DataFrame:
    """By class of a table of ``cell_counts``: cells, predicted, mean_error (over images, of
    |predicted - cells|), bias (of predicted - cells).
    """
    difference = counts["predicted"] - counts["cells"]
    table = counts.assign(mean_error=difference.abs(), bias=difference).groupby("class", sort=False)
    return table.agg({"cells": "sum", "predicted": "sum", "mean_error": "mean", "bias": "mean"})


def _by_class(matches: Matches, score_thresholds: Thresholds) -> list[float]:
    names = list(matches.class_names.values())
    if not isinstance(score_thresholds, Mapping):
        return [float(score_thresholds)] * len(names)
    missing = ", ".join(name for name in names if name not in score_thresholds)
    if missing:
        raise ValueError(f"score_thresholds has no value for {missing}; give one for each class")
    return [float(score_thresholds[name]) for name in names]


def _classes(matches: Matches) -> dict[str, pd.DataFrame]:
    found, names = matches.detections, matches.class_names.items()
    return {"all": found} | {name: found[found["class_id"] == k] for k, name in names}


def _best_f1(counts: np.ndarray) -> np.ndarray:
    """Index int [..., K] of each class's threshold of best F1, of counts [3, ..., K, T]; a class
    without a cell gets the one that is best for all classes together.
    """
    cells = (counts[0] + counts[2])[..., 0]
    for_all = _f1(counts.sum(-2)).argmax(-1)[..., None]
    return np.where(cells > 0, _f1(counts).argmax(-1), for_all)


def _f1(counts: np.ndarray) -> np.ndarray:
    """2 tp / (2 tp + fp + fn), 0 where nothing is counted; tp, fp, fn along the first axis."""
    tp, fp, fn = counts
    return 2 * tp / np.maximum(2 * tp + fp + fn, 1)
