# make demo   train ResNet18 on real digits until it collapses      make test   run the tests
# Both make the environment (.venv) first where it is missing. Needs Python 3.10 or newer and make, nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed

.PHONY: demo test lint types docs examples benchmarks clean

demo: $(INSTALLED)
	$(BIN)/python examples/resnet18.py fit $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check lightning_nc tests examples benchmarks

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

benchmarks: $(INSTALLED)
	$(BIN)/python benchmarks/moments.py
	$(BIN)/python benchmarks/exact_pass.py

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

clean:
	rm -rf $(VENV) docs/_build
