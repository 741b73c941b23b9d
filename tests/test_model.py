"""The label-map model against torchvision's dense one: same weights, same images, same sampled
proposals.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.drawn import draw_tissue
from cellseg_helpers.data.labels import find_instances
from cellseg_helpers.data.samples import make_target
from cellseg_helpers.model import heads as roi_heads
from cellseg_helpers.model.backbones import resnet_fpn
from cellseg_helpers.model.build import IMAGENET_MEAN, IMAGENET_STD, build_model, count_parameters
from cellseg_helpers.model.heads import SeededSampler, mask_targets
from cellseg_helpers.model.roi_align import GatherRoIAlign


def dense_masks(label_maps: np.ndarray, instances) -> torch.Tensor:
    masks = [label_maps[k - 1] == i for k, i in zip(instances.labels, instances.ids, strict=True)]
    return torch.from_numpy(np.array(masks, np.uint8).reshape(-1, *label_maps.shape[1:]))


def crowded_label_maps(height: int, width: int) -> np.ndarray:
    """Touching cells, a one-pixel cell, cells cut by every border, a cell under another class's
    cell.
    """
    label_maps = np.zeros((4, height, width), np.int32)
    label_maps[0, 10:30, 10:30], label_maps[0, 10:30, 30:45], label_maps[0, 30:50, 10:33] = 1, 2, 7
    label_maps[1, 60, 60] = 3
    label_maps[1, :12, 50:66], label_maps[1, -9:, 5:20], label_maps[1, 40:55, -7:] = 4, 5, 60_000
    label_maps[2, 20:40, :6], label_maps[3, 12:60, 12:60] = 1, 9
    label_maps[0, 70:75, 40:90] = 11
    return label_maps


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(1, 90))
def test_mask_targets_equal_torchvisions_on_random_boxes(seed, height, width):
    rng = np.random.default_rng(seed)
    label_maps = rng.integers(0, 4, (2, height, width)).astype(np.int32)
    label_maps[1] *= 21_845
    instances = find_instances(label_maps)
    if not len(instances.labels):
        return
    corners = np.sort(rng.random((20, 2, 2)), axis=1) * (width, height)
    boxes = torch.from_numpy(corners.reshape(20, 4).astype(np.float32))
    match = torch.from_numpy(rng.integers(0, len(instances.labels), 20))
    expected = project_masks_on_boxes(dense_masks(label_maps, instances), boxes, match, 28)
    labels, ids = torch.from_numpy(instances.labels)[match], torch.from_numpy(instances.ids)[match]
    torch.testing.assert_close(
        mask_targets(torch.from_numpy(label_maps), labels, ids, boxes, 28),
        expected,
        atol=2e-4,
        rtol=0,
    )


def test_mask_targets_of_no_box():
    empty = torch.zeros(0, dtype=torch.int64)
    assert mask_targets(
        torch.zeros(4, 8, 8, dtype=torch.int32), empty, empty, torch.zeros(0, 4), 28
    ).shape == (0, 28, 28)


def smooth(model: nn.Module) -> None:
    """Activate the heads smoothly: of millions of units some are so near 0 that a ReLU makes a
    gradient of a rounding.
    """
    for part in (model.rpn, model.roi_heads):
        for module in list(part.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(module, name, nn.SiLU())
    box_head = model.roi_heads.box_head
    box_head.forward = lambda x: F.silu(box_head.fc7(F.silu(box_head.fc6(x.flatten(1)))))


def paired_models(min_size: int, max_size: int):
    """Ours, and torchvision's own Mask R-CNN with the same weights and samplers."""
    torch.manual_seed(0)
    config = RunConfig(min_size=min_size, max_size=max_size, mask_batch_size_per_image=0)
    ours = build_model(config)
    theirs = MaskRCNN(
        resnet_fpn("resnet18"),
        len(CLASS_NAMES) + 1,
        min_size=min_size,
        max_size=max_size,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        rpn_anchor_generator=AnchorGenerator(
            tuple((s,) for s in config.anchor_sizes), (config.anchor_ratios,) * 5
        ),
        rpn_pre_nms_top_n_train=config.rpn_pre_nms_top_n_train,
        rpn_post_nms_top_n_train=config.rpn_post_nms_top_n_train,
        rpn_pre_nms_top_n_test=config.rpn_pre_nms_top_n_test,
        rpn_post_nms_top_n_test=config.rpn_post_nms_top_n_test,
        box_batch_size_per_image=config.box_batch_size_per_image,
        box_detections_per_img=config.detections_per_image,
    )
    theirs.load_state_dict(ours.state_dict())
    theirs.rpn.fg_bg_sampler = SeededSampler(256, 0.5)
    theirs.roi_heads.fg_bg_sampler = SeededSampler(config.box_batch_size_per_image, 0.25)
    return ours, theirs


