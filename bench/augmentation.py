"""The recipe ``full`` with every part of it applied: label maps against one mask a cell.

Both sides run the same transforms with the same random numbers on one image (uint8 [3, 1024, 1024]) of 300 drawn cells. Ours moves
4 label maps (int32 [4, H, W]), the peer a ``tv_tensors.Mask`` stack (uint8 [300, H, W]), as torchvision's own examples do.
"""

import copy

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from bench.measure import Pair, Row, megabytes, seconds_in_turn
from bench.scenes import dense_image, dense_label_maps
from cellseg_helpers.data.labels import find_instances
from cellseg_helpers.data.recipes import RECIPES, augment

RECIPE = "full"
CELLS, SIDE_PX = 300, 1024
SEED = 0


def always() -> list[v2.Transform]:
    """The recipe with probability 1 for each of its parts; which of several is taken stays drawn."""
    recipe = copy.deepcopy(RECIPES[RECIPE])
    for step in nn.ModuleList(recipe).modules():
        if isinstance(getattr(step, "p", None), float):
            step.p = 1.0
    return recipe


def label_maps_and_stack() -> Pair:
    maps = dense_label_maps(SIDE_PX, CELLS)
    image, label_maps = torch.from_numpy(dense_image(maps)), torch.from_numpy(maps)
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
