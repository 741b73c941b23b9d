"""Dense drawn scenes that the benchmarks share: any number of cells, about equally spaced, none on
another.
"""

import numpy as np
import torch
from torch import Tensor

from cellseg_helpers.data.samples import make_target
from cellseg_helpers.model.heads import mask_targets
from tools.large_run import mask_of

CELLS_PER_PX = 2_000 / 2_500**2
MASK_SIDE = 28


def dense_label_maps(side_px: int, cells: int, classes: int = 4, seed: int = 0) -> Tensor:
    """Label maps int32 [classes, side, side] of disjoint wavy blobs, 15 to 40 px across, on a
    jittered square grid.
    """
    rng = np.random.default_rng(seed)
    per_row = int(np.ceil(np.sqrt(cells)))
    squares = np.column_stack(np.divmod(rng.choice(per_row**2, cells, replace=False), per_row))
    centres = (squares + rng.uniform(0.35, 0.65, (cells, 2))) * (side_px / per_row)
    waves = (rng.normal(0, 0.07, (cells, 2)), rng.uniform(0, 2 * np.pi, (cells, 2)))
    shapes = np.column_stack([centres, rng.uniform(7.5, 20, cells), *waves])
    label_maps = np.zeros((classes, side_px, side_px), np.int32)
    for number, shape in enumerate(shapes):
        mask, x0, y0 = mask_of(shape, side_px, side_px)
        window = label_maps[:, y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
        free = mask & (window == 0).all(0)
        window[number % classes][free] = number // classes + 1
    return torch.from_numpy(label_maps)


def dense_scene(side_px: int, cells: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An image uint8 [3, side, side], dark cells on bright ground, noisy, and its label maps."""
    label_maps = dense_label_maps(side_px, cells, seed=seed)
    rng = np.random.default_rng(seed)
    bright = 220 - 90 * label_maps.any(0).numpy()
    image = np.clip(bright + rng.normal(0, 15, (3, side_px, side_px)), 0, 255).astype(np.uint8)
    return torch.from_numpy(image), label_maps


def with_dense_masks(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same target as torchvision's Mask R-CNN takes it: ``masks`` uint8 [N, H, W] in place of
    ``ids`` and ``label_maps``.
    """
    label_maps, labels, ids = target["label_maps"], target["labels"], target["ids"]
    masks = label_maps.new_empty(len(ids), *label_maps.shape[1:], dtype=torch.uint8)
    for mask, label, instance_id in zip(masks, labels, ids, strict=True):
        torch.eq(label_maps[label - 1], instance_id, out=mask)
    return {"boxes": target["boxes"], "labels": labels, "masks": masks}


def perfect_detections(label_maps: Tensor) -> dict[str, Tensor]:
    """What a perfect model finds: ``boxes``, ``labels``, ``scores`` of 1 and ``masks`` float32 [N,
    28, 28] in their boxes.
    """
    target = make_target(label_maps)
    boxes, labels = target["boxes"], target["labels"]
    masks = mask_targets(label_maps, labels, target["ids"], boxes, MASK_SIDE)
    return {"boxes": boxes, "labels": labels, "scores": torch.ones(len(masks)), "masks": masks}
