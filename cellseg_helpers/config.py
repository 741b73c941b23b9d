"""Every setting of a run as one flat, checked record, and the check of each notebook's parameters.

Dataclasses, not pydantic: importing pydantic and building this record with it adds 0.11 s to every
notebook, job and worker.
"""

import difflib
import hashlib
import json
import math
import os
import tempfile
import types
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
NOT_PART_OF_A_RUN = ("run_name", "num_workers", "keep_checkpoint")
CHECKED = "_parameters_checked"  # a notebook's global once its parameters are checked

# A type, what its values must also be, and the test of that.
Count = Annotated[int, "must not be negative", lambda value: value >= 0]
Positive = Annotated[int, "must be above 0", lambda value: value > 0]
Layers = Annotated[int, "a backbone has 5 layers", lambda value: 0 <= value <= 5]
Amount = Annotated[float, "must not be negative", lambda value: value >= 0]
Rate = Annotated[float, "must be above 0", lambda value: value > 0]
Stride = Annotated[int, "must be 2 or 4", lambda value: value in (2, 4)]
Share = Annotated[float, "must lie between 0 and 1", lambda value: 0 <= value <= 1]
OpenShare = Annotated[float, "must lie strictly between 0 and 1", lambda value: 0 < value < 1]
Threshold = Annotated[float, "must be above 0 and at most 1", lambda value: 0 < value <= 1]
SOME = "needs at least one number, all above 0"
Numbers = Annotated[tuple[float, ...], SOME, lambda value: min(value, default=0) > 0]
Anchors = Annotated[
    tuple[float, ...] | Literal["auto"], SOME, lambda v: v == "auto" or min(v, default=0) > 0
]

