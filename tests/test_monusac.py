import csv
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from skimage.draw import polygon2mask

from cellseg_helpers.config import ROOT
from cellseg_helpers.data.faults import DataError
from cellseg_helpers.data.hw3 import open_dataset
from tools.monusac import (
    convert_originals,
    convert_parquet,
    draw_instances,
    fill_outline,
    main,
)

NAME = "TCGA-AA-0001-01Z-00-DX1_1"
HUB_CLASSES = ["Ambiguous", "Epithelial", "Lymphocyte", "Macrophage", "Neutrophil"]
HUB_TISSUES = ["Breast", "Kidney", "Lung", "Prostate"]


def square(top: float, left: float, size: float) -> list[tuple[float, float]]:
    """Corners (x, y) of an outline that holds (size + 1)^2 pixel centres."""
    return [(left, top), (left + size, top), (left + size, top + size), (left, top + size)]


def annotation(layers: dict[str, list]) -> str:
    text = ""
    for name, outlines in layers.items():
        regions = ""
        for number, outline in enumerate(outlines, 1):
            vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in outline)
            regions += (
                f'<Region Id="{number}"><Attributes/><Vertices>{vertices}</Vertices></Region>'
            )
        attributes = f'<Attributes><Attribute Name="{name}"/></Attributes>'
        text += f"<Annotation>{attributes}<Regions>{regions}</Regions></Annotation>"
    return f"<Annotations>{text}</Annotations>"


def write_original(
    folder: Path, layers: dict[str, list], name: str = NAME, shape=(40, 60), suffix=".tif"
) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    tifffile.imwrite(folder / f"{name}{suffix}", image, photometric="rgb")
    (folder / f"{name}.xml").write_text(annotation(layers))
    return image


def label_map(folder: Path, class_id: int, name: str = NAME) -> np.ndarray:
    return tifffile.imread(folder / "train" / name / f"class{class_id}.tif")


