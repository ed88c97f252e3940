# unimodal: `make demo` and `make test` are all a fresh clone needs. Each creates .venv when it is missing.
.DEFAULT_GOAL := help
.PHONY: help demo test extras lint clean

PYTHON ?= python3
BIN := .venv/bin
comma := ,

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z.]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv  ## train one model on drawn scenes, then open checkpoints/demo/index.html
	$(BIN)/unimodal demo

test: lint  ## linter, type checker and the whole test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

extras: .venv/installed-extras  ## install the optional libraries and run the tests that need them
	$(BIN)/python -m pytest tests/test_search_backends.py tests/test_huggingface.py tests/test_data_check.py tests/test_metrics_judged.py \
	  tests/test_onnx.py tests/test_sentence_transformers.py tests/test_sentence_transformers_training.py tests/test_adapters.py tests/test_app.py \
	  tests/test_qwen.py::test_a_video_file_is_read_where_it_can_be_decoded

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

.venv/installed-extras: pyproject.toml
	$(call install,.[dev$(comma)datasets$(comma)faiss$(comma)lancedb$(comma)milvus$(comma)eccv$(comma)onnx$(comma)sentence-transformers$(comma)mteb$(comma)clip-benchmark$(comma)video$(comma)browser])
	touch .venv/installed .venv/installed-dev
