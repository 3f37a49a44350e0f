PYTHON ?= python3
VENV ?= .venv
PYTEST := $(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

QUESTION := A bus has 81 people. At one stop 29 get off and 58 get on. Then 7 get off. How many people are on the bus?

# A run starts a hundred processes, which read what Python compiled for the first.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-all lint types one-of-each one-of-each-quick one-of-each-others every-case test-fast test-pods test-gpu test-soak notebooks browser clean

# Answers a question with the model that comes with the package.
run: $(VENV)/.installed
	$(VENV)/bin/diffulex-jax generate --model embedded --strategy dmax --accept-threshold 0.5 --chat --prompt "$(QUESTION)"

# Lint, format, types, every notebook, and of every kind of test one: nine minutes on two cores.
test: lint
	@$(MAKE) --no-print-directory --jobs 3 --output-sync=target types one-of-each

# The same with every case of every test, which continuous integration runs: 21 minutes.
test-all: lint
	@$(MAKE) --no-print-directory --jobs 2 types every-case

lint: $(VENV)/.installed-dev browser
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed-dev
	$(VENV)/bin/mypy

# Side by side: while tests of one wait, or the last of a run ends, the others have both processors.
one-of-each: one-of-each-quick one-of-each-others

one-of-each-quick: $(VENV)/.installed-dev
	$(PYTEST) --one-of-each --compiled quick

one-of-each-others: $(VENV)/.installed-dev
	$(PYTEST) --one-of-each --compiled users
	$(PYTEST) --one-of-each --compiled least

every-case: $(VENV)/.installed-dev
	$(PYTEST) --compiled users
	$(PYTEST) --compiled quick
	$(PYTEST) --compiled least

# The tests without those that take long, in a minute and a half: rules, scheduler, pages, configs, checkpoints, settings, small kernels.
test-fast: $(VENV)/.installed-dev
	$(PYTEST) --one-of-each -m "not slow and not pods"

# What is compiled for every generation of TPUs and every pod that diffulex_jax/planning/pods.md lists. Half an hour.
test-pods: $(VENV)/.installed-dev
	$(VENV)/bin/pytest -n 2 --dist load tests/aot -m pods

# The kernels against their references on a Hopper GPU; PYTHON is one whose JAX sees it.
test-gpu:
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS=--xla_gpu_autotune_level=0 $(PYTHON) -m pytest -n 12 --maxschedchunk 1 tests/gpu

# The long tests: the same answers in every way of running, and what serving must stand. More than an hour, on a machine with nothing else to do.
test-soak: $(VENV)/.installed-dev
	$(PIP) "lm-eval[api]>=0.4.9"
	$(VENV)/bin/pytest -v --capture=no tests/soak/soak_every_answer.py tests/soak/soak_serving.py tests/soak/soak_lm_eval.py
	$(VENV)/bin/pytest -v --capture=no tests/soak/soak_meshes.py
	$(VENV)/bin/pytest -v --capture=no tests/soak/soak_loading.py
	$(VENV)/bin/pytest -v --capture=no tests/soak/soak_hosts.py
	$(VENV)/bin/pytest -v --capture=no tests/soak/soak_memory.py

# Runs the notebooks and stores their outputs.
notebooks: $(VENV)/.installed-dev
	JAX_PLATFORMS=cpu $(VENV)/bin/jupyter-execute --inplace notebooks/*.ipynb

# The page is tested in a real browser.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		{ apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver; }

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Stamps: nothing is installed again until pyproject.toml changes.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable ".[dev]"
	touch $@ $(VENV)/.installed
