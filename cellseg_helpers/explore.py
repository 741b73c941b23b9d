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
    """A figure below controls, drawn again whenever one of them changes.

    In JupyterLab the controls can be moved; papermill and nbval see the first figure.
    ``ipywidgets.interact`` would do, but its Output widget sends messages to the kernel, and
    papermill then sometimes waits for ever.

    Args:
        draw: takes the controls' values by name.
        controls: widgets that have a value.
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
    """``plots.found_and_missed`` with sliders for the score threshold and the image.

    Args:
        images: image ``n`` is ``images[n - 1]``.
        truth: all annotated cells, in the order of ``matches.truths``.
        detections: all detections, in the order of ``matches.detections``.
        matches: of ``metrics.match_detections``.
        score_threshold: where the slider starts.
    """
    threshold = FloatSlider(score_threshold, min=0, max=1, step=0.05, description="score ≥")
    number = IntSlider(1, 1, len(images), description="image")
    for slider in (threshold, number):
        slider.continuous_update = False  # draw when it is let go
    return interact(
        lambda threshold, number: plots.found_and_missed(
            images[number - 1], number, truth, detections, matches, threshold
        ),
        threshold=threshold,
        number=number,
    )


def choose_image(dataset: CellDataset, image_number: int = -1) -> int:
    """The index of an image to show: ``image_number``, or for -1 that of the image with the most
    classes (of several, the one with the most cells).

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
    """One row an annotated cell: image_id, patient, class, area_px, size_px (the square root of
    area_px), touches_border.
    """
    parts = []
    for image in dataset:
        found = find_instances(image.label_maps)
        columns = {
            "image_id": image.image_id,
            "patient": image.patient,
            "class": np.array(CLASS_NAMES)[found.labels - 1],
            "area_px": found.area_px,
            "size_px": np.sqrt(found.area_px),
            "touches_border": found.touches_border,
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def class_summary(instances: pd.DataFrame, anchor_sizes: Sequence[float]) -> pd.DataFrame:
    """Per class: cells, images, size in px (5th percentile, median, 95th), the anchor size nearest
    to the median by ratio, and how many cells touch the border.

    Args:
        instances: of ``instance_table``.
        anchor_sizes: px.
    """
    rows = {}
    for name in CLASS_NAMES:
        cells = instances[instances["class"] == name]
        low, median, high = cells["size_px"].quantile([0.05, 0.5, 0.95])
        nearest = np.argmin(np.abs(np.log(np.divide(anchor_sizes, median))))
        rows[name] = {
            "cells": len(cells),
            "images": cells["image_id"].nunique(),
            "size_5%_px": low,
            "size_median_px": median,
            "size_95%_px": high,
            "nearest_anchor_px": anchor_sizes[nearest] if len(cells) else np.nan,
            "touch_border": int(cells["touches_border"].sum()),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


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
    """The highest-scored of some detections, for ``plots.crops``.

    Args:
        matches: of ``metrics.match_detections``.
        rows: of the detections.
        count: at most so many.

    Returns:
        Indexed by the detection's row: image_id, class, score, kind (right or wrong).
    """
    found = matches.detections.loc[list(rows)].nlargest(count, "score")
    columns = {
        "image_id": found["image_id"],
        "class": found["class_id"].map(matches.class_names),
        "score": found["score"],
        "kind": np.where(found["matched"], "right", "wrong"),
    }
    return pd.DataFrame(columns).rename_axis("detection")


def confident_mistakes(
    truth: dict[str, Any], detections: Cells, matches: Matches, count: int
) -> pd.DataFrame:
    """The highest-scored detections that match no annotated cell, and what is wrong with them.

    ``kind``: ``found twice`` (a higher-scored detection matches the cell), ``wrong class`` (on a
    cell of another class), ``poor outline`` (IoU with some cell between 0.1 and the threshold) or
    ``no annotated cell``.

    Args:
        truth: COCO data set.
        detections: of the same images.
        matches: of ``metrics.match_detections(truth, detections, ...)``.
        count: at most so many.

    Returns:
        Indexed by the detection's row: image, class, score, kind, iou (with a cell of its class),
        iou_other_class, at_border (the mask ends within 2 px of the image's edge).
    """
    wrong = matches.detections[~matches.detections["matched"]].nlargest(count, "score")
    cells = Cells.from_coco(truth["annotations"])
    others = [
        cells[(cells.image_ids == image_id) & (cells.labels != class_id)]
        for image_id, class_id in zip(wrong["image_id"], wrong["class_id"], strict=True)
    ]
    of_other_class = [
        mask_iou(detections[[row]], other).max(initial=0)
        for row, other in zip(wrong.index, others, strict=True)
    ]
    iou = wrong["iou"].to_numpy()
    largest = np.maximum(iou, np.array(of_other_class, float))
    is_kind = {
        "found twice": iou >= matches.iou_threshold,
        "wrong class": largest >= matches.iou_threshold,
        "poor outline": largest >= BACKGROUND_IOU,
    }
    names = {image["id"]: image["file_name"][:8] for image in truth["images"]}
    columns = {
        "image": wrong["image_id"].map(names),
        "class": wrong["class_id"].map(matches.class_names),
        "score": wrong["score"],
        "kind": np.select(list(is_kind.values()), list(is_kind), "no annotated cell"),
        "iou": iou,
        "iou_other_class": of_other_class,
        "at_border": near_border(detections[wrong.index], BORDER_MARGIN_PX, by="mask"),
    }
    return pd.DataFrame(columns, index=wrong.index).rename_axis("detection")
