"""Figures of images, cells, detections and scores.

Each figure is returned closed and at least 900 px wide; ``show`` displays it in a notebook.
seaborn, whose import takes up to a second, is imported only for the panels by class of
``threshold_sweep`` and ``predicted_against_true_counts``; histograms and intervals need bins and
colours that the classes share, and are shorter without it.
"""

import io
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
from matplotlib.colors import hsv_to_rgb, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image
from skimage.measure import find_contours

from cellseg_helpers.cells import CLASS_NAMES, BoxMask, Cells
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.labels import find_cells
from cellseg_helpers.metrics import Counts, Matches, count_matches

# Okabe and Ito's colours for colour-blind readers; these stand out on stained tissue and on white.
CLASS_COLORS = dict(zip(CLASS_NAMES, ("#E69F00", "#56B4E9", "#009E73", "#D55E00"), strict=True))
ALL_COLORS = {"all": "0.1", **CLASS_COLORS}
BLUE, RED, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # also Okabe and Ito's
WIDTH_IN, DPI = 9.6, 100
VIEW_PX = 320  # of a large image, a square of this side is shown
GALLERY_PX = 96  # side of the square that ``recipe_gallery`` shows
WINDOW_PX = 64  # smallest side of the crop around a detection
REDRAW_S = 30  # shortest time between two updates of a live figure
DASHED = (0, (2, 1.5))
# options of a legend on the right of the axes
BESIDE = {"frameon": False, "loc": "center left", "bbox_to_anchor": (1, 0.5)}
MARKS = "os^DvP*X"
FEWEST_IN_BIN = 10  # bins with fewer detections are not shown in the reliability diagram
LOSS_LABELS = {
    "loss_objectness": "RPN objectness", "loss_rpn_box_reg": "RPN boxes",
    "loss_classifier": "classes", "loss_box_reg": "boxes", "loss_mask": "masks",
}  # fmt: skip


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook, with a text ``alt`` for readers who cannot see it.

    The PNG is reduced to 256 colours, those of the classes among them: to a third of its size.
    """
    from IPython.display import display

    full_colour, png = io.BytesIO(), io.BytesIO()
    figure.savefig(full_colour, bbox_inches="tight")
    image, palette = Image.open(full_colour).convert("RGB"), Image.new("P", (1, 1))
    own = to_rgba_array([BLUE, RED, GREEN, PURPLE, *CLASS_COLORS.values()])[:, :3]
    of_image = image.quantize(256 - len(own)).getpalette()
    palette.putpalette(of_image + np.rint(255 * own).astype(int).ravel().tolist())
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(png, "PNG")
    bundle = {"image/png": png.getvalue(), "text/plain": repr(figure)}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})


# Images and cells


def image_beside_instances(cell_image: CellImage, *class_names: str) -> Figure:
    """Show an image and, for each class name (or ``all``), a panel with its instances, each in
    another colour.

    Raises:
        ValueError: an unknown class name.
    """
    cells = find_cells(cell_image.label_maps)
    panels: list[tuple] = [(cell_image.image, cell_image.image_id[:8])]
    for name in class_names:
        if name not in ALL_COLORS:
            raise ValueError(f"unknown class_name {name!r}; one of {', '.join(ALL_COLORS)}")
        shown = cells if name == "all" else cells[cells.labels == CLASS_NAMES.index(name) + 1]
        classes = "all classes" if name == "all" else name
        picture = colour_instances(shown, *cell_image.image.shape[1:])
        panels.append((picture, f"{len(shown)} instances, {classes}"))
    return _image_panels(panels, len(panels), 4.9 if len(panels) < 3 else 3.5)[0]


def colour_instances(cells: Cells, height: int, width: int) -> np.ndarray:
    """Paint cells on black, consecutive ones in very different colours: float64 [3, H, W], 0..1."""
    number = np.arange(len(cells))
    hue = number * 0.618034 % 1  # steps of the golden ratio: no hue repeats
    hsv = np.stack([hue, 0.55 + 0.4 * (number % 2), 1 - 0.25 * (number % 3 == 2)], axis=1)
    picture = np.zeros((height, width, 3))
    for (mask, x0, y0), colour in zip(cells.masks, hsv_to_rgb(hsv), strict=True):
        picture[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]][mask] = colour
    return picture.transpose(2, 0, 1)


def truth_beside_predictions(
    cell_images: Sequence[CellImage],
    truths: Sequence[Cells],
    predictions: Sequence[Cells],
    score_threshold: float,
) -> Figure:
    """Show each image in a row: the image, its annotated cells (of ``truths``), and its detections
    (of ``predictions``) that score at least ``score_threshold``.
    """
    panels: list[tuple] = []
    for (name, _, image, _), truth, detected in zip(cell_images, truths, predictions, strict=True):
        shown = detected[detected.scores >= score_threshold]
        title = f"{len(shown)} predicted, score ≥ {score_threshold:g}"
        panels += [(image, name[:8]), (image, f"{len(truth)} annotated", truth)]
        panels.append((image, title, shown))
    return _image_panels(panels, 3, 3.4)[0]


def contact_sheet(
    images: Sequence[np.ndarray], names: Sequence[str], detections: Sequence[Cells]
) -> Figure:
    """Show images (uint8 [3, H, W], of any sizes) with their detections, four images in a row."""
    panels = [
        (image, f"{name[:8]}: {len(detected)} cells", detected)
        for image, name, detected in zip(images, names, detections, strict=True)
    ]
    return _image_panels(panels, 4, 2.8)[0]


def crops(
    table: pd.DataFrame, cell_images: Sequence[CellImage], truth: Cells, detections: Cells
) -> Figure:
    """Show a crop around each detection in ``table`` (solid), with the annotated cells (dashed).

    ``table`` has the columns class, score and kind; its index is the row in ``detections``, as in
    ``explore.confident_mistakes``. The image with id ``n`` is ``cell_images[n - 1]``.
    """
    panels = []
    for row, class_name, score, mistake in table[["class", "score", "kind"]].itertuples():
        number = detections.image_ids[row]
        title = f"{class_name} {score:.2f}\n{mistake}"
        annotated = truth[truth.image_ids == number]
        panels.append((cell_images[number - 1].image, title, Cells.empty(), annotated))
    fig, axes = _image_panels(panels, 4, 2.9)
    for ax, row in zip(axes, table.index, strict=True):
        _outline(ax, detections[[row]], linewidth=2)
        start, stop = detections.boxes[row].reshape(2, 2)
        (x, y), half = (start + stop) / 2, max(WINDOW_PX, 1.5 * (stop - start).max()) / 2
        ax.set(xlim=(x - half, x + half), ylim=(y + half, y - half), facecolor="0.85")
    return fig


def found_and_missed(
    cell_image: CellImage,
    number: int,
    truth: Cells,
    detections: Cells,
    matches: Matches,
    score_threshold: float,
) -> Figure:
    """Show one image at a score threshold: annotated cells (missed ones dashed) beside detections
    (wrong ones dashed). The title gives precision, recall and F1 over all images.

    ``truth`` and ``detections`` are those of all images, in the order of ``matches``; ``number`` is
    the image's id in them. Detections below ``score_threshold`` are left out.
    """
    missed = ~(matches.truths["score"] >= score_threshold).to_numpy()
    wrong = ~matches.detections["matched"].to_numpy()
    in_image = truth.image_ids == number
    counted = (detections.image_ids == number) & (detections.scores >= score_threshold)
    left = f"{in_image.sum()} annotated, {(in_image & missed).sum()} missed (dashed)"
    right = f"{counted.sum()} detections, {(counted & wrong).sum()} wrong (dashed)"
    panels = [
        (cell_image.image, left, truth[in_image & ~missed], truth[in_image & missed]),
        (cell_image.image, right, detections[counted & ~wrong], detections[counted & wrong]),
    ]
    fig, _ = _image_panels(panels, 2, 4.6)
    count = count_matches(matches, score_threshold)["all"]
    ratios = f"precision {count.precision:.2f}, recall {count.recall:.2f}, F1 {count.f1:.2f}"
    title = f"image {cell_image.image_id[:8]} at score ≥ {score_threshold:.2f}; all images: "
    fig.suptitle(title + ratios.replace("nan", "–"))
    return fig


def border_strip(cell_image: CellImage, truth: Cells, at_border: Cells, title: str) -> Figure:
    """Show an image's annotated cells beside its detections at the border; ``title`` names these.

    Of a large image, only ``VIEW_PX`` around the highest-scored of these detections are shown.
    """
    panels = [
        (cell_image.image, f"{cell_image.image_id[:8]}: {len(truth)} annotated", truth),
        (cell_image.image, f"{len(at_border)} {title}", at_border),
    ]
    fig, axes = _image_panels(panels, 2, 4.6)
    box = at_border.boxes[at_border.scores.argmax()] if len(at_border) else np.zeros(4)
    _view(axes, box.reshape(2, 2).mean(0), cell_image)
    return fig


def before_and_after(
    cell_image: CellImage, before: Cells, labels: np.ndarray, cell_classes: Sequence[str]
) -> Figure:
    """Show an image, its detections ``before`` post-processing (they may overlap), and the final
    label image, coloured by class. Of a large image, the middle ``VIEW_PX`` are shown.

    ``labels`` is the label image, uint [H, W]: 0 = background, 1..N = the cells; ``cell_classes``
    holds the class name of each of the N cells.
    """
    from skimage.segmentation import find_boundaries  # imported here, since it takes 0.1 s

    colours = to_rgba_array(["black", *(CLASS_COLORS[name] for name in cell_classes)])[:, :3]
    # A cell's border pixels are black, so that touching cells stay apart.
    picture = colours[np.where(find_boundaries(labels, mode="inner"), 0, labels)]
    panels: list[tuple] = [
        (cell_image.image, cell_image.image_id[:8]),
        (cell_image.image, f"{len(before)} detections in the image", before),
        (picture.transpose(2, 0, 1), f"{len(cell_classes)} cells, each pixel to one"),
    ]
    fig, axes = _image_panels(panels, 3, 3.4)
    _view(axes, np.divide(labels.shape[::-1], 2), cell_image)
    return fig


def recipe_gallery(cell_image: CellImage, recipes: Mapping[str, Sequence], seed: int) -> Figure:
    """Show the middle of an image, with its cells, in three random augmentations: one column per
    recipe (name -> steps, as in ``augment.RECIPES``), rows with seeds ``seed``, ``seed + 1``, ...
    """
    import torch

    from cellseg_helpers.data.augment import augment

    y, x = (max(length - GALLERY_PX, 0) // 2 for length in cell_image.image.shape[1:])
    window = np.s_[:, y : y + GALLERY_PX, x : x + GALLERY_PX]
    pixels = (cell_image.image[window], cell_image.label_maps[window])
    image, label_maps = (torch.from_numpy(part.copy()) for part in pixels)
    panels = []
    for row in range(3):
        for name, recipe in recipes.items():
            new_image, new_maps = augment(image, label_maps, recipe, seed + row)
            title = "" if row else textwrap.fill(name.replace("_", " "), 12)
            panels.append((new_image.numpy(), title, find_cells(new_maps.numpy())))
    fig, axes = _image_panels(panels, len(recipes), 1.45)
    for row, ax in enumerate(axes[:: len(recipes)], 1):
        ax.set_ylabel(f"draw {row}")
    return fig


def outlines(mask: BoxMask) -> list[np.ndarray]:
    """Find the closed outlines of a mask, each float64 [n, 2]: x, y px, whole at pixel centres."""
    lines = find_contours(np.pad(mask.mask, 1).astype(float), 0.5)
    return [line[:, ::-1] - 1 + (mask.x0, mask.y0) for line in lines]


# Training


def seldom(draw: Callable[[pd.DataFrame], None]) -> Callable[[pd.DataFrame], None]:
    """``draw``, throttled: a call within ``REDRAW_S`` seconds of the last drawing does nothing. (A
    figure can take as long as a training step.)
    """
    last_drawn_s = -math.inf

    def throttled(history: pd.DataFrame) -> None:
        nonlocal last_drawn_s
        if time.monotonic() - last_drawn_s > REDRAW_S:
            draw(history)
            last_drawn_s = time.monotonic()

    return throttled


def training_curves(history: pd.DataFrame) -> Figure:
    """Plot training loss, validation loss and validation AP50 by epoch, from a run's history."""
    fig, (left, right) = new_figure(1, 2, 3.4, sharex=True)
    validated = history.dropna(subset="validation_loss")
    draw_by_epoch(left, history, "loss", BLUE, label="training")
    draw_by_epoch(left, validated, "validation_loss", PURPLE, label="validation")
    left.set(ylabel="sum of the five losses", ylim=(0, None))
    left.legend(frameon=False)
    draw_by_epoch(right, validated, "validation_ap50", "0.1")
    right.set(ylabel="validation mask AP50", ylim=(0, 1))
    return fig


