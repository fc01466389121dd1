# Everything runs from the virtual environment in .venv. Each target first makes it if it is missing or if pyproject.toml
# or the C file has changed. Variables may be set on the command line: make extract DATA='my images'
# The shell gets each variable as one word, as it was typed; only ARGS may be several words, or none.
PYTHON   ?= python3
DATA     ?= sample:digits
BACKBONE ?= mobilenetv2
FEATURES ?= features.h5
HEAD     ?= dropout-linear
RUNS     ?= runs
PREDICTIONS ?= predictions.csv
ARGS     ?=
TORCH    ?= torch
ifeq ($(origin RUN),undefined)
RUN := $(value RUNS)
endif
ifeq ($(origin IMAGES),undefined)
IMAGES := $(value DATA)
endif

VARIABLES := PYTHON TORCH DATA BACKBONE FEATURES HEAD RUNS RUN IMAGES PREDICTIONS NAME
unexport $(VARIABLES)
# Without bytecode each of some 500 processes of the tests would compile the packages again, and times would be those of no user.
unexport PYTHONDONTWRITEBYTECODE
quoted = $(subst '~/,~/','$(subst ','\'',$(value $(1)))')

VENV := .venv
FLOOR := .venv-floor
STAGES := cluster,openvino,onnx-backbones
TESTING := pytest pytest-timeout
BIN  := $(VENV)/bin
RUNNER := $(BIN)/python -m pipeline

.DEFAULT_GOAL := help
.PHONY: help setup demo extract train-head finetune predict evaluate leaderboard report preview export recipe cluster-demo stress-cluster check test-fast test-floor test-jax test-torch test stress bench gpu-check dist clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'
	@printf '  variables:'; printf ' %s' $(foreach name,$(filter-out PYTHON TORCH NAME,$(VARIABLES)),$(name)=$(call quoted,$(name))) 'ARGS="..."'; echo