def both_losses(ours, theirs, images, label_maps) -> tuple[dict, dict]:
    seeds = [11 + i for i in range(len(images))]
    theirs.rpn.fg_bg_sampler.seeds = theirs.roi_heads.fg_bg_sampler.seeds = seeds
    targets, dense = [], []
    for maps, seed in zip(label_maps, seeds, strict=True):
        targets.append(make_target(torch.from_numpy(maps)) | {"seed": seed})
        instances = find_instances(maps)
        dense.append(
            {
                "boxes": torch.from_numpy(instances.boxes),
                "labels": torch.from_numpy(instances.labels),
                "masks": dense_masks(maps, instances),
            }
        )
    return ours.train()(images, targets), theirs.train()(images, dense)


def assert_same_losses_and_gradients(ours, theirs, images, label_maps):
    losses, expected = both_losses(ours, theirs, images, label_maps)
    assert losses["loss_mask"] > 0 and losses["loss_box_reg"] > 0
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    smooth(ours), smooth(theirs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            roi_heads, "CHANNELS_LAST_FROM_PX", math.inf
        )  # gradients by the same kernels on both sides
        losses, expected = both_losses(ours, theirs, images, label_maps)
    assert losses["loss_mask"] > 0 and losses["loss_box_reg"] > 0
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for (name, mine), theirs_parameter in zip(
        ours.named_parameters(), theirs.parameters(), strict=True
    ):
        assert (
            mine.grad - theirs_parameter.grad
        ).norm() <= 2e-5 * theirs_parameter.grad.norm() + 1e-6, name


@pytest.mark.parametrize(
    ("min_size", "max_size"), [(96, 96), (160, 200)], ids=["native", "resized"]
)
def test_losses_equal_torchvisions_on_hand_made_cells(min_size, max_size):
    ours, theirs = paired_models(min_size, max_size)
    label_maps = [crowded_label_maps(96, 96), crowded_label_maps(96, 96)[:, ::-1].copy()]
    images = [torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    assert_same_losses_and_gradients(ours, theirs, images, label_maps)


def test_losses_equal_torchvisions_on_drawn_tissue_cut_by_crops():
    ours, theirs = paired_models(128, 128)
    image, maps = draw_tissue(np.random.default_rng(3))
    maps, image = (
        maps[:, 11:139, 7:135],
        torch.from_numpy(image[:, 11:139, 7:135] / np.float32(255)),
    )
    assert find_instances(maps).touches_border.any()
    assert_same_losses_and_gradients(ours, theirs, [image], [np.ascontiguousarray(maps)])


def test_losses_equal_torchvisions_on_the_real_sample(sample_data):
    import tifffile

    folder = sample_data / "hw3_sample"
    image = torch.from_numpy(
        tifffile.imread(folder / "image.tif")[:256, :256, :3] / np.float32(255)
    ).permute(2, 0, 1)
    maps = np.zeros((4, 256, 256), np.int32)
    for k in (1, 2):
        maps[k - 1] = tifffile.imread(folder / f"class{k}.tif")[:256, :256]
    assert len(find_instances(maps).ids) > 40
    ours, theirs = paired_models(256, 256)
    assert_same_losses_and_gradients(ours, theirs, [image], [maps])


def test_min_size_zero_keeps_the_images_size():
    ours, theirs = paired_models(96, 96)
    native = build_model(RunConfig(mask_batch_size_per_image=0))
    native.load_state_dict(ours.state_dict())
    assert_same_losses_and_gradients(
        native, theirs, [torch.rand(3, 96, 96)], [crowded_label_maps(96, 96)]
    )


def test_an_image_without_cells_has_no_mask_loss():
    ours, _ = paired_models(96, 96)
    losses = ours.train()(
        [torch.rand(3, 96, 96)],
        [make_target(torch.zeros(4, 96, 96, dtype=torch.int32)) | {"seed": 1}],
    )
    assert (
        losses["loss_mask"] == 0 and losses["loss_box_reg"] == 0 and losses["loss_classifier"] > 0
    )
    sum(losses.values()).backward()


def test_detections_equal_torchvisions_before_pasting():
    ours, theirs = paired_models(128, 160)
    image = torch.rand(3, 90, 111)
    with torch.no_grad():
        found, expected = ours.eval()([image])[0], theirs.eval()([image])[0]
    assert len(found["boxes"]) == len(expected["boxes"]) > 0
    for key in ("boxes", "labels", "scores"):
        torch.testing.assert_close(found[key], expected[key])
    assert found["masks"].shape == (len(found["boxes"]), 28, 28)
    assert expected["masks"].shape[1:] == (1, 90, 111)


def test_a_sample_is_drawn_from_its_own_seed_whatever_the_batch():
    labels = [torch.randint(-1, 2, (500,)) for _ in range(3)]
    sampler = SeededSampler(64, 0.25)
    sampler.seeds = [5, 6, 7]
    together = sampler(labels)
    sampler.seeds = [6]
    alone = sampler(labels[1:2])
    assert torch.equal(together[0][1], alone[0][0]) and torch.equal(together[1][1], alone[1][0])
    assert together[0][1].sum() == 16 and together[1][1].sum() == 48


@pytest.mark.parametrize("length", [3, 70, 3000])
def test_a_seeded_sample_is_torchvisions_drawn_after_that_seed(length):
    labels = torch.randint(-1, 2, (length,))
    sampler = SeededSampler(64, 0.25)
    sampler.seeds = [2**63 - 1]
    before = torch.get_rng_state()
    found = sampler([labels])
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2**63 - 1)
    expected = BalancedPositiveNegativeSampler(64, 0.25)([labels])
    assert all(one[0].equal(other[0]) for one, other in zip(found, expected, strict=True))


