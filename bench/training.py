"""Training on a dense image: mask targets, matching of anchors, RoIAlign, and a whole step, beside
torchvision's Mask R-CNN.

Both sides have the same weights, anchors, proposals, samples and losses; torchvision takes a dense
mask for each cell.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, box_iou, clip_boxes_to_image

from bench.measure import Call, Pair, Row, row, side_by_side, time_and_memory, verdict
from bench.scenes import MASK_SIDE, dense_scene, with_dense_masks
from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.drawn import draw_tissue
from cellseg_helpers.data.samples import make_target
from cellseg_helpers.engine import to_device
from cellseg_helpers.model.anchors import fit_anchor_sizes
from cellseg_helpers.model.build import build_model
from cellseg_helpers.model.heads import SeededSampler, mask_targets
from cellseg_helpers.model.roi_align import GatherRoIAlign
from study.runs import settings as study_settings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDE_PX, CELLS, FEW_CELLS, POSITIVES = 1024, 772, 5, 512
SIZE = (SIDE_PX, SIDE_PX)
SIDES = [SIDE_PX // stride for stride in (4, 8, 16, 32, 64)]  # of the pyramid's levels
CHUNK = 2**14  # anchors
TOLERANCE = 1e-4
AS_TORCHVISION = {  # settings of ours
    "rpn_pre_nms_top_n_train": 2000, "rpn_post_nms_top_n_train": 2000,
    "box_batch_size_per_image": 512, "mask_batch_size_per_image": 0, "backbone": "resnet50",
}  # fmt: skip
SCENE = f"{CELLS} drawn cells, {SIDE_PX} px"
MASKS_MB = CELLS * SIDE_PX**2 / 1e6  # of the peer's dense masks, uint8
LEAST_DIFFERENCE_MB = 50  # of two peaks of some GB
SEED = 7
DEFAULTS = RunConfig()


def scene(cells: int = CELLS) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch of one image, as ours takes it: images (float32 [3, H, W], 0..1) and targets."""
    image, label_maps = dense_scene(SIDE_PX, cells)
    return to_device([image], [make_target(label_maps) | {"seed": SEED}], DEVICE)


def boxes_near_cells(target: dict[str, Tensor], count: int, spread_px: float = 3) -> list[Tensor]:
    """Random cells int64 [count], repeats included, and a box float32 [count, 4] px near each."""
    rng = torch.Generator().manual_seed(0)
    match = torch.randint(len(target["boxes"]), (count,), generator=rng).to(DEVICE)
    shifts = torch.randn(count, 2, generator=rng).repeat(1, 2).to(DEVICE)
    return [match, clip_boxes_to_image(target["boxes"][match] + spread_px * shifts, SIZE)]


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """A verdict: the largest difference must stay under ``TOLERANCE`` of the largest value."""
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    largest = max(other.abs().max().item() for other in theirs)
    found = f"max difference {difference:.0e} in values up to {largest:.0f}"
    return verdict(difference < TOLERANCE * largest, found)


def targets_of_boxes() -> Pair:
    """Mask targets of boxes near cells; the peer's dense masks are made before the call."""
    _, [target] = scene()
    masks = with_dense_masks(target)["masks"]
    match, boxes = boxes_near_cells(target, POSITIVES)
    cells = (target["labels"][match], target["ids"][match], boxes)
    return Pair(
        lambda: [mask_targets(target["label_maps"], *cells, MASK_SIDE)],
        lambda: [project_masks_on_boxes(masks, boxes, match, MASK_SIDE)],
        largest_difference,
        DEVICE.type,
    )


def roi_align() -> Pair:
    """RoIAlign of boxes near cells on the CPU, as for the box head: the pooled values and each
    level's gradient.
    """
    _, [target] = scene()
    boxes = boxes_near_cells(target, POSITIVES)[1].cpu()
    rng = torch.Generator().manual_seed(0)
    levels = {str(side): torch.randn(1, 256, side, side, generator=rng) for side in SIDES[:4]}
    upstream = torch.randn(POSITIVES, 256, 7, 7, generator=rng)

    def pool_by(kind: type[MultiScaleRoIAlign]) -> list[Tensor]:
        features = {name: level.clone().requires_grad_() for name, level in levels.items()}
        pooled = kind(list(levels), 7, 2)(features, [boxes], [SIZE])
        pooled.backward(upstream)
        return [pooled.detach(), *(level.grad for level in features.values())]

    sides = (partial(pool_by, kind) for kind in (GatherRoIAlign, MultiScaleRoIAlign))
    return Pair(*sides, largest_difference)