# uv installs in a fraction of the time; pip does it where uv cannot (a private index that only pip knows).
$(VENV)/.installed: pyproject.toml $(wildcard features/pixels/*.c)
	@$(call quoted,PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "Python 3.11 to 3.13 is needed, %s.%s found: make PYTHON=python3.12 ..." % v)'
	@test -x $(BIN)/python || $(call quoted,PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "could not make $(VENV) (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "installing into $(VENV) (TensorFlow is a large download; this happens once)" >&2
	@{ $(BIN)/python -m pip install --quiet --disable-pip-version-check uv && $(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'; } 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

setup: $(VENV)/.installed  ## make the virtual environment and install the project into it

demo: extract train-head finetune  ## run the three stages, on scikit-learn's digits unless DATA is set

extract: setup  ## stage one: compute the features of DATA and keep them in FEATURES
	$(RUNNER) extract $(call quoted,DATA) --out $(call quoted,FEATURES) --backbone $(call quoted,BACKBONE) $(ARGS)

train-head: setup  ## stage two: train HEAD on FEATURES; writes a run folder into RUNS
	$(RUNNER) train-head $(call quoted,FEATURES) --head $(call quoted,HEAD) --runs $(call quoted,RUNS) $(ARGS)

finetune: setup  ## stage three: fine-tune the last block, starting from a run in RUN that can be fine-tuned
	$(RUNNER) finetune $(call quoted,RUN) --images $(call quoted,DATA) $(ARGS)

predict: setup  ## write classes and probabilities of IMAGES by the chosen run in RUN to PREDICTIONS
	$(RUNNER) predict $(call quoted,RUN) $(call quoted,IMAGES) --out $(call quoted,PREDICTIONS) $(ARGS)

evaluate: setup  ## score the chosen run in RUN on the labelled images IMAGES: accuracy, confusion, each class, calibration
	$(RUNNER) evaluate $(call quoted,RUN) $(call quoted,IMAGES) $(ARGS)

leaderboard: setup  ## print the table of runs, best first
	$(RUNNER) leaderboard $(call quoted,RUNS) $(ARGS)

report: setup  ## write a page about all runs: report.html
	$(RUNNER) report $(call quoted,RUNS) --out report.html $(ARGS)

preview: setup  ## draw what the network will see of DATA: preview.png
	$(RUNNER) preview $(call quoted,DATA) --out preview.png $(ARGS)

export: setup  ## export the chosen run in RUN, from pixels to probabilities (ARGS="--format onnx --out model.onnx")
	$(RUNNER) export $(call quoted,RUN) $(ARGS)

recipe: setup  ## run a published experiment on DATA: make recipe NAME=mobilenetv2-cats-dogs DATA=my/photos
	$(RUNNER) recipe $(call quoted,NAME) $(call quoted,DATA) $(ARGS)

cluster-demo: setup  ## start a cluster on this machine, kill one of its three workers, compare the store
	$(BIN)/python tests/benchmarks/cluster_demo.py $(ARGS)

stress-cluster: setup  ## kill workers 20 times and the scheduler 3 times, compare the stores (minutes)
	$(BIN)/python tests/benchmarks/stress_cluster.py $(ARGS)

check: setup  ## run ruff, mypy and the architecture test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

test-fast: setup  ## run the tests that need no TensorFlow, in about 20 s
	$(BIN)/python -m pytest -q -m "not slow" -n auto $(ARGS)

$(FLOOR)/.installed: pyproject.toml $(wildcard features/pixels/*.c)
	@test -x $(FLOOR)/bin/python || $(call quoted,PYTHON) -m venv $(FLOOR)
	@echo "installing the lowest declared versions into $(FLOOR) (TensorFlow is a large download)" >&2
	@$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(FLOOR)/bin/uv pip install --quiet --python $(FLOOR)/bin/python --upgrade --resolution lowest-direct -e '.[dev]'
	@touch $@

test-floor: $(FLOOR)/.installed  ## run the fast tests with the lowest versions that pyproject.toml allows
	$(FLOOR)/bin/python -m pytest -q -m "not slow" -n auto $(ARGS)

# Environments without TensorFlow, which is a dependency for everyone else: uv leaves it out, pip takes it away again.
.venv-jax/.installed: pyproject.toml $(wildcard features/pixels/*.c)
	@test -x .venv-jax/bin/python || $(call quoted,PYTHON) -m venv .venv-jax
	@echo "installing JAX and the project into .venv-jax" >&2
	@{ .venv-jax/bin/python -m pip install --quiet --disable-pip-version-check uv && echo 'tensorflow; python_version < "3"' > .venv-jax/without.txt && .venv-jax/bin/uv pip install --quiet --python .venv-jax/bin/python --overrides .venv-jax/without.txt -e '.[jax,$(STAGES)]' $(TESTING); } 2>/dev/null \
		|| { .venv-jax/bin/python -m pip install --quiet --disable-pip-version-check -e '.[jax,$(STAGES)]' $(TESTING) && .venv-jax/bin/python -m pip uninstall --quiet --yes tensorflow; }
	@touch $@

.venv-torch/.installed: pyproject.toml $(wildcard features/pixels/*.c)
	@test -x .venv-torch/bin/python || $(call quoted,PYTHON) -m venv .venv-torch
	@echo "installing PyTorch and the project into .venv-torch (from PyPI that is several GB; TORCH=... names another build)" >&2
	@.venv-torch/bin/python -m pip install --quiet --disable-pip-version-check $(call quoted,TORCH) -e '.[$(STAGES)]' $(TESTING)
	@.venv-torch/bin/python -m pip uninstall --quiet --yes tensorflow
	@touch $@

test-jax: .venv-jax/.installed  ## run the tests of all stages with JAX, without TensorFlow
	KERAS_BACKEND=jax .venv-jax/bin/python -m pytest -q tests/test_without_tensorflow.py tests/test_logistic.py $(ARGS)

test-torch: .venv-torch/.installed  ## run the tests of all stages with PyTorch, without TensorFlow
	KERAS_BACKEND=torch .venv-torch/bin/python -m pytest -q tests/test_without_tensorflow.py tests/test_logistic.py tests/test_torch_graph.py $(ARGS)

test: setup  ## run all tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

stress: setup  ## kill a real extraction 50 times, flip thousands of bits (minutes)
	$(BIN)/python tests/benchmarks/stress.py
	STRESS=1 $(BIN)/python -m pytest -q -m stress --timeout 3600 $(ARGS)

bench: setup  ## run the benchmarks and print ratios (three quarters of an hour); see tests/benchmarks/README.md
	$(BIN)/python tests/benchmarks/bench_reuse.py
	$(BIN)/python tests/benchmarks/bench_extract.py --json bench-mobilenetv2.json
	$(BIN)/python tests/benchmarks/bench_process.py --json bench-process.json
	$(BIN)/python tests/benchmarks/bench_bank.py
	$(BIN)/python tests/benchmarks/bench_tasks.py
	$(BIN)/python tests/benchmarks/bench_answers.py
	$(BIN)/python tests/benchmarks/bench_finetune.py --json bench-finetune.json
	$(BIN)/python tests/benchmarks/bench_cluster.py bench-cluster.json
	$(BIN)/python tests/benchmarks/bench_extract.py --json bench-vgg16.json --backbone vgg16 --size 224 --limit 200 --rounds 3

gpu-check:  ## check a GPU machine with torch and JAX, in minutes; see tests/benchmarks/gpu/README.md
	bash tests/benchmarks/gpu/on_device.sh $(ARGS)

docs: setup  ## build the documentation site in build/site, from the pages of the packages and the docstrings
	$(BIN)/python .docs/build.py

dist: setup  ## build the sdist and the wheel of this commit into dist/
	.ci/dist

clean:  ## remove the virtual environment and caches; features and runs are kept
	rm -rf $(VENV) $(FLOOR) .venv-jax .venv-torch .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
