"""Training samples: image and labels move together, the key alone decides, crops keep what they
must hold.
"""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from cellseg_helpers.config import Augmentation
from cellseg_helpers.data.augment import RECIPES, QuarterTurn
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.labels import find_instances
from cellseg_helpers.data.samples import (
    EpochSampler,
    SampleKey,
    TrainingSet,
    collate,
    crop,
    make_target,
)

ALONE = SampleKey(0, 0, 0)


class Images:
    """In place of a ``CellDataset``."""

    def __init__(self, label_maps: list[np.ndarray]):
        self.label_maps = label_maps
        self.counts = [
            np.bincount(find_instances(maps).labels, minlength=5)[1:] for maps in label_maps
        ]

    def __len__(self) -> int:
        return len(self.label_maps)

    def __getitem__(self, index: int) -> CellImage:
        """An image whose pixels are the ids of the first three label maps."""
        maps = self.label_maps[index]
        maps.flags.writeable = False
        return CellImage(f"image{index}", None, maps[:3].astype(np.uint8), maps)


def random_maps(seed: int, height: int = 80, width: int = 100) -> np.ndarray:
    """Rectangles with ids up to 255 in the first three maps, apart from the border only by chance;
    the fourth is empty.
    """
    rng = np.random.default_rng(seed)
    maps = np.zeros((4, height, width), np.int32)
    for instance in rng.choice(np.arange(1, 256), 30, replace=False):
        y, x, h, w = rng.integers(0, height), rng.integers(0, width), *rng.integers(1, 25, 2)
        maps[rng.integers(3), y : y + h, x : x + w] = instance
    return maps


def training_set(images: Images, **changes) -> TrainingSet:
    arguments = {
        "crop_size_px": 64,
        "class_balance": 0.5,
        "augmentation": "flips",
        "seed": 3,
        **changes,
    }
    return TrainingSet(images, list(range(len(images))), **arguments)


def same(first, second) -> bool:
    (image, target), (other_image, other) = first, second
    tensors = [name for name in target if isinstance(target[name], torch.Tensor)]
    plain = target.keys() - set(tensors)
    return (
        torch.equal(image, other_image)
        and target.keys() == other.keys()
        and all(torch.equal(target[name], other[name]) for name in tensors)
        and all(target[name] == other[name] for name in plain)
    )


def test_every_recipe_is_a_choice():
    assert set(RECIPES) == set(get_args(Augmentation))


@pytest.mark.parametrize("augmentation", ["none", "flips"])
def test_image_and_label_maps_move_together(augmentation):
    images = Images([random_maps(0), random_maps(1, 40, 90)])
    samples = training_set(images, augmentation=augmentation)
    pictures = set()
    for position in range(24):
        image, target = samples[SampleKey(0, position, position % 2)]
        assert image.dtype == torch.uint8 and type(image) is torch.Tensor
        assert (
            target["label_maps"].dtype == torch.int32 and type(target["label_maps"]) is torch.Tensor
        )
        assert torch.equal(image.int(), target["label_maps"][:3])
        pictures.add(image.numpy().tobytes())
    assert len(pictures) > 12


def test_turns_move_image_and_label_maps_together_and_reach_every_direction():
    maps = random_maps(5, 60, 60)
    image, seen = torch.from_numpy(maps[:3].astype(np.uint8)), set()
    for seed in range(20):
        torch.manual_seed(seed)
        turned, labels = QuarterTurn()(
            tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(maps.copy()))
        )
        assert torch.equal(turned.int(), labels[:3])
        assert isinstance(turned, tv_tensors.Image) and isinstance(labels, tv_tensors.Mask)
        seen |= {
            turns for turns in range(4) if torch.equal(turned, torch.rot90(image, turns, (-2, -1)))
        }
    assert seen == {0, 1, 2, 3}


