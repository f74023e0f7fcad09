# make demo   train ResNet18 on real digits until it collapses
# make test   run the tests that cover every kind of thing once      make test-all   run the full matrices too
# Both make the environment (.venv) first where it is missing. Needs Python 3.10 or newer and make, nothing else.
# CONTRIBUTING.md lists all commands.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed

NUMBERED = $(addprefix figure-,4 9 8 7 6 3 2 1)

.PHONY: help demo language-model test test-all coverage test-browser test-oldest test-newest package soak lint types docs figures gallery \
	benchmarks mutation clean $(NUMBERED)

help:
	@sed '/^$$/q; s/^# //' Makefile

demo: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python examples/resnet18.py fit --config examples/configs/digits.yaml $(ARGS)

language-model: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python examples/language_model.py $(ARGS)

# One thread: the models are small, and several threads, or processes with several each, only wait for each other.
# JOBS=8 runs eight tests at a time.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL = -n $(JOBS) --dist worksteal
QUICK = not slow and not browser and not soak

test: $(INSTALLED)
	$(PYTEST) $(PARALLEL) -m "$(QUICK)" $(ARGS)

test-all: $(INSTALLED)
	$(PYTEST) $(PARALLEL) -m "not browser and not soak" $(ARGS)

# Lines and branches of the package that make test reaches, in the processes that it starts too.
coverage: $(INSTALLED)
	$(PYTEST) $(PARALLEL) -m "$(QUICK)" --cov --cov-report=term --cov-report=json $(ARGS)

# The report in headless Chromium. On Debian and Ubuntu: apt-get install chromium chromium-driver.
test-browser: $(INSTALLED)
	$(PYTEST) -m browser tests/test_browser.py $(ARGS)

# In environments of their own, with Python 3.10 and the oldest releases, and with the newest of everything: see noxfile.py.
test-oldest test-newest: test-%: $(INSTALLED)
	$(BIN)/nox --error-on-missing-interpreters -s tests-$* -- $(PARALLEL) $(ARGS)

# Wheel and sdist, in dist/, and what an installed wheel can do.
package: $(INSTALLED)
	.ci/package $(BIN)/python

# Drawn trainings and faults by plan, about ten minutes by default: make soak ARGS="--examples 200 --minutes 20"
soak: $(INSTALLED)
	$(PYTEST) -m soak tests/soak $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check lightning_nc tests examples benchmarks
	$(BIN)/codespell
	$(BIN)/codespell --dictionary .ci/private.txt --regex "def fold\b|[\w-]+"  # codespell:ignore
	VENV=$(VENV) .ci/lint-workflows

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# The pictures of docs/ufm.md, docs/metrics.md and docs/gallery.md; make -j2 figures draws two at a time.
UFM = OMP_NUM_THREADS=1 $(BIN)/python examples/ufm.py --out docs/figures

figures: $(NUMBERED) gallery
	$(UFM) --theorem 5.1
	$(UFM) --sweep lambda-b
	$(UFM) --model linear --loss cross-entropy --seeds 8 --iterations 100000 --every 5000
	OMP_NUM_THREADS=1 $(BIN)/python examples/measures.py --out docs/images

gallery: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python examples/gallery.py --out docs/images/gallery

$(NUMBERED): figure-%: $(INSTALLED)
	$(UFM) --figure $*

# Changes the formulas in one place at a time and lists the changes that no test notices. It takes an hour or more on one core.
mutation: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python .ci/mutation.py $(ARGS)

# Prints the tables of docs/costs.md and docs/peers.md; ARGS=--write puts them into the pages. About half an hour.
benchmarks: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/costs.py $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/overhead.py --rounds 5
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/long_run.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/report.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ufm.py --repeats 3

# A torch that was built locally (2.13.0+cpu, say) satisfies torchvision's demand for 2.13.0, but the two do not import
# together. Then the torch of the same version that torchvision was built against takes its place.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; found $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[all]"
	@$(BIN)/python -c "import torchvision" || $(BIN)/python -m pip install --quiet --force-reinstall \
		"torch===$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch").split("+")[0])')"
	@$(BIN)/python -c "import torchvision"
	@touch $@

# What make builds. What a training, a download or make mutation has written stays.
clean:
	rm -rf $(VENV) docs/_build dist .nox .mypy_cache .pytest_cache .ruff_cache .coverage* coverage.json
