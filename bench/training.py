"""Training on a dense image: mask targets, matching of anchors to cells, and a whole step, against torchvision's Mask R-CNN.

Both sides have the same weights, anchors, sampled proposals and losses; torchvision takes a dense mask for each cell.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import clip_boxes_to_image

from bench.measure import Pair, Row, megabytes, seconds, seconds_in_turn
from bench.scenes import MASK_SIDE, dense_image, dense_label_maps, dense_target, with_dense_masks
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.labels import CLASS_NAMES
from cellseg_helpers.model.build import build_model
from cellseg_helpers.model.roi_heads import SeededSampler, mask_targets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDE_PX, CELLS, FEW_CELLS, POSITIVES = 1024, 772, 5, 512
STRIDES = (4, 8, 16, 32, 64)
REPORT_A = {"anchor_sizes": (16, 32, 48, 64, 96), "anchor_ratios": (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)}
AS_TORCHVISION = {
    "rpn_pre_nms_top_n_train": 2000,
    "rpn_post_nms_top_n_train": 2000,
    "box_batch_size_per_image": 512,
    "mask_batch_size_per_image": 0,
}
SCENE = f"{CELLS} drawn cells, {SIDE_PX} px"
SEED = 7


def scene_target(cells: int) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in dense_target(dense_label_maps(SIDE_PX, cells)).items()}


def targets_of_boxes(masks_are_there: bool = True) -> Pair:
    """Mask targets of boxes near cells; unless ``masks_are_there`` before the call, the peer's call makes the dense masks."""
    target = scene_target(CELLS)
    dense = with_dense_masks(target)["masks"] if masks_are_there else None
    rng = torch.Generator().manual_seed(0)
    match = torch.randint(CELLS, (POSITIVES,), generator=rng).to(DEVICE)
    moved = target["boxes"][match] + 3 * torch.randn(POSITIVES, 4, generator=rng).to(DEVICE)
    boxes = clip_boxes_to_image(moved, (SIDE_PX, SIDE_PX))

    def peer() -> Tensor:
        return project_masks_on_boxes(with_dense_masks(target)["masks"] if dense is None else dense, boxes, match, MASK_SIDE)

    return Pair(
        lambda: mask_targets(target["label_maps"], target["labels"][match], target["ids"][match], boxes, MASK_SIDE),
        peer,
        lambda ours, theirs: f"max difference {(ours - theirs).abs().max():.0e}",
    )


