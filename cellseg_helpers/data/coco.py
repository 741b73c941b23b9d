"""Writes, checks and reads COCO data sets; ``data.hw3`` reads the pixels. numpy and pycocotools.

    python -m cellseg_helpers.data.coco DATA DESTINATION

writes ``DESTINATION/annotations.json`` and the images it lists, ``DESTINATION/images/<image
id>.tif``. A run with ``data`` set to that file trains as one on DATA does: images, patients and
instances, and their order, are the same. Test images are not exported.

What is read of a COCO file:

- ``images``: ``id``, ``file_name`` (relative to the file's own folder), ``height``, ``width``, and
  optionally ``patient`` (otherwise a TCGA file name gives the patient). The image id is the file's
  name without folder and ending.
- ``categories``: ``id`` and ``name``, one of ``CLASS_NAMES`` or ``class1`` to ``class4``, in any
  case. If no category has such a name, ``category_id`` 1 to 4 is the class.
- ``annotations``: ``id``, ``image_id``, ``category_id`` and ``segmentation``: an RLE with counts as
  text or as numbers, or polygons, which pycocotools fills. ``bbox`` and ``area`` are not read.

Where annotations of one class overlap, the smallest one gets the pixels (of equally large ones, the
first), as in ``tools.monusac``. An annotation without any pixel left is a fault.
"""

import argparse
import json
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from pycocotools import mask as coco_mask
from tqdm import tqdm

from cellseg_helpers.cells import CLASS_NAMES, decode_mask, run_lengths
from cellseg_helpers.config import replacing, resolve_path
from cellseg_helpers.data.cache import LARGEST_ID, CellImage
from cellseg_helpers.data.faults import DataError, Fault, adding_fault, as_data_error
from cellseg_helpers.data.labels import find_boxes, find_cells
from cellseg_helpers.data.splits import patient_of

CLASS_IDS = {alias: k for k, name in enumerate(CLASS_NAMES, 1) for alias in (name, f"class{k}")}
LISTS = ("images", "annotations", "categories")
GIVE_OWN = "give each its own"
# Compressed counts, as ``cells.run_lengths`` explains them: "0" to "O" is the last group of a
# number, "P" to "o" an earlier one; six groups are enough for 500 million px.
COUNTS = re.compile("([P-o]{0,5}[0-O])+")


# Writing COCO files


def to_coco(cell_images: Iterable[CellImage]) -> dict[str, Any]:
    """Images and their instances as a COCO data set (a dict). Image ids count from 1; masks are
    RLEs whose counts are text; an image's ``file_name`` is its ``CellImage.image_id``.
    """
    images, annotations = [], []
    for number, (image_id, patient, image, label_maps) in enumerate(cell_images, 1):
        size = dict(zip(("height", "width"), image.shape[1:], strict=True))
        images.append({"id": number, "file_name": image_id, **size, "patient": patient})
        cells = find_cells(label_maps, number)
        for row, area in zip(cells.to_coco(), cells.area_px.tolist(), strict=True):
            entry = {"id": len(annotations) + 1, "image_id": number}
            entry |= {key: row[key] for key in ("category_id", "bbox")}
            segmentation = row["segmentation"]
            annotations.append(entry | {"area": area, "iscrowd": 0, "segmentation": segmentation})
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASS_NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def export_coco(data: str | Path, destination: str | Path) -> Path:
    """Write a data set as COCO, whole or not at all; returns the COCO file's path.

    Images become RGB uint8 TIFFs (LZW), masks compressed RLEs. Instance ids are not written, but in
    each image the annotations of each class are ordered by instance id.

    Args:
        data: as for ``hw3.open_dataset``.
        destination: a new or empty folder; a relative path is under the repository's root.

    Raises:
        DataError: the data cannot be used, or the destination is not empty.
        OSError: the destination cannot be written.
    """
    from cellseg_helpers.data.hw3 import open_dataset  # at the top it would be a circular import

    destination = resolve_path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        remedy = "remove it, or name another destination"
        raise DataError(f"{destination} exists and is not an empty folder; {remedy}")
    dataset = open_dataset(data)
    content = to_coco(dataset)
    tiff = {"photometric": "rgb", "compression": "lzw", "predictor": True, "metadata": None}
    bar = tqdm(dataset, f"exporting {dataset.name}", unit="image", delay=2, leave=False)
    with replacing(destination, folder=True) as part:
        (part / "images").mkdir()
        for listed, cell_image in zip(content["images"], bar, strict=True):
            listed["file_name"] = f"images/{cell_image.image_id}.tif"
            pixels = cell_image.image.transpose(1, 2, 0)
            tifffile.imwrite(part / listed["file_name"], pixels, **tiff)
        content = {"info": {"description": f"Cells of the data {dataset.name}"}, **content}
        text = json.dumps(content, allow_nan=False) + "\n"
        (part / "annotations.json").write_text(text, encoding="utf-8")
    return destination / "annotations.json"


