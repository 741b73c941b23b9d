"""``build_model``: the Mask R-CNN that a run's settings describe."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import detection, get_model_weights
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import RunConfig, one_line, resolve_path
from cellseg_helpers.model import backbones
from cellseg_helpers.model.heads import LabelMapRoIHeads, LabelMapTransform
from cellseg_helpers.model.rpn import LabelMapRPN

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PARAMETER_LIMIT = 200_000_000  # of trainable parameters; a rule of the task
COCO_WEIGHTS = {
    "resnet50": detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    "resnet50_fpn_v2": detection.MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
}


class LabelMapMaskRCNN(GeneralizedRCNN):
    """torchvision's Mask R-CNN, trained on label maps; predicted masks are 28 x 28 in their boxes.

    In training, ``model(images, targets)`` gives the five losses. Images are float32 [3, H, W] in
    [0, 1]. A target holds ``boxes`` float32 [N, 4] px, ``labels`` int64 [N], ``ids`` int [N],
    ``label_maps`` int32 [K, H, W] and, optionally, ``seed`` int, by which the image's anchors and
    proposals are sampled. In evaluation, ``model(images)`` gives for each image ``boxes`` float32
    [N, 4] px, ``labels`` int64 [N], ``scores`` float32 [N] and ``masks`` float32 [N, 28, 28].

    Args:
        config: thresholds, numbers of proposals and samples, image size and normalisation.
        backbone: returns its feature maps by name: "0", "1", ...
        heads: ``rpn_head``, ``box_head``, ``box_predictor``, ``mask_head``, ``mask_predictor``.
    """

    load_report: backbones.LoadReport

    def __init__(self, config: RunConfig, backbone: nn.Module, anchors, rpn_head, **heads):
        rpn = LabelMapRPN(config, anchors, rpn_head)
        roi_heads = LabelMapRoIHeads(config, **heads)
        mean, std = channel_statistics(config.normalization)
        transform = LabelMapTransform(config.min_size, config.max_size, list(mean), list(std))
        super().__init__(backbone, rpn, roi_heads, transform)
        self.mask_geometry = config.mask_geometry
        if config.normalization == "data":
            transform.learn_statistics(mean, std)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        seeds = [int(target["seed"]) for target in targets or () if "seed" in target]
        self.rpn.fg_bg_sampler.seeds = self.roi_heads.fg_bg_sampler.seeds = seeds
        return super().forward(images, targets)


def channel_statistics(normalization: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of R, G, B in [0, 1], by which images are normalised:
    ``(x - mean) / std``.

    ``imagenet``: torchvision's m and s. ``data``: the same, until ``learn_statistics`` replaces
    them. Two mistakes of released code: ``imagenet_twice`` normalises by ImageNet's statistics
    twice, ``((x - m) / s - m) / s = (x - (m + m s)) / s^2``; ``imagenet_of_0_255`` applies them to
    values from 0 to 255, ``(255 x - m) / s = (x - m / 255) / (s / 255)``.
    """
    m, s = IMAGENET_MEAN, IMAGENET_STD
    if normalization == "imagenet_twice":
        return tuple(a + a * b for a, b in zip(m, s, strict=True)), tuple(b * b for b in s)
    if normalization == "imagenet_of_0_255":
        return tuple(a / 255 for a in m), tuple(b / 255 for b in s)
    return m, s


def build_model(config: RunConfig) -> LabelMapMaskRCNN:
    """Build the Mask R-CNN of a run; its ``load_report`` says which tensors were loaded.

    Raises:
        ValueError: the weights are not available or do not fit, or the model is too large.
    """
    if config.neck == "none":
        backbone = backbones.SingleMapBackbone(config.backbone, config.head_width)
        levels = 1
    else:
        backbone = backbones.resnet_fpn(config.backbone, config.head_width, config.stem_stride)
        levels = 5
    if config.attention == "cbam":
        backbones.add_cbam(backbone)
    sizes = np.reshape(config.anchor_sizes, (levels, -1)).tolist()
    anchors = AnchorGenerator(tuple(map(tuple, sizes)), (config.anchor_ratios,) * levels)
    heads = _heads(config, anchors.num_anchors_per_location()[0], len(CLASS_NAMES) + 1)
    model = LabelMapMaskRCNN(config, backbone, anchors, **heads)
    if count_parameters(model) >= PARAMETER_LIMIT:
        too_large = f"the model has {count_parameters(model):,} trainable parameters"
        raise ValueError(f"{too_large}, but the task allows under {PARAMETER_LIMIT:,}")
    model.load_report = _load(model, config)
    _freeze(model, config, model.load_report.loaded)
    return model


