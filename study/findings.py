"""Measure the findings: differences between the reports' text and their released code.

``findings.yaml`` lists the findings. ``Measures`` collects the rows of ``findings.csv``, one per
measure. This module measures effects on scores; ``released_code``, those on data and model.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from IPython.display import Markdown, display

from cellseg_helpers import resampling
from cellseg_helpers.cells import CLASS_NAMES, Cells
from cellseg_helpers.config import NOT_PART_OF_A_RUN, first_line
from cellseg_helpers.data.cache import CellDataset, DataError
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.inference import predict_run
from cellseg_helpers.runs import RunError, read_json, write_json
from study import runs as study_runs
from study import tables, verdicts
from study.reported import E_THRESHOLDS
from study.runs import Study, Trained, differences

NO_CHANGE, CANNOT_TELL = "no visible change", "cannot tell"
HIGHER, LOWER = "higher as released", "lower as released"
SHOWN, NOT_SHOWN = "confirmed here", "no effect here"
COLUMNS = [
    "finding", "report", "text_says", "code_does", "measured_on", "measure", "base", "as_reported",
    "as_released", "effect", "low", "high", "verdict", "sentence", "seeds", "data", "split",
    "maxDets", "scale", "weights", "empty_because",
]  # fmt: skip
TRAINING_DETECTIONS = "training_detections.json"


class Finding(NamedTuple):
    """A difference between a report's text and its released code; see ``findings.yaml``."""

    key: str
    report: str
    title: str
    text_says: str
    code_does: str
    as_reported: str | None = None
    as_released: str | None = None
    change: str = ""


_rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
FINDINGS = {row["key"]: Finding(**row) for row in _rows}


def names_of(compared: pd.DataFrame) -> pd.Series:
    """The report and title of each row of ``findings.csv``; where a finding has several rows in the
    table, also what was measured, and on what.
    """
    titles = [f"{FINDINGS[key].report}: {FINDINGS[key].title}" for key in compared["finding"]]
    measured = " (" + compared["measure"] + ", " + compared["measured_on"] + ")"
    several = compared["finding"].duplicated(keep=False)
    return pd.Series(titles, compared.index) + measured.where(several, "")


