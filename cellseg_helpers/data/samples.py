"""Training samples: crops, augmented image and label maps together, and their targets."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cellseg_helpers.data.augment import RECIPES, augment
from cellseg_helpers.data.cache import CellDataset, CellImage
from cellseg_helpers.data.labels import find_boxes

Sample = tuple[Tensor, dict[str, Any]]  # image and target


class SampleKey(NamedTuple):
    """The key of a training sample: with it, every process makes the same sample."""

    epoch: int
    position: int  # in the epoch, counted over all processes
    image_index: int


@dataclass(eq=False)
class EpochSampler(Sampler):
    """This process's keys of one epoch, shuffled; call ``set_epoch`` before each epoch."""

    indices: list[int]  # of the images to train on
    samples: int  # in an epoch, over all processes
    seed: int
    rank: int = 0  # of this process
    world_size: int = 1  # number of processes
    batch_size: int = 1
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples // self.world_size

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        rounds = -(-self.samples // len(self.indices))  # rounded up
        order = np.concatenate([rng.permutation(self.indices) for _ in range(rounds)])
        for position, image_index in enumerate(order[: self.samples].tolist()):
            if position // self.batch_size % self.world_size == self.rank:
                yield SampleKey(self.epoch, position, image_index)


@dataclass(eq=False)
class TrainingSet(Dataset):
    """Cropped and augmented samples: ``training_set[key]`` is (image uint8 [3, h, w], target).

    A share ``class_balance`` of the samples is balanced over classes: first a class is chosen, then
    one of its instances in the training images, each with equal probability; the crop contains the
    instance's centre. The other samples are crops at a random position in the key's own image.
    """

    dataset: CellDataset
    indices: list[int]  # of the images to train on
    crop_size_px: int  # side, at native resolution; a smaller image is used whole; 0: whole images
    class_balance: float  # in [0, 1]
    augmentation: str  # a name in ``augment.RECIPES``
    seed: int  # with the key, it determines every random choice
    drop_cut_cells: bool = False  # as in ``crop``
    boxes_miss_last_pixel: bool = False  # as in ``make_target``

    def __post_init__(self):
        self.counts = np.asarray(self.dataset.counts)[self.indices]

    def __getitem__(self, key: SampleKey) -> Sample:
        image, label_maps, image_id, (model_seed, recipe_seed) = self.draw_crop(key)
        image, label_maps = augment(image, label_maps, RECIPES[self.augmentation], recipe_seed)
        target = make_target(label_maps, self.boxes_miss_last_pixel)
        return image, target | {"image_id": image_id, "seed": model_seed}

    def draw_crop(self, key: SampleKey) -> tuple[Tensor, Tensor, str, list[int]]:
        """A crop before augmentation: image, label maps, image id, seeds of model and recipe."""
        rng = np.random.default_rng((self.seed, key.epoch, key.position))
        cell_image, center = self.dataset[key.image_index], None
        if rng.random() < self.class_balance and self.counts.any():
            cell_image, center = self._choose_instance(rng)
        image, label_maps = crop(cell_image, self.crop_size_px, center, rng, self.drop_cut_cells)
        return image, label_maps, cell_image.image_id, rng.integers(2**63, size=2).tolist()

    def _choose_instance(self, rng: np.random.Generator) -> tuple[CellImage, tuple[int, int]]:
        """An instance of a random class: its image and the (row, column) of its centre."""
        class_index = rng.choice(np.flatnonzero(self.counts.sum(0)))
        per_image = self.counts[:, class_index]
        position = rng.choice(len(per_image), p=per_image / per_image.sum())
        cell_image = self.dataset[self.indices[position]]
        boxes, _, _ = find_boxes(cell_image.label_maps[class_index][None])
        x1, y1, x2, y2 = boxes[rng.integers(len(boxes))]
        return cell_image, (int(y1 + y2) // 2, int(x1 + x2) // 2)


def crop(
    cell_image: CellImage,
    size_px: int,
    center: tuple[int, int] | None,
    rng: np.random.Generator,
    drop_cut_cells: bool = False,
) -> tuple[Tensor, Tensor]:
    """A random square crop, copied: image uint8 [3, h, w] and label maps int32 [K, h, w].

    Args:
        size_px: side of the crop; an image side that is shorter is not cut. 0: the whole image.
        center: (row, column) that lies in the crop, if possible in its middle half; None: the crop
            lies anywhere.
        drop_cut_cells: instances that reach a side of the crop inside the image become background,
            just as annotators leave out cells at the image's border.
    """
    window, cuts = [slice(None)], []  # cuts: (axis, line) of the crop's sides inside the image
    for axis, length in enumerate(cell_image.image.shape[1:]):
        side = min(size_px or length, length)
        if center is None:
            start = rng.integers(length - side + 1)
        else:
            start = center[axis] - side // 2 + rng.integers(-(side // 4), side // 4 + 1)
        start = int(np.clip(start, 0, length - side))
        window.append(slice(start, start + side))
        ends = ((0, start > 0), (-1, start + side < length))
        cuts += [(axis, line) for line, is_inside in ends if is_inside]
    label_maps = cell_image.label_maps[tuple(window)].astype(np.int32)
    if drop_cut_cells and cuts:
        for label_map in label_maps:
            is_cut = np.zeros(label_map.max() + 1, bool)  # by id
            for axis, line in cuts:
                is_cut[label_map.take(line, axis)] = True
            label_map[is_cut[label_map]] = 0
    return torch.from_numpy(cell_image.image[tuple(window)].copy()), torch.from_numpy(label_maps)


def make_target(label_maps: Tensor, boxes_miss_last_pixel: bool = False) -> dict[str, Tensor]:
    """The training target of label maps int32 [K, H, W]: boxes float32 [N, 4], labels int64 [N],
    ids int32 [N], label_maps.

    ``boxes_miss_last_pixel`` repeats a common mistake, to measure its effect: a box ends at its
    cell's last pixel row and column, not behind them; cells one pixel wide or high are left out.
    """
    boxes, labels, ids = map(torch.from_numpy, find_boxes(label_maps.numpy()))
    if boxes_miss_last_pixel:
        boxes = boxes - torch.tensor([0.0, 0, 1, 1])
        not_empty = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, labels, ids = boxes[not_empty], labels[not_empty], ids[not_empty]
    return {"boxes": boxes, "labels": labels, "ids": ids, "label_maps": label_maps}


def collate(samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """A list of the samples' images, whose sizes may differ, and a list of their targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
