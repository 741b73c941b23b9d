"""The region proposal network: anchors matched without the matrix of all pairs, gradients taken
where anchors are sampled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)
from torchvision.ops import box_iou

from cellseg_helpers.model.heads import mean_over_processes

ANCHORS_PER_STRIP = 2**12
IOUS_PER_STRIP = 2**22
LONGER_ON_GPU = (
    8  # times: each strip launches some 50 kernels there; a guess, no GPU has measured it
)


@torch.no_grad()
def match_anchors(matcher: Matcher, boxes: Tensor, anchors: Tensor) -> Tensor:
    """``matcher(box_iou(boxes, anchors))``, its oracle: the same matches (Ren et al., "Faster
    R-CNN", 2015) without all IoUs' matrix.

    Anchors come row by row of each pyramid level, so some thousand in turn cover a strip of the
    image; boxes that do not reach into it have IoU 0 with all of them. An anchor's match needs only
    its own column of the matrix. The low-quality rule, by which anchor j keeps its best box,
    however poor, where ``IoU_ij = max_k IoU_ik`` for any box i, needs whole rows: these maxima are
    taken on the way, and then only the strips that hold one are searched for the anchors that reach
    it.

    Args:
        matcher: torchvision's, with its thresholds.
        boxes: float32 [M, 4], x1, y1, x2, y2 px, none of them without area.
        anchors: float [N, 4], likewise, in any order; x1 <= x2, y1 <= y2.

    Returns:
        int64 [N], the box of each anchor, or ``matcher.BELOW_LOW_THRESHOLD``, or
        ``matcher.BETWEEN_THRESHOLDS``.
    """
    best_iou, best_box = (
        boxes.new_zeros(len(anchors)),
        torch.zeros(len(anchors), dtype=torch.int64, device=boxes.device),
    )
    highest_iou = boxes.new_zeros(len(boxes))
    strips = []
    length = max(1, min(ANCHORS_PER_STRIP, IOUS_PER_STRIP // max(1, len(boxes)))) * (
        LONGER_ON_GPU if anchors.is_cuda else 1
    )
    for first in range(0, len(anchors), length):
        strip = slice(first, first + length)
        start, end = anchors[strip, :2].amin(0), anchors[strip, 2:].amax(0)
        rows = torch.where(((boxes[:, :2] < end) & (boxes[:, 2:] > start)).all(1))[0]
        if len(rows):
            iou = box_iou(boxes[rows], anchors[strip])
            best_iou[strip], row = iou.max(0)
            best_box[strip] = rows[row] * (best_iou[strip] > 0)
            row_maxima = iou.amax(1)
            highest_iou[rows] = highest_iou[rows].maximum(row_maxima)
            strips.append((strip, rows, row_maxima))
    kept = best_iou >= matcher.high_threshold
    if matcher.allow_low_quality_matches:
        kept |= (highest_iou == 0).any()  # a box out of every anchor's reach ties with all anchors
        for strip, rows, row_maxima in strips:
            rows = rows[row_maxima == highest_iou[rows]]
            kept[strip] |= (box_iou(boxes[rows], anchors[strip]) == highest_iou[rows, None]).any(0)
    below = best_iou < matcher.low_threshold
    return best_box.where(
        kept, torch.where(below, matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS)
    )


def predictions_at(head: RPNHead, features: list[Tensor], sampled: Tensor) -> tuple[Tensor, Tensor]:
    """``head(features)`` at some anchors alone; its oracle, in ``tests/test_rpn.py``.

    With d convolutions of 3 x 3, what the head (Ren et al., "Faster R-CNN", 2015) predicts at a
    place depends on the (2 d + 1) x (2 d + 1) features around it, zeros outside the map. These are
    gathered, and each convolution, as a product of windows and weights, takes one ring off them.

    Args:
        head: torchvision's.
        features: float [N, C, H, W] of each level.
        sampled: int64 [S], of all anchors of all images in torchvision's order: by image, level,
            row, column, anchor of the place.

    Returns:
        float32 [S], the objectness, a logit; float32 [S, 4], the box's deltas.
    """
    device, anchors_per_place = sampled.device, head.cls_logits.out_channels
    height, width = torch.tensor([level.shape[2:] for level in features], device=device).unbind(1)
    ends = (height * width).cumsum(0)
    image, place = (
        sampled // (anchors_per_place * ends[-1]),
        sampled % (anchors_per_place * ends[-1]) // anchors_per_place,
    )
    level = torch.bucketize(place, ends, right=True)
    before = (ends - height * width)[level]
    height, width = height[level, None, None], width[level, None, None]
    ring = torch.arange(-len(head.conv), len(head.conv) + 1, device=device)
    y = (place - before)[:, None, None] // width + ring[:, None]
    x = (place - before)[:, None, None] % width + ring
    inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width))[..., None]
    first_row = (before * len(features[0]))[:, None, None] + image[:, None, None] * height * width
    row = first_row + y.clamp(min=0).minimum(height - 1) * width + x.clamp(min=0).minimum(width - 1)
    around = F.embedding(
        row, torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in features])
    )
    for convolution, activation in head.conv:
        windows = (around * inside).unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)
        around = activation(F.linear(windows, convolution.weight.flatten(1), convolution.bias))
        inside = inside[:, 1:-1, 1:-1]
    each, anchor = torch.arange(len(sampled), device=device), sampled % anchors_per_place
    objectness, deltas = (
        F.linear(around[:, 0, 0], last.weight.flatten(1), last.bias)
        for last in (head.cls_logits, head.bbox_pred)
    )
    return objectness[each, anchor].float(), deltas.unflatten(1, (-1, 4))[each, anchor].float()


class LabelMapRPN(RegionProposalNetwork):
    """torchvision's region proposal network with seeded sampling and losses that are the same over
    any number of processes.

    Anchors and cells are matched without the matrix of all their pairs. Losses are of some hundred
    anchors of an image's 10^5, and proposals carry no gradient: so all anchors are predicted
    without a graph, and the sampled ones once more with one. The losses and gradients are
    torchvision's, without a backward pass through the head at every place, which on a large image
    is a seventh of a step's arithmetic.
    """

    def forward(self, images, features, targets=None):
        features = list(features.values())
        grids = [level.new_empty(0, *level.shape[2:], dtype=torch.float32) for level in features]
        anchors = self.anchor_generator(
            images, grids
        )  # in the features' bfloat16 they would be whole pixels off
        losses = self._losses(features, anchors, targets) if self.training else {}
        with torch.no_grad():  # after the losses: before pytorch's pull request 165068, autocast kept weights that it cast here
            objectness, deltas = self.head(features)
            counts = [level[0].numel() for level in objectness]
            objectness, deltas = concat_box_prediction_layers(objectness, deltas)
            proposals = self.box_coder.decode(deltas, anchors).view(len(anchors), -1, 4)
            boxes, _ = self.filter_proposals(proposals, objectness, images.image_sizes, counts)
        return boxes, losses

    def _losses(self, features, anchors, targets) -> dict[str, Tensor]:
        labels, boxes = self.assign_targets_to_anchors(anchors, targets)
        positive, negative = (
            torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels)
        )
        sampled = torch.cat([positive, negative])
        objectness, deltas = predictions_at(self.head, features, sampled)
        goals = self.box_coder.encode_single(
            torch.cat(boxes)[positive], torch.cat(anchors)[positive]
        )
        box_loss = F.smooth_l1_loss(deltas[: len(positive)], goals, beta=1 / 9, reduction="sum")
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness, torch.cat(labels)[sampled], reduction="sum"
        )
        return {
            "loss_objectness": mean_over_processes(objectness_loss, len(sampled)),
            "loss_rpn_box_reg": mean_over_processes(box_loss, len(sampled)),
        }

    def assign_targets_to_anchors(self, anchors, targets):
        labels, boxes = [], []
        for places, target in zip(anchors, targets, strict=True):
            if not len(target["boxes"]):
                labels.append(places.new_zeros(len(places), dtype=torch.float32))
                boxes.append(torch.zeros_like(places, dtype=torch.float32))
                continue
            matches = match_anchors(self.proposal_matcher, target["boxes"], places)
            labels.append(
                (matches.clamp(max=0) + 1).float()
            )  # 1 a cell, 0 background (-1), -1 neither (-2)
            boxes.append(target["boxes"][matches.clamp(min=0)])
        return labels, boxes
