import itertools
from dataclasses import replace

import numpy as np
import pytest

from cellseg_helpers.borders import border_contact, drop_border_detections, near_border
from cellseg_helpers.cells import CLASS_NAMES, BoxMask, Cells
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.drawn import draw_tissue

CLEAR = ["epithelial", "lymphocyte"]  # the frequent classes


def image_of(image_id: int, width: int, height: int) -> dict:
    return {"id": image_id, "file_name": f"image{image_id}", "height": height, "width": width}


def cell_of(image: dict, mask: np.ndarray, x: int, y: int, class_id: int = 1) -> Cells:
    """What shows in the image of a mask that stands at (x, y): one cell, or none."""
    height, width = image["height"], image["width"]
    part = mask[max(-y, 0) : max(height - y, 0), max(-x, 0) : max(width - x, 0)]
    tight = [BoxMask.around(part, max(x, 0), max(y, 0))] if part.any() else []
    return Cells.of_image(height, width, [class_id] * len(tight), tight, image_id=image["id"])


def everywhere(image: dict, width: int, height: int) -> Cells:
    """A box of this size, in turn at every position at which any of it shows."""
    mask = np.ones((height, width), bool)
    places = itertools.product(
        range(-width + 1, image["width"]), range(-height + 1, image["height"])
    )
    return Cells.concatenate(cell_of(image, mask, x, y) for x, y in places)


def disc(radius: int) -> np.ndarray:
    return np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius + 0.3


DISCS = {radius: disc(radius) for radius in range(5, 17)}


def scatter(
    seed: int, images: int = 6, side: int = 160, mean: float = 35
) -> tuple[Cells, list[dict]]:
    """Discs thrown at random on planes that are larger than the images, and what shows of them in
    the images.
    """
    rng = np.random.default_rng(seed)
    frames = [image_of(number, side, side) for number in range(1, images + 1)]
    cells = []
    for frame in frames:
        for x, y in rng.integers(
            -40, side + 40, (rng.poisson(mean * (side + 80) ** 2 / side**2), 2)
        ).tolist():
            radius = int(rng.integers(5, 17))
            cells.append(
                cell_of(frame, DISCS[radius], x - radius, y - radius, class_id=1 + (radius > 10))
            )
    return Cells.concatenate(cells), frames


def without_cut_cells(cells: Cells) -> Cells:
    inside = (cells.boxes[:, :2] > 0) & (cells.boxes[:, 2:] < cells.sizes[:, ::-1])
    return cells[inside.all(1)]


def as_detections(cells: Cells) -> Cells:
    """Cells whose own boxes say nothing about the border."""
    boxes = np.tile([20.5, 20.5, 25.5, 25.5], (len(cells), 1))
    return replace(cells, scores=np.full(len(cells), 0.9), boxes=boxes)


@pytest.mark.parametrize(
    "width, height, margin_px, min_visible_px",
    [
        (4, 3, 0, 1),
        (4, 3, 0, 3),
        (5, 7, 1, 2),
        (3, 3, 2, 3),
        (6, 2, 1, 2),
        (1, 1, 0, 1),
        (9, 6, 0, 3),
    ],
)
@pytest.mark.parametrize("virtual, inset_px", [(False, 1), (True, 1), (True, 3), (True, 5)])
def test_a_box_at_every_position_is_as_expected(
    width, height, margin_px, min_visible_px, virtual, inset_px
):
    image = image_of(1, 24, 21)
    cells = everywhere(image, width, height)
    contact = border_contact(cells, [image], margin_px, virtual, inset_px, min_visible_px).loc[
        "epithelial"
    ]
    inset = inset_px if virtual else 0
    left, right, top, bottom = inset, 24 - inset, inset, 21 - inset
    counted = inside = 0
    for x, y in itertools.product(range(-width + 1, 24), range(-height + 1, 21)):
        shown = np.zeros((21 + 2 * height, 24 + 2 * width), bool)
        shown[y + height : y + 2 * height, x + width : x + 2 * width] = True
        shown = shown[height:-height, width:-width]
        inner = shown[top:bottom, left:right]
        if (
            virtual
            and shown.sum()
            - shown[1 + margin_px : 20 - margin_px, 1 + margin_px : 23 - margin_px].sum()
        ):
            continue
        if inner.any(axis=0).sum() >= min_visible_px and inner.any(axis=1).sum() >= min_visible_px:
            counted += 1
            core = shown[
                top + 1 + margin_px : bottom - 1 - margin_px,
                left + 1 + margin_px : right - 1 - margin_px,
            ]
            inside += core.sum() == width * height
    assert (contact["cells"], contact["at_border"]) == (counted, counted - inside)
    assert contact["expected"] == pytest.approx(counted - inside) and inside > 0


