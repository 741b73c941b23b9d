"""Write and check the course's submission: a zip file that contains ``test-results.json``.

The JSON is a list of ``{"image_id", "bbox", "score", "category_id", "segmentation": {"size": [h,
w], "counts": "<RLE>"}}``. In the course's own example, ``bbox`` has the corners of the box (x1, y1,
x2, y2); submissions with corners, with x, y, width, height and without ``bbox`` were all accepted.
This module writes x, y, width, height, as COCO's result format does, which every COCO tool reads.
"""

import json
import reprlib
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from cellseg_helpers.cells import CLASS_NAMES, Cells
from cellseg_helpers.config import one_line, replacing, resolve_path
from cellseg_helpers.data.coco import mask_problem
from cellseg_helpers.runs import write_json

RESULTS = "test-results.json"
CORNERS, SIDES = "corners", "x, y, width, height"
KEYS = ("image_id", "bbox", "score", "category_id", "segmentation")
Images = list[dict[str, Any]]  # the test images: id, height and width (px) of each


def _is_number(value: Any, least: float = -1e9, greatest: float = 1e9) -> bool:
    return type(value) in (int, float) and least <= value <= greatest  # no bool, no NaN


def _is_box(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) == 4
    return is_list and all(map(_is_number, value)) and min(value[2:]) >= 0


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {  # key -> check, what the value must be
    "image_id": (lambda value: type(value) is int, "a whole number"),
    "category_id": (
        lambda value: type(value) is int and 1 <= value <= len(CLASS_NAMES),
        f"a whole number, 1 to {len(CLASS_NAMES)}",
    ),
    "score": (lambda value: _is_number(value, 0, 1), "a number between 0 and 1"),
    "bbox": (_is_box, f"four numbers, {SIDES}"),
}


class Checked(NamedTuple):
    """What a check of a submission finds. ``faults`` has one sentence for each type of fault: the
    first result that has it (counted from 0), and how many more have it.

    ``summary`` has the numbers of results, of images with and without results, and of results of
    each class. Its ``boxes`` says how the boxes are written: "x, y, width, height", "corners",
    "none", "mixed", or "unclear" if both readings fit the masks equally well.
    """

    faults: list[str]
    summary: dict[str, Any]


