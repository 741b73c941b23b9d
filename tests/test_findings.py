import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scenes import disc, result, truth_of

from cellseg_helpers import borders, plots, resampling
from cellseg_helpers.cells import BoxMask, Cells
from cellseg_helpers.config import ROOT
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.model.build import build_model
from cellseg_helpers.runs import RunError
from study import figures, findings, released_code, reported, verdicts
from study import runs as study_runs
from study.findings import FINDINGS

STUDY = "quick-drawn"


def cell_image(label_map, name="a", seed=0):
    label_maps = np.zeros((4, *label_map.shape), np.int32)
    label_maps[0] = label_map
    image = np.random.default_rng(seed).integers(0, 256, (3, *label_map.shape), dtype=np.uint8)
    return CellImage(name, None, image, label_maps)


def ids_in_squares(*ids):
    """Squares of 4 px, two apart from one another, in a row."""
    label_map = np.zeros((8, 6 * len(ids) + 2), np.int32)
    for place, instance_id in enumerate(ids):
        label_map[2:6, 6 * place + 2 : 6 * place + 6] = instance_id
    return label_map


@pytest.fixture
def truth():
    """Eight images with two cells each, of two classes."""
    cells = [(i, k, disc(x, 40, 9)) for i in range(1, 9) for k, x in ((1, 25), (2, 70))]
    return truth_of(cells, images=8)


def found_in(truth, lose=(), score=0.9):
    """A right detection for each cell but those of some images."""
    rows = [
        result(cell["image_id"], cell["category_id"], score, cell["segmentation"])
        for cell in truth["annotations"]
        if cell["image_id"] not in lose
    ]
    return Cells.from_coco(rows)


@pytest.fixture
def runs_dir(tmp_path, truth):
    """Runs of the study under their names; ``write(key, detections)`` adds one."""

    def write(key, detections, **changes):
        config = study_runs.settings(key, "quick", "drawn", 0)
        folder = tmp_path / config.run_name
        shutil.copytree(ROOT / "outputs" / "reference" / "quick_run", folder)
        files = {
            "settings": config.to_dict() | changes,
            "truth": truth,
            "detections": detections.to_coco(),
            "finished": {
                "epochs": 5,
                "stopped_early": False,
                "parameters": 1,
                "model_megabytes": 1.0,
            },
        }
        for name, value in files.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        resampling.save_scores(resampling.score_run(truth, detections), folder / "scores.json")
        return folder

    return SimpleNamespace(path=tmp_path, write=write)


class TestRegistry:
    def test_has_all_differences_in_their_order(self):
        letters = ["B"] * 6 + ["C"] * 4 + ["B, C, E"] + ["E"] * 10
        assert [finding.report for finding in FINDINGS.values()] == letters

    @pytest.mark.parametrize("key", [key for key in FINDINGS if FINDINGS[key].as_reported])
    def test_names_runs_of_the_study_that_differ(self, key):
        runs = FINDINGS[key].as_reported, FINDINGS[key].as_released
        one, two = (study_runs.settings(run, "full", "drawn", 0) for run in runs)
        assert one.differences(two.to_dict()) and FINDINGS[key].change

    def test_uses_every_variant_of_the_findings(self):
        used = {finding.as_reported for finding in FINDINGS.values()}
        used |= {finding.as_released for finding in FINDINGS.values()}
        assert {key for key in study_runs.run_keys() if "+" in key} <= used

    def test_notebook_has_a_section_for_each(self):
        cells = json.loads((ROOT / "notebooks" / "09_findings.ipynb").read_text())["cells"]
        text = "".join("".join(cell["source"]) + "\n" for cell in cells)
        titles = [line[4:].lower() for line in text.splitlines() if line.startswith("### ")]
        assert titles == [finding.title.lower() for finding in FINDINGS.values()]

    def test_names_say_the_measure_where_a_finding_has_several(self):
        rows = [("b-heads", "AP50", "training pair"), ("e-scores", "AP50", "detections")]
        rows.append(("e-scores", "F1", "detections"))
        names = findings.names_of(pd.DataFrame(rows, columns=["finding", "measure", "measured_on"]))
        assert list(names) == [
            "B: v2 backbone, v1 heads",
            "E: size-aware scores and refinement (AP50, detections)",
            "E: size-aware scores and refinement (F1, detections)",
        ]

    def test_figure_has_a_row_for_each(self):
        rows = pd.DataFrame({"effect": [0.1, -0.2], "low": [0.0, -0.3], "high": [0.3, -0.1]})
        (ax,) = figures.finding_effects(rows, ["first", "second"]).axes
        assert [label.get_text() for label in ax.get_yticklabels()] == ["first", "second"]
        line, bars = ax.containers[0][0], ax.containers[0][2][0]
        assert line.get_xdata().tolist() == [0.1, -0.2] and ax.yaxis_inverted()
        ends = [[x for x, _ in segment] for segment in bars.get_segments()]
        np.testing.assert_allclose(ends, [[0.0, 0.3], [-0.3, -0.1]], atol=1e-12)


