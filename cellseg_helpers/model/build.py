"""``build_model``: the Mask R-CNN that a run's settings describe."""

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection import (
    MaskRCNN,
    MaskRCNN_ResNet50_FPN_V2_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
)
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import RunConfig, resolve_path
from cellseg_helpers.model.backbones import (
    NO_WEIGHTS,
    LoadReport,
    SingleMapBackbone,
    add_cbam,
    freeze_loaded,
    load_weights,
    published_weights,
    read_weights,
    resnet_fpn,
)
from cellseg_helpers.model.heads import (
    LabelMapRoIHeads,
    LabelMapTransform,
    SeededSampler,
    full_precision,
)
from cellseg_helpers.model.roi_align import GatherRoIAlign
from cellseg_helpers.model.rpn import LabelMapRPN

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PARAMETER_LIMIT = 200_000_000  # a rule of the task


class LabelMapMaskRCNN(MaskRCNN):
    """torchvision's Mask R-CNN, trained on label maps, its detections' masks left in their boxes.

    In training, ``model(images, targets)`` gives the five losses. Images are float32 [3, H, W] in
    [0, 1]; a target holds ``boxes`` float32 [N, 4], ``labels`` int64 [N], ``ids`` int [N],
    ``label_maps`` int32 [K, H, W] and, optionally, ``seed`` int, from which its anchors and
    proposals are sampled. In evaluation, ``model(images)`` gives for each image ``boxes`` float32
    [N, 4] px, ``labels`` int64 [N], ``scores`` float32 [N] and ``masks`` float32 [N, 28, 28].
    """

    load_report: LoadReport

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        min_size: int,
        max_size: int,
        mask_batch_size_per_image: int = 0,
        normalization: str = "imagenet",
        **kwargs,
    ):
        super().__init__(backbone, num_classes, **kwargs)
        self.transform = LabelMapTransform(
            min_size, max_size, *map(list, channel_statistics(normalization))
        )
        if normalization == "data":
            self.transform.learn_statistics(self.transform.image_mean, self.transform.image_std)
        self.rpn.__class__ = LabelMapRPN
        self.roi_heads.__class__ = LabelMapRoIHeads
        self.roi_heads.mask_batch_size_per_image = mask_batch_size_per_image
        self.roi_heads.box_roi_pool.__class__ = self.roi_heads.mask_roi_pool.__class__ = (
            GatherRoIAlign
        )
        self.rpn.head.register_forward_hook(full_precision)
        self.roi_heads.box_predictor.register_forward_hook(full_precision)
        for part in (self.rpn, self.roi_heads):
            sampler = part.fg_bg_sampler
            part.fg_bg_sampler = SeededSampler(
                sampler.batch_size_per_image, sampler.positive_fraction
            )

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        seeded = targets is not None and all("seed" in target for target in targets)
        seeds = [int(target["seed"]) for target in targets] if seeded else None
        self.rpn.fg_bg_sampler.seeds = self.roi_heads.fg_bg_sampler.seeds = seeds
        return super().forward(images, targets)


