"""Test-time augmentation: a Mask R-CNN that sees each image flipped and scaled."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import batched_nms, box_iou

from cellseg_helpers.config import RunConfig
from cellseg_helpers.model.build import LabelMapMaskRCNN


def with_views(model: LabelMapMaskRCNN, config: RunConfig) -> nn.Module:
    """What predicts for a run: ``AugmentedViews`` if it has ``test_time_augmentation``."""
    return AugmentedViews(model) if config.test_time_augmentation else model


class AugmentedViews(nn.Module):
    """``model`` in evaluation, on six views of each image: three scales, each also mirrored.

    How it works: 1. The boxes that the model finds in all views, moved back into the image, are
    thinned by one non-maximum suppression. 2. In each view the highest-scored box of the same
    class that overlaps a remaining one by the suppression's IoU votes for it: its score is the mean
    over the views (0 where none votes), its corners are the votes' mean, weighted by score. 3. The
    mask head looks at the voted box in every view; the probabilities are averaged, as in
    detectron2's ``GeneralizedRCNNWithTTA``.
    """

    def __init__(
        self,
        model: LabelMapMaskRCNN,
        scales: Sequence[float] = (0.8, 1.0, 1.25),
        flips: Sequence[bool] = (False, True),
    ):
        super().__init__()
        self.model, self.mask_geometry = model, model.mask_geometry
        self.views = list(itertools.product(scales, flips))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self._detect(image) for image in images]

    def _detect(self, image: Tensor) -> dict[str, Tensor]:
        views = [View(self.model, image, *view) for view in self.views]
        found = [view.detect() for view in views]
        boxes, labels, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        heads = self.model.roi_heads
        kept = batched_nms(boxes, scores, labels, heads.nms_thresh)
        boxes, labels = boxes[kept], labels[kept]
        votes, corners = torch.zeros_like(scores[kept]), torch.zeros_like(boxes)
        for view_boxes, view_labels, view_scores in found:
            same = (box_iou(boxes, view_boxes) >= heads.nms_thresh) & (
                labels[:, None] == view_labels
            )
            best, row = F.pad(same * view_scores, (0, 1)).max(1)
            votes += best
            corners += best[:, None] * F.pad(view_boxes, (0, 0, 0, 1))[row]
        order = votes.argsort(descending=True, stable=True)[: heads.detections_per_img]
        boxes, labels, votes = (corners / votes[:, None])[order], labels[order], votes[order]
        masks = torch.stack([view.masks(boxes, labels) for view in views]).mean(0)
        return {"boxes": boxes, "labels": labels, "scores": votes / len(views), "masks": masks}


class View:
    """One view of an image float32 [3, H, W], and its feature maps."""

    def __init__(self, model: LabelMapMaskRCNN, image: Tensor, scale: float, flip: bool):
        self.model, self.flip, self.size = model, flip, tuple(image.shape[1:])
        image = image.flip(-1) if flip else image
        if scale != 1:
            size = [round(scale * side) for side in self.size]
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        self.images, _ = model.transform([image])
        self.features = model.backbone(self.images.tensors)

    def detect(self) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes in the image's coordinates, labels, scores."""
        proposals, _ = self.model.rpn(self.images, self.features)
        heads, (size,) = self.model.roi_heads, self.images.image_sizes
        pooled = heads.box_head(heads.box_roi_pool(self.features, proposals, [size]))
        outputs = (output.float() for output in heads.box_predictor(pooled))
        ((boxes,), (scores,), (labels,)) = heads.postprocess_detections(*outputs, proposals, [size])
        return self._mirrored(resize_boxes(boxes, size, self.size)), labels, scores

    def masks(self, boxes: Tensor, labels: Tensor) -> Tensor:
        """Probabilities float [N, 28, 28] inside boxes of the image."""
        (size,) = self.images.image_sizes
        inside = resize_boxes(self._mirrored(boxes), self.size, size)
        logits = self.model.roi_heads._mask_logits(self.features, [inside], [size])
        masks = logits[torch.arange(len(labels)), labels].sigmoid()
        return masks.flip(-1) if self.flip else masks

    def _mirrored(self, boxes: Tensor) -> Tensor:
        if not self.flip:
            return boxes
        x1, y1, x2, y2 = boxes.unbind(1)
        return torch.stack([self.size[1] - x2, y1, self.size[1] - x1, y2], 1)