class TestModel:
    def test_parameters_of_report_b(self):
        whole, mixed = (
            released_code.model_parts(key)["parameters"] for key in ("b/v2_whole", "b/v2_backbone")
        )
        assert (round(whole["all"] / 1e6, 2), round(mixed["all"] / 1e6, 2)) == (45.90, 43.99)
        assert whole["RPN convolutions"] == 2 * mixed["RPN convolutions"] == 2 * 256 * (256 * 9 + 1)
        assert mixed["box head"] == (256 * 49 + 1) * 1024 + 1025 * 1024
        assert (whole[released_code.HEAD_NORMS], mixed[released_code.HEAD_NORMS]) == (
            8 * 2 * 256,
            0,
        )
        assert whole[:-1].sum() == whole["all"]

    @pytest.mark.parametrize("key", ["c/final", "c/final+coco_weights", "b/v2_backbone"])
    def test_loaded_and_trainable_as_the_model_is_built(self, key, monkeypatch):
        config = study_runs.settings(key, "full", "drawn", 0)

        def published(weights_enum, kind):
            import torchvision

            version = "_v2" if "v2" in config.backbone else ""
            name = "resnet50" if kind == "imagenet" else f"maskrcnn_resnet50_fpn{version}"
            options = {"weights_backbone": None} if kind == "coco" else {}
            with torch.device("meta"):
                return torchvision.models.get_model(name, weights=None, **options).state_dict()

        monkeypatch.setattr("cellseg_helpers.model.backbones.published_weights", published)
        with torch.device("meta"):
            model = build_model(config)
        loaded = set(model.load_report.loaded)
        parameters = dict(model.named_parameters())
        parts = released_code.model_parts(key)
        assert parts.loc["all", "loaded"] == sum(
            p.numel() for name, p in parameters.items() if name in loaded
        )
        assert parts.loc["all", "trainable"] == sum(
            p.numel() for p in parameters.values() if p.requires_grad
        )

    def test_plateau(self):
        assert released_code.plateau_rates([1.0] * 6, 0.1, 0.5, 3) == [0.1] * 4 + [0.05] * 2
        assert released_code.plateau_rates(reported.LOSSES["C-Fig3"], 0.005, 0.1, 3) == [0.005] * 10

    def test_normalised_values(self):
        image = np.zeros((3, 2, 2), np.uint8)
        image[:, 0] = 255
        dataset = [CellImage("a", None, image, np.zeros((4, 2, 2), np.int32))]
        table = released_code.normalised_values(
            dataset, ["imagenet", "imagenet_of_0_255", "imagenet_twice", "data"]
        )
        assert table.loc[("data", "R")].tolist() == pytest.approx([0, 1, -1, 1])
        assert table.loc[("imagenet", "R")].tolist() == pytest.approx(
            [(0.5 - 0.485) / 0.229, 0.5 / 0.229, -0.485 / 0.229, 0.515 / 0.229]
        )
        assert table.loc[("imagenet_of_0_255", "G"), "greatest"] == pytest.approx(
            (255 - 0.456) / 0.224
        )
        once = (1 - 0.406) / 0.225
        assert table.loc[("imagenet_twice", "B"), "greatest"] == pytest.approx(
            (once - 0.406) / 0.225
        )

    def test_only_a_frozen_norm_lets_the_range_through(self):
        table = released_code.range_behind_a_norm(
            np.random.default_rng(0).integers(0, 256, (3, 40, 40), dtype=np.uint8)
        )
        ratio = table["0 to 255"] / table["0 to 1"]
        assert ratio.tolist() == pytest.approx([255, 1, 255], rel=1e-3)

    def test_norms_learn_only_in_training_mode(self):
        table = released_code.norms_after_validation(open_dataset("drawn"))
        assert table["norms"].tolist() == [20, 20]
        assert table["changed"].tolist() == [0, 20]


