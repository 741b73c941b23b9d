"""Rebuild the tables and figures of the five reports, with the reported values beside those that
the study's runs reproduce. Needs no torch.

Where a run is missing, the cell stays empty, and the column ``missing`` says why.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from cellseg_helpers import borders, metrics, plots, resampling, thresholds
from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import RunConfig, first_line
from cellseg_helpers.data.cache import CellImage, DataError
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.runs import Run, annotations_of_run, images_of_run
from study import figures, reported, tables, verdicts
from study.reported import SYSTEMS, TABLES, Comparison, Row
from study.runs import Study, Trained, differences, parameter_files

NOTHING_FOUND = "no detection scores as high as the threshold"
NO_SUCH_CELL = "no such cell in the validation images"
HISTOGRAM_BINS = 40  # in B-Fig1
DISPLAYED_THRESHOLD = 0.5  # least score of the predictions in B-Fig2, as in 05_border_cells

RUN_COLUMNS = [
    "interval_over", "seeds", "data", "split", "maxDets", "scale", "weights", "epochs", "minutes",
    "parameters", "peak_memory_GB", "run_dir",
]  # fmt: skip
SCORES = ["reproduced", "seed_sd", "low", "high"]
SCORE_COLUMNS = ["row", "run", "variant", "reported", *SCORES, *RUN_COLUMNS, "missing"]
SCORE_PAGE = [
    "run", "reported", "reproduced", "95 % interval", "data", "split", "maxDets", "scale",
    "weights", "epochs", "minutes", "parameters",
]  # fmt: skip
CONTEXT = ["seeds", "data", "split", "maxDets", "scale", "weights"]
VERDICT_COLUMNS = [
    "table", "claim", "verdict", "base", "other", "difference", "low", "high", "sentence", *CONTEXT,
]  # fmt: skip
SHARED = [  # settings that are the same in all quick runs, although the reports' differ
    "optimizer", "learning_rate", "scheduler", "crop_size_px", "min_size", "detections_per_image",
]  # fmt: skip


@dataclass
class Shown:
    """A rebuilt table or figure of a report."""

    key: str  # such as ``A-T2``
    title: str
    sentences: list[str] = field(default_factory=list)  # shown below it
    table: pd.DataFrame | None = None  # all columns, for the CSV; the first one names the rows
    page: pd.DataFrame | None = None  # the columns to show
    reasons: dict[str, str] = field(default_factory=dict)  # column -> why its empty cells are empty
    figure: Figure | None = None
    judged: list[tuple[Comparison, verdicts.Verdict]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The sentences and the verdicts' sentences as a Markdown list, with bold verdicts."""
        verdict_sentences = [
            verdict.sentence.replace(f": {verdict.word}.", f": **{verdict.word}**.", 1)
            for _, verdict in self.judged
        ]
        return "\n".join(f"- {sentence}" for sentence in [*self.sentences, *verdict_sentences])

    def display(self) -> None:
        """Display heading, table, figure and sentences in a notebook."""
        display(Markdown(f"### {self.key} {self.title}"))
        if self.page is not None:
            display(tables.page(self.page, self.key))
        if self.figure:
            plots.show(self.figure, f"{self.key}: {self.title}")
        if self.text:
            display(Markdown(self.text))


def build(study: Study, key: str) -> Shown:
    """Rebuild a table or figure of a report.

    Raises:
        ValueError: no such key.
    """
    if key not in TABLES:
        raise ValueError(f"the reports have no {key!r}; they have {', '.join(TABLES)}")
    about = TABLES[key]
    shown = Shown(key, about.title, [about.note] if about.note else [])
    if about.rows:
        _score_table(shown, study)
    elif key in PICTURES:
        _picture(shown, study)
    elif not about.not_needed:
        _system_table(shown, study)
    return shown


def build_all(study: Study) -> dict[str, list[Shown]]:
    """Rebuild all tables and figures of each report (A to E), in the report's order."""
    return {letter: [build(study, key) for key in TABLES if key[0] == letter] for letter in SYSTEMS}


