import contextlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask
from torch import nn
from torch.nn import functional
from torchvision.models.detection.roi_heads import paste_masks_in_image

from cellseg_helpers.cells import Cells, encode_mask
from cellseg_helpers.inference import lay_tiles, paste_in_boxes, predict


def pasted_by_torchvision(
    masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int, mask_threshold: float
) -> np.ndarray:
    """uint8 [N, H, W]; torchvision fails on some boxes outside the image, where nothing is to be
    pasted.
    """
    dense = np.zeros((len(masks), height, width), np.uint8)
    for row, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        with contextlib.suppress(RuntimeError):
            dense[row] = (
                paste_masks_in_image(mask[None, None], box[None], (height, width))[0, 0]
                >= mask_threshold
            )
    return dense


def assert_pastes_like_torchvision(
    masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int, threshold: float
) -> None:
    dense = pasted_by_torchvision(masks, boxes, height, width, threshold)
    expected = coco_mask.encode(np.asfortranarray(dense.transpose(1, 2, 0)))
    pasted = paste_in_boxes(masks, boxes, height, width, threshold)
    assert [encode_mask(mask, height, width)["counts"].encode() for mask in pasted] == [
        rle["counts"] for rle in expected
    ]


@st.composite
def boxes_and_sizes(draw):
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    corner = st.floats(-40, 130, width=32)
    side = st.one_of(
        st.floats(0, 3, width=32), st.floats(0, 60, width=32), st.floats(60, 400, width=32)
    )
    boxes = draw(st.lists(st.tuples(corner, corner, side, side), min_size=1, max_size=5))
    return (
        height,
        width,
        torch.tensor([(x, y, x + w, y + h) for x, y, w, h in boxes], dtype=torch.float32),
    )


@settings(deadline=None, max_examples=100)
@given(
    boxes_and_sizes(),
    st.integers(0, 2**31),
    st.sampled_from([0.05, 0.5, 1.0]),
    st.sampled_from(["smooth", "binary", "half"]),
)
def test_masks_in_boxes_equal_torchvisions_paste(case, seed, threshold, kind):
    height, width, boxes = case
    coarse = torch.rand(len(boxes), 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    masks = functional.interpolate(coarse, (28, 28), mode="bilinear")[:, 0]
    masks = {"smooth": masks, "binary": (masks > 0.5).float(), "half": (masks > 0.5).float() / 2}[
        kind
    ]
    assert_pastes_like_torchvision(masks, boxes, height, width, threshold)


@settings(deadline=None, max_examples=30)
@given(hnp.arrays(np.float32, (2, 28, 28), elements=st.floats(0, 1, width=32)))
def test_masks_in_boxes_equal_torchvisions_paste_for_any_mask(masks):
    boxes = torch.tensor([[3.3, -4.8, 41.0, 30.2], [10.5, 10.5, 21.25, 99.0]])
    assert_pastes_like_torchvision(torch.from_numpy(masks), boxes, 50, 37, 0.5)


@pytest.mark.parametrize(
    "box",
    [(-30, 5, -10, 20), (5, -30, 20, -10), (60, 5, 80, 20), (5, 60, 20, 80), (50, 50, 50, 50)],
)
def test_boxes_outside_the_image_give_empty_masks(box):
    (mask,) = paste_in_boxes(
        torch.ones(1, 28, 28), torch.tensor([box], dtype=torch.float32), 40, 40
    )
    assert not mask.mask.any()
    nothing = coco_mask.encode(np.zeros((40, 40), np.uint8, order="F"))
    assert encode_mask(mask, 40, 40)["counts"].encode() == nothing["counts"]


@pytest.mark.parametrize(
    "box",
    [(0, 0, 1, 1), (39, 39, 40, 40), (0, 0, 40, 40), (-500, -500, 500, 500), (39.9, 0, 40, 40)],
)
def test_boxes_at_the_borders_equal_torchvisions_paste(box):
    assert_pastes_like_torchvision(
        torch.rand(1, 28, 28), torch.tensor([box], dtype=torch.float32), 40, 40, 0.5
    )


def test_pasting_nothing():
    assert paste_in_boxes(torch.zeros(0, 28, 28), torch.zeros(0, 4), 40, 40) == []


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 300), st.data())
def test_tiles_cover_the_image_and_overlap(height, width, tile_size_px, data):
    overlap = data.draw(st.integers(1, max(1, tile_size_px - 1)))
    tiles = lay_tiles(height, width, tile_size_px if tile_size_px > 1 else 0, overlap)
    sides = tiles[:, 2:] - tiles[:, :2]
    assert (sides == sides[0]).all() and (sides > 0).all() and (tiles[:, :2] >= 0).all()
    for axis, length in enumerate((width, height)):
        starts, ends = np.unique(tiles[:, axis]), np.unique(tiles[:, axis + 2])
        assert starts[0] == 0 and ends[-1] == length
        assert (ends[:-1] - starts[1:] >= overlap).all()
        assert tile_size_px <= 1 or sides[0, axis] == min(length, tile_size_px)


