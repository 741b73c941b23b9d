"""COCO data sets, written, read and checked. numpy and pycocotools; ``data.hw3`` reads the pixels.

    python -m cellseg_helpers.data.coco DATA DESTINATION

writes ``DESTINATION/annotations.json`` and the images it lists, ``DESTINATION/images/<image
id>.tif``. Given as ``data``, that file trains as DATA does: the same images, patients and instances
in the same order. Test images are not exported.

What is read of a COCO file:

- ``images``: ``id``, ``file_name`` (relative to the file's own folder), ``height``, ``width``, and
  optionally ``patient``; without it, the patient of a TCGA name. The image id is the file's name
  without folder and ending.
- ``categories``: by name, one of ``CLASS_NAMES`` or ``class1`` to ``class4``, in any case. If none
  has such a name, or none is listed, ``category_id`` 1 to 4 is the class.
- ``annotations``: ``id``, ``image_id``, ``category_id`` and ``segmentation``: an RLE with counts as
  text or as numbers, or polygons, filled by pycocotools' rule; ``bbox`` and ``area`` follow.

Where annotations of one class overlap, the pixel goes to the smallest one (of equal ones, the
first), as in ``tools.monusac``. An annotation that is left without a pixel is a fault.
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

CLASS_IDS = {name: k for k, own in enumerate(CLASS_NAMES, 1) for name in (own, f"class{k}")}
LISTS = "images, annotations, categories"
OWN = "give each its own"
# Compressed counts: numbers in groups of 5 bits. "0" to "O" ends a number, "P" to "o" is a group
# that more follow; six groups are enough for 500 million px.
COUNTS = re.compile("([P-o]{0,5}[0-O])+")


# Written


def to_coco(cell_images: Iterable[CellImage]) -> dict[str, Any]:
    """A COCO data set dict of images, numbered from 1, and their instances (masks as RLEs with
    counts as text). An image's ``file_name`` is its image id, ``patient`` its patient or None.
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
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASS_NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def export_coco(data: str | Path, destination: str | Path) -> Path:
    """Write a data set as COCO, whole or not at all; returns the COCO file.

    Images become RGB uint8 TIFFs (LZW), masks compressed RLEs. Instance ids are not written, but
    the annotations of a class are in their order.

    Args:
        data: as for ``hw3.open_dataset``.
        destination: a new or empty folder; a relative path is under the repository's root.

    Raises:
        DataError: data that cannot be used, or a destination that is not empty.
        OSError: it cannot be written.
    """
    from cellseg_helpers.data.hw3 import open_dataset  # which reads COCO files through this module

    destination = resolve_path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        remove = "remove it, or name another destination"
        raise DataError(f"{destination} exists and is not an empty folder; {remove}")
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


# Checked


def mask_problem(segmentation: Any, size: Sequence[int] | None = None) -> str:
    """What is wrong with a segmentation that must be a compressed RLE with at least one pixel; ""
    if nothing is. ``size``: height and width of its image, px; None if unknown.
    """
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), str):
        rle = 'a compressed RLE, {"size": [height, width], "counts": "text"}'
        return f"its segmentation is {reprlib.repr(segmentation)}; it must be {rle}"
    own, counts = segmentation.get("size"), segmentation["counts"]
    is_size = isinstance(own, list) and len(own) == 2
    if not is_size or not all(type(side) is int and 0 < side < 2**20 for side in own):
        return f"its mask's size is {reprlib.repr(own)}; it must be [height, width] in px"
    if size is not None and own != list(size):
        turned = "; height and width are swapped" if own[::-1] == list(size) else ""
        sizes = "its mask is {} x {} px, its image {} x {} px (height x width)"
        return sizes.format(*own, *size) + turned
    if not COUNTS.fullmatch(counts):
        return "its counts are damaged: they are no text of a compressed RLE"
    lengths = run_lengths(counts)
    if lengths.min() < 0 or lengths.sum() != own[0] * own[1]:
        return _wrong_cover(lengths.tolist(), own[0] * own[1])
    return "" if lengths[1::2].any() else "its mask has no pixel; leave such results out"


def _wrong_cover(lengths: Sequence[int], expected_px: int) -> str:
    wrong = "one is negative" if min(lengths) < 0 else f"they cover {sum(lengths):,} px"
    must = f"run lengths must cover the mask's {expected_px:,} px"
    return f"its counts are damaged: {must}, but {wrong}"


TEXT, WHOLE, EITHER = "text", "a whole number", "a whole number or text"
SIDE = "a whole number of pixels, 1 or more"
KINDS = {
    TEXT: lambda value: isinstance(value, str) and value.strip() != "" and "\0" not in value,
    WHOLE: lambda value: type(value) is int,
    EITHER: lambda value: KINDS[WHOLE](value) or KINDS[TEXT](value),
    SIDE: lambda value: type(value) is int and value > 0,
}


