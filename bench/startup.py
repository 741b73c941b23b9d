"""How soon work begins: the package and the analysis notebooks' import cells, that need no torch,
against the same with torch.

Every measurement is the wall time of a fresh process, from its start to its end.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import nbformat

from bench.measure import ROOT, Row, medians_in_turn

NOTEBOOKS = ROOT / "notebooks"
ANALYSES = ("03", "04", "05", "06", "08")
TORCH = "import torch, torchvision\n"
SAY_TORCH = (
    "\nimport sys; print('OTHER: torch loaded' if 'torch' in sys.modules else 'torch not loaded')"
)


def run(code: str) -> str:
    """The last line that a Python process prints which runs ``code`` and then says whether torch is
    loaded.
    """
    command = [sys.executable, "-c", code + SAY_TORCH]
    done = subprocess.run(command, cwd=NOTEBOOKS, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def run_notebook(code: str, folder: str) -> str:
    """``run`` by papermill, of a notebook with this one cell."""
    path, executed = Path(folder) / "one_cell.ipynb", Path(folder) / "executed.ipynb"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code + SAY_TORCH)])
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "papermill", "--cwd", str(NOTEBOOKS), str(path), str(executed)]
    subprocess.run(command, capture_output=True, check=True)
    return nbformat.read(executed, as_version=4).cells[0].outputs[0].text.strip()


def import_cell(notebook: Path) -> str:
    return next(
        cell.source
        for cell in nbformat.read(notebook, as_version=4).cells
        if cell.cell_type == "code"
    )


def in_turn(
    start: Callable[[str], str], codes: Sequence[str], repeats: int
) -> tuple[list[float], str]:
    """Median seconds of each code, started in turn, and what the first said of torch."""
    said: list[str] = []
    return medians_in_turn(
        [lambda code=code: said.append(start(code)) for code in codes], repeats
    ), said[0]


def rows() -> list[Row]:
    table = []

    def add(name: str, ours: float, peer: float, said: str, note: str) -> None:
        table.append(Row(f"startup: {name}", ours, peer, "s", peer / ours, said, note))

    (ours, peer), said = in_turn(run, ["import cellseg_helpers", TORCH], repeats=3)
    add(
        "import cellseg_helpers",
        ours,
        peer,
        said,
        "a Python process; peer: import torch, torchvision",
    )
    with tempfile.TemporaryDirectory() as folder:
        start = partial(run_notebook, folder=folder)
        (peer,), _ = in_turn(start, [TORCH], repeats=1)
        (ours, empty), said = in_turn(start, ["import cellseg_helpers", ""], repeats=3)
    note = f"goal: at most 0.3 s on top of papermill with an empty notebook, {empty:.2f} s, found {ours - empty:.2f} s"
    add(
        "papermill, import cellseg_helpers",
        ours,
        peer,
        said,
        f"{note}; peer: import torch, torchvision",
    )
    for path in sorted(
        path for path in NOTEBOOKS.glob("*.ipynb") if path.name.startswith(ANALYSES)
    ):
        (ours,), said = in_turn(run, [import_cell(path)], repeats=1)
        add(
            f"import cell of {path.stem}",
            ours,
            float("nan"),
            said,
            "goal: starts without torch; one process",
        )
    return table
