"""Each report's system is really that system: the model, optimizer and schedule that its parameter
file makes.
"""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d

from cellseg_helpers import engine
from cellseg_helpers.config import ROOT, RunConfig
from cellseg_helpers.data.cache import CellDataset
from cellseg_helpers.model.backbones import CBAM, SingleMapBackbone
from cellseg_helpers.model.build import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_model,
    channel_statistics,
    count_parameters,
    rebuild_model,
)
from study import runs as study

# What a report says and its runs do not share (beside the run that differs from the report's own
# system in these settings)
DIFFERS = {
    "a/resnet18": {"backbone"},
    "a/resnet50": {"backbone"},
    "a/default_anchors": {"anchor_sizes", "anchor_ratios"},
    "b/resnet50": {"backbone", "heads", "weights"},
    "b/resnext50": {"backbone", "heads", "weights"},
    "b/v2_whole": {"heads"},
    "c/flip_colour_rotation": {"augmentation"},
    "d/fpn": {"attention"},
    "d/no_fpn": {"attention", "neck"},
    "e/base": {"anchor_sizes"},
    "e/basic": {"augmentation"},
    "e/none": {"augmentation"},
}


def system(key: str, **changes) -> RunConfig:
    """A run at full scale, from random weights."""
    return replace(
        study.settings(key, "full", "drawn", 0), **{"weights": "none", "precision": "32", **changes}
    )


def rate_after(config: RunConfig, steps: int = 30) -> float:
    """The learning rate after so many steps of an epoch of 10, without warm-up."""
    _, optimizer = after_a_step(config)
    per_step, _ = engine.make_schedulers(optimizer, config, steps_per_epoch=10)
    for _ in range(steps):
        optimizer.step()
        per_step.step()
    return optimizer.param_groups[0]["lr"]


def after_a_step(config: RunConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small stand-in's optimizer after one step, made as ``fit`` makes it."""
    model = nn.Linear(4, 2)
    optimizer = engine.make_optimizer(model, config)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("key", study.run_keys())
@pytest.mark.parametrize("scale", ["quick", "sample", "full"])
def test_every_parameter_file_holds_known_settings_of_the_right_type(key, scale):
    files = study.parameter_files(key, scale)
    text = (ROOT / files[0]).read_text()
    assert text.startswith(("# Report ", "# Beside report ")) and len(text.splitlines()[0]) > 20
    merged = {}
    for file in files:
        merged |= yaml.safe_load((ROOT / file).read_text())
    config = RunConfig.from_yaml(*files)
    assert merged.items() <= config.to_dict().items()
    assert config.scale == scale
    if scale == "quick":
        assert config.weights == "none" and config.epochs * config.steps_per_epoch <= 50


@pytest.mark.parametrize(("key", "names"), DIFFERS.items())
def test_the_runs_of_a_comparison_differ_in_nothing_else(key, names):
    final = next(final for final in study.FINALS if final[0] == key[0])
    assert system(key).differences(system(final).to_dict()).keys() <= names | {"weights"}
    with_weights = study.settings(key, "full", "drawn", 0).differences(
        study.settings(final, "full", "drawn", 0).to_dict()
    )
    assert with_weights.keys() == names


def test_every_run_is_a_final_or_differs_from_one():
    assert sorted([*study.FINALS, *DIFFERS]) == [key for key in study.run_keys() if "+" not in key]


@pytest.mark.parametrize("key", [key for key in study.run_keys() if "+" in key])
def test_a_finding_changes_what_its_file_says_and_nothing_else(key):
    changes = yaml.safe_load((ROOT / study.FINDINGS / f"{key}.yaml").read_text())
    base = study.settings(key.split("+")[0], "full", "drawn", 0)
    assert (
        study.settings(key, "full", "drawn", 0).differences(base.to_dict()).keys() == changes.keys()
    )


def test_a_has_eight_ratios_a_level_and_a_longest_side_of_1024():
    config = system("a/resnet101")
    model = build_model(config)
    generator = model.rpn.anchor_generator
    assert generator.num_anchors_per_location() == [8] * 5
    for size, cell in zip((16, 32, 48, 64, 96), generator.cell_anchors, strict=True):
        width, height = (cell[:, 2:] - cell[:, :2]).T
        assert torch.allclose((width * height).sqrt(), torch.full((8,), float(size)), atol=1.5)
        assert torch.allclose(
            height / width, torch.tensor([0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4]), rtol=0.2
        )
    resized, _ = model.transform.resize(torch.zeros(3, 300, 600))
    assert resized.shape[1:] == (512, 1024)
    assert len(model.backbone.body.layer3) == 23
    model, optimizer = after_a_step(config)
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == 5e-5
    assert (config.epochs, config.batch_size, config.weight_decay) == (150, 2, 0)
    assert config.scheduler == "none" and rate_after(config) == 5e-5
    assert (
        build_model(system("a/default_anchors")).rpn.anchor_generator.num_anchors_per_location()
        == [3] * 5
    )


def test_b_is_a_v2_backbone_in_a_v1_model():
    config = system("b/v2_backbone", trainable_backbone_layers=5)
    model, whole = (
        build_model(config),
        build_model(system("b/v2_whole", trainable_backbone_layers=5)),
    )
    assert count_parameters(model) == pytest.approx(43.99e6, rel=1e-3)
    assert count_parameters(whole) == pytest.approx(45.90e6, rel=1e-3)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.backbone.fpn.modules())
    assert isinstance(model.roi_heads.box_head, TwoMLPHead) and isinstance(
        whole.roi_heads.box_head, FastRCNNConvFCHead
    )
    assert (len(model.rpn.head.conv), len(whole.rpn.head.conv)) == (1, 2)
    assert not [m for m in model.roi_heads.mask_head.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in whole.roi_heads.mask_head.modules() if isinstance(m, nn.BatchNorm2d)]
    assert model.backbone.state_dict().keys() == whole.backbone.state_dict().keys()
    assert (
        config.instance_reading == "connected_components"
        and config.truth_reading == "pixel_values"
        and config.keep_every_epoch
    )
    _, optimizer = after_a_step(config)
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == 5e-4
    assert (
        config.scheduler == "none"
        and rate_after(config) == 5e-4
        and (config.epochs, config.batch_size) == (5, 2)
    )


