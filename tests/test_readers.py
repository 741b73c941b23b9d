import csv
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_helpers.config import ROOT
from cellseg_helpers.data import cache
from cellseg_helpers.data import drawn as synthetic
from cellseg_helpers.data import hw3 as readers
from cellseg_helpers.data.faults import DataError, Fault
from cellseg_helpers.data.hw3 import check_folder, open_dataset
from cellseg_helpers.data.labels import connected_components, find_instances

HEIGHT, WIDTH = 40, 33
IDS = "save whole numbers: 0 = background, other values = instance ids"


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """Three images without fault; ``a`` and ``c`` have cells of classes 1 and 3."""
    data = tmp_path / "data"
    for seed, image_id in enumerate("abc"):
        add_image(
            data,
            image_id,
            rgb(seed),
            {1: cells(), 3: cells() * 2} if image_id != "b" else {2: 0 * cells()},
        )
    return data


def rgb(seed=0, shape=(HEIGHT, WIDTH)):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def cells(dtype=np.uint16):
    """Three instances with a gap in the ids; 2 and 7 touch, and 7 comes in two pieces."""
    label_map = np.zeros((HEIGHT, WIDTH), dtype)
    label_map[0:5, 0:4] = 1 if dtype is bool else 2
    label_map[5:9, 4:6] = label_map[20, 20] = 1 if dtype is bool else 7
    label_map[30:40, 25:33] = 1
    return label_map


def add_image(data, image_id, image, class_maps, **options):
    place = data / "train" / image_id
    place.mkdir(parents=True)
    tifffile.imwrite(place / "image.tif", image, **{"photometric": "rgb", **options})
    for class_id, label_map in class_maps.items():
        tifffile.imwrite(place / f"class{class_id}.tif", label_map)


def write_patients(data, *rows, columns=("image_id", "patient")):
    with open(data / "patients.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


# Images as they come

GREY = rgb()[..., 0]
ALPHA = np.full((HEIGHT, WIDTH, 1), 77, np.uint8)
TWELVE_BITS = np.append(
    np.random.default_rng(1).integers(0, 4096, (HEIGHT, WIDTH, 2)),
    np.full((HEIGHT, WIDTH, 1), 4095),
    -1,
)
PALETTE = np.random.default_rng(2).integers(0, 65_536, (3, 256), np.uint16)
IMAGES = {
    "rgb": (rgb(), {}, rgb()),
    "rgba_lzw": (np.append(rgb(), ALPHA, -1), {"compression": "lzw"}, rgb()),
    "rgb_lzw_predictor": (rgb(), {"compression": "lzw", "predictor": True}, rgb()),
    "rgb_deflate_tiles": (rgb(), {"compression": "zlib", "tile": (16, 16)}, rgb()),
    "rgb_packbits_strips": (rgb(), {"compression": "packbits", "rowsperstrip": 7}, rgb()),
    "rgb_bigtiff_big_endian": (rgb(), {"bigtiff": True, "byteorder": ">"}, rgb()),
    "grey": (GREY, {"photometric": "minisblack"}, np.stack([GREY] * 3, -1)),
    "grey_alpha": (
        np.dstack([GREY, ALPHA]),
        {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]},
        np.stack([GREY] * 3, -1),
    ),
    "white_is_zero": (GREY, {"photometric": "miniswhite"}, 255 - np.stack([GREY] * 3, -1)),
    "palette": (
        GREY,
        {"photometric": "palette", "colormap": PALETTE},
        np.rint(PALETTE.T[GREY] / 257),
    ),
    "planar": (rgb().transpose(2, 0, 1), {"planarconfig": "separate"}, rgb()),
    "rgb_as_pages": (rgb().transpose(2, 0, 1), {"photometric": "minisblack"}, rgb()),
    "rgb_16_bits": (rgb().astype(np.uint16) * 257, {}, rgb()),
    "rgba_16_bits_lzw": (
        np.append(rgb(), ALPHA, -1).astype(np.uint16) * 257,
        {"compression": "lzw"},
        rgb(),
    ),
    "grey_16_bits": (
        GREY.astype(np.uint16) * 257,
        {"photometric": "minisblack"},
        np.stack([GREY] * 3, -1),
    ),
    "12_of_16_bits": (TWELVE_BITS.astype(np.uint16), {}, np.rint(TWELVE_BITS / 4095 * 255)),
    "8_of_16_bits": (rgb().astype(np.uint16), {}, rgb()),
}


