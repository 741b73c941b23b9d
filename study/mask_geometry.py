"""What torchvision's mask convention costs: perfect mask targets, pasted back both ways."""

from collections.abc import Sequence

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cellseg_helpers.cells import CLASS_NAMES, Cells, mask_iou
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.labels import find_cells
from cellseg_helpers.data.samples import make_target
from cellseg_helpers.inference import paste_in_boxes
from cellseg_helpers.metrics import dense_max_dets, score_coco, summarize
from cellseg_helpers.model.heads import mask_targets
from cellseg_helpers.plots import CLASS_COLORS, RED, new_figure, outlines

GEOMETRIES = ("exact", "torchvision")
MASK_SIDE, HALF = 28, 0.5


def perfect_cells(cell_image: CellImage, mask_geometry: str, image_id: int = 1) -> Cells:
    """The cells of an image as a model finds them whose mask head is perfect and whose boxes are
    off by up to half a pixel on each side.
    """
    target = make_target(torch.from_numpy(cell_image.label_maps))
    noise = torch.rand(target["boxes"].shape, generator=torch.Generator().manual_seed(image_id))
    boxes, labels = target["boxes"] + noise - HALF, target["labels"]
    of_cells = target["label_maps"], labels, target["ids"], boxes
    masks = mask_targets(*of_cells, MASK_SIDE, mask_geometry == "exact")
    size = cell_image.image.shape[1:]
    pasted = paste_in_boxes(masks, boxes, *size, HALF, mask_geometry)
    return Cells.of_image(*size, labels.numpy(), pasted, image_id=image_id)


def mask_ceilings(images: Sequence[CellImage]) -> pd.DataFrame:
    """AP of perfect cells by class, and their mean (``all``), in each geometry (columns): no model
    of that geometry is better.
    """
    truth, columns = to_coco(images), {}
    for mask_geometry in GEOMETRIES:
        perfect = (perfect_cells(image, mask_geometry, i) for i, image in enumerate(images, 1))
        scores = score_coco(truth, Cells.concatenate(perfect), dense_max_dets(truth))
        lines = {name: summarize(scores, class_name=name) for name in scores.class_names}
        lines["all"] = summarize(scores)
        columns[mask_geometry] = {name: line["AP"] for name, line in lines.items()}
    return pd.DataFrame(columns).rename_axis("class")


def one_cell_both_ways(images: Sequence[CellImage], class_name: str = "lymphocyte") -> Figure:
    """The cell of a class's median area on its pixels: the outline of its annotated mask, and of
    its perfect target pasted back, one panel for each geometry.
    """
    class_id, of_class = list(CLASS_NAMES).index(class_name) + 1, []
    for number, cell_image in enumerate(images):
        cells = find_cells(cell_image.label_maps)
        areas_px = enumerate(cells.area_px.tolist())
        of_class += [(a, number, row) for row, a in areas_px if cells.labels[row] == class_id]
    area_px, number, row = sorted(of_class)[len(of_class) // 2]
    cell_image = images[number]
    cell = find_cells(cell_image.label_maps)[[row]]
    x1, y1, x2, y2 = cell.mask_boxes[0]
    fig, axes = new_figure(1, 2, 4.6)
    lines = {
        f"annotated {class_name}, {area_px} px²": {"color": CLASS_COLORS[class_name]},
        "its perfect target, pasted back": {"color": RED, "ls": "--"},
    }
    for ax, mask_geometry in zip(axes, GEOMETRIES[::-1], strict=True):
        pasted = perfect_cells(cell_image, mask_geometry, number + 1)[[row]]
        ax.imshow(cell_image.image.transpose(1, 2, 0), interpolation="nearest")
        for shown, style in zip((cell, pasted), lines.values(), strict=True):
            for line in outlines(shown.masks[0]):
                ax.plot(*line.T, linewidth=2.5, **style)
        ax.set(xlim=(x1 - 4, x2 + 3), ylim=(y2 + 3, y1 - 4), xlabel="px", ylabel="px")
        ax.set_title(f"{mask_geometry}: IoU {mask_iou(cell, pasted)[0, 0]:.2f}")
    handles = [Line2D([], [], label=label, **style) for label, style in lines.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return fig
