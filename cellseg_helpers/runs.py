"""The run folder: what a run was, what it measured, and its checkpoints. Every file is written
whole or not at all.

    settings.json             every setting (RunConfig)
    provenance.json           code version, package versions, machine, data fingerprint
    split.json                image ids of each side
    truth.json                the validation images' cells, as a COCO data set
    history.csv               one row an epoch
    last.pt                   checkpoint to go on from
    best.safetensors          weights of the best epoch
    epoch_<n>.safetensors     weights of every epoch, if keep_every_epoch is set
    detections.json           the best epoch's detections in the validation images, COCO results
    metrics.json              its scores
    finished.json             written last: epochs, early stop, trainable parameters, megabytes
    trained.json              seconds and memory of the job that trained the run
    scores.json               03_evaluate: AP50 and its bootstrap values
    training_detections.json  09_findings: detections in some training images
    test_detections.json      07_predict_test: detections in the test images
"""

import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from cellseg_helpers.cells import Cells
from cellseg_helpers.config import ROOT, RunConfig, one_line, replacing, resolve_path
from cellseg_helpers.data.cache import CellDataset, CellImage, DataError
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.hw3 import open_dataset

RUNS = "outputs/runs"
TABLES = "outputs/tables"
PACKAGES = (
    "torch", "torchvision", "lightning-fabric", "numpy", "hotcoco", "pycocotools", "tifffile",
    "imagecodecs", "scipy",
)  # fmt: skip


class RunError(ValueError):
    """A run cannot start, continue or be read; the message is written for the user."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder holds, for the analyses; needs no GPU and no weights.

    Attributes:
        run_dir: the folder.
        settings, provenance, split: of the JSON files of these names.
        history: one row an epoch.
        truth: the validation images' cells, a COCO data set.
        metrics: of ``metrics.evaluate``; undefined is NaN.
        detections: the best epoch's cells in the validation images; read when first asked for.
    """

    run_dir: Path
    settings: dict[str, Any]
    provenance: dict[str, Any]
    split: dict[str, Any]
    history: pd.DataFrame
    truth: dict[str, Any]
    metrics: dict[str, Any]

    @cached_property
    def detections(self) -> Cells:
        return Cells.from_coco(read_json(self.run_dir / "detections.json"))


def load_run(run_dir: str | Path) -> Run:
    """Read a finished run.

    Raises:
        RunError: no such folder, or a file of it missing or unreadable.
    """
    folder = resolve_path(run_dir)
    if not folder.is_dir():
        raise RunError(
            f"run_dir {run_dir} does not exist; train one with notebooks/02_train.ipynb or give "
            "another"
        )
    try:
        (folder / "detections.json").stat()
        names = ("settings", "provenance", "split", "truth")
        parts = {name: read_json(folder / f"{name}.json") for name in names}
        metrics = _change_leaves(
            read_json(folder / "metrics.json"), lambda leaf: math.nan if leaf is None else leaf
        )
        history = pd.read_csv(folder / "history.csv")
    except FileNotFoundError as error:
        raise RunError(
            f"run_dir {run_dir} has no {Path(error.filename).name}: the run has not finished; run "
            "02_train again"
        ) from None
    except RunError:
        raise
    except ValueError as error:
        raise RunError(
            f"run_dir {run_dir} has a damaged history.csv ({one_line(error)}); run 02_train again"
        ) from None
    return Run(run_dir=folder, history=history, metrics=metrics, **parts)


def context_of(run: Run) -> dict[str, Any]:
    """The columns that every row of a run's tables carries: scale, data, split, maxDets."""
    data = Path(run.settings["data"])
    return {
        "scale": run.settings["scale"],
        "data": f"{data.parent.name}/{data.name}" if data.suffix == ".json" else data.name,
        "split": f"{run.split['kind']}, validation side",
        "maxDets": run.metrics["coco_dense"]["max_dets"][-1],
    }