class DiscFinder(nn.Module):
    """Finds painted discs: red is the disc's number, green its class; reports what it sees of each
    in the image it gets.
    """

    def __init__(self, jitter_px: float = 0, seed: int = 0):
        super().__init__()
        self.device_marker = nn.Parameter(torch.zeros(1))
        self.inner = nn.Dropout()
        self.jitter_px = jitter_px
        self.generator = torch.Generator().manual_seed(seed)
        self.largest_image = 0

    def forward(self, images):
        assert not self.training and torch.is_inference_mode_enabled()
        return [self.find(image) for image in images]

    def find(self, image):
        assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
        self.largest_image = max(self.largest_image, *image.shape[1:])
        numbers, classes = (image[:2] * 255).round().to(torch.int64)
        boxes, labels, masks = [], [], []
        for number in numbers.unique().tolist():
            if number == 0:
                continue
            ys, xs = torch.nonzero(numbers == number, as_tuple=True)
            x1, y1, x2, y2 = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            seen = (numbers[y1:y2, x1:x2] == number).float()
            masks.append(
                functional.interpolate(seen[None, None], (28, 28), mode="bilinear", antialias=True)[
                    0, 0
                ]
            )
            boxes.append(torch.stack([x1, y1, x2, y2]).float())
            labels.append(int(classes[ys[0], xs[0]]))
        boxes = torch.stack(boxes) if boxes else torch.zeros(0, 4)
        boxes += (torch.rand(boxes.shape, generator=self.generator) * 2 - 1) * self.jitter_px
        scores = torch.rand(len(boxes), generator=self.generator).sort(descending=True).values
        return {
            "boxes": boxes,
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": scores,
            "masks": torch.stack(masks) if masks else torch.zeros(0, 28, 28),
        }


