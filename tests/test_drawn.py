"""The drawn tissue: the HW3 layout with its quirks, the same bytes from the same seed, and what is
planted in it.
"""

import csv
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from cellseg_helpers.config import ROOT
from cellseg_helpers.data import drawn
from cellseg_helpers.data.drawn import (
    TISSUES,
    VERSION,
    discard_older_drawing,
    draw_dataset,
    draw_tissue,
)
from cellseg_helpers.data.labels import find_instances
from tools import drawn_vs_real

TRAIN, TEST = 14, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "tissue"
    draw_dataset(folder, TRAIN, TEST, seed=5)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def label_maps(folder: Path) -> list[np.ndarray]:
    return [tifffile.imread(path) for path in sorted(folder.glob("train/*/class*.tif"))]


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path / "again", TRAIN, TEST, seed=5)
    draw_dataset(tmp_path / "other", TRAIN, TEST, seed=6)
    assert content(tmp_path / "again") == content(folder)
    assert not {k for k in content(tmp_path / "other") if "train" in k} & set(content(folder))


def test_images_do_not_depend_on_how_many_are_drawn(folder: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path / "few", 3, 0, seed=5)
    few = {
        name: data for name, data in content(tmp_path / "few").items() if name.startswith("train")
    }
    assert few.items() <= content(folder).items()


def test_layout(folder: Path) -> None:
    names = sorted(path.name for path in (folder / "train").iterdir())
    assert len(names) == TRAIN and all(str(uuid.UUID(name)) == name for name in names)
    with open(folder / "patients.csv") as file:
        rows = list(csv.DictReader(file))
    assert (
        sorted(row["image_id"] for row in rows) == names
        and len({row["patient"] for row in rows}) == 8
    )
    tests = json.loads((folder / "test_image_name_to_ids.json").read_text())
    assert [test["id"] for test in tests] == [1, 2, 3]
    for test in tests:
        assert tifffile.imread(folder / "test_release" / test["file_name"]).shape == (
            test["height"],
            test["width"],
            3,
        )
    assert sorted(path.name for path in (folder / "test_release").iterdir()) == sorted(
        test["file_name"] for test in tests
    )


def test_files_have_the_quirks_of_the_course_data(folder: Path) -> None:
    gaps = []
    for train in (folder / "train").iterdir():
        with tifffile.TiffFile(train / "image.tif") as file:
            page = file.pages[0]
            assert (
                page.compression == tifffile.COMPRESSION.LZW
                and page.dtype == np.uint8
                and page.shape[2] == 4
            )
            shape = page.shape[:2]
            assert (page.asarray()[..., 3] == 255).all()
        masks = sorted(train.glob("class*.tif"))
        assert 1 <= len(masks) <= 4
        for mask in map(tifffile.imread, masks):
            assert (
                mask.dtype == np.float64
                and mask.shape == shape
                and (mask == np.rint(mask)).all()
                and mask.max() > 0
            )
            gaps.append(mask.max() > len(np.unique(mask)) - 1)
    assert any(gaps)
    assert len(gaps) < 4 * TRAIN


@pytest.mark.parametrize("kind", TISSUES)
def test_instances_are_whole_and_share_no_pixel(kind: str) -> None:
    image, maps = draw_tissue(np.random.default_rng(1), 180, 230, kind)
    assert image.shape == (3, 180, 230) and image.dtype == np.uint8
    assert maps.shape == (4, 180, 230) and maps.dtype == np.int32
    assert ((maps > 0).sum(0) <= 1).all()
    found = find_instances(maps)
    assert len(found.labels) > 0
    for label, instance_id in zip(found.labels, found.ids, strict=True):
        assert ndimage.label(maps[label - 1] == instance_id, np.ones((3, 3)))[1] == 1


def test_some_cells_abut() -> None:
    lymphocytes = draw_tissue(np.random.default_rng(1), 200, 200, "lymphoid")[1][1]
    left, right = lymphocytes[:, :-1], lymphocytes[:, 1:]
    assert ((left > 0) & (right > 0) & (left != right)).any()


@pytest.mark.parametrize("kind", TISSUES)
def test_border_cells_are_drawn_but_not_annotated(kind: str) -> None:
    image, maps = draw_tissue(np.random.default_rng(3), 160, 160, kind)
    same, all_maps = draw_tissue(
        np.random.default_rng(3), 160, 160, kind, annotate_border_cells=True
    )
    assert np.array_equal(image, same)
    assert not find_instances(maps).touches_border.any()
    added = find_instances(np.where(maps > 0, 0, all_maps))
    assert len(added.labels) > 0 and added.touches_border.all()
    assert np.array_equal(np.where(maps > 0, all_maps, 0), maps)


def test_classes_differ_as_real_ones_do(folder: Path) -> None:
    sizes, darkness = {k: [] for k in range(1, 5)}, {1: [], 2: []}
    for train in (folder / "train").iterdir():
        red = tifffile.imread(train / "image.tif")[..., 0]
        for path in train.glob("class*.tif"):
            k, mask = int(path.stem[-1]), tifffile.imread(path).astype(int)
            sizes[k] += list(np.sqrt(np.bincount(mask.ravel())[1:][np.unique(mask)[1:] - 1]))
            if k in darkness:
                darkness[k].append(red[mask > 0].mean())
    medians = {k: np.median(values) for k, values in sizes.items()}
    assert (
        14 < medians[2] < 19
        and 20 < medians[1] < 29
        and 20 < medians[3] < 26
        and 32 < medians[4] < 50
    )
    assert np.mean(darkness[2]) + 20 < np.mean(darkness[1])