def wrong_entry(entry: Any, kinds: Mapping[str, str], **optional: str) -> str:
    """What is wrong with an entry of a list in a JSON file: a sentence's end ("has no id; ..."), or
    "". ``kinds`` gives each key that it must have the kind of its value (a key of ``KINDS``),
    ``optional`` each key that may be missing or null.
    """
    if not isinstance(entry, dict):
        return f"is {_shown(entry)}, but must be an object with {', '.join(kinds)}"
    if missing := [key for key in kinds if key not in entry]:
        return f"has no {' and no '.join(missing)}; it needs {', '.join(kinds)}"
    given = {key: kind for key, kind in optional.items() if entry.get(key) is not None}
    for key, kind in {**kinds, **given}.items():
        if not KINDS[kind](entry[key]):
            return f"has {key} {_shown(entry[key])}, but it must be {kind}"
    return ""


def _shown(value: Any) -> str:
    return repr(str(value)[:40])


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises ``DataError`` if it cannot be read."""
    with as_data_error("it cannot be read as JSON"):
        return json.loads(path.read_bytes())


# Read


class CocoAnnotation(NamedTuple):
    """One annotation, its mask as in the file; ``where`` is "annotations.json, annotation 3"."""

    where: str
    class_id: int
    segmentation: Any
    is_crowd: bool


class CocoImage(NamedTuple):
    """One image that the file lists, its annotations in the file's order."""

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
    """The images that a COCO file lists, sorted by image id; and what is wrong with the file as a
    whole. ``draw_label_maps`` checks the masks.
    """
    if not path.exists():
        give = "give the .json of a COCO data set, or a folder that holds train/"
        return [], [Fault("", str(path), f"there is no such file; {give}")]
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
    content = read_json(path)
    if not isinstance(content, dict):
        found = f"it holds no COCO data set but a {type(content).__name__}"
        raise DataError(f"{found}; give an object with {LISTS}")
    content = {"categories": [], **content}
    for name in LISTS.split(", "):
        if name not in content:
            raise DataError(f"it has no {name}; a COCO data set is an object with {LISTS}")
        if not isinstance(content[name], list):
            found = f"its {name} are no list but a {type(content[name]).__name__}"
            raise DataError(f"{found}; export it again")
    if not content["images"]:
        raise DataError("its list of images is empty; export it again, with images")
    return content


def _entries(
    content: dict[str, list], name: str, problems: list[str], kinds: dict[str, str], **optional: str
) -> Iterator[dict[str, Any]]:
    """The well-formed entries of a list; the others' problems are added to ``problems``."""
    ids = set()
    for row, entry in enumerate(content[name]):
        problem = wrong_entry(entry, kinds, **optional)
        if not problem and entry["id"] in ids:
            problem = f"has id {_shown(entry['id'])}, as one before it; {OWN}"
        if problem:
            problems.append(f"entry {row} of its {name} {problem}")
        else:
            ids.add(entry["id"])
            yield entry


def _read_images(
    content: dict[str, list], folder: Path, problems: list[str]
) -> dict[int | str, CocoImage]:
    """Images by their number in the file; what is wrong is added to ``problems``."""
    kinds = {"id": EITHER, "file_name": TEXT, "height": SIDE, "width": SIDE}
    images = {}
    for entry in _entries(content, "images", problems, kinds, patient=TEXT):
        number, name, height, width = (entry[key] for key in kinds)
        patient = (entry.get("patient") or "").strip() or patient_of(Path(name).stem)
        images[number] = CocoImage(folder / name, name, height, width, patient, [])
    names = Counter(image.image_id.lower() for image in images.values())
    ending = f"but for folder, ending, upper and lower case; {OWN}, since it is the image id"
    problems += [
        f"{times} entries of its images have the file name {_shown(name)}, {ending}"
        for name, times in names.items()
        if times > 1
    ]
    return images


def _add_annotations(
    content: dict[str, list], file: str, images: dict[int | str, CocoImage], problems: list[str]
) -> None:
    """Add each annotation to its image, and what is wrong to ``problems``."""
    all_images_read = not problems
    kinds = {"id": WHOLE, "name": TEXT}
    names = {e["id"]: e["name"] for e in _entries(content, "categories", problems, kinds)}
    class_of = {i: CLASS_IDS.get(name.strip().lower()) for i, name in names.items()}
    if not any(class_of.values()):
        class_of = {k: k for k in range(1, len(CLASS_NAMES) + 1)}
    unknown_images, unknown_categories = Counter(), Counter()
    kinds = {"id": WHOLE, "image_id": EITHER, "category_id": WHOLE}
    for entry in _entries(content, "annotations", problems, kinds):
        image, class_id = images.get(entry["image_id"]), class_of.get(entry["category_id"])
        unknown_images[entry["image_id"]] += image is None
        unknown_categories[entry["category_id"]] += class_id is None
        if image and class_id:
            where = f"{file}, annotation {entry['id']}"
            mask = entry.get("segmentation"), entry.get("iscrowd") not in (0, None)
            image.annotations.append(CocoAnnotation(where, class_id, *mask))
    remove = "or remove what it marks"
    if all_images_read:  # else the id may be a faulty entry's
        for number, times in (+unknown_images).items():
            of = f"image_id {_shown(number)} of {_annotations(times)}"
            problems.append(f"{of} is no image's id; correct it, {remove}")
    rename = f"name it in categories as one of {', '.join(CLASS_NAMES)}"
    for category, times in (+unknown_categories).items():
        name = f" ({_shown(names[category])})" if category in names else ""
        of = f"category {category}{name} of {_annotations(times)}"
        problems.append(f"{of} is no class; {rename}, {remove}")


