"""The file of a COCO data set as images and their label maps, checked. numpy and pycocotools;
``data.readers`` reads the pixels.

What is read of it:

- ``images``: ``id``, ``file_name`` (relative to the file's own folder), ``height``, ``width``, and
  ``patient`` where there is one; else a TCGA name in the file's name tells the patient. The image
  id is the file's name without folder and ending.
- ``categories``: by name, one of ``CLASS_NAMES`` or ``class1`` to ``class4``, in any case. Where
  none has such a name, or none is listed, ``category_id`` 1 to 4 is taken as the class.
- ``annotations``: ``id``, ``image_id``, ``category_id`` and ``segmentation``: an RLE whose counts
  are text or numbers, or polygons, filled by pycocotools' rule. ``bbox`` and ``area`` are derived
  from the mask and so not read.

**Overlaps.** A label map has room for one id a pixel. Where instances of one class overlap, the
smaller one keeps the pixel (of two equal ones, the first), as in ``data.monusac``. An instance that
keeps no pixel is a fault.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_masks

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.data.labels import decode_in_boxes, run_lengths
from cellseg_helpers.data.rle_check import check_masks
from cellseg_helpers.data.splits import patient_of

CLASS_IDS = {name: k for k, own in enumerate(CLASS_NAMES, 1) for name in (own, f"class{k}")}
LISTS = ("images", "annotations", "categories")
TEXT, WHOLE, NUMBER, SIDE = (
    "text",
    "a whole number",
    "a whole number or text",
    "a whole number of pixels, 1 or more",
)
LARGEST_ID = np.iinfo(np.uint16).max
MASKS_PER_BATCH = 50  # decoded at once: bounds the memory where masks are as large as their image
SHOWN = 40  # characters of a wrong value in a sentence

Problem = tuple[
    str, str, str
]  # image id, file, what is wrong with it: the parts of a ``readers.Fault``


class CocoAnnotation(NamedTuple):
    """One instance: where it stands in the file ("annotations.json, annotation 3"), its class and
    its mask as the file has it.
    """

    where: str
    class_id: int
    segmentation: Any
    is_crowd: bool


class CocoImage(NamedTuple):
    """One image that the file lists; its annotations stand in the file's order."""

    path: Path
    file_name: str
    height: int
    width: int
    patient: str | None
    annotations: list[CocoAnnotation]


def read_coco(path: Path) -> tuple[dict[str, CocoImage], list[Problem]]:
    """The images that a COCO file lists, by image id, sorted; and what is wrong with the file as a
    whole.

    Masks are checked by ``read_masks``.
    """
    if not path.exists():
        return {}, [
            (
                "",
                str(path),
                "there is no such file; give the .json of a COCO data set, or a folder that holds train/",
            )
        ]
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        cause = " ".join((getattr(error, "strerror", None) or str(error)).split())[:120]
        return {}, [
            ("", path.name, f"it cannot be read as JSON ({cause}); copy or export it again")
        ]
    problem = _wrong_lists(content)
    if problem:
        return {}, [("", path.name, problem)]
    by_number, image_problems = _read_images(content["images"], path)
    class_of, names, category_problems = _read_categories(content.get("categories", []))
    annotation_problems = []
    ids, unknown_images, unknown_categories = Counter(), Counter(), Counter()
    for row, entry in enumerate(content["annotations"]):
        problem = _wrong_entry(entry, {"id": WHOLE, "image_id": NUMBER, "category_id": WHOLE})
        if problem:
            annotation_problems.append(f"entry {row} of its annotations {problem}")
            continue
        ids[entry["id"]] += 1
        image, class_id = by_number.get(entry["image_id"]), class_of.get(entry["category_id"])
        unknown_images[entry["image_id"]] += image is None
        unknown_categories[entry["category_id"]] += class_id is None
        if image and class_id:
            where, is_crowd = (
                f"{path.name}, annotation {entry['id']}",
                entry.get("iscrowd") not in (0, None),
            )
            image.annotations.append(
                CocoAnnotation(where, class_id, entry.get("segmentation"), is_crowd)
            )
    for annotation_id, times in ids.items():
        if times > 1:
            annotation_problems.append(
                f"annotation id {annotation_id} is given {times} times; give each its own"
            )
    for number, times in (+unknown_images).items():
        if not image_problems:  # else it may be a faulty entry's
            of_many = (
                f"image_id {_shown(number)} of {_number(times, 'annotation')} is no image's id"
            )
            annotation_problems.append(f"{of_many}; correct it, or remove what it marks")
    for category, times in (+unknown_categories).items():
        name = f" ({_shown(names[category])})" if category in names else ""
        of_many = f"category {category}{name} of {_number(times, 'annotation')} is no class"
        name_it = f"name it in categories as one of {', '.join(CLASS_NAMES)}"
        annotation_problems.append(f"{of_many}; {name_it}, or remove what it marks")
    images = {Path(image.file_name).stem: image for image in by_number.values()}
    problems = image_problems + category_problems + annotation_problems
    return dict(sorted(images.items())), [("", path.name, problem) for problem in problems]


