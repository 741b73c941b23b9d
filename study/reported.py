"""What the five reports say, as data: their tables' rows, numbers and conclusions, and how their
scores came about. No torch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from cellseg_helpers import borders, postprocess
from cellseg_helpers.data.labels import CLASS_NAMES

Detections = list[dict[str, Any]]


class Row(NamedTuple):
    """One row of a score table.

    Attributes:
        label: as the report names it.
        reported: its number, or its words, or None where it gives none.
        run: key of the run that reproduces it.
        variant: what is done to the run's detections before they are scored, a name in
            ``VARIANTS``.
        measure: ``AP50``, or a number in ``finished.json``.
    """

    label: str
    reported: float | str | None
    run: str
    variant: str = "all detections"
    measure: str = "AP50"


class Comparison(NamedTuple):
    """A conclusion that a report draws from two rows of its table.

    Attributes:
        claim: a statement, without full stop.
        base: label of the row that the other is compared with.
        other: label of the other row.
        expected: 1: the other scores higher, -1: lower, 0: no change to be seen.
    """

    claim: str
    base: str
    other: str
    expected: int = 1


class Table(NamedTuple):
    """A score table of a report.

    Attributes:
        title: of the table.
        rows: of the table.
        comparisons: the conclusions.
        note: what a reader has to know.
    """

    title: str
    rows: list[Row]
    comparisons: list[Comparison] = []
    note: str = ""


ORDER = {
    "A": ["A-Fig1", "A-Fig2", "A-Fig3", "A-T1", "A-T2", "A-T3"],
    "B": ["B-T1", "B-T2", "B-Fig1", "B-T3", "B-Fig2", "B-T4", "B-T5"],
    "C": ["C-T1", "C-Fig1", "C-Fig2", "C-Fig3", "C-T2", "C-T3"],
    "D": ["D-T1", "D-T2", "D-Fig1", "D-Fig2", "D-T3", "D-T4"],
    "E": ["E-Fig1", "E-Fig2", "E-T1", "E-T2", "E-T3", "E-T4", "E-sweep"],
}

E_BOTH = "class thresholds + refinement"
SCORE_TABLES = {
    "A-T1": Table("Performance", [Row("ResNet101_FPN (ours)", 0.357, "a/resnet101")]),
    "A-T2": Table(
        "Backbones",
        [
            Row("ResNet18_FPN", 0.335, "a/resnet18"),
            Row("ResNet50_FPN", 0.334, "a/resnet50"),
            Row("ResNet101_FPN", 0.357, "a/resnet101"),
        ],
        [
            Comparison(
                "A larger backbone helps, ResNet-50 over ResNet-18", "ResNet18_FPN", "ResNet50_FPN"
            ),
            Comparison(
                "A larger backbone helps, ResNet-101 over ResNet-50",
                "ResNet50_FPN",
                "ResNet101_FPN",
            ),
            Comparison(
                "A larger backbone helps, ResNet-101 over ResNet-18",
                "ResNet18_FPN",
                "ResNet101_FPN",
            ),
        ],
        "The report's own ResNet-18 beats its ResNet-50.",
    ),
    "A-T3": Table(
        "Anchors",
        [Row("library default", 0.339, "a/default_anchors"), Row("ours", 0.357, "a/resnet101")],
        [Comparison("Cell-sized anchors help", "library default", "ours")],
        "Default: sizes 32 to 512 px, 3 ratios; ours: 16 to 96 px, 8 ratios, in px of what the model sees: at full scale images are "
        "enlarged to 1024 px, at quick scale they stay as they are. That the backbone is ResNet-101 is inferred.",
    ),
    "B-T3": Table(
        "Score threshold",
        [
            Row("0.2 (cut the low peak)", 0.26, "b/v2_backbone", "score ≥ 0.2"),
            Row("0.5 (keep the high peak)", 0.21, "b/v2_backbone", "score ≥ 0.5"),
            Row("0 (keep all)", 0.27, "b/v2_backbone"),
        ],
        [
            Comparison(
                "Keeping all scores higher than a threshold of 0.2",
                "0.2 (cut the low peak)",
                "0 (keep all)",
            ),
            Comparison(
                "Keeping all scores higher than a threshold of 0.5",
                "0.5 (keep the high peak)",
                "0 (keep all)",
            ),
        ],
        "The report says only that 0 scored highest: which of 0.26 and 0.21 is which is inferred, and the border filter may have "
        "been on. A threshold takes the end off "
        "the precision-recall curve, so under AP keeping all wins whatever the scores are worth; B-Fig1 says what they are. All is what "
        "the model gives: it drops scores under 0.05 itself and keeps 100 an image.",
    ),
    "B-T4": Table(
        "Border filter",
        [
            Row("keep all", 0.27, "b/v2_backbone"),
            Row("drop boxes at the border", 0.27, "b/v2_backbone", "no box at the border"),
        ],
        [
            Comparison(
                "Dropping boxes at the border changes nothing to be seen",
                "keep all",
                "drop boxes at the border",
                0,
            )
        ],
        "Two digits were reported: a change under 0.01 counts as none.",
    ),
    "B-T5": Table(
        "Backbones tried",
        [
            Row("ResNet-50", None, "b/resnet50"),
            Row("ResNeXt-50", None, "b/resnext50"),
            Row("ResNet-50-FPN v2, backbone", "chosen", "b/v2_backbone"),
            Row("ResNet-50-FPN v2, whole model", None, "b/v2_whole"),
        ],
        [
            Comparison(
                "The v2 backbone beats ResNet-50", "ResNet-50", "ResNet-50-FPN v2, backbone"
            ),
            Comparison(
                "The v2 backbone beats ResNeXt-50", "ResNeXt-50", "ResNet-50-FPN v2, backbone"
            ),
            Comparison(
                "The whole v2 model beats its backbone in a v1-style Mask R-CNN",
                "ResNet-50-FPN v2, backbone",
                "ResNet-50-FPN v2, whole model",
            ),
        ],
        "The report chose v2, and gives neither figures nor an order of the others. Its text means the whole v2 model, its "
        "released code takes the backbone and FPN of it; the last row and comparison are not in the report. At full scale v2 starts "
        "from COCO weights, the other two backbones from ImageNet's: there are no others for all, so the weights are compared, too.",
    ),
    "C-T2": Table(
        "Final", [Row("ResNet-50 FPN", 0.31, "c/final")], note="Reported: private leaderboard."
    ),
    "C-T3": Table(
        "Augmentation",
        [
            Row("none", None, "c/final"),
            Row(
                "flip, colour jitter, rotation ±15°",
                "a loss in validation performance",
                "c/flip_colour_rotation",
            ),
        ],
        [
            Comparison(
                "This augmentation lowers the score",
                "none",
                "flip, colour jitter, rotation ±15°",
                -1,
            )
        ],
        "The report gives no figure.",
    ),
    "D-T3": Table(
        "Ablation, all else equal",
        [
            Row("ResNet-50 without FPN", 0.2421, "d/no_fpn"),
            Row("+ FPN", 0.2815, "d/fpn"),
            Row("+ FPN + CBAM", 0.3336, "d/fpn_cbam"),
        ],
        [
            Comparison("A feature pyramid helps", "ResNet-50 without FPN", "+ FPN"),
            Comparison("CBAM helps", "+ FPN", "+ FPN + CBAM"),
        ],
        "Without FPN: one feature map, C4 (stride 16; C5's stride of 32 is larger than most cells), layer 4 left out, all five anchor "
        "sizes on it; so it has fewer parameters. Which map the report took is not said.",
    ),
    "D-T4": Table(
        "Final",
        [
            Row("ResNet-50 + FPN + CBAM", 0.3336, "d/fpn_cbam"),
            Row("size of the model, MB", 176.29, "d/fpn_cbam", measure="model_megabytes"),
        ],
        note="Reported: test mAP, its IoU not stated. A 5-class ResNet-50 FPN without CBAM is saved in 176.28 MB; CBAM with "
        "reduction 16 adds 2.8 MB. Here: the bytes of all tensors; a file has about 0.1 MB more.",
    ),
    "E-T1": Table(
        "Phases",
        [
            Row("base", 0.340, "e/base", "score ≥ 0.5"),
            Row("+ anchors + class thresholds", 0.40, "e/full", "class thresholds"),
            Row("+ refinement + score adjustment", 0.455, "e/full", E_BOTH),
        ],
        [
            Comparison(
                "Small anchors and class thresholds help", "base", "+ anchors + class thresholds"
            ),
            Comparison(
                "Refinement and score adjustment help",
                "+ anchors + class thresholds",
                "+ refinement + score adjustment",
            ),
        ],
        "Reported figures are approximate. The base's one threshold of 0.5 is inferred, and that it differs from the system in the "
        "anchors alone (in px of what the model sees: enlarged to 800 px at full scale, not at quick scale); as the class thresholds "
        "lie under 0.5, "
        "they can only raise AP.",
    ),
    "E-T2": Table(
        "Augmentation",
        [
            Row("none", 0.412, "e/none", E_BOTH),
            Row("basic: flips, 90° rotations", 0.438, "e/basic", E_BOTH),
            Row("full: + colours, distortion, blur", 0.455, "e/full", E_BOTH),
        ],
        [
            Comparison("Basic augmentation helps", "none", "basic: flips, 90° rotations"),
            Comparison(
                "Full augmentation beats basic",
                "basic: flips, 90° rotations",
                "full: + colours, distortion, blur",
            ),
            Comparison("Full augmentation helps", "none", "full: + colours, distortion, blur"),
        ],
        "All with class thresholds and refinement, as 0.455 is the figure of the whole system. The report gives the gains over none "
        "as +6.3 % and +10.4 %.",
    ),
    "E-T4": Table(
        "Effect of class thresholds",
        [
            Row("without (one threshold of 0.5)", 0.442, "e/full", "score ≥ 0.5 + refinement"),
            Row("with", 0.455, "e/full", E_BOTH),
        ],
        [Comparison("Class thresholds help", "without (one threshold of 0.5)", "with")],
        "Both with refinement and score adjustment. That `without` means one threshold, and which, is inferred; a lower one "
        "raises AP by construction. E-T3 asks the same of F1, on images that did not choose.",
    ),
}

OTHER_TITLES = {
    "A-Fig1": "An image beside the instance map of one class",
    "A-Fig2": "Schematic of the feature pyramid",
    "A-Fig3": "Training curve of the final model",
    "B-T1": "COCO's 12 lines",
    "B-T2": "Training loss by epoch",
    "B-Fig1": "Histogram of prediction scores",
    "B-Fig2": "Annotated cells over an image: are cells at the border annotated?",
    "C-T1": "Data set",
    "C-Fig1": "An image beside its instance mask",
    "C-Fig2": "Schematic of ResNet-50",
    "C-Fig3": "Training loss over 10 epochs",
    "D-T1": "Augmentation",
    "D-T2": "Hyper-parameters",
    "D-Fig1": "Leaderboard entry",
    "D-Fig2": "Training and validation loss",
    "E-Fig1": "Training and validation loss",
    "E-Fig2": "Predictions over images",
    "E-T3": "Class thresholds",
    "E-sweep": "Scores over the score threshold",
}
NOT_NEEDED = {
    "A-Fig2": "A schematic: nothing to reproduce.",
    "C-Fig2": "A schematic: nothing to reproduce.",
    "D-Fig1": "A screenshot of the entry, 0.3336: the number is in D-T4.",
}

B_SUMMARY = {
    "AP": 0.287, "AP50": 0.461, "AP75": 0.340, "APs": 0.209, "APm": 0.238, "APl": 0.119,
    "AR1": 0.042, "AR10": 0.214, "AR100": 0.385, "ARs": 0.353, "ARm": 0.331, "ARl": 0.162,
}  # fmt: skip
LOSSES = {
    "B-T2": [1.8835, 1.4656, 1.2757, 1.2308, 1.1274],
    "C-Fig3": [0.7856, 0.7839, 0.7342, 0.7164, 0.6516, 0.6369, 0.6210, 0.6259, 0.6229, 0.5715],
}

# Step, as report D lists it, as the recipe joint_full holds it.
D_AUGMENTATION = [
    ("horizontal flip", "p 0.5", "p 0.5"),
    ("vertical flip", "p 0.3", "p 0.3"),
    ("rotation", "±15°, p 0.4", "±15°, p 0.4"),
    ("zoom", "scale 0.85 to 1.15, p 0.3", "scale 0.85 to 1.15, p 0.3"),
    (
        "random resized crop",
        "area 0.8 to 1.0, ratio 0.9 to 1.1, p 0.3",
        "area 0.8 to 1.0, ratio 0.9 to 1.1, p 0.3",
    ),
    (
        "colour jitter",
        "brightness, contrast, saturation, hue, p: legible are 0.3, 0.3, 0.3, 0.15",
        "brightness 0.3, contrast 0.3, saturation 0.3, hue 0.15, p 0.3",
    ),
    ("Gaussian noise", "std 0.02, p 0.2", "std 0.02, p 0.2"),
    ("Gaussian blur", "kernel 3, sigma 0.1 to 1.0, p 0.2", "kernel 3, sigma 0.1 to 1.0, p 0.2"),
    ("gamma", "0.8 to 1.2, p 0.3", "0.8 to 1.2, p 0.3"),
]

# Setting, as report D gives it, the name of the run's setting.
D_SETTINGS = [
    ("optimizer", "AdamW", "optimizer"),
    ("learning rate", "2e-4", "learning_rate"),
    ("lowest learning rate", "5e-6", "min_learning_rate"),
    ("schedule", "cosine annealing", "scheduler"),
    ("weight decay", "1e-4", "weight_decay"),
    ("batch", "2", "batch_size"),
    ("epochs", "40", "epochs"),
    ("precision", "mixed", "precision"),
    ("weights of every epoch kept", "yes", "keep_every_epoch"),
    ("score threshold", "0.5", "box_score_thresh"),
    ("NMS threshold", "0.5", "box_nms_thresh"),
    ("validation after so many epochs", "1", "validation_every_epochs"),
    ("normalisation", "the data's own mean and standard deviation", "normalization"),
    ("initial weights", "not stated", "weights"),
    ("shorter side, px (0: as it is)", "not stated", "min_size"),
    ("crop, px (0: whole images)", "not stated", "crop_size_px"),
    ("split", "not stated", "split"),
]

E_THRESHOLDS = {1: 0.25, 2: 0.22, 3: 0.20, 4: 0.18}
E_PRECISION = [0.83, 0.78, 0.74, 0.70]
E_RECALL = [0.72, 0.76, 0.79, 0.82]
E_SIZE_FACTORS = [(0.01, 1.15), (0.05, 1.10)]
F1_COMPARISON = Comparison(
    "Class thresholds beat one threshold, chosen on other images",
    "one threshold",
    "class thresholds",
)
E_GRID = [round(0.05 * step, 2) for step in range(2, 17)]


def _refine(detections: Detections) -> Detections:
    """Report E's refinement, with its 5 x 5 closing, 3 x 3 opening and 3 x 3 closing as discs of
    radius 2, 1 and 1.
    """
    opened = postprocess.open_masks(postprocess.close_masks(detections, 2), 1)
    return postprocess.close_masks(
        postprocess.fill_holes(postprocess.keep_largest_component(opened)), 1
    )


def above(score_threshold: float, detections: Detections) -> Detections:
    """The detections that score as high as one threshold for all classes."""
    return postprocess.apply_class_thresholds(
        detections, dict.fromkeys(range(1, len(CLASS_NAMES) + 1), score_threshold)
    )


def _adjusted(detections: Detections) -> Detections:
    return postprocess.adjust_scores_by_size(detections, E_SIZE_FACTORS)


VARIANTS: dict[str, Callable[[Detections, list[dict[str, Any]]], Detections]] = {
    "all detections": lambda detections, images: detections,
    "score ≥ 0.2": lambda detections, images: above(0.2, detections),
    "score ≥ 0.5": lambda detections, images: above(0.5, detections),
    "no box at the border": lambda detections, images: borders.drop_border_detections(detections),
    "class thresholds": lambda detections, images: postprocess.apply_class_thresholds(
        detections, E_THRESHOLDS
    ),
    E_BOTH: lambda detections, images: _refine(
        postprocess.apply_class_thresholds(_adjusted(detections), E_THRESHOLDS)
    ),
    "score ≥ 0.5 + refinement": lambda detections, images: _refine(
        above(0.5, _adjusted(detections))
    ),
}
