"""The region proposal network, which matches anchors without the matrix of all pairs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)
from torchvision.ops import box_iou

from cellseg_helpers.config import RunConfig
from cellseg_helpers.model.heads import SeededSampler, mean_over_processes

ANCHORS_PER_STRIP = 2**11
POSITIVE_FRACTION = 0.5  # of the sampled anchors, at most


@torch.no_grad()
def match_anchors(matcher: Matcher, boxes: Tensor, anchors: Tensor) -> Tensor:
    """``matcher(box_iou(boxes, anchors))``, its oracle: the same matches (Ren et al., "Faster
    R-CNN", 2015) in bounded memory.

    How it works: 1. Anchors come row by row of each pyramid level, so some thousand in turn cover a
    strip of the image: only boxes that reach into it have an IoU above 0 with them. 2. Each strip's
    IoUs give its anchors their best boxes, and each box its best IoU so far. 3. By the low-quality
    rule an anchor also takes its best box where it has the highest IoU of all anchors with any box:
    the strips that hold such a highest IoU are searched once more. 4. The thresholds decide the
    rest.

    Args:
        matcher: torchvision's, with its thresholds.
        boxes: float32 [M, 4], x1, y1, x2, y2 px, none of them without area.
        anchors: float [N, 4], likewise, in any order; x1 <= x2, y1 <= y2.

    Returns:
        int64 [N], the box of each anchor, or ``matcher.BELOW_LOW_THRESHOLD``, or
        ``matcher.BETWEEN_THRESHOLDS``.
    """
    best_iou = boxes.new_zeros(len(anchors))
    best_box = torch.zeros_like(best_iou, dtype=torch.int64)
    highest_iou = boxes.new_zeros(len(boxes))
    strips = []
    # On a GPU each strip launches some 50 kernels: fewer, longer ones (gain not measured).
    length = ANCHORS_PER_STRIP * (8 if anchors.is_cuda else 1)
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
    matched = best_iou >= matcher.high_threshold
    if matcher.allow_low_quality_matches:
        matched |= (highest_iou == 0).any()  # a box that no anchor reaches ties with all anchors
        for strip, rows, row_maxima in strips:
            rows = rows[row_maxima == highest_iou[rows]]
            highest = box_iou(boxes[rows], anchors[strip]) == highest_iou[rows, None]
            matched[strip] |= highest.any(0)
    below = best_iou < matcher.low_threshold
    unmatched = torch.where(below, matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS)
    return best_box.where(matched, unmatched)


def predictions_at(head: RPNHead, features: list[Tensor], sampled: Tensor) -> tuple[Tensor, Tensor]:
    """``head(features)`` at some anchors alone; its oracle, in ``tests/test_rpn.py``.

    How it works: 1. With d convolutions of 3 x 3, what the head (Ren et al., "Faster R-CNN", 2015)
    predicts at a pixel depends on the (2 d + 1) x (2 d + 1) features around it, zeros outside the
    map. 2. The index of an anchor gives its image, level, row and column. 3. The features around
    are gathered. 4. Each convolution, a product of 3 x 3 windows and weights, takes one ring off.

    Args:
        head: torchvision's.
        features: float [N, C, H, W] of each level.
        sampled: int64 [S], indices of anchors over all images in torchvision's order: by image,
            level, row, column, anchor of the pixel.

    Returns:
        float32 [S], the objectness, a logit; float32 [S, 4], the box's deltas.
    """
    device, per_pixel = sampled.device, head.cls_logits.out_channels
    height, width = torch.tensor([level.shape[2:] for level in features], device=device).unbind(1)
    ends = (height * width).cumsum(0)
    image, pixel = sampled // per_pixel // ends[-1], sampled // per_pixel % ends[-1]
    level = torch.bucketize(pixel, ends, right=True)
    before = (ends - height * width)[level, None, None]
    height, width = height[level, None, None], width[level, None, None]
    ring = torch.arange(-len(head.conv), len(head.conv) + 1, device=device)
    y = (pixel[:, None, None] - before) // width + ring[:, None]
    x = (pixel[:, None, None] - before) % width + ring
    inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width))[..., None]
    first_row = before * len(features[0]) + image[:, None, None] * height * width
    row = first_row + y.clamp(min=0).minimum(height - 1) * width + x.clamp(min=0).minimum(width - 1)
    table = torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in features])
    around = F.embedding(row, table)
    for convolution, activation in head.conv:
        windows = (around * inside).unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)
        around = activation(F.linear(windows, convolution.weight.flatten(1), convolution.bias))
        inside = inside[:, 1:-1, 1:-1]
    each, anchor = torch.arange(len(sampled), device=device), sampled % per_pixel
    objectness, deltas = (
        F.linear(around[:, 0, 0], last.weight.flatten(1), last.bias).float()
        for last in (head.cls_logits, head.bbox_pred)
    )
    return objectness[each, anchor], deltas.unflatten(1, (-1, 4))[each, anchor]


class LabelMapRPN(RegionProposalNetwork):
    """torchvision's region proposal network: the same losses and gradients, in less memory and
    time, with seeded sampling, over any number of processes.

    Only some hundred of an image's 10^5 anchors enter the losses, and proposals carry no gradient.
    So all anchors are predicted without an autograd graph, and the sampled ones again with a graph:
    no backward pass goes through the head at every pixel.
    """

    def __init__(self, config: RunConfig, anchor_generator: AnchorGenerator, head: nn.Module):
        training = config.rpn_pre_nms_top_n_train, config.rpn_post_nms_top_n_train
        testing = config.rpn_pre_nms_top_n_test, config.rpn_post_nms_top_n_test
        samples = config.rpn_batch_size_per_image, POSITIVE_FRACTION
        super().__init__(
            *(anchor_generator, head, config.rpn_fg_iou_thresh, config.rpn_bg_iou_thresh, *samples),
            *({"training": n, "testing": m} for n, m in zip(training, testing, strict=True)),
            config.rpn_nms_thresh,
        )
        self.fg_bg_sampler = SeededSampler(*samples)

    def forward(self, images, features, targets=None):
        features = list(features.values())
        # Anchors take the features' type: in bfloat16 they would be whole pixels off.
        grids = [level.new_empty(0, *level.shape[2:], dtype=torch.float32) for level in features]
        anchors = self.anchor_generator(images, grids)
        # Losses first: before pytorch's pull request 165068, autocast reused weights that it had
        # cast without a graph.
        losses = self._losses(features, anchors, targets) if self.training else {}
        with torch.no_grad():
            objectness, deltas = self.head(features)
            counts = [level[0].numel() for level in objectness]
            objectness, deltas = concat_box_prediction_layers(objectness, deltas)
            proposals = self.box_coder.decode(deltas.float(), anchors).view(len(anchors), -1, 4)
            boxes, _ = self.filter_proposals(
                proposals, objectness.float(), images.image_sizes, counts
            )
        return boxes, losses

    def _losses(self, features, anchors, targets) -> dict[str, Tensor]:
        labels, boxes = map(torch.cat, self.assign_targets_to_anchors(anchors, targets))
        chosen = self.fg_bg_sampler(labels.split([len(of_image) for of_image in anchors]))
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in chosen)
        sampled = torch.cat([positive, negative])
        objectness, deltas = predictions_at(self.head, features, sampled)
        goals = self.box_coder.encode_single(boxes[positive], torch.cat(anchors)[positive])
        losses = {
            "loss_objectness": F.binary_cross_entropy_with_logits(
                objectness, labels[sampled], reduction="sum"
            ),
            "loss_rpn_box_reg": F.smooth_l1_loss(
                deltas[: len(positive)], goals, beta=1 / 9, reduction="sum"
            ),
        }
        return {name: mean_over_processes(loss, len(sampled)) for name, loss in losses.items()}

    def assign_targets_to_anchors(self, anchors, targets):
        labels, boxes = [], []
        for of_image, target in zip(anchors, targets, strict=True):
            matches = match_anchors(self.proposal_matcher, target["boxes"], of_image)
            labels.append((matches.clamp(max=0) + 1).float())  # 1 cell, 0 background, -1 neither
            one_more = F.pad(target["boxes"], (0, 0, 0, 1))  # an image may have no box
            boxes.append(one_more[matches.clamp(min=0)])
        return labels, boxes
