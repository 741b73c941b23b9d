"""Reads the data of a run: a folder in the HW3 layout, or a COCO data set. No torch.

    train/<image id>/image.tif      a training image
    train/<image id>/class1.tif     to class4.tif: the instance id of each pixel, 0 = background;
                                    a class without instances needs no file
    patients.csv                    optional: columns image_id, patient
    test_release/<name>.tif         optional: test images, which have no annotations
    test_image_name_to_ids.json     optional: file_name, id, height, width of each test image

File names may be in upper or lower case, with ``.tif`` or ``.tiff``. Similar names in ``train/``
(``class5.tif``) are faults; other files, and hidden ones, are ignored. A COCO data set is one
``.json`` file, which names its images (TIFF, PNG or JPEG).
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import ROOT, Reading, resolve_path
from cellseg_helpers.data import coco, images
from cellseg_helpers.data.cache import CellDataset, CellImage, Decoded, open_cached
from cellseg_helpers.data.faults import DataError, Fault, adding_fault, as_data_error
from cellseg_helpers.data.images import read_image, read_tiff, size_text, to_label_map
from cellseg_helpers.data.labels import drop_small_instances
from cellseg_helpers.data.splits import patient_of

INSTANCE_READINGS = get_args(Reading)
FAULTS_SHOWN = 20  # in one message
FILE_NAME = re.compile(r"(image|class[1-4])\.tiff?", re.IGNORECASE)
SIMILAR = re.compile(r"(image|class).*|.*\.tiff?", re.IGNORECASE)  # probably a misspelling
TIFF = re.compile(r"\.tiff?$", re.IGNORECASE)
TEST_FOLDER, TEST_LIST = "test_release", "test_image_name_to_ids.json"

# (instance_reading, faults) -> one decoded image, or None if its faults were added to the list.
Reader = Callable[[str, list[Fault]], CellImage | None]


def open_dataset(
    data: str | Path,
    instance_reading: str = "pixel_values",
    min_instance_area_px: int = 0,
    skip_faulty_images: bool = False,
    cache_dir: Path | None = None,
) -> CellDataset:
    """Open a folder in the HW3 layout, or a COCO data set; the first call decodes it into a cache.

    Args:
        data: the folder that holds ``train/`` (a relative path is under the repository's root); or
            the ``.json`` of a COCO data set; or ``drawn``: tissue drawn into ``outputs/drawn``.
        instance_reading: what is one instance. ``pixel_values``: all pixels of one value in a class
            file, or one annotation, even in several pieces; ``connected_components``: each
            8-connected piece of a class's pixels.
        min_instance_area_px: instances of fewer pixels are left out; 0 leaves out none.
        skip_faulty_images: leave out faulty images; ``.skipped`` lists their faults.
        cache_dir: folder for the decoded images; ``outputs/cache`` by default.

    Raises:
        ValueError: an unknown ``instance_reading``, or a wrong ``min_instance_area_px``.
        DataError: the data have faults (the message lists them), or no image is left.
    """
    _check_reading(instance_reading)
    if not isinstance(min_instance_area_px, int) or min_instance_area_px < 0:
        remedy = "give a whole number of pixels, 0 or more"
        raise ValueError(f"min_instance_area_px is {min_instance_area_px!r}; {remedy}")
    settings = instance_reading, min_instance_area_px
    folder, name = locate_data(data)
    lists_all = ": cellseg_helpers.data.hw3.check_folder lists all"

    def decode() -> tuple[Iterator[Decoded], list[Fault]]:
        readers, faults = _list_images(folder)
        if not readers:
            raise DataError(_refusal(folder, faults, lists_all))
        return _decode(name, readers, *settings), faults

    dataset = open_cached(folder, name, settings, lambda: _file_state(folder), decode, cache_dir)
    # A fault without an image id concerns the whole data set.
    can_skip = len(dataset) > 0 and all(fault.image_id for fault in dataset.skipped)
    if dataset.skipped and not (skip_faulty_images and can_skip):
        skip = ", or set skip_faulty_images to go on without these images."
        ending = skip if can_skip else " and run again."
        raise DataError(_refusal(folder, dataset.skipped, lists_all, ending))
    return dataset


def check_folder(data: str | Path, instance_reading: str = "pixel_values") -> list[Fault]:
    """Decode every file of the data and return all faults; arguments as for ``open_dataset``."""
    _check_reading(instance_reading)
    folder, name = locate_data(data)
    readers, faults = _list_images(folder)
    decoded = _decode(name, readers, instance_reading, 0)
    return faults + [fault for _, image_faults in decoded for fault in image_faults]


def _check_reading(instance_reading: str) -> None:
    if instance_reading not in INSTANCE_READINGS:
        allowed = ", ".join(INSTANCE_READINGS)
        raise ValueError(f"unknown instance_reading {instance_reading!r}; one of {allowed}")


def locate_data(data: str | Path) -> tuple[Path, str]:
    """The folder or COCO file that ``data`` names, and a short name for it. ``drawn`` is drawn
    first if it is missing or an older version drew it; raises ``DataError`` if that fails.
    """
    if data != "drawn":
        path = resolve_path(data)
        target = path.resolve()
        return path, f"{target.parent.name}/{target.name}" if _is_coco(path) else target.name
    from cellseg_helpers.data.drawn import discard_older_drawing, draw_dataset

    folder = ROOT / "outputs" / "drawn"
    try:
        discard_older_drawing(folder)
        draw_dataset(folder)
    except OSError as error:
        raise DataError(f"the drawn data cannot be made: {error}") from error
    return folder, "drawn"


def _is_coco(data: Path) -> bool:
    return data.suffix.lower() == ".json" and not data.is_dir()


def _refusal(
    folder: Path, faults: list[Fault], lists_all: str = "", ending: str = " and run again."
) -> str:
    """The error message for faulty data: the first ``FAULTS_SHOWN`` faults, and what to do."""
    count, plural = len(faults), len(faults) > 1
    lines = [f"the data in {folder} has {count} fault{'s' if plural else ''}:"]
    lines += [f"  {fault}" for fault in faults[:FAULTS_SHOWN]]
    if count > FAULTS_SHOWN:
        lines.append(f"  and {count - FAULTS_SHOWN} more{lists_all}")
    return "\n".join([*lines, f"Repair {'them' if plural else 'it'}{ending}"])


# What is in the folder


def _list_images(folder: Path) -> tuple[list[Reader], list[Fault]]:
    """A reader for each image, sorted by image id, and the faults found without decoding."""
    if _is_coco(folder):
        listed, faults = coco.read_coco(folder)
        return [partial(_read_listed, image) for image in listed], faults
    train, faulty_path = folder / "train", str(folder)
    try:
        if not folder.is_dir():
            raise DataError("there is no such folder; give the folder that holds train/")
        if not train.is_dir():
            expected = "that holds train/<image id>/image.tif"
            if folder.name == "train":
                expected = f"above, {folder.parent}"
            if (folder / "annotations.json").is_file():
                expected += f", or the COCO file {folder / 'annotations.json'}"
            raise DataError(f"it has no train/ folder; give the folder {expected}")
        faulty_path = "train"
        names = _visible_names(train)
        image_ids = [name for name in names if (train / name).is_dir()]
        if not image_ids:
            remedy = "each image needs train/<image id>/image.tif"
            raise DataError(f"it holds no image folder; {remedy}")
    except DataError as error:
        return [], [Fault("", faulty_path, str(error))]
    remedy = "move it to train/<image id>/ under its right name, or remove it"
    stray = f"it stands outside an image folder; {remedy}"
    same = "another folder has the same image id but for upper and lower case; rename or remove one"
    problems = {name: stray for name in names if name not in image_ids and SIMILAR.fullmatch(name)}
    ids_in_lower_case = Counter(map(str.lower, image_ids))
    problems |= {name: same for name in image_ids if ids_in_lower_case[name.lower()] > 1}
    faults = [Fault(name, f"train/{name}", problem) for name, problem in problems.items()]
    patients = {image_id: patient_of(image_id) for image_id in image_ids}
    if (folder / "patients.csv").exists():
        with adding_fault(faults, "", "patients.csv"):
            patients = _read_patients(folder, image_ids, faults)
    return [partial(_read_image, train / name, patients[name]) for name in image_ids], faults


def _visible_names(folder: Path) -> list[str]:
    with as_data_error("it cannot be listed", "allow reading it"):
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _read_patients(
    folder: Path, image_ids: list[str], faults: list[Fault]
) -> dict[str, str | None]:
    """The patient of each image, from ``patients.csv``; adds the faults of its rows."""
    keys = ("image_id", "patient")
    remedy = "save it as UTF-8 text with the columns image_id and patient"
    with (
        as_data_error("it cannot be read", remedy),
        open(folder / "patients.csv", encoding="utf-8-sig", newline="") as file,
    ):
        reader = csv.DictReader(file, skipinitialspace=True)
        rows, columns = list(reader), reader.fieldnames or []
    if missing := [key for key in keys if key not in columns]:
        problem = f"its columns ({', '.join(columns) or 'none'}) lack {' and '.join(missing)}"
        raise DataError(f"{problem}; name them in the first line")
    pairs = [[(row[key] or "").strip() for key in keys] for row in rows]
    patients, row_counts = dict(pairs), Counter(image_id for image_id, _ in pairs)
    # The rows may also name test images, which need no patient.
    known = {*image_ids, *(file.stem for file in _files_in(folder / TEST_FOLDER))}
    or_remove = "or remove patients.csv to go on without patients"
    for image_id in sorted({*patients, *image_ids}):
        row_count, is_training = row_counts[image_id], image_id in image_ids
        checks = {
            f"is listed {row_count} times; keep one row": row_count > 1,
            f"is missing; add its row, {or_remove}": row_count == 0,
            "has no folder under train/; correct or remove its row": image_id not in known,
            f"has no patient; fill it in, {or_remove}": is_training and not patients.get(image_id),
        }
        problems = [problem for problem, applies in checks.items() if applies]
        if problems:  # one per image is enough
            faults.append(Fault(image_id, "patients.csv", f"image id {image_id!r} {problems[0]}"))
    return {image_id: patients.get(image_id) for image_id in image_ids}


def _files_in(folder: Path) -> list[Path]:
    """The visible files and folders in a folder; none if it cannot be listed."""
    try:
        return [folder / name for name in _visible_names(folder)]
    except DataError:
        return []


def _file_state(folder: Path) -> object:
    """Name, size, times and inode of every file: the cache is made anew when one changes."""
    if _is_coco(folder):
        files = [folder, *(image.path for image in coco.read_coco(folder)[0])]
    else:
        folders = _files_in(folder / "train")
        image_files = [file for image_folder in folders for file in _files_in(image_folder)]
        files = [folder / "patients.csv", *folders, *image_files]
    state = []
    for file in files:
        state.append(os.path.relpath(file, folder))
        if file.exists() and not file.is_dir():
            status = file.stat()
            state += [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return state, [file.stem for file in _files_in(folder / TEST_FOLDER)]


# Decoding one image


def _decode(
    name: str, readers: list[Reader], instance_reading: str, min_instance_area_px: int
) -> Iterator[Decoded]:
    """For each reader: the image without its small instances, or None; and its faults."""
    for reader in tqdm(readers, f"decoding {name}", unit="image", delay=2, leave=False):
        faults: list[Fault] = []
        cell_image = reader(instance_reading, faults)
        if cell_image:
            label_maps = drop_small_instances(cell_image.label_maps, min_instance_area_px)
            cell_image = cell_image._replace(label_maps=label_maps)
        yield cell_image, faults


def _read_image(
    folder: Path, patient: str | None, instance_reading: str, faults: list[Fault]
) -> CellImage | None:
    """Read an image folder; with the first two arguments bound, this is a ``Reader``."""
    image_id, shown_folder = folder.name, f"train/{folder.name}"
    image, shape, class_maps, files = None, None, {}, {}
    with adding_fault(faults, image_id, shown_folder):
        files = _find_files(folder, faults)
    for key in sorted(files, reverse=True):  # the image before its class files
        with adding_fault(faults, image_id, f"{shown_folder}/{files[key]}"):
            tiff = read_tiff(folder / files[key])
            if key == "image":
                image = images.to_rgb(tiff)
                shape = image.shape[1:]
            else:
                class_maps[int(key[-1])] = to_label_map(tiff.pixels, shape, instance_reading)
    if faults:
        faults.sort()
        return None
    empty = np.zeros(shape, np.int32)
    label_maps = np.stack([class_maps.get(k, empty) for k in range(1, len(CLASS_NAMES) + 1)])
    return CellImage(image_id, patient, image, label_maps)


def _find_files(folder: Path, faults: list[Fault]) -> dict[str, str]:
    """An image folder's file names by what they hold (``image``, ``class1`` ...); adds faults."""
    names = _visible_names(folder)
    if not names:
        remedy = "put image.tif and its class files there, or remove the folder"
        raise DataError(f"it is empty; {remedy}")
    files: dict[str, str] = {}
    problems = {}  # by file name; "" is the folder itself
    for name in names:
        key = name.lower().split(".")[0]
        if FILE_NAME.fullmatch(name):
            if files.setdefault(key, name) != name:
                problems[name] = _same_name_problem(files[key])
        elif SIMILAR.fullmatch(name):
            expected = "image.tif and class1.tif to class4.tif are read"
            problems[name] = f"unexpected name; {expected}: rename or remove it"
    if "image" not in files:
        remedy = "put the image there under this name, or remove its folder"
        problems["image.tif"] = f"it is missing; {remedy}"
    if not files.keys() - {"image"}:
        remedy = "add at least one of class1.tif to class4.tif (all 0 where there is no cell)"
        problems[""] = f"it has no class file; {remedy}"
    shown = Path("train", folder.name)
    faults += [Fault(folder.name, str(shown / name), text) for name, text in problems.items()]
    return files


def _same_name_problem(other: str) -> str:
    return f"{other} is here too and means the same; keep one of them"


def _read_listed(
    listed: coco.CocoImage, instance_reading: str, faults: list[Fault]
) -> CellImage | None:
    """Read an image of a COCO data set; with ``listed`` bound, this is a ``Reader``."""
    image, label_maps, size = None, None, (listed.height, listed.width)
    with adding_fault(faults, listed.image_id, listed.file_name):
        image = read_image(listed.path)
        if image.shape[1:] != size:
            raise DataError(_size_problem(image.shape[1:], size, "its entry"))
    if max(size) <= images.LARGEST_SIDE_PX:
        label_maps = coco.draw_label_maps(listed, faults)
    if not faults and instance_reading == "connected_components":
        with adding_fault(faults, listed.image_id, listed.file_name):
            pieces = [to_label_map(one, size, instance_reading) for one in label_maps]
            label_maps = np.stack(pieces)
    return None if faults else CellImage(listed.image_id, listed.patient, image, label_maps)


def _size_problem(actual: tuple[int, ...], listed: tuple[int, ...], entry: str) -> str:
    sizes = f"it is {size_text(actual)} px, but listed as {size_text(listed)} px (height x width)"
    return f"{sizes}; correct {entry}, or copy the right image"


# Test images


class NoTestImages(DataError):
    """The data have no test images. This is no fault: they are optional."""


@dataclass
class UnlabelledImages(Sequence):
    """Checked test images, each decoded when it is used; made by ``open_test_images``.

    ``images[i]`` is uint8 [3, H, W], RGB; raises ``DataError`` if its file is no longer readable.
    """

    name: str  # of the folder, or "drawn"
    listed: list[dict[str, Any]]  # file_name, id, height, width (px) of each, as in COCO
    paths: list[Path]
    note: str  # a sentence on how the images were numbered; "" if they are listed

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            return read_image(self.paths[index])
        except DataError as error:
            raise DataError(f"{self.paths[index]}: {error}") from None


def open_test_images(data: str | Path) -> UnlabelledImages:
    """Open the test images of a folder; each is decoded once to check it.

    Without ``TEST_LIST`` the images are numbered from 1 in the order of their names (``.note``).

    Args:
        data: the folder that holds ``test_release/`` (a relative path is under the repository's
            root), or ``drawn``.

    Raises:
        NoTestImages: ``test_release`` holds no TIFF file, and no list names one.
        DataError: no such folder, or faults (the message lists them).
    """
    folder, name = locate_data(data)
    if _is_coco(folder):
        remedy = f"give a folder that holds {TEST_FOLDER}/ to predict some"
        raise NoTestImages(f"{folder} is a COCO data set, which holds no test images; {remedy}")
    if not folder.is_dir():
        remedy = f"give the folder that holds {TEST_FOLDER}/"
        raise DataError(f"{folder}: there is no such folder; {remedy}")
    faults: list[Fault] = []
    listed = _read_list(folder / TEST_LIST, faults) if (folder / TEST_LIST).exists() else None
    files, sizes = _read_test_images(folder / TEST_FOLDER, name, faults)
    if listed is not None:
        faults += _compare_with_files(listed, files, sizes)
    if faults:
        raise DataError(_refusal(folder, faults))
    if not files:
        remedy = f"({TEST_FOLDER}/<name>.tif); add some to predict them"
        raise NoTestImages(f"the data in {folder} have no test images {remedy}")
    note = ""
    if listed is None:
        listed = [
            {"file_name": files[key].name, "id": number, "height": height, "width": width}
            for number, (key, (height, width)) in enumerate(sizes.items(), 1)
        ]
        numbering = f"the {len(files)} images are numbered from 1 in the order of their names"
        note = f"There is no {TEST_LIST}: {numbering}."
    return UnlabelledImages(name, listed, [files[_key(row["file_name"])] for row in listed], note)


def _key(file_name: str) -> str:
    """A file name in lower case without its ending: one key for ``a.tif`` and ``A.TIFF``."""
    return TIFF.sub("", file_name).lower()


def _read_test_images(
    folder: Path, name: str, faults: list[Fault]
) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    """Paths of a folder's TIFF files, and (height, width) px of the readable ones, by ``_key``."""
    files, sizes, names = {}, {}, []
    with adding_fault(faults, "", TEST_FOLDER):
        if folder.exists():
            names = [name for name in _visible_names(folder) if TIFF.search(name)]
    for file in tqdm(names, f"checking {name}", unit="image", delay=2, leave=False):
        key = _key(file)
        with adding_fault(faults, "", f"{TEST_FOLDER}/{file}"):
            if files.setdefault(key, folder / file).name != file:
                raise DataError(_same_name_problem(files[key].name))
            sizes[key] = read_image(folder / file).shape[1:]
    return files, sizes


def _read_list(path: Path, faults: list[Fault]) -> list[dict[str, Any]] | None:
    """The entries of the list of test images; None if it has faults."""
    required = {"file_name": coco.TEXT, "id": coco.WHOLE, "height": coco.SIDE, "width": coco.SIDE}
    with adding_fault(faults, "", TEST_LIST):
        listed = coco.read_json(path)
        if not isinstance(listed, list):
            type_name = type(listed).__name__
            raise DataError(f"it holds no list of images but a {type_name}; copy it again")
        checked = [(row, coco.wrong_entry(entry, required)) for row, entry in enumerate(listed)]
        problems = [f"entry {row} {problem}" for row, problem in checked if problem]
        if not problems:
            names = [f"image {_key(entry['file_name'])!r}" for entry in listed]
            counts = Counter([f"id {entry['id']}" for entry in listed] + names)
            once = "times; list each once"
            problems = [f"{what} is listed {n} {once}" for what, n in counts.items() if n > 1]
        faults += [Fault("", TEST_LIST, problem) for problem in problems]
    return None if faults else [{key: entry[key] for key in required} for entry in listed]


def _compare_with_files(
    listed: list[dict[str, Any]], files: dict[str, Path], sizes: dict[str, tuple[int, ...]]
) -> list[Fault]:
    """Faults where list and folder differ: files missing, of another size, or not listed."""
    problems = {}
    for row in listed:
        key, size = _key(row["file_name"]), (row["height"], row["width"])
        if key not in files:
            problems[row["file_name"]] = f"it is listed in {TEST_LIST} but missing; copy it there"
        elif sizes.get(key, size) != size:
            problems[files[key].name] = _size_problem(sizes[key], size, TEST_LIST)
    no_id = f"it is not listed in {TEST_LIST}, so it has no id; add it there, or remove the file"
    unlisted = sorted(files.keys() - {_key(row["file_name"]) for row in listed})
    problems |= {files[key].name: no_id for key in unlisted}
    return [Fault("", f"{TEST_FOLDER}/{file}", problem) for file, problem in problems.items()]
