"""Label images, tables, outlines and COCO files of cells, read back by other libraries."""

import csv
import json
import time

import numpy as np
import pandas as pd
import pytest
import skimage.io
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.path import Path as Outline
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scenes import HEIGHT, WIDTH, disc, result, truth_of
from shapely.geometry import shape
from skimage import measure

from cellseg_helpers import export, runs
from cellseg_helpers.data.labels import CLASS_NAMES, encode_box_mask, encode_box_masks
from cellseg_helpers.data.outlines import pixel_outlines
from cellseg_helpers.export import geojson, label_image, save_cells
from cellseg_helpers.plots import CLASS_COLORS

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))


def rle(mask):
    return encode_box_mask(mask, 0, 0, *mask.shape)


def rows(*texts):
    return np.array([[character == "#" for character in text] for text in texts])


def three_cells():
    """A disc, one cut by two edges of the image, one with a hole and a second piece."""
    ring = coco_mask.decode(disc(70, 50, 12)) & ~coco_mask.decode(disc(70, 50, 4)) & 1
    ring[80:84, 100:103] = 1
    cells = [disc(30, 30, 9), disc(0, 88, 11), rle(ring.astype(bool))]
    return [
        result(1, class_id, score, mask)
        for class_id, score, mask in zip((2, 1, 4), (0.9, 0.5, 0.7), cells, strict=True)
    ]


def rasterize(geometry, height, width):
    """How many of the geometry's rings hold each pixel's centre, modulo 2."""
    polygons = (
        geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    )
    ys, xs = np.mgrid[:height, :width] + 0.5
    centres = np.column_stack([xs.ravel(), ys.ravel()])
    inside = [Outline(ring).contains_points(centres) for polygon in polygons for ring in polygon]
    return np.logical_xor.reduce(inside).reshape(height, width)


# Label image and table


def test_labels_and_table_are_those_of_the_masks():
    cells = three_cells()
    labels, table = label_image(cells, HEIGHT, WIDTH)
    assert labels.dtype == np.uint16 and labels.shape == (HEIGHT, WIDTH)
    for number, cell in enumerate(cells, 1):
        assert np.array_equal(labels == number, coco_mask.decode(cell["segmentation"]) == 1)
    assert table["id"].tolist() == [1, 2, 3]
    assert table["class_id"].tolist() == [2, 1, 4] and table["class"].tolist() == [
        "lymphocyte",
        "epithelial",
        "macrophage",
    ]
    assert table["score"].tolist() == [0.9, 0.5, 0.7]
    for row, region in zip(table.itertuples(), measure.regionprops(labels), strict=True):
        assert row.area_px == region.area
        assert (row.centroid_y_px, row.centroid_x_px) == pytest.approx(
            np.add(region.centroid, 0.5), abs=1e-9
        )
        top, left, bottom, right = region.bbox
        assert (row.x_px, row.y_px, row.width_px, row.height_px) == (
            left,
            top,
            right - left,
            bottom - top,
        )


def test_cells_may_touch_but_not_overlap():
    halves = np.zeros((2, HEIGHT, WIDTH), bool)
    halves[0, :, :55], halves[1, :, 55:] = True, True
    assert np.unique(
        label_image([result(1, 1, 0.5, rle(half)) for half in halves], HEIGHT, WIDTH)[0]
    ).tolist() == [1, 2]
    overlapping = [*three_cells(), result(1, 1, 0.4, disc(38, 30, 3))]
    shared_px = np.count_nonzero(
        coco_mask.decode(disc(30, 30, 9)) & coco_mask.decode(disc(38, 30, 3))
    )
    with pytest.raises(
        ValueError,
        match=f"cells 1 and 4 overlap in {shared_px} px.*call postprocess.resolve_overlaps first",
    ):
        label_image(overlapping, HEIGHT, WIDTH)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="cell 1 is of a 90 x 110 px image, not 110 x 90 px"):
        label_image(three_cells(), WIDTH, HEIGHT)


def test_no_cells_and_empty_masks():
    labels, table = label_image([], 5, 7)
    assert labels.shape == (5, 7) and not labels.any() and len(table) == 0
    empty = {
        "image_id": 1,
        "category_id": 1,
        "score": 0.5,
        "segmentation": rle(np.zeros((5, 7), bool)),
    }
    labels, table = label_image([empty], 5, 7)
    assert (
        not labels.any()
        and table["area_px"].tolist() == [0]
        and table["centroid_x_px"].isna().all()
    )
    assert geojson([empty])["features"] == geojson([])["features"] == []


