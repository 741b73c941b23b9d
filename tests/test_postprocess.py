import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage import measure, morphology

from cellseg_helpers.cells import BoxMask, Cells
from cellseg_helpers.postprocess import (
    adjust_scores_by_size,
    apply_class_thresholds,
    close_masks,
    fill_holes,
    keep_largest_component,
    mask_nms,
    open_masks,
    resolve_overlaps,
    smooth_masks,
)

HEIGHT, WIDTH = 60, 80
MARGIN_PX = 30  # around the image, so that the oracles never see an edge
SIZE_FACTORS = [(0.01, 1.15), (0.05, 1.10)]


def detection(mask, score=0.9, class_id=1, image_id=1):
    """One cell with a model's box: not the mask's."""
    box = np.array([[0.25, 0.5, 8, 10]])
    tight = [BoxMask.around(np.asarray(mask, bool))]
    return Cells.of_image(*mask.shape, [class_id], tight, [score], box, image_id)


def rows_of(*parts):
    """All cells of some parts as COCO results, to compare."""
    return Cells.concatenate(parts).to_coco()


def disc(x, y, radius=10):
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]
    return (xs - x) ** 2 + (ys - y) ** 2 <= radius**2


def block(x1, y1, x2, y2):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def drawn(*rows):
    return np.array([[pixel == "#" for pixel in row] for row in rows])


def masks_of(cells):
    """bool [H, W] of each cell."""
    planes = [np.zeros(size, bool) for size in cells.sizes]
    for plane, (mask, x0, y0) in zip(planes, cells.masks, strict=True):
        plane[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]] = mask
    return planes


def random_blobs(seed, count=150):
    """Detections in images of several sizes, numbered by their class ids from 1: blobs with holes,
    bays and pieces, many at the edge; 1-px, full, empty masks.
    """
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        image_id = number % 4
        shape = [(40, 50), (33, 20), (1, 9), (25, 64)][image_id]
        noise = ndimage.gaussian_filter(rng.standard_normal(shape), rng.uniform(0.5, 3))
        mask = noise > np.quantile(noise, rng.uniform(0.3, 0.97))
        if rng.random() < 0.7:
            mask &= ndimage.binary_dilation(
                np.arange(mask.size).reshape(shape) == rng.integers(mask.size), iterations=10
            )
        if number % 15 == 3:
            mask = np.arange(mask.size).reshape(shape) == rng.integers(mask.size)
        if number % 40 == 5:
            mask = np.full(shape, number % 80 == 5)
        score = float(rng.choice([0.2, 0.4, 0.6, rng.random()]))
        found.append(detection(mask, score, number + 1, image_id))
    return Cells.concatenate(found)


def largest_component(mask):
    components = measure.label(mask.T, connectivity=2).T
    return (components == np.bincount(components[mask]).argmax()) & mask if mask.any() else mask


def on_large_canvas(function):
    return lambda mask: function(np.pad(mask, MARGIN_PX))[
        MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX
    ]


def blurred(sigma_px):
    return lambda mask: (
        ndimage.gaussian_filter(mask.astype(float), sigma_px, mode="constant") >= 0.5
    )


def morphological(function, radius_px):
    return lambda mask: function(mask.astype(np.uint8), morphology.disk(radius_px)).astype(bool)


REFINEMENTS = {
    **{
        f"open {r}": (lambda rows, r=r: open_masks(rows, r), morphological(morphology.opening, r))
        for r in (0, 1, 2, 4)
    },
    **{
        f"close {r}": (lambda rows, r=r: close_masks(rows, r), morphological(morphology.closing, r))
        for r in (0, 1, 2, 5)
    },
    "close 1.5": (
        lambda rows: close_masks(rows, 1.5),
        lambda mask: morphology.closing(mask.astype(np.uint8), np.ones((3, 3))).astype(bool),
    ),
    "fill": (fill_holes, ndimage.binary_fill_holes),
    "largest": (keep_largest_component, largest_component),
    **{f"smooth {s}": (lambda rows, s=s: smooth_masks(rows, s), blurred(s)) for s in (0.5, 1, 2.5)},
}
STEPS = {
    "adjust": lambda rows: adjust_scores_by_size(rows, SIZE_FACTORS),
    "class thresholds": lambda rows: apply_class_thresholds(
        rows, {number: (0.1, 0.5, 0.3, 0.0)[number % 4] for number in range(1, 151)}
    ),
    "nms": lambda rows: mask_nms(rows, 0.3),
    "resolve": lambda rows: resolve_overlaps(rows, 0.3),
    **{name: step for name, (step, _) in REFINEMENTS.items()},
}
MASK_STEPS = [name for name in STEPS if name not in ("adjust", "class thresholds", "nms")]