class TestAnchorsAndProposals:
    def test_sizes_set_on_a_built_generator_change_no_anchor(self):
        table = released_code.reassign_sizes((32, 64), (8, 16))
        assert table["sizes after"].tolist() == [8, 16]
        assert table["anchor_px before"].tolist() == table["anchor_px after"].tolist() == [32, 64]

    def test_names_set_on_a_built_rpn_change_nothing(self):
        table = released_code.proposals_after_setting()
        assert table["before"].tolist() == table["after"].tolist() == [2000, 2000, 1000, 1000]
        assert table["set"].tolist() == [2000, 1000, 1000, 500]

    def test_anchor_fit(self):
        cells = pd.DataFrame(
            {
                "width_px": [32, 10],
                "height_px": [32, 10],
                "image_height_px": [400, 400],
                "image_width_px": [500, 500],
            }
        )
        scales = {
            "own": released_code.input_scale(cells, 0),
            "enlarged": released_code.input_scale(cells),
        }
        assert scales["enlarged"].tolist() == [2, 2]
        table = released_code.anchor_fit(cells, {"one": [32]}, scales)
        assert table.loc[("own", "one")].tolist() == [0.5, 0.5]  # 10 px: IoU 100 / 1024
        assert table.loc[("enlarged", "one")].tolist() == [
            0,
            0,
        ]  # 64 px: IoU 1024 / 4096; 20 px: 400 / 1024

    def test_input_scale_by_the_longer_side(self):
        cells = pd.DataFrame({"image_height_px": [500], "image_width_px": [1333]})
        assert released_code.input_scale(cells).tolist() == [1]