@pytest.mark.parametrize("image, options, expected", IMAGES.values(), ids=IMAGES)
def test_image_of_every_kind(tmp_path, image, options, expected):
    add_image(tmp_path / "data", "a", image, {1: cells()}, **options)
    assert check_folder(tmp_path / "data") == []
    read = open_dataset(tmp_path / "data")[0].image
    assert (read.dtype, read.shape) == (np.uint8, (3, HEIGHT, WIDTH))
    assert np.array_equal(read, expected.transpose(2, 0, 1))


def test_jpeg_in_tiff_has_its_colours(tmp_path):
    image = np.full((HEIGHT, WIDTH, 3), [200, 90, 150], np.uint8)
    add_image(tmp_path, "a", image, {1: cells()}, compression="jpeg", compressionargs={"level": 95})
    assert np.abs(open_dataset(tmp_path)[0].image.transpose(1, 2, 0).astype(int) - image).max() <= 4


MASK_TYPES = (
    np.float64,
    np.float32,
    np.uint8,
    np.int8,
    np.uint16,
    np.int16,
    np.uint32,
    np.int32,
    np.int64,
    bool,
)


@pytest.mark.parametrize("dtype", MASK_TYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("options", [{}, {"compression": "lzw"}, {"byteorder": ">"}], ids=str)
def test_mask_of_every_type(tmp_path, dtype, options):
    add_image(tmp_path, "a", rgb(), {})
    tifffile.imwrite(
        tmp_path / "train" / "a" / "class3.tif", cells(dtype), photometric="minisblack", **options
    )
    label_maps = open_dataset(tmp_path)[0].label_maps
    assert (label_maps.dtype, label_maps.shape) == (np.int32, (4, HEIGHT, WIDTH))
    assert np.array_equal(label_maps[2], cells(dtype))
    assert not label_maps[[0, 1, 3]].any()


def test_mask_with_a_channel_axis(tmp_path):
    add_image(tmp_path, "a", rgb(), {1: cells()[..., None], 2: cells()[None]})
    assert np.array_equal(open_dataset(tmp_path)[0].label_maps[:2], [cells()] * 2)


def test_file_names_in_any_case_and_other_files_left_alone(tmp_path):
    add_image(tmp_path, "a", rgb(), {1: cells()})
    place = tmp_path / "train" / "a"
    (place / "image.tif").rename(place / "Image.TIFF")
    (place / "class1.tif").rename(place / "CLASS1.tiff")
    for name in ("._image.tif", "Thumbs.db", "notes.txt"):
        (place / name).write_bytes(b"x")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    assert check_folder(tmp_path) == []
    assert open_dataset(tmp_path).counts.tolist() == [[3, 0, 0, 0]]


def test_one_cell_in_33_px_and_772_cells_in_2500_px(tmp_path):
    add_image(tmp_path, "small", rgb(shape=(33, 33)), {4: np.eye(33, dtype=np.uint8)})
    many = np.zeros((2500, 2500))
    for i in range(772):
        y, x = divmod(i, 28)
        many[y * 89 : y * 89 + 20, x * 89 : x * 89 + 20] = i + 1
    add_image(
        tmp_path,
        "large",
        np.broadcast_to(np.uint8(200), (2500, 2500, 3)),
        {2: many},
        compression="lzw",
    )
    for reading in readers.INSTANCE_READINGS:
        dataset = open_dataset(tmp_path, reading)
        assert dataset.image_ids == ["large", "small"]
        assert dataset.sizes.tolist() == [[2500, 2500], [33, 33]]
        assert dataset.counts.tolist() == [[0, 772, 0, 0], [0, 0, 0, 1]]
    assert find_instances(dataset[0].label_maps).area_px.tolist() == [400] * 772


# Instances


def test_readings_of_an_instance(tmp_path):
    add_image(tmp_path, "a", rgb(), {1: cells(np.float64)})
    by_value = open_dataset(tmp_path)
    assert np.array_equal(by_value[0].label_maps[0], cells())
    assert by_value.counts.tolist() == [[3, 0, 0, 0]]
    components = open_dataset(tmp_path, "connected_components")
    assert np.array_equal(components[0].label_maps[0], connected_components(cells()))
    assert find_instances(components[0].label_maps).area_px.tolist() == [
        28,
        1,
        80,
    ]  # 2 and 7 touch at a corner
    assert by_value.fingerprint != components.fingerprint


@pytest.mark.parametrize(
    "reading, areas", [("pixel_values", [80, 20]), ("connected_components", [28, 80])]
)
def test_small_instances_are_left_out(tmp_path, reading, areas):
    add_image(tmp_path, "a", rgb(), {1: cells()})
    dataset = open_dataset(tmp_path, reading, min_instance_area_px=10)
    assert find_instances(dataset[0].label_maps).area_px.tolist() == areas
    assert dataset.counts.tolist() == [[2, 0, 0, 0]]


def test_id_65535_is_kept(tmp_path):
    add_image(tmp_path, "a", rgb(), {1: np.where(cells() == 7, 65_535.0, cells())})
    assert find_instances(open_dataset(tmp_path)[0].label_maps).ids.tolist() == [1, 2, 65_535]


def test_ids_above_65535_do_not_matter_to_components(tmp_path):
    add_image(tmp_path, "a", rgb(), {1: cells(np.int32) * 1_000_000})
    assert open_dataset(tmp_path, "connected_components").counts.tolist() == [[3, 0, 0, 0]]


def test_an_image_without_cells_is_an_image(folder):
    dataset = open_dataset(folder)
    assert dataset.counts.tolist() == [[3, 0, 3, 0], [0, 0, 0, 0], [3, 0, 3, 0]]
    assert not dataset[1].label_maps.any()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"instance_reading": "components"},
            "unknown instance_reading 'components'; one of pixel_values, connected_components",
        ),
        (
            {"min_instance_area_px": -1},
            "min_instance_area_px is -1; give a whole number of pixels, 0 or more",
        ),
        (
            {"min_instance_area_px": 2.5},
            "min_instance_area_px is 2.5; give a whole number of pixels, 0 or more",
        ),
    ],
)
def test_unknown_settings(folder, options, message):
    with pytest.raises(ValueError) as error:
        open_dataset(folder, **options)
    assert str(error.value) == message


