"""Figures of images, instances, detections and scores. Each function returns a closed ``Figure``: a
notebook shows it once.
"""

import colorsys
import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator
from skimage.measure import find_contours

from cellseg_helpers.cells import CLASS_NAMES, BoxMask, Cells
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.labels import find_instances
from cellseg_helpers.metrics import Counts, Matches, count_matches

# Okabe and Ito's colour-blind safe palette, those of its colours that show on stained tissue and on
# white.
CLASS_COLORS = {
    "epithelial": "#E69F00",
    "lymphocyte": "#56B4E9",
    "neutrophil": "#009E73",
    "macrophage": "#D55E00",
}
BEFORE, AFTER = "#0072B2", "#D55E00"  # also Okabe and Ito's
DPI = 80
VIEW_PX = 320  # side of what is shown of a large image
GALLERY_PX = 128  # side of what the gallery of augmentations shows
WINDOW_PX = 64  # side of the crop around a mistake, at least
MARKS = "os^DvP*X"
FEWEST_IN_BIN = 10  # detections that make a point of the reliability diagram
LOSS_LABELS = {
    "loss_objectness": "RPN objectness",
    "loss_rpn_box_reg": "RPN boxes",
    "loss_classifier": "classes",
    "loss_box_reg": "boxes",
    "loss_mask": "masks",
}


def image_beside_instances(cell_image: CellImage, class_name: str = "all") -> Figure:
    """An image beside its instance map, one colour an instance; of one class or of all.

    Raises:
        ValueError: an unknown ``class_name``.
    """
    if class_name != "all" and class_name not in CLASS_NAMES:
        raise ValueError(f"unknown class_name {class_name!r}; one of all, {', '.join(CLASS_NAMES)}")
    kept = [class_name in ("all", name) for name in CLASS_NAMES]
    label_maps = cell_image.label_maps * np.array(kept)[:, None, None]
    fig, (left, right) = _figure(1, 2, 6.4, 3.4)
    _show(left, cell_image.image, cell_image.image_id[:8])
    right.imshow(colour_instances(label_maps))
    _bare(
        right,
        f"{len(find_instances(label_maps).ids)} instances, {class_name if class_name != 'all' else 'all classes'}",
    )
    return fig


def colour_instances(label_maps: np.ndarray) -> np.ndarray:
    """Label maps (int [K, H, W]) as uint8 [H, W, 3]: instances that follow one another get hues far
    apart; background black.
    """
    picture = np.zeros((*label_maps.shape[1:], 3), np.uint8)
    instances = find_instances(label_maps)
    rows = zip(instances.boxes.astype(int).tolist(), instances.labels, instances.ids, strict=True)
    for place, ((x1, y1, x2, y2), class_id, instance_id) in enumerate(rows):
        colour = colorsys.hsv_to_rgb(
            place * 0.618034 % 1, 0.55 + 0.4 * (place % 2), 1 - 0.25 * (place % 3 == 2)
        )
        picture[y1:y2, x1:x2][label_maps[class_id - 1, y1:y2, x1:x2] == instance_id] = np.multiply(
            colour, 255
        )
    return picture


def sizes_against_anchors(instances: pd.DataFrame, anchor_sizes: Sequence[float]) -> Figure:
    """Histograms of sqrt(area_px) per class, with the anchor sizes as lines.

    Args:
        instances: one row an instance, with ``class`` and ``size_px``.
        anchor_sizes: px.
    """
    every_size = [*instances["size_px"], *anchor_sizes]
    bins = np.geomspace(min(every_size) / 1.1, max(every_size) * 1.1, 40)
    fig, axes = _figure(2, 2, 7.2, 4.2, sharex=True)
    for ax, name in zip(axes.flat, CLASS_NAMES, strict=True):
        sizes = instances.loc[instances["class"] == name, "size_px"]
        ax.hist(sizes, bins, color=CLASS_COLORS[name])
        for size in anchor_sizes:
            ax.axvline(size, color="0.3", linestyle="--", linewidth=0.8)
        ax.set_xscale("log")
        ax.set_xticks(list(anchor_sizes), [f"{size:g}" for size in anchor_sizes])
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.set_title(f"{name}, {len(sizes)} cells", fontsize="medium")
    fig.supxlabel("size of a cell, sqrt(area), px; dashed: anchor sizes", fontsize="medium")
    fig.supylabel("cells", fontsize="medium")
    return fig


