"""``Cells`` and their run-length encodings; pycocotools is the oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from cellseg_helpers.cells import BoxMask, Cells, decode_mask, encode_mask, mask_iou, run_lengths

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=10))
offsets = st.tuples(*[st.integers(0, 5)] * 4)  # 0 on both sides: as high or as wide as the image
few = settings(deadline=None, max_examples=60)


def placed(mask, margins):
    """The mask in an image with these margins (px): left, right, top, bottom."""
    left, right, top, bottom = margins
    return np.asfortranarray(np.pad(mask, ((top, bottom), (left, right))), np.uint8)


def by_pycocotools(image):
    return {"size": list(image.shape), "counts": coco_mask.encode(image)["counts"].decode()}


def drawn(box_mask, shape):
    mask, x0, y0 = box_mask
    image = np.zeros(shape, bool)
    image[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]] = mask
    return image


def cells_of(images):
    """A cell for each image, numbered from 1, in turn of the classes 1 and 2."""
    parts = [
        Cells.of_image(*image.shape, [1 + i % 2], [BoxMask.around(image > 0)], image_id=i)
        for i, image in enumerate(images, 1)
    ]
    return Cells.concatenate(parts)


@few
@given(masks, offsets)
def test_an_encoded_mask_equals_pycocotools_of_the_full_image(mask, margins):
    image = placed(mask, margins)
    for box_mask in (BoxMask(mask, margins[0], margins[2]), BoxMask.around(image > 0)):
        assert encode_mask(box_mask, *image.shape) == by_pycocotools(image)


@few
@given(masks, offsets)
def test_a_decoded_mask_is_pycocotools_in_its_tight_box(mask, margins):
    image = placed(mask, margins)
    rle = by_pycocotools(image)
    for counts in (rle["counts"], rle["counts"].encode()):
        inside, x0, y0 = decode_mask({"size": rle["size"], "counts": counts})
        assert inside.dtype == bool
        assert np.array_equal(drawn((inside, x0, y0), image.shape), coco_mask.decode(rle))
        box = [x0, y0, *inside.shape[::-1]]
        assert box == coco_mask.toBbox(rle).tolist()
        if not image.any():
            assert inside.shape == (0, 0)


@few
@given(masks, offsets)
def test_run_lengths_are_background_and_mask_in_turn(mask, margins):
    image = placed(mask, margins)
    lengths = run_lengths(by_pycocotools(image)["counts"])
    values = np.arange(len(lengths)) % 2
    assert np.array_equal(np.repeat(values, lengths), image.ravel(order="F"))


@pytest.mark.parametrize("share", [0, 0.001, 0.03, 0.5, 0.97, 0.999, 1])
def test_long_runs_round_trip(share):
    """Runs above 32 and 1,024 px need several characters, and shrinking ones negative differences."""
    image = np.asfortranarray(np.random.default_rng(0).random((1500, 90)) < share, np.uint8)
    rle = by_pycocotools(image)
    found = decode_mask(rle)
    assert np.array_equal(drawn(found, image.shape), image)
    assert encode_mask(found, *image.shape) == rle


def test_work_does_not_grow_with_the_image():
    """A dense 60,000 x 60,000 px image would take 3.6 GB."""
    mask = BoxMask(np.array([[True, False], [True, True]]), 41_000, 59_998)
    rle = encode_mask(mask, 60_000, 60_000)
    found = decode_mask(rle)
    assert found[1:] == mask[1:] and np.array_equal(found.mask, mask.mask)
    assert coco_mask.area(rle) == 3


@pytest.mark.parametrize("x0, y0", [(8, 0), (0, 9), (-1, 0), (0, -1)])
def test_a_mask_outside_its_image_is_refused(x0, y0):
    problem = f"a 2 x 3 px mask at x {x0}, y {y0} reaches outside its 10 x 10 px image"
    with pytest.raises(ValueError, match=problem):
        encode_mask(BoxMask(np.ones((2, 3), bool), x0, y0), 10, 10)


@few
@given(st.lists(st.tuples(masks, offsets), max_size=8))
def test_coco_rows_of_cells_in_images_of_several_sizes(cases):
    """Empty masks, and ones as high or as large as their image, are among them."""
    images = [placed(*case) for case in cases]
    cells = cells_of(images)
    rles = [by_pycocotools(image) for image in images]
    assert cells.rles == rles
    assert cells.area_px.tolist() == [image.sum() for image in images]
    rows = cells.to_coco()
    assert [row["bbox"] for row in rows] == [coco_mask.toBbox(rle).tolist() for rle in rles]
    assert [row["image_id"] for row in rows] == list(range(1, len(images) + 1))
    without_box = [{key: row[key] for key in row if key not in ("bbox", "score")} for row in rows]
    for again in (Cells.from_coco(rows), Cells.from_coco(without_box)):
        assert again.to_coco() == rows
        assert (again.boxes == again.mask_boxes).all()


def test_a_models_box_and_score_stay_as_they_are():
    mask = BoxMask(np.ones((2, 3), bool), 4, 5)
    cells = Cells.of_image(20, 30, [3], [mask], scores=[0.25], boxes=[[3.5, 4.5, 8.25, 9]])
    (row,) = cells.to_coco()
    assert (row["bbox"], row["score"], row["category_id"]) == ([3.5, 4.5, 4.75, 4.5], 0.25, 3)
    assert Cells.from_coco([row]).boxes.tolist() == [[3.5, 4.5, 8.25, 9]]


def test_cells_are_selected_and_joined_as_rows_are():
    rng = np.random.default_rng(1)
    cells = cells_of([np.asfortranarray(rng.random((9, 7)) < 0.5, np.uint8) for _ in range(5)])
    rows = cells.to_coco()
    few_rows = np.array([True, False, True, False, False])
    for selection in (few_rows, np.flatnonzero(few_rows), [0, 2], slice(0, 3, 2)):
        assert cells[selection].to_coco() == [rows[0], rows[2]]
    for nothing in ([], np.zeros(0, bool), np.zeros(5, bool), slice(0)):
        assert len(cells[nothing]) == 0
    assert Cells.concatenate([cells[[4]], cells[:2]]).to_coco() == [rows[4], *rows[:2]]
    assert len(Cells.concatenate([])) == len(Cells.from_coco([])) == len(Cells.empty()) == 0


def test_new_masks_bring_their_boxes_and_empty_ones_go():
    cells = cells_of([np.ones((6, 8), np.uint8)] * 3)
    corner = BoxMask(np.ones((2, 3), bool), 5, 4)
    changed = cells.with_masks({1: corner, 2: BoxMask.around(np.zeros((4, 4), bool))})
    assert changed.image_ids.tolist() == [1, 2]
    assert changed.boxes.tolist() == [[0, 0, 8, 6], [5, 4, 8, 6]]
    assert changed.area_px.tolist() == [48, 6]


def test_mask_iou_of_each_pair():
    image = np.zeros((4, 8), np.uint8)
    image[:, :4] = 1
    half, whole = image > 0, np.ones((4, 8), bool)
    two = Cells.of_image(4, 8, [1, 1], [BoxMask.around(half), BoxMask.around(whole)])
    assert mask_iou(two, two).tolist() == [[1, 0.5], [0.5, 1]]
    assert mask_iou(two, two[[]]).shape == (2, 0)
