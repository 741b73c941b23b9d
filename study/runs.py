"""The runs of the study: which parameter files make each, and finished runs read back. No torch.

A run's key names its parameter files: ``a/resnet101`` is ``params/reports/a/resnet101.yaml``;
``c/final+coco_weights`` is ``params/reports/c/final.yaml``, then
``params/findings/c/final+coco_weights.yaml``, which changes one thing.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cellseg_helpers import resampling
from cellseg_helpers.config import ROOT, RunConfig, resolve_path
from cellseg_helpers.runs import Run, RunError, load_run, read_json
from study.reported import SYSTEMS, VARIANTS

REPORTS = Path("params/reports")
FINDINGS = Path("params/findings")
SCALES = {
    "full": [],
    "sample": [Path("params/sample.yaml")],
    "quick": [Path("params/quick.yaml"), Path("params/quick_study.yaml")],
}
FINALS = tuple(SYSTEMS.values())  # each report's own system


def run_keys(scale: str = "full") -> list[str]:
    """Every run of the study at a scale: those of the reports, then those of the findings, without
    the ones that the scale makes equal to their base.

    Raises:
        ValueError: no such scale, or a parameter file that cannot be used.
    """
    keys = [
        path.relative_to(ROOT / folder).with_suffix("").as_posix()
        for folder in (REPORTS, FINDINGS)
        for path in sorted((ROOT / folder).glob("*/*.yaml"))
    ]
    return keys if scale == "full" else [key for key in keys if differs_from_base(key, scale)]


def differs_from_base(key: str, scale: str) -> bool:
    """Whether a run of the findings has other settings than its base at a scale; True for a run of
    a report, which has no base.
    """
    base, *change = key.split("+")
    return not change or _config(key, scale) != _config(base, scale)


def parameter_files(key: str, scale: str) -> list[Path]:
    """The parameter files of a run in their order, relative to the repository's root; those of a
    scale other than ``full`` come last.

    Raises:
        ValueError: no such run or scale.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; one of {', '.join(SCALES)}")
    if key not in run_keys():
        raise ValueError(f"unknown run {key!r}; one of {', '.join(run_keys())}")
    base, *change = key.split("+")
    files = [REPORTS / f"{base}.yaml", *(FINDINGS / f"{key}.yaml" for _ in change)]
    return files + SCALES[scale]


def _config(key: str, scale: str) -> RunConfig:
    return RunConfig.from_yaml(*parameter_files(key, scale))


def study_name(scale: str, data: str) -> str:
    """``<scale>-<name of the data folder>``; for a COCO file the folder that it is in."""
    if data == "drawn":
        return f"{scale}-drawn"
    path = resolve_path(data).resolve()
    return f"{scale}-{(path.parent if path.suffix == '.json' else path).name}"


def run_name(study: str, key: str, seed: int) -> str:
    """Name of a run's folder under ``outputs/runs``.

    >>> run_name("quick-drawn", "a/resnet18", 0)
    'quick-drawn-a-resnet18-seed0'
    """
    return f"{study}-{key.replace('/', '-')}-seed{seed}"


def settings(key: str, scale: str, data: str, seed: int) -> RunConfig:
    """The settings of a run of the study.

    Raises:
        ValueError: no such run or scale, or a parameter file that cannot be used.
    """
    name = run_name(study_name(scale, data), key, seed)
    return replace(_config(key, scale), data=data, seed=seed, run_name=name)


class Trained(NamedTuple):
    """A finished and scored run of a study."""

    seed: int
    run: Run
    finished: dict[str, Any]  # finished.json
    scores: resampling.SavedScores  # scores.json

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return self.run.run_dir.name

    @property
    def caution(self) -> str:
        """At quick scale a sentence on what a comparison is worth, else ''."""
        settings = self.run.settings
        if settings["scale"] != "quick":
            return ""
        steps, weights = settings["epochs"] * settings["steps_per_epoch"], settings["weights"]
        how = f"Quick scale ({steps} steps, weights {Path(weights).name})"
        return f"{how}: it says nothing of models trained to the end."