def anchor_matches(config: RunConfig = DEFAULTS, iou: Callable = box_iou) -> Pair:
    """Labels and cells of all anchors; ``iou`` gives the peer its matrix, [cells, anchors]."""
    shapes = {"anchor_sizes": config.anchor_sizes, "anchor_ratios": config.anchor_ratios}
    rpn = build_model(RunConfig(**shapes)).rpn
    rpn.box_similarity = iou
    features = [torch.zeros(1, 1, side, side, device=DEVICE) for side in SIDES]
    placed = rpn.anchor_generator(ImageList(torch.zeros(1, 3, *SIZE), [SIZE]), features)
    _, targets = scene()

    def compare(ours: tuple, theirs: tuple) -> str:
        (labels,), (boxes,), (their_labels,), (their_boxes,) = *ours, *theirs
        same = (labels == their_labels) & (boxes == their_boxes).all(1)
        return verdict(bool(same.all()), f"same matches of {same.sum()} of {len(same)} anchors")

    return Pair(
        lambda: rpn.assign_targets_to_anchors(placed, targets),
        lambda: RegionProposalNetwork.assign_targets_to_anchors(rpn, placed, targets),
        compare,
        DEVICE.type,
    )


def iou_in_chunks(boxes: Tensor, anchors: Tensor) -> Tensor:
    """``box_iou(boxes, anchors)`` [M, N], without the temporaries that are 8 times as large."""
    iou = boxes.new_empty(len(boxes), len(anchors))
    for columns, chunk in zip(iou.split(CHUNK, 1), anchors.split(CHUNK), strict=True):
        columns.copy_(box_iou(boxes, chunk))
    return iou


def our_model() -> nn.Module:
    """A Mask R-CNN of the package, ResNet-50, that samples as torchvision's does."""
    torch.manual_seed(0)
    return build_model(RunConfig(**AS_TORCHVISION)).to(DEVICE).train()


def give_images(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Have the model's backbone take its images in this order of memory, whatever their size."""
    model.backbone.register_forward_pre_hook(
        lambda backbone, inputs: inputs[0].contiguous(memory_format=memory_format)
    )


def torchvision_model() -> nn.Module:
    """torchvision's own, of the same weights and anchors, without its resizing."""
    anchors = build_model(DEFAULTS).rpn.anchor_generator
    torch.manual_seed(0)
    settings = {"weights": None, "weights_backbone": None, "num_classes": len(CLASS_NAMES) + 1}
    model = maskrcnn_resnet50_fpn(rpn_anchor_generator=anchors, _skip_resize=True, **settings)
    return model.to(DEVICE).train()


def step(cells: int) -> Pair:
    """Forward, backward and SGD step on one image; the peer's dense masks are made before the call.

    Both RPNs make their proposals, but the same boxes go on to both models' heads: of two boxes
    that overlap, a rounding decides which one is left. On a GPU convolutions are without TF32,
    whose 11 bits would move the losses.
    """
    torch.backends.cudnn.allow_tf32 = False
    images, targets = scene(cells)
    ours, theirs = our_model(), torchvision_model()
    count = AS_TORCHVISION["rpn_post_nms_top_n_train"]
    _, proposals = boxes_near_cells(targets[0], count, spread_px=10)
    for model in (ours, theirs):
        model.rpn.register_forward_hook(lambda module, inputs, output: ([proposals], output[1]))
    for part in (theirs.rpn, theirs.roi_heads):
        old = part.fg_bg_sampler
        part.fg_bg_sampler = SeededSampler(old.batch_size_per_image, old.positive_fraction)
        part.fg_bg_sampler.seeds = [SEED]

    def compare(ours: dict[str, float], theirs: dict[str, float]) -> str:
        difference = max(abs(ours[name] - loss) / loss for name, loss in theirs.items())
        found = f"{len(theirs)} losses, largest relative difference {difference:.0e}"
        return verdict(difference < TOLERANCE, found)

    steps = stepper(ours, images, targets), stepper(theirs, images, [with_dense_masks(targets[0])])
    return Pair(*steps, compare, DEVICE.type)


def own_step() -> Pair:
    """A step of ``params/own.yaml``'s model on two crops, beside torchvision's Mask R-CNN with a
    ResNet-18 and as many boxes sampled for its heads. They are different models.
    """
    config = RunConfig.from_yaml("params/sample.yaml", "params/own.yaml")
    crops = [
        draw_tissue(np.random.default_rng(seed), *[config.crop_size_px] * 2) for seed in (0, 1)
    ]
    images, targets = to_device(
        [torch.from_numpy(image) for image, _ in crops],
        [make_target(torch.from_numpy(label_maps)) for _, label_maps in crops],
        DEVICE,
    )
    boxes, labels = (torch.cat([target[k] for target in targets]) for k in ("boxes", "labels"))
    sizes = fit_anchor_sizes(boxes.cpu().numpy(), labels.cpu().numpy(), config.anchor_ratios)
    ours = build_model(replace(config, anchor_sizes=sizes, weights="none"))
    theirs = MaskRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5),
        num_classes=len(CLASS_NAMES) + 1,
        rpn_anchor_generator=build_model(DEFAULTS).rpn.anchor_generator,
        box_batch_size_per_image=config.box_batch_size_per_image,
        _skip_resize=True,
    )
    steps = (
        stepper(ours.to(DEVICE).train(), images, targets),
        stepper(theirs.to(DEVICE).train(), images, [with_dense_masks(each) for each in targets]),
    )
    return Pair(*steps, lambda *losses: "not compared: different models", DEVICE.type)


