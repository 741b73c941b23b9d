import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scenes import disc, result, truth_of

from cellseg_helpers import metrics, resampling
from cellseg_helpers.cells import Cells
from cellseg_helpers.config import ROOT, RunConfig
from cellseg_helpers.runs import load_run, write_json
from study import reported, reports, tables, verdicts
from study import runs as runs_of_study

STUDY = "quick-drawn"
PLACES = [
    disc(x, y, r)
    for x, y, r in ((15, 15, 6), (45, 15, 8), (80, 40, 20), (20, 60, 18), (100, 80, 7), (60, 80, 6))
]
IMAGES = 6
TRUTH = truth_of(
    [(image, 1 + n % 4, mask) for image in range(1, IMAGES + 1) for n, mask in enumerate(PLACES)],
    IMAGES,
)
POOR = ("a/resnet18", "d/no_fpn")


def detections(found, seed):
    """Of each image every cell but for a share that is missed, at scores from 0.1 on, and two finds
    of nothing.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for image in range(1, IMAGES + 1):
        rows += [
            result(image, 1 + n % 4, rng.uniform(0.1, 1), mask)
            for n, mask in enumerate(PLACES)
            if rng.random() < found
        ]
        rows += [
            result(image, int(rng.integers(1, 5)), rng.uniform(0.05, 0.6), disc(60, 50, 5))
            for _ in range(2)
        ]
    return Cells.from_coco(rows)


def write_run(folder, key, seed, found):
    folder.mkdir(parents=True)
    write_json(
        folder / "settings.json", runs_of_study.settings(key, "quick", "drawn", seed).to_dict()
    )
    write_json(folder / "provenance.json", {"data_fingerprint": "0"})
    names = [image["file_name"] for image in TRUTH["images"]]
    write_json(
        folder / "split.json",
        {"kind": "random", "train": ["x"], "validation": names, "warning": ""},
    )
    write_json(folder / "truth.json", TRUTH)
    write_json(folder / "detections.json", found.to_coco())
    write_json(folder / "metrics.json", metrics.evaluate(TRUTH, found))
    history = pd.DataFrame(
        {"epoch": [1, 2, 3], "loss": [2.0, 1.5, 1.25], "train_minutes": [0.5, 1.0, 1.5]}
    )
    history = history.assign(
        validation_loss=1.0, validation_ap50=[np.nan, np.nan, 0.5], peak_memory_bytes=2e9
    )
    history.to_csv(folder / "history.csv", index=False)
    ended = {
        "epochs": 3,
        "stopped_early": False,
        "parameters": 44_000_000,
        "model_megabytes": 177.5,
    }
    write_json(folder / "finished.json", ended)


@pytest.fixture(scope="module")
def whole_study(tmp_path_factory):
    """Every run of the reports with two seeds; ``POOR`` ones find few of the made-up cells."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {
        (poor, seed): detections(0.3 if poor else 0.9, 10 * seed + poor)
        for poor in (False, True)
        for seed in (0, 1)
    }
    scores = {kind: resampling.score_run(TRUTH, found) for kind, found in kinds.items()}
    for key in report_keys():
        for seed in (0, 1):
            kind = key in POOR, seed
            run = folder / runs_of_study.run_name(STUDY, key, seed)
            write_run(run, key, seed, kinds[kind])
            resampling.save_scores(scores[kind], run / "scores.json")
    return folder


