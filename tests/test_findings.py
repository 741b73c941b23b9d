import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scenes import disc, result, truth_of

from cellseg_helpers import plots, resampling
from cellseg_helpers.config import ROOT
from cellseg_helpers.data.cache import CellImage
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.model.build import build_model
from cellseg_helpers.runs import RunError
from study import findings, released_code, reports, verdicts
from study import runs as study_runs

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
    return [
        result(cell["image_id"], cell["category_id"], score, cell["segmentation"])
        for cell in truth["annotations"]
        if cell["image_id"] not in lose
    ]


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
            "detections": detections,
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
        assert len(findings.FINDINGS) == len(findings.BY_KEY) == 21
        assert [finding.report for finding in findings.FINDINGS] == ["B"] * 6 + ["C"] * 4 + [
            "B, C, E"
        ] + ["E"] * 10

    def test_names_runs_of_the_study_that_differ(self):
        for finding in findings.FINDINGS:
            assert (finding.as_reported is None) == (finding.as_released is None)
            if finding.as_reported:
                one, two = (
                    study_runs.settings(key, "full", "drawn", 0)
                    for key in (finding.as_reported, finding.as_released)
                )
                assert one.differences(two.to_dict())

    def test_uses_every_variant_of_the_findings(self):
        used = {
            run
            for finding in findings.FINDINGS
            for run in (finding.as_reported, finding.as_released)
        }
        assert {key for key in study_runs.run_keys() if "+" in key} <= used

    def test_heading(self):
        text = findings.heading("e-anchors")
        assert text.startswith("## Report E: anchors\n") and "`e/base` as released" in text
        assert "Runs" not in findings.heading("c-half")


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

            name = {
                "imagenet": "resnet50",
                "coco": "maskrcnn_resnet50_fpn" + "_v2" * ("v2" in config.backbone),
            }[kind]
            options = {"weights_backbone": None} if kind == "coco" else {}
            with torch.device("meta"):
                return torchvision.models.get_model(name, weights=None, **options).state_dict()

        monkeypatch.setattr("cellseg_helpers.model.build.published_weights", published)
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
        assert released_code.plateau_rates(reports.LOSSES["C-Fig3"], 0.005, 0.1, 3) == [0.005] * 10

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
        table = released_code.norms_after_validation(open_dataset("drawn"), images=2)
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
    def test_uint8(self):
        assert released_code.as_uint8([1, 255, 256, 257, 512]).tolist() == [1, 255, 0, 1, 0]

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
        assert released_code.shared_patients(["a", None], 0.5) is None
        apart = released_code.shared_patients(["a", "b", "c", "d"], 0.25)
        assert apart == {"patients": 4, "both_sides": 0, "seen_share": 0}
        together = released_code.shared_patients(["a"] * 5 + ["b"] * 5, 0.2)
        assert (together["patients"], together["seen_share"]) == (2, 1)
        assert 1 < together["both_sides"] < 2


class TestDetections:
    def test_box_nms_within_image_and_class(self):
        def box(image_id, class_id, score, x):
            return {
                "image_id": image_id,
                "category_id": class_id,
                "score": score,
                "bbox": [x, 0, 10, 10],
            }

        found = [
            box(1, 1, 0.5, 0),
            box(1, 1, 0.9, 2),
            box(1, 2, 0.5, 0),
            box(2, 1, 0.5, 0),
            box(1, 1, 0.4, 40),
        ]  # IoU 2/3
        assert released_code.box_nms(found, 0.5) == found[1:]
        assert released_code.box_nms(found, 0.7) == found
        assert released_code.box_nms([], 0.5) == []

    def test_defaults(self):
        assert released_code.default_nms_thresholds() == {
            "rpn_nms_thresh": 0.7,
            "box_nms_thresh": 0.5,
        }

    def test_size_factors(self):
        found = [
            {"bbox": [0, 0, side, side], "segmentation": {"size": [100, 100]}}
            for side in (5, 9, 15, 50)
        ]
        assert released_code.size_factors(found).to_dict() == {1.15: 0.5, 1.10: 0.25, 1.0: 0.25}

    def test_images_at_limit(self):
        assert released_code.images_at_limit([{"image_id": i} for i in (1, 1, 2)], 2) == 1

    def test_near_edge(self, truth):
        found = found_in(truth)[:3]
        for detection, x in zip(found, (0, 0.005, 1), strict=True):
            detection["bbox"] = [x, 20, 10, 10]
        assert released_code.drop_near_edge(found, truth["images"]) == found[2:]


