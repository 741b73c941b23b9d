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
from shapely.geometry import mapping
from skimage import measure

from cellseg_helpers import export, runs
from cellseg_helpers.cells import CLASS_NAMES, BoxMask, Cells
from cellseg_helpers.export import geojson, label_image, outline, save_cells
from cellseg_helpers.plots import CLASS_COLORS

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))


def cells_of(*found):
    """``Cells`` of image_id, class_id, score and RLE of each."""
    return Cells.from_coco([result(*cell) for cell in found])


def cell_of(mask):
    """One cell with a mask of its image's size: bool [H, W]."""
    return Cells.of_image(*mask.shape, [1], [BoxMask.around(mask)], [0.5])


def decoded(cells):
    return [coco_mask.decode(rle) == 1 for rle in cells.rles]


def rows(*texts):
    return np.array([[character == "#" for character in text] for text in texts])


def three_cells():
    """A disc, one cut by two edges of the image, one with a hole and a second piece."""
    ring = coco_mask.decode(disc(70, 50, 12)) & ~coco_mask.decode(disc(70, 50, 4)) & 1
    ring[80:84, 100:103] = 1
    two = cells_of((1, 2, 0.9, disc(30, 30, 9)), (1, 1, 0.5, disc(0, 88, 11)))
    third = Cells.of_image(HEIGHT, WIDTH, [4], [BoxMask.around(ring == 1)], [0.7])
    return Cells.concatenate([two, third])


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
    for number, mask in enumerate(decoded(cells), 1):
        assert np.array_equal(labels == number, mask)
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
    labels, _ = label_image(Cells.concatenate(map(cell_of, halves)), HEIGHT, WIDTH)
    assert np.unique(labels).tolist() == [1, 2]
    overlapping = Cells.concatenate([three_cells(), cells_of((1, 1, 0.4, disc(38, 30, 3)))])
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
    labels, table = label_image(Cells.empty(), 5, 7)
    assert labels.shape == (5, 7) and not labels.any() and len(table) == 0
    empty = cell_of(np.zeros((5, 7), bool))
    labels, table = label_image(empty, 5, 7)
    assert (
        not labels.any()
        and table["area_px"].tolist() == [0]
        and table["centroid_x_px"].isna().all()
    )
    assert geojson(empty)["features"] == geojson(Cells.empty())["features"] == []


def test_more_cells_than_16_bits_hold():
    pixels = [BoxMask(np.ones((1, 1), bool), k % 300, k // 300) for k in range(65_536)]
    cells = Cells.of_image(300, 300, np.ones(65_536), pixels)
    labels, table = label_image(cells, 300, 300)
    assert labels.dtype == np.uint32 and labels.max() == 65_536 == table["id"].max()
    assert label_image(cells[:-1], 300, 300)[0].dtype == np.uint16


# Outlines


@settings(deadline=None, max_examples=150)
@given(masks, st.integers(0, 4), st.integers(0, 4))
def test_outlines_are_valid_and_give_the_mask_back(mask, x0, y0):
    full = np.pad(mask, ((y0, 1), (x0, 1)))
    drawn = outline(BoxMask(mask, x0, y0))
    polygons = getattr(drawn, "geoms", [drawn] if mask.any() else [])
    assert len(polygons) == measure.label(mask, connectivity=1).max()
    assert drawn.is_valid and drawn.area == mask.sum()
    if mask.any():
        assert np.array_equal(rasterize(mapping(drawn), *full.shape), full)
    for polygon in polygons:
        assert polygon.exterior.is_ccw and not any(ring.is_ccw for ring in polygon.interiors)
        for ring in (polygon.exterior, *polygon.interiors):  # only corners, no point of a side
            sides = np.diff(ring.coords[:], axis=0)
            assert (np.roll(sides, 1, axis=0) * sides == 0).all()


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
    drawn = outline(BoxMask(mask, 0, 0))
    polygons = [polygon for polygon in getattr(drawn, "geoms", [drawn]) if not polygon.is_empty]
    assert sorted((1 + len(p.interiors) for p in polygons), reverse=True) == rings
    assert drawn.is_valid


def test_geojson_has_what_qupath_reads():
    cells = three_cells()
    collection = json.loads(json.dumps(geojson(cells)))
    assert collection["type"] == "FeatureCollection"
    assert [feature["geometry"]["type"] for feature in collection["features"]] == [
        "Polygon",
        "Polygon",
        "MultiPolygon",
    ]
    for row, (feature, mask) in enumerate(zip(collection["features"], decoded(cells), strict=True)):
        assert feature["type"] == "Feature"
        assert np.array_equal(rasterize(feature["geometry"], HEIGHT, WIDTH), mask)
        name = CLASS_NAMES[cells.labels[row] - 1]
        colour = [int(CLASS_COLORS[name][place : place + 2], 16) for place in (1, 3, 5)]
        assert feature["properties"] == {
            "objectType": "detection",
            "name": str(row + 1),
            "classification": {"name": name, "color": colour},
            "measurements": {"score": cells.scores[row], "area_px": mask.sum()},
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
    cells = three_cells()
    boxes = coco_mask.toBbox(cells.rles).tolist()
    assert [annotation["score"] for annotation in annotations] == cells.scores.tolist()
    for annotation, expected, box in zip(annotations, decoded(cells), boxes, strict=True):
        mask = coco.annToMask(annotation)
        assert np.array_equal(mask, expected)
        assert annotation["area"] == mask.sum() and annotation["bbox"] == box
    assert [category["name"] for category in coco.loadCats([1, 2, 3, 4])] == list(CLASS_NAMES)


def test_what_cannot_be_saved_is_said(tmp_path):
    images = truth_of([], images=2)["images"]
    with pytest.raises(
        ValueError, match="detections of image 3, which is not among the 2 images given"
    ):
        save_cells(cells_of((3, 1, 0.5, disc(20, 20, 5))), images, tmp_path)
    with pytest.raises(ValueError, match="image image2: cells 1 and 2 overlap"):
        two = cells_of((2, 1, 0.5, disc(20, 20, 5)), (2, 1, 0.5, disc(22, 20, 5)))
        save_cells(two, images, tmp_path)
    assert not (tmp_path / "cells.json").exists()
    images[1]["file_name"] = "image1.tiff"
    with pytest.raises(ValueError, match="two images have the same id or name"):
        save_cells(Cells.empty(), images, tmp_path)


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
    masks = [BoxMask.around(cell, 25 * (k % 20), 25 * (k // 20)) for k in range(300)]
    cells = Cells.concatenate(
        Cells.of_image(500, 500, np.ones(300), masks, image_id=number) for number in range(1, 5)
    )
    images = [
        {"id": number, "file_name": f"{number}", "height": 500, "width": 500}
        for number in range(1, 5)
    ]
    started = time.process_time()
    save_cells(cells, images, tmp_path)
    assert time.process_time() - started < 2
