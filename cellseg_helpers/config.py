"""``RunConfig``: all settings of a run, checked; and the check of any notebook's parameters.

It is a dataclass, not a pydantic model: importing pydantic and building the model would add 0.11 s
to the start of every notebook, job and worker.
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
CHECKED = "_parameters_checked"  # set in a notebook's globals by the check of its parameters

# Types with a condition: the type, the condition in words (for the message), and its test.
Count = Annotated[int, "must not be negative", lambda value: value >= 0]
Positive = Annotated[int, "must be above 0", lambda value: value > 0]
Layers = Annotated[int, "a backbone has 5 layers", lambda value: 0 <= value <= 5]
Amount = Annotated[float, "must not be negative", lambda value: value >= 0]
Rate = Annotated[float, "must be above 0", lambda value: value > 0]
Stride = Annotated[int, "must be 2 or 4", lambda value: value in (2, 4)]
Share = Annotated[float, "must lie between 0 and 1", lambda value: 0 <= value <= 1]
OpenShare = Annotated[float, "must lie strictly between 0 and 1", lambda value: 0 < value < 1]
Threshold = Annotated[float, "must be above 0 and at most 1", lambda value: 0 < value <= 1]
NEEDS_NUMBERS = "needs at least one number, all above 0"
Numbers = Annotated[tuple[float, ...], NEEDS_NUMBERS, lambda value: min(value, default=0) > 0]
NumbersOrAuto = tuple[float, ...] | Literal["auto"]
Anchors = Annotated[
    NumbersOrAuto, NEEDS_NUMBERS, lambda value: value == "auto" or min(value, default=0) > 0
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
    """The settings of one run. The same names are used in the parameters cell of
    ``02_train.ipynb``, in the YAML files and in ``settings.json``; where torchvision has a name for
    a setting, it is used. The defaults train at quick scale on the drawn tissue.

    Raises:
        ValueError: a value that no run could use; the message says what is allowed.
    """

    run_name: str = ""  # folder under outputs/runs; "" makes a name from the settings
    scale: Scale = "quick"  # quick, sample or full: a label in every row of the run's tables

    # Data
    data: str = "drawn"  # folder in the HW3 layout, COCO .json file, or "drawn": synthetic tissue
    instance_reading: Reading = "pixel_values"  # one cell per value, or "connected_components"
    truth_reading: Reading = "pixel_values"  # the same for the annotations used in scoring
    min_instance_area_px: Count = 0  # smaller instances are left out of training; 0 = keep all
    skip_faulty_images: bool = False  # leave faulty images out instead of stopping
    split: Split = "auto"  # patient, random, auto (by patient if known), all (all images train)
    validation_fraction: OpenShare = 0.25  # share of the patients (or images) in validation
    folds: Count = 0  # folds of a cross-validation; 0 = one split by validation_fraction
    fold: Count = 0  # the fold that validates, counted from 0
    split_seed: Count = 0  # of the random split

    # Crops and augmentation
    crop_size_px: Count = 192  # side of the training crops, at native resolution; 0 = whole images
    class_balance: Share = 0.7  # share of the crops around a random cell of a random class
    drop_cut_cells: bool = True  # cells cut by a crop's edge are no targets
    augmentation: Augmentation = "flips"  # none, flips, flips_turns_stain or one of augment.RECIPES
    boxes_miss_last_pixel: bool = False  # boxes end one pixel early: a common mistake

    # Model
    backbone: Backbone = "resnet18"  # a ResNet or ResNeXt of torchvision, or resnet50_fpn_v2
    neck: Neck = "fpn"  # fpn: a pyramid of five levels; none: one feature map at stride 16
    attention: Attention = "none"  # or "cbam" after each stage of the ResNet
    stem_stride: Stride = 4  # of the first feature map, px; 2 makes all maps twice as fine
    heads: Heads = "auto"  # torchvision's v1 or v2; auto: v2 for resnet50_fpn_v2, else v1
    head_width: Positive = 256  # channels of pyramid, RPN, mask head; the box head has 4 x as many
    weights: str = "none"  # none, imagenet, coco, or the path of a .safetensors or .pth file
    trainable_backbone_layers: Layers = 3  # the last n of 5; layers at random weights always train
    normalization: Normalization = "imagenet"  # or "data" (training images); see channel_statistics
    min_size: Count = 0  # px, an image's shorter side after resizing; 0 = native size
    max_size: Count = 0  # px, its longer side after resizing, at most; 0 = native size
    anchor_sizes: Anchors = (8, 16, 32, 64, 128)  # px, 1 or 2 per level; auto: fitted to the data
    anchor_ratios: Numbers = (0.5, 1, 2)  # height / width; each at every level

    # Model: region proposals
    rpn_pre_nms_top_n_train: Positive = 1000  # proposals per level before NMS, in training
    rpn_pre_nms_top_n_test: Positive = 1000  # the same in prediction
    rpn_post_nms_top_n_train: Positive = 500  # proposals per image after NMS, in training
    rpn_post_nms_top_n_test: Positive = 1000  # the same in prediction
    rpn_nms_thresh: Share = 0.7  # above this IoU NMS drops the lower-scored of two proposals
    rpn_fg_iou_thresh: Share = 0.7  # least IoU of a positive anchor with its cell
    rpn_bg_iou_thresh: Share = 0.3  # an anchor whose IoUs are all lower is background
    rpn_batch_size_per_image: Positive = 256  # anchors sampled per image for the RPN's losses

    # Model: boxes and masks
    box_score_thresh: Share = 0.05  # detections with a lower score are dropped
    box_nms_thresh: Share = 0.5  # above this IoU NMS drops the lower-scored of two boxes of a class
    box_fg_iou_thresh: Share = 0.5  # least IoU of a positive proposal with its cell
    box_bg_iou_thresh: Share = 0.5  # a proposal whose IoUs are all lower is background
    box_batch_size_per_image: Positive = 128  # proposals sampled per image for the box losses
    mask_geometry: MaskGeometry = "torchvision"  # or exact: pixels are sampled at their centres
    mask_batch_size_per_image: Count = 4  # positives per image in the mask loss; 0 = all
    detections_per_image: Positive = 300  # at most, per image (or tile): those scored highest

    # Training
    epochs: Positive = 3  # each of steps_per_epoch optimizer steps
    steps_per_epoch: Count = 66  # optimizer steps; 0 = one pass over the training images
    validation_every_epochs: Positive = 1  # validate after every n-th epoch and after the last
    validation_updates_norms: bool = False  # batch norms learn from validation images: a mistake
    keep_every_epoch: bool = False  # save the weights of every epoch
    keep_checkpoint: bool = True  # keep last.pt after the end; it is 3 x the weights' size
    batch_size: Positive = 2  # crops per step and device
    optimizer: Optimizer = "adamw"  # adam, adamw or sgd
    learning_rate: Rate = 5e-4  # after the warm-up
    min_learning_rate: Amount = 0.0  # lowest rate of the cosine and plateau schedules
    momentum: Share = 0.9  # of sgd only
    weight_decay: Amount = 1e-4  # of every optimizer
    scheduler: Scheduler = "cosine"  # none, cosine (each step), plateau (each epoch, by monitor)
    warmup_steps: Count = 20  # linear rise of the learning rate; 0 = starts at the full rate
    monitor: Monitor = "validation_ap50"  # or validation_loss, loss; for best epoch, plateau, stop
    plateau_factor: OpenShare = 0.1  # the plateau schedule multiplies the learning rate by it
    plateau_patience: Positive = 3  # epochs without improvement before the rate is lowered
    early_stopping_patience: Count = 0  # epochs without improvement that end the run; 0 = never
    gradient_clip_norm: Amount = 10.0  # largest norm of the gradient; 0 = no clipping
    precision: Precision = "auto"  # 32, bf16-mixed, 16-mixed (GPU); auto: bf16-mixed where fast
    accelerator: Accelerator = "auto"  # cpu, cuda; auto: a GPU if the machine has one
    devices: Positive = 1  # processes, one per device; above 1 only outside notebooks
    num_workers: Count = 0  # processes that prepare crops; 0 = the training process does
    seed: Count = 0  # of weights, crops and augmentation

    # Prediction and scores
    tile_size_px: Count = 0  # side of the tiles in prediction; 0 = the whole image at once
    tile_overlap_px: Count = 64  # of neighbouring tiles; best a little more than a large cell
    test_time_augmentation: bool = False  # joins six views: 3 scales, each also mirrored
    mask_threshold: Threshold = 0.5  # a pixel of at least this probability belongs to the cell
    score_threshold: Share = 0.5  # for precision, recall, F1 and figures, not for AP
    iou_threshold: Threshold = 0.5  # mask IoU of a match, for precision, recall and F1

    def __post_init__(self):
        for field in fields(self):
            value = _checked(field.name, getattr(self, field.name), field.type)
            object.__setattr__(self, field.name, value)
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        """Yield a sentence for each problem that the type of one field does not catch."""
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
                "values, or 10 for two per level, and so on"
            )
        if self.neck == "none" and self.stem_stride != 4:
            yield "stem_stride 2 needs neck 'fpn'"
        if self.neck == "none" and self.backbone == "resnet50_fpn_v2":
            yield "neck 'none' needs a backbone without a pyramid, such as 'resnet50'"
        shorter, longer = self.min_size, self.max_size
        if bool(shorter) != bool(longer) or longer < shorter:
            yield (
                f"min_size is {shorter} and max_size {longer}; give both, min_size <= max_size, "
                "or 0 for both to keep the images' own size"
            )
        side, overlap = self.tile_size_px, self.tile_overlap_px
        if side and not 0 < overlap < side:
            allowed = f"above 0 and below tile_size_px, {side}"
            yield f"tile_overlap_px is {overlap}, but must be {allowed}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """A config with these settings; all others have their defaults.

        Raises:
            ValueError: an unknown name (with the nearest known one), or a value out of range.
        """
        _refuse_unknown(values, cls.__dataclass_fields__, "see RunConfig for all names")
        return cls(**values)

    @classmethod
    def from_yaml(cls, *paths: str | Path) -> "RunConfig":
        """A config from parameter files; a later file overrides earlier ones. YAML 1.1 reads
        ``1e-4`` as text: write ``1.0e-4``.
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
                its_type = type(values).__name__
                raise ValueError(f"{file} must hold `name: value` lines, not a {its_type}")
            merged |= values
        return cls.from_dict(merged)

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any]) -> "RunConfig":
        """The config, with a run name, of a notebook whose parameters are a run's settings,
        checked as by ``from_dict``. Call it with ``globals()`` right after the parameters cell.
        """
        config = cls.from_dict(_candidate_parameters(namespace, cls.__dataclass_fields__)).named()
        namespace[CHECKED] = True
        return config

    def named(self) -> "RunConfig":
        """The same settings with a ``run_name``; an empty one is replaced by one made from them.

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
        """The settings as ``settings.json`` and YAML hold them: with lists instead of tuples."""
        values = vars(self).items()
        return {name: list(value) if type(value) is tuple else value for name, value in values}

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The settings that differ between two runs: name -> (value in ``other``, in this one)."""
        mine = self.to_dict()
        return {
            name: (other.get(name), mine.get(name))
            for name in {**mine, **other}
            if name not in NOT_PART_OF_A_RUN and other.get(name) != mine.get(name)
        }


