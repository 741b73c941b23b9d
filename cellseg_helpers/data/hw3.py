"""A folder in the HW3 layout, or a COCO data set, as checked, decoded, memory-mapped images. numpy
and tifffile, no torch.

The layout: ``train/<image id>/image.tif`` with ``class1.tif`` to ``class4.tif`` beside it (an
absent class has no file), and optionally ``patients.csv`` (columns ``image_id``, ``patient``)
beside ``train/``. File names are taken in any case, with ``.tif`` or ``.tiff``; other files and
hidden ones are left alone.

A COCO data set is one ``.json`` file, which names its images (TIFF, PNG or JPEG); ``coco_reading``
says what of it is read.

Every file is decoded once, into ``outputs/cache``; that folder may be deleted at any time.
"""

import csv
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from PIL import Image
from tqdm import tqdm

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import ROOT, resolve_path
from cellseg_helpers.data.cache import (
    CellDataset,
    CellImage,
    DataError,
    Decoded,
    Fault,
    open_cached,
)
from cellseg_helpers.data.coco_reading import CocoImage, draw_label_maps, read_coco, read_masks
from cellseg_helpers.data.labels import connected_components, drop_small_instances
from cellseg_helpers.data.splits import patient_of

INSTANCE_READINGS = ("pixel_values", "connected_components")
LARGEST_ID = 65_535
LARGEST_SIDE_PX = 20_000  # beyond it, a header is taken for damaged: decoding would fill the memory
FAULTS_SHOWN = 20
FOLDER, LIST = "test_release", "test_image_name_to_ids.json"
TIFF = re.compile(r"\.tiff?$", re.IGNORECASE)
KEYS = {"file_name": str, "id": int, "height": int, "width": int}
FILE_NAME = re.compile(r"(image|class[1-4])\.tiff?", re.IGNORECASE)
LOOKALIKE = re.compile(r"(image|class).*|.*\.tiff?", re.IGNORECASE)

logging.getLogger("tifffile").setLevel(
    logging.CRITICAL
)  # its remarks on broken files come back as faults


def open_dataset(
    data: str | Path,
    instance_reading: str = "pixel_values",
    min_instance_area_px: int = 0,
    skip_faulty_images: bool = False,
    cache_dir: Path | None = None,
) -> CellDataset:
    """Open a folder in the HW3 layout, or a COCO data set; decode it first, unless its cache is at
    hand.

    Args:
        data: the folder that holds ``train/`` (a relative path stands under the repository's root);
            or the ``.json`` of a COCO data set; or ``drawn``: the embedded drawn tissue, drawn into
            ``outputs/drawn`` on first use.
        instance_reading: ``pixel_values`` (each value of a class file, or each annotation, is one
            instance, in however many pieces) or ``connected_components`` (each 8-connected piece of
            a class's pixels).
        min_instance_area_px: instances of fewer pixels are left out; 0 keeps all.
        skip_faulty_images: leave faulty images out, named in ``.skipped``, instead of refusing the
            folder.
        cache_dir: where decoded images are kept; ``outputs/cache`` by default.

    Raises:
        ValueError: an unknown ``instance_reading`` or a bad ``min_instance_area_px``.
        DataError: faults, all named in the message; or no image left.
    """
    _check_settings(instance_reading, min_instance_area_px)
    folder, name = locate_data(data)
    settings = (instance_reading, min_instance_area_px)

    def decode() -> tuple[Iterator[Decoded], list[Fault]]:
        layout = _read_layout(folder)
        if not layout.patients:
            raise DataError(refusal(folder, layout.faults))
        return _decode(folder, name, layout, settings), layout.faults

    dataset = open_cached(folder, name, settings, lambda: _files_state(folder), decode, cache_dir)
    for_all = [fault for fault in dataset.skipped if not fault.image_id]
    if dataset.skipped and (for_all or not skip_faulty_images or not len(dataset)):
        raise DataError(
            refusal(folder, dataset.skipped, can_skip=bool(len(dataset)) and not for_all)
        )
    return dataset