def paint(
    height: int, width: int, discs: list[tuple[float, float, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """An image (uint8 [3, H, W]) for ``DiscFinder`` of discs (x, y, radius), and their masks (bool
    [N, H, W]).
    """
    ys, xs = np.mgrid[:height, :width]
    masks = np.array(
        [(xs - x) ** 2 + (ys - y) ** 2 <= radius**2 for x, y, radius in discs]
    ).reshape(-1, height, width)
    image = np.zeros((3, height, width), np.uint8)
    for number, mask in enumerate(masks, 1):
        image[0][mask], image[1][mask] = number, 1 + number % 4
    return image, masks


def decode(found: Cells, height: int, width: int) -> np.ndarray:
    return np.array([coco_mask.decode(rle) for rle in found.rles], bool).reshape(-1, height, width)


def assert_each_once(cells: Cells, masks: np.ndarray, min_iou: float) -> None:
    height, width = masks.shape[1:]
    found = decode(cells, height, width).reshape(len(cells), -1).astype(np.float32)
    true = masks.reshape(len(masks), -1).astype(np.float32)
    shared = found @ true.T
    iou = shared / (found.sum(1)[:, None] + true.sum(1)[None] - shared)
    assert len(cells) == len(masks), iou.round(2)
    assert (iou.max(axis=0) >= min_iou).all() and (iou.max(axis=1) >= min_iou).all(), iou.round(2)
    assert cells.labels.tolist() == [1 + (disc + 1) % 4 for disc in iou.argmax(axis=1)]


def test_a_whole_image():
    image, masks = paint(120, 90, [(20, 20, 9), (60, 80, 15), (89, 119, 12)])
    found = predict(DiscFinder(), image, image_id=7)
    assert_each_once(found, masks, 0.85)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert found.image_ids.tolist() == [7] * 3 and found.sizes.tolist() == [[120, 90]] * 3
    assert found.boxes.min() >= 0 and (found.boxes.max(axis=0) <= [90, 120, 90, 120]).all()
    assert found.boxes[found.labels == 2].tolist() == [[11, 11, 30, 30]]


def test_bbox_is_the_models_box_clipped_to_the_image():
    image, _ = paint(40, 40, [(2, 20, 10)])
    model = DiscFinder()
    find = model.find
    model.find = lambda picture: {
        **find(picture),
        "boxes": torch.tensor([[-6.5, 9.5, 13.25, 31.0]]),
    }
    assert predict(model, image).boxes.tolist() == [[0, 9.5, 13.25, 31.0]]


@pytest.mark.parametrize(
    "x, y",
    [*itertools.product([32, 64, 68, 80, 90, 96, 100, 128, 130], [70, 96])],
)
@pytest.mark.parametrize("radius", [4, 12, 15, 16, 17, 25, 45])
def test_a_disc_anywhere_at_a_seam_appears_once(x, y, radius):
    image, masks = paint(224, 224, [(x, y, radius)])
    model = DiscFinder()
    results = predict(model, image, tile_size_px=128, tile_overlap_px=32)
    assert model.largest_image == 128
    assert_each_once(results, masks, 0.6 if radius == 4 else 0.85)


@pytest.mark.parametrize("radius", [60, 100, 140])
def test_a_disc_larger_than_a_tile_is_put_together(radius):
    image, masks = paint(300, 310, [(150, 155, radius), (8, 8, 6)])
    assert_each_once(predict(DiscFinder(), image, tile_size_px=96, tile_overlap_px=24), masks, 0.8)


@st.composite
def disc_scenes(draw):
    """Discs that do not touch, one at most in each cell of a grid."""
    pitch = draw(st.integers(26, 70))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    discs = []
    for row, column in itertools.product(range(rows), range(columns)):
        radius = draw(st.integers(5, pitch // 2 - 3))
        free = pitch / 2 - radius - 1
        dx, dy = (draw(st.floats(-free, free)) for _ in range(2))
        discs.append(((column + 0.5) * pitch + dx, (row + 0.5) * pitch + dy, radius))
    tile_size_px = draw(st.integers(64, 200))
    return (
        paint(rows * pitch, columns * pitch, discs),
        tile_size_px,
        draw(st.integers(16, tile_size_px // 2)),
    )


@settings(deadline=None, max_examples=60)
@given(disc_scenes(), st.integers(0, 2**31))
def test_each_disc_of_a_scene_appears_once(scene, seed):
    (image, masks), tile_size_px, tile_overlap_px = scene
    assert_each_once(
        predict(DiscFinder(seed=seed), image, tile_size_px, tile_overlap_px), masks, 0.6
    )


@settings(deadline=None, max_examples=50)
@given(disc_scenes(), st.integers(0, 2**31))
def test_each_disc_appears_once_when_tiles_disagree_by_a_pixel(scene, seed):
    (image, masks), tile_size_px, tile_overlap_px = scene
    results = predict(
        DiscFinder(jitter_px=1, seed=seed), image, tile_size_px, max(tile_overlap_px, 32)
    )
    assert_each_once(results, masks, 0.4)


@pytest.mark.parametrize("size", [(33, 33), (33, 300), (300, 33), (64, 64), (65, 64)])
def test_images_smaller_than_a_tile(size):
    height, width = size
    image, masks = paint(
        height, width, [(width - 10, 16, 8), (10, height - 18, 7)][: 2 if max(size) > 64 else 1]
    )
    assert_each_once(predict(DiscFinder(), image, tile_size_px=64, tile_overlap_px=16), masks, 0.8)


def test_tiles_equal_the_whole_image_away_from_seams():
    discs = [(40, 40, 14), (40, 200, 9), (200, 40, 11), (205, 205, 20)]
    image, _ = paint(240, 240, discs)
    whole, tiled = (predict(DiscFinder(), image, tile_size_px, 32) for tile_size_px in (0, 136))
    by_place = [
        sorted((r["bbox"], r["category_id"], r["segmentation"]["counts"]) for r in cells.to_coco())
        for cells in (whole, tiled)
    ]
    assert by_place[0] == by_place[1]


def test_touching_discs_of_one_class_stay_apart():
    image, masks = paint(
        160, 224, [(112 - 10, 80, 10), (112 + 11, 80, 10), (112, 100, 9), (112, 60, 10)]
    )
    image[1][image[0] > 0] = 2
    results = predict(DiscFinder(), image, tile_size_px=128, tile_overlap_px=32)
    assert len(results) == 4
    assert {
        int(np.argmax([(found & mask).sum() for mask in masks]))
        for found in decode(results, 160, 224)
    } == {0, 1, 2, 3}


class Scripted(nn.Module):
    """Answers with prepared detections, image by image: (box, label, score)."""

    def __init__(self, answers, mask_value=1.0):
        super().__init__()
        self.answers, self.mask_value = iter(answers), mask_value

    def forward(self, images):
        return [self.answer(next(self.answers)) for _ in images]

    def answer(self, detections):
        boxes, labels, scores = zip(*detections, strict=True) if detections else ((), (), ())
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores, dtype=torch.float32),
            "masks": torch.full((len(boxes), 28, 28), self.mask_value),
        }


TWO_TILES = {
    "tile_size_px": 100,
    "tile_overlap_px": 40,
}  # of a 100 x 160 image: columns 0 to 100 and 60 to 160


def of_two_tiles(left, right):
    shifted = [
        ((x1 - 60, y1, x2 - 60, y2), label, score) for (x1, y1, x2, y2), label, score in right
    ]
    found = predict(Scripted([left, shifted]), np.zeros((3, 100, 160), np.uint8), **TWO_TILES)
    rows = zip(found.labels.tolist(), found.scores.round(3).tolist(), found.boxes, strict=True)
    return [(label, score, [x1, y1, x2 - x1, y2 - y1]) for label, score, (x1, y1, x2, y2) in rows]


def test_the_view_with_more_context_wins_over_the_higher_score():
    left, right = [((65, 40, 80, 60), 1, 0.4)], [((66, 40, 80, 60), 1, 0.9)]
    assert of_two_tiles(left, right) == [(1, 0.4, [65, 40, 15, 20])]


def test_classes_of_one_cell_come_from_one_tile():
    box = (65, 40, 80, 60)
    left, right = [(box, 1, 0.6), (box, 2, 0.3)], [(box, 3, 0.9)]
    assert of_two_tiles(left, right) == [(1, 0.6, [65, 40, 15, 20]), (2, 0.3, [65, 40, 15, 20])]


def test_a_sliver_that_the_other_tile_does_not_confirm_goes():
    assert of_two_tiles([((95, 40, 100, 60), 1, 0.9)], []) == []


def test_a_cell_that_only_one_tile_sees_whole_stays():
    assert of_two_tiles([((70, 40, 85, 60), 1, 0.9)], []) == [(1, 0.9, [70, 40, 15, 20])]


def test_pieces_of_a_large_cell_become_one_of_the_best_score():
    left = [((20, 10, 100, 90), 2, 0.5), ((30, 10, 100, 90), 3, 0.7)]
    right = [((60, 10, 140, 90), 2, 0.8)]
    assert of_two_tiles(left, right) == [(2, 0.8, [20, 10, 120, 80])]


def test_different_cells_at_one_seam_stay():
    left, right = [((60, 10, 80, 30), 1, 0.5)], [((75, 10, 95, 30), 1, 0.8)]
    assert len(of_two_tiles(left, right)) == 2


def test_empty_masks_are_left_out():
    model = Scripted([[((5, 5, 20, 20), 1, 0.9)]], mask_value=0.4)
    assert len(predict(model, np.zeros((3, 40, 40), np.uint8))) == 0


@pytest.mark.parametrize("mask_threshold, found", [(0.5, 1), (0.51, 0)])
def test_mask_threshold_is_inclusive(mask_threshold, found):
    model = Scripted([[((5, 5, 20, 20), 1, 0.9)]], mask_value=0.5)
    image = np.zeros((3, 40, 40), np.uint8)
    assert len(predict(model, image, mask_threshold=mask_threshold)) == found


def test_nothing_found():
    image = np.zeros((3, 300, 200), np.uint8)
    assert len(predict(DiscFinder(), image, tile_size_px=64, tile_overlap_px=16)) == 0
    assert len(predict(DiscFinder(), image)) == 0


def test_a_tensor_is_taken_and_modes_are_restored():
    image, masks = paint(60, 60, [(30, 30, 10)])
    model = DiscFinder().train()
    model.inner.eval()
    assert_each_once(predict(model, torch.from_numpy(image)), masks, 0.8)
    assert model.training and not model.inner.training


def test_modes_are_restored_after_a_failure():
    model = Scripted([[]]).train()
    with pytest.raises(StopIteration):
        predict(model, np.zeros((3, 300, 60), np.uint8), tile_size_px=64, tile_overlap_px=16)
    assert model.training


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 40, 3), np.uint8),
        np.zeros((3, 40, 40), np.float32),
        np.zeros((3, 40), np.uint8),
        np.zeros((3, 0, 4), "u1"),
    ],
)
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match=r"uint8 image of shape \[3, H, W\]"):
        predict(DiscFinder(), image)


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"mask_threshold": 0.0}, "mask_threshold is 0.0"),
        ({"mask_threshold": 1.5}, "mask_threshold is 1.5"),
        ({"tile_size_px": 64, "tile_overlap_px": 64}, "tile_overlap_px 64"),
        ({"tile_size_px": 64, "tile_overlap_px": 0}, "tile_overlap_px 0"),
        ({"tile_size_px": -5}, "tile_size_px is -5"),
    ],
)
def test_bad_parameters_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        predict(DiscFinder(), np.zeros((3, 40, 40), np.uint8), **parameters)


