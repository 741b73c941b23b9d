"""Seeded splits by image or patient, with every class on both sides where the data allow it."""

import re
from itertools import compress
from typing import NamedTuple

import numpy as np

TCGA_PATIENT = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}")
CANDIDATES = 500  # random splits, of which the best one is taken


class Split(NamedTuple):
    """The image ids of each side, and a warning if a patient may be on both sides."""

    kind: str  # how it was split: "patient", "random" (by image) or "all" (trains on all images)
    train: list[str]
    validation: list[str]
    warning: str  # "" when no patient can be on both sides


def patient_of(image_id: str) -> str | None:
    """The TCGA patient in an image's name (``TCGA-xx-xxxx``), or None."""
    match = TCGA_PATIENT.search(image_id)
    return match.group() if match else None


def make_split(
    image_ids: list[str],
    counts: np.ndarray,
    patients: list[str | None],
    kind: str,
    validation_fraction: float,
    seed: int,
    folds: int = 0,
    fold: int = 0,
) -> Split:
    """Split N images so that the validation side holds about the same share of every class.

    How it works: 1. 500 candidate validation sides are sampled from the groups: all images of one
    patient or, for ``random``, single images. 2. The candidates with the most classes on both sides
    remain. 3. Of these, the one is taken whose shares of all images and of each class's instances
    are nearest to ``validation_fraction``. With ``folds``, each candidate divides the groups into
    ``folds`` validation sides of equal size (to within one group).

    Args:
        counts: int [N, K], instances per image and class.
        patients: names, None where unknown.
        kind: ``patient``: no patient is on both sides; ``random``: by image; ``auto``: ``patient``
            if the patients of all images are known and there are two or more, else ``random``;
            ``all``: as ``auto``, but every image is also on the training side.
        validation_fraction: share of the groups, in (0, 1); at least one group is on each side.
        folds: 0, or the number of validation sides for cross-validation, which replaces
            ``validation_fraction``.
        fold: the validation side to use, 0 to ``folds`` - 1.

    Raises:
        ValueError: an unknown kind, an unknown patient under ``patient``, fewer than two groups, or
            fewer groups than folds.
    """
    if kind not in ("auto", "patient", "random", "all"):
        raise ValueError(f"unknown split {kind!r}; one of auto, patient, random, all")
    if kind == "all":
        auto = make_split(
            image_ids, counts, patients, "auto", validation_fraction, seed, folds, fold
        )
        warning = "the validation images are trained on, too: scores are of training images"
        return Split(kind, list(image_ids), auto.validation, warning)
    if kind == "auto":
        kind = "random" if None in patients or len(set(patients)) < 2 else "patient"
    unknown = [i for i, patient in zip(image_ids, patients, strict=True) if patient is None]
    if kind == "patient" and unknown:
        raise ValueError(
            f"split 'patient' needs the patient of every image, but {len(unknown)} of "
            f"{len(image_ids)} have none (first: {unknown[0]}); add patients.csv (columns "
            "image_id, patient) beside train/, or use split 'random'"
        )
    groups = np.array(patients if kind == "patient" else image_ids, dtype=str)
    names, group_of = np.unique(groups, return_inverse=True)
    if len(names) < max(folds, 2):
        unit = "patients" if kind == "patient" else "images"
        least = f"{folds} {unit}, one a fold" if folds > 2 else f"two {unit}"
        raise ValueError(f"split {kind!r} needs at least {least}, found {len(names)}")

    size = min(max(round(validation_fraction * len(names)), 1), len(names) - 1)
    contents = np.column_stack([np.ones(len(image_ids)), counts])  # images, instances per class
    per_group = np.stack([np.bincount(group_of, column, len(names)) for column in contents.T], 1)
    shares = per_group / np.maximum(per_group.sum(0), 1)
    present = per_group.sum(0) > 0

    rng = np.random.default_rng(seed)
    if folds:
        fold_of = [rng.permutation(len(names)) % folds for _ in range(CANDIDATES)]  # by group
        candidates = [[np.flatnonzero(of == k) for k in range(folds)] for of in fold_of]
    else:
        candidates = [[rng.choice(len(names), size, replace=False)] for _ in range(CANDIDATES)]
    held_shares = np.array([[shares[groups].sum(0) for groups in one] for one in candidates])
    held_shares = held_shares[..., present]  # [candidate, fold, images and each class]
    one_sided = ((held_shares == 0) | np.isclose(held_shares, 1)).sum((1, 2))
    aim = 1 / folds if folds else validation_fraction
    best = np.lexsort((np.abs(held_shares - aim).sum((1, 2)), one_sided))[0]
    held_out = np.isin(group_of, candidates[best][fold])
    sides = [list(compress(image_ids, side)) for side in (~held_out, held_out)]
    return Split(kind, *sides, "" if kind == "patient" else _patient_warning(patients, held_out))


def _patient_warning(patients: list[str | None], held_out: np.ndarray) -> str:
    """A warning if a patient's images are, or may be, on both sides of a random split."""
    train, validation = (set(compress(patients, side)) - {None} for side in (~held_out, held_out))
    shared = sorted(train & validation)
    if shared:
        problem = f"{len(shared)} patients have images on both sides of this random split"
        return f"{problem} ({', '.join(shared[:3])} ...): scores will be too high"
    if None in patients:
        problem = "one patient's images may be on both sides of this random split"
        return f"patients are unknown, so {problem}: scores may be too high"
    return ""
