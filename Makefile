# Every target works as the first command on a fresh clone: it makes .venv when that is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE := 1

# The same operator tests again on the implementation that needs no compiler.
OPERATORS := gram spectrum rank surrogate combine weighted_sum stacked_svd flora_na

.PHONY: env run test test-slow test-cpp check format bench clean

env: $(STAMP)

# torch and the build tools come first so that the package itself needs no isolated build.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/CMakeLists.txt csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt \
		torch scipy-openblas64 scikit-build-core pybind11 cmake ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation \
		-e '.[triton,plot,integration,bench,dev]'
	@touch $@

# Waiting threads must not spin: on two shared cores that costs more than the work.
run test: export OMP_WAIT_POLICY := PASSIVE

run: env
	$(BIN)/python -m integration compare --preset quickstart --out runs/quickstart

test: env
	$(BIN)/python -m pytest -m 'not slow'
	FEDLORA_BACKEND=composed $(BIN)/python -m pytest -m 'not slow' \
		$(OPERATORS:%=python_tests/test_%.py)

test-slow: env
	$(BIN)/python -m pytest -m slow

# Needs doctest (Debian: doctest-dev). Address and undefined behaviour first, then races.
test-cpp: env
	for preset in address thread; do \
		$(BIN)/cmake --preset $$preset -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python && \
		$(BIN)/cmake --build --preset $$preset && $(BIN)/ctest --preset $$preset || exit 1; \
	done

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