def check_parameters(namespace: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """A notebook's own parameters, checked; call it with ``globals()`` right after their cell.

    Args:
        namespace: every plain value in it counts as a parameter.
        wanted: name -> type, or (type, least, greatest) for a number, or for a list of numbers,
            within bounds, or (list, least, greatest, length) for a list of that length. A parameter
            named like a setting of ``RunConfig`` must also be allowed as that setting.

    Raises:
        ValueError: an unknown name (with the nearest known one), a missing one, or a value out of
            type or range.
    """
    values = _candidate_parameters(namespace, wanted)
    _refuse_unknown(values, wanted, f"this notebook has {', '.join(wanted)}")
    for name in wanted:
        if name not in values:
            raise ValueError(f"parameter {name!r} has no value; the parameters cell must set it")
    checked = {name: _checked(name, values[name], wanted[name]) for name in wanted}
    shared = checked.keys() & RunConfig.__dataclass_fields__.keys()
    RunConfig(**{name: checked[name] for name in shared})
    namespace[CHECKED] = True
    return checked


def resolve_path(path: str | Path) -> Path:
    """The absolute path; a relative one starts at the repository's root, not the working folder."""
    return ROOT / Path(path).expanduser()


@contextmanager
def replacing(path: Path, folder: bool = False) -> Iterator[Path]:
    """Give a temporary file, or empty folder, that becomes ``path`` when the block ends; a file's
    bytes are on disk before. After an error ``path`` is as it was before.

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
    """An error's message in one line of at most ``limit`` characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:limit]


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).splitlines()[0]


