"""How the notebooks are built; what they compute is compared by ``pytest --nbval``."""

import ast
import json
import re
import subprocess
import sys

import pytest

from cellseg_helpers.borders import BORDER_MARGIN_PX
from cellseg_helpers.config import ROOT
from study.reported import E_SIZE_FACTORS, E_THRESHOLDS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
IGNORED = "nbval-ignore-output"
MACHINE_PATH = re.compile(r"/(?:home|root|Users|tmp|work|mnt|opt|usr)/[\w.-]+|[A-Z]:\\\\")


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def tags(cell):
    return cell["metadata"].get("tags", [])


def parameters_of(path):
    (cell,) = [cell for cell in cells_of(path) if "parameters" in tags(cell)]
    statements = ast.parse(source(cell)).body
    assert all(
        isinstance(statement, ast.Assign) and len(statement.targets) == 1
        for statement in statements
    )
    return {statement.targets[0].id: ast.literal_eval(statement.value) for statement in statements}


def test_the_first_notebooks_are_there():
    names = "overview explore_data train evaluate score_thresholds border_cells postprocessing"
    names = f"{names} predict_test report_tables findings".split()
    assert [path.stem for path in NOTEBOOKS] == [f"{i:02}_{name}" for i, name in enumerate(names)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestEveryNotebook:
    def test_opens_with_title_question_files_and_time(self, path):
        first = source(cells_of(path)[0])
        assert first.startswith("# ")
        assert all(f"- **{what}:** " in first for what in ("Question", "Reads", "Writes", "Takes"))

    def test_has_15_to_30_cells_and_no_class(self, path):
        cells = cells_of(path)
        assert 15 <= len(cells) <= (60 if path.stem == "09_findings" else 30)
        code = [ast.parse(source(cell)) for cell in cells if cell["cell_type"] == "code"]
        assert not [
            node for tree in code for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
        ]

    def test_imports_all_stand_in_the_first_code_cell(self, path):
        first, *others = [
            ast.parse(source(cell)) for cell in cells_of(path) if cell["cell_type"] == "code"
        ]
        imports = ast.Import | ast.ImportFrom
        assert all(isinstance(statement, imports) for statement in first.body)
        assert not [node for tree in others for node in ast.walk(tree) if isinstance(node, imports)]

    def test_explains_every_parameter_and_guards_them_next(self, path):
        code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
        place = next(i for i, cell in enumerate(code) if "parameters" in tags(cell))
        assert parameters_of(path)
        lines = [
            line for line in source(code[place]).splitlines() if line and not line.startswith("#")
        ]
        assert all("  # " in line for line in lines)
        assert re.search(
            r"= (check_parameters|RunConfig\.from_notebook)\(\s*globals\(\)",
            source(code[place + 1]),
        )
        assert place == 1

    def test_ends_with_result_limits_next(self, path):
        text = "\n".join(source(cell) for cell in cells_of(path) if cell["cell_type"] == "markdown")
        places = [text.index(f"## {heading}\n") for heading in ("Result", "Limits", "Next")]
        assert places == sorted(places)

    def test_was_run_from_top_to_bottom_without_errors(self, path):
        code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
        assert "error" not in kinds and kinds & {"display_data", "execute_result"}

    def test_at_most_a_third_of_the_outputs_go_uncompared(self, path):
        code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
        with_output = [cell for cell in code if cell["outputs"] or IGNORED in tags(cell)]
        ignored = [cell for cell in with_output if IGNORED in tags(cell)]
        assert 3 * len(ignored) <= len(with_output)
        assert not [
            cell for cell in with_output if {"nbval-skip", "raises-exception"} & set(tags(cell))
        ]
        assert "NBVAL" not in path.read_text(encoding="utf-8")

    def test_shows_no_path_of_a_machine_and_is_small(self, path):
        outputs = json.dumps([cell.get("outputs") for cell in cells_of(path)])
        assert not MACHINE_PATH.search(re.sub(r'"image/png": "[^"]*"', "", outputs))
        assert path.stat().st_size < 1_500_000


@pytest.mark.parametrize(
    ("notebook", "name", "value"),
    [
        ("04_score_thresholds", "reported_thresholds", list(E_THRESHOLDS.values())),
        ("05_border_cells", "border_margin_px", BORDER_MARGIN_PX),
        ("06_postprocessing", "reported_thresholds", list(E_THRESHOLDS.values())),
        ("06_postprocessing", "size_factors", [list(pair) for pair in E_SIZE_FACTORS]),
    ],
)
def test_a_parameter_that_repeats_a_value_of_the_packages_equals_it(notebook, name, value):
    assert parameters_of(ROOT / "notebooks" / f"{notebook}.ipynb")[name] == value


@pytest.mark.parametrize("number", ["00", "03", "04", "05", "06", "08"])
def test_an_analysis_starts_without_torch(number):
    path = next(path for path in NOTEBOOKS if path.stem.startswith(number))
    imports = source(next(cell for cell in cells_of(path) if cell["cell_type"] == "code"))
    code = f"{imports}\nimport sys\nassert not {{'torch', 'torchvision'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
