"""The pixels of one file, checked: images (TIFF, PNG, JPEG) and class files (TIFF). No torch."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image

from cellseg_helpers.data.cache import LARGEST_ID
from cellseg_helpers.data.faults import DataError, as_data_error
from cellseg_helpers.data.labels import connected_components

LARGEST_SIDE_PX = 20_000  # a header that claims more is damaged: decoding would fill the memory

# tifffile's remarks on damaged files; they come back as faults
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class RawImage(NamedTuple):
    """The pixels of a file as they are stored."""

    pixels: np.ndarray
    colours: str  # TIFF's photometric interpretation of the decoded pixels
    palette: np.ndarray | None = None  # uint16 [3, number of colours]


def read_image(path: Path) -> np.ndarray:
    """The image of a TIFF, PNG or JPEG file as uint8 [3, H, W]; ``to_rgb`` says what is read.

    Raises:
        DataError: no such file, truncated, or not an image.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        return to_rgb(read_tiff(path))
    read = as_data_error("it cannot be read as a PNG or JPEG")
    with read, Image.open(path, formats=("PNG", "JPEG")) as picture:
        # Of 16 bits a channel Pillow gives 8 for colours, all for grey.
        if picture.mode.startswith("I;16"):
            return to_rgb(RawImage(np.asarray(picture), "MINISBLACK"))
        return to_rgb(RawImage(np.asarray(picture.convert("RGB")), "RGB"))


def read_tiff(path: Path) -> RawImage:
    """The first image series of a TIFF; a ``DataError`` if it is none, truncated or damaged."""
    with as_data_error("it cannot be read as a TIFF"), tifffile.TiffFile(path) as tif:
        page, size = tif.pages.first, tif.filehandle.size
        if max(page.shape) > LARGEST_SIDE_PX:
            claim = f"claims {size_text(page.shape)} px, above {LARGEST_SIDE_PX:,} a side"
            raise DataError(f"its header {claim}; cut it up, or copy it again if it is damaged")
        for part in tif.pages:
            ends = np.add(part.dataoffsets, part.databytecounts)
            if not len(ends) or not all(part.databytecounts) or max(ends) > size:
                held = f"its {size:,} bytes do not hold all its pixels"
                raise DataError(f"it is truncated ({held}); copy or export it again")
        colours = getattr(page.photometric, "name", str(page.photometric))
        if colours == "YCBCR" and page.compression == tifffile.COMPRESSION.JPEG:
            colours = "RGB"  # the decoder converts
        return RawImage(tif.series[0].asarray(), colours, page.colormap)


def to_rgb(raw: RawImage) -> np.ndarray:
    """uint8 [3, H, W] of RGB, RGBA, grey, grey + alpha or palette pixels, channels last or first;
    alpha is dropped.

    16-bit values become ``round(value * 255 / (2**depth - 1))``, where ``depth`` is the smallest of
    8, 12 and 16 bits that holds all colour values: a bright-field image is bright somewhere, so
    with every value below 4,096 it was not recorded with 16 bits.

    Raises:
        DataError: another pixel type, colour space or shape.
    """
    array = raw.pixels
    if array.dtype not in (np.uint8, np.uint16):
        save = "save the image with 8 or 16 bits a channel (unsigned integers)"
        raise DataError(f"its pixels are {array.dtype}; {save}")
    if raw.colours not in ("MINISBLACK", "MINISWHITE", "RGB", "PALETTE"):
        raise DataError(f"its colours are {raw.colours}; save the image as RGB or grey")
    if raw.colours == "MINISWHITE":
        array = np.iinfo(array.dtype).max - array
    if raw.colours == "PALETTE":
        array = raw.palette[:, array]
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[-1] <= 4:
        array = np.moveaxis(array, -1, 0)
    if array.ndim != 3 or array.shape[0] > 4:
        save = "save height x width x 1 to 4 channels"
        raise DataError(f"its shape {size_text(raw.pixels.shape)} is not that of an image; {save}")
    array = array[: 3 if len(array) > 2 else 1]
    if array.dtype == np.uint16:
        depth = next(bits for bits in (8, 12, 16) if array.max() < 2**bits)
        array = np.rint(array * (255 / (2**depth - 1))).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (3, *array.shape[1:])))


def size_text(shape: tuple[int, ...]) -> str:
    """A shape as sentences have it: "1000 x 800"."""
    return " x ".join(map(str, shape))


def to_label_map(
    array: np.ndarray, image_shape: tuple[int, ...] | None, instance_reading: str
) -> np.ndarray:
    """int32 [H, W] of a class file's pixels; ``image_shape`` is None if the image is unreadable.

    Raises:
        DataError: another shape, values that are not ids, or too many of them.
    """
    if array.ndim > 2:
        array = array.squeeze()
    if array.ndim != 2:
        save = "a class file has one channel: save height x width"
        raise DataError(f"its shape is {size_text(array.shape)}; {save}")
    if image_shape and array.shape != image_shape:
        sizes = f"it is {size_text(array.shape)} px but its image is {size_text(image_shape)} px"
        raise DataError(f"{sizes} (height x width); export both at one size")
    if wrong := _wrong_values(array):
        save = "save whole numbers: 0 = background, other values = instance ids"
        raise DataError(f"it has {' and '.join(wrong)}; {save}")
    largest, remedy = "its largest instance id is {:,.10g}", "number the instances from 1 on"
    if instance_reading == "connected_components":
        array = connected_components(array)
        largest, remedy = "it has {:,} connected components", "is it a mask of cells?"
    if array.max() > LARGEST_ID:
        raise DataError(f"{largest.format(array.max())}, above {LARGEST_ID:,}; {remedy}")
    return array.astype(np.int32)


def _wrong_values(array: np.ndarray) -> list[str]:
    """How many pixels of each wrong kind there are, and where the first is."""
    if array.dtype.kind not in "buif":
        return [f"pixels of type {array.dtype}"]
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
