# SPDX-License-Identifier: Apache-2.0
# CUDA kernels on a CPU. Included by Makefile; also `make -f tests/emu/emu.mk emu-check`.
#
#   emu-check   C++ tests of the emulation and of kernels on it: g++, clang++, sanitizers; no torch
#   emu         build/emu/_C_emu.so: the torch ops over the emulated GPU, for the Python tests
#
# Objects lie in build/emu (the library) and build/emu-<gcc|clang|san> (the C++ tests).

# Tensor maps are passed by value, with an alignment that once changed g++'s ABI.
EMU_WARN := -Wall -Wextra -Wno-psabi
EMU_INCLUDE := -Itests/emu -Icsrc -Icsrc/include
# -ffp-contract=off as in the C core: results do not depend on the CPU that runs the tests.
EMU_CXXFLAGS := -std=c++17 -ffp-contract=off -fPIC -g $(EMU_WARN) $(EMU_INCLUDE)
EMU_CFLAGS := -std=c11 -ffp-contract=off -fPIC -g $(EMU_WARN) $(EMU_INCLUDE)
# Fibers leave their stacks without returning, which the check for use after return cannot follow.
EMU_SAN := -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
	-fno-sanitize=integer-divide-by-zero \
	-DEMU_TEST_THIN=4 -DPBS_TEST_THIN=3

# All variants of a kernel that a GPU is to decide between.
%/csrc/cuda/attend_sm90.cu.o: EMU_CXXFLAGS += -DPBS_ATTEND_VARIANTS