def overview(parts: Sequence[Shown]) -> pd.DataFrame:
    """Collect all rows with a score, and the verdicts on what the reports conclude from them."""
    tables_with_scores = []
    for part in parts:
        if part.table is None or "low" not in part.table:
            continue
        rows = part.table.rename(columns={part.table.columns[0]: "row"})
        words = {row: [] for row in rows["row"]}
        for compared, verdict in part.judged:
            one_each = " (one training each)" if verdicts.ONE_EACH in verdict.sentence else ""
            words[compared.other].append(f"over {compared.base}: {verdict.word}{one_each}")
        rows["verdict on the claim"] = ["; ".join(of_row) for of_row in words.values()]
        rows.insert(0, "table", part.key)
        tables_with_scores.append(rows)
    columns = ["row", "reported", "reproduced", "95 % interval", "scale", "weights"]
    rows = pd.concat(tables_with_scores, ignore_index=True)
    return _page(rows, [*columns, "verdict on the claim"], {"reproduced": ""})


def verdict_table(parts: Sequence[Shown]) -> pd.DataFrame:
    """List the reports' conclusions with their verdicts (columns: ``VERDICT_COLUMNS``)."""
    rows = []
    for part in parts:
        for compared, verdict in part.judged:
            row = verdict._asdict() | verdict.difference._asdict()
            row |= {"table": part.key, "claim": compared.claim, "verdict": verdict.word}
            row["difference"] = verdict.difference.value
            contexts = part.table[CONTEXT].dropna(how="all")
            rows.append(row | (contexts.iloc[0].to_dict() if len(contexts) else {}))
    return pd.DataFrame(rows, columns=VERDICT_COLUMNS)


def describe(study: Study) -> str:
    """Describe the study's runs in Markdown, with a warning if they are at quick scale."""
    keys = sorted({row.run for table in reported.SCORE_TABLES.values() for row in table.rows})
    of_runs = [trained.run.settings for key in keys for trained in study.trained(key)]
    each = f"{study.seeds} seed{'s' if study.seeds > 1 else ''} each"
    runs = f"{len(of_runs)} of {len(keys) * study.seeds} runs of {study.study} ({each})"
    text = f"{runs} are finished and scored in {study.runs_dir}."
    if not of_runs:
        return text
    paths = ({Path(settings[name]).name for settings in of_runs} for name in ("data", "weights"))
    data, weights = (", ".join(sorted(names)) for names in paths)
    text += f" Data: {data}; initial weights: {weights}."
    if "quick" not in {settings["scale"] for settings in of_runs}:
        return text
    steps = [settings["epochs"] * settings["steps_per_epoch"] for settings in of_runs]
    span = " to ".join(str(number) for number in sorted({min(steps), max(steps)}))
    alike = [name for name in SHARED if len({settings[name] for settings in of_runs}) == 1]
    listed = ", ".join(f"{name} {of_runs[0][name]}" for name in alike)
    return (
        f"**Quick scale: weights {weights}, {span} steps: a smoke test, not a reproduction of the "
        f"scores.** {text} Whatever its report says, every run has {listed} (min_size 0: images "
        "are not enlarged); its own are backbone, neck, attention, anchors, proposals, "
        "augmentation and normalisation."
    )


def _page(table: pd.DataFrame, columns: list[str], reasons: dict[str, str]) -> pd.DataFrame:
    """Select the columns of a table to show, and fill empty cells with their reasons (column ->
    reason; '': the row's ``missing``). ``± over seeds`` is added for several seeds, and ``missing``
    if a row has a reason for missing runs that no cell shows.
    """
    page = table.set_index(table.columns[0])
    if "low" in page:
        ends = page[["low", "high"]].to_numpy(float)
        spans = [f"[{low:.3f},\u00a0{high:.3f}]" for low, high in ends]  # in one line
        page["95 % interval"] = np.where(page["low"].isna(), "", spans)
    if "seed_sd" in page and page["seed_sd"].notna().any():
        after = columns.index("reproduced") + 1
        columns = [*columns[:after], "± over seeds", *columns[after:]]
        page["± over seeds"] = page["seed_sd"]
    explained = pd.Series(False, page.index)
    for name, reason in reasons.items():
        empty = page[name].isna()
        page[name] = page[name].astype(object).mask(empty, reason or page["missing"])
        explained |= empty
    unexplained = "missing" in page and (page["missing"].ne("") & ~explained).any()
    return page[[*columns, "missing"] if unexplained else columns]


