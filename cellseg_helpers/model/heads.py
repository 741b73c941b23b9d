"""Mask R-CNN parts that read their mask targets from label maps and leave predicted masks in their
boxes.

torchvision's own take a dense mask for each instance (N x H x W) in training and paste each
prediction into one at the end.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

PATCH_ELEMENTS = 2**24
CHANNELS_LAST_FROM_PX = 256


@torch.no_grad()
def mask_targets(
    label_maps: Tensor, labels: Tensor, ids: Tensor, boxes: Tensor, size: int
) -> Tensor:
    """Mask R-CNN's mask targets, read from label maps.

    Its oracle is torchvision's ``project_masks_on_boxes``, which RoI-aligns (He et al., "Mask
    R-CNN", 2017; here sampling_ratio -1, aligned False) the dense mask of each box's instance.
    RoIAlign averages bilinear samples on a regular grid, so it is separable: with A_y, A_x [size,
    span] the averaged bilinear weights of a box's rows and columns, its target is ``A_y 1[label_map
    = id] A_x^T``. Only the label map under the box is read, and boxes of like span are done
    together.

    Args:
        label_maps: int [K, H, W].
        labels: int64 [P], class 1..K of each box's instance.
        ids: int [P], its instance id in that class's map.
        boxes: float32 [P, 4], x1, y1, x2, y2 px; what lies outside the image is background.
        size: target side, 28 in Mask R-CNN.

    Returns:
        float32 [P, size, size] in [0, 1].
    """
    boxes = boxes.float()
    height, width = label_maps.shape[-2:]
    targets = boxes.new_zeros(len(boxes), size, size)
    if not len(boxes):
        return targets
    spans = (boxes[:, 2:].floor() - boxes[:, :2].floor()).amax(1).clamp(min=1) + 2
    buckets = spans.log2().ceil().int()
    for bucket in buckets.unique().tolist():
        members = torch.where(buckets == bucket)[0]
        span = int(2**bucket)
        for rows in members.split(max(1, PATCH_ELEMENTS // span**2)):
            y, weights_y = _axis_weights(boxes[rows, 1], boxes[rows, 3], size, span, height)
            x, weights_x = _axis_weights(boxes[rows, 0], boxes[rows, 2], size, span, width)
            patches = label_maps[(labels[rows] - 1)[:, None, None], y[:, :, None], x[:, None, :]]
            masks = (patches == ids[rows, None, None]).to(weights_y.dtype)
            with torch.autocast(boxes.device.type, enabled=False):
                targets[rows] = weights_y @ masks @ weights_x.transpose(1, 2)
    return targets


def _axis_weights(
    start: Tensor, end: Tensor, size: int, span: int, length: int
) -> tuple[Tensor, Tensor]:
    """RoIAlign along one axis: the pixels [P, span] under each box and the weight [P, size, span]
    of each in each bin.
    """
    extent = (end - start).clamp(min=1)
    bin_extent = extent / size
    samples = bin_extent.ceil()
    most = -(-span // size)
    sample = torch.arange(most, device=start.device, dtype=start.dtype)
    bins = torch.arange(size, device=start.device, dtype=start.dtype)
    position = (
        start[:, None, None]
        + bins[:, None] * bin_extent[:, None, None]
        + (sample + 0.5) * bin_extent[:, None, None] / samples[:, None, None]
    )
    first = start.floor().clamp(0, length - 1)
    pixels = first[:, None] + torch.arange(span, device=start.device, dtype=start.dtype)
    bilinear = (
        1 - (position.clamp(0, length - 1)[..., None] - pixels[:, None, None, :]).abs()
    ).clamp(min=0)
    counts = (sample < samples[:, None, None]) & (position >= -1) & (position <= length)
    weights = (bilinear * counts[..., None]).sum(2) / samples[:, None, None]
    return pixels.long().clamp(max=length - 1), weights


class SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's balanced sampler, drawing for each image from that image's own seed.

    What is sampled for an image then depends neither on the batch it is in nor on the process or
    device that holds it. Without seeds it draws from the global generator, as torchvision's does.
    """

    seeds: list[int] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self.seeds is None:
            return super().__call__(matched_idxs)
        positives, negatives = [], []
        for labels, seed in zip(matched_idxs, self.seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
            num_positive = min(
                len(positive), int(self.batch_size_per_image * self.positive_fraction)
            )
            num_negative = min(len(negative), self.batch_size_per_image - num_positive)
            some_positive = torch.randperm(len(positive), generator=generator)[:num_positive]
            some_negative = first_of_permutation(
                len(negative), num_negative, generator
            )  # the last that is drawn
            for candidates, rows, chosen in (
                (positive, some_positive, positives),
                (negative, some_negative, negatives),
            ):
                mask = torch.zeros_like(labels, dtype=torch.uint8)
                mask[candidates[rows.to(labels.device)]] = 1
                chosen.append(mask)
        return positives, negatives


def first_of_permutation(length: int, count: int, generator: torch.Generator) -> Tensor:
    """``torch.randperm(length, generator=generator)[:count]``, its oracle, in a time that does not
    grow with ``length``.

    Step i of the shuffle (Durstenfeld, "Algorithm 235", 1964) swaps entry i with entry ``i + r_i
    mod (length - i)``, where r_i are the generator's next 32 bits; later steps leave entry i alone.
    A GPU waits meanwhile: to permute all background anchors of an image, some 10^5, takes
    milliseconds.

    Args:
        length: up to 2^27; of many more torch shuffles in another way.
        count: at most ``length``.
        generator: on the CPU; unlike torch's, it goes on by ``count`` draws, or one more.

    Returns:
        int64 [count].
    """
    drawn = torch.empty(-(-count // 2), dtype=torch.int64).random_(
        -(2**63), None, generator=generator
    )
    draws = (
        torch.stack([drawn >> 32, drawn], 1).flatten()[:count] & 0xFFFF_FFFF
    )  # of 64 bits the upper 32 come first
    moved, chosen = {}, []
    for place, other in enumerate(
        (torch.arange(count) + draws % torch.arange(length, length - count, -1)).tolist()
    ):
        chosen.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return torch.tensor(chosen, dtype=torch.int64)


def mean_over_processes(total: Tensor, count: int) -> Tensor:
    """``total / count``, with the count averaged over processes, so that averaged gradients are
    those of one large batch.
    """
    if distributed.is_available() and distributed.is_initialized():
        counts = torch.tensor(float(count), device=total.device)
        distributed.all_reduce(counts)
        count = counts.item() / distributed.get_world_size()
    return total / max(count, 1)


def full_precision(module, inputs, outputs: tuple) -> tuple:
    """Forward hook that makes a predictor's outputs float32.

    torchvision's box coder works in the type of the deltas; under mixed precision that would round
    every box to bfloat16, whose steps are 2 px from 256 px on.
    """
    return tuple(
        [level.float() for level in output] if isinstance(output, list) else output.float()
        for output in outputs
    )


class LabelMapRoIHeads(RoIHeads):
    """torchvision's box and mask heads, with mask targets read from label maps.

    Training targets hold ``boxes`` float32 [N, 4], ``labels`` int64 [N], ``ids`` int [N] and
    ``label_maps`` int [K, H, W]. Detections hold ``boxes``, ``labels``, ``scores`` and ``masks``
    float [N, 28, 28], probabilities inside the box. The mask loss is taken on at most
    ``mask_batch_size_per_image`` of an image's positive boxes (0: on all, as torchvision does):
    many of them lie on the same cell, and the mask head is most of a step's arithmetic.
    """

    mask_batch_size_per_image: int = 0

    def has_mask(self) -> bool:
        return False  # keeps torchvision's target check from asking for dense masks

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            box_features = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
            boxes, scores, labels = self.postprocess_detections(
                *self.box_predictor(box_features), proposals, image_shapes
            )
            masks = maskrcnn_inference(self._mask_logits(features, boxes, image_shapes), labels)
            keys = ("boxes", "labels", "scores", "masks")
            return [
                dict(zip(keys, (*detection, mask[:, 0]), strict=True))
                for *detection, mask in zip(boxes, labels, scores, masks, strict=True)
            ], {}

        proposals, matched, labels, regression_targets = self.select_training_samples(
            proposals, targets
        )
        box_features = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        losses = self._box_losses(
            *self.box_predictor(box_features), torch.cat(labels), torch.cat(regression_targets)
        )

        positive = self._mask_samples(labels)
        boxes = [proposal[index] for proposal, index in zip(proposals, positive, strict=True)]
        matched = [match[index] for match, index in zip(matched, positive, strict=True)]
        logits = self._mask_logits(features, boxes, image_shapes)
        size = logits.shape[-1]
        goals = [
            mask_targets(
                target["label_maps"], target["labels"][match], target["ids"][match], box, size
            )
            for target, match, box in zip(targets, matched, boxes, strict=True)
        ]
        classes = torch.cat(
            [target["labels"][match] for target, match in zip(targets, matched, strict=True)]
        )
        each = torch.arange(len(classes), device=classes.device)
        loss = F.binary_cross_entropy_with_logits(
            logits[each, classes], torch.cat(goals), reduction="sum"
        )
        return [], losses | {"loss_mask": mean_over_processes(loss, len(classes) * size**2)}

    def _mask_samples(self, labels: list[Tensor]) -> list[Tensor]:
        positive = [torch.where(label > 0)[0] for label in labels]
        most = self.mask_batch_size_per_image
        if not most:
            return positive
        seeds = self.fg_bg_sampler.seeds or torch.randint(2**62, (len(labels),)).tolist()
        orders = [
            torch.randperm(len(p), generator=torch.Generator().manual_seed(s))
            for p, s in zip(positive, seeds, strict=True)
        ]
        return [p[order[:most].to(p.device)] for p, order in zip(positive, orders, strict=True)]

    def _mask_logits(self, features, boxes, image_shapes) -> Tensor:
        return self.mask_predictor(
            self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))
        ).float()

    def _box_losses(
        self, class_logits, box_regression, labels, regression_targets
    ) -> dict[str, Tensor]:
        """torchvision's ``fastrcnn_loss``, the same over any number of processes."""
        classifier = F.cross_entropy(class_logits, labels, reduction="sum")
        positive = torch.where(labels > 0)[0]
        deltas = box_regression.unflatten(1, (-1, 4))[positive, labels[positive]]
        box = F.smooth_l1_loss(deltas, regression_targets[positive], beta=1 / 9, reduction="sum")
        return {
            "loss_classifier": mean_over_processes(classifier, len(labels)),
            "loss_box_reg": mean_over_processes(box, len(labels)),
        }


