# Every target works as the first command on a fresh clone: it makes .venv when that is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE := 1

.PHONY: env run test test-slow check format bench clean

env: $(STAMP)

# torch and the build tools come first so that the package itself needs no isolated build.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch scikit-build-core pybind11 cmake ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation \
		-e '.[triton,plot,integration,bench,dev]'
	@touch $@

run: env
	$(BIN)/python -m integration compare --preset quickstart --out runs/quickstart

test: env
	$(BIN)/python -m pytest -m 'not slow'

test-slow: env
	$(BIN)/python -m pytest -m slow

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@files=$$(git ls-files '*.cpp' '*.cu' '*.h' '*.cuh' '*.hpp'); \
	if [ -n "$$files" ]; then $(BIN)/clang-format --dry-run --Werror $$files; fi

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: env
	$(BIN)/python -m pytest benchmarks --benchmark-only --results benchmarks/results
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.acceptance
	$(BIN)/python -m benchmarks.figures

clean:
	rm -rf $(VENV) build dist runs