# Faults


def truncate(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def overwrite_tag(path, name, value):
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages.first.tags[name].overwrite(value, dtype="I")


def put(name, array, **options):
    return lambda place: tifffile.imwrite(place / name, array, **options)


def changed(value, dtype=np.float64):
    label_map = cells(dtype)
    label_map[3, 2] = label_map[9, 9] = value
    return label_map


FAULTS = {  # what is done to train/a, the file at fault, what is said (... stands for the decoder's own words or a size)
    "image missing": (
        lambda place: (place / "image.tif").unlink(),
        "train/a/image.tif",
        "it is missing; put the image there under this name, or remove its folder",
    ),
    "image truncated": (
        lambda place: truncate(place / "image.tif", 0.5),
        "train/a/image.tif",
        "it is truncated (its ... bytes do not hold all its pixels); copy or export it again",
    ),
    "image truncated to its header": (
        lambda place: truncate(place / "image.tif", 0.001),
        "train/a/image.tif",
        "it cannot be read as a TIFF (...); copy or export it again",
    ),
    "image empty": (
        lambda place: (place / "image.tif").write_bytes(b""),
        "train/a/image.tif",
        "it cannot be read as a TIFF (...); copy or export it again",
    ),
    "image not a TIFF": (
        lambda place: (place / "image.tif").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)),
        "train/a/image.tif",
        "it cannot be read as a TIFF (...); copy or export it again",
    ),
    "image a folder": (
        lambda place: ((place / "image.tif").unlink(), (place / "image.tif").mkdir()),
        "train/a/image.tif",
        "it cannot be read as a TIFF (...); copy or export it again",
    ),
    "image of floats": (
        put("image.tif", rgb().astype(np.float32), photometric="rgb"),
        "train/a/image.tif",
        "its pixels are float32; save the image with 8 or 16 bits a channel (unsigned integers)",
    ),
    "image without one of its strips": (
        lambda place: (
            tifffile.imwrite(place / "image.tif", rgb(), photometric="rgb", rowsperstrip=20),
            overwrite_tag(place / "image.tif", "StripByteCounts", (20 * WIDTH * 3, 0)),
        ),
        "train/a/image.tif",
        "it is truncated (its ... bytes do not hold all its pixels); copy or export it again",
    ),
    "image with a damaged header": (
        lambda place: overwrite_tag(place / "image.tif", "ImageLength", 6_094_888),
        "train/a/image.tif",
        "its header claims 6094888 x 33 x 3 px, above 20,000 a side; cut it up, or copy it again if it is damaged",
    ),
    "image in CMYK": (
        put("image.tif", np.append(rgb(), ALPHA, -1), photometric="separated"),
        "train/a/image.tif",
        "its colours are SEPARATED; save the image as RGB or grey",
    ),
    "image of six channels": (
        put(
            "image.tif",
            np.append(rgb(), rgb(), -1),
            photometric="minisblack",
            planarconfig="contig",
        ),
        "train/a/image.tif",
        "its shape 40 x 33 x 6 is not that of an image; save height x width x 1 to 4 channels",
    ),
    "mask truncated": (
        lambda place: truncate(place / "class1.tif", 0.9),
        "train/a/class1.tif",
        "it is truncated (its ... bytes do not hold all its pixels); copy or export it again",
    ),
    "mask of another shape": (
        put("class1.tif", cells().T),
        "train/a/class1.tif",
        "it is 33 x 40 px but its image is 40 x 33 px (height x width); export both at one size",
    ),
    "mask of several channels": (
        put("class1.tif", rgb(), photometric="rgb"),
        "train/a/class1.tif",
        "its shape is 40 x 33 x 3; a class file has one channel: save height x width",
    ),
    "mask fractional": (
        put("class1.tif", changed(1.5)),
        "train/a/class1.tif",
        f"it has 2 fractional pixels (the first at row 3, column 2: 1.5); {IDS}",
    ),
    "mask negative": (
        put("class1.tif", changed(-1, np.int16)),
        "train/a/class1.tif",
        f"it has 2 negative pixels (the first at row 3, column 2: -1); {IDS}",
    ),
    "mask NaN": (
        put("class1.tif", changed(np.nan)),
        "train/a/class1.tif",
        f"it has 2 NaN pixels (the first at row 3, column 2: nan); {IDS}",
    ),
    "mask infinite": (
        put("class1.tif", changed(-np.inf)),
        "train/a/class1.tif",
        f"it has 2 infinite pixels (the first at row 3, column 2: -inf); {IDS}",
    ),
    "mask with several kinds": (
        put("class1.tif", np.where(cells() == 7, np.nan, np.where(cells() == 2, -2.5, cells()))),
        "train/a/class1.tif",
        "it has 9 NaN pixels (the first at row 5, column 4: nan) and 20 fractional pixels (the first at row 0, column 0: -2.5) "
        f"and 20 negative pixels (the first at row 0, column 0: -2.5); {IDS}",
    ),
    "mask complex": (
        put("class1.tif", cells().astype(np.complex64)),
        "train/a/class1.tif",
        f"it has pixels of type complex64; {IDS}",
    ),
    "id above 65,535": (
        put("class1.tif", changed(65_536)),
        "train/a/class1.tif",
        "its largest instance id is 65,536, above 65,535; number the instances from 1 on",
    ),
    "no class file": (
        lambda place: ((place / "class1.tif").unlink(), (place / "class3.tif").unlink()),
        "train/a",
        "it has no class file; add at least one of class1.tif to class4.tif (all 0 where there is no cell)",
    ),
    "empty folder": (
        lambda place: (shutil.rmtree(place), place.mkdir()),
        "train/a",
        "it is empty; put image.tif and its class files there, or remove the folder",
    ),
    "class5.tif": (
        put("class5.tif", cells()),
        "train/a/class5.tif",
        "unexpected name; image.tif and class1.tif to class4.tif are read: rename or remove it",
    ),
    "class2.png": (
        lambda place: (place / "class2.png").write_bytes(b"x"),
        "train/a/class2.png",
        "unexpected name; image.tif and class1.tif to class4.tif are read: rename or remove it",
    ),
    "class file twice": (
        put("class1.tiff", cells()),
        "train/a/class1.tiff",
        "class1.tif is here too and means the same; keep one of them",
    ),
    "class file twice in another case": (
        put("CLASS1.TIF", cells()),
        "train/a/class1.tif",
        "CLASS1.TIF is here too and means the same; keep one of them",
    ),
    "image twice": (
        put("image.tiff", rgb(), photometric="rgb"),
        "train/a/image.tiff",
        "image.tif is here too and means the same; keep one of them",
    ),
    "image beside its folder": (
        lambda place: shutil.copy(place / "image.tif", place.parent / "d.tif"),
        "train/d.tif",
        "it stands outside an image folder; move it to train/<image id>/ under its right name, or remove it",
    ),
}


