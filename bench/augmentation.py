"""The recipe ``full`` with every part of it applied: to label maps, and to one mask a cell.

Both sides run the same transforms with the same random numbers on one image (uint8 [3, 1024, 1024])
of 300 drawn cells: ours on 4 label maps (int32 [4, H, W]), the peer on a ``tv_tensors.Mask`` stack
(uint8 [300, H, W]), as torchvision's own examples do.
"""

import copy

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from bench.measure import Pair, Row, side_by_side, time_and_memory, verdict
from bench.scenes import dense_scene, with_dense_masks
from cellseg_helpers.data.augment import RECIPES, augment
from cellseg_helpers.data.samples import make_target

Sample = tuple[Tensor, Tensor]  # image, and label maps or masks
RECIPE, CELLS, SIDE_PX = "full", 300, 1024
DRAWN = {  # seed, and which parts of the recipe it draws
    "elastic": (5, "hue, saturation, elastic distortion, turned by 90 degrees"),
    "grid": (3, "brightness, contrast, grid distortion, turned by 270 degrees"),
}


def label_maps_and_stack(seed: int) -> Pair:
    image, label_maps = dense_scene(SIDE_PX, CELLS)
    target = make_target(label_maps)
    stack = with_dense_masks(target)["masks"]
    recipe = copy.deepcopy(RECIPES[RECIPE])
    for step in nn.ModuleList(recipe).modules():
        if isinstance(getattr(step, "p", None), float):
            step.p = 1.0  # the choice of one part, and the turns, stay random

    def augment_stack() -> Sample:
        torch.manual_seed(seed)
        return v2.Compose(recipe)(tv_tensors.Image(image), tv_tensors.Mask(stack))

    def compare(ours: Sample, peer: Sample) -> str:
        (our_image, our_maps), (their_image, their_stack) = ours, peer
        alike = torch.equal(our_image, their_image)
        our_stack = with_dense_masks(target | {"label_maps": our_maps})["masks"]
        same = int((our_stack == their_stack).all((1, 2)).sum())
        found = f"image {'the same' if alike else 'other'}, {same} of {len(stack)} masks the same"
        return verdict(alike and same == len(stack), f"{found}, pixel by pixel")

    return Pair(lambda: augment(image, label_maps, recipe, seed), augment_stack, compare)


def rows() -> list[Row]:
    table = []
    for name, (seed, parts) in DRAWN.items():
        note = f"recipe {RECIPE}, every part applied: {parts}; {SIDE_PX} px, {CELLS} drawn cells; "
        note += "peer: a tv_tensors.Mask of each cell, uint8"
        measured = side_by_side(label_maps_and_stack, seed, repeats=1)
        table += time_and_memory(f"augmentation, {name}", measured, note, "goal 5x", "goal 10x")
    return table
