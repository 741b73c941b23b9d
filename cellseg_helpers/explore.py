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

BACKGROUND_IOU = 0.1  # a detection of less IoU lies on no annotated cell (TIDE's value)


def interact(draw: Callable[..., Figure], **controls: ValueWidget) -> VBox:
    """A figure, which ``draw`` makes of the controls' values (by name), below these controls; drawn
    again whenever one of them changes.

    ``ipywidgets.interact`` would do, but its Output widget sends messages to the kernel, and
    papermill then sometimes waits for ever.
    """
    picture = Image(format="png", layout=Layout(align_self="flex-start"))  # not stretched

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
    """``plots.found_and_missed`` with sliders for the score threshold (first ``score_threshold``)
    and the image; image ``n`` of the cells is ``images[n - 1]``.
    """

    def draw(threshold: float, number: int) -> Figure:
        image = images[number - 1]
        return plots.found_and_missed(image, number, truth, detections, matches, threshold)

    share = {"min": 0, "max": 1, "step": 0.05, "description": "score ≥"}
    threshold = FloatSlider(score_threshold, continuous_update=False, **share)
    number = IntSlider(1, 1, len(images), continuous_update=False, description="image")
    return interact(draw, threshold=threshold, number=number)


def choose_image(dataset: CellDataset, image_number: int = -1) -> int:
    """The index of an image to show: ``image_number``, or for -1 that of the image with the most
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
    """One row an annotated cell: image_id, patient, class, area_px, size_px (the square root of
    area_px), touches_border.
    """
    parts = []
    for image in dataset:
        found = find_instances(image.label_maps)
        names, area_px = np.array(CLASS_NAMES)[found.labels - 1], found.area_px
        columns = {"image_id": image.image_id, "patient": image.patient, "class": names}
        columns |= {"area_px": area_px, "size_px": np.sqrt(area_px)}
        columns["touches_border"] = found.touches_border
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def class_summary(instances: pd.DataFrame, anchor_sizes: Sequence[float]) -> pd.DataFrame:
    """Per class of an ``instance_table``: cells, images, size in px (5th percentile, median, 95th),
    the anchor size (px) nearest to the median by ratio, and how many cells touch the border.
    """
    groups = instances.groupby(pd.Categorical(instances["class"], CLASS_NAMES), observed=False)
    table = groups.agg(cells=("size_px", "size"), images=("image_id", "nunique"))
    for name, share in {"5%": 0.05, "median": 0.5, "95%": 0.95}.items():
        table[f"size_{name}_px"] = groups["size_px"].quantile(share)
    ratios = np.divide.outer(table["size_median_px"].to_numpy(), anchor_sizes)
    nearest = np.take(anchor_sizes, np.abs(np.log(ratios)).argmin(axis=1))
    table["nearest_anchor_px"] = pd.Series(nearest, table.index).where(table["cells"] > 0)
    table["touch_border"] = groups["touches_border"].sum()
    return table.set_axis(pd.Index(CLASS_NAMES, name="class"))


def patient_summary(dataset: CellDataset) -> pd.DataFrame:
    """Per patient: images, cells, and cells of each class; empty where no patient is known."""
    table = pd.DataFrame(dataset.counts, columns=list(CLASS_NAMES))
    table.insert(0, "images", 1)
    table.insert(1, "cells", dataset.counts.sum(1))
    return table.assign(patient=dataset.patients).groupby("patient").sum()


def describe_split(split: Mapping[str, Any]) -> str:
    """One sentence: the kind of split, its numbers of images, and its warning."""
    rules = {"patient": "no patient on both sides", "all": "every image is trained on"}
    rule = rules.get(split["kind"], "by image")
    sides = f"{len(split['train'])} training and {len(split['validation'])} validation images"
    warning = f" Warning: {split['warning']}." if split["warning"] else ""
    return f"{split['kind']} split ({rule}): {sides}.{warning}"


def affected_detections(matches: Matches, rows: Sequence[int], count: int) -> pd.DataFrame:
    """The ``count`` highest-scored of some detections, for ``plots.crops``: class, score and kind
    (right or wrong), indexed by the detection's row.
    """
    found = matches.detections.loc[list(rows)].nlargest(count, "score")
    kind = np.where(found["matched"], "right", "wrong")
    columns = {"class": found["class_id"].map(matches.class_names), "kind": kind}
    return found[["score"]].assign(**columns)


def confident_mistakes(
    truth: dict[str, Any], detections: Cells, matches: Matches, count: int
) -> pd.DataFrame:
    """The ``count`` highest-scored detections that match no annotated cell, and what is wrong.

    ``kind``: ``found twice`` (a higher-scored detection matches the cell), ``wrong class`` (on a
    cell of another class), ``poor outline`` (IoU with some cell between 0.1 and the threshold) or
    ``no annotated cell``. ``matches`` are those of ``truth``, a COCO data set, and ``detections``.

    Returns:
        Indexed by the detection's row: image, class, score, kind, iou (with a cell of its class),
        iou_other_class, at_border (the mask ends within 2 px of the image's edge).
    """
    wrong = matches.detections[~matches.detections["matched"]].nlargest(count, "score")
    cells = Cells.from_coco(truth["annotations"])
    iou_other_class = np.zeros(len(wrong))
    for place, found in enumerate(wrong.itertuples()):
        others = cells[(cells.image_ids == found.image_id) & (cells.labels != found.class_id)]
        iou_other_class[place] = mask_iou(detections[[found.Index]], others).max(initial=0)
    iou, least = wrong["iou"].to_numpy(), matches.iou_threshold
    largest = np.maximum(iou, iou_other_class)
    kinds = ["found twice", "wrong class", "poor outline"]
    is_kind = [iou >= least, largest >= least, largest >= BACKGROUND_IOU]
    names = {image["id"]: image["file_name"][:8] for image in truth["images"]}
    columns = {
        "image": wrong["image_id"].map(names),
        "class": wrong["class_id"].map(matches.class_names),
        "score": wrong["score"],
        "kind": np.select(is_kind, kinds, "no annotated cell"),
        "iou": iou,
        "iou_other_class": iou_other_class,
        "at_border": near_border(detections[wrong.index], BORDER_MARGIN_PX, by="mask"),
    }
    return pd.DataFrame(columns).rename_axis("detection")
