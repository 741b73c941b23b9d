"""Which notebook run feeds which table. `make study` runs it, `make plan` lists what would run and why.

    snakemake --cores 4 --config data=drawn scale=quick seeds=1        the same by hand; profiles/default holds the options

One papermill run a job (cellseg_helpers/jobs.py). A job's notebook so far is its `log`, also after a failure; it
becomes an output when every cell has run. Times and memory are its `benchmark`. A job runs again when

- an output is missing, or a job that it depends on has run;
- the content of a parameter file or of its notebook changed, the images did (by name, size and time), or a value of the
  command line below. A file that was only touched, or changed and changed back, does not count.

The package's code does not count: a corrected axis label would train everything anew. Where a change of code matters, delete
the run folders; for tables alone, `.venv/bin/snakemake --cores 4 --forcerun tables findings`. A finished training that runs again
under the same settings only reads its folder.

Snakemake removes a job's outputs before it starts it. So a training declares an empty file, `trained`, which Snakemake writes at
the very end, and never its checkpoint, from which it goes on, nor finished.json, by which `fit` knows that there is nothing left
to train.
"""

import hashlib
import os
import re
import shlex
import signal
import sys

from cellseg_helpers import jobs
from cellseg_helpers.config import resolve_path
from study import runs

DATA = os.path.normpath(str(config.get("data", "drawn")))
SCALE = config.get("scale", "quick")
SEEDS = int(config.get("seeds", 1))
STUDY = runs.study_name(SCALE, DATA)
RUNS = {runs.run_name(STUDY, key, seed): (key, seed) for key in runs.run_keys(SCALE) for seed in range(SEEDS)}
NOTEBOOKS, LOGS = f"outputs/notebooks/{STUDY}", f"outputs/logs/{STUDY}"
PARTIAL = config.get("partial", False)  # tables of what is there, after a failure
SCORED = [run for run in RUNS if not PARTIAL or os.path.exists(f"outputs/runs/{run}/scores.json")]
GPUS = len(jobs.gpus())
TRAINING_MB = min(2500 if SCALE == "quick" else 8000, jobs.memory_mb())

ANALYSED = [runs.run_name(STUDY, key, 0) for key in ("b/v2_backbone", "e/full")]  # the reports that asked 04 to 06's questions
FINALS = [runs.run_name(STUDY, key, 0) for key in runs.FINALS]
ANALYSES = {
    "04_score_thresholds": ["strategies", "sweep", "reported", "chosen", "gain", "optimism", "calibration", "counting"],
    "05_border_cells": ["contact", "filter", "dropped"],
    "06_postprocessing": ["phases", "steps", "effects", "total"],
}
REPORT_TABLES = [f"{report}-T{number + 1}" for report, numbers in zip("ABCDE", (3, 5, 3, 4, 4)) for number in range(numbers)]
REPORT_FIGURES = ["A-Fig3", "B-Fig1", "C-Fig3", "D-Fig2", "E-Fig1", "E-sweep"]  # those that have numbers

FOLDER = resolve_path(DATA).parent if DATA.endswith(".json") else resolve_path(DATA)
HAS_TESTS = DATA == "drawn" or (FOLDER / "test_release").is_dir()


def state_of(folder):
    """A digest of the names, sizes and times of all files below a folder."""
    files = [(path.as_posix(), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return hashlib.sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]).encode()).hexdigest()[:16]


DATA_STATE = "drawn" if DATA == "drawn" else state_of(FOLDER)
SUBMISSION = ["tables/07_{run}_submission.csv", "tables/07_{run}_images.csv", "submissions/{run}/test-results.zip"]

os.environ["STUDY_PROCESS"] = str(os.getpid())  # the jobs' parent: they end with it
JOB = f"exec {shlex.quote(sys.executable)} -m cellseg_helpers.jobs {{input.notebook}} {{log:q}} {{output.notebook:q}}"


def stop(number, frame):
    print("\nStopped. The same command goes on from here.", flush=True)
    os._exit(128 + number)  # the jobs end with this process


wildcard_constraints:
    run="|".join(map(re.escape, RUNS)),


onstart:
    if workflow.local_exec:  # on a cluster, Snakemake stops the jobs itself
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)


localrules:
    all,


rule explore:
    input:
        notebook="notebooks/01_explore_data.ipynb",
    output:
        tables=expand("outputs/tables/01_{table}.csv", table=["data_summary", "classes", "patients"]),
        notebook=f"{NOTEBOOKS}/01_explore_data.ipynb",
    log: f"{LOGS}/01_explore_data.ipynb"
    benchmark: f"{LOGS}/01_explore_data.tsv"
    message: "01_explore_data"
    params:
        data=DATA,
        data_state=DATA_STATE,
    priority: 100
    shell:
        JOB + " -r data {params.data:q}"


rule overview:
    input:
        notebook="notebooks/00_overview.ipynb",
    output:
        notebook=f"{NOTEBOOKS}/00_overview.ipynb",
    log: f"{LOGS}/00_overview.ipynb"
    benchmark: f"{LOGS}/00_overview.tsv"
    message: "00_overview"
    priority: 90
    shell:
        JOB


