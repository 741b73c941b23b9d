"""The recipe ``full`` with every part of it applied: label maps against one mask a cell.

Both sides run the same transforms with the same random numbers on one image (uint8 [3, 1024, 1024]) of 300 drawn cells, with two
seeds one after the other. Ours moves 4 label maps (int32 [4, H, W]), the peer a ``tv_tensors.Mask`` stack (uint8 [300, H, W]), as
torchvision's own examples do.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from bench.measure import Pair, Row, both_megabytes, seconds_in_turn, times_less, verdict
from bench.scenes import dense_image, dense_label_maps
from cellseg_helpers.data.labels import find_instances
from cellseg_helpers.data.recipes import RECIPES, augment

Sample = tuple[Tensor, Tensor]  # image, and label maps or masks
RECIPE = "full"
CELLS, SIDE_PX = 300, 1024
SEEDS = (5, 3)  # drawn: a quarter turn, jitter with hue and saturation, elastic distortion; three, the other jitter, the grid's


def always() -> list[v2.Transform]:
    """The recipe with probability 1 for each of its parts; which of several is taken, and how often to turn, stays drawn."""
    recipe = copy.deepcopy(RECIPES[RECIPE])
    for step in nn.ModuleList(recipe).modules():
        if isinstance(getattr(step, "p", None), float):
            step.p = 1.0
    return recipe


def label_maps_and_stack(samples_are_kept: bool = True) -> Pair:
    """Unless ``samples_are_kept``, a call drops each sample before it makes the next, so that its peak is that of the larger one."""
    maps = dense_label_maps(SIDE_PX, CELLS)
    image, label_maps = torch.from_numpy(dense_image(maps)), torch.from_numpy(maps)
    cells = find_instances(label_maps.numpy())
    places = list(zip(cells.labels.tolist(), cells.ids.tolist(), strict=True))
    stack = torch.stack([label_maps[label - 1] == number for label, number in places]).to(torch.uint8)
    recipe = always()

    def augment_stack(seed: int) -> Sample:
        torch.manual_seed(seed)
        return v2.Compose(recipe)(tv_tensors.Image(image), tv_tensors.Mask(stack))

    def compare(ours: list[Sample], peer: list[Sample]) -> str:
        images = same = 0
        for (our_image, our_maps), (their_image, their_stack) in zip(ours, peer, strict=True):
            images += torch.equal(our_image, their_image)
            for (label, number), mask in zip(places, their_stack, strict=True):
                same += torch.equal(our_maps[label - 1] == number, mask.bool())
        total = len(SEEDS) * len(places)
        found = f"{images} of {len(SEEDS)} images and {same} of {total} masks the same, pixel by pixel"
        return verdict(images == len(SEEDS) and same == total, found)

    def both_seeds(make: Callable[[int], Sample]) -> list[Sample]:
        samples = []
        for seed in SEEDS:
            samples.append(make(seed))
            if not samples_are_kept:
                samples.clear()
        return samples

    return Pair(
        lambda: both_seeds(lambda seed: augment(image, label_maps, recipe, seed)), lambda: both_seeds(augment_stack), compare
    )


one_sample_at_a_time = partial(label_maps_and_stack, samples_are_kept=False)


def rows() -> list[Row]:
    ours, peer, identical = seconds_in_turn(label_maps_and_stack(), repeats=1)
    parts = "every part applied: hue, saturation and elastic distortion, turned by 90 degrees; brightness, contrast and grid distortion, turned by 270"
    note = f"recipe {RECIPE}, {parts}; {SIDE_PX} px, {CELLS} drawn cells; peer: a tv_tensors.Mask of each cell, uint8"
    peak = "peak of the larger sample, dropped before the next"
    ours_mb, peer_mb = both_megabytes("bench.augmentation:one_sample_at_a_time")
    return [
        Row("augmentation: time", ours, peer, "s", times_less(ours, peer), identical, f"goal 5x; {note}"),
        Row("augmentation: memory", ours_mb, peer_mb, "MB", times_less(ours_mb, peer_mb), identical, f"goal 10x; {peak}; {note}"),
    ]