def test_the_stain_recipe_changes_colours_but_not_places():
    """Every pixel of an instance has one colour before, so it has one colour after, wherever the
    instance went.
    """
    samples = training_set(
        Images([random_maps(2)]), augmentation="flips_turns_stain", class_balance=0
    )
    changed = 0
    for position in range(16):
        image, target = samples[SampleKey(0, position, 0)]
        code = (
            target["label_maps"][0]
            + 256 * target["label_maps"][1]
            + 65_536 * target["label_maps"][2]
        )
        for value in code.unique():
            assert len(image[:, code == value].unique(dim=1).T) == 1
        changed += not torch.equal(image.int(), target["label_maps"][:3])
    assert changed > 8


def test_targets_are_the_moved_label_maps_instances():
    image, target = training_set(Images([random_maps(0)]))[ALONE]
    maps = target["label_maps"].numpy()
    found = {(k + 1, i) for k in range(4) for i in np.unique(maps[k]) if i}
    assert {
        (k, i) for k, i in zip(target["labels"].tolist(), target["ids"].tolist(), strict=True)
    } == found and len(found) > 5
    for box, label, instance in zip(target["boxes"], target["labels"], target["ids"], strict=True):
        rows, columns = np.nonzero(maps[label - 1] == instance.item())
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert (target["image_id"], target["boxes"].dtype, target["labels"].dtype) == (
        "image0",
        torch.float32,
        torch.int64,
    )
    assert 0 <= target["seed"] < 2**63


def test_a_cell_cut_by_the_crop_keeps_the_box_of_what_is_left():
    maps = np.zeros((4, 10, 12), np.int32)
    maps[1, 2:8, 3:11], maps[0, 0:2, 0:2] = 9, 4
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        image, label_maps = crop(Images([maps])[0], 6, None, rng)
        y, x = next(
            (y, x)
            for y in range(5)
            for x in range(7)
            if np.array_equal(maps[:, y : y + 6, x : x + 6], label_maps)
        )
        target = make_target(label_maps)
        expected = [max(3 - x, 0), max(2 - y, 0), min(11 - x, 6), min(8 - y, 6)]
        assert target["boxes"][target["labels"] == 2].tolist() == [expected]
        assert (1 in target["labels"]) == (y < 2 and x < 2)
        seen.add((y, x))
    assert len(seen) > 10


