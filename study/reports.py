"""The tables and figures of the five reports, in their order: what was reported beside what the
study's runs reproduce. No torch.

A run that is missing leaves an empty cell with its reason.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cellseg_helpers import borders, metrics, plots, resampling, thresholds
from cellseg_helpers.config import RunConfig
from cellseg_helpers.cells import Cells
from cellseg_helpers.data.hw3 import DataError, open_dataset
from cellseg_helpers.data.labels import CLASS_NAMES
from cellseg_helpers.runs import Run, annotations_of_run
from study import tables, verdicts
from study.reported import (
    B_SUMMARY,
    D_AUGMENTATION,
    D_SETTINGS,
    E_BOTH,
    E_GRID,
    E_PRECISION,
    E_RECALL,
    E_THRESHOLDS,
    F1_COMPARISON,
    LOSSES,
    NOT_NEEDED,
    ORDER,
    OTHER_TITLES,
    SCORE_TABLES,
    VARIANTS,
    Comparison,
    Row,
    Table,
    above,
)
from study.runs import FINALS, parameter_files
from study.trained import Study, Trained, differences

OWN_SYSTEM = {
    key[0].upper(): key for key in FINALS
}  # of which all is that is no comparison of a report
NOTHING_FOUND = "no detection scores as high as the threshold"
THRESHOLD_COLUMNS = ["precision", "recall", "chosen_threshold", "chosen_precision", "chosen_recall"]
NO_SUCH_CELL = "no such cell in the validation images"
HALVING_SEED = 0
HISTOGRAM_BINS = 40  # as drawn in B-Fig1
DISPLAYED_THRESHOLD = 0.5  # of predictions in B-Fig2, as in 05_border_cells
BORDER_PX = 2  # likewise

SCORE_COLUMNS = [
    "row", "run", "variant", "reported", "reproduced", "seed_sd", "low", "high", "interval_over", "seeds", "data", "split",
    "maxDets", "scale", "weights", "epochs", "minutes", "parameters", "peak_memory_GB", "run_dir", "missing",
]  # fmt: skip

RUN_COLUMNS = ["seeds", "data", "split", "maxDets", "scale", "weights"]
VERDICT_COLUMNS = [
    "table",
    "claim",
    "verdict",
    "base",
    "other",
    "difference",
    "low",
    "high",
    "sentence",
    *RUN_COLUMNS,
]


class Shown(NamedTuple):
    """A table or figure of a report, rebuilt.

    Attributes:
        key: as ``A-T2``.
        title: of it.
        table: all columns, for the CSV; None for a figure.
        page: the table as a reader sees it, as text, or None.
        figures: pictures.
        sentences: what a reader has to know, and a sentence for each conclusion of the report.
        judged: these conclusions, with what was found.
    """

    key: str
    title: str
    table: pd.DataFrame | None = None
    page: pd.DataFrame | None = None
    figures: list[Figure] = []
    sentences: list[str] = []
    judged: list[tuple[Comparison, verdicts.Verdict]] = []

    @property
    def heading(self) -> str:
        """Markdown."""
        return f"### {self.key} {self.title}"

    @property
    def pieces(self) -> list[pd.DataFrame | Figure]:
        """What there is to display: the table, the pictures."""
        return [*([] if self.page is None else [self.page]), *self.figures]

    @property
    def text(self) -> str:
        """Markdown: a list of the sentences, the verdicts' words in bold."""
        lines = []
        for sentence in self.sentences:
            claim, found, rest = sentence.partition(": ")
            word = next(
                (word for word in verdicts.WORDS if found and rest.startswith(f"{word}.")), ""
            )
            lines.append(f"- {claim}: **{word}**{rest[len(word) :]}" if word else f"- {sentence}")
        return "\n".join(lines)


def show(study: Study, report: str) -> Iterator[Shown]:
    """Every table and figure of a report, in the report's order; of those that are not needed a
    sentence.
    """
    return (build(study, key) for key in ORDER[report])


def build(study: Study, key: str) -> Shown:
    """A table or figure of a report by its key.

    Raises:
        ValueError: no such key.
    """
    if key in SCORE_TABLES:
        return _score_table(study, key)
    if key in NOT_NEEDED:
        return Shown(key, OTHER_TITLES[key], sentences=[NOT_NEEDED[key]])
    if key not in BUILDERS:
        known = [known for keys in ORDER.values() for known in keys]
        raise ValueError(f"the reports have no {key!r}; they have {', '.join(known)}")
    return BUILDERS[key](study, key)._replace(key=key, title=OTHER_TITLES[key])


