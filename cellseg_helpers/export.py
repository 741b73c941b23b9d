"""What a microscopist takes away: cells as label images, tables, outlines for QuPath and one COCO
data set.

Coordinates are in px from the image's top left corner, as in QuPath and Fiji: pixel (0, 0) covers 0
to 1, its centre is at 0.5. A cell has one id in all of an image's files.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from matplotlib.colors import to_rgb

from cellseg_helpers.config import resolve_path
from cellseg_helpers.data.labels import CLASS_NAMES, decode_in_boxes
from cellseg_helpers.data.outlines import pixel_outlines
from cellseg_helpers.plots import CLASS_COLORS
from cellseg_helpers.runs import replacing, write_json, write_text

Rows = list[dict[str, Any]]


def label_image(detections: Rows, height: int, width: int) -> tuple[np.ndarray, pd.DataFrame]:
    """The detections of one image as a label image and a table.

    Args:
        detections: COCO results whose masks are disjoint.
        height: of the image, px.
        width: of the image, px.

    Returns:
        uint16 [H, W] (uint32 above 65,535 cells), 0 = background, 1..N = the detections in the
        order given; and one row a cell: id, class_id, class, score, area_px, centroid_x_px,
        centroid_y_px and the mask's box, x_px, y_px, width_px, height_px. A mask without a pixel
        has area 0 and no centroid.

    Raises:
        ValueError: masks that overlap (two are named), or that are not of this size.
    """
    labels = np.zeros((height, width), np.uint16 if len(detections) < 2**16 else np.uint32)
    rows = []
    masks = decode_in_boxes([detection["segmentation"] for detection in detections])
    for number, (detection, (mask, x0, y0)) in enumerate(zip(detections, masks, strict=True), 1):
        if list(detection["segmentation"]["size"]) != [height, width]:
            size = " x ".join(map(str, detection["segmentation"]["size"]))
            raise ValueError(
                f"the mask of cell {number} is of a {size} px image, not {height} x {width} px (height x width)"
            )
        place = labels[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
        shared = place[mask & (place > 0)]
        if len(shared):
            raise ValueError(
                f"cells {shared[0]} and {number} overlap in {np.count_nonzero(shared == shared[0])} px, but a pixel of a label "
                "image belongs to one cell; call postprocess.resolve_overlaps first"
            )
        place[mask] = number
        class_id = detection["category_id"]
        rows.append(
            (
                number,
                class_id,
                CLASS_NAMES[class_id - 1],
                detection["score"],
                x0,
                y0,
                *mask.shape[::-1],
            )
        )
    columns = ["id", "class_id", "class", "score", "x_px", "y_px", "width_px", "height_px"]
    table = pd.DataFrame(rows, columns=columns)
    y, x = np.nonzero(labels)
    ids = labels[y, x]
    area_px, x_sum, y_sum = (
        np.bincount(ids, weights, len(rows) + 1)[1:] for weights in (None, x + 0.5, y + 0.5)
    )
    with np.errstate(invalid="ignore"):
        measured = {
            "area_px": area_px,
            "centroid_x_px": x_sum / area_px,
            "centroid_y_px": y_sum / area_px,
        }
    return labels, table.assign(**measured)[[*columns[:4], *measured, *columns[4:]]]


def geojson(detections: Rows) -> dict[str, Any]:
    """The detections of one image as a GeoJSON FeatureCollection, which QuPath imports as detection
    objects.

    A cell's outline runs along its pixels' edges, so that it has the mask's pixels and area, and
    neighbours abut: a Polygon, or a MultiPolygon of the pieces that share no pixel's side, with
    holes (RFC 7946: closed rings, outer ones counter-clockwise). ``name`` is the cell's id,
    ``measurements`` are its score and area_px; the keys are those that ``QuPathTypeAdapters`` of
    QuPath's source reads. Masks without a pixel are left out.
    """
    masks = decode_in_boxes([detection["segmentation"] for detection in detections])
    features = []
    for number, (detection, (mask, _, _), polygons) in enumerate(
        zip(detections, masks, pixel_outlines(masks), strict=True), 1
    ):
        if not polygons:
            continue
        name = CLASS_NAMES[detection["category_id"] - 1]
        several = len(polygons) > 1
        geometry = {
            "type": "MultiPolygon" if several else "Polygon",
            "coordinates": polygons if several else polygons[0],
        }
        properties = {
            "objectType": "detection",
            "name": str(number),
            "classification": {
                "name": name,
                "color": [round(255 * part) for part in to_rgb(CLASS_COLORS[name])],
            },
            "measurements": {"score": detection["score"], "area_px": int(np.count_nonzero(mask))},
        }
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def save_cells(detections: Rows, images: Rows, folder: str | Path) -> list[Path]:
    """Write each image's cells, and one COCO data set of all.

    ``<image>_cells.tif`` is the label image (deflated TIFF, for napari, Fiji, QuPath),
    ``<image>_cells.csv`` its table, ``<image>_cells.geojson`` the outlines. ``cells.json``, written
    last, is the COCO data set; its annotations also carry ``score`` and ``label``, the id in the
    label image. Every file is written whole or not at all.

    Args:
        detections: COCO results, disjoint within an image.
        images: of a COCO data set: id, file_name, height, width.
        folder: where to.

    Returns:
        The files.

    Raises:
        ValueError: masks as for ``label_image``, detections of an image that is not listed, or two
            images of one name.
    """
    folder = resolve_path(folder)
    names = {
        image["id"]: re.sub(r"\.tiff?$", "", Path(image["file_name"]).name, flags=re.IGNORECASE)
        for image in images
    }
    if len(set(names.values())) < len(images):
        raise ValueError(
            "two images have the same id or name, so that one's files would replace the other's; rename one"
        )
    by_image = defaultdict(list)
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    unknown = by_image.keys() - names.keys()
    if unknown:
        raise ValueError(
            f"there are detections of image {min(unknown)}, which is not among the {len(images)} images given"
        )
    paths, annotations = [], []
    for image in images:
        found = by_image[image["id"]]
        try:
            labels, table = label_image(found, image["height"], image["width"])
        except ValueError as error:
            raise ValueError(f"image {image['file_name']}: {error}") from None
        tif, csv, outlines = (
            folder / f"{names[image['id']]}_cells.{ending}" for ending in ("tif", "csv", "geojson")
        )
        with replacing(tif) as temporary:
            tifffile.imwrite(
                temporary, labels, photometric="minisblack", compression="zlib", metadata=None
            )
        write_text(csv, table.to_csv(index=False))
        write_json(outlines, geojson(found), indent=None)
        paths += [tif, csv, outlines]
        for detection, row in zip(found, table.to_dict("records"), strict=True):
            kept = {
                key: detection[key] for key in ("image_id", "category_id", "score", "segmentation")
            }
            box = [row[name] for name in ("x_px", "y_px", "width_px", "height_px")]
            measured = {"bbox": box, "area": row["area_px"], "iscrowd": 0, "label": row["id"]}
            annotations.append({"id": len(annotations) + 1, **kept, **measured})
    categories = [{"id": class_id, "name": name} for class_id, name in enumerate(CLASS_NAMES, 1)]
    write_json(
        folder / "cells.json",
        {"images": images, "annotations": annotations, "categories": categories},
        indent=None,
    )
    return [*paths, folder / "cells.json"]
