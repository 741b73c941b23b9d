"""What the reports' released code does to cells, images, the model and its detections, where it
differs from their text.

Measured with the code of torch and torchvision themselves, on what is at hand; nothing is trained.
"""

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco_mask
from torch import nn
from torch.utils.data import Dataset, Subset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import batched_nms

from cellseg_helpers import borders
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.hw3 import CellDataset, CellImage, DataError
from cellseg_helpers.data.labels import CLASS_NAMES, connected_components, find_instances
from cellseg_helpers.data.test_images import open_test_images
from cellseg_helpers.devices import make_fabric
from cellseg_helpers.engine import image_statistics, validation_loss
from cellseg_helpers.model.build import channel_statistics, has_v2_heads, rebuild_model
from study import runs as study_runs
from study.reported import E_SIZE_FACTORS, Detections

# ---------------------------------------------------------------------------------------------------------------
# cells and images


def cell_table(dataset: Iterable[CellImage]) -> pd.DataFrame:
    """One row a cell: image (its place), class, width_px, height_px (of the tight box),
    image_height_px, image_width_px.
    """
    parts = []
    for place, cell_image in enumerate(dataset):
        found = find_instances(cell_image.label_maps)
        width, height = (found.boxes[:, 2:] - found.boxes[:, :2]).T.astype(int)
        names = np.array(CLASS_NAMES)[found.labels - 1]
        table = pd.DataFrame(
            {"image": place, "class": names, "width_px": width, "height_px": height}
        )
        image_height, image_width = cell_image.image.shape[1:]
        parts.append(table.assign(image_height_px=image_height, image_width_px=image_width))
    return pd.concat(parts, ignore_index=True)


def image_sizes(dataset: CellDataset, data: str | Path) -> tuple[list[tuple[int, int]], str]:
    """The different sizes (height, width), px, of annotated images and of test images, if there are
    any, and a sentence.
    """
    annotated = {tuple(size) for size in dataset.sizes.tolist()}
    try:
        tests = {(image["height"], image["width"]) for image in open_test_images(data).listed}
    except DataError:
        tests = set()
    return sorted(
        annotated | tests
    ), f"{len(annotated)} sizes of annotated images and {len(tests)} of test images"


def as_uint8(ids: Sequence[int]) -> np.ndarray:
    """Ids cast to uint8, which keeps the remainder of a division by 256."""
    return np.asarray(ids).astype(np.uint8)


def components_of_cells(dataset: Iterable[CellImage]) -> pd.DataFrame:
    """What report B's reading makes of each image's cells, one row an image.

    Returns:
        image_id, cells, highest_id; lost: cells whose id is a multiple of 256, which uint8 makes 0;
        same_value: cells that share their uint8 value with another one of their class. Of the cells
        that are left, components: 8-connected; joined: cells that share one with another cell;
        split: cells in several.
    """
    rows = []
    for cell_image in dataset:
        row = dict.fromkeys(
            ("cells", "highest_id", "lost", "same_value", "components", "joined", "split"), 0
        )
        for label_map in cell_image.label_maps:
            ids = np.unique(label_map[label_map > 0])
            values, times = np.unique(as_uint8(ids), return_counts=True)
            left = np.where(as_uint8(label_map) > 0, label_map, 0)
            components = connected_components(left)
            pairs = np.unique(np.column_stack([components[left > 0], left[left > 0]]), axis=0)
            _, place, cells_in = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
            row["cells"] += len(ids)
            row["highest_id"] = max(row["highest_id"], int(label_map.max()))
            row["lost"] += int(times[values == 0].sum())
            row["same_value"] += int(times[(values > 0) & (times > 1)].sum())
            row["components"] += int(components.max(initial=0))
            row["joined"] += len(np.unique(pairs[cells_in[place] > 1, 1]))
            row["split"] += int((np.unique(pairs[:, 1], return_counts=True)[1] > 1).sum())
        rows.append({"image_id": cell_image.image_id, **row})
    return pd.DataFrame(rows)