@pytest.mark.parametrize("name", STEPS)
def test_each_step_leaves_its_input_and_the_order_alone(name):
    found = random_blobs(0)
    results = STEPS[name](found)
    assert rows_of(found) == rows_of(random_blobs(0))
    assert (np.diff(results.labels) > 0).all()
    old = found[results.labels - 1]
    assert (results.image_ids == old.image_ids).all() and (results.sizes == old.sizes).all()
    same = [new == before for new, before in zip(results.rles, old.rles, strict=True)]
    changed = np.logical_not(same)
    assert (results.boxes[same] == old.boxes[same]).all()
    assert (results.boxes[changed] == results.mask_boxes[changed]).all()
    assert name == "adjust" or (results.scores == old.scores).all()


@pytest.mark.parametrize("name", STEPS)
def test_no_detections_give_none(name):
    assert len(STEPS[name](Cells.empty())) == 0


@pytest.mark.parametrize("name", MASK_STEPS)
def test_empty_masks_are_dropped(name):
    empty, full = detection(block(0, 0, 0, 0), 0.8), detection(block(2, 3, 40, 50), 0.7)
    assert len(STEPS[name](Cells.concatenate([empty, full, empty]))) == 1
    assert len(STEPS[name](empty)) == 0


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", REFINEMENTS)
def test_refinement_equals_the_oracle_on_a_large_canvas(name, seed):
    found = random_blobs(seed)
    step, oracle = REFINEMENTS[name]
    expected = [on_large_canvas(oracle)(mask) for mask in masks_of(found)]
    results = step(found)
    assert results.labels.tolist() == [n for n, mask in enumerate(expected, 1) if mask.any()]
    for number, mask in zip(results.labels, masks_of(results), strict=True):
        assert np.array_equal(mask, expected[number - 1])


def test_small_boxes_score_more():
    sides = np.array([(9.9, 10), (10, 10), (10, 49.9), (20, 25), (60, 70), (5, 5), (10, 20)])
    scores = [0.5, 0.5, 0.5, 0.5, 0.5, 0.9, 0.95]
    masks = [BoxMask(np.ones((1, 1), bool), 0, 0)] * 7
    boxes = np.hstack([np.tile([3.0, 4.0], (7, 1)), sides + [3.0, 4.0]])
    found = Cells.of_image(100, 100, [1] * 7, masks, scores, boxes)
    adjusted = adjust_scores_by_size(found, SIZE_FACTORS)
    assert adjusted.scores.tolist() == pytest.approx([0.575, 0.55, 0.55, 0.5, 0.5, 1, 1])
    assert adjusted.scores.max() == 1 and (adjusted.boxes == found.boxes).all()
    assert (adjust_scores_by_size(found, []).scores == scores).all()
    assert adjust_scores_by_size(found, [[1, 0.5]]).scores[3] == 0.25


@pytest.mark.parametrize(
    "factors",
    [
        [1.15],
        [(0.01, 1.15), 0.05],
        [(0.05, 1.1), (0.01, 1.15)],
        [(0.01, 1.1), (0.01, 1.2)],
        [(0, 1.1)],
        [(1.5, 1.1)],
        [(0.1, 0)],
        [(0.1, float("nan"))],
        [0.01, 1.15],
    ],
)
def test_size_factors_are_checked(factors):
    with pytest.raises(
        ValueError,
        match=r"factors is .*; it must be pairs whose shares rise from above 0 to at most 1",
    ):
        adjust_scores_by_size(Cells.empty(), factors)


def test_each_class_has_its_own_threshold():
    scores = [(1, 0.49), (1, 0.5), (2, 0.1), (2, 0.9), (4, 0.0)]
    found = Cells.concatenate(detection(disc(20, 30), score, k) for k, score in scores)
    kept = apply_class_thresholds(found, {1: 0.5, 2: 0.89, 3: 1, 4: 0})
    assert rows_of(kept) == rows_of(found[[1, 3, 4]])
    with pytest.raises(
        ValueError,
        match=r"score_thresholds has nothing for class 4, but there are detections of it; it has \[1, 2\]",
    ):
        apply_class_thresholds(found, {1: 0.5, 2: 0.5})
    with pytest.raises(
        ValueError, match=r"score_thresholds\[2\] is 1.5; it must be at least 0 and at most 1"
    ):
        apply_class_thresholds(found, {1: 0.5, 2: 1.5, 4: 0})


