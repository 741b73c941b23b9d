"""The region proposal network against torchvision's: matches strip by strip, predictions and
gradients at sampled anchors alone.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)
from torchvision.ops import box_iou

from cellseg_helpers.config import RunConfig
from cellseg_helpers.model import rpn as rpn_module
from cellseg_helpers.model.build import build_model
from cellseg_helpers.model.rpn import match_anchors, predictions_at


def random_boxes(count: int, side_px: int, least_px: int, rng: torch.Generator) -> torch.Tensor:
    """Boxes on a grid of whole pixels, so that many IoUs tie, a tenth of them partly outside the
    image.
    """
    corner = torch.randint(-side_px // 10, side_px, (count, 2), generator=rng)
    extent = torch.randint(least_px, side_px // 3, (count, 2), generator=rng)
    return torch.cat([corner, corner + extent], 1).float()


def test_matching_holds_no_more_ious_at_once_than_a_strip(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    boxes, anchors = random_boxes(100, 200, 5, rng), random_boxes(1000, 200, 5, rng)
    held = []

    def recorded(some, strip):
        held.append(len(some) * len(strip))
        return box_iou(some, strip)

    monkeypatch.setattr(rpn_module, "box_iou", recorded)
    monkeypatch.setattr(rpn_module, "ANCHORS_PER_STRIP", 5)
    matcher = Matcher(0.7, 0.3, True)
    assert torch.equal(match_anchors(matcher, boxes, anchors), matcher(box_iou(boxes, anchors)))
    assert max(held) <= 500 and len(held) >= 200


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 30),
    st.integers(1, 300),
    st.sampled_from([12, 40, 200]),
    st.sampled_from([(0.7, 0.3), (0.5, 0.5), (0.5, 0.0)]),
    st.booleans(),
    st.booleans(),
)
def test_matches_equal_torchvisions(
    seed, cells, num_anchors, side_px, thresholds, low_quality, in_order
):
    rng = torch.Generator().manual_seed(seed)
    boxes, anchors = (
        random_boxes(cells, side_px, 1, rng),
        random_boxes(num_anchors, side_px, 0, rng),
    )
    if in_order:
        anchors = anchors[anchors[:, 1].argsort()]
    matcher = Matcher(*thresholds, allow_low_quality_matches=low_quality)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpn_module, "ANCHORS_PER_STRIP", 16)
        found = match_anchors(matcher, boxes, anchors)
    assert torch.equal(found, matcher(box_iou(boxes, anchors)))


def test_a_box_out_of_every_anchors_reach_keeps_all_matches_as_torchvisions_does():
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    boxes, anchors = (
        torch.tensor([[0.0, 0, 4, 4], [90, 90, 99, 99]]),
        torch.tensor([[0.0, 0, 4, 9], [2, 2, 9, 9], [50, 0, 60, 9]]),
    )
    assert (
        match_anchors(matcher, boxes, anchors).tolist()
        == matcher(box_iou(boxes, anchors)).tolist()
        == [0, 0, 0]
    )


@pytest.mark.parametrize("cells", [0, 1, 300])
def test_targets_of_a_models_anchors_equal_torchvisions(cells):
    rpn = build_model(RunConfig(anchor_ratios=(0.25, 0.5, 1.0, 3.0))).rpn
    features = [torch.zeros(1, 1, 256 // stride, 256 // stride) for stride in (4, 8, 16, 32, 64)]
    anchors = rpn.anchor_generator(ImageList(torch.zeros(1, 3, 256, 256), [(256, 256)]), features)
    assert len(anchors[0]) > 2 * rpn_module.ANCHORS_PER_STRIP
    boxes = random_boxes(cells, 190, 8, torch.Generator().manual_seed(0)).clamp(min=0)
    targets = [{"boxes": boxes[(boxes[:, 2:] - boxes[:, :2] >= 4).all(1)]}]
    labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
    expected_labels, expected = RegionProposalNetwork.assign_targets_to_anchors(
        rpn, anchors, targets
    )
    torch.testing.assert_close([labels, matched], [expected_labels, expected], rtol=0, atol=0)
    assert set(labels[0].tolist()) == {0: {0}, 1: {-1, 0, 1}, 300: {-1, 0, 1}}[cells]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 40),
)
def test_predictions_and_gradients_at_anchors_are_the_whole_heads(
    seed, images, sizes, depth, anchors_per_place, count
):
    torch.manual_seed(seed)
    head = RPNHead(6, anchors_per_place, depth).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    features = [
        torch.randn(images, 6, *size, dtype=torch.float64, requires_grad=True) for size in sizes
    ]
    objectness, deltas = concat_box_prediction_layers(*head(features))
    sampled = torch.randint(len(deltas), (count,))
    expected = objectness[sampled, 0].float(), deltas[sampled].float()
    found = predictions_at(head, features, sampled)
    torch.testing.assert_close(found, expected)
    leaves = [*features, *head.parameters()]
    upstream = [torch.randn_like(output) for output in found]
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
    )


@pytest.mark.parametrize("heads", ["v1", "v2"])
@pytest.mark.parametrize("neck", ["fpn", "none"])
@pytest.mark.parametrize(
    "cells", [(20, 20), (0, 20), (0, 0)], ids=["cells", "an image without", "no cells"]
)
def test_losses_proposals_and_gradients_are_torchvisions(heads, neck, cells):
    torch.manual_seed(0)
    rpn = build_model(RunConfig(heads=heads, neck=neck, anchor_ratios=(0.5, 1.0, 3.0))).train().rpn
    assert len(rpn.head.conv) == {"v1": 1, "v2": 2}[heads]
    images = ImageList(torch.zeros(2, 3, 128, 128), [(128, 96), (100, 128)])
    targets = [
        {"boxes": random_boxes(count, 80, 8, torch.Generator().manual_seed(count)).clamp(min=0)}
        for count in cells
    ]
    results = []
    for forward in (rpn.forward, partial(RegionProposalNetwork.forward, rpn)):
        rng = torch.Generator().manual_seed(0)
        sides = [128 // stride for stride in ((4, 8, 16, 32, 64) if neck == "fpn" else (16,))]
        features = {
            str(side): torch.randn(2, 256, side, side, generator=rng).requires_grad_()
            for side in sides
        }
        rpn.fg_bg_sampler.seeds = [3, 4]
        boxes, losses = forward(images, features, targets)
        gradients = torch.autograd.grad(
            sum(losses.values()), [*features.values(), *rpn.head.parameters()]
        )
        results.append((boxes, losses, gradients))
    (boxes, losses, gradients), (expected_boxes, expected_losses, expected_gradients) = results
    torch.testing.assert_close((boxes, losses), (expected_boxes, expected_losses))
    for found, expected in zip(gradients, expected_gradients, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_two_threads_give_the_same_gradients_every_time():
    """The windows of neighbouring anchors share features, whose gradients are sums: always in one
    order.
    """
    torch.manual_seed(0)
    head = RPNHead(256, 3)
    features = [torch.randn(2, 256, side, side, requires_grad=True) for side in (48, 24, 12, 6, 3)]
    sampled = torch.randint(60, (512,))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        upstream = [torch.randn(512), torch.randn(512, 4)]
        runs = [
            torch.autograd.grad(predictions_at(head, features, sampled), features, upstream)
            for _ in range(10)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(level, first) for run in runs for level, first in zip(run, runs[0], strict=True)
    )


def test_anchors_keep_their_place_under_mixed_precision():
    """torchvision's take the features' dtype: in bfloat16, an anchor from 256 px on stands up to a
    pixel off, from 512 px on two.
    """
    model = build_model(RunConfig()).train()
    images = ImageList(torch.zeros(1, 3, 640, 640), [(640, 640)])
    features = {
        str(level): torch.randn(1, 256, 640 // stride, 640 // stride)
        for level, stride in enumerate((4, 8, 16, 32, 64))
    }
    exact = torch.cat(model.rpn.anchor_generator(images, list(features.values())))
    seen = []
    model.rpn.anchor_generator.register_forward_hook(
        lambda module, inputs, output: seen.append(torch.cat(output))
    )
    with torch.autocast("cpu", torch.bfloat16):
        model.rpn(
            images,
            {name: level.bfloat16() for name, level in features.items()},
            [{"boxes": torch.tensor([[4.0, 6, 20, 30]])}],
        )
    torch.testing.assert_close(seen[0], exact, rtol=0, atol=0)
    assert (exact - exact.bfloat16()).abs().max() >= 2


@pytest.mark.parametrize("v2", [False, True], ids=["one convolution", "two"])
def test_mixed_precision_keeps_the_heads_gradients(v2):
    """They are those of 32 bit, rounded, although the proposals' predictions are made without a
    graph.
    """
    torch.manual_seed(0)
    model = build_model(RunConfig(heads="v2" if v2 else "v1")).train()
    assert len(model.rpn.head.conv) == 1 + v2
    images = ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)])
    features = {
        str(level): torch.randn(1, 256, 64 // stride, 64 // stride)
        for level, stride in enumerate((4, 8, 16, 32, 64))
    }
    gradients = []
    for precision in (None, torch.bfloat16):
        model.rpn.fg_bg_sampler.seeds = [3]
        with torch.autocast("cpu", precision, enabled=precision is not None):
            _, losses = model.rpn(images, features, [{"boxes": torch.tensor([[4.0, 6, 20, 30]])}])
        model.zero_grad()
        sum(losses.values()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.rpn.head.parameters()])
    for exact, rounded in zip(*gradients, strict=True):
        assert exact.norm() > 0 and (exact - rounded).norm() < 0.05 * exact.norm()
