"""Every setting is checked before any work, and a wrong one is named with what is right."""

import inspect
import json
import math
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import nbformat
import pytest
import yaml

from cellseg_helpers.config import (
    NOT_PART_OF_A_RUN,
    ROOT,
    RunConfig,
    check_parameters,
    one_line,
    replacing,
    resolve_path,
)

TYPES = {field.name: field.type for field in fields(RunConfig)}
CHOICES = {name: get_args(kind) for name, kind in TYPES.items() if get_origin(kind) is Literal}
CHECKS = {
    name: kind.__metadata__[0] for name, kind in TYPES.items() if hasattr(kind, "__metadata__")
}
PARAMETER_FILES = sorted((ROOT / "params").rglob("*.yaml"))


def test_every_number_is_checked():
    numbers = {
        name
        for name, value in RunConfig().to_dict().items()
        if isinstance(value, (int, float, list)) and not isinstance(value, bool)
    }
    assert numbers == set(CHECKS) and set(NOT_PART_OF_A_RUN) <= set(RunConfig().to_dict())


def test_the_training_notebook_has_the_fields_with_their_defaults_and_comments():
    """Once in ``RunConfig``, in its order and groups, and again as literals in the notebook."""
    notebook = nbformat.read(ROOT / "notebooks/02_train.ipynb", 4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    pattern = r"^ *(\w+)(?:: \S+(?: \S+\])?)? = (.*?)  # (.*)$|^ *# (.+)$"
    source = inspect.getsource(RunConfig).split("    def ")[0]
    fields_of = {}
    for where, text in (("record", source), ("notebook", cell.source)):
        rows = re.findall(pattern, text, re.MULTILINE)
        fields_of[where] = [(name, comment, heading) for name, _, comment, heading in rows]
    assert fields_of["notebook"] == fields_of["record"]
    values: dict = {}
    exec(cell.source, values)
    del values["__builtins__"]
    assert values == RunConfig().to_dict() and list(values) == list(RunConfig().to_dict())


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("bakbone", "backbone"),
        ("learning_rat", "learning_rate"),
        ("box_nms_tresh", "box_nms_thresh"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=f"unknown parameter '{wrong}'; did you mean '{right}'\\?"):
        RunConfig.from_dict({wrong: 1})


def test_a_name_like_no_other_is_answered_without_a_guess():
    with pytest.raises(ValueError, match="unknown parameter 'qqqq'; see RunConfig"):
        RunConfig.from_dict({"qqqq": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet102"}, "unknown backbone 'resnet102'; one of resnet18, .*did you mean 'resnet1..'"),
        ({"split": "patients"}, "unknown split 'patients'; one of auto, patient, random, all; did you mean 'patient'"),
        ({"precision": "bf16"}, "unknown precision 'bf16'; one of .*32, bf16-mixed, 16-mixed"),
        ({"backbone": True}, "unknown backbone True; one of resnet18"),
        ({"epochs": "3"}, "epochs is '3', but must be of type int$"),
        ({"epochs": 3.0}, "epochs is 3.0, but must be of type int"),
        ({"epochs": True}, "epochs is True, but must be of type int"),
        ({"epochs": None}, "epochs is None, but must be of type int"),
        ({"learning_rate": True}, "learning_rate is True, but must be of type float"),
        ({"skip_faulty_images": 1}, "skip_faulty_images is 1, but must be of type bool"),
        ({"data": 3}, "data is 3, but must be of type str"),
        ({"learning_rate": "1e-4"}, "learning_rate is '1e-4', but must be of type float; YAML reads 1e-4 as text, write 1.0e-4"),
        ({"learning_rate": math.nan}, "learning_rate is nan, but must be a finite number"),
        ({"weight_decay": math.inf}, "weight_decay is inf, but must be a finite number"),
        ({"anchor_sizes": "8,16"}, "anchor_sizes is '8,16', but must be a list.*-p cannot pass lists, -y and -f can"),
        ({"anchor_sizes": 8}, "anchor_sizes is 8, but must be a list"),
        ({"anchor_sizes": [8, 16, 32, 64, math.nan]}, "anchor_sizes is nan, but must be a finite number"),
        ({"anchor_sizes": [8, 16, 32, 64, "a"]}, "anchor_sizes is 'a', but must be of type float"),
        ({"anchor_sizes": [8, 16, 32]}, "anchor_sizes has 3 values, but the feature pyramid has 5 levels"),
        ({"folds": 1}, "folds is 1 and fold 0; folds must be 0 or at least 2, fold below it"),
        ({"folds": 3, "fold": 3}, "folds is 3 and fold 3; folds must be 0 or at least 2"),
        ({"fold": 1}, "folds is 0 and fold 1"),
        ({"anchor_sizes": [8, 16, 32, 64, 0]}, "needs at least one number, all above 0"),
        ({"anchor_ratios": []}, "anchor_ratios is \\[\\], but needs at least one number"),
        ({"validation_fraction": 0}, "validation_fraction is 0.0, but must lie strictly between 0 and 1"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0, but must lie strictly between 0 and 1"),
        ({"warmup_steps": -1}, "warmup_steps is -1, but must not be negative"),
        ({"seed": -1}, "seed is -1, but must not be negative"),
        ({"precision": "16-mixed", "accelerator": "cpu"}, "'16-mixed' needs a GPU"),
        ({"weights": ""}, "weights is empty; one of none, imagenet, coco, or the path"),
        ({"trainable_backbone_layers": 6}, "trainable_backbone_layers is 6, but a backbone has 5 layers"),
        ({"min_size": 100}, "min_size is 100 and max_size 0; give both"),
        ({"max_size": 100}, "min_size is 0 and max_size 100; give both"),
        ({"min_size": 200, "max_size": 100}, "min_size is 200 and max_size 100"),
        ({"tile_size_px": 64, "tile_overlap_px": 64}, "tile_overlap_px is 64, but must be above 0 and below tile_size_px, 64"),
        ({"tile_size_px": 64, "tile_overlap_px": 0}, "tile_overlap_px is 0, but must be above 0 and below tile_size_px, 64"),
        ({"plateau_factor": 1.0}, "plateau_factor is 1.0, but must lie strictly between 0 and 1"),
        ({"rpn_bg_iou_thresh": 0.8}, "rpn_bg_iou_thresh is 0.8, but must not be above rpn_fg_iou_thresh, 0.7"),
        ({"box_fg_iou_thresh": 0.4}, "box_bg_iou_thresh is 0.5, but must not be above box_fg_iou_thresh, 0.4"),
        ({"run_name": "a/b"}, "run_name 'a/b' must be a plain folder name"),
        ({"run_name": ".."}, "run_name '..' must be a plain folder name"),
    ],
)  # fmt: skip
def test_a_value_that_no_run_could_use_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(settings)


POSITIVE = [
    "batch_size", "epochs", "validation_every_epochs", "learning_rate", "detections_per_image",
    "devices", "plateau_patience", "rpn_batch_size_per_image", "box_batch_size_per_image",
    "rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_train",
    "rpn_post_nms_top_n_test", "mask_threshold", "iou_threshold",
]  # fmt: skip
FRACTIONS = [
    "validation_fraction", "class_balance", "momentum", "plateau_factor", "rpn_nms_thresh",
    "rpn_fg_iou_thresh", "rpn_bg_iou_thresh", "box_score_thresh", "box_nms_thresh",
    "box_fg_iou_thresh", "box_bg_iou_thresh", "mask_threshold", "score_threshold", "iou_threshold",
]  # fmt: skip


@pytest.mark.parametrize("name", POSITIVE)
def test_zero_is_refused_where_nothing_could_run(name):
    with pytest.raises(ValueError, match=f"{name} is 0.*but must be above 0"):
        RunConfig.from_dict({name: 0})


@pytest.mark.parametrize("name", FRACTIONS)
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_fractions_lie_between_0_and_1(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, but {CHECKS[name]}"):
        RunConfig.from_dict({name: value})
    assert "1" in CHECKS[name]


@pytest.mark.parametrize(("name", "choices"), CHOICES.items())
def test_every_choice_is_accepted(name, choices):
    for choice in choices:
        assert getattr(RunConfig.from_dict({name: choice}), name) == choice


def test_values_take_their_settings_type_where_nothing_is_lost():
    config = RunConfig.from_dict(
        {"learning_rate": 1, "anchor_sizes": [4, 8, 16, 32, 64], "precision": 32}
    )
    assert config.learning_rate == 1.0 and isinstance(config.learning_rate, float)
    assert config.anchor_sizes == (4.0, 8.0, 16.0, 32.0, 64.0)
    assert config.precision == "32"


def test_settings_survive_json_and_yaml():
    config = RunConfig(learning_rate=3e-4, anchor_ratios=[1.0], run_name="a")
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_a_run_is_named_after_its_settings():
    name = RunConfig().named().run_name
    assert name.startswith("quick-resnet18-")
    assert RunConfig().named().run_name == name
    assert RunConfig(num_workers=3).named().run_name == name
    others = [
        {"seed": 1},
        {"learning_rate": 2e-3},
        {"anchor_ratios": [1.0]},
        {"data": "outputs/sample"},
        {"scale": "full"},
    ]
    assert len({name, *(RunConfig(**other).named().run_name for other in others)}) == 1 + len(
        others
    )
    assert RunConfig(run_name="mine", seed=5).named().run_name == "mine"


def test_differences_leave_out_what_makes_no_other_run():
    old = RunConfig(run_name="a", num_workers=2, epochs=3, anchor_ratios=[1.0]).to_dict()
    assert RunConfig(run_name="b", epochs=3, anchor_ratios=[1.0]).differences(old) == {}
    assert RunConfig(epochs=4).differences(old) == {
        "epochs": (3, 4),
        "anchor_ratios": ([1.0], [0.5, 1.0, 2.0]),
    }
    assert RunConfig().differences(RunConfig().to_dict() | {"old_setting": 1}) == {
        "old_setting": (1, None)
    }


def test_later_parameter_files_win(tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 3\nbatch_size: 8\nanchor_ratios: [1.0]\n")
    (tmp_path / "b.yaml").write_text("epochs: 5\n")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    config = RunConfig.from_yaml(*(tmp_path / f"{name}.yaml" for name in ("a", "b", "empty")))
    assert (config.epochs, config.batch_size, config.anchor_ratios) == (5, 8, (1.0,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1e-4\n", "learning_rate is '1e-4'.*write 1.0e-4"),
        ("epochs: .nan\n", "epochs is nan, but must be of type int"),
        ("learning_rate: .nan\n", "learning_rate is nan, but must be a finite number"),
        ("- epochs\n", "parameter file .*a.yaml must hold `name: value` lines, not a list"),
        ("epochs: [1\n", "parameter file .*a.yaml cannot be read: [^\\n]*$"),
        ("epoch: 1\n", "unknown parameter 'epoch'; did you mean 'epochs'"),
    ],
)
def test_a_faulty_parameter_file_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        RunConfig.from_yaml(tmp_path / "a.yaml")


def test_a_missing_parameter_file_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="parameter file .*none.yaml cannot be read: .*No such file"
    ):
        RunConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_parameter_file_loads_and_can_be_scaled_down(path):
    values = yaml.safe_load(path.read_text())
    assert values.items() <= RunConfig.from_yaml(path).to_dict().items()
    scaled_down, quick = RunConfig.from_yaml(path, "params/quick.yaml"), RunConfig()
    for name in (
        "scale",
        "weights",
        "crop_size_px",
        "batch_size",
        "epochs",
        "steps_per_epoch",
        "learning_rate",
        "tile_size_px",
    ):
        assert getattr(scaled_down, name) == getattr(quick, name)


def test_the_quick_file_keeps_what_a_run_is_about():
    assert (
        not {"backbone", "data", "split", "seed", "optimizer", "augmentation"}
        & yaml.safe_load((ROOT / "params/quick.yaml").read_text()).keys()
    )


def notebook(**parameters):
    """A notebook's globals after its imports and its parameters cell."""
    kernel = {
        "__name__": "__main__",
        "_": 1,
        "_i1": "x",
        "In": [""],
        "Out": {},
        "exit": object(),
        "quit": object(),
    }
    return kernel | {"json": json, "Path": Path, "check_parameters": check_parameters} | parameters


def test_a_notebooks_parameters_become_a_named_config():
    config = RunConfig.from_notebook(notebook(backbone="resnet34", anchor_ratios=[1.0], epochs=2))
    assert (config.backbone, config.anchor_ratios, config.epochs) == ("resnet34", (1.0,), 2)
    assert (
        config.run_name
        == RunConfig(backbone="resnet34", anchor_ratios=[1.0], epochs=2).named().run_name
    )


def test_a_notebook_with_an_injected_typo_stops():
    with pytest.raises(ValueError, match="unknown parameter 'bakbone'; did you mean 'backbone'?"):
        RunConfig.from_notebook(notebook(backbone="resnet18", bakbone="resnet101"))


def test_a_notebooks_own_parameters_are_checked():
    checked = check_parameters(
        notebook(limit=3, run_dir="outputs/x", scores=[0.1, 1]),
        run_dir=str,
        limit=int,
        scores=tuple[float, ...],
    )
    assert checked == {"run_dir": "outputs/x", "limit": 3, "scores": (0.1, 1.0)}
    assert list(checked) == ["run_dir", "limit", "scores"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"run_dir": "x", "rundir": "y"}, "unknown parameter 'rundir'; did you mean 'run_dir'"),
        (
            {"run_dir": "x", "zzz": "y"},
            "unknown parameter 'zzz'; this notebook has run_dir, score_threshold",
        ),
        ({"run_dir": "x"}, "parameter 'score_threshold' has no value"),
        ({"run_dir": 3, "score_threshold": 0.5}, "run_dir is 3, but must be of type str"),
        (
            {"run_dir": "x", "score_threshold": "0.5"},
            "score_threshold is '0.5', but must be of type float",
        ),
        (
            {"run_dir": "x", "score_threshold": 1.5},
            "score_threshold is 1.5, but must lie between 0 and 1",
        ),
    ],
)
def test_a_notebooks_wrong_parameter_stops_it(parameters, message):
    with pytest.raises(ValueError, match=message):
        check_parameters(notebook(**parameters), run_dir=str, score_threshold=float)