def three_cells():
    """One cell found well, shifted under another class, and merged with its neighbour; the third
    cut by the image's edge.
    """
    return [
        detection(disc(20, 30) | disc(45, 30), 0.7),
        detection(disc(20, 30), 0.9),
        detection(disc(22, 30), 0.6, class_id=2),
        detection(disc(79, 58), 0.8, class_id=3),
        detection(disc(20, 30), 0.1, image_id=2),
    ]


def test_one_cell_found_thrice():
    """The merged mask is two discs of equal size: IoU 1/2, not above it."""
    merged, good, shifted, cut, elsewhere = three_cells()
    found = Cells.concatenate(three_cells())
    assert rows_of(mask_nms(found, 0.5)) == rows_of(merged, good, cut, elsewhere)
    assert rows_of(mask_nms(found, 0.49)) == rows_of(good, cut, elsewhere)
    assert rows_of(mask_nms(found, 0.9)) == rows_of(found)
    assert rows_of(mask_nms(found, 1)) == rows_of(found)
    assert rows_of(mask_nms(found[:3], 0)) == rows_of(good)


def test_merged_cell_keeps_its_own_half():
    merged, good, shifted, cut, elsewhere = three_cells()
    found = Cells.concatenate(three_cells())
    results = resolve_overlaps(found, 0.5)
    assert rows_of(results[1:]) == rows_of(good, cut, elsewhere)
    assert np.array_equal(masks_of(results)[0], disc(45, 30))
    assert results.boxes[0].tolist() == [35, 20, 35 + 21, 20 + 21]
    assert rows_of(resolve_overlaps(found, 0.501)) == rows_of(good, cut, elsewhere)
    assert len(resolve_overlaps(found, 0)) == 5


def test_cut_cell_stays_at_the_edge():
    """Closing as scipy does it by default would take the edge's pixels away."""
    masks = disc(79, 58), disc(0, 0, 4), disc(0, 30) & ~disc(3, 30, 1)
    found = Cells.concatenate(map(detection, masks))
    closed = close_masks(found, 3)
    assert rows_of(closed[:2]) == rows_of(found[:2])
    assert np.array_equal(masks_of(closed)[2], disc(0, 30))
    assert np.array_equal(masks_of(fill_holes(found))[2], disc(0, 30))
    assert masks_of(smooth_masks(detection(disc(0, 30)), 1))[0][22:39, 0].all()


def test_opening_rounds_corners_also_at_the_edge():
    (opened,) = masks_of(open_masks(detection(block(0, 0, 5, 4)), 1))
    assert opened[:4, :5].tolist() == drawn(".###.", "#####", "#####", ".###.").tolist()
    assert opened.sum() == 16


def test_what_is_too_small_vanishes():
    masks = block(9, 9, 10, 10), block(20, 20, 30, 30), block(0, 5, 40, 6)
    found = Cells.concatenate(map(detection, masks))
    assert open_masks(found, 1).boxes.tolist() == [[20, 20, 30, 30]]
    assert len(smooth_masks(found, 2)) == 1
    assert len(open_masks(found, 6)) == 0


def test_only_enclosed_background_is_filled():
    bay = drawn(
        "#.###", "#.#.#", "##.##", "#####"
    )  # the top bay is closed by the image's edge only; two holes touch diagonally
    (filled,) = masks_of(fill_holes(detection(bay)))
    assert filled.tolist() == drawn("#.###", "#.###", "#####", "#####").tolist()


def test_diagonal_neighbours_are_one_component_and_of_equal_ones_the_leftmost_stays():
    mask = drawn(".....##", "#......", ".#.....", ".....#.")
    (kept,) = masks_of(keep_largest_component(detection(mask)))
    assert kept.tolist() == drawn(".......", "#......", ".#.....", ".......").tolist()


@pytest.mark.parametrize("step", [open_masks, close_masks, smooth_masks])
def test_lengths_are_checked_and_zero_changes_nothing(step):
    found = random_blobs(4)
    found = found[found.area_px > 0]
    assert rows_of(step(found, 0)) == rows_of(found)
    name = "sigma_px" if step is smooth_masks else "radius_px"
    for value in (-1, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=f"{name} is {value}; it must be a finite number of pixels, at least 0"
        ):
            step(Cells.empty(), value)