def _score_table(shown: Shown, study: Study) -> None:
    """Rebuild a table of scores, and compare its rows as the report does."""
    about = TABLES[shown.key]
    base = next((first for row in about.rows if (first := study.first(row.run))), None)
    rows, values = {}, {}
    for row in about.rows:
        trained, reason = study.trained(row.run), study.missing(row.run)
        if trained and (differing := differences(base, trained[0])):
            reason = f"{trained[0].name} is of other {differing} than {base.name}"
            trained = []
        values[row.label] = {one.seed: study.values(one, row.variant) for one in trained}
        measured = _reproduced(row, trained, values[row.label]) | _run_columns(study, trained)
        rows[row.label] = row.model_dump() | measured | {"row": row.label, "missing": reason}
    shown.table = pd.DataFrame(rows.values(), columns=SCORE_COLUMNS)
    shown.page = _page(shown.table, SCORE_PAGE, {"reproduced": ""})
    by_label = {row.label: row for row in about.rows}
    for compared in about.comparisons:
        pair = by_label[compared.base], by_label[compared.other]
        common = sorted(values[compared.base].keys() & values[compared.other].keys())
        if common:
            sides = []
            for row in pair:
                scores = [values[row.label][seed] for seed in common]
                sides.append(verdicts.Side(row.label, scores, row.reported))
            options = {"same_weights": pair[0].run == pair[1].run, "caution": base.caution}
            options["expected"] = compared.expected
            verdict = verdicts.judge(compared.claim, *sides, base.scores, **options)
        else:
            missing = dict.fromkeys(rows[row.label]["missing"] for row in pair)
            verdict = verdicts.not_asked(compared.claim, "; ".join(filter(None, missing)))
        shown.judged.append((compared, verdict))


def _reproduced(row: Row, trained: list[Trained], values: dict[int, np.ndarray]) -> dict[str, Any]:
    """The columns ``SCORES`` of a row; {} without a run."""
    if not trained:
        return {}
    if row.measure == "AP50":
        return _score_columns(verdicts.estimate(list(values.values()), trained[0].scores.units))
    numbers = pd.Series([float(one.finished[row.measure]) for one in trained])
    return {"reproduced": numbers.mean(), "seed_sd": numbers.std()}


def _score_columns(estimate: verdicts.Estimate) -> dict[str, float]:
    """The columns ``SCORES``, with the interval limited to 0..1."""
    low, high = max(estimate.low, 0), min(estimate.high, 1)
    return dict(zip(SCORES, (estimate.value, estimate.seed_sd, low, high), strict=True))


def _run_columns(study: Study, trained: list[Trained]) -> dict[str, Any]:
    """The columns ``RUN_COLUMNS``, facts about the runs behind a row; {} without a run."""
    if not trained:
        return {}
    first, histories = trained[0], [one.run.history for one in trained]
    folder = first.name
    if len(trained) > 1:
        seeds = ",".join(str(one.seed) for one in trained)
        folder = f"{folder.removesuffix(str(first.seed))}{{{seeds}}}"
    return first.context | {
        "interval_over": f"{first.scores.units} {first.scores.unit}",
        "seeds": len(trained),
        "epochs": float(np.mean([len(history) for history in histories])),
        "minutes": float(np.mean([history["train_minutes"].iloc[-1] for history in histories])),
        "parameters": first.finished["parameters"],
        "peak_memory_GB": max(history["peak_memory_bytes"].max() for history in histories) / 1e9,
        "run_dir": f"{study.runs_dir}/{folder}",
    }