def check_folder(data: str | Path, instance_reading: str = "pixel_values") -> list[Fault]:
    """All faults of a folder or COCO data set, in one pass that decodes every file; empty when
    there are none.

    Args:
        data: as for ``open_dataset``.
        instance_reading: as for ``open_dataset``.
    """
    _check_settings(instance_reading, 0)
    folder, name = locate_data(data)
    layout = _read_layout(folder)
    return layout.faults + [
        fault
        for _, faults in _decode(folder, name, layout, (instance_reading, 0))
        for fault in faults
    ]


def _check_settings(instance_reading: str, min_instance_area_px: int) -> None:
    if instance_reading not in INSTANCE_READINGS:
        raise ValueError(
            f"unknown instance_reading {instance_reading!r}; one of {', '.join(INSTANCE_READINGS)}"
        )
    if not isinstance(min_instance_area_px, int) or min_instance_area_px < 0:
        raise ValueError(
            f"min_instance_area_px is {min_instance_area_px!r}; give a whole number of pixels, 0 or more"
        )


def locate_data(data: str | Path) -> tuple[Path, str]:
    """The folder, or COCO file, of ``data`` and the data's name; ``drawn`` is drawn on first use.

    Raises:
        DataError: it cannot be drawn.
    """
    if data != "drawn":
        folder = resolve_path(data)
        name = folder.resolve().name
        return folder, f"{folder.resolve().parent.name}/{name}" if is_coco(folder) else name
    from cellseg_helpers.data.drawn import discard_older_drawing, draw_dataset

    folder = ROOT / "outputs" / "drawn"
    try:
        discard_older_drawing(folder)
        draw_dataset(folder)
    except OSError as error:
        raise DataError(f"the drawn data cannot be made: {error}") from error
    return folder, "drawn"


def is_coco(folder: Path) -> bool:
    """What ``locate_data`` gave is the file of a COCO data set, and no folder."""
    return folder.suffix.lower() == ".json" and not folder.is_dir()


def refusal(
    folder: Path,
    faults: list[Fault],
    can_skip: bool = False,
    lists_all: str = "cellseg_helpers.data.hw3.check_folder",
) -> str:
    """Why a folder is refused: its faults, the first ``FAULTS_SHOWN`` in full, and what to do.

    Args:
        folder: of the data.
        faults: one or more.
        can_skip: the caller could go on without the faulty images.
        lists_all: the function that lists the faults not shown; "" where there is none.
    """
    lines = [f"the data in {folder} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:"]
    lines += [f"  {fault}" for fault in faults[:FAULTS_SHOWN]]
    if len(faults) > FAULTS_SHOWN:
        lines.append(
            f"  and {len(faults) - FAULTS_SHOWN} more"
            + (f": {lists_all} lists all" if lists_all else "")
        )
    go_on = (
        ", or set skip_faulty_images to go on without these images"
        if can_skip
        else " and run again"
    )
    return "\n".join([*lines, f"Repair {'them' if len(faults) > 1 else 'it'}{go_on}."])


# What stands in the folder


class _Layout(NamedTuple):
    patients: dict[str, str | None]  # of every image folder, by image id, sorted
    faults: list[Fault]
    listed: dict[str, CocoImage] = {}  # the images of a COCO file


def _read_layout(folder: Path) -> _Layout:
    if is_coco(folder):
        listed, problems = read_coco(folder)
        return _Layout(
            {i: image.patient for i, image in listed.items()},
            [Fault(*problem) for problem in problems],
            listed,
        )
    train = folder / "train"
    if not folder.is_dir():
        return _Layout(
            {},
            [Fault("", str(folder), "there is no such folder; give the folder that holds train/")],
        )
    if not train.is_dir():
        right = (
            f"above, {folder.parent}"
            if folder.name == "train"
            else "that holds train/<image id>/image.tif"
        )
        if (folder / "annotations.json").is_file():
            right += f", or the COCO file {folder / 'annotations.json'}"
        return _Layout(
            {}, [Fault("", str(folder), f"it has no train/ folder; give the folder {right}")]
        )
    try:
        entries = list_visible(train)
    except OSError as error:
        return _Layout(
            {}, [Fault("", "train", f"it cannot be listed ({_cause(error)}); allow reading it")]
        )
    image_ids = [name for name in entries if (train / name).is_dir()]
    if not image_ids:
        return _Layout(
            {},
            [
                Fault(
                    "",
                    "train",
                    "it holds no image folder; each image needs train/<image id>/image.tif",
                )
            ],
        )
    stray = "it stands outside an image folder; move it to train/<image id>/ under its right name, or remove it"
    faults = [
        Fault(name, f"train/{name}", stray)
        for name in entries
        if name not in image_ids and LOOKALIKE.fullmatch(name)
    ]
    spellings = Counter(image_id.lower() for image_id in image_ids)
    twice = (
        "another folder has the same image id but for upper and lower case; rename or remove one"
    )
    faults += [
        Fault(image_id, f"train/{image_id}", twice)
        for image_id in image_ids
        if spellings[image_id.lower()] > 1
    ]
    if not (folder / "patients.csv").exists():
        return _Layout({image_id: patient_of(image_id) for image_id in image_ids}, faults)
    patients, patient_faults = _read_patients(folder, image_ids)
    return _Layout(patients, faults + patient_faults)