@pytest.mark.parametrize(
    ("step", "name"), [(mask_nms, "iou_threshold"), (resolve_overlaps, "min_visible_share")]
)
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_shares_are_checked(step, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least 0 and at most 1"):
        step(Cells.empty(), value)


def by_score(found):
    """Rows of each image by descending score, earlier first."""
    return [
        sorted(np.flatnonzero(found.image_ids == image_id), key=lambda i: (-found.scores[i], i))
        for image_id in set(found.image_ids.tolist())
    ]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([0, 0.1, 0.25, 0.5, 0.75, 1]))
def test_nms_equals_the_naive_one(seed, iou_threshold):
    found = random_blobs(seed, 60)
    masks = masks_of(found)
    kept = set()
    for rows in by_score(found):
        for row in rows:
            rivals = [masks[other] for other in rows if other in kept]
            ious = [
                (masks[row] & mask).sum() / max((masks[row] | mask).sum(), 1) for mask in rivals
            ]
            if not any(iou > iou_threshold for iou in ious):
                kept.add(row)
    assert rows_of(mask_nms(found, iou_threshold)) == rows_of(found[sorted(kept)])


def test_nms_of_many_detections_in_one_image():
    """A grid of 1,600 cells, each found twice."""
    corners = [(x, y) for y in range(0, 160, 4) for x in range(0, 160, 4)]
    masks = [BoxMask(np.ones((h, 3), bool), x, y) for x, y in corners for h in (2, 3)]
    found = Cells.of_image(160, 160, [1] * 3200, masks, np.tile([0.5, 0.6], 1600))
    assert rows_of(mask_nms(found, 0.6)) == rows_of(found[1::2])
    assert rows_of(mask_nms(found, 0.7)) == rows_of(found)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([0, 0.2, 0.5, 1]))
def test_each_pixel_has_one_owner(seed, min_visible_share):
    found = random_blobs(seed, 60)
    masks = masks_of(found)
    expected = {}
    for rows in by_score(found):
        taken = np.zeros(masks[rows[0]].shape, bool)
        for row in rows:
            left = masks[row] & ~taken
            left = left if (left == masks[row]).all() else largest_component(left)
            if left.any() and left.sum() / masks[row].sum() >= min_visible_share:
                expected[row] = left
                taken |= left
    results = resolve_overlaps(found, min_visible_share)
    assert (results.labels - 1).tolist() == sorted(expected)
    for number, mask in zip(results.labels, masks_of(results), strict=True):
        assert np.array_equal(mask, expected[number - 1])
    for image_id in set(results.image_ids.tolist()):
        assert sum(map(int, results.area_px[results.image_ids == image_id])) == (
            np.any(masks_of(results[results.image_ids == image_id]), axis=0).sum()
        )


def test_crossed_bar_keeps_its_longer_end_and_the_shorter_is_free():
    """The top bar wins; what it cuts off from the second belongs to the third, which lies below it."""
    found = Cells.concatenate(
        [
            detection(block(10, 20, 40, 24), 0.6),  # the bar that is crossed
            detection(block(20, 10, 24, 40), 0.9),
            detection(block(8, 20, 20, 24), 0.3),  # on its shorter end
            detection(block(38, 20, 42, 24), 0.2),  # half of it on its longer end
        ]
    )
    results = masks_of(resolve_overlaps(found, 0.5))
    expected = [
        block(24, 20, 40, 24),
        block(20, 10, 24, 40),
        block(8, 20, 20, 24),
        block(40, 20, 42, 24),
    ]
    assert all(np.array_equal(mask, other) for mask, other in zip(results, expected, strict=True))
    assert np.array_equal(np.any(results, axis=0), np.any(masks_of(found), axis=0))


def test_a_dropped_cell_hides_nothing():
    top, hidden, below = block(0, 0, 20, 20), block(5, 5, 22, 20), block(18, 5, 40, 20)
    masks = (top, 0.9), (hidden, 0.8), (below, 0.7)
    found = Cells.concatenate(detection(mask, score) for mask, score in masks)
    results = masks_of(resolve_overlaps(found, 0.5))
    assert len(results) == 2
    assert np.array_equal(results[1], below & ~top)


def test_equal_scores_go_to_the_earlier():
    masks = block(0, 0, 10, 10), block(5, 0, 15, 10), block(5, 0, 15, 10)
    found = Cells.concatenate(detection(mask, 0.5) for mask in masks)
    assert rows_of(mask_nms(found, 0.5)) == rows_of(found[:2])
    assert resolve_overlaps(found, 0).area_px.tolist() == [100, 50]
