"""The run folder: what a run was, what it measured, and its checkpoints. Every file is written
whole or not at all.

    settings.json             every setting (RunConfig)
    provenance.json           code version, package versions, machine, data fingerprint
    split.json                image ids of each side
    truth.json                the validation images' cells, as a COCO data set
    history.csv               one row per epoch
    last.pt                   checkpoint from which training resumes
    best.safetensors          weights of the best epoch
    epoch_<n>.safetensors     weights of every epoch, if keep_every_epoch is set
    detections.json           the best epoch's detections in the validation images, COCO results
    metrics.json              their scores
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
import re
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
from cellseg_helpers.config import ROOT, RunConfig, first_line, one_line, replacing, resolve_path
from cellseg_helpers.data.cache import CellDataset, CellImage, DataError
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.data.labels import find_cells

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
    """The results of a finished run, for the analyses; needs no GPU and no weights. ``settings``,
    ``provenance`` and ``split`` hold the JSON files of these names.
    """

    run_dir: Path
    settings: dict[str, Any]
    provenance: dict[str, Any]
    split: dict[str, Any]
    history: pd.DataFrame  # one row per epoch
    truth: dict[str, Any]  # the validation images' cells, a COCO data set
    metrics: dict[str, Any]  # from ``metrics.evaluate``; an undefined score is NaN

    @cached_property
    def detections(self) -> Cells:
        """The best epoch's cells in the validation images; read when first asked for."""
        return Cells.from_coco(read_json(self.run_dir / "detections.json"))

    @cached_property
    def annotated(self) -> Cells:
        """The annotated cells of the validation images; decoded when first asked for."""
        return Cells.from_coco(self.truth["annotations"])


def load_run(run_dir: str | Path) -> Run:
    """Read a finished run.

    Raises:
        RunError: no such folder, or a file of it missing or unreadable.
    """
    folder, subject = resolve_path(run_dir), f"run_dir {run_dir}"
    if not folder.is_dir():
        advice = "train one with notebooks/02_train.ipynb or give another"
        raise RunError(f"{subject} does not exist; {advice}")
    json_names = ("settings", "provenance", "split", "truth", "metrics")
    for file in (*(f"{name}.json" for name in json_names), "detections.json", "history.csv"):
        if not (folder / file).exists():
            raise RunError(f"{subject} has no {file}: the run has not finished; run 02_train again")
    parts = {name: read_json(folder / f"{name}.json") for name in json_names}
    parts["metrics"] = _change_leaves(
        parts["metrics"], lambda leaf: math.nan if leaf is None else leaf
    )
    try:
        history = pd.read_csv(folder / "history.csv")
    except ValueError as error:
        damaged = f"a damaged history.csv ({one_line(error)})"
        raise RunError(f"{subject} has {damaged}; run 02_train again") from None
    return Run(run_dir=folder, history=history, **parts)


def context_of(run: Run) -> dict[str, Any]:
    """Columns that identify the run in each row of its tables: scale, data, split, maxDets."""
    data = Path(run.settings["data"])
    return {
        "scale": run.settings["scale"],
        "data": f"{data.parent.name}/{data.name}" if data.suffix == ".json" else data.name,
        "split": f"{run.split['kind']}, validation side",
        "maxDets": run.metrics["coco_dense"]["max_dets"][-1],
    }


def images_of_run(run: Run) -> tuple[list[CellImage], str]:
    """A run's validation images in the order of ``run.truth``, and a sentence on their origin; no
    images if the data are gone or have changed.
    """
    try:
        dataset = _open_data(run)
    except DataError as error:
        return [], f"No pictures: {first_line(error)}"
    index_of = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
    names = [image["file_name"] for image in run.truth["images"]]
    images = [dataset[index_of[name]] for name in names if name in index_of]
    data = f"the data {dataset.name!r}"
    if to_coco(images)["annotations"] != run.truth["annotations"]:
        return [], f"No pictures: {data} are no longer those that this run was scored on."
    return images, f"Pictures are from {data}; their cells are those that the run was scored on."


