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

# tifffile logs what is wrong with a damaged file; this is reported as a fault instead.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class RawImage(NamedTuple):
    """The decoded pixels of a file, before ``to_rgb``."""

    pixels: np.ndarray
    colours: str  # what the pixels mean: TIFF's photometric interpretation, such as "RGB"
    palette: np.ndarray | None = None  # uint16 [3, number of colours], if ``colours`` is PALETTE


def read_image(path: Path) -> np.ndarray:
    """The image of a TIFF, PNG or JPEG file as uint8 [3, H, W], converted by ``to_rgb``.

    Raises:
        DataError: the file is missing, truncated or no image, or ``to_rgb`` cannot convert it.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        return to_rgb(read_tiff(path))
    faulty = as_data_error("it cannot be read as a PNG or JPEG")
    with faulty, Image.open(path, formats=("PNG", "JPEG")) as picture:
        # Pillow gives all bits of 16-bit grey values, but only the upper 8 of 16-bit colours.
        if picture.mode.startswith("I;16"):
            return to_rgb(RawImage(np.asarray(picture), "MINISBLACK"))
        return to_rgb(RawImage(np.asarray(picture.convert("RGB")), "RGB"))


def read_tiff(path: Path) -> RawImage:
    """The first image series of a TIFF; raises ``DataError`` if the file is no TIFF or damaged."""
    with as_data_error("it cannot be read as a TIFF"), tifffile.TiffFile(path) as tif:
        page, size = tif.pages.first, tif.filehandle.size
        if max(page.shape) > LARGEST_SIDE_PX:
            claim = f"claims {size_text(page.shape)} px, above {LARGEST_SIDE_PX:,} a side"
            raise DataError(f"its header {claim}; cut it up, or copy it again if it is damaged")
        for any_page in tif.pages:
            ends = np.add(any_page.dataoffsets, any_page.databytecounts)  # of its strips or tiles
            if not len(ends) or not all(any_page.databytecounts) or max(ends) > size:
                problem = f"its {size:,} bytes do not hold all its pixels"
                raise DataError(f"it is truncated ({problem}); copy or export it again")
        colours = getattr(page.photometric, "name", str(page.photometric))
        if colours == "YCBCR" and page.compression == tifffile.COMPRESSION.JPEG:
            colours = "RGB"  # the JPEG decoder has converted them
        return RawImage(tif.series[0].asarray(), colours, page.colormap)


def to_rgb(raw: RawImage) -> np.ndarray:
    """Convert RGB, RGBA, grey, grey + alpha or palette pixels, channels last or first, to uint8 RGB
    [3, H, W] without alpha.

    16-bit values become ``round(value * 255 / (2**depth - 1))``, where ``depth`` is the smallest of
    8, 12 and 16 bits that holds all colour values: a bright-field image is bright somewhere, and if
    all its values are below 4,096, the camera recorded 12 bits, not 16.

    Raises:
        DataError: pixels of another type, colour space or shape.
    """
    array = raw.pixels
    if array.dtype not in (np.uint8, np.uint16):
        remedy = "save the image with 8 or 16 bits a channel (unsigned integers)"
        raise DataError(f"its pixels are {array.dtype}; {remedy}")
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
        remedy = "save height x width x 1 to 4 channels"
        shape = size_text(raw.pixels.shape)
        raise DataError(f"its shape {shape} is not that of an image; {remedy}")
    array = array[: 3 if len(array) > 2 else 1]  # without alpha
    if array.dtype == np.uint16:
        depth = next(bits for bits in (8, 12, 16) if array.max() < 2**bits)
        array = np.rint(array * (255 / (2**depth - 1))).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (3, *array.shape[1:])))


def size_text(shape: tuple[int, ...]) -> str:
    """A shape as it is written in messages: "1000 x 800"."""
    return " x ".join(map(str, shape))


def to_label_map(
    array: np.ndarray, image_shape: tuple[int, ...] | None, instance_reading: str
) -> np.ndarray:
    """Check a class file's pixels and return them as a label map int32 [H, W]. ``image_shape`` is
    None if the image could not be read.

    Raises:
        DataError: another shape, values that are no ids, or an id above ``LARGEST_ID``.
    """
    if array.ndim > 2:
        array = array.squeeze()
    if array.ndim != 2:
        remedy = "a class file has one channel: save height x width"
        raise DataError(f"its shape is {size_text(array.shape)}; {remedy}")
    if image_shape and array.shape != image_shape:
        sizes = f"it is {size_text(array.shape)} px but its image is {size_text(image_shape)} px"
        raise DataError(f"{sizes} (height x width); export both at one size")
    if wrong_values := _wrong_values(array):
        remedy = "save whole numbers: 0 = background, other values = instance ids"
        raise DataError(f"it has {' and '.join(wrong_values)}; {remedy}")
    problem, remedy = "its largest instance id is {:,.10g}", "number the instances from 1 on"
    if instance_reading == "connected_components":
        array = connected_components(array)
        problem, remedy = "it has {:,} connected components", "is it a mask of cells?"
    if array.max() > LARGEST_ID:
        raise DataError(f"{problem.format(array.max())}, above {LARGEST_ID:,}; {remedy}")
    return array.astype(np.int32)


def _wrong_values(array: np.ndarray) -> list[str]:
    """The number of NaN, infinite, fractional and negative pixels, with the first one of each."""
    if array.dtype.kind not in "buif":  # boolean, integer or float
        return [f"pixels of type {array.dtype}"]
    finite = np.isfinite(array)
    masks = {
        "NaN": np.isnan(array),
        "infinite": np.isinf(array),
        "fractional": finite & (array != np.rint(array)),
        "negative": finite & (array < 0),
    }
    counts = []
    for adjective, mask in masks.items():
        if count := np.count_nonzero(mask):
            row, column = np.unravel_index(mask.argmax(), mask.shape)
            first = f"the first at row {row}, column {column}: {array[row, column]:g}"
            counts.append(f"{count:,} {adjective} pixel{'s' if count > 1 else ''} ({first})")
    return counts
