"""The study as jobs: what runs again and what does not, that nothing outlives it, and that a
failure is named in a sentence.
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
import pandas as pd
import psutil
import pytest
import yaml

from cellseg_helpers import jobs
from cellseg_helpers.config import ROOT
from study import __main__ as study
from study.runs import FINALS, parameter_files

KEYS = (*FINALS, "e/full+proposals")
LAST = ("08_report_tables", "09_findings")
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
    for name in ("profiles", "cellseg_helpers", "study"):
        no_cache = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=no_cache)
    for file in {file for key in KEYS for file in parameter_files(key, "quick")}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    for name in set(re.findall(r"\b\d\d_[a-z_]+", (ROOT / "Snakefile").read_text())):
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "")
    return tmp_path


def call(tree: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    options = {"cwd": tree, "env": environment, "text": True, "timeout": SECONDS}
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, **options)


def plan(tree: Path) -> list[str]:
    """The planned jobs, without their reasons."""
    said = call(tree, "study", "plan")
    assert said.returncode == 0, said.stdout + said.stderr
    lines = said.stdout.splitlines()
    assert "jobs would run:" in lines[0] or "Nothing to be done" in said.stdout
    return [re.split(r"\s{2,}", line)[0] for line in lines if re.match(r"\d\d_", line)]


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
    assert plan(tree) == []
    changed.write_text(changed.read_text() + "batch_size: 3\n")
    run = "quick-drawn-c-final-seed0"
    assert plan(tree) == [f"02_train {run}", f"03_evaluate {run}", f"07_predict_test {run}", *LAST]

    base = tree / "params" / "reports" / "e" / "full.yaml"  # a variant stands on it
    base.write_text(base.read_text() + "batch_size: 3\n")
    listed = plan(tree)
    variants = {f"02_train quick-drawn-e-{name}-seed0" for name in ("full", "full+proposals")}
    assert variants < set(listed) and "01_explore_data" not in listed
    assert not [line for line in listed if re.search("-(a|b|d)-", line)]


def test_what_a_killed_process_forked_ends_even_before_it_could_look():
    code = (
        "import os, signal, time; from cellseg_helpers.jobs import end_forks_too\n"
        "end_forks_too(); child = os.fork()\n"
        "if child: print(child, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"time.sleep({2 * SECONDS})"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as killed:
        child = int(killed.stdout.readline())
        assert killed.wait() == -signal.SIGKILL
        wait_until(lambda: child not in running())


def running() -> set[int]:
    processes = psutil.process_iter(["status"])
    return {process.pid for process in processes if process.info["status"] != "zombie"}


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
        second = call(tree, "study", "run")
        assert second.returncode == 2 and len(second.stderr.splitlines()) == 1
        assert second.stderr.startswith("another study runs in this folder (process ")
    finally:
        make.send_signal(signal.SIGKILL)
        make.wait()
    wait_until(lambda: not any(psutil.pid_exists(process.pid) for process in family[1:]))
    wait_until(lambda: not any(psutil.pid_exists(int(file.name)) for file in pids.iterdir()))
    assert {"00_overview", "01_explore_data"} < set(plan(tree))  # half done; and no lock is left


def test_failures_are_named_in_a_sentence_and_the_other_jobs_go_on(tree):
    fails = "raise ValueError('the\\nloss ' + 50 * 'is not finite ')"
    write_notebook(tree / "notebooks" / "02_train.ipynb", fails, "run_name = ''")
    tables = [
        f"../outputs/tables/01_{name}.csv" for name in ("data_summary", "classes", "patients")
    ]
    explore = f"for file in {tables}: open(file, 'w').close()"
    write_notebook(tree / "notebooks" / "01_explore_data.ipynb", explore, "data = ''")
    other, killed = (
        tree / "outputs" / "runs" / f"quick-drawn-{name}-seed0"
        for name in ("e-full", "a-resnet101")
    )
    other.mkdir(parents=True)
    (other / "settings.json").write_text('{"epochs": 99}')
    killed.mkdir()
    (killed / "last.pt").touch()
    said = call(tree, "study", "run")
    assert said.returncode == 1 and "2 of 28 steps" in said.stderr
    *_, failures = said.stdout.split("What does not depend on these failures is done:\n")
    (*failures, last) = failures.splitlines()
    assert len(failures) == len(KEYS) and last == "The same command goes on from here."
    assert failures[2].startswith(
        "- 02_train quick-drawn-c-final-seed0: ValueError: the loss is not finite is not"
    )
    failed = "outputs/logs/quick-drawn/02_train/quick-drawn-c-final-seed0.ipynb"
    assert f"... (all of it in {failed})" in said.stderr and (tree / failed).exists()
    assert "Traceback" not in said.stdout + said.stderr
    assert re.search(r"01_explore_data +1 +\d", said.stdout)  # time of each notebook's jobs
    times = pd.read_csv(tree / "outputs" / "quick-drawn-times.csv", index_col="job")
    assert list(times.index) == ["00_overview", "01_explore_data"]
    assert (times[["s", "max_rss"]] > 0).all(axis=None)
    assert (killed / "last.pt").exists()  # to go on from
    assert not other.exists() and (other.parent / f"{other.name}.old-1" / "settings.json").exists()


def test_a_job_whose_kernel_was_killed_is_a_failure_too(tmp_path):
    notebook, log, output = (tmp_path / f"{name}.ipynb" for name in ("note", "log", "out"))
    write_notebook(notebook, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert "Kernel died" in jobs.run(notebook, log, output, {}) and not output.exists()
    said = jobs.describe_failure(log)
    assert said == "it was ended from outside, perhaps because memory ran out"


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
    figures = ["A-Fig3", "B-Fig1", "C-Fig3", "D-Fig2", "E-Fig1", "E-sweep", "08_verdicts"]
    counts = {"A": 3, "B": 5, "C": 3, "D": 4, "E": 4}
    names = [f"{report}-T{n + 1}" for report, count in counts.items() for n in range(count)]
    tables = {"08_report_tables": names + figures, "09_findings": ["findings"]}
    for notebook, files in tables.items():
        code = f"for name in {files}: open(f'../outputs/tables/{{name}}.csv', 'w').close()"
        path = tree / "notebooks" / f"{notebook}.ipynb"
        write_notebook(path, code, "runs_dir = study = ''; seeds = 0")
    said = call(tree, "study", "run")
    assert said.returncode == 1
    assert "- 02_train quick-drawn-c-final-seed0: ValueError: no\n" in said.stdout
    assert "The tables of the runs that succeeded; an empty cell has its reason." in said.stdout
    written = {path.stem for path in (tree / "outputs/tables").iterdir()}
    assert set(sum(tables.values(), [])) <= written
    assert (tree / "outputs" / "quick-drawn.html").stat().st_size
    # with the run that was missing, they are made anew
    assert {"02_train quick-drawn-c-final-seed0", *LAST} < set(plan(tree))


def test_a_job_writes_its_notebook_whole_or_not_at_all(tmp_path):
    notebook, log = tmp_path / "note.ipynb", tmp_path / "log" / "note.ipynb"
    output = tmp_path / "out" / "note.ipynb"
    (tmp_path / "first.yaml").write_text("x: 1\ny: [1, 2]\n")
    (tmp_path / "second.yaml").write_text("x: 2\n")
    write_notebook(notebook, "assert os.path.exists(running)\nprint(x, y, repr(z), n)")
    options = ["-f", str(tmp_path / "first.yaml"), str(tmp_path / "second.yaml")]
    options += ["-r", "z", "1", "-p", "n", "3", "--page", str(tmp_path / "note.html")]
    command = ("cellseg_helpers.jobs", str(notebook), str(log), str(output), "-r", "running")
    assert call(ROOT, *command, str(log), *options).returncode == 0
    (shown,) = nbformat.read(output, 4).cells[-1].outputs
    assert shown.text == "2 [1, 2] '1' 3\n"
    assert sorted(path.name for path in output.parent.iterdir()) == [".note.lock", "note.ipynb"]
    html = (tmp_path / "note.html").read_text()
    assert "2 [1, 2] '1' 3" in html and "repr" not in html.split("</head>")[-1]

    said = call(ROOT, *command, "nowhere")
    assert said.returncode == 1
    assert f"note failed: AssertionError (all of it in {log})" in said.stderr.splitlines()[-1]
    assert nbformat.read(output, 4).cells[-1].outputs == [shown]  # the good one stays


def test_a_jobs_kernel_has_no_names_of_ours(tmp_path):
    notebook, log, output = (tmp_path / f"{name}.ipynb" for name in ("note", "log", "out"))
    write_notebook(notebook, "print({'end_with', 'end_forks_too'} & set(globals()))")
    assert jobs.run(notebook, log, output, {}) == ""
    (shown,) = nbformat.read(output, 4).cells[-1].outputs
    assert shown.text == "set()\n"


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
    assert study.main(["plan", *options]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_slurm_needs_its_plugin(monkeypatch, capsys):
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    needs = r"needs snakemake-executor-plugin-slurm, which is not installed; .*--group slurm"
    monkeypatch.delenv("MAKELEVEL", raising=False)
    assert study.main(["plan", "--profile", "slurm"]) == 2
    assert re.search(needs, capsys.readouterr().err)
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    rules = re.findall(r"^rule (\w+):", (ROOT / "Snakefile").read_text(), re.MULTILINE)
    assert set(profile["set-resources"]) | set(profile["set-threads"]) <= set(rules)
