"""What the reports' released code does to cells, images, the model and its detections where it
differs from their text: measured with torch and torchvision themselves, without any training.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco_mask
from torch import nn
from torch.utils.data import Dataset, Subset
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import batched_nms

from cellseg_helpers import postprocess
from cellseg_helpers.cells import CLASS_NAMES, Cells
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.cache import CellDataset, CellImage, DataError
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.hw3 import open_test_images
from cellseg_helpers.data.labels import connected_components, find_boxes, find_cells
from cellseg_helpers.devices import make_fabric
from cellseg_helpers.engine import image_statistics, validation_loss
from cellseg_helpers.model.build import channel_statistics, rebuild_model, starts_loaded
from study import runs as study_runs
from study.reported import E_SIZE_FACTORS
from study.runs import Study

MIN_SIZE, MAX_SIZE = 800, 1333  # torchvision's defaults for the resized image's sides, px

# Cells and images


def cell_table(dataset: Iterable[CellImage]) -> pd.DataFrame:
    """One row a cell: image (its index), class, width_px and height_px of its tight box,
    image_height_px, image_width_px.
    """
    parts = (find_cells(cell_image.label_maps, i) for i, cell_image in enumerate(dataset))
    cells = Cells.concatenate(parts)
    table = pd.DataFrame({"image": cells.image_ids})
    table["class"] = pd.Categorical.from_codes(cells.labels - 1, CLASS_NAMES)
    table[["width_px", "height_px"]] = (cells.boxes[:, 2:] - cells.boxes[:, :2]).astype(int)
    return table.assign(image_height_px=cells.sizes[:, 0], image_width_px=cells.sizes[:, 1])


def components_of_cells(dataset: Iterable[CellImage]) -> pd.DataFrame:
    """What report B's way to read class masks makes of each image's cells.

    Returns:
        One row an image: image_id; cells; highest_id; lost: cells whose id is a multiple of 256,
        which uint8 turns into 0; same_value: cells that share their uint8 value with another cell
        of their class. Of the cells that are not lost: components, 8-connected; joined: cells that
        share a component with another cell; split: cells in several components.
    """
    rows = []
    for cell_image in dataset:
        counts = np.zeros(6, int)
        for label_map in cell_image.label_maps:
            ids = np.unique(label_map[label_map > 0])
            values, number = np.unique(ids.astype(np.uint8), return_counts=True)
            left = np.where(label_map.astype(np.uint8) > 0, label_map, 0)
            components = connected_components(left)
            pixels = pd.DataFrame({"component": components[left > 0], "cell": left[left > 0]})
            pairs = pixels.drop_duplicates()
            lost, shared = number[values == 0].sum(), number[(values > 0) & (number > 1)].sum()
            joined = pairs.loc[pairs["component"].duplicated(keep=False), "cell"].nunique()
            split = pairs.loc[pairs["cell"].duplicated(), "cell"].nunique()
            counts += len(ids), lost, shared, components.max(initial=0), joined, split
        highest = int(cell_image.label_maps.max(initial=0))
        rows.append((cell_image.image_id, counts[0], highest, *counts[1:]))
    columns = ["image_id", "cells", "highest_id", "lost", "same_value"]
    return pd.DataFrame(rows, columns=[*columns, "components", "joined", "split"])


def missing_strip(cells: pd.DataFrame) -> pd.DataFrame:
    """How much of the box of each cell (of ``cell_table``) is missing when it ends before the last
    pixel row and column. The short box lies inside the whole box, so their IoU is 1 - missing.

    Returns:
        Rows: ``all``, then the classes. cells; width_px and height_px (means); missing: mean share
        of the box's area; worst_5%: the share that one in twenty cells exceeds; IoU: mean IoU of
        the short box with the whole one; vanished: cells whose short box is empty.
    """
    width, height = cells["width_px"], cells["height_px"]
    missing = 1 - (width - 1) * (height - 1) / (width * height)
    groups = _by_class(cells.assign(missing=missing, IoU=1 - missing, vanished=missing == 1))
    found = groups[["width_px", "height_px", "missing", "IoU"]].mean()
    found.insert(0, "cells", groups.size())
    found.insert(4, "worst_5%", groups["missing"].quantile(0.95))
    return found.assign(vanished=groups["vanished"].sum())


def small_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells (of ``cell_table``) that report E's code drops: last minus first pixel, in x or in
    y, is 5 or less.

    Returns:
        Rows: ``all``, then the classes. cells, dropped, share, images (with such a cell before),
        images_left (with such a cell afterwards).
    """
    dropped = cells[["width_px", "height_px"]].min(axis=1) - 1 <= 5
    groups = _by_class(cells.assign(dropped=dropped))
    table = groups["dropped"].agg(cells="size", dropped="sum", share="mean")
    left = _by_class(cells[~dropped])["image"].nunique()
    return table.assign(images=groups["image"].nunique(), images_left=left)


