"""What a GPU is given and gives back, by a pretended one; ``TestOnAGpu`` in ``test_engine.py`` is
for a real one.
"""

import numpy as np
import pytest
import torch
from pretended_gpu import GPU, pretended_gpu
from tiny_training import build_tiny

from bench import gpu as bench_gpu
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.augment import RECIPES, GaussianNoise, augment
from cellseg_helpers.data.drawn import draw_tissue
from cellseg_helpers.data.samples import make_target
from cellseg_helpers.engine import to_device
from cellseg_helpers.inference import predict


def scene(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    image, label_maps = draw_tissue(np.random.default_rng(seed), 128, 144)
    return torch.from_numpy(image), make_target(torch.from_numpy(label_maps)) | {"seed": seed}


def test_a_pretended_gpu_refuses_tensors_of_the_cpu():
    with pretended_gpu():
        there, here = torch.arange(6, device="cuda"), torch.arange(6)
        assert there.device == GPU and (there * 2 + 1).sum().item() == 36
        assert there.to(here.device).equal(here) and here.to(GPU).equal(there)
        assert (
            torch.zeros_like(here, device="cuda").device
            == here.new_zeros(6, device="cuda").device
            == GPU
        )
        assert there[here].tolist() == here.tolist()  # a GPU takes indices from the CPU
        mixes = [
            lambda: there + here,
            lambda: there + there.new_zeros(6, device="cpu"),
            lambda: here[there],
            lambda: torch.cat([there, here]),
            lambda: there.index_put_([there], here),
        ]
        for mix in mixes:
            with pytest.raises(RuntimeError, match="one on the CPU"):
                mix()
        with pytest.raises(TypeError, match="cannot be an array"):
            np.asarray(there)


@pytest.mark.parametrize("mask_batch", [0, 8])
def test_a_training_step(mask_batch):
    """Losses and gradients are those of the CPU, but for RoIAlign, here torchvision's, and for
    torchvision's NMS, which goes another way on a GPU, so that some proposals without cells are
    others. One of the images has no cell."""
    torch.manual_seed(0)
    model = build_tiny(RunConfig(mask_batch_size_per_image=mask_batch)).train()
    empty = make_target(torch.zeros(4, 100, 90, dtype=torch.int32)) | {"seed": 3}
    scenes = [*map(scene, (0, 1)), (torch.full((3, 100, 90), 240, dtype=torch.uint8), empty)]
    images, targets = map(list, zip(*scenes, strict=True))

    def step(device: str) -> tuple[dict[str, float], list[torch.Tensor]]:
        losses = model(*to_device(images, targets, torch.device(device)))
        assert {loss.device.type for loss in losses.values()} == {device}
        gradients = torch.autograd.grad(sum(losses.values()), list(model.parameters()))
        return {name: loss.item() for name, loss in losses.items()}, [
            gradient.cpu() for gradient in gradients
        ]

    losses, gradients = step("cpu")
    with pretended_gpu():
        model.to("cuda")
        found, found_gradients = step("cuda")
    assert found == pytest.approx(losses, rel=1e-3)
    for one, other in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.01 * other.abs().max())


def test_prediction():
    torch.manual_seed(0)
    model = build_tiny(RunConfig())
    model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 20
    image, _ = scene(0)
    expected = predict(model, image, 96, 32, 0.5).to_coco()
    with pretended_gpu():
        found = predict(model.to("cuda"), image, 96, 32, 0.5).to_coco()
        assert {parameter.device for parameter in model.parameters()} == {GPU}
    assert len(found) == len(expected) > 20
    for name in ("category_id", "segmentation"):
        assert [cell[name] for cell in found] == [cell[name] for cell in expected]
    np.testing.assert_allclose(
        [cell["bbox"] for cell in found], [cell["bbox"] for cell in expected], atol=1e-3
    )
    np.testing.assert_allclose(
        [cell["score"] for cell in found], [cell["score"] for cell in expected], atol=1e-5
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", range(3))
def test_augmentation(recipe, seed, monkeypatch):
    """Of ``bench/gpu.py``: the boxes, classes and ids that a worker makes, and the pixels but for
    how the CPU blurs bytes.
    """
    monkeypatch.setattr(bench_gpu, "RECIPE", recipe)
    monkeypatch.setattr(bench_gpu, "DEVICE", torch.device("cuda"))
    image, target = scene(seed)
    label_maps = target["label_maps"]
    expected, expected_maps = augment(image, label_maps, RECIPES[recipe], seed)
    with pretended_gpu():
        drawn = {"label_maps": label_maps, "image_id": 1, "seed": 1, "recipe_seed": seed}
        [found], [found_target] = bench_gpu.augment_on_device(([image], [drawn]))
        assert found.device == GPU and (found.cpu().int() - expected.int()).abs().max() <= 1
        for name, value in make_target(expected_maps).items():
            assert found_target[name].cpu().equal(value), name


def test_noise():
    """A step that ``joint_full`` takes one time in five."""
    image, target = scene(0)
    expected, _ = augment(image, target["label_maps"], [GaussianNoise(0.02)], 5)
    with pretended_gpu():
        found, _ = augment(
            image.to("cuda"), target["label_maps"].to("cuda"), [GaussianNoise(0.02)], 5
        )
        assert found.device == GPU and found.cpu().equal(expected) and not expected.equal(image)