class TestCells:
    def test_ids_lost_and_shared(self):
        row = released_code.components_of_cells(
            [cell_image(ids_in_squares(1, 256, 257, 512, 3))]
        ).iloc[0]
        assert row[["cells", "highest_id", "lost", "same_value"]].tolist() == [5, 512, 2, 2]
        assert row[["components", "joined", "split"]].tolist() == [3, 0, 0]

    def test_touching_cells_and_cells_in_pieces(self):
        label_map = ids_in_squares(1, 2, 3)
        label_map[2:6, 6:8] = 2  # 2 now touches 1
        label_map[0, -1] = 3  # a second piece of 3
        row = released_code.components_of_cells([cell_image(label_map)]).iloc[0]
        assert row[["cells", "components", "joined", "split"]].tolist() == [3, 3, 2, 1]

    def test_diagonal_contact_joins(self):
        row = released_code.components_of_cells(
            [cell_image(np.array([[1, 0], [0, 2]], np.int32))]
        ).iloc[0]
        assert row[["components", "joined"]].tolist() == [1, 2]

    def test_no_cell(self):
        row = released_code.components_of_cells([cell_image(np.zeros((4, 4), np.int32))]).iloc[0]
        assert row.drop("image_id").tolist() == [0] * 7

    def test_official_sample(self, sample_data, tmp_path):
        place = tmp_path / "train" / "official"
        place.mkdir(parents=True)
        for path in (sample_data / "hw3_sample").glob("*.tif"):
            shutil.copy(path, place)
        row = released_code.components_of_cells(
            open_dataset(tmp_path, cache_dir=tmp_path / "cache")
        ).iloc[0]
        assert row[["cells", "highest_id", "lost", "components"]].tolist() == [
            161,
            161,
            0,
            145,
        ]  # 2 of them of class 1

    def test_missing_strip(self):
        cells = released_code.cell_table(
            [cell_image(ids_in_squares(1, 2)), cell_image(np.eye(1, 6, 2, dtype=np.int32))]
        )
        assert cells["image"].tolist() == [0, 0, 1]
        table = released_code.missing_strip(cells)
        assert table.loc["epithelial", ["cells", "vanished"]].tolist() == [3, 1]
        assert table.loc["all", "missing"] == pytest.approx((2 * 7 / 16 + 1) / 3)
        assert table.loc["all", "IoU"] == pytest.approx(2 * 9 / 16 / 3)
        assert table.loc["macrophage", "cells"] == 0

    def test_small_cells(self):
        label_map = np.zeros((20, 40), np.int32)
        label_map[1:7, 1:8] = 1  # last minus first pixel 5
        label_map[1:8, 11:18] = 2  # 6
        lonely = np.zeros((20, 40), np.int32)
        lonely[1:3, 1:30] = 1
        table = released_code.small_cells(
            released_code.cell_table([cell_image(label_map), cell_image(lonely)])
        )
        assert table.loc["all"].tolist() == [3, 2, pytest.approx(2 / 3), 2, 1]

    def test_edges_that_boxes_reach(self):
        table = released_code.unreachable_edges([(400, 400), (1000, 1000), (201, 243)])
        assert table["right"].tolist() == [True, True, False]
        assert table["bottom"].all()

    def test_edges_at_the_official_test_sizes(self, sample_data):
        listed = json.loads(
            (sample_data / "hw3_sample" / "test_image_name_to_ids.json").read_text()
        )
        table = released_code.unreachable_edges(
            [(image["height"], image["width"]) for image in listed]
        )
        assert (len(table), int((~(table["right"] & table["bottom"])).sum())) == (101, 9)

    def test_coco_format_keeps_cells(self):
        assert released_code.changed_by_coco(
            [cell_image(ids_in_squares(1, 7)), cell_image(ids_in_squares(3))]
        ) == (3, 0)

    def test_image_sizes_of_drawn_data(self):
        dataset = open_dataset("drawn")
        sizes, sentence = released_code.image_sizes(dataset, "drawn")
        assert set(map(tuple, dataset.sizes.tolist())) <= set(sizes)
        assert "8 of test images" in sentence


class TestImages:
    def test_one_object_leaves_the_training_without_augmentation(self):
        images = [
            np.random.default_rng(i).integers(0, 256, (3, 4, 6), dtype=np.uint8) for i in range(10)
        ]
        table = released_code.augmented_images(images)
        assert table.loc["one object"].tolist() == [8, 0, 2, 0]
        assert table.loc["two objects"].tolist() == [8, 8, 2, 0]

    def test_shared_patients(self):
        unknown, why = released_code.shared_patients(["a", None], 0.5)
        assert unknown is None and "unknown" in why
        seen, sentence = released_code.shared_patients(["a", "b", "c", "d"], 0.25)
        assert seen == 0 and "0.0 of 4 patients" in sentence
        seen, sentence = released_code.shared_patients(["a"] * 5 + ["b"] * 5, 0.2)
        both = float(sentence.split("images, ")[1].split(" of 2 patients")[0])
        assert seen == 1 and 1 < both < 2