def _system_table(shown: Shown, study: Study) -> None:
    """Rebuild a table or figure about the report's own system. The builder fills in what the run
    measured; without a run, only the reported values are shown.
    """
    key, about, run = shown.key, TABLES[shown.key], SYSTEMS[shown.key[0]]
    builder, columns = BUILDERS[key]
    trained = study.trained(run) if key in MEANS_OVER_SEEDS else study.trained(run)[:1]
    shown.table = about.frame if about.columns else None
    if trained or key in ALSO_WITHOUT_A_RUN:
        builder(shown, trained)
    missing, of_runs = study.missing(run), _run_columns(study, trained)
    sentence = f"Nothing of {run}: {missing}."
    if trained:
        sentence = (
            "Run {run}: {scale} scale, weights {weights}, data {data} ({split}), maxDets "
            "{maxDets}, in {run_dir}."
        ).format(run=run, **of_runs)
    shown.sentences.append(sentence)
    if shown.table is None:
        return
    own = shown.table.filter(items=RUN_COLUMNS)
    of_runs = {name: of_runs.get(name) for name in RUN_COLUMNS} | dict(own)
    measured = shown.table.drop(columns=own.columns)
    shown.table = measured.assign(run=run, **of_runs, missing=missing)
    for name, reason in shown.reasons.items():
        shown.table.loc[shown.table[name].isna(), "missing"] = reason
    if columns:
        shown.page = _page(shown.table, columns, shown.reasons)


def _coco_lines(shown: Shown, trained: list[Trained]) -> None:
    """B-T1: the lines of COCO's summary, averaged over seeds."""
    samples = resampling.draw_units(trained[0].run.truth)
    summaries = []
    for run in (one.run for one in trained):
        scored = run.truth, run.detections, samples.weights, metrics.COCO_MAX_DETS
        summaries.append(resampling.bootstrap_summary(*scored))
    for row, name in shown.table["metric"].items():
        estimate = verdicts.estimate([summary[name] for summary in summaries], samples.units)
        shown.table.loc[row, SCORES] = _score_columns(estimate)
    shown.reasons = {"reproduced": NO_SUCH_CELL}


def _losses(shown: Shown, trained: list[Trained]) -> None:
    """B-T2, C-Fig3: the loss by epoch, averaged over seeds; the figure shows the first run."""
    epochs, histories = shown.table["epoch"], [one.run.history for one in trained]
    if "Fig" in shown.key:
        first = histories[0] if histories else None
        shown.figure = figures.losses_beside_reported(first, shown.table["reported"])
    if histories:
        by_seed = pd.DataFrame(h.set_index("epoch")["loss"].reindex(epochs) for h in histories)
        shown.table["reproduced"] = by_seed.mean().to_numpy()
        shown.table["seed_sd"] = by_seed.reset_index(drop=True).std().to_numpy()
        shown.reasons = {"reproduced": f"the run has {len(histories[0])} epochs"}


def _data_set(shown: Shown, trained: list[Trained]) -> None:
    """C-T1: facts about the data."""
    settings = trained[0].run.settings
    data, reading = settings["data"], settings["truth_reading"]
    try:
        dataset = open_dataset(data, reading, 0, settings["skip_faulty_images"])
        shown.table["here"] = tables.dataset_summary(dataset, data)["here"].to_numpy()
    except DataError as error:
        shown.sentences.append(f"The data cannot be opened: {first_line(error)}")


def _augmentation(shown: Shown, trained: list[Trained]) -> None:
    """D-T1: only a sentence on the run's augmentation; the table is all in ``reported.yaml``."""
    shown.sentences.append(f"The run's augmentation is {trained[0].run.settings['augmentation']}.")


def _settings(shown: Shown, trained: list[Trained]) -> None:
    """D-T2: the reported settings beside those of the study's run, at full scale and at its own."""
    names = shown.table.pop("name")
    full = RunConfig.from_yaml(*parameter_files(SYSTEMS["D"], "full")).to_dict()
    shown.table["full scale"] = names.map(full)
    if trained:
        shown.table["this run"] = [trained[0].run.settings.get(name) for name in names]


