"""Cells for other programs: label images, tables, outlines for QuPath, and one COCO data set.

Coordinates are in px from the image's top left corner, as in QuPath and Fiji: pixel (0, 0) covers 0
to 1, its centre is at 0.5. A cell has the same id in all files of its image.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import shapely
import tifffile
from matplotlib.colors import to_rgb
from scipy import ndimage

from cellseg_helpers.cells import CLASS_NAMES, BoxMask, Cells
from cellseg_helpers.config import resolve_path
from cellseg_helpers.plots import CLASS_COLORS
from cellseg_helpers.runs import replacing, write_json, write_text

BOX_COLUMNS = ["x_px", "y_px", "width_px", "height_px"]


def label_image(cells: Cells, height: int, width: int) -> tuple[np.ndarray, pd.DataFrame]:
    """The cells of one image, whose masks are disjoint, as a label image and a table.

    Returns:
        uint16 [H, W] (uint32 above 65,535 cells), 0 = background, 1..N = the cells in their order;
        and one row a cell: id, class_id, class, score, area_px, centroid_x_px, centroid_y_px and
        the mask's box, x_px, y_px, width_px, height_px. An empty mask has area 0 and no centroid.

    Raises:
        ValueError: two masks overlap, or a mask is not of this image size.

    >>> corner = BoxMask(np.ones((1, 2), bool), x0=0, y0=0)
    >>> label_image(Cells.of_image(2, 3, [1], [corner]), 2, 3)[0].tolist()
    [[1, 1, 0], [0, 0, 0]]
    """
    labels = np.zeros((height, width), np.uint16 if len(cells) < 2**16 else np.uint32)
    for number, (mask, size) in enumerate(zip(cells.masks, cells.sizes.tolist(), strict=True), 1):
        if size != [height, width]:
            wrong = f"of a {size[0]} x {size[1]} px image, not {height} x {width} px"
            raise ValueError(f"the mask of cell {number} is {wrong} (height x width)")
        rows, columns = mask.mask.shape
        window = labels[mask.y0 : mask.y0 + rows, mask.x0 : mask.x0 + columns]
        shared = window[mask.mask & (window > 0)]
        if len(shared):
            overlap = f"cells {shared[0]} and {number} overlap in {(shared == shared[0]).sum()} px"
            rule = "a pixel of a label image belongs to one cell"
            raise ValueError(f"{overlap}, but {rule}; call postprocess.resolve_overlaps first")
        window[mask.mask] = number
    ids = np.arange(1, len(cells) + 1)
    with np.errstate(invalid="ignore"):  # an empty mask has no centroid
        centroids = np.reshape(ndimage.center_of_mass(labels > 0, labels, ids), (-1, 2)) + 0.5
    starts, stops = np.hsplit(cells.mask_boxes, 2)
    names = np.array(CLASS_NAMES)[cells.labels - 1]
    columns = {"id": ids, "class_id": cells.labels, "class": names, "score": cells.scores}
    table = pd.DataFrame({**columns, "area_px": cells.area_px})
    table[["centroid_x_px", "centroid_y_px"]] = centroids[:, ::-1]
    table[BOX_COLUMNS] = np.hstack([starts, stops - starts])
    return labels, table


def outline(mask: BoxMask) -> shapely.Polygon | shapely.MultiPolygon:
    """The outline along the edges of the mask's pixels, so that it has the mask's pixels and area.

    A Polygon with its holes, or a MultiPolygon of the pieces that share no pixel's side. Outer
    rings have a positive area by the shoelace formula, holes a negative one (RFC 7946).
    """
    steps = np.diff(mask.mask.astype(np.int8), axis=1, prepend=0, append=0)
    y, left = np.nonzero(steps == 1)  # each row's runs of pixels
    right = np.nonzero(steps == -1)[1]
    y, left, right = y + mask.y0, left + mask.x0, right + mask.x0
    runs = shapely.box(left, y, right, y + 1)
    return shapely.orient_polygons(shapely.union_all(runs).simplify(0))


def geojson(cells: Cells) -> dict[str, Any]:
    """The cells of one image as a GeoJSON FeatureCollection, which QuPath imports as detections.

    ``name`` is the cell's id, ``measurements`` are its score and area_px; the keys are those that
    ``QuPathTypeAdapters`` of QuPath's source reads. Empty masks are left out.
    """
    features = []
    columns = (cells.masks, cells.labels, cells.scores.tolist(), cells.area_px.tolist())
    for number, (mask, class_id, score, area_px) in enumerate(zip(*columns, strict=True), 1):
        if not area_px:
            continue
        name = CLASS_NAMES[class_id - 1]
        color = [round(255 * part) for part in to_rgb(CLASS_COLORS[name])]
        properties = {"objectType": "detection", "name": str(number)}
        properties["classification"] = {"name": name, "color": color}
        properties["measurements"] = {"score": score, "area_px": area_px}
        geometry = shapely.geometry.mapping(outline(mask))
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def save_cells(cells: Cells, images: list[dict[str, Any]], folder: str | Path) -> list[Path]:
    """Write the cells of a COCO data set's ``images``, disjoint in each, and return the files.

    ``<image>_cells.tif`` is the label image (deflated TIFF, for napari, Fiji, QuPath),
    ``<image>_cells.csv`` its table, ``<image>_cells.geojson`` the outlines. ``cells.json``, written
    last, is a COCO data set of all; its annotations also have ``score`` and ``label``, the id in
    the label image. Every file is written whole or not at all.

    Raises:
        ValueError: masks as for ``label_image``, cells of an image that is not listed, or two
            images with one name.
    """
    folder = resolve_path(folder)
    files = {image["id"]: Path(image["file_name"]).name for image in images}
    names = {key: re.sub(r"\.tiff?$", "", file, flags=re.I) for key, file in files.items()}
    if len(set(names.values())) < len(images):
        lost = "so that one's files would replace the other's; rename one"
        raise ValueError(f"two images have the same id or name, {lost}")
    if unknown := set(cells.image_ids.tolist()) - names.keys():
        wrong = f"which is not among the {len(images)} images given"
        raise ValueError(f"there are detections of image {min(unknown)}, {wrong}")
    paths, annotations = [], []
    for image in images:
        found = cells[cells.image_ids == image["id"]]
        try:
            labels, table = label_image(found, image["height"], image["width"])
        except ValueError as error:
            raise ValueError(f"image {image['file_name']}: {error}") from None
        stem = folder / f"{names[image['id']]}_cells"
        tif, csv, outlines = (Path(f"{stem}.{ending}") for ending in ("tif", "csv", "geojson"))
        with replacing(tif) as temporary:
            deflated = {"photometric": "minisblack", "compression": "zlib", "metadata": None}
            tifffile.imwrite(temporary, labels, **deflated)
        write_text(csv, table.to_csv(index=False))
        write_json(outlines, geojson(found), indent=None)
        paths += [tif, csv, outlines]
        boxes = table[BOX_COLUMNS].to_numpy().tolist()
        rows = zip(found.to_coco(), boxes, table["area_px"].tolist(), strict=True)
        for label, (row, box, area) in enumerate(rows, 1):
            measured = {"bbox": box, "area": area, "iscrowd": 0, "label": label}
            annotations.append({"id": len(annotations) + 1, **row, **measured})
    categories = [{"id": class_id, "name": name} for class_id, name in enumerate(CLASS_NAMES, 1)]
    data_set = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "cells.json", data_set, indent=None)
    return [*paths, folder / "cells.json"]
