"""Measure where the reports' released code differs from their text: its effect on cells, images,
the model and its detections, with torch and torchvision themselves and without any training.
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
    """List the cells, one per row: image (its index), class, width_px and height_px of the tight
    box, image_height_px, image_width_px.
    """
    parts = (find_cells(cell_image.label_maps, i) for i, cell_image in enumerate(dataset))
    cells = Cells.concatenate(parts)
    table = pd.DataFrame({"image": cells.image_ids})
    table["class"] = pd.Categorical.from_codes(cells.labels - 1, CLASS_NAMES)
    table[["width_px", "height_px"]] = (cells.boxes[:, 2:] - cells.boxes[:, :2]).astype(int)
    return table.assign(image_height_px=cells.sizes[:, 0], image_width_px=cells.sizes[:, 1])


def components_of_cells(dataset: Iterable[CellImage]) -> pd.DataFrame:
    """Count what happens to the cells of each image when class masks are read as report B's code
    does: converted to uint8, then split into 8-connected components.

    Returns:
        One row per image: image_id; cells; highest_id; lost: cells whose id is a multiple of 256,
        which uint8 turns into 0; same_value: cells with the same uint8 value as another cell of
        their class. Of the cells that are not lost: components; joined: cells that share a
        component with another cell; split: cells in several components.
    """
    rows = []
    for cell_image in dataset:
        counts = np.zeros(6, int)
        for label_map in cell_image.label_maps:
            ids = np.unique(label_map[label_map > 0])
            values, count = np.unique(ids.astype(np.uint8), return_counts=True)
            remaining = np.where(label_map.astype(np.uint8) > 0, label_map, 0)
            components, inside = connected_components(remaining), remaining > 0
            pixels = pd.DataFrame({"component": components[inside], "cell": remaining[inside]})
            pairs = pixels.drop_duplicates()
            lost, shared = count[values == 0].sum(), count[(values > 0) & (count > 1)].sum()
            joined = pairs.loc[pairs["component"].duplicated(keep=False), "cell"].nunique()
            split = pairs.loc[pairs["cell"].duplicated(), "cell"].nunique()
            counts += len(ids), lost, shared, components.max(initial=0), joined, split
        highest = int(cell_image.label_maps.max(initial=0))
        rows.append((cell_image.image_id, counts[0], highest, *counts[1:]))
    columns = ["image_id", "cells", "highest_id", "lost", "same_value"]
    return pd.DataFrame(rows, columns=[*columns, "components", "joined", "split"])


def missing_strip(cells: pd.DataFrame) -> pd.DataFrame:
    """Measure how much of a cell's box is missing if it misses the last pixel row and column (as in
    released code). The short box lies inside the whole box, so their IoU is 1 - missing.

    Returns:
        One row for ``all`` and each class of ``cell_table``: cells; width_px and height_px (means);
        missing: mean share of the box's area; worst_5%: the share that one in twenty cells exceeds;
        IoU: mean IoU of the short box with the whole one; vanished: cells whose short box is empty.
    """
    width, height = cells["width_px"], cells["height_px"]
    missing = 1 - (width - 1) * (height - 1) / (width * height)
    groups = _by_class(cells.assign(missing=missing, IoU=1 - missing, vanished=missing == 1))
    table = groups[["width_px", "height_px", "missing", "IoU"]].mean()
    table.insert(0, "cells", groups.size())
    table.insert(4, "worst_5%", groups["missing"].quantile(0.95))
    return table.assign(vanished=groups["vanished"].sum())


def small_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """Count the cells that report E's code drops: those whose last pixel minus first pixel, in x or
    in y, is 5 or less.

    Returns:
        One row for ``all`` and each class of ``cell_table``: cells, dropped, share (dropped /
        cells), images (with a cell of the class), images_left (with one that is not dropped).
    """
    dropped = cells[["width_px", "height_px"]].min(axis=1) - 1 <= 5
    groups = _by_class(cells.assign(dropped=dropped))
    table = groups["dropped"].agg(cells="size", dropped="sum", share="mean")
    images_left = _by_class(cells[~dropped])["image"].nunique()
    return table.assign(images=groups["image"].nunique(), images_left=images_left)


def _by_class(cells: pd.DataFrame):
    """Group cells by class, after a first group of all cells; a class may have no cells."""
    twice = pd.concat([cells.assign(**{"class": "all"}), cells])
    names = pd.Categorical(twice["class"], ["all", *CLASS_NAMES])
    return twice.assign(**{"class": names}).groupby("class", observed=False)


def image_sizes(dataset: CellDataset, data: str | Path) -> tuple[list[tuple[int, int]], str]:
    """List the distinct sizes (height, width), px, of annotated and test images, and say in a
    sentence how many there are.
    """
    annotated = {tuple(size) for size in dataset.sizes.tolist()}
    try:
        tests = {(image["height"], image["width"]) for image in open_test_images(data).listed}
    except DataError:
        tests = set()
    sentence = f"{len(annotated)} sizes of annotated images and {len(tests)} of test images"
    return sorted(annotated | tests), sentence


def unreachable_edges(sizes: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """Test whether a box as large as the resized image still reaches the right and bottom edge of
    the image after torchvision has scaled it back. ``sizes`` are (height, width), px.

    Returns:
        One row per size: height_px, width_px, right_px and bottom_px (where the box ends), right
        and bottom (whether it reaches the edge).
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
    """Count the cells, and those whose pixels change when they are written as COCO's RLE."""
    unchanged = []
    for cell_image in dataset:
        _, labels, ids = find_boxes(cell_image.label_maps)
        written = to_coco([cell_image])["annotations"]
        for class_id, instance_id, annotation in zip(labels, ids, written, strict=True):
            mask = coco_mask.decode(annotation["segmentation"])
            of_cell = cell_image.label_maps[class_id - 1] == instance_id
            unchanged.append(np.array_equal(mask, of_cell))
    return len(unchanged), unchanged.count(False)