def test_relative_paths_stand_under_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("params/quick.yaml") == ROOT / "params" / "quick.yaml"
    assert resolve_path(tmp_path / "a") == tmp_path / "a"
    assert resolve_path("~/a") == Path(os.path.expanduser("~")) / "a"
    assert RunConfig.from_yaml("params/quick.yaml").scale == "quick"


def test_the_guard_can_run_again_in_a_live_kernel_and_still_finds_typos():
    namespace = {"run_dir": "outputs/reference/quick_run", "score_threshold": 0.5}
    kinds = {"run_dir": str, "score_threshold": float}
    settings = check_parameters(namespace, **kinds)
    namespace |= {"settings": settings, "best": 3, "megabytes": 1.5, "validation": [1, 2]}
    assert check_parameters(namespace, **kinds) == settings
    namespace["score_treshold"] = 0.3
    with pytest.raises(ValueError, match="did you mean 'score_threshold'"):
        check_parameters(namespace, **kinds)

    namespace = {"backbone": "resnet34"}
    config = RunConfig.from_notebook(namespace)
    namespace |= {
        "config": config,
        "best": 3,
        "megabytes": 1.5,
        "train": [0],
        "validation": [1, 2],
        "scores": object(),
    }
    assert RunConfig.from_notebook(namespace) == config
    with pytest.raises(ValueError, match="did you mean 'backbone'"):
        RunConfig.from_notebook(namespace | {"bakbone": "resnet101"})