class TestPairs:
    def test_effect_of_the_released_code(self, runs_dir, truth):
        runs_dir.write("e/full", found_in(truth))
        runs_dir.write("e/base", found_in(truth, lose=(1, 2, 3, 4, 5, 6)))
        found = findings.compare_runs(reports.Study(runs_dir.path, STUDY), "e-anchors")
        assert found.effect < -0.7 and found.high < 0 and found.verdict == findings.LOWER
        assert (found.base, found.other, found.seeds) == ("e/full", "e/base", 1)
        assert found.context == {
            "data": "drawn",
            "split": "patient, validation side",
            "maxDets": 100,
            "scale": "quick",
            "weights": "none",
        }
        assert "as reported, e/full" in found.sentence

    def test_same_detections(self, runs_dir, truth):
        for key in ("e/full", "e/base"):
            runs_dir.write(key, found_in(truth))
        found = findings.compare_runs(reports.Study(runs_dir.path, STUDY), "e-anchors")
        assert (found.effect, found.verdict) == (0, findings.NO_CHANGE)

    def test_missing_run(self, runs_dir, truth):
        runs_dir.write("e/full", found_in(truth))
        found = findings.compare_runs(reports.Study(runs_dir.path, STUDY), "e-anchors")
        assert math.isnan(found.effect) and found.verdict == verdicts.NOT_ASKED
        assert found.empty_because == "no run quick-drawn-e-base-seed0"

    def test_scale_that_sets_both_alike(self, runs_dir, truth):
        for key in ("c/final", "c/final+coco_weights"):
            runs_dir.write(key, found_in(truth))
        found = findings.compare_runs(reports.Study(runs_dir.path, STUDY), "c-weights")
        assert (
            found.empty_because
            == "the quick scale gives both runs weights 'none': it cannot test this pair"
        )

    def test_scale_that_leaves_some_of_the_differences_says_so(self, runs_dir, truth):
        for key in ("b/v2_backbone", "b/v2_backbone+all_images"):
            folder = runs_dir.write(key, found_in(truth))
        split = json.loads((folder / "split.json").read_text())
        (folder / "split.json").write_text(json.dumps(split | {"kind": "all"}))
        found = findings.compare_runs(reports.Study(runs_dir.path, STUDY), "b-training-images")
        assert (
            found.verdict == findings.NO_CHANGE
        )  # though of another split: the pair is meant to be
        assert (
            "make no visible difference (the quick scale leaves no difference in epochs): holds here"
            in found.sentence
        )

    def test_scale_that_leaves_no_difference_trains_no_pair(self, runs_dir, truth):
        left_out = {
            key for key in study_runs.run_keys() if not study_runs.differs_from_base(key, "quick")
        }
        assert (
            left_out
            == {"c/final+coco_weights", "c/final+batch2_10_epochs"}
            == set(study_runs.run_keys()) - set(study_runs.run_keys("quick"))
        )
        assert (
            set(study_runs.run_keys("full"))
            == set(study_runs.run_keys("sample"))
            == set(study_runs.run_keys())
        )
        runs_dir.write("c/final", found_in(truth))
        found = findings.compare_runs(reports.Study(runs_dir.path, STUDY), "c-weights")
        assert found.empty_because == (
            "c/final+coco_weights is not trained at the quick scale, which gives it all the settings of c/final"
        )

    def test_runs_that_differ_in_more(self, runs_dir, truth):
        runs_dir.write("e/full", found_in(truth))
        runs_dir.write("e/base", found_in(truth), epochs=9)
        found = findings.compare_runs(reports.Study(runs_dir.path, STUDY), "e-anchors")
        assert found.empty_because == "the two runs also differ in epochs"

    def test_other_validation_images(self, runs_dir, truth):
        runs_dir.write("e/full", found_in(truth))
        folder = runs_dir.write("e/base", found_in(truth))
        other = json.loads(json.dumps(truth))
        other["images"][0]["file_name"] = "another"
        (folder / "truth.json").write_text(json.dumps(other))
        resampling.save_scores(resampling.score_run(other, found_in(truth)), folder / "scores.json")
        found = findings.compare_runs(reports.Study(runs_dir.path, STUDY), "e-anchors")
        assert "the two runs are of other validation images" in found.empty_because

    def test_two_ways_to_treat_detections(self, runs_dir, truth):
        runs_dir.write(
            "c/final",
            found_in(truth, lose=(1, 2, 3, 4)) + found_in(truth, lose=(5, 6, 7, 8), score=0.3),
        )
        ways = (
            ("all", reports.VARIANTS["all detections"]),
            ("score ≥ 0.5", reports.VARIANTS["score ≥ 0.5"]),
        )
        study = reports.Study(runs_dir.path, STUDY)
        found = findings.compare_detections(study, "c-half", "c/final", "Nothing changes", *ways)
        assert found.verdict == findings.LOWER and found.effect == pytest.approx(-0.495, abs=0.01)
        f1 = findings.compare_detections(
            study, "c-half", "c/final", "Nothing changes", *ways, metric="F1"
        )
        assert f1.effect == pytest.approx(2 / 3 - 1)
        missing = findings.compare_detections(
            study, "c-half", "c/flip_colour_rotation", "Nothing changes", *ways
        )
        assert missing.empty_because == "no run quick-drawn-c-flip_colour_rotation-seed0"

    def test_thresholds_on_the_other_half(self, runs_dir, truth):
        noise = [result(i, 1, 0.3, disc(90, 70, 6)) for i in range(1, 9)]
        runs_dir.write("e/full", found_in(truth) + noise)
        found = findings.compare_thresholds(
            reports.Study(runs_dir.path, STUDY), "e-thresholds", "e/full"
        )
        assert found.measure == "F1" and found.effect == pytest.approx(2 * 8 / (2 * 8 + 4) - 1)
        assert "4 images to choose on and 4 images to judge on" in found.sentence

    def test_limit_of_detections(self, runs_dir, truth):
        runs_dir.write("b/v2_backbone", found_in(truth), detections_per_image=2)
        found = findings.measure_limit(
            reports.Study(runs_dir.path, STUDY), "b-threshold", "b/v2_backbone"
        )
        assert found.effect == 8 and "8 of 8 images" in found.sentence and "0.900" in found.sentence

    def test_raised_scores(self, runs_dir, truth):
        runs_dir.write("e/full", found_in(truth))
        found = findings.measure_size_factors(
            reports.Study(runs_dir.path, STUDY), "e-scores", "e/full"
        )
        assert (
            found.effect == 1 and "100% get a factor of 1.1," in found.sentence
        )  # 22 x 22 of 90 x 110 px


