"""Test-time augmentation: one view is the model itself; mirrored images give mirrored cells."""

import numpy as np
import pytest
import torch

from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.drawn import draw_tissue
from cellseg_helpers.inference import predict
from cellseg_helpers.model.build import build_model
from cellseg_helpers.model.views import AugmentedViews, View, with_views

SIDE = 96


@pytest.fixture(scope="module")
def model():
    """Random weights; predictors that find some twenty boxes of every class."""
    torch.manual_seed(0)
    config = RunConfig(mask_geometry="exact", head_width=32, rpn_post_nms_top_n_test=40)
    model = build_model(config).eval()
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def image():
    return torch.from_numpy(draw_tissue(np.random.default_rng(0), SIDE, SIDE)[0]).float() / 255


@torch.no_grad()
def test_one_view_is_the_model_itself(model, image):
    (expected,), (found,) = model([image]), AugmentedViews(model, [1], [False])([image])
    assert len(expected["boxes"]) > 10
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_mirrored_image_gives_mirrored_cells(model, image):
    views = AugmentedViews(model, [1, 1.25])
    (found,), (mirrored,) = views([image]), views([image.flip(-1)])
    assert len(found["boxes"]) > 10
    torch.testing.assert_close(mirrored["scores"], found["scores"], atol=1e-4, rtol=1e-3)
    x1, y1, x2, y2 = mirrored["boxes"].unbind(1)
    back = torch.stack([SIDE - x2, y1, SIDE - x1, y2], 1)
    torch.testing.assert_close(back, found["boxes"], atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(mirrored["masks"].flip(-1), found["masks"], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_cell_that_one_of_two_views_finds_has_half_the_score(model, image, monkeypatch):
    def detect(view, seen=View.detect):
        return tuple(part[:0] if view.flip else part for part in seen(view))

    monkeypatch.setattr(View, "detect", detect)
    (found,), (alone,) = AugmentedViews(model, [1])([image]), model([image])
    torch.testing.assert_close(found["scores"], alone["scores"] / 2)
    torch.testing.assert_close(found["boxes"], alone["boxes"])


def test_predict_takes_views(model, image):
    config = RunConfig(test_time_augmentation=True, mask_geometry="exact")
    views = with_views(model, config)
    assert views.mask_geometry == "exact"
    cells = predict(views, (255 * image).byte(), 64, 32)
    assert len(cells) and (cells.boxes <= SIDE).all()
    assert with_views(model, RunConfig()) is model