def overview(shown: list[Shown]) -> pd.DataFrame:
    """Every row with a score: reported, reproduced, 95 % interval, scale, weights, and what its
    comparisons found or it lacks.
    """
    rows = []
    for part in shown:
        if part.page is None or "95 % interval" not in part.page:
            continue
        for label, told in part.page.iterrows():
            found = [
                f"over {compared.base}: {verdict.word}"
                + " (one training each)" * (verdicts.ONE_EACH in verdict.sentence)
                for compared, verdict in part.judged
                if compared.other == label
            ]
            found += [told["missing"]] if told.get("missing") else []
            told = told[["reported", "reproduced", "95 % interval", "scale", "weights"]]
            rows.append(
                {"table": part.key, "row": label, **told, "verdict on the claim": "; ".join(found)}
            )
    return pd.DataFrame(rows).set_index("table").rename_axis(None)


def verdict_table(shown: list[Shown]) -> pd.DataFrame:
    """Every conclusion of a report, with what its runs are of: see ``VERDICT_COLUMNS``."""
    rows = []
    for part in shown:
        for compared, found in part.judged:
            told = {
                "table": part.key,
                "claim": compared.claim,
                "verdict": found.word,
                "base": found.base,
                "other": found.other,
            }
            numbers = {
                "difference": found.difference.value,
                "low": found.difference.low,
                "high": found.difference.high,
            }
            of_runs = part.table[RUN_COLUMNS].dropna(how="all")
            context = of_runs.iloc[0].to_dict() if len(of_runs) else {}
            rows.append(told | numbers | {"sentence": found.sentence} | context)
    return pd.DataFrame(rows, columns=VERDICT_COLUMNS)


def describe(study: Study) -> str:
    """Markdown: what the study's runs are, and what their scores can be worth."""
    keys = sorted({row.run for table in SCORE_TABLES.values() for row in table.rows})
    found = [trained for key in keys for trained in study.trained(key)]
    wanted = f"{len(keys) * study.seeds} runs of {study.study} ({study.seeds} seed{'s' * (study.seeds > 1)} each)"
    told = f"{len(found)} of {wanted} are finished and scored in {study.runs_dir}."
    if not found:
        return told
    settings = [trained.run.settings for trained in found]
    scales, data, weights = (
        sorted({Path(one[name]).name for one in settings}) for name in ("scale", "data", "weights")
    )
    told += f" Data: {', '.join(data)}; initial weights: {', '.join(weights)}."
    if "quick" in scales:
        steps = sorted({one["epochs"] * one["steps_per_epoch"] for one in settings})
        how = f"Quick scale: weights {', '.join(weights)}, {_span(steps)} steps"
        told = (
            f"**{how}: a smoke test, not a reproduction of the scores.** {told} {_scaled(settings)}"
        )
    return told


def _scaled(settings: list[dict[str, Any]]) -> str:
    """What a scale gives all runs, whatever their reports say, in a sentence."""
    names = (
        "optimizer",
        "learning_rate",
        "scheduler",
        "crop_size_px",
        "min_size",
        "detections_per_image",
    )
    alike = {
        name: settings[0][name]
        for name in names
        if all(one[name] == settings[0][name] for one in settings)
    }
    listed = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in alike.items()
    )
    return (
        f"Whatever its report says, every run has {listed} (min_size 0: images are not enlarged); its own are backbone, neck, "
        "attention, anchors, proposals, augmentation and normalisation."
    )


def _span(numbers: list[float]) -> str:
    return (
        f"{min(numbers):g}"
        if min(numbers) == max(numbers)
        else f"{min(numbers):g} to {max(numbers):g}"
    )