def write_submission(cells: Cells, images: Images, folder: str | Path) -> tuple[Path, Path]:
    """Write detections as ``test-results.json`` and ``test-results.zip`` and return these paths.
    Each is written completely or not at all. The same cells give the same bytes.

    Raises:
        ValueError: ``check_results`` finds faults; nothing is written.
    """
    results = cells.to_coco()
    if faults := check_results(results, images).faults:
        raise ValueError("\n  ".join(["these detections are no valid submission:", *faults]))
    json_path, zip_path = (resolve_path(folder) / name for name in (RESULTS, "test-results.zip"))
    write_json(json_path, results)
    entry = zipfile.ZipInfo(RESULTS, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system, entry.external_attr = 3, 0o644 << 16  # Unix, readable by all
    with replacing(zip_path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(entry, json_path.read_bytes(), zipfile.ZIP_DEFLATED)
    return json_path, zip_path


def check_submission(path: str | Path, images: Images) -> Checked:
    """Check a ``.json`` or ``.zip`` file; damaged content is a fault, not an exception."""
    path = resolve_path(path)
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if RESULTS not in (names := archive.namelist()):
                    held = f"it holds {_first(names) or 'nothing'}"
                    return Checked([f"{path.name}: it has no {RESULTS} at its top; {held}"], {})
                data = archive.read(RESULTS)
        results = json.loads(data)
    except Exception as error:  # zipfile raises nearly everything on a broken file
        problem = f"it cannot be read as a zip archive or JSON ({one_line(error)}); write it again"
        return Checked([f"{path.name}: {problem}"], {})
    return check_results(results, images)


def check_results(results: Any, images: Images) -> Checked:
    """Check the content of ``test-results.json``."""
    if not isinstance(results, list):
        must_be = "must be a list of results: [{...}, {...}]"
        return Checked([f"it holds {reprlib.repr(results)}, but {must_be}"], {})
    sizes = {image["id"]: [image["height"], image["width"]] for image in images}
    faults: dict[str, list[str]] = {}  # type of fault -> sentences
    counts, faultless = {"image_id": Counter(), "category_id": Counter()}, []
    for row, result in enumerate(results):
        problems = _problems(result, sizes)
        valid_keys = result.keys() - problems.keys() if isinstance(result, dict) else set()
        image = f" (image {result['image_id']})" if "image_id" in valid_keys else ""
        for fault_type, sentence in problems.items():
            faults.setdefault(fault_type, []).append(f"result {row}{image}: {sentence}")
        for key in counts.keys() & valid_keys:
            counts[key][result[key]] += 1
        if not problems:
            faultless.append(result)
    with_results = len(counts["image_id"].keys() & sizes.keys())
    of_images = {"images with results": with_results}
    of_images["images without results"] = len(sizes) - with_results
    of_classes = {name: counts["category_id"][k] for k, name in enumerate(CLASS_NAMES, 1)}
    boxes = _box_format(faultless)
    summary = {"results": len(results), **of_images, **of_classes, "boxes": boxes}
    sentences = [
        f"{first} (and {len(more):,} more like it)" if more else first
        for first, *more in faults.values()
    ]
    return Checked(sentences, summary)


def _problems(result: Any, sizes: dict[int, list[int]]) -> dict[str, str]:
    """The faults of one result: type of fault -> sentence. The type of a wrong value is its key."""
    if not isinstance(result, dict):
        must_be = f"an object with {', '.join(KEYS)}"
        return {"result": f"it is {reprlib.repr(result)}, but must be {must_be}"}
    missing = [key for key in KEYS if key != "bbox" and key not in result]
    problems = {f"no {key}": f"it has no {key}" for key in missing}
    for key, (is_right, must_be) in RULES.items():
        if key in result and not is_right(result[key]):
            problems[key] = f"its {key} is {reprlib.repr(result[key])}; it must be {must_be}"
    is_id = "image_id" in result and "image_id" not in problems
    size = sizes.get(result["image_id"]) if is_id else None
    if is_id and size is None:
        known = f"the ids are {_first(sorted(sizes))}"
        problems["unknown image"] = f"there is no test image {result['image_id']}; {known}"
    if "segmentation" in result and (problem := mask_problem(result["segmentation"], size)):
        problems[" ".join(problem.split()[:3])] = problem
    return problems


def _first(values: list[Any]) -> str:
    """The first five values, separated by commas; two dots stand for the others."""
    text = ", ".join(map(str, values[:5]))
    return f"{text}, .." if len(values) > 5 else text


def _box_format(results: list[dict[str, Any]]) -> str:
    """How the boxes of faultless results are written, as in ``Checked.summary``: each box is read
    both ways, and the reading that has the higher IoU with the box of the mask counts.
    """
    boxed = [result for result in results if "bbox" in result]
    if not boxed:
        return "none"
    boxes = np.array([result["bbox"] for result in boxed], float)
    masks = coco_mask.toBbox([result["segmentation"] for result in boxed])
    sides, masks = (np.hstack([box[:, :2], box[:, :2] + box[:, 2:]]) for box in (boxes, masks))
    as_sides, as_corners = _iou(sides, masks), _iou(boxes, masks)
    votes = {SIDES: (as_sides > as_corners).sum(), CORNERS: (as_corners > as_sides).sum()}
    few = 0.01 * sum(votes.values())  # a poor mask may fit the wrong reading of its box better
    formats = [name for name, count in votes.items() if count > few]
    if len(boxed) < len(results) or len(formats) > 1:
        return "mixed"
    return formats[0] if formats else "unclear"


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The IoU of ``boxes[i]`` with ``others[i]`` (x1, y1, x2, y2) for each i: float64 [N]."""
    start, stop = np.maximum(boxes, others)[:, :2], np.minimum(boxes, others)[:, 2:]
    common = (stop - start).clip(0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (boxes, others)]
    return np.divide(common, sum(areas) - common, out=np.zeros(len(boxes)), where=common > 0)