def loss_parts(history: pd.DataFrame) -> Figure:
    """Plot the five training losses by epoch, from a run's history."""
    fig, ax = new_figure(1, 1, 3.4)
    colours = (BLUE, RED, GREEN, PURPLE, "0.1")
    for (name, label), colour, mark in zip(LOSS_LABELS.items(), colours, MARKS, strict=False):
        draw_by_epoch(ax, history, name, colour, mark, label=label)
    ax.set(ylabel="training loss", ylim=(0, None))
    ax.legend(**BESIDE)
    return fig


# Scores, sizes and borders


def precision_recall(curves: pd.DataFrame, counts: dict[float, dict[str, Counts]]) -> Figure:
    """Plot the precision-recall curve of each class (from ``metrics.precision_recall_curves``) and
    its points at some score thresholds.

    ``counts``: score threshold -> ``metrics.count_matches``; at most ``len(MARKS)``. A point may
    lie below the curve, in which precision is, as in COCO, the highest at this recall or beyond.
    """
    fig, ax = new_figure(1, 1, 4.6)
    averages = curves.groupby("class", sort=False)["precision"].mean()
    for name, average in averages.dropna().items():
        color = CLASS_COLORS[name]
        curve = curves[(curves["class"] == name) & (curves["precision"] > 0)]
        label = f"{name}: {average:.2f}"
        ax.plot(curve["recall"], curve["precision"], color=color, label=label)
        for mark, count in zip(MARKS, counts.values(), strict=False):
            point = (count[name].recall, count[name].precision)
            ax.plot(*point, mark, color=color, markeredgecolor="0.1")
    for mark, score_threshold in zip(MARKS, counts, strict=False):
        label = f"score ≥ {score_threshold:g}" if score_threshold else "all detections"
        ax.plot([], [], mark, color="white", markeredgecolor="0.1", label=label)
    ax.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    ax.legend(title="average precision", **BESIDE)
    return fig


