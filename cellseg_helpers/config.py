"""Every setting of a run as one flat, checked record, and the guard that each notebook runs on its
parameters.
"""

import difflib
import hashlib
import json
import math
import os
import shutil
import tempfile
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
)
BACKBONES = (*RESNETS, "resnet50_fpn_v2")
CHOICES = {
    "scale": ("quick", "sample", "full"),
    "instance_reading": ("pixel_values", "connected_components"),
    "split": ("auto", "patient", "random", "all"),
    "truth_reading": ("pixel_values", "connected_components"),
    "augmentation": (
        "none",
        "flips",
        "flips_turns_stain",
        "flip_colour_rotation",
        "joint_full",
        "basic",
        "full",
    ),
    "normalization": ("imagenet", "data", "imagenet_twice", "imagenet_of_0_255"),
    "backbone": BACKBONES,
    "neck": ("fpn", "none"),
    "attention": ("none", "cbam"),
    "heads": ("auto", "v1", "v2"),
    "optimizer": ("adam", "adamw", "sgd"),
    "scheduler": ("none", "cosine", "plateau"),
    "monitor": ("validation_ap50", "validation_loss", "loss"),
    "accelerator": ("auto", "cpu", "cuda"),
    "precision": ("auto", "32", "bf16-mixed", "16-mixed"),
}
POSITIVE = (
    "batch_size", "epochs", "validation_every_epochs", "learning_rate", "detections_per_image", "devices", "plateau_patience",
    "rpn_batch_size_per_image", "box_batch_size_per_image", "rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_train",
    "rpn_post_nms_top_n_test", "mask_threshold", "iou_threshold",
)  # fmt: skip
FRACTIONS = (
    "validation_fraction", "class_balance", "momentum", "plateau_factor", "rpn_nms_thresh", "rpn_fg_iou_thresh",
    "rpn_bg_iou_thresh", "box_score_thresh", "box_nms_thresh", "box_fg_iou_thresh", "box_bg_iou_thresh", "mask_threshold",
    "score_threshold", "iou_threshold",
)  # fmt: skip
CHECKED = "_parameters_checked"
NOT_PART_OF_A_RUN = ("run_name", "num_workers", "keep_checkpoint")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run's settings. The names are those of the notebook's parameters cell, of the YAML files
    and of ``settings.json``.

    The defaults are the quick scale on drawn tissue. Lengths are in px, thresholds and fractions in
    [0, 1]; the names that torchvision has are torchvision's.

    Raises:
        ValueError: a value that no run could use, named with what is allowed.
    """

    run_name: str = ""
    scale: str = "quick"

    data: str = "drawn"
    instance_reading: str = "pixel_values"
    truth_reading: str = "pixel_values"
    min_instance_area_px: int = 0
    skip_faulty_images: bool = False
    split: str = "auto"
    validation_fraction: float = 0.25
    split_seed: int = 0

    crop_size_px: int = 192
    class_balance: float = 0.7
    drop_cut_cells: bool = True
    augmentation: str = "flips"
    boxes_miss_last_pixel: bool = False

    backbone: str = "resnet18"
    neck: str = "fpn"
    attention: str = "none"
    heads: str = "auto"
    weights: str = "none"
    trainable_backbone_layers: int = 3
    normalization: str = "imagenet"
    min_size: int = 0
    max_size: int = 0
    anchor_sizes: tuple[float, ...] = (8, 16, 32, 64, 128)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_pre_nms_top_n_train: int = 1000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 500
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_thresh: float = 0.7
    rpn_fg_iou_thresh: float = 0.7
    rpn_bg_iou_thresh: float = 0.3
    rpn_batch_size_per_image: int = 256
    box_score_thresh: float = 0.05
    box_nms_thresh: float = 0.5
    box_fg_iou_thresh: float = 0.5
    box_bg_iou_thresh: float = 0.5
    box_batch_size_per_image: int = 128
    mask_batch_size_per_image: int = 4
    detections_per_image: int = 300

    epochs: int = 3
    steps_per_epoch: int = 66
    validation_every_epochs: int = 1
    validation_updates_norms: bool = False
    keep_every_epoch: bool = False
    keep_checkpoint: bool = True
    batch_size: int = 2
    optimizer: str = "adamw"
    learning_rate: float = 5e-4
    min_learning_rate: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    scheduler: str = "cosine"
    warmup_steps: int = 20
    monitor: str = "validation_ap50"
    plateau_factor: float = 0.1
    plateau_patience: int = 3
    early_stopping_patience: int = 0
    gradient_clip_norm: float = 10.0
    precision: str = "auto"
    accelerator: str = "auto"
    devices: int = 1
    num_workers: int = 0
    seed: int = 0

    tile_size_px: int = 0
    tile_overlap_px: int = 64
    mask_threshold: float = 0.5
    score_threshold: float = 0.5
    iou_threshold: float = 0.5

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(
                self, field.name, _typed(field.name, getattr(self, field.name), field.type)
            )
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"unknown {name} {value!r}; one of {', '.join(choices)}{_did_you_mean(value, choices)}"
                )
        for name in FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must lie between 0 and 1")
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be above 0")
        for field in fields(self):
            if field.type in (int, float) and getattr(self, field.name) < 0:
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)}, but must not be negative"
                )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}, but must lie strictly between 0 and 1"
            )
        if self.plateau_factor == 1:
            raise ValueError(
                "plateau_factor is 1.0, but must be below 1: the learning rate is multiplied by it"
            )
        for part in ("rpn", "box"):
            background, foreground = (
                getattr(self, f"{part}_bg_iou_thresh"),
                getattr(self, f"{part}_fg_iou_thresh"),
            )
            if background > foreground:
                raise ValueError(
                    f"{part}_bg_iou_thresh is {background}, but must not be above {part}_fg_iou_thresh, {foreground}"
                )
        if self.precision == "16-mixed" and self.accelerator == "cpu":
            raise ValueError(
                "precision '16-mixed' needs a GPU; use 'bf16-mixed' or '32' with accelerator 'cpu'"
            )
        if not self.weights:
            raise ValueError(
                "weights is empty; one of none, imagenet, coco, or the path of a weights file"
            )
        if self.trainable_backbone_layers > 5:
            raise ValueError(
                f"trainable_backbone_layers is {self.trainable_backbone_layers}, but a backbone has 5 layers"
            )
        for name in ("anchor_sizes", "anchor_ratios"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(
                    f"{name} is {list(getattr(self, name))}, but needs at least one number, all above 0"
                )
        if self.neck == "fpn" and len(self.anchor_sizes) != 5:
            raise ValueError(
                f"anchor_sizes has {len(self.anchor_sizes)} values, but the feature pyramid has 5 levels, one size each"
            )
        if self.neck == "none" and self.backbone == "resnet50_fpn_v2":
            raise ValueError(
                "neck 'none' has no feature pyramid, but backbone 'resnet50_fpn_v2' is one; use backbone 'resnet50' with it"
            )
        if bool(self.min_size) != bool(self.max_size) or self.max_size < self.min_size:
            raise ValueError(
                f"min_size is {self.min_size} and max_size {self.max_size}; give both, min_size <= max_size, "
                "or 0 for both to keep the images' own size"
            )
        if self.tile_size_px and not 0 < self.tile_overlap_px < self.tile_size_px:
            raise ValueError(
                f"tile_overlap_px is {self.tile_overlap_px}, but must be above 0 and below tile_size_px, {self.tile_size_px}"
            )
        if any(character in self.run_name for character in "/\\") or self.run_name in (".", ".."):
            raise ValueError(f"run_name {self.run_name!r} must be a plain folder name")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """A config from names and values; the others keep their defaults.

        Raises:
            ValueError: a name that no setting has, with the nearest one, or a value out of type or
                range.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(
                    f"unknown parameter {name!r}{_did_you_mean(name, known) or '; see RunConfig for all names'}"
                )
        return cls(**values)

    @classmethod
    def from_yaml(cls, *paths: str | Path) -> "RunConfig":
        """A config from parameter files; a later file wins. YAML 1.1 reads ``1e-4`` as text: write
        ``1.0e-4``.
        """
        import yaml

        merged: dict[str, Any] = {}
        for path in paths:
            try:
                values = yaml.safe_load(resolve_path(path).read_text()) or {}
            except (OSError, yaml.YAMLError) as error:
                raise ValueError(
                    f"parameter file {path} cannot be read: {' '.join(str(error).split())}"
                ) from None
            if not isinstance(values, dict):
                raise ValueError(
                    f"parameter file {path} must hold `name: value` lines, not a {type(values).__name__}"
                )
            merged |= values
        return cls.from_dict(merged)

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any]) -> "RunConfig":
        """The config of a notebook whose parameters are run settings; call it with ``globals()``
        right after the parameters.

        Raises:
            ValueError: see ``from_dict``; every plain value in the namespace counts as a parameter.
        """
        config = cls.from_dict(
            _parameters(namespace, [field.name for field in fields(cls)])
        ).named()
        namespace[CHECKED] = True
        return config

    def named(self) -> "RunConfig":
        """The same settings with a ``run_name``; where it is empty, one made from the settings."""
        if self.run_name:
            return self
        settings = {
            name: value for name, value in self.to_dict().items() if name not in NOT_PART_OF_A_RUN
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return replace(self, run_name=f"{self.scale}-{self.backbone}-{digest}")

    def to_dict(self) -> dict[str, Any]:
        """Plain names and values, with lists for tuples, as ``settings.json`` and YAML hold them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Settings that make this another run than ``other``: name -> (other's value, this one's)."""
        mine = self.to_dict()
        names = [name for name in {**mine, **other} if name not in NOT_PART_OF_A_RUN]
        return {
            name: (other.get(name), mine.get(name))
            for name in names
            if other.get(name) != mine.get(name)
        }


def check_parameters(namespace: dict[str, Any], **types_by_name: type | tuple) -> dict[str, Any]:
    """Check a notebook's own parameters; call it with ``globals()`` right after the parameters
    cell.

    Args:
        namespace: the notebook's globals; every plain value in it counts as a parameter.
        types_by_name: the parameters that the notebook has, with their types; (type, least,
            greatest) also bounds the value, or each number of a list, (list, least, greatest,
            length) its length, too. Names that ``RunConfig`` has too are held to its range.

    Returns:
        name -> value, in the order of ``types_by_name``.

    Raises:
        ValueError: an unknown name (with the nearest known one), a missing one, or a value out of
            type or range.
    """
    found = _parameters(namespace, list(types_by_name))
    for name in found:
        if name not in types_by_name:
            hint = (
                _did_you_mean(name, types_by_name)
                or f"; this notebook has {', '.join(types_by_name)}"
            )
            raise ValueError(f"unknown parameter {name!r}{hint}")
    for name in types_by_name:
        if name not in found:
            raise ValueError(f"parameter {name!r} has no value; the parameters cell must set it")
    kinds = {
        name: kind if isinstance(kind, tuple) else (kind,) for name, kind in types_by_name.items()
    }
    checked = {name: _typed(name, found[name], kind) for name, (kind, *_) in kinds.items()}
    for name, (_, *bounds) in kinds.items():
        if bounds:
            _check_bounds(name, checked[name], *bounds)
    RunConfig(
        **{name: value for name, value in checked.items() if name in RunConfig.__dataclass_fields__}
    )
    namespace[CHECKED] = True
    return checked


def resolve_path(path: str | Path) -> Path:
    """An absolute path; a relative one stands under the repository's root, whatever the working
    folder.
    """
    return ROOT / Path(path).expanduser()


@contextmanager
def replacing(path: Path, folder: bool = False) -> Iterator[Path]:
    """A temporary file (or empty folder) beside ``path``. It becomes ``path``, a file with its
    bytes on disk, when the block ends; after an error ``path`` is as it was before.

    Raises:
        OSError: it cannot be written, or a folder that is not empty is in the way of ``folder``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    else:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o755 if folder else 0o644)
        if not folder:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def one_line(error: object, limit: int = 120) -> str:
    """An error's text in one line of at most ``limit`` characters; its type's name if it has none."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:limit] or type(error).__name__


def _parameters(namespace: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """The plain values of a notebook. Once checked, a live kernel also holds later cells' results:
    then only likely typos count.
    """
    shell_names = {"In", "Out", "exit", "quit"}
    found = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in shell_names
        and not callable(value)
        and not isinstance(value, types.ModuleType)
    }
    if CHECKED in namespace:
        return {
            name: value
            for name, value in found.items()
            if difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        }
    return found


def _typed(name: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind`` where nothing is lost (an int for a float, a list for a tuple), else a
    ValueError.
    """
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(
                f"{name} is {value!r}, but must be a list, such as [8, 16, 32]; -p cannot pass lists, -y and -f can"
            )
        return tuple(_typed(name, item, get_args(kind)[0]) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if name == "precision" and value == 32 and not isinstance(value, bool):
        value = "32"
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, but must be a finite number")
        return value
    hint = ""
    if kind is float and isinstance(value, str):
        hint = "; YAML reads 1e-4 as text, write 1.0e-4"
    raise ValueError(f"{name} is {value!r}, but must be of type {kind.__name__}{hint}")


def _check_bounds(name: str, value: Any, least: float, greatest: float, length: int = 0) -> None:
    numbers = value if isinstance(value, list) else [value]
    is_number = [
        isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers
    ]
    right_length = len(numbers) == length if length else bool(numbers)
    if (
        not right_length
        or not all(is_number)
        or not all(least <= number <= greatest for number in numbers)
    ):
        each = f"hold {length or 'one or more'} numbers, each" if isinstance(value, list) else "lie"
        raise ValueError(f"{name} is {value!r}, but must {each} between {least:g} and {greatest:g}")


def _did_you_mean(name: Any, known) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
