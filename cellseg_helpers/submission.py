"""The course's submission: ``test-results.json`` in a zip, written and checked.

The file is a list of ``{"image_id", "bbox", "score", "category_id", "segmentation": {"size": [h,
w], "counts": "<RLE>"}}``. As ``bbox`` the course's own example has the box's corners (x1, y1, x2,
y2); submissions with corners, with x, y, width, height and with no box at all were accepted. Here
it is x, y, width, height: COCO's result format, which every COCO reader takes.
"""

import json
import reprlib
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import resolve_path
from cellseg_helpers.data.rle_check import CORNERS, SIDES, box_reading, check_masks
from cellseg_helpers.runs import replacing, write_json

RESULTS = "test-results.json"
KEYS = ("image_id", "bbox", "score", "category_id", "segmentation")
NO_IMAGE = {"type", "no image_id", "image_id", "image"}  # kinds of faults
NO_CLASS = {"type", "no category_id", "category_id"}

Rows = list[dict[str, Any]]


class Checked(NamedTuple):
    """What a submission holds.

    Attributes:
        faults: a sentence for each kind, with the first place and how many there are; empty where
            all is well. Results are counted from 0.
        summary: results, images with results, images without, results of each class, and what the
            boxes are: "x, y, width, height", "corners", "none", "mixed" or, where they suit both or
            neither reading, "unclear".
    """

    faults: list[str]
    summary: dict[str, Any]


