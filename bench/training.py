"""Training on a dense image: mask targets, matching of anchors, RoIAlign, and a whole step, against torchvision's Mask R-CNN.

Both sides have the same weights, anchors, proposals, samples and losses; torchvision takes a dense mask for each cell.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, box_iou, clip_boxes_to_image

from bench.measure import Pair, Row, both_megabytes, megabytes, seconds, seconds_in_turn, times_less, verdict
from bench.scenes import MASK_SIDE, dense_image, dense_label_maps, dense_target, with_dense_masks
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.labels import CLASS_NAMES
from cellseg_helpers.model.build import build_model
from cellseg_helpers.model.roi_align import GatherRoIAlign
from cellseg_helpers.model.roi_heads import SeededSampler, mask_targets
from cellseg_helpers.study import settings as study_settings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDE_PX, CELLS, FEW_CELLS, POSITIVES = 1024, 772, 5, 512
STRIDES = (4, 8, 16, 32, 64)
REPORT_A = study_settings("a/resnet101", "full", "drawn", 0)
CHUNK = 2**14  # anchors
TOLERANCE = 1e-4
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
    match, boxes = boxes_near_cells(target, POSITIVES)

    def peer() -> Tensor:
        return project_masks_on_boxes(with_dense_masks(target)["masks"] if dense is None else dense, boxes, match, MASK_SIDE)

    return Pair(
        lambda: mask_targets(target["label_maps"], target["labels"][match], target["ids"][match], boxes, MASK_SIDE),
        peer,
        lambda ours, theirs: largest_difference([ours], [theirs]),
        DEVICE.type,
    )


def boxes_near_cells(target: dict[str, Tensor], count: int, spread_px: float = 3) -> tuple[Tensor, Tensor]:
    """Cells int64 [``count``], some drawn more than once, and a box float32 [``count``, 4] px near each."""
    rng = torch.Generator().manual_seed(0)
    match = torch.randint(len(target["boxes"]), (count,), generator=rng).to(DEVICE)
    moved = target["boxes"][match] + spread_px * torch.randn(count, 2, generator=rng).repeat(1, 2).to(DEVICE)
    return match, clip_boxes_to_image(moved, (SIDE_PX, SIDE_PX))


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> str:
    difference = max((one - other).abs().max().item() for one, other in zip(ours, theirs, strict=True))
    largest = max(other.abs().max().item() for other in theirs)
    return verdict(difference < TOLERANCE * largest, f"max difference {difference:.0e} in values up to {largest:.0f}")


def roi_align() -> Pair:
    """RoIAlign of boxes near cells on the CPU, as for the box head: the pooled values and each level's gradient."""
    _, boxes = boxes_near_cells(scene_target(CELLS), POSITIVES)
    rng = torch.Generator().manual_seed(0)
    sides = [SIDE_PX // stride for stride in STRIDES[:4]]
    levels = {str(level): torch.randn(1, 256, side, side, generator=rng) for level, side in enumerate(sides)}
    upstream = torch.randn(POSITIVES, 256, 7, 7, generator=rng)

    def pool_by(kind: type[MultiScaleRoIAlign]) -> list[Tensor]:
        features = {name: level.clone().requires_grad_() for name, level in levels.items()}
        pooled = kind(list(levels), 7, 2)(features, [boxes.cpu()], [(SIDE_PX, SIDE_PX)])
        pooled.backward(upstream)
        return [pooled.detach(), *(level.grad for level in features.values())]

    return Pair(lambda: pool_by(GatherRoIAlign), lambda: pool_by(MultiScaleRoIAlign), largest_difference)


def anchor_matches(anchors: RunConfig = RunConfig(), iou: Callable[[Tensor, Tensor], Tensor] = box_iou) -> Pair:
    """Labels and cells of all anchors of an image; ``iou`` gives the peer its matrix, float32 [cells, anchors]."""
    rpn = build_model(RunConfig(anchor_sizes=anchors.anchor_sizes, anchor_ratios=anchors.anchor_ratios)).rpn
    rpn.box_similarity = iou
    features = [torch.zeros(1, 1, SIDE_PX // stride, SIDE_PX // stride, device=DEVICE) for stride in STRIDES]
    places = rpn.anchor_generator(ImageList(torch.zeros(1, 3, SIDE_PX, SIDE_PX), [(SIDE_PX, SIDE_PX)]), features)
    targets = [scene_target(CELLS)]

    def identical(ours: tuple, theirs: tuple) -> str:
        (labels,), (boxes,), (their_labels,), (their_boxes,) = *ours, *theirs
        same = (labels == their_labels) & (boxes == their_boxes).all(1)
        return verdict(bool(same.all()), f"same matches of {same.sum()} of {len(same)} anchors")

    return Pair(
        lambda: rpn.assign_targets_to_anchors(places, targets),
        lambda: RegionProposalNetwork.assign_targets_to_anchors(rpn, places, targets),
        identical,
        DEVICE.type,
    )


def iou_in_chunks(boxes: Tensor, anchors: Tensor) -> Tensor:
    """``box_iou(boxes, anchors)``, float32 [M, N], without the temporaries that are 8 times as large."""
    iou = torch.empty(len(boxes), len(anchors), device=boxes.device)
    for columns, chunk in zip(iou.split(CHUNK, 1), anchors.split(CHUNK), strict=True):
        columns.copy_(box_iou(boxes, chunk))
    return iou


def our_model() -> nn.Module:
    """A Mask R-CNN of the package, ResNet-50, that samples as torchvision's does."""
    torch.manual_seed(0)
    return build_model(RunConfig(backbone="resnet50", **AS_TORCHVISION)).to(DEVICE).train()


def give_images(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Have a package's model take its images in this order, whatever their size."""

    def batch_images(*args: Any, **named: Any) -> Tensor:
        return GeneralizedRCNNTransform.batch_images(model.transform, *args, **named).contiguous(memory_format=memory_format)

    model.transform.batch_images = batch_images


def torchvision_model() -> nn.Module:
    """torchvision's own, of the same weights and anchors, spared its resizing to the size that images have."""
    config = RunConfig()
    sizes = tuple((size,) for size in config.anchor_sizes)
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=len(CLASS_NAMES) + 1,
        rpn_anchor_generator=AnchorGenerator(sizes, (config.anchor_ratios,) * len(sizes)),
        _skip_resize=True,
    )
    return model.to(DEVICE).train()


def step(cells: int, masks_are_there: bool = True) -> Pair:
    """Forward, backward and SGD step on one image; ``masks_are_there`` as in ``targets_of_boxes``.

    Both RPNs make their proposals, but the same boxes go on to both models' heads: of two boxes that overlap, a rounding decides
    which one is left.
    """
    image = torch.from_numpy(dense_image(dense_label_maps(SIDE_PX, cells))).to(DEVICE) / 255
    target = scene_target(cells)
    dense = with_dense_masks(target) if masks_are_there else None
    ours, theirs = our_model(), torchvision_model()
    proposals = boxes_near_cells(target, AS_TORCHVISION["rpn_post_nms_top_n_train"], spread_px=10)[1]
    for model in (ours, theirs):
        model.rpn.register_forward_hook(lambda module, inputs, output: ([proposals], output[1]))
    for part in (theirs.rpn, theirs.roi_heads):
        part.fg_bg_sampler = SeededSampler(part.fg_bg_sampler.batch_size_per_image, part.fg_bg_sampler.positive_fraction)
        part.fg_bg_sampler.seeds = [SEED]
    our_step, their_step = stepper(ours, image), stepper(theirs, image)

    def identical(ours: dict[str, float], theirs: dict[str, float]) -> str:
        difference = max(abs(ours[name] - loss) / loss for name, loss in theirs.items())
        return verdict(difference < TOLERANCE, f"{len(theirs)} losses, largest relative difference {difference:.0e}")

    return Pair(
        lambda: our_step(target | {"seed": SEED}),
        lambda: their_step(with_dense_masks(target) if dense is None else dense),
        identical,
        DEVICE.type,
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
matches_of_eight_ratios = partial(anchor_matches, REPORT_A, iou_in_chunks)


def rows() -> list[Row]:
    repeats, steps = (5, 5) if DEVICE.type == "cuda" else (3, 2)
    return [*rows_of_mask_targets(repeats), *rows_of_matching(repeats), row_of_roi_align(repeats), *rows_of_steps(steps)]


def rows_of_mask_targets(repeats: int) -> list[Row]:
    ours, peer, alike = seconds_in_turn(targets_of_boxes(), repeats)
    ours_mb, peer_mb = both_megabytes("bench.training:targets_with_masks")
    note = f"{POSITIVES} boxes, {SCENE}; project_masks_on_boxes"
    time, memory = f"goal: not slower; {note}, without making its masks", f"goal 20x; {note}, with its masks"
    return [
        Row("mask targets: time", ours, peer, "s", times_less(ours, peer), alike, time),
        Row("mask targets: memory", ours_mb, peer_mb, "MB", times_less(ours_mb, peer_mb), alike, memory),
    ]


def rows_of_matching(repeats: int) -> list[Row]:
    ours, peer, alike = seconds_in_turn(anchor_matches(), 1)
    ours_mb, peer_mb = both_megabytes("bench.training:anchor_matches")
    eight = matches_of_eight_ratios()
    matched = eight.ours()
    alike_eight = eight.identical(matched, eight.peer())
    anchors = len(matched[0][0])
    eight_mb = megabytes("bench.training:matches_of_eight_ratios", "ours")
    eight_seconds = statistics.median(seconds(eight.ours) for _ in range(repeats))
    note = f"three ratios, {SCENE}; torchvision's assign_targets_to_anchors; one timed after a warm-up"
    matrix = f"{4e-9 * CELLS * anchors:.1f} GB of IoUs alone, on the way to them 8 times that"
    oracle = f"peer too large to measure ({matrix}); same matches as torchvision's Matcher on the matrix filled chunk by chunk"
    eight_note = f"eight ratios, report A's anchors, {SCENE}; {oracle}"
    bounded = f"goal: same matches, memory bounded by a chunk; {ours_mb:.0f} MB at three ratios; {eight_note}"
    return [
        Row("matching, three ratios: time", ours, peer, "s", times_less(ours, peer), alike, note),
        Row("matching, three ratios: memory", ours_mb, peer_mb, "MB", times_less(ours_mb, peer_mb), alike, note),
        Row("matching, eight ratios: time", eight_seconds, math.nan, "s", math.nan, alike_eight, eight_note),
        Row("matching, eight ratios: memory", eight_mb, math.nan, "MB", math.nan, alike_eight, bounded),
    ]


def row_of_roi_align(repeats: int) -> Row:
    ours, peer, alike = seconds_in_turn(roi_align(), repeats)
    note = f"CPU, {POSITIVES} boxes, 256 channels, pyramid of {SIDE_PX} px, 7 x 7 bins; torchvision's MultiScaleRoIAlign"
    return Row("RoIAlign: forward and backward", ours, peer, "s", times_less(ours, peer), alike, note)


def rows_of_steps(steps: int) -> list[Row]:
    ours, peer, alike = seconds_in_turn(step(CELLS), steps)
    few, many = both_megabytes("bench.training:step_of_few"), both_megabytes("bench.training:step_of_many")
    ours_mb, peer_mb = many[0] - few[0], many[1] - few[1]
    note = f"goal 2.5x; ResNet-50, {SCENE}, SGD; {steps} timed after a warm-up; maskrcnn_resnet50_fpn without its resizing, channels first as it comes, ours last"
    peaks = f"ours {many[0]:.0f} - {few[0]:.0f} MB, peer {many[1]:.0f} - {few[1]:.0f} MB"
    memory = f"goal 3x; peak of a step with {CELLS} cells above that with {FEW_CELLS}, with the peer's dense masks: {peaks}"
    return [
        Row("training step: time", ours, peer, "s", times_less(ours, peer), alike, note),
        Row("training step: memory", ours_mb, peer_mb, "MB", times_less(ours_mb, peer_mb), alike, memory),
    ]