def boxes_at(*rows):
    """Detections in images of 100 x 100 px: rows of (image_id, class_id, score, x, side) with
    square boxes at y 20.
    """
    image_ids, labels, scores, x, side = np.array(rows, float).T
    return Cells(
        image_ids=image_ids.astype(int),
        sizes=np.full((len(rows), 2), 100),
        labels=labels.astype(int),
        scores=scores,
        boxes=np.column_stack([x, np.full(len(rows), 20), x + side, 20 + side]),
        masks=[BoxMask(np.ones((1, 1), bool), 0, 0)] * len(rows),
    )


class TestDetections:
    def test_box_nms_within_image_and_class(self):
        found = boxes_at(
            (1, 1, 0.5, 0, 10),
            (1, 1, 0.9, 2, 10),  # IoU 2/3 with the first
            (1, 2, 0.5, 0, 10),
            (2, 1, 0.5, 0, 10),
            (1, 1, 0.4, 40, 10),
        )
        assert released_code.box_nms(found, 0.5).boxes.tolist() == found.boxes[1:].tolist()
        assert len(released_code.box_nms(found, 0.7)) == len(found)
        assert len(released_code.box_nms(Cells.empty(), 0.5)) == 0

    def test_defaults(self):
        model = released_code.default_model()
        assert (model.rpn.nms_thresh, model.roi_heads.nms_thresh) == (0.7, 0.5)

    def test_size_factors(self):
        found = boxes_at(*((1, 1, 0.95, 0, side) for side in (5, 9, 15, 50)))
        assert released_code.size_factors(found).to_dict() == {1.15: 0.5, 1.10: 0.25, 1.0: 0.25}

    def test_near_edge(self):
        found = boxes_at(*((1, 1, 0.9, x, 10) for x in (0, 0.005, 1)))
        assert borders.drop_border_detections(found, 0.01).boxes[:, 0].tolist() == [1]


@pytest.fixture
def measures(runs_dir):
    """``measures()`` opens the runs that were written so far."""
    return lambda: findings.Measures(study_runs.Study(runs_dir.path, STUDY))


def compare_runs(measures, key):
    found = measures()
    found.compare_runs(key)
    (row,) = found.rows
    return row


