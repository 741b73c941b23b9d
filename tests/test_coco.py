import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import hotcoco
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from tiny_training import build_tiny, history_without_clock, tiny_settings
from torchvision.datasets import CocoDetection

from cellseg_helpers import engine, runs
from cellseg_helpers.config import ROOT
from cellseg_helpers.data import cache, coco
from cellseg_helpers.data import hw3 as readers
from cellseg_helpers.data.coco import export_coco
from cellseg_helpers.data.drawn import draw_dataset
from cellseg_helpers.data.faults import DataError
from cellseg_helpers.data.hw3 import check_folder, open_dataset, open_test_images
from cellseg_helpers.data.labels import find_instances
from cellseg_helpers.engine import fit
from cellseg_helpers.runs import load_checkpoint

HEIGHT, WIDTH = 30, 24


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def tissue(tmp_path_factory) -> Path:
    """Six drawn images of six patients, 64 to 94 px a side, with border cells, whose instance ids
    are spread and turned round.
    """
    folder = tmp_path_factory.mktemp("tissue") / "cells"
    draw_dataset(
        folder, num_train=6, num_test=1, image_size_px=(64, 72), annotate_border_cells=True
    )
    for path in folder.glob("train/*/class*.tif"):
        label_map = tifffile.imread(path)
        tifffile.imwrite(path, np.where(label_map > 0, 500 - 3 * label_map, 0))
    return folder


@pytest.fixture
def exported(tissue, tmp_path) -> Path:
    return export_coco(tissue, tmp_path / "as coco")


@pytest.fixture
def written(tmp_path):
    """A function that writes a COCO data set: two images ``a`` and ``b``, and these annotations and
    changes.
    """

    def write(*annotations, **changes) -> Path:
        for seed, name in enumerate("ab"):
            write_image(tmp_path / "set" / f"{name}.tif", seed)
        path = tmp_path / "set" / "cells.json"
        path.write_text(json.dumps({**data_set(*annotations), **changes}))
        return path

    return write


def write_image(path, seed=0, shape=(HEIGHT, WIDTH)):
    path.parent.mkdir(exist_ok=True)
    tifffile.imwrite(path, pixels(seed, shape), photometric="rgb")


def pixels(seed=0, shape=(HEIGHT, WIDTH)):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def data_set(*annotations):
    images = [
        {"id": i, "file_name": f"{name}.tif", "height": HEIGHT, "width": WIDTH}
        for i, name in ((7, "a"), (5, "b"))
    ]
    categories = [
        {"id": k, "name": name}
        for k, name in enumerate(("epithelial", "lymphocyte", "neutrophil", "macrophage"), 1)
    ]
    return {"images": images, "annotations": list(annotations), "categories": categories}


def mask(top, left, bottom, right):
    full = np.zeros((HEIGHT, WIDTH), np.uint8)
    full[top:bottom, left:right] = 1
    return full


def rle(full):
    encoded = coco_masks.encode(np.asfortranarray(full))
    return {"size": list(full.shape), "counts": encoded["counts"].decode()}


def cell(number=1, segmentation=None, category=1, image=7, **more):
    segmentation = rle(mask(2, 3, 8, 9)) if segmentation is None else segmentation
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": 0,
        **more,
    }


def instance_masks(label_maps):
    """(class id, mask) of each instance, in their order."""
    found = find_instances(label_maps)
    return [
        (k, label_maps[k - 1] == i)
        for k, i in zip(found.labels.tolist(), found.ids.tolist(), strict=True)
    ]


def assert_same_data(one, other):
    """Equal but for the ids of instances, whose order is the same."""
    assert (one.image_ids, one.patients) == (other.image_ids, other.patients)
    assert np.array_equal(one.sizes, other.sizes) and np.array_equal(one.counts, other.counts)
    for a, b in zip(one, other, strict=True):
        assert (a.image_id, a.patient) == (b.image_id, b.patient)
        assert np.array_equal(a.image, b.image)
        for mine, theirs in zip(a.label_maps, b.label_maps, strict=True):
            assert np.array_equal(in_sequence(mine), in_sequence(theirs))


