"""The recipe ``full`` with every part of it applied: label maps against one mask a cell.

Both sides run the same transforms with the same random numbers on one image (uint8 [3, 1024, 1024])
of 300 drawn cells. Ours moves 4 label maps (int32 [4, H, W]), the peer a ``tv_tensors.Mask`` stack
(uint8 [300, H, W]), as torchvision's own examples do.
"""

import copy

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from bench.measure import Pair, Row, side_by_side, time_and_memory, verdict
from bench.scenes import dense_image, dense_label_maps
from cellseg_helpers.data.augment import RECIPES, augment
from cellseg_helpers.data.labels import find_instances

Sample = tuple[Tensor, Tensor]  # image, and label maps or masks
RECIPE = "full"
CELLS, SIDE_PX = 300, 1024
DRAWN = {
    "elastic": (5, "hue, saturation, elastic distortion, turned by 90 degrees"),
    "grid": (3, "brightness, contrast, grid distortion, turned by 270 degrees"),
}  # seed, and what it draws of the recipe


def always() -> list[v2.Transform]:
    """The recipe with probability 1 for each of its parts; which of several is taken, and how often
    to turn, stays drawn.
    """
    recipe = copy.deepcopy(RECIPES[RECIPE])
    for step in nn.ModuleList(recipe).modules():
        if isinstance(getattr(step, "p", None), float):
            step.p = 1.0
    return recipe


def label_maps_and_stack(seed: int) -> Pair:
    maps = dense_label_maps(SIDE_PX, CELLS)
    image, label_maps = torch.from_numpy(dense_image(maps)), torch.from_numpy(maps)
    cells = find_instances(label_maps.numpy())
    places = list(zip(cells.labels.tolist(), cells.ids.tolist(), strict=True))
    stack = torch.stack([label_maps[label - 1] == number for label, number in places]).to(
        torch.uint8
    )
    recipe = always()

    def augment_stack() -> Sample:
        torch.manual_seed(seed)
        return v2.Compose(recipe)(tv_tensors.Image(image), tv_tensors.Mask(stack))

    def compare(ours: Sample, peer: Sample) -> str:
        (our_image, our_maps), (their_image, their_stack) = ours, peer
        alike = torch.equal(our_image, their_image)
        same = sum(
            torch.equal(our_maps[label - 1] == number, mask.bool())
            for (label, number), mask in zip(places, their_stack, strict=True)
        )
        found = f"image {'the same' if alike else 'other'}, {same} of {len(places)} masks the same, pixel by pixel"
        return verdict(alike and same == len(places), found)

    return Pair(lambda: augment(image, label_maps, recipe, seed), augment_stack, compare)


def rows() -> list[Row]:
    table = []
    for name, (seed, parts) in DRAWN.items():
        note = (
            f"recipe {RECIPE}, every part applied: {parts}; {SIDE_PX} px, {CELLS} drawn cells; peer: a tv_tensors.Mask of each "
            "cell, uint8"
        )
        measured = side_by_side(label_maps_and_stack, seed, repeats=1)
        table += time_and_memory(
            f"augmentation, {name}", measured, f"goal 5x; {note}", f"goal 10x; {note}"
        )
    return table
