"""The unlabelled test images: what is opened, and all that can be wrong, in sentences."""

import json
import shutil

import numpy as np
import pytest
import tifffile

from cellseg_helpers.data import drawn as synthetic
from cellseg_helpers.data import hw3 as readers
from cellseg_helpers.data.faults import DataError
from cellseg_helpers.data.hw3 import NoTestImages, open_test_images

HEIGHT, WIDTH = 12, 17
LIST = "test_image_name_to_ids.json"


@pytest.fixture
def folder(tmp_path):
    """Three test images, listed as 7, 3, 5."""
    for name in "abc":
        add_image(tmp_path / "data", f"{name}.tif", name)
    write_list(tmp_path / "data", [entry("a", 7), entry("b", 3), entry("c", 5)])
    return tmp_path / "data"


def pixels(seed):
    return np.random.default_rng(ord(seed)).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def add_image(data, file_name, seed, **options):
    (data / "test_release").mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(data / "test_release" / file_name, pixels(seed), photometric="rgb", **options)


def entry(name, image_id, height=HEIGHT, width=WIDTH):
    return {"file_name": f"{name}.tif", "id": image_id, "height": height, "width": width}


def write_list(data, listed):
    (data / LIST).write_text(json.dumps(listed))


def faults_of(data):
    with pytest.raises(DataError) as caught:
        open_test_images(data)
    first, *faults, last = str(caught.value).splitlines()
    assert not isinstance(caught.value, NoTestImages)
    assert first == f"the data in {data} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:"
    assert last.startswith("Repair ")
    return [fault.strip() for fault in faults]


# What is opened


def test_images_come_in_the_lists_order_with_its_ids(folder):
    tests = open_test_images(folder)
    assert len(tests) == 3 and tests.name == "data" and tests.note == ""
    assert tests.listed == [entry("a", 7), entry("b", 3), entry("c", 5)]
    for image, name in zip(tests, "abc", strict=True):
        assert image.dtype == np.uint8 and np.array_equal(image, pixels(name).transpose(2, 0, 1))