class OneTransform(Dataset):
    """Images with one ``transform``, which all ``Subset`` views of this object share."""

    def __init__(self, images: Sequence[np.ndarray]):
        self.images, self.transform = images, None

    def __getitem__(self, i: int) -> np.ndarray:
        return self.transform(self.images[i])


def augmented_images(images: Sequence[np.ndarray]) -> pd.DataFrame:
    """Count the images (uint8 [3, H, W], not symmetric) that are augmented if training and
    validation set (every fifth image) are ``Subset`` views of one dataset object, as in report E's
    code (a mistake: the transform set last is used for both), and of two objects. The transform of
    the training view is set first, to a flip; that of the validation view then to no change.

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
    """The share of validation images whose patient also has training images, averaged over 1000
    random splits by image, and a sentence about it; None and the reason if patients are unknown.
    """
    if None in patients or not len(patients):
        return None, "the patients of the images are unknown"
    names, codes = np.unique(np.array(patients, str), return_inverse=True)
    held_out = int(np.clip(round(validation_fraction * len(codes)), 1, len(codes) - 1))
    rng = np.random.default_rng(0)
    splits = [np.split(rng.permutation(codes), [held_out]) for _ in range(1000)]
    both = np.mean([len(np.intersect1d(*sides)) for sides in splits])
    share = float(np.mean([np.isin(*sides).mean() for sides in splits]))
    return share, (
        f"In random splits that hold out {validation_fraction:.0%} of the images, {both:.1f} of "
        f"{len(names)} patients (mean) are on both sides; {share:.0%} of the validation images are "
        "of a patient with training images."
    )


# Model

PARTS = {
    "backbone.body.": "backbone", "backbone.fpn.": "feature pyramid",
    "rpn.head.conv.": "RPN convolutions", "rpn.head.": "RPN predictors",
    "roi_heads.box_head.": "box head", "roi_heads.box_predictor.": "box predictor",
    "roi_heads.mask_head.": "mask head", "roi_heads.mask_predictor.": "mask predictor",
}  # fmt: skip  # prefix of a parameter's name -> part; the first prefix that fits counts
HEAD_NORMS = "norms in the heads"


def model_parts(key: str) -> pd.DataFrame:
    """Count the parameters of a run's model at full scale, without making or loading weights.

    Returns:
        Rows: the parts, then ``all``. Columns: parameters; trainable: those that are not frozen;
        loaded: those that start from the run's weights. Frozen batch norms have no parameters.
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
    """The learning rate after each epoch by torch's ``ReduceLROnPlateau``, from the losses."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", factor, patience)
    rates = []
    for loss in losses:
        schedule.step(loss)
        rates.append(schedule.get_last_lr()[0])
    return rates


def normalised_values(dataset: CellDataset, normalizations: Sequence[str]) -> pd.DataFrame:
    """Summarise the values that the first layer of the model gets under several normalisations.

    Args:
        normalizations: values of ``RunConfig.normalization``; for ``data``, the statistics of the
            images in ``dataset`` are used.

    Returns:
        One row per normalisation and channel (R, G, B): mean, std, least, greatest over all pixels.
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
    """Measure whether a batch norm after the first convolution (of random weights) evens out that
    the values of an image (uint8 [3, H, W]) range from 0 to 255 instead of 0 to 1.

    Returns:
        Rows: the convolution alone; with a batch norm that uses the batch's statistics; with a
        frozen batch norm that has the statistics of values from 0 to 1. Columns: standard deviation
        of the output channels (mean over them) for values from 0 to 1 and from 0 to 255.
    """
    generator, double = torch.Generator().manual_seed(0), torch.float64
    weight = torch.randn(16, 3, 7, 7, dtype=double, generator=generator)
    outputs = {}
    for name, normalization in (("0 to 1", "imagenet"), ("0 to 255", "imagenet_of_0_255")):
        mean, std = torch.tensor(channel_statistics(normalization), dtype=double)[..., None, None]
        values = (torch.from_numpy(image / 255) - mean) / std
        outputs[name] = nn.functional.conv2d(values[None], weight, stride=2)
    expected, batch_norm = outputs["0 to 1"], nn.functional.batch_norm
    frozen = expected.mean((0, 2, 3)), expected.var((0, 2, 3), unbiased=False)
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
    """Count the batch norms of a small model whose statistics change when the validation loss over
    two images is computed: if they are left alone, as in this study, and in training mode (as in
    released code).
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
    """torchvision's generator, with one size per pyramid level and its ratios 0.5, 1 and 2."""
    return AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * len(sizes))