def annotations_of_run(run: Run) -> tuple[Cells, list[dict[str, Any]], str]:
    """All annotated cells of a run's data, the images (with their ``id``) and a sentence on which
    they are: only the validation images if the data are gone.
    """
    try:
        dataset = _open_data(run)
    except DataError as error:
        images = run.truth["images"]
        sentence = f"Only the {len(images)} validation images: {first_line(error)}"
        return run.annotated, images, sentence
    images = [{"id": number} for number in range(1, len(dataset) + 1)]
    cells = Cells.concatenate(find_cells(image.label_maps, i) for i, image in enumerate(dataset, 1))
    return cells, images, f"All {len(dataset)} annotated images of the data {dataset.name!r}."


def _open_data(run: Run) -> CellDataset:
    """The run's data with the annotations used in scoring; early runs saved no truth_reading."""
    settings = run.settings
    reading = settings.get("truth_reading", "pixel_values")
    return open_dataset(settings["data"], reading, 0, settings["skip_faulty_images"])


def save_table(table: pd.DataFrame, name: str, **context: Any) -> Path:
    """Write ``outputs/tables/<name>.csv``, whole or not at all.

    Args:
        table: its index is also written if it has a name.
        context: the first columns, the same in every row (see ``context_of``).

    Returns:
        The path under the repository's root.
    """
    rows = table.reset_index() if any(table.index.names) else table
    columns = [*context, *(column for column in rows.columns if column not in context)]
    path = Path(TABLES) / f"{name}.csv"
    write_text(resolve_path(path), rows.assign(**context)[columns].to_csv(index=False))
    return path


def rename_other_run(config: RunConfig) -> Path | None:
    """If the folder of this ``run_name`` holds a run with other settings or images, rename it, so
    that this run can start. Returns the new path, ``<name>.old-<n>``, or None.
    """
    folder = resolve_path(RUNS) / config.run_name
    if not (folder / "settings.json").exists():
        return None
    reading = (config.instance_reading, config.min_instance_area_px, config.skip_faulty_images)
    try:
        differences = _differences(config, open_dataset(config.data, *reading).fingerprint, folder)
    except (DataError, RunError):
        return None  # the training will say what is wrong
    if not differences:
        return None
    number = 1 + len(list(folder.parent.glob(f"{folder.name}.old-*")))
    return folder.rename(folder.with_name(f"{folder.name}.old-{number}"))


def start_run(
    config: RunConfig, fingerprint: str, split: dict[str, Any], truth: dict[str, Any]
) -> Path:
    """Make the run's folder, or prepare the existing one for resuming.

    Raises:
        RunError: the folder is damaged or holds a run with other settings or data (named).
    """
    config = config.named()
    run_dir = resolve_path(RUNS) / config.run_name
    if differences := _differences(config, fingerprint, run_dir):
        advice = "choose another run_name, give the old settings to go on, or delete that folder"
        other_run = f"a run with other settings ({_listed(differences)})"
        raise RunError(f"{run_dir} holds {other_run}; {advice}")
    for half_written in run_dir.glob(".*.*"):  # by a process that was killed
        shutil.rmtree(half_written, ignore_errors=True)
    write_json(run_dir / "split.json", split)
    write_json(run_dir / "truth.json", truth)
    if not (run_dir / "provenance.json").exists():  # keep that of the run's start
        write_json(run_dir / "provenance.json", provenance() | {"data_fingerprint": fingerprint})
    write_json(run_dir / "settings.json", config.to_dict())
    return run_dir


