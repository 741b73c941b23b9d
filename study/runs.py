"""The runs of the study: which parameter files make each, what it is called, where its folder is.
Starts in no time: no torch.

A run's key names its parameter files: ``a/resnet101`` is ``params/reports/a/resnet101.yaml``;
``c/final+coco_weights`` is ``params/reports/c/final.yaml``, then
``params/findings/c/final+coco_weights.yaml``, which changes one thing.
"""

from dataclasses import replace
from pathlib import Path

from cellseg_helpers.config import ROOT, RunConfig, resolve_path

REPORTS = Path("params/reports")
FINDINGS = Path("params/findings")
SCALES = {
    "full": [],
    "sample": [Path("params/sample.yaml")],
    "quick": [Path("params/quick.yaml"), Path("params/quick_study.yaml")],
}
FINALS = (
    "a/resnet101",
    "b/v2_backbone",
    "c/final",
    "d/fpn_cbam",
    "e/full",
)  # each report's own system


def run_keys(scale: str = "full") -> list[str]:
    """Every run of the study at a scale: those of the reports, then those of the findings that the
    scale does not make alike their base.

    Raises:
        ValueError: no such scale, or a parameter file that cannot be used.
    """
    keys = [
        path.relative_to(ROOT / folder).with_suffix("").as_posix()
        for folder in (REPORTS, FINDINGS)
        for path in sorted((ROOT / folder).glob("*/*.yaml"))
    ]
    return keys if scale == "full" else [key for key in keys if differs_from_base(key, scale)]


def differs_from_base(key: str, scale: str) -> bool:
    """Whether a run of the findings still has other settings than its base at a scale; a run of a
    report is a base itself.
    """
    if "+" not in key:
        return True
    own, base = (
        RunConfig.from_yaml(*parameter_files(each, scale)) for each in (key, key.split("+")[0])
    )
    return own != base


def parameter_files(key: str, scale: str) -> list[Path]:
    """The parameter files of a run in their order, relative to the repository's root; the last ones
    scale it down, unless it is ``full``.

    Raises:
        ValueError: no such run or scale.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; one of {', '.join(SCALES)}")
    if key not in run_keys():
        raise ValueError(f"unknown run {key!r}; one of {', '.join(run_keys())}")
    files = [REPORTS / f"{key.split('+')[0]}.yaml"]
    if "+" in key:
        files.append(FINDINGS / f"{key}.yaml")
    return files + SCALES[scale]


def study_name(scale: str, data: str) -> str:
    """``<scale>-<name of the data>``: of its folder, also where the data are a COCO file in it."""
    place = resolve_path(data).resolve()
    return f"{scale}-{'drawn' if data == 'drawn' else place.parent.name if place.suffix == '.json' else place.name}"


def run_name(study: str, key: str, seed: int) -> str:
    """Name of a run's folder under ``outputs/runs``."""
    return f"{study}-{key.replace('/', '-')}-seed{seed}"


def settings(key: str, scale: str, data: str, seed: int) -> RunConfig:
    """The settings of a run of the study.

    Raises:
        ValueError: no such run or scale, or a parameter file that cannot be used.
    """
    config = RunConfig.from_yaml(*parameter_files(key, scale))
    return replace(
        config, data=data, seed=seed, run_name=run_name(study_name(scale, data), key, seed)
    )