def anchor_matches(**anchors: tuple[float, ...]) -> Pair:
    """Labels and cells of all anchors of an image."""
    rpn = build_model(RunConfig(**anchors)).rpn
    features = [torch.zeros(1, 1, SIDE_PX // stride, SIDE_PX // stride, device=DEVICE) for stride in STRIDES]
    places = rpn.anchor_generator(ImageList(torch.zeros(1, 3, SIDE_PX, SIDE_PX), [(SIDE_PX, SIDE_PX)]), features)
    targets = [scene_target(CELLS)]

    def identical(ours: tuple, theirs: tuple) -> str:
        (labels,), (boxes,), (their_labels,), (their_boxes,) = *ours, *theirs
        same = (labels == their_labels) & (boxes == their_boxes).all(1)
        return f"same matches of {same.sum()} of {len(same)} anchors"

    return Pair(
        lambda: rpn.assign_targets_to_anchors(places, targets),
        lambda: RegionProposalNetwork.assign_targets_to_anchors(rpn, places, targets),
        identical,
    )


def paired_models(**settings: int) -> tuple[nn.Module, nn.Module]:
    """Ours, and torchvision's own with the same weights and anchors, spared its resizing to the size that images have."""
    torch.manual_seed(0)
    config = RunConfig(backbone="resnet50", **AS_TORCHVISION | settings)
    ours = build_model(config)
    theirs = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=len(CLASS_NAMES) + 1,
        rpn_anchor_generator=ours.rpn.anchor_generator,
        _skip_resize=True,
    )
    theirs.load_state_dict(ours.state_dict())
    return ours.to(DEVICE).train(), theirs.to(DEVICE).train()


def step(cells: int, masks_are_there: bool = True, **settings: int) -> Pair:
    """Forward, backward and SGD step on one image; ``masks_are_there`` as in ``targets_of_boxes``."""
    image = torch.from_numpy(dense_image(dense_label_maps(SIDE_PX, cells))).to(DEVICE) / 255
    target = scene_target(cells)
    dense = with_dense_masks(target) if masks_are_there else None
    ours, theirs = paired_models(**settings)
    for part in (theirs.rpn, theirs.roi_heads):
        part.fg_bg_sampler = SeededSampler(part.fg_bg_sampler.batch_size_per_image, part.fg_bg_sampler.positive_fraction)
        part.fg_bg_sampler.seeds = [SEED]
    our_step, their_step = stepper(ours, image), stepper(theirs, image)

    def identical(ours: dict[str, float], theirs: dict[str, float]) -> str:
        difference = max(abs(ours[name] - loss) / loss for name, loss in theirs.items())
        return f"{len(theirs)} losses, largest relative difference {difference:.0e}"

    return Pair(
        lambda: our_step(target | {"seed": SEED}),
        lambda: their_step(with_dense_masks(target) if dense is None else dense),
        identical,
    )


def stepper(model: nn.Module, image: Tensor) -> Callable[[dict[str, Tensor]], dict[str, float]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def take(target: dict[str, Tensor]) -> dict[str, float]:
        losses = model([image], [target])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}

    return take


targets_with_masks = partial(targets_of_boxes, masks_are_there=False)
step_of_many = partial(step, CELLS, masks_are_there=False)
step_of_few = partial(step, FEW_CELLS, masks_are_there=False)
matches_report_a = partial(anchor_matches, **REPORT_A)


def both_megabytes(pair: str) -> tuple[float, float]:
    return megabytes(f"bench.training:{pair}", "ours"), megabytes(f"bench.training:{pair}", "peer")


def rows() -> list[Row]:
    repeats, steps = (5, 5) if DEVICE.type == "cuda" else (3, 1)
    return [*rows_of_mask_targets(repeats), *rows_of_matching(repeats), *rows_of_steps(steps)]


def rows_of_mask_targets(repeats: int) -> list[Row]:
    ours, peer, alike = seconds_in_turn(targets_of_boxes(), repeats)
    ours_mb, peer_mb = both_megabytes("targets_with_masks")
    note = f"{POSITIVES} boxes, {SCENE}; project_masks_on_boxes"
    return [
        Row("mask targets: time", ours, peer, "s", peer / ours, alike, f"goal: not slower; {note}, without making its masks"),
        Row("mask targets: memory", ours_mb, peer_mb, "MB", peer_mb / ours_mb, alike, f"goal 20x; {note}, with its masks"),
    ]


def rows_of_matching(repeats: int) -> list[Row]:
    ours, peer, alike = seconds_in_turn(anchor_matches(), 1)
    ours_mb, peer_mb = both_megabytes("anchor_matches")
    note = f"3 anchors a place, {SCENE}; torchvision's assign_targets_to_anchors"
    many = matches_report_a()
    anchors = len(many.ours()[0][0])
    many_seconds = statistics.median(seconds(many.ours) for _ in range(repeats))
    too_large = f"peer not run: its IoUs alone are {4e-9 * CELLS * anchors:.1f} GB, on the way to them it holds 8 times that"
    many_note = f"8 anchors a place, as report A, {SCENE}; {too_large}"
    return [
        Row("matching: time", ours, peer, "s", peer / ours, alike, note),
        Row("matching: memory", ours_mb, peer_mb, "MB", peer_mb / ours_mb, alike, note),
        Row("matching, report A: time", many_seconds, math.nan, "s", math.nan, "", many_note),
    ]


def rows_of_steps(steps: int) -> list[Row]:
    ours, peer, alike = seconds_in_turn(step(CELLS), steps)
    fewer = RunConfig().mask_batch_size_per_image
    as_package = seconds(step(CELLS, mask_batch_size_per_image=fewer).ours)
    many, few = both_megabytes("step_of_many"), both_megabytes("step_of_few")
    ours_mb, peer_mb = many[0] - few[0], many[1] - few[1]
    note = f"goal 2.5x; ResNet-50, {SCENE}, SGD; {steps} timed after a warm-up; maskrcnn_resnet50_fpn without its resizing"
    unlike = f"the package's default: mask loss of {fewer} boxes an image; peer as above, of all positive boxes"
    memory = f"goal 3x; peak of a step with {CELLS} cells above that with {FEW_CELLS}, with the peer's dense masks"
    return [
        Row("training step: time", ours, peer, "s", peer / ours, alike, note),
        Row(
            "training step, mask loss of fewer boxes: time",
            as_package,
            peer,
            "s",
            peer / as_package,
            "not the same losses",
            unlike,
        ),
        Row("training step: memory", ours_mb, peer_mb, "MB", peer_mb / ours_mb, alike, memory),
    ]