def missing_strip(cells: pd.DataFrame) -> pd.DataFrame:
    """Boxes that miss the last pixel row and column, by class and ``all``.

    Returns:
        cells; width_px and height_px (means); missing: mean share of the box's area; worst_5%: the
        share that one in twenty exceeds; IoU: mean IoU of the short box with the whole one;
        vanished: cells of one row or column, whose box is empty.
    """
    width, height = cells["width_px"], cells["height_px"]
    share = 1 - (width - 1) * (height - 1) / (
        width * height
    )  # the short box lies in the whole one: IoU is 1 - share
    table = pd.DataFrame(
        {
            "width_px": width,
            "height_px": height,
            "missing": share,
            "vanished": (width == 1) | (height == 1),
        }
    )
    rows = {}
    for name, part in _by_class(table, cells["class"]):
        mean = part.mean()
        rows[name] = {
            "cells": len(part),
            "width_px": mean["width_px"],
            "height_px": mean["height_px"],
            "missing": mean["missing"],
            "worst_5%": part["missing"].quantile(0.95),
            "IoU": 1 - mean["missing"],
            "vanished": int(part["vanished"].sum()),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def small_cells(cells: pd.DataFrame, largest_difference_px: int = 5) -> pd.DataFrame:
    """Cells whose last minus first pixel, in x or in y, is ``largest_difference_px`` (report E's as
    released) or less.

    Args:
        cells: of ``cell_table``.
        largest_difference_px: of a cell that is dropped.

    Returns:
        By class and ``all``: cells, dropped, share, images (that hold such a cell), images_left
        (likewise, afterwards).
    """
    dropped = (cells[["width_px", "height_px"]].min(axis=1) - 1) <= largest_difference_px
    rows = {}
    for name, part in _by_class(cells.assign(dropped=dropped), cells["class"]):
        counts = {
            "cells": len(part),
            "dropped": int(part["dropped"].sum()),
            "share": part["dropped"].mean(),
        }
        images = part["image"].nunique(), part.loc[~part["dropped"], "image"].nunique()
        rows[name] = counts | dict(zip(("images", "images_left"), images, strict=True))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def _by_class(table: pd.DataFrame, classes: pd.Series) -> list[tuple[str, pd.DataFrame]]:
    return [("all", table), *((name, table[classes == name]) for name in CLASS_NAMES)]


def unreachable_edges(
    sizes: Sequence[tuple[int, int]], min_size: int = 800, max_size: int = 1333
) -> pd.DataFrame:
    """Whether a box at the edge of the resized image ends at the image's own edge once torchvision
    has scaled it back.

    Returns:
        One row a size: height_px, width_px, right_px, bottom_px (where the box ends), right, bottom
        (bool, reached).
    """
    rows = []
    for height, width in sizes:
        scale = min(min_size / min(height, width), max_size / max(height, width))
        resized = math.floor(height * scale), math.floor(width * scale)
        box = torch.tensor([[0.0, 0.0, resized[1], resized[0]]])
        _, _, right, bottom = resize_boxes(box, resized, (height, width))[0].tolist()
        rows.append((height, width, right, bottom, right >= width, bottom >= height))
    return pd.DataFrame(
        rows, columns=["height_px", "width_px", "right_px", "bottom_px", "right", "bottom"]
    )


def changed_by_coco(dataset: Iterable[CellImage]) -> tuple[int, int]:
    """Cells of some images, and how many of them come back with other pixels from the COCO format,
    as run lengths.
    """
    cells = changed = 0
    for cell_image in dataset:
        found = find_instances(cell_image.label_maps)
        written = to_coco([cell_image])["annotations"]
        for class_id, instance_id, annotation in zip(found.labels, found.ids, written, strict=True):
            mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
            changed += not np.array_equal(mask, cell_image.label_maps[class_id - 1] == instance_id)
        cells += len(written)
    return cells, changed


class OneTransform(Dataset):
    """Images with one ``transform``, whoever asks."""

    def __init__(self, images: Sequence[np.ndarray]):
        self.images, self.transform = images, None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.transform(self.images[i]) if self.transform else self.images[i]


def augmented_images(images: Sequence[np.ndarray]) -> pd.DataFrame:
    """How many images are augmented when training and validation (one image in five) are views of
    one dataset object, and of two.

    The views are torch's ``Subset``; the transform of the training view is a flip, that of the
    validation view, set last, none.

    Args:
        images: uint8 [3, H, W] each, none its own mirror image.

    Returns:
        Rows: one object, as in report E's released code; two objects. Columns: training,
        training_flipped, validation, validation_flipped (numbers of images).
    """
    rows_of = {
        "training": [row for row in range(len(images)) if row % 5],
        "validation": [row for row in range(len(images)) if not row % 5],
    }
    table = {}
    for name, objects in (
        ("one object", [OneTransform(images)] * 2),
        ("two objects", [OneTransform(images), OneTransform(images)]),
    ):
        views = {
            side: Subset(dataset, rows_of[side])
            for side, dataset in zip(rows_of, objects, strict=True)
        }
        views["training"].dataset.transform = lambda image: image[..., ::-1]
        views["validation"].dataset.transform = lambda image: image
        table[name] = {}
        for side, view in views.items():
            flipped = [
                not np.array_equal(view[i], images[row]) for i, row in enumerate(rows_of[side])
            ]
            table[name] |= {side: len(flipped), f"{side}_flipped": sum(flipped)}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("views of")


class SharedPatients(NamedTuple):
    """Random splits by image.

    Attributes:
        both_sides: mean number of patients with images on both sides.
        patients: number of patients.
        seen_share: mean share of validation images whose patient also has a training image.
    """

    both_sides: float
    patients: int
    seen_share: float


def shared_patients(
    patients: Sequence[str | None], validation_fraction: float, draws: int = 1000
) -> SharedPatients | None:
    """How patients fall in random splits by image, mean over some draws; None where a patient is
    unknown.
    """
    if None in patients or not len(patients):
        return None
    names, place = np.unique(np.array(patients, str), return_inverse=True)
    held = min(max(round(validation_fraction * len(place)), 1), len(place) - 1)
    rng = np.random.default_rng(0)
    both, seen = [], []
    for _ in range(draws):
        order = rng.permutation(place)
        validation, training = order[:held], order[held:]
        both.append(len(np.intersect1d(validation, training)))
        seen.append(np.isin(validation, training).mean())
    return SharedPatients(float(np.mean(both)), len(names), float(np.mean(seen)))


# --------------------------------------------------------------------------------------------------------------------------
# model

PARTS = {
    "backbone.body.": "backbone",
    "backbone.fpn.": "feature pyramid",
    "rpn.head.conv.": "RPN convolutions",
    "rpn.head.": "RPN predictors",
    "roi_heads.box_head.": "box head",
    "roi_heads.box_predictor.": "box predictor",
    "roi_heads.mask_head.": "mask head",
    "roi_heads.mask_predictor.": "mask predictor",
}  # the first that a name begins with
HEAD_NORMS = "norms in the heads"
NEW_PREDICTORS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")


def model_parts(key: str) -> pd.DataFrame:
    """The model of a run at full scale, part by part; no weights are needed, and none are made.

    Args:
        key: of the run.

    Returns:
        Rows: the parts, then ``all``. parameters; trainable: those that are not frozen; loaded:
        those that start from the run's weights (``FrozenBatchNorm2d`` has no parameters).
    """
    config = study_runs.settings(key, "full", "drawn", 0)
    with torch.device("meta"):
        model = rebuild_model(config)
    parts = dict.fromkeys([*PARTS.values(), HEAD_NORMS], (0, 0, 0))
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            part = next(part for start, part in PARTS.items() if name.startswith(start))
            if isinstance(module, nn.BatchNorm2d) and not name.startswith("backbone."):
                part = HEAD_NORMS
            size = parameter.numel()
            counts = size, size * parameter.requires_grad, size * _starts_loaded(name, config)
            parts[part] = tuple(map(sum, zip(parts[part], counts, strict=True)))
    table = pd.DataFrame.from_dict(
        parts, orient="index", columns=["parameters", "trainable", "loaded"]
    ).rename_axis("part")
    table.loc["all"] = table.sum()
    return table


def _starts_loaded(name: str, config: RunConfig) -> bool:
    if config.weights == "coco":
        whole = has_v2_heads(config) == (config.backbone == "resnet50_fpn_v2")
        return not name.startswith(NEW_PREDICTORS if whole else ("rpn.", "roi_heads."))
    return config.weights == "imagenet" and name.startswith("backbone.body.")


def plateau_rates(
    losses: Sequence[float], learning_rate: float, factor: float, patience: int
) -> list[float]:
    """The learning rate after each of some epochs' losses, by torch's ``ReduceLROnPlateau``."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", factor, patience)
    rates = []
    for loss in losses:
        schedule.step(loss)
        rates.append(schedule.get_last_lr()[0])
    return rates


def normalised_values(dataset: CellDataset, normalizations: Sequence[str]) -> pd.DataFrame:
    """What the first layer of the model sees of some images.

    Args:
        dataset: the images.
        normalizations: of ``RunConfig.normalization``; ``data`` takes these images' own statistics.

    Returns:
        One row a normalisation and channel (R, G, B): mean, std, least, greatest over all pixels of
        all images.
    """
    mean, std = (np.array(values) for values in image_statistics(dataset, range(len(dataset))))
    channels = [cell_image.image.reshape(3, -1) / 255 for cell_image in dataset]
    least, greatest = (
        np.stack([ends(image, axis=1) for image in channels]) for ends in (np.min, np.max)
    )
    rows = {}
    for normalization in normalizations:
        own = normalization == "data"
        m, s = (mean, std) if own else map(np.array, channel_statistics(normalization))
        columns = [(mean - m) / s, std / s, (least.min(0) - m) / s, (greatest.max(0) - m) / s]
        rows |= {
            (normalization, channel): values
            for channel, values in zip("RGB", zip(*columns, strict=True), strict=True)
        }
    index = pd.MultiIndex.from_tuples(rows, names=["normalization", "channel"])
    return pd.DataFrame(list(rows.values()), index, ["mean", "std", "least", "greatest"])


def range_behind_a_norm(image: np.ndarray) -> pd.DataFrame:
    """How far the range of an image's values reaches behind a norm, by one random convolution and
    what follows it.

    Args:
        image: uint8 [3, H, W].

    Returns:
        Rows: the convolution alone; a BatchNorm with the batch's statistics; a frozen norm, with
        the statistics of the range of 0 to 1. Columns: standard deviation of an output channel
        (mean over the channels) for values of 0 to 1 and of 0 to 255.
    """
    ranges = {}
    for name, normalization in (("0 to 1", "imagenet"), ("0 to 255", "imagenet_of_0_255")):
        mean, std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None]
            for values in channel_statistics(normalization)
        )
        ranges[name] = ((torch.from_numpy(image.copy()) / 255 - mean) / std)[None]
    weight = torch.randn(
        16, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    outputs = {
        name: nn.functional.conv2d(values, weight, stride=2) for name, values in ranges.items()
    }
    usual = outputs["0 to 1"]
    frozen = usual.mean((0, 2, 3)), usual.var((0, 2, 3), unbiased=False)
    rows = {
        "convolution": outputs,
        "BatchNorm": {
            name: nn.functional.batch_norm(values, None, None, training=True)
            for name, values in outputs.items()
        },
        "frozen norm": {
            name: nn.functional.batch_norm(values, *frozen) for name, values in outputs.items()
        },
    }
    table = {
        row: {name: values.std((0, 2, 3)).mean().item() for name, values in columns.items()}
        for row, columns in rows.items()
    }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("behind")


def norms_after_validation(dataset: CellDataset, images: int = 2) -> pd.DataFrame:
    """How many norms of a small model changed their statistics in ``engine.validation_loss`` over
    some images.

    Returns:
        Rows: validation as in this study; in training mode. Columns: norms, changed.
    """
    rows = {}
    for name, updates in (("norms left alone", False), ("in training mode", True)):
        config = RunConfig(
            crop_size_px=64, accelerator="cpu", precision="32", validation_updates_norms=updates
        )
        fabric = make_fabric(config)
        model = fabric.setup_module(rebuild_model(config))
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        before = [norm.running_mean.clone() for norm in norms]
        validation_loss(fabric, model, dataset, list(range(min(images, len(dataset)))), config)
        changed = [
            not torch.equal(norm.running_mean, mean)
            for norm, mean in zip(norms, before, strict=True)
        ]
        rows[name] = (len(norms), sum(changed))
    return pd.DataFrame.from_dict(rows, orient="index", columns=["norms", "changed"]).rename_axis(
        "validation"
    )


# -------------------------------------------------------------------------------------------------------------
# anchors, proposals

REPORTED_ANCHORS = (8, 16, 32, 64, 128)
DEFAULT_ANCHORS = (32, 64, 128, 256, 512)
SET_PROPOSALS = {
    "pre_nms_top_n_train": 2000,
    "post_nms_top_n_train": 1000,
    "pre_nms_top_n_test": 1000,
    "post_nms_top_n_test": 500,
}


def _anchor_generator(sizes: Sequence[float]) -> AnchorGenerator:
    return AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * len(sizes))


def reassign_sizes(sizes: Sequence[float], new_sizes: Sequence[float]) -> pd.DataFrame:
    """A torchvision ``AnchorGenerator`` before and after ``sizes`` is set on it.

    Returns:
        One row a pyramid level: ``sizes``, and the side, px, of the square anchor that it lays,
        before and after.
    """

    def sides(generator: AnchorGenerator) -> list[int]:
        return [
            int(anchors[1, 2] - anchors[1, 0]) for anchors in generator.cell_anchors
        ]  # the second ratio is 1

    generator = _anchor_generator(sizes)
    columns = {"sizes before": list(sizes), "anchor_px before": sides(generator)}
    generator.sizes = tuple((size,) for size in new_sizes)
    columns |= {
        "sizes after": [size for (size,) in generator.sizes],
        "anchor_px after": sides(generator),
    }
    names = [f"P{level}" for level in range(2, 2 + len(columns["sizes before"]))]
    return pd.DataFrame(columns, pd.Index(names, name="level"))[
        ["sizes before", "sizes after", "anchor_px before", "anchor_px after"]
    ]


def input_scale(cells: pd.DataFrame, min_size: int = 800, max_size: int = 1333) -> pd.Series:
    """By how much a cell's image is enlarged for the model: torchvision's rule; ``min_size`` 0
    leaves it as it is.
    """
    sides = cells[["image_height_px", "image_width_px"]]
    return (
        np.minimum(min_size / sides.min(axis=1), max_size / sides.max(axis=1))
        if min_size
        else pd.Series(1.0, cells.index)
    )


def anchor_fit(
    cells: pd.DataFrame, anchors: dict[str, Sequence[float]], scales: dict[str, pd.Series]
) -> pd.DataFrame:
    """How well anchors can fit cells: the share of boxes that have an IoU of 0.5, or 0.7, with an
    anchor around their own middle.

    Anchors lie on a grid, so that the share that some anchor really reaches is lower.

    Args:
        cells: of ``cell_table``.
        anchors: name -> sizes, each with the ratios 0.5, 1 and 2.
        scales: name -> of ``input_scale``.
    """
    rows = {}
    for scale_name, scale in scales.items():
        width, height = (
            (cells[side] * scale).to_numpy()[:, None] for side in ("width_px", "height_px")
        )
        for name, sizes in anchors.items():
            boxes = torch.cat(_anchor_generator(sizes).cell_anchors).numpy()
            anchor_width, anchor_height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
            common = np.minimum(width, anchor_width) * np.minimum(height, anchor_height)
            best = (common / (width * height + anchor_width * anchor_height - common)).max(axis=1)
            rows[scale_name, name] = [float((best >= iou).mean()) for iou in (0.5, 0.7)]
    index = pd.MultiIndex.from_tuples(rows, names=["image", "anchors"])
    return pd.DataFrame(list(rows.values()), index, ["IoU ≥ 0.5", "IoU ≥ 0.7"])


def proposals_after_setting(names: dict[str, int] = SET_PROPOSALS) -> pd.DataFrame:
    """What torchvision's region proposal network reads before and after some names are set on it.

    Returns:
        Rows: number of proposals before and behind NMS, in training and in use. Columns: before,
        set, after.
    """
    default = inspect.signature(FasterRCNN).parameters
    kept = {
        step: {
            mode: default[f"rpn_{step}_nms_top_n_{end}"].default
            for mode, end in (("training", "train"), ("testing", "test"))
        }
        for step in ("pre", "post")
    }
    rpn = RegionProposalNetwork(
        _anchor_generator(DEFAULT_ANCHORS),
        RPNHead(256, 3),
        0.7,
        0.3,
        256,
        0.5,
        kept["pre"],
        kept["post"],
        0.7,
    )

    def read() -> dict[str, int]:
        found = {}
        for end in ("train", "test"):
            rpn.train(end == "train")
            found |= {
                f"pre_nms_top_n_{end}": rpn.pre_nms_top_n(),
                f"post_nms_top_n_{end}": rpn.post_nms_top_n(),
            }
        return found

    before = read()
    for name, number in names.items():
        setattr(rpn, name, number)
    return (
        pd.DataFrame({"before": before, "set": names, "after": read()})
        .loc[list(before)]
        .rename_axis("proposals")
    )


# ---------------------------------------------------------------------------------------------------------------------
# detections

EDGE_PX = 0.01  # a box that ends this near an edge touches it


def default_nms_thresholds() -> dict[str, float]:
    """torchvision's: ``rpn_nms_thresh`` of the proposals, ``box_nms_thresh`` of the detections."""
    default = inspect.signature(FasterRCNN).parameters
    return {name: default[name].default for name in ("rpn_nms_thresh", "box_nms_thresh")}


def drop_near_edge(detections: Detections, images: list[dict[str, Any]]) -> Detections:
    """Report B's border filter with a tolerance: a box that ends within ``EDGE_PX`` of an edge
    touches it.
    """
    return borders.drop_border_detections(detections, images, EDGE_PX)


def box_nms(detections: Detections, iou_threshold: float) -> Detections:
    """The detections that torchvision's box NMS, within each image and class, leaves at this
    threshold, in their order.
    """
    if not detections:
        return []
    x, y, width, height = torch.tensor(
        [detection["bbox"] for detection in detections], dtype=torch.float64
    ).unbind(1)
    scores = torch.tensor([detection["score"] for detection in detections], dtype=torch.float64)
    groups = torch.tensor(
        [
            detection["image_id"] * (len(CLASS_NAMES) + 1) + detection["category_id"]
            for detection in detections
        ]
    )
    kept = batched_nms(torch.stack([x, y, x + width, y + height], 1), scores, groups, iou_threshold)
    return [detections[row] for row in sorted(kept.tolist())]


def size_factors(detections: Detections) -> pd.Series:
    """The share of detections that get each factor of report E's size-aware scores; 1.0: unchanged."""
    shares = [
        math.prod(detection["bbox"][2:]) / math.prod(detection["segmentation"]["size"])
        for detection in detections
    ]
    factors = [
        next((factor for limit, factor in E_SIZE_FACTORS if share < limit), 1.0) for share in shares
    ]
    counts = pd.Series(factors, dtype=float).value_counts(normalize=True)
    return (
        counts.reindex([*(factor for _, factor in E_SIZE_FACTORS), 1.0], fill_value=0.0)
        .rename("share")
        .rename_axis("factor")
    )


def images_at_limit(detections: Detections, detections_per_image: int) -> int:
    """How many images have as many detections as the model keeps of one, so that more may have been
    found.
    """
    return sum(
        number >= detections_per_image
        for number in Counter(detection["image_id"] for detection in detections).values()
    )
