"""The region proposal network, without the IoU matrix of all anchors and boxes."""

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

ANCHORS_PER_STRIP = 2**11  # anchors whose IoUs ``match_anchors`` holds at once
POSITIVE_FRACTION = 0.5  # of the sampled anchors, at most


@torch.no_grad()
def match_anchors(matcher: Matcher, boxes: Tensor, anchors: Tensor) -> Tensor:
    """Exactly the result of ``matcher(box_iou(boxes, anchors))`` (the tests compare them), without
    holding the full IoU matrix (matching of Ren et al., "Faster R-CNN", 2015).

    How it works: 1. Anchors are ordered row by row in each pyramid level, so a few thousand
    consecutive anchors cover a strip of the image. Only boxes that reach into the strip have an IoU
    above 0 with them. 2. A strip's IoUs give the best box of each of its anchors, and raise each
    box's highest IoU so far. 3. Low-quality rule: an anchor that has, for at least one box, the
    highest IoU of all anchors is matched to its own best box, even below the threshold. To find
    such anchors, the strips in which a box reached its highest IoU are searched again. 4. All
    others are matched by the thresholds.

    Args:
        matcher: torchvision's, with its thresholds.
        boxes: float32 [M, 4], x1, y1, x2, y2 px, all with a positive area.
        anchors: float [N, 4], the same, x1 <= x2, y1 <= y2, in any order (row by row is fastest).

    Returns:
        int64 [N], the index of each anchor's box, or ``matcher.BELOW_LOW_THRESHOLD``, or
        ``matcher.BETWEEN_THRESHOLDS``.
    """
    best_iou_of_anchor = boxes.new_zeros(len(anchors))
    best_box = torch.zeros_like(best_iou_of_anchor, dtype=torch.int64)
    best_iou_of_box = boxes.new_zeros(len(boxes))
    strips = []
    # On a GPU each strip launches about 50 kernels, so strips are longer (gain not measured).
    length = ANCHORS_PER_STRIP * (8 if anchors.is_cuda else 1)
    for first in range(0, len(anchors), length):
        strip = slice(first, first + length)
        start, end = anchors[strip, :2].amin(0), anchors[strip, 2:].amax(0)
        rows = torch.where(((boxes[:, :2] < end) & (boxes[:, 2:] > start)).all(1))[0]
        if len(rows):
            iou = box_iou(boxes[rows], anchors[strip])
            best_iou_of_anchor[strip], row = iou.max(0)
            best_box[strip] = rows[row] * (best_iou_of_anchor[strip] > 0)
            row_maxima = iou.amax(1)
            best_iou_of_box[rows] = best_iou_of_box[rows].maximum(row_maxima)
            strips.append((strip, rows, row_maxima))
    matched = best_iou_of_anchor >= matcher.high_threshold
    if matcher.allow_low_quality_matches:
        matched |= (best_iou_of_box == 0).any()  # for such a box all anchors tie
        for strip, rows, row_maxima in strips:
            rows = rows[row_maxima == best_iou_of_box[rows]]
            is_best = box_iou(boxes[rows], anchors[strip]) == best_iou_of_box[rows, None]
            matched[strip] |= is_best.any(0)
    below = best_iou_of_anchor < matcher.low_threshold
    unmatched = torch.where(below, matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS)
    return best_box.where(matched, unmatched)


