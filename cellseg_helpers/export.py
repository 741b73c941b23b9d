"""Export cells to other programs: label images, tables, outlines for QuPath, and a COCO data set.

Coordinates are in px from the top left corner of the image, as in QuPath and Fiji: pixel (0, 0)
extends from 0 to 1, and its centre is at 0.5. A cell has the same id in all files of its image.
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
    """Make a label image and a table of one image's cells, whose masks must not overlap.

    Returns:
        The label image: uint16 [H, W] (uint32 for more than 65,535 cells), 0 = background, 1..N =
        the cells in their order. The table, one row per cell: id, class_id, class, score, area_px,
        centroid_x_px, centroid_y_px, and the mask's box: x_px, y_px, width_px, height_px. An empty
        mask has area 0 and no centroid.

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
        others = window[mask.mask & (window > 0)]
        if len(others):
            overlap = f"cells {others[0]} and {number} overlap in {(others == others[0]).sum()} px"
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
    """Outline a mask along the edges of its pixels: it encloses exactly these pixels.

    Returns a Polygon with holes, or a MultiPolygon if the mask has several 4-connected pieces.
    Outer rings have a positive area by the shoelace formula, holes a negative one (RFC 7946).
    """
    steps = np.diff(mask.mask.astype(np.int8), axis=1, prepend=0, append=0)
    y, left = np.nonzero(steps == 1)  # a run of pixels in a row starts
    right = np.nonzero(steps == -1)[1]  # and ends
    y, left, right = y + mask.y0, left + mask.x0, right + mask.x0
    runs = shapely.box(left, y, right, y + 1)
    return shapely.orient_polygons(shapely.union_all(runs).simplify(0))


def geojson(cells: Cells) -> dict[str, Any]:
    """Make a GeoJSON FeatureCollection of one image's cells, which QuPath imports as detections.

    ``name`` is the cell's id; ``measurements`` are its score and area_px. The keys are those that
    ``QuPathTypeAdapters`` in QuPath's source code reads. Empty masks are left out.
    """
    features = []
    fields = (cells.masks, cells.labels, cells.scores.tolist(), cells.area_px.tolist())
    for number, (mask, class_id, score, area_px) in enumerate(zip(*fields, strict=True), 1):
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
    """Write the cells of ``images`` (those of a COCO data set), and return the paths of the files.

    For each image: ``<image>_cells.tif``, the label image (compressed TIFF, for napari, Fiji and
    QuPath); ``<image>_cells.csv``, its table; ``<image>_cells.geojson``, the outlines. Written
    last: ``cells.json``, a COCO data set of all cells, whose annotations also have ``score`` and
    ``label``, the id in the label image. Each file is written completely or not at all.

    Raises:
        ValueError: masks overlap or have another size than their image, cells are of an image that
            is not listed, or two images have the same name.
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
        of_image = cells[cells.image_ids == image["id"]]
        try:
            labels, table = label_image(of_image, image["height"], image["width"])
        except ValueError as error:
            raise ValueError(f"image {image['file_name']}: {error}") from None
        stem = folder / f"{names[image['id']]}_cells"
        tif, csv, outlines = (Path(f"{stem}.{ending}") for ending in ("tif", "csv", "geojson"))
        with replacing(tif) as temporary:
            options = {"photometric": "minisblack", "compression": "zlib", "metadata": None}
            tifffile.imwrite(temporary, labels, **options)
        write_text(csv, table.to_csv(index=False))
        write_json(outlines, geojson(of_image), indent=None)
        paths += [tif, csv, outlines]
        boxes = table[BOX_COLUMNS].to_numpy().tolist()
        rows = zip(of_image.to_coco(), boxes, table["area_px"].tolist(), strict=True)
        for label, (row, box, area) in enumerate(rows, 1):
            of_mask = {"bbox": box, "area": area, "iscrowd": 0, "label": label}
            annotations.append({"id": len(annotations) + 1, **row, **of_mask})
    categories = [{"id": class_id, "name": name} for class_id, name in enumerate(CLASS_NAMES, 1)]
    data_set = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "cells.json", data_set, indent=None)
    return [*paths, folder / "cells.json"]
