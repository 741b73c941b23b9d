"""Parts of Mask R-CNN that need no full-size masks. torchvision stores one H x W mask for each
instance and pastes each prediction into one; here targets are read from label maps, and predictions
stay 28 x 28 in their boxes.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from cellseg_helpers.config import RunConfig
from cellseg_helpers.model.roi_align import GatherRoIAlign

PATCH_ELEMENTS = 2**24  # most mask pixels that ``mask_targets`` holds at once
CHANNELS_LAST_FROM_PX = 256  # shorter side of a batch


@torch.no_grad()
def mask_targets(
    label_maps: Tensor,
    labels: Tensor,
    ids: Tensor,
    boxes: Tensor,
    size: int,
    aligned: bool = False,
) -> Tensor:
    """Mask R-CNN's mask targets, read from label maps.

    The tests compare them with torchvision's ``roi_align`` (He et al., "Mask R-CNN", 2017;
    sampling_ratio -1) of full-size masks and, unless ``aligned``, ``project_masks_on_boxes``.

    How it works: 1. RoIAlign averages bilinear samples on a regular grid. So it is separable: the
    target is ``A_y mask A_x^T``, with the mean weights A_y, A_x [size, span] of a box's rows and
    columns (``_axis_weights``). 2. The mask is read only under the box:
    ``label_map[rows, columns] == id``. 3. Boxes whose spans round up to the same power of two are
    computed together.

    Args:
        label_maps: int [K, H, W].
        labels: int64 [P], class 1..K of each box's instance.
        ids: int [P], its instance id in that class's map.
        boxes: float32 [P, 4], x1, y1, x2, y2 px; what lies outside the image is background.
        size: target side, 28 in Mask R-CNN.
        aligned: a pixel's value lies at its centre, not at its upper left corner.

    Returns:
        float32 [P, size, size] in [0, 1].
    """
    boxes, least_px = boxes.float() - aligned / 2, 0 if aligned else 1
    height, width = label_maps.shape[-2:]
    targets = boxes.new_zeros(len(boxes), size, size)
    spans = (boxes[:, 2:].floor() - boxes[:, :2].floor()).clamp(min=1).amax(1) + 2
    powers = spans.log2().ceil().int()
    for power in powers.unique().tolist():
        span = 2**power
        of_span = torch.where(powers == power)[0]
        for rows in of_span.split(max(1, PATCH_ELEMENTS // span**2)):
            y, weights_y = _axis_weights(boxes[rows, 1::2], least_px, size, span, height)
            x, weights_x = _axis_weights(boxes[rows, 0::2], least_px, size, span, width)
            patches = label_maps[(labels[rows] - 1)[:, None, None], y[:, :, None], x[:, None, :]]
            masks = (patches == ids[rows, None, None]).to(weights_y.dtype)
            with torch.autocast(boxes.device.type, enabled=False):
                targets[rows] = weights_y @ masks @ weights_x.transpose(1, 2)
    return targets


def _axis_weights(
    ends: Tensor, least_px: int, size: int, span: int, length: int
) -> tuple[Tensor, Tensor]:
    """RoIAlign along one axis of an image, ``length`` px long. A box reaches from
    ``ends[:, 0]`` to ``ends[:, 1]``, or at least over ``least_px``. Returns its pixels int64
    [P, span] and their weights in each of its ``size`` bins, float32 [P, size, span].
    """
    start, end = ends[:, :, None, None].unbind(1)
    bin_extent = (end - start).clamp(min=least_px) / size
    samples_per_bin = bin_extent.ceil().clamp(min=1)
    sample = torch.arange(-(-span // size), device=start.device, dtype=start.dtype)
    bins = torch.arange(size, device=start.device, dtype=start.dtype)[:, None]
    position = start + bins * bin_extent + (sample + 0.5) * bin_extent / samples_per_bin
    first = start.floor().clamp(0, length - 1)
    pixels = first + torch.arange(span, device=start.device, dtype=start.dtype)
    distance = (position.clamp(0, length - 1)[..., None] - pixels[..., None, :]).abs()
    is_counted = (sample < samples_per_bin) & (position >= -1) & (position <= length)
    weights = ((1 - distance).clamp(min=0) * is_counted[..., None]).sum(2) / samples_per_bin
    return pixels[:, 0].long().clamp(max=length - 1), weights


class SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's balanced sampler with one seed per image: samples do not depend on the batch,
    process or device. Without ``seeds`` torch's global generator is used.
    """

    seeds: Sequence[int] = ()

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if not self.seeds:
            return super().__call__(matched_idxs)
        positives, negatives = [], []
        with torch.random.fork_rng(devices=[]):
            for labels, seed in zip(matched_idxs, self.seeds, strict=True):
                torch.default_generator.manual_seed(seed)
                (positive,), (negative,) = super().__call__([labels.cpu()])
                positives.append(positive.to(labels.device))
                negatives.append(negative.to(labels.device))
        return positives, negatives


