"""Residual networks with and without a feature pyramid, attention in them, and the loading of whole
or partial weights.
"""

from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

NO_WEIGHTS = (
    "num_batches_tracked",
    "transform.image_mean",
    "transform.image_std",
)  # ends of names of tensors that no file gives


class LoadReport(NamedTuple):
    """What a weights file gave a model; names are the model's."""

    source: str
    loaded: list[str]
    random: list[str]
    unused: list[str]  # in the file, but with no place (or another shape) in the model

    def __str__(self) -> str:
        if not self.loaded:
            return f"weights {self.source}: all {len(self.random)} tensors start at random"
        text = f"weights {self.source}: {len(self.loaded)} tensors loaded, {len(self.random)} stay random"
        if self.random:
            text += f" ({_modules(self.random)})"
        return text + (f"; not used from the file: {_modules(self.unused)}" if self.unused else "")


def resnet_fpn(name: str, fpn_norm: type[nn.Module] | None = None) -> BackboneWithFPN:
    """A ResNet or ResNeXt of torchvision with a 256-channel feature pyramid of 5 levels (strides 4
    to 64), at random weights.
    """
    return _resnet_fpn_extractor(
        torchvision.models.get_model(name, weights=None), trainable_layers=5, norm_layer=fpn_norm
    )


class SingleMapBackbone(nn.Module):
    """A ResNet without a feature pyramid: one map of 256 channels at stride 16.

    The map is C4, the output of ``layer3``, as in the Mask R-CNN without a pyramid of He et al.
    ("Mask R-CNN", 2017), here followed by a 1x1 convolution to the pyramid's 256 channels, so that
    RPN and heads are the same with and without a pyramid. (Theirs uses ``layer4`` as the box head;
    C5, at stride 32, is coarser than most cells.)
    """

    out_channels = 256

    def __init__(self, name: str):
        super().__init__()
        net = torchvision.models.get_model(name, weights=None)
        self.body = IntermediateLayerGetter(net, {"layer3": "0"})
        self.lateral = nn.Conv2d(net.inplanes // 2, self.out_channels, 1)
        nn.init.kaiming_uniform_(self.lateral.weight, a=1)  # as torchvision's pyramid
        nn.init.zeros_(self.lateral.bias)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict({"0": self.lateral(self.body(x)["0"])})


class CBAM(nn.Module):
    """Convolutional block attention, channel then spatial (Woo et al., "CBAM", 2018, equations 1 to
    3).

    ``F' = Mc(F) * F`` with ``Mc(F) = sigmoid(W1 relu(W0 mean(F)) + W1 relu(W0 max(F)))`` over all
    pixels, and ``F'' = Ms(F') * F'`` with ``Ms(F') = sigmoid(conv7x7([mean(F'), max(F')]))`` over
    all channels. W0 narrows the channels 16-fold; no layer has a bias. Takes and gives float [N, C,
    H, W].
    """

    def __init__(self, channels: int, reduction: int = 16, kernel_size: int = 7):
        super().__init__()
        self.channel = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, 1, bias=False),
        )
        self.spatial = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = (
            x
            * (
                self.channel(x.mean((2, 3), keepdim=True))
                + self.channel(x.amax((2, 3), keepdim=True))
            ).sigmoid()
        )
        return (
            x
            * self.spatial(
                torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
            ).sigmoid()
        )