def score_histograms(matches: Matches) -> Figure:
    """Plot stacked histograms of scores by class: matched detections (blue) and others (grey)."""
    fig, axes = new_figure(2, 2, 5.6, sharex=True)
    labels = {"matches an annotated cell": BLUE, "matches none": "0.75"}
    for ax, (class_id, name) in zip(axes.flat, matches.class_names.items(), strict=True):
        rows = matches.detections[matches.detections["class_id"] == class_id]
        parts = [rows.loc[rows["matched"] == is_match, "score"] for is_match in (True, False)]
        ax.hist(parts, np.linspace(0, 1, 41), stacked=True, color=list(labels.values()))
        ax.set_title(f"{name}: {len(parts[0])} matched, {len(parts[1])} not")
        ax.set(xlim=(0, 1), ylim=(0, max(1, ax.get_ylim()[1])), ylabel="detections")
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in axes[1]:
        ax.set_xlabel("score")
    _legend(fig, [Patch(color=color, label=label) for label, color in labels.items()])
    return fig


def threshold_sweep(table: pd.DataFrame) -> Figure:
    """Plot AP, precision, recall and F1 over the score threshold, from ``thresholds.sweep``."""
    ap_column = next(column for column in table if column.startswith("AP"))
    rows = table.melt(["class", "score_threshold"], [ap_column, "precision", "recall", "F1"])
    panels = {"col": "variable", "col_wrap": 2, "height": 2.7, "aspect": 1.6}
    lines = {"kind": "line", "hue": "class", "palette": ALL_COLORS, "marker": "o", "markersize": 4}
    grid = _relplot(rows, x="score_threshold", y="value", **panels, **lines)
    grid.set(ylim=(0, 1.02), xlabel="score threshold", ylabel="")
    return grid.figure


