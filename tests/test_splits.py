"""Splits by patient and by image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellseg_helpers.data.splits import make_split, patient_of

FEW = settings(max_examples=40, deadline=None)


def split_of(patients, counts=None, kind="patient", fraction=0.25, seed=0):
    image_ids = [f"image{i}" for i in range(len(patients))]
    counts = np.ones((len(patients), 4), int) if counts is None else np.asarray(counts)
    return image_ids, make_split(image_ids, counts, patients, kind, fraction, seed)


@FEW
@given(
    st.lists(st.sampled_from("ABCDEFG"), min_size=2, max_size=30).filter(
        lambda patients: len(set(patients)) > 1
    ),
    st.floats(0.05, 0.95),
    st.integers(0, 1000),
)
def test_no_patient_stands_on_both_sides(patients, fraction, seed):
    image_ids, split = split_of(patients, fraction=fraction, seed=seed)
    assert sorted(split.train + split.validation) == sorted(image_ids)
    of = dict(zip(image_ids, patients, strict=True))
    assert split.train and split.validation
    assert not {of[i] for i in split.train} & {of[i] for i in split.validation}
    assert (split.kind, split.warning) == ("patient", "")


@FEW
@given(st.integers(2, 5), st.integers(5, 12), st.integers(0, 1000))
def test_each_patient_validates_in_one_fold(folds, number, seed):
    patients = [f"p{i % number}" for i in range(3 * number)]
    counts = np.random.default_rng(seed).integers(0, 50, (len(patients), 4))
    image_ids = [f"image{i}" for i in range(len(patients))]
    splits = [
        make_split(image_ids, counts, patients, "patient", 0.25, seed, folds, fold)
        for fold in range(folds)
    ]
    assert sorted(i for split in splits for i in split.validation) == sorted(image_ids)
    of = dict(zip(image_ids, patients, strict=True))
    for split in splits:
        assert sorted(split.train + split.validation) == sorted(image_ids)
        assert not {of[i] for i in split.train} & {of[i] for i in split.validation}
        assert len({of[i] for i in split.validation}) in (number // folds, -(-number // folds))


def test_a_class_in_as_many_patients_as_folds_is_in_every_fold():
    counts = np.ones((9, 4), int)
    counts[:6, 3] = 0
    patients = [f"p{i}" for i in range(9)]
    for fold in range(3):
        split = make_split(patients, counts, patients, "patient", 0.25, 0, 3, fold)
        assert sum(patient in split.validation for patient in patients[6:]) == 1


def test_more_folds_than_patients_are_refused():
    with pytest.raises(ValueError, match="needs at least 3 patients, one a fold, found 2"):
        make_split(["a", "b"], np.ones((2, 4), int), ["p", "q"], "patient", 0.25, 0, 3)


@FEW
@given(st.integers(2, 40), st.floats(0.05, 0.95), st.integers(0, 1000))
def test_a_random_split_holds_the_asked_share_of_images(number, fraction, seed):
    image_ids, split = split_of([None] * number, kind="random", fraction=fraction, seed=seed)
    assert sorted(split.train + split.validation) == sorted(image_ids)
    assert len(split.validation) == min(max(round(fraction * number), 1), number - 1)


@FEW
@given(st.integers(0, 10_000), st.sampled_from(["patient", "random"]))
def test_a_class_in_two_groups_reaches_both_sides(seed, kind):
    """12 patients of two images; macrophages in two patients (images) only, neutrophils in three."""
    rng = np.random.default_rng(seed)
    counts = np.column_stack(
        [rng.integers(1, 100, 24), rng.integers(1, 100, 24), np.zeros((24, 2), int)]
    )
    first = rng.permutation(12)
    for patient in first[:2]:
        counts[2 * patient, 3] = 5
    for patient in first[:3]:
        counts[2 * patient + 1, 2] = 2
    image_ids, split = split_of([f"p{i // 2}" for i in range(24)], counts, kind, 1 / 3, seed)
    held_out = np.isin(image_ids, split.validation)
    assert (counts[held_out].sum(0) > 0).all() and (counts[~held_out].sum(0) > 0).all()


@pytest.mark.parametrize("seed", range(30))
def test_a_rare_class_reaches_validation_also_at_a_small_fraction(seed):
    rng = np.random.default_rng(seed)
    counts = np.column_stack(
        [rng.integers(1, 100, 10), rng.integers(1, 100, 10), np.zeros((10, 2), int)]
    )
    counts[rng.choice(10, 2, replace=False), 3] = rng.integers(1, 60, 2)
    image_ids, split = split_of([f"p{i}" for i in range(10)], counts, fraction=0.25, seed=seed)
    held_out = np.isin(image_ids, split.validation)
    assert counts[held_out, 3].sum() > 0 and counts[~held_out, 3].sum() > 0


def test_auto_splits_by_patient_where_every_patient_is_known():
    patients = ["a", "a", "b", "b", "c", "d"]
    assert split_of(patients, kind="auto")[1] == split_of(patients, kind="patient")[1]
    unknown = split_of([None, *patients[1:]], kind="auto")[1]
    assert unknown.kind == "random" and unknown.warning
    assert split_of(["only"] * 6, kind="auto")[1].kind == "random"


def test_shares_of_each_class_are_near_the_asked_one():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (80, 4))
    image_ids, split = split_of([f"p{i % 20}" for i in range(80)], counts, fraction=0.25)
    held_out = np.isin(image_ids, split.validation)
    shares = counts[held_out].sum(0) / counts.sum(0)
    assert np.abs(shares - 0.25).max() < 0.05


def test_the_seed_decides():
    patients = [f"p{i // 3}" for i in range(36)]
    splits = [split_of(patients, kind="random", seed=seed)[1] for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


def test_a_class_that_nobody_has_is_no_obstacle():
    counts = np.ones((8, 4), int)
    counts[:, 3] = 0
    _, split = split_of([f"p{i // 2}" for i in range(8)], counts)
    assert len(split.validation) == 2
    _, split = split_of(["a", "b", "c", "d"], np.zeros((4, 4), int))
    assert len(split.validation) == 1


def test_a_random_split_warns_of_patients_on_both_sides():
    _, split = split_of(["only"] * 6, kind="random")
    assert split.warning.startswith(
        "1 patients have images on both sides of this random split (only ...)"
    )
    assert "too high" in split.warning


def test_a_random_split_warns_where_patients_are_unknown():
    _, split = split_of([None] * 6, kind="random")
    assert split.warning.startswith(
        "patients are unknown, so one patient's images may be on both sides"
    )
    _, split = split_of(["a", "b", "c", None], kind="random")
    assert "unknown" in split.warning


def test_a_random_split_of_one_image_a_patient_needs_no_warning():
    assert split_of(list("abcdef"), kind="random")[1].warning == ""


@pytest.mark.parametrize("patients", [list("aabbccdd"), [None] * 8])
def test_all_trains_on_the_validation_images_too(patients):
    image_ids, split = split_of(patients, kind="all")
    assert (
        split.train == image_ids
        and split.validation == split_of(patients, kind="auto")[1].validation
    )
    assert (split.kind, split.warning) == (
        "all",
        "the validation images are trained on, too: scores are of training images",
    )


@pytest.mark.parametrize(
    ("patients", "kind", "message"),
    [
        (["a", "b"], "patients", "unknown split 'patients'; one of auto, patient, random, all"),
        (
            ["a", None, "b", None],
            "patient",
            "2 of 4 have none \\(first: image1\\); add patients.csv .* or use split 'random'",
        ),
        (["a", "a", "a"], "patient", "split 'patient' needs at least two patients, found 1"),
        (["a"], "random", "split 'random' needs at least two images, found 1"),
    ],
)
def test_what_cannot_be_split_is_refused(patients, kind, message):
    with pytest.raises(ValueError, match=message):
        split_of(patients, kind=kind)


def test_patients_are_read_from_tcga_names():
    assert patient_of("TCGA-5P-A9K0-01Z-00-DX1_1") == "TCGA-5P-A9K0"
    assert patient_of("a_TCGA-2Z-A9JN-01Z") == "TCGA-2Z-A9JN"
    assert patient_of("0f4c1d9e-2f3a") is None