def stepper(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]):
    """A function that takes a step of SGD and gives the losses by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def take_step() -> dict[str, float]:
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}

    return take_step


def rows() -> list[Row]:
    repeats, steps = (5, 5) if DEVICE.type == "cuda" else (3, 2)
    note = f"{POSITIVES} boxes, {SCENE}; project_masks_on_boxes, without making its masks "
    note += f"({MASKS_MB:.0f} MB)"
    measured = side_by_side(targets_of_boxes, repeats=repeats)
    table = time_and_memory("mask targets", measured, note, "goal: not slower", "goal 20x")

    note = f"three ratios, {SCENE}; torchvision's assign_targets_to_anchors; one after a warm-up"
    three = side_by_side(anchor_matches, repeats=1)
    table += time_and_memory("matching, three ratios", three, note)
    report_a = study_settings("a/resnet101", "full", "drawn", 0)
    call = {"repeats": repeats, "repeat_peer": False}
    eight, oracle, identical = side_by_side(anchor_matches, report_a, iou_in_chunks, **call)
    anchors = len(report_a.anchor_ratios) * sum(side**2 for side in SIDES)
    note = f"eight ratios, report A's anchors, {SCENE}; torchvision's own is too large to measure "
    note += f"({4e-9 * CELLS * anchors:.1f} GB of IoUs, on the way to them 8 times that); same "
    note += "matches as its Matcher's on the matrix filled chunk by chunk "
    note += f"({oracle.seconds:.1f} s, {oracle.megabytes:.0f} MB)"
    bounded = "goal: same matches, memory bounded by a chunk; "
    bounded += f"{three[0].megabytes:.0f} MB at three ratios"
    without_peer = (eight, Call(), identical)
    table += time_and_memory("matching, eight ratios", without_peer, note, peak_goal=bounded)

    note = f"CPU, {POSITIVES} boxes, 256 channels, pyramid of {SIDE_PX} px, 7 x 7 bins; "
    note += "torchvision's MultiScaleRoIAlign"
    measured = side_by_side(roi_align, repeats=repeats)
    table += time_and_memory("RoIAlign, forward and backward", measured, note)
    return table + rows_of_steps(steps)


def rows_of_steps(steps: int) -> list[Row]:
    ours, peer, identical = side_by_side(step, CELLS, repeats=steps)
    our_few, peer_few, _ = side_by_side(step, FEW_CELLS, repeats=0)
    ours_mb, peer_mb = ours.megabytes - our_few.megabytes, peer.megabytes - peer_few.megabytes
    note = f"goal 2.5x; ResNet-50, {SCENE}, SGD; {steps} timed after a warm-up; "
    note += "maskrcnn_resnet50_fpn without its resizing, channels first as it comes, ours last"
    note += ", both without TF32" if DEVICE.type == "cuda" else ""
    memory_note = (
        f"goal 3x; peak of a step with {CELLS} cells above that with {FEW_CELLS}, without the "
        f"peer's dense masks ({MASKS_MB:.0f} MB): ours {ours.megabytes:.0f} - "
        f"{our_few.megabytes:.0f} MB, peer {peer.megabytes:.0f} - {peer_few.megabytes:.0f} MB; "
        f"in the ratio, less than {LEAST_DIFFERENCE_MB} MB counts as {LEAST_DIFFERENCE_MB}"
    )
    ours_own, peer_own, compared = side_by_side(own_step, repeats=5)
    own = (ours_own.seconds, peer_own.seconds, "s", compared)
    own_note = "goal 3x; ResNet-18, batch of 2 at 256 px, 128 boxes an image for the heads; five "
    own_note += "timed after a warm-up; torchvision's MaskRCNN, anchors 8 to 128 px, three ratios"
    memory = (max(ours_mb, LEAST_DIFFERENCE_MB), peer_mb, "MB", identical, memory_note)
    return [
        row("training step: time", ours.seconds, peer.seconds, "s", identical, note),
        row("training step: memory", *memory) | {"ours": ours_mb},
        row("training step of params/own.yaml: time", *own, own_note),
    ]
