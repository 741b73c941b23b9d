PYTHON ?= python3
DATA ?= drawn
SCALE ?= quick
RUN ?= $(SCALE)-$(notdir $(patsubst %/,%,$(DATA)))

BIN := .venv/bin
OUT := outputs/notebooks/$(RUN)
PAPERMILL := $(BIN)/papermill --cwd notebooks
ANALYSES := 03_evaluate 04_score_thresholds 05_border_cells 06_postprocessing 07_predict_test

.PHONY: study test lab data install lock nbdime

## Run the notebooks in order on DATA (an HW3 folder; "drawn" is the embedded tissue) at SCALE (quick or full).
study: install nbdime
	mkdir -p $(OUT)
	$(PAPERMILL) notebooks/00_overview.ipynb $(OUT)/00_overview.ipynb
	$(PAPERMILL) notebooks/01_explore_data.ipynb $(OUT)/01_explore_data.ipynb -r data "$(DATA)"
	$(PAPERMILL) notebooks/02_train.ipynb $(OUT)/02_train.ipynb -f params/$(SCALE).yaml -r data "$(DATA)" -r run_name "$(RUN)"
	for notebook in $(ANALYSES); do \
		$(PAPERMILL) notebooks/$$notebook.ipynb $(OUT)/$$notebook.ipynb -r run_dir "outputs/runs/$(RUN)" || exit 1; \
	done
	@echo "Tables:             outputs/tables/"
	@echo "Cells:              outputs/cells/$(RUN)/"
	@echo "Submission:         outputs/submissions/$(RUN)/"
	@echo "Executed notebooks: $(OUT)/"
	@echo "The run:            outputs/runs/$(RUN)/"

## The whole test suite, the notebooks' committed outputs included.
test: install
	$(BIN)/pytest --nbval --nbval-current-env

## JupyterLab, with nbdime as the repository's notebook diff and merge.
lab: install nbdime
	$(BIN)/jupyter lab

## MoNuSAC 2020 from its public copy, in the HW3 layout, into outputs/monusac (needs a network).
data: install
	$(BIN)/python -m cellseg_helpers.data.monusac download outputs/monusac

## Compile the one list of pinned versions anew.
lock: install
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --fork-strategy fewest \
		--no-header --no-annotate --no-emit-index-url --upgrade --quiet --output-file requirements.txt

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; make PYTHON=python3.12 names another")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.txt)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

nbdime: install
	@if git rev-parse --git-dir >/dev/null 2>&1; then \
		git config diff.jupyternotebook.command '"$(CURDIR)/$(BIN)/git-nbdiffdriver" diff'; \
		git config merge.jupyternotebook.driver '"$(CURDIR)/$(BIN)/git-nbmergedriver" merge %O %A %B %L %P'; \
		git config merge.jupyternotebook.name 'nbdime notebook merge'; \
	fi