def nothing_left(folder: Path, *others: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(others)


# Originals


def test_real_originals_give_640_instances(sample_data, tmp_path):
    report = convert_originals(sample_data / "monusac_originals", tmp_path / "hw3")
    assert report.instances == {
        "epithelial": 329,
        "lymphocyte": 299,
        "neutrophil": 5,
        "macrophage": 7,
    }
    assert (report.images, report.patients, report.ambiguous, report.clipped, report.vanished) == (
        3,
        1,
        0,
        0,
        [],
    )
    assert report.overlapping == 61

    dataset = open_dataset(tmp_path / "hw3", cache_dir=tmp_path / "cache")
    assert dataset.image_ids == [f"TCGA-5P-A9K0-01Z-00-DX1_{i}" for i in (1, 2, 3)]
    assert set(dataset.patients) == {"TCGA-5P-A9K0"}
    assert dataset.counts.tolist() == [[314, 0, 0, 7], [15, 299, 0, 0], [0, 0, 5, 0]]
    assert dataset.sizes.tolist() == [[1153, 1307], [763, 756], [185, 497]]
    for item in dataset:
        pages = tifffile.TiffFile(sample_data / "monusac_originals" / f"{item.image_id}.svs").pages
        assert (item.image == np.moveaxis(pages[0].asarray(), -1, 0)).all()
        assert (
            max(page.size for page in pages) > pages[0].size
        )  # the picture of the slide is larger than the tissue


def test_classes_pixels_and_patients(tmp_path):
    image = write_original(
        tmp_path / "in" / "TCGA-AA-0001",
        {
            "Macrophage": [square(20, 30, 9)],
            "Epithelial": [square(2, 3, 4), square(10, 3, 4)],
            "Neutrophil": [],
        },
    )
    report = convert_originals(tmp_path / "in", tmp_path / "out")
    assert report.instances == {"epithelial": 2, "lymphocyte": 0, "neutrophil": 0, "macrophage": 1}

    folder = tmp_path / "out" / "train" / NAME
    assert sorted(path.name for path in folder.iterdir()) == [
        "class1.tif",
        "class4.tif",
        "image.tif",
    ]
    assert (tifffile.imread(folder / "image.tif") == image).all()
    expected = np.zeros((40, 60), np.uint16)
    expected[2:7, 3:8], expected[10:15, 3:8] = 1, 2
    assert label_map(tmp_path / "out", 1).dtype == np.uint16
    assert (label_map(tmp_path / "out", 1) == expected).all()
    with open(tmp_path / "out" / "patients.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"image_id": NAME, "patient": "TCGA-AA-0001", "organ": ""}
        ]
    assert nothing_left(tmp_path, "in", "out")


@pytest.mark.parametrize("order", [1, -1])
def test_smaller_instance_is_on_top_within_a_class(tmp_path, order):
    large, small, inside = square(0, 0, 19), square(15, 15, 9), square(4, 4, 2)
    write_original(
        tmp_path / "in", {"Epithelial": [large, small, inside][::order], "Lymphocyte": [large]}
    )
    report = convert_originals(tmp_path / "in", tmp_path / "out")
    areas = np.bincount(label_map(tmp_path / "out", 1).ravel())[1:][::order]
    assert areas.tolist() == [400 - 25 - 9, 100, 9]
    assert (label_map(tmp_path / "out", 2) > 0).sum() == 400  # another class has a map of its own
    assert report.overlapping == 1
    assert not report.vanished


def test_vanished_regions_are_named_and_ambiguous_ones_counted(tmp_path):
    same = square(20, 20, 5)
    write_original(
        tmp_path / "in",
        {
            "Epithelial": [
                same,
                same,
                [(1, 1), (9, 9)],
                [],
                [(3.2, 3.2), (3.6, 3.2), (3.4, 3.6)],
                square(100, 0, 5),
            ],
            "Lymphocyte": [square(-5, 55, 9)],
            "Ambiguous": [square(1, 1, 8), square(3, 1, 8)],
        },
    )
    report = convert_originals(tmp_path / "in", tmp_path / "out")
    assert report.instances == {"epithelial": 1, "lymphocyte": 1, "neutrophil": 0, "macrophage": 0}
    assert report.ambiguous == 2
    assert report.clipped == 2
    assert (label_map(tmp_path / "out", 2) > 0).sum() == 5 * 5
    assert np.unique(label_map(tmp_path / "out", 1)).tolist() == [
        0,
        1,
    ]  # of two equal regions the earlier stays
    reasons = [
        "covered by smaller or equal",
        "2 vertices",
        "0 vertices",
        "no pixel centre",
        "no pixel centre",
    ]
    for number, (sentence, reason) in enumerate(zip(report.vanished, reasons, strict=True), 2):
        assert f"{NAME}.xml, region {number} (epithelial)" in sentence
        assert reason in sentence
    for part in ("ambiguous", "left out", "vanished", *report.vanished):
        assert part in str(report)


def test_outline_that_crosses_itself_leaves_no_hole():
    loop = np.array(
        [(0, 0), (0, 20), (20, 20), (20, 5), (5, 5), (5, 15), (15, 15), (15, 0)]
    )  # winds twice round (10, 10)
    plain = polygon2mask((30, 30), loop)
    filled = np.zeros((30, 30), bool)
    filled.ravel()[fill_outline(loop, (30, 30))] = True
    assert not plain[10, 10]
    assert filled[10, 10]
    assert filled.sum() > plain.sum()
    assert filled[plain].all()


@given(st.lists(st.tuples(st.integers(-20, 140), st.integers(-20, 140)), min_size=3, max_size=9))
def test_outlines_equal_scikit_image_but_for_holes(quarters):
    from scipy.ndimage import binary_fill_holes

    vertices = np.array(quarters) / 4
    pixels = fill_outline(vertices, (20, 30))
    ours = np.zeros((20, 30), bool)
    ours.ravel()[pixels] = True
    assert len(pixels) == ours.sum()
    assert (ours == binary_fill_holes(polygon2mask((60, 60), vertices + 10)[10:30, 10:40])).all()


@given(st.data())
def test_a_pixel_belongs_to_the_smallest_instance_on_it(data):
    pixels = [
        np.array(sorted(chosen), int)
        for chosen in data.draw(st.lists(st.sets(st.integers(0, 29), max_size=12), max_size=6))
    ]
    drawn, areas = draw_instances(pixels, (5, 6))
    for position, value in enumerate(drawn.ravel()):
        covering = [(len(own), index) for index, own in enumerate(pixels) if position in own]
        assert value == (min(covering)[1] + 1 if covering else 0)
    assert areas.tolist() == [int((drawn == index + 1).sum()) for index in range(len(pixels))]


def test_image_without_cells_is_readable(tmp_path):
    write_original(tmp_path / "in", {"Ambiguous": [square(1, 1, 8)], "Epithelial": []})
    convert_originals(tmp_path / "in", tmp_path / "out")
    dataset = open_dataset(tmp_path / "out", cache_dir=tmp_path / "cache")
    assert dataset.counts.tolist() == [[0, 0, 0, 0]]


def test_unknown_patients_leave_out_the_patient_list(tmp_path):
    write_original(tmp_path / "in", {"Epithelial": [square(1, 1, 8)]}, name="slide_7")
    assert convert_originals(tmp_path / "in", tmp_path / "out").patients == 0
    assert open_dataset(tmp_path / "out", cache_dir=tmp_path / "cache").patients == [None]


def test_svs_is_read_before_tif_first_page_before_larger_ones_and_hidden_files_never(tmp_path):
    folder = tmp_path / "in"
    write_original(folder, {"Epithelial": [square(1, 1, 8)]})
    first = np.full((40, 60, 4), (1, 2, 3, 255), np.uint8)
    with tifffile.TiffWriter(folder / f"{NAME}.svs") as tiff:
        tiff.write(first, photometric="rgb", extrasamples=["unassalpha"])
        tiff.write(np.zeros((200, 200, 3), np.uint8), photometric="rgb")
    (folder / f"._{NAME}.xml").write_text("not an annotation")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "other.svs").write_text("not an image")
    assert convert_originals(folder, tmp_path / "out").images == 1
    assert (tifffile.imread(tmp_path / "out" / "train" / NAME / "image.tif") == (1, 2, 3)).all()


