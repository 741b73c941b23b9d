"""The submission: what is written, and what is said of damaged and foreign files."""

import copy
import json
import math
import random
import re
import time
import zipfile

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scenes import HEIGHT, WIDTH, disc, result, truth_of

from cellseg_helpers.cells import Cells
from cellseg_helpers.submission import check_results, check_submission, write_submission

IMAGES = truth_of([], images=3)["images"]
SIDES = "x, y, width, height"


def detections() -> Cells:
    """Three discs and a large one in image 1, one disc in image 2, none in image 3."""
    cells = [
        (1, 1, 20, 30, 8),
        (1, 2, 60, 30, 9),
        (1, 2, 100, 80, 12),
        (1, 4, 60, 70, 15),
        (2, 3, 50, 50, 7),
    ]
    return Cells.from_coco(
        [
            result(image_id, k, 0.9 - 0.1 * row, disc(x, y, r))
            for row, (image_id, k, x, y, r) in enumerate(cells)
        ]
    )


def faults_of(change):
    """What is said when ``change`` was made to the third result."""
    results = detections().to_coco()
    change(results[2])
    return check_results(results, IMAGES).faults


# Writing


def test_the_file_is_the_courses_format(tmp_path):
    json_path, zip_path = write_submission(detections(), IMAGES, tmp_path / "new" / "folder")
    assert (json_path.name, zip_path.name) == ("test-results.json", "test-results.zip")
    assert json.loads(json_path.read_text()) == detections().to_coco()
    with zipfile.ZipFile(zip_path) as archive:
        assert archive.namelist() == ["test-results.json"] and archive.testzip() is None
        assert archive.read("test-results.json") == json_path.read_bytes()
    assert zip_path.stat().st_mode & 0o777 == 0o644


def test_the_same_detections_give_the_same_bytes(tmp_path, monkeypatch):
    first = write_submission(detections(), IMAGES, tmp_path / "a")
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setattr(time, "localtime", lambda *args: time.gmtime(2e9))
    again = write_submission(detections(), IMAGES, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_faulty_detections_are_not_written(tmp_path):
    paths = write_submission(detections(), IMAGES, tmp_path)
    before = [path.read_bytes() for path in paths]
    faulty = Cells.concatenate(
        [detections(), Cells.from_coco([result(9, 1, 1.2, disc(20, 20, 5))])]
    )
    with pytest.raises(
        ValueError,
        match="no valid submission:\n  result 5 .*score is 1.2.*\n  result 5 .*no test image 9",
    ):
        write_submission(faulty, IMAGES, tmp_path)
    assert [path.read_bytes() for path in paths] == before and sorted(tmp_path.iterdir()) == sorted(
        paths
    )


def test_a_failing_write_leaves_the_old_files(tmp_path, monkeypatch):
    paths = write_submission(detections(), IMAGES, tmp_path)
    before = paths[1].read_bytes()
    monkeypatch.setattr(
        zipfile.ZipFile,
        "writestr",
        lambda *args: (_ for _ in ()).throw(OSError("no space left on device")),
    )
    with pytest.raises(OSError, match="no space"):
        write_submission(detections()[:2], IMAGES, tmp_path)
    assert paths[1].read_bytes() == before and sorted(tmp_path.iterdir()) == sorted(paths)


# Checking whole files


@pytest.mark.parametrize("which", [0, 1], ids=["json", "zip"])
def test_a_written_submission_has_no_faults(tmp_path, which):
    checked = check_submission(write_submission(detections(), IMAGES, tmp_path)[which], IMAGES)
    assert checked.faults == []
    assert checked.summary == {
        "results": 5,
        "images with results": 2,
        "images without results": 1,
        "epithelial": 1,
        "lymphocyte": 2,
        "neutrophil": 1,
        "macrophage": 1,
        "boxes": SIDES,
    }


def test_no_result_at_all_is_no_fault():
    checked = check_results([], IMAGES)
    assert checked.faults == []
    assert (
        checked.summary["results"],
        checked.summary["images without results"],
        checked.summary["boxes"],
    ) == (0, 3, "none")


FILES = {
    "json_that_is_none": (
        "a.json",
        b"results",
        "a.json: it cannot be read as a zip archive or JSON \\(Expecting value",
    ),
    "half_a_json": (
        "a.json",
        b'[{"image_id": 1, "sc',
        "it cannot be read as a zip archive or JSON \\(Unterminated string",
    ),
    "empty": ("a.json", b"", "it cannot be read"),
    "bytes": ("a.json", bytes(range(128, 256)), "it cannot be read"),
    "too_deep": ("a.json", b"[" * 100_000, "it cannot be read .*recursion"),
    "zip_that_is_none": (
        "a.zip",
        b"[]",
        "a.zip: it cannot be read as a zip archive or JSON \\(File is not a zip file\\)",
    ),
    "dict": (
        "a.json",
        b'{"annotations": []}',
        "it holds {'annotations': \\[\\]}, but must be a list of results",
    ),
    "number": ("a.json", b"3", "it holds 3, but must be a list"),
    "list_of_lists": (
        "a.json",
        b"[[1, 2], [3], 4]",
        "result 0: it is \\[1, 2\\], but must be an .*\\(and 2 more like it\\)",
    ),
}


@pytest.mark.parametrize("name, content, expected", FILES.values(), ids=FILES)
def test_foreign_files_are_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    checked = check_submission(tmp_path / name, IMAGES)
    assert len(checked.faults) == 1
    assert re.search(expected, checked.faults[0])


def test_a_zip_without_the_results_says_what_it_holds(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("folder/test-results.json", "readme.txt"):
            archive.writestr(name, "[]")
    (fault,) = check_submission(tmp_path / "a.zip", IMAGES).faults
    assert fault == (
        "a.zip: it has no test-results.json at its top; "
        "it holds folder/test-results.json, readme.txt"
    )


def test_a_missing_file_and_a_folder(tmp_path):
    for path, cause in ((tmp_path / "a.zip", "No such file"), (tmp_path, "Is a directory")):
        (fault,) = check_submission(path, IMAGES).faults
        assert cause in fault and str(tmp_path) not in fault


def test_bytes_changed_at_random_never_raise(tmp_path):
    rng = random.Random(0)
    whole = [path.read_bytes() for path in write_submission(detections(), IMAGES, tmp_path)]
    found = 0
    for _ in range(400):
        damaged = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "a.zip").write_bytes(
            damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])]
        )
        (tmp_path / "a.zip").rename(tmp_path / rng.choice(["a.zip", "a.json"]))
        for name in ("a.zip", "a.json"):
            found += bool(check_submission(tmp_path / name, IMAGES).faults)
    assert found > 400