def test_b_takes_the_backbone_alone_from_the_pretrained_model(monkeypatch):
    whole = build_model(system("b/v2_whole"))
    monkeypatch.setattr(
        "cellseg_helpers.model.backbones.published_weights", lambda *arguments: whole.state_dict()
    )
    model = build_model(study.settings("b/v2_backbone", "full", "drawn", 0))
    assert {name.split(".")[0] for name in model.load_report.loaded} == {"backbone"}
    norms = [
        m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)
    ]
    assert norms and all(isinstance(norm, nn.BatchNorm2d) for norm in norms)


def test_c_is_sgd_with_a_plateau_on_validation_ap50():
    config = system("c/final")
    assert config.monitor == "validation_ap50" and config.augmentation == "none"
    model = build_model(config)
    assert model.rpn.anchor_generator.num_anchors_per_location() == [3] * 5 and isinstance(
        model.roi_heads.box_head, TwoMLPHead
    )
    assert len(model.backbone.body.layer3) == 6 and not [
        m for m in model.modules() if isinstance(m, CBAM)
    ]
    assert model.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 5
    _, optimizer = after_a_step(config)
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.SGD
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.005, 0.9, 5e-4)
    assert all("momentum_buffer" in state for state in optimizer.state.values())
    _, plateau = engine.make_schedulers(optimizer, config, steps_per_epoch=10)
    assert plateau.mode == "max"
    for value in [0.3] * (config.plateau_patience + 2):
        plateau.step(value)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0005)