def list_visible(folder: Path) -> list[str]:
    """Names in a folder but for hidden ones, sorted."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _read_patients(folder: Path, image_ids: list[str]) -> tuple[dict[str, str | None], list[Fault]]:
    unknown = dict.fromkeys(image_ids)
    try:
        with open(folder / "patients.csv", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            rows, columns = list(reader), reader.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        problem = f"it cannot be read ({_cause(error)}); save it as UTF-8 text with the columns image_id and patient"
        return unknown, [Fault("", "patients.csv", problem)]
    missing = [column for column in ("image_id", "patient") if column not in columns]
    if missing:
        problem = f"its columns ({', '.join(columns) or 'none'}) lack {' and '.join(missing)}; name them in the first line"
        return unknown, [Fault("", "patients.csv", problem)]

    listed = [((row["image_id"] or "").strip(), (row["patient"] or "").strip()) for row in rows]
    patients, times = dict(listed), Counter(image_id for image_id, _ in listed)
    tests = _test_ids(folder)
    problems = {}
    for image_id in sorted(patients.keys() | unknown.keys()):
        if times[image_id] > 1:
            problems[image_id] = f"is listed {times[image_id]} times; keep one row"
        elif image_id not in patients:
            problems[image_id] = (
                "is missing; add its row, or remove patients.csv to go on without patients"
            )
        elif image_id not in unknown and image_id not in tests:
            problems[image_id] = "has no folder under train/; correct or remove its row"
        elif image_id in unknown and not patients[image_id]:
            problems[image_id] = (
                "has no patient; fill it in, or remove patients.csv to go on without patients"
            )
    faults = [
        Fault(image_id, "patients.csv", f"image id {image_id!r} {problem}")
        for image_id, problem in problems.items()
    ]
    return {image_id: patients.get(image_id) for image_id in image_ids}, faults


def _test_ids(folder: Path) -> set[str]:
    return {file.stem for file in _inside(folder / "test_release")}


# Decoding one image


def _decode(
    folder: Path, name: str, layout: _Layout, settings: tuple[str, int]
) -> Iterator[Decoded]:
    for image_id, patient in tqdm(
        layout.patients.items(), f"decoding {name}", unit="image", delay=2, leave=False
    ):
        if layout.listed:
            yield _read_listed(image_id, layout.listed[image_id], *settings)
        else:
            yield _read_image(folder / "train" / image_id, image_id, patient, *settings)


def _read_image(
    place: Path,
    image_id: str,
    patient: str | None,
    instance_reading: str,
    min_instance_area_px: int,
) -> Decoded:
    files, problems = _find_files(place)
    image, shape = None, None
    label_maps = {}
    for key in sorted(files, reverse=True):  # the image before its class files
        try:
            tiff = _read_tiff(place / files[key])
            if key == "image":
                image = _to_rgb(tiff)
                shape = image.shape[1:]
            else:
                label_maps[int(key[-1])] = _to_label_map(tiff.pixels, shape, instance_reading)
        except DataError as error:
            problems.append((files[key], str(error)))
    if problems or image is None:
        return None, [
            Fault(image_id, f"train/{image_id}/{name}".rstrip("/"), problem)
            for name, problem in sorted(problems)
        ]
    stack = np.zeros((len(CLASS_NAMES), *shape), np.int32)
    for class_id, label_map in label_maps.items():
        stack[class_id - 1] = label_map
    return CellImage(
        image_id, patient, image, drop_small_instances(stack, min_instance_area_px)
    ), []


def _read_listed(
    image_id: str, listed: CocoImage, instance_reading: str, min_instance_area_px: int
) -> Decoded:
    """``_read_image`` of an image of a COCO data set."""
    problems: list[tuple[str, str]] = []
    size = (listed.height, listed.width)
    try:
        image = read_image(listed.path)
        if image.shape[1:] != size:
            sizes = f"it is {_size(image.shape[1:])} px, but listed as {_size(size)} px (height x width)"
            raise DataError(f"{sizes}; correct its entry, or copy the right image")
    except DataError as error:
        problems.append((listed.file_name, str(error)))
    if max(size) <= LARGEST_SIDE_PX:
        rles, wrong = read_masks(listed)
        problems += wrong
    if not problems:
        label_maps, problems = draw_label_maps(listed, rles)
    if problems:
        return None, [Fault(image_id, *problem) for problem in problems]
    if instance_reading == "connected_components":
        label_maps = np.stack(
            [_to_label_map(label_map, size, instance_reading) for label_map in label_maps]
        )
    return CellImage(
        image_id, listed.patient, image, drop_small_instances(label_maps, min_instance_area_px)
    ), []


def _find_files(place: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """File names by what they hold (``image``, ``class1`` ...), and (file name, problem) of what is
    amiss.
    """
    try:
        names = list_visible(place)
    except OSError as error:
        return {}, [("", f"it cannot be listed ({_cause(error)}); allow reading it")]
    if not names:
        return {}, [
            ("", "it is empty; put image.tif and its class files there, or remove the folder")
        ]
    files: dict[str, str] = {}
    problems = []
    for name in names:
        if not FILE_NAME.fullmatch(name):
            if LOOKALIKE.fullmatch(name):
                problems.append(
                    (
                        name,
                        "unexpected name; image.tif and class1.tif to class4.tif are read: rename or remove it",
                    )
                )
            continue
        key = name.lower().split(".")[0]
        if key in files:
            problems.append(
                (name, f"{files[key]} is here too and means the same; keep one of them")
            )
        files.setdefault(key, name)
    if "image" not in files:
        problems.append(
            (
                "image.tif",
                "it is missing; put the image there under this name, or remove its folder",
            )
        )
    if not files.keys() - {"image"}:
        problems.append(
            (
                "",
                "it has no class file; add at least one of class1.tif to class4.tif (all 0 where there is no cell)",
            )
        )
    return files, problems


def read_image(path: Path) -> np.ndarray:
    """The image of a TIFF, PNG or JPEG file as uint8 [3, H, W]; see ``_to_rgb`` for what is read
    and how.

    Raises:
        DataError: no such file, truncated, or not an image.
    """
    return _to_rgb(
        _read_picture(path)
        if path.suffix.lower() in (".png", ".jpg", ".jpeg")
        else _read_tiff(path)
    )


class _Tiff(NamedTuple):
    pixels: np.ndarray
    colours: str  # TIFF's photometric interpretation of the decoded pixels
    palette: np.ndarray | None  # uint16 [3, number of colours]


def _read_tiff(path: Path) -> _Tiff:
    """The first image series of a TIFF.

    Raises:
        DataError: not a TIFF, truncated, or not to be decoded.
    """
    try:
        with tifffile.TiffFile(path) as tif:
            size = tif.filehandle.size
            page = tif.pages.first
            if max(page.shape) > LARGEST_SIDE_PX:
                claim = (
                    f"its header claims {_size(page.shape)} px, above {LARGEST_SIDE_PX:,} a side"
                )
                raise DataError(f"{claim}; cut it up, or copy it again if it is damaged")
            for part in tif.pages:
                ends = np.add(part.dataoffsets, part.databytecounts)
                if not len(ends) or not all(part.databytecounts) or max(ends) > size:
                    raise DataError(
                        f"it is truncated (its {size:,} bytes do not hold all its pixels); copy or export it again"
                    )
            colours = getattr(page.photometric, "name", str(page.photometric))
            if colours == "YCBCR" and page.compression == tifffile.COMPRESSION.JPEG:
                colours = "RGB"  # the decoder converts
            return _Tiff(tif.series[0].asarray(), colours, page.colormap)
    except DataError:
        raise
    except Exception as error:  # decoders raise nearly everything on a broken file
        raise DataError(
            f"it cannot be read as a TIFF ({_cause(error)}); copy or export it again"
        ) from error


def _read_picture(path: Path) -> _Tiff:
    """A PNG or JPEG file as if it were a TIFF; Pillow gives 8 of the 16 bits of a colour PNG, and
    all of a grey one.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            if picture.mode.startswith("I;16"):
                return _Tiff(np.asarray(picture), "MINISBLACK", None)
            return _Tiff(np.asarray(picture.convert("RGB")), "RGB", None)
    except Exception as error:  # decoders raise nearly everything on a broken file
        raise DataError(
            f"it cannot be read as a PNG or JPEG ({_cause(error)}); copy or export it again"
        ) from error