Scale = Literal["quick", "sample", "full"]
Reading = Literal["pixel_values", "connected_components"]
Split = Literal["auto", "patient", "random", "all"]
Augmentation = Literal[
    "none", "flips", "flips_turns_stain", "flip_colour_rotation", "joint_full", "basic", "full"
]
Normalization = Literal["imagenet", "data", "imagenet_twice", "imagenet_of_0_255"]
Backbone = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "resnet50_fpn_v2",
]  # fmt: skip
Neck = Literal["fpn", "none"]
Attention = Literal["none", "cbam"]
Heads = Literal["auto", "v1", "v2"]
MaskGeometry = Literal["exact", "torchvision"]
Optimizer = Literal["adam", "adamw", "sgd"]
Scheduler = Literal["none", "cosine", "plateau"]
Monitor = Literal["validation_ap50", "validation_loss", "loss"]
Accelerator = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "32", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run's settings: the names of 02's parameters cell, of the YAML files and of
    ``settings.json``. Defaults are the quick scale on drawn tissue; torchvision's names where it
    has one. A unit is in the name or the comment.

    Raises:
        ValueError: a value that no run could use; it says what is allowed.
    """

    run_name: str = ""  # folder under outputs/runs; "" makes a name from the settings
    scale: Scale = "quick"  # quick, sample or full: a label in every row of the run's tables

    # Data
    data: str = "drawn"  # folder in the HW3 layout, COCO .json file, or "drawn": embedded tissue
    instance_reading: Reading = "pixel_values"  # or "connected_components" of a class's pixels
    truth_reading: Reading = "pixel_values"  # the same, for the cells that scores count
    min_instance_area_px: Count = 0  # smaller instances are left out of training; 0 = none
    skip_faulty_images: bool = False  # leave faulty images out instead of stopping
    split: Split = "auto"  # patient, random (by image), auto (patient if all are known), all
    validation_fraction: OpenShare = 0.25  # share of the patients (or images) in validation
    folds: Count = 0  # validation sides of a cross-validation; 0 = one, of validation_fraction
    fold: Count = 0  # the one that validates, from 0
    split_seed: Count = 0  # of the draw of the split

    # Crops and augmentation
    crop_size_px: Count = 192  # side of the training crops, at native resolution; 0 = whole images
    class_balance: Share = 0.7  # share of the crops drawn around a cell of an evenly drawn class
    drop_cut_cells: bool = True  # cells that a crop cuts are no targets
    augmentation: Augmentation = "flips"  # none, flips, flips_turns_stain or one of augment.RECIPES
    boxes_miss_last_pixel: bool = False  # boxes end at a cell's last pixel, not behind it

    # Model
    backbone: Backbone = "resnet18"  # a ResNet or ResNeXt of torchvision, or resnet50_fpn_v2
    neck: Neck = "fpn"  # fpn: a pyramid of five levels; none: one feature map at stride 16
    attention: Attention = "none"  # or "cbam" after each stage of the body
    stem_stride: Stride = 4  # px between neighbours on the body's first map; 2: twice as fine maps
    heads: Heads = "auto"  # torchvision's v1 or v2; auto: v2 for resnet50_fpn_v2, else v1
    head_width: Positive = 256  # channels of pyramid, RPN, mask head; a quarter of the box head's
    weights: str = "none"  # none, imagenet, coco, or the path of a .safetensors or .pth file
    trainable_backbone_layers: Layers = 3  # of 5, from the end; only loaded layers are ever frozen
    normalization: Normalization = "imagenet"  # or "data": statistics of the training images
    min_size: Count = 0  # px, an image's shorter side after resizing; 0 = native size
    max_size: Count = 0  # px, its longest side after resizing; 0 = native size
    anchor_sizes: Anchors = (8, 16, 32, 64, 128)  # px, one or two a level; auto: fit the data
    anchor_ratios: Numbers = (0.5, 1, 2)  # height / width, all at every level

    # Model: region proposals
    rpn_pre_nms_top_n_train: Positive = 1000  # proposals a level before their NMS, in training
    rpn_pre_nms_top_n_test: Positive = 1000  # the same in prediction
    rpn_post_nms_top_n_train: Positive = 500  # proposals an image after their NMS, in training
    rpn_post_nms_top_n_test: Positive = 1000  # the same in prediction
    rpn_nms_thresh: Share = 0.7  # IoU above which NMS drops the lower-scored of two proposals
    rpn_fg_iou_thresh: Share = 0.7  # IoU with a cell from which an anchor counts as that cell
    rpn_bg_iou_thresh: Share = 0.3  # IoU below which it counts as background
    rpn_batch_size_per_image: Positive = 256  # anchors sampled an image for the RPN's losses

    # Model: boxes and masks
    box_score_thresh: Share = 0.05  # detections of a lower score are dropped
    box_nms_thresh: Share = 0.5  # IoU above which NMS drops the lower-scored of a class's boxes
    box_fg_iou_thresh: Share = 0.5  # IoU with a cell from which a proposal counts as that cell
    box_bg_iou_thresh: Share = 0.5  # IoU below which it counts as background
    box_batch_size_per_image: Positive = 128  # proposals sampled an image for the box losses
    mask_geometry: MaskGeometry = "torchvision"  # or exact: pixels are sampled at their centres
    mask_batch_size_per_image: Count = 4  # of them in the mask loss, cells only; 0 = all cells
    detections_per_image: Positive = 300  # at most, in each image (or tile): the highest-scored

    # Training
    epochs: Positive = 3  # each of steps_per_epoch optimizer steps
    steps_per_epoch: Count = 66  # 0 = once over the training images
    validation_every_epochs: Positive = 1  # validates after every so many epochs, and at the end
    validation_updates_norms: bool = False  # the norms also learn from the validation images
    keep_every_epoch: bool = False  # save the weights of every epoch
    keep_checkpoint: bool = True  # a finished run has last.pt, three times the weights' size
    batch_size: Positive = 2  # crops a step and device
    optimizer: Optimizer = "adamw"  # adam, adamw or sgd
    learning_rate: Rate = 5e-4  # after the warm-up
    min_learning_rate: Amount = 0.0  # at the end of the cosine and plateau schedules
    momentum: Share = 0.9  # of sgd
    weight_decay: Amount = 1e-4  # of every optimizer
    scheduler: Scheduler = "cosine"  # none, cosine (by step), plateau (by epoch, on monitor)
    warmup_steps: Count = 20  # linear rise of the learning rate; 0 = starts at the full rate
    monitor: Monitor = "validation_ap50"  # or validation_loss, loss: for best epoch and plateau
    plateau_factor: OpenShare = 0.1  # the plateau schedule multiplies the learning rate by it
    plateau_patience: Positive = 3  # epochs without improvement before it does
    early_stopping_patience: Count = 0  # epochs without improvement that end the run; 0 = never
    gradient_clip_norm: Amount = 10.0  # largest norm of the gradient; 0 = no clipping
    precision: Precision = "auto"  # 32, bf16-mixed, 16-mixed (GPU); auto: bf16-mixed if it is fast
    accelerator: Accelerator = "auto"  # cpu, cuda; auto: a GPU if the machine has one
    devices: Positive = 1  # processes, one a device; more than 1 only outside notebooks
    num_workers: Count = 0  # processes that prepare crops; 0 = the training process does
    seed: Count = 0  # of weights, crops and augmentation

    # Prediction and scores
    tile_size_px: Count = 0  # side of the tiles that an image is predicted in; 0 = the whole image
    tile_overlap_px: Count = 64  # of neighbouring tiles; best a little more than a large cell
    test_time_augmentation: bool = False  # joins three scales, each also mirrored: 7 x the time
    mask_threshold: Threshold = 0.5  # probability from which a pixel belongs to a cell
    score_threshold: Share = 0.5  # for precision, recall, F1 and figures, not for AP
    iou_threshold: Threshold = 0.5  # mask IoU of a match, for precision, recall and F1

    def __post_init__(self):
        for field in fields(self):
            value = _checked(field.name, getattr(self, field.name), field.type)
            object.__setattr__(self, field.name, value)
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        """Sentences on values that do not go together."""
        if any(character in self.run_name for character in "/\\") or self.run_name in (".", ".."):
            yield f"run_name {self.run_name!r} must be a plain folder name"
        if self.folds == 1 or self.fold >= max(self.folds, 1):
            allowed = "folds must be 0 or at least 2, fold below it"
            yield f"folds is {self.folds} and fold {self.fold}; {allowed}"
        if not self.weights:
            yield "weights is empty; one of none, imagenet, coco, or the path of a weights file"
        for part in ("rpn", "box"):
            lower, upper = f"{part}_bg_iou_thresh", f"{part}_fg_iou_thresh"
            below, above = getattr(self, lower), getattr(self, upper)
            if below > above:
                yield f"{lower} is {below}, but must not be above {upper}, {above}"
        if self.precision == "16-mixed" and self.accelerator == "cpu":
            yield "precision '16-mixed' needs a GPU; use 'bf16-mixed' or '32' on a CPU"
        sizes = len(self.anchor_sizes)
        if self.anchor_sizes == "auto":
            if self.neck == "none" or self.min_size:
                yield "anchor_sizes 'auto' needs neck 'fpn' and images at native size, min_size 0"
        elif self.neck == "fpn" and sizes % 5:
            yield (
                f"anchor_sizes has {sizes} values, but the feature pyramid has 5 levels; give 5 "
                "values, or 10 for two a level, and so on"
            )
        if self.neck == "none" and self.stem_stride != 4:
            yield "stem_stride 2 needs neck 'fpn'"
        if self.neck == "none" and self.backbone == "resnet50_fpn_v2":
            yield "neck 'none' needs a backbone without a pyramid, such as 'resnet50'"
        small, large = self.min_size, self.max_size
        if bool(small) != bool(large) or large < small:
            yield (
                f"min_size is {small} and max_size {large}; give both, min_size <= max_size, or 0 "
                "for both to keep the images' own size"
            )
        side, overlap = self.tile_size_px, self.tile_overlap_px
        if side and not 0 < overlap < side:
            allowed = f"above 0 and below tile_size_px, {side}"
            yield f"tile_overlap_px is {overlap}, but must be {allowed}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """A config from names and values; the others have their defaults.

        Raises:
            ValueError: an unknown name (with the nearest known one), or a value out of range.
        """
        _refuse_unknown(values, cls.__dataclass_fields__, "see RunConfig for all names")
        return cls(**values)

    @classmethod
    def from_yaml(cls, *paths: str | Path) -> "RunConfig":
        """A config from parameter files; a later file wins. YAML 1.1 reads ``1e-4`` as text: write
        ``1.0e-4``.
        """
        import yaml

        merged: dict[str, Any] = {}
        for path in paths:
            file = f"parameter file {path}"
            try:
                values = yaml.safe_load(resolve_path(path).read_text()) or {}
            except (OSError, yaml.YAMLError) as error:
                raise ValueError(f"{file} cannot be read: {one_line(error, 1000)}") from None
            if not isinstance(values, dict):
                found = type(values).__name__
                raise ValueError(f"{file} must hold `name: value` lines, not a {found}")
            merged |= values
        return cls.from_dict(merged)

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any]) -> "RunConfig":
        """The named config of a notebook whose parameters are a run's settings, checked as by
        ``from_dict``; call it with ``globals()`` right after the parameters cell.
        """
        config = cls.from_dict(_parameters(namespace, cls.__dataclass_fields__)).named()
        namespace[CHECKED] = True
        return config

    def named(self) -> "RunConfig":
        """The same settings with a ``run_name``: if it is empty, one made from the settings.

        >>> RunConfig(backbone="resnet34").named().run_name
        'quick-resnet34-13c19621'
        """
        if self.run_name:
            return self
        values = self.to_dict()
        for name in NOT_PART_OF_A_RUN:
            del values[name]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
        return replace(self, run_name=f"{self.scale}-{self.backbone}-{digest}")

    def to_dict(self) -> dict[str, Any]:
        """Plain names and values, lists for tuples: as ``settings.json`` and YAML hold them."""
        values = vars(self).items()
        return {name: list(value) if type(value) is tuple else value for name, value in values}

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The settings that differ in two runs: name -> (value in ``other``, value in this one)."""
        mine = self.to_dict()
        return {
            name: (other.get(name), mine.get(name))
            for name in {**mine, **other}
            if name not in NOT_PART_OF_A_RUN and other.get(name) != mine.get(name)
        }


