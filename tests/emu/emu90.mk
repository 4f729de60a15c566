# SPDX-License-Identifier: Apache-2.0
# The sm_90a half of emu.mk, which includes this file.
#
#   ptx-emu       every function of ptx*.cuh on the emulation, in many orders; part of emu-check. It
#                 writes build/ptx_expected.bin, what a GPU should answer
#   ptx-check     with nvcc, then part of emu-check: the same program and the tests' own kernels
#                 compile for sm_80 and sm_90a, without spills and without ptxas notes on wgmma
#                 (C75xx)
#   ptx-gpu       the first thing to run where there is a GPU: its answers against those, and the
#                 tests' own attention kernel against fp64

NVCC ?= $(firstword $(shell command -v nvcc /usr/local/cuda/bin/nvcc 2>/dev/null))
PTX_RUNTIME := $(EMU_RUNTIME) csrc/cuda/tensor_map.cu csrc/core/status.c

.PHONY: ptx-emu ptx-check ptx-program ptx-gpu
ptx-emu: build/ptx_expected.bin
emu-run-gcc: ptx-emu

build/emu-gcc/test_ptx: $(call emu_objects,build/emu-gcc,$(PTX_RUNTIME) tests/gpu/test_ptx.cu)
	$(EMU_GXX) $^ -lpthread -o $@

build/ptx_expected.bin: build/emu-gcc/test_ptx
	@build/emu-gcc/test_ptx $@.new
	@mv $@.new $@

# ---- nvcc -----------------------------------------------------------------------------------------
PTX_NVCC = $(NVCC) -std=c++17 -O3 -Itests/emu -Icsrc -Icsrc/include -Xptxas -v
PTX_SM90 := -gencode arch=compute_90a,code=sm_90a
# PTX of sm_80 for what comes after 9.0.
PTX_BOTH := -gencode "arch=compute_80,code=[sm_80,compute_80]" $(PTX_SM90)
PTX_OBJECTS := $(addprefix build/ptx/,test_ptx.o toy_kernels.o tensor_map.o)
PTX_SOURCES := $(wildcard tests/emu/*.h tests/emu/*.cuh csrc/cuda/*.cuh)

# ptx_object NAME, SOURCE, FLAGS: compiled, and the notes of ptxas read.
define ptx_object
build/ptx/$1.o: $2 $(PTX_SOURCES)
	@mkdir -p $$(@D)
	@$$(PTX_NVCC) $3 -c $$< -o $$@.new 2>$$@.log || { cat $$@.log; exit 1; }
	@! grep -E 'C75[0-9][0-9]|[1-9][0-9]* bytes spill|warning' $$@.log
	@mv $$@.new $$@
endef

$(eval $(call ptx_object,test_ptx,tests/gpu/test_ptx.cu,$(PTX_BOTH)))
$(eval $(call ptx_object,toy_kernels,tests/gpu/toy_kernels.cu,$(PTX_SM90)))
$(eval $(call ptx_object,tensor_map,csrc/cuda/tensor_map.cu,$(PTX_SM90)))

ptx-check: ## every PTX function compiles: sm_80, sm_90a; no spills, no C75xx
	@$(if $(NVCC),$(emu_make) $(PTX_OBJECTS),$(call emu_missing,nvcc))

build/ptx/status.o: csrc/core/status.c
	@mkdir -p $(@D)
	cc $(EMU_CFLAGS) -c $< -o $@

build/ptx/test_ptx: $(PTX_OBJECTS) build/ptx/status.o
	$(NVCC) $^ -o $@

ptx-program: build/ptx_expected.bin build/ptx/test_ptx

ptx-gpu: ## every PTX function on this machine's GPU, against the emulation
	@$(emu_make) build/ptx_expected.bin build/ptx/test_ptx
	build/ptx/test_ptx build/ptx_expected.bin

# ---- CUTLASS --------------------------------------------------------------------------------------
# CUTLASS_HOME=folder of include/cute: test_layouts.cc is held against its layouts, too. Its headers
# want those of the CUDA toolkit.
ifneq ($(CUTLASS_HOME),)
%/tests/emu/test_layouts.cc.o: EMU_CXXFLAGS += -DEMU_CUTLASS -isystem $(CUTLASS_HOME)/include \
	-isystem /usr/local/cuda/include -isystem /usr/local/cuda/include/cccl
endif