class TestPairs:
    def test_effect_of_the_released_code(self, runs_dir, truth, measures):
        runs_dir.write("e/full", found_in(truth))
        runs_dir.write("e/base", found_in(truth, lose=(1, 2, 3, 4, 5, 6)))
        row = compare_runs(measures, "e-anchors")
        assert row["effect"] < -0.7 and row["high"] < 0 and row["verdict"] == findings.LOWER
        assert (row["base"], row["as_reported"], row["as_released"]) == (
            "e/full",
            "e/full",
            "e/base",
        )
        context = {"data": "drawn", "split": "patient, validation side", "maxDets": 100}
        context |= {"scale": "quick", "weights": "none", "seeds": 1}
        assert {name: row[name] for name in context} == context
        assert "as reported, e/full" in row["sentence"]
        assert row["summary"] == (
            "With anchors of 32 to 512 px instead of 8 to 128 px, AP50 goes from 1.000 to 0.257: "
            "**lower as released**."
        )

    def test_same_detections(self, runs_dir, truth, measures):
        for key in ("e/full", "e/base"):
            runs_dir.write(key, found_in(truth))
        row = compare_runs(measures, "e-anchors")
        assert (row["effect"], row["verdict"]) == (0, findings.NO_CHANGE)

    def test_missing_run(self, runs_dir, truth, measures):
        runs_dir.write("e/full", found_in(truth))
        row = compare_runs(measures, "e-anchors")
        assert math.isnan(row["effect"]) and row["verdict"] == verdicts.NOT_ASKED
        assert row["empty_because"] == "no run quick-drawn-e-base-seed0"

    def test_scale_that_sets_both_alike(self, runs_dir, truth, measures):
        for key in ("c/final", "c/final+coco_weights"):
            runs_dir.write(key, found_in(truth))
        assert compare_runs(measures, "c-weights")["empty_because"] == (
            "the quick scale gives both runs weights 'none': it cannot test this pair"
        )

    def test_scale_that_leaves_some_of_the_differences_says_so(self, runs_dir, truth, measures):
        for key in ("b/v2_backbone", "b/v2_backbone+all_images"):
            folder = runs_dir.write(key, found_in(truth))
        split = json.loads((folder / "split.json").read_text())
        (folder / "split.json").write_text(json.dumps(split | {"kind": "all"}))
        row = compare_runs(measures, "b-training-images")
        # the two are of other splits, but that is what the pair is about
        assert row["verdict"] == findings.NO_CHANGE
        told = "(the quick scale leaves no difference in epochs), the score does not change visibly"
        assert f"{told}: holds here" in row["sentence"]

    def test_scale_that_leaves_no_difference_trains_no_pair(self, runs_dir, truth, measures):
        every = set(study_runs.run_keys())
        left_out = {key for key in every if not study_runs.differs_from_base(key, "quick")}
        assert left_out == {"c/final+coco_weights", "c/final+batch2_10_epochs"}
        assert set(study_runs.run_keys("quick")) == every - left_out
        assert set(study_runs.run_keys("full")) == set(study_runs.run_keys("sample")) == every
        runs_dir.write("c/final", found_in(truth))
        assert compare_runs(measures, "c-weights")["empty_because"] == (
            "c/final+coco_weights is not trained at the quick scale, which gives it all the "
            "settings of c/final"
        )

    def test_runs_that_differ_in_more(self, runs_dir, truth, measures):
        runs_dir.write("e/full", found_in(truth))
        runs_dir.write("e/base", found_in(truth), epochs=9)
        row = compare_runs(measures, "e-anchors")
        assert row["empty_because"] == "the two runs also differ in epochs"

    def test_other_validation_images(self, runs_dir, truth, measures):
        runs_dir.write("e/full", found_in(truth))
        folder = runs_dir.write("e/base", found_in(truth))
        other = json.loads(json.dumps(truth))
        other["images"][0]["file_name"] = "another"
        (folder / "truth.json").write_text(json.dumps(other))
        resampling.save_scores(resampling.score_run(other, found_in(truth)), folder / "scores.json")
        row = compare_runs(measures, "e-anchors")
        assert "the two runs are of other validation images" in row["empty_because"]


class TestOfDetections:
    def test_two_ways_to_treat_detections(self, runs_dir, truth, measures):
        right = found_in(truth, lose=(1, 2, 3, 4))
        low = found_in(truth, lose=(5, 6, 7, 8), score=0.3)
        runs_dir.write("c/final", Cells.concatenate([right, low]))
        ways = {name: reported.VARIANTS[name] for name in ("all detections", "score ≥ 0.5")}
        found = measures()
        found.compare_detections("c-half", "c/final", ways)
        found.compare_detections("c-half", "c/final", ways, metric="F1")
        found.compare_detections("c-half", "c/flip_colour_rotation", ways)
        ap50, f1, missing = found.rows
        assert ap50["verdict"] == findings.LOWER
        assert ap50["effect"] == pytest.approx(-0.495, abs=0.01)
        assert f1["effect"] == pytest.approx(2 / 3 - 1)
        assert missing["empty_because"] == "no run quick-drawn-c-flip_colour_rotation-seed0"

    def test_thresholds_on_the_other_half(self, runs_dir, truth, measures):
        noise = Cells.from_coco([result(i, 1, 0.3, disc(90, 70, 6)) for i in range(1, 9)])
        runs_dir.write("e/full", Cells.concatenate([found_in(truth), noise]))
        found = measures()
        found.compare_thresholds("e-thresholds", "e/full")
        (row,) = found.rows
        assert row["measure"] == "F1" and row["effect"] == pytest.approx(2 * 8 / (2 * 8 + 4) - 1)
        assert "4 images to choose on and 4 images to judge on" in row["sentence"]

    def test_limit_of_detections(self, runs_dir, truth):
        runs_dir.write("b/v2_backbone", found_in(truth), detections_per_image=2)
        study = study_runs.Study(runs_dir.path, STUDY)
        full, sentence = released_code.images_at_limit(study, "b/v2_backbone")
        assert full == 8 and "8 of 8 images" in sentence and "0.900" in sentence
        missing = None, "no run quick-drawn-e-full-seed0"
        assert released_code.images_at_limit(study, "e/full") == missing
        assert released_code.raised_scores(study, "e/full") == missing

    def test_raised_scores(self, runs_dir, truth):
        runs_dir.write("e/full", found_in(truth))
        study = study_runs.Study(runs_dir.path, STUDY)
        raised, sentence = released_code.raised_scores(study, "e/full")
        assert raised == 1 and "100% get a factor of 1.1," in sentence  # 22 x 22 of 90 x 110 px