def _differences(config: RunConfig, fingerprint: str, run_dir: Path) -> dict[str, tuple[Any, Any]]:
    """What differs from the run in a folder, settings or else data: name -> (old, new).

    Raises:
        RunError: the folder's files are missing or damaged.
    """
    if not (run_dir / "settings.json").exists():
        return {}  # no run yet
    try:
        differences = config.differences(read_json(run_dir / "settings.json"))
        for name in ("precision", "anchor_sizes"):
            if getattr(config, name) == "auto":  # the run saved what "auto" became
                differences.pop(name, None)
        if not differences:
            old = read_json(run_dir / "provenance.json")["data_fingerprint"]
            if old != fingerprint:
                return {"data_fingerprint": (old[:12], fingerprint[:12])}
    except (OSError, TypeError, KeyError, AttributeError):
        lost = "lost or damaged files (settings.json, provenance.json)"
        raise RunError(f"{run_dir} has {lost}; delete that folder to train anew") from None
    return differences


def _listed(differences: dict[str, tuple[Any, Any]]) -> str:
    """The differences as part of a message."""
    return "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in differences.items())


def provenance() -> dict[str, Any]:
    """The current code version, package versions and machine."""
    import torch

    describe = ["git", "describe", "--always", "--dirty"]
    try:
        version = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True)
        code_version = version.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        code_version = "unknown (not a git checkout)"
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    processor = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "code_version": code_version,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "machine": {
            "platform": platform.platform(),
            "processor": processor[1] if processor else platform.processor(),
            "cpu_count": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """``torch.save``, whole or not at all: a kill leaves either the old or the new checkpoint."""
    import torch

    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, with ``weights_only=True``; RunError if it is not readable."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        problem = f"cannot be read ({one_line(error)})"
        raise RunError(f"checkpoint {path} {problem}; delete it to train anew") from None


def resume(parts: dict[str, Any], run_dir: Path, config: RunConfig) -> list[dict[str, Any]]:
    """Load a run's checkpoint ``last.pt``, if there is one, into model, optimizer and so on.

    Args:
        parts: name in the checkpoint -> object with ``load_state_dict`` (model, optimizer, ...).

    Returns:
        The history: one row for each epoch trained before the checkpoint; [] without one.

    Raises:
        RunError: the checkpoint is damaged, is of other settings (the message names them) or does
            not fit, or a file that was written before it is missing.
    """
    path = run_dir / "last.pt"
    if not path.exists():
        return []
    checkpoint, problem = load_checkpoint(path), ""
    try:
        history = checkpoint["history"]
        validated = any(not math.isnan(row["validation_loss"]) for row in history)
        if differences := config.differences(checkpoint["settings"]):
            problem = f"is of a run with other settings ({_listed(differences)})"
        else:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
        problem = f"does not fit this run ({one_line(error)})"
    if problem:
        raise RunError(f"checkpoint {path} {problem}; delete it to train anew")
    of_best = ["best.safetensors", "detections.json", "metrics.json"] if validated else []
    if lost := [name for name in [*of_best, "history.csv"] if not (run_dir / name).exists()]:
        raise RunError(f"{run_dir} has lost {', '.join(lost)}; delete that folder to train anew")
    return history


def save_weights(path: Path, state: dict[str, Any]) -> None:
    """Write weights as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write JSON, whole or not at all. NaN becomes null; a list is written on one line."""
    options = {"indent": None if isinstance(value, list) else indent, "allow_nan": False}
    try:
        text = json.dumps(value, **options)
    except ValueError:  # there is a NaN, the only value that does not equal itself
        value = _change_leaves(value, lambda leaf: leaf if leaf == leaf else None)
        text = json.dumps(value, **options)
    write_text(path, text + "\n")


def _change_leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested dicts and lists with ``change`` applied to each leaf."""
    if isinstance(tree, dict):
        return {key: _change_leaves(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_change_leaves(value, change) for value in tree]
    return change(tree)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> Any:
    """The content of a JSON file; a RunError if it is not valid JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        advice = "copy it again, or delete it and run again what made it"
        raise RunError(f"{path} is not valid JSON ({error}); {advice}") from None