def reliability_diagram(table: pd.DataFrame, errors: pd.Series) -> Figure:
    """Plot the share of matched detections over their score for each class, and below it how many
    detections each point stands for; bins with fewer than ``FEWEST_IN_BIN`` are left out.

    Args:
        table: from ``thresholds.reliability``.
        errors: expected calibration error of each class, for the legend.
    """
    fig, (ax, below) = new_figure(2, 1, 5.6, sharex=True, height_ratios=(3, 1))
    ax.plot([0, 1], [0, 1], ":", color="0.6", label="if scores were probabilities")
    filled = table[table["detections"] >= FEWEST_IN_BIN]
    for name, colour in ALL_COLORS.items():
        rows = filled[filled["class"] == name]
        style = {"color": colour, "marker": "o", "markersize": 4}
        style["linestyle"] = "--" if name == "all" else "-"
        label = f"{name}: {errors.get(name, np.nan):.2f}"
        ax.plot(rows["mean_score"], rows["matched_share"], label=label, **style)
        below.plot(rows["mean_score"], rows["detections"], **style)
    ax.set(ylabel="share that matches a cell", xlim=(0, 1), ylim=(0, 1.02))
    below.set(xlabel="score (mean of a bin)", ylabel="detections")
    if len(filled):
        below.set(yscale="log", ylim=(FEWEST_IN_BIN, None))
    ax.legend(title="expected calibration error", **BESIDE)
    return fig