def write_submission(detections: Rows, images: Rows, folder: str | Path) -> tuple[Path, Path]:
    """Write ``test-results.json`` and ``test-results.zip``, each whole or not at all; the same
    detections give the same bytes.

    Args:
        detections: COCO results; other keys than the format's are left out.
        images: id, height and width (px) of the test images.
        folder: where to.

    Returns:
        The JSON file, the zip file.

    Raises:
        ValueError: ``check_results`` finds faults; nothing is written.
    """
    faults = check_results(detections, images).faults
    if faults:
        raise ValueError("\n  ".join(["these detections are no valid submission:", *faults]))
    json_path, zip_path = (resolve_path(folder) / name for name in (RESULTS, "test-results.zip"))
    write_json(
        json_path,
        [{key: detection[key] for key in KEYS if key in detection} for detection in detections],
    )
    entry = zipfile.ZipInfo(RESULTS, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system, entry.external_attr, entry.compress_type = (
        3,
        0o644 << 16,
        zipfile.ZIP_DEFLATED,
    )
    with replacing(zip_path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(entry, json_path.read_bytes())
    return json_path, zip_path


def check_submission(path: str | Path, images: Rows) -> Checked:
    """Check a submission, ``.json`` or ``.zip``, whatever it holds.

    Args:
        path: of the file.
        images: id, height and width (px) of the test images.
    """
    results, problem = _read(resolve_path(path))
    return (
        Checked([f"{Path(path).name}: {problem}"], {})
        if problem
        else check_results(results, images)
    )


def check_results(results: Any, images: Rows) -> Checked:
    """``check_submission`` of results that have been read, or are yet to be written."""
    if not isinstance(results, list):
        return Checked(
            [
                f"it holds {reprlib.repr(results)}, but must be a list of results: [{{...}}, {{...}}]"
            ],
            {},
        )
    sizes = {image["id"]: [image["height"], image["width"]] for image in images}
    faults = [_check(result, sizes) for result in results]
    rows = [
        row
        for row, found in enumerate(faults)
        if not found.keys() & {"type", "no segmentation", "segmentation"}
    ]
    masks = [results[row]["segmentation"] for row in rows]
    mask_boxes, problems = check_masks(
        [mask["counts"] for mask in masks], [mask["size"] for mask in masks]
    )
    boxes: Counter[str] = Counter()
    for row, mask_box, problem in zip(rows, mask_boxes.tolist(), problems, strict=True):
        box = results[row].get("bbox")
        boxes[
            "none"
            if "bbox" not in results[row]
            else "unclear"
            if "bbox" in faults[row]
            else box_reading(box, mask_box)
        ] += 1
        if problem:
            faults[row][problem.split(":")[0]] = problem
    told: dict[str, list[str]] = {}
    for row, found in enumerate(faults):
        for kind, sentence in found.items():
            image = (
                f" (image {results[row]['image_id']})"
                if not found.keys() & {"type", "no image_id", "image_id"}
                else ""
            )
            told.setdefault(kind, []).append(f"result {row}{image}: {sentence}")
    image_ids = {
        result["image_id"]
        for result, found in zip(results, faults, strict=True)
        if not found.keys() & NO_IMAGE
    }
    classes = Counter(
        result["category_id"]
        for result, found in zip(results, faults, strict=True)
        if not found.keys() & NO_CLASS
    )
    few = 0.01 * (
        boxes[SIDES] + boxes[CORNERS]
    )  # a poor mask may suit the wrong reading of its box
    kinds = [kind for kind in (SIDES, CORNERS) if boxes[kind] > few] + ["none"] * bool(
        boxes["none"]
    )
    return Checked(
        [
            first + (f" (and {len(more):,} more like it)" if more else "")
            for first, *more in told.values()
        ],
        {
            "results": len(results),
            "images with results": len(image_ids),
            "images without results": len(sizes) - len(image_ids),
            **{name: classes[class_id] for class_id, name in enumerate(CLASS_NAMES, 1)},
            "boxes": "mixed"
            if len(kinds) > 1
            else kinds[0]
            if kinds
            else "unclear"
            if boxes
            else "none",
        },
    )


def _read(path: Path) -> tuple[Any, str]:
    """What the file holds, and why it cannot be read or ""."""
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if RESULTS not in names:
                    held = ", ".join(names[:5]) + ", .." * (len(names) > 5)
                    return None, f"it has no {RESULTS} at its top; it holds {held or 'nothing'}"
                data = archive.read(RESULTS)
        return json.loads(data), ""
    except Exception as error:  # zipfile raises nearly everything on a broken file
        cause = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else str(error) or type(error).__name__
        )
        return (
            None,
            f"it cannot be read as a zip archive or JSON ({' '.join(cause.split())[:120]}); write it again",
        )


def _check(result: Any, sizes: dict[int, list[int]]) -> dict[str, str]:
    """What is wrong with a result, apart from its mask's runs: sentences by kind of fault."""
    if not isinstance(result, dict):
        return {
            "type": f"it is {reprlib.repr(result)}, but must be an object with {', '.join(KEYS)}"
        }
    faults = {
        f"no {key}": f"it has no {key}" for key in KEYS if key != "bbox" and key not in result
    }
    image_id, box, score, class_id, mask = (result.get(key) for key in KEYS)
    if "image_id" in result and not _is_whole(image_id):
        faults["image_id"] = f"its image_id is {reprlib.repr(image_id)}; it must be a whole number"
    elif "image_id" in result and image_id not in sizes:
        some = ", ".join(map(str, sorted(sizes)[:5])) + (", .." if len(sizes) > 5 else "")
        faults["image"] = f"there is no test image {image_id}; the ids are {some}"
    if "category_id" in result and not (_is_whole(class_id) and 1 <= class_id <= len(CLASS_NAMES)):
        faults["category_id"] = (
            f"its category_id is {reprlib.repr(class_id)}; it must be a whole number, 1 to {len(CLASS_NAMES)}"
        )
    if "score" in result and not (_is_number(score) and 0 <= score <= 1):
        faults["score"] = f"its score is {reprlib.repr(score)}; it must be a number between 0 and 1"
    if "bbox" in result and not (
        isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0
    ):
        faults["bbox"] = f"its bbox is {reprlib.repr(box)}; it must be four numbers, {SIDES}"
    if "segmentation" in result:
        faults |= _check_segmentation(mask, None if faults.keys() & NO_IMAGE else sizes[image_id])
    return faults


def _check_segmentation(mask: Any, image_size: list[int] | None) -> dict[str, str]:
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str):
        rle = 'a compressed RLE, {"size": [height, width], "counts": "text"}'
        return {"segmentation": f"its segmentation is {reprlib.repr(mask)}; it must be {rle}"}
    size = mask.get("size")
    if not (
        isinstance(size, list)
        and len(size) == 2
        and all(_is_whole(side) and 0 < side < 2**20 for side in size)
    ):
        return {
            "segmentation": f"its mask's size is {reprlib.repr(size)}; it must be [height, width] in px"
        }
    if image_size not in (None, size):
        turned = "; height and width are swapped" if size[::-1] == image_size else ""
        sizes = "its mask is {} x {} px, its image {} x {} px (height x width)".format(
            *size, *image_size
        )
        return {"size": sizes + turned}
    return {}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
