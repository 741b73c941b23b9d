"""The named augmentation recipes. A step that moves cells moves image and label maps together.

Images are sampled bilinearly, label maps by nearest neighbour: ids are never mixed (they pass
through float32, which is exact below 2^24). No transform folds or tears a cell; a cell can fall
into pieces only where it is a pixel or two thin or meets the image's edge. All random numbers come
from torch's default generator.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

BILINEAR, NEAREST = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.NEAREST_EXACT


class QuarterTurn(v2.Transform):
    """A turn by 0, 90, 180 or 270 degrees, equally likely: no direction in tissue is "up"."""

    def make_params(self, flat_inputs):
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt, params):
        turned = torch.rot90(inpt, params["turns"], (-2, -1)).contiguous()  # later steps are faster
        return tv_tensors.wrap(turned, like=inpt)


class OnWhite(v2.Transform):
    """Applies ``inner``; pixels from outside the image become white and unlabelled.

    White is the bare glass of a slide; mirrored tissue would show cells without labels. ``inner``
    fills with 0. So it gets the image's negative, in which 0 means white. (torchvision's ``fill``
    would leave a grey line along the edge.)
    """

    def __init__(self, inner: v2.Transform):
        super().__init__()
        self.inner = inner

    def forward(self, image, label_maps):
        image, label_maps = self.inner(v2.functional.invert(image), label_maps)
        return v2.functional.invert(image), label_maps


class ResizedCrop(v2.Transform):
    """A crop at a random position, stretched back to the size of the image.

    torchvision's ``RandomResizedCrop`` has one fixed output size, chooses the crop's shape without
    regard to the image's, and samples masks half a pixel off.

    Args:
        area: range of the crop's area as a share of the image's, sampled uniformly; up to 1.
        ratio: range of the crop's width / height, divided by the image's, sampled uniformly on a
            log scale. A side longer than the image's is cut to it; area and ratio stay in their
            ranges if ``ratio`` contains 1.
    """

    def __init__(self, area: tuple[float, float], ratio: tuple[float, float]):
        super().__init__()
        self.area, self.ratio = area, ratio

    def make_params(self, flat_inputs):
        size = v2.query_size(flat_inputs)
        area, ratio = _uniform(*self.area), math.exp(_uniform(*map(math.log, self.ratio)))
        shares = zip((area / ratio, area * ratio), size, strict=True)
        height, width = (max(round(min(math.sqrt(share), 1) * side), 1) for share, side in shares)
        top = int(torch.randint(size[0] - height + 1, ()))
        left = int(torch.randint(size[1] - width + 1, ()))
        return {"top": top, "left": left, "height": height, "width": width, "size": list(size)}

    def transform(self, inpt, params):
        params["interpolation"] = BILINEAR if isinstance(inpt, tv_tensors.Image) else NEAREST
        resized = v2.functional.resized_crop(inpt.as_subclass(Tensor), **params)
        return tv_tensors.wrap(resized, like=inpt)


class Displacement(v2.Transform):
    """Base class: takes each pixel from where the parameter ``displacement`` points.

    ``displacement``: float [1, H, W, 2], x and y in halves of the image's sides.
    """

    def transform(self, inpt, params):
        return v2.functional.elastic(inpt, params["displacement"])


class ElasticDistortion(Displacement):
    """A smooth random displacement: cubic B-splines over a grid of control points.

    It is one to one, so that no cell is folded or torn, if every control point moves by less than
    0.48 of the grid's spacing (Choi and Lee, Injectivity conditions of 2D and 3D uniform cubic
    B-spline functions, Graphical Models 62, 2000).

    Args:
        displacement_px: a control point moves by up to this in x and in y, sampled uniformly; the
            root mean square of the pixels' moves in x (or y) is a quarter of it.
        spacing_px: distance of neighbouring control points.

    Raises:
        ValueError: ``displacement_px`` is so large that cells could fold.
    """

    def __init__(self, displacement_px: float, spacing_px: int):
        super().__init__()
        if displacement_px >= 0.48 * spacing_px:
            bound = f"must be below 0.48 of spacing_px, which is {spacing_px}, or cells could fold"
            raise ValueError(f"displacement_px is {displacement_px}, but {bound}")
        self.displacement_px, self.spacing_px = displacement_px, spacing_px

    def make_params(self, flat_inputs):
        height, width = v2.query_size(flat_inputs)
        rows, columns = self._weights(height), self._weights(width)
        moves = (2 * torch.rand(2, rows.shape[1], columns.shape[1]) - 1) * self.displacement_px
        sides = torch.tensor([width, height]) / 2
        return {"displacement": (rows @ moves @ columns.T).permute(1, 2, 0)[None] / sides}

    def _weights(self, length: int) -> Tensor:
        """The weight of each control point in each pixel's move on one axis: [pixels, points]."""
        points = torch.arange((length - 1) // self.spacing_px + 4)
        distance = (torch.arange(length)[:, None] / self.spacing_px + 1 - points).abs()
        return ((2 - distance).clamp(0) ** 3 - 4 * (1 - distance).clamp(0) ** 3) / 6


class GridDistortion(Displacement):
    """Stretches or squeezes each column and row of a grid; the image's edges stay where they are.
    Same as albumentations' ``GridDistortion`` (normalised).

    Args:
        steps: number of columns, and of rows.
        limit: below 1. Each width (height) is multiplied by a factor sampled uniformly from 1 +-
            ``limit``; then all are scaled to fit the image.
    """

    def __init__(self, steps: int, limit: float):
        super().__init__()
        self.steps, self.limit = steps, limit

    def make_params(self, flat_inputs):
        height, width = v2.query_size(flat_inputs)
        x, y = self._shifts(width), self._shifts(height)
        return {"displacement": torch.stack(torch.broadcast_tensors(x, y[:, None]), -1)[None]}

    def _shifts(self, length: int) -> Tensor:
        """The displacement of each pixel on one axis, linear between the grid's lines."""
        widths = 1 + (2 * torch.rand(self.steps) - 1) * self.limit
        ends = widths.cumsum(0) / widths.sum()
        moves = nn.functional.pad(ends[:-1] - torch.arange(1, self.steps) / self.steps, (1, 1))
        position = torch.linspace(0, self.steps, length)
        step = position.long().clamp(max=self.steps - 1)
        moves = torch.lerp(moves[step], moves[step + 1], position - step)
        return moves * (2 * (length - 1) / length)


class GaussianNoise(v2.Transform):
    """Adds normal noise to each channel of each pixel; ``std`` is on a scale of 0 to 1.

    On uint8 torchvision's ``GaussianNoise`` rounds towards 0, which turns a standard deviation of
    0.02 into 0.0185.
    """

    def __init__(self, std: float):
        super().__init__()
        self.std = std

    def transform(self, inpt, params):
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        noisy = torch.randn(inpt.shape).mul_(255 * self.std).to(inpt.device).add_(inpt)
        return tv_tensors.wrap(noisy.round_().clamp_(0, 255).to(torch.uint8), like=inpt)


class Gamma(v2.Transform):
    """Raises intensities (on a scale of 0 to 1) to a power sampled uniformly from a range."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs):
        return {"gamma": _uniform(self.low, self.high)}

    def transform(self, inpt, params):
        is_image = isinstance(inpt, tv_tensors.Image)
        return v2.functional.adjust_gamma(inpt, **params) if is_image else inpt


def _uniform(low: float, high: float) -> float:
    return torch.empty(()).uniform_(low, high).item()


def _with(p: float, *transforms: v2.Transform) -> v2.RandomApply:
    """Applies, with probability ``p``, one of the transforms, each equally likely."""
    one = transforms[0] if len(transforms) == 1 else v2.RandomChoice(transforms)
    return v2.RandomApply([one], p)


FLIPS = [v2.RandomHorizontalFlip(p=0.5), v2.RandomVerticalFlip(p=0.5)]
BASIC = [*FLIPS, _with(0.5, QuarterTurn())]
ROTATION = OnWhite(v2.RandomRotation((-15, 15), BILINEAR, fill=None))
ZOOM = OnWhite(v2.RandomAffine(0, scale=(0.85, 1.15), interpolation=BILINEAR, fill=None))

# The arguments of ColorJitter are the ranges of brightness, contrast, saturation and hue.
RECIPES = {
    "none": [],
    "flips": FLIPS,
    "flips_turns_stain": [FLIPS[0], QuarterTurn(), _with(0.8, v2.ColorJitter(0.2, 0.2, 0.2, 0.04))],
    # Only the sorts of steps and the 15 degrees are published. The probabilities are torchvision's
    # defaults; the colour changes are our choice, of moderate strength.
    "flip_colour_rotation": [FLIPS[0], v2.ColorJitter(0.2, 0.2, 0.2, 0.05), ROTATION],
    # As published, except for two guesses at the colour jitter: its numbers are taken in the order
    # of the names, and its illegible probability as 0.3, the most frequent one in that table.
    "joint_full": [
        v2.RandomHorizontalFlip(p=0.5),
        v2.RandomVerticalFlip(p=0.3),
        _with(0.4, ROTATION),
        _with(0.3, ZOOM),
        _with(0.3, ResizedCrop(area=(0.8, 1.0), ratio=(0.9, 1.1))),
        _with(0.3, v2.ColorJitter(0.3, 0.3, 0.3, 0.15)),
        _with(0.2, GaussianNoise(std=0.02)),
        _with(0.2, v2.GaussianBlur(3, sigma=(0.1, 1.0))),
        _with(0.3, Gamma(0.8, 1.2)),
    ],
    # Only the steps are published, no numbers. The numbers are albumentations' defaults where they
    # can be used: probability 0.5 for each step, or for one of several; quarter turns include 0;
    # brightness, contrast, saturation +-0.2; hue +-20 of 180; 5 grid steps +-0.3; the blur of
    # kernels of 3 to 7 px. Its default elastic step (alpha 1, sigma 50) has no visible effect;
    # ours deforms at the scale of cells.
    "basic": BASIC,
    "full": [
        *BASIC,
        _with(0.5, v2.ColorJitter(0.2, 0.2), v2.ColorJitter(0.2, 0.2, 0.2, 0.11)),
        _with(0.5, OnWhite(ElasticDistortion(8, spacing_px=24)), GridDistortion(5, limit=0.3)),
        _with(0.5, v2.GaussianBlur(7, sigma=(0.8, 1.4))),
    ],
}


def augment(
    image: Tensor, label_maps: Tensor, recipe: Sequence[v2.Transform], seed: int
) -> tuple[Tensor, Tensor]:
    """Apply a recipe's steps to an image and its label maps. All random choices depend on ``seed``
    alone, and torch's generator is left as it was. A quarter turn may swap the sides. The tests
    compare the label maps with torchvision's transforms of one mask per instance.

    Args:
        image: uint8 [3, H, W]; at least 4 px a side if the recipe blurs.
        label_maps: int32 [K, H, W], ids below 2^24.
        recipe: one of ``RECIPES``.
        seed: in [0, 2^63).
    """
    image, label_maps = tv_tensors.Image(image), tv_tensors.Mask(label_maps)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for step in recipe:
            image, label_maps = step(image, label_maps)
    return image.as_subclass(Tensor), label_maps.as_subclass(Tensor)