# Checking results


def put(*keys, value):
    def change(result):
        for key in keys[:-1]:
            result = result[key]
        result[keys[-1]] = value

    return change


def as_counts(*numbers):
    """Numbers as COCO writes them: groups of 5 bits, lowest first, 32 where more follow, 16 where
    the last is negative.
    """
    text = ""
    for number in numbers:
        while not -16 <= number < 16:
            text += chr(48 + 32 + (number & 31))
            number >>= 5
        text += chr(48 + (number & 31))
    return text


RLE = 'it must be a compressed RLE, {"size": [height, width], "counts": "text"}'
CASES = {
    "no_score": (lambda r: r.pop("score"), "result 2 (image 1): it has no score"),
    "no_image_id": (lambda r: r.pop("image_id"), "result 2: it has no image_id"),
    "no_segmentation": (
        lambda r: r.pop("segmentation"),
        "result 2 (image 1): it has no segmentation",
    ),
    "image_unknown": (
        put("image_id", value=7),
        "result 2 (image 7): there is no test image 7; the ids are 1, 2, 3",
    ),
    "image_as_text": (
        put("image_id", value="1"),
        "result 2: its image_id is '1'; it must be a whole number",
    ),
    "image_as_list": (
        put("image_id", value=[1]),
        "result 2: its image_id is [1]; it must be a whole number",
    ),
    "class_0": (
        put("category_id", value=0),
        "result 2 (image 1): its category_id is 0; it must be a whole number, 1 to 4",
    ),
    "class_5": (put("category_id", value=5), "its category_id is 5"),
    "class_as_text": (put("category_id", value="2"), "its category_id is '2'"),
    "class_true": (put("category_id", value=True), "its category_id is True"),
    "score_high": (
        put("score", value=1.2),
        "result 2 (image 1): its score is 1.2; it must be a number between 0 and 1",
    ),
    "score_negative": (put("score", value=-0.1), "its score is -0.1"),
    "score_nan": (put("score", value=math.nan), "its score is nan"),
    "score_text": (put("score", value="0.5"), "its score is '0.5'"),
    "score_null": (put("score", value=None), "its score is None"),
    "box_of_three": (
        put("bbox", value=[1, 2, 3]),
        "its bbox is [1, 2, 3]; it must be four numbers, x, y, width, height",
    ),
    "box_with_text": (put("bbox", value=[1, 2, 3, "4"]), "its bbox is [1, 2, 3, '4']"),
    "box_infinite": (put("bbox", value=[1, 2, 3, math.inf]), "its bbox is [1, 2, 3, inf]"),
    "box_huge": (put("bbox", value=[1, 2, 3, 10**400]), "its bbox is [1, 2, 3, 1000"),
    "box_negative": (put("bbox", value=[1, 2, -3, 4]), "its bbox is [1, 2, -3, 4]"),
    "box_null": (put("bbox", value=None), "its bbox is None"),
    "polygon": (
        put("segmentation", value=[[1, 2, 3, 4, 5, 6]]),
        f"its segmentation is [[1, 2, 3, 4, 5, 6]]; {RLE}",
    ),
    "counts_as_list": (put("segmentation", "counts", value=[10, 5]), RLE),
    "no_counts": (lambda r: r["segmentation"].pop("counts"), RLE),
    "size_of_text": (
        put("segmentation", "size", value="90x110"),
        "its mask's size is '90x110'; it must be [height, width]",
    ),
    "size_turned": (
        put("segmentation", "size", value=[WIDTH, HEIGHT]),
        "its mask is 110 x 90 px, its image 90 x 110 px (height x width); "
        "height and width are swapped",
    ),
    "no_rle": (
        put("segmentation", "counts", value="a cell"),
        "its counts are damaged: they are no text of a compressed RLE",
    ),
    "not_ascii": (
        put("segmentation", "counts", value="é\ud800"),
        "they are no text of a compressed RLE",
    ),
    "empty_counts": (
        put("segmentation", "counts", value=""),
        "they are no text of a compressed RLE",
    ),
    "endless_number": (
        put("segmentation", "counts", value="o" * 30 + "0"),
        "they are no text of a compressed RLE",
    ),
    "too_short": (
        put("segmentation", "counts", value=as_counts(1, 2, 3, 4)),
        "mask's 9,900 px, but they cover 12 px",
    ),
    "negative_run": (
        put("segmentation", "counts", value=as_counts(9900, 7, -7)),
        "the mask's 9,900 px, but one is negative",
    ),
    "empty_mask": (
        put("segmentation", value=coco_mask.encode(np.zeros((HEIGHT, WIDTH), np.uint8, order="F"))),
        "its mask has no pixel; leave such results out",
    ),
}