def predicted_against_true_counts(counts: dict[str, pd.DataFrame]) -> Figure:
    """Plot predicted over annotated cells of each image, one panel per class, with a dotted line
    where both are equal. ``counts``: how thresholds were chosen -> ``thresholds.cell_counts``.
    """
    rows = pd.concat(counts, names=["threshold"]).reset_index("threshold")
    free_axes = {"sharex": False, "sharey": False}
    panels = {"col": "class", "height": 2.6, "aspect": 0.9, "facet_kws": free_axes}
    colours = [BLUE, RED, GREEN, PURPLE][: len(counts)]
    points = {"hue": "threshold", "style": "threshold", "palette": colours, "s": 45}
    grid = _relplot(rows, x="cells", y="predicted", **panels, **points)
    grid.set(xlabel="annotated cells", ylabel="")
    grid.axes[0, 0].set_ylabel("predicted cells")
    for ax in grid.axes.flat:
        ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8, linestyle=":")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(4, integer=True))
    return grid.figure


def sizes_against_anchors(
    sizes: Mapping[str, pd.Series], anchors: Mapping[str, Sequence[float]], columns: int = 2
) -> Figure:
    """Plot histograms of cell sizes, with a line at each anchor size.

    Args:
        sizes: title (or class name) -> size of each cell, px: the square root of its area.
        anchors: label -> anchor sizes, px; at most two sets.
        columns: number of panels side by side.
    """
    rows = math.ceil(len(sizes) / columns)
    fig, axes = new_figure(rows, columns, 2.2 * rows + 0.6, sharex=True, squeeze=False)
    styles = dict(zip(anchors, ({"color": BLUE}, {"color": RED, "ls": "--"}), strict=False))
    all_sizes = np.concatenate([*sizes.values(), *anchors.values()])
    bins = np.geomspace(all_sizes.min() / 1.1, all_sizes.max() * 1.1, 45)
    for ax, (title, values) in zip(axes.flat, sizes.items(), strict=False):
        ax.hist(values, bins, color=CLASS_COLORS.get(title, "0.75"))
        for label, style in styles.items():
            for side in anchors[label]:
                ax.axvline(side, linewidth=1.2, **style)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.set(title=f"{title}, {len(values)} cells", ylabel="cells")
    for ax in axes[-1]:
        ax.set_xlabel("size: square root of the area, px")
    _legend(fig, [Line2D([], [], label=label, **style) for label, style in styles.items()])
    return fig


