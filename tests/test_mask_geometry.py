"""``mask_geometry`` exact: targets, pooling and masks sampled at pixel centres, against torchvision's
aligned RoIAlign and ``grid_sample``.
"""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import MultiScaleRoIAlign, poolers, roi_align

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.drawn import draw_tissue
from cellseg_helpers.data.samples import make_target
from cellseg_helpers.inference import paste_in_boxes
from cellseg_helpers.model.build import build_model
from cellseg_helpers.model.heads import mask_targets
from cellseg_helpers.model.roi_align import GatherRoIAlign
from study.mask_geometry import mask_ceilings, one_cell_both_ways

seeds = st.integers(0, 2**32 - 1)


def boxes_around(seed: int, height: int, width: int, count: int = 9) -> torch.Tensor:
    """Boxes in and around an image; the last has no width."""
    rng = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=rng) * torch.tensor([width, height]) * 1.2 - 3
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    boxes[-1, 2] = boxes[-1, 0]
    return boxes


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 90), st.integers(1, 90))
def test_exact_targets_are_an_aligned_roi_align_of_each_mask(seed, height, width):
    rng = np.random.default_rng(seed)
    label_map = torch.from_numpy(rng.integers(0, 4, (1, height, width)).astype(np.int32))
    boxes = boxes_around(seed, height, width)[:-1]
    ids = torch.from_numpy(rng.integers(1, 4, len(boxes)))
    masks = (label_map == ids[:, None, None]).float()
    rois = torch.cat([torch.arange(len(boxes))[:, None], boxes], 1)
    expected = roi_align(masks[:, None], rois, 28, sampling_ratio=-1, aligned=True)[:, 0]
    found = mask_targets(label_map, torch.ones_like(ids), ids, boxes, 28, aligned=True)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_aligned_pooling_and_its_gradients_equal_torchvisions(seed, height, width, as_on_a_gpu):
    rng = torch.Generator().manual_seed(seed)
    levels = {
        str(i): torch.randn(2, 3, -(-height >> i) or 1, -(-width >> i) or 1, generator=rng)
        for i in range(3)
    }
    boxes = [boxes_around(seed + image, 4 * height, 4 * width) for image in range(2)]
    shapes, results = [(4 * height, 4 * width)] * 2, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(poolers, "roi_align", partial(roi_align, aligned=True))
        ours = GatherRoIAlign(["0", "1", "2"], 7, 2, aligned=True)
        if as_on_a_gpu:
            patch.setattr(ours, "_pool_by_gather", ours._pool_by_torchvision)
        for pool in (MultiScaleRoIAlign(["0", "1", "2"], 7, 2), ours):
            features = {name: level.clone().requires_grad_() for name, level in levels.items()}
            pooled = pool(features, boxes, shapes)
            (pooled * torch.arange(pooled.numel()).view_as(pooled).cos()).sum().backward()
            results.append([pooled, *(feature.grad for feature in features.values())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.05, 0.3, 0.5, 0.9]))
def test_exact_masks_are_sampled_at_pixel_centres(seed, height, width, threshold):
    """The oracle samples the mask at every pixel's centre, in bins of the box from -1 to 1."""
    boxes = boxes_around(seed, height, width)[:-1]
    boxes[:, 2:] += 1
    coarse = torch.rand(len(boxes), 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    masks = F.interpolate(coarse, (28, 28), mode="bilinear")
    x = (torch.arange(width) + 0.5 - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    y = (torch.arange(height) + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), -1)
    expected = F.grid_sample(masks, grid, align_corners=False)[:, 0]
    pasted = paste_in_boxes(masks[:, 0], boxes, height, width, threshold, "exact")
    for mask, values in zip(pasted, expected.numpy(), strict=True):
        whole = np.zeros((height, width), bool)
        whole[mask.y0 :, mask.x0 :][: mask.mask.shape[0], : mask.mask.shape[1]] = mask.mask
        clear = np.abs(values - threshold) > 1e-4
        np.testing.assert_array_equal(whole[clear], (values >= threshold)[clear])


def test_perfect_targets_come_back_as_the_cells_that_they_are():
    """A ceiling of AP: what no model can exceed, in each class of drawn tissue."""
    images = []
    for seed in range(3):
        image, label_maps = draw_tissue(np.random.default_rng(seed), 256, 256)
        images.append(CellImage(str(seed), None, image, label_maps))
    ceilings = mask_ceilings(images)
    exact, torchvisions = ceilings["exact"], ceilings["torchvision"]
    assert list(exact.index) == [*CLASS_NAMES, "all"]
    assert exact.min() >= 0.99
    assert torchvisions.min() < 0.95 and torchvisions["all"] < 0.95
    assert one_cell_both_ways(images).axes[0].get_title().startswith("torchvision: IoU 0.")


def test_narrow_heads_fine_maps_and_several_anchor_sizes_train_and_predict():
    config = RunConfig(
        mask_geometry="exact",
        head_width=32,
        stem_stride=2,
        anchor_sizes=(16, 23, 32, 45, 64, 90, 128, 181, 256, 362),
        anchor_ratios=(1,),
    )
    model = build_model(config)
    image, label_maps = draw_tissue(np.random.default_rng(0), 96, 96)
    target = make_target(torch.from_numpy(label_maps))
    losses = model([torch.from_numpy(image) / 255], [target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    features = model.backbone(torch.zeros(1, 3, 64, 64))
    assert [feature.shape[1:] for feature in features.values()] == [
        (32, side, side) for side in (32, 16, 8, 4, 2)
    ]
    assert model.rpn.anchor_generator.num_anchors_per_location() == [2] * 5
    assert model.roi_heads.box_head.fc7.out_features == 128
    (found,) = model.eval()([torch.from_numpy(image) / 255])
    assert found["masks"].shape[1:] == (28, 28)