def test_boxes_stay_float32_under_mixed_precision():
    model = build_model(RunConfig()).eval()
    seen = []
    model.rpn.register_forward_hook(lambda module, inputs, output: seen.append(output[0][0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model([torch.rand(3, 96, 300)])[0]
    for boxes in (seen[0], found["boxes"]):
        assert boxes.dtype == torch.float32
        assert len(boxes) and (boxes != boxes.bfloat16().float()).any()
    assert found["masks"].dtype == found["scores"].dtype == torch.float32


def test_channels_last_images_give_the_same_features_and_gradients():
    """Both orders of memory, at a size at which the model takes its images channels last; in
    double, or roundings turn some ReLU.
    """
    model = build_model(RunConfig()).double().train()
    image = torch.rand(3, 256, 256, dtype=torch.float64)
    batch = model.transform([image])[0].tensors
    assert batch.is_contiguous(memory_format=torch.channels_last)
    results = []
    for images in (batch.contiguous(), batch):
        model.zero_grad()
        features = model.backbone(images)
        sum(
            (level * torch.linspace(-1, 1, level.numel()).view_as(level)).sum()
            for level in features.values()
        ).backward()
        gradients = [
            parameter.grad.clone()
            for parameter in model.backbone.parameters()
            if parameter.grad is not None
        ]
        results.append([level.detach() for level in features.values()] + gradients)
    assert len(results[0]) > 50
    for first, last in zip(*results, strict=True):
        assert (first - last).norm() <= 1e-9 * first.norm()


def test_mask_batch_size_bounds_the_mask_heads_work():
    model = build_model(RunConfig(mask_batch_size_per_image=3)).train()
    seen = []
    model.roi_heads.mask_head.register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )
    target = make_target(torch.from_numpy(crowded_label_maps(96, 96))) | {"seed": 1}
    losses = model([torch.rand(3, 96, 96)] * 2, [target, target])
    assert seen == [6] and losses["loss_mask"] > 0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([7, 14]),
    st.booleans(),
)
def test_roi_align_equals_torchvisions_and_so_do_its_gradients(
    seed, images, height, width, size, channels_last
):
    rng = torch.Generator().manual_seed(seed)
    levels = {
        str(i): torch.randn(images, 3, -(-height >> i) or 1, -(-width >> i) or 1, generator=rng)
        for i in range(3)
    }
    levels["pool"] = torch.randn(images, 3, 1, 1, generator=rng)
    if channels_last:
        levels = {
            name: level.contiguous(memory_format=torch.channels_last)
            for name, level in levels.items()
        }
    corners = (
        torch.rand(images, 9, 2, 2, generator=rng) * torch.tensor([4.0 * width, 4.0 * height]) * 1.2
        - 3
    )
    boxes = list(torch.cat([corners.amin(2), corners.amax(2)], -1))
    shapes = [(4 * height, 4 * width)] * images
    results = []
    for pool in (
        MultiScaleRoIAlign(["0", "1", "2"], size, 2),
        GatherRoIAlign(["0", "1", "2"], size, 2),
    ):
        features = {name: level.clone().requires_grad_() for name, level in levels.items()}
        pooled = pool(features, boxes, shapes)
        (pooled * torch.arange(pooled.numel()).view_as(pooled).cos()).sum().backward()
        results.append([pooled, *(features[name].grad for name in "012")])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["resnet34", "resnet50", "resnext50_32x4d", "resnet50_fpn_v2"])
def test_backbones_build_and_run(backbone):
    model = build_model(RunConfig(backbone=backbone)).eval()
    with torch.no_grad():
        detections = model([torch.rand(3, 64, 64)])[0]
    assert set(detections) == {"boxes", "labels", "scores", "masks"}


def test_parameter_counts_are_torchvisions():
    from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2

    for backbone, factory in (
        ("resnet50", maskrcnn_resnet50_fpn),
        ("resnet50_fpn_v2", maskrcnn_resnet50_fpn_v2),
    ):
        reference = factory(weights=None, weights_backbone=None, num_classes=5)
        ours = build_model(RunConfig(backbone=backbone))
        assert sum(p.numel() for p in ours.parameters()) == sum(
            p.numel() for p in reference.parameters()
        )
        assert {n: p.shape for n, p in ours.named_parameters()} == {
            n: p.shape for n, p in reference.named_parameters()
        }
    assert count_parameters(ours) < 200_000_000