def channel_statistics(normalization: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, of R, G, B in [0, 1], by which the model normalises its images,
    as ``(x - mean) / std``.

    ``imagenet``: torchvision's. ``imagenet_twice``: the result normalised again, as in report E's
    released code, is ``(x - (m + m s)) / s^2``. ``imagenet_of_0_255``: images of values 0 to 255
    normalised as if they were 0 to 1, as in report B's, is ``(x - m / 255) / (s / 255)``. ``data``:
    ImageNet's, until ``LabelMapTransform.learn_statistics`` puts the data's own there.
    """
    m, s = IMAGENET_MEAN, IMAGENET_STD
    if normalization == "imagenet_twice":
        return tuple(a + a * b for a, b in zip(m, s, strict=True)), tuple(b * b for b in s)
    if normalization == "imagenet_of_0_255":
        return tuple(a / 255 for a in m), tuple(b / 255 for b in s)
    return m, s


def build_model(config: RunConfig, num_classes: int = len(CLASS_NAMES)) -> LabelMapMaskRCNN:
    """The Mask R-CNN of a run; ``model.load_report`` says what its weights gave it and what starts
    at random.

    Args:
        config: its backbone, weights, anchors, thresholds and image size.
        num_classes: K, without the background.

    Raises:
        ValueError: weights that are not to be had or do not fit, or more parameters than the task
            allows.
    """
    if config.neck == "none":
        backbone = SingleMapBackbone(config.backbone)
        anchors = AnchorGenerator((config.anchor_sizes,), (config.anchor_ratios,))
    else:
        v2 = config.backbone == "resnet50_fpn_v2"
        backbone = resnet_fpn("resnet50", nn.BatchNorm2d) if v2 else resnet_fpn(config.backbone)
        anchors = AnchorGenerator(
            tuple((size,) for size in config.anchor_sizes),
            (config.anchor_ratios,) * len(config.anchor_sizes),
        )
    if config.attention == "cbam":
        add_cbam(backbone)
    model = LabelMapMaskRCNN(
        backbone,
        num_classes + 1,
        min_size=config.min_size,
        max_size=config.max_size,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=config.rpn_pre_nms_top_n_train,
        rpn_pre_nms_top_n_test=config.rpn_pre_nms_top_n_test,
        rpn_post_nms_top_n_train=config.rpn_post_nms_top_n_train,
        rpn_post_nms_top_n_test=config.rpn_post_nms_top_n_test,
        rpn_nms_thresh=config.rpn_nms_thresh,
        rpn_fg_iou_thresh=config.rpn_fg_iou_thresh,
        rpn_bg_iou_thresh=config.rpn_bg_iou_thresh,
        rpn_batch_size_per_image=config.rpn_batch_size_per_image,
        box_score_thresh=config.box_score_thresh,
        box_nms_thresh=config.box_nms_thresh,
        box_detections_per_img=config.detections_per_image,
        box_fg_iou_thresh=config.box_fg_iou_thresh,
        box_bg_iou_thresh=config.box_bg_iou_thresh,
        box_batch_size_per_image=config.box_batch_size_per_image,
        mask_batch_size_per_image=config.mask_batch_size_per_image,
        normalization=config.normalization,
        **(_v2_heads(backbone.out_channels, anchors) if has_v2_heads(config) else {}),
    )
    if count_parameters(model) >= PARAMETER_LIMIT:
        raise ValueError(
            f"the model has {count_parameters(model):,} trainable parameters, but the task allows under {PARAMETER_LIMIT:,}"
        )
    model.load_report = _load(model, config)
    _freeze(model, config, set(model.load_report.loaded))
    return model


def outline_model(config: RunConfig) -> LabelMapMaskRCNN:
    """``build_model`` without values or memory for them (on the ``meta`` device): its parameters
    can be counted, in a tenth of the time.

    Raises:
        ValueError: see ``build_model``.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*which is a no-op")
        return build_model(config)


def rebuild_model(config: RunConfig, state: Mapping[str, Tensor] | None = None) -> LabelMapMaskRCNN:
    """The model of a run as its training left it, without the weights that it started from: nothing
    is downloaded.

    Args:
        config: of the run.
        state: the trained weights; without them the model is the same but for its values, which are
            random.

    Raises:
        ValueError: weights of another model.
    """
    model = build_model(replace(config, weights="none"))
    if config.weights != "none":
        ending = "num_batches_tracked"  # of a batch norm that was trained; a frozen one has none
        trained = {
            name.removesuffix(ending) + "running_mean"
            for name in state or ()
            if name.endswith(ending)
        }
        of_backbone = {
            name for name in model.backbone.state_dict(prefix="backbone.") if ".cbam." not in name
        }
        _freeze(model, config, of_backbone - trained)
    if state is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            cause = " ".join(str(error).split())[:160]
            raise ValueError(
                f"the weights do not fit a model of these settings ({cause})"
            ) from None
    return model


def _freeze(model: LabelMapMaskRCNN, config: RunConfig, loaded: set[str]) -> None:
    """Freeze what was loaded, as the settings say; ``loaded`` are names of tensors in the model."""
    v2 = config.backbone == "resnet50_fpn_v2"
    in_backbone = {name.removeprefix("backbone.") for name in loaded}
    freeze_loaded(model.backbone, in_backbone, config.trainable_backbone_layers, norms=not v2)
    if config.weights == "coco" and not v2:
        overwrite_eps(
            model, 0.0
        )  # as these weights were trained, and as torchvision builds the model around them


def has_v2_heads(config: RunConfig) -> bool:
    """Whether RPN, box and mask head are those of torchvision's v2 model."""
    return config.heads == "v2" or (config.heads == "auto" and config.backbone == "resnet50_fpn_v2")


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _load(model: nn.Module, config: RunConfig) -> LoadReport:
    kind = config.weights
    body = "resnet50" if config.backbone == "resnet50_fpn_v2" else config.backbone
    if kind == "none":
        return LoadReport(
            "none", [], [n for n in model.state_dict() if not n.endswith(NO_WEIGHTS)], []
        )
    if kind == "imagenet":
        state = published_weights(get_model_weights(body).IMAGENET1K_V1, kind)
    elif kind == "coco":
        whole = {
            "resnet50": MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
            "resnet50_fpn_v2": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
        }
        if config.backbone not in whole:
            raise ValueError(
                f"torchvision has no COCO weights for backbone {config.backbone!r}, only for {', '.join(whole)}"
            )
        state = published_weights(whole[config.backbone], kind)
        fresh = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
        if has_v2_heads(config) != (config.backbone == "resnet50_fpn_v2"):
            fresh = (
                "rpn.",
                "roi_heads.",
            )  # other heads than these weights are of: all new, not those parts alone that happen to fit
        state = {name: tensor for name, tensor in state.items() if not name.startswith(fresh)}
    else:
        state = read_weights(resolve_path(kind))
    return load_weights(model, state, ("", "backbone.", "backbone.body."), kind)


def _v2_heads(out_channels: int, anchors: AnchorGenerator) -> dict[str, nn.Module]:
    """The heads of torchvision's ``maskrcnn_resnet50_fpn_v2``: two-convolution RPN,
    four-convolution box head, norms in both.
    """
    return {
        "rpn_head": RPNHead(out_channels, anchors.num_anchors_per_location()[0], conv_depth=2),
        "box_head": FastRCNNConvFCHead(
            (out_channels, 7, 7), [256, 256, 256, 256], [1024], norm_layer=nn.BatchNorm2d
        ),
        "mask_head": MaskRCNNHeads(
            out_channels, [256, 256, 256, 256], 1, norm_layer=nn.BatchNorm2d
        ),
    }
