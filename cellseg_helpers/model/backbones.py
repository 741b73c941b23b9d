"""Residual networks with or without a feature pyramid, attention, and the loading of weights.

A new backbone needs a name in ``config.Backbone`` and, if torchvision lacks it, a constructor here
that ``build.build_model`` calls.
"""

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from cellseg_helpers.config import one_line

NO_WEIGHTS = ("num_batches_tracked", "transform.image_mean", "transform.image_std")


class LoadReport(NamedTuple):
    """Which tensors of a model were loaded from a weights file, by their names in the model."""

    source: str
    loaded: list[str]
    random: list[str]  # not in the file: they keep their random values
    unused: list[str]  # names in the file: not in the model, or of another shape there

    def __str__(self) -> str:
        if not self.loaded:
            return f"weights {self.source}: all {len(self.random)} tensors start at random"
        text = f"weights {self.source}: {len(self.loaded)} tensors loaded, "
        text += f"{len(self.random)} stay random"
        text += f" ({_modules(self.random)})" if self.random else ""
        return text + (f"; not used from the file: {_modules(self.unused)}" if self.unused else "")


def resnet_fpn(name: str, channels: int = 256, stem_stride: int = 4) -> BackboneWithFPN:
    """torchvision's ResNet, ResNeXt or ``resnet50_fpn_v2`` (with batch norms in the pyramid) at
    random weights. Its five levels have strides from ``stem_stride`` to 16 times that; 4 is
    torchvision's, 2 takes the stride from the first pooling.
    """
    network = torchvision.models.get_model(name.removesuffix("_fpn_v2"), weights=None)
    network.maxpool.stride = stem_stride // 2
    norm_layer = nn.BatchNorm2d if name.endswith("_v2") else None
    stages = {f"layer{number}": str(number - 1) for number in (1, 2, 3, 4)}
    widths = [network.inplanes // 8 * 2**stage for stage in range(4)]
    return BackboneWithFPN(network, stages, widths, channels, norm_layer=norm_layer)


class SingleMapBackbone(nn.Module):
    """A ResNet without a feature pyramid: one map at stride 16.

    The map is C4, the output of ``layer3``, as in He et al. ("Mask R-CNN", 2017) where they use
    no pyramid. A 1x1 convolution gives it as many channels as the pyramid has, so that RPN and
    heads are the same with and without a pyramid. (He et al. use ``layer4`` as the box head; its
    map, C5 at stride 32, would be coarser than most cells.)
    """

    def __init__(self, name: str, channels: int):
        super().__init__()
        self.out_channels = channels
        network = torchvision.models.get_model(name, weights=None)
        self.body = IntermediateLayerGetter(network, {"layer3": "0"})
        self.lateral = nn.Conv2d(network.inplanes // 2, self.out_channels, 1)
        nn.init.kaiming_uniform_(self.lateral.weight, a=1)  # as torchvision's pyramid
        nn.init.zeros_(self.lateral.bias)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict({"0": self.lateral(self.body(x)["0"])})


class CBAM(nn.Module):
    """Convolutional block attention over a map F, float [N, C, H, W]: first of channels, then of
    pixels (Woo et al., "CBAM", 2018, equations 1 to 3).

    ``F' = Mc(F) * F`` with ``Mc(F) = sigmoid(W1 relu(W0 mean(F)) + W1 relu(W0 max(F)))`` over all
    pixels, and ``F'' = Ms(F') * F'`` with ``Ms(F') = sigmoid(conv7x7([mean(F'), max(F')]))`` over
    all channels. W0 reduces the channels to a 16th; no layer has a bias.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channel = nn.Sequential(
            nn.Conv2d(channels, channels // 16, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // 16, channels, 1, bias=False),
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean, maximum = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        x = x * (self.channel(mean) + self.channel(maximum)).sigmoid()
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.spatial(maps).sigmoid()


def add_cbam(backbone: nn.Module) -> None:
    """Append a ``CBAM`` to each stage (``layer1``, ...) of a backbone's ``body``, in place."""
    for name, stage in backbone.body.named_children():
        if name.startswith("layer"):
            last = getattr(stage[-1], "conv3", stage[-1].conv2)
            stage.add_module("cbam", CBAM(last.out_channels))


def tensor_names(names: Iterable[str]) -> list[str]:
    """The names of tensors that can be loaded: without counters and image statistics."""
    return [name for name in names if not name.endswith(NO_WEIGHTS)]


def load_weights(
    model: nn.Module, state: dict[str, Tensor], prefixes: tuple[str, ...], source: str
) -> LoadReport:
    """Copy every tensor of ``state`` that the model has in the same shape.

    Args:
        prefixes: name in the model = prefix + name in the file. Each prefix is tried, such as ""
            and "backbone.body."; the one that fits the most tensors is used.
        source: what the report calls the file.

    Raises:
        ValueError: no tensor fits.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names, model_names = tensor_names(state), tensor_names(shapes)
    fitting = [
        {prefix + name: name for name in names if shapes.get(prefix + name) == state[name].shape}
        for prefix in prefixes
    ]
    file_name_of = max(fitting, key=len)
    if not file_name_of:
        raise ValueError(
            f"weights {source}: none of its {len(names)} tensors fits this model (first name in "
            f"the file: {next(iter(names), None)!r}); check that backbone names the network that "
            "the file was saved from"
        )
    loaded = {name: state[file_name] for name, file_name in file_name_of.items()}
    model.load_state_dict(loaded, strict=False)
    random = [name for name in model_names if name not in loaded]
    used = set(file_name_of.values())
    return LoadReport(source, list(loaded), random, [name for name in names if name not in used])


def freeze_loaded(
    backbone: nn.Module, loaded: set[str], trainable_layers: int, norms: bool
) -> None:
    """Freeze loaded weights: those of all but the body's last ``trainable_layers`` layers and, with
    ``norms``, those of its batch norms. Weights that were not loaded stay trainable: training
    diverges with a batch norm frozen at random weights; a frozen random convolution gives noise.

    Args:
        loaded: names of loaded tensors, relative to ``backbone``.
        trainable_layers: 0 to 5, counted from layer4 back to conv1, as in torchvision.
        norms: turn loaded batch norms into ``FrozenBatchNorm2d``.
    """
    layers = ("layer4", "layer3", "layer2", "layer1", "conv1", "bn1")
    frozen = layers[trainable_layers:] if trainable_layers < 5 else ()
    starts = tuple(f"body.{layer}." for layer in frozen)
    for name, parameter in backbone.named_parameters():
        if name in loaded and name.startswith(starts):
            parameter.requires_grad_(False)
    if not norms:
        return
    for name, module in list(backbone.body.named_modules()):
        own = [f"body.{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if isinstance(module, nn.BatchNorm2d) and loaded.issuperset(own):
            frozen_norm = FrozenBatchNorm2d(module.num_features, eps=module.eps)
            frozen_norm.load_state_dict(module.state_dict(), strict=False)
            backbone.body.set_submodule(name, frozen_norm)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.pth`` or ``.pt`` file.

    Raises:
        ValueError: the file does not exist, cannot be read, or holds no tensors by name.
    """
    if not path.is_file():
        raise ValueError(
            f"weights file {path} does not exist; "
            "give an existing file, or one of none, imagenet, coco"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"weights file {path} cannot be read ({one_line(error)}); "
            "it must be .safetensors or a .pth of tensors"
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = state.values() if isinstance(state, dict) else ()
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ValueError(
            f"weights file {path} holds no table of tensors by name; save model.state_dict() to it"
        )
    return state


def published_weights(weights_enum, setting: str) -> dict[str, Tensor]:
    """torchvision's published weights, from its cache; downloaded if they are not in it.

    Raises:
        ValueError: they are not in the cache and cannot be downloaded.
    """
    try:
        return weights_enum.get_state_dict(progress=True, check_hash=True)
    except Exception as error:
        file_name = weights_enum.url.rsplit("/", 1)[-1]
        raise ValueError(
            f"weights {setting!r} need {file_name}, which is not in "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'} and could not be downloaded "
            f"({one_line(error)}); put the file there, give weights as the path of a local file, "
            "or use weights none"
        ) from None


def _modules(names: list[str]) -> str:
    """The first eight modules that hold the named tensors, and the number of further ones."""
    modules = list(dict.fromkeys(".".join(name.split(".")[:-1][:5]) for name in names))
    more = f" and {len(modules) - 8} more modules" if len(modules) > 8 else ""
    return ", ".join(modules[:8]) + more