def break_original(folder: Path, fault: str) -> None:
    image, xml = folder / f"{NAME}.tif", folder / f"{NAME}.xml"
    if fault == "no xml":
        xml.unlink()
    elif fault == "no image":
        image.unlink()
    elif fault == "broken xml":
        xml.write_text(xml.read_text()[:-30])
    elif fault == "other xml":
        xml.write_text("<html></html>")
    elif fault == "empty image":
        image.write_bytes(b"")
    elif fault == "truncated image":
        image.write_bytes(image.read_bytes()[:-4000])
    elif fault == "grey image":
        tifffile.imwrite(image, np.zeros((40, 60), np.uint8))
    elif fault == "unknown class":
        xml.write_text(annotation({"Plasma cell": [square(1, 1, 4)]}))
    elif fault == "bad vertex":
        xml.write_text(annotation({"Epithelial": [[(1, 1), ("one", 2), (3, 3)]]}))
    elif fault == "endless vertex":
        xml.write_text(annotation({"Epithelial": [[(1, 1), ("nan", 2), (3, 3)]]}))
    elif fault == "same name":
        write_original(folder / "again", {})


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("no xml", rf"{NAME}\.tif has no \.xml beside it"),
        ("no image", rf"{NAME}\.xml has no image beside it"),
        ("broken xml", rf"{NAME}\.xml: the annotation cannot be read"),
        ("other xml", rf"{NAME}\.xml: .*no MoNuSAC annotation"),
        ("empty image", rf"{NAME}\.tif: the image cannot be read"),
        ("truncated image", rf"{NAME}\.tif: the image cannot be read"),
        (
            "grey image",
            rf"{NAME}\.tif: expected a uint8 RGB image, found uint8 of shape \(40, 60\)",
        ),
        (
            "unknown class",
            rf"{NAME}\.xml: unknown class 'Plasma cell'; one of epithelial, .*macrophage",
        ),
        (
            "bad vertex",
            rf"{NAME}\.xml, region 1 \(epithelial\): a vertex without a numeric X and Y",
        ),
        (
            "endless vertex",
            rf"{NAME}\.xml, region 1 \(epithelial\): a vertex that is not a finite number",
        ),
        ("same name", rf"{NAME}\.tif and .*{NAME}\.tif have the same name"),
    ],
)
def test_damaged_originals_end_in_a_sentence_and_leave_nothing(tmp_path, fault, sentence):
    write_original(
        tmp_path / "in" / "a", {"Epithelial": [square(1, 1, 8)]}, name="TCGA-AA-0000-01Z-00-DX1_1"
    )
    write_original(tmp_path / "in" / "b", {"Epithelial": [square(1, 1, 8)]})
    break_original(tmp_path / "in" / "b", fault)
    with pytest.raises(DataError, match=sentence):
        convert_originals(tmp_path / "in", tmp_path / "out")
    assert nothing_left(tmp_path, "in")


