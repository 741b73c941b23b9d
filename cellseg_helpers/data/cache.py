"""Decoded images in a cache on disk. numpy, no torch.

Each data set is decoded once, into a folder of ``outputs/cache``, which may be deleted at any time.
It holds ``index.json`` and one file per image, ``<number>.bin``: the label maps (uint16,
little-endian, [K, H, W]), then the image (uint8 [3, H, W]).
"""

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import ROOT, one_line, replacing
from cellseg_helpers.data.faults import DataError, Fault
from cellseg_helpers.data.labels import find_instances

CACHE = ROOT / "outputs" / "cache"
LARGEST_ID = np.iinfo(np.uint16).max  # the largest instance id that a cache file can store
CACHE_FORMAT = 2  # raise it when what is decoded, or how it is stored, changes
BYTES_PER_PIXEL = 2 * len(CLASS_NAMES) + 3  # uint16 label maps, uint8 RGB
STALE_HOURS = 12  # an unfinished cache folder this old belongs to a process that died


class CellImage(NamedTuple):
    """One decoded image."""

    image_id: str  # its folder under train/; in a COCO data set, its file's name without ending
    patient: str | None  # None: unknown
    image: np.ndarray  # uint8 [3, H, W], RGB, read-only
    label_maps: np.ndarray  # int32 [K, H, W]: 0 = background, 1..65,535 an instance of the class


Decoded = tuple[CellImage | None, list[Fault]]  # an image, or what is wrong with it


class CellDataset:
    """The images of one data set, read from their cache; made by ``hw3.open_dataset``.

    ``dataset[i]`` is a ``CellImage``. A pickled copy (in DataLoader workers) opens the same cache.

    Attributes:
        name: the folder's name, ``drawn``, or a COCO file (``cells/annotations.json``).
        image_ids: N image ids, sorted.
        patients: N names, None where unknown.
        sizes: int64 [N, 2], height and width, px.
        counts: int64 [N, K], instances per image and class.
        fingerprint: sha256 of image ids, pixels and label maps; the same on every machine.
        skipped: faults of the images that were left out.
    """

    def __init__(self, cache: Path, name: str) -> None:
        self._cache, self.name = cache, name
        try:
            with open(cache / "index.json", "rb") as file:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_SH)
                # The map holds the lock, which stops ``_remove_old``, while the data set is in use.
                self._index = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            index = json.loads(self._index[:])
            self.image_ids: list[str] = index["image_ids"]
            self.patients: list[str | None] = index["patients"]
            self.sizes = np.array(index["sizes"], np.int64).reshape(-1, 2)
            self.counts = np.array(index["counts"], np.int64).reshape(-1, len(CLASS_NAMES))
            self.fingerprint: str = index["fingerprint"]
            self.skipped = [Fault(*fault) for fault in index["faults"]]
            for i, (height, width) in enumerate(self.sizes.tolist()):
                if self._file(i).stat().st_size != BYTES_PER_PIXEL * height * width:
                    raise ValueError(f"{self._file(i)} is not as long as the index says")
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = "open the data again, which rebuilds it"
            raise DataError(f"{cache}: the decoded cache is gone or damaged; {remedy}") from error

    def _file(self, i: int) -> Path:
        return self._cache / f"{i}.bin"

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, i: int) -> CellImage:
        i = range(len(self))[i]  # counts negative i from the end, raises IndexError beyond it
        height, width = self.sizes[i].tolist()
        with open(self._file(i), "rb") as file:
            label_maps = np.fromfile(file, "<u2", len(CLASS_NAMES) * height * width)
            image = np.fromfile(file, np.uint8).reshape(3, height, width)
        image.flags.writeable = False
        label_maps = label_maps.astype(np.int32).reshape(-1, height, width)
        return CellImage(self.image_ids[i], self.patients[i], image, label_maps)

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return CellDataset, (self._cache, self.name)