MEMORY = """
import resource, numpy as np, torch
from torch import nn
from cellseg_helpers.inference import predict

class Dense(nn.Module):
    def forward(self, images):
        return [self.cells(*image.shape[1:]) for image in images]

    def cells(self, height, width):
        n = 1000 * height * width // 2500**2
        corners = torch.rand(n, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([width - 30.0, height - 30.0])
        return {"boxes": torch.cat([corners, corners + 30], 1), "labels": torch.ones(n, dtype=torch.int64),
                 "scores": torch.linspace(0.1, 0.9, n), "masks": torch.ones(n, 28, 28)}

def grown(tile_size_px):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = predict(Dense().eval(), np.zeros((3, 2500, 2500), np.uint8), tile_size_px=tile_size_px, tile_overlap_px=64)
    return len(found), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024

predict(Dense().eval(), np.zeros((3, 500, 500), np.uint8))
print(*grown(512), *grown(0))
"""


def test_a_dense_large_image_takes_little_memory():
    """2,500 x 2,500 px, 1,000 cells: full-size float masks would be 25 GB; the image itself is 75
    MB as float32.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    in_tiles, tiles_mb, whole, whole_mb = map(int, done.stdout.split())
    assert in_tiles > 800 and whole == 1000
    assert tiles_mb < 100 and whole_mb < 400
