"""The runs of the study: find their parameter files, and read finished runs. Needs no torch.

The key of a run names its parameter files: ``a/resnet101`` means
``params/reports/a/resnet101.yaml``; ``c/final+coco_weights`` means ``params/reports/c/final.yaml``
(its base) and then ``params/findings/c/final+coco_weights.yaml``, which changes one thing.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cellseg_helpers import resampling
from cellseg_helpers.cells import Cells
from cellseg_helpers.config import ROOT, RunConfig, resolve_path
from cellseg_helpers.metrics import Matches, count_matches, match_detections
from cellseg_helpers.runs import Run, RunError, context_of, load_run, read_json
from cellseg_helpers.thresholds import Thresholds, choose_thresholds, keep_scores
from study.reported import E_GRID, SYSTEMS, VARIANTS

REPORTS = Path("params/reports")
FINDINGS = Path("params/findings")
SCALES = {
    "full": [],
    "sample": [Path("params/sample.yaml")],
    "quick": [Path("params/quick.yaml"), Path("params/quick_study.yaml")],
}
FINALS = tuple(SYSTEMS.values())  # each report's own system
HALVING_SEED = 0  # for splitting images into a half to choose thresholds and a half to test them


def run_keys(scale: str = "full") -> list[str]:
    """List the runs of the study: those of the reports, then those of the findings. Runs that have
    the same settings as their base at this scale are left out.
    """
    keys = []
    for folder in (REPORTS, FINDINGS):
        files = sorted((ROOT / folder).glob("*/*.yaml"))
        keys += [f"{file.parent.name}/{file.stem}" for file in files]
    return keys if scale == "full" else [key for key in keys if differs_from_base(key, scale)]


def differs_from_base(key: str, scale: str) -> bool:
    """Whether a run's settings differ from its base's at a scale; True for a run without a base."""
    base = key.split("+")[0]
    return key == base or _config(key, scale) != _config(base, scale)


def parameter_files(key: str, scale: str) -> list[Path]:
    """List the parameter files of a run in the order in which they are read, relative to the
    repository's root. The files of the scale come last (``full`` has none).

    Raises:
        ValueError: no such run or scale.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; one of {', '.join(SCALES)}")
    if key not in run_keys():
        raise ValueError(f"unknown run {key!r}; one of {', '.join(run_keys())}")
    base = key.split("+")[0]
    change = [] if key == base else [FINDINGS / f"{key}.yaml"]
    return [REPORTS / f"{base}.yaml", *change, *SCALES[scale]]


def _config(key: str, scale: str) -> RunConfig:
    """The settings from the parameter files of a run (``settings`` adds data, seed and name)."""
    return RunConfig.from_yaml(*parameter_files(key, scale))


def study_name(scale: str, data: str) -> str:
    """``<scale>-<name of the data folder>``; for a COCO file, the folder that contains it."""
    if data == "drawn":
        return f"{scale}-drawn"
    path = resolve_path(data).resolve()
    return f"{scale}-{(path.parent if path.suffix == '.json' else path).name}"


def run_name(study: str, key: str, seed: int) -> str:
    """The name of a run's folder under ``outputs/runs``.

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


class Halves(NamedTuple):
    """Score thresholds chosen on one half of a run's images, and the other half to test them on."""

    judging: Matches  # of the other half
    chosen: dict[str, float]  # class -> the threshold with the best F1
    threshold: float  # with the best F1 for all classes together
    draw: resampling.Draw  # bootstrap samples of the other half
    sentence: str  # that describes the halves

    def f1(self, limits: Thresholds) -> np.ndarray:
        """F1 on the other half with the thresholds ``limits``, then its B bootstrap values."""
        return _f1(keep_scores(self.judging, limits), self.draw)