def open_cached(
    folder: Path,
    name: str,
    settings: object,
    state: Callable[[], object],
    decode: Callable[[], tuple[Iterable[Decoded], list[Fault]]],
    cache_dir: Path | None = None,
) -> CellDataset:
    """Open the cache of a data set. Decode the data first if no cache matches their present state.

    Args:
        folder: the data set's folder or COCO file.
        settings: how the data are read; each way has a cache of its own.
        state: returns what changes when a file does: sizes, times and so on.
        decode: returns an iterable with each image or its faults, and a list of the faults of the
            data set as a whole.
        cache_dir: ``CACHE`` by default.

    Raises:
        DataError: the cache cannot be written, or the files change while they are read.
    """
    cache_dir = cache_dir or CACHE

    def current_path() -> Path:
        parts = (str(folder.resolve()), settings, CACHE_FORMAT, CLASS_NAMES), state()
        hashes = (hashlib.sha256(repr(part).encode()).hexdigest()[:16] for part in parts)
        return cache_dir / "-".join(hashes)

    for _ in range(3):  # tries, since other processes may change files or remove the cache
        cache = current_path()
        if not cache.exists():
            try:
                with replacing(cache, folder=True) as temporary:
                    _write(*decode(), temporary)
            except OSError as error:
                if not cache.exists():  # else another process was first
                    problem = f"cannot write the decoded cache in {cache_dir} ({one_line(error)})"
                    raise DataError(f"{problem}; make room there, or allow writing") from error
            _remove_old(cache)
            if cache != current_path():
                continue
        try:
            return CellDataset(cache, name)
        except DataError:  # damaged, or just removed by a process that found newer files
            _discard(cache)
    problem = f"its files change while they are read, or no cache can be stored in {cache_dir}"
    raise DataError(f"{folder}: {problem}; run again when they are at rest")


def _write(decoded: Iterable[Decoded], faults: list[Fault], folder: Path) -> None:
    """Write the images that have no fault, then the index, into a new cache folder."""
    faults, faulty = list(faults), {fault.image_id for fault in faults}
    columns: dict[str, list] = {"image_ids": [], "patients": [], "sizes": [], "counts": []}
    digest = hashlib.sha256()
    for cell_image, image_faults in decoded:
        faults += image_faults
        if cell_image is None or cell_image.image_id in faulty:
            continue
        image_id, patient, image, label_maps = cell_image
        pixels, labels = image.tobytes(), label_maps.astype("<u2").tobytes()
        _write_to_disk(folder / f"{len(columns['image_ids'])}.bin", labels, pixels)
        digest.update(json.dumps([image_id, *image.shape[1:]]).encode() + pixels + labels)
        counts = np.bincount(find_instances(label_maps).labels, minlength=len(CLASS_NAMES) + 1)
        row = (image_id, patient, image.shape[1:], counts[1:].tolist())
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    index = {**columns, "fingerprint": digest.hexdigest(), "faults": faults}
    _write_to_disk(folder / "index.json", json.dumps(index).encode())


def _write_to_disk(path: Path, *parts: bytes) -> None:
    """Write a file and wait until the disk has it, so that a crash leaves no incomplete cache."""
    with open(path, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _remove_old(cache: Path) -> None:
    """Remove caches of the same data's older states, unless in use, and unfinished old folders."""
    for old in cache.parent.glob(f"{cache.name.split('-')[0]}-*"):
        if old != cache:
            with suppress(OSError), open(old / "index.json", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where it is in use
                _discard(old)
    for unfinished in cache.parent.glob(".*"):
        with suppress(OSError):
            if time.time() - unfinished.stat().st_mtime > STALE_HOURS * 3600:
                shutil.rmtree(unfinished)


def _discard(cache: Path) -> None:
    """Remove a cache folder; renamed first, so that no process opens it half removed."""
    with suppress(OSError):
        shutil.rmtree(cache.rename(cache.with_name(f".{uuid.uuid4().hex}")))