@pytest.mark.parametrize("change, expected", CASES.values(), ids=CASES)
def test_every_fault_has_its_sentence(change, expected):
    def as_json(result):
        change(result)
        counts = (
            result.get("segmentation")
            and isinstance(result["segmentation"], dict)
            and result["segmentation"].get("counts")
        )
        if isinstance(counts, bytes):
            result["segmentation"]["counts"] = counts.decode()

    (fault,) = faults_of(as_json)
    assert fault.startswith("result 2") and expected in fault


def test_like_faults_are_told_once():
    results = detections().to_coco() * 9
    for row in range(3, 45):
        results[row] = results[row] | {"score": 1 + row}
    results[17] = results[17] | {"category_id": 9}
    assert check_results(results, IMAGES).faults == [
        "result 3 (image 1): its score is 4; it must be a number between 0 and 1 "
        "(and 41 more like it)",
        "result 17 (image 1): its category_id is 9; it must be a whole number, 1 to 4",
    ]


def test_several_faults_of_one_result_are_all_told():
    def change(result):
        result |= {"image_id": "1", "category_id": 0, "score": None, "bbox": []}
        result["segmentation"] = result["segmentation"] | {"counts": "1"}

    kinds = [fault.split("its ")[1].split()[0] for fault in faults_of(change)]
    assert kinds == ["image_id", "category_id", "score", "bbox", "counts"]


def corners(detection):
    x, y, width, height = detection["bbox"]
    return detection | {"bbox": [x, y, x + width, y + height]}


def no_box(detection):
    return {key: value for key, value in detection.items() if key != "bbox"}


def test_the_kind_of_the_boxes_is_told():
    sides = detections().to_coco() * 40
    kind_of = {
        "as they are": sides,
        "corners": [corners(detection) for detection in sides],
        "none": [no_box(detection) for detection in sides],
        "half": [
            corners(detection) if row % 2 else detection for row, detection in enumerate(sides)
        ],
        "one without": [no_box(sides[0]), *sides[1:]],
        "one stray": [corners(sides[0]), *sides[1:]],
        "elsewhere": [detection | {"bbox": [0, 0, 0, 0]} for detection in sides],
    }
    told = {name: check_results(results, IMAGES) for name, results in kind_of.items()}
    assert not any(checked.faults for checked in told.values())
    assert [checked.summary["boxes"] for checked in told.values()] == [
        SIDES, "corners", "none", "mixed", "mixed", SIDES, "unclear",
    ]  # fmt: skip


def test_many_results_are_checked_in_seconds():
    results = [copy.copy(detection) for detection in detections().to_coco() * 4000]
    started = time.process_time()
    assert check_results(results, IMAGES).summary["results"] == 20_000
    assert time.process_time() - started < 2
