"""RoIAlign over a feature pyramid, as one weighted gather on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import _convert_to_roi_format, _setup_scales


class GatherRoIAlign(MultiScaleRoIAlign):
    """torchvision's ``MultiScaleRoIAlign``, several times faster forward and backward on a CPU.

    A bin is the mean of ``sampling_ratio ** 2`` bilinear samples (He et al., "Mask R-CNN", 2017),
    so it is a sum of at most ``(2 * sampling_ratio) ** 2`` weighted feature vectors. All bins of
    all boxes and levels are one ``embedding_bag`` over the pyramid laid out as rows of channels,
    whose kernels read and write whole vectors; torchvision's CPU kernel goes channel by channel. On
    other devices this is torchvision's own, which is also its oracle (values and gradients,
    ``tests/test_model.py``).
    """

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if features[0].device.type != "cpu":
            return super().forward(x, boxes, image_shapes)
        if self.scales is None or self.map_levels is None:
            self.scales, self.map_levels = _setup_scales(
                features, image_shapes, self.canonical_scale, self.canonical_level
            )
        channels = features[0].shape[1]
        rows = torch.cat(
            [feature.permute(0, 2, 3, 1).reshape(-1, channels).float() for feature in features]
        )
        index, weight = self._gather(features, boxes)
        pooled = F.embedding_bag(index, rows, per_sample_weights=weight, mode="sum")
        return pooled.view(-1, *self.output_size, channels).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _gather(self, features: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Row and weight of every feature vector in every bin: int64 and float32 [boxes * bins, (2
        * sampling_ratio) ** 2].
        """
        rois = _convert_to_roi_format(boxes).float()
        levels = (
            self.map_levels(boxes)
            if len(features) > 1
            else torch.zeros(len(rois), dtype=torch.int64)
        )
        sizes = torch.tensor([feature.shape[2:] for feature in features])
        areas = sizes.prod(1)
        first_row = torch.cat(
            [torch.zeros(1, dtype=torch.int64), (areas * features[0].shape[0]).cumsum(0)]
        )
        height, width = sizes[levels].unbind(1)
        base = first_row[levels] + rois[:, 0].long() * areas[levels]
        corners = rois[:, 1:] * torch.tensor(self.scales)[levels][:, None]
        y, weight_y = self._axis(corners[:, 1], corners[:, 3], self.output_size[0], height)
        x, weight_x = self._axis(corners[:, 0], corners[:, 2], self.output_size[1], width)
        index = (
            base[:, None, None, None, None]
            + y[:, :, None, :, None] * width[:, None, None, None, None]
            + x[:, None, :, None, :]
        )
        weight = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
        return index.flatten(3).flatten(0, 2), weight.flatten(3).flatten(0, 2)

    def _axis(self, start: Tensor, end: Tensor, bins: int, length: Tensor) -> tuple[Tensor, Tensor]:
        """Along one axis: pixels int64 and weights float32 [boxes, bins, 2 * sampling_ratio] of
        each bin's bilinear samples.
        """
        bin_extent = ((end - start).clamp(min=1) / bins)[:, None, None]
        sample = (torch.arange(self.sampling_ratio) + 0.5) / self.sampling_ratio
        position = start[:, None, None] + (torch.arange(bins)[:, None] + sample) * bin_extent
        last = (length - 1)[:, None, None]
        inside = (position >= -1) & (position <= length[:, None, None])
        position = position.clamp(min=0).minimum(last)
        low = position.long()
        upper = position - low
        weights = torch.cat([1 - upper, upper], -1) * inside.repeat(1, 1, 2) / self.sampling_ratio
        return torch.cat([low, (low + 1).minimum(last)], -1), weights