class LabelMapTransform(GeneralizedRCNNTransform):
    """torchvision's normalisation, resizing and batching, with label maps in place of masks;
    ``min_size`` 0 keeps the size.
    """

    def learn_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise by these (of R, G, B in [0, 1]) from now on; they belong to the model's weights
        and are saved with them.
        """
        for name, values in (("image_mean", mean), ("image_std", std)):
            if hasattr(self, name):
                delattr(self, name)
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32))

    def resize(self, image, target=None):
        """torchvision's, its oracle, of label maps in place of masks: the same pixels are taken of
        both (nearest).
        """
        if not self.max_size:
            return image, target
        height, width = image.shape[-2:]
        scale = min(self.min_size[0] / min(height, width), self.max_size / max(height, width))
        size = (math.floor(height * scale), math.floor(width * scale))
        image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        if target is None:
            return image, None
        label_maps = F.interpolate(target["label_maps"][None].float(), size=size, mode="nearest")[
            0
        ].int()
        return image, target | {
            "label_maps": label_maps,
            "boxes": resize_boxes(target["boxes"], (height, width), size),
        }

    def batch_images(self, images, size_divisible=32):
        """torchvision's; large ones channels last, which each layer hands on: convolutions are
        faster so (``bench/README.md``).
        """
        batch = super().batch_images(images, size_divisible)
        large = min(batch.shape[2:]) >= CHANNELS_LAST_FROM_PX
        return batch.contiguous(memory_format=torch.channels_last) if large else batch

    def postprocess(self, result, image_shapes, original_image_sizes):
        if not self.training:
            for detections, size, original_size in zip(
                result, image_shapes, original_image_sizes, strict=True
            ):
                detections["boxes"] = resize_boxes(detections["boxes"], size, original_size)
        return result