def in_sequence(label_map):
    """The same instances in the same order, with ids that follow each other."""
    return np.searchsorted(np.unique(np.append(0, label_map)), label_map)


# There and back


@pytest.mark.parametrize("reading", readers.INSTANCE_READINGS)
@pytest.mark.parametrize("min_area", [0, 40])
def test_reads_as_the_tiff_data(tissue, exported, reading, min_area):
    assert check_folder(exported, reading) == []
    as_tiff, as_coco = (open_dataset(data, reading, min_area) for data in (tissue, exported))
    assert_same_data(as_tiff, as_coco)
    assert len(set(as_coco.patients)) == 6 and as_coco.counts.sum() > 20
    assert as_coco.name == "as coco/annotations.json"
    assert (
        as_coco[0].label_maps.max() == as_coco.counts[0].max()
        or reading == "connected_components"
        or min_area
    )


def test_exported_again_it_is_the_same(exported, tmp_path):
    again = export_coco(exported, tmp_path / "again")
    assert (
        json.loads(again.read_text())["annotations"]
        == json.loads(exported.read_text())["annotations"]
    )
    assert open_dataset(again).fingerprint == open_dataset(exported).fingerprint
    assert [p.name for p in sorted((again.parent / "images").iterdir())] == [
        f"{i}.tif" for i in open_dataset(again).image_ids
    ]


def test_official_sample_through_coco(sample_data, tmp_path):
    place = tmp_path / "hw3" / "train" / "official"
    place.mkdir(parents=True)
    for path in (sample_data / "hw3_sample").glob("*.tif"):
        shutil.copy(path, place)
    exported = export_coco(tmp_path / "hw3", tmp_path / "coco")
    dataset = open_dataset(exported)
    assert dataset.counts.tolist() == [[2, 159, 0, 0]]
    assert_same_data(open_dataset(tmp_path / "hw3"), dataset)
    class2 = tifffile.imread(place / "class2.tif")
    truth = [class2 == i for i in np.unique(class2[class2 > 0])]
    masks = [full for k, full in instance_masks(dataset[0].label_maps) if k == 2]
    assert len(truth) == len(masks) == 159
    assert all(np.array_equal(one, other) for one, other in zip(truth, masks, strict=True))
    assert open_dataset(exported, "connected_components").counts.tolist() == [[2, 143, 0, 0]]


def test_unpacked_sample_through_coco(sample_data, tmp_path):
    subprocess.run(
        [sys.executable, sample_data / "unpack.py", tmp_path / "hw3"],
        check=True,
        capture_output=True,
    )
    exported = export_coco(tmp_path / "hw3", tmp_path / "coco")
    assert_same_data(open_dataset(tmp_path / "hw3"), open_dataset(exported))


# Other readers


def test_pycocotools_reads_it(tissue, exported, capsys):
    truth, reader = open_dataset(tissue), COCO(str(exported))
    assert_masks_of_reader(reader, truth, COCO.annToMask)
    assert reader.loadCats(reader.getCatIds())[3] == {"id": 4, "name": "macrophage"}
    keys = ("image_id", "category_id", "segmentation")
    results = reader.loadRes(
        [{key: row[key] for key in keys} | {"score": 0.5} for row in reader.dataset["annotations"]]
    )
    assert len(results.getAnnIds()) == truth.counts.sum()
    assert_masks_of_reader(results, truth, COCO.annToMask)


def test_hotcoco_reads_it(tissue, exported):
    reader = hotcoco.COCO(str(exported))
    assert_masks_of_reader(reader, open_dataset(tissue), hotcoco.COCO.annToMask)
    assert reader.healthcheck()["errors"] == []


def assert_masks_of_reader(reader, truth, mask_of):
    for number, cell_image in enumerate(truth, 1):
        (listed,) = reader.loadImgs([number])
        assert (listed["height"], listed["width"]) == cell_image.image.shape[1:]
        annotations = reader.loadAnns(reader.getAnnIds(imgIds=[number]))
        for annotation, (class_id, full) in zip(
            annotations, instance_masks(cell_image.label_maps), strict=True
        ):
            y, x = np.nonzero(full)
            assert annotation["category_id"] == class_id
            assert annotation["area"] == len(x)
            assert list(annotation["bbox"]) == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert np.array_equal(mask_of(reader, annotation), full)


