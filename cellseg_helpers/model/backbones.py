"""Residual networks with or without a feature pyramid, attention, and the loading of weights."""

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
    """Which of a model's tensors a weights file gave, by the model's names."""

    source: str
    loaded: list[str]
    random: list[str]
    unused: list[str]  # the file's names; not in the model, or of another shape

    def __str__(self) -> str:
        if not self.loaded:
            return f"weights {self.source}: all {len(self.random)} tensors start at random"
        text = f"weights {self.source}: {len(self.loaded)} tensors loaded, "
        text += f"{len(self.random)} stay random"
        text += f" ({_modules(self.random)})" if self.random else ""
        return text + (f"; not used from the file: {_modules(self.unused)}" if self.unused else "")


def resnet_fpn(name: str, channels: int = 256, stem_stride: int = 4) -> BackboneWithFPN:
    """torchvision's ResNet, ResNeXt or ``resnet50_fpn_v2`` (with norms in the pyramid) at random
    weights: 5 levels of strides ``stem_stride`` (4, or 2: no stride in the first pooling) to 16
    times that.
    """
    network = torchvision.models.get_model(name.removesuffix("_fpn_v2"), weights=None)
    network.maxpool.stride = stem_stride // 2
    norm = nn.BatchNorm2d if name.endswith("_v2") else None
    stages = {f"layer{number}": str(number - 1) for number in (1, 2, 3, 4)}
    widths = [network.inplanes // 8 * 2**stage for stage in range(4)]
    return BackboneWithFPN(network, stages, widths, channels, norm_layer=norm)


class SingleMapBackbone(nn.Module):
    """A ResNet without a feature pyramid: one map at stride 16.

    The map is C4, the output of ``layer3``, as in the Mask R-CNN without a pyramid of He et al.
    ("Mask R-CNN", 2017). A 1x1 convolution gives it the pyramid's channels, so that RPN and
    heads are the same with and without a pyramid. (Theirs uses ``layer4`` as the box head; C5, at
    stride 32, is coarser than most cells.)
    """

    def __init__(self, name: str, channels: int):
        super().__init__()
        self.out_channels = channels
        net = torchvision.models.get_model(name, weights=None)
        self.body = IntermediateLayerGetter(net, {"layer3": "0"})
        self.lateral = nn.Conv2d(net.inplanes // 2, self.out_channels, 1)
        nn.init.kaiming_uniform_(self.lateral.weight, a=1)  # as torchvision's pyramid
        nn.init.zeros_(self.lateral.bias)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict({"0": self.lateral(self.body(x)["0"])})


class CBAM(nn.Module):
    """Convolutional block attention, channel then spatial (Woo et al., "CBAM", 2018, equations 1 to
    3), of float [N, C, H, W].

    ``F' = Mc(F) * F`` with ``Mc(F) = sigmoid(W1 relu(W0 mean(F)) + W1 relu(W0 max(F)))`` over all
    pixels, and ``F'' = Ms(F') * F'`` with ``Ms(F') = sigmoid(conv7x7([mean(F'), max(F')]))`` over
    all channels. W0 narrows the channels 16-fold; no layer has a bias.
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
        mean, most = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        x = x * (self.channel(mean) + self.channel(most)).sigmoid()
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.spatial(maps).sigmoid()


def add_cbam(backbone: nn.Module) -> None:
    """Append a ``CBAM`` to each stage (``layer1`` ..) of a backbone's ``body``, in place."""
    for name, stage in backbone.body.named_children():
        if name.startswith("layer"):
            last = getattr(stage[-1], "conv3", stage[-1].conv2)
            stage.add_module("cbam", CBAM(last.out_channels))


def tensor_names(names: Iterable[str]) -> list[str]:
    """The names of tensors that a weights file can give: no counters, no image statistics."""
    return [name for name in names if not name.endswith(NO_WEIGHTS)]


def load_weights(
    model: nn.Module, state: dict[str, Tensor], prefixes: tuple[str, ...], source: str
) -> LoadReport:
    """Copy every tensor of ``state`` that the model has in the same shape.

    Args:
        prefixes: what may stand before the file's names in the model's, such as ``("",
            "backbone.body.")``; the one that fits most tensors is taken.
        source: name for the report.

    Raises:
        ValueError: no tensor fits.
    """
    own = model.state_dict()
    names, own_names = tensor_names(state), tensor_names(own)
    shapes = {name: own[name].shape for name in own_names}
    fits = [
        {prefix + n: n for n in names if shapes.get(prefix + n) == state[n].shape}
        for prefix in prefixes
    ]
    files_name = max(fits, key=len)
    if not files_name:
        raise ValueError(
            f"weights {source}: none of its {len(names)} tensors fits this model (first name in "
            f"the file: {next(iter(names), None)!r}); check that backbone names the network that "
            "the file was saved from"
        )
    model.load_state_dict({name: state[n] for name, n in files_name.items()}, strict=False)
    random = [name for name in own_names if name not in files_name]
    used = set(files_name.values())
    return LoadReport(source, list(files_name), random, [n for n in names if n not in used])


def freeze_loaded(
    backbone: nn.Module, loaded: set[str], trainable_layers: int, norms: bool
) -> None:
    """Freeze what was loaded: the weights of all but the body's last ``trainable_layers`` layers
    and, with ``norms``, its norms.

    What was not loaded stays trainable: a frozen norm at random weights diverges, and a frozen
    random convolution is noise.

    Args:
        loaded: names of loaded tensors, relative to ``backbone``.
        trainable_layers: 0 to 5, counted from layer4 back to conv1, as in torchvision.
        norms: turn loaded batch norms into ``FrozenBatchNorm2d``.
    """
    frozen = ("layer4", "layer3", "layer2", "layer1", "conv1", "bn1")[trainable_layers:]
    frozen = frozen if trainable_layers < 5 else ()
    starts = tuple(f"body.{layer}." for layer in frozen)
    for name, parameter in backbone.named_parameters():
        if name in loaded and name.startswith(starts):
            parameter.requires_grad_(False)
    for name, module in list(backbone.body.named_modules()) if norms else ():
        own = [f"body.{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if isinstance(module, nn.BatchNorm2d) and loaded.issuperset(own):
            norm = FrozenBatchNorm2d(module.num_features, eps=module.eps)
            norm.load_state_dict(module.state_dict(), strict=False)
            backbone.body.set_submodule(name, norm)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.pth`` or ``.pt`` file.

    Raises:
        ValueError: no such file, not readable, or not a flat table of tensors.
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


def published_weights(weights_enum, kind: str) -> dict[str, Tensor]:
    """torchvision's published weights, from its cache or downloaded into it.

    Raises:
        ValueError: neither in the cache nor downloadable.
    """
    try:
        return weights_enum.get_state_dict(progress=True, check_hash=True)
    except Exception as error:
        file_name = weights_enum.url.rsplit("/", 1)[-1]
        raise ValueError(
            f"weights {kind!r} need {file_name}, which is not in "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'} and could not be downloaded "
            f"({one_line(error)}); put the file there, give weights as the path of a local file, "
            "or use weights none"
        ) from None


def _modules(names: list[str]) -> str:
    """The first eight modules that hold the named tensors, and how many more there are."""
    modules = list(dict.fromkeys(".".join(name.split(".")[:-1][:5]) for name in names))
    more = f" and {len(modules) - 8} more modules" if len(modules) > 8 else ""
    return ", ".join(modules[:8]) + more