def test_d_has_attention_after_each_stage():
    model, plain = build_model(system("d/fpn_cbam")), build_model(system("d/fpn"))
    stages = [getattr(model.backbone.body, f"layer{n}") for n in (1, 2, 3, 4)]
    assert [type(stage[-1]) for stage in stages] == [CBAM] * 4
    assert not [m for m in plain.modules() if isinstance(m, CBAM)]
    channels = np.array([256, 512, 1024, 2048])
    assert (
        count_parameters(model) - count_parameters(plain)
        == (2 * channels**2 // 16).sum() + 4 * 2 * 7**2
    )
    extra = set(model.state_dict()) - set(plain.state_dict())
    assert set(plain.state_dict()) <= set(model.state_dict()) and all(
        ".cbam." in name for name in extra
    )


def test_cbam_is_the_papers_equations():
    torch.manual_seed(0)
    cbam, x = CBAM(32), torch.randn(2, 32, 5, 7)
    w0, w1 = cbam.channel[0].weight[:, :, 0, 0], cbam.channel[2].weight[:, :, 0, 0]
    assert w0.shape == (2, 32)

    def mlp(v: torch.Tensor) -> torch.Tensor:
        return (v @ w0.T).relu() @ w1.T

    attended = (
        x
        * torch.sigmoid(mlp(x.flatten(2).mean(2)) + mlp(x.flatten(2).max(2).values))[
            :, :, None, None
        ]
    )
    maps = torch.stack([attended.mean(1), attended.max(1).values], 1)
    expected = attended * torch.sigmoid(nn.functional.conv2d(maps, cbam.spatial.weight, padding=3))
    torch.testing.assert_close(cbam(x), expected)


def test_cbam_stays_trainable_beside_frozen_stages():
    config = system("d/fpn_cbam", trainable_backbone_layers=0)
    rebuilt = rebuild_model(replace(config, weights="imagenet"))
    trainable = {
        name
        for name, parameter in rebuilt.backbone.body.named_parameters()
        if parameter.requires_grad
    }
    assert trainable and all(".cbam." in name for name in trainable)


def test_d_without_a_pyramid_has_one_map_at_stride_16():
    config = system("d/no_fpn", min_size=0, max_size=0)
    model = build_model(config)
    assert isinstance(model.backbone, SingleMapBackbone)
    features = model.backbone(torch.zeros(1, 3, 64, 96))
    assert [(name, tuple(f.shape)) for name, f in features.items()] == [("0", (1, 256, 4, 6))]
    assert isinstance(features, OrderedDict)
    assert model.rpn.anchor_generator.num_anchors_per_location() == [15]
    assert isinstance(model.roi_heads.box_head, TwoMLPHead)
    assert not hasattr(model.backbone.body, "layer4")
    detections = model.eval()([torch.rand(3, 64, 96)])
    assert detections[0]["masks"].shape[1:] == (28, 28)


def test_d_is_adamw_from_2e_4_to_5e_6_with_the_datas_own_statistics():
    config = system("d/fpn_cbam")
    model = build_model(config)
    model.transform.learn_statistics([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    grey = model.transform.normalize(torch.full((3, 2, 2), 0.5))[:, 0, 0]
    torch.testing.assert_close(grey, torch.tensor([1.0, 0.6, 1 / 3]))
    assert (
        config.normalization == "data"
        and config.box_score_thresh == 0.5
        and config.augmentation == "joint_full"
    )
    assert config.keep_every_epoch
    assert study.settings("d/fpn_cbam", "full", "drawn", 0).precision == "16-mixed"
    _, optimizer = after_a_step(config)
    assert (
        type(optimizer) is torch.optim.AdamW and optimizer.param_groups[0]["weight_decay"] == 1e-4
    )
    schedule, _ = engine.make_schedulers(optimizer, config, steps_per_epoch=1)
    assert optimizer.param_groups[0]["lr"] == 2e-4
    for _ in range(config.epochs):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-6)


def test_e_has_small_anchors_more_proposals_and_stops_early():
    config = system("e/full")
    model = build_model(config)
    sizes = [
        (cell[:, 2:] - cell[:, :2]).prod(1).sqrt().mean().item()
        for cell in model.rpn.anchor_generator.cell_anchors
    ]
    assert np.allclose(sizes, [8, 16, 32, 64, 128], atol=0.5)
    model.train()
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()) == (4000, 4000)
    model.eval()
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()) == (2000, 2000)
    assert model.roi_heads.nms_thresh == 0.7 and model.roi_heads.detections_per_img == 300
    assert (
        config.min_instance_area_px == 36
        and config.early_stopping_patience == 5
        and config.monitor == "validation_loss"
    )
    flat = [{"validation_loss": 1.0}] * 6
    assert engine.stopped_early(flat, config) and not engine.stopped_early(flat[:5], config)
    _, optimizer = after_a_step(config)
    assert type(optimizer) is torch.optim.SGD and optimizer.param_groups[0]["lr"] == 1e-3
    _, plateau = engine.make_schedulers(optimizer, config, steps_per_epoch=10)
    rates = []
    for loss in [1.0] * 5:  # one that is the best, then four that are not better: patience 3
        plateau.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert plateau.mode == "min" and rates == [1e-3] * 4 + [5e-4]


def test_normalisations_are_what_their_names_say():
    image = torch.rand(3, 4, 4)
    m, s = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    once = (image - m) / s
    for name, expected in (
        ("imagenet", once),
        ("imagenet_twice", (once - m) / s),
        ("imagenet_of_0_255", (255 * image - m) / s),
    ):
        mean, std = (torch.tensor(values)[:, None, None] for values in channel_statistics(name))
        torch.testing.assert_close((image - mean) / std, expected, rtol=1e-4, atol=1e-4)


def test_statistics_of_images_are_those_of_all_their_pixels():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3, 5, n), dtype=np.uint8) for n in (4, 9, 7)]

    class Images:
        def __getitem__(self, i: int):
            return type("CellImage", (), {"image": images[i]})

    dataset: CellDataset = Images()
    mean, std = engine.image_statistics(dataset, [0, 2])
    pixels = np.concatenate([images[i].reshape(3, -1) for i in (0, 2)], 1) / 255
    assert np.allclose(mean, pixels.mean(1)) and np.allclose(std, pixels.std(1))


def test_learned_statistics_are_saved_with_the_weights():
    config = replace(system("d/fpn"), backbone="resnet18", min_size=0, max_size=0)
    model = build_model(config)
    model.transform.learn_statistics([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    rebuilt = rebuild_model(config, model.state_dict())
    image = torch.rand(3, 8, 8)
    torch.testing.assert_close(rebuilt.transform.normalize(image), (image - image.new_tensor([0.1, 0.2, 0.3])[:, None, None])
                               / image.new_tensor([0.4, 0.5, 0.6])[:, None, None])  # fmt: skip
    assert not [
        name for name in (*model.load_report.random, *model.load_report.loaded) if "image_" in name
    ]


def test_unknown_runs_and_scales_are_named():
    with pytest.raises(
        ValueError, match="unknown run 'a/resnet102'; one of a/default_anchors, .*e/full"
    ):
        study.parameter_files("a/resnet102", "quick")
    with pytest.raises(ValueError, match="unknown scale 'tiny'; one of full, sample, quick"):
        study.parameter_files("a/resnet101", "tiny")
