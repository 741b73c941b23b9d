"""Test-time augmentation: a Mask R-CNN that predicts each image mirrored and scaled, too."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import batched_nms, box_iou
from torchvision.transforms.v2.functional import horizontal_flip_bounding_boxes
from torchvision.tv_tensors import BoundingBoxFormat

from cellseg_helpers.config import RunConfig
from cellseg_helpers.model.build import LabelMapMaskRCNN


def with_views(model: LabelMapMaskRCNN, config: RunConfig) -> nn.Module:
    """The model for prediction: with ``test_time_augmentation``, ``AugmentedViews`` of it."""
    return AugmentedViews(model) if config.test_time_augmentation else model


class AugmentedViews(nn.Module):
    """``model`` in evaluation, on six views of each image: three scales, each also mirrored.

    How it works: 1. The boxes of all views, in the image's coordinates, go through one non-maximum
    suppression. 2. For each box that remains, each view votes with its highest-scored box of the
    same class whose IoU with it is at least ``nms_thresh``. The remaining box's new score is the
    mean of the votes' scores over all views (0 for a view without a vote), and its new corners are
    the score-weighted mean of the votes' corners. 3. The mask head is applied to this box in every
    view; the probabilities are averaged, as in detectron2's ``GeneralizedRCNNWithTTA``.
    """

    def __init__(
        self,
        model: LabelMapMaskRCNN,
        scales: Sequence[float] = (0.8, 1.0, 1.25),
        flips: Sequence[bool] = (False, True),
    ):
        super().__init__()
        self.model, self.mask_geometry = model, model.mask_geometry  # ``predict`` reads it
        self.scales_and_flips = list(itertools.product(scales, flips))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self._detect(image) for image in images]

    def _detect(self, image: Tensor) -> dict[str, Tensor]:
        views = [View(self.model, image, *options) for options in self.scales_and_flips]
        detections = [view.detect() for view in views]
        boxes, labels, scores = (torch.cat(parts) for parts in zip(*detections, strict=True))
        heads = self.model.roi_heads
        remaining = batched_nms(boxes, scores, labels, heads.nms_thresh)
        boxes, labels = boxes[remaining], labels[remaining]
        score_sums, corner_sums = torch.zeros_like(scores[remaining]), torch.zeros_like(boxes)
        for view_boxes, view_labels, view_scores in detections:
            overlaps = box_iou(boxes, view_boxes) >= heads.nms_thresh
            may_vote = overlaps & (labels[:, None] == view_labels)
            vote_scores, row = F.pad(may_vote * view_scores, (0, 1)).max(1)  # padding: no vote
            score_sums += vote_scores
            corner_sums += vote_scores[:, None] * F.pad(view_boxes, (0, 0, 0, 1))[row]
        order = score_sums.argsort(descending=True, stable=True)[: heads.detections_per_img]
        boxes, labels = (corner_sums / score_sums[:, None])[order], labels[order]
        scores = score_sums[order] / len(views)
        masks = torch.stack([view.masks(boxes, labels) for view in views]).mean(0)
        return {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}


class View:
    """One scaled, perhaps mirrored view of an image float32 [3, H, W], and its feature maps."""

    def __init__(self, model: LabelMapMaskRCNN, image: Tensor, scale: float, flip: bool):
        self.model, self.flip, self.size = model, flip, tuple(image.shape[1:])
        image = image.flip(-1) if flip else image
        if scale != 1:
            size = [round(scale * side) for side in self.size]
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        self.images, _ = model.transform([image])
        self.features = model.backbone(self.images.tensors)

    def detect(self) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes in the image's coordinates, labels and scores of the view's detections."""
        proposals, _ = self.model.rpn(self.images, self.features)
        heads, sizes = self.model.roi_heads, self.images.image_sizes
        outputs = heads.predict_boxes(self.features, proposals, sizes)
        ((boxes,), (scores,), (labels,)) = heads.postprocess_detections(*outputs, proposals, sizes)
        return self._mirrored(resize_boxes(boxes, sizes[0], self.size)), labels, scores

    def masks(self, boxes: Tensor, labels: Tensor) -> Tensor:
        """The mask head's probabilities float [N, 28, 28] in boxes given in the image."""
        sizes = self.images.image_sizes
        in_view = resize_boxes(self._mirrored(boxes), self.size, sizes[0])
        heads = self.model.roi_heads
        (masks,) = heads.predict_masks(self.features, [in_view], [labels], sizes)
        return masks.flip(-1) if self.flip else masks

    def _mirrored(self, boxes: Tensor) -> Tensor:
        """Boxes of the image mirrored if the view is; the same function moves them back."""
        if not self.flip:
            return boxes
        return horizontal_flip_bounding_boxes(boxes, BoundingBoxFormat.XYXY, self.size)
