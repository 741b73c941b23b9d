"""Tables of data, runs and mistakes as DataFrames, and the saving of them."""

import json
import re
from pathlib import Path

import pandas as pd

from cellseg_helpers.config import ROOT, resolve_path
from cellseg_helpers.data.hw3 import CellDataset
from cellseg_helpers.runs import load_run

REPORT_C = {
    "image type": "RGB microscopy",
    "annotation": "instance level",
    "classes": "4",
    "labelled images": "209",
    "unlabelled images": "101",
    "format": "TIFF images and masks, one mask a class",
}


def dataset_summary(dataset: CellDataset, data: str) -> pd.DataFrame:
    """Report C's data table beside the data at hand; rows: its items, columns: ``reported``,
    ``here``.
    """
    is_coco = str(data).endswith(".json")
    place = ROOT / "outputs" / "drawn" if data == "drawn" else resolve_path(data)
    tests = [
        file
        for file in (place.parent if is_coco else place).glob("test_release/*")
        if file.suffix.lower() in (".tif", ".tiff")
    ]
    here = {
        "image type": "RGB, drawn in H&E colours" if data == "drawn" else "read as RGB",
        "annotation": "instance level",
        "classes": str((dataset.counts.sum(0) > 0).sum()),
        "labelled images": str(len(dataset)),
        "unlabelled images": str(len(tests)),
        "format": "images beside a COCO file" if is_coco else REPORT_C["format"],
    }
    return pd.DataFrame({"reported": REPORT_C, "here": here}).rename_axis("item")


def notebook_map(folder: str | Path = "notebooks") -> pd.DataFrame:
    """Per notebook: its question and what it reads, writes and takes, from the first cell of each
    file.
    """
    rows = {}
    for path in sorted(resolve_path(folder).glob("[0-9]*.ipynb")):
        title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        told = dict(re.findall(r"^- \*\*(\w+):\*\* (.+)$", title, flags=re.MULTILINE))
        rows[path.stem] = {
            key.lower(): told.get(key, "").replace("`", "")
            for key in ("Question", "Reads", "Writes", "Takes")
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("notebook")


def parameter_files(folder: str | Path = "params") -> pd.DataFrame:
    """Per parameter file: its first comment sentence and how many settings it changes."""
    import yaml

    rows = {}
    for path in sorted(resolve_path(folder).rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        rows[str(path.relative_to(ROOT))] = {
            "what": comment.split(". ")[0],
            "settings": len(yaml.safe_load(text) or {}),
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["what", "settings"]).rename_axis(
        "file"
    )


def run_table(runs_dir: str | Path) -> pd.DataFrame:
    """Per finished run in a folder: scale, data, split, backbone, epochs, AP50 and its maxDets."""
    rows = {}
    for path in sorted(resolve_path(runs_dir).glob("*/metrics.json")):
        run = load_run(path.parent)
        section = run.metrics["coco_dense"]
        rows[path.parent.name] = {
            "scale": run.settings["scale"],
            "data": Path(run.settings["data"]).name,
            "split": run.split["kind"],
            "backbone": run.settings["backbone"],
            "epochs": len(run.history),
            "AP50": section["summary"]["AP50"],
            "maxDets": section["max_dets"][-1],
        }
    columns = ["scale", "data", "split", "backbone", "epochs", "AP50", "maxDets"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("run")