def _score_table(study: Study, key: str) -> Shown:
    table = SCORE_TABLES[key]
    base = next((first for row in table.rows if (first := study.first(row.run))), None)
    rows, values = [], {}
    for row in table.rows:
        trained, reason = study.trained(row.run), study.missing(row.run)
        if trained and (differing := differences(base, trained[0])):
            reason = f"{trained[0].run.run_dir.name} is of other {differing} than {base.run.run_dir.name}"
            trained = []
        values[row.label] = (
            {one.seed: study.values(one, row.variant) for one in trained}
            if row.measure == "AP50"
            else {}
        )
        rows.append({**_score_row(study, row, trained, values[row.label]), "missing": reason})
    reasons = {row["row"]: row["missing"] for row in rows}
    judged = [
        (comparison, _judge(table, comparison, values, reasons, base))
        for comparison in table.comparisons
    ]
    sentences = [
        *([table.note] if table.note else []),
        *(verdict.sentence for _, verdict in judged),
    ]
    frame = pd.DataFrame(rows, columns=SCORE_COLUMNS)
    return Shown(key, table.title, frame, _score_page(frame), sentences=sentences, judged=judged)


def _score_row(
    study: Study, row: Row, trained: list[Trained], values: dict[int, np.ndarray]
) -> dict[str, Any]:
    told = {"row": row.label, "run": row.run, "variant": row.variant, "reported": row.reported}
    if not trained:
        return told
    if values:
        estimate = verdicts.estimate(list(values.values()), trained[0].scores.units)
    else:
        numbers = np.array([[one.finished[row.measure]] for one in trained], float)
        spread = numbers.std(ddof=1) if len(numbers) > 1 else math.nan
        estimate = verdicts.Estimate(float(numbers.mean()), float(spread), math.nan, math.nan)
    told |= {"reproduced": estimate.value, "seed_sd": estimate.seed_sd}
    told |= {
        "low": max(estimate.low, 0) if values else math.nan,
        "high": min(estimate.high, 1) if values else math.nan,
    }
    return told | _context(study, trained)


def _context(study: Study, trained: list[Trained]) -> dict[str, Any]:
    """What every row says of its runs."""
    first = trained[0]
    names = [one.run.run_dir.name for one in trained]
    stem = names[0].removesuffix(f"{first.seed}")
    name = (
        names[0] if len(names) == 1 else f"{stem}{{{','.join(str(one.seed) for one in trained)}}}"
    )
    return {
        "interval_over": f"{first.scores.units} {first.scores.unit}",
        "seeds": len(trained),
        "data": Path(first.run.settings["data"]).name,
        "split": f"{first.run.split['kind']}, validation side",
        "maxDets": first.scores.max_dets,
        "scale": first.run.settings["scale"],
        "weights": Path(first.run.settings["weights"]).name,
        "epochs": float(np.mean([len(one.run.history) for one in trained])),
        "minutes": float(np.mean([one.run.history["train_minutes"].iloc[-1] for one in trained])),
        "parameters": first.finished["parameters"],
        "peak_memory_GB": max(one.run.history["peak_memory_bytes"].max() for one in trained) / 1e9,
        "run_dir": f"{study.runs_dir}/{name}",
    }


def _judge(
    table: Table,
    comparison: Comparison,
    values: dict[str, dict[int, np.ndarray]],
    reasons: dict[str, str],
    base: Trained | None,
) -> verdicts.Verdict:
    """Over the seeds that both sides have."""
    rows = {row.label: row for row in table.rows}
    common = sorted(values[comparison.base].keys() & values[comparison.other].keys())
    if not common:
        missing = dict.fromkeys(
            reasons[label] for label in (comparison.base, comparison.other) if reasons[label]
        )
        return verdicts.not_asked(comparison.claim, "; ".join(missing))
    first, second = (rows[label] for label in (comparison.base, comparison.other))
    sides = []
    for row in (first, second):
        reported = row.reported if isinstance(row.reported, float) else None
        sides.append(
            verdicts.Side(row.label, [values[row.label][seed] for seed in common], reported)
        )
    units, same = (base.scores.units, base.scores.unit), first.run == second.run
    found = verdicts.judge(comparison.claim, *sides, *units, comparison.expected, same_weights=same)
    return found._replace(sentence=f"{found.sentence} {base.caution}".strip())