def add_cbam(backbone: nn.Module) -> None:
    """Put a ``CBAM`` at the end of each stage (``layer1`` ..) of a backbone's ``body``, in place;
    names of weights stay as they are.
    """
    for name, stage in backbone.body.named_children():
        if name.startswith("layer"):
            block = stage[-1]
            stage.add_module(
                "cbam", CBAM((block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels)
            )


def load_weights(
    model: nn.Module, state: dict[str, Tensor], prefixes: tuple[str, ...], source: str
) -> LoadReport:
    """Copy every tensor of ``state`` that has a place of the same shape in ``model``.

    Args:
        model: changed in place.
        state: tensors by name.
        prefixes: where the file's names may stand in the model's, such as ``("",
            "backbone.body.")``; the one that places most tensors is taken.
        source: name for the report.

    Raises:
        ValueError: no tensor fits.
    """
    own = {
        name: tensor for name, tensor in model.state_dict().items() if not name.endswith(NO_WEIGHTS)
    }
    state = {name: tensor for name, tensor in state.items() if not name.endswith(NO_WEIGHTS)}

    def fitting(prefix: str) -> dict[str, str]:
        return {
            prefix + n: n
            for n, t in state.items()
            if prefix + n in own and own[prefix + n].shape == t.shape
        }

    placed = max((fitting(prefix) for prefix in prefixes), key=len)
    if not placed:
        raise ValueError(
            f"weights {source}: none of its {len(state)} tensors fits this model (first name in the file: {next(iter(state), None)!r}); "
            "check that backbone names the network that the file was saved from"
        )
    model.load_state_dict({mine: state[theirs] for mine, theirs in placed.items()}, strict=False)
    used = set(placed.values())
    return LoadReport(
        source,
        list(placed),
        [n for n in own if n not in placed],
        [n for n in state if n not in used],
    )


def freeze_loaded(
    backbone: nn.Module, loaded: set[str], trainable_layers: int, norms: bool
) -> None:
    """Freeze what was loaded: the weights of all but the body's last ``trainable_layers`` layers
    and, with ``norms``, its norms.

    A frozen norm at random weights diverges, and a frozen random convolution is noise, so what was
    not loaded stays trainable.

    Args:
        backbone: changed in place.
        loaded: names of loaded tensors, relative to ``backbone``.
        trainable_layers: 0 to 5, counted from layer4 back to conv1, as in torchvision.
        norms: turn loaded batch norms into ``FrozenBatchNorm2d``.
    """
    layers = ("layer4", "layer3", "layer2", "layer1", "conv1")
    frozen = layers[trainable_layers:]
    frozen += ("bn1",) if frozen else ()
    for name, parameter in backbone.named_parameters():
        if name in loaded and name.startswith(tuple(f"body.{layer}." for layer in frozen)):
            parameter.requires_grad_(False)
    for name, module in list(backbone.body.named_modules()):
        own = [f"body.{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if norms and isinstance(module, nn.BatchNorm2d) and loaded.issuperset(own):
            norm = FrozenBatchNorm2d(module.num_features, eps=module.eps)
            norm.load_state_dict(module.state_dict(), strict=False)
            parent, _, child = name.rpartition(".")
            setattr(backbone.body.get_submodule(parent), child, norm)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.pth`` / ``.pt`` file, the latter read with
    ``weights_only=True``.

    Raises:
        ValueError: no such file, not readable, or not a flat table of tensors.
    """
    if not path.is_file():
        raise ValueError(
            f"weights file {path} does not exist; give an existing file, or one of none, imagenet, coco"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"weights file {path} cannot be read ({_first_line(error)}); it must be .safetensors or a .pth of tensors"
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise ValueError(
            f"weights file {path} holds no table of tensors by name; save model.state_dict() to it"
        )
    return state


def published_weights(weights_enum, kind: str) -> dict[str, Tensor]:
    """torchvision's published weights, from its cache or downloaded into it.

    Raises:
        ValueError: not in the cache and not to be had.
    """
    try:
        return weights_enum.get_state_dict(progress=True, check_hash=True)
    except Exception as error:
        file_name = weights_enum.url.rsplit("/", 1)[-1]
        raise ValueError(
            f"weights {kind!r} need {file_name}, which is not in {Path(torch.hub.get_dir()) / 'checkpoints'} and could not be "
            f"downloaded ({_first_line(error)}); put the file there, give weights as the path of a local file, or use weights none"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _modules(names: list[str]) -> str:
    """The modules that hold the named tensors, first to fourth level, shortened."""
    modules = list(dict.fromkeys(".".join(name.split(".")[:-1][:5]) for name in names))
    return ", ".join(modules[:8]) + (
        f" and {len(modules) - 8} more modules" if len(modules) > 8 else ""
    )