class TestTrainingImages:
    @pytest.fixture
    def trained(self, runs_dir):
        """A run whose validation images are the first two of the drawn tissue, its training images
        the next four.
        """
        dataset = open_dataset("drawn")
        folder = runs_dir.write("b/v2_backbone", [])
        truth = findings.to_coco([dataset[0], dataset[1]])
        split = {
            "kind": "random",
            "train": dataset.image_ids[2:6],
            "validation": dataset.image_ids[:2],
            "warning": "",
        }
        (folder / "truth.json").write_text(json.dumps(truth))
        (folder / "split.json").write_text(json.dumps(split))
        resampling.save_scores(resampling.score_run(truth, []), folder / "scores.json")
        return reports.Study(runs_dir.path, STUDY).first("b/v2_backbone"), dataset

    def test_needs_weights_once(self, trained, monkeypatch):
        run, dataset = trained
        with pytest.raises(RunError, match="^quick-drawn-b-v2_backbone-seed0 has no weights"):
            findings.training_detections(run, dataset)
        asked = []
        monkeypatch.setattr(
            findings, "predict_run", lambda run_dir, images: asked.append(images) or []
        )
        truth, detections = findings.training_detections(run, dataset)
        assert [image["file_name"] for image in truth["images"]] == [
            dataset.image_ids[2],
            dataset.image_ids[5],
        ]
        assert detections == [] and np.array_equal(asked[0][1], dataset[5].image)
        monkeypatch.undo()
        assert findings.training_detections(run, dataset) == (truth, [])

    def test_other_data(self, trained):
        run, dataset = trained
        other = SimpleNamespace(image_ids=["x"])
        with pytest.raises(RunError, match="trained on other images"):
            findings.training_detections(run, other)

    def test_difference_from_unseen_images(self, runs_dir, truth, monkeypatch):
        runs_dir.write("b/v2_backbone", found_in(truth, lose=(1, 2, 3, 4, 5, 6)))
        monkeypatch.setattr(
            findings, "training_detections", lambda trained, dataset: (truth, found_in(truth))
        )
        study = reports.Study(runs_dir.path, STUDY)
        found = findings.compare_with_training_images(
            study, "b-training-images", "b/v2_backbone", None
        )
        assert found.verdict == findings.HIGHER and found.low > 0
        assert found.context["split"] == "patient, training minus validation side"
        assert "AP50 1.000 on 8 training images" in found.sentence