def seldom(
    draw: Callable[[pd.DataFrame], None], every_s: float = 30.0
) -> Callable[[pd.DataFrame], None]:
    """``draw``, left out where it ended less than ``every_s`` seconds ago: a picture can take as
    long as a training step.
    """
    drawn = -math.inf

    def call(history: pd.DataFrame) -> None:
        nonlocal drawn
        if time.monotonic() - drawn > every_s:
            draw(history)
            drawn = time.monotonic()

    return call


def training_curves(history: pd.DataFrame) -> Figure:
    """Training and validation loss and validation AP50 by epoch.

    Args:
        history: as ``history.csv`` of a run, one row an epoch.
    """
    fig, (left, right) = _figure(1, 2, 7.2, 2.8, sharex=True)
    marker = "o" if len(history) < 25 else None
    left.plot(
        history["epoch"],
        history["loss"],
        color="#0072B2",
        marker=marker,
        markersize=3,
        label="training",
    )
    validated = history.dropna(subset="validation_loss")
    left.plot(
        validated["epoch"],
        validated["validation_loss"],
        color="#CC79A7",
        marker=marker,
        markersize=3,
        label="validation",
    )
    left.set(xlabel="epoch", ylabel="sum of the five losses")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    right.plot(
        validated["epoch"], validated["validation_ap50"], color="0.1", marker=marker, markersize=3
    )
    right.set(xlabel="epoch", ylabel="validation mask AP50", ylim=(0, 1))
    _whole_epochs(left, right)
    return fig


def loss_parts(history: pd.DataFrame) -> Figure:
    """Each of the five training losses by epoch.

    Args:
        history: as ``history.csv`` of a run, one row an epoch.
    """
    fig, ax = _figure(1, 1, 5.6, 2.8)
    for (name, label), style in zip(
        LOSS_LABELS.items(), ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))), strict=True
    ):
        ax.plot(history["epoch"], history[name], linestyle=style, label=label)
    ax.set(xlabel="epoch", ylabel="training loss")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    _whole_epochs(ax)
    return fig


def losses_beside_reported(history: pd.DataFrame | None, reported: Sequence[float]) -> Figure:
    """Training loss by epoch beside that of a report.

    Args:
        history: as ``history.csv`` of a run, one row an epoch; of it as many epochs as were
            reported are drawn. None: no run.
        reported: the report's losses, from epoch 1.
    """
    fig, ax = _figure(1, 1, 4.8, 2.8)
    ax.plot(
        range(1, len(reported) + 1),
        reported,
        color="0.5",
        linestyle="--",
        marker="s",
        markersize=3,
        label="reported",
    )
    if history is not None:
        shown = history[history["epoch"] <= len(reported)]
        ax.plot(
            shown["epoch"], shown["loss"], color="#0072B2", marker="o", markersize=3, label="here"
        )
    ax.set(xlabel="epoch", ylabel="training loss")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    _whole_epochs(ax)
    return fig


def truth_beside_predictions(
    cell_images: Sequence[CellImage],
    truths: Sequence[Cells],
    predictions: Sequence[Cells],
    score_threshold: float,
) -> Figure:
    """One row an image: the image, its annotated cells, its detections of at least
    ``score_threshold``, outlined by class.

    Args:
        cell_images: the images.
        truths: annotated cells of each.
        predictions: detections of each.
        score_threshold: of the detections shown.
    """
    fig, axes = _figure(len(cell_images), 3, 6.6, 2.35 * len(cell_images) + 0.3, squeeze=False)
    for row, cell_image, truth, found in zip(axes, cell_images, truths, predictions, strict=True):
        found = found[found.scores >= score_threshold]
        _show(row[0], cell_image.image, cell_image.image_id[:8])
        _show(row[1], cell_image.image, f"{len(truth)} annotated")
        _show(row[2], cell_image.image, f"{len(found)} predicted, score ≥ {score_threshold:g}")
        _outline_by_class(row[1], truth)
        _outline_by_class(row[2], found)
    _class_legend(fig)
    return fig