def _cause(error: Exception) -> str:
    text = (
        error.strerror
        if isinstance(error, OSError) and error.strerror
        else str(error) or type(error).__name__
    )
    return " ".join(text.split())[:120]


def _to_rgb(tiff: _Tiff) -> np.ndarray:
    """uint8 [3, H, W] of RGB, RGBA, grey, grey + alpha or palette pixels, channels last or first;
    alpha is dropped.

    16-bit values are scaled to 8 bits by the bit depth in use: the smallest of 8, 12 and 16 bits
    that holds the largest value of the image's colour channels, so ``round(value * 255 / (2**depth
    - 1))``. (A bright-field image is bright somewhere: one whose every value is below 4,096 was not
    recorded with 16 bits.)

    Raises:
        DataError: another pixel type, colour space or shape.
    """
    array = tiff.pixels
    if array.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"its pixels are {array.dtype}; save the image with 8 or 16 bits a channel (unsigned integers)"
        )
    if tiff.colours not in ("MINISBLACK", "MINISWHITE", "RGB", "PALETTE"):
        raise DataError(f"its colours are {tiff.colours}; save the image as RGB or grey")
    if tiff.colours == "MINISWHITE":
        array = np.iinfo(array.dtype).max - array
    if tiff.colours == "PALETTE":
        array = tiff.palette[:, array]
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[-1] <= 4:
        array = np.moveaxis(array, -1, 0)
    if array.ndim != 3 or array.shape[0] > 4:
        raise DataError(
            f"its shape {_size(tiff.pixels.shape)} is not that of an image; save height x width x 1 to 4 channels"
        )
    array = array[: 3 if len(array) > 2 else 1]
    if array.dtype == np.uint16:
        depth = next(bits for bits in (8, 12, 16) if array.max() < 2**bits)
        array = np.rint(array * (255 / (2**depth - 1))).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (3, *array.shape[1:])))


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _to_label_map(
    array: np.ndarray, image_shape: tuple[int, ...] | None, instance_reading: str
) -> np.ndarray:
    """int32 [H, W] of a class file; its shape is not compared where the image is unreadable (None).

    Raises:
        DataError: another shape, values that are not ids, or more than 65,535 of them.
    """
    if array.ndim > 2:
        array = array.squeeze()
    if array.ndim != 2:
        raise DataError(
            f"its shape is {_size(array.shape)}; a class file has one channel: save height x width"
        )
    if image_shape and array.shape != image_shape:
        sizes = f"it is {_size(array.shape)} px but its image is {_size(image_shape)} px (height x width)"
        raise DataError(f"{sizes}; export both at one size")
    wrong = _wrong_values(array)
    if wrong:
        raise DataError(
            f"it has {' and '.join(wrong)}; save whole numbers: 0 = background, other values = instance ids"
        )
    if instance_reading == "connected_components":
        array = connected_components(array)
        if array.max() > LARGEST_ID:
            raise DataError(
                f"it has {array.max():,} connected components, above {LARGEST_ID:,}; is it a mask of cells?"
            )
    elif array.max() > LARGEST_ID:
        raise DataError(
            f"its largest instance id is {array.max():,.10g}, above {LARGEST_ID:,}; number the instances from 1 on"
        )
    return array.astype(np.int32)