class TestTable:
    def test_needs_every_finding(self):
        with pytest.raises(ValueError, match="no measurement of b-heads, b-cells"):
            findings.findings_table([])

    def test_rows_in_the_order_of_the_registry(self, runs_dir, truth):
        runs_dir.write("e/full", found_in(truth))
        runs_dir.write("e/base", found_in(truth))
        pair = findings.compare_runs(reports.Study(runs_dir.path, STUDY), "e-anchors")
        others = [
            findings.missing(finding.key, "AP50", "detections", "x", "c/final")
            for finding in reversed(findings.FINDINGS)
        ]
        table = findings.findings_table([pair, *others])
        assert table["finding"].drop_duplicates().tolist() == list(findings.BY_KEY)
        row = table[
            (table["finding"] == "e-anchors") & (table["measured_on"] == "training pair")
        ].iloc[0]
        assert row[["base", "as_reported", "as_released", "scale", "maxDets"]].tolist() == [
            "e/full",
            "e/full",
            "e/base",
            "quick",
            100,
        ]
        empty = table[table["finding"] == "c-half"].iloc[0]
        assert (
            math.isnan(empty["effect"])
            and empty["empty_because"] == "x"
            and empty["as_reported"] == ""
        )

    def test_outcome(self):
        shown = findings.measured("b-cells", "cells", 3, True, "Three.")
        gone = findings.missing("b-cells", "AP50", "detections", "no run x")
        assert findings.outcome([shown, gone]) == "cells 3 (confirmed here); AP50 (cannot be asked)"
        assert findings.sentences([shown, gone]).splitlines()[0] == "Three."

    def test_data_of_no_run(self, tmp_path):
        dataset, data, sentence = findings.data_of(reports.Study(tmp_path, STUDY))
        assert (dataset.name, data) == ("drawn", "drawn") and sentence.startswith(
            "There is no finished run of quick-drawn. Data: 'drawn'"
        )

    def test_data_that_are_gone(self, runs_dir, truth):
        runs_dir.write("e/full", found_in(truth), data="gone")
        dataset, data, sentence = findings.data_of(reports.Study(runs_dir.path, STUDY))
        assert (dataset.name, data) == ("drawn", "drawn") and sentence.startswith(
            "The data of the runs cannot be opened"
        )


def test_figures():
    cells = released_code.cell_table([cell_image(ids_in_squares(1, 2))])
    scales = {
        "own": released_code.input_scale(cells, 0),
        "enlarged": released_code.input_scale(cells),
    }
    fig = plots.anchors_against_cells(cells, scales, [8, 16], [32, 64])
    assert len(fig.axes) == 2 and len(fig.axes[0].lines) == 4
    values = released_code.normalised_values(
        [cell_image(ids_in_squares(1))], ["imagenet", "imagenet_twice"]
    )
    (ax,) = plots.value_ranges(values).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["imagenet", "imagenet_twice"]
