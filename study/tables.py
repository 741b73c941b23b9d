"""Tables of the repository's notebooks, parameter files and runs, report C's table of its data, and
the layout of the study's tables in notebooks.
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


def _bold_verdicts(text: str) -> str:  # as HTML
    return re.sub("|".join(WORDS), "<b>\\g<0></b>", html.escape(text))


FORMATS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(["reported", "full scale", "this run", "epochs"], _short),
    "minutes": "{:.1f}".format,
    "parameters": lambda count: f"{count / 1e6:.1f} M",
    "split": lambda text: text.removesuffix(", validation side"),
}


def page(table: pd.DataFrame, name: str, wide: Sequence[str] = ()) -> HTML:
    """Format a table for a notebook: three decimals, missing values empty, verdicts bold.

    Args:
        table: the table; its index names the rows. Columns in ``FORMATS`` have their own format.
        name: unique in the notebook; with it, the same table gives the same HTML each time.
        wide: columns that contain sentences; they are at least 15 em wide.
    """
    formats = {column: FORMATS[column] for column in table if column in FORMATS}
    one_header_row = table.rename_axis(index=None, columns=table.index.name)
    style = Styler(one_header_row, cell_ids=False, uuid=name)
    style.format(formats, na_rep="", precision=3, escape="html")
    verdicts = [column for column in table if column.startswith("verdict")]
    style.format(_bold_verdicts, subset=verdicts, na_rep="")
    style.format_index(lambda column: column.replace("_", " "), axis=1).format_index(escape="html")
    cells = {"selector": "td, th", "props": "text-align: left; vertical-align: top"}
    row_names = {"selector": "th.row_heading", "props": "white-space: nowrap"}
    width = [{"selector": "", "props": "min-width: 15em"}]
    style.set_table_styles([cells, row_names])
    style.set_table_styles(dict.fromkeys(wide, width), overwrite=False)
    return HTML(style.to_html())


def dataset_summary(dataset: CellDataset, data: str) -> pd.DataFrame:
    """Compare report C's table of its data (``reported``) with the same facts (``here``) about all
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
    """List the notebooks: question, what each reads and writes, and the time that it takes, from
    the list in its first cell.
    """
    rows = {}
    for path in sorted(resolve_path(folder).glob("[0-9]*.ipynb")):
        text = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        facts = re.findall(r"^- \*\*(\w+):\*\* (.+)$", text.replace("`", ""), flags=re.MULTILINE)
        rows[path.stem] = {name.lower(): fact for name, fact in facts}
    columns = ["question", "reads", "writes", "takes"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return table.fillna("").rename_axis("notebook")


def parameter_files(folder: str | Path = "params") -> pd.DataFrame:
    """List the parameter files: first sentence of the comment, number of settings changed."""
    rows = {}
    for path in sorted(resolve_path(folder).rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        comment = " ".join(re.findall(r"^# *(.*)$", text, flags=re.MULTILINE))
        settings = yaml.safe_load(text) or {}
        rows[str(path.relative_to(ROOT))] = comment.split(". ")[0], len(settings)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["what", "settings"])
    return table.rename_axis("file")


def run_table(runs_dir: str | Path) -> pd.DataFrame:
    """List the evaluated runs of a folder: scale, data, split, backbone, epochs, AP50, maxDets."""
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
