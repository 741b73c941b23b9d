"""The recipe ``full`` with every part of it applied: label maps against one mask a cell.

Both sides run the same transforms with the same random numbers on one image (uint8 [3, 1024, 1024]) of 300 drawn cells. Ours moves
4 label maps (int32 [4, H, W]), the peer a ``tv_tensors.Mask`` stack (uint8 [300, H, W]), as torchvision's own examples do.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from bench.large_run import mask_of, throw_blobs
from bench.measure import Pair, Row, megabytes, seconds_in_turn
from cellseg_helpers.data.labels import CLASS_NAMES, find_instances
from cellseg_helpers.data.recipes import RECIPES, augment

RECIPE = "full"
CELLS, SIDE_PX = 300, 1024
SEED = 0


def draw_cells() -> tuple[Tensor, Tensor]:
    """Noise, uint8 [3, H, W], and label maps, int32 [K, H, W], of ``CELLS`` cells that share no pixel."""
    rng = np.random.default_rng(0)
    size = {"height": SIDE_PX, "width": SIDE_PX}
    label_maps = np.zeros((len(CLASS_NAMES), SIDE_PX, SIDE_PX), np.int32)
    drawn = 0
    while drawn < CELLS:
        (class_id,), shapes = throw_blobs(rng, 1, size, outside_px=0)
        mask, x, y = mask_of(shapes[0], size)
        window = label_maps[:, y : y + mask.shape[0], x : x + mask.shape[1]]
        if not window[:, mask].any():
            drawn += 1
            window[class_id - 1, mask] = drawn
    return torch.from_numpy(rng.integers(0, 256, (3, SIDE_PX, SIDE_PX), np.uint8)), torch.from_numpy(label_maps)


def always() -> list[v2.Transform]:
    """The recipe with probability 1 for each of its parts; which of several is taken stays drawn."""
    recipe = copy.deepcopy(RECIPES[RECIPE])
    for step in nn.ModuleList(recipe).modules():
        if isinstance(getattr(step, "p", None), float):
            step.p = 1.0
    return recipe


def label_maps_and_stack() -> Pair:
    image, label_maps = draw_cells()
    cells = find_instances(label_maps.numpy())
    places = list(zip(cells.labels.tolist(), cells.ids.tolist(), strict=True))
    stack = torch.stack([label_maps[label - 1] == number for label, number in places]).to(torch.uint8)
    recipe = always()

    def augment_stack() -> tuple[Tensor, Tensor]:
        torch.manual_seed(SEED)
        return v2.Compose(recipe)(tv_tensors.Image(image), tv_tensors.Mask(stack))

    def compare(ours: tuple[Tensor, Tensor], peer: tuple[Tensor, Tensor]) -> str:
        masks = torch.stack([ours[1][label - 1] == number for label, number in places])
        images, other = torch.equal(ours[0], peer[0]), int((masks != peer[1].bool()).any((1, 2)).sum())
        return f"{'same' if images else 'OTHER'} image; {len(places) - other} of {len(places)} masks the same, pixel by pixel"

    return Pair(lambda: augment(image, label_maps, recipe, SEED), augment_stack, compare)


def rows() -> list[Row]:
    ours, peer, identical = seconds_in_turn(label_maps_and_stack(), repeats=2)
    note = f"recipe {RECIPE}, every part applied, {SIDE_PX} px, {CELLS} drawn cells; peer: a tv_tensors.Mask of each cell, uint8"
    pair = "bench.augmentation:label_maps_and_stack"
    ours_mb, peer_mb = (megabytes(pair, side) for side in Pair._fields[:2])
    return [
        Row("augmentation: time", ours, peer, "s", peer / ours, identical, f"goal 5x; {note}"),
        Row("augmentation: memory", ours_mb, peer_mb, "MB", peer_mb / ours_mb, identical, f"goal 10x; peak that one call adds; {note}"),
    ]
