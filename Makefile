# Two commands: `make demo` and `make test`. Both make the environment first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check golden env data clean

demo: $(STAMP) data ## the whole pipeline on this machine, with the result at the end
	$(VENV)/bin/rlhf run

test: $(STAMP) data ## style, types, layers, and all tests in two workers (one file: python -m pytest tests/...)
	$(MAKE) --no-print-directory check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

golden: $(STAMP) ## record the trainers' curves again, after a change that is meant to move them
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python -m support.golden

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev,parity]" -c constraints.txt
	touch $(STAMP)

data: $(STAMP)
	@test -n "$$(ls data 2>/dev/null)" || $(VENV)/bin/dvc pull --quiet data.dvc

clean: ## what runs left behind; the environment stays
	-$(VENV)/bin/rlhf down
	rm -rf .rlhf runs artifacts reports/html reports/report.html reports/summary.json dvc_plots