@pytest.mark.parametrize(
    "value, bounds, message",
    [
        (0, (int, 1, 12), "shown is 0, but must lie between 1 and 12"),
        (13, (int, 1, 12), "shown is 13, but must lie between 1 and 12"),
        (1.5, (float, 0, 1), "shown is 1.5, but must lie between 0 and 1"),
        (
            [0.2, 25],
            (list, 0, 1),
            "shown is [0.2, 25], but must hold one or more numbers, each between 0 and 1",
        ),
        ([], (list, 0, 1), "shown is [], but must hold one or more numbers"),
        (["0.2"], (list, 0, 1), "shown is ['0.2'], but must hold one or more numbers"),
        ("3", (int, 1, 12), "shown is '3', but must be of type int"),
        (
            [0.2, 0.3],
            (list, 0, 1, 4),
            "shown is [0.2, 0.3], but must hold 4 numbers, each between 0 and 1",
        ),
    ],
)
def test_a_notebooks_own_parameter_out_of_bounds_is_told(value, bounds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_parameters({"shown": value}, shown=bounds)


def test_a_notebooks_own_parameter_within_bounds_passes():
    found = check_parameters(
        {"shown": 12, "limits": [0, 0.5, 1]}, shown=(int, 1, 12), limits=(list, 0, 1)
    )
    assert found == {"shown": 12, "limits": [0, 0.5, 1]}


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    path = tmp_path / "made" / "folder"
    with pytest.raises(KeyError), replacing(path, folder=True) as temporary:
        (temporary / "half").touch()
        raise KeyError
    assert list(path.parent.iterdir()) == []
    with replacing(path, folder=True) as temporary:
        (temporary / "a").write_text("b")
    assert [file.name for file in path.parent.rglob("*")] == ["folder", "a"]


def test_an_error_in_one_line():
    assert one_line(ValueError("a\n  b " + "c" * 200)) == "a b " + "c" * 116
    assert one_line(KeyError()) == "KeyError"
    assert one_line(FileNotFoundError(2, "No such file", "a.txt")) == "No such file"