def test_only_a_new_or_empty_destination(tmp_path):
    write_original(tmp_path / "in", {"Epithelial": [square(1, 1, 8)]})
    (tmp_path / "out").mkdir()
    convert_originals(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="out exists and is not an empty folder"):
        convert_originals(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="no such folder"):
        convert_originals(tmp_path / "nowhere", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no MoNuSAC originals"):
        convert_originals(tmp_path / "empty", tmp_path / "new")
    assert nothing_left(tmp_path, "in", "out", "empty")


# Parquet


def mask(top: int, left: int, size: int, shape=(40, 60)) -> np.ndarray:
    picture = np.zeros(shape, bool)
    picture[top : top + size, left : left + size] = True
    return picture


def row(
    instances: list[np.ndarray],
    names: list[str],
    patient="TCGA-AA-0001",
    tissue="Lung",
    shape=(40, 60),
) -> dict:
    image = np.full((*shape, 3), 200, np.uint8)
    return {
        "patient": patient,
        "image": image,
        "instances": instances,
        "categories": names,
        "tissue": tissue,
    }


def write_parquet(
    path: Path, rows: list[dict], classes=HUB_CLASSES, drop=(), numbers_only=False
) -> None:
    """A file of the public copy's schema, written by the library that wrote that one."""
    import datasets
    from PIL import Image

    categories = datasets.Value("int64") if numbers_only else datasets.ClassLabel(names=classes)
    features = {
        "patient": datasets.Value("string"),
        "image": datasets.Image(mode="RGB"),
        "instances": datasets.List(datasets.Image(mode="1")),
        "categories": datasets.List(categories),
        "tissue": datasets.ClassLabel(names=HUB_TISSUES),
    }
    rows = [
        item
        | {
            "image": Image.fromarray(item["image"]),
            "instances": [Image.fromarray(picture) for picture in item["instances"]],
            "categories": [classes.index(name) for name in item["categories"]],
        }
        for item in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    written = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    written.remove_columns(list(drop)).to_parquet(path)


def test_parquet_copy(tmp_path):
    names = [
        "Neutrophil",
        "Macrophage",
        "Epithelial",
        "Ambiguous",
        "Lymphocyte",
        "Epithelial",
        "Epithelial",
    ]
    small, large, empty = mask(5, 5, 4), mask(0, 0, 20), mask(0, 0, 0)
    masks = [mask(0, 0, 2), mask(0, 0, 3), small, mask(0, 0, 30), mask(0, 0, 5), large, empty]
    write_parquet(
        tmp_path / "hub" / "data" / "train-00000-of-00001.parquet",
        [
            row(masks, names),
            row([], [], patient="TCGA-BB-0002", tissue="Breast"),
            row([small], ["Macrophage"]),
        ],
    )
    write_parquet(
        tmp_path / "hub" / "data" / "test-00000-of-00001.parquet",
        [row([small, large], ["Ambiguous", "Neutrophil"])],
    )
    reports = convert_parquet(tmp_path / "hub", tmp_path / "out")

    assert list(reports) == ["train", "test"]
    train = reports["train"]
    assert train.instances == {"epithelial": 2, "lymphocyte": 1, "neutrophil": 1, "macrophage": 2}
    assert (train.images, train.patients, train.ambiguous, train.overlapping) == (3, 2, 1, 1)
    assert len(train.vanished) == 1
    assert "row 1, instance 7 (epithelial) has an empty mask" in train.vanished[0]
    assert reports["test"].instances == {
        "epithelial": 0,
        "lymphocyte": 0,
        "neutrophil": 1,
        "macrophage": 0,
    }
    assert reports["test"].ambiguous == 1
    assert nothing_left(tmp_path, "hub", "out", "out_test")

    first = "TCGA-AA-0001_001"
    areas = [
        np.bincount(label_map(tmp_path / "out", class_id, first).ravel())[1:].tolist()
        for class_id in (1, 2, 3, 4)
    ]
    assert areas == [[16, 400 - 16], [25], [4], [9]]
    with open(tmp_path / "out" / "patients.csv", newline="") as file:
        assert [tuple(line.values()) for line in csv.DictReader(file)] == [
            (first, "TCGA-AA-0001", "lung"),
            ("TCGA-BB-0002_001", "TCGA-BB-0002", "breast"),
            ("TCGA-AA-0001_002", "TCGA-AA-0001", "lung"),
        ]
    dataset = open_dataset(tmp_path / "out", cache_dir=tmp_path / "cache")
    assert dataset.image_ids == [first, "TCGA-AA-0001_002", "TCGA-BB-0002_001"]
    assert dataset.counts.tolist() == [[2, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert (dataset[0].image == 200).all()
    assert open_dataset(tmp_path / "out_test", cache_dir=tmp_path / "cache").counts.tolist() == [
        [0, 0, 1, 0]
    ]


def test_parquet_classes_go_by_name_not_by_number(tmp_path):
    write_parquet(
        tmp_path / "t.parquet", [row([mask(0, 0, 3)], ["Macrophage"])], classes=HUB_CLASSES[::-1]
    )
    assert (
        convert_parquet(tmp_path / "t.parquet", tmp_path / "out")["train"].instances["macrophage"]
        == 1
    )


@pytest.mark.parametrize(
    ("faulty", "options", "sentence"),
    [
        (
            row([], []),
            {"drop": ["instances", "tissue"]},
            "no column instances, tissue; expected patient, image",
        ),
        (
            row([], []),
            {"classes": [*HUB_CLASSES, "Plasma"]},
            "column categories: unknown class 'Plasma'",
        ),
        (
            row([mask(0, 0, 3)], ["Epithelial"]),
            {"numbers_only": True},
            "column categories has no class names",
        ),
        (
            row([mask(0, 0, 3)], []),
            {},
            "row 2: instances and categories must be two lists of the same length",
        ),
        (
            row([mask(0, 0, 3, (10, 10))], ["Epithelial"]),
            {},
            r"row 2, instance 1 \(epithelial\): mask of shape \(10, 10\)",
        ),
        (
            row([], [], patient="../x"),
            {},
            "row 2: the patient '../x' cannot be part of a file name",
        ),
        (row([], [], tissue=None), {}, "row 2: label None has no name; names are Breast"),
    ],
)
def test_wrong_parquet_ends_in_a_sentence_and_leaves_nothing(tmp_path, faulty, options, sentence):
    write_parquet(tmp_path / "t.parquet", [row([], []), faulty], **options)
    with pytest.raises(DataError, match=rf"t\.parquet.*{sentence}"):
        convert_parquet(tmp_path / "t.parquet", tmp_path / "out")
    assert nothing_left(tmp_path, "t.parquet")


def test_damaged_parquet_ends_in_a_sentence_and_leaves_nothing(tmp_path):
    path = tmp_path / "t.parquet"
    write_parquet(path, [row([mask(0, 0, 3)], ["Epithelial"])])
    whole = path.read_bytes()
    pictures = whole.index(b"\x89PNG")
    for content, sentence in (
        (b"no parquet", "cannot be read as Parquet"),
        (whole[:-10], "cannot be read as Parquet"),
        (
            whole[:pictures] + bytes(40) + whole[pictures + 40 :],
            r"row 1, image: cannot be decoded|cannot be read to its end",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"t\.parquet.*({sentence})"):
            convert_parquet(path, tmp_path / "out")
    with pytest.raises(DataError, match="no such file or folder"):
        convert_parquet(tmp_path / "nowhere.parquet", tmp_path / "out")
    path.write_bytes(whole)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(DataError, match="not an empty folder"):
        convert_parquet(path, tmp_path / "out")
    assert nothing_left(tmp_path, "t.parquet", "out")


def test_parquet_masks_are_never_stacked(tmp_path):
    count, shape = 150, (800, 800)
    masks = [mask(5 * i, 5 * i, 4, shape) for i in range(count)]
    write_parquet(tmp_path / "t.parquet", [row(masks, ["Lymphocyte"] * count, shape=shape)])
    del masks
    convert_parquet(tmp_path / "t.parquet", tmp_path / "warm")
    tracemalloc.start()
    report = convert_parquet(tmp_path / "t.parquet", tmp_path / "out")["train"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.instances["lymphocyte"] == count
    assert peak < count * shape[0] * shape[1] / 4


# Command line and download


def test_command_line_converts_and_prints_the_table(tmp_path, capsys):
    write_original(tmp_path / "in", {"Epithelial": [square(1, 1, 8)]})
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "out") in printed
    assert "epithelial          1" in printed
    write_parquet(tmp_path / "p" / "train-0.parquet", [row([mask(0, 0, 3)], ["Macrophage"])])
    assert main([str(tmp_path / "p"), str(tmp_path / "out2")]) == 0
    assert "macrophage          1" in capsys.readouterr().out
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_download_converts_what_the_hub_gives(tmp_path, monkeypatch):
    write_parquet(
        tmp_path / "snapshot" / "data" / "train-00000-of-00001.parquet",
        [row([mask(0, 0, 3)], ["Macrophage"])],
    )
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["revision"]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **options: None)
    assert main(["download", str(tmp_path / "out"), "--revision", "abc"]) == 0
    assert asked == [("RationAI/MoNuSAC", "abc")]
    assert (tmp_path / "out" / "train" / "TCGA-AA-0001_001" / "class4.tif").exists()


def test_download_of_a_revision_without_data_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **options: None)
    assert main(["download", str(tmp_path / "out")]) == 1
    assert (
        "holds no Parquet files; take another one, such as --revision main"
        in capsys.readouterr().err
    )


def test_download_without_a_network_says_what_to_do(tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hub"),
    }
    command = [
        sys.executable,
        "-m",
        "tools.monusac",
        "download",
        str(tmp_path / "out"),
    ]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    convert = f"python -m tools.monusac FOLDER {tmp_path / 'out'}"
    for part in ("MoNuSAC 2020", "grand-challenge", "CC BY-NC-SA 4.0", convert):
        assert part in result.stderr
    assert not (tmp_path / "out").exists()
