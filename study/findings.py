"""Where the reports' released code differs from their text, and what each difference does: to the
data, the model, the score.

First the registry: the differences, as data, in the order of the reports; then pairs of scores that
differ in nothing else, and the table of all. What a difference does to data and model is measured
in ``released_code``.
"""

import math
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from cellseg_helpers import resampling, thresholds
from cellseg_helpers.config import NOT_PART_OF_A_RUN
from cellseg_helpers.data.cache import CellDataset, DataError
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.inference import predict_run
from cellseg_helpers.metrics import match_detections
from cellseg_helpers.runs import RunError, read_json, write_json
from study import released_code, verdicts
from study import runs as study_runs
from study.reported import E_GRID, E_THRESHOLDS
from study.reports import HALVING_SEED
from study.runs import Study, Trained, differences

Detections = list[dict[str, Any]]

Change = Callable[[Detections, list[dict[str, Any]]], Detections]  # as reported.VARIANTS

# -------------------------------------------------------------------------------------------------------------------
# the registry


class Finding(NamedTuple):
    """A difference between a report's text and its released code.

    Attributes:
        key: short name.
        report: letter, or letters.
        title: of it.
        text_says: in the report.
        code_does: in the released files.
        as_reported: key of the run that follows the text, or None where no training is affected.
        as_released: key of the run that follows the code, all else equal.
        claim: what the pair asks: that this changes nothing to be seen.
    """

    key: str
    report: str
    title: str
    text_says: str
    code_does: str
    as_reported: str | None = None
    as_released: str | None = None
    claim: str = ""


FINDINGS = [
    Finding(**row)
    for row in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
]
BY_KEY = {finding.key: finding for finding in FINDINGS}


def heading(key: str) -> str:
    """A finding as Markdown: its title, what the text says, what the code does, and the runs that
    tell what it matters.
    """
    finding = BY_KEY[key]
    lines = [
        f"## Report{'s' * (',' in finding.report)} {finding.report}: {finding.title}",
        "",
        f"- **Text:** {finding.text_says}",
        f"- **Code:** {finding.code_does}",
    ]
    if finding.as_reported:
        lines.append(
            f"- **Runs:** `{finding.as_reported}` as reported, `{finding.as_released}` as released"
        )
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------------
# data at hand