def predictions_at(head: RPNHead, features: list[Tensor], sampled: Tensor) -> tuple[Tensor, Tensor]:
    """What ``head(features)`` predicts for the sampled anchors only, without computing the others
    (compared in ``tests/test_rpn.py``).

    How it works: 1. With d convolutions of 3 x 3, the prediction of the head at a pixel depends on
    the (2 d + 1) x (2 d + 1) features around it, zeros outside the map. 2. The index of an anchor
    gives its image, level, row and column. 3. The features around each anchor are gathered. 4. Each
    convolution, a product of 3 x 3 windows and weights, removes the outermost ring.

    Args:
        head: torchvision's (Ren et al., "Faster R-CNN", 2015).
        features: float [N, C, H, W] of each level.
        sampled: int64 [S], indices of anchors over all images in torchvision's order: by image,
            level, row, column, anchor of the pixel.

    Returns:
        Objectness logits float32 [S] and box deltas float32 [S, 4].
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
    rows, anchor = torch.arange(len(sampled), device=device), sampled % per_pixel
    objectness, deltas = (
        F.linear(around[:, 0, 0], last.weight.flatten(1), last.bias).float()
        for last in (head.cls_logits, head.bbox_pred)
    )
    return objectness[rows, anchor], deltas.unflatten(1, (-1, 4))[rows, anchor]


class LabelMapRPN(RegionProposalNetwork):
    """torchvision's region proposal network with the same losses and gradients in less memory and
    time, with seeded sampling and losses averaged over processes.

    Only a few hundred of an image's 10^5 anchors enter the losses, and proposals carry no gradient.
    So all anchors are predicted without an autograd graph, and the sampled ones again with a graph:
    no backward pass goes through the head at every pixel.
    """

    def __init__(self, config: RunConfig, anchor_generator: AnchorGenerator, head: nn.Module):
        training = config.rpn_pre_nms_top_n_train, config.rpn_post_nms_top_n_train
        testing = config.rpn_pre_nms_top_n_test, config.rpn_post_nms_top_n_test
        samples = config.rpn_batch_size_per_image, POSITIVE_FRACTION
        matching = config.rpn_fg_iou_thresh, config.rpn_bg_iou_thresh
        top_n = ({"training": n, "testing": m} for n, m in zip(training, testing, strict=True))
        nms_thresh = config.rpn_nms_thresh
        super().__init__(anchor_generator, head, *matching, *samples, *top_n, nms_thresh)
        self.fg_bg_sampler = SeededSampler(*samples)

    def forward(self, images, features, targets=None):
        features = list(features.values())
        # Anchors take the type of these maps: in bfloat16 they would be off by whole pixels.
        grids = [level.new_empty(0, *level.shape[2:], dtype=torch.float32) for level in features]
        anchors = self.anchor_generator(images, grids)
        # Losses first: before pytorch's pull request 165068, autocast reused weights that it had
        # cast under no_grad, without a graph.
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
        """torchvision's two RPN losses, computed at the sampled anchors only."""
        labels, boxes = map(torch.cat, self.assign_targets_to_anchors(anchors, targets))
        chosen = self.fg_bg_sampler(labels.split([len(of_image) for of_image in anchors]))
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in chosen)
        sampled = torch.cat([positive, negative])
        objectness, deltas = predictions_at(self.head, features, sampled)
        true_deltas = self.box_coder.encode_single(boxes[positive], torch.cat(anchors)[positive])
        losses = {
            "loss_objectness": F.binary_cross_entropy_with_logits(
                objectness, labels[sampled], reduction="sum"
            ),
            "loss_rpn_box_reg": F.smooth_l1_loss(
                deltas[: len(positive)], true_deltas, beta=1 / 9, reduction="sum"
            ),
        }
        return {name: mean_over_processes(loss, len(sampled)) for name, loss in losses.items()}

    def assign_targets_to_anchors(self, anchors, targets):
        """As in torchvision, with ``match_anchors``: each anchor's label and box, by image."""
        labels, boxes = [], []
        for of_image, target in zip(anchors, targets, strict=True):
            matches = match_anchors(self.proposal_matcher, target["boxes"], of_image)
            labels.append((matches.clamp(max=0) + 1).float())  # 1 cell, 0 background, -1 unused
            one_more = F.pad(target["boxes"], (0, 0, 0, 1))  # an image may have no box
            boxes.append(one_more[matches.clamp(min=0)])
        return labels, boxes
