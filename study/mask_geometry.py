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
from cellseg_helpers.plots import BLUE, RED, new_figure, outlines

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


def mask_ceiling(images: Sequence[CellImage], mask_geometry: str) -> pd.Series:
    """AP by class, and their mean (``all``), of perfect cells: no model of this geometry is
    better.
    """
    found = [perfect_cells(image, mask_geometry, row) for row, image in enumerate(images, 1)]
    truth = to_coco(images)
    scores = score_coco(truth, Cells.concatenate(found), dense_max_dets(truth))
    names = {name: name for name in scores.class_names} | {"all": None}
    return pd.Series({k: summarize(scores, class_name=name)["AP"] for k, name in names.items()})


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
    for ax, mask_geometry in zip(axes, GEOMETRIES[::-1], strict=True):
        found = perfect_cells(cell_image, mask_geometry, number + 1)[[row]]
        ax.imshow(cell_image.image.transpose(1, 2, 0), interpolation="nearest")
        for cells, style in ((cell, {"color": BLUE}), (found, {"color": RED, "ls": "--"})):
            for line in outlines(cells.masks[0]):
                ax.plot(*line.T, linewidth=2.5, **style)
        ax.set(xlim=(x1 - 4, x2 + 3), ylim=(y2 + 3, y1 - 4), xlabel="px", ylabel="px")
        ax.set_title(f"{mask_geometry}: IoU {mask_iou(cell, found)[0, 0]:.2f}")
    handles = [Line2D([], [], color=BLUE, label=f"annotated {class_name}, {area_px} px²")]
    handles += [Line2D([], [], color=RED, ls="--", label="its perfect target, pasted back")]
    fig.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return fig