# Checking entries of JSON files


def mask_problem(segmentation: Any, size: Sequence[int] | None = None) -> str:
    """Why a segmentation is no compressed RLE with at least one pixel; "" if it is one. ``size``:
    height and width of its image, px; None if unknown.
    """
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), str):
        rle = 'a compressed RLE, {"size": [height, width], "counts": "text"}'
        return f"its segmentation is {reprlib.repr(segmentation)}; it must be {rle}"
    mask_size, counts = segmentation.get("size"), segmentation["counts"]
    is_pair = isinstance(mask_size, list) and len(mask_size) == 2
    if not is_pair or not all(type(side) is int and 0 < side < 2**20 for side in mask_size):
        return f"its mask's size is {reprlib.repr(mask_size)}; it must be [height, width] in px"
    if size is not None and mask_size != list(size):
        hint = "; height and width are swapped" if mask_size[::-1] == list(size) else ""
        sizes = "its mask is {} x {} px, its image {} x {} px (height x width)"
        return sizes.format(*mask_size, *size) + hint
    if not COUNTS.fullmatch(counts):
        return "its counts are damaged: they are no text of a compressed RLE"
    lengths = run_lengths(counts)
    mask_px = mask_size[0] * mask_size[1]
    if lengths.min() < 0 or lengths.sum() != mask_px:
        return _run_lengths_problem(lengths.tolist(), mask_px)
    return "" if lengths[1::2].any() else "its mask has no pixel; leave such results out"


def _run_lengths_problem(lengths: Sequence[int], expected_px: int) -> str:
    problem = "one is negative" if min(lengths) < 0 else f"they cover {sum(lengths):,} px"
    rule = f"run lengths must cover the mask's {expected_px:,} px"
    return f"its counts are damaged: {rule}, but {problem}"


# What the value of a key must be, in words (as in messages), and its test.
TEXT, WHOLE, EITHER = "text", "a whole number", "a whole number or text"
SIDE = "a whole number of pixels, 1 or more"
VALUE_TESTS = {
    TEXT: lambda value: isinstance(value, str) and value.strip() != "" and "\0" not in value,
    WHOLE: lambda value: type(value) is int,
    EITHER: lambda value: VALUE_TESTS[WHOLE](value) or VALUE_TESTS[TEXT](value),
    SIDE: lambda value: type(value) is int and value > 0,
}


def wrong_entry(entry: Any, required: Mapping[str, str], **optional: str) -> str:
    """The fault of an entry of a JSON list, worded as the end of a sentence ("has no id; ..."); ""
    if there is none. ``required``: key -> what its value must be (a key of ``VALUE_TESTS``);
    ``optional``: the same for keys that may be missing or null.
    """
    if not isinstance(entry, dict):
        return f"is {_shortened(entry)}, but must be an object with {', '.join(required)}"
    if missing := [key for key in required if key not in entry]:
        return f"has no {' and no '.join(missing)}; it needs {', '.join(required)}"
    given = {key: rule for key, rule in optional.items() if entry.get(key) is not None}
    for key, rule in {**required, **given}.items():
        if not VALUE_TESTS[rule](entry[key]):
            return f"has {key} {_shortened(entry[key])}, but it must be {rule}"
    return ""


def _shortened(value: Any) -> str:
    return repr(str(value)[:40])


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises ``DataError`` if it cannot be read."""
    with as_data_error("it cannot be read as JSON"):
        return json.loads(path.read_bytes())


# Reading COCO files


class CocoAnnotation(NamedTuple):
    """One annotation; its mask is not checked yet."""

    where: str  # for messages: "annotations.json, annotation 3"
    class_id: int
    segmentation: Any  # as in the file
    is_crowd: bool


class CocoImage(NamedTuple):
    """One image that the file lists, with its annotations in the file's order."""

    path: Path
    file_name: str
    height: int
    width: int
    patient: str | None
    annotations: list[CocoAnnotation]

    @property
    def image_id(self) -> str:
        return Path(self.file_name).stem


def read_coco(path: Path) -> tuple[list[CocoImage], list[Fault]]:
    """The images that a COCO file lists, sorted by image id; and the file's faults, except those of
    masks, which ``draw_label_maps`` checks.
    """
    if not path.exists():
        remedy = "give the .json of a COCO data set, or a folder that holds train/"
        return [], [Fault("", str(path), f"there is no such file; {remedy}")]
    images, problems = {}, []
    try:
        content = _read_lists(path)
        images = _read_images(content, path.parent, problems)
        _add_annotations(content, path.name, images, problems)
    except DataError as error:
        problems.append(str(error))
    by_id = {image.image_id: image for image in images.values()}
    faults = [Fault("", path.name, problem) for problem in problems]
    return [by_id[image_id] for image_id in sorted(by_id)], faults


