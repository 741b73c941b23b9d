"""Tables of data, runs and mistakes as DataFrames, and the saving of them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pycocotools import mask as coco_mask

from cellseg_helpers.config import ROOT, resolve_path
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.hw3 import CellDataset, CellImage, DataError, open_dataset
from cellseg_helpers.data.labels import CLASS_NAMES, find_instances
from cellseg_helpers.metrics import Matches
from cellseg_helpers.runs import Run, load_run, write_text

TABLES = "outputs/tables"
NO_CELL_IOU = 0.1  # under it, a detection lies on no annotated cell (TIDE's background threshold)
BORDER_PX = 2  # a predicted mask may end this far from the image's edge and still be of a cell that the edge cuts
REPORT_C = {
    "image type": "RGB microscopy",
    "annotation": "instance level",
    "classes": "4",
    "labelled images": "209",
    "unlabelled images": "101",
    "format": "TIFF images and masks, one mask a class",
}


def save_table(table: pd.DataFrame, name: str, **context: str | int) -> Path:
    """Write ``outputs/tables/<name>.csv``, whole or not at all.

    Args:
        table: its named index is written too.
        name: of the file, without ending.
        context: columns that every row carries: ``scale``, ``data``, ``split`` and ``maxDets``, as
            far as they apply.

    Returns:
        The path under the repository's root.
    """
    rows = table.reset_index() if any(table.index.names) else table
    for place, (column, value) in enumerate(context.items()):
        rows = rows.assign(**{column: value})[
            [*rows.columns[:place], column, *rows.columns[place:]]
        ]
    path = Path(TABLES) / f"{name}.csv"
    write_text(resolve_path(path), rows.to_csv(index=False))
    return path


def dataset_summary(dataset: CellDataset, data: str) -> pd.DataFrame:
    """Report C's data table beside the data at hand; rows: its items, columns: ``reported``,
    ``here``.
    """
    is_coco = str(data).endswith(".json")
    place = ROOT / "outputs" / "drawn" if data == "drawn" else resolve_path(data)
    tests = [
        file
        for file in (place.parent if is_coco else place).glob("test_release/*")
        if file.suffix.lower() in (".tif", ".tiff")
    ]
    here = {
        "image type": "RGB, drawn in H&E colours" if data == "drawn" else "read as RGB",
        "annotation": "instance level",
        "classes": str((dataset.counts.sum(0) > 0).sum()),
        "labelled images": str(len(dataset)),
        "unlabelled images": str(len(tests)),
        "format": "images beside a COCO file" if is_coco else REPORT_C["format"],
    }
    return pd.DataFrame({"reported": REPORT_C, "here": here}).rename_axis("item")


def choose_image(dataset: CellDataset, image_number: int = -1) -> int:
    """The image's index; for -1 that of an image with the most classes, and of these the one with
    the most cells.

    Raises:
        ValueError: no such image.
    """
    if not -1 <= image_number < len(dataset):
        allowed = f"0 to {len(dataset) - 1}, or -1"
        raise ValueError(
            f"image_number is {image_number}, but the data have {len(dataset)} images: {allowed}"
        )
    classes, cells = (dataset.counts > 0).sum(1), dataset.counts.sum(1)
    return image_number if image_number >= 0 else int(np.lexsort([cells, classes])[-1])


def instance_table(dataset: CellDataset) -> pd.DataFrame:
    """One row an instance: image_id, patient, class, area_px, size_px (sqrt of area_px),
    touches_border.
    """
    parts = []
    for cell_image in dataset:
        found = find_instances(cell_image.label_maps)
        names = np.array(CLASS_NAMES)[found.labels - 1]
        parts.append(
            pd.DataFrame(
                {"class": names, "area_px": found.area_px, "touches_border": found.touches_border}
            ).assign(image_id=cell_image.image_id, patient=cell_image.patient)
        )
    table = pd.concat(parts, ignore_index=True).assign(
        size_px=lambda rows: np.sqrt(rows["area_px"])
    )
    return table[["image_id", "patient", "class", "area_px", "size_px", "touches_border"]]


def class_summary(instances: pd.DataFrame, anchor_sizes: Sequence[float]) -> pd.DataFrame:
    """Per class: cells, images, size in px (5th percentile, median, 95th), the anchor nearest to
    the median, border contact.
    """
    rows = {}
    for name in CLASS_NAMES:
        cells = instances[instances["class"] == name]
        sizes = cells["size_px"].quantile([0.05, 0.5, 0.95]).to_numpy()
        nearest = (
            min(anchor_sizes, key=lambda size, middle=sizes[1]: abs(np.log(size / middle)))
            if len(cells)
            else np.nan
        )
        rows[name] = {
            "cells": len(cells),
            "images": cells["image_id"].nunique(),
            "size_5%_px": sizes[0],
            "size_median_px": sizes[1],
            "size_95%_px": sizes[2],
            "nearest_anchor_px": nearest,
            "touch_border": int(cells["touches_border"].sum()),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def patient_summary(dataset: CellDataset) -> pd.DataFrame:
    """Per patient: images, cells, and cells of each class; empty where no patient is known."""
    counts = pd.DataFrame(dataset.counts, columns=list(CLASS_NAMES)).assign(
        patient=dataset.patients, images=1
    )
    table = counts.groupby("patient").sum()
    table.insert(0, "cells", table[list(CLASS_NAMES)].sum(axis=1))
    table.insert(0, "images", table.pop("images"))
    return table


def describe_split(split: Mapping[str, Any]) -> str:
    """One sentence: which split it was, how many images stand on each side, and its warning."""
    rule = {"patient": "no patient on both sides", "all": "every image is trained on"}.get(
        split["kind"], "by image"
    )
    sides = f"{len(split['train'])} training and {len(split['validation'])} validation images"
    return f"{split['kind']} split ({rule}): {sides}." + (
        f" Warning: {split['warning']}." if split["warning"] else ""
    )


def images_of_run(run: Run) -> tuple[list[CellImage], str]:
    """The validation images of a run in the order of its truth, and a sentence; no images where the
    data are gone or changed.
    """
    try:
        dataset = _dataset_of(run)
    except DataError as error:
        return [], f"No pictures: {str(error).splitlines()[0]}"
    index = {image_id: i for i, image_id in enumerate(dataset.image_ids)}
    names = [image["file_name"] for image in run.truth["images"]]
    images = [dataset[index[name]] for name in names if name in index]
    if to_coco(images)["annotations"] != run.truth["annotations"]:
        return (
            [],
            f"No pictures: the data {dataset.name!r} are no longer those that this run was scored on.",
        )
    return (
        images,
        f"Pictures are from the data {dataset.name!r}, whose cells are those that the run was scored on.",
    )


def annotations_of_run(run: Run) -> tuple[dict[str, Any], str]:
    """All annotated images of a run's data as a COCO data set, and a sentence; the validation
    images where the data are gone.
    """
    try:
        dataset = _dataset_of(run)
    except DataError as error:
        return (
            run.truth,
            f"Only the {len(run.truth['images'])} validation images: {str(error).splitlines()[0]}",
        )
    return to_coco(dataset), f"All {len(dataset)} annotated images of the data {dataset.name!r}."


def _dataset_of(run: Run) -> CellDataset:
    settings = run.settings
    return open_dataset(
        settings["data"],
        settings.get("truth_reading", "pixel_values"),
        0,
        settings["skip_faulty_images"],
    )


def affected_detections(matches: Matches, rows: Sequence[int], count: int) -> pd.DataFrame:
    """Of some detections the highest-scored, indexed by their row: image_id, class, score, kind
    (right or wrong), for ``plots.crops``.

    Args:
        matches: of ``metrics.match_detections``.
        rows: of the detections.
        count: rows at most.
    """
    found = matches.detections.loc[list(rows)].nlargest(count, "score")
    kinds = np.where(found["matched"], "right", "wrong")
    table = pd.DataFrame(
        {
            "image_id": found["image_id"],
            "class": found["class_id"].map(matches.class_names),
            "score": found["score"],
        }
    )
    return table.assign(kind=kinds).rename_axis("detection")


def confident_mistakes(
    truth: dict[str, Any], detections: list[dict[str, Any]], matches: Matches, count: int
) -> pd.DataFrame:
    """The highest-scored detections that match no cell, and what they are.

    ``kind``: ``found twice`` (on a cell that a higher-scored detection has), ``wrong class`` (on a
    cell of another class), ``poor outline`` (IoU between 0.1 and the threshold with some cell) or
    ``no annotated cell``.

    Args:
        truth: COCO data set.
        detections: COCO results.
        matches: of ``metrics.match_detections(truth, detections, ...)``.
        count: rows at most.

    Returns:
        Indexed by the detection's row: image, class, score, kind, iou (with a cell of its class),
        iou_other_class, at_border (the mask ends within 2 px of the image's edge).
    """
    wrong = matches.detections[~matches.detections["matched"]].nlargest(count, "score")
    images = {image["id"]: image for image in truth["images"]}
    rows = {}
    for row, detection in wrong.iterrows():
        others = [
            cell["segmentation"]
            for cell in truth["annotations"]
            if cell["image_id"] == detection["image_id"]
            and cell["category_id"] != detection["class_id"]
        ]
        other = (
            coco_mask.iou([detections[row]["segmentation"]], others, [0] * len(others)).max()
            if others
            else 0.0
        )
        image = images[detection["image_id"]]
        x, y, width, height = coco_mask.toBbox(detections[row]["segmentation"])
        rows[row] = {
            "image": image["file_name"][:8],
            "class": matches.class_names[detection["class_id"]],
            "score": detection["score"],
            "kind": _kind(detection["iou"], other, matches.iou_threshold),
            "iou": detection["iou"],
            "iou_other_class": other,
            "at_border": bool(
                min(x, y, image["width"] - x - width, image["height"] - y - height) <= BORDER_PX
            ),
        }
    columns = ["image", "class", "score", "kind", "iou", "iou_other_class", "at_border"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("detection")


def _kind(iou: float, iou_other_class: float, iou_threshold: float) -> str:
    if iou >= iou_threshold:
        return "found twice"
    if iou_other_class >= iou_threshold:
        return "wrong class"
    return "poor outline" if max(iou, iou_other_class) >= NO_CELL_IOU else "no annotated cell"


def notebook_map(folder: str | Path = "notebooks") -> pd.DataFrame:
    """Per notebook: its question and what it reads, writes and takes, from the first cell of each
    file.
    """
    rows = {}
    for path in sorted(resolve_path(folder).glob("[0-9]*.ipynb")):
        title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        told = dict(re.findall(r"^- \*\*(\w+):\*\* (.+)$", title, flags=re.MULTILINE))
        rows[path.stem] = {
            key.lower(): told.get(key, "").replace("`", "")
            for key in ("Question", "Reads", "Writes", "Takes")
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("notebook")


def parameter_files(folder: str | Path = "params") -> pd.DataFrame:
    """Per parameter file: its first comment sentence and how many settings it changes."""
    import yaml

    rows = {}
    for path in sorted(resolve_path(folder).rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        rows[str(path.relative_to(ROOT))] = {
            "what": comment.split(". ")[0],
            "settings": len(yaml.safe_load(text) or {}),
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["what", "settings"]).rename_axis(
        "file"
    )


def run_table(runs_dir: str | Path) -> pd.DataFrame:
    """Per finished run in a folder: scale, data, split, backbone, epochs, AP50 and its maxDets."""
    rows = {}
    for path in sorted(resolve_path(runs_dir).glob("*/metrics.json")):
        run = load_run(path.parent)
        section = run.metrics["coco_dense"]
        rows[path.parent.name] = {
            "scale": run.settings["scale"],
            "data": Path(run.settings["data"]).name,
            "split": run.split["kind"],
            "backbone": run.settings["backbone"],
            "epochs": len(run.history),
            "AP50": section["summary"]["AP50"],
            "maxDets": section["max_dets"][-1],
        }
    columns = ["scale", "data", "split", "backbone", "epochs", "AP50", "maxDets"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("run")