def border_contact(contacts: dict[str, pd.DataFrame]) -> Figure:
    """Plot the number of cells at the border divided by the number expected by chance, by class,
    over its 95 % interval by chance (grey). ``contacts``: title -> ``borders.border_contact``.
    """
    fig, axes = new_figure(1, len(contacts), 3.4, sharey=True, squeeze=False)
    for ax, (title, table) in zip(axes[0], contacts.items(), strict=True):
        rows = table[table["expected"] > 0]
        low, high = rows["low"] / rows["expected"], rows["high"] / rows["expected"]
        y = table.index.get_indexer(rows.index)
        ax.axvline(1, color="0.5", linewidth=0.8, linestyle=":")
        ax.barh(y, high - low, left=low, height=0.6, color="0.85")
        for height, (name, row) in zip(y, rows.iterrows(), strict=True):
            ax.plot(row["ratio"], height, "o", color=ALL_COLORS[name])
            position, text = (0.98, height), f"{row['at_border']} of {row['expected']:.0f}"
            ax.text(*position, text, ha="right", va="center", transform=ax.get_yaxis_transform())
        ax.set_yticks(range(len(table)), table.index)
        ax.set(xlim=(-0.1, 1.5 * np.nanmax([1.6, *table["ratio"], *high])))
        ax.set(title=textwrap.fill(title, 28), xlabel="at border / by chance")
    axes[0, 0].invert_yaxis()
    _legend(fig, [Patch(color="0.85", label="95 % interval of chance")])
    return fig


# Parts of figures


def new_figure(rows: int, columns: int, height_in: float, **options: Any) -> tuple[Figure, Any]:
    """Make ``plt.subplots`` of the notebooks' width, closed so that no notebook shows it twice."""
    size = (WIDTH_IN, height_in)
    fig, axes = plt.subplots(rows, columns, figsize=size, dpi=DPI, layout="constrained", **options)
    fig.add_artist(Line2D([0, 1], [0, 0], alpha=0))  # keeps the width under bbox_inches="tight"
    plt.close(fig)
    return fig, axes


def draw_by_epoch(
    ax: Axes, table: pd.DataFrame, column: str, color: str, marker: str = "o", **style: Any
) -> None:
    """Draw a line of a column over ``epoch``, with markers for fewer than 25 rows."""
    marker = marker if len(table) < 25 else ""
    ax.plot(table["epoch"], table[column], color=color, marker=marker, markersize=4, **style)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _relplot(rows: pd.DataFrame, **options: Any) -> Any:
    """Make seaborn's ``relplot`` and close its figure."""
    import seaborn as sns

    grid = sns.relplot(rows, **options).set_titles("{col_name}")
    grid.figure.set_dpi(DPI)
    plt.close(grid.figure)
    return grid


def _image_panels(
    panels: Sequence[tuple], columns: int, row_height_in: float
) -> tuple[Figure, list[Axes]]:
    """Show images in rows. A panel is a tuple: image, title, and optionally cells to outline (in
    the colours of their classes) and cells to outline with dashes.
    """
    rows = max(1, math.ceil(len(panels) / columns))
    fig, axes = new_figure(rows, columns, row_height_in * rows + 0.5, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (image, title, *outlined) in zip(axes.flat, panels, strict=False):
        ax.imshow(image.transpose(1, 2, 0), interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
        for cells, linestyle in zip(outlined, ("-", DASHED), strict=False):
            _outline(ax, cells, linestyle=linestyle)
    if any(len(panel) > 2 for panel in panels):
        _legend(fig, [Line2D([], [], color=CLASS_COLORS[name], label=name) for name in CLASS_NAMES])
    return fig, list(axes.flat[: len(panels)])


def _outline(ax: Axes, cells: Cells, linewidth: float = 1.3, linestyle: Any = "-") -> None:
    """Outline cells in the colours of their classes; the limits of the axes stay as they are."""
    for class_id, name in enumerate(CLASS_NAMES, 1):
        masks = cells[cells.labels == class_id].masks
        lines = [line for mask in masks for line in outlines(mask)]
        style = {"colors": CLASS_COLORS[name], "linewidths": linewidth, "linestyles": [linestyle]}
        ax.add_collection(LineCollection(lines, **style), autolim=False)


def _view(axes: Sequence[Axes], centre: np.ndarray, cell_image: CellImage) -> None:
    """Limit axes to ``VIEW_PX`` around ``centre`` (x, y px), or less, without leaving the image."""
    size = np.array(cell_image.image.shape[:0:-1])  # width, height
    start = np.clip(centre - VIEW_PX / 2, 0, np.maximum(size - VIEW_PX, 0)) - 0.5
    (left, top), (right, bottom) = start, np.minimum(start + VIEW_PX, size - 0.5)
    for ax in axes:
        ax.set(xlim=(left, right), ylim=(bottom, top))


def _legend(fig: Figure, handles: list[Any]) -> None:  # in one row below the panels
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