def _read_lists(path: Path) -> dict[str, list]:
    """The content of a COCO file, checked to hold lists of images, annotations and categories;
    without categories, their list is empty.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        problem = f"it holds no COCO data set but a {type(content).__name__}"
        raise DataError(f"{problem}; give an object with {', '.join(LISTS)}")
    content = {"categories": [], **content}
    for name in LISTS:
        if name not in content:
            expected = f"a COCO data set is an object with {', '.join(LISTS)}"
            raise DataError(f"it has no {name}; {expected}")
        if not isinstance(content[name], list):
            problem = f"its {name} are no list but a {type(content[name]).__name__}"
            raise DataError(f"{problem}; export it again")
    if not content["images"]:
        raise DataError("its list of images is empty; export it again, with images")
    return content


def _entries(
    content: dict, name: str, problems: list[str], required: dict[str, str], **optional: str
) -> Iterator[dict[str, Any]]:
    """Yield the faultless entries of the list ``name``; add the others' faults to ``problems``."""
    ids = set()
    for row, entry in enumerate(content[name]):
        problem = wrong_entry(entry, required, **optional)
        if not problem and entry["id"] in ids:
            problem = f"has id {_shortened(entry['id'])}, as one before it; {GIVE_OWN}"
        if problem:
            problems.append(f"entry {row} of its {name} {problem}")
        else:
            ids.add(entry["id"])
            yield entry


def _read_images(
    content: dict[str, list], folder: Path, problems: list[str]
) -> dict[int | str, CocoImage]:
    """Images, still without annotations, by their ``id`` in the file; adds to ``problems``."""
    required = {"id": EITHER, "file_name": TEXT, "height": SIDE, "width": SIDE}
    images = {}
    for entry in _entries(content, "images", problems, required, patient=TEXT):
        number, name, height, width = (entry[key] for key in required)
        patient = (entry.get("patient") or "").strip() or patient_of(Path(name).stem)
        images[number] = CocoImage(folder / name, name, height, width, patient, [])
    names = Counter(image.image_id.lower() for image in images.values())
    ending = f"but for folder, ending, upper and lower case; {GIVE_OWN}, since it is the image id"
    problems += [
        f"{count} entries of its images have the file name {_shortened(name)}, {ending}"
        for name, count in names.items()
        if count > 1
    ]
    return images


def _add_annotations(
    content: dict[str, list], file: str, images: dict[int | str, CocoImage], problems: list[str]
) -> None:
    """Add each annotation to its image; add faults of the list to ``problems``."""
    all_images_read = not problems
    categories = _entries(content, "categories", problems, {"id": WHOLE, "name": TEXT})
    names = {category["id"]: category["name"] for category in categories}
    class_of = {number: CLASS_IDS.get(name.strip().lower()) for number, name in names.items()}
    if not any(class_of.values()):
        class_of = {class_id: class_id for class_id in range(1, len(CLASS_NAMES) + 1)}
    unknown_images, unknown_categories = Counter(), Counter()
    required = {"id": WHOLE, "image_id": EITHER, "category_id": WHOLE}
    for entry in _entries(content, "annotations", problems, required):
        image, class_id = images.get(entry["image_id"]), class_of.get(entry["category_id"])
        unknown_images[entry["image_id"]] += image is None
        unknown_categories[entry["category_id"]] += class_id is None
        if image and class_id:
            where = f"{file}, annotation {entry['id']}"
            mask, is_crowd = entry.get("segmentation"), entry.get("iscrowd") not in (0, None)
            image.annotations.append(CocoAnnotation(where, class_id, mask, is_crowd))
    or_remove = "or remove what it marks"
    if all_images_read:  # otherwise the id may be that of an image whose entry is faulty
        for number, count in (+unknown_images).items():  # the plus drops counts of 0
            image_of = f"image_id {_shortened(number)} of {_annotations(count)}"
            problems.append(f"{image_of} is no image's id; correct it, {or_remove}")
    remedy = f"name it in categories as one of {', '.join(CLASS_NAMES)}"
    for category, count in (+unknown_categories).items():
        name = f" ({_shortened(names[category])})" if category in names else ""
        category_of = f"category {category}{name} of {_annotations(count)}"
        problems.append(f"{category_of} is no class; {remedy}, {or_remove}")


def _annotations(count: int) -> str:
    return f"{count:,} annotation{'s' if count > 1 else ''}"


