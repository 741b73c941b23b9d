"""The region proposal network: anchors matched without the matrix of all pairs, gradients taken where anchors are sampled."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import box_iou

from cellseg_helpers.model.roi_heads import mean_over_processes

ANCHORS_PER_STRIP = 2**12


@torch.no_grad()
def match_anchors(matcher: Matcher, boxes: Tensor, anchors: Tensor) -> Tensor:
    """``matcher(box_iou(boxes, anchors))``, the same matches without the matrix of all IoUs.

    Anchors come row by row of each pyramid level, so some thousand in turn cover a strip of the image; boxes that do not reach
    into it have IoU 0 with all of them. An anchor's match needs only its own column of the matrix. The low-quality rule, by
    which anchor j keeps its best box, however poor, where ``IoU_ij = max_k IoU_ik`` for any box i, needs whole rows: these
    maxima are taken on the way, and then only the strips that hold one are searched for the anchors that reach it.

    Args:
        matcher: torchvision's, with its thresholds.
        boxes: float32 [M, 4], x1, y1, x2, y2 px, none of them without area.
        anchors: float [N, 4], likewise, in any order; x1 <= x2, y1 <= y2.

    Returns:
        int64 [N], the box of each anchor, or ``matcher.BELOW_LOW_THRESHOLD``, or ``matcher.BETWEEN_THRESHOLDS``.
    """
    best_iou, best_box = boxes.new_zeros(len(anchors)), torch.zeros(len(anchors), dtype=torch.int64, device=boxes.device)
    highest_iou = boxes.new_zeros(len(boxes))
    strips = []
    length = ANCHORS_PER_STRIP * (1 if boxes.device.type == "cpu" else 8)  # a GPU's time goes into starting kernels
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
    return best_box.where(kept, torch.where(below, matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS))


def predictions_at(head: RPNHead, features: list[Tensor], sampled: Tensor) -> tuple[Tensor, Tensor]:
    """``head(features)`` at some anchors, its convolutions taken around their places alone.

    A prediction of a head of d 3 x 3 convolutions depends on the (2 d + 1) x (2 d + 1) features around its place, zeros outside the
    map. These are gathered, and every convolution takes one ring off them.

    Args:
        head: torchvision's.
        features: float [N, C, H, W] of each level.
        sampled: int64 [S], of all anchors of all images in torchvision's order: by image, level, row, column, anchor of the place.

    Returns:
        float32 [S], the objectness, a logit; float32 [S, 4], the box's deltas.
    """
    anchors_per_place = head.cls_logits.out_channels
    counts = [anchors_per_place * level.shape[2] * level.shape[3] for level in features]
    image, place = sampled // sum(counts), sampled % sum(counts) // anchors_per_place
    ring = torch.arange(-len(head.conv), len(head.conv) + 1, device=sampled.device)
    around = features[0].new_empty(len(sampled), len(ring), len(ring), features[0].shape[1])
    inside = torch.empty(around.shape[:3], dtype=torch.bool, device=sampled.device)
    for level in features:
        height, width = level.shape[2:]
        here = torch.where((place >= 0) & (place < height * width))[0]
        y = (place[here] // width)[:, None, None] + ring[:, None]
        x = (place[here] % width)[:, None, None] + ring
        inside[here] = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        around[here] = level.permute(0, 2, 3, 1)[image[here, None, None], y.clamp(0, height - 1), x.clamp(0, width - 1)]
        place = place - height * width
    around, inside = around.permute(0, 3, 1, 2), inside[:, None]
    for convolution, activation in head.conv:
        around = activation(F.conv2d(around * inside, convolution.weight, convolution.bias))
        inside = inside[..., 1:-1, 1:-1]
    row, anchor = torch.arange(len(sampled), device=sampled.device), sampled % anchors_per_place
    objectness = head.cls_logits(around)[row, anchor, 0, 0]
    deltas = head.bbox_pred(around)[..., 0, 0].unflatten(1, (-1, 4))[row, anchor]
    return objectness.float(), deltas.float()


class LabelMapRPN(RegionProposalNetwork):
    """torchvision's region proposal network with seeded sampling and losses that are the same over any number of processes.

    Anchors and cells are matched without the matrix of all their pairs. Losses are of some hundred anchors of an image's 10^5, and
    proposals carry no gradient: so all anchors are predicted without a graph, and the sampled ones once more with one. The losses
    and gradients are torchvision's, without a backward pass through the head at every place.
    """

    def forward(self, images, features, targets=None):
        features = list(features.values())
        anchors = self.anchor_generator(images, features)
        losses = self._losses(features, anchors, targets) if self.training else {}
        with torch.no_grad():  # the losses came first: older torch's autocast keeps a weight that it casts here, without its graph
            objectness, deltas = self.head(features)
            counts = [level[0].numel() for level in objectness]
            objectness, deltas = concat_box_prediction_layers(objectness, deltas)
            proposals = self.box_coder.decode(deltas, anchors).view(len(anchors), -1, 4)
            boxes, _ = self.filter_proposals(proposals, objectness, images.image_sizes, counts)
        return boxes, losses

    def _losses(self, features, anchors, targets) -> dict[str, Tensor]:
        labels, boxes = self.assign_targets_to_anchors(anchors, targets)
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        objectness, deltas = predictions_at(self.head, features, sampled)
        goals = self.box_coder.encode_single(torch.cat(boxes)[positive], torch.cat(anchors)[positive])
        box_loss = F.smooth_l1_loss(deltas[: len(positive)], goals, beta=1 / 9, reduction="sum")
        objectness_loss = F.binary_cross_entropy_with_logits(objectness, torch.cat(labels)[sampled], reduction="sum")
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
            labels.append((matches.clamp(max=0) + 1).float())  # 1 a cell, 0 background (-1), -1 neither (-2)
            boxes.append(target["boxes"][matches.clamp(min=0)])
        return labels, boxes