def _wrong_values(array: np.ndarray) -> list[str]:
    if array.dtype.kind not in "buif":
        return [f"pixels of type {array.dtype}"]
    kinds = {"negative": array < 0}
    if array.dtype.kind == "f":
        finite = np.isfinite(array)
        kinds = {
            "NaN": np.isnan(array),
            "infinite": np.isinf(array),
            "fractional": finite & (array != np.rint(array)),
            "negative": finite & (array < 0),
        }
    found = []
    for kind, wrong in kinds.items():
        if count := np.count_nonzero(wrong):
            row, column = np.unravel_index(wrong.argmax(), wrong.shape)
            first = f"the first at row {row}, column {column}: {array[row, column]:g}"
            found.append(f"{count:,} {kind} pixel{'s' if count > 1 else ''} ({first})")
    return found


# The state of the files, by which the cache sees a change


def _files_state(folder: Path) -> object:
    """Name, size, times and inode of every file."""
    if is_coco(folder):
        files = [folder, *(image.path for image in read_coco(folder)[0].values())]
    else:
        places = _inside(folder / "train")
        files = [
            folder / "patients.csv",
            *places,
            *(file for place in places for file in _inside(place)),
        ]
    state = [(os.path.relpath(file, folder), *_state(file)) for file in files]
    return state, sorted(_test_ids(folder))