def data_of(study: Study) -> tuple[CellDataset, str, str]:
    """All annotated images of the data that a study's runs are of, every cell; the data as settings
    name them; a sentence.

    Where there is no run, or its data are gone, they are the embedded drawn tissue.
    """
    runs = (trained for key in study_runs.run_keys() for trained in study.trained(key))
    first = next(runs, None)
    data, why = (
        (first.run.settings["data"], "")
        if first
        else ("drawn", f"There is no finished run of {study.study}. ")
    )
    try:
        dataset = open_dataset(
            data, skip_faulty_images=bool(first and first.run.settings["skip_faulty_images"])
        )
    except DataError as error:
        data, dataset = "drawn", open_dataset("drawn")
        why = f"The data of the runs cannot be opened ({str(error).splitlines()[0]}). "
    return (
        dataset,
        data,
        f"{why}Data: {dataset.name!r}, {len(dataset)} annotated images, {dataset.counts.sum()} cells.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# detections

TRAINING_DETECTIONS = "training_detections.json"


def training_detections(
    trained: Trained, dataset: CellDataset
) -> tuple[dict[str, Any], Detections]:
    """The truth of some of a run's training images, as many as it has validation images, spread
    evenly, and its detections there.

    They are predicted once and kept as ``training_detections.json`` in the run folder.

    Args:
        trained: the run.
        dataset: all annotated images of its data, every cell.

    Raises:
        RunError: other data, or neither weights nor kept detections in the run folder.
    """
    run = trained.run
    if not set(run.split["train"]) <= set(dataset.image_ids):
        raise RunError(f"{run.run_dir.name} was trained on other images than those at hand")
    places = (
        np.linspace(
            0, len(run.split["train"]) - 1, min(len(run.truth["images"]), len(run.split["train"]))
        )
        .round()
        .astype(int)
    )
    names = [run.split["train"][place] for place in places]
    images = [dataset[dataset.image_ids.index(name)] for name in names]
    path = run.run_dir / TRAINING_DETECTIONS
    kept = read_json(path) if path.exists() else {}
    if kept.get("names") != names:
        try:
            kept = {
                "names": names,
                "detections": predict_run(run.run_dir, [image.image for image in images]).to_coco(),
            }
        except RunError as error:
            raise RunError(str(error).replace(f"run_dir {run.run_dir}", run.run_dir.name)) from None
        write_json(path, kept, indent=None)
    return to_coco(images), kept["detections"]


# ----------------------------------------------------------------------------------------------------------
# pairs and their table

NO_CHANGE, CANNOT_TELL, HIGHER, LOWER = (
    "no change to be seen",
    "cannot tell",
    "higher as released",
    "lower as released",
)
SHOWN, NOT_HERE = "confirmed here", "no effect here"


class Measurement(NamedTuple):
    """One number about a finding.

    Attributes:
        finding: its key.
        measure: what the effect is, with its unit.
        effect: NaN where it could not be measured.
        low: of the 95 % interval; NaN where a count or a property of a model has none.
        high: of it.
        verdict: of scores ``NO_CHANGE``, ``CANNOT_TELL``, ``HIGHER`` or ``LOWER``, else ``SHOWN``
            or ``NOT_HERE``, or ``verdicts.NOT_ASKED``.
        sentence: it in words.
        measured_on: ``data``, ``model``, ``detections`` or ``training pair``.
        base: key of the run.
        other: key of the run that differs from it, or "".
        seeds: number of trainings on either side.
        context: data, split, maxDets, scale.
        empty_because: why there is no effect.
    """

    finding: str
    measure: str
    effect: float
    low: float
    high: float
    verdict: str
    sentence: str
    measured_on: str
    base: str = ""
    other: str = ""
    seeds: int = 0
    context: dict[str, Any] = {}
    empty_because: str = ""


def measured(
    key: str,
    measure: str,
    effect: float,
    shown: bool,
    sentence: str,
    dataset: CellDataset | None = None,
) -> Measurement:
    """A count on the data, or (without ``dataset``) a property of the model; ``shown``: it bears
    the difference out.
    """
    context = {"data": dataset.name, "split": "all annotated images"} if dataset else {}
    word = SHOWN if shown else NOT_HERE
    return Measurement(
        key,
        measure,
        float(effect),
        math.nan,
        math.nan,
        word,
        sentence,
        "data" if dataset else "model",
        context=context,
    )


def missing(
    key: str, measure: str, measured_on: str, reason: str, base: str = "", other: str = ""
) -> Measurement:
    """A number that cannot be had, and why."""
    found = verdicts.not_asked(
        (other and BY_KEY[key].claim) or f"{BY_KEY[key].title}, {measure}", reason
    )
    nothing = [math.nan] * 3
    return Measurement(
        key,
        measure,
        *nothing,
        found.word,
        found.sentence,
        measured_on,
        base,
        other,
        empty_because=reason,
    )


def compare_runs(study: Study, key: str) -> Measurement:
    """The paired difference in AP50, as released minus as reported, of a finding's two runs; same
    images, same seeds.
    """
    finding = BY_KEY[key]
    base, other = finding.as_reported, finding.as_released
    found = {
        run: {trained.seed: trained for trained in study.trained(run)} for run in (base, other)
    }
    seeds = sorted(found[base].keys() & found[other].keys())
    why = "; ".join(filter(None, map(study.missing, (base, other)))) if not seeds else ""
    pairs = [(found[base][seed], found[other][seed]) for seed in seeds]
    meant = (
        study_runs.settings(other, "full", "drawn", 0)
        .differences(study_runs.settings(base, "full", "drawn", 0).to_dict())
        .keys()
    )
    why = why or next(filter(None, (_incomparable(*pair, meant) for pair in pairs)), "")
    if why or not pairs:
        return missing(
            key, "AP50", "training pair", why or "no seed was trained on both sides", base, other
        )
    alike = meant - _apart(*pairs[0])
    scaled = (
        f" (the {pairs[0][0].run.settings['scale']} scale leaves no difference in {', '.join(sorted(alike))})"
        if alike
        else ""
    )
    values = [[study.values(trained) for trained in side] for side in zip(*pairs, strict=True)]
    labels = f"as reported, {base}", f"as released, {other}"
    return _judged(
        key,
        finding.claim + scaled,
        "AP50",
        labels,
        values,
        pairs[0][0],
        "training pair",
        base,
        other,
    )


def _apart(reported: Trained, released: Trained) -> set[str]:
    """The names of the settings in which two runs differ."""
    before, after = reported.run.settings, released.run.settings
    return {
        name
        for name in before | after
        if name not in NOT_PART_OF_A_RUN and before.get(name) != after.get(name)
    }


def _incomparable(reported: Trained, released: Trained, meant: Set[str]) -> str:
    """Why a pair of runs, which should differ in the settings ``meant``, cannot tell what a finding
    does, or "".
    """
    if differing := differences(reported, released, besides=meant):
        return f"the two runs are of other {differing}"
    apart = _apart(reported, released)
    if apart - meant:
        return f"the two runs also differ in {', '.join(sorted(apart - meant))}"
    if not apart:
        settings = reported.run.settings
        shared = ", ".join(f"{name} {settings.get(name)!r}" for name in sorted(meant))
        return f"the {settings['scale']} scale gives both runs {shared}: it cannot test this pair"
    return ""


def measure_shared_patients(
    key: str, dataset: CellDataset, validation_fraction: float
) -> Measurement:
    """The share of validation images of random splits whose patient is trained on, too
    (``shared_patients``).
    """
    measure = "share of validation images of seen patients"
    found = released_code.shared_patients(dataset.patients, validation_fraction)
    if found is None:
        return missing(key, measure, "data", f"the patients of {dataset.name!r} are unknown")
    sentence = (
        f"In random splits that hold out {validation_fraction:.0%} of the images, {found['both_sides']:.1f} of {found['patients']} "
        f"patients (mean) are on both sides; {found['seen_share']:.0%} of the validation images are of a patient that is trained on."
    )
    return measured(key, measure, found["seen_share"], found["seen_share"] > 0, sentence, dataset)


def measure_limit(study: Study, key: str, run: str) -> Measurement:
    """In how many images a run's detections are as many as the model keeps of one, and the lowest
    score that is left.
    """
    trained = study.first(run)
    if trained is None:
        return missing(
            key, "images at the limit of detections", "detections", study.missing(run), run
        )
    found, images = trained.run.detections, len(trained.run.truth["images"])
    least, most = (
        trained.run.settings[name] for name in ("box_score_thresh", "detections_per_image")
    )
    full = released_code.images_at_limit(found, most)
    lowest = min((detection["score"] for detection in found), default=math.nan)
    sentence = (
        f"{run} drops scores under {least:g} and keeps {most} detections an image: the lowest of {len(found)} scores is "
        f"{lowest:.3f}, and {full} of {images} images are at the limit; what was dropped, no histogram shows."
    )
    return measured(key, "images at the limit of detections", full, True, sentence)._replace(
        measured_on="detections", base=run, seeds=1, context=_context(trained)
    )


def measure_size_factors(study: Study, key: str, run: str) -> Measurement:
    """The share of a run's detections whose score report E's size-aware adjustment raises."""
    trained = study.first(run)
    if trained is None or not trained.run.detections:
        return missing(
            key,
            "share of raised scores",
            "detections",
            study.missing(run) or f"{run} has no detections",
            run,
        )
    shares = released_code.size_factors(trained.run.detections)
    told = ", ".join(f"{share:.0%} get a factor of {factor:g}" for factor, share in shares.items())
    sentence = f"Of the detections of {run}, {told}: where most are small, this is much the same as lower thresholds."
    return measured(key, "share of raised scores", 1 - shares.loc[1.0], True, sentence)._replace(
        measured_on="detections", base=run, seeds=1, context=_context(trained)
    )


def compare_detections(
    study: Study,
    key: str,
    run: str,
    claim: str,
    reported: tuple[str, Change],
    released: tuple[str, Change],
    metric: str = "AP50",
) -> Measurement:
    """The paired difference of a score, as released minus as reported, between two ways to treat
    one run's detections.

    Args:
        study: its runs.
        key: of the finding.
        run: key of the run.
        claim: a statement of no change, without full stop.
        reported: label, and what is done to detections as the text has it.
        released: likewise, as the code has it.
        metric: ``AP50``, or ``F1`` of all detections that are left.
    """
    runs = study.trained(run)
    if not runs:
        return missing(key, metric, "detections", study.missing(run), run)
    values = [
        [_scores(trained, change, metric) for trained in runs] for _, change in (reported, released)
    ]
    return _judged(
        key, claim, metric, (reported[0], released[0]), values, runs[0], "detections", run
    )


def _scores(trained: Trained, change: Change, metric: str) -> np.ndarray:
    truth, scores = trained.run.truth, trained.scores
    weights = resampling.draw_units(truth, scores.resamples, scores.seed).weights
    left = change(trained.run.detections, truth["images"])
    if metric == "AP50":
        return resampling.bootstrap_ap50(truth, left, weights)
    return np.nan_to_num(
        resampling.count_scores(match_detections(truth, left), weights).values[metric, "all"]
    )


def compare_thresholds(
    study: Study, key: str, run: str, halving_seed: int = HALVING_SEED
) -> Measurement:
    """F1 of report E's fixed class thresholds, minus that of thresholds chosen on one half of the
    images, on the other half.
    """
    runs = study.trained(run)
    if not runs:
        return missing(key, "F1", "detections", study.missing(run), run)
    try:
        halves = [
            resampling.halve(trained.run.truth, trained.run.detections, halving_seed)
            for trained in runs
        ]
    except ValueError as error:
        return missing(key, "F1", "detections", str(error), run)
    _, judging, sentence = halves[0]
    draw = resampling.draw_units(judging.truth)
    values: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for *sides, _ in halves:
        here, there = (match_detections(*half) for half in sides)
        fixed = {name: E_THRESHOLDS[class_id] for class_id, name in there.class_names.items()}
        for way, scores in zip(
            (thresholds.choose_thresholds(here, E_GRID), fixed), values, strict=True
        ):
            counted = resampling.count_scores(thresholds.keep_scores(there, way), draw.weights)
            scores.append(np.nan_to_num(counted.values["F1", "all"]))
    claim = "Fixed class thresholds in place of chosen ones change nothing to be seen"
    found = _judged(
        key,
        claim,
        "F1",
        ("chosen on the other half", "fixed"),
        values,
        runs[0],
        "detections",
        run,
        draw=draw,
    )
    return found._replace(sentence=f"{found.sentence} {sentence}")


def compare_with_training_images(
    study: Study, key: str, run: str, dataset: CellDataset
) -> Measurement:
    """AP50 of a run's first training on its own training images, minus that on its validation
    images: two sets, so not paired.
    """
    trained = study.first(run)
    if trained is None:
        return missing(key, "AP50", "detections", study.missing(run), run)
    try:
        truth, detections = training_detections(trained, dataset)
    except RunError as error:
        return missing(key, "AP50", "detections", str(error), run)
    draw = resampling.draw_units(truth, trained.scores.resamples, trained.scores.seed + 1)
    training, unseen = (
        resampling.bootstrap_ap50(truth, detections, draw.weights),
        study.values(trained),
    )
    units = min(draw.units, trained.scores.units)
    difference = verdicts.estimate([training - unseen], units)
    images = len(truth["images"]), len(trained.scores.names)
    found = f"AP50 {training[0]:.3f} on {images[0]} training images, {unseen[0]:.3f} on {images[1]} unseen images"
    if max(training[0], unseen[0]) < verdicts.LEAST_SCORE:
        word, why = CANNOT_TELL, "The model finds no cells yet, so this scale cannot tell."
    elif math.isnan(difference.low):
        word, why = CANNOT_TELL, f"{units} {draw.unit} are too few for an interval."
    elif difference.low <= 0 <= difference.high:
        word, why = CANNOT_TELL, "The interval holds 0."
    else:
        word, why = (
            HIGHER if difference.value > 0 else LOWER,
            "The difference is larger than the interval.",
        )
    span = "" if math.isnan(difference.low) else f" [{difference.low:+.3f}, {difference.high:+.3f}]"
    told = f"difference {difference.value:+.3f}{span}, not paired. {why} Reported: 0.461, and 0.27 on the hidden test set."
    context = _context(trained) | {
        "split": f"{trained.run.split['kind']}, training minus validation side"
    }
    numbers = (
        "AP50",
        difference.value,
        difference.low,
        difference.high,
        word,
        f"{run}: {found}, {told}",
    )
    return Measurement(key, *numbers, "detections", run, seeds=1, context=context)


def _judged(
    key: str,
    claim: str,
    metric: str,
    labels: tuple[str, str],
    values: Sequence[Sequence[np.ndarray]],
    trained: Trained,
    measured_on: str,
    base: str,
    other: str = "",
    draw: resampling.Draw | None = None,
) -> Measurement:
    units, unit = (draw.units, draw.unit) if draw else (trained.scores.units, trained.scores.unit)
    sides = [verdicts.Side(label, side) for label, side in zip(labels, values, strict=True)]
    found = verdicts.judge(
        claim, *sides, units, unit, expected=0, same_weights=not other, metric=metric
    )
    words = {
        verdicts.HOLDS: NO_CHANGE,
        verdicts.NO_DIFFERENCE: NO_CHANGE,
        verdicts.CANNOT_TELL: CANNOT_TELL,
    }
    word = words.get(found.word, HIGHER if found.difference.value > 0 else LOWER)
    effect, _, low, high = found.difference
    context = _context(trained)
    sentence = f"{found.sentence} {trained.caution}".strip()
    return Measurement(
        key,
        metric,
        effect,
        low,
        high,
        word,
        sentence,
        measured_on,
        base,
        other,
        len(values[0]),
        context,
    )


def _context(trained: Trained) -> dict[str, Any]:
    settings, split = trained.run.settings, trained.run.split["kind"]
    data = Path(settings["data"]).name
    told = {"data": data, "split": f"{split}, validation side", "maxDets": trained.scores.max_dets}
    return told | {"scale": settings["scale"], "weights": Path(settings["weights"]).name}


def sentences(measurements: Sequence[Measurement]) -> str:
    """A finding's sentences, one a line."""
    return "\n".join(found.sentence for found in measurements)


def outcome(measurements: Sequence[Measurement]) -> str:
    """A finding's verdicts in one line, each with its measure, effect and interval."""
    parts = []
    for found in measurements:
        signed = found.verdict in (NO_CHANGE, CANNOT_TELL, HIGHER, LOWER)
        number = (
            ""
            if math.isnan(found.effect)
            else f" {found.effect:+.3f}"
            if signed
            else f" {found.effect:.4g}"
        )
        span = "" if math.isnan(found.low) else f" [{found.low:+.3f}, {found.high:+.3f}]"
        parts.append(f"{found.measure}{number}{span} ({found.verdict})")
    return "; ".join(parts)


def findings_table(measurements: Sequence[Measurement]) -> pd.DataFrame:
    """All measurements, in the order of the registry.

    Raises:
        ValueError: a finding has no measurement.
    """
    left = BY_KEY.keys() - {measurement.finding for measurement in measurements}
    if left:
        raise ValueError(
            f"no measurement of {', '.join(key for key in BY_KEY if key in left)}; each finding needs one"
        )
    rows = []
    for finding in FINDINGS:
        difference = {
            "finding": finding.key,
            "report": finding.report,
            "text_says": finding.text_says,
            "code_does": finding.code_does,
        }
        for found in measurements:
            if found.finding != finding.key:
                continue
            paired = found.measured_on == "training pair"
            runs = {
                "base": found.base,
                "as_reported": found.base * paired,
                "as_released": found.other,
            }
            numbers = {
                "measured_on": found.measured_on,
                "measure": found.measure,
                **runs,
                "effect": found.effect,
                "low": found.low,
            }
            told = {
                "high": found.high,
                "verdict": found.verdict,
                "sentence": found.sentence,
                "seeds": found.seeds or "",
            }
            where = {
                name: found.context.get(name, "")
                for name in ("data", "split", "maxDets", "scale", "weights")
            }
            rows.append(
                difference | numbers | told | where | {"empty_because": found.empty_because}
            )
    return pd.DataFrame(rows)
