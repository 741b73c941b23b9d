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


def dense_label_maps(
    side_px: int, num_cells: int, num_classes: int = 4, seed: int = 0
) -> np.ndarray:
    """Label maps int32 [num_classes, side, side] of disjoint wavy blobs, 15 to 40 px across, on a
    jittered square grid.
    """
    rng = np.random.default_rng(seed)
    per_row = int(np.ceil(np.sqrt(num_cells)))
    squares = np.column_stack(np.divmod(rng.choice(per_row**2, num_cells, replace=False), per_row))
    centres = (squares + rng.uniform(0.35, 0.65, (num_cells, 2))) * (side_px / per_row)
    waves = (rng.normal(0, 0.07, (num_cells, 2)), rng.uniform(0, 2 * np.pi, (num_cells, 2)))
    shapes = np.column_stack([centres, rng.uniform(7.5, 20, num_cells), *waves])
    label_maps = np.zeros((num_classes, side_px, side_px), np.int32)
    taken = np.zeros((side_px, side_px), bool)
    for number, shape in enumerate(shapes):
        mask, x0, y0 = mask_of(shape, side_px, side_px)
        window = np.s_[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
        free = mask & ~taken[window]
        taken[window] |= free
        label_maps[number % num_classes][window][free] = number // num_classes + 1
    return label_maps


def dense_target(label_maps: np.ndarray) -> dict[str, Tensor]:
    """The target that ``LabelMapMaskRCNN`` trains on."""
    return make_target(torch.from_numpy(label_maps))


def dense_image(label_maps: np.ndarray, seed: int = 0) -> np.ndarray:
    """An image uint8 [3, H, W] of the scene: dark cells on bright ground, noisy."""
    rng = np.random.default_rng(seed)
    bright = 220 - 90 * (label_maps != 0).any(0)
    return np.clip(bright + rng.normal(0, 15, (3, *bright.shape)), 0, 255).astype(np.uint8)


def with_dense_masks(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same target as torchvision's Mask R-CNN takes it: ``masks`` uint8 [N, H, W] in place of
    ``ids`` and ``label_maps``.
    """
    label_maps, labels, ids = target["label_maps"], target["labels"], target["ids"]
    size = (len(ids), *label_maps.shape[1:])
    masks = torch.empty(size, dtype=torch.uint8, device=label_maps.device)
    for mask, label, instance_id in zip(masks, labels, ids, strict=True):
        torch.eq(label_maps[label - 1], instance_id, out=mask)
    return {"boxes": target["boxes"], "labels": labels, "masks": masks}


def detections_of(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a perfect model finds: ``boxes``, ``labels``, ``scores`` of 1 and ``masks`` float32 [N,
    28, 28] in their boxes.
    """
    cells = (target["labels"], target["ids"], target["boxes"])
    masks = mask_targets(target["label_maps"], *cells, MASK_SIDE)
    found = {name: target[name] for name in ("boxes", "labels")}
    return found | {"scores": torch.ones(len(masks)), "masks": masks}
