"""Tables of the repository (notebooks, parameter files, runs), report C's table of the data, and
how a table of the study looks on a page.
"""

import html
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from IPython.display import HTML
from pandas.io.formats.style import Styler

from cellseg_helpers.config import ROOT, resolve_path
from cellseg_helpers.data.cache import CellDataset
from cellseg_helpers.runs import load_run
from study.reported import TABLES
from study.verdicts import WORDS


def _short(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _bold_verdicts(text: str) -> str:
    return re.sub("|".join(WORDS), "<b>\\g<0></b>", html.escape(text))


FORMATS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(["reported", "full scale", "this run", "epochs"], _short),
    "minutes": "{:.1f}".format,
    "parameters": lambda count: f"{count / 1e6:.1f} M",
    "split": lambda text: text.removesuffix(", validation side"),
}


def page(table: pd.DataFrame, name: str, wide: Sequence[str] = ()) -> HTML:
    """A table for a notebook and its page: three decimals, missing values empty, verdicts bold.

    Args:
        table: as it is to be shown; its index names the rows. Columns in ``FORMATS`` have their own
            format.
        name: unique in the notebook; the HTML is the same each time.
        wide: columns of sentences; they get 15 em at least.
    """
    formats = {column: FORMATS[column] for column in table if column in FORMATS}
    corner = table.rename_axis(index=None, columns=table.index.name)
    style = Styler(corner, cell_ids=False, uuid=name)
    style.format(formats, na_rep="", precision=3, escape="html")
    found = [column for column in table if column.startswith("verdict")]
    style.format(_bold_verdicts, subset=found, na_rep="")
    style.format_index(lambda column: column.replace("_", " "), axis=1).format_index(escape="html")
    cells = {"selector": "td, th", "props": "text-align: left; vertical-align: top"}
    names = {"selector": "th.row_heading", "props": "white-space: nowrap"}
    room = [{"selector": "", "props": "min-width: 15em"}]
    style.set_table_styles([cells, names])
    style.set_table_styles(dict.fromkeys(wide, room), overwrite=False)
    return HTML(style.to_html())


def dataset_summary(dataset: CellDataset, data: str) -> pd.DataFrame:
    """Report C's table of its data (``reported``) beside the same facts (``here``) about all
    annotated images of ``data``: ``drawn``, a folder, or a COCO file.
    """
    table = TABLES["C-T1"].frame.set_index("item")
    is_coco = data.endswith(".json")
    path = ROOT / "outputs" / "drawn" if data == "drawn" else resolve_path(data)
    files = (path.parent if is_coco else path).glob("test_release/*")
    tests = [file for file in files if file.suffix.lower() in (".tif", ".tiff")]
    here = {
        "image type": "RGB, drawn in H&E colours" if data == "drawn" else "read as RGB",
        "annotation": "instance level",
        "classes": str((dataset.counts.sum(0) > 0).sum()),
        "labelled images": str(len(dataset)),
        "unlabelled images": str(len(tests)),
        "format": "images beside a COCO file" if is_coco else table.loc["format", "reported"],
    }
    return table.assign(here=pd.Series(here))


def notebook_map(folder: str | Path = "notebooks") -> pd.DataFrame:
    """Per notebook: its question and what it reads, writes and takes, from its first cell."""
    rows = {}
    for path in sorted(resolve_path(folder).glob("[0-9]*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        facts = re.findall(r"^- \*\*(\w+):\*\* (.+)$", first.replace("`", ""), flags=re.MULTILINE)
        rows[path.stem] = {name.lower(): fact for name, fact in facts}
    columns = ["question", "reads", "writes", "takes"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return table.fillna("").rename_axis("notebook")


def parameter_files(folder: str | Path = "params") -> pd.DataFrame:
    """Per parameter file: the first sentence of its comment and how many settings it changes."""
    rows = {}
    for path in sorted(resolve_path(folder).rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        comment = " ".join(re.findall(r"^# *(.*)$", text, flags=re.MULTILINE))
        settings = yaml.safe_load(text) or {}
        rows[str(path.relative_to(ROOT))] = comment.split(". ")[0], len(settings)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["what", "settings"])
    return table.rename_axis("file")


def run_table(runs_dir: str | Path) -> pd.DataFrame:
    """Per finished run in a folder: scale, data, split, backbone, epochs, AP50 and its maxDets."""
    rows = {}
    for path in sorted(resolve_path(runs_dir).glob("*/metrics.json")):
        run = load_run(path.parent)
        scores = run.metrics["coco_dense"]
        rows[path.parent.name] = {
            "scale": run.settings["scale"],
            "data": Path(run.settings["data"]).name,
            "split": run.split["kind"],
            "backbone": run.settings["backbone"],
            "epochs": len(run.history),
            "AP50": scores["summary"]["AP50"],
            "maxDets": scores["max_dets"][-1],
        }
    columns = ["scale", "data", "split", "backbone", "epochs", "AP50", "maxDets"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("run")