def _inside(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in list_visible(folder)]
    except OSError:
        return []


def _state(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except OSError:
        return ()
    if file.is_dir():
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


# Test images


class NoTestImages(DataError):
    """The data have no test images at all, which is no fault."""


class UnlabelledImages(Sequence):
    """Checked test images, decoded when asked for. Made by ``open_test_images``.

    ``images[i]`` is uint8 [3, H, W], RGB; it raises a ``DataError`` where the file is no longer
    readable.

    Attributes:
        name: of the folder, or ``drawn``.
        listed: a dict of ``id``, ``file_name``, ``height``, ``width`` (px) for each image, as the
            images of a COCO data set.
        note: a sentence on how the images were numbered, or "".
    """

    def __init__(
        self, name: str, listed: list[dict[str, Any]], paths: list[Path], note: str
    ) -> None:
        self.name, self.listed, self._paths, self.note = name, listed, paths, note

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, i: int) -> np.ndarray:
        try:
            return read_image(self._paths[i])
        except DataError as error:
            raise DataError(f"{self._paths[i]}: {error}") from None


def open_test_images(data: str | Path) -> UnlabelledImages:
    """Open the test images of a folder, each of which is decoded once to check it.

    Without a list the images are numbered from 1 in the order of their names; ``.note`` says so.

    Args:
        data: the folder that holds ``test_release/`` (a relative path stands under the repository's
            root), or ``drawn``.

    Raises:
        NoTestImages: neither a ``test_release`` folder with a TIFF file in it nor a list that asks
            for one.
        DataError: no such folder, or faults, all named in the message.
    """
    folder, name = locate_data(data)
    if is_coco(folder):
        raise NoTestImages(
            f"{folder} is a COCO data set, which holds no test images; give a folder that holds {FOLDER}/ to predict some"
        )
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give the folder that holds {FOLDER}/")
    files, faults = _find_images(folder / FOLDER)
    listed, list_faults = _read_list(folder / LIST)
    if not (files or listed or faults or list_faults):
        raise NoTestImages(
            f"the data in {folder} have no test images ({FOLDER}/<name>.tif); add some to predict them"
        )
    sizes = {}
    for key, path in tqdm(files.items(), f"checking {name}", unit="image", delay=2, leave=False):
        try:
            sizes[key] = read_image(path).shape[1:]
        except DataError as error:
            faults.append(Fault("", f"{FOLDER}/{path.name}", str(error)))
    note = ""
    if not (folder / LIST).exists():
        note = f"There is no {LIST}: the {len(files)} images are numbered from 1 in the order of their names."
        listed = [
            {
                "file_name": files[key].name,
                "id": number,
                "height": sizes[key][0],
                "width": sizes[key][1],
            }
            for number, key in enumerate(sizes, 1)
        ]
    elif not list_faults:
        faults += _compare(listed, files, sizes)
    if faults + list_faults:
        raise DataError(refusal(folder, list_faults + faults, lists_all=""))
    return UnlabelledImages(
        name, listed, [files[_key(image["file_name"])] for image in listed], note
    )


