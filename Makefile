PYTHON ?= python3
DATA ?= drawn
SCALE ?= quick
SEEDS ?= 1
PROFILE ?=
JOBS ?= 0

BIN := .venv/bin
STUDY = --data "$(DATA)" --scale "$(SCALE)" --seeds "$(SEEDS)" --profile "$(PROFILE)" --jobs "$(JOBS)"

.PHONY: study plan test bench lab data install lock nbdime

## Everything: the five reports' runs, their analyses and tables. DATA: an HW3 folder, or "drawn", the embedded tissue; SCALE:
## quick, sample or full; SEEDS: so many trainings of each run; JOBS: processors to use (0: all); PROFILE=slurm: as Slurm jobs.
study: install nbdime
	@exec $(BIN)/python -m study run $(STUDY)

## What `make study` would run, and why.
plan: install
	@exec $(BIN)/python -m study plan $(STUDY)

## Form and floors (ruff, import-linter), then every test, doctest and notebook output; a process for each processor, a file at a time.
test: install
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest --nbval --nbval-current-env --numprocesses auto --maxprocesses 8 --dist loadfile

## Speed and memory beside torchvision, pycocotools and tifffile, into outputs/bench.csv. DATA: real images in the HW3 layout.
bench: install
	$(BIN)/python -m bench $(if $(filter-out drawn,$(DATA)),--sample "$(DATA)")

## JupyterLab, with nbdime as the repository's notebook diff and merge.
lab: install nbdime
	$(BIN)/jupyter lab

## MoNuSAC 2020 from its public copy, in the HW3 layout, into outputs/monusac (needs a network).
data: install
	$(BIN)/python -m tools.monusac download outputs/monusac

## Compile the one list of pinned versions anew.
lock: install
	$(BIN)/uv pip compile pyproject.toml --extra test --extra install --universal --python-version 3.11 \
		--fork-strategy fewest --no-header --no-annotate --no-emit-index-url --upgrade --quiet --output-file requirements.txt

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; make PYTHON=python3.12 names another")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.txt)"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirements requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

nbdime: install
	@if git rev-parse --git-dir >/dev/null 2>&1; then \
		git config diff.jupyternotebook.command '"$(CURDIR)/$(BIN)/git-nbdiffdriver" diff'; \
		git config merge.jupyternotebook.driver '"$(CURDIR)/$(BIN)/git-nbmergedriver" merge %O %A %B %L %P'; \
		git config merge.jupyternotebook.name 'nbdime notebook merge'; \
	fi