class Trained(NamedTuple):
    """A finished and scored run of a study."""

    seed: int
    run: Run
    finished: dict[str, Any]  # finished.json
    scores: resampling.SavedScores  # scores.json

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.run.run_dir.name

    @property
    def context(self) -> dict[str, Any]:
        """Columns for tables: scale, data, split, maxDets, weights."""
        return context_of(self.run) | {"weights": Path(self.run.settings["weights"]).name}

    @property
    def caution(self) -> str:
        """At quick scale, a sentence that warns of over-interpreting a comparison; else ''."""
        settings = self.run.settings
        if settings["scale"] != "quick":
            return ""
        steps, weights = settings["epochs"] * settings["steps_per_epoch"], settings["weights"]
        how = f"Quick scale ({steps} steps, weights {Path(weights).name})"
        return f"{how}: it says nothing of models trained to the end."

    def rescored(self, change: Callable[[Cells], Cells], metric: str = "AP50") -> np.ndarray:
        """``AP50`` or ``F1`` of the changed detections, then its B bootstrap values."""
        truth, cells = self.run.truth, change(self.run.detections)
        samples = resampling.draw_units(truth, self.scores.resamples, self.scores.seed)
        if metric == "AP50":
            return resampling.bootstrap_ap50(truth, cells, samples.weights)
        return _f1(match_detections(truth, cells), samples)

    def halves(self) -> Halves:
        """Choose thresholds from report E's grid on one half of the images.

        Raises:
            RunError: there are fewer than two images.
        """
        try:
            *halves, sentence = resampling.halve(self.run.truth, self.run.detections, HALVING_SEED)
        except ValueError as error:
            raise RunError(str(error)) from None
        choosing, judging = (match_detections(*half) for half in halves)
        chosen = choose_thresholds(choosing, E_GRID)
        threshold = max(E_GRID, key=lambda value: count_matches(choosing, value)["all"].f1)
        samples = resampling.draw_units(halves[1].truth)
        return Halves(judging, chosen, threshold, samples, sentence)


def _f1(matches: Matches, samples: resampling.Draw) -> np.ndarray:
    """F1 of all classes together, then its B bootstrap values; 0 instead of NaN."""
    return np.nan_to_num(resampling.count_scores(matches, samples.weights).values["F1", "all"])


class Study:
    """The runs of a study. Each is read when it is first needed.

    Args:
        runs_dir: the folder that contains the run folders.
        study: the prefix of the run folders' names, such as ``quick-drawn``.
        seeds: number of trainings of each key, with the seeds 0, 1, ...
    """

    def __init__(self, runs_dir: str, study: str, seeds: int = 1):
        self.runs_dir, self.study, self.seeds = runs_dir, study, seeds
        self._runs: dict[str, list[Trained | str]] = {}
        self._values: dict[tuple[str, str], np.ndarray] = {}

    def trained(self, key: str) -> list[Trained]:
        """The finished runs of a key by seed, if comparable with the first (``differences``)."""
        return [run for run in self._runs_or_reasons(key) if isinstance(run, Trained)]

    def first(self, key: str) -> Trained | None:
        """The finished run of a key with the lowest seed, or None."""
        return next(iter(self.trained(key)), None)

    def missing(self, key: str) -> str:
        """Which seeds of a key are missing, and why; '' if none are."""
        reasons = (reason for reason in self._runs_or_reasons(key) if isinstance(reason, str))
        return "; ".join(reasons)

    def values(self, trained: Trained, variant: str = "all detections") -> np.ndarray:
        """AP50 of a run's detections after the post-processing of a variant, then its B bootstrap
        values: float64 [1 + B].
        """
        if variant == "all detections":
            return np.array(trained.scores.AP50, float)
        name = trained.name, variant
        if name not in self._values:
            self._values[name] = trained.rescored(VARIANTS[variant])
        return self._values[name]

    def _runs_or_reasons(self, key: str) -> list[Trained | str]:
        """For each seed the run, or why it is missing or cannot be compared with the first one."""
        if key not in self._runs:
            runs = []
            for seed in range(self.seeds):
                run = self._read(key, seed)
                # The first run sets what the others must share with it.
                first = next((other for other in runs if isinstance(other, Trained)), run)
                if isinstance(run, Trained) and (differing := differences(first, run)):
                    run = f"{run.name} is of other {differing} than {first.name}"
                runs.append(run)
            self._runs[key] = runs
        return self._runs[key]

    def _read(self, key: str, seed: int) -> Trained | str:
        """Read a run, or say why it is missing."""
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
            trained = Trained(seed, load_run(folder), finished, scores)
            read_json(folder / "detections.json")  # to notice a damaged file now, not later
            return trained
        except RunError as error:
            return str(error).replace(str(folder), name)


def differences(one: Trained, other: Trained, besides: Collection[str] = ()) -> str:
    """Comma-separated names of what two runs do not share (ignoring ``besides``): data, scale,
    split, validation images or cells, bootstrap samples; '' if they are comparable.
    """
    facts: dict[str, Callable[[Trained], Any]] = {
        "data": lambda trained: Path(trained.run.settings["data"]).name,
        "scale": lambda trained: trained.run.settings["scale"],
        "split": lambda trained: trained.run.split["kind"],
        "validation images or cells": lambda trained: trained.run.truth,
        "bootstrap samples": lambda trained: trained.scores._replace(AP50=None, names=None),
    }
    differing = [name for name, fact in facts.items() if fact(one) != fact(other)]
    return ", ".join(name for name in differing if name not in besides)