def fits(text, expected):
    start, _, end = expected.partition("...")
    return text == expected or ("..." in expected and text.startswith(start) and text.endswith(end))


@pytest.mark.parametrize("spoil, file, problem", FAULTS.values(), ids=FAULTS)
def test_fault_of_one_image(folder, spoil, file, problem):
    spoil(folder / "train" / "a")
    faults = check_folder(folder)
    assert [fault.file for fault in faults] == [file]
    assert fits(faults[0].problem, problem)
    with pytest.raises(DataError) as error:
        open_dataset(folder)
    assert str(error.value) == (
        f"the data in {folder} has 1 fault:\n  {faults[0]}\n"
        "Repair it, or set skip_faulty_images to go on without these images."
    )
    dataset = open_dataset(folder, skip_faulty_images=True)
    assert dataset.skipped == faults
    assert dataset.image_ids == (["a", "b", "c"] if "d.tif" in file else ["b", "c"])


def test_more_components_than_65535(tmp_path):
    dots = np.zeros((512, 512), np.uint8)
    dots[::2, ::2] = 1
    add_image(tmp_path, "a", rgb(shape=dots.shape), {1: dots})
    assert check_folder(tmp_path) == []
    problem = "it has 65,536 connected components, above 65,535; is it a mask of cells?"
    assert check_folder(tmp_path, "connected_components") == [
        Fault("a", "train/a/class1.tif", problem)
    ]