def test_more_cells_than_16_bits_hold():
    pixels = [(np.ones((1, 1), bool), number % 300, number // 300) for number in range(65_536)]
    cells = [
        {"category_id": 1, "score": 0.5, "segmentation": mask}
        for mask in encode_box_masks(pixels, [(300, 300)] * 65_536)
    ]
    labels, table = label_image(cells, 300, 300)
    assert labels.dtype == np.uint32 and labels.max() == 65_536 == table["id"].max()
    assert label_image(cells[:-1], 300, 300)[0].dtype == np.uint16


# Outlines


@settings(deadline=None, max_examples=150)
@given(masks, st.integers(0, 4), st.integers(0, 4))
def test_outlines_are_valid_and_give_the_mask_back(mask, x0, y0):
    (polygons,) = pixel_outlines([(mask, x0, y0)])
    assert len(polygons) == measure.label(mask, connectivity=1).max()
    full = np.pad(mask, ((y0, 1), (x0, 1)))
    if polygons:
        geometry = {"type": "MultiPolygon", "coordinates": polygons}
        assert np.array_equal(rasterize(geometry, *full.shape), full)
        assert shape(geometry).is_valid and shape(geometry).area == mask.sum()
    for polygon in shape({"type": "MultiPolygon", "coordinates": polygons}).geoms:
        assert polygon.exterior.is_ccw and not any(ring.is_ccw for ring in polygon.interiors)


SHAPES = {  # mask -> rings of each polygon
    "pixel": (rows("#"), [1]),
    "ring": (rows("###", "#.#", "###"), [2]),
    "ring_that_meets_at_a_corner": (rows("##.", "#.#", "###"), [2]),
    "diagonal": (rows("#.", ".#"), [1, 1]),
    "holes_that_meet_at_a_corner": (rows("####", "#.##", "##.#", "####"), [3]),
    "pixel_in_a_hole": (rows("#####", "#...#", "#.#.#", "#...#", "#####"), [2, 1]),
    "checkerboard_in_a_frame": (rows("#####", "##.##", "#.#.#", "##.##", "#####"), [2, 1]),
    "empty": (np.zeros((0, 0), bool), []),
}


@pytest.mark.parametrize("mask, rings", SHAPES.values(), ids=SHAPES)
def test_outlines_of_shapes_with_corners_in_common(mask, rings):
    (polygons,) = pixel_outlines([(mask, 0, 0)])
    assert sorted(map(len, polygons), reverse=True) == rings
    assert all(shape({"type": "Polygon", "coordinates": polygon}).is_valid for polygon in polygons)


def test_many_masks_at_once_are_as_one_by_one(monkeypatch):
    rng = np.random.default_rng(0)
    several = [
        (rng.random(rng.integers(1, 9, 2)) < 0.6, int(x), int(y))
        for x, y in rng.integers(0, 50, (40, 2))
    ]
    alone = [pixel_outlines([mask])[0] for mask in several]
    assert pixel_outlines(several) == alone
    monkeypatch.setattr("cellseg_helpers.data.outlines.MASKS_PER_STRIP", 7)
    assert pixel_outlines(several) == alone
    assert pixel_outlines([]) == []


def test_geojson_has_what_qupath_reads():
    cells = three_cells()
    collection = json.loads(json.dumps(geojson(cells)))
    assert collection["type"] == "FeatureCollection"
    assert [feature["geometry"]["type"] for feature in collection["features"]] == [
        "Polygon",
        "Polygon",
        "MultiPolygon",
    ]
    for number, (feature, cell) in enumerate(zip(collection["features"], cells, strict=True), 1):
        mask = coco_mask.decode(cell["segmentation"]) == 1
        assert feature["type"] == "Feature"
        assert np.array_equal(rasterize(feature["geometry"], HEIGHT, WIDTH), mask)
        name = CLASS_NAMES[cell["category_id"] - 1]
        colour = [int(CLASS_COLORS[name][place : place + 2], 16) for place in (1, 3, 5)]
        assert feature["properties"] == {
            "objectType": "detection",
            "name": str(number),
            "classification": {"name": name, "color": colour},
            "measurements": {"score": cell["score"], "area_px": mask.sum()},
        }


# Files


def test_saved_cells_are_read_back_by_others(tmp_path):
    images = truth_of([], images=2)["images"]
    images[0]["file_name"] = "slide.one.TIF"
    cells = three_cells()
    paths = save_cells(cells, images, tmp_path / "cells")
    stems = ("slide.one_cells", "image2_cells")
    expected = [f"{stem}.{ending}" for stem in stems for ending in ("tif", "csv", "geojson")]
    assert [path.name for path in paths] == [*expected, "cells.json"]
    assert sorted(file.name for file in (tmp_path / "cells").iterdir()) == sorted(
        path.name for path in paths
    )

    labels, table = label_image(cells, HEIGHT, WIDTH)
    assert np.array_equal(tifffile.imread(paths[0]), labels) and np.array_equal(
        skimage.io.imread(paths[0]), labels
    )
    with tifffile.TiffFile(paths[0]) as tif:
        (page,) = tif.pages
        tags = {tag.name: tag.value for tag in page.tags}
        assert not tif.is_bigtiff and tif.byteorder in "<>"
    assert (
        tags["ImageWidth"],
        tags["ImageLength"],
        tags["BitsPerSample"],
        tags["SamplesPerPixel"],
    ) == (WIDTH, HEIGHT, 16, 1)
    assert (
        tags["Compression"] == 8
        and tags["PhotometricInterpretation"] == 1
        and tags.get("SampleFormat", 1) == 1
    )
    pd.testing.assert_frame_equal(pd.read_csv(paths[1]), table)
    assert json.loads(paths[2].read_text()) == json.loads(json.dumps(geojson(cells)))
    assert not tifffile.imread(paths[3]).any()
    assert next(csv.reader(paths[4].open())) == list(table) and len(pd.read_csv(paths[4])) == 0
    assert json.loads(paths[5].read_text()) == {"type": "FeatureCollection", "features": []}


def test_the_coco_data_set_is_read_by_pycocotools(tmp_path, capsys):
    save_cells(three_cells(), truth_of([])["images"], tmp_path)
    coco = COCO(tmp_path / "cells.json")
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert [annotation["label"] for annotation in annotations] == [1, 2, 3]
    for annotation, cell in zip(annotations, three_cells(), strict=True):
        mask = coco.annToMask(annotation)
        assert np.array_equal(mask, coco_mask.decode(cell["segmentation"]))
        assert (
            annotation["area"] == mask.sum()
            and annotation["bbox"] == coco_mask.toBbox(cell["segmentation"]).tolist()
        )
        assert annotation["score"] == cell["score"]
    assert [category["name"] for category in coco.loadCats([1, 2, 3, 4])] == list(CLASS_NAMES)


def test_what_cannot_be_saved_is_said(tmp_path):
    images = truth_of([], images=2)["images"]
    with pytest.raises(
        ValueError, match="detections of image 3, which is not among the 2 images given"
    ):
        save_cells([result(3, 1, 0.5, disc(20, 20, 5))], images, tmp_path)
    with pytest.raises(ValueError, match="image image2: cells 1 and 2 overlap"):
        save_cells(
            [result(2, 1, 0.5, disc(20, 20, 5)), result(2, 1, 0.5, disc(22, 20, 5))],
            images,
            tmp_path,
        )
    assert not (tmp_path / "cells.json").exists()
    images[1]["file_name"] = "image1.tiff"
    with pytest.raises(ValueError, match="two images have the same id or name"):
        save_cells([], images, tmp_path)


def test_a_write_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    images = truth_of([])["images"]
    paths = save_cells(three_cells(), images, tmp_path)
    before = [path.read_bytes() for path in paths]

    def half(path, *args, **kwargs):
        path.write_bytes(b"II*")
        raise OSError("no space left on device")

    monkeypatch.setattr(export.tifffile, "imwrite", half)
    with pytest.raises(OSError, match="no space"):
        save_cells(three_cells()[:1], images, tmp_path)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_thousand_cells_take_about_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.os, "fsync", lambda file: None)
    ys, xs = np.mgrid[-12:13, -12:13]
    cell = np.hypot(ys, xs) < 12
    places = [(25 * (number % 20), 25 * (number // 20)) for number in range(300)]
    cells = [
        {
            "image_id": image_id,
            "category_id": 1,
            "score": 0.5,
            "segmentation": encode_box_mask(cell, *place, 500, 500),
        }
        for image_id in range(1, 5)
        for place in places
    ]
    images = [
        {"id": number, "file_name": f"{number}", "height": 500, "width": 500}
        for number in range(1, 5)
    ]
    started = time.process_time()
    save_cells(cells, images, tmp_path)
    assert time.process_time() - started < 2
