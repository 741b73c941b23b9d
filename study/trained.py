"""The finished and scored runs of a study, read from their folders. No torch."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cellseg_helpers import resampling
from cellseg_helpers.config import resolve_path
from cellseg_helpers.data.hw3 import CellImage
from cellseg_helpers.runs import Run, RunError, images_of_run, load_run, read_json
from study.reported import VARIANTS
from study.runs import SCALES, differs_from_base, run_name


class Trained(NamedTuple):
    """A finished and scored run of a study.

    Attributes:
        seed: of the run.
        run: its folder.
        finished: its ``finished.json``.
        scores: its ``scores.json``.
    """

    seed: int
    run: Run
    finished: dict[str, Any]
    scores: resampling.SavedScores

    @property
    def caution(self) -> str:
        """At quick scale a sentence that says what a comparison is worth, else an empty text."""
        settings = self.run.settings
        if settings["scale"] != "quick":
            return ""
        steps = settings["epochs"] * settings["steps_per_epoch"]
        return f"Quick scale ({steps} steps, weights {Path(settings['weights']).name}): it says nothing of models trained to the end."


class Study:
    """The runs of a study, read when they are first asked for.

    Args:
        runs_dir: the folder of their folders.
        study: what their names begin with, as ``quick-drawn``.
        seeds: how many of each, from 0.
    """

    def __init__(self, runs_dir: str, study: str, seeds: int = 1):
        self.runs_dir, self.study, self.seeds = runs_dir, study, seeds
        self._trained: dict[tuple[str, int], Trained | str] = {}
        self._values: dict[tuple[str, str], np.ndarray] = {}
        self._images: dict[str, tuple[list[CellImage], str]] = {}

    def trained(self, key: str) -> list[Trained]:
        """The finished runs of a key, by seed; of the first one's data, split and scale."""
        found = [self._read(key, seed) for seed in range(self.seeds)]
        return [run for run in found if isinstance(run, Trained)]

    def first(self, key: str) -> Trained | None:
        """The finished run of a key with the lowest seed, or None."""
        return next(iter(self.trained(key)), None)

    def missing(self, key: str) -> str:
        """Which seeds of a key are missing, and why; empty where none is."""
        reasons = [
            reason for seed in range(self.seeds) if isinstance(reason := self._read(key, seed), str)
        ]
        return "; ".join(reasons)

    def values(self, trained: Trained, variant: str = "all detections") -> np.ndarray:
        """AP50 of a run after a variant's post-processing, and its bootstrap values: float64 [1 +
        B].
        """
        place = trained.run.run_dir.name, variant
        if place not in self._values:
            if variant == "all detections":
                self._values[place] = np.array(trained.scores.AP50, float)
            else:
                truth, found = trained.run.truth, trained.run.detections
                weights = resampling.draw_units(
                    truth, trained.scores.resamples, trained.scores.seed
                ).weights
                self._values[place] = resampling.bootstrap_ap50(
                    truth, VARIANTS[variant](found, truth["images"]), weights
                )
        return self._values[place]

    def images(self, key: str) -> tuple[list[CellImage], str]:
        """The validation images of a key's first run, and a sentence; none where they, or the run,
        are not at hand.
        """
        if key not in self._images:
            trained = self.first(key)
            self._images[key] = (
                images_of_run(trained.run)
                if trained
                else ([], f"No pictures: {self.missing(key)}.")
            )
        return self._images[key]

    def _read(self, key: str, seed: int) -> Trained | str:
        """A run, or why there is none."""
        if (key, seed) not in self._trained:
            self._trained[key, seed] = self._open(key, seed)
        return self._trained[key, seed]

    def _open(self, key: str, seed: int) -> Trained | str:
        name = run_name(self.study, key, seed)
        folder = resolve_path(self.runs_dir) / name
        if not folder.is_dir():
            scale = self.study.split("-")[0]
            if scale in SCALES and not differs_from_base(key, scale):
                return f"{key} is not trained at the {scale} scale, which gives it all the settings of {key.split('+')[0]}"
            return f"no run {name}"
        for file, reason in {
            "finished.json": "has not finished",
            "scores.json": "was not scored, run 03_evaluate on it",
        }.items():
            if not (folder / file).exists():
                return f"{name} {reason} (no {file})"
        try:
            finished, scores = (
                read_json(folder / "finished.json"),
                resampling.load_scores(folder / "scores.json"),
            )
            found = Trained(seed, load_run(folder), finished, scores)
        except RunError as error:
            return str(error).replace(str(folder), name)
        if seed:
            before = next(
                (
                    run
                    for earlier in range(seed)
                    if isinstance(run := self._read(key, earlier), Trained)
                ),
                None,
            )
            if before and (differing := differences(before, found)):
                return f"{name} is of other {differing} than {before.run.run_dir.name}"
        return found


def differences(one: Trained, other: Trained, besides: Collection[str] = ()) -> str:
    """In which of data, scale, split, truth and scoring, ``besides`` some, two runs differ, in
    words; empty where they can be compared.
    """
    before, after = (
        {
            "data": Path(trained.run.settings["data"]).name,
            "scale": trained.run.settings["scale"],
            "split": trained.run.split["kind"],
            "validation images or cells": trained.run.truth,
            "bootstrap samples": trained.scores._replace(AP50=None, names=None),
        }
        for trained in (one, other)
    )
    return ", ".join(name for name in before if before[name] != after[name] and name not in besides)