def _by_class(cells: pd.DataFrame):
    """Grouped by class, with all cells as the first group; a class without cells is a group."""
    twice = pd.concat([cells.assign(**{"class": "all"}), cells])
    names = pd.Categorical(twice["class"], ["all", *CLASS_NAMES])
    return twice.assign(**{"class": names}).groupby("class", observed=False)


def image_sizes(dataset: CellDataset, data: str | Path) -> tuple[list[tuple[int, int]], str]:
    """The distinct sizes (height, width), px, of the annotated and the test images; a sentence."""
    annotated = {tuple(size) for size in dataset.sizes.tolist()}
    try:
        tests = {(image["height"], image["width"]) for image in open_test_images(data).listed}
    except DataError:
        tests = set()
    sentence = f"{len(annotated)} sizes of annotated images and {len(tests)} of test images"
    return sorted(annotated | tests), sentence


def unreachable_edges(sizes: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """Whether a box as large as the resized image reaches the image's right and bottom edge once
    torchvision has scaled it back, for image sizes (height, width) in px.

    Returns:
        One row a size: height_px, width_px, right_px and bottom_px (where the box ends), right and
        bottom (whether the edge is reached).
    """
    rows = []
    for height, width in sizes:
        scale = min(MIN_SIZE / min(height, width), MAX_SIZE / max(height, width))
        resized = int(height * scale), int(width * scale)
        box = torch.tensor([[0.0, 0.0, resized[1], resized[0]]])
        right, bottom = resize_boxes(box, resized, (height, width))[0, 2:].tolist()
        rows.append((height, width, right, bottom, right >= width, bottom >= height))
    columns = ["height_px", "width_px", "right_px", "bottom_px", "right", "bottom"]
    return pd.DataFrame(rows, columns=columns)


def changed_by_coco(dataset: Iterable[CellImage]) -> tuple[int, int]:
    """The number of cells, and of those that the COCO format's run lengths give other pixels."""
    same = []
    for cell_image in dataset:
        _, labels, ids = find_boxes(cell_image.label_maps)
        written = to_coco([cell_image])["annotations"]
        for class_id, instance_id, annotation in zip(labels, ids, written, strict=True):
            mask = coco_mask.decode(annotation["segmentation"])
            same.append(np.array_equal(mask, cell_image.label_maps[class_id - 1] == instance_id))
    return len(same), same.count(False)


class OneTransform(Dataset):
    """Images with one ``transform``, whichever view asks for them."""

    def __init__(self, images: Sequence[np.ndarray]):
        self.images, self.transform = images, None

    def __getitem__(self, i: int) -> np.ndarray:
        return self.transform(self.images[i])


def augmented_images(images: Sequence[np.ndarray]) -> pd.DataFrame:
    """How many images (uint8 [3, H, W], none its own mirror image) are augmented when training and
    validation (one in five) are torch's ``Subset`` of one dataset object, as in report E's code,
    and of two. The training view gets a flip as its transform; then the validation view gets one
    that changes nothing.

    Returns:
        Rows: one object, two objects. Columns: training, training_flipped, validation,
        validation_flipped (numbers of images).
    """
    rows = {}
    for name, number in (("one object", 1), ("two objects", 2)):
        objects = [OneTransform(images) for _ in range(number)]
        training = Subset(objects[0], [i for i in range(len(images)) if i % 5])
        validation = Subset(objects[-1], range(0, len(images), 5))
        training.dataset.transform = lambda image: image[..., ::-1]
        validation.dataset.transform = lambda image: image
        rows[name] = {}
        for side, view in (("training", training), ("validation", validation)):
            pairs = zip(view, (images[index] for index in view.indices), strict=True)
            flipped = sum(not np.array_equal(*pair) for pair in pairs)
            rows[name] |= {side: len(view), f"{side}_flipped": flipped}
    return pd.DataFrame(rows).T.rename_axis("views of")


def shared_patients(
    patients: Sequence[str | None], validation_fraction: float
) -> tuple[float | None, str]:
    """The share of validation images whose patient also has a training image, mean over 1000 random
    splits by image that hold out a fraction, 0..1; a sentence. None and the reason where a patient
    is unknown.
    """
    if None in patients or not len(patients):
        return None, "the patients of the images are unknown"
    names, codes = np.unique(np.array(patients, str), return_inverse=True)
    held = int(np.clip(round(validation_fraction * len(codes)), 1, len(codes) - 1))
    rng = np.random.default_rng(0)
    splits = [np.split(rng.permutation(codes), [held]) for _ in range(1000)]
    both = np.mean([len(np.intersect1d(*sides)) for sides in splits])
    seen = float(np.mean([np.isin(*sides).mean() for sides in splits]))
    return seen, (
        f"In random splits that hold out {validation_fraction:.0%} of the images, {both:.1f} of "
        f"{len(names)} patients (mean) are on both sides; {seen:.0%} of the validation images are "
        "of a patient with training images."
    )


# Model

PARTS = {
    "backbone.body.": "backbone", "backbone.fpn.": "feature pyramid",
    "rpn.head.conv.": "RPN convolutions", "rpn.head.": "RPN predictors",
    "roi_heads.box_head.": "box head", "roi_heads.box_predictor.": "box predictor",
    "roi_heads.mask_head.": "mask head", "roi_heads.mask_predictor.": "mask predictor",
}  # fmt: skip  # a parameter's name begins with one; the first that fits counts
HEAD_NORMS = "norms in the heads"


def model_parts(key: str) -> pd.DataFrame:
    """Numbers of parameters of a run's model at full scale; no weights are loaded or made.

    Returns:
        Rows: the parts, then ``all``. Columns: parameters; trainable: those that are not frozen;
        loaded: those that start from the run's weights. Frozen norms have no parameters.
    """
    config = study_runs.settings(key, "full", "drawn", 0)
    with torch.device("meta"):
        model = rebuild_model(config)
    rows = []
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            part = next(part for start, part in PARTS.items() if name.startswith(start))
            if isinstance(module, nn.BatchNorm2d) and not name.startswith("backbone."):
                part = HEAD_NORMS
            size, loaded = parameter.numel(), starts_loaded(name, config)
            rows.append((part, size, size * parameter.requires_grad, size * loaded))
    columns = ["part", "parameters", "trainable", "loaded"]
    table = pd.DataFrame(rows, columns=columns).groupby("part").sum()
    table = table.reindex([*PARTS.values(), HEAD_NORMS], fill_value=0)
    table.loc["all"] = table.sum()
    return table


def plateau_rates(
    losses: Sequence[float], learning_rate: float, factor: float, patience: int
) -> list[float]:
    """The learning rate after each epoch's loss, by torch's ``ReduceLROnPlateau``."""
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
        normalizations: of ``RunConfig.normalization``; ``data`` takes these images' own statistics.

    Returns:
        One row a normalisation and channel (R, G, B): mean, std, least, greatest over all pixels.
    """
    mean, std = image_statistics(dataset, range(len(dataset)))
    values = pd.DataFrame({"mean": mean, "std": std}, pd.Index(list("RGB"), name="channel"))
    values["least"] = np.min([item.image.min((1, 2)) / 255 for item in dataset], axis=0)
    values["greatest"] = np.max([item.image.max((1, 2)) / 255 for item in dataset], axis=0)
    tables = {}
    for name in normalizations:
        m, s = np.array((mean, std) if name == "data" else channel_statistics(name))
        tables[name] = values.sub(m, axis=0).assign(std=values["std"]).div(s, axis=0)
    return pd.concat(tables, names=["normalization"])


def range_behind_a_norm(image: np.ndarray) -> pd.DataFrame:
    """How far the range of an image's values (uint8 [3, H, W]) reaches behind a norm: one random
    convolution and what follows it, in float64.

    Returns:
        Rows: the convolution alone; a BatchNorm with the batch's statistics; a frozen norm with the
        statistics of values of 0 to 1. Columns: standard deviation of an output channel (mean over
        the channels) for values of 0 to 1 and of 0 to 255.
    """
    generator, double = torch.Generator().manual_seed(0), torch.float64
    weight = torch.randn(16, 3, 7, 7, dtype=double, generator=generator)
    outputs = {}
    for name, normalization in (("0 to 1", "imagenet"), ("0 to 255", "imagenet_of_0_255")):
        mean, std = torch.tensor(channel_statistics(normalization), dtype=double)[..., None, None]
        values = (torch.from_numpy(image / 255) - mean) / std
        outputs[name] = nn.functional.conv2d(values[None], weight, stride=2)
    usual, batch_norm = outputs["0 to 1"], nn.functional.batch_norm
    frozen = usual.mean((0, 2, 3)), usual.var((0, 2, 3), unbiased=False)
    columns = {}
    for name, output in outputs.items():
        layers = {
            "convolution": output,
            "BatchNorm": batch_norm(output, None, None, training=True),
            "frozen norm": batch_norm(output, *frozen),
        }
        columns[name] = {layer: v.std((0, 2, 3)).mean().item() for layer, v in layers.items()}
    return pd.DataFrame(columns).rename_axis("behind")


def norms_after_validation(dataset: CellDataset) -> pd.DataFrame:
    """How many norms of a small model change their statistics in ``engine.validation_loss`` over
    two images: when norms are left alone, as in this study, and in training mode.
    """
    rows = {}
    small = RunConfig(crop_size_px=64, accelerator="cpu", precision="32")
    for name, updates in (("norms left alone", False), ("in training mode", True)):
        config = replace(small, validation_updates_norms=updates)
        fabric = make_fabric(config)
        model = fabric.setup_module(rebuild_model(config))
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        before = [norm.running_mean.clone() for norm in norms]
        validation_loss(fabric, model, dataset, list(range(len(dataset)))[:2], config)
        pairs = zip(norms, before, strict=True)
        changed = sum(not torch.equal(norm.running_mean, mean) for norm, mean in pairs)
        rows[name] = {"norms": len(norms), "changed": changed}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("validation")


# Anchors and proposals

REPORTED_ANCHORS = (8, 16, 32, 64, 128)
DEFAULT_ANCHORS = (32, 64, 128, 256, 512)
SET_PROPOSALS = {
    "pre_nms_top_n_train": 2000, "post_nms_top_n_train": 1000,
    "pre_nms_top_n_test": 1000, "post_nms_top_n_test": 500,
}  # fmt: skip


def anchor_generator(sizes: Sequence[float]) -> AnchorGenerator:
    """torchvision's, with one size a pyramid level and its ratios 0.5, 1 and 2."""
    return AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * len(sizes))


