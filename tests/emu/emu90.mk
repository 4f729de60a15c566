# SPDX-License-Identifier: Apache-2.0
# The sm_90a half of emu.mk, which includes this file.
#
#   ptx-check     with nvcc: the conformance program and the tests' own kernels compile for every
#                 target, without spills and without ptxas notes on wgmma (C75xx)

# CUTLASS_HOME=folder of include/cute: test_layouts.cc is held against its layouts, too. Its headers
# want those of the CUDA toolkit.
ifneq ($(CUTLASS_HOME),)
%/tests/emu/test_layouts.cc.o: EMU_CXXFLAGS += -DEMU_CUTLASS -isystem $(CUTLASS_HOME)/include \
	-isystem /usr/local/cuda/include -isystem /usr/local/cuda/include/cccl
endif