EMU_RUNTIME := $(filter-out tests/emu/test_%.cc,$(wildcard tests/emu/*.cc))
EMU_TESTS := $(wildcard tests/emu/test_*.cc) csrc/cuda/tensor_map.cu csrc/core/status.c
EMU_VERBS := tests/emu/verbs.c tests/emu/host_reads.c $(addprefix tests/c/,\
	harness.c memory.c brute.c selects.c calls.c test_score.c test_permute.c \
	test_select.c test_select_rows.c test_attend.c test_correction.c)
EMU_LIBRARY := $(wildcard csrc/core/*.c csrc/cuda/*.c csrc/cuda/*.cu)

emu_first = $(firstword $(foreach c,$1,$(shell command -v $(c) 2>/dev/null)))
EMU_GXX ?= $(call emu_first,g++)
EMU_CLANGXX ?= $(call emu_first,clang++ clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14)
EMU_ANY := $(or $(EMU_GXX),$(EMU_CLANGXX))

# emu_objects FOLDER, FILES
emu_objects = $(addsuffix .o,$(addprefix $1/,$2))

# emu_build FOLDER, C++ COMPILER, C COMPILER, FLAGS: objects in FOLDER, named after their sources.
define emu_build
$1/%.cu.o: %.cu
	@mkdir -p $$(@D)
	$2 -x c++ $$(EMU_CXXFLAGS) $4 -MMD -MP -c $$< -o $$@

$1/%.cc.o: %.cc
	@mkdir -p $$(@D)
	$2 $$(EMU_CXXFLAGS) $4 -MMD -MP -c $$< -o $$@

$1/%.c.o: %.c
	@mkdir -p $$(@D)
	$3 $$(EMU_CFLAGS) $4 -MMD -MP -c $$< -o $$@
endef

# emu_tests NAME, C++ COMPILER, C COMPILER, FLAGS: the C++ tests, in build/emu-NAME.
define emu_tests
$(call emu_build,build/emu-$1,$2,$3,$4)

build/emu-$1/emu_tests: $(call emu_objects,build/emu-$1,$(EMU_RUNTIME) $(EMU_TESTS))
	$2 $4 $$^ -lpthread -o $$@

.PHONY: emu-run-$1
emu-run-$1: build/emu-$1/emu_tests
	@ASAN_OPTIONS=detect_stack_use_after_return=0 build/emu-$1/emu_tests $$(EMU_ARGS)
endef

# emu_verbs FOLDER, C++ COMPILER, FLAGS: the C tests of the verbs over the emulated backend.
define emu_verbs
$1/emu_verbs: $(call emu_objects,$1,$(EMU_RUNTIME) $(EMU_LIBRARY) $(EMU_VERBS))
	$2 $3 $$^ -lpthread -lm -o $$@
endef

$(eval $(call emu_tests,gcc,$(EMU_GXX),gcc,-O2 -Werror))
$(eval $(call emu_tests,clang,$(EMU_CLANGXX),clang,-O2 -DEMU_TEST_THIN=4))
$(eval $(call emu_tests,san,$(EMU_ANY),gcc,$(EMU_SAN)))
$(eval $(call emu_build,build/emu,$(EMU_ANY),cc,-O2))
$(eval $(call emu_verbs,build/emu,$(EMU_ANY)))
$(eval $(call emu_verbs,build/emu-san,$(EMU_ANY),$(EMU_SAN)))

# Objects of the library are those of `make emu`, so only the sanitizers compile it once more.
emu-run-gcc: emu-verbs-run
emu-run-san: emu-verbs-run-san
.PHONY: emu-verbs-run emu-verbs-run-san
emu-verbs-run: build/emu/emu_verbs
	@build/emu/emu_verbs
emu-verbs-run-san: build/emu-san/emu_verbs
	@ASAN_OPTIONS=detect_stack_use_after_return=0 build/emu-san/emu_verbs

# Everything of the emulated backend but the torch binding.
EMU_OBJECTS := $(call emu_objects,build/emu,$(EMU_LIBRARY) $(EMU_RUNTIME))
build/emu/libpbs_emu.a: $(EMU_OBJECTS)
	@rm -f $@
	ar rcs $@ $^

.PHONY: emu-check emu-check-gcc emu-check-clang emu-check-san emu-library emu
# A compiler that is not there: one loud line for a user, an error for CI.
emu_missing = echo "*** $1: not found, its checks were NOT run ***" >&2; test "$${CI:-0}" = 0
# One at a time: Python test processes and people make the library at the same time.
emu_lock = $(if $(shell command -v flock 2>/dev/null),mkdir -p build && flock build/emu.lock)
emu_make = $(emu_lock) $(MAKE) --no-print-directory -s -j$(shell nproc) --output-sync=target \
	-f tests/emu/emu.mk

# One make for all: where one build runs its tests, on one core, the others compile.
emu-check: ## CUDA kernels on a CPU: tests of the emulation
	@$(if $(EMU_ANY),$(emu_make) $(if $(EMU_GXX),emu-run-gcc) $(if $(EMU_CLANGXX),emu-run-clang) \
		emu-run-san $(if $(NVCC),$(PTX_OBJECTS)))
	@$(if $(EMU_GXX),:,$(call emu_missing,g++))
	@$(if $(EMU_CLANGXX),:,$(call emu_missing,clang++))

emu-check-gcc:
	@$(if $(EMU_GXX),$(emu_make) emu-run-gcc,$(call emu_missing,g++))

emu-check-clang:
	@$(if $(EMU_CLANGXX),$(emu_make) emu-run-clang,$(call emu_missing,clang++))

emu-check-san:
	@$(if $(EMU_ANY),$(emu_make) emu-run-san,$(call emu_missing,c++))

emu-library: build/emu/libpbs_emu.a

# The torch binding over it. An empty library named libtorch_cpu.so is enough to link with: see
# setup.py. Both this library and pbs_attn._C hold the core, hence -Bsymbolic.
PY ?= python3
EMU_BINDING := -O2 -fvisibility=hidden -Wno-missing-field-initializers -DPBS_EMULATED_LIBRARY \
	-DTORCH_TARGET_VERSION=0x020a000000000000
EMU_LINK := -shared -Wl,-Bsymbolic -Wl,--version-script=build_tools/exports.map

build/emu/csrc/torch/ops.cpp.o: csrc/torch/ops.cpp
	@mkdir -p $(@D)
	$(EMU_ANY) $(EMU_CXXFLAGS) $(EMU_BINDING) \
		-isystem "$$($(PY) build_tools/torch_headers.py)" -MMD -MP -c $< -o $@

build/emu/libtorch_cpu.so:
	@mkdir -p $(@D)
	cc -shared -nostdlib -Wl,-soname,$(@F) -o $@ -x c /dev/null

build/emu/_C_emu.so: $(EMU_OBJECTS) build/emu/csrc/torch/ops.cpp.o | build/emu/libtorch_cpu.so
	$(EMU_ANY) $(EMU_LINK) -o $@.new $^ -lpthread \
		-Lbuild/emu -Wl,--no-as-needed -ltorch_cpu
	@mv $@.new $@

emu: ## the torch ops over an emulated GPU, for the Python tests
	@$(emu_make) PY=$(PY) build/emu/_C_emu.so

include tests/emu/emu90.mk

-include $(shell find build/emu build/emu-* -name '*.d' 2>/dev/null)
