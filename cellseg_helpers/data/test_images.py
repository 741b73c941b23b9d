"""The unlabelled images of a folder in the HW3 layout: ``test_release/<name>.tif``, numbered by
``test_image_name_to_ids.json``.

The list holds a ``{"file_name", "id", "height", "width"}`` for each image. File names are taken in
any case, with ``.tif`` or ``.tiff``; other files and hidden ones are left alone.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cellseg_helpers.data.hw3 import (
    DataError,
    Fault,
    is_coco,
    list_visible,
    locate_data,
    read_image,
    refusal,
)

FOLDER, LIST = "test_release", "test_image_name_to_ids.json"
TIFF = re.compile(r"\.tiff?$", re.IGNORECASE)
KEYS = {"file_name": str, "id": int, "height": int, "width": int}


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