def draw_label_maps(image: CocoImage, faults: list[Fault]) -> np.ndarray | None:
    """Rasterise an image's annotations as label maps int32 [K, H, W]; the n-th of a class has id n.

    Larger annotations are rasterised first, so that smaller ones lie on top. Annotations that
    cannot be used, or that others cover completely, are added to ``faults``. Returns None, without
    rasterising, if ``faults`` is not empty once all annotations have been read.
    """
    rles, ids, counts = [], [], Counter()  # ids: (class id, instance id) of each annotation
    for annotation in image.annotations:
        with adding_fault(faults, image.image_id, annotation.where):
            rles.append(_to_rle(annotation, image.height, image.width))
        counts[annotation.class_id] += 1
        ids.append((annotation.class_id, counts[annotation.class_id]))
    for class_id, count in sorted(counts.items()):
        if count > LARGEST_ID:
            problem = f"it has {count:,} annotations of class {CLASS_NAMES[class_id - 1]}"
            problem += f", above {LARGEST_ID:,}; cut the image up"
            faults.append(Fault(image.image_id, image.file_name, problem))
    if faults:
        return None
    label_maps = np.zeros((len(CLASS_NAMES), image.height, image.width), np.int32)
    areas_px = [int(coco_mask.area(rle)) for rle in rles]  # of a list, area() takes 255 at most
    for row in np.argsort(areas_px, kind="stable")[::-1]:
        mask, x0, y0 = decode_mask(rles[row])
        class_id, instance_id = ids[row]
        box = label_maps[class_id - 1, y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
        box[mask] = instance_id
    _, *columns = find_boxes(label_maps)
    visible = set(zip(*(column.tolist() for column in columns), strict=True))
    problem = "annotations of its class that are smaller, or as large, cover all its pixels"
    problem += "; remove what is there twice"
    for annotation, class_and_id in zip(image.annotations, ids, strict=True):
        if class_and_id not in visible:
            faults.append(Fault(image.image_id, annotation.where, problem))
    return label_maps


def _to_rle(annotation: CocoAnnotation, height: int, width: int) -> dict[str, Any]:
    """An annotation's segmentation as a compressed RLE; raises ``DataError`` if it cannot be."""
    given = annotation.segmentation
    if annotation.is_crowd:
        problem = "it is a crowd (iscrowd 1), which cannot be one instance"
        raise DataError(f"{problem}; annotate its cells one by one, or remove it")
    if isinstance(given, list):
        polygons = _checked_polygons(given, height, width)
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    elif not isinstance(given, dict) or not {"size", "counts"} <= given.keys():
        rule = "an RLE (an object with size and counts) or a list of polygons"
        raise DataError(f"its segmentation is {_shortened(given)}, but must be {rule}")
    elif isinstance(given["counts"], str):
        rle = given
    else:
        counts = given["counts"]
        if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
            rule = "text, or a list of whole numbers from 0 on"
            raise DataError(f"its RLE's counts are {_shortened(counts)}, but must be {rule}")
        if sum(counts) != height * width:
            raise DataError(_run_lengths_problem([0, *counts], height * width))
        runs = {"size": [height, width], "counts": counts}
        rle = {**coco_mask.frPyObjects(runs, height, width), "size": given["size"]}
    if isinstance(rle["counts"], bytes):
        rle = {**rle, "counts": rle["counts"].decode("ascii")}
    if problem := mask_problem(rle, (height, width)):
        raise DataError(problem)
    return rle


def _checked_polygons(polygons: list, height: int, width: int) -> list[list[float]]:
    """The polygons unchanged; raises ``DataError`` if one is malformed or far outside the image."""
    if not polygons:
        remedy = "give at least one polygon, or remove it"
        raise DataError(f"its segmentation is an empty list; {remedy}")
    for polygon in polygons:
        is_polygon = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        # n == n is false for NaN only.
        if not is_polygon or not all(type(n) in (int, float) and n == n for n in polygon):
            rule = "a list x, y, x, y, ... of 3 vertices or more, in px"
            raise DataError(f"its polygon {_shortened(polygon)} must be {rule}")
        for values, side in ((polygon[::2], width), (polygon[1::2], height)):
            # The time that pycocotools takes grows with the edges' length, also outside the image.
            if min(values) < -side or max(values) > 2 * side:
                far = f"reaches far outside its {height} x {width} px image (height x width)"
                raise DataError(f"its polygon {_shortened(polygon)} {far}; correct or remove it")
    return polygons


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    purpose = "DESTINATION/annotations.json and DESTINATION/images/<image id>.tif."
    parser = argparse.ArgumentParser(
        prog="python -m cellseg_helpers.data.coco",
        description=f"Write a data set as COCO: {purpose}",
        epilog="Relative paths are under the repository's root.",
    )
    sources = "folder in the HW3 layout (it holds train/), 'drawn', or the .json of a COCO data set"
    parser.add_argument("data", help=sources)
    parser.add_argument("destination", help="a new or empty folder")
    options = parser.parse_args(arguments)
    try:
        file = export_coco(options.data, options.destination)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{file}: train from it with data = {str(file)!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