def test_every_patient_of_the_default_size_shows_every_kind() -> None:
    turns = {
        (turn % 8, drawn.KINDS[(turn // 8 + turn % 8) % len(drawn.KINDS)]) for turn in range(48)
    }
    assert len(turns) == 8 * len(TISSUES)


def test_stain_turns_into_light_by_beer_lambert() -> None:
    amounts = np.zeros((3, 64, 64))
    amounts[0, :, 32:] = 1.0
    image = drawn._expose(
        np.random.default_rng(0), amounts, np.array([[1.0, 0.5, 0.0], [0, 0, 0], [0, 0, 0]])
    )
    clear, stained = image[:, :, :24].mean((1, 2)), image[:, :, 40:].mean((1, 2))
    assert stained / clear == pytest.approx([0.1, 10**-0.5, 1.0], abs=0.02)


def test_image_sides_stay_within_the_given_range(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "small", 8, 0, image_size_px=(96, 100))
    shapes = [
        tifffile.imread(path).shape[:2] for path in (tmp_path / "small").glob("train/*/image.tif")
    ]
    assert len(shapes) == 8 and all(72 <= side <= 130 for shape in shapes for side in shape)


def test_same_drawing_is_left_alone_and_another_is_refused(folder: Path, tmp_path: Path) -> None:
    before = (folder / "drawn.json").stat().st_mtime_ns
    draw_dataset(folder, TRAIN, TEST, seed=5)
    assert (folder / "drawn.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="remove that folder or name another one"):
        draw_dataset(folder, TRAIN, TEST, seed=6)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files"):
        draw_dataset(tmp_path, 2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_broken_off_drawing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(path: Path, *rest, **tags) -> None:
        written.append(path)
        if len(written) == 4:
            raise OSError("disk full")

    monkeypatch.setattr(drawn, "_write", write)
    with pytest.raises(OSError, match="disk full"):
        draw_dataset(tmp_path / "tissue", 4, 0)
    assert written and not list(tmp_path.iterdir())


def test_two_processes_at_once_end_well(tmp_path: Path) -> None:
    code = "from sys import argv; from cellseg_helpers.data.drawn import draw_dataset as draw; "
    command = [sys.executable, "-c", code + "draw(argv[1], 6, 1)", str(tmp_path / "tissue")]
    runs = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for _ in range(2)
    ]
    assert [run.wait(60) for run in runs] == [0, 0]
    draw_dataset(tmp_path / "alone", 6, 1)
    assert content(tmp_path / "tissue") == content(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {"tissue", "alone"}


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown kind of tissue 'bone'; one of epithelium, lymphoid"
    ):
        draw_tissue(np.random.default_rng(0), kind="bone")


@pytest.mark.parametrize("kind", TISSUES)
def test_small_and_narrow_images(kind: str) -> None:
    for height, width in ((33, 80), (150, 34), (40, 40)):
        image, maps = draw_tissue(np.random.default_rng(2), height, width, kind)
        assert image.shape == (3, height, width) and maps.shape == (4, height, width)


def test_a_drawing_of_another_version_is_discarded_and_nothing_else(tmp_path):
    draw_dataset(tmp_path / "drawn", 2, 0)
    discard_older_drawing(tmp_path / "drawn")
    assert (tmp_path / "drawn" / "train").is_dir()
    (tmp_path / "drawn" / "drawn.json").write_text(json.dumps({"version": VERSION - 1}))
    discard_older_drawing(tmp_path / "drawn")
    assert not (tmp_path / "drawn").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "drawn.json").write_text("not JSON")
    discard_older_drawing(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
    with pytest.raises(FileExistsError, match="holds something other than this drawing"):
        draw_dataset(tmp_path / "mine", 2, 0)


@pytest.mark.parametrize(
    "wrong",
    [{"num_train": 0}, {"num_test": -1}, {"image_size_px": (32, 64)}, {"image_size_px": (99, 90)}],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict
) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        draw_dataset(tmp_path / "tissue", **wrong)
    assert not list(tmp_path.iterdir())


def test_touching_counts_diagonal_neighbours_of_any_class() -> None:
    maps = np.zeros((4, 20, 20), np.int32)
    maps[0, 2:5, 2:5] = 1
    maps[0, 5:8, 5:8] = 2  # meets 1 at a corner
    maps[1, 8:10, 5:8] = 1  # meets 2 of class 1
    maps[1, 15:18, 15:18] = 2
    assert drawn_vs_real.touches_another(maps, find_instances(maps)).tolist() == [
        True,
        True,
        True,
        False,
    ]


def test_a_data_set_lies_at_distance_zero_from_itself(folder: Path) -> None:
    from cellseg_helpers.data.hw3 import open_dataset

    dataset = open_dataset(folder)
    table = drawn_vs_real.compare(dataset, dataset)
    assert (table.distance[table.measure == "sd"] == 0).all()
    assert (table.distance[table.measure == "ratio"].dropna() == 1).all()
    swapped = [cells._replace(image=cells.image[::-1]) for cells in dataset]
    assert drawn_vs_real.holds_bgr(swapped) and not drawn_vs_real.holds_bgr(dataset)
    assert drawn_vs_real.compare(swapped, dataset).equals(table)