def reassign_sizes(sizes: Sequence[float], new_sizes: Sequence[float]) -> pd.DataFrame:
    """Show that setting ``sizes`` on a torchvision ``AnchorGenerator`` does not change its anchors.
    One row per pyramid level: sizes, and side of the square anchor (anchor_px), before and after.
    """
    generator = anchor_generator(sizes)
    columns = {}
    for when, sizes_now in (("before", sizes), ("after", new_sizes)):
        generator.sizes = tuple((size,) for size in sizes_now)
        squares = [anchors[1] for anchors in generator.cell_anchors]  # the second ratio is 1
        columns[f"sizes {when}"] = sizes_now
        columns[f"anchor_px {when}"] = [int(square[2] - square[0]) for square in squares]
    levels = pd.Index([f"P{level}" for level in range(2, 2 + len(sizes))], name="level")
    return pd.DataFrame(columns, levels).sort_index(axis=1, ascending=False)


def input_scale(cells: pd.DataFrame, min_size: int = MIN_SIZE) -> pd.Series:
    """The factor by which torchvision enlarges the image of each cell; 1 if ``min_size`` is 0."""
    if not min_size:
        return pd.Series(1.0, cells.index)
    sides = cells[["image_height_px", "image_width_px"]]
    return np.minimum(min_size / sides.min(axis=1), MAX_SIZE / sides.max(axis=1))


def anchor_fit(
    cells: pd.DataFrame, anchors: Mapping[str, Sequence[float]], scales: Mapping[str, pd.Series]
) -> pd.DataFrame:
    """The share of cells (of ``cell_table``) whose box has an IoU of at least 0.5, or 0.7, with an
    anchor around its own centre. Real anchors lie on a grid, so that fewer cells have such a one.

    Args:
        anchors: name -> sizes, px, each with the ratios 0.5, 1 and 2.
        scales: name -> factors from ``input_scale``.
    """
    rows = {}
    for scale_name, scale in scales.items():
        boxes = cells[["width_px", "height_px"]].mul(scale, axis=0).to_numpy()[:, None]
        for name, sizes in anchors.items():
            corners = torch.cat(anchor_generator(sizes).cell_anchors).numpy()
            sides = corners[:, 2:] - corners[:, :2]
            common = np.minimum(boxes, sides).prod(-1)
            best_iou = (common / (boxes.prod(-1) + sides.prod(-1) - common)).max(axis=1)
            shares = {f"IoU ≥ {least}": (best_iou >= least).mean() for least in (0.5, 0.7)}
            rows[scale_name, name] = shares
    return pd.DataFrame(rows).T.rename_axis(["image", "anchors"])


def proposals_after_setting() -> pd.DataFrame:
    """Compare the numbers of proposals that torchvision's RPN keeps before and after report E's
    code sets ``SET_PROPOSALS`` on it (each for before and after NMS, in training and in testing).
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
    """torchvision's Mask R-CNN v2 with its default settings, on device ``meta`` (no weights)."""
    with torch.device("meta"):
        return maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)


# Detections


def box_nms(detections: Cells, iou_threshold: float) -> Cells:
    """Apply torchvision's box NMS in each image and class; the order of detections stays."""
    groups = detections.image_ids * (len(CLASS_NAMES) + 1) + detections.labels
    tensors = (torch.from_numpy(array) for array in (detections.boxes, detections.scores, groups))
    return detections[np.sort(batched_nms(*tensors, iou_threshold).numpy())]


def images_at_limit(study: Study, key: str) -> tuple[int | None, str]:
    """Count the images with as many detections as the run's model returns at most, and give a
    sentence about them; None and the reason if the run is missing.
    """
    if not (trained := study.first(key)):
        return None, study.missing(key)
    cells, settings = trained.run.detections, trained.run.settings
    limit, images = settings["detections_per_image"], len(trained.run.truth["images"])
    full = int((np.bincount(cells.image_ids) >= limit).sum())
    threshold, lowest = settings["box_score_thresh"], cells.scores.min(initial=1)
    return full, (
        f"{key} drops scores under {threshold:g} and leaves at most {limit} detections an image: "
        f"the lowest of {len(cells)} scores is {lowest:.3f}, and {full} of {images} images are at "
        "the limit. No histogram shows what was dropped."
    )


def raised_scores(study: Study, key: str) -> tuple[float | None, str]:
    """The share of a run's detections whose score is raised by report E's size-aware factors, and a
    sentence about it; None and the reason if the run or its detections are missing.
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
    halves = np.full(len(detections), 0.5)  # low enough that the limit of 1 is not reached
    adjusted = postprocess.adjust_scores_by_size(replace(detections, scores=halves), E_SIZE_FACTORS)
    shares = pd.Series(adjusted.scores / halves).value_counts(normalize=True)
    return shares.reindex([*(factor for _, factor in E_SIZE_FACTORS), 1.0], fill_value=0.0)
