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
    drop_small_instances,
    find_cells,
    find_instances,
)

IDS = (0, 1, 2, 7, 255, 256, 65_535)
label_stacks = hnp.arrays(
    st.sampled_from([np.int32, np.uint16]),
    hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=12),
    elements=st.sampled_from(IDS),
    fill=st.just(0),
)


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
    assert len(find_cells(np.zeros(shape, np.int32))) == 0


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
def test_cells_are_the_instances_with_their_masks(label_maps):
    found, cells = find_instances(label_maps), find_cells(label_maps, 3)
    masks = [label_maps[k - 1] == i for k, i in zip(found.labels, found.ids, strict=True)]
    rles = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    assert [rle["counts"] for rle in cells.rles] == [r["counts"].decode() for r in rles]
    assert np.array_equal(cells.boxes, found.boxes) and np.array_equal(cells.labels, found.labels)
    assert cells.image_ids.tolist() == [3] * len(masks)


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