def reassign_sizes(sizes: Sequence[float], new_sizes: Sequence[float]) -> pd.DataFrame:
    """A torchvision ``AnchorGenerator`` before and after ``sizes`` is set on it. One row a pyramid
    level: sizes, and the side of the level's square anchor (anchor_px), before and after.
    """
    generator = anchor_generator(sizes)
    columns = {}
    for when, own_sizes in (("before", sizes), ("after", new_sizes)):
        generator.sizes = tuple((size,) for size in own_sizes)
        squares = [anchors[1] for anchors in generator.cell_anchors]  # the second ratio is 1
        columns[f"sizes {when}"] = own_sizes
        columns[f"anchor_px {when}"] = [int(square[2] - square[0]) for square in squares]
    levels = pd.Index([f"P{level}" for level in range(2, 2 + len(sizes))], name="level")
    return pd.DataFrame(columns, levels).sort_index(axis=1, ascending=False)


def input_scale(cells: pd.DataFrame, min_size: int = MIN_SIZE) -> pd.Series:
    """By how much the model enlarges each cell's image (torchvision's rule); ``min_size`` 0: 1."""
    if not min_size:
        return pd.Series(1.0, cells.index)
    sides = cells[["image_height_px", "image_width_px"]]
    return np.minimum(min_size / sides.min(axis=1), MAX_SIZE / sides.max(axis=1))


