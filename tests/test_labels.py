import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask
from skimage import measure

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.data.labels import (
    connected_components,
    decode_in_box,
    decode_in_boxes,
    drop_small_instances,
    encode_box_mask,
    encode_box_masks,
    encode_instances,
    find_instances,
    mask_boxes,
)

IDS = (0, 1, 2, 7, 255, 256, 65_535)
label_stacks = hnp.arrays(
    st.sampled_from([np.int32, np.uint16]),
    hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=12),
    elements=st.sampled_from(IDS),
    fill=st.just(0),
)
masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=10))
offsets = st.tuples(*[st.integers(0, 5)] * 4)


def brute_force(label_maps):
    """(class, id, box, area, border) of every instance, by looking at each pixel."""
    height, width = label_maps.shape[1:]
    found = []
    for class_id, label_map in enumerate(label_maps, 1):
        for instance_id in np.unique(label_map[label_map > 0]):
            ys, xs = np.nonzero(label_map == instance_id)
            box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            border = 0 in xs or 0 in ys or width - 1 in xs or height - 1 in ys
            found.append((class_id, int(instance_id), tuple(map(int, box)), len(xs), bool(border)))
    return found


def as_tuples(instances):
    columns = (
        instances.labels,
        instances.ids,
        instances.boxes,
        instances.area_px,
        instances.touches_border,
    )
    return [
        (int(k), int(i), tuple(map(int, box)), int(a), bool(t))
        for k, i, box, a, t in zip(*columns, strict=True)
    ]


def full_rle(mask, x0, y0, height, width):
    image = np.zeros((height, width), np.uint8, order="F")
    image[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]] = mask
    return image, coco_mask.encode(image)["counts"].decode()


def test_five_cells_with_known_places():
    label_maps = np.zeros((4, 8, 10), np.int32)
    label_maps[0, 2:5, 3:7] = 9
    label_maps[0, 3, 4] = 0  # a hole is not area
    label_maps[0, 0, 9] = 2
    label_maps[1, 2:5, 3:7] = 9  # the same id in another class, on the same pixels
    label_maps[3, 7, 0] = 65_535
    label_maps[3, 6, 8] = 1
    label_maps[3, 1, 1] = 1  # one id in two pieces is one instance
    found = find_instances(label_maps)
    assert as_tuples(found) == [
        (1, 2, (9, 0, 10, 1), 1, True),
        (1, 9, (3, 2, 7, 5), 11, False),
        (2, 9, (3, 2, 7, 5), 12, False),
        (4, 1, (1, 1, 9, 7), 2, False),
        (4, 65_535, (0, 7, 1, 8), 1, True),
    ]
    assert [column.dtype for column in found] == [np.float32, np.int64, np.int32, np.int64, bool]
    assert found.boxes.shape == (5, 4)


@pytest.mark.parametrize("shape", [(4, 5, 7), (1, 1, 1)])
def test_empty_maps_have_no_instances(shape):
    found = find_instances(np.zeros(shape, np.int32))
    assert found.boxes.shape == (0, 4)
    assert [len(column) for column in found] == [0] * 5
    assert [column.dtype for column in found] == [np.float32, np.int64, np.int32, np.int64, bool]
    assert encode_instances(np.zeros(shape, np.int32), found) == []


@settings(deadline=None, max_examples=60)
@given(label_stacks)
def test_instances_equal_brute_force(label_maps):
    assert as_tuples(find_instances(label_maps)) == brute_force(label_maps)


@pytest.mark.parametrize("y", [0, 1, 4, 5])
@pytest.mark.parametrize("x", [0, 1, 6, 7])
def test_one_pixel_cell_at_every_border(x, y):
    label_maps = np.zeros((4, 6, 8), np.int32)
    label_maps[2, y, x] = 3
    assert as_tuples(find_instances(label_maps)) == [
        (3, 3, (x, y, x + 1, y + 1), 1, x in (0, 7) or y in (0, 5))
    ]


def test_ids_with_gaps_up_to_the_largest():
    ids = np.array([1, 3, 300, 40_000, 65_535])
    label_maps = np.zeros((len(CLASS_NAMES), 3, 20), np.uint16)
    label_maps[1, 1, 2 : 2 + len(ids)] = ids
    found = find_instances(label_maps)
    assert found.ids.tolist() == ids.tolist()
    assert found.labels.tolist() == [2] * len(ids)


@settings(deadline=None, max_examples=60)
@given(label_stacks)
def test_instance_rle_equals_pycocotools(label_maps):
    found = find_instances(label_maps)
    rles = encode_instances(label_maps, found)
    assert len(rles) == len(found.ids)
    for rle, class_id, instance_id in zip(rles, found.labels, found.ids, strict=True):
        mask = np.asfortranarray(label_maps[class_id - 1] == instance_id, np.uint8)
        assert rle == {
            "size": list(mask.shape),
            "counts": coco_mask.encode(mask)["counts"].decode(),
        }


@settings(deadline=None, max_examples=60)
@given(masks, offsets)
def test_box_rle_equals_pycocotools_of_the_full_image(mask, margins):
    left, right, top, bottom = margins
    height, width = mask.shape[0] + top + bottom, mask.shape[1] + left + right
    rle = encode_box_mask(mask, left, top, height, width)
    assert rle == {"size": [height, width], "counts": full_rle(mask, left, top, height, width)[1]}


