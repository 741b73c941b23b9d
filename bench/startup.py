"""How soon work begins: the wall time of fresh processes that import the package or run an analysis
notebook's import cell, which need no torch, beside an import of torch.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial

import nbformat

from bench.measure import NAN, Row, medians_in_turn, row
from cellseg_helpers.config import ROOT

NOTEBOOKS = ROOT / "notebooks"
PACKAGE, TORCH = "import cellseg_helpers", "import torch, torchvision"
SAY_TORCH = """
import sys
print("OTHER: torch loaded" if "torch" in sys.modules else "torch not loaded")"""


def run(code: str) -> str:
    """Whether torch is loaded in a Python process that has run ``code``."""
    command = [sys.executable, "-c", code + SAY_TORCH]
    done = subprocess.run(command, cwd=NOTEBOOKS, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def run_notebook(code: str, folder: str) -> str:
    """``run`` by papermill, of a notebook with this one cell."""
    path, executed = f"{folder}/one_cell.ipynb", f"{folder}/executed.ipynb"
    cells = [nbformat.v4.new_code_cell(code + SAY_TORCH)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    command = [sys.executable, "-m", "papermill", "-k", "python3", path, executed]
    subprocess.run(command, cwd=NOTEBOOKS, capture_output=True, check=True)
    return nbformat.read(executed, as_version=4).cells[0].outputs[0].text.strip()


def in_turn(repeats: int, start: Callable[[str], str], *codes: str) -> tuple[list[float], str]:
    """Median seconds of each code, started in turn, and whether the first loaded torch."""
    said: list[str] = []
    calls = [lambda code=code: said.append(start(code)) for code in codes]
    return medians_in_turn(calls, repeats), said[0]


def rows() -> list[Row]:
    (ours, peer), said = in_turn(3, run, PACKAGE, TORCH)
    note = "a Python process; peer: import torch, torchvision"
    table = [row(f"startup: {PACKAGE}", ours, peer, "s", said, note)]
    with tempfile.TemporaryDirectory() as folder:
        start = partial(run_notebook, folder=folder)
        (peer,), _ = in_turn(1, start, TORCH)
        (ours, empty), said = in_turn(3, start, PACKAGE, "")
    note = f"goal: at most 0.3 s on top of papermill with an empty notebook, {empty:.2f} s, "
    note += f"found {ours - empty:.2f} s; peer: import torch, torchvision"
    table.append(row(f"startup: papermill, {PACKAGE}", ours, peer, "s", said, note))
    note = "goal: starts without torch; one process"
    for path in sorted(NOTEBOOKS.glob("0[34568]_*.ipynb")):  # the analyses
        cells = nbformat.read(path, as_version=4).cells
        imports = next(cell.source for cell in cells if cell.cell_type == "code")
        (ours,), said = in_turn(1, run, imports)
        table.append(row(f"startup: import cell of {path.stem}", ours, NAN, "s", said, note))
    return table