def precision_recall(
    curves: pd.DataFrame, per_class: dict[str, float], counts: dict[float, dict[str, Counts]]
) -> Figure:
    """The precision-recall curve of each class, and where score thresholds put it.

    Args:
        curves: of ``metrics.precision_recall_curves``.
        per_class: average precision by class name, for the legend; NaN for a class without truth,
            which is left out.
        counts: score threshold -> counts of ``metrics.count_matches``, shown as a mark on (or, as
            the curve is COCO's envelope, a little below) each curve; at most ``len(MARKS)``.
    """
    fig, ax = _figure(1, 1, 5.6, 3.6)
    for name, average in per_class.items():
        if np.isnan(average):
            continue
        curve = curves[curves["class"] == name]
        reached = curve[curve["precision"] > 0]
        ax.plot(
            reached["recall"],
            reached["precision"],
            color=CLASS_COLORS[name],
            label=f"{name}: {average:.2f}",
        )
        for mark, count in zip(MARKS, counts.values(), strict=False):
            ax.plot(
                count[name].recall,
                count[name].precision,
                mark,
                color=CLASS_COLORS[name],
                markeredgecolor="0.1",
            )
    for mark, score_threshold in zip(MARKS, counts, strict=False):
        label = f"score ≥ {score_threshold:g}" if score_threshold else "all detections"
        ax.plot([], [], mark, color="white", markeredgecolor="0.1", label=label)
    ax.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    ax.legend(frameon=False, title="average precision", loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def score_histograms(matches: Matches) -> Figure:
    """Scores of the detections of each class, matched (in the class's colour) on top of unmatched
    ones (grey).
    """
    fig, axes = _figure(2, 2, 7.2, 4.2, sharex=True)
    bins = np.linspace(0, 1, 41)
    for ax, (class_id, name) in zip(axes.flat, matches.class_names.items(), strict=True):
        found = matches.detections[matches.detections["class_id"] == class_id]
        parts = [found.loc[~found["matched"], "score"], found.loc[found["matched"], "score"]]
        ax.hist(parts, bins, stacked=True, color=["0.75", CLASS_COLORS[name]])
        ax.set_title(f"{name}: {len(parts[1])} matched, {len(parts[0])} not", fontsize="medium")
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.set_xlim(0, 1)
        ax.set_ylim(0, max(1, ax.get_ylim()[1]))
    handles = [
        Patch(color="0.75", label="matches no annotated cell"),
        Patch(color="0.3", label="colours: matches one"),
    ]
    fig.legend(
        handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize="small"
    )
    fig.supxlabel("score", fontsize="medium")
    fig.supylabel("detections", fontsize="medium")
    return fig


def threshold_sweep(table: pd.DataFrame) -> Figure:
    """Average precision, precision, recall and F1 over the score threshold, by class and all
    together.

    Args:
        table: of ``thresholds.sweep``; its column of average precision is the one whose name begins
            with AP.
    """
    average = next(column for column in table if column.startswith("AP"))
    fig, axes = _figure(2, 2, 7.2, 4.8, sharex=True, sharey=True)
    for ax, column in zip(axes.flat, (average, "precision", "recall", "F1"), strict=True):
        for name, colour in {"all": "0.1", **CLASS_COLORS}.items():
            rows = table[table["class"] == name]
            style = "--" if name == "all" else "-"
            ax.plot(
                rows["score_threshold"],
                rows[column],
                style,
                color=colour,
                marker=".",
                markersize=4,
                label=name,
            )
        ax.set_title(column, fontsize="medium")
        ax.set_ylim(0, 1.02)
    handles, names = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    for ax in axes[1]:
        ax.set_xlabel("score threshold")
    return fig


def reliability_diagram(table: pd.DataFrame, errors: pd.Series) -> Figure:
    """Matched share over score, by class, and how many detections each point stands for; bins of
    under ten are left out.

    Args:
        table: of ``thresholds.reliability``.
        errors: expected calibration error by class, for the legend.
    """
    fig, (ax, below) = _figure(2, 1, 5.6, 4.6, sharex=True, height_ratios=(3, 1))
    ax.plot(
        [0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":", label="scores were probabilities"
    )
    for name, colour in {"all": "0.1", **CLASS_COLORS}.items():
        rows = table[(table["class"] == name) & (table["detections"] >= FEWEST_IN_BIN)]
        style = "--" if name == "all" else "-"
        for axis, column in ((ax, "matched_share"), (below, "detections")):
            axis.plot(
                rows["mean_score"], rows[column], style, color=colour, marker="o", markersize=3
            )
        ax.plot([], [], style, color=colour, label=f"{name}: {errors.get(name, np.nan):.2f}")
    ax.set(ylabel="share that matches a cell", xlim=(0, 1), ylim=(0, 1.02))
    below.set(xlabel="score (mean of a bin)", ylabel="detections")
    if (table["detections"] >= FEWEST_IN_BIN).any():
        below.set_yscale("log")
        below.yaxis.set_minor_formatter(NullFormatter())
    ax.legend(
        frameon=False,
        title="expected calibration error",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        fontsize="small",
    )
    return fig


def predicted_against_true_counts(counts: dict[str, pd.DataFrame]) -> Figure:
    """Predicted over annotated cells of each image, one panel a class, one mark for each way to
    choose the threshold.

    Args:
        counts: name of the choice -> table of ``thresholds.cell_counts``; at most ``len(MARKS)``.
    """
    fig, axes = _figure(1, 4, 9.2, 2.9)
    for ax, (name, colour) in zip(axes, CLASS_COLORS.items(), strict=True):
        largest = 1
        for mark, size, table in zip(MARKS, (7, 5, 4), counts.values(), strict=False):
            rows = table[table["class"] == name]
            face = colour if mark == MARKS[0] else "white"
            ax.plot(
                rows["cells"],
                rows["predicted"],
                mark,
                color=face,
                markeredgecolor=colour,
                markersize=size,
                alpha=0.8,
            )
            largest = max(largest, rows["cells"].max(), rows["predicted"].max())
        ax.plot([0, largest], [0, largest], color="0.6", linewidth=0.8, linestyle=":")
        ax.set_title(name, fontsize="medium")
        ax.set_xlabel("cells of an image")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(4, integer=True))
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=mark,
            color="0.4" if mark == MARKS[0] else "white",
            markeredgecolor="0.4",
            label=name,
        )
        for mark, name in zip(MARKS, counts, strict=False)
    ]
    fig.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )
    axes[0].set_ylabel("predicted cells")
    return fig