def test_torchvision_reads_it(tissue, exported, capsys):
    loaded = CocoDetection(str(exported.parent), str(exported))
    for (picture, annotations), cell_image in zip(loaded, open_dataset(tissue), strict=True):
        assert np.array_equal(np.asarray(picture).transpose(2, 0, 1), cell_image.image)
        masks = [coco_masks.decode(annotation["segmentation"]) for annotation in annotations]
        assert np.array_equal(masks, [full for _, full in instance_masks(cell_image.label_maps)])


# Training from it


def test_trains_as_the_tiff_data(tissue, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(engine, "build_model", build_tiny)
    more = {
        "augmentation": "flips_turns_stain",
        "normalization": "data",
        "min_instance_area_px": 20,
    }
    as_tiff, as_coco = (
        fit(tiny_settings(data, run_name=name, epochs=2, **more))
        for data, name in ((tissue, "as_tiff"), (exported, "as_coco"))
    )
    pd.testing.assert_frame_equal(
        history_without_clock(as_tiff), history_without_clock(as_coco), check_exact=True
    )
    assert len(history_without_clock(as_coco)) == 2
    for name in ("split.json", "truth.json", "detections.json", "metrics.json", "best.safetensors"):
        assert (as_tiff / name).read_bytes() == (as_coco / name).read_bytes(), name
    states = [load_checkpoint(run_dir / "last.pt")["model"] for run_dir in (as_tiff, as_coco)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


# The export's folder


def test_command_line(tissue, tmp_path):
    command = [
        sys.executable,
        "-m",
        "cellseg_helpers.data.coco",
        str(tissue),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert (
        done.stdout
        == f"{tmp_path}/out/annotations.json: train from it with data = '{tmp_path}/out/annotations.json'\n"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "annotations.json",
        "images",
    ]
    before = (tmp_path / "out" / "annotations.json").read_bytes()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    problem = f"error: {tmp_path}/out exists and is not an empty folder; remove it, or name another destination\n"
    assert done.stderr == problem
    assert (tmp_path / "out" / "annotations.json").read_bytes() == before


def test_an_empty_folder_is_filled(tissue, tmp_path):
    (tmp_path / "out").mkdir()
    assert export_coco(tissue, tmp_path / "out").stat().st_size > 1000


def test_an_export_that_fails_leaves_nothing(tissue, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(coco.tifffile, "imwrite", fail)
    with pytest.raises(OSError, match="No space left"):
        export_coco(tissue, tmp_path / "there" / "out")
    assert list((tmp_path / "there").iterdir()) == []
    assert coco.main([str(tissue), str(tmp_path / "there" / "out")]) == 1


def test_faulty_data_are_not_exported(tmp_path, capsys):
    assert coco.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Others' COCO files


def test_segmentations_of_every_kind(written):
    full = mask(4, 5, 20, 12)
    full[10:12, 7:9] = 0
    parts = mask(1, 1, 4, 4) | mask(22, 15, 29, 23)
    counts = np.diff(
        np.flatnonzero(np.diff(np.r_[2, full.T.ravel(), 2]))
    ).tolist()  # from background on, column after column
    polygons = [[1, 1, 4, 1, 4, 4, 1, 4], [15.0, 22, 23, 22, 23, 29.0, 15, 29]]
    dataset = open_dataset(
        written(
            cell(1, rle(full)),
            cell(2, {"size": [HEIGHT, WIDTH], "counts": counts}, 2),
            cell(3, polygons, 3),
            cell(4, [[-5, -5, 3, -5, 3, 3, -5, 3]], 4),
        )
    )
    assert dataset.image_ids == ["a", "b"]
    assert dataset.counts.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert np.array_equal(dataset[0].label_maps, [full, full, parts, mask(0, 0, 3, 3)])
    assert np.array_equal(dataset[1].image, pixels(1).transpose(2, 0, 1))


def test_only_what_is_needed_is_asked_for(written):
    annotation = cell(1, category=3)
    del annotation["iscrowd"]
    path = written(
        annotation,
        annotation | {"id": 2, "image_id": 5, "iscrowd": None, "bbox": "none", "area": -1},
        info=3,
    )
    content = json.loads(path.read_text())
    del content["categories"]
    path.write_text(json.dumps(content))
    assert open_dataset(path).counts.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    "names, class_ids",
    [
        (
            {1: "epithelial", 2: "lymphocyte", 3: "neutrophil", 4: "macrophage"},
            {1: 1, 2: 2, 3: 3, 4: 4},
        ),
        (
            {0: "Epithelial", 1: " lymphocyte", 2: "NEUTROPHIL", 3: "macrophage"},
            {0: 1, 1: 2, 2: 3, 3: 4},
        ),
        ({4: "lymphocyte", 90: "macrophage", 1: "ambiguous"}, {4: 2, 90: 4}),
        ({0: "class1", 1: "class2", 2: "Class3", 3: "class4"}, {0: 1, 1: 2, 2: 3, 3: 4}),
        ({1: "A", 2: "B", 3: "C", 4: "D"}, {1: 1, 2: 2, 3: 3, 4: 4}),
        ({0: "background", 1: "A"}, {1: 1}),
    ],
)
def test_categories(written, names, class_ids):
    cells = [cell(n, category=category) for n, category in enumerate(class_ids, 1)]
    dataset = open_dataset(
        written(*cells, categories=[{"id": i, "name": name} for i, name in names.items()])
    )
    assert dataset.counts[0].tolist() == [list(class_ids.values()).count(k) for k in (1, 2, 3, 4)]


def test_the_smaller_of_two_overlapping_keeps_the_pixels(written):
    large, small, other = mask(2, 2, 12, 12), mask(8, 8, 13, 13), mask(11, 11, 16, 16)
    for order in ((large, small, other), (small, large, other)):
        label_map = open_dataset(written(*[cell(n, rle(full)) for n, full in enumerate(order, 1)]))[
            0
        ].label_maps[0]
        ids = {id(full): n for n, full in enumerate(order, 1)}
        assert np.array_equal(
            label_map == ids[id(small)], small
        )  # as large as the other, and before it
        assert np.array_equal(label_map == ids[id(large)], large & ~small & ~other)
        assert np.array_equal(label_map == ids[id(other)], other & ~small)
    classes_apart = open_dataset(written(cell(1, rle(large)), cell(2, rle(small), 2)))[0].label_maps
    assert np.array_equal(classes_apart[:2], [large, small])


def test_annotations_need_not_stand_in_order(written):
    cells = [
        cell(9, rle(mask(0, 0, 3, 3)), image=5),
        cell(4, rle(mask(5, 5, 8, 8))),
        cell(2, rle(mask(10, 10, 14, 14))),
    ]
    first, second = open_dataset(written(*cells))
    assert np.array_equal(first.label_maps[0], mask(5, 5, 8, 8) + 2 * mask(10, 10, 14, 14))
    assert np.array_equal(second.label_maps[0], mask(0, 0, 3, 3))


def test_patients(written):
    images = data_set()["images"]
    images[0] |= {"patient": " P1 "}
    images[1] |= {"file_name": "b/TCGA-A2-A0ES_3.tif", "patient": None}
    path = written(images=images)
    write_image(path.parent / "b" / "TCGA-A2-A0ES_3.tif")
    dataset = open_dataset(path)
    assert (dataset.image_ids, dataset.patients) == (
        ["TCGA-A2-A0ES_3", "a"],
        ["TCGA-A2-A0ES", "P1"],
    )


@pytest.mark.parametrize(
    "mode, ending",
    [
        ("RGB", "png"),
        ("RGBA", "png"),
        ("L", "PNG"),
        ("P", "png"),
        ("I;16", "png"),
        ("RGB", "jpg"),
        ("CMYK", "jpeg"),
    ],
)
def test_pictures(written, mode, ending):
    images = data_set()["images"]
    images[0]["file_name"] = f"a.{ending}"
    path = written(images=images)
    grey = Image.fromarray(pixels()).convert("L")
    sixteen_bits = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    picture = sixteen_bits if mode == "I;16" else Image.fromarray(pixels()).convert(mode)
    picture.save(path.parent / f"a.{ending}", **({"quality": 95} if ending.startswith("j") else {}))
    with Image.open(path.parent / f"a.{ending}") as saved:
        expected = np.asarray((grey if mode == "I;16" else saved).convert("RGB"))
    assert np.array_equal(open_dataset(path)[0].image, expected.transpose(2, 0, 1))


def test_relative_to_the_file_and_absolute(written):
    images = data_set()["images"]
    path = written()
    images[0]["file_name"] = str(path.parent / "a.tif")
    images[1]["file_name"] = "../set/b.tif"
    below = path.parent / "below" / "cells.JSON"
    below.parent.mkdir()
    images[1]["file_name"] = "../b.tif"
    below.write_text(json.dumps({**data_set(cell()), "images": images}))
    assert_same_data(open_dataset(below), open_dataset(written(cell())))


def test_the_cache_follows_file_and_images(written):
    path = written(cell())
    first = open_dataset(path)
    assert open_dataset(path).fingerprint == first.fingerprint
    write_image(path.parent / "b.tif", seed=9)
    assert np.array_equal(open_dataset(path)[1].image, pixels(9).transpose(2, 0, 1))
    assert open_dataset(written(cell(), cell(2, rle(mask(20, 10, 25, 20))))).counts[0].tolist() == [
        2,
        0,
        0,
        0,
    ]


# Faults

CROWD = "it is a crowd (iscrowd 1), which cannot be one instance; annotate its cells one by one, or remove it"
NO_MASK = "but must be an RLE (an object with size and counts) or a list of polygons"
VERTICES = "must be a list x, y, x, y, ... of 3 vertices or more, in px"
OUTSIDE = "reaches far outside its 30 x 24 px image (height x width); correct or remove it"
COUNTS = "must be text, or a list of whole numbers from 0 on"
ANNOTATION_FAULTS = {
    "crowd": (cell(iscrowd=1), CROWD),
    "no segmentation": (
        {k: v for k, v in cell().items() if k != "segmentation"},
        f"its segmentation is 'None', {NO_MASK}",
    ),
    "text": (cell(segmentation="0101"), f"its segmentation is '0101', {NO_MASK}"),
    "no counts": (
        cell(segmentation={"size": [1, 2]}),
        f"its segmentation is \"{{'size': [1, 2]}}\", {NO_MASK}",
    ),
    "other size": (
        cell(segmentation={"size": [WIDTH, HEIGHT], "counts": "01"}),
        "its mask is 24 x 30 px, its image 30 x 24 px (height x width); height and width are swapped",
    ),
    "damaged text": (
        cell(segmentation={"size": [HEIGHT, WIDTH], "counts": "~~é"}),
        "its counts are damaged: they are no text of a compressed RLE",
    ),
    "cut text": (
        cell(
            segmentation={"size": [HEIGHT, WIDTH], "counts": rle(mask(2, 3, 8, 9))["counts"][:-2]}
        ),
        "its counts are damaged: run lengths must cover the mask's 720 px, but they cover 248 px",
    ),
    "short list": (
        cell(segmentation={"size": [HEIGHT, WIDTH], "counts": [5, 9]}),
        "its counts are damaged: run lengths must cover the mask's 720 px, but they cover 14 px",
    ),
    "negative": (
        cell(segmentation={"size": [HEIGHT, WIDTH], "counts": [-1, 721]}),
        f"its RLE's counts are '[-1, 721]', but {COUNTS}",
    ),
    "fractions": (
        cell(segmentation={"size": [HEIGHT, WIDTH], "counts": [1.0, 719]}),
        f"its RLE's counts are '[1.0, 719]', but {COUNTS}",
    ),
    "no polygon": (
        cell(segmentation=[]),
        "its segmentation is an empty list; give at least one polygon, or remove it",
    ),
    "two vertices": (cell(segmentation=[[1, 2, 3, 4]]), f"its polygon '[1, 2, 3, 4]' {VERTICES}"),
    "odd": (
        cell(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
        f"its polygon '[1, 2, 3, 4, 5, 6, 7]' {VERTICES}",
    ),
    "flat": (cell(segmentation=[1, 2, 3, 4, 5, 6]), f"its polygon '1' {VERTICES}"),
    "not a number": (
        cell(segmentation=[[1, 2, 3, float("nan"), 5, 6]]),
        f"its polygon '[1, 2, 3, nan, 5, 6]' {VERTICES}",
    ),
    "far away": (
        cell(segmentation=[[0, 0, 10**9, 0, 9, 9]]),
        f"its polygon '[0, 0, 1000000000, 0, 9, 9]' {OUTSIDE}",
    ),
    "beyond floats": (
        cell(segmentation=[[0, 0, 10**400, 0, 9, 9]]),
        f"its polygon '[0, 0, 1{'0' * 32}' {OUTSIDE}",
    ),
}


@pytest.mark.parametrize("annotation, problem", ANNOTATION_FAULTS.values(), ids=ANNOTATION_FAULTS)
def test_faulty_annotation(written, annotation, problem):
    path = written(cell(8, image=5), {**annotation, "id": 3})
    (fault,) = check_folder(path)
    assert str(fault) == f"cells.json, annotation 3: {problem}"
    with pytest.raises(DataError) as error:
        open_dataset(path)
    assert str(error.value).endswith(
        "Repair it, or set skip_faulty_images to go on without these images."
    )
    assert open_dataset(path, skip_faulty_images=True).image_ids == ["b"]


@pytest.mark.parametrize(
    "segmentation",
    [
        rle(mask(3, 3, 3, 3)),
        {"size": [HEIGHT, WIDTH], "counts": [720]},
        [[40.0, 50, 45, 50, 45, 55]],
    ],
    ids=["text", "list", "polygon outside the image"],
)
def test_no_pixel(written, segmentation):
    (fault,) = check_folder(written(cell(3, segmentation)))
    assert str(fault).startswith("cells.json, annotation 3: its mask has no pixel; leave ")


def test_covered_annotation(written):
    cells = [
        cell(1),
        cell(2),
        cell(3, rle(mask(2, 3, 8, 6))),
        cell(4, rle(mask(2, 6, 8, 9))),
        cell(5, category=2),
    ]
    covered = "annotations of its class that are smaller, or as large, cover all its pixels; remove what is there twice"
    path = written(*cells)
    assert list(map(str, check_folder(path))) == [
        f"cells.json, annotation {n}: {covered}" for n in (1, 2)
    ]
    assert open_dataset(path, skip_faulty_images=True).image_ids == ["b"]


def test_an_image_of_more_than_255_annotations(written):
    cells = [cell(n, rle(mask(n // 24, n % 24, n // 24 + 1, n % 24 + 1))) for n in range(300)]
    (label_map, *_) = open_dataset(written(*cells))[0].label_maps
    assert np.array_equal(label_map.ravel()[:300], np.arange(1, 301)) and label_map.max() == 300


def test_too_many_of_one_class(written, monkeypatch):
    monkeypatch.setattr(coco, "LARGEST_ID", 2)
    cells = [
        cell(n, rle(mask(n, n, n + 1, n + 1)), category)
        for n, category in enumerate((1, 1, 1, 2, 2))
    ]
    (fault,) = check_folder(written(*cells))
    assert (
        str(fault) == "a.tif: it has 3 annotations of class epithelial, above 2; cut the image up"
    )


def test_faulty_images(written):
    images = [
        *data_set()["images"],
        {"id": 1, "file_name": "sub/gone.tif", "height": HEIGHT, "width": WIDTH},
        {"id": 2, "file_name": "lost.png", "height": HEIGHT, "width": WIDTH},
        {"id": 3, "file_name": "turned.tif", "height": HEIGHT, "width": WIDTH},
        {"id": 4, "file_name": "huge.tif", "height": 10**9, "width": 10**9},
        {"id": 6, "file_name": "cut.jpg", "height": HEIGHT, "width": WIDTH},
    ]
    path = written(
        cell(1),
        cell(2, [], image=2),
        cell(3, [[0, 0, 10**9, 0, 10**9, 10**9]], image=4),
        images=images,
    )
    for name in ("turned", "huge"):
        write_image(path.parent / f"{name}.tif", shape=(WIDTH, HEIGHT))
    Image.fromarray(pixels()).save(path.parent / "cut.jpg")
    (path.parent / "cut.jpg").write_bytes((path.parent / "cut.jpg").read_bytes()[:-300])
    again = "copy or export it again"
    assert list(map(str, check_folder(path))) == [
        f"cut.jpg: it cannot be read as a PNG or JPEG (image file is truncated (39 bytes not processed)); {again}",
        f"sub/gone.tif: it cannot be read as a TIFF (No such file or directory); {again}",
        "huge.tif: it is 24 x 30 px, but listed as 1000000000 x 1000000000 px (height x width); "
        "correct its entry, or copy the right image",
        f"lost.png: it cannot be read as a PNG or JPEG (No such file or directory); {again}",
        "cells.json, annotation 2: its segmentation is an empty list; give at least one polygon, or remove it",
        "turned.tif: it is 24 x 30 px, but listed as 30 x 24 px (height x width); correct its entry, or copy the right image",
    ]
    assert open_dataset(path, skip_faulty_images=True).image_ids == ["a", "b"]


def changed(part, row, **changes):
    content = data_set(cell(1), cell(2, image=5))
    content[part][row] |= changes
    return content


def without(part, row, key):
    content = data_set(cell(1), cell(2, image=5))
    del content[part][row][key]
    return content


OWN = "give each its own"
SAME = f"but for folder, ending, upper and lower case; {OWN}, since it is the image id"
ONE_OF = "name it in categories as one of epithelial, lymphocyte, neutrophil, macrophage, or remove what it marks"
FILE_FAULTS = {
    "a list": (
        [1],
        "it holds no COCO data set but a list; give an object with images, annotations, categories",
    ),
    "results": (
        {"images": []},
        "it has no annotations; a COCO data set is an object with images, annotations, categories",
    ),
    "no list": (
        data_set() | {"annotations": {}},
        "its annotations are no list but a dict; export it again",
    ),
    "no images": (
        data_set() | {"images": []},
        "its list of images is empty; export it again, with images",
    ),
    "an image is text": (
        data_set() | {"images": ["a.tif"]},
        "entry 0 of its images is 'a.tif', but must be an object with id, file_name, height, width",
    ),
    "no file name": (
        without("images", 1, "file_name"),
        "entry 1 of its images has no file_name; it needs id, file_name, height, width",
    ),
    "empty file name": (
        changed("images", 0, file_name=" "),
        "entry 0 of its images has file_name ' ', but it must be text",
    ),
    "file name of zeros": (
        changed("images", 0, file_name="\0"),
        "entry 0 of its images has file_name '\\x00', but it must be text",
    ),
    "height of text": (
        changed("images", 0, height="30"),
        "entry 0 of its images has height '30', but it must be a whole number of pixels, 1 or more",
    ),
    "no width": (
        changed("images", 0, width=0),
        "entry 0 of its images has width '0', but it must be a whole number of pixels, 1 or more",
    ),
    "patient": (
        changed("images", 0, patient=3),
        "entry 0 of its images has patient '3', but it must be text",
    ),
    "image id twice": (
        changed("images", 1, id=7) | {"annotations": []},
        f"entry 1 of its images has id '7', as one before it; {OWN}",
    ),
    "file twice": (
        changed("images", 1, file_name="x/A.png"),
        f"2 entries of its images have the file name 'a', {SAME}",
    ),
    "category without name": (
        without("categories", 3, "name"),
        "entry 3 of its categories has no name; it needs id, name",
    ),
    "category twice": (
        changed("categories", 3, id=3),
        f"entry 3 of its categories has id '3', as one before it; {OWN}",
    ),
    "unknown image": (
        changed("annotations", 0, image_id=8),
        "image_id '8' of 1 annotation is no image's id; correct it, or remove what it marks",
    ),
    "unknown category": (
        changed("annotations", 0, category_id=0),
        f"category 0 of 1 annotation is no class; {ONE_OF}",
    ),
    "other category": (
        changed("categories", 0, name="ambiguous"),
        f"category 1 ('ambiguous') of 2 annotations is no class; {ONE_OF}",
    ),
    "annotation id twice": (
        changed("annotations", 1, id=1),
        f"entry 1 of its annotations has id '1', as one before it; {OWN}",
    ),
    "no annotation id": (
        without("annotations", 1, "id"),
        "entry 1 of its annotations has no id; it needs id, image_id, category_id",
    ),
    "no image id": (
        without("annotations", 1, "image_id"),
        "entry 1 of its annotations has no image_id; it needs id, image_id, category_id",
    ),
    "category of text": (
        changed("annotations", 1, category_id="1"),
        "entry 1 of its annotations has category_id '1', but it must be a whole number",
    ),
    "image id in a list": (
        changed("annotations", 1, image_id=[5]),
        "entry 1 of its annotations has image_id '[5]', but it must be a whole number or text",
    ),
}


@pytest.mark.parametrize("content, problem", FILE_FAULTS.values(), ids=FILE_FAULTS)
def test_faulty_file(written, content, problem):
    path = written()
    path.write_text(json.dumps(content))
    faults = check_folder(path)
    assert [str(fault) for fault in faults if not fault.image_id] == [f"cells.json: {problem}"]
    for skip in (False, True):
        with pytest.raises(DataError) as error:
            open_dataset(path, skip_faulty_images=skip)
        assert f"cells.json: {problem}" in str(error.value)
        assert str(error.value).splitlines()[-1].endswith(" and run again.")


NO_JSON = {
    "empty": b"",
    "cut": b"{",
    "deep": b"[" * 100_000,
    "binary": b"\xff\xfe{}",
    "a number too long": b"9" * 5000,
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_no_json(written, content):
    path = written()
    path.write_bytes(content)
    (fault,) = check_folder(path)
    assert str(fault).startswith("cells.json: it cannot be read as JSON (") and str(fault).endswith(
        "; copy or export it again"
    )
    with pytest.raises(DataError, match="cannot be read as JSON"):
        open_dataset(path)


def test_no_file(tmp_path):
    problem = (
        "there is no such file; give the .json of a COCO data set, or a folder that holds train/"
    )
    with pytest.raises(DataError, match=f"none.json: {problem}"):
        open_dataset(tmp_path / "none.json")


def test_the_folder_of_a_coco_file_names_it(exported):
    with pytest.raises(DataError, match=f"or the COCO file {exported}"):
        open_dataset(exported.parent)


def test_all_faults_at_once(written):
    images = [
        *data_set()["images"],
        {"id": 1, "file_name": "gone.tif", "height": HEIGHT, "width": WIDTH},
    ]
    cells = [cell(1, iscrowd=1), cell(2, image=99), cell(3, category=9), cell(4, [], image=5)]
    faults = check_folder(written(*cells, images=images))
    assert [fault.image_id for fault in faults] == ["", "", "a", "b", "gone"]


PLACES = st.lists(st.integers(0, 10), min_size=1, max_size=4)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([[], {}, [[1, 2, 3]]]),
)


@settings(max_examples=150, deadline=None)
@given(PLACES, VALUES)
def test_whatever_stands_in_the_file_it_is_read_or_refused(tmp_path_factory, places, value):
    """One value of a sound file is replaced by another of any type."""
    folder = tmp_path_factory.mktemp("set")
    for name in "ab":
        write_image(folder / f"{name}.tif")
    content = copy.deepcopy(data_set(cell(1), cell(2, [[1, 1, 5, 1, 5, 5]], 2)))
    part, key = content, None
    for place in places:
        if not isinstance(part, dict | list) or not part:
            break
        keys = list(part) if isinstance(part, dict) else range(len(part))
        key, holder = keys[place % len(keys)], part
        part = holder[key]
    holder[key] = value
    (folder / "cells.json").write_text(json.dumps(content))
    try:
        dataset = open_dataset(folder / "cells.json", cache_dir=folder / "cache")
        assert len(dataset) and check_folder(folder / "cells.json") == []
    except DataError as error:
        assert "fault" in str(error)


def test_test_images_are_not_part_of_it(exported):
    with pytest.raises(DataError):
        open_test_images(exported)