@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
def test_a_file_cut_anywhere_is_a_fault(tmp_path, compression):
    add_image(tmp_path, "a", rgb(), {1: cells()}, compression=compression, rowsperstrip=16)
    path = tmp_path / "train" / "a" / "image.tif"
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 61), len(whole) - 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        faults = check_folder(tmp_path)
        assert [fault.file for fault in faults] == ["train/a/image.tif"], length


def test_every_fault_is_listed_in_one_pass(folder):
    for image_id, what in {
        "a": ("mask NaN", "class5.tif", "image truncated"),
        "c": ("image missing", "mask fractional"),
    }.items():
        for name in what:
            FAULTS[name][0](folder / "train" / image_id)
    write_patients(folder, ("a", "P1"), ("b", "P1"), ("b", "P2"), ("c", "P3"))
    expected = [
        ("b", "patients.csv"),
        ("a", "train/a/class1.tif"),
        ("a", "train/a/class5.tif"),
        ("a", "train/a/image.tif"),
        ("c", "train/c/class1.tif"),
        ("c", "train/c/image.tif"),
    ]
    faults = check_folder(folder)
    assert [fault[:2] for fault in faults] == expected
    with pytest.raises(DataError) as error:
        open_dataset(folder)
    for fault in faults:
        assert f"\n  {fault}\n" in str(error.value)
    with pytest.raises(DataError, match="Repair them and run again"):  # no image is left
        open_dataset(folder, skip_faulty_images=True)


def test_a_long_list_of_faults_is_cut(folder):
    for i in range(30):
        (folder / "train" / f"empty{i:02}").mkdir()
    with pytest.raises(DataError) as error:
        open_dataset(folder)
    lines = str(error.value).split("\n")
    assert len(lines) == 23
    assert lines[0] == f"the data in {folder} has 30 faults:"
    assert lines[21] == "  and 10 more: cellseg_helpers.data.hw3.check_folder lists all"
    assert (
        len(check_folder(folder))
        == len(open_dataset(folder, skip_faulty_images=True).skipped)
        == 30
    )


def test_image_ids_that_differ_in_case(folder):
    shutil.copytree(folder / "train" / "a", folder / "train" / "A")
    problem = (
        "another folder has the same image id but for upper and lower case; rename or remove one"
    )
    assert check_folder(folder) == [Fault("A", "train/A", problem), Fault("a", "train/a", problem)]


@pytest.mark.parametrize(
    "make, file, problem",
    [
        (lambda data: None, "{data}", "there is no such folder; give the folder that holds train/"),
        (
            lambda data: data.mkdir(),
            "{data}",
            "it has no train/ folder; give the folder that holds train/<image id>/image.tif",
        ),
        (
            lambda data: (data / "train").mkdir(parents=True),
            "train",
            "it holds no image folder; each image needs train/<image id>/image.tif",
        ),
    ],
    ids=["no folder", "no train folder", "no image folder"],
)
def test_folder_without_images(tmp_path, make, file, problem):
    data = tmp_path / "data"
    make(data)
    fault = Fault("", file.format(data=data), problem)
    assert check_folder(data) == [fault]
    for skip in (False, True):
        with pytest.raises(DataError) as error:
            open_dataset(data, skip_faulty_images=skip)
        assert (
            str(error.value)
            == f"the data in {data} has 1 fault:\n  {fault}\nRepair it and run again."
        )


def test_train_given_in_place_of_its_parent(folder):
    with pytest.raises(
        DataError, match=rf"train: it has no train/ folder; give the folder above, {folder}\n"
    ):
        open_dataset(folder / "train")


# Patients

ALL = [("a", "P1"), ("b", "P2"), ("c", "P1")]
NO_PATIENT = (
    "image id 'a' has no patient; fill it in, or remove patients.csv to go on without patients"
)


def test_patients_from_csv(folder):
    (folder / "test_release").mkdir()
    tifffile.imwrite(folder / "test_release" / "t.tif", rgb())
    rows = [(image_id, "lung", f" {patient} ") for image_id, patient in [*ALL, ("t", "P9")]]
    write_patients(folder, *rows, columns=("image_id", "organ", "patient"))
    dataset = open_dataset(folder)
    assert dataset.patients == ["P1", "P2", "P1"]
    assert dataset[1].patient == "P2"