def test_a_single_cell_is_weighted_by_hand():
    """A box of 4 x 3 in 20 x 10 px: 15 x 6 positions inside, 23 x 12 at which it shows, 19 x 8 with
    3 px of it.
    """
    image = image_of(1, 20, 10)
    cell = cell_of(image, np.ones((3, 4), bool), 8, 4)
    for min_visible_px, weight in ((1, 23 * 12 / 90 - 1), (3, 19 * 8 / 90 - 1)):
        contact = border_contact(cell, [image], inset_px=1, min_visible_px=min_visible_px).loc[
            "epithelial"
        ]
        assert contact[["cells", "at_border", "ratio", "low"]].tolist() == [1, 0, 0, 0]
        assert contact["expected"] == pytest.approx(weight)
        assert contact["verdict"] == "cannot tell" and contact["dispersion"] == 1
        assert contact["high"] == pytest.approx(weight + 1.96 * (weight * (1 + weight)) ** 0.5)


def test_slivers_do_not_count():
    image = image_of(1, 100, 100)
    bar = np.ones((12, 12), bool)
    places = (-10, 50), (-9, 50), (50, 98), (50, 97), (97, 97), (98, 97)
    cells = Cells.concatenate(cell_of(image, bar, x, y) for x, y in places)
    assert border_contact(cells, [image])["at_border"]["all"] == 3
    assert border_contact(cells, [image], min_visible_px=1)["at_border"]["all"] == 6


def test_small_images_are_left_out():
    cells, images = scatter(0)
    small = image_of(99, 95, 400)
    extra = cell_of(small, disc(8), 30, 30)
    with_small = border_contact(Cells.concatenate([cells, extra]), [*images, small])
    assert with_small.equals(border_contact(cells, images))
    assert border_contact(Cells.concatenate([cells, extra]), [*images, small], inset_px=31)[
        "cells"
    ]["all"] == len(cells) + 1 - slivers(cells)


def slivers(cells: Cells) -> int:
    return ((cells.boxes[:, 2:] - cells.boxes[:, :2]).min(1) < 3).sum()


def test_cells_that_ignore_the_border_are_there_as_by_chance():
    outcomes = [border_contact(*scatter(seed, images=3)).loc["all"] for seed in range(200)]
    held = [row["low"] <= row["at_border"] <= row["high"] for row in outcomes]
    assert 0.9 <= np.mean(held) < 1
    at_border, expected = (
        sum(row[column] for row in outcomes) for column in ("at_border", "expected")
    )
    assert at_border / expected == pytest.approx(1, abs=0.03)


def test_the_table_finds_no_effect_where_there_is_none_and_the_planted_one():
    cells, images = scatter(3, images=12)
    neutral = border_contact(cells, images)
    assert neutral.index.tolist() == ["all", *CLASS_NAMES] and neutral.index.name == "class"
    assert (neutral.loc[["all", *CLEAR], "verdict"] == "as by chance").all()
    assert neutral.loc[["all", *CLEAR], "ratio"].between(0.8, 1.2).all()
    numbers = ["cells", "at_border", "expected"]
    np.testing.assert_allclose(
        neutral.loc["all", numbers].astype(float), neutral.loc[list(CLASS_NAMES), numbers].sum()
    )

    planted = border_contact(without_cut_cells(cells), images)
    assert (planted.loc[["all", *CLEAR], "verdict"] == "fewer than by chance").all()
    assert (planted["at_border"] == 0).all() and (planted.loc[["all", *CLEAR], "ratio"] == 0).all()
    np.testing.assert_array_equal(planted["expected"], neutral["expected"])

    cut = near_border(cells)
    assert len(cells[~cut]) == len(without_cut_cells(cells))
    doubled = Cells.concatenate([cells, cells[cut]])
    assert border_contact(doubled, images).loc["all", "verdict"] == "more than by chance"


def test_the_virtual_border_does_not_see_the_planted_effect():
    cells, images = scatter(5, images=60)
    for inset_px in (8, 32):  # narrower and wider than a cell
        neutral = border_contact(cells, images, virtual=True, inset_px=inset_px)
        planted = border_contact(without_cut_cells(cells), images, virtual=True, inset_px=inset_px)
        assert planted.equals(neutral)
        assert (
            planted.loc["all", "ratio"] == pytest.approx(1, abs=0.15)
            and planted.loc["all", "verdict"] == "as by chance"
        )


