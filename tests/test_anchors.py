"""How well anchors fit, against torchvision's anchors and IoU; fitted sizes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.engine import split_dataset, with_anchors
from cellseg_helpers.model.anchors import anchor_fit, best_anchor_iou, cell_boxes, fit_anchor_sizes

SIDE = 512


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.floats(4, 200), min_size=5, max_size=5),
    st.integers(1, 2),
    st.sampled_from([(1,), (0.5, 1, 2), (0.37,)]),
    st.sampled_from([2, 4]),
)
def test_best_iou_is_that_of_torchvisions_anchors(seed, sizes, per_level, ratios, stride):
    sizes = np.repeat(np.sort(sizes), per_level) * np.tile([1, 1.4][:per_level], 5)
    levels = tuple(map(tuple, sizes.reshape(5, -1).tolist()))
    generator = AnchorGenerator(levels, (tuple(ratios),) * 5)
    features = [torch.zeros(1, 1, *(2 * [SIDE // stride >> level])) for level in range(5)]
    images = ImageList(torch.zeros(1, 3, SIDE, SIDE), [(SIDE, SIDE)])
    (anchors,) = generator(images, features)
    rng = np.random.default_rng(seed)
    centres, sides = rng.uniform(150, SIDE - 150, (20, 2)), rng.uniform(3, 200, (20, 2))
    boxes = np.hstack([centres - sides / 2, centres + sides / 2]).round()
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    expected = box_iou(torch.from_numpy(boxes), anchors.double()).amax(1)
    found = best_anchor_iou(boxes, sizes, ratios, stride)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_fitted_sizes_fit_squares_of_these_sizes():
    """Squares of 24 and 34 px on the grid: both are among the sizes, and every square fits."""
    corners = np.arange(0, 320, 32)[:, None].repeat(2, 1)
    boxes = np.vstack([np.hstack([corners, corners + side]) for side in (24, 34)]).astype(float)
    labels = np.repeat([1, 4], 10)
    sizes = fit_anchor_sizes(boxes, labels, [1])
    assert len(sizes) == 10
    assert np.allclose(np.divide(sizes[1:], sizes[:-1]), 2**0.5, atol=0.01)
    table = anchor_fit(boxes, labels, sizes, [1])
    assert list(table.index) == ["epithelial", "macrophage", "all"]
    assert table.loc["all", "IoU ≥ 0.7"] == 1


def test_auto_takes_the_training_images_sizes():
    config = RunConfig(anchor_sizes="auto", anchor_ratios=(1,))
    dataset = open_dataset(config.data, config.instance_reading, 0, False)
    train, _, _ = split_dataset(dataset, config)
    fitted = with_anchors(config, dataset, train)
    assert fitted.anchor_sizes == fit_anchor_sizes(*cell_boxes(dataset, train), (1,))
    shares = [
        anchor_fit(*cell_boxes(dataset, train), of.anchor_sizes, of.anchor_ratios)["IoU ≥ 0.7"]
        for of in (fitted, RunConfig())
    ]
    assert (shares[0] > shares[1] + 0.5).all()


@pytest.mark.parametrize("other", [{"neck": "none"}, {"min_size": 100, "max_size": 200}])
def test_auto_is_refused_where_it_cannot_fit(other):
    with pytest.raises(
        ValueError, match="anchor_sizes 'auto' needs neck 'fpn' and images at native"
    ):
        RunConfig(anchor_sizes="auto", **other)