def test_patients_from_names_or_unknown(tmp_path):
    for image_id in ("TCGA-A2-A0ES-01Z-00-DX1_001", "x1"):
        add_image(tmp_path, image_id, rgb(), {1: cells()})
    assert open_dataset(tmp_path).patients == ["TCGA-A2-A0ES", None]


@pytest.mark.parametrize(
    "rows, image_id, problem",
    [
        ([*ALL, ("a", "P1")], "a", "image id 'a' is listed 2 times; keep one row"),
        (
            [*ALL, ("d", "P1")],
            "d",
            "image id 'd' has no folder under train/; correct or remove its row",
        ),
        (
            ALL[1:],
            "a",
            "image id 'a' is missing; add its row, or remove patients.csv to go on without patients",
        ),
        ([("a", " "), *ALL[1:]], "a", NO_PATIENT),
        ([("a",), *ALL[1:]], "a", NO_PATIENT),
    ],
    ids=["twice", "unknown", "missing", "no patient", "short row"],
)
def test_faulty_patients(folder, rows, image_id, problem):
    write_patients(folder, *rows)
    assert check_folder(folder) == [Fault(image_id, "patients.csv", problem)]
    with pytest.raises(DataError, match="patients.csv: image id"):
        open_dataset(folder)
    dataset = open_dataset(folder, skip_faulty_images=True)
    assert dataset.image_ids == [i for i in "abc" if i != image_id]
    assert dataset.patients == [dict(ALL)[i] for i in dataset.image_ids]


@pytest.mark.parametrize(
    "content, problem",
    [
        (
            b"image_id;patient\na;P1\n",
            "its columns (image_id;patient) lack image_id and patient; name them in the first line",
        ),
        (
            b"image_id,person\na,P1\n",
            "its columns (image_id, person) lack patient; name them in the first line",
        ),
        (b"", "its columns (none) lack image_id and patient; name them in the first line"),
        (
            b"image_id,patient\na,\xff\n",
            "it cannot be read (...); save it as UTF-8 text with the columns image_id and patient",
        ),
    ],
    ids=["semicolons", "column", "empty", "not UTF-8"],
)
def test_unusable_patients_stop_the_run(folder, content, problem):
    (folder / "patients.csv").write_bytes(content)
    (fault,) = check_folder(folder)
    assert fault[:2] == ("", "patients.csv")
    assert fits(fault.problem, problem)
    for skip in (False, True):
        with pytest.raises(DataError) as error:
            open_dataset(folder, skip_faulty_images=skip)
        assert f"\n  {fault}\nRepair it and run again." in str(error.value)


# Cache


def directly(folder, image_id):
    place = folder / "train" / image_id
    label_maps = np.zeros((4, HEIGHT, WIDTH), np.int32)
    for path in place.glob("class*.tif"):
        label_maps[int(path.stem[-1]) - 1] = tifffile.imread(path)
    return tifffile.imread(place / "image.tif").transpose(2, 0, 1), label_maps


def assert_as_on_disk(dataset, folder):
    assert dataset.image_ids == sorted(path.name for path in (folder / "train").iterdir())
    for cell_image in dataset:
        image, label_maps = directly(folder, cell_image.image_id)
        assert np.array_equal(cell_image.image, image)
        assert np.array_equal(cell_image.label_maps, label_maps)


def caches(cache_dir):
    return sorted(path.name for path in cache_dir.iterdir())


def test_cache_equals_direct_reading_and_is_used(folder, cache_dir, monkeypatch):
    assert_as_on_disk(open_dataset(folder), folder)
    monkeypatch.setattr(readers, "read_tiff", None)
    again = open_dataset(folder)
    assert_as_on_disk(again, folder)
    assert again.name == "data"
    assert len(caches(cache_dir)) == 1
    assert not again[0].image.flags.writeable
    assert [again[-1].image_id, len(again)] == ["c", 3]
    with pytest.raises(IndexError):
        again[3]


def test_faults_are_remembered_too(folder, monkeypatch):
    (folder / "train" / "a" / "image.tif").unlink()
    with pytest.raises(DataError):
        open_dataset(folder)
    monkeypatch.setattr(readers, "read_tiff", None)
    assert len(open_dataset(folder, skip_faulty_images=True)) == 2
    with pytest.raises(DataError, match="train/a/image.tif: it is missing"):
        open_dataset(folder)


def change_one_pixel(folder):
    """In place: same name, same size, same modification time."""
    path = folder / "train" / "b" / "image.tif"
    status = path.stat()
    time.sleep(0.01)
    image = tifffile.imread(path)
    image[5, 5] ^= 1
    tifffile.imwrite(path, image, photometric="rgb")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_file(folder):
    path = folder / "train" / "b" / "class2.tif"
    tifffile.imwrite(path.with_name("new.tmp"), cells())
    os.replace(path.with_name("new.tmp"), path)