rule train:
    input:
        notebook="notebooks/02_train.ipynb",
        files=lambda wildcards: [path.as_posix() for path in runs.parameter_files(RUNS[wildcards.run][0], SCALE)],
    output:
        trained=touch("outputs/runs/{run}/trained"),
        table="outputs/tables/02_{run}.csv",
        notebook=f"{NOTEBOOKS}/02_train/{{run}}.ipynb",
    log: f"{LOGS}/02_train/{{run}}.ipynb"
    benchmark: f"{LOGS}/02_train/{{run}}.tsv"
    message: "02_train {wildcards.run}"
    params:
        data=DATA,
        data_state=DATA_STATE,
        seed=lambda wildcards: RUNS[wildcards.run][1],
    threads: max(1, min(4, os.cpu_count() // GPUS)) if GPUS else 1
    resources:
        gpu=min(1, GPUS),
        mem_mb=TRAINING_MB,
    priority: lambda wildcards: 20 if wildcards.run in ANALYSED + FINALS else 10
    shell:
        JOB + " --gpu --rename-other -f {input.files:q} -r data {params.data:q} -r run_name {wildcards.run:q}"
        " -p seed {params.seed} -p keep_checkpoint false"


rule evaluate:
    input:
        notebook="notebooks/03_evaluate.ipynb",
        trained="outputs/runs/{run}/trained",
        training=f"{NOTEBOOKS}/02_train/{{run}}.ipynb",
    output:
        scores="outputs/runs/{run}/scores.json",
        tables=expand("outputs/tables/03_{{run}}_{table}.csv", table=["summary", "classes", "curves", "mistakes"]),
        notebook=f"{NOTEBOOKS}/03_evaluate/{{run}}.ipynb",
    log: f"{LOGS}/03_evaluate/{{run}}.ipynb"
    benchmark: f"{LOGS}/03_evaluate/{{run}}.tsv"
    message: "03_evaluate {wildcards.run}"
    priority: 40
    shell:
        JOB + " -r run_dir outputs/runs/{wildcards.run:q}"


for analysis, names in ANALYSES.items():

    rule:
        name:
            analysis[3:]
        input:
            notebook=f"notebooks/{analysis}.ipynb",
            trained="outputs/runs/{run}/trained",
            training=f"{NOTEBOOKS}/02_train/{{run}}.ipynb",
        output:
            tables=[f"outputs/tables/{analysis[:2]}_{{run}}_{name}.csv" for name in names],
            notebook=f"{NOTEBOOKS}/{analysis}/{{run}}.ipynb",
        log: f"{LOGS}/{analysis}/{{run}}.ipynb"
        benchmark: f"{LOGS}/{analysis}/{{run}}.tsv"
        message: f"{analysis} {{wildcards.run}}"
        priority: 30
        shell:
            JOB + " -r run_dir outputs/runs/{wildcards.run:q}"


rule predict_test:
    input:
        notebook="notebooks/07_predict_test.ipynb",
        trained="outputs/runs/{run}/trained",
        training=f"{NOTEBOOKS}/02_train/{{run}}.ipynb",
    output:
        submission=[f"outputs/{file}" for file in SUBMISSION] if HAS_TESTS else [],
        notebook=f"{NOTEBOOKS}/07_predict_test/{{run}}.ipynb",
    log: f"{LOGS}/07_predict_test/{{run}}.ipynb"
    benchmark: f"{LOGS}/07_predict_test/{{run}}.tsv"
    message: "07_predict_test {wildcards.run}"
    resources:
        gpu=min(1, GPUS),
    priority: 30
    shell:
        JOB + " --gpu -r run_dir outputs/runs/{wildcards.run:q}"


rule tables:
    input:
        notebook="notebooks/08_report_tables.ipynb",
        scores=expand("outputs/runs/{run}/scores.json", run=SCORED),
        evaluations=expand(f"{NOTEBOOKS}/03_evaluate/{{run}}.ipynb", run=SCORED),
    output:
        tables=expand("outputs/tables/{table}.csv", table=[*REPORT_TABLES, *REPORT_FIGURES, "08_verdicts"]),
        page=f"outputs/{STUDY}.html",
        notebook=f"{NOTEBOOKS}/08_report_tables.ipynb",
    log: f"{LOGS}/08_report_tables.ipynb"
    benchmark: f"{LOGS}/08_report_tables.tsv"
    message: "08_report_tables"
    params:
        study=STUDY,
        seeds=SEEDS,
    shell:
        JOB + " --page {output.page:q} -r runs_dir outputs/runs -r study {params.study:q} -p seeds {params.seeds}"


rule findings:
    input:
        notebook="notebooks/09_findings.ipynb",
        scores=expand("outputs/runs/{run}/scores.json", run=SCORED),
        evaluations=expand(f"{NOTEBOOKS}/03_evaluate/{{run}}.ipynb", run=SCORED),
    output:
        table="outputs/tables/findings.csv",
        notebook=f"{NOTEBOOKS}/09_findings.ipynb",
    log: f"{LOGS}/09_findings.ipynb"
    benchmark: f"{LOGS}/09_findings.tsv"
    message: "09_findings"
    params:
        study=STUDY,
        seeds=SEEDS,
    resources:
        gpu=min(1, GPUS),
    shell:
        JOB + " --gpu -r runs_dir outputs/runs -r study {params.study:q} -p seeds {params.seeds}"


rule all:
    default_target: True
    input:
        rules.overview.output,
        rules.explore.output,
        expand(rules.train.output, run=RUNS),
        expand(rules.evaluate.output, run=RUNS),
        expand(rules.score_thresholds.output, run=ANALYSED),
        expand(rules.border_cells.output, run=ANALYSED),
        expand(rules.postprocessing.output, run=ANALYSED),
        expand(rules.predict_test.output, run=FINALS),
        rules.tables.output,
        rules.findings.output,