@pytest.fixture
def some_runs(whole_study, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(whole_study, tmp_path / "runs")
    return tmp_path / "runs"


def run_of(folder, key, seed=0):
    return folder / runs_of_study.run_name(STUDY, key, seed)


def opened(folder, seeds=1):
    return runs_of_study.Study(str(folder), STUDY, seeds)


def report_keys():
    return [key for key in runs_of_study.run_keys() if "+" not in key]


class TestRegistry:
    def test_every_row_has_a_run_and_every_run_a_row(self):
        used = {row.run for table in reported.TABLES.values() for row in table.rows}
        assert used == set(report_keys())

    def test_every_table_and_figure_is_built_in_one_way(self):
        not_needed = [key for key, table in reported.TABLES.items() if table.not_needed]
        known = [*reported.SCORE_TABLES, *reports.BUILDERS, *reports.PICTURES, *not_needed]
        assert sorted(known) == sorted(reported.TABLES)
        assert [key[0] for key in reported.TABLES] == sorted(key[0] for key in reported.TABLES)
        assert not_needed == ["A-Fig2", "C-Fig2", "D-Fig1"]

    def test_comparisons_and_variants_are_known(self):
        for table in reported.SCORE_TABLES.values():
            labels = [row.label for row in table.rows]
            assert len(set(labels)) == len(labels)
            for pair in table.comparisons:
                assert pair.base in labels and pair.other in labels and pair.base != pair.other
            assert all(row.variant in reported.VARIANTS for row in table.rows)

    @pytest.mark.parametrize(
        "change", [{"rowz": []}, {"rows": [{"label": "a"}]}, {"comparisons": [{"claim": "x"}]}]
    )
    def test_an_unknown_or_missing_field_is_refused(self, change):
        with pytest.raises(ValueError):
            reported.Table.model_validate({"title": "t"} | change)

    def test_reported_values_are_those_of_the_reports(self):
        values = {
            "A-T1": [0.357],
            "A-T2": [0.335, 0.334, 0.357],
            "A-T3": [0.339, 0.357],
            "B-T3": [0.26, 0.21, 0.27],
            "B-T4": [0.27, 0.27],
            "B-T5": [None, None, "chosen", None],
            "C-T2": [0.31],
            "C-T3": [None, "a loss in validation performance"],
            "D-T3": [0.2421, 0.2815, 0.3336],
            "D-T4": [0.3336, 176.29],
            "E-T1": [0.340, 0.40, 0.455],
            "E-T2": [0.412, 0.438, 0.455],
            "E-T4": [0.442, 0.455],
        }
        tables = reported.SCORE_TABLES.items()
        assert {key: [row.reported for row in table.rows] for key, table in tables} == values

    def test_each_row_names_its_table_in_its_runs_file(self):
        for key, table in reported.SCORE_TABLES.items():
            report, number = key.split("-T")
            for row in table.rows:
                path = runs_of_study.parameter_files(row.run, "full")[0]
                comment = (ROOT / path).read_text().splitlines()[0]
                spans = re.findall(rf"{report}-T(\d) to {report}-T(\d)", comment)
                in_a_span = any(first <= number <= last for first, last in spans)
                assert key in comment or in_a_span, (key, row.label, comment)

    def test_all_else_is_of_the_reports_own_system(self):
        for report, key in reported.SYSTEMS.items():
            path = runs_of_study.parameter_files(key, "full")[0]
            comment = (ROOT / path).read_text().splitlines()[0]
            assert comment.startswith(f"# Report {report}, the system itself: ")

    def test_other_reported_values_are_those_of_the_reports(self):
        lines = [0.287, 0.461, 0.340, 0.209, 0.238, 0.119, 0.042, 0.214, 0.385, 0.353, 0.331, 0.162]
        assert reported.column("B-T1", "reported") == lines
        assert reported.column("B-T1", "maxDets") == [100] * 6 + [1, 10] + [100] * 4
        assert reported.LOSSES["B-T2"] == [1.8835, 1.4656, 1.2757, 1.2308, 1.1274]
        ten = [0.7856, 0.7839, 0.7342, 0.7164, 0.6516, 0.6369, 0.6210, 0.6259, 0.6229, 0.5715]
        assert reported.LOSSES["C-Fig3"] == ten
        assert reported.E_THRESHOLDS == {1: 0.25, 2: 0.22, 3: 0.20, 4: 0.18}
        assert reported.column("E-T3", "reported_precision") == [0.83, 0.78, 0.74, 0.70]
        assert reported.column("E-T3", "reported_recall") == [0.72, 0.76, 0.79, 0.82]
        assert [round(0.05 * step, 2) for step in range(2, 17)] == reported.E_GRID
        assert reported.E_SIZE_FACTORS == [(0.01, 1.15), (0.05, 1.10)]

    def test_report_ds_augmentation_is_what_the_recipe_does(self):
        from cellseg_helpers.data.augment import RECIPES

        in_the_code = {
            "horizontal flip": "HorizontalFlip",
            "vertical flip": "VerticalFlip",
            "rotation": "degrees=[-15.0, 15.0]",
            "zoom": "scale=(0.85, 1.15)",
            "random resized crop": "area=(0.8, 1.0), ratio=(0.9, 1.1)",
            "colour jitter": "brightness=(0.7, 1.3), contrast=(0.7, 1.3), saturation=(0.7, 1.3), "
            "hue=(-0.15, 0.15)",
            "Gaussian noise": "std=0.02",
            "Gaussian blur": "kernel_size=(3, 3), sigma=[0.1, 1.0]",
            "gamma": "low=0.8, high=1.2",
        }
        rows = reported.TABLES["D-T1"].values
        for (step, in_report, here), transform in zip(rows, RECIPES["joint_full"], strict=True):
            assert in_the_code[step] in repr(transform)
            assert here.endswith(f"p {transform.p:g}")
            assert here == in_report or step == "colour jitter"

    def test_report_ds_settings_are_those_of_its_parameter_file(self):
        full = RunConfig.from_yaml(*runs_of_study.parameter_files("d/fpn_cbam", "full")).to_dict()
        for label, in_report, name in reported.TABLES["D-T2"].values:
            if re.fullmatch(r"[\d.e-]+", in_report):
                assert full[name] == float(in_report), label
        assert (full["optimizer"], full["scheduler"], full["normalization"]) == (
            "adamw",
            "cosine",
            "data",
        )
        assert full["precision"].endswith("mixed") and full["augmentation"] == "joint_full"


def test_torch_is_not_needed():
    code = "import sys\nfrom study import reports, tables\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def everything(whole_study):
    shown = reports.build_all(opened(whole_study))
    assert list(shown) == list("ABCDE")
    return {part.key: part for parts in shown.values() for part in parts}


class TestWholeStudy:
    def test_everything_is_in_the_reports_order(self, everything):
        assert list(everything) == list(reported.TABLES)

    def test_the_workflow_declares_every_table_that_is_saved(self, everything):
        lines = re.findall(
            r"^REPORT_(?:TABLES|FIGURES) = .*$", (ROOT / "Snakefile").read_text(), re.MULTILINE
        )
        declared = {}
        exec("\n".join(lines), declared)
        saved = {key for key, part in everything.items() if part.table is not None}
        assert {*declared["REPORT_TABLES"], *declared["REPORT_FIGURES"]} == saved

    def test_every_conclusion_and_score_says_what_its_runs_are_of(self, everything):
        told = reports.verdict_table(list(everything.values()))
        assert (
            told[["seeds", "data", "split", "maxDets", "scale", "weights"]].notna().all(axis=None)
        )
        assert set(told["scale"]) == {"quick"} and set(told["weights"]) == {"none"}
        overview = reports.overview(list(everything.values()))
        assert set(overview["scale"]) == {"quick"} and set(overview["weights"]) == {"none"}

    def test_no_score_cell_is_empty(self, everything):
        for key in reported.SCORE_TABLES:
            table = everything[key].table
            assert table["reproduced"].notna().all() and (table["missing"] == "").all()
            of_scores = table[table["row"] != "size of the model, MB"]
            assert of_scores[["low", "high"]].notna().all(axis=None)
            assert (
                (of_scores["low"] <= of_scores["reproduced"])
                & (of_scores["reproduced"] <= of_scores["high"])
            ).all()

    def test_a_row_says_where_its_number_is_from(self, everything, whole_study):
        row = everything["A-T2"].table.set_index("row").loc["ResNet18_FPN"]
        expected = {
            "run": "a/resnet18", "reported": 0.335, "interval_over": "6 images", "seeds": 1,
            "data": "drawn", "split": "random, validation side", "maxDets": 100, "scale": "quick",
            "epochs": 3, "minutes": 1.5, "parameters": 44_000_000, "peak_memory_GB": 2,
            "run_dir": f"{whole_study}/quick-drawn-a-resnet18-seed0",
        }  # fmt: skip
        assert row[list(expected)].to_dict() == expected
        saved = resampling.load_scores(run_of(whole_study, "a/resnet18") / "scores.json")
        assert row["reproduced"] == saved.AP50[0]

    def test_a_planted_effect_is_found_and_none_is_not(self, everything):
        words = {
            (key, compared.claim): found.word
            for key, part in everything.items()
            for compared, found in part.judged
        }
        assert words["A-T2", "A larger backbone helps, ResNet-50 over ResNet-18"] == verdicts.HOLDS
        assert (
            words["A-T2", "A larger backbone helps, ResNet-101 over ResNet-50"]
            == verdicts.NO_DIFFERENCE
        )
        assert words["D-T3", "A feature pyramid helps"] == verdicts.HOLDS
        assert words["D-T3", "CBAM helps"] == verdicts.NO_DIFFERENCE
        assert words["B-T3", "Keeping all scores higher than a threshold of 0.5"] == verdicts.HOLDS

    def test_a_variant_is_scored_from_the_runs_detections(self, everything, whole_study):
        found = json.loads((run_of(whole_study, "b/v2_backbone") / "detections.json").read_text())
        kept = Cells.from_coco([row for row in found if row["score"] >= 0.5])
        expected = metrics.evaluate(TRUTH, kept)["coco_dense"]["summary"]["AP50"]
        row = everything["B-T3"].table.set_index("row").loc["0.5 (keep the high peak)"]
        assert row["reproduced"] == pytest.approx(expected, abs=1e-6)

    def test_the_12_lines_are_at_the_usual_limits(self, everything, whole_study):
        table = everything["B-T1"].table.set_index("metric")
        summary = load_run(run_of(whole_study, "b/v2_backbone")).metrics["coco"]["summary"]
        np.testing.assert_allclose(table["reproduced"], list(summary.values()), atol=1e-9)
        assert table["maxDets"].tolist() == [100] * 6 + [1, 10] + [100] * 4
        assert table.loc["APl", "missing"] == "no such cell in the validation images"

    def test_losses_stand_beside_the_reported_ones(self, everything):
        table = everything["B-T2"].table
        assert table["reproduced"].tolist()[:3] == [2.0, 1.5, 1.25] and table[
            "reproduced"
        ].isna().tolist()[3:] == [True, True]
        assert table["missing"].tolist() == [
            "",
            "",
            "",
            "the run has 3 epochs",
            "the run has 3 epochs",
        ]
        assert (
            everything["C-Fig3"].table["reported"].tolist()[:2] == [0.7856, 0.7839]
            and everything["C-Fig3"].figure is not None
        )

    def test_the_size_of_the_model_is_no_score(self, everything):
        row = everything["D-T4"].table.set_index("row").loc["size of the model, MB"]
        assert (row["reported"], row["reproduced"]) == (176.29, 177.5) and np.isnan(row["low"])

    def test_thresholds_are_chosen_on_one_half_and_judged_on_the_other(self, everything):
        part = everything["E-T3"]
        assert part.table["chosen_threshold"].isin(reported.E_GRID).all() and len(part.table) == 4
        assert any(
            "3 images to choose on and 3 images to judge on" in sentence
            for sentence in part.sentences
        )
        assert (
            part.judged[0][1].word == verdicts.CANNOT_TELL
            and "3 images are too few" in part.judged[0][1].sentence
        )

    def test_an_empty_score_of_detections_says_why(self, some_runs):
        """No detection of a macrophage, and no macrophage to be found: precision and recall are
        ratios of nothing.
        """
        for kind, reason in (
            ("detections", reports.NOTHING_FOUND),
            ("truth", reports.NO_SUCH_CELL),
        ):
            path = run_of(some_runs, "e/full") / f"{kind}.json"
            content = json.loads(path.read_text())
            rows = content if kind == "detections" else content["annotations"]
            rows[:] = [row for row in rows if row["category_id"] != 4]
            path.write_text(json.dumps(content))
            part = reports.build(opened(some_runs), "E-T3")
            row = part.table.set_index("class").loc["macrophage"]
            assert row["missing"] == reason and part.table["missing"].tolist()[0] == ""
            assert (
                part.page.loc["macrophage", "recall" if kind == "truth" else "precision"] == reason
            )
            assert reason in set(reports.build(opened(some_runs), "E-sweep").table["missing"])

    def test_the_sweep_has_every_threshold_and_class(self, everything):
        table = everything["E-sweep"].table
        assert sorted(set(table["score_threshold"])) == pytest.approx(np.arange(0.10, 0.81, 0.05))
        assert len(table) == 15 * 5 and everything["E-sweep"].figure is not None
        assert len(everything["E-sweep"].page) == 15

    def test_pictures_whose_images_are_gone_are_a_sentence(self, everything):
        """The drawn images are not those of this made-up truth."""
        for key in ("A-Fig1", "B-Fig2", "C-Fig1", "E-Fig2"):
            assert everything[key].figure is None
            assert everything[key].sentences[0].startswith("No pictures")
        for key in ("A-Fig3", "B-Fig1", "D-Fig2", "E-Fig1"):
            assert everything[key].figure is not None

    def test_the_overview_and_the_verdicts_list_everything(self, everything):
        overview = reports.overview(list(everything.values()))
        assert (
            len(overview) == sum(len(table.rows) for table in reported.SCORE_TABLES.values()) + 12
        )
        assert (
            "over ResNet18_FPN: holds here"
            in overview[overview["row"] == "ResNet50_FPN"]["verdict on the claim"].item()
        )
        told = reports.verdict_table(list(everything.values()))
        assert (
            len(told) == sum(len(table.comparisons) for table in reported.SCORE_TABLES.values()) + 1
        )

    def test_text_puts_the_verdict_in_bold(self, everything):
        assert (
            "A larger backbone helps, ResNet-50 over ResNet-18: **holds here**. AP50 "
            in everything["A-T2"].text
        )
        shown = tables.page(reports.overview(list(everything.values())), "overview").data
        assert "over ResNet18_FPN: <b>holds here</b> (one training each)" in shown

    def test_a_page_is_the_same_each_time_and_formats_its_numbers(self, everything):
        page = everything["A-T2"].page
        html = tables.page(page, "A-T2").data
        assert html == tables.page(page, "A-T2").data
        assert ">0.335<" in html and ">44.0 M<" in html and ">1.5<" in html and "nan" not in html

    def test_a_part_is_displayed_with_its_table_figure_and_sentences(self, everything, monkeypatch):
        shown = []
        monkeypatch.setattr(reports, "display", shown.append)
        monkeypatch.setattr(reports.plots, "show", lambda figure, alt: shown.append(alt))
        everything["C-Fig3"].display()
        heading, table, alt, text = shown
        assert heading.data == f"### {alt.replace(':', '')}" and text.data.startswith("- Sum of")
        assert "0.7856" in table.data and alt == "C-Fig3: Training loss over 10 epochs"

    def test_the_quick_scale_is_called_a_smoke_test(self, whole_study):
        told = reports.describe(opened(whole_study))
        assert re.match(
            r"\*\*Quick scale: weights none, \d+ steps: a smoke test, not a reproduction of the "
            r"scores\.\*\*",
            told,
        )
        assert "17 of 17 runs" in told


def test_seeds_are_averaged_and_their_spread_is_told(whole_study):
    part = reports.build(opened(whole_study, 2), "A-T2")
    row = part.table.set_index("row").loc["ResNet18_FPN"]
    values = [
        resampling.load_scores(run_of(whole_study, "a/resnet18", seed) / "scores.json").AP50[0]
        for seed in (0, 1)
    ]
    assert row["reproduced"] == pytest.approx(np.mean(values)) and row["seed_sd"] == pytest.approx(
        np.std(values, ddof=1)
    )
    assert row["run_dir"].endswith("quick-drawn-a-resnet18-seed{0,1}") and row["seeds"] == 2
    assert part.page.loc["ResNet18_FPN", "± over seeds"] == row["seed_sd"]
    assert "6 images and 2 seeds" in part.text


class TestMissingRuns:
    def test_a_run_that_is_not_there_leaves_an_empty_cell_with_its_reason(self, some_runs):
        shutil.rmtree(run_of(some_runs, "a/resnet50"))
        part = reports.build(opened(some_runs), "A-T2")
        row = part.table.set_index("row").loc["ResNet50_FPN"]
        assert (
            np.isnan(row["reproduced"]) and row["missing"] == "no run quick-drawn-a-resnet50-seed0"
        )
        assert part.page.loc["ResNet50_FPN", "reproduced"] == row["missing"]
        assert part.table["missing"].tolist() == ["", row["missing"], ""]
        words = [found.word for _, found in part.judged]
        assert words == [verdicts.NOT_ASKED, verdicts.NOT_ASKED, verdicts.HOLDS]
        assert "**cannot be asked**. Reason: no run quick-drawn-a-resnet50-seed0." in part.text

    @pytest.mark.parametrize(
        ("file", "reason"),
        [
            ("finished.json", "quick-drawn-c-final-seed0 has not finished (no finished.json)"),
            (
                "scores.json",
                "quick-drawn-c-final-seed0 was not scored, run 03_evaluate on it (no scores.json)",
            ),
            ("history.csv", "has no history.csv"),
        ],
    )
    def test_a_run_without_a_file_is_missing(self, some_runs, file, reason):
        (run_of(some_runs, "c/final") / file).unlink()
        table = reports.build(opened(some_runs), "C-T2").table
        assert table["reproduced"].isna().all() and reason in table["missing"].item()

    @pytest.mark.parametrize(
        "file", ["settings.json", "scores.json", "finished.json", "detections.json"]
    )
    def test_a_damaged_run_is_missing(self, some_runs, file):
        (run_of(some_runs, "c/final") / file).write_text("{")
        table = reports.build(opened(some_runs), "C-T2").table
        assert table["reproduced"].isna().all() and file in table["missing"].item()

    @pytest.mark.parametrize(
        ("name", "value", "told"), [("scale", "full", "scale"), ("data", "outputs/other", "data")]
    )
    def test_a_run_of_other_data_or_scale_is_left_out(self, some_runs, name, value, told):
        path = run_of(some_runs, "a/resnet101") / "settings.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        part = reports.build(opened(some_runs), "A-T2")
        row = part.table.set_index("row").loc["ResNet101_FPN"]
        assert np.isnan(row["reproduced"])
        assert (
            row["missing"]
            == f"quick-drawn-a-resnet101-seed0 is of other {told} than quick-drawn-a-resnet18-seed0"
        )

    def test_a_run_of_another_split_is_left_out(self, some_runs):
        folder = run_of(some_runs, "a/resnet101")
        (folder / "truth.json").write_text(
            json.dumps(TRUTH | {"annotations": TRUTH["annotations"][:-1]})
        )
        (folder / "split.json").write_text(
            json.dumps({"kind": "patient", "train": [], "validation": [], "warning": ""})
        )
        row = reports.build(opened(some_runs), "A-T2").table.set_index("row").loc["ResNet101_FPN"]
        assert "is of other split, validation images or cells than" in row["missing"]

    def test_a_missing_seed_is_told_and_the_others_count(self, some_runs):
        shutil.rmtree(run_of(some_runs, "a/resnet50", 1))
        part = reports.build(opened(some_runs, 2), "A-T2")
        row = part.table.set_index("row").loc["ResNet50_FPN"]
        assert (
            row["seeds"] == 1
            and row["missing"] == "no run quick-drawn-a-resnet50-seed1"
            and row["reproduced"] > 0
        )

    @pytest.mark.parametrize("key", ["E-T3", "E-sweep"])
    def test_a_missing_seed_is_told_beside_thresholds_too(self, some_runs, key):
        shutil.rmtree(run_of(some_runs, "e/full", 1))
        assert "no run quick-drawn-e-full-seed1" in set(
            reports.build(opened(some_runs, 2), key).table["missing"]
        )

    def test_without_any_run_every_table_says_so(self, tmp_path):
        study = opened(tmp_path)
        for key, about in reported.TABLES.items():
            part = reports.build(study, key)
            assert "no run" in part.text or about.not_needed or about.rows
            if about.rows:
                assert part.table["missing"].str.startswith("no run").all()
                assert part.table["reproduced"].isna().all()
            elif about.columns:
                assert part.table["missing"].str.startswith("no run").all()
                assert len(part.table) == len(about.values)
        assert "0 of 17 runs" in reports.describe(study)

    def test_an_unknown_table_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="the reports have no 'A-T9'; they have A-Fig1, "):
            reports.build(opened(tmp_path), "A-T9")


def test_the_committed_quick_study_leaves_no_score_cell_empty():
    """A cell holds a number, or why there can be none."""
    study = runs_of_study.Study("outputs/reference/quick_study", STUDY)
    for key in reported.TABLES:
        if "Fig" in key and key != "C-Fig3":
            continue
        page = reports.build(study, key).page
        if "reproduced" in page:
            assert "missing" not in page and page["reproduced"].notna().all(), key
            texts = {value for value in page["reproduced"] if isinstance(value, str)}
            assert texts <= {reports.NO_SUCH_CELL}, key
        elif key in ("E-T3", "E-sweep"):
            assert page.notna().all(axis=None), key
