# make quickstart   experts, then gates over them, then one table (needs the package index once, afterwards works offline)
# make test         every test
# make cluster      tests on a real Slurm on this machine (Debian: slurmctld slurmd slurm-client munge), a quarter of an hour
# make lint         ruff and mypy
# make clean        remove the environment and the quickstart's runs

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

RUNS := runs/quickstart
Q := configs/quickstart/radargate.yaml
RADARGATE := $(BIN)/radargate

export TOKENIZERS_PARALLELISM ?= false

.PHONY: install quickstart test cluster lint clean
.DEFAULT_GOAL := install

install: $(STAMP)

# The stamp is newer than both files after a complete install: a second make needs no network.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[quickstart,dev]'
	touch $@

# Every line below can be typed by hand. "--overwrite true" replaces the runs of an earlier quickstart.
quickstart: $(STAMP)
	$(RADARGATE) fit --config configs/quickstart/experts.yaml --overwrite true
	$(RADARGATE) fit --config $(Q) --overwrite true
	$(RADARGATE) fit --config $(Q) --config configs/gates/stretch.yaml --trainer.default_root_dir $(RUNS)/stretch --overwrite true
	$(RADARGATE) validate --config $(Q) --config configs/gates/task.yaml --model.network.experts '[]' --trainer.default_root_dir $(RUNS)/frozen --overwrite true
	$(RADARGATE) validate --config $(Q) --config configs/gates/uniform.yaml --trainer.default_root_dir $(RUNS)/uniform --overwrite true
	$(RADARGATE) validate --config $(Q) --config configs/gates/task.yaml --trainer.default_root_dir $(RUNS)/task --overwrite true
	$(BIN)/python -m radargate_pl.report --quickstart $(RUNS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

cluster: $(STAMP)
	$(BIN)/python -m pytest -q -n 0 -m cluster tests/cluster

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(RUNS)
