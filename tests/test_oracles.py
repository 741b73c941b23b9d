"""Each fast path against its slow oracle on random small scenes.

Among them: one-pixel cells, cells at every border, no cell, ids above 16 bits, two classes on the
same pixels; boxes partly and wholly outside the image.
"""

import copy
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from scenes import CLASS_NAMES
from test_metrics import by_pycocotools, with_nan
from test_model import both_losses, paired_models
from test_postprocess import REFINEMENTS, detection, masks_of, on_large_canvas
from test_readers import add_image
from test_thresholds import simulated
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.roi_heads import (
    expand_boxes,
    paste_masks_in_image,
    project_masks_on_boxes,
)
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, box_iou, masks_to_boxes
from torchvision.transforms import v2

from cellseg_helpers.cells import Cells, encode_mask
from cellseg_helpers.data import hw3 as readers
from cellseg_helpers.data.augment import RECIPES, augment
from cellseg_helpers.data.coco import CocoAnnotation, CocoImage, draw_label_maps
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.data.labels import find_cells, find_instances
from cellseg_helpers.data.samples import make_target
from cellseg_helpers.inference import paste_in_boxes, predict
from cellseg_helpers.metrics import match_detections, score_coco
from cellseg_helpers.model import rpn as rpn_module
from cellseg_helpers.model.heads import LabelMapTransform, mask_targets
from cellseg_helpers.model.roi_align import GatherRoIAlign
from cellseg_helpers.model.rpn import LabelMapRPN
from cellseg_helpers.resampling import bootstrap_ap50, bootstrap_summary, draw_images
from cellseg_helpers.thresholds import count_by_threshold, keep_scores

IDS = (1, 2, 3, 255, 256, 65_535, 65_536, 70_000)
seeds = st.integers(0, 2**32 - 1)
half_axes = st.sampled_from((1, 1, 2, 3.5, 8, 20))  # px


def ellipse(shape, y, x, half_height, half_width):
    ys, xs = np.ogrid[: shape[0], : shape[1]]
    return ((ys - y) / half_height) ** 2 + ((xs - x) / half_width) ** 2 < 1


@st.composite
def scenes(draw, min_side=1, ids=IDS):
    """Label maps int32 [K, H, W] of ellipses, lines and single pixels anywhere, later ones on
    earlier ones.
    """
    shape = draw(st.integers(min_side, 40)), draw(st.integers(min_side, 40))
    label_maps = np.zeros((draw(st.integers(1, 4)), *shape), np.int32)
    cells = st.tuples(
        *(st.integers(0, length - 1) for length in label_maps.shape),
        half_axes,
        half_axes,
        st.sampled_from(ids),
    )
    for k, *cell, number in draw(st.lists(cells, max_size=10)):
        label_maps[k][ellipse(shape, *cell)] = number
    return label_maps


def borders():
    """A pixel in every corner and on every side, a row and a column, a large cell, two classes on
    the same pixels.
    """
    label_maps = np.zeros((4, 24, 30), np.int32)
    label_maps[0, [0, 0, -1, -1, 0, -1, 9, 13], [0, -1, 0, -1, 15, 15, 0, -1]] = range(
        65_532, 65_540
    )
    label_maps[1, 8:17, 9:20] = label_maps[2, 8:17, 9:20] = 70_000
    label_maps[2, 10, 10], label_maps[3, 5], label_maps[3, 7:, 4], label_maps[3, 7:, 6:] = (
        7,
        1,
        2,
        3,
    )
    return label_maps


def on(images, *cases):
    """Runs a test of (images, seed) on random ones and on these cases."""

    def decorate(test):
        for case in cases:
            test = example(case, 0)(test)
        return settings(max_examples=30, deadline=None)(given(images, seeds)(test))

    return decorate


EMPTY = np.zeros((4, 9, 7), np.int32)
on_scenes = on(scenes(), borders(), EMPTY)
on_data_sets = on(st.lists(scenes(), min_size=1, max_size=3), [borders(), EMPTY], [EMPTY])