def mean_over_processes(total: Tensor, count: int) -> Tensor:
    """``total`` divided by the mean of ``count`` over all processes. When gradients are then
    averaged over processes, the result is that of one large batch.
    """
    if distributed.is_available() and distributed.is_initialized():
        counts = torch.tensor(float(count), device=total.device)
        distributed.all_reduce(counts)
        count = counts.item() / distributed.get_world_size()
    return total / max(count, 1)


class LabelMapRoIHeads(RoIHeads):
    """torchvision's box and mask heads, with mask targets read from label maps.

    Training targets hold ``boxes`` float32 [N, 4], ``labels`` int64 [N], ``ids`` int [N] and
    ``label_maps`` int [K, H, W]. Detections hold ``boxes``, ``labels``, ``scores`` and ``masks``
    float [N, 28, 28], probabilities inside the box. The mask loss uses at most
    ``mask_batch_size_per_image`` of an image's positive boxes (0: all, as in torchvision): many of
    them lie on the same cell, and most of a step's arithmetic is in the mask head.

    Under mixed precision the predictors' outputs become float32: torchvision's box coder works in
    their type, and bfloat16 has steps of 2 px from 256 px on.
    """

    def __init__(self, config: RunConfig, box_head, box_predictor, mask_head, mask_predictor):
        levels, positive_fraction = ["0", "1", "2", "3"], 0.25
        samples = config.box_batch_size_per_image, positive_fraction
        aligned = config.mask_geometry == "exact"
        box_parts = GatherRoIAlign(levels, 7, 2, aligned), box_head, box_predictor
        matching = config.box_fg_iou_thresh, config.box_bg_iou_thresh
        selection = config.box_score_thresh, config.box_nms_thresh, config.detections_per_image
        mask_parts = GatherRoIAlign(levels, 14, 2, aligned), mask_head, mask_predictor
        box_weights = None  # torchvision's
        super().__init__(*box_parts, *matching, *samples, box_weights, *selection, *mask_parts)
        self.fg_bg_sampler = SeededSampler(*samples)
        self.mask_batch_size_per_image = config.mask_batch_size_per_image

    def has_mask(self) -> bool:
        return False  # else torchvision expects full-size masks in the targets

    def forward(self, features, proposals, image_shapes, targets=None):
        if self.training:
            proposals, matched, labels, regression_targets = self.select_training_samples(
                proposals, targets
            )
        class_logits, deltas = self.predict_boxes(features, proposals, image_shapes)
        if self.training:
            box_targets = torch.cat(labels), torch.cat(regression_targets)
            losses = _box_losses(class_logits, deltas, *box_targets)
            chosen = self._mask_samples(labels)
            boxes = [boxes[rows] for boxes, rows in zip(proposals, chosen, strict=True)]
            matched = [match[rows] for match, rows in zip(matched, chosen, strict=True)]
            mask_logits = self._mask_logits(features, boxes, image_shapes)
            return [], losses | {"loss_mask": self._mask_loss(mask_logits, boxes, matched, targets)}
        boxes, scores, labels = self.postprocess_detections(
            class_logits, deltas, proposals, image_shapes
        )
        masks = self.predict_masks(features, boxes, labels, image_shapes)
        return [
            {"boxes": box, "labels": label, "scores": score, "masks": mask}
            for box, label, score, mask in zip(boxes, labels, scores, masks, strict=True)
        ], {}

    def predict_boxes(self, features, proposals, image_shapes) -> tuple[Tensor, Tensor]:
        """Class logits and box deltas of all images' proposals, float32."""
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, deltas = self.box_predictor(pooled)
        return class_logits.float(), deltas.float()

    def predict_masks(self, features, boxes, labels, image_shapes) -> list[Tensor]:
        """For each image, probabilities float32 [N, 28, 28] in its boxes, of their classes."""
        masks = maskrcnn_inference(self._mask_logits(features, boxes, image_shapes), labels)
        return [mask[:, 0] for mask in masks]

    def _mask_samples(self, labels: list[Tensor]) -> list[Tensor]:
        """For each image, the indices of the positive boxes that the mask loss uses."""
        positive = [torch.where(label > 0)[0] for label in labels]
        limit = self.mask_batch_size_per_image
        if not limit:
            return positive
        seeds = self.fg_bg_sampler.seeds or torch.randint(2**62, (len(labels),)).tolist()
        chosen = []
        for rows, seed in zip(positive, seeds, strict=True):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            chosen.append(rows[order[:limit].to(rows.device)])
        return chosen

    def _mask_logits(self, features, boxes, image_shapes) -> Tensor:
        """The mask head's output float32 [P, classes, 28, 28], P boxes over all images."""
        pooled = self.mask_roi_pool(features, boxes, image_shapes)
        return self.mask_predictor(self.mask_head(pooled)).float()

    def _mask_loss(
        self,
        logits: Tensor,
        boxes: list[Tensor],
        matched: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        """torchvision's ``maskrcnn_loss`` of logits [P, classes, size, size], P over all images."""
        size, labels, masks = logits.shape[-1], [], []
        for target, match, box in zip(targets, matched, boxes, strict=True):
            labels.append(target["labels"][match])
            of_cells = target["label_maps"], labels[-1], target["ids"][match], box
            masks.append(mask_targets(*of_cells, size, self.mask_roi_pool.aligned))
        classes = torch.cat(labels)
        rows = torch.arange(len(classes), device=classes.device)
        loss = F.binary_cross_entropy_with_logits(
            logits[rows, classes], torch.cat(masks), reduction="sum"
        )
        return mean_over_processes(loss, len(classes) * size**2)


def _box_losses(
    class_logits: Tensor, deltas: Tensor, labels: Tensor, regression_targets: Tensor
) -> dict[str, Tensor]:
    """torchvision's ``fastrcnn_loss``, as in one large batch over all processes."""
    classifier = F.cross_entropy(class_logits, labels, reduction="sum")
    positive = torch.where(labels > 0)[0]
    deltas = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
    box = F.smooth_l1_loss(deltas, regression_targets[positive], beta=1 / 9, reduction="sum")
    return {
        "loss_classifier": mean_over_processes(classifier, len(labels)),
        "loss_box_reg": mean_over_processes(box, len(labels)),
    }


class LabelMapTransform(GeneralizedRCNNTransform):
    """torchvision's transform with label maps for masks; ``max_size`` 0: images keep their size."""

    def learn_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """From now on normalise by these (R, G, B in [0, 1]); they are saved with the weights."""
        for name, values in (("image_mean", mean), ("image_std", std)):
            if hasattr(self, name):
                delattr(self, name)
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32))

    def resize(self, image, target=None):
        """As in torchvision (the tests compare them); label maps are sampled like its masks."""
        if not self.max_size:
            return image, target
        height, width = image.shape[-2:]
        scale = min(self.min_size[0] / min(height, width), self.max_size / max(height, width))
        size = (math.floor(height * scale), math.floor(width * scale))
        image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        if target is not None:
            maps = F.interpolate(target["label_maps"][None].float(), size=size, mode="nearest")
            boxes = resize_boxes(target["boxes"], (height, width), size)
            target = target | {"label_maps": maps[0].int(), "boxes": boxes}
        return image, target

    def batch_images(self, images, size_divisible=32):
        """As in torchvision, but large images in the faster channels-last order (``bench``)."""
        batch = super().batch_images(images, size_divisible)
        large = min(batch.shape[2:]) >= CHANNELS_LAST_FROM_PX
        return batch.contiguous(memory_format=torch.channels_last) if large else batch

    def postprocess(self, result, image_shapes, original_image_sizes):
        """As in torchvision, but masks stay in their boxes: only the boxes are resized."""
        if not self.training:
            sizes = zip(result, image_shapes, original_image_sizes, strict=True)
            for detections, size, original_size in sizes:
                detections["boxes"] = resize_boxes(detections["boxes"], size, original_size)
        return result