class TestTrainingImages:
    @pytest.fixture
    def trained(self, runs_dir):
        """A run whose validation images are the first two of the drawn tissue, its training images
        the next four.
        """
        dataset = open_dataset("drawn")
        folder = runs_dir.write("b/v2_backbone", Cells.empty())
        truth = findings.to_coco([dataset[0], dataset[1]])
        sides = {"train": dataset.image_ids[2:6], "validation": dataset.image_ids[:2]}
        split = {"kind": "random", **sides, "warning": ""}
        (folder / "truth.json").write_text(json.dumps(truth))
        (folder / "split.json").write_text(json.dumps(split))
        scores = resampling.score_run(truth, Cells.empty())
        resampling.save_scores(scores, folder / "scores.json")
        return study_runs.Study(runs_dir.path, STUDY).first("b/v2_backbone"), dataset

    def test_needs_weights_once(self, trained, monkeypatch):
        run, dataset = trained
        with pytest.raises(RunError, match="^quick-drawn-b-v2_backbone-seed0 has no weights"):
            findings.training_detections(run, dataset)
        asked = []

        def predict(run_dir, images):
            asked.append(images)
            return Cells.empty()

        monkeypatch.setattr(findings, "predict_run", predict)
        truth, detections = findings.training_detections(run, dataset)
        names = [image["file_name"] for image in truth["images"]]
        assert names == [dataset.image_ids[2], dataset.image_ids[5]]
        assert len(detections) == 0 and np.array_equal(asked[0][1], dataset[5].image)
        monkeypatch.undo()
        assert findings.training_detections(run, dataset)[0] == truth

    def test_other_data(self, trained):
        run, dataset = trained
        other = SimpleNamespace(image_ids=["x"])
        with pytest.raises(RunError, match="trained on other images"):
            findings.training_detections(run, other)

    def test_difference_from_unseen_images(self, runs_dir, truth, measures, monkeypatch):
        runs_dir.write("b/v2_backbone", found_in(truth, lose=(1, 2, 3, 4, 5, 6)))
        seen = truth, found_in(truth)
        monkeypatch.setattr(findings, "training_detections", lambda trained, dataset: seen)
        found = measures()
        found.compare_with_training_images("b-training-images", "b/v2_backbone")
        (row,) = found.rows
        assert row["verdict"] == findings.HIGHER and row["low"] > 0
        assert row["split"] == "patient, training minus validation side"
        assert "AP50 1.000 on 8 training images" in row["sentence"]