@pytest.mark.parametrize(
    "change",
    [
        change_one_pixel,
        replace_file,
        lambda folder: tifffile.imwrite(folder / "train" / "b" / "class4.tif", cells()),
        lambda folder: (folder / "train" / "a" / "class3.tif").unlink(),
        lambda folder: add_image(folder, "d", rgb(9), {1: cells()}),
        lambda folder: shutil.rmtree(folder / "train" / "c"),
    ],
    ids=["pixel", "replaced", "class added", "class removed", "image added", "image removed"],
)
def test_cache_is_rebuilt_after_a_change(folder, cache_dir, change):
    first = open_dataset(folder)
    before = first.fingerprint
    del first
    change(folder)
    changed_dataset = open_dataset(folder)
    assert changed_dataset.fingerprint != before
    assert_as_on_disk(changed_dataset, folder)
    assert len(caches(cache_dir)) == 1  # the old one is gone


def test_patients_csv_is_read_again_after_a_change(folder):
    assert open_dataset(folder).patients == [None] * 3
    write_patients(folder, *ALL)
    assert open_dataset(folder).patients == ["P1", "P2", "P1"]
    (folder / "patients.csv").unlink()
    assert open_dataset(folder).patients == [None] * 3


def test_an_old_cache_in_use_stays(folder, cache_dir):
    old = open_dataset(folder)
    old_pixels = old[1].image.copy()
    change_one_pixel(folder)
    new = open_dataset(folder)
    assert len(caches(cache_dir)) == 2
    assert np.array_equal(pickle.loads(pickle.dumps(old))[1].image, old_pixels)
    assert not np.array_equal(new[1].image, old_pixels)
    del old
    replace_file(folder)
    assert open_dataset(folder).fingerprint != new.fingerprint
    assert len(caches(cache_dir)) == 2  # new, and the third: the first went


def test_readings_have_caches_of_their_own(folder, cache_dir):
    options = [{}, {"instance_reading": "connected_components"}, {"min_instance_area_px": 10}]
    counts = [open_dataset(folder, **option).counts.sum() for option in options]
    assert counts == [12, 12, 8]
    assert len(caches(cache_dir)) == 3


def test_damaged_cache_is_rebuilt(folder, cache_dir):
    fingerprint = open_dataset(folder).fingerprint
    for file in ("0.bin", "2.bin", "index.json"):
        truncate(cache_dir / caches(cache_dir)[0] / file, 0.5)
        dataset = open_dataset(folder)
        assert dataset.fingerprint == fingerprint
        assert_as_on_disk(dataset, folder)
    (cache_dir / caches(cache_dir)[0] / "1.bin").unlink()
    assert_as_on_disk(open_dataset(folder), folder)


def test_pickled_dataset_carries_no_pixels(folder):
    dataset = open_dataset(folder)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(read_through, dataset).result() == read_through(dataset)
    shutil.rmtree(cache.CACHE)
    with pytest.raises(
        DataError,
        match="the decoded cache is gone or damaged; open the data again, which rebuilds it",
    ):
        pickle.loads(pickled)


def read_through(dataset):
    return [(i, p, int(image.sum()), int(label_maps.sum())) for i, p, image, label_maps in dataset]


def test_cache_folder_that_cannot_be_written(folder, cache_dir):
    cache_dir.write_text("a file stands in the way")
    with pytest.raises(
        DataError,
        match=r"cannot write the decoded cache in .*cache \(.+\); make room there, or allow writing",
    ):
        open_dataset(folder)


OPEN = """
import sys, time
from pathlib import Path
from cellseg_helpers.data import cache, hw3 as readers
cache.CACHE = Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
dataset = readers.open_dataset(sys.argv[1])
print(dataset.fingerprint, int(sum(image.image.sum(dtype=int) + image.label_maps.sum() for image in dataset)))
"""
KILLS = {
    "while decoding": """
import os, signal
read = readers._read_image
def read_then_die(place, *rest):
    if place.name == "c":
        os.kill(os.getpid(), signal.SIGKILL)
    return read(place, *rest)
readers._read_image = read_then_die
""",
    "before the move": """
import os, signal
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
""",
}