def _page(table: pd.DataFrame, label: str, columns: list[str]) -> pd.DataFrame:
    """A table as text: a number where there is one, nothing where there is none, and why, where it
    is known.

    ``reproduced`` carries its standard deviation over seeds, ``95 % interval`` stands for ``low``
    and ``high``.
    """
    shown = table.astype(object)
    shown["reported"] = [
        f"{value:g}" if isinstance(value, float) and value == value else value
        for value in table["reported"]
    ]
    spread = zip(table["reproduced"], table["seed_sd"], strict=True)
    shown["reproduced"] = [
        f"{_text(value)} ± {_text(sd)}" if _text(sd) else value for value, sd in spread
    ]
    if "low" in table:
        ends = zip(table["low"], table["high"], strict=True)
        shown["95 % interval"] = [
            f"[{_text(low)}, {_text(high)}]" if _text(low) else "" for low, high in ends
        ]
    names = [*columns, "missing"] if table["missing"].any() else columns
    page = shown.set_index(label).rename_axis(None)[names].map(_text)
    return page.rename(columns=lambda name: name.replace("_", " "))


def _score_page(table: pd.DataFrame, label: str = "row") -> pd.DataFrame:
    rounded = table.assign(
        minutes=[
            f"{minutes:.1f}" if minutes == minutes else ""
            for minutes in table["minutes"].astype(float)
        ],
        parameters=[
            f"{count / 1e6:.1f} M" if count == count else ""
            for count in table["parameters"].astype(float)
        ],
        peak_memory_GB=[
            f"{size:.1f}" if size == size else "" for size in table["peak_memory_GB"].astype(float)
        ],
        run_dir=[
            Path(run_dir).name if isinstance(run_dir, str) else "" for run_dir in table["run_dir"]
        ],
    )
    columns = [
        "run",
        "reported",
        "reproduced",
        "95 % interval",
        "interval_over",
        "data",
        "split",
        "maxDets",
        "scale",
        "weights",
        "epochs",
    ]
    return _page(rounded, label, [*columns, "minutes", "parameters", "peak_memory_GB", "run_dir"])


def _text(value: Any) -> str:
    """A number with up to three digits behind the point, text as it is; nothing (None, NaN) as an
    empty text.
    """
    if value is None or value != value:
        return ""
    return value if isinstance(value, str) else f"{value:.3f}" if abs(value) < 1 else f"{value:.5g}"


def _of_run(table: pd.DataFrame, study: Study, key: str, trained: list[Trained]) -> pd.DataFrame:
    """The table with the columns that say which runs it is of, or why there are none."""
    told = _context(study, trained) if trained else {}
    names = SCORE_COLUMNS[SCORE_COLUMNS.index("interval_over") : SCORE_COLUMNS.index("missing")]
    return table.assign(
        run=key, **{name: told.get(name) for name in names}, missing=study.missing(key)
    )


def _told(study: Study, key: str, trained: list[Trained]) -> str:
    """Which runs a table or figure is of, in a sentence."""
    if not trained:
        return f"Nothing of {key}: {study.missing(key)}."
    told = _context(study, trained)
    where = f"{told['data']}, {trained[0].run.split['kind']} split (validation side)"
    how = f"{told['scale']} scale, weights {told['weights']}"
    return f"Run {key}, {how}, data {where}, maxDets {told['maxDets']}: {told['run_dir']}."


def _coco_lines(study: Study, key: str) -> Shown:
    """B-T1: mean over seeds, at the usual ``maxDets`` as reported."""
    run = OWN_SYSTEM[key[0]]
    trained = study.trained(run)
    table = pd.DataFrame({"metric": list(B_SUMMARY), "reported": list(B_SUMMARY.values())})
    table = table.assign(reproduced=math.nan, seed_sd=math.nan, low=math.nan, high=math.nan)
    if trained:
        draw = resampling.draw_units(trained[0].run.truth)
        limits, folders = metrics.COCO_MAX_DETS, [one.run for one in trained]
        lines = [
            resampling.bootstrap_summary(folder.truth, folder.detections, draw.weights, limits)
            for folder in folders
        ]
        estimates = [
            verdicts.estimate([line[name] for line in lines], draw.units) for name in B_SUMMARY
        ]
        estimates = pd.DataFrame(estimates, columns=verdicts.Estimate._fields)
        table[["reproduced", "seed_sd"]] = estimates[["value", "seed_sd"]]
        table["low"], table["high"] = (
            estimates["low"].clip(lower=0),
            estimates["high"].clip(upper=1),
        )
    table = _of_run(table, study, run, trained)
    table["maxDets"] = [
        {"AR1": 1, "AR10": 10}.get(name, metrics.COCO_MAX_DETS[-1]) for name in table["metric"]
    ]
    page = _score_page(table, "metric")
    if trained:
        undefined = table["reproduced"].isna().to_numpy()
        table.loc[undefined, "missing"] = NO_SUCH_CELL
        page.loc[undefined, "reproduced"] = NO_SUCH_CELL
    note = "The report does not say which images; its released code trains on all, so they were probably training images."
    usual = "Here the usual maxDets of 1, 10 and 100 are taken, whatever the dense one is."
    return Shown(key, "", table, page, sentences=[note, usual, _told(study, run, trained)])


