"""Weights: none, torchvision's, whole and partial local files; what was loaded is named, and only
that is frozen.
"""

import re
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import (
    MaskRCNN_ResNet50_FPN_V2_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    maskrcnn_resnet50_fpn,
)
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

from cellseg_helpers.config import RunConfig
from cellseg_helpers.model.backbones import (
    LoadReport,
    freeze_loaded,
    load_weights,
    read_weights,
    resnet_fpn,
)
from cellseg_helpers.model.build import build_model, count_parameters, outline_model, rebuild_model

PREFIXES = ("", "backbone.", "backbone.body.")


def trained(name: str = "resnet18") -> dict[str, torch.Tensor]:
    """A network's weights as after training: norms that are not at their start."""
    torch.manual_seed(7)
    model = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
    return model.state_dict()


@pytest.fixture(scope="module")
def resnet18() -> dict[str, torch.Tensor]:
    return trained()


@pytest.fixture(scope="module")
def without_layer4(resnet18) -> dict[str, torch.Tensor]:
    """As the real partial file: without layer4's 3x3 convolutions and norms and without fc."""
    missing = re.compile(r"layer4\.\d\.(conv|bn)\d\.|fc\.")
    return {name: tensor for name, tensor in resnet18.items() if not missing.match(name)}


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty cache of torchvision's weights, and no network."""

    def no_network(url, *args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def norms(module: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, child in module.named_modules() if isinstance(child, kind)}


def test_without_weights_all_is_random_and_trainable():
    model = build_model(RunConfig(weights="none", trainable_backbone_layers=0))
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert not norms(model, FrozenBatchNorm2d) and norms(model, nn.BatchNorm2d)
    assert (
        str(model.load_report)
        == f"weights none: all {len(model.load_report.random)} tensors start at random"
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_whole_local_file(tmp_path, resnet18, suffix):
    path = tmp_path / f"resnet18{suffix}"
    save_file(resnet18, path) if suffix == ".safetensors" else torch.save(resnet18, path)
    model = build_model(RunConfig(weights=str(path), trainable_backbone_layers=3))
    body = model.backbone.body.state_dict()
    expected = {
        name: tensor
        for name, tensor in resnet18.items()
        if not name.startswith("fc") and "num_batches" not in name
    }
    assert body.keys() == expected.keys()
    assert all(torch.equal(body[name], expected[name]) for name in expected)
    assert not norms(model, nn.BatchNorm2d)
    frozen = {name for name, _ in model.backbone.body.named_parameters()} - trainable(
        model.backbone.body
    )
    assert {name.split(".")[0] for name in frozen} == {"conv1", "layer1"}
    assert not {
        name for name in trainable(model.backbone.body) if name.startswith(("conv1", "layer1"))
    }
    report = model.load_report
    assert set(report.loaded) == {f"backbone.body.{name}" for name in expected}
    assert sorted(report.unused) == ["fc.bias", "fc.weight"]
    assert f"{len(expected)} tensors loaded" in str(report) and str(report).endswith(
        "not used from the file: fc"
    )


def assert_partially_loaded(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """layer4's 3x3 convolutions and norms are random and trainable; the rest is loaded, its norms
    and first layers frozen.
    """
    body, report = model.backbone.body, model.load_report
    for name, tensor in body.state_dict().items():
        if name in state:
            assert torch.equal(tensor, state[name]), name
    random_norms = {f"layer4.{block}.bn{number}" for block in (0, 1) for number in (1, 2)}
    assert norms(body, nn.BatchNorm2d) >= random_norms
    for name in norms(body, nn.BatchNorm2d):
        assert f"{name}.weight" not in state
    for name in norms(body, FrozenBatchNorm2d):
        assert f"{name}.weight" in state
    assert {"bn1", "layer1.0.bn1", "layer2.0.downsample.1", "layer3.1.bn2"} <= norms(
        body, FrozenBatchNorm2d
    )
    random = {
        name.removeprefix("backbone.body.")
        for name in report.random
        if name.startswith("backbone.body.")
    }
    convolutions = {f"layer4.{block}.conv{number}.weight" for block in (0, 1) for number in (1, 2)}
    assert convolutions | {f"{name}.weight" for name in random_norms} <= random
    assert all(name.startswith("layer4.") for name in random)
    assert random & dict(body.named_parameters()).keys() <= trainable(body)
    assert not {name for name in trainable(body) if name.startswith(("conv1", "bn1", "layer1"))}
    assert {"layer2.0.conv1.weight", "layer4.0.downsample.0.weight"} <= trainable(body)
    assert "backbone.body.layer4.0.conv1" in str(report) and "stay random" in str(report)
    assert all(
        name in report.random
        for name in ("rpn.head.cls_logits.weight", "backbone.fpn.inner_blocks.0.0.weight")
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_partial_local_file(tmp_path, without_layer4, suffix):
    path = tmp_path / f"partial{suffix}"
    save_file(without_layer4, path) if suffix == ".safetensors" else torch.save(
        {"state_dict": without_layer4}, path
    )
    model = build_model(RunConfig(weights=str(path), trainable_backbone_layers=3))
    assert_partially_loaded(model, without_layer4)
    model.train()([torch.rand(3, 64, 64)], [no_cells(64, 64)])
    moved = [
        name
        for name in norms(model.backbone.body, nn.BatchNorm2d)
        if model.backbone.body.get_submodule(name).running_mean.any()
    ]
    assert moved


def no_cells(height: int, width: int) -> dict:
    empty = torch.zeros(0, dtype=torch.int64)
    maps = torch.zeros(4, height, width, dtype=torch.int32)
    return {
        "boxes": torch.zeros(0, 4),
        "labels": empty,
        "ids": empty.int(),
        "label_maps": maps,
        "seed": 0,
    }


def test_the_real_partial_file(sample_data):
    path = sample_data.parent / "weights" / "resnet18_imagenet_without_layer4.safetensors"
    if not path.is_file():
        pytest.skip(
            "no weights/resnet18_imagenet_without_layer4.safetensors beside the real sample images"
        )
    model = build_model(RunConfig(weights=str(path), trainable_backbone_layers=3))
    assert_partially_loaded(model, read_weights(path))
    norm = model.backbone.body.bn1
    assert (
        torch.allclose(norm.running_var + norm.eps, torch.ones(64)) and not norm.running_mean.any()
    )
    assert model.load_report.unused == []


@pytest.mark.parametrize("layers", range(6))
@pytest.mark.parametrize("frozen_norms", [True, False])
def test_whole_weights_freeze_the_layers_that_torchvision_freezes(resnet18, layers, frozen_norms):
    kind = FrozenBatchNorm2d if frozen_norms else nn.BatchNorm2d
    theirs = _resnet_fpn_extractor(
        torchvision.models.resnet18(weights=None, norm_layer=kind), layers
    )
    ours = resnet_fpn("resnet18")
    report = load_weights(ours, resnet18, ("", "body."), "file")
    freeze_loaded(ours, set(report.loaded), layers, norms=frozen_norms)
    assert trainable(ours) == trainable(theirs)
    assert norms(ours, FrozenBatchNorm2d) == norms(theirs, FrozenBatchNorm2d)


def test_frozen_norms_compute_what_the_loaded_ones_do(resnet18):
    ours, reference = resnet_fpn("resnet18"), resnet_fpn("resnet18")
    for model in (ours, reference):
        loaded = load_weights(model, resnet18, ("", "body."), "file").loaded
    freeze_loaded(ours, set(loaded), 3, norms=True)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found, expected = ours.train().body(image), reference.eval().body(image)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


def test_a_finished_runs_weights_start_another_run(tmp_path, resnet18):
    torch.save(resnet18, tmp_path / "a.pth")
    first = build_model(RunConfig(weights=str(tmp_path / "a.pth")))
    save_file(
        {name: tensor.contiguous() for name, tensor in first.state_dict().items()},
        tmp_path / "best.safetensors",
    )
    again = build_model(RunConfig(weights=str(tmp_path / "best.safetensors")))
    assert again.load_report.random == again.load_report.unused == []
    assert all(
        torch.equal(tensor, first.state_dict()[name]) for name, tensor in again.state_dict().items()
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weights", ["none", "partial.pth", "partial.safetensors", "coco"])
def test_an_outline_reports_what_the_model_would(torch_home, tmp_path, without_layer4, weights):
    """It is that model without its values: names, shapes, what was loaded, what is frozen."""
    coco = (
        maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        if weights == "coco"
        else {}
    )
    torch.save(coco, torch_home / MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url.rsplit("/", 1)[-1])
    torch.save(without_layer4, tmp_path / "partial.pth")
    save_file(without_layer4, tmp_path / "partial.safetensors")
    where = str(tmp_path / weights) if "." in weights else weights
    config = RunConfig(
        backbone="resnet50" if weights == "coco" else "resnet18",
        weights=where,
        trainable_backbone_layers=2,
    )
    outline, model = outline_model(config), build_model(config)
    assert outline.load_report == model.load_report and count_parameters(
        outline
    ) == count_parameters(model)
    for (name, empty), (own_name, own) in zip(
        outline.named_parameters(), model.named_parameters(), strict=True
    ):
        assert (name, empty.shape, empty.requires_grad, empty.is_meta) == (
            own_name,
            own.shape,
            own.requires_grad,
            True,
        )
    assert outline.state_dict().keys() == model.state_dict().keys()


def test_imagenet_without_network_and_cache_says_what_to_do(torch_home):
    with pytest.raises(ValueError) as caught:
        build_model(RunConfig(weights="imagenet"))
    message = str(caught.value)
    assert re.fullmatch(
        r"weights 'imagenet' need resnet18-f37072fd\.pth, which is not in .*checkpoints and could not be downloaded "
        r"\(.*no network in tests.*\); put the file there, give weights as the path of a local file, or use weights none",
        message,
    )
    assert str(torch_home) in message


def test_imagenet_from_the_cache(torch_home, resnet18):
    torch.save(resnet18, torch_home / "resnet18-f37072fd.pth")
    model = build_model(RunConfig(weights="imagenet", trainable_backbone_layers=2))
    assert torch.equal(
        model.backbone.body.layer4[1].conv2.weight, resnet18["layer4.1.conv2.weight"]
    )
    frozen = {name for name, _ in model.backbone.body.named_parameters()} - trainable(
        model.backbone.body
    )
    assert {name.split(".")[0] for name in frozen} == {"conv1", "layer1", "layer2"}
    assert model.load_report.source == "imagenet"


def test_a_damaged_file_in_the_cache_is_named(torch_home):
    (torch_home / "resnet18-f37072fd.pth").write_bytes(b"half a download")
    with pytest.raises(ValueError, match="resnet18-f37072fd.pth"):
        build_model(RunConfig(weights="imagenet"))


def test_coco_weights_leave_the_predictors_random(torch_home):
    torch.manual_seed(1)
    published = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    torch.save(published, torch_home / MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url.rsplit("/", 1)[-1])
    model = build_model(
        RunConfig(backbone="resnet50", weights="coco", anchor_ratios=[0.5, 1.0, 2.0])
    )
    state = model.state_dict()
    predictors = {
        name
        for name in state
        if name.startswith("roi_heads.box_predictor") or "mask_fcn_logits" in name
    }
    assert set(model.load_report.random) == predictors and len(predictors) == 6
    for name in (
        "backbone.body.layer3.2.conv1.weight",
        "roi_heads.mask_predictor.conv5_mask.weight",
        "rpn.head.conv.0.0.weight",
    ):
        assert torch.equal(state[name], published[name])
    assert not norms(model, nn.BatchNorm2d)


def test_coco_weights_exist_for_two_backbones_only(torch_home):
    with pytest.raises(
        ValueError,
        match="no COCO weights for backbone 'resnet18', only for resnet50, resnet50_fpn_v2",
    ):
        build_model(RunConfig(weights="coco"))
    file_name = MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url.rsplit("/", 1)[-1]
    with pytest.raises(ValueError, match=f"weights 'coco' need {file_name}, which is not in"):
        build_model(RunConfig(backbone="resnet50_fpn_v2", weights="coco"))


@pytest.mark.parametrize("weights", ["none", "imagenet", "partial", "coco"])
def test_a_trained_model_is_rebuilt_without_the_weights_it_started_from(
    torch_home, tmp_path, resnet18, without_layer4, weights
):
    backbone = "resnet50" if weights == "coco" else "resnet18"
    coco = (
        maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        if weights == "coco"
        else {}
    )
    torch.save(coco, torch_home / MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url.rsplit("/", 1)[-1])
    torch.save(resnet18, torch_home / "resnet18-f37072fd.pth")
    torch.save(without_layer4, tmp_path / "partial.pth")
    where = str(tmp_path / "partial.pth") if weights == "partial" else weights
    config = RunConfig(backbone=backbone, weights=where, trainable_backbone_layers=2)
    model = build_model(config)
    for file in (*torch_home.iterdir(), tmp_path / "partial.pth"):
        file.unlink()
    again = rebuild_model(config, model.state_dict())
    assert [
        (name, type(module), getattr(module, "eps", None)) for name, module in again.named_modules()
    ] == [
        (name, type(module), getattr(module, "eps", None)) for name, module in model.named_modules()
    ]
    assert trainable(again) == trainable(model)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_rebuilt_model_refuses_weights_of_another(resnet18):
    with pytest.raises(
        ValueError, match="the weights do not fit a model of these settings \\(Error"
    ):
        rebuild_model(RunConfig(), resnet18)


def test_weights_of_another_network_are_refused(tmp_path):
    save_file(
        {"encoder.weight": torch.ones(3), "conv1.weight": torch.ones(2)},
        tmp_path / "other.safetensors",
    )
    with pytest.raises(
        ValueError,
        match="none of its 2 tensors fits this model \\(first name in the file: 'conv1.weight'\\).*backbone",
    ):
        build_model(RunConfig(weights=str(tmp_path / "other.safetensors")))


class Runs:
    """A pickle that would run code."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        (
            "none.pth",
            lambda path: None,
            "weights file {path} does not exist; give an existing file, or one of none, imagenet, coco",
        ),
        ("folder", lambda path: path.mkdir(), "weights file {path} does not exist"),
        (
            "a.pth",
            lambda path: path.write_bytes(b"hello"),
            "weights file {path} cannot be read \\(.+\\); it must be .safetensors",
        ),
        (
            "b.pth",
            lambda path: path.write_bytes(b""),
            "weights file {path} cannot be read \\(.+\\); it must be .safetensors",
        ),
        (
            "a.safetensors",
            lambda path: path.write_bytes(b"hello"),
            "weights file {path} cannot be read \\(.+\\)",
        ),
        (
            "c.pth",
            lambda path: torch.save([1, 2], path),
            "weights file {path} holds no table of tensors by name",
        ),
        (
            "d.pth",
            lambda path: torch.save({}, path),
            "weights file {path} holds no table of tensors by name",
        ),
        (
            "e.pth",
            lambda path: torch.save({"a": 1}, path),
            "weights file {path} holds no table of tensors by name",
        ),
    ],
)
def test_a_file_that_holds_no_weights_is_named(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match="^" + message.format(path=re.escape(str(path)))) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    torch.save({"a": Runs(str(tmp_path / "ran"))}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="weights file .*a.pth cannot be read"):
        read_weights(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_the_prefix_that_places_most_is_taken():
    model = nn.ModuleDict(
        {"backbone": nn.ModuleDict({"body": nn.Linear(2, 3)}), "weight": nn.Linear(1, 1)}
    )
    report = load_weights(
        model, {"weight": torch.ones(3, 2), "bias": torch.ones(4)}, PREFIXES, "file"
    )
    assert report == LoadReport(
        "file",
        ["backbone.body.weight"],
        ["backbone.body.bias", "weight.weight", "weight.bias"],
        ["bias"],
    )
    assert model["backbone"]["body"].weight.eq(1).all()
