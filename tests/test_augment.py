"""The recipes: what moves cells moves image and labels together, what changes colours leaves labels
alone, as often as listed.
"""

import colorsys
from typing import get_args

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from skimage.draw import disk
from skimage.measure import label
from torchvision import tv_tensors
from torchvision.transforms import v2

from cellseg_helpers.config import Augmentation
from cellseg_helpers.data.augment import (
    RECIPES,
    ElasticDistortion,
    Gamma,
    GaussianNoise,
    GridDistortion,
    OnWhite,
    QuarterTurn,
    ResizedCrop,
    augment,
)
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.data.labels import find_instances
from cellseg_helpers.data.samples import SampleKey, TrainingSet
from cellseg_helpers.plots import recipe_gallery

LARGEST_ID = 65_535
PHOTOMETRIC = (v2.ColorJitter, v2.GaussianBlur, GaussianNoise, Gamma)
WHOLE = (
    v2.RandomHorizontalFlip,
    v2.RandomVerticalFlip,
    QuarterTurn,
)  # pixels change place, none is made


@pytest.fixture(autouse=True)
def one_thread():
    """These images are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def leaves(step: v2.Transform) -> list[v2.Transform]:
    """The transforms behind a step, each to be forced on; one of several gives several."""
    if isinstance(step, (v2.RandomApply, v2.RandomChoice)):
        return [leaf for inner in step.transforms for leaf in leaves(inner)]
    if isinstance(step, OnWhite):
        return [OnWhite(inner) for inner in leaves(step.inner)]
    if isinstance(step, (v2.RandomHorizontalFlip, v2.RandomVerticalFlip)):
        return [type(step)(p=1)]
    return [step]


def bare(transform: v2.Transform) -> v2.Transform:
    return transform.inner if isinstance(transform, OnWhite) else transform


def probability(step: v2.Transform) -> float:
    return getattr(step, "p", 1.0)


ENTRIES = [
    pytest.param(leaf, id=f"{name}-{number}-{type(bare(leaf)).__name__}")
    for name, recipe in RECIPES.items()
    for number, step in enumerate(recipe)
    for leaf in leaves(step)
]
GEOMETRIC = [entry for entry in ENTRIES if not isinstance(entry.values[0], PHOTOMETRIC)]
COLOURS = [entry for entry in ENTRIES if isinstance(entry.values[0], PHOTOMETRIC)]


def discs(
    height: int = 160, width: int = 220, radius: int = 9, pitch: int = 26
) -> tuple[torch.Tensor, torch.Tensor]:
    """Discs with ids up to 65,535 in four label maps, and an image that is white but on discs:
    there its channels are 0 and the low and the high byte of the id."""
    maps = np.zeros((4, height, width), np.int32)
    ids = iter(range(LARGEST_ID, 0, -331))
    for place, (y, x) in enumerate(
        (y, x) for y in range(20, height - 12, pitch) for x in range(16, width - 12, pitch)
    ):
        rows, columns = disk((y, x), radius, shape=(height, width))
        maps[place % 4, rows, columns] = next(ids)
    code = maps.sum(0)
    image = np.where(code > 0, np.stack([0 * code, code % 256, code // 256]), 255).astype(np.uint8)
    return torch.from_numpy(image), torch.from_numpy(maps)


def pieces(label_maps: torch.Tensor) -> np.ndarray:
    """How many 8-connected pieces each instance has."""
    counts = []
    for label_map in label_maps.numpy():
        parts = label(label_map, connectivity=2)  # of pixels of one value
        _, firsts = np.unique(parts[parts > 0], return_index=True)
        counts.append(np.unique(label_map[parts > 0][firsts], return_counts=True)[1])
    return np.concatenate(counts)


def inside(label_maps: torch.Tensor) -> np.ndarray:
    """bool [H, W]: pixels whose 9 x 9 neighbours all have one code, so that no interpolation mixes
    here.
    """
    code = label_maps.sum(0).float()[None]
    padded = torch.nn.functional.pad(code, (4, 4, 4, 4), mode="replicate")
    largest = torch.nn.functional.max_pool2d(padded, 9, 1)
    smallest = -torch.nn.functional.max_pool2d(-padded, 9, 1)
    return (largest == smallest)[0].numpy()


def boxes_inside(label_maps: torch.Tensor) -> list[tuple[slice, slice]]:
    """The boxes of the cells that do not touch the border, 2 px wider on each side."""
    instances = find_instances(label_maps.numpy())
    rows = instances.boxes[~instances.touches_border].astype(int).tolist()
    return [
        (slice(max(y1 - 2, 0), y2 + 2), slice(max(x1 - 2, 0), x2 + 2)) for x1, y1, x2, y2 in rows
    ]


def middle(area: torch.Tensor, box: tuple[slice, slice]) -> np.ndarray:
    return torch.nonzero(area[box]).float().mean(0).numpy()


def test_every_choice_is_a_recipe():
    assert tuple(RECIPES) == get_args(Augmentation)


def test_joint_full_is_the_table_of_report_d():
    """Report D, table 1, line by line. What cannot be read there (the jitter's probability) is 0.3
    here, as the recipe says.
    """
    told = []
    for step in RECIPES["joint_full"]:
        (leaf,) = map(bare, leaves(step))
        match leaf:
            case v2.RandomHorizontalFlip():
                told.append(("horizontal flip", step.p))
            case v2.RandomVerticalFlip():
                told.append(("vertical flip", step.p))
            case v2.RandomRotation():
                told.append(("rotation", tuple(leaf.degrees), step.p))
            case v2.RandomAffine():
                told.append(("zoom", leaf.scale, step.p))
                assert tuple(leaf.degrees) == (0, 0) and leaf.translate is leaf.shear is None
            case ResizedCrop():
                told.append(("random resized crop", leaf.area, leaf.ratio, step.p))
            case v2.ColorJitter():
                told.append(
                    (
                        "colour jitter",
                        leaf.brightness,
                        leaf.contrast,
                        leaf.saturation,
                        leaf.hue,
                        step.p,
                    )
                )
            case GaussianNoise():
                told.append(("noise", leaf.std, step.p))
            case v2.GaussianBlur():
                told.append(("blur", tuple(leaf.kernel_size), tuple(leaf.sigma), step.p))
            case Gamma():
                told.append(("gamma", (leaf.low, leaf.high), step.p))
    assert told == [
        ("horizontal flip", 0.5),
        ("vertical flip", 0.3),
        ("rotation", (-15, 15), 0.4),
        ("zoom", (0.85, 1.15), 0.3),
        ("random resized crop", (0.8, 1.0), (0.9, 1.1), 0.3),
        ("colour jitter", (0.7, 1.3), (0.7, 1.3), (0.7, 1.3), (-0.15, 0.15), 0.3),
        ("noise", 0.02, 0.2),
        ("blur", (3, 3), (0.1, 1.0), 0.2),
        ("gamma", (0.8, 1.2), 0.3),
    ]


def test_the_recipes_of_reports_c_and_e():
    kinds = {
        name: [([type(bare(leaf)) for leaf in leaves(step)], probability(step)) for step in recipe]
        for name, recipe in RECIPES.items()
    }
    flip, rotation = v2.RandomHorizontalFlip, v2.RandomRotation
    assert kinds["flip_colour_rotation"] == [([flip], 0.5), ([v2.ColorJitter], 1), ([rotation], 1)]
    assert tuple(RECIPES["flip_colour_rotation"][2].inner.degrees) == (-15, 15)
    assert kinds["basic"] == [([flip], 0.5), ([v2.RandomVerticalFlip], 0.5), ([QuarterTurn], 0.5)]
    assert kinds["full"] == kinds["basic"] + [
        ([v2.ColorJitter, v2.ColorJitter], 0.5),
        ([ElasticDistortion, GridDistortion], 0.5),
        ([v2.GaussianBlur], 0.5),
    ]


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name]])
def test_every_step_happens_as_often_as_listed(name):
    """300 draws: a share further than 0.12 from its p would have a chance under 3e-5, and the seeds
    are fixed.
    """
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.randint(256, (3, 12, 16), dtype=torch.uint8))
    maps = tv_tensors.Mask(torch.arange(4 * 12 * 16, dtype=torch.int32).reshape(4, 12, 16))
    for step in RECIPES[name]:
        changed = 0
        for _ in range(300):
            new_image, new_maps = step(image, maps)
            changed += not (torch.equal(new_image, image) and torch.equal(new_maps, maps))
        turns = any(isinstance(leaf, QuarterTurn) for leaf in leaves(step))
        crops = any(
            isinstance(leaf, ResizedCrop) for leaf in leaves(step)
        )  # of 12 x 16 px: sometimes the whole
        expected = probability(step) * (0.75 if turns else 1)
        assert expected - (0.2 if crops else 0.12) < changed / 300 < expected + 0.12, step


@pytest.mark.parametrize("transform", GEOMETRIC)
def test_image_and_labels_move_together(transform):
    """In a cell each pixel tells its id, outside it is white; the two outlines, one bilinear,
    agree; no cell is torn.
    """
    image, maps = discs()
    changed = 0
    for seed in range(8):
        moved, labels = augment(image, maps, [transform], seed)
        assert (
            moved.dtype == torch.uint8
            and labels.dtype == torch.int32
            and type(moved) is type(labels) is torch.Tensor
        )
        assert moved.shape[1:] == labels.shape[1:] and sorted(moved.shape[1:]) == sorted(
            image.shape[1:]
        )
        assert isinstance(transform, QuarterTurn) or moved.shape == image.shape
        assert all(
            set(new.unique().tolist()) <= set(old.unique().tolist())
            for new, old in zip(labels, maps, strict=True)
        )
        assert pieces(labels).max() == 1
        code = labels.sum(0)
        told = torch.where(code > 0, torch.stack([0 * code, code % 256, code // 256]), 255)
        apart = (moved.int() - told).abs().amax(0).numpy()
        assert apart[inside(labels)].max() <= 1  # a rounding of bilinear weights
        if isinstance(transform, WHOLE):
            assert apart.max() == 0
        dark, cell = moved[0] < 128, code > 0
        assert (dark != cell).float().mean() < 0.01
        offsets = [middle(dark, box) - middle(cell, box) for box in boxes_inside(labels)]
        assert (
            np.abs(np.mean(offsets, axis=0)).max() < 0.2
        )  # half a pixel between image and labels would show here
        changed += not torch.equal(labels, maps)
    assert changed >= 4


@pytest.mark.parametrize("name", RECIPES)
def test_cells_survive_every_recipe_in_one_piece(name):
    """The whole recipe on cells of drawn tissue: no new id, and all but slivers at the frame in one
    piece.
    """
    dataset = open_dataset("drawn")
    counts = []
    for seed in range(6):
        cell_image = dataset[7 * seed]
        maps = torch.from_numpy(cell_image.label_maps.copy())
        _, labels = augment(torch.from_numpy(cell_image.image.copy()), maps, RECIPES[name], seed)
        assert all(
            set(new.unique().tolist()) <= set(old.unique().tolist())
            for new, old in zip(labels, maps, strict=True)
        )
        counts.extend(pieces(labels))
    assert len(counts) > 80 and np.mean(np.array(counts) > 1) <= 0.02


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "none"])
def test_the_largest_id_survives(recipe):
    maps = torch.full((4, 40, 50), LARGEST_ID, dtype=torch.int32)
    maps[1, :, 25:] = LARGEST_ID - 1
    for seed in range(8):
        _, labels = augment(torch.zeros(3, 40, 50, dtype=torch.uint8), maps, RECIPES[recipe], seed)
        assert (
            set(labels[0].unique().tolist()) <= {0, LARGEST_ID}
            and (labels[0] == LARGEST_ID).float().mean() > 0.6
        )
        assert set(labels[1].unique().tolist()) <= {0, LARGEST_ID, LARGEST_ID - 1}


@pytest.mark.parametrize("extremes", [False, True])
@pytest.mark.parametrize(
    "transform", [ElasticDistortion(8, 24), ElasticDistortion(11.5, 24), GridDistortion(5, 0.3)]
)
def test_displacements_never_fold(transform, extremes, monkeypatch):
    """The Jacobian of the map, by differences, is above 0 everywhere, even where every control
    point moves as far as it may.
    """
    size, draw = (150, 211), torch.rand
    if extremes:
        monkeypatch.setattr(torch, "rand", lambda *shape: draw(*shape).round())
    picture = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))
    torch.manual_seed(0)
    for _ in range(25):
        field = (
            transform.make_params([picture])["displacement"][0].double()
            * torch.tensor([size[1], size[0]])
            / 2
        )
        by_x, by_y = field[1:, 1:] - field[1:, :-1], field[1:, 1:] - field[:-1, 1:]
        jacobian = (1 + by_x[..., 0]) * (1 + by_y[..., 1]) - by_x[..., 1] * by_y[..., 0]
        assert jacobian.min() > 0
        assert field.abs().max() > 1
        if isinstance(transform, ElasticDistortion):
            assert field.abs().max() <= transform.displacement_px + 1e-3


def test_an_elastic_distortion_that_could_fold_is_refused():
    with pytest.raises(
        ValueError, match="displacement_px is 12, but must be below 0.48 of spacing_px, which is 24"
    ):
        ElasticDistortion(12, 24)


def test_a_grid_distortion_leaves_the_edges_in_place():
    image = torch.randint(256, (3, 60, 80), dtype=torch.uint8)
    maps = torch.arange(4 * 60 * 80, dtype=torch.int32).reshape(4, 60, 80)
    for seed in range(5):
        moved, labels = augment(image, maps, [GridDistortion(5, 0.3)], seed)
        corners = np.ix_([0, -1], [0, -1])
        assert np.array_equal(labels[0].numpy()[corners], maps[0].numpy()[corners])
        assert np.array_equal(moved[0].numpy()[corners], image[0].numpy()[corners])
        widths = np.diff(labels[0, 0].numpy())
        assert (widths >= 0).all() and (widths > 1).any() and (widths == 0).any()


def test_beyond_the_image_it_is_white_and_without_labels():
    """A cell that the turned frame cuts keeps what is visible."""
    image, maps = (
        torch.zeros(3, 60, 80, dtype=torch.uint8),
        torch.ones(4, 60, 80, dtype=torch.int32),
    )
    turn = OnWhite(v2.RandomRotation((15, 15), v2.InterpolationMode.BILINEAR, fill=None))
    moved, labels = augment(image, maps, [turn], 0)
    assert labels[:, 0, 0].tolist() == [0] * 4 and moved[:, 0, 0].tolist() == [255] * 3
    assert labels[0, 30, 40] == 1 and moved[0, 30, 40] == 0
    assert ((moved[0] > 127) == (labels[0] == 0)).float().mean() > 0.995
    smaller = RECIPES["joint_full"][3].transforms[0]
    shares = [
        augment(image, maps, [smaller], seed)[1][0].float().mean().item() for seed in range(40)
    ]
    assert 0.85**2 - 0.02 < min(shares) < 0.8 and max(shares) == 1


def test_a_resized_crop_keeps_the_size_and_stays_in_its_ranges():
    crop = ResizedCrop(area=(0.8, 1.0), ratio=(0.9, 1.1))
    for height, width in ((400, 400), (300, 900)):
        picture = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
        torch.manual_seed(0)
        params = [crop.make_params([picture]) for _ in range(300)]
        areas = np.array([p["height"] * p["width"] / (height * width) for p in params])
        ratios = np.array([p["width"] / p["height"] * height / width for p in params])
        assert 0.795 < areas.min() < 0.82 and 0.98 < areas.max() <= 1
        assert 0.895 < ratios.min() < 0.93 and 1.07 < ratios.max() < 1.105
        assert all(
            p["top"] + p["height"] <= height and p["left"] + p["width"] <= width for p in params
        )
        assert len({p["top"] for p in params}) > 10 and len({p["left"] for p in params}) > 10
    one = torch.zeros(3, 1, 1, dtype=torch.uint8)
    assert augment(one, one.int(), [crop], 0)[0].shape == (3, 1, 1)


@pytest.mark.parametrize("transform", COLOURS)
def test_colours_change_and_labels_do_not(transform):
    image, maps = discs()
    changed = 0
    for seed in range(8):
        coloured, labels = augment(image, maps, [transform], seed)
        assert (
            torch.equal(labels, maps)
            and coloured.dtype == torch.uint8
            and coloured.shape == image.shape
        )
        changed += not torch.equal(coloured, image)
    assert changed >= 6


@pytest.mark.parametrize(
    "transform", [entry for entry in COLOURS if isinstance(entry.values[0], v2.ColorJitter)]
)
def test_colour_jitter_keeps_to_its_ranges_and_uses_them(transform):
    """On one grey, brightness alone acts; on one colour, hue alone changes the hue."""
    maps = torch.zeros(4, 2, 2, dtype=torch.int32)
    grey = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    colour = torch.tensor([180, 60, 120], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    factors, turns = [], []
    for seed in range(150):
        factors.append(augment(grey, maps, [transform], seed)[0][0, 0, 0].item() / 100)
        rgb = augment(colour, maps, [transform], seed)[0][:, 0, 0].tolist()
        turn = colorsys.rgb_to_hsv(*rgb)[0] - colorsys.rgb_to_hsv(180, 60, 120)[0]
        turns.append((turn + 0.5) % 1 - 0.5)
    low, high = transform.brightness
    assert low - 0.021 < min(factors) < low + 0.04 and high - 0.04 < max(factors) < high + 0.021
    low, high = transform.hue or (0, 0)
    assert low - 0.012 < min(turns) <= low + 0.02 and high - 0.02 <= max(turns) < high + 0.012


def test_noise_has_its_standard_deviation():
    grey, maps = (
        torch.full((3, 300, 300), 128, dtype=torch.uint8),
        torch.zeros(4, 300, 300, dtype=torch.int32),
    )
    noise = augment(grey, maps, [GaussianNoise(0.02)], 0)[0].float() - 128
    assert (
        noise.std().item() == pytest.approx(0.02 * 255, rel=0.01)
        and abs(noise.mean().item()) < 0.05
    )
    assert np.corrcoef(noise.reshape(3, -1))[0, 1] == pytest.approx(0, abs=0.02)
    dark = augment(torch.zeros_like(grey), maps, [GaussianNoise(0.02)], 0)[0]
    assert dark.max() < 60 and (dark == 0).float().mean() > 0.4  # no 0 wraps round to 255


def test_gamma_stays_between_its_powers():
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    share = torch.arange(256) / 255
    middles = []
    for seed in range(60):
        out = (
            augment(ramp, torch.zeros(4, 1, 256, dtype=torch.int32), [Gamma(0.8, 1.2)], seed)[0][
                0, 0
            ].float()
            / 255
        )
        assert (out >= share**1.2 - 0.005).all() and (out <= share**0.8 + 0.005).all()
        middles.append(np.log(out[64].item()) / np.log(64 / 255))
    assert 0.79 < min(middles) < 0.84 and 1.16 < max(middles) < 1.21


@pytest.mark.parametrize(
    "transform", [entry for entry in COLOURS if isinstance(entry.values[0], v2.GaussianBlur)]
)
def test_blur_spreads_an_edge_by_its_sigma(transform):
    edge = torch.zeros(3, 20, 60, dtype=torch.uint8)
    edge[:, :, 30:] = 250
    widths = []
    for seed in range(60):
        profile = augment(edge, torch.zeros(4, 20, 60, dtype=torch.int32), [transform], seed)[0][
            0, 10
        ].float()
        assert (profile.diff() >= 0).all() and profile[25].item() == 0 and profile[34].item() == 250
        steps = profile.diff() / 250
        places = torch.arange(59) - 29
        widths.append(((steps * places**2).sum() - (steps * places).sum() ** 2).sqrt().item())
    taps = np.arange(transform.kernel_size[0]) - transform.kernel_size[0] // 2
    low, high = (
        np.sqrt(np.average(taps**2, weights=np.exp(-((taps / sigma) ** 2) / 2)))
        for sigma in transform.sigma
    )
    assert low - 0.06 < min(widths) < low + 0.1 and high - 0.1 < max(widths) < high + 0.06


@pytest.mark.parametrize("name", RECIPES)
def test_a_seed_alone_decides_and_the_generator_is_left_alone(name):
    image, maps = discs(96, 120)
    image_before, maps_before = image.clone(), maps.clone()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [augment(image, maps, RECIPES[name], seed) for seed in range(6)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    np.random.seed(7)
    again = [augment(image, maps, RECIPES[name], seed) for seed in reversed(range(6))][::-1]
    assert all(
        torch.equal(a, b)
        for one, other in zip(first, again, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    assert torch.equal(image, image_before) and torch.equal(maps, maps_before)
    different = {tuple(picture.shape) + (picture.numpy().tobytes(),) for picture, _ in first}
    assert len(different) == 1 if name == "none" else len(different) > 2


@pytest.mark.parametrize("name", RECIPES)
def test_the_number_of_threads_changes_nothing(name):
    """A worker process has one, the main process may have many."""
    image, maps = discs(320, 400)
    for seed in range(4):
        alone = augment(image, maps, RECIPES[name], seed)
        torch.set_num_threads(2)
        together = augment(image, maps, RECIPES[name], seed)
        torch.set_num_threads(1)
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_none_leaves_everything_equal():
    image, maps = discs(96, 120)
    same_image, same_maps = augment(image, maps, RECIPES["none"], 0)
    assert torch.equal(same_image, image) and torch.equal(same_maps, maps)


@pytest.mark.parametrize("name", RECIPES)
def test_training_samples_of_every_recipe(name):
    """The boxes are those of the moved cells, whatever became of image size and cells."""
    dataset = open_dataset("drawn")
    samples = TrainingSet(dataset, list(range(6)), 96, 0.5, name, 0)
    for position in range(6):
        image, target = samples[SampleKey(0, position, position)]
        assert image.dtype == torch.uint8 and target["label_maps"].dtype == torch.int32
        assert image.shape[1:] == target["label_maps"].shape[1:]
        for box, k, instance in zip(
            target["boxes"].int().tolist(), target["labels"], target["ids"], strict=True
        ):
            rows, columns = np.nonzero(target["label_maps"][k - 1].numpy() == instance.item())
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_the_gallery_outlines_the_cells_where_they_went():
    image, maps = discs()
    fig = recipe_gallery(
        CellImage("discs", None, image.numpy(), maps.numpy()),
        {"none": [], "elastic": RECIPES["full"][4:5]},
        0,
    )
    panels = [ax for ax in fig.axes if ax.images]
    assert len(panels) == 6 and [ax.get_title() for ax in panels[:2]] == ["none", "elastic"]
    for ax in panels:
        shown = ax.images[0].get_array()
        assert shown.shape == (96, 96, 3)
        for line in np.concatenate([collection.get_paths() for collection in ax.collections]):
            x, y = np.clip(np.round(line.vertices.mean(0)).astype(int), 0, 95)
            assert shown[y, x, 0] == 0  # dark: a cell, also where it went
    assert not plt.get_fignums()