def _candidate_parameters(namespace: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The values in a notebook's namespace that can be meant as parameters: before the check, all
    plain values. If the cell is run again in a live kernel, results of later cells are there too;
    then only values named like a known parameter (a resembling name is reported as a typo).
    """

    def is_parameter(name: str, value: Any) -> bool:
        if name.startswith("_") or name in ("In", "Out", "exit", "quit") or callable(value):
            return False
        may_be_meant = CHECKED not in namespace or difflib.get_close_matches(name, known, 1, 0.8)
        return bool(may_be_meant) and not isinstance(value, types.ModuleType)

    return {name: value for name, value in namespace.items() if is_parameter(name, value)}


def _checked(name: str, value: Any, wanted: Any) -> Any:
    """``value`` in the type ``wanted``; an int becomes a float, a list a tuple, where wanted.

    Args:
        wanted: a type; or, as in ``check_parameters``, a tuple of a type and its bounds.

    Raises:
        ValueError: a value of another type, not one of the choices, or out of range.
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    wanted = _bounded(*wanted) if isinstance(wanted, tuple) else wanted
    if get_origin(wanted) is Union:
        numbers, choices = get_args(wanted)
        wanted = choices if value in get_args(choices) else numbers
    if get_origin(wanted) is Annotated:
        wanted, condition, holds = get_args(wanted)
        value = _checked(name, value, wanted)
        if not holds(value):
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{name} is {shown}, but {condition}")
    elif get_origin(wanted) is Literal:
        choices, value = get_args(wanted), str(value) if is_int else value  # YAML reads 32 as int
        if value not in choices:
            hint = _did_you_mean(value, choices)
            raise ValueError(f"unknown {name} {value!r}; one of {', '.join(choices)}{hint}")
    elif get_origin(wanted) is tuple:
        if not isinstance(value, (list, tuple)):
            advice = "such as [8, 16, 32]; -p cannot pass lists, -y and -f can"
            raise ValueError(f"{name} is {value!r}, but must be a list, {advice}")
        value = tuple(_checked(name, item, get_args(wanted)[0]) for item in value)
    elif wanted is float and is_int:
        value = float(value)
    elif not isinstance(value, wanted) or (wanted is int and not is_int):
        is_text = wanted is float and isinstance(value, str)
        hint = "; YAML reads 1e-4 as text, write 1.0e-4" if is_text else ""
        raise ValueError(f"{name} is {value!r}, but must be of type {wanted.__name__}{hint}")
    elif wanted is float and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, but must be a finite number")
    return value


def _bounded(base: type, least: float, greatest: float, length: int = 0) -> Any:
    """A type for numbers in [least, greatest], or lists of ``length`` (0: one or more) of them."""
    wording = f"hold {length or 'one or more'} numbers, each" if base is list else "lie"

    def holds(value: Any) -> bool:
        numbers = value if base is list else [value]
        right_length = len(numbers) == length if length else len(numbers) > 0
        are_numbers = all(type(number) in (int, float) for number in numbers)  # not bool
        return right_length and are_numbers and all(least <= n <= greatest for n in numbers)

    return Annotated[base, f"must {wording} between {least:g} and {greatest:g}", holds]


def _refuse_unknown(names: Collection[str], known: Collection[str], otherwise: str) -> None:
    """Raise a ValueError for an unknown name, with the nearest known one or else ``otherwise``."""
    for name in names:
        if name not in known:
            hint = _did_you_mean(name, known) or f"; {otherwise}"
            raise ValueError(f"unknown parameter {name!r}{hint}")


def _did_you_mean(name: Any, known: Collection[str]) -> str:
    """The end of a message that names the nearest known name; "" if none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
