"""Tables and controls to explore data and runs in a notebook."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from ipywidgets import FloatSlider, Image, IntSlider, Layout, ValueWidget, VBox
from matplotlib.figure import Figure

from cellseg_helpers import plots
from cellseg_helpers.borders import BORDER_MARGIN_PX, near_border
from cellseg_helpers.cells import CLASS_NAMES, Cells, mask_iou
from cellseg_helpers.data.cache import CellDataset, CellImage
from cellseg_helpers.data.labels import find_instances
from cellseg_helpers.metrics import Matches

BACKGROUND_IOU = 0.1  # below this IoU with all annotated cells, a detection is on background (TIDE)


def interact(draw: Callable[..., Figure], **controls: ValueWidget) -> VBox:
    """Show controls with a figure below them. ``draw`` makes the figure from the controls' values
    (by name), and makes it again after each change.

    ``ipywidgets.interact`` would do the same, but its Output widget sends messages to the kernel,
    which sometimes makes papermill wait forever.
    """
    picture = Image(format="png", layout=Layout(align_self="flex-start"))  # or it is stretched

    def redraw(_=None) -> None:
        png = io.BytesIO()
        values = {name: control.value for name, control in controls.items()}
        draw(**values).savefig(png, format="png")
        picture.value = png.getvalue()

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    return VBox([*controls.values(), picture])


def threshold_slider(
    images: Sequence[CellImage],
    truth: Cells,
    detections: Cells,
    matches: Matches,
    score_threshold: float,
) -> VBox:
    """Show ``plots.found_and_missed`` with sliders for the score threshold (which starts at
    ``score_threshold``) and the image. The image with id ``n`` is ``images[n - 1]``.
    """

    def draw(threshold: float, number: int) -> Figure:
        image = images[number - 1]
        return plots.found_and_missed(image, number, truth, detections, matches, threshold)

    options = {"min": 0, "max": 1, "step": 0.05, "description": "score ≥"}
    threshold = FloatSlider(score_threshold, continuous_update=False, **options)
    number = IntSlider(1, 1, len(images), continuous_update=False, description="image")
    return interact(draw, threshold=threshold, number=number)


def choose_image(dataset: CellDataset, image_number: int = -1) -> int:
    """Choose the index of an image to show: ``image_number``, or for -1 the image with the most
    classes (of several, the one with the most cells).

    Raises:
        ValueError: no such image.
    """
    if not -1 <= image_number < (images := len(dataset)):
        allowed = f"the data have {images} images: 0 to {images - 1}, or -1"
        raise ValueError(f"image_number is {image_number}, but {allowed}")
    classes, cells = (dataset.counts > 0).sum(1), dataset.counts.sum(1)
    return image_number if image_number >= 0 else int(np.lexsort([cells, classes])[-1])


def instance_table(dataset: CellDataset) -> pd.DataFrame:
    """List the annotated cells, one per row: image_id, patient, class, area_px, size_px (the square
    root of area_px), touches_border.
    """
    tables = []
    for image in dataset:
        instances = find_instances(image.label_maps)
        names, area_px = np.array(CLASS_NAMES)[instances.labels - 1], instances.area_px
        columns = {"image_id": image.image_id, "patient": image.patient, "class": names}
        columns |= {"area_px": area_px, "size_px": np.sqrt(area_px)}
        columns["touches_border"] = instances.touches_border
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def class_summary(instances: pd.DataFrame, anchor_sizes: Sequence[float]) -> pd.DataFrame:
    """Summarise an ``instance_table`` by class: numbers of cells and images; 5th percentile, median
    and 95th percentile of the size; the anchor size with the ratio to the median nearest to 1; and
    the number of cells that touch the border.
    """
    groups = instances.groupby(pd.Categorical(instances["class"], CLASS_NAMES), observed=False)
    table = groups.agg(cells=("size_px", "size"), images=("image_id", "nunique"))
    for name, share in {"5%": 0.05, "median": 0.5, "95%": 0.95}.items():
        table[f"size_{name}_px"] = groups["size_px"].quantile(share)
    ratios = np.divide.outer(table["size_median_px"].to_numpy(), anchor_sizes)  # [classes, anchors]
    nearest = np.take(anchor_sizes, np.abs(np.log(ratios)).argmin(axis=1))
    table["nearest_anchor_px"] = pd.Series(nearest, table.index).where(table["cells"] > 0)
    table["touch_border"] = groups["touches_border"].sum()
    return table.set_axis(pd.Index(CLASS_NAMES, name="class"))


def patient_summary(dataset: CellDataset) -> pd.DataFrame:
    """Count images, cells, and cells of each class by patient; unknown patients are left out."""
    table = pd.DataFrame(dataset.counts, columns=list(CLASS_NAMES))
    table.insert(0, "images", 1)
    table.insert(1, "cells", dataset.counts.sum(1))
    return table.assign(patient=dataset.patients).groupby("patient").sum()


def describe_split(split: Mapping[str, Any]) -> str:
    """Describe a split in a sentence: its rule, its numbers of images, and its warning, if any."""
    rules = {"patient": "no patient on both sides", "all": "every image is trained on"}
    rule = rules.get(split["kind"], "by image")
    sides = f"{len(split['train'])} training and {len(split['validation'])} validation images"
    warning = f" Warning: {split['warning']}." if split["warning"] else ""
    return f"{split['kind']} split ({rule}): {sides}.{warning}"


def affected_detections(matches: Matches, rows: Sequence[int], count: int) -> pd.DataFrame:
    """List the ``count`` highest-scored of the detections in ``rows``, for ``plots.crops``: class,
    score and kind (right or wrong), indexed by the detection's row.
    """
    chosen = matches.detections.loc[list(rows)].nlargest(count, "score")
    right_or_wrong = np.where(chosen["matched"], "right", "wrong")
    columns = {"class": chosen["class_id"].map(matches.class_names), "kind": right_or_wrong}
    return chosen[["score"]].assign(**columns)


def confident_mistakes(
    truth: dict[str, Any], detections: Cells, matches: Matches, count: int
) -> pd.DataFrame:
    """List the ``count`` highest-scored detections that match no annotated cell, and what is wrong.

    ``matches`` must be those of ``detections`` with ``truth``, a COCO data set.

    Returns:
        Indexed by the detection's row: image, class, score, kind, iou (highest with a cell of its
        class), iou_other_class, at_border (the mask ends within 2 px of the image's edge). ``kind``
        is ``found twice`` (a higher-scored detection matches the cell), ``wrong class`` (on a cell
        of another class), ``poor outline`` (the highest IoU is between 0.1 and the threshold) or
        ``no annotated cell``.
    """
    wrong = matches.detections[~matches.detections["matched"]].nlargest(count, "score")
    cells = Cells.from_coco(truth["annotations"])
    iou_other_class = np.zeros(len(wrong))
    for i, row in enumerate(wrong.itertuples()):
        others = cells[(cells.image_ids == row.image_id) & (cells.labels != row.class_id)]
        iou_other_class[i] = mask_iou(detections[[row.Index]], others).max(initial=0)
    iou, threshold = wrong["iou"].to_numpy(), matches.iou_threshold
    highest_iou = np.maximum(iou, iou_other_class)
    mistakes = ["found twice", "wrong class", "poor outline"]  # the first that applies
    applies = [iou >= threshold, highest_iou >= threshold, highest_iou >= BACKGROUND_IOU]
    names = {image["id"]: image["file_name"][:8] for image in truth["images"]}
    columns = {
        "image": wrong["image_id"].map(names),
        "class": wrong["class_id"].map(matches.class_names),
        "score": wrong["score"],
        "kind": np.select(applies, mistakes, "no annotated cell"),
        "iou": iou,
        "iou_other_class": iou_other_class,
        "at_border": near_border(detections[wrong.index], BORDER_MARGIN_PX, by="mask"),
    }
    return pd.DataFrame(columns).rename_axis("detection")