def _class_thresholds(shown: Shown, trained: list[Trained]) -> None:
    """E-T3: scores of the reported thresholds and of those chosen on one half of the images, both
    on the other half, averaged over seeds. Then compare class thresholds with one threshold.
    """
    halves = [one.halves() for one in trained]
    fixed = dict(zip(CLASS_NAMES, reported.E_THRESHOLDS.values(), strict=True))
    columns = [("precision", "reported"), ("recall", "reported")]
    columns += [(name, "chosen") for name in ("score_threshold", "precision", "recall")]
    by_seed = []
    for half in halves:
        strategies = {"reported": fixed, "chosen": half.chosen}
        scores = thresholds.threshold_table(half.judging, strategies, trained[0].scores.max_dets)
        scores = scores.pivot(index="class", columns="strategy").loc[list(CLASS_NAMES), columns]
        by_seed.append(scores.to_numpy(float))
    names = TABLES[shown.key].measured
    shown.table[names] = sum(by_seed) / len(by_seed)  # NaN (an empty cell) if NaN for any seed
    shown.reasons = {name: NOTHING_FOUND for name in names if "precision" in name}
    shown.reasons |= {name: NO_SUCH_CELL for name in names if "recall" in name}
    shown.sentences.append(
        f"{halves[0].sentence} Chosen: the thresholds of best F1 on the one half; precision and "
        "recall are measured on the other."
    )
    (compared,) = TABLES[shown.key].comparisons
    chosen = ", ".join(dict.fromkeys(f"{half.threshold:g}" for half in halves))
    one_threshold = [half.f1(half.threshold) for half in halves]
    class_thresholds = [half.f1(half.chosen) for half in halves]
    sides = [verdicts.Side(f"{compared.base}, {chosen}", one_threshold)]
    sides.append(verdicts.Side(compared.other, class_thresholds))
    options = {"same_weights": True, "metric": "F1", "caution": trained[0].caution}
    options["expected"] = compared.expected
    verdict = verdicts.judge(compared.claim, *sides, halves[0].draw, **options)
    shown.judged.append((compared, verdict))


def _threshold_sweep(shown: Shown, trained: list[Trained]) -> None:
    """E-sweep: AP, precision, recall and F1 of the first run over the score threshold."""
    matches = metrics.match_detections(trained[0].run.truth, trained[0].run.detections)
    shown.table = thresholds.sweep(matches, reported.E_GRID, trained[0].scores.max_dets)
    shown.figure = plots.threshold_sweep(shown.table)
    shown.reasons = {"precision": NOTHING_FOUND, "recall": NO_SUCH_CELL}
    rows = shown.table.pivot(index="score_threshold", columns="class")
    overall = rows[TABLES[shown.key].measured].xs("all", axis=1, level="class")
    wide = overall.join(rows["F1"][list(CLASS_NAMES)].add_prefix("F1 "))
    reasons = dict.fromkeys(wide, NO_SUCH_CELL) | {"precision": NOTHING_FOUND}
    shown.page = _page(wide.reset_index(), list(wide), reasons)


def _curves(shown: Shown, trained: list[Trained]) -> None:
    """A-Fig3, D-Fig2, E-Fig1: training curves of the first run."""
    history = trained[0].run.history
    shown.table = history[["epoch", "loss", "validation_loss", "validation_ap50"]]
    shown.figure = plots.training_curves(history)
    if history["validation_loss"].notna().sum() == 1:
        shown.sentences.append("Validated once, after the last epoch: a point, no curve.")


def _score_histogram(shown: Shown, trained: list[Trained]) -> None:
    """B-Fig1: scores of matched and unmatched detections, and how well they separate these."""
    run = trained[0].run
    matches = metrics.match_detections(run.truth, run.detections)
    overall = thresholds.separation(matches).loc["all"]
    sentence = "There are no matched and unmatched detections to compare."
    if pd.notna(overall["AUROC"]):
        sentence = (
            "Do scores separate right from wrong? A matched detection scores above an unmatched "
            f"one in {overall['AUROC']:.0%} of pairs (50 %: not at all, 100 %: perfectly); "
            f"{overall['matched']:.0f} detections match a cell, {overall['unmatched']:.0f} do not."
        )
    least = f"The model itself drops scores under {run.settings['box_score_thresh']:g}."
    shown.sentences += [sentence, least]
    shown.table = thresholds.reliability(matches, HISTOGRAM_BINS)
    shown.figure = plots.score_histograms(matches)


def _picture(shown: Shown, study: Study) -> None:
    """Draw a figure of validation images; without images, only a sentence says why."""
    key = SYSTEMS[shown.key[0]]
    images, sentence = [], f"No pictures: {study.missing(key)}."
    if trained := study.first(key):
        images, sentence = images_of_run(trained.run)
    if images:
        PICTURES[shown.key](shown, images, trained.run)
    shown.sentences = [*(shown.sentences if images else []), sentence]