def outline_model(config: RunConfig) -> LabelMapMaskRCNN:
    """``build_model`` on torch's ``meta`` device: names and shapes without values, 10x faster."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*which is a no-op")
        return build_model(config)


def rebuild_model(config: RunConfig, state: Mapping[str, Tensor] | None = None) -> LabelMapMaskRCNN:
    """The model of a run with its trained weights ``state`` (None: random values), frozen as in
    training. The weights from which the training started are not needed.

    Raises:
        ValueError: the weights are of another model.
    """
    model = build_model(replace(config, weights="none"))
    if config.weights != "none":
        # Only a batch norm that was trained has a counter of batches: it must not be frozen.
        counter = "num_batches_tracked"
        trained = {name.removesuffix(counter) for name in state or () if name.endswith(counter)}
        loaded = {
            name
            for name in model.backbone.state_dict(prefix="backbone.")
            if ".cbam." not in name and name.removesuffix("running_mean") not in trained
        }
        _freeze(model, config, loaded)
    if state is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            cause = one_line(error, 160)
            message = f"the weights do not fit a model of these settings ({cause})"
            raise ValueError(message) from None
    return model


def starts_loaded(name: str, config: RunConfig) -> bool:
    """Whether the model's tensor ``name`` is loaded from a run's published weights.

    From ``imagenet`` weights the network below the pyramid is loaded. From ``coco`` weights
    everything except the class-dependent predictors is loaded, or only the backbone if the model's
    heads are of another version (v1, v2) than the published model's.
    """
    if config.weights == "coco":
        other_heads = has_v2_heads(config) != (config.backbone == "resnet50_fpn_v2")
        predictors = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
        return not name.startswith(("rpn.", "roi_heads.") if other_heads else predictors)
    in_network = name.startswith("backbone.body.") and ".cbam." not in name
    return config.weights == "imagenet" and in_network


def has_v2_heads(config: RunConfig) -> bool:
    """Whether RPN, box head and mask head are built as in torchvision's v2 model."""
    return config.heads == "v2" or (config.heads == "auto" and config.backbone == "resnet50_fpn_v2")


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _heads(config: RunConfig, anchors_per_pixel: int, num_outputs: int) -> dict[str, nn.Module]:
    """The heads of torchvision's ``maskrcnn_resnet50_fpn``, or of its ``_v2``: two convolutions in
    the RPN, four in the box head, batch norms in the box head and the mask head.

    They are created in torchvision's order, which decides their random initial weights.
    """
    width, heads, v2 = config.head_width, {}, has_v2_heads(config)
    norm_layer = nn.BatchNorm2d if v2 else None
    if v2:
        heads["rpn_head"] = RPNHead(width, anchors_per_pixel, conv_depth=2)
        heads["box_head"] = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [4 * width], norm_layer)
    heads["mask_head"] = MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm_layer)
    heads["mask_predictor"] = MaskRCNNPredictor(width, width, num_outputs)
    if not v2:
        heads["rpn_head"] = RPNHead(width, anchors_per_pixel)
        heads["box_head"] = TwoMLPHead(width * 7**2, 4 * width)
    heads["box_predictor"] = FastRCNNPredictor(4 * width, num_outputs)
    return heads


def _load(model: nn.Module, config: RunConfig) -> backbones.LoadReport:
    """Load the weights that the settings name, and report which tensors they gave."""
    weights, is_v2 = config.weights, config.backbone == "resnet50_fpn_v2"
    if weights == "none":
        return backbones.LoadReport("none", [], backbones.tensor_names(model.state_dict()), [])
    if weights == "imagenet":
        network = get_model_weights("resnet50" if is_v2 else config.backbone)
        state = backbones.published_weights(network.IMAGENET1K_V1, weights)
    elif weights == "coco":
        if config.backbone not in COCO_WEIGHTS:
            missing = f"torchvision has no COCO weights for backbone {config.backbone!r}"
            raise ValueError(f"{missing}, only for {', '.join(COCO_WEIGHTS)}")
        state = backbones.published_weights(COCO_WEIGHTS[config.backbone], weights)
        state = {name: state[name] for name in state if starts_loaded(name, config)}
    else:
        state = backbones.read_weights(resolve_path(weights))
    return backbones.load_weights(model, state, ("", "backbone.", "backbone.body."), weights)


def _freeze(model: LabelMapMaskRCNN, config: RunConfig, loaded: Iterable[str]) -> None:
    """Freeze the loaded layers before the trainable ones and, except in v2, their batch norms."""
    is_v2 = config.backbone == "resnet50_fpn_v2"
    in_backbone = {name.removeprefix("backbone.") for name in loaded}
    backbones.freeze_loaded(
        model.backbone, in_backbone, config.trainable_backbone_layers, norms=not is_v2
    )
    if config.weights == "coco" and not is_v2:
        overwrite_eps(model, 0.0)  # as torchvision does for these weights