def _key(file_name: str) -> str:
    return TIFF.sub("", file_name).lower()


def _find_images(place: Path) -> tuple[dict[str, Path], list[Fault]]:
    """TIFF files by their names in lower case without ending, sorted by name."""
    try:
        names = (
            [name for name in list_visible(place) if TIFF.search(name)] if place.exists() else []
        )
    except OSError as error:
        return {}, [
            Fault(
                "",
                FOLDER,
                f"it cannot be listed ({error.strerror}); it must be a folder that you may read",
            )
        ]
    files: dict[str, Path] = {}
    faults = []
    for name in names:
        if _key(name) in files:
            same = f"{files[_key(name)].name} is here too and means the same; keep one of them"
            faults.append(Fault("", f"{FOLDER}/{name}", same))
        files.setdefault(_key(name), place / name)
    return files, faults


def _read_list(path: Path) -> tuple[list[dict[str, Any]], list[Fault]]:
    if not path.exists():
        return [], []
    try:
        listed = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problem = f"it cannot be read as JSON ({' '.join(str(error).split())[:120]})"
        return [], [
            Fault(
                "", path.name, f"{problem}; copy it again, or remove it to number the images anew"
            )
        ]
    if not isinstance(listed, list):
        return [], [
            Fault(
                "",
                path.name,
                f"it holds no list of images but a {type(listed).__name__}; copy it again",
            )
        ]
    faults = [
        Fault("", path.name, f"entry {row} {problem}")
        for row, entry in enumerate(listed)
        if (problem := _wrong(entry))
    ]
    if not faults:
        told = [f"id {image['id']}" for image in listed] + [
            f"image {_key(image['file_name'])!r}" for image in listed
        ]
        several = [(what, times) for what, times in Counter(told).items() if times > 1]
        faults = [
            Fault("", path.name, f"{what} is listed {times} times; list each once")
            for what, times in several
        ]
    return ([] if faults else [{key: image[key] for key in KEYS} for image in listed]), faults


def _wrong(entry: Any) -> str:
    """What is wrong with an entry of the list, or ""."""
    if not isinstance(entry, dict):
        return f"is {str(entry)[:40]!r}, but must be an object with {', '.join(KEYS)}"
    missing = [key for key in KEYS if key not in entry]
    if missing:
        return f"has no {', '.join(missing)}; each image needs {', '.join(KEYS)}"
    for key, kind in KEYS.items():
        value = entry[key]
        if (
            not isinstance(value, kind)
            or isinstance(value, bool)
            or (key in ("height", "width") and value < 1)
        ):
            allowed = (
                "text"
                if kind is str
                else "a whole number" + (" of pixels, 1 or more" if key != "id" else "")
            )
            return f"has {key} {str(value)[:40]!r}, but it must be {allowed}"
    return ""


def _compare(
    listed: list[dict[str, Any]], files: dict[str, Path], sizes: dict[str, tuple[int, ...]]
) -> list[Fault]:
    """Faults of what the list says against what stands in the folder."""
    faults = []
    for image in listed:
        key, size = _key(image["file_name"]), (image["height"], image["width"])
        if key not in files:
            faults.append(
                Fault(
                    "",
                    f"{FOLDER}/{image['file_name']}",
                    f"it is listed in {LIST} but missing; copy it there",
                )
            )
        elif sizes.get(key, size) != size:
            problem = "it is {} x {} px, but listed as {} x {} px (height x width)".format(
                *sizes[key], *size
            )
            faults.append(
                Fault(
                    "",
                    f"{FOLDER}/{files[key].name}",
                    f"{problem}; correct {LIST}, or copy the right image",
                )
            )
    unlisted = files.keys() - {_key(image["file_name"]) for image in listed}
    problem = f"it is not listed in {LIST}, so it has no id; add it there, or remove the file"
    return faults + [Fault("", f"{FOLDER}/{files[key].name}", problem) for key in sorted(unlisted)]