@settings(deadline=None, max_examples=60)
@given(masks, offsets)
def test_decoding_gives_the_tight_box(mask, margins):
    left, right, top, bottom = margins
    image, counts = full_rle(
        mask, left, top, mask.shape[0] + top + bottom, mask.shape[1] + left + right
    )
    for encoded in (counts, counts.encode()):
        inside, x0, y0 = decode_in_box({"size": list(image.shape), "counts": encoded})
        assert inside.dtype == bool
        if not image.any():
            assert (inside.shape, x0, y0) == ((0, 0), 0, 0)
            continue
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        again = np.zeros(image.shape, bool)
        again[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]] = inside
        assert np.array_equal(again, image)


@pytest.mark.parametrize("seed", range(5))
def test_long_runs_round_trip(seed):
    """Runs above 32 and 1,024 px need several characters, and shrinking ones negative differences."""
    rng = np.random.default_rng(seed)
    image = np.asfortranarray(
        rng.random((1500, 90)) < [0.001, 0.999, 0.5, 0.03, 0.97][seed], np.uint8
    )
    rle = coco_mask.encode(image)
    inside, x0, y0 = decode_in_box(rle)
    assert np.array_equal(inside, image[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]])
    assert inside.sum() == image.sum()
    assert encode_box_mask(inside, x0, y0, *image.shape)["counts"] == rle["counts"].decode()


def extent_of(mask):
    """x, y, width, height of what is True; all 0 where nothing is."""
    rows, columns = np.nonzero(mask)
    return (
        [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1] if len(rows) else [0] * 4
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(masks, offsets), max_size=8))
def test_batches_equal_one_by_one(cases):
    """Masks of different images; empty ones and ones as high or as large as their image are among
    them.
    """
    full = [
        full_rle(mask, x, y, mask.shape[0] + y + bottom, mask.shape[1] + x + right)
        for mask, (x, right, y, bottom) in cases
    ]
    sizes = [image.shape for image, _ in full]
    rles = [{"size": list(image.shape), "counts": counts} for image, counts in full]
    assert encode_box_masks([(mask, x, y) for mask, (x, _, y, _) in cases], sizes) == rles
    for (image, _), rle, (inside, x0, y0) in zip(full, rles, decode_in_boxes(rles), strict=True):
        assert inside.dtype == bool
        again = np.zeros(image.shape, bool)
        again[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]] = inside
        assert np.array_equal(again, image)
        alone, *corner = decode_in_box(rle)
        assert np.array_equal(alone, inside) and corner == [x0, y0]
    assert encode_box_masks(decode_in_boxes(rles), sizes) == rles
    assert mask_boxes(rles).tolist() == [extent_of(image) for image, _ in full]


def test_batch_with_long_runs_and_bytes():
    rng = np.random.default_rng(0)
    images = [
        np.asfortranarray(rng.random((1500, 20)) < share, np.uint8)
        for share in (0.001, 1, 0.999, 0, 0.5)
    ]
    rles = [coco_mask.encode(image) for image in images]
    inside = decode_in_boxes(rles)
    assert [mask.sum() for mask, _, _ in inside] == [image.sum() for image in images]
    assert [
        rle["counts"].encode() for rle in encode_box_masks(inside, [rle["size"] for rle in rles])
    ] == [rle["counts"] for rle in rles]


def test_work_does_not_grow_with_the_image():
    """A dense 60,000 x 60,000 px image would take 3.6 GB."""
    mask = np.array([[True, False], [True, True]])
    rle = encode_box_mask(mask, 41_000, 59_998, 60_000, 60_000)
    inside, x0, y0 = decode_in_box(rle)
    assert (x0, y0) == (41_000, 59_998)
    assert np.array_equal(inside, mask)
    assert coco_mask.area(rle) == 3


def test_mask_outside_its_image_is_refused():
    with pytest.raises(
        ValueError, match="a 2 x 3 px mask at x 8, y 0 reaches outside its 10 x 10 px image"
    ):
        encode_box_mask(np.ones((2, 3), bool), 8, 0, 10, 10)
    with pytest.raises(
        ValueError, match="a 2 x 3 px mask at x 0, y 4 reaches outside its 5 x 10 px image"
    ):
        encode_box_masks([(np.ones((2, 3), bool), 0, 4)] * 2, [(6, 10), (5, 10)])


def test_diagonal_neighbours_are_one_component_and_ids_do_not_matter():
    label_map = np.array([[5, 0, 0, 1], [0, 9, 0, 2], [0, 0, 0, 0], [3, 0, 0, 0]], np.int32)
    assert connected_components(label_map).tolist() == [
        [1, 0, 0, 2],
        [0, 1, 0, 2],
        [0, 0, 0, 0],
        [3, 0, 0, 0],
    ]


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        np.int32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=st.sampled_from((0, 0, 1, 4)),
    )
)
def test_components_equal_scikit_image(label_map):
    ours, theirs = connected_components(label_map), measure.label(label_map != 0, connectivity=2)
    assert ours.dtype == np.int32
    assert ours.max() == theirs.max()
    assert len(np.unique(np.stack([ours.ravel(), theirs.ravel()]), axis=1).T) == len(
        np.unique(ours)
    )


@settings(deadline=None, max_examples=60)
@given(label_stacks, st.integers(0, 6))
def test_small_instances_are_dropped_and_only_they(label_maps, min_area_px):
    before = label_maps.copy()
    kept = drop_small_instances(label_maps, min_area_px)
    assert kept.dtype == label_maps.dtype
    assert as_tuples(find_instances(kept)) == [
        cell for cell in brute_force(label_maps) if cell[3] >= min_area_px
    ]
    assert np.array_equal(kept[kept > 0], label_maps[kept > 0])
    assert np.array_equal(label_maps, before)
