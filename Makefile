# `make demo`, `make test`, `make docs` and `make notebooks` do all their set-up; everything lives in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
comma := ,
# With a clone of solo-learn its tests run too, and need what it needs: make test SOLO_LEARN_ROOT=...
# stable-pretraining brings 30 packages more: make test STABLE=1
EXTRAS := test$(if $(SOLO_LEARN_ROOT),$(comma)solo)$(if $(STABLE),$(comma)stable)

.PHONY: demo test lint docs notebooks soak clean

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -n -q docs build/docs $(ARGS)

# Executes the notebooks and writes them beside their sources; 03 with SOLO_LEARN_ROOT=... only.
notebooks: $(VENV)/.installed-notebooks$(if $(SOLO_LEARN_ROOT),$(comma)solo)
	$(BIN)/python examples/build_notebooks.py $(ARGS)

$(VENV)/.installed-%: setup.cfg pyproject.toml src/logo_plugin/__init__.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

# Ten times the examples of the property tests, then long runs: memory, hooks, bad files. Not part of `make test`.
soak: $(VENV)/.installed-test
	HYPOTHESIS_EXAMPLES=20000 $(BIN)/python -m pytest -q tests/test_properties.py
	$(BIN)/python benchmarks/soak.py $(ARGS)

clean:
	rm -rf $(VENV) build dist demo_output docs/notebooks src/*.egg-info
