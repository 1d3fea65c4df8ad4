# Two targets do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.
# The versions in constraints.txt are the tested ones; `make test CONSTRAINTS=` takes the newest instead.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= -c constraints.txt
BIN = $(VENV)/bin

.PHONY: demo demo-nano test pytest lint docs clean

demo: $(VENV)/.demo
	$(BIN)/python -m examples.demo.demo

demo-nano: $(VENV)/.demo
	$(BIN)/python -m examples.demo.nano

test: $(VENV)/.test
	$(MAKE) -j3 lint docs pytest  # mypy and mkdocs use one core each

pytest: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

$(VENV)/.%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