def test_clustered_cells_widen_the_interval():
    """Each cell twice: twice the expectation, four times the variance, of which a Poisson process
    explains half.
    """
    cells, images = scatter(1, images=60)
    once, twice = (
        border_contact(cells, images),
        border_contact(Cells.concatenate([cells] * 2), images),
    )
    assert once.loc["all", "dispersion"] < 1.4 and 1.5 < twice.loc["all", "dispersion"] < 2.8
    width, twice_width = ((table["high"] - table["low"])["all"] for table in (once, twice))
    assert twice_width / width > 1.7 > 2**0.5


def test_dispersion_adds_up_squares_of_images():
    """One image with cells inside alone, one with cells at the virtual border alone: the
    differences must not cancel.
    """
    images = [image_of(1, 120, 120), image_of(2, 120, 120)]
    square = np.ones((10, 10), bool)
    inside = [cell_of(images[0], square, 55, 50 + k) for k in range(6)]
    cells = Cells.concatenate([*inside, *[cell_of(images[1], square, 28, 50)] * 8])
    weight = (120 - 64 + 10 - 6 + 1) ** 2 / (120 - 64 - 11) ** 2 - 1
    expected = ((6 * weight) ** 2 + 8**2) / (6 * weight * (1 + weight))
    for virtual in (False, True):
        contact = border_contact(cells, images, virtual=virtual).loc["epithelial"]
        assert contact["dispersion"] == pytest.approx(expected) and expected > 1


def tissue(annotate_border_cells: bool, rng: np.random.Generator) -> dict:
    kinds = ("epithelium", "lymphoid", "mixed") * 5
    drawn = [
        draw_tissue(rng, 200, 220, kind, annotate_border_cells=annotate_border_cells)
        for kind in kinds
    ]
    return to_coco(CellImage(str(number), None, *one) for number, one in enumerate(drawn))


def cut_out_tissue(rng: np.random.Generator) -> dict:
    """Windows of larger drawings. (At its own border, a drawing sets more cells: their parts
    outside need no free place.)
    """
    windows = []
    for kind in ("epithelium", "lymphoid", "mixed"):
        image, label_maps = draw_tissue(rng, 620, 620, kind, annotate_border_cells=True)
        for y, x in itertools.product((60, 340), (60, 340)):
            place = np.s_[:, y : y + 220, x : x + 220]
            windows.append(
                CellImage(
                    f"{kind}{y}{x}", None, image[place], np.ascontiguousarray(label_maps[place])
                )
            )
    return to_coco(windows)


def test_drawn_tissue_leaves_out_border_cells_unless_asked():
    truth = tissue(False, np.random.default_rng(0))
    contact = border_contact(Cells.from_coco(truth["annotations"]), truth["images"])
    assert (contact.loc[["all", *CLEAR], "verdict"] == "fewer than by chance").all()
    assert (contact["at_border"] == 0).all() and contact.loc["all", "expected"] > 150
    control = border_contact(Cells.from_coco(truth["annotations"]), truth["images"], virtual=True)
    assert (control.loc[["all", *CLEAR], "verdict"] == "as by chance").all()
    assert control.loc["all", "ratio"] == pytest.approx(1, abs=0.2)

    windows = cut_out_tissue(np.random.default_rng(0))
    assert border_contact(Cells.from_coco(windows["annotations"]), windows["images"]).loc[
        "all", "ratio"
    ] == pytest.approx(1, abs=0.2)
    for virtual in (False, True):
        contact = border_contact(
            Cells.from_coco(windows["annotations"]), windows["images"], virtual=virtual
        )
        assert (contact.loc[["all", *CLEAR], "verdict"] == "as by chance").all()


def test_detections_are_taken_by_their_masks():
    cells, images = scatter(3, images=12)
    for some in (cells, without_cut_cells(cells)):
        assert border_contact(as_detections(some), images).equals(border_contact(some, images))


def test_one_class_no_cells_no_images():
    cells, images = scatter(2)
    one = border_contact(replace(cells, labels=np.full(len(cells), 4)), images)
    assert one.loc["all"].equals(one.loc["macrophage"]) and one.loc["all", "cells"] > 100
    for table in (
        one.drop(["all", "macrophage"]),
        border_contact(Cells.empty(), images),
        border_contact(Cells.empty(), []),
    ):
        assert (table[["cells", "at_border", "expected", "low", "high"]] == 0).all(axis=None)
        assert table["ratio"].isna().all() and (table["verdict"] == "cannot tell").all()
    empty = replace(cells[:1], masks=[BoxMask(np.zeros((0, 0), bool), 0, 0)])
    assert border_contact(Cells.concatenate([cells, empty]), images).equals(
        border_contact(cells, images)
    )


