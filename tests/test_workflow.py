"""The study as jobs: what runs again and what does not, that nothing outlives it, and that a
failure is told in a sentence.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from cellseg_helpers import jobs
from cellseg_helpers.config import ROOT
from study import runs as study

KEYS = (*study.FINALS, "e/full+proposals")
LAST = ("08_report_tables", "09_findings", "page")
SECONDS = 120  # for what takes a few, on a busy machine

WAITS = """
import os, time
from pathlib import Path
from torch.utils.data import DataLoader
class Rows:
    def __len__(self): return 8
    def __getitem__(self, i):
        Path(pids, str(os.getpid())).touch()
        time.sleep(0.2)
        return i
Path(pids, str(os.getpid())).touch()
while True:
    list(DataLoader(Rows(), num_workers=2))
"""


def write_notebook(path: Path, code: str, parameters: str = "") -> None:
    cells = [
        nbformat.v4.new_code_cell("import os"),
        nbformat.v4.new_code_cell(parameters),
        nbformat.v4.new_code_cell(code),
    ]
    cells[1].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def wait_until(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


@pytest.fixture
def tree(tmp_path) -> Path:
    """The project with its own Snakefile and package, few runs, and notebooks that do nothing."""
    for name in ("Snakefile", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    shutil.copytree(
        ROOT / "cellseg_helpers",
        tmp_path / "cellseg_helpers",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for file in {file for key in KEYS for file in study.parameter_files(key, "quick")}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    for name in set(re.findall(r"\b\d\d_[a-z_]+", (ROOT / "Snakefile").read_text())):
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "")
    return tmp_path


def call(tree: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    options = {
        "cwd": tree,
        "env": environment,
        "capture_output": True,
        "text": True,
        "timeout": SECONDS,
    }
    return subprocess.run([sys.executable, "-m", *command], **options)


def plan(tree: Path) -> list[str]:
    """The planned jobs, without their reasons."""
    told = call(tree, "cellseg_helpers.jobs", "plan")
    assert told.returncode == 0, told.stdout + told.stderr
    return [re.split(r"\s{2,}", line)[0] for line in told.stdout.splitlines()[1:]]


def test_only_what_depends_on_a_changed_parameter_file_runs_again(tree):
    snakemake = ("snakemake", "--cores", "2")
    missing = call(tree, *snakemake, "--summary").stdout.splitlines()[1:]
    for line in missing:
        output = tree / line.split("\t")[0]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(line)
    done = call(tree, *snakemake, "--touch", "--forceall")  # as if every job had run
    assert done.returncode == 0, done.stderr

    changed = tree / "params" / "reports" / "c" / "final.yaml"
    changed.touch()
    assert plan(tree) == []  # "Nothing to do" is the first line
    changed.write_text(changed.read_text() + "batch_size: 3\n")
    run = "quick-drawn-c-final-seed0"
    assert plan(tree) == [f"02_train {run}", f"03_evaluate {run}", f"07_predict_test {run}", *LAST]

    base = tree / "params" / "reports" / "e" / "full.yaml"  # a variant stands on it
    base.write_text(base.read_text() + "batch_size: 3\n")
    listed = plan(tree)
    assert {
        "02_train quick-drawn-e-full-seed0",
        "02_train quick-drawn-e-full+proposals-seed0",
    } < set(listed)
    assert (
        not [line for line in listed if re.search("-(a|b|d)-", line)]
        and "01_explore_data" not in listed
    )


def test_what_a_killed_process_forked_ends_even_before_it_could_look():
    code = (
        "import os, signal, time; from cellseg_helpers.jobs import end_forks_too; end_forks_too(); child = os.fork()\n"
        "if child: print(child, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"time.sleep({2 * SECONDS})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as killed:
        child = int(killed.stdout.readline())
        assert killed.wait() == -signal.SIGKILL
        wait_until(
            lambda: (
                child
                not in [
                    each.pid
                    for each in psutil.process_iter(["status"])
                    if each.info["status"] != "zombie"
                ]
            )
        )


def test_nothing_outlives_a_killed_make(tree):
    pids = tree / "pids"
    pids.mkdir()
    for name in ("01_explore_data", "00_overview"):
        write_notebook(
            tree / "notebooks" / f"{name}.ipynb", f"pids = {str(pids)!r}" + WAITS, "data = ''"
        )
    environment = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    venv = Path(sys.executable).parent
    command = ["make", "study", f"BIN={venv}", "--old-file", ".venv/installed", "JOBS=2"]
    make = subprocess.Popen(command, cwd=tree, env=environment)
    try:
        wait_until(lambda: len(list(pids.iterdir())) >= 6)  # two kernels, two workers each
        family = [make, *psutil.Process(make.pid).children(recursive=True)]
        second = call(tree, "cellseg_helpers.jobs", "study")
        assert second.returncode == 2 and second.stderr.startswith(
            "another study runs in this folder (process "
        )
        assert len(second.stderr.splitlines()) == 1
    finally:
        make.send_signal(signal.SIGKILL)
        make.wait()
    wait_until(lambda: not any(psutil.pid_exists(process.pid) for process in family[1:]))
    wait_until(lambda: not any(psutil.pid_exists(int(file.name)) for file in pids.iterdir()))
    assert {"00_overview", "01_explore_data"} < set(plan(tree))  # half done; and no lock is left


def test_failures_are_told_in_a_sentence_and_the_other_jobs_go_on(tree):
    fails = "raise ValueError('the\\nloss ' + 50 * 'is not finite ')"
    write_notebook(tree / "notebooks" / "02_train.ipynb", fails, "run_name = ''")
    tables = [f"outputs/tables/01_{name}.csv" for name in ("data_summary", "classes", "patients")]
    explore = f"for file in {tables}:\n    os.makedirs('../outputs/tables', exist_ok=True); open('../' + file, 'w').close()"
    write_notebook(tree / "notebooks" / "01_explore_data.ipynb", explore, "data = ''")
    other, killed = (
        tree / "outputs" / "runs" / f"quick-drawn-{name}-seed0"
        for name in ("e-full", "a-resnet101")
    )
    other.mkdir(parents=True)
    (other / "settings.json").write_text('{"epochs": 99}')
    killed.mkdir()
    (killed / "last.pt").touch()
    told = call(tree, "cellseg_helpers.jobs", "study")
    assert told.returncode == 1
    assert (
        "2 of 28 jobs done, 26 left: " in told.stdout and f"{len(KEYS)} failures; " in told.stdout
    )
    failed = "outputs/notebooks/quick-drawn/02_train/quick-drawn-c-final-seed0.failed.ipynb"
    line = next(
        line
        for line in told.stdout.splitlines()
        if line.startswith("- 02_train quick-drawn-c-final-seed0: ")
    )
    assert "ValueError: the loss is not finite is not" in line and line.endswith(
        f"... (all of it in {failed})"
    )
    assert (tree / failed).exists() and "Traceback" not in told.stdout + told.stderr
    assert re.search(r"01_explore_data +1 +\d", told.stdout)  # time per kind of job
    assert (killed / "last.pt").exists()  # to go on from
    assert not other.exists() and (other.parent / f"{other.name}.old-1" / "settings.json").exists()


def test_after_a_failure_the_tables_have_what_is_there(tree):
    train = """