class Measures:
    """Collects measures of the findings on a study's runs and their data, or on the drawn tissue if
    no run is finished or its data cannot be opened.

    Attributes:
        dataset: all annotated images of the data, with every cell.
        data: the data, as in the setting ``data`` of a run.
        sentence: describes the data.
        rows: the rows of ``findings.csv``, in the order in which they were measured.
    """

    def __init__(self, study: Study):
        self.study, self.rows = study, []
        runs = (trained for key in study_runs.run_keys() for trained in study.trained(key))
        settings = next((trained.run.settings for trained in runs), None)
        why_drawn = "" if settings else f"There is no finished run of {study.study}. "
        settings = settings or {"data": "drawn", "skip_faulty_images": False}
        self.data, skip_faulty = settings["data"], settings["skip_faulty_images"]
        try:
            self.dataset = open_dataset(self.data, skip_faulty_images=skip_faulty)
        except DataError as error:
            self.data, self.dataset = "drawn", open_dataset("drawn")
            why_drawn = f"The data of the runs cannot be opened ({first_line(error)}). "
        counts = f"{len(self.dataset)} annotated images, {self.dataset.counts.sum()} cells"
        self.sentence = f"{why_drawn}Data: {self.dataset.name!r}, {counts}."

    def count(
        self, key: str, measure: str, effect: float | None, sentence: str,
        shown: bool | None = None, on: str = "data", run: str = "",
    ) -> None:  # fmt: skip
        """Add a number without an interval.

        Args:
            key: the key of the finding.
            measure: what the number means, with its unit.
            effect: the number, or None if it could not be measured.
            sentence: what the number shows, or why there is none.
            shown: whether the number confirms the difference; by default, whether it is above 0.
            on: what was measured: ``data`` (all annotated images), ``model``, ``detections`` or
                ``training pair``.
            run: for ``detections``, the key of their run.
        """
        with self._row(key, measure, on, run) as row:
            if effect is None:
                raise RunError(sentence)
            shown = effect > 0 if shown is None else shown
            verdict = SHOWN if shown else NOT_SHOWN
            row |= {"effect": float(effect), "verdict": verdict, "sentence": sentence}
            if on == "data":
                row |= {"data": self.dataset.name, "split": "all annotated images"}
            if run:
                row |= {"seeds": 1, **self.study.first(run).context}

    def compare_runs(self, key: str) -> None:
        """Add the difference in AP50 between a finding's two runs, as released minus as reported,
        paired by image and seed.
        """
        runs = FINDINGS[key].as_reported, FINDINGS[key].as_released
        with self._row(key, "AP50", "training pair", *runs) as row:
            pairs, unchanged = self._pairs(*runs)
            first, remark = pairs[0][0], ""
            if unchanged:
                scale = first.run.settings["scale"]
                remark = f" (the {scale} scale leaves no difference in {', '.join(unchanged)})"
            labels = f"as reported, {runs[0]}", f"as released, {runs[1]}"
            scores = [[self.study.values(run) for run in side] for side in zip(*pairs, strict=True)]
            _add_comparison(row, dict(zip(labels, scores, strict=True)), first, remark=remark)

    def compare_detections(
        self, key: str, run: str, ways: Mapping[str, Callable[[Cells], Cells]], metric: str = "AP50"
    ) -> None:
        """Add the paired difference in ``AP50`` or ``F1`` between two ways to post-process the
        detections of a run, as released minus as reported. ``ways``: label -> function; first as
        reported, then as released.
        """
        with self._row(key, metric, "detections", run) as row:
            runs, scores = self._trained(run), {}
            for label, way in ways.items():
                scores[label] = [trained.rescored(way, metric) for trained in runs]
            _add_comparison(row, scores, runs[0])

    def compare_thresholds(self, key: str, run: str) -> None:
        """Add the difference in F1 of report E's fixed class thresholds minus thresholds chosen on
        one half of the images; both are measured on the other half.
        """
        with self._row(key, "F1", "detections", run) as row:
            runs = self._trained(run)
            halves = [trained.halves() for trained in runs]
            fixed = dict(zip(CLASS_NAMES, E_THRESHOLDS.values(), strict=True))
            scores = {"chosen on the other half": [half.f1(half.chosen) for half in halves]}
            scores["fixed"] = [half.f1(fixed) for half in halves]
            _add_comparison(row, scores, runs[0], halves[0].draw)
            row["sentence"] += f" {halves[0].sentence}"

    def compare_with_training_images(self, key: str, run: str) -> None:
        """Add the difference in AP50 of a run's first training between its training images and its
        validation images. It cannot be paired, since these are different images.
        """
        with self._row(key, "AP50", "detections", run) as row:
            trained = self._trained(run)[0]
            truth, detections = training_detections(trained, self.dataset)
            saved, unseen = trained.scores, self.study.values(trained)
            # another seed, so that the samples of the two sets of images are independent
            samples = resampling.draw_units(truth, saved.resamples, saved.seed + 1)
            training = resampling.bootstrap_ap50(truth, detections, samples.weights)
            sides = [verdicts.Side("unseen images", [unseen])]
            sides.append(verdicts.Side("training images", [training]))
            smaller = min(samples, saved, key=lambda side: side.units)
            result = verdicts.judge("training images score higher", *sides, smaller)
            row["effect"], _, row["low"], row["high"] = result.difference
            words = {verdicts.HOLDS: HIGHER, verdicts.OPPOSITE: LOWER}
            row |= {"verdict": words.get(result.word, CANNOT_TELL), "seeds": 1, **trained.context}
            row["split"] = f"{trained.run.split['kind']}, training minus validation side"
            row["sentence"] = (
                f"{run}: AP50 {result.other:.3f} on {len(truth['images'])} training images, "
                f"{result.base:.3f} on {len(saved.names)} unseen images, not paired. Reported: "
                "0.461, and 0.27 on the hidden test set."
            )

    def show(self, key: str) -> None:
        """Display what a finding is, its measures as a table, and a sentence on each."""
        finding = FINDINGS[key]
        display(Markdown(f"Text: {finding.text_says}.\n\nCode: {finding.code_does}."))
        rows = [row for row in self.rows if row["finding"] == key]
        table = {"effect": [], "95 % interval": [], "verdict": [row["verdict"] for row in rows]}
        for effect, low, high in ((row["effect"], row["low"], row["high"]) for row in rows):
            number = "" if math.isnan(effect) else f"{effect:.4g}"
            table["effect"].append(number if math.isnan(low) else f"{effect:+.3f}")
            table["95 % interval"].append("" if math.isnan(low) else f"[{low:+.3f}, {high:+.3f}]")
        display(tables.page(pd.DataFrame(table, [row["measure"] for row in rows]), key))
        display(Markdown("\n".join(f"- {row.get('summary', row['sentence'])}" for row in rows)))

    def table(self) -> pd.DataFrame:
        """The content of ``findings.csv``, in the order of ``findings.yaml``.

        Raises:
            ValueError: a finding has no measure.
        """
        measured = {row["finding"] for row in self.rows}
        if missing := [key for key in FINDINGS if key not in measured]:
            raise ValueError(f"no measure of {', '.join(missing)}; each finding needs one")
        rows = [row for key in FINDINGS for row in self.rows if row["finding"] == key]
        return pd.DataFrame(rows, columns=COLUMNS)

    @contextmanager
    def _row(
        self, key: str, measure: str, measured_on: str, base: str = "", other: str = ""
    ) -> Iterator[dict[str, Any]]:
        """Add a row that the ``with`` block fills in; if the block raises a ``RunError``, the row
        gets no effect, and ``empty_because`` says why.
        """
        finding = FINDINGS[key]
        row = dict.fromkeys(COLUMNS, "") | dict.fromkeys(("effect", "low", "high"), math.nan)
        row |= {"finding": key, "report": finding.report, "text_says": finding.text_says}
        row |= {"code_does": finding.code_does, "measured_on": measured_on, "measure": measure}
        row |= {"base": base, "as_released": other}
        if measured_on == "training pair":
            row["as_reported"] = base
        try:
            yield row
        except RunError as error:
            verdict = verdicts.not_asked(f"{finding.title}, {measure}", str(error))
            row |= {"verdict": verdict.word, "sentence": verdict.sentence}
            row["empty_because"] = str(error)
            row["summary"] = f"{measure}: **{verdict.word}**. Reason: {error}."
        self.rows.append(row)

    def _trained(self, run: str) -> list[Trained]:
        """The trainings of a run; a ``RunError`` if there are none."""
        if runs := self.study.trained(run):
            return runs
        raise RunError(self.study.missing(run))

    def _pairs(self, *keys: str) -> tuple[list[tuple[Trained, Trained]], list[str]]:
        """Pair the trainings of two runs by seed, and list the settings in which the runs should
        differ but do not.

        Raises:
            RunError: no seed was trained for both runs, or the trainings of a pair also differ in
                other settings, or in none.
        """
        first, second = ({run.seed: run for run in self.study.trained(key)} for key in keys)
        pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
        if not pairs:
            why = "; ".join(filter(None, map(self.study.missing, keys)))
            raise RunError(why or "no seed was trained on both sides")
        base, other = (study_runs.settings(key, "full", "drawn", 0) for key in keys)
        intended = set(other.differences(base.to_dict()))
        for pair in pairs:
            changed, settings = _changed_settings(*pair), pair[0].run.settings
            if differing := differences(*pair, besides=intended):
                raise RunError(f"the two runs are of other {differing}")
            if others := sorted(changed - intended):
                raise RunError(f"the two runs also differ in {', '.join(others)}")
            if not changed:
                alike = ", ".join(f"{name} {settings.get(name)!r}" for name in sorted(intended))
                scale = f"the {settings['scale']} scale"
                raise RunError(f"{scale} gives both runs {alike}: it cannot test this pair")
        return pairs, sorted(intended - _changed_settings(*pairs[0]))