def test_cells_at_the_border_alone_tell_nothing():
    image = image_of(1, 100, 100)
    contact = border_contact(Cells.concatenate([cell_of(image, disc(8), -8, 40)] * 5), [image]).loc[
        "epithelial"
    ]
    assert (
        contact["at_border"] == 5
        and contact["expected"] == 0
        and contact["verdict"] == "cannot tell"
    )


def test_bad_input_is_refused():
    cells, images = scatter(0, images=1)
    for change, message in (({"image_ids": 7}, "image 7"), ({"labels": 5}, r"\[1, 2, 5\]")):
        wrong = replace(cells[:1], **{name: np.array([value]) for name, value in change.items()})
        with pytest.raises(ValueError, match=message):
            border_contact(Cells.concatenate([cells, wrong]), images)
    for settings, message in (
        ({"border_margin_px": -1}, "border_margin_px is -1"),
        ({"inset_px": 0}, "inset_px is 0"),
        ({"min_visible_px": 0}, "min_visible_px 0"),
    ):
        with pytest.raises(ValueError, match=message):
            border_contact(cells, images, **settings)
    with pytest.raises(ValueError, match="by is 'polygon'"):
        near_border(cells, by="polygon")
    with pytest.raises(ValueError, match="border_margin_px is -1"):
        near_border(cells, -1)


IMAGE = image_of(4, 100, 80)
GAPS = [
    (0, 30),
    (1, 30),
    (2, 30),
    (3, 30),
    (40, 0),
    (40, 1),
    (40, 2),
    (40, 3),
]  # left and top edge; then right and bottom
PLACES = [
    *GAPS,
    *((90 - x, y) for x, y in GAPS[:4]),
    *((x, 68 - y) for x, y in GAPS[4:]),
]  # of boxes of 10 x 12 px


@pytest.mark.parametrize("border_margin_px", [0, 1, 2])
@pytest.mark.parametrize("by", ["box", "mask"])
def test_the_filter_drops_what_touches_each_edge(border_margin_px, by):
    box = np.ones((12, 10), bool)
    detections = Cells.concatenate(cell_of(IMAGE, box, x, y) for x, y in PLACES)
    expected = [gap <= border_margin_px for gap in (0, 1, 2, 3)] * 4
    near = near_border(detections, border_margin_px, by)
    assert near.dtype == bool and near.tolist() == expected
    left = drop_border_detections(detections, border_margin_px, by)
    assert left.to_coco() == detections[np.logical_not(expected)].to_coco()


def test_boxes_and_masks_may_differ_at_the_border():
    cells = Cells.concatenate(cell_of(IMAGE, disc(6), x, 30) for x in (40, 100 - 13))
    boxes = np.array([[0.0, 30, 20, 42], [86.9, 30.1, 99.9999, 42.1]])  # the mask's 40 and 100
    detections = replace(cells, boxes=boxes)
    before = detections.to_coco()
    assert near_border(detections, 0, "box").tolist() == [True, False]
    assert near_border(detections, 1, "box").tolist() == [True, True]
    assert near_border(detections, 0, "mask").tolist() == [False, True]
    assert drop_border_detections(detections).to_coco() == before[1:]
    assert drop_border_detections(detections, by="mask").to_coco() == before[:1]
    assert detections.to_coco() == before


def test_the_filter_takes_no_detections_and_empty_masks():
    assert near_border(Cells.empty()).tolist() == []
    assert len(drop_border_detections(Cells.empty())) == 0
    nothing = BoxMask(np.zeros((0, 0), bool), 0, 0)
    empty = Cells.of_image(80, 100, [1], [nothing], boxes=np.array([[5.0, 5, 14, 14]]))
    assert not near_border(empty, 2, "mask").any()


def test_an_excess_is_told_where_none_would_be_as_by_chance():
    """Eight cells at the border and one inside: far more than chance, of which the interval reaches
    down to 0.
    """
    image = image_of(1, 200, 200)
    places = [(0, y) for y in range(20, 180, 20)] + [(100, 100)]
    cells = Cells.concatenate(cell_of(image, np.ones((8, 8), bool), x, y) for x, y in places)
    table = border_contact(cells, [image])
    assert table.loc["epithelial", "low"] == 0 and table.loc["epithelial", "at_border"] == 8
    assert table.loc["epithelial", "verdict"] == "more than by chance"