class TestTable:
    def test_needs_every_finding(self, measures):
        with pytest.raises(ValueError, match="no measure of b-heads, b-cells"):
            measures().table()

    def test_rows_in_the_order_of_the_registry(self, runs_dir, truth, measures):
        runs_dir.write("e/full", found_in(truth))
        runs_dir.write("e/base", found_in(truth))
        found = measures()
        found.compare_runs("e-anchors")
        for key in reversed(FINDINGS):
            found.count(key, "AP50", None, "x", on="detections", run="c/final")
        table = found.table()
        assert table["finding"].drop_duplicates().tolist() == list(FINDINGS)
        row = table[table["measured_on"] == "training pair"].iloc[0]
        names = ["finding", "base", "as_reported", "as_released", "scale", "maxDets"]
        assert row[names].tolist() == ["e-anchors", "e/full", "e/full", "e/base", "quick", 100]
        empty = table[table["finding"] == "c-half"].iloc[0]
        assert math.isnan(empty["effect"]) and math.isnan(empty["low"])
        assert (empty["empty_because"], empty["as_reported"], empty["seeds"]) == ("x", "", "")

    def test_count(self, runs_dir, truth, measures):
        runs_dir.write("e/full", found_in(truth))
        found = measures()
        found.count("b-cells", "cells", 3, "Three.")
        found.count("b-cells", "cells", 0, "None.")
        found.count("b-cells", "levels", 0, "None.", shown=True, on="model")
        found.count("b-cells", "images", 2, "Two.", on="detections", run="e/full")
        verdict = [row["verdict"] for row in found.rows]
        assert verdict == [findings.SHOWN, findings.NOT_SHOWN, findings.SHOWN, findings.SHOWN]
        assert [row["split"] for row in found.rows[:3]] == ["all annotated images"] * 2 + [""]
        assert found.rows[3]["scale"] == "quick"

    def test_show(self, runs_dir, truth, measures, monkeypatch):
        for key in ("e/full", "e/base"):
            runs_dir.write(key, found_in(truth))
        found, shown = measures(), []
        monkeypatch.setattr(findings, "display", lambda piece: shown.append(piece.data))
        found.count("e-anchors", "levels", 3, "Three.")
        found.compare_runs("e-anchors")
        found.compare_runs("c-weights")
        found.show("e-anchors")
        text = re.sub(r"<style.*?</style>|<[^>]+>", " ", shown[1], flags=re.DOTALL)
        assert text.split("verdict")[1].split("AP50")[0].split() == [
            "levels",
            "3",
            "confirmed",
            "here",
        ]
        assert "+0.000 [+0.000, +0.000] no visible change" in " ".join(text.split())
        assert shown[0].startswith("Text: ") and "Code: sets" in shown[0]
        assert "- Three.\n- With anchors" in shown[2] and "initial weights" not in shown[2]

    def test_data_of_no_run(self, tmp_path):
        found = findings.Measures(study_runs.Study(tmp_path, STUDY))
        assert (found.dataset.name, found.data) == ("drawn", "drawn")
        start = "There is no finished run of quick-drawn. Data: 'drawn'"
        assert found.sentence.startswith(start)

    def test_data_that_are_gone(self, runs_dir, truth, measures):
        runs_dir.write("e/full", found_in(truth), data="gone")
        found = measures()
        assert (found.dataset.name, found.data) == ("drawn", "drawn")
        assert found.sentence.startswith("The data of the runs cannot be opened")


def test_figures():
    cells = released_code.cell_table([cell_image(ids_in_squares(1, 2))])
    scales = {
        "own": released_code.input_scale(cells, 0),
        "enlarged": released_code.input_scale(cells),
    }
    sizes = {title: cells["width_px"] * scale for title, scale in scales.items()}
    fig = plots.sizes_against_anchors(sizes, {"text": [8, 16], "model": [32, 64]}, columns=1)
    assert len(fig.axes) == 2 and len(fig.axes[0].lines) == 4
    values = released_code.normalised_values(
        [cell_image(ids_in_squares(1))], ["imagenet", "imagenet_twice"]
    )
    (ax,) = figures.value_ranges(values).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["imagenet", "imagenet_twice"]