def _annotations(count: int) -> str:
    return f"{count:,} annotation{'s' if count > 1 else ''}"


def draw_label_maps(image: CocoImage, faults: list[Fault]) -> np.ndarray | None:
    """The annotations of an image as label maps int32 [K, H, W]; the n-th of a class has the id n.

    The largest is drawn first, so that smaller ones lie on it. Annotations that cannot be used, and
    ones that others cover wholly, are added to ``faults``. None if it holds any before drawing.
    """
    rles, ids, counts = [], [], Counter()  # ids: class and id in its label map, of each annotation
    for annotation in image.annotations:
        with adding_fault(faults, image.image_id, annotation.where):
            rles.append(_to_rle(annotation, image.height, image.width))
        counts[annotation.class_id] += 1
        ids.append((annotation.class_id, counts[annotation.class_id]))
    for class_id, count in sorted(counts.items()):
        if count > LARGEST_ID:
            many = f"it has {count:,} annotations of class {CLASS_NAMES[class_id - 1]}"
            problem = f"{many}, above {LARGEST_ID:,}; cut the image up"
            faults.append(Fault(image.image_id, image.file_name, problem))
    if faults:
        return None
    label_maps = np.zeros((len(CLASS_NAMES), image.height, image.width), np.int32)
    areas_px = [int(coco_mask.area(rle)) for rle in rles]  # at once, pycocotools takes 255 at most
    for i in np.argsort(areas_px, kind="stable")[::-1]:
        mask, x0, y0 = decode_mask(rles[i])
        class_id, instance_id = ids[i]
        box = label_maps[class_id - 1, y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
        box[mask] = instance_id
    _, *columns = find_boxes(label_maps)
    drawn = set(zip(*(column.tolist() for column in columns), strict=True))
    smaller = "annotations of its class that are smaller, or as large, cover all its pixels"
    covered = f"{smaller}; remove what is there twice"
    for annotation, class_and_id in zip(image.annotations, ids, strict=True):
        if class_and_id not in drawn:
            faults.append(Fault(image.image_id, annotation.where, covered))
    return label_maps


def _to_rle(annotation: CocoAnnotation, height: int, width: int) -> dict[str, Any]:
    """The compressed RLE of an annotation's segmentation; a ``DataError`` if there is none."""
    given = annotation.segmentation
    if annotation.is_crowd:
        crowd = "it is a crowd (iscrowd 1), which cannot be one instance"
        raise DataError(f"{crowd}; annotate its cells one by one, or remove it")
    if isinstance(given, list):
        polygons = _checked_polygons(given, height, width)
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    elif not isinstance(given, dict) or not {"size", "counts"} <= given.keys():
        wanted = "an RLE (an object with size and counts) or a list of polygons"
        raise DataError(f"its segmentation is {_shown(given)}, but must be {wanted}")
    elif isinstance(given["counts"], str):
        rle = given
    else:
        counts = given["counts"]
        if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
            wanted = "text, or a list of whole numbers from 0 on"
            raise DataError(f"its RLE's counts are {_shown(counts)}, but must be {wanted}")
        if sum(counts) != height * width:
            raise DataError(_wrong_cover([0, *counts], height * width))
        runs = {"size": [height, width], "counts": counts}
        rle = {**coco_mask.frPyObjects(runs, height, width), "size": given["size"]}
    if isinstance(rle["counts"], bytes):
        rle = {**rle, "counts": rle["counts"].decode("ascii")}
    if problem := mask_problem(rle, (height, width)):
        raise DataError(problem)
    return rle


def _checked_polygons(polygons: list, height: int, width: int) -> list[list[float]]:
    if not polygons:
        give = "give at least one polygon, or remove it"
        raise DataError(f"its segmentation is an empty list; {give}")
    for polygon in polygons:
        is_polygon = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        if not is_polygon or not all(type(n) in (int, float) and n == n for n in polygon):
            wanted = "a list x, y, x, y, ... of 3 vertices or more, in px"
            raise DataError(f"its polygon {_shown(polygon)} must be {wanted}")
        for values, side in ((polygon[::2], width), (polygon[1::2], height)):
            # pycocotools walks along every edge, inside the image or not.
            if min(values) < -side or max(values) > 2 * side:
                far = f"reaches far outside its {height} x {width} px image (height x width)"
                raise DataError(f"its polygon {_shown(polygon)} {far}; correct or remove it")
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
