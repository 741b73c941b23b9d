"""Instances as a COCO data set, which pycocotools and other readers take.

    python -m cellseg_helpers.data.coco DATA DESTINATION

writes ``DESTINATION/annotations.json`` and the images it lists, ``DESTINATION/images/<image
id>.tif``. Given as ``data``, that file trains as DATA does: the same images, patients and instances
in the same order. Test images are not exported.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tifffile
from tqdm import tqdm

from cellseg_helpers.config import resolve_path
from cellseg_helpers.data.hw3 import CellDataset, CellImage, DataError, open_dataset
from cellseg_helpers.data.labels import CLASS_NAMES, encode_instances, find_instances


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
        instances = find_instances(cell_image.label_maps)
        masks = encode_instances(cell_image.label_maps, instances)
        for box, label, area, mask in zip(
            instances.boxes.tolist(), instances.labels, instances.area_px, masks, strict=True
        ):
            x1, y1, x2, y2 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(area),
                    "iscrowd": 0,
                    "segmentation": mask,
                }
            )
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASS_NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


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
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
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
        part.chmod(0o755)
        os.rename(part, destination)
    finally:
        shutil.rmtree(part, ignore_errors=True)
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