def images_of_run(run: Run) -> tuple[list[CellImage], str]:
    """A run's validation images in the order of its truth, and a sentence on where they are from;
    none if the data are gone or have changed.
    """
    try:
        dataset = _dataset_of(run)
    except DataError as error:
        return [], f"No pictures: {str(error).splitlines()[0]}"
    index = {image_id: i for i, image_id in enumerate(dataset.image_ids)}
    names = [image["file_name"] for image in run.truth["images"]]
    images = [dataset[index[name]] for name in names if name in index]
    if to_coco(images)["annotations"] != run.truth["annotations"]:
        return [], (
            f"No pictures: the data {dataset.name!r} are no longer those that this run was "
            "scored on."
        )
    return images, (
        f"Pictures are from the data {dataset.name!r}; their cells are those that the run was "
        "scored on."
    )


def annotations_of_run(run: Run) -> tuple[dict[str, Any], str]:
    """All annotated images of a run's data as a COCO data set, and a sentence; the validation
    images alone if the data are gone.
    """
    try:
        dataset = _dataset_of(run)
    except DataError as error:
        number, problem = len(run.truth["images"]), str(error).splitlines()[0]
        return run.truth, f"Only the {number} validation images: {problem}"
    return to_coco(dataset), f"All {len(dataset)} annotated images of the data {dataset.name!r}."


def _dataset_of(run: Run) -> CellDataset:
    settings = run.settings
    reading = settings.get("truth_reading", "pixel_values")
    return open_dataset(settings["data"], reading, 0, settings["skip_faulty_images"])


def save_table(table: pd.DataFrame, name: str, **context: Any) -> Path:
    """Write ``outputs/tables/<name>.csv``, whole or not at all.

    Args:
        table: a named index is written, too.
        name: of the file, without ending.
        context: first columns, the same in every row (see ``context_of``).

    Returns:
        The path under the repository's root.
    """
    rows = table.reset_index() if any(table.index.names) else table
    columns = [*context, *(column for column in rows.columns if column not in context)]
    path = Path(TABLES) / f"{name}.csv"
    write_text(resolve_path(path), rows.assign(**context)[columns].to_csv(index=False))
    return path


def set_aside_other_run(config: RunConfig) -> Path | None:
    """Rename the folder of a run that has this one's name and other settings or images, so that
    this one can start.

    Returns:
        The new path, ``<name>.old-<n>``; None if no folder was in the way.
    """
    folder = resolve_path(RUNS) / config.run_name
    try:
        differences = config.differences(json.loads((folder / "settings.json").read_text()))
        if config.precision == "auto":
            differences.pop("precision", None)  # saved as what it was on this machine
        if not differences:
            provenance = json.loads((folder / "provenance.json").read_text())
            if provenance["data_fingerprint"] == _fingerprint(config):
                return None
    except (OSError, ValueError, KeyError):
        return None  # no folder, or one that start_run refuses
    number = 1 + len(list(folder.parent.glob(f"{folder.name}.old-*")))
    return folder.rename(folder.with_name(f"{folder.name}.old-{number}"))


def _fingerprint(config: RunConfig) -> str:
    reading = (config.instance_reading, config.min_instance_area_px, config.skip_faulty_images)
    try:
        return open_dataset(config.data, *reading).fingerprint
    except DataError:
        return ""  # the training will report it


def start_run(
    config: RunConfig, fingerprint: str, split: dict[str, Any], truth: dict[str, Any]
) -> Path:
    """Make the run's folder, or find the one to go on in.

    Raises:
        RunError: the folder holds a run with other settings or other data; the differing fields are
            named.
    """
    run_dir = resolve_path(RUNS) / config.named().run_name
    if (run_dir / "settings.json").exists():
        _refuse_other_run(config, fingerprint, run_dir)
    for half_written in run_dir.glob(".*.*"):  # by a process that was killed
        shutil.rmtree(half_written, ignore_errors=True)
    write_json(run_dir / "split.json", split)
    write_json(run_dir / "truth.json", truth)
    if not (run_dir / "provenance.json").exists():  # it is of the code that began the run
        write_json(run_dir / "provenance.json", provenance() | {"data_fingerprint": fingerprint})
    write_json(run_dir / "settings.json", config.named().to_dict())
    return run_dir