def check_parameters(namespace: dict[str, Any], **kinds: Any) -> dict[str, Any]:
    """A notebook's own parameters, checked; call it with ``globals()`` right after their cell.

    Args:
        namespace: every plain value in it counts as a parameter.
        kinds: name -> type. (type, least, greatest) also bounds the number, or each number of a
            list; (list, least, greatest, length) its length, too. A parameter that is a setting of
            ``RunConfig`` must also be in that one's range.

    Raises:
        ValueError: an unknown name (with the nearest known one), a missing one, or a value out of
            type or range.
    """
    found = _parameters(namespace, kinds)
    _refuse_unknown(found, kinds, f"this notebook has {', '.join(kinds)}")
    for name in kinds:
        if name not in found:
            raise ValueError(f"parameter {name!r} has no value; the parameters cell must set it")
    checked = {name: _checked(name, found[name], kind) for name, kind in kinds.items()}
    shared = checked.keys() & RunConfig.__dataclass_fields__.keys()
    RunConfig(**{name: checked[name] for name in shared})
    namespace[CHECKED] = True
    return checked


def resolve_path(path: str | Path) -> Path:
    """An absolute path; a relative one is under the repository's root, not the working folder."""
    return ROOT / Path(path).expanduser()


@contextmanager
def replacing(path: Path, folder: bool = False) -> Iterator[Path]:
    """A temporary file, or empty folder, beside ``path``. It becomes ``path``, a file with its
    bytes on disk, when the block ends; after an error ``path`` is as it was before.

    Raises:
        OSError: it cannot be written, or a folder that is not empty is in the way of ``folder``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as parent:
        temporary = Path(parent) / path.name
        temporary.mkdir() if folder else temporary.touch()
        yield temporary
        temporary.chmod(0o755 if folder else 0o644)
        if not folder:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)


def one_line(error: Exception, limit: int = 120) -> str:
    """What an error says, in one line of at most ``limit`` characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:limit]


