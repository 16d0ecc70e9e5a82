# `make help` lists what there is to do.
# Everything runs in .venv, made by the first target that needs it, unless VENV= or PYTHON= names an
# environment that has torch. There, only missing test tools are added and nothing is changed.

SHELL := /bin/bash
.DEFAULT_GOAL := help
ARGS ?=
HAS_TORCH := -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'

ifneq ($(VENV),)
  NAMED := $(VENV)
  PY := $(VENV)/bin/python
else ifneq ($(PYTHON),)
  ifneq ($(shell $(PYTHON) $(HAS_TORCH) 2>/dev/null && echo yes),)
    NAMED := $(PYTHON)
    PY := $(PYTHON)
  endif
endif

BASE_PYTHON := $(or $(PYTHON),python3)
PY ?= .venv/bin/python
SCRIPTS = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
PIP = $(PY) -m pip --disable-pip-version-check -qq
STAMPS := $(if $(NAMED),build/stamps/$(subst /,-,$(abspath $(PY))),.venv/stamps)
CPP_FILES = $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*.h csrc/*/*.inl tests/*.cu)

# requirements-test.txt in two parts: resolved by pip, and installed with --no-deps.
RESOLVED := sed '/--no-deps,/,$$d' requirements-test.txt
UNRESOLVED := sed '1,/--no-deps,/d' requirements-test.txt

.PHONY: help demo test test-interpreter test-emulator test-emulator-asan property coverage gpu-check \
  lint bench wheel clean extension

help: ## show this list
	@grep -E '^[a-z-]+:.* ## ' $(MAKEFILE_LIST) | sed -E 's/:.* ## /\t/' | \
	  awk -F'\t' '{ printf "make %-18s %s\n", $$1, $$2 }'
	@echo
	@echo "VENV=DIR or PYTHON=EXE: use that environment, which must have torch, instead of .venv."
	@echo "PYTHON=EXE without torch: make .venv with that interpreter. ARGS=...: passed to the command."

demo: $(STAMPS)/package extension ## set up, then run the main job on real input (report in demo_report/)
	$(PY) -m resnet_fused demo $(ARGS)

# Triton runs either its interpreter or its compiler in a process. Status 5: ARGS choose no such test.
test: $(STAMPS)/package extension ## set up, then run all tests
	$(PY) -m pytest $(ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 $(ARGS) -m interpreter || [ $$? -eq 5 ]

test-interpreter: $(STAMPS)/package extension ## run the Triton kernels on the CPU only: part of the tests
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 $(ARGS) -m interpreter

test-emulator: $(STAMPS)/package extension ## run the CUDA kernels on the CPU only: part of the tests
	$(PY) -m pytest -m emulator $(ARGS)

test-emulator-asan: $(STAMPS)/package extension ## the same under AddressSanitizer
	variables=$$($(PY) tests/emulation.py) && env $$variables $(PY) -m pytest -m emulator $(ARGS)

property: $(STAMPS)/package extension ## fuse random networks, others each time: CASES=20000
	OMP_NUM_THREADS=1 RESNET_FUSED_CASES=$(or $(CASES),20000) $(PY) -m pytest -n 2 tests/test_random_networks.py $(ARGS)

coverage: $(STAMPS)/package extension ## fuse every model of docs/coverage.md and compare it with eager
	OMP_NUM_THREADS=1 $(PY) benchmarks/coverage.py $(ARGS)

lint: $(STAMPS)/tools ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(SCRIPTS)/clang-format --dry-run -Werror $(CPP_FILES)

gpu-check: ## on a GPU, with what is installed: PART=tests, sanitizers or benchmarks; default all
	$(if $(wildcard $(PY)),$(PY),$(BASE_PYTHON)) tests/gpu_check.py $(addprefix --part ,$(PART)) $(ARGS)

bench: $(STAMPS)/bench extension ## compare with eager, torch.compile, onnxruntime and OpenVINO
	$(PY) benchmarks/bench_resnet.py --device cpu $(ARGS)

wheel: extension ## make the manylinux wheel in dist/ (CPU, and CUDA where nvcc is in reach)
	rm -rf build/wheel build/lib* dist
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(SCRIPTS):$$PATH" $(PY) -m auditwheel repair --wheel-dir dist \
	  --exclude 'libtorch*.so' --exclude 'libc10*.so' build/wheel/*.whl
	$(PY) -m abi3audit --strict --summary dist/*.whl
	@ls -l dist

clean: ## remove what was built (not .venv)
	rm -rf build dist demo_report *.egg-info resnet_fused/_C*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache

# Always run: it compiles what changed, and nothing if nothing did.
extension: $(STAMPS)/tools
	@$(PY) setup.py -q build_ext --inplace

# The development form: the package is imported from this directory. RESNET_FUSED_BUILD=none,
# because the extension is built beside it by the target above, with visible progress.
$(STAMPS)/package: pyproject.toml setup.py resnet_fused/_version.py | $(STAMPS)/tools
	@echo "[4/4] installing resnet_fused in development form"
	@RESNET_FUSED_BUILD=none $(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

$(STAMPS)/bench: pyproject.toml | $(STAMPS)/package
	@echo "installing onnxruntime and OpenVINO to compare with"
	@RESNET_FUSED_BUILD=none $(PIP) install --no-build-isolation -e '.[bench]'
	@touch $@

ifneq ($(NAMED),)
$(STAMPS)/tools: requirements-test.txt
	@[ -x "$$(command -v $(PY))" ] || { echo "VENV=$(VENV) has no bin/python:" \
	  "name an environment that has torch, or leave VENV out to have .venv made"; exit 1; }
	@$(PY) $(HAS_TORCH) || { echo "VENV=$(VENV) has no torch:" \
	  "install torch 2.11 or newer there, or leave VENV out to have .venv made"; exit 1; }
	@echo "adding the test tools that $(NAMED) lacks"
	@$(PIP) install $$($(RESOLVED) | sed -E '/^(#|torch)/d; s/(;|==).*//; s/^setuptools$$/&>=77/' | sort -u)
	@mkdir -p $(@D) && touch $@
else
$(STAMPS)/tools: requirements-test.txt
	@command -v $(BASE_PYTHON) >/dev/null || { echo "$(BASE_PYTHON) was not found:" \
	  "name a Python 3.10 or newer with PYTHON="; exit 1; }
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(BASE_PYTHON) is older than 3.10: name a newer Python with PYTHON="; exit 1; }
	@echo "[1/4] making .venv with $$($(BASE_PYTHON) --version)"
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(BASE_PYTHON) -m venv --clear .venv || { \
	  echo "$(BASE_PYTHON) cannot make environments: install its venv module (python3-venv)"; exit 1; }
	@echo "[2/4] installing torch (200 MB or more)"
	@$(PIP) install $$($(RESOLVED) | grep '^torch==')
	@echo "[3/4] installing test tools"
	@$(RESOLVED) > .venv/resolved.txt && $(PIP) install -r .venv/resolved.txt
	@$(UNRESOLVED) > .venv/unresolved.txt && $(PIP) install --no-deps -r .venv/unresolved.txt
	@mkdir -p $(@D) && touch $@
endif
