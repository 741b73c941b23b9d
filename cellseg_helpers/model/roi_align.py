"""RoIAlign over a feature pyramid, as one weighted gather on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import _convert_to_roi_format, _setup_scales


class GatherRoIAlign(MultiScaleRoIAlign):
    """torchvision's ``MultiScaleRoIAlign``, several times faster on a CPU. Other devices use
    ``roi_align``; the tests compare values and gradients with it (``tests/test_model.py``).

    With ``aligned``, which ``MultiScaleRoIAlign`` lacks, pixel i covers [i, i + 1), its value lies
    at i + 1/2, and small boxes are not widened to one pixel.

    How it works: 1. A bin's value is the mean of ``sampling_ratio ** 2`` bilinear samples (He et
    al., "Mask R-CNN", 2017): a weighted sum of at most ``(2 * sampling_ratio) ** 2`` feature
    vectors. 2. The pyramid becomes one table with one row of channels per pixel. 3. ``_axis`` gives
    the pixels and weights of each bin along y and along x; ``_gather`` combines them. 4.
    ``embedding_bag`` sums whole rows, while torchvision's CPU kernel works channel by channel.
    """

    def __init__(
        self, levels: list[str], output_size: int, sampling_ratio: int, aligned: bool = False
    ):
        super().__init__(levels, output_size, sampling_ratio)
        self.aligned = aligned

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if self.scales is None:
            self.scales, self.map_levels = _setup_scales(
                features, image_shapes, self.canonical_scale, self.canonical_level
            )
        on_cpu = features[0].device.type == "cpu"
        return (self._pool_by_gather if on_cpu else self._pool_by_torchvision)(features, boxes)

    def _pool_by_gather(self, features: list[Tensor], boxes: list[Tensor]) -> Tensor:
        tables = [level.permute(0, 2, 3, 1).flatten(0, 2).float() for level in features]
        rows, weights = self._gather(features, boxes)
        pooled = F.embedding_bag(rows, torch.cat(tables), per_sample_weights=weights, mode="sum")
        return pooled.unflatten(0, (-1, *self.output_size)).permute(0, 3, 1, 2)

    def _pool_by_torchvision(self, features: list[Tensor], boxes: list[Tensor]) -> Tensor:
        rois, levels = _convert_to_roi_format(boxes), self.map_levels(boxes)
        pooled = features[0].new_zeros(len(rois), features[0].shape[1], *self.output_size)
        for level, (feature, scale) in enumerate(zip(features, self.scales, strict=True)):
            rows = torch.where(levels == level)[0]
            sampling = self.output_size, scale, self.sampling_ratio, self.aligned
            pooled[rows] = roi_align(feature, rois[rows].to(feature), *sampling).to(pooled)
        return pooled

    @torch.no_grad()
    def _gather(self, features: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Each bin's table rows int64 and weights float32 [boxes * bins, (2 * ratio) ** 2]."""
        rois, levels = _convert_to_roi_format(boxes).float(), self.map_levels(boxes)
        sizes = torch.tensor([level.shape[2:] for level in features])
        areas = sizes.prod(1)
        first_row = (areas.cumsum(0) - areas) * len(features[0])  # of each level
        height, width = sizes[levels].unbind(1)
        corners = rois[:, 1:] * torch.tensor(self.scales)[levels, None] - self.aligned / 2
        x1, y1, x2, y2 = corners.unbind(1)
        y, weight_y = self._axis(y1, y2, self.output_size[0], height)
        x, weight_x = self._axis(x1, x2, self.output_size[1], width)
        first_row = first_row[levels] + rois[:, 0].long() * areas[levels]  # of each box's map
        row_of_y = first_row[:, None, None] + y * width[:, None, None]
        rows = row_of_y[:, :, None, :, None] + x[:, None, :, None, :]
        weights = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
        return rows.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)

    def _axis(self, start: Tensor, end: Tensor, bins: int, length: Tensor) -> tuple[Tensor, Tensor]:
        """Each bin's pixels int64 and weights float32 [boxes, bins, 2 * ratio] along one axis."""
        start, end, length = start[:, None, None], end[:, None, None], length[:, None, None]
        sample = (torch.arange(self.sampling_ratio) + 0.5) / self.sampling_ratio
        bin_extent = (end - start).clamp(min=0 if self.aligned else 1) / bins
        position = start + (torch.arange(bins)[:, None] + sample) * bin_extent
        inside = ((position >= -1) & (position <= length)).repeat(1, 1, 2)
        position = position.clamp(min=0).minimum(length - 1)
        lower = position.long()
        upper_weight = position - lower
        weights = torch.cat([1 - upper_weight, upper_weight], -1) * inside / self.sampling_ratio
        return torch.cat([lower, (lower + 1).minimum(length - 1)], -1), weights