def read_masks(image: CocoImage) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The RLE of each annotation of an image; and (where, problem) of those that have none that can
    be used.
    """
    size = [image.height, image.width]
    rles, read, problems = [], [], []
    for annotation in image.annotations:
        try:
            if annotation.is_crowd:
                crowd = "it is a crowd (iscrowd 1), which cannot be one instance"
                raise ValueError(f"{crowd}; annotate its cells one by one, or remove it")
            rles.append({"size": size, "counts": _to_counts(annotation.segmentation, *size)})
        except ValueError as error:
            problems.append((annotation.where, str(error)))
            continue
        read.append(annotation.where)
    _, damages = check_masks([rle["counts"] for rle in rles], [size] * len(rles))
    problems += [(where, damage) for where, damage in zip(read, damages, strict=True) if damage]
    for class_id, count in sorted(
        Counter(annotation.class_id for annotation in image.annotations).items()
    ):
        if count > LARGEST_ID:
            many = f"it has {count:,} annotations of class {CLASS_NAMES[class_id - 1]}, above {LARGEST_ID:,}"
            problems.append((image.file_name, f"{many}; cut the image up"))
    return rles, problems


def draw_label_maps(
    image: CocoImage, rles: list[dict[str, Any]]
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """The masks of an image, as ``read_masks`` gives them, as label maps: the largest is drawn
    first, so that a smaller one lies on it.

    Returns:
        int32 [K, H, W]: the n-th annotation of a class has the id n; and (where, problem) of
        annotations that kept no pixel.
    """
    label_maps = np.zeros((len(CLASS_NAMES), image.height, image.width), np.int32)
    counts = np.zeros(len(CLASS_NAMES), int)
    places = []
    for annotation in image.annotations:
        counts[annotation.class_id - 1] += 1
        places.append((annotation.class_id - 1, counts[annotation.class_id - 1]))
    lengths, rows = run_lengths([rle["counts"] for rle in rles])
    # pycocotools' own area function fails on more than 255 masks (2.0.11)
    areas_px = np.add.reduceat(lengths[:, 1], np.cumsum(rows) - rows).tolist() if rles else []
    largest_first = sorted(range(len(rles)), key=lambda i: (-areas_px[i], -i))
    for first in range(0, len(rles), MASKS_PER_BATCH):
        batch = largest_first[first : first + MASKS_PER_BATCH]
        for i, (mask, x, y) in zip(batch, decode_in_boxes([rles[i] for i in batch]), strict=True):
            k, instance_id = places[i]
            label_maps[k, y : y + mask.shape[0], x : x + mask.shape[1]][mask] = instance_id
    kept_px = [
        np.bincount(label_map.ravel(), minlength=count + 1)
        for label_map, count in zip(label_maps, counts, strict=True)
    ]
    covered = "annotations of its class that are smaller, or as large, cover all its pixels; remove what is there twice"
    problems = [
        (annotation.where, covered)
        for annotation, (k, instance_id) in zip(image.annotations, places, strict=True)
        if not kept_px[k][instance_id]
    ]
    return label_maps, problems


# The file's lists


def _wrong_lists(content: Any) -> str:
    if not isinstance(content, dict):
        return f"it holds no COCO data set but a {type(content).__name__}; give an object with {', '.join(LISTS)}"
    for name in LISTS:
        if name not in content and name != "categories":
            return f"it has no {name}; a COCO data set is an object with {', '.join(LISTS)}"
        if not isinstance(content.get(name, []), list):
            return f"its {name} are no list but a {type(content[name]).__name__}; export it again"
    return "" if content["images"] else "its list of images is empty; export it again, with images"


def _read_images(entries: list, path: Path) -> tuple[dict[Any, CocoImage], list[str]]:
    """Images by their numbers in the file, and sentences of what is wrong."""
    kinds = {"id": NUMBER, "file_name": TEXT, "height": SIDE, "width": SIDE}
    images, problems, names = {}, [], Counter()
    for row, entry in enumerate(entries):
        problem = _wrong_entry(entry, kinds)
        if not problem and entry.get("patient") is not None:
            problem = _wrong_entry(entry, {"patient": TEXT})
        if problem:
            problems.append(f"entry {row} of its images {problem}")
            continue
        if entry["id"] in images:
            problems.append(
                f"entry {row} of its images has id {_shown(entry['id'])}, as one before it; give each its own"
            )
            continue
        name = entry["file_name"]
        names[Path(name).stem.lower()] += 1
        patient = (entry.get("patient") or "").strip() or patient_of(Path(name).stem)
        images[entry["id"]] = CocoImage(
            path.parent / name, name, entry["height"], entry["width"], patient, []
        )
    several = [(name, times) for name, times in names.items() if times > 1]
    same = (
        "but for folder, ending, upper and lower case; give each its own, since it is the image id"
    )
    problems += [
        f"{times} entries of its images have the file name {_shown(name)}, {same}"
        for name, times in several
    ]
    return images, problems


def _read_categories(entries: list) -> tuple[dict[int, int], dict[int, str], list[str]]:
    """The class of each category that has one, the names of the others, and sentences of what is
    wrong.
    """
    names, problems = {}, []
    for row, entry in enumerate(entries):
        problem = _wrong_entry(entry, {"id": WHOLE, "name": TEXT})
        if not problem and entry["id"] in names:
            problem = f"has id {entry['id']}, as one before it; give each its own"
        if problem:
            problems.append(f"entry {row} of its categories {problem}")
        else:
            names[entry["id"]] = entry["name"]
    by_name = {
        i: CLASS_IDS[name.strip().lower()]
        for i, name in names.items()
        if name.strip().lower() in CLASS_IDS
    }
    class_of = by_name or {k: k for k in range(1, len(CLASS_NAMES) + 1)}
    return class_of, names, problems


def _wrong_entry(entry: Any, kinds: dict[str, str]) -> str:
    """What is wrong with an entry of a list whose keys must be of these kinds, or ""."""
    if not isinstance(entry, dict):
        return f"is {_shown(entry)}, but must be an object with {', '.join(kinds)}"
    missing = [key for key in kinds if key not in entry]
    if missing:
        return f"has no {' and no '.join(missing)}; it needs {', '.join(kinds)}"
    for key, kind in kinds.items():
        value = entry[key]
        whole = isinstance(value, int) and not isinstance(value, bool)
        text = isinstance(value, str) and value.strip() != "" and "\0" not in value
        if not {TEXT: text, WHOLE: whole, NUMBER: whole or text, SIDE: whole and value > 0}[kind]:
            return f"has {key} {_shown(value)}, but it must be {kind}"
    return ""


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count > 1 else ''}"


def _shown(value: Any) -> str:
    return repr(str(value)[:SHOWN])


# Segmentations


def _to_counts(segmentation: Any, height: int, width: int) -> str:
    """The compressed counts of a segmentation; counts that are text already are not checked.

    Raises:
        ValueError: it is none, of another size, or malformed.
    """
    if isinstance(segmentation, list):
        return _fill_polygons(segmentation, height, width)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        wanted = "an RLE (an object with size and counts) or a list of polygons"
        raise ValueError(f"its segmentation is {_shown(segmentation)}, but must be {wanted}")
    counts, size = segmentation["counts"], segmentation["size"]
    if size != [height, width]:
        listed = f"its image is listed as [{height}, {width}] (height, width)"
        raise ValueError(f"its RLE has size {_shown(size)}, but {listed}; correct one of them")
    if isinstance(counts, str):
        return counts
    if not isinstance(counts, list) or not all(
        _is_number(count) and isinstance(count, int) and count >= 0 for count in counts
    ):
        raise ValueError(
            f"its RLE's counts are {_shown(counts)}, but must be text, or a list of whole numbers from 0 on"
        )
    if sum(counts) != height * width:
        covered = f"run lengths must cover the mask's {height * width:,} px, but they cover {sum(counts):,} px"
        raise ValueError(f"its counts are damaged: {covered}")
    return coco_masks.frPyObjects({"size": size, "counts": counts}, height, width)["counts"].decode(
        "ascii"
    )


def _fill_polygons(polygons: list, height: int, width: int) -> str:
    if not polygons:
        raise ValueError(
            "its segmentation is an empty list; give at least one polygon, or remove it"
        )
    for polygon in polygons:
        if (
            not isinstance(polygon, list)
            or not all(map(_is_number, polygon))
            or len(polygon) < 6
            or len(polygon) % 2
        ):
            raise ValueError(
                f"its polygon {_shown(polygon)} must be a list x, y, x, y, ... of 3 vertices or more, in px"
            )
        for values, side in ((polygon[::2], width), (polygon[1::2], height)):
            if (
                min(values) < -side or max(values) > 2 * side
            ):  # pycocotools walks along every edge, inside the image or not
                image = f"its {height} x {width} px image (height x width)"
                raise ValueError(
                    f"its polygon {_shown(polygon)} reaches far outside {image}; correct or remove it"
                )
    return coco_masks.merge(coco_masks.frPyObjects(polygons, height, width))["counts"].decode(
        "ascii"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
