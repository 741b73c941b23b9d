"""Instances as a COCO data set, which pycocotools and other readers take.

    python -m cellseg_helpers.data.coco DATA DESTINATION

writes ``DESTINATION/annotations.json`` and the images it lists, ``DESTINATION/images/<image
id>.tif``. Given as ``data``, that file trains as DATA does: the same images, patients and instances
in the same order. Test images are not exported.
"""

import argparse
import json
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tifffile
from tqdm import tqdm

from cellseg_helpers.cells import CLASS_NAMES, run_lengths
from cellseg_helpers.config import replacing, resolve_path
from cellseg_helpers.data.cache import CellDataset, CellImage, DataError
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.data.labels import find_cells

# Numbers in groups of 5 bits: "P" to "o" are groups that more follow, "0" to "O" a number's last.
# Six groups are enough for 500 million px.
COUNTS = re.compile("([P-o]{0,5}[0-O])+")


def to_coco(cell_images: Iterable[CellImage]) -> dict[str, Any]:
    """A COCO data set dict of images and their instances; image ids count from 1 in the order
    given.

    An image's ``file_name`` is its image id, ``patient`` its patient or None. An annotation's
    ``bbox`` is x, y, w, h px, its ``area`` the mask's pixels, its ``segmentation`` an RLE whose
    counts are text.
    """
    images, annotations = [], []
    for number, cell_image in enumerate(cell_images, 1):
        height, width = cell_image.image.shape[1:]
        images.append(
            {
                "id": number,
                "file_name": cell_image.image_id,
                "height": height,
                "width": width,
                "patient": cell_image.patient,
            }
        )
        cells = find_cells(cell_image.label_maps, number)
        for row, area in zip(cells.to_coco(), cells.area_px.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": row["category_id"],
                    "bbox": row["bbox"],
                    "area": area,
                    "iscrowd": 0,
                    "segmentation": row["segmentation"],
                }
            )
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASS_NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def mask_problem(segmentation: Any, size: Sequence[int] | None = None) -> str:
    """What is wrong with a segmentation that must be a compressed RLE with at least one pixel.

    Args:
        segmentation: as read from a file, of any type.
        size: height and width of its image, px; None where they are unknown.

    Returns:
        A sentence, "" where nothing is wrong.
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
        return (
            f"its mask is {own[0]} x {own[1]} px, its image {size[0]} x {size[1]} px "
            f"(height x width){turned}"
        )
    if not COUNTS.fullmatch(counts):
        return "its counts are damaged: they are no text of a compressed RLE"
    lengths, expected = run_lengths(counts), own[0] * own[1]
    if min(lengths) < 0 or sum(lengths) != expected:
        wrong = "one is negative" if min(lengths) < 0 else f"they cover {sum(lengths):,} px"
        return f"its counts are damaged: run lengths must cover the mask's {expected:,} px, but {wrong}"
    return "" if any(lengths[1::2]) else "its mask has no pixel; leave such results out"


def export_coco(data: str | Path, destination: str | Path) -> Path:
    """Write a data set as COCO: images as RGB uint8 TIFF (LZW, lossless), masks as compressed RLE;
    whole or not at all.

    An image's ``file_name`` is relative to the file (``images/<image id>.tif``), its ``patient`` is
    kept; instance ids are not, but the annotations of a class stand in their order.

    Args:
        data: as for ``open_dataset``.
        destination: a new or empty folder; a relative path stands under the repository's root.

    Returns:
        The COCO file, ``destination/annotations.json``.

    Raises:
        DataError: data that cannot be used, or a destination that is not empty.
        OSError: it cannot be written.
    """
    destination = resolve_path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise DataError(
            f"{destination} exists and is not an empty folder; remove it, or name another destination"
        )
    dataset = open_dataset(data)
    with replacing(destination, folder=True) as part:
        (part / "images").mkdir()
        exported = {
            "info": {"description": f"Cells of the data {dataset.name}"},
            **to_coco(_writing_images(dataset, part)),
        }
        for image in exported["images"]:
            image["file_name"] = _file_name(image["file_name"])
        (part / "annotations.json").write_text(
            json.dumps(exported, allow_nan=False) + "\n", encoding="utf-8"
        )
    return destination / "annotations.json"


def _file_name(image_id: str) -> str:
    return f"images/{image_id}.tif"


def _writing_images(dataset: CellDataset, folder: Path) -> Iterator[CellImage]:
    for cell_image in tqdm(
        dataset, f"exporting {dataset.name}", unit="image", delay=2, leave=False
    ):
        pixels = cell_image.image.transpose(1, 2, 0)
        tifffile.imwrite(
            folder / _file_name(cell_image.image_id),
            pixels,
            photometric="rgb",
            compression="lzw",
            predictor=True,
            metadata=None,
        )
        yield cell_image


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cellseg_helpers.data.coco",
        description="Write a data set as COCO: DESTINATION/annotations.json and DESTINATION/images/<image id>.tif.",
        epilog="Relative paths stand under the repository's root.",
    )
    parser.add_argument(
        "data",
        help="folder in the HW3 layout (it holds train/), 'drawn', or the .json of a COCO data set",
    )
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