def _losses(study: Study, key: str) -> Shown:
    run, reported = OWN_SYSTEM[key[0]], LOSSES[key]
    trained = study.trained(run)
    table = pd.DataFrame({"epoch": range(1, len(reported) + 1), "reported": reported})
    losses = [
        one.run.history.set_index("epoch")["loss"].reindex(table["epoch"]).to_numpy()
        for one in trained
    ]
    table["reproduced"] = np.mean(losses, axis=0) if losses else math.nan
    table["seed_sd"] = np.std(losses, axis=0, ddof=1) if len(losses) > 1 else math.nan
    table = _of_run(table, study, run, trained)
    epochs = f"the run has {len(trained[0].run.history)} epochs" if trained else study.missing(run)
    table.loc[table["reproduced"].isna(), "missing"] = epochs
    page = _page(table, "epoch", ["reported", "reproduced", "scale", "weights"]).rename(
        index="epoch {}".format
    )
    note = "Sum of the five losses, mean over an epoch's steps. It depends on data and crops, so only its course can be compared."
    if key == "C-Fig3":
        note += " The report names three losses (class, box, mask); whether its figure holds the two of the RPN is not said."
    figures = []
    if key == "C-Fig3":
        figures = [
            plots.losses_beside_reported(trained[0].run.history if trained else None, reported)
        ]
    return Shown(key, "", table, page, figures, [note, _told(study, run, trained)])


def _data_set(study: Study, key: str) -> Shown:
    run = OWN_SYSTEM[key[0]]
    trained = study.trained(run)[:1]
    here, sentence = None, _told(study, run, trained)
    if trained:
        settings = trained[0].run.settings
        try:
            dataset = open_dataset(
                settings["data"], settings["truth_reading"], 0, settings["skip_faulty_images"]
            )
            here = tables.dataset_summary(dataset, settings["data"])["here"]
        except DataError as error:
            sentence = f"The data are not at hand: {str(error).splitlines()[0]}"
    table = pd.Series(tables.REPORT_C, name="reported").rename_axis("item").reset_index()
    table["here"] = here.to_numpy() if here is not None else ""
    page = table.set_index("item").rename_axis(None)
    return Shown(key, "", _of_run(table, study, run, trained), page, sentences=[sentence])


def _augmentation(study: Study, key: str) -> Shown:
    table = pd.DataFrame(D_AUGMENTATION, columns=["step", "reported", "here"])
    run = OWN_SYSTEM[key[0]]
    trained = study.trained(run)[:1]
    recipe = (
        f"The run's recipe is {trained[0].run.settings['augmentation']}."
        if trained
        else _told(study, run, [])
    )
    note = (
        "Here: the recipe joint_full. Of the colour jitter four values are legible; they are taken, in the order of the names, "
        "for brightness, contrast, saturation and hue, and its probability is a guess, the list's most frequent one."
    )
    page = table.set_index("step").rename_axis(None)
    return Shown(key, "", _of_run(table, study, run, trained), page, sentences=[note, recipe])