def crops(
    table: pd.DataFrame,
    cell_images: Sequence[CellImage],
    truth: Cells,
    detections: Cells,
) -> Figure:
    """A crop around each of some detections (solid), with the annotated cells (dashed), outlined by
    class.

    Args:
        table: indexed by the detection's row: class, score, kind (shown above the crop), as
            ``explore.confident_mistakes`` gives.
        cell_images: image ``n`` is ``cell_images[n - 1]``.
        truth: annotated cells of these images.
        detections: of these images; ``table`` lists some of them.
    """
    columns = 4
    rows = -(-len(table) // columns)
    fig, axes = _figure(rows, columns, 7.2, 2.15 * rows + 0.3, squeeze=False)
    for ax in axes.flat[len(table) :]:
        ax.set_axis_off()
    for ax, (row, told) in zip(axes.flat, table.iterrows(), strict=False):
        number = detections.image_ids[row]
        _show(
            ax,
            cell_images[number - 1].image,
            f"{told['class']} {told['score']:.2f}\n{told['kind']}",
        )
        _outline_by_class(ax, truth[truth.image_ids == number], linestyle=(0, (2, 1.5)))
        _outline_by_class(ax, detections[[row]], linewidth=2)
        x1, y1, x2, y2 = detections.boxes[row]
        half = max(WINDOW_PX, 1.5 * (x2 - x1), 1.5 * (y2 - y1)) / 2
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        ax.set(xlim=(x - half, x + half), ylim=(y + half, y - half))
        ax.set_facecolor("0.85")
    _class_legend(fig)
    return fig


def border_contact(contacts: dict[str, pd.DataFrame]) -> Figure:
    """Cells at the border over the number expected by chance, by class, with the interval of chance
    (grey); one panel a table.

    Args:
        contacts: title -> table of ``borders.border_contact``.
    """
    fig, axes = _figure(1, len(contacts), 2.3 * len(contacts) + 1, 2.6, sharey=True, squeeze=False)
    for ax, (title, table) in zip(axes[0], contacts.items(), strict=True):
        shown = table[table["expected"] > 0]
        places = [list(table.index).index(name) for name in shown.index]
        low, high = shown["low"] / shown["expected"], shown["high"] / shown["expected"]
        ax.barh(places, high - low, left=low, height=0.6, color="0.85")
        ax.axvline(1, color="0.5", linewidth=0.8, linestyle=":")
        for place, (name, row) in zip(places, shown.iterrows(), strict=True):
            ax.plot(row["ratio"], place, "o", color=CLASS_COLORS.get(name, "0.1"))
            ax.annotate(f"{row['at_border']} of {row['expected']:.0f}", (0.98, place), xycoords=("axes fraction", "data"),
                        ha="right", va="center", fontsize="x-small")  # fmt: skip
        ax.set_yticks(range(len(table)), table.index)
        ax.set_xlim(
            -0.1, max(2.4, 1.5 * shown["ratio"].max(), 1.4 * high.max()) if len(shown) else 2.4
        )
        ax.set_title(textwrap.fill(title, 26), fontsize="small")
        ax.set_xlabel("at the border / by chance", fontsize="small")
    axes[0, 0].invert_yaxis()
    fig.legend(
        handles=[Patch(color="0.85", label="95 % of chance")],
        loc="outside lower center",
        frameon=False,
        fontsize="small",
    )
    return fig


def border_strip(cell_image: CellImage, truth: Cells, at_border: Cells, title: str) -> Figure:
    """Annotated cells over an image, beside the detections that come near its
    border.

    Of a large image a window of ``VIEW_PX`` around the highest-scored of these detections is shown.

    Args:
        cell_image: the image.
        truth: its annotated cells.
        at_border: its detections near the border.
        title: of the detections.
    """
    fig, (left, right) = _figure(1, 2, 6.6, 3.7)
    _show(left, cell_image.image, f"{cell_image.image_id[:8]}: {len(truth)} annotated")
    _outline_by_class(left, truth)
    _show(right, cell_image.image, f"{len(at_border)} {title}")
    _outline_by_class(right, at_border)
    height, width = cell_image.image.shape[1:]
    box = at_border.boxes[at_border.scores.argmax()] if len(at_border) else np.zeros(4)
    for ax in (left, right):
        _view(ax, box[::2].mean(), box[1::2].mean(), width, height)
    _class_legend(fig)
    return fig


def step_effects(effects: pd.DataFrame, steps: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """What each step of post-processing changed on the judging half: difference and 95 % interval,
    one panel a metric.

    The scale is linear between -0.01 and 0.01 and logarithmic beyond, so that small and large
    changes show side by side.

    Args:
        effects: ``effects`` of ``ablation.ablate``; the rows of all classes together are shown.
        steps: ``steps`` of it; steps that were not carried on are drawn hollow.
        metrics: of the panels.
    """
    fig, axes = _figure(
        1, len(metrics), 2.0 * len(metrics) + 1.4, 0.28 * len(steps) + 1, sharey=True, squeeze=False
    )
    for ax, metric in zip(axes[0], metrics, strict=True):
        rows = (
            effects[(effects["of"] == "all") & (effects["metric"] == metric)]
            .set_index("step")
            .loc[steps.index]
        )
        ax.axvline(0, color="0.5", linewidth=0.8, linestyle=":")
        ax.hlines(range(len(rows)), rows["low"], rows["high"], color="#0072B2", linewidth=1.5)
        for place, (difference, carried) in enumerate(
            zip(rows["difference"], steps["carried"], strict=True)
        ):
            ax.plot(
                difference,
                place,
                "o",
                markeredgecolor="#0072B2",
                color="#0072B2" if carried else "white",
                markersize=5,
            )
        ax.set_yticks(range(len(rows)), rows.index)
        ax.set_xscale("symlog", linthresh=0.01)
        ax.set_xticks([-0.1, -0.01, 0, 0.01, 0.1], ["−.1", "−.01", "0", ".01", ".1"])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_title(metric, fontsize="medium")
        ax.set_xlabel("change")
    axes[0, 0].invert_yaxis()
    return fig


def before_and_after(
    cell_image: CellImage,
    before: Cells,
    labels: np.ndarray,
    class_names: Sequence[str],
) -> Figure:
    """An image, its detections as predicted (they may overlap), and the label image in the end,
    coloured by class.

    Of a large image the middle ``VIEW_PX`` are shown.

    Args:
        cell_image: the image.
        before: its detections, outlined by class.
        labels: uint [H, W], ids 1..N; 0 = background.
        class_names: of the N cells.
    """
    from skimage.segmentation import (
        find_boundaries,
    )  # it takes 0.1 s, which no other notebook needs

    fig, (left, middle, right) = _figure(1, 3, 8.4, 3.3)
    _show(left, cell_image.image, cell_image.image_id[:8])
    _show(middle, cell_image.image, f"{len(before)} detections in the image")
    _outline_by_class(middle, before, linewidth=0.8)
    colours = np.array([(0, 0, 0), *(to_rgb(CLASS_COLORS[name]) for name in class_names)])
    right.imshow(
        colours[np.where(find_boundaries(labels, mode="inner"), 0, labels)], interpolation="nearest"
    )
    _bare(right, f"{len(class_names)} cells, each pixel to one")
    height, width = labels.shape
    for ax in (left, middle, right):
        _view(ax, width / 2, height / 2, width, height)
    _class_legend(fig)
    return fig


def found_and_missed(
    cell_image: CellImage,
    number: int,
    truth: Cells,
    detections: Cells,
    matches: Matches,
    score_threshold: float,
) -> Figure:
    """One image at a score threshold: annotated cells (missed ones dashed) beside detections (wrong
    ones dashed).

    The title tells precision, recall and F1 of all images.

    Args:
        cell_image: the image.
        number: its id in ``truth``.
        truth: all annotated cells, in the order of ``matches.truths``.
        detections: all detections, in the order of ``matches.detections``.
        matches: of ``metrics.match_detections``.
        score_threshold: of the detections that count.
    """
    missed = ~(matches.truths["score"] >= score_threshold).to_numpy()
    wrong = ~matches.detections["matched"].to_numpy()
    dashed = (0, (2, 1.5))
    in_image = truth.image_ids == number
    counted = (detections.image_ids == number) & (detections.scores >= score_threshold)
    fig, (left, right) = _figure(1, 2, 6.6, 3.9)
    title = f"{in_image.sum()} annotated, {(in_image & missed).sum()} missed (dashed)"
    _show(left, cell_image.image, title)
    _outline_by_class(left, truth[in_image & ~missed])
    _outline_by_class(left, truth[in_image & missed], linestyle=dashed)
    title = f"{counted.sum()} detections, {(counted & wrong).sum()} wrong (dashed)"
    _show(right, cell_image.image, title)
    _outline_by_class(right, detections[counted & ~wrong])
    _outline_by_class(right, detections[counted & wrong], linestyle=dashed)
    _class_legend(fig)
    count = count_matches(matches, score_threshold)["all"]
    ratios = {"precision": count.precision, "recall": count.recall, "F1": count.f1}
    told = ", ".join(
        f"{name} {'–' if np.isnan(value) else f'{value:.2f}'}" for name, value in ratios.items()
    )
    fig.suptitle(
        f"image {cell_image.image_id[:8]} at score ≥ {score_threshold:.2f}; all images: {told}",
        fontsize="small",
    )
    return fig


def contact_sheet(
    images: Sequence[np.ndarray],
    names: Sequence[str],
    detections: Sequence[Cells],
    columns: int = 4,
) -> Figure:
    """Small images with their detections, outlined by class.

    Args:
        images: uint8 [3, H, W] each, of any sizes.
        names: of the images.
        detections: of each, those to be shown.
        columns: images side by side.
    """
    rows = -(-len(images) // columns)
    fig, axes = _figure(rows, columns, 2.1 * columns, 2.3 * rows + 0.3, squeeze=False)
    for ax in axes.flat[len(images) :]:
        ax.set_axis_off()
    for ax, image, name, found in zip(axes.flat, images, names, detections, strict=False):
        _show(ax, image, f"{name[:8]}: {len(found)} cells")
        _outline_by_class(ax, found, linewidth=0.8)
    _class_legend(fig)
    return fig


def recipe_gallery(
    cell_image: CellImage, recipes: Mapping[str, Sequence[Any]], seed: int
) -> Figure:
    """One row a recipe: what it makes of the middle of an image, in four draws, and where the cells
    went, outlined by class.

    Args:
        cell_image: shown and augmented are at most ``GALLERY_PX`` of each side.
        recipes: name -> steps, as ``recipes.RECIPES``.
        seed: of the first draw, the same for every recipe; the others count on from it.
    """
    import torch

    from cellseg_helpers.data.augment import augment

    draws = 4
    starts = [max(length - GALLERY_PX, 0) // 2 for length in cell_image.image.shape[1:]]
    window = np.s_[:, starts[0] : starts[0] + GALLERY_PX, starts[1] : starts[1] + GALLERY_PX]
    image, label_maps = (
        torch.from_numpy(pixels[window].copy())
        for pixels in (cell_image.image, cell_image.label_maps)
    )
    fig, axes = _figure(len(recipes), draws, 5.0, 1.2 * len(recipes) + 0.5, squeeze=False)
    for row, (name, recipe) in zip(axes, recipes.items(), strict=True):
        for draw, ax in enumerate(row):
            changed, moved = (
                tensor.numpy() for tensor in augment(image, label_maps, recipe, seed + draw)
            )
            ax.imshow(changed.transpose(1, 2, 0), interpolation="bilinear")
            _bare(ax, "")
            _outline_by_class(ax, _cells_of(moved), linewidth=1)
        row[0].set_ylabel(name, fontsize="small")
    for draw, ax in enumerate(axes[0], 1):
        ax.set_title(f"draw {draw}", fontsize="small")
    _class_legend(fig)
    return fig


def outlines(mask: BoxMask) -> list[np.ndarray]:
    """The closed outlines of a mask, each float64 [n, 2] of x, y px."""
    lines = find_contours(np.pad(mask.mask, 1).astype(float), 0.5)
    return [line[:, ::-1] - 1 + (mask.x0, mask.y0) for line in lines]


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook with an alternative text: what a reader who cannot see it
    should know.
    """
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": alt}})


def _cells_of(label_maps: np.ndarray) -> Cells:
    found = find_instances(label_maps)
    rows = zip(found.boxes.astype(int).tolist(), found.labels, found.ids, strict=True)
    masks = [
        BoxMask.around(label_maps[k - 1, y1:y2, x1:x2] == instance_id, x1, y1)
        for (x1, y1, x2, y2), k, instance_id in rows
    ]
    return Cells.of_image(*label_maps.shape[1:], found.labels, masks)


def _outline_by_class(ax: Axes, cells: Cells, linewidth: float = 1.3, linestyle: Any = "-") -> None:
    for class_id, name in enumerate(CLASS_NAMES, 1):
        masks = cells[cells.labels == class_id].masks
        lines = [line for mask in masks for line in outlines(mask)]
        drawn = LineCollection(
            lines, colors=CLASS_COLORS[name], linewidths=linewidth, linestyles=[linestyle]
        )
        ax.add_collection(drawn, autolim=False)


def _class_legend(fig: Figure) -> None:
    handles = [
        Line2D([], [], color=colour, linewidth=2, label=name)
        for name, colour in CLASS_COLORS.items()
    ]
    fig.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize="small",
    )


def _figure(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, Any]:
    fig, axes = plt.subplots(
        rows, columns, figsize=(width, height), dpi=DPI, layout="constrained", **options
    )
    plt.close(fig)
    return fig, axes


def _show(ax: Axes, image: np.ndarray, title: str) -> None:
    ax.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    _bare(ax, title)


def _view(ax: Axes, x: float, y: float, width: int, height: int) -> None:
    """Show at most ``VIEW_PX`` around (x, y) of an image of this size, without leaving it."""
    spans = []
    for middle, size in ((x, width), (y, height)):
        start = min(max(middle - VIEW_PX / 2, 0), max(size - VIEW_PX, 0))
        spans.append((start - 0.5, min(start + VIEW_PX, size) - 0.5))
    ax.set(xlim=spans[0], ylim=spans[1][::-1])


def _bare(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize="small")
    ax.set(xticks=[], yticks=[])


def _whole_epochs(*axes: Axes) -> None:
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def anchors_against_cells(
    cells: pd.DataFrame,
    scales: dict[str, pd.Series],
    reported: Sequence[float],
    kept: Sequence[float],
) -> Figure:
    """Histograms of the cells' sizes as the model sees them, with the anchors of the text and those
    that the model keeps.

    Args:
        cells: of ``cell_table``.
        scales: title -> of ``input_scale``; one panel each.
        reported: sizes, px.
        kept: sizes, px.
    """
    fig, axes = plt.subplots(
        len(scales),
        1,
        figsize=(6.4, 1.9 * len(scales) + 0.6),
        dpi=DPI,
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    plt.close(fig)
    sizes = {
        title: np.sqrt(cells["width_px"] * cells["height_px"]) * scale
        for title, scale in scales.items()
    }
    every = np.concatenate([*sizes.values(), reported, kept])
    bins = np.geomspace(every.min() / 1.1, every.max() * 1.1, 50)
    for ax, (title, values) in zip(axes[:, 0], sizes.items(), strict=True):
        ax.hist(values, bins, color="0.75", label="cells")
        for sides, colour, style, label in (
            (reported, BEFORE, "-", "anchors, text"),
            (kept, AFTER, "--", "anchors, kept by the model"),
        ):
            for place, side in enumerate(sides):
                ax.axvline(
                    side,
                    color=colour,
                    linestyle=style,
                    linewidth=1.6,
                    label=label if not place else None,
                )
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_title(title, fontsize="medium")
        ax.set_ylabel("cells")
    axes[-1, 0].set_xlabel("square root of the box's area, or side of the anchor, px")
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize="small",
    )
    return fig


def value_ranges(table: pd.DataFrame) -> Figure:
    """What the first layer sees, by normalisation and channel: least to greatest (line), mean
    (dot), standard deviation (bar).

    Args:
        table: of ``normalised_values``.
    """
    names = list(dict.fromkeys(table.index.get_level_values(0)))
    fig, ax = plt.subplots(figsize=(6.4, 0.6 * len(names) + 1.2), dpi=DPI, layout="constrained")
    plt.close(fig)
    for channel, colour, mark, shift in zip(
        "RGB", ("#D55E00", "#009E73", "#0072B2"), "os^", (-0.22, 0, 0.22), strict=True
    ):
        rows = table.xs(channel, level="channel").loc[names]
        places = np.arange(len(names)) + shift
        ax.hlines(places, rows["least"], rows["greatest"], color=colour, linewidth=1)
        ax.hlines(
            places,
            rows["mean"] - rows["std"],
            rows["mean"] + rows["std"],
            color=colour,
            linewidth=4,
            alpha=0.5,
        )
        ax.plot(rows["mean"], places, mark, color=colour, markersize=5, label=channel)
    ax.set_xscale("symlog", linthresh=1)
    ax.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("value at the first layer (linear between -1 and 1, then logarithmic)")
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return fig