def dense(label_maps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Classes, ids, masks (bool [N, H, W]) and boxes (to behind the last pixel) of the cells, by
    class, then id.
    """
    cells = [
        (k, int(number))
        for k, label_map in enumerate(label_maps, 1)
        for number in np.unique(label_map)
        if number
    ]
    masks = np.array([label_maps[k - 1] == number for k, number in cells], bool).reshape(
        -1, *label_maps.shape[1:]
    )
    labels, ids = torch.tensor(cells, dtype=torch.int64).reshape(-1, 2).T
    masks = torch.from_numpy(masks)
    return labels, ids, masks, masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])


def by_pycocos_encode(masks: Tensor) -> list[str]:
    return [
        coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
        for mask in masks.numpy()
    ]


def moved(boxes: Tensor, seed: int) -> Tensor:
    """The boxes, then three copies of them moved a little, to the image's border, or out of it, and
    stretched.
    """
    rng = torch.Generator().manual_seed(seed)
    again = boxes.repeat(3, 1)
    far = torch.tensor([0.3, 4, 40])[torch.randint(3, (len(again), 1), generator=rng)]
    corner = again[:, :2] + far * torch.randn(len(again), 2, generator=rng)
    side = (again[:, 2:] - again[:, :2]) * (0.3 + 2 * torch.rand(len(again), 2, generator=rng))
    return torch.cat([boxes, torch.cat([corner, corner + side], 1)])


@on_scenes
def test_instances_equal_those_of_masks(label_maps, seed):
    labels, ids, masks, boxes = dense(label_maps)
    found = find_instances(label_maps)
    edges = torch.cat([masks[:, [0, -1]].flatten(1), masks[:, :, [0, -1]].flatten(1)], 1).any(1)
    expected = (boxes, labels, ids, masks.sum((1, 2)), edges)
    assert [values.tolist() for values in found] == [values.tolist() for values in expected]
    rles = find_cells(label_maps).rles
    assert [rle["counts"] for rle in rles] == by_pycocos_encode(masks)


@pytest.mark.parametrize("boxes_miss_last_pixel", [False, True])
@on_scenes
def test_targets_equal_those_of_masks(boxes_miss_last_pixel, label_maps, seed):
    labels, ids, masks, boxes = dense(label_maps)
    boxes = masks_to_boxes(masks) if boxes_miss_last_pixel else boxes
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    target = make_target(torch.from_numpy(label_maps), boxes_miss_last_pixel)
    expected = {
        "boxes": boxes[kept],
        "labels": labels[kept],
        "ids": ids[kept].int(),
        "label_maps": torch.from_numpy(label_maps),
    }
    torch.testing.assert_close(target, expected, rtol=0, atol=0)


@on_scenes
def test_mask_targets_equal_projected_masks(label_maps, seed):
    labels, ids, masks, own = dense(label_maps)
    boxes = moved(own, seed)  # the RPN's are clipped to the image
    match = torch.arange(len(labels)).repeat(4)
    found = mask_targets(torch.from_numpy(label_maps), labels[match], ids[match], boxes, 28)
    torch.testing.assert_close(
        found, project_masks_on_boxes(masks, boxes, match, 28), rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("low_quality", [False, True])
@on_data_sets
def test_anchors_match_as_in_torchvision(low_quality, images, seed):
    """Some images without a cell, some anchors on cells, some out of the image and of every cell's
    reach.
    """
    targets = [make_target(torch.from_numpy(label_maps)) for label_maps in images]
    far = torch.tensor([[-90.0, -90, -60, -60], [200, 5, 216, 21], [3, 3, 3, 9]])
    anchors = [
        torch.cat([moved(target["boxes"], seed)[len(target["boxes"]) :], far]) for target in targets
    ]
    rpn = SimpleNamespace(proposal_matcher=Matcher(0.7, 0.3, low_quality), box_similarity=box_iou)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpn_module, "ANCHORS_PER_STRIP", 16)
        found = LabelMapRPN.assign_targets_to_anchors(rpn, anchors, targets)
    torch.testing.assert_close(
        found,
        RegionProposalNetwork.assign_targets_to_anchors(rpn, anchors, targets),
        rtol=0,
        atol=0,
    )


@on_scenes
def test_pasted_and_encoded_masks_equal_torchvisions(label_maps, seed):
    height, width = label_maps.shape[1:]
    _, _, masks, own = dense(label_maps)
    match = torch.arange(len(masks)).repeat(4)
    masks, boxes = project_masks_on_boxes(masks, own[match], match, 28), moved(own, seed)
    grown = expand_boxes(boxes, 30 / 28).long()
    seen = ((grown[:, :2] < torch.tensor([width, height])) & (grown[:, 2:] >= 0)).all(
        1
    )  # else torchvision's may fail
    expected = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    expected[seen] = (
        paste_masks_in_image(masks[seen, None], boxes[seen], (height, width))[:, 0] >= 0.5
    )
    pasted = paste_in_boxes(masks, boxes, height, width, 0.5)
    found = [encode_mask(mask, height, width) for mask in pasted]
    assert [rle["counts"] for rle in found] == by_pycocos_encode(expected)


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name]])
@on(scenes(min_side=4, ids=(*IDS, 2**24 - 2, 2**24 - 1)), borders(), EMPTY)
def test_recipes_move_label_maps_as_a_stack_of_masks(name, label_maps, seed):
    recipe = copy.deepcopy(RECIPES[name])
    for step in nn.ModuleList(recipe).modules():
        if isinstance(getattr(step, "p", None), float):  # RandomChoice has a list
            step.p = 1.0
    rng = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (3, *label_maps.shape[1:]), generator=rng, dtype=torch.uint8)
    labels, ids, masks, _ = dense(label_maps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected_image, expected = v2.Compose(recipe)(
            tv_tensors.Image(image), tv_tensors.Mask(masks.byte())
        )
    found_image, found = augment(image, torch.from_numpy(label_maps), recipe, seed)
    assert torch.equal(found_image, expected_image)
    assert torch.equal(found[labels - 1] == ids[:, None, None], expected.bool())
    assert (found != 0).sum() == expected.sum()


def coco_data(images, seed, times=1):
    """COCO truth of images, each so many times, and detections: cells as they are and a pixel off,
    some missed or mislabelled.
    """
    truth = {
        "images": [],
        "annotations": [],
        "categories": [{"id": k, "name": name} for k, name in enumerate(CLASS_NAMES, 1)],
    }
    found = []
    for image_id, place in enumerate(np.repeat(np.arange(len(images)), times), 1):
        rng, label_maps = np.random.default_rng((seed, place)), images[place]
        truth["images"].append(
            {"id": image_id, "height": label_maps.shape[1], "width": label_maps.shape[2]}
        )
        truth["annotations"] += coco_cells(label_maps, image_id)
        share = rng.choice([0, 0.7, 1])
        for shift in ((0, 0), (0, 1), (1, 1)):
            for cell in coco_cells(np.roll(label_maps, shift, (1, 2)), image_id):
                changed = {"category_id": int(rng.integers(1, 5))} if rng.random() < 0.2 else {}
                found += (
                    [{**cell, **changed, "score": rng.random()}] if rng.random() < share else []
                )
    for number, cell in enumerate(truth["annotations"], 1):
        cell |= {"id": number, "iscrowd": 0}
    return truth, found


def coco_cells(label_maps, image_id):
    cells = find_cells(label_maps)
    columns = cells.labels.tolist(), cells.area_px.tolist(), cells.rles
    names = ("category_id", "area", "segmentation", "image_id")
    return [dict(zip(names, (*cell, image_id), strict=True)) for cell in zip(*columns, strict=True)]


@on_data_sets
def test_coco_scores_equal_pycocotools(images, seed):
    truth, detections = coco_data(images, seed)
    detections = [row | {"score": round(row["score"], 1)} for row in detections]  # equal scores too
    found, expected = (
        score_coco(truth, Cells.from_coco(detections), (1, 3, 100)),
        by_pycocotools(truth, detections, (1, 3, 100)).eval,
    )
    for values, key in (
        (found.precision, "precision"),
        (found.recall, "recall"),
    ):
        np.testing.assert_array_equal(values, with_nan(expected[key]))


@on_data_sets
def test_bootstrap_scores_equal_pycocotools_on_images_written_out(images, seed):
    truth, detections = coco_data(images, seed)
    detections = Cells.from_coco(detections)
    weights = draw_images(len(images), 1, seed)
    lines, ap50 = (
        bootstrap_summary(truth, detections, weights, (1, 10, 100)),
        bootstrap_ap50(truth, detections, weights),
    )
    for row, times in enumerate(weights):
        expected = with_nan(by_pycocotools(*coco_data(images, seed, times)).stats)
        np.testing.assert_allclose(
            [values[row] for values in lines.values()], expected, rtol=0, atol=1e-12
        )
        np.testing.assert_allclose(ap50[row], expected[1], rtol=0, atol=1e-6)


@on_scenes
def test_roi_align_equals_torchvisions(label_maps, seed):
    """Of cells, and of boxes partly and wholly outside; the second image has no box."""
    shape = label_maps.shape[1:]
    boxes = [moved(dense(label_maps)[3], seed), torch.zeros(0, 4)]
    rng = torch.Generator().manual_seed(seed)
    levels = {
        str(i): torch.randn(2, 3, -(-shape[0] >> i) or 1, -(-shape[1] >> i) or 1, generator=rng)
        for i in range(3)
    }
    found, expected = (
        pool(["0", "1", "2"], 7, 2)(levels, boxes, [shape] * 2)
        for pool in (GatherRoIAlign, MultiScaleRoIAlign)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@on_scenes
def test_resized_label_maps_equal_resized_masks(label_maps, seed):
    rng = np.random.default_rng(seed)
    sizes = int(rng.integers(1, 60)), int(rng.integers(60, 120))
    labels, ids, masks, boxes = dense(label_maps)
    image = torch.rand(3, *label_maps.shape[1:])
    ours, theirs = (
        kind(*sizes, [0.5] * 3, [0.5] * 3) for kind in (LabelMapTransform, GeneralizedRCNNTransform)
    )
    new_image, target = ours.resize(
        image, {"label_maps": torch.from_numpy(label_maps), "boxes": boxes}
    )
    expected_image, expected = theirs.resize(image, {"masks": masks.byte(), "boxes": boxes})
    torch.testing.assert_close([new_image, target["boxes"]], [expected_image, expected["boxes"]])
    assert torch.equal(
        target["label_maps"][labels - 1] == ids[:, None, None], expected["masks"].bool()
    )


class ReadsColours(nn.Module):
    """Finds the cells whose ids the colours are, 65,536 R + 256 G + B."""

    def forward(self, images):
        return [self.find((image * 255).round().int()) for image in images]

    def find(self, colours):
        boxes, labels, ids, label_maps = make_target(
            (colours[0] << 16 | colours[1] << 8 | colours[2])[None]
        ).values()
        masks = mask_targets(label_maps, labels, ids, boxes, 28) > 0.49
        return {
            "boxes": boxes,
            "labels": 1 + ids % 4,
            "scores": ids / 2**17,
            "masks": masks.float(),
        }


@settings(max_examples=40, deadline=None)
@given(
    *[st.integers(1, 90) | st.integers(60, 90)] * 2,
    st.integers(32, 48),
    st.sampled_from([0, 0.5, 1, 1]),
    seeds,
)
def test_joined_tiles_equal_the_whole_image(height, width, tile_size_px, share, seed):
    """Cells of up to 7 px, which some tile of 16 px overlap sees whole, from a pixel on and with
    space between them.
    """
    rng = np.random.default_rng(seed)
    label_map = np.zeros((height, width), np.int32)
    for number, corner in enumerate(np.ndindex(8, 8)):
        if rng.random() < share:
            y, x = np.multiply(corner, 12) + rng.integers(4, 8, 2)
            label_map[ellipse((height, width), y, x, *rng.integers(1, 5, 2))] = 65_510 + number
    image = np.stack([label_map >> 16, label_map >> 8 & 255, label_map & 255]).astype(np.uint8)
    whole, joined = (
        predict(ReadsColours(), image, size, 16).to_coco() for size in (0, tile_size_px)
    )
    assert len(whole) == len(np.unique(label_map[label_map > 0]))
    assert joined == whole


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(REFINEMENTS)), st.lists(scenes(), min_size=1, max_size=2))
@example("open 2", [borders(), EMPTY])
@example("close 5", [borders(), EMPTY])
@example("fill", [borders(), EMPTY])
@example("largest", [borders(), EMPTY])
@example("smooth 1", [borders(), EMPTY])
def test_refined_masks_equal_those_of_scipy_and_skimage(name, images):
    """Masks of images of several sizes in one list, each by itself on a canvas that no mask leaves."""
    step, oracle = REFINEMENTS[name]
    masks = [mask for label_maps in images for mask in dense(label_maps)[2].numpy()]
    refined = step(
        Cells.concatenate(detection(mask, class_id=number) for number, mask in enumerate(masks))
    )
    expected = [on_large_canvas(oracle)(mask) for mask in masks]
    assert refined.labels.tolist() == [n for n, mask in enumerate(expected) if mask.any()]
    for number, mask in zip(refined.labels, masks_of(refined), strict=True):
        assert np.array_equal(mask, expected[number])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5),
    seeds,
    st.lists(st.sampled_from((0, 0.1, 0.3, 0.35, 0.9, 1)), min_size=1, max_size=6),
)
def test_counts_by_threshold_equal_those_of_what_each_keeps(images, seed, limits):
    """Scores of one decimal, many of them equal and many at a threshold; thresholds in any order,
    some twice.
    """

    def score(rng):
        return round(rng.random(), 1)

    matches = match_detections(*simulated(images, seed, score, score))
    tp, fp, fn = count_by_threshold(matches, limits)
    index = pd.MultiIndex.from_product([matches.image_ids, list(matches.class_names)])

    def table(rows):
        return (
            rows.groupby(["image_id", "class_id"])
            .size()
            .reindex(index, fill_value=0)
            .to_numpy()
            .reshape(tp.shape[:2])
        )

    for place, limit in enumerate(limits):
        kept = keep_scores(matches, limit)
        np.testing.assert_array_equal((tp + fn)[..., place], table(matches.truths))
        np.testing.assert_array_equal((tp + fp)[..., place], table(kept.detections))
        np.testing.assert_array_equal(
            tp[..., place], table(kept.detections[kept.detections["matched"]])
        )
        np.testing.assert_array_equal(
            tp[..., place], table(kept.truths[kept.truths["detection"].notna()])
        )


@settings(max_examples=20, deadline=None)
@given(
    st.lists(scenes(ids=[number for number in IDS if number < 2**16]), min_size=1, max_size=3),
    st.sampled_from((None, "lzw", "zlib")),
    seeds,
)
@example([EMPTY], "lzw", 0)
@example([EMPTY, borders() % 2**16, EMPTY], None, 0)
def test_images_from_the_cache_are_those_written(images, compression, seed):
    """First decoded into the cache, then mapped from it, no file being decoded; one-pixel images
    and classes without a file too.
    """
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        written = []
        for number, label_maps in enumerate(images):
            image = rng.integers(0, 256, (*label_maps.shape[1:], 3), np.uint8)
            class_maps = {
                k: label_map.astype(np.uint16) for k, label_map in enumerate(label_maps, 1)
            }
            add_image(
                Path(folder, "data"), f"image{number}", image, class_maps, compression=compression
            )
            written.append(
                (
                    image.transpose(2, 0, 1),
                    np.pad(label_maps, ((0, 4 - len(label_maps)), (0, 0), (0, 0))),
                )
            )
        for decode in (readers.read_tiff, None):
            with patch.object(readers, "read_tiff", decode):
                dataset = open_dataset(Path(folder, "data"), cache_dir=Path(folder, "cache"))
            assert len(dataset) == len(written)
            for found, (image, label_maps) in zip(dataset, written, strict=True):
                np.testing.assert_array_equal(found.image, image)
                np.testing.assert_array_equal(found.label_maps, label_maps)


@cache
def models() -> tuple[nn.Module, nn.Module]:
    return paired_models(96, 96)


@on_data_sets
def test_a_steps_losses_equal_torchvisions(images, seed):
    """Of batches in which some or all images are without cells, of other sizes, resized to one."""
    rng = torch.Generator().manual_seed(seed)
    losses, expected = both_losses(
        *models(), [torch.rand(3, *maps.shape[1:], generator=rng) for maps in images], images
    )
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert (losses["loss_mask"] == 0) == (not any(maps.any() for maps in images))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(
        st.tuples(st.integers(1, 4), *[st.integers(0, 39)] * 2, *[half_axes] * 2), max_size=12
    ),
)
def test_coco_masks_drawn_on_one_another_leave_each_pixel_to_the_smallest(height, width, cells):
    """Of its class; the first of those of the same size. Another formulation than drawing one after
    the other.
    """
    masks = np.array(
        [ellipse((height, width), y % height, x % width, *halves) for _, y, x, *halves in cells],
        bool,
    )
    masks = masks.reshape(-1, height, width)
    areas, classes = masks.sum((1, 2)), np.array([k for k, *_ in cells], int)
    expected, seen = np.zeros((4, height, width), np.int32), np.zeros(len(cells), bool)
    for k, y, x in np.ndindex(expected.shape):
        covering = np.flatnonzero(masks[:, y, x] & (classes == k + 1))
        if len(covering):
            smallest = min(covering, key=lambda i: (areas[i], i))
            expected[k, y, x], seen[smallest] = (classes[: smallest + 1] == k + 1).sum(), True
    rles = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    annotations = [
        CocoAnnotation(f"annotation {n}", k, rle | {"counts": rle["counts"].decode()}, False)
        for n, ((k, *_), rle) in enumerate(zip(cells, rles, strict=True))
    ]
    image = CocoImage(Path("image.png"), "image.png", height, width, None, annotations)
    faults = []
    np.testing.assert_array_equal(draw_label_maps(image, faults), expected)
    assert [fault.file for fault in faults] == [
        f"annotation {number}" for number in np.flatnonzero(~seen)
    ]


def test_more_cells_than_16_bits_can_count():
    """Each pixel a cell, in two classes."""
    rng = np.random.default_rng(0)
    label_maps = np.stack([1 + rng.permutation(66_300).reshape(255, 260) for _ in range(2)]).astype(
        np.int32
    )
    found = find_instances(label_maps)
    y, x = np.divmod(np.argsort(label_maps.reshape(2, -1), axis=1).ravel(), 260)
    assert (
        np.array_equal(found.boxes, np.column_stack([x, y, x + 1, y + 1]))
        and (found.area_px == 1).all()
    )
    assert (
        np.array_equal(found.ids, np.tile(np.arange(1, 66_301), 2))
        and found.labels.sum() == 3 * 66_300
    )
    rles = find_cells(label_maps).rles
    rows = rng.choice(2 * 66_300, 100, replace=False)
    masks = label_maps[found.labels[rows] - 1] == found.ids[rows, None, None]
    assert [rles[row]["counts"] for row in rows] == by_pycocos_encode(torch.from_numpy(masks))
