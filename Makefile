# Every target makes .venv when it is missing and installs what it needs; EXTRAS grow, nothing is reinstalled.
PYTHON ?= python3
VENV ?= .venv
PEERS_VENV ?= .venv-peers
BIN := $(VENV)/bin
DATA ?= data/glyphs
RUN ?= runs/glyphs_clip
# test processes; a file stays in one, so that its fixtures are made once
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo peers test test-fast build bench bench-compare bench-gpu lint typecheck format clean help
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# the setuptools of a new environment may be too old for the editable install; ninja compiles csrc/
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

# their pins hold torch and transformers back, hence an environment of its own; csrc/ is compiled for its torch as well
peers: $(PEERS_VENV)/.installed  ## PyLate, colpali-engine and the MaxSim libraries in .venv-peers, and the tests beside them
	$(PEERS_VENV)/bin/python -m pytest tests/kernels/test_pylate.py tests/kernels/test_colpali.py

$(PEERS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --upgrade pip setuptools wheel
	$(PEERS_VENV)/bin/python -m pip install --quiet --editable ".[peers]"
	@touch $@

demo: $(VENV)/.installed-train  ## prepare glyphs, train on two ranks under ZeRO-2, evaluate, print the table
	$(BIN)/python -m pairtile.engine.demo --data $(DATA) --run $(RUN)

test: $(VENV)/.installed-test  ## the whole test suite
	$(PYTEST)

test-fast: $(VENV)/.installed-test  ## without the tests that take more than 20 seconds
	$(PYTEST) -m "not slow"

build: $(VENV)/.installed-train  ## compile csrc/ for this machine ahead of the first use
	$(BIN)/python -c "from pairtile.kernels import build; print(build(verbose=True) or 'nothing was built: the torch backend serves')"

# ARGS="-k siglip" runs a part, BENCH_FULL=1 in the environment all rows; PAIRTILE_BENCH_BARS=1 makes a missed bar fail. Runs are kept in
# .benchmarks, pytest-benchmark's storage. A row that fails leaves the report of the others.
RESULTS := benchmarks/results
STAMP := $(shell date +%Y%m%d-%H%M%S)
bench: $(VENV)/.installed-bench  ## speed, memory and exactness beside others, and the report: 25 minutes on 2 cores
	@mkdir -p $(RESULTS)
	env -u OMP_NUM_THREADS $(BIN)/python -m pytest benchmarks $(ARGS) --benchmark-autosave \
		--benchmark-json=$(RESULTS)/$(STAMP).json; \
	status=$$?; $(BIN)/python -m pairtile.engine report $(RESULTS)/$(STAMP).json --out $(RESULTS)/$(STAMP) && exit $$status

# AGAINST=0003 or a file names another run than the last one; what is compared: benchmarks/regressions.py
bench-compare: $(VENV)/.installed-bench  ## fails where ours is slower than in the last `make bench`, relative to the others
	@mkdir -p $(RESULTS)
	env -u OMP_NUM_THREADS $(BIN)/python -m pytest benchmarks $(ARGS) --benchmark-json=$(RESULTS)/$(STAMP).json \
		--benchmark-compare$(if $(AGAINST),=$(AGAINST)) --benchmark-compare-fail=median:15%

# at most 8 minutes; without a GPU it says so and fails. benchmarks/gpu/README.md
bench-gpu: $(VENV)/.installed-bench  ## the same on a GPU, beside siglip-kernel, memeff, cut-cross-entropy and others
	folder=$$($(BIN)/python -m benchmarks.gpu) && \
		$(BIN)/python -m pytest benchmarks/gpu $(ARGS) --benchmark-json=$$folder/results.json

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory typecheck

# mypy does not follow the folder mapping of pyproject.toml: give it a tree with the installed names
typecheck: $(VENV)/.installed-dev
	@mkdir -p build/typing/pairtile
	@for part in kernels engine csrc; do ln -sfn ../../../$$part build/typing/pairtile/$$part; done
	@ln -sfn ../../../benchmarks/drawn build/typing/pairtile/report
	MYPYPATH=build/typing $(BIN)/mypy -p pairtile.kernels -p pairtile.engine -p pairtile.report

format: $(VENV)/.installed-dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built; runs and data stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