def training_detections(trained: Trained, dataset: CellDataset) -> tuple[dict[str, Any], Cells]:
    """The annotations of some of a run's training images (a COCO data set), and its detections in
    them. As many images as in validation are taken, at even distances in the list of training
    images. Detections are predicted once and saved in the run folder.

    Raises:
        RunError: the run is of other data, or its folder has neither weights nor these detections.
    """
    run, names = trained.run, trained.run.split["train"]
    if not set(names) <= set(dataset.image_ids):
        raise RunError(f"{run.run_dir.name} was trained on other images than the data's")
    number = min(len(run.truth["images"]), len(names))
    names = [names[i] for i in np.linspace(0, len(names) - 1, number).round().astype(int)]
    images = [dataset[dataset.image_ids.index(name)] for name in names]
    path = run.run_dir / TRAINING_DETECTIONS
    saved = read_json(path) if path.exists() else {}
    if saved.get("names") != names:
        try:
            cells = predict_run(run.run_dir, [cell_image.image for cell_image in images])
        except RunError as error:
            raise RunError(str(error).replace(f"run_dir {run.run_dir}", run.run_dir.name)) from None
        saved = {"names": names, "detections": cells.to_coco()}
        write_json(path, saved, indent=None)
    return to_coco(images), Cells.from_coco(saved["detections"])


def _add_comparison(
    row: dict[str, Any],
    scores: Mapping[str, Sequence[np.ndarray]],
    trained: Trained,
    draw: resampling.Draw | None = None,
    remark: str = "",
) -> None:
    """Fill in a row from the scores of two sides (label -> for each seed float64 [1 + B])."""
    sides = [verdicts.Side(label, values) for label, values in scores.items()]
    change, metric = FINDINGS[row["finding"]].change + remark, row["measure"]
    claim = f"With {change}, the score does not change visibly"
    options = {"expected": 0, "same_weights": not row["as_released"], "metric": metric}
    options["caution"] = trained.caution
    result = verdicts.judge(claim, *sides, draw or trained.scores, **options)
    effect, _, low, high = result.difference
    verdict = HIGHER if effect > 0 else LOWER
    if result.word != verdicts.OPPOSITE:
        verdict = CANNOT_TELL if result.word == verdicts.CANNOT_TELL else NO_CHANGE
    row |= {"effect": effect, "low": low, "high": high, "verdict": verdict, **trained.context}
    row |= {"seeds": len(sides[0].values), "sentence": result.sentence}
    values = f"{metric} goes from {result.base:.3f} to {result.other:.3f}"
    row["summary"] = f"With {change}, {values}: **{verdict}**."


def _changed_settings(reported: Trained, released: Trained) -> set[str]:
    """The names of the settings in which two runs differ."""
    before, after = reported.run.settings, released.run.settings
    names = (before | after).keys() - set(NOT_PART_OF_A_RUN)
    return {name for name in names if before.get(name) != after.get(name)}
