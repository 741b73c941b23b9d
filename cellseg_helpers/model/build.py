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
PARAMETER_LIMIT = 200_000_000  # a rule of the task
COCO_WEIGHTS = {
    "resnet50": detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    "resnet50_fpn_v2": detection.MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
}


class LabelMapMaskRCNN(GeneralizedRCNN):
    """torchvision's Mask R-CNN, trained on label maps; masks of detections stay in their boxes.

    In training, ``model(images, targets)`` gives the five losses. Images are float32 [3, H, W] in
    [0, 1]. A target holds ``boxes`` float32 [N, 4] px, ``labels`` int64 [N], ``ids`` int [N],
    ``label_maps`` int32 [K, H, W] and, optionally, ``seed`` int, from which its anchors and
    proposals are sampled. In evaluation, ``model(images)`` gives for each image ``boxes`` float32
    [N, 4] px, ``labels`` int64 [N], ``scores`` float32 [N] and ``masks`` float32 [N, 28, 28].

    Args:
        config: thresholds, numbers of proposals and samples, image size and normalisation.
        backbone: gives its feature maps by name: "0", "1", ...
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

    ``imagenet``: torchvision's m and s. ``imagenet_twice``: ImageNet's normalisation, and once more
    on its result, is ``(x - (m + m s)) / s^2``. ``imagenet_of_0_255``: ImageNet's normalisation of
    values 0 to 255, as if they were 0 to 1, is ``(x - m / 255) / (s / 255)``. ``data``: ImageNet's
    until ``LabelMapTransform.learn_statistics`` replaces them.
    """
    m, s = IMAGENET_MEAN, IMAGENET_STD
    if normalization == "imagenet_twice":
        return tuple(a + a * b for a, b in zip(m, s, strict=True)), tuple(b * b for b in s)
    if normalization == "imagenet_of_0_255":
        return tuple(a / 255 for a in m), tuple(b / 255 for b in s)
    return m, s


def build_model(config: RunConfig) -> LabelMapMaskRCNN:
    """The Mask R-CNN of a run; its ``load_report`` says which tensors were loaded.

    Raises:
        ValueError: weights that cannot be had or do not fit, or too many parameters for the task.
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
        found = f"the model has {count_parameters(model):,} trainable parameters"
        raise ValueError(f"{found}, but the task allows under {PARAMETER_LIMIT:,}")
    model.load_report = _load(model, config)
    _freeze(model, config, model.load_report.loaded)
    return model


def outline_model(config: RunConfig) -> LabelMapMaskRCNN:
    """``build_model`` on torch's ``meta`` device: names and shapes without values, 10x faster."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*which is a no-op")
        return build_model(config)


def rebuild_model(config: RunConfig, state: Mapping[str, Tensor] | None = None) -> LabelMapMaskRCNN:
    """The model of a run as its training left it, with its trained weights ``state`` (without them,
    random values). The weights that it started from are not needed.

    Raises:
        ValueError: weights of another model.
    """
    model = build_model(replace(config, weights="none"))
    if config.weights != "none":
        # A trained batch norm counts its batches, a frozen one does not.
        count = "num_batches_tracked"
        trained = {name.removesuffix(count) for name in state or () if name.endswith(count)}
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
            why = one_line(error, 160)
            raise ValueError(f"the weights do not fit a model of these settings ({why})") from None
    return model


def starts_loaded(name: str, config: RunConfig) -> bool:
    """Whether a run's published weights (``imagenet``, ``coco``) hold the model's tensor ``name``.

    ImageNet's hold the network below the pyramid. COCO's hold all but the predictors of classes,
    or the backbone alone where the model's heads are not of the published model's kind.
    """
    if config.weights == "coco":
        other_heads = has_v2_heads(config) != (config.backbone == "resnet50_fpn_v2")
        predictors = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
        return not name.startswith(("rpn.", "roi_heads.") if other_heads else predictors)
    in_network = name.startswith("backbone.body.") and ".cbam." not in name
    return config.weights == "imagenet" and in_network


def has_v2_heads(config: RunConfig) -> bool:
    """Whether RPN, box and mask head are those of torchvision's v2 model."""
    return config.heads == "v2" or (config.heads == "auto" and config.backbone == "resnet50_fpn_v2")


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _heads(config: RunConfig, anchors_per_pixel: int, num_outputs: int) -> dict[str, nn.Module]:
    """The heads of torchvision's ``maskrcnn_resnet50_fpn``, or of its ``_v2``: two convolutions in
    the RPN, four in the box head, norms in the box and the mask head.

    They are made in torchvision's order, which decides the random numbers that each starts from.
    """
    width, parts, v2 = config.head_width, {}, has_v2_heads(config)
    norm = nn.BatchNorm2d if v2 else None
    if v2:
        parts["rpn_head"] = RPNHead(width, anchors_per_pixel, conv_depth=2)
        parts["box_head"] = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [4 * width], norm)
    parts["mask_head"] = MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm)
    parts["mask_predictor"] = MaskRCNNPredictor(width, width, num_outputs)
    if not v2:
        parts["rpn_head"] = RPNHead(width, anchors_per_pixel)
        parts["box_head"] = TwoMLPHead(width * 7**2, 4 * width)
    parts["box_predictor"] = FastRCNNPredictor(4 * width, num_outputs)
    return parts


def _load(model: nn.Module, config: RunConfig) -> backbones.LoadReport:
    kind, is_v2 = config.weights, config.backbone == "resnet50_fpn_v2"
    if kind == "none":
        return backbones.LoadReport("none", [], backbones.tensor_names(model.state_dict()), [])
    if kind == "imagenet":
        network = get_model_weights("resnet50" if is_v2 else config.backbone)
        state = backbones.published_weights(network.IMAGENET1K_V1, kind)
    elif kind == "coco":
        if config.backbone not in COCO_WEIGHTS:
            missing = f"torchvision has no COCO weights for backbone {config.backbone!r}"
            raise ValueError(f"{missing}, only for {', '.join(COCO_WEIGHTS)}")
        state = backbones.published_weights(COCO_WEIGHTS[config.backbone], kind)
        state = {name: state[name] for name in state if starts_loaded(name, config)}
    else:
        state = backbones.read_weights(resolve_path(kind))
    return backbones.load_weights(model, state, ("", "backbone.", "backbone.body."), kind)


def _freeze(model: LabelMapMaskRCNN, config: RunConfig, loaded: Iterable[str]) -> None:
    """Freeze those of the loaded tensors that the settings name."""
    is_v2 = config.backbone == "resnet50_fpn_v2"
    in_backbone = {name.removeprefix("backbone.") for name in loaded}
    backbones.freeze_loaded(
        model.backbone, in_backbone, config.trainable_backbone_layers, norms=not is_v2
    )
    if config.weights == "coco" and not is_v2:
        overwrite_eps(model, 0.0)  # as torchvision builds the model around these weights