def _image_and_map(shown: Shown, images: list[CellImage], run: Run) -> None:
    """A-Fig1, C-Fig1: the image with the most classes; of several, the one with the most cells."""
    cells, counts = run.annotated, np.zeros((len(images), len(CLASS_NAMES)), int)
    np.add.at(counts, (cells.image_ids - 1, cells.labels - 1), 1)
    chosen = int(np.lexsort([counts.sum(1), (counts > 0).sum(1)])[-1])
    class_name = CLASS_NAMES[counts[chosen].argmax()] if shown.key == "A-Fig1" else "all"
    shown.figure = plots.image_beside_instances(images[chosen], class_name)


def _border_cells(shown: Shown, images: list[CellImage], run: Run) -> None:
    """B-Fig2: the image with the most predictions at its border."""
    predicted = run.detections[run.detections.scores >= DISPLAYED_THRESHOLD]
    margin = borders.BORDER_MARGIN_PX
    at_border = predicted[borders.near_border(predicted, margin, by="mask")]
    number = int(np.bincount(at_border.image_ids, minlength=2)[1:].argmax()) + 1
    of_image = [part[part.image_ids == number] for part in (run.annotated, at_border)]
    title = f"predicted at the border, score ≥ {DISPLAYED_THRESHOLD:g}"
    shown.figure = plots.border_strip(images[number - 1], *of_image, title)
    everywhere, of_images, which = annotations_of_run(run)
    contact = borders.border_contact(everywhere, of_images).loc["all"]
    shown.sentences.append(
        f"{which} {contact['at_border']} annotated cells touch the border, where chance would put "
        f"{contact['expected']:.0f} [{contact['low']:.0f}, {contact['high']:.0f}]: "
        f"{contact['verdict']}."
    )


def _predictions(shown: Shown, images: list[CellImage], run: Run) -> None:
    """E-Fig2: the image with the most predictions; of several, the one with the most cells."""
    predicted = reported.VARIANTS[reported.E_BOTH](run.detections)
    size = len(images) + 1  # ids count from 1
    counts = [np.bincount(part.image_ids, minlength=size) for part in (predicted, run.annotated)]
    by_image = np.transpose(counts)[1:].tolist()
    number = by_image.index(max(by_image)) + 1
    of_image = [[part[part.image_ids == number]] for part in (run.annotated, predicted)]
    lowest = min(reported.E_THRESHOLDS.values())
    shown.figure = plots.truth_beside_predictions([images[number - 1]], *of_image, lowest)


PICTURES: dict[str, Callable[[Shown, list[CellImage], Run], None]] = {
    "A-Fig1": _image_and_map,
    "B-Fig2": _border_cells,
    "C-Fig1": _image_and_map,
    "E-Fig2": _predictions,
}
SCALE, OF_E_T3 = ["scale", "weights"], TABLES["E-T3"]
# key -> builder, columns to show beside the row names (none: a figure, or the builder makes them)
BUILDERS: dict[str, tuple[Callable[[Shown, list[Trained]], None], list[str]]] = {
    "A-Fig3": (_curves, []),
    "B-T1": (_coco_lines, ["reported", "reproduced", "95 % interval", "maxDets", *SCALE]),
    "B-T2": (_losses, ["reported", "reproduced", *SCALE]),
    "B-Fig1": (_score_histogram, []),
    "C-T1": (_data_set, ["reported", "here"]),
    "C-Fig3": (_losses, ["reported", "reproduced", *SCALE]),
    "D-T1": (_augmentation, ["reported", "here"]),
    "D-T2": (_settings, ["reported", "full scale", "this run"]),
    "D-Fig2": (_curves, []),
    "E-Fig1": (_curves, []),
    "E-T3": (_class_thresholds, [*OF_E_T3.columns[1:], *OF_E_T3.measured, *SCALE]),
    "E-sweep": (_threshold_sweep, []),
}
MEANS_OVER_SEEDS = {"B-T1", "B-T2", "C-Fig3", "E-T3"}  # all others show the first seed only
ALSO_WITHOUT_A_RUN = {"C-Fig3", "D-T2"}