def _parameters(namespace: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The plain values of a notebook. Once they are checked, a live kernel also holds later cells'
    results: then only names that are nearly a parameter's count.
    """

    def is_parameter(name: str, value: Any) -> bool:
        if name.startswith("_") or name in ("In", "Out", "exit", "quit") or callable(value):
            return False
        is_near = CHECKED not in namespace or difflib.get_close_matches(name, known, 1, 0.8)
        return bool(is_near) and not isinstance(value, types.ModuleType)

    return {name: value for name, value in namespace.items() if is_parameter(name, value)}


def _checked(name: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind`` if nothing is lost (an int for a float, a list for a tuple).

    Args:
        kind: a type; or, as in ``check_parameters``, a tuple of it and its bounds.

    Raises:
        ValueError: another type, not one of the choices, or out of range.
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    kind = _bounded(*kind) if isinstance(kind, tuple) else kind
    if get_origin(kind) is Union:
        numbers, words = get_args(kind)
        kind = words if value in get_args(words) else numbers
    if get_origin(kind) is Annotated:
        kind, words, holds = get_args(kind)
        value = _checked(name, value, kind)
        if not holds(value):
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{name} is {shown}, but {words}")
    elif get_origin(kind) is Literal:
        choices, value = get_args(kind), str(value) if is_int else value  # YAML reads 32 as int
        if value not in choices:
            hint = _did_you_mean(value, choices)
            raise ValueError(f"unknown {name} {value!r}; one of {', '.join(choices)}{hint}")
    elif get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            advice = "such as [8, 16, 32]; -p cannot pass lists, -y and -f can"
            raise ValueError(f"{name} is {value!r}, but must be a list, {advice}")
        value = tuple(_checked(name, item, get_args(kind)[0]) for item in value)
    elif kind is float and is_int:
        value = float(value)
    elif not isinstance(value, kind) or (kind is int and not is_int):
        is_text = kind is float and isinstance(value, str)
        hint = "; YAML reads 1e-4 as text, write 1.0e-4" if is_text else ""
        raise ValueError(f"{name} is {value!r}, but must be of type {kind.__name__}{hint}")
    elif kind is float and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, but must be a finite number")
    return value


def _bounded(kind: type, least: float, greatest: float, length: int = 0) -> Any:
    """The type of a number, or of a list of ``length`` (0: one or more) numbers, within bounds."""
    verb = f"hold {length or 'one or more'} numbers, each" if kind is list else "lie"

    def holds(value: Any) -> bool:
        numbers = value if kind is list else [value]
        fits = [type(number) in (int, float) and least <= number <= greatest for number in numbers]
        return all(fits) and len(fits) == (length or max(len(fits), 1))

    return Annotated[kind, f"must {verb} between {least:g} and {greatest:g}", holds]


def _refuse_unknown(names: Collection[str], known: Collection[str], otherwise: str) -> None:
    for name in names:
        if name not in known:
            hint = _did_you_mean(name, known) or f"; {otherwise}"
            raise ValueError(f"unknown parameter {name!r}{hint}")


def _did_you_mean(name: Any, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