def test_cells_cut_by_the_crop_can_be_left_out_of_the_targets():
    """Where a side of the crop lies inside the image, a cell that reaches it goes, and no other
    class's cell of that id with it.
    """
    maps = np.zeros((4, 40, 44), np.int32)
    maps[0, 0:3, 12:18], maps[1, 10:16, 10:16], maps[2, 20:24, 20:24], maps[2, 30:34, 25:29] = (
        9,
        9,
        9,
        8,
    )
    places = np.stack([*np.indices(maps.shape[1:]), maps[0]]).astype(np.uint8)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        image, label_maps = crop(
            CellImage("image0", None, places, maps), 20, None, rng, drop_cut_cells=True
        )
        top, left = image[:2, 0, 0].tolist()
        expected = maps[:, top : top + 20, left : left + 20].copy()
        for k, instance, y1, x1, y2, x2 in (
            (0, 9, 0, 12, 3, 18),
            (1, 9, 10, 10, 16, 16),
            (2, 9, 20, 20, 24, 24),
            (2, 8, 30, 25, 34, 29),
        ):
            reached = (
                (y1 <= top and top > 0)
                or (y2 >= top + 20 and top < 20)
                or (x1 <= left and left > 0)
                or (x2 >= left + 20 and left < 24)
            )
            expected[k][(expected[k] == instance) & reached] = 0
        assert np.array_equal(label_maps, expected)
        seen |= {
            (k, i, bool((expected[k] == i).any())) for k, i in ((0, 9), (1, 9), (2, 9), (2, 8))
        }
    assert len(seen) == 8


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_cut_cells_are_those_with_a_pixel_at_an_inner_side(height, width, size, seed):
    """Against ``np.isin`` of each side, for cells of a few pixels with ids up to 65,520."""
    maps = (
        np.random.default_rng(seed)
        .integers(0, 40, (4, -(-height // 3), -(-width // 3)))
        .repeat(3, 1)
        .repeat(3, 2)
        * 1_680
    )
    maps = maps[:, :height, :width].astype(np.int32)
    places = np.stack([*np.indices((height, width)), maps[0] % 251]).astype(np.uint8)
    image, label_maps = crop(
        CellImage("", None, places, maps),
        size,
        None,
        np.random.default_rng(seed),
        drop_cut_cells=True,
    )
    top, left = image[:2, 0, 0].tolist()
    rows, columns = image.shape[1:]
    expected = maps[:, top : top + rows, left : left + columns].copy()
    inside = (top > 0, top + rows < height, left > 0, left + columns < width)
    for label_map in expected:
        sides = (
            label_map[0].copy(),
            label_map[-1].copy(),
            label_map[:, 0].copy(),
            label_map[:, -1].copy(),
        )
        label_map[
            np.isin(
                label_map,
                np.concatenate(
                    [[0], *(side for side, cut in zip(sides, inside, strict=True) if cut)]
                ),
            )
        ] = 0
    assert np.array_equal(label_maps, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 80), st.integers(0, 2**32 - 1))
def test_a_crop_holds_its_centre_and_has_the_right_size(height, width, size, seed):
    rng = np.random.default_rng(seed)
    row, column = int(rng.integers(height)), int(rng.integers(width))
    maps = np.zeros((4, height, width), np.int32)
    maps[2, row, column] = 1
    image, label_maps = crop(Images([maps])[0], size, (row, column), rng)
    assert (
        label_maps.shape[1:]
        == image.shape[1:]
        == (min(size or height, height), min(size or width, width))
    )
    assert label_maps[2].sum() == 1
    image, label_maps = crop(Images([maps])[0], size, None, rng)
    assert (
        label_maps.shape[1:]
        == image.shape[1:]
        == (min(size or height, height), min(size or width, width))
    )


def test_a_centre_far_from_the_border_lies_in_the_crops_middle_half():
    maps = np.zeros((4, 300, 300), np.int32)
    maps[0, 150, 140] = 1
    rng, places = np.random.default_rng(0), []
    for _ in range(200):
        places.append(np.argwhere(crop(Images([maps])[0], 64, (150, 140), rng)[1][0].numpy())[0])
    places = np.array(places)
    assert places.min() == 16 and places.max() == 48


def test_crops_without_a_centre_reach_every_place():
    maps = np.arange(4 * 5 * 6, dtype=np.int32).reshape(4, 5, 6)
    rng = np.random.default_rng(0)
    firsts = {int(crop(Images([maps])[0], 3, None, rng)[1][0, 0, 0]) for _ in range(300)}
    assert firsts == {int(maps[0, y, x]) for y in range(3) for x in range(4)}


def test_a_small_image_is_used_whole():
    images = Images([random_maps(0, 40, 90), random_maps(1, 33, 50)])
    whole = training_set(images, augmentation="none", class_balance=0)
    assert whole[SampleKey(0, 0, 0)][0].shape == (3, 40, 64)
    assert torch.equal(
        whole[SampleKey(0, 0, 1)][1]["label_maps"], torch.from_numpy(images.label_maps[1].copy())
    )
    native = training_set(images, crop_size_px=0, augmentation="none", class_balance=0)
    assert torch.equal(
        native[SampleKey(0, 0, 0)][1]["label_maps"], torch.from_numpy(images.label_maps[0].copy())
    )


def test_a_crop_is_a_copy():
    images = Images([random_maps(0)])
    image, label_maps = crop(images[0], 0, None, np.random.default_rng(0))
    before = images.label_maps[0].copy()
    label_maps += 1
    image += 1
    assert np.array_equal(images.label_maps[0], before)


def rare_class() -> Images:
    """20 images of 200 px with many lymphocytes; a single macrophage in the last."""
    maps = np.zeros((4, 200, 200), np.int32)
    maps[1, ::20, ::20] = np.arange(1, 101).reshape(10, 10)
    last = maps.copy()
    last[3, 160:170, 20:30] = 1
    return Images([maps] * 19 + [last])


def test_class_balance_shows_the_rare_class_as_often_as_the_others():
    samples = training_set(rare_class(), class_balance=1.0)
    held = [4 in samples[SampleKey(0, position, 0)][1]["labels"] for position in range(80)]
    assert 25 <= sum(held) <= 55  # 80 draws of 1/2: outside with p < 0.001, and the seed is fixed


def test_without_class_balance_a_sample_is_its_keys_image():
    samples = training_set(rare_class(), class_balance=0.0)
    targets = [samples[SampleKey(0, position, 19 - position % 2)][1] for position in range(40)]
    assert [target["image_id"] for target in targets] == [
        f"image{19 - position % 2}" for position in range(40)
    ]
    assert sum(4 in target["labels"] for target in targets) < 10


def test_class_balance_draws_from_the_training_images_alone():
    images = rare_class()
    samples = TrainingSet(images, list(range(19)), 64, 1.0, "flips", 0)
    targets = [samples[SampleKey(0, position, 0)][1] for position in range(40)]
    assert not any(4 in target["labels"] for target in targets)
    assert len({target["image_id"] for target in targets}) > 5


def test_images_without_any_cell_are_no_obstacle():
    empty = Images([np.zeros((4, 70, 70), np.int32)])
    image, target = training_set(empty, class_balance=1.0)[ALONE]
    assert image.shape == (3, 64, 64)
    assert target["boxes"].shape == (0, 4) and len(target["labels"]) == len(target["ids"]) == 0


def test_a_key_alone_decides_its_sample():
    images = Images([random_maps(seed) for seed in range(3)])
    keys = [SampleKey(epoch, position, position % 3) for epoch in range(2) for position in range(6)]
    samples = training_set(images, augmentation="flips_turns_stain")
    first = [samples[key] for key in keys]
    torch.manual_seed(99)
    np.random.seed(99)
    again = [training_set(images, augmentation="flips_turns_stain")[key] for key in reversed(keys)]
    assert all(same(*pair) for pair in zip(first, reversed(again), strict=True))
    assert not any(same(first[0], other) for other in first[1:])
    assert not same(
        first[0], training_set(images, augmentation="flips_turns_stain", seed=4)[keys[0]]
    )


def test_drawing_a_sample_leaves_the_global_generator_alone():
    samples = training_set(Images([random_maps(0)]), augmentation="flips_turns_stain")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    samples[ALONE]
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_give_the_samples_of_one_process():
    samples = training_set(
        Images([random_maps(seed) for seed in range(3)]), augmentation="flips_turns_stain"
    )
    sampler = EpochSampler([0, 1, 2], 8, seed=0)
    loaded = []
    for num_workers in (0, 2):
        torch.manual_seed(num_workers)
        loaded.append(
            list(
                DataLoader(samples, 2, sampler=sampler, num_workers=num_workers, collate_fn=collate)
            )
        )
    for (images, targets), (other_images, others) in zip(*loaded, strict=True):
        assert all(
            same(*pair)
            for pair in zip(
                zip(images, targets, strict=True),
                zip(other_images, others, strict=True),
                strict=True,
            )
        )
    assert len(loaded[0]) == 4 and isinstance(loaded[0][0][0], list)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 99),
    st.integers(0, 5),
)
def test_processes_share_the_order_of_one(world_size, batch_size, steps, images, seed, epoch):
    per_step = world_size * batch_size
    indices = [10 + i for i in range(images)]

    def batches(rank: int, world_size: int, batch_size: int) -> np.ndarray:
        sampler = EpochSampler(indices, steps * per_step, seed, rank, world_size, batch_size)
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler) == steps * batch_size
        return np.array(keys).reshape(steps, batch_size, 3)

    alone = batches(0, 1, per_step)
    together = np.concatenate(
        [batches(rank, world_size, batch_size) for rank in range(world_size)], 1
    )
    assert np.array_equal(alone, together)
    assert (
        np.array_equal(alone[..., 1].ravel(), np.arange(steps * per_step))
        and (alone[..., 0] == epoch).all()
    )
    times = [np.count_nonzero(alone[..., 2] == index) for index in indices]
    assert max(times) - min(times) <= 1


def test_each_epoch_has_an_order_of_its_own():
    sampler = EpochSampler(list(range(20)), 20, seed=0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([key.image_index for key in sampler])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))
    assert orders[0] != [key.image_index for key in EpochSampler(list(range(20)), 20, seed=1)]