def anchor_fit(
    cells: pd.DataFrame, anchors: Mapping[str, Sequence[float]], scales: Mapping[str, pd.Series]
) -> pd.DataFrame:
    """The share of cells (of ``cell_table``) with a box that an anchor around the same centre fits
    at an IoU of 0.5, or 0.7. Anchors lie on a grid, so fewer cells really have such an anchor.

    Args:
        anchors: name -> sizes, px, each with the ratios 0.5, 1 and 2.
        scales: name -> of ``input_scale``.
    """
    rows = {}
    for scale_name, scale in scales.items():
        boxes = cells[["width_px", "height_px"]].mul(scale, axis=0).to_numpy()[:, None]
        for name, sizes in anchors.items():
            corners = torch.cat(anchor_generator(sizes).cell_anchors).numpy()
            sides = corners[:, 2:] - corners[:, :2]
            common = np.minimum(boxes, sides).prod(-1)
            best = (common / (boxes.prod(-1) + sides.prod(-1) - common)).max(axis=1)
            rows[scale_name, name] = {f"IoU ≥ {iou}": (best >= iou).mean() for iou in (0.5, 0.7)}
    return pd.DataFrame(rows).T.rename_axis(["image", "anchors"])


def proposals_after_setting() -> pd.DataFrame:
    """How many proposals the region proposal network of torchvision's v2 model keeps (before and
    after NMS, in training and in testing): before and after ``SET_PROPOSALS`` is set on it, as in
    report E's code.
    """
    rpn = default_model().rpn
    columns = {"before": {}, "set": SET_PROPOSALS, "after": {}}
    for when in ("before", "after"):
        for mode in ("train", "test"):
            rpn.train(mode == "train")
            columns[when][f"pre_nms_top_n_{mode}"] = rpn.pre_nms_top_n()
            columns[when][f"post_nms_top_n_{mode}"] = rpn.post_nms_top_n()
        for name, number in SET_PROPOSALS.items():
            setattr(rpn, name, number)
    return pd.DataFrame(columns).loc[list(SET_PROPOSALS)].rename_axis("proposals")