class Study:
    """The runs of a study, each read when it is first asked for.

    Args:
        runs_dir: the folder of the run folders.
        study: what the folders' names begin with, such as ``quick-drawn``.
        seeds: number of trainings of each key, from seed 0.
    """

    def __init__(self, runs_dir: str, study: str, seeds: int = 1):
        self.runs_dir, self.study, self.seeds = runs_dir, study, seeds
        self._runs: dict[tuple[str, int], Trained | str] = {}
        self._values: dict[tuple[str, str], np.ndarray] = {}

    def trained(self, key: str) -> list[Trained]:
        """The finished runs of a key by seed, all on the data, split and scale of the first."""
        return [run for run in self._of_key(key) if isinstance(run, Trained)]

    def first(self, key: str) -> Trained | None:
        """The finished run of a key with the lowest seed, or None."""
        return next(iter(self.trained(key)), None)

    def missing(self, key: str) -> str:
        """Which seeds of a key are missing, and why; '' if none is."""
        return "; ".join(reason for reason in self._of_key(key) if isinstance(reason, str))

    def values(self, trained: Trained, variant: str = "all detections") -> np.ndarray:
        """AP50 of a run after a variant's post-processing, and its bootstrap values: float64
        [1 + B].
        """
        name, run, scores = (trained.name, variant), trained.run, trained.scores
        if name not in self._values:
            if variant == "all detections":
                self._values[name] = np.array(scores.AP50, float)
            else:
                weights = resampling.draw_units(run.truth, scores.resamples, scores.seed).weights
                cells = VARIANTS[variant](run.detections)
                self._values[name] = resampling.bootstrap_ap50(run.truth, cells, weights)
        return self._values[name]

    def _of_key(self, key: str) -> list[Trained | str]:
        """For each seed the run, or why it is missing."""
        for seed in range(self.seeds):
            if (key, seed) not in self._runs:
                self._runs[key, seed] = self._read(key, seed)
        return [self._runs[key, seed] for seed in range(self.seeds)]

    def _read(self, key: str, seed: int) -> Trained | str:
        name = run_name(self.study, key, seed)
        folder = resolve_path(self.runs_dir) / name
        if not folder.is_dir():
            scale, base = self.study.split("-")[0], key.split("+")[0]
            if scale in SCALES and not differs_from_base(key, scale):
                alike = f"gives it all the settings of {base}"
                return f"{key} is not trained at the {scale} scale, which {alike}"
            return f"no run {name}"
        if not (folder / "finished.json").exists():
            return f"{name} has not finished (no finished.json)"
        if not (folder / "scores.json").exists():
            return f"{name} was not scored, run 03_evaluate on it (no scores.json)"
        try:
            finished = read_json(folder / "finished.json")
            scores = resampling.load_scores(folder / "scores.json")
            found = Trained(seed, load_run(folder), finished, scores)
            read_json(folder / "detections.json")  # a damaged file is found now, not later
        except RunError as error:
            return str(error).replace(str(folder), name)
        before = [run for at in range(seed) if isinstance(run := self._runs[key, at], Trained)]
        if before and (differing := differences(before[0], found)):
            return f"{name} is of other {differing} than {before[0].name}"
        return found


def differences(one: Trained, other: Trained, besides: Collection[str] = ()) -> str:
    """Comma-separated names of what two runs do not share (ignoring ``besides``): data, scale,
    split, validation images or cells, bootstrap samples; '' if they are comparable.
    """
    first, second = (
        {
            "data": Path(trained.run.settings["data"]).name,
            "scale": trained.run.settings["scale"],
            "split": trained.run.split["kind"],
            "validation images or cells": trained.run.truth,
            "bootstrap samples": trained.scores._replace(AP50=None, names=None),
        }
        for trained in (one, other)
    )
    return ", ".join(name for name in first if first[name] != second[name] and name not in besides)