def _hyper_parameters(study: Study, key: str) -> Shown:
    run = OWN_SYSTEM[key[0]]
    trained = study.trained(run)[:1]
    full = RunConfig.from_yaml(*parameter_files(run, "full")).to_dict()
    here = trained[0].run.settings if trained else {}
    rows = [(label, reported, full[name], here.get(name)) for label, reported, name in D_SETTINGS]
    table = pd.DataFrame(
        rows, columns=["setting", "reported", "full scale", "this run"], dtype=object
    )
    page = table.set_index("setting").rename_axis(None)
    page = page.map(
        lambda value: (
            "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        )
    )
    note = "Full scale: params/reports/d/fpn_cbam.yaml. CBAM's reduction is 16; the report does not state it."
    return Shown(
        key,
        "",
        _of_run(table, study, run, trained),
        page,
        sentences=[note, _told(study, run, trained)],
    )


def _class_thresholds(study: Study, key: str) -> Shown:
    """E-T3: report E's thresholds here, and those chosen on one half of the images, both judged on
    the other half; mean over seeds.
    """
    run = OWN_SYSTEM[key[0]]
    trained = study.trained(run)
    reported = {
        "reported_threshold": E_THRESHOLDS.values(),
        "reported_precision": E_PRECISION,
        "reported_recall": E_RECALL,
    }
    table = pd.DataFrame({"class": CLASS_NAMES, **reported})
    sentences, judged = [_told(study, run, trained)], []
    if not trained:
        table = table.assign(**dict.fromkeys(THRESHOLD_COLUMNS, math.nan))
        page = table.set_index("class").map(_text)
    else:
        halves = [
            resampling.halve(one.run.truth, one.run.detections, HALVING_SEED) for one in trained
        ]
        _, judging, sentence = halves[0]
        matches = [[metrics.match_detections(*half) for half in sides] for *sides, _ in halves]
        chosen = [thresholds.choose_thresholds(one_half, E_GRID) for one_half, _ in matches]
        limit = metrics.dense_max_dets(judging.truth)[-1]
        found = [
            _threshold_scores(other_half, way, limit)
            for (_, other_half), way in zip(matches, chosen, strict=True)
        ]
        mean = sum(found) / len(found)  # empty where it is for one training
        table[THRESHOLD_COLUMNS] = mean.to_numpy()
        sentences.append(
            f"{sentence} Chosen: those of best F1 on the one half; precision and recall here are of the other."
        )
        verdict = _thresholds_verdict(matches, chosen, resampling.draw_units(judging.truth), limit)
        verdict = verdict._replace(sentence=f"{verdict.sentence} {trained[0].caution}".strip())
        sentences.append(verdict.sentence)
        judged = [(F1_COMPARISON, verdict)]
        page = _with_reasons(table.set_index("class")).assign(**_scale_and_weights(trained))
    page = page.rename_axis(None).rename(columns=lambda name: name.replace("_", " "))
    table = _of_run(table, study, run, trained)
    if trained:
        table["missing"] = _reasons(table[THRESHOLD_COLUMNS], table["missing"])
    return Shown(key, "", table, page, sentences=sentences, judged=judged)


def _threshold_scores(
    judging: metrics.Matches, chosen: dict[str, float], max_dets: int
) -> pd.DataFrame:
    """``THRESHOLD_COLUMNS`` by class: precision and recall at report E's thresholds, then the
    chosen ones, and theirs.
    """
    ways = {
        "reported": dict(zip(CLASS_NAMES, E_THRESHOLDS.values(), strict=True)),
        "chosen": chosen,
    }
    scores = thresholds.threshold_table(judging, ways, max_dets).set_index(["strategy", "class"])
    reported, own = (scores.loc[way].loc[list(CLASS_NAMES)] for way in ways)
    columns = [
        reported["precision"],
        reported["recall"],
        own["score_threshold"],
        own["precision"],
        own["recall"],
    ]
    return pd.concat(columns, axis=1, keys=THRESHOLD_COLUMNS)


def _thresholds_verdict(
    matches: list[list[metrics.Matches]],
    chosen: list[dict[str, float]],
    draw: resampling.Draw,
    max_dets: int,
) -> verdicts.Verdict:
    """Do class thresholds give a higher F1 than one for all, both chosen on one half and judged on
    the other, in each training?
    """
    ones = []
    for one_half, _ in matches:
        sweep = thresholds.sweep(one_half, E_GRID, max_dets).query("`class` == 'all'")
        ones.append(float(sweep["score_threshold"].iloc[int(sweep["F1"].fillna(0).argmax())]))
    label = f"{F1_COMPARISON.base}, {', '.join(f'{one:g}' for one in dict.fromkeys(ones))}"
    sides = []
    for name, ways in ((label, ones), (F1_COMPARISON.other, chosen)):
        kept = [
            thresholds.keep_scores(other_half, way)
            for (_, other_half), way in zip(matches, ways, strict=True)
        ]
        scores = [resampling.count_scores(left, draw.weights).values["F1", "all"] for left in kept]
        sides.append(verdicts.Side(name, [np.nan_to_num(values) for values in scores]))
    return verdicts.judge(
        F1_COMPARISON.claim, *sides, draw.units, draw.unit, same_weights=True, metric="F1"
    )


def _with_reasons(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores of detections above a threshold as text; where one is a ratio of nothing, why."""
    reasons = {name: NOTHING_FOUND if "precision" in name else NO_SUCH_CELL for name in scores}
    return scores.astype(object).fillna(reasons).map(_text)


def _reasons(scores: pd.DataFrame, missing: pd.Series) -> pd.Series:
    """For each row the first reason of an empty score; where none is empty, which seeds are
    ``missing``.
    """
    no_cell, nothing = (
        scores.filter(like=name).isna().any(axis=1) for name in ("recall", "precision")
    )
    return missing.mask(nothing, NOTHING_FOUND).mask(no_cell, NO_SUCH_CELL)


def _scale_and_weights(trained: list[Trained]) -> dict[str, str]:
    settings = trained[0].run.settings
    return {"scale": settings["scale"], "weights": Path(settings["weights"]).name}


def _threshold_sweep(study: Study, key: str) -> Shown:
    run = OWN_SYSTEM[key[0]]
    trained = study.trained(run)[:1]
    if not trained:
        empty = pd.DataFrame({"score_threshold": E_GRID}).assign(
            **dict.fromkeys(("AP50", "precision", "recall", "F1"), math.nan)
        )
        return Shown(key, "", _of_run(empty, study, run, []), sentences=[_told(study, run, [])])
    matches = metrics.match_detections(trained[0].run.truth, trained[0].run.detections)
    sweep = thresholds.sweep(matches, E_GRID, trained[0].scores.max_dets)
    wide = sweep.pivot(index="score_threshold", columns="class", values="F1")[
        list(CLASS_NAMES)
    ].rename(columns="F1 {}".format)
    overall = sweep[sweep["class"] == "all"].set_index("score_threshold")[
        ["AP50", "precision", "recall", "F1"]
    ]
    page = overall.join(wide).rename_axis(None).rename(index="score ≥ {:.2f}".format)
    page = _with_reasons(page).assign(**_scale_and_weights(trained))
    sentences = [
        "The report describes this sweep and never shows it. Scores of all classes, then F1 of each; the CSV has all of each.",
        _told(study, run, trained),
    ]
    table = _of_run(sweep, study, run, trained)
    table["missing"] = _reasons(sweep, table["missing"])
    return Shown(key, "", table, page, [plots.threshold_sweep(sweep)], sentences)


def _image_and_map(study: Study, key: str) -> Shown:
    run = OWN_SYSTEM[key[0]]
    images, sentence = study.images(run)
    if not images:
        return Shown(key, "", sentences=[sentence])
    by_image = _cells_by_image(study.first(run).run)
    counts = np.array(
        [
            np.bincount([cell["category_id"] for cell in cells], minlength=5)[1:]
            for cells in by_image
        ]
    )
    place = int(np.lexsort([counts.sum(1), (counts > 0).sum(1)])[-1])
    class_name = CLASS_NAMES[counts[place].argmax()] if key == "A-Fig1" else "all"
    return Shown(
        key,
        "",
        figures=[plots.image_beside_instances(images[place], class_name)],
        sentences=[sentence],
    )


def _curves(study: Study, key: str) -> Shown:
    run = OWN_SYSTEM[key[0]]
    trained = study.trained(run)[:1]
    sentences = [_told(study, run, trained)]
    if key == "E-Fig1":
        sentences.insert(
            0,
            "Reported: training loss from above 1 to near 0.5, validation loss flat near 0.8 from epoch 5.",
        )
    if not trained:
        return Shown(key, "", sentences=sentences)
    table = trained[0].run.history[["epoch", "loss", "validation_loss", "validation_ap50"]]
    if table["validation_loss"].notna().sum() == 1:
        sentences.append("Validated once, after the last epoch: a point, no curve.")
    return Shown(
        key,
        "",
        _of_run(table, study, run, trained),
        None,
        [plots.training_curves(trained[0].run.history)],
        sentences,
    )


def _score_histogram(study: Study, key: str) -> Shown:
    run = OWN_SYSTEM[key[0]]
    trained = study.trained(run)[:1]
    if not trained:
        return Shown(key, "", sentences=[_told(study, run, [])])
    matches = metrics.match_detections(trained[0].run.truth, trained[0].run.detections)
    found = thresholds.separation(matches).loc["all"]
    told = "No matched and unmatched detections to tell apart."
    if not math.isnan(found["AUROC"]):
        told = (
            f"Do scores separate right from wrong? A matched detection scores above an unmatched one in {found['AUROC']:.0%} of "
            f"pairs (50 %: not at all, 100 %: perfectly); {found['matched']:.0f} detections match a cell, "
            f"{found['unmatched']:.0f} do not."
        )
    reported = "Reported: one peak of low scores and one of high ones."
    least = f"The model itself drops scores under {trained[0].run.settings['box_score_thresh']:g}."
    table = _of_run(thresholds.reliability(matches, HISTOGRAM_BINS), study, run, trained)
    return Shown(
        key,
        "",
        table,
        None,
        [plots.score_histograms(matches)],
        [reported, told, least, _told(study, run, trained)],
    )


def _border_cells(study: Study, key: str) -> Shown:
    run = OWN_SYSTEM[key[0]]
    images, sentence = study.images(run)
    if not images:
        return Shown(key, "", sentences=[sentence])
    found = study.first(run).run
    predicted = above(DISPLAYED_THRESHOLD, found.detections)
    near = borders.near_border(predicted, BORDER_PX, by="mask")
    at_border = predicted[near]
    number = (
        int(
            np.bincount([detection["image_id"] for detection in at_border], minlength=2)[
                1:
            ].argmax()
        )
        + 1
    )
    cells = _cells_by_image(found)[number - 1]
    here = [detection for detection in at_border if detection["image_id"] == number]
    figure = plots.border_strip(
        images[number - 1], cells, here, f"predicted at the border, score ≥ {DISPLAYED_THRESHOLD:g}"
    )
    annotated, which = annotations_of_run(found)
    contact = borders.border_contact(Cells.from_coco(annotated["annotations"]), annotated["images"]).loc["all"]
    told = (
        f"{which} {contact['at_border']} annotated cells touch the border, where chance would put {contact['expected']:.0f} "
        f"[{contact['low']:.0f}, {contact['high']:.0f}]: {contact['verdict']}."
    )
    reported = "Reported: cells that the image border cuts are not annotated."
    return Shown(key, "", figures=[figure], sentences=[reported, told, sentence])


def _predictions(study: Study, key: str) -> Shown:
    run = OWN_SYSTEM[key[0]]
    images, sentence = study.images(run)
    if not images:
        return Shown(key, "", sentences=[sentence])
    found = study.first(run).run
    kept = VARIANTS[E_BOTH](found.detections, found.truth["images"])
    cells = _cells_by_image(found)
    predicted = [
        [detection for detection in kept if detection["image_id"] == image["id"]]
        for image in found.truth["images"]
    ]
    place = max(range(len(images)), key=lambda place: (len(predicted[place]), len(cells[place])))
    least = min(E_THRESHOLDS.values())
    figure = plots.truth_beside_predictions(
        [images[place]], [cells[place]], [predicted[place]], least
    )
    told = "After report E's class thresholds (0.18 to 0.25), refinement and score adjustment; the image with most of these."
    return Shown(key, "", figures=[figure], sentences=[told, sentence])


def _cells_by_image(run: Run) -> list[list[dict[str, Any]]]:
    """The annotated cells of each image, in the order of the images."""
    cells = {image["id"]: [] for image in run.truth["images"]}
    for cell in run.truth["annotations"]:
        cells[cell["image_id"]].append(cell)
    return list(cells.values())


BUILDERS: dict[str, Callable[[Study, str], Shown]] = {
    "A-Fig1": _image_and_map,
    "A-Fig3": _curves,
    "B-T1": _coco_lines,
    "B-T2": _losses,
    "B-Fig1": _score_histogram,
    "B-Fig2": _border_cells,
    "C-T1": _data_set,
    "C-Fig1": _image_and_map,
    "C-Fig3": _losses,
    "D-T1": _augmentation,
    "D-T2": _hyper_parameters,
    "D-Fig2": _curves,
    "E-Fig1": _curves,
    "E-Fig2": _predictions,
    "E-T3": _class_thresholds,
    "E-sweep": _threshold_sweep,
}