def default_model() -> nn.Module:
    """torchvision's Mask R-CNN v2 with its default settings, without values."""
    with torch.device("meta"):
        return maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)


# Detections


def box_nms(detections: Cells, iou_threshold: float) -> Cells:
    """The detections that torchvision's box NMS leaves in each image and class, in their order."""
    groups = detections.image_ids * (len(CLASS_NAMES) + 1) + detections.labels
    arrays = (torch.from_numpy(array) for array in (detections.boxes, detections.scores, groups))
    return detections[np.sort(batched_nms(*arrays, iou_threshold).numpy())]


def images_at_limit(study: Study, key: str) -> tuple[int | None, str]:
    """How many images have as many detections as the run's model may leave; a sentence. None and
    the reason if the run is missing.
    """
    if not (trained := study.first(key)):
        return None, study.missing(key)
    found, settings = trained.run.detections, trained.run.settings
    limit, images = settings["detections_per_image"], len(trained.run.truth["images"])
    full = int((np.bincount(found.image_ids) >= limit).sum())
    least, lowest = settings["box_score_thresh"], found.scores.min(initial=1)
    return full, (
        f"{key} drops scores under {least:g} and leaves at most {limit} detections an image: the "
        f"lowest of {len(found)} scores is {lowest:.3f}, and {full} of {images} images are at the "
        "limit. No histogram shows what was dropped."
    )


def raised_scores(study: Study, key: str) -> tuple[float | None, str]:
    """The share of a run's detections with a score that report E's size-aware factors raise; a
    sentence. None and the reason if the run or its detections are missing.
    """
    if not (trained := study.first(key)):
        return None, study.missing(key)
    if not len(trained.run.detections):
        return None, f"{key} has no detections"
    factors = size_factors(trained.run.detections)
    listed = [f"{share:.0%} get a factor of {factor:g}" for factor, share in factors.items()]
    return 1 - factors.loc[1.0], (
        f"Of the detections of {key}, {', '.join(listed)}. Where most cells are small, this does "
        "much the same as lower thresholds."
    )


def size_factors(detections: Cells) -> pd.Series:
    """The share of detections for each factor of report E's size-aware scores; 1.0: unchanged."""
    halves = np.full(len(detections), 0.5)  # no factor raises them to the limit of 1
    adjusted = postprocess.adjust_scores_by_size(replace(detections, scores=halves), E_SIZE_FACTORS)
    shares = pd.Series(adjusted.scores / halves).value_counts(normalize=True)
    return shares.reindex([*(factor for _, factor in E_SIZE_FACTORS), 1.0], fill_value=0.0)