if "c-final" in run_name: raise ValueError("no")
open(f"../outputs/tables/02_{run_name}.csv", "w").close()
"""
    evaluate = """
name = os.path.basename(run_dir)
for table in ("summary", "classes", "curves", "mistakes"):
    open(f"../outputs/tables/03_{name}_{table}.csv", "w").close()
open(f"../{run_dir}/scores.json", "w").close()
"""
    write_notebook(tree / "notebooks" / "02_train.ipynb", train, "run_name = ''")
    write_notebook(tree / "notebooks" / "03_evaluate.ipynb", evaluate, "run_dir = ''")
    written = "for file in files: open('../outputs/tables/' + file + '.csv', 'w').close()"
    names = [
        *(
            f"{report}-T{n + 1}"
            for report, count in zip("ABCDE", (3, 5, 3, 4, 4), strict=True)
            for n in range(count)
        )
    ]
    tables = {
        "08_report_tables": [
            *names,
            "A-Fig3",
            "B-Fig1",
            "C-Fig3",
            "D-Fig2",
            "E-Fig1",
            "E-sweep",
            "08_verdicts",
        ],
        "09_findings": ["findings"],
    }
    for notebook, files in tables.items():
        write_notebook(
            tree / "notebooks" / f"{notebook}.ipynb",
            f"files = {files}\n{written}",
            "runs_dir = study = ''; seeds = 0",
        )
    told = call(tree, "cellseg_helpers.jobs", "study")
    assert (
        told.returncode == 1
        and "- 02_train quick-drawn-c-final-seed0: ValueError: no" in told.stdout
    )
    assert "The tables of the runs that are there; an empty cell has its reason." in told.stdout
    assert {f"{name}.csv" for files in tables.values() for name in files} <= {
        path.name for path in (tree / "outputs/tables").iterdir()
    }
    assert (tree / "outputs" / "quick-drawn.html").stat().st_size
    assert {"02_train quick-drawn-c-final-seed0", *LAST} < set(
        plan(tree)
    )  # with the run that was missing, they are made anew


def test_a_job_writes_its_notebook_whole_or_not_at_all(tmp_path):
    notebook, output, log = (
        tmp_path / "note.ipynb",
        tmp_path / "out" / "note.ipynb",
        tmp_path / "jobs.csv",
    )
    (tmp_path / "first.yaml").write_text("x: 1\ny: [1, 2]\n")
    (tmp_path / "second.yaml").write_text("x: 2\n")
    options = [
        "-f",
        str(tmp_path / "first.yaml"),
        str(tmp_path / "second.yaml"),
        "-r",
        "z",
        "1",
        "-p",
        "n",
        "3",
    ]
    write_notebook(notebook, "assert os.path.exists(running)\nprint(x, y, repr(z), n)")
    options += ["-r", "running", str(output.with_suffix(".running.ipynb")), "--log", str(log)]
    assert (
        call(ROOT, "cellseg_helpers.jobs", "run", str(notebook), str(output), *options).returncode
        == 0
    )
    (shown,) = nbformat.read(output, 4).cells[-1].outputs
    assert shown.text == "2 [1, 2] '1' 3\n"
    assert sorted(path.name for path in output.parent.iterdir()) == [".note.lock", "note.ipynb"]
    jobs.page(output, tmp_path / "note.html")
    html = (tmp_path / "note.html").read_text()
    assert "2 [1, 2] '1' 3" in html and "repr" not in html.split("</head>")[-1]
    header, row = log.read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert (
        values["job"] == "note"
        and 0 < float(values["start_seconds"]) <= float(values["seconds"])
        and not values["error"]
    )

    told = call(
        ROOT, "cellseg_helpers.jobs", "run", str(notebook), str(output), "-r", "running", "nowhere"
    )
    assert told.returncode == 1 and told.stderr.splitlines()[-1].startswith(
        "note failed: AssertionError (all of it in "
    )
    assert nbformat.read(output, 4).cells[-1].outputs == [shown]  # the good one stays
    assert (
        output.with_suffix(".failed.ipynb").exists()
        and not output.with_suffix(".running.ipynb").exists()
    )


def test_a_jobs_kernel_looks_for_garbage_more_seldom_and_has_no_names_of_ours(tmp_path):
    notebook, output = tmp_path / "note.ipynb", tmp_path / "out.ipynb"
    write_notebook(notebook, "print('gc' in globals())\nimport gc\nprint(gc.get_threshold()[0])")
    assert call(ROOT, "cellseg_helpers.jobs", "run", str(notebook), str(output)).returncode == 0
    (shown,) = nbformat.read(output, 4).cells[-1].outputs
    assert shown.text == "False\n10000\n"


def test_gpus_are_taken_one_a_job(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    first = jobs.take_gpu()
    assert jobs.gpus() == ["2"]  # all that this job sees
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    second = jobs.take_gpu()
    assert jobs.gpus() == ["5"] and first and second
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert jobs.gpus() == [] and jobs.take_gpu() is None


@pytest.mark.parametrize(
    "options, said",
    [
        (["--data", "nowhere"], "DATA=nowhere is no folder that holds train/"),
        (["--seeds", "0"], "SEEDS is 0, but must be at least 1"),
        (["--scale", "huge"], "unknown scale 'huge'"),
        (["--profile", "sturm"], "PROFILE=sturm has no profiles/sturm/config.yaml"),
    ],
)
def test_a_study_that_cannot_start_says_why(options, said, capsys, monkeypatch):
    monkeypatch.delenv("MAKELEVEL", raising=False)
    assert jobs.main(["plan", *options]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1


def test_slurm_needs_its_plugin(monkeypatch):
    monkeypatch.setattr(jobs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        jobs.StudyError,
        match=r"needs snakemake-executor-plugin-slurm, which is not installed; .*--group slurm",
    ):
        jobs.run_study("drawn", "quick", 1, "slurm", plan=True)
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    rules = re.findall(r"^rule (\w+):", (ROOT / "Snakefile").read_text(), re.MULTILINE)
    assert set(profile["set-resources"]) | set(profile["set-threads"]) <= set(rules)