def test_files_are_decoded_as_training_images_are(tmp_path):
    rgba = np.dstack([pixels("a"), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    for place in (tmp_path / "test_release" / "a.tif", tmp_path / "train" / "a" / "image.tif"):
        place.parent.mkdir(parents=True)
        tifffile.imwrite(
            place,
            rgba.astype(np.uint16) * 257,
            photometric="rgb",
            extrasamples=["unassalpha"],
            compression="lzw",
        )
    tifffile.imwrite(
        tmp_path / "train" / "a" / "class1.tif", np.eye(HEIGHT, WIDTH, dtype=np.uint16)
    )
    (image,) = open_test_images(tmp_path)
    assert np.array_equal(
        image, readers.open_dataset(tmp_path, cache_dir=tmp_path / "cache")[0].image
    )


def test_names_are_taken_in_any_case_and_other_files_left_alone(folder):
    release = folder / "test_release"
    (release / "b.tif").rename(release / "B.TIFF")
    for name in (".hidden.tif", "._a.tif", "notes.txt", "Thumbs.db"):
        (release / name).write_bytes(b"something else")
    assert np.array_equal(open_test_images(folder)[1], pixels("b").transpose(2, 0, 1))


def test_without_a_list_images_are_numbered_by_name(folder):
    (folder / LIST).unlink()
    tests = open_test_images(folder)
    assert tests.listed == [entry("a", 1), entry("b", 2), entry("c", 3)]
    assert (
        tests.note
        == f"There is no {LIST}: the 3 images are numbered from 1 in the order of their names."
    )


def test_the_drawn_data_have_test_images(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ROOT", tmp_path)
    draw = synthetic.draw_dataset
    monkeypatch.setattr(
        synthetic,
        "draw_dataset",
        lambda folder: draw(folder, num_train=1, num_test=2, image_size_px=(64, 70)),
    )
    tests = open_test_images("drawn")
    assert tests.name == "drawn" and [image["id"] for image in tests.listed] == [1, 2]
    assert [list(image.shape[1:]) for image in tests] == [
        [image["height"], image["width"]] for image in tests.listed
    ]


# What is not there


@pytest.mark.parametrize("leave", ["nothing", "empty_folder", "empty_list", "only_other_files"])
def test_data_without_test_images_are_told_apart(tmp_path, leave):
    (tmp_path / "train").mkdir()
    if leave != "nothing":
        (tmp_path / "test_release").mkdir()
    if leave == "empty_list":
        write_list(tmp_path, [])
    if leave == "only_other_files":
        (tmp_path / "test_release" / "readme.txt").write_text("none yet")
    with pytest.raises(
        NoTestImages, match="have no test images \\(test_release/<name>.tif\\); add some"
    ):
        open_test_images(tmp_path)


def test_a_missing_data_folder_is_another_matter(tmp_path):
    with pytest.raises(
        DataError, match="there is no such folder; give the folder that holds test_release/"
    ) as caught:
        open_test_images(tmp_path / "nowhere")
    assert not isinstance(caught.value, NoTestImages)


def test_a_list_whose_folder_is_missing_is_a_fault(folder):
    shutil.rmtree(folder / "test_release")
    assert faults_of(folder) == [
        f"test_release/{name}.tif: it is listed in {LIST} but missing; copy it there"
        for name in "abc"
    ]


def test_all_faults_are_told_at_once(folder):
    release = folder / "test_release"
    (release / "a.tif").unlink()
    (release / "b.tif").write_bytes((release / "b.tif").read_bytes()[:300])
    add_image(folder, "d.tif", "d")
    write_list(folder, [entry("a", 7), entry("b", 3), entry("c", 5, height=13)])
    faults = faults_of(folder)
    assert len(faults) == 4
    assert any(fault.startswith("test_release/b.tif: it is truncated") for fault in faults)
    assert faults[1:] == [
        f"test_release/a.tif: it is listed in {LIST} but missing; copy it there",
        "test_release/c.tif: it is 12 x 17 px, but listed as 13 x 17 px (height x width); "
        f"correct {LIST}, or copy the right image",
        f"test_release/d.tif: it is not listed in {LIST}, so it has no id; add it there, or remove the file",
    ]


def test_two_spellings_of_one_name(folder):
    add_image(folder, "a.TIFF", "a")
    assert faults_of(folder) == [
        "test_release/a.tif: a.TIFF is here too and means the same; keep one of them"
    ]


LISTS = {
    "no_json": ('[{"file_name": "a.tif", ', "it cannot be read as JSON (Expecting property name"),
    "not_text": (b"\xff\xfe\x00", "it cannot be read as JSON"),
    "too_deep": ("[" * 100_000, "it cannot be read as JSON"),
    "dict": ({"images": []}, "it holds no list of images but a dict; copy it again"),
    "text_in_list": (
        ["a.tif"],
        "entry 0 is 'a.tif', but must be an object with file_name, id, height, width",
    ),
    "keys": (
        [{"file_name": "a.tif", "height": 12}],
        "entry 0 has no id and no width; it needs file_name, id, height, width",
    ),
    "id_as_text": ([entry("a", "7")], "entry 0 has id '7', but it must be a whole number"),
    "id_true": ([entry("a", True)], "entry 0 has id 'True', but it must be a whole number"),
    "name_as_number": (
        [entry("a", 7) | {"file_name": 3}],
        "entry 0 has file_name '3', but it must be text",
    ),
    "height_0": (
        [entry("a", 7, height=0)],
        "entry 0 has height '0', but it must be a whole number of pixels, 1 or more",
    ),
    "width_fraction": (
        [entry("a", 7, width=17.5)],
        "entry 0 has width '17.5', but it must be a whole number of pixels",
    ),
    "same_id": (
        [entry("a", 7), entry("b", 7), entry("c", 5)],
        "id 7 is listed 2 times; list each once",
    ),
    "same_name": (
        [entry("a", 7), entry("A", 3), entry("c", 5)],
        "image 'a' is listed 2 times; list each once",
    ),
}


@pytest.mark.parametrize("content, expected", LISTS.values(), ids=LISTS)
def test_a_damaged_list_is_named(folder, content, expected):
    if isinstance(content, (str, bytes)):
        (folder / LIST).write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        write_list(folder, content)
    (fault,) = faults_of(folder)
    assert fault.startswith(f"{LIST}: {expected}")


def test_many_faults_are_counted(folder):
    write_list(folder, [entry(f"x{number}", number) for number in range(30)])
    with pytest.raises(
        DataError,
        match=r"has 33 faults:(\n  test_release/.*){20}\n  and 13 more\nRepair them and run again\.$",
    ):
        open_test_images(folder)


def test_a_file_that_goes_later_is_named(folder):
    tests = open_test_images(folder)
    (folder / "test_release" / "b.tif").unlink()
    with pytest.raises(DataError, match="b.tif: it cannot be read"):
        tests[1]
    with pytest.raises(IndexError):
        tests[3]