def _refuse_other_run(config: RunConfig, fingerprint: str, run_dir: Path) -> None:
    try:
        differences = config.differences(read_json(run_dir / "settings.json"))
        before = read_json(run_dir / "provenance.json")["data_fingerprint"]
    except (FileNotFoundError, TypeError, KeyError, AttributeError):
        raise RunError(
            f"{run_dir} has lost or damaged files (settings.json, provenance.json); delete that "
            "folder to train anew"
        ) from None
    if before != fingerprint:
        differences["data_fingerprint"] = (before[:12], fingerprint[:12])
    if differences:
        raise RunError(
            f"{run_dir} holds a run with other settings ({_listed(differences)}); choose another "
            "run_name, give the old settings to go on, or delete that folder"
        )


def _listed(differences: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in differences.items())


def provenance() -> dict[str, Any]:
    """Code version, package versions and machine, as they are now."""
    import torch

    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        code_version = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        code_version = "unknown (not a git checkout)"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "code_version": code_version,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "machine": {
            "platform": platform.platform(),
            "processor": models[0] if models else platform.processor(),
            "cpu_count": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """``torch.save``, whole or not at all: a kill at any moment leaves a whole checkpoint."""
    import torch

    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU, read with ``weights_only=True``.

    Raises:
        RunError: not readable.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RunError(
            f"checkpoint {path} cannot be read ({one_line(error)}); delete it to train anew"
        ) from None


def resume(parts: dict[str, Any], run_dir: Path, config: RunConfig) -> list[dict[str, Any]]:
    """Load the run's ``last.pt``, if there is one, into its parts.

    Args:
        parts: name in the checkpoint -> model, optimizer, ...: what has ``load_state_dict``.
        run_dir: the run folder.
        config: of the run.

    Returns:
        The history: one row for each epoch that the checkpoint has seen.

    Raises:
        RunError: the checkpoint is damaged, of other settings (the differing fields are named), or
            does not fit; or a file is gone that was written before it.
    """
    path = run_dir / "last.pt"
    if not path.exists():
        return []
    checkpoint = load_checkpoint(path)
    try:
        history = checkpoint["history"]
        written = ["history.csv"]
        if any(not math.isnan(row["validation_loss"]) for row in history):
            written = ["best.safetensors", "detections.json", "metrics.json", *written]
        lost = [name for name in written if not (run_dir / name).exists()]
        if lost:
            raise RunError(
                f"{run_dir} has lost {', '.join(lost)}; delete that folder to train anew"
            )
        differences = config.differences(checkpoint["settings"])
        if differences:
            raise RunError(
                f"checkpoint {path} is of a run with other settings ({_listed(differences)}); "
                "delete it to train anew"
            )
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except RunError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
        raise RunError(
            f"checkpoint {path} does not fit this run ({one_line(error)}); delete it to train anew"
        ) from None
    return history


def save_weights(path: Path, state: dict[str, Any]) -> None:
    """Weights as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """JSON, whole or not at all: NaN as null, a list on one line."""
    indent = None if isinstance(value, list) else indent
    try:
        text = json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        value = _change_leaves(
            value, lambda leaf: None if isinstance(leaf, float) and math.isnan(leaf) else leaf
        )
        text = json.dumps(value, indent=indent, allow_nan=False)
    write_text(path, text + "\n")


def _change_leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested dicts and lists with each leaf changed."""
    if isinstance(tree, dict):
        return {key: _change_leaves(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_change_leaves(value, change) for value in tree]
    return change(tree)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        RunError: it is not valid JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RunError(
            f"{path} is not valid JSON ({error}); copy it again, or delete it and run again what "
            "made it"
        ) from None