def start(folder, cache_dir, code=OPEN):
    command = [sys.executable, "-c", code, str(folder), str(cache_dir)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_processes_that_start_at_once_all_end_well(folder, cache_dir):
    for i in range(20):
        add_image(folder, f"more{i}", rgb(i), {1: cells()})
    processes = [start(folder, cache_dir) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    dataset = open_dataset(folder)
    total = sum(image.image.sum(dtype=int) + image.label_maps.sum() for image in dataset)
    assert results == {f"{dataset.fingerprint} {total}\n"}
    assert len(caches(cache_dir)) == 1


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_a_killed_builder_leaves_no_cache_to_read(folder, cache_dir, kill):
    process = start(folder, cache_dir, OPEN.replace('print("ready"', kill + 'print("ready"'))
    process.communicate("\n")
    assert process.returncode == -signal.SIGKILL
    (left,) = caches(cache_dir)
    assert left.startswith(".")
    assert_as_on_disk(open_dataset(folder), folder)
    assert left in caches(cache_dir)  # it could belong to a living process
    os.utime(cache_dir / left, (0, 0))
    change_one_pixel(folder)
    open_dataset(folder)
    assert len(caches(cache_dir)) == 1


def test_files_that_change_while_they_are_read(folder, monkeypatch):
    read = readers._read_image

    def read_and_change(*arguments):
        change_one_pixel(folder)
        return read(*arguments)

    monkeypatch.setattr(readers, "_read_image", read_and_change)
    with pytest.raises(
        DataError, match="its files change while they are read, .*; run again when they are at rest"
    ):
        open_dataset(folder)


# Fingerprint


def test_fingerprint_depends_on_content_alone(folder, tmp_path):
    other = tmp_path / "elsewhere" / "copy"
    for image_id in "cab":
        image, label_maps = directly(folder, image_id)
        rgba = np.append(image.transpose(1, 2, 0), ALPHA, -1)
        masks = {k: label_map.astype(np.float64) for k, label_map in enumerate(label_maps, 1)}
        add_image(other, image_id, rgba, masks, compression="lzw")
    assert open_dataset(other).fingerprint == open_dataset(folder).fingerprint


def test_fingerprint_is_the_same_on_every_machine(tmp_path):
    add_image(
        tmp_path,
        "a",
        np.arange(33 * 34 * 3, dtype=np.uint8).reshape(33, 34, 3),
        {2: np.eye(33, 34) * 300},
    )
    assert (
        open_dataset(tmp_path).fingerprint
        == "aa8b238b00e8e5391383f439090953704ec3bed8273b143046c936df01683cf7"
    )


# Embedded and real data


def test_drawn_data_are_drawn_on_first_use(tmp_path, monkeypatch):
    def draw(folder):
        if folder == tmp_path / "outputs" / "drawn" and not folder.exists():
            add_image(folder, "a", rgb(), {1: cells()})

    monkeypatch.setattr(readers, "ROOT", tmp_path)
    monkeypatch.setattr(synthetic, "draw_dataset", draw)
    for _ in range(2):
        dataset = open_dataset("drawn")
        assert (dataset.name, len(dataset)) == ("drawn", 1)


def test_drawn_folder_that_holds_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ROOT", tmp_path)
    (tmp_path / "outputs" / "drawn").mkdir(parents=True)
    (tmp_path / "outputs" / "drawn" / "mine.txt").write_text("x")
    with pytest.raises(
        DataError,
        match="the drawn data cannot be made: .*drawn holds something other than this drawing",
    ):
        open_dataset("drawn")


def test_official_sample(sample_data, tmp_path):
    place = tmp_path / "train" / "official"
    place.mkdir(parents=True)
    for path in (sample_data / "hw3_sample").glob("*.tif"):
        shutil.copy(path, place)
    assert check_folder(tmp_path) == []
    dataset = open_dataset(tmp_path)
    assert dataset.sizes.tolist() == [[397, 482]]
    assert dataset.counts.tolist() == [[2, 159, 0, 0]]
    assert find_instances(dataset[0].label_maps).ids.max() == 161
    assert np.array_equal(
        dataset[0].image, tifffile.imread(place / "image.tif")[..., :3].transpose(2, 0, 1)
    )
    assert open_dataset(tmp_path, "connected_components").counts.tolist() == [[2, 143, 0, 0]]


def test_unpacked_sample(sample_data, tmp_path):
    subprocess.run(
        [sys.executable, sample_data / "unpack.py", tmp_path], check=True, capture_output=True
    )
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 34
    assert dataset.counts.sum(0).tolist() == [2580, 2939, 54, 87]
    assert dataset.sizes.max() == 2500
    assert None not in dataset.patients


def test_reading_needs_no_torch():
    code = (
        "import sys; from cellseg_helpers.data import coco, hw3; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_relative_folders_stand_under_the_repository(folder, monkeypatch):
    monkeypatch.chdir("/")
    assert len(open_dataset(Path(os.path.relpath(folder, ROOT)))) == 3
