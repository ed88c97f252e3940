# unimodal: `make demo` and `make test` are all a fresh clone needs. Each creates .venv when it is missing.
.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

PYTHON ?= python3
BIN := .venv/bin

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z.]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv  ## train one model on drawn scenes, then open checkpoints/demo/index.html
	$(BIN)/unimodal demo

test: lint  ## linter, type checker and the whole test suite
	$(BIN)/python -m pytest

lint: .venv/installed-dev  ## linter and type checker only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy unimodal

clean:  ## remove .venv and caches; checkpoints stay
	rm -rf .venv dist build .pytest_cache .ruff_cache .mypy_cache

.venv: .venv/installed  ## create the environment and install the package in it

# $(call install,REQUIREMENT): uv where there is one, else pip. A stamp keeps later runs from installing again.
define install
	if command -v uv >/dev/null; then \
	  { test -x $(BIN)/python || uv venv --python $(PYTHON) .venv; } && uv pip install --python $(BIN)/python -e '$(1)'; \
	else \
	  { test -x $(BIN)/pip || $(PYTHON) -m venv .venv; } && $(BIN)/pip install --disable-pip-version-check -e '$(1)'; \
	fi
	touch $@
endef

.venv/installed: pyproject.toml
	$(call install,.)

.venv/installed-dev: pyproject.toml
	$(call install,.[dev])
	touch .venv/installed
