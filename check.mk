# SPDX-License-Identifier: Apache-2.0
# The C core and its tests with nothing but `cc`: no torch, no Python. Included by Makefile; also
# `make -f check.mk check`. Objects lie in build/check-<compiler>[-san].

CHECK_WARN := -Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Werror
CHECK_FLAGS := -std=c11 -ffp-contract=off -Icsrc -Icsrc/include $(CHECK_WARN)
CHECK_SAN := -O1 -g -DPBS_TEST_THIN=3 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
# Macros of gcc's own headers convert signs where nothing is optimised.
CHECK_QUICK := -O0 -Wno-sign-conversion
CHECK_TSAN := -O2 -g -DPBS_TEST_THIN=5 -fsanitize=thread -fno-omit-frame-pointer
CHECK_LIB := $(wildcard csrc/core/*.c csrc/cpu/*.c)
CHECK_TESTS := $(wildcard tests/c/*.c)
CHECK_DEPS := $(wildcard csrc/*/*.h csrc/*/*.inc csrc/*/*/*.h tests/c/*.h) check.mk
CHECK_CLANG ?= $(firstword $(foreach c,clang clang-19 clang-18 clang-17 clang-16 clang-15 clang-14,\
	$(shell command -v $(c) 2>/dev/null)))
CHECK_GCC ?= $(firstword $(shell command -v gcc 2>/dev/null))

# What a file's instruction set needs, by its name. Emulated vector units are plain C, but so much
# of it, all inlined, that optimising costs more time than it saves: $2 is what they get instead. $3
# is for kernels that this machine cannot run.
ifeq ($(shell uname -m),x86_64)
check_lacks = $(if $(shell grep -m1 -ow $1 /proc/cpuinfo 2>/dev/null),,$2)
CHECK_IDLE := $(call check_lacks,avx512f,%_avx512) $(call check_lacks,avx512_bf16,%_avx512bf16) \
	$(call check_lacks,amx_bf16,%_amx)
CHECK_AVX512 := -mavx512f -mavx512bw -mavx512dq -mavx512vl
check_isa = $(if $(findstring emu_,$1),$2,$(if $(findstring avx512bf16,$1)$(findstring isa_amx,$1),\
	$(CHECK_AVX512) -mavx512bf16,$(if $(findstring avx512,$1),$(CHECK_AVX512),$(if \
	$(findstring avx2,$1),-mavx2 -mfma -mf16c))) $(if $(filter $(CHECK_IDLE),$1),$3))
else
CHECK_LIB := $(filter-out csrc/cpu/isa_avx%.c csrc/cpu/isa_amx.c,$(CHECK_LIB))
CHECK_TESTS := $(filter-out tests/c/vec_avx%.c,$(CHECK_TESTS))
check_isa = $(if $(findstring emu_,$1),$2)
endif

# check_build NAME, COMPILER, FLAGS, FLAGS OF EMULATED, FLAGS OF IDLE: one build in build/check-NAME.
define check_build
build/check-$1/%.o: %.c $$(CHECK_DEPS)
	@mkdir -p $$(@D)
	$2 $$(CHECK_FLAGS) $3 $$(call check_isa,$$(notdir $$*),$4,$5) -c $$< -o $$@

build/check-$1/pbs_tests: $$(addprefix build/check-$1/,$$(CHECK_LIB:.c=.o) $$(CHECK_TESTS:.c=.o))
	$2 $3 $$^ -lm -lpthread -o $$@

build/check-$1/prefill: $$(addprefix build/check-$1/,$$(CHECK_LIB:.c=.o) examples/prefill.o)
	$2 $3 $$^ -lm -o $$@

.PHONY: check-run-$1
check-run-$1: build/check-$1/pbs_tests build/check-$1/prefill
	@build/check-$1/pbs_tests $$(CHECK_ARGS)
	@build/check-$1/prefill 1000 >build/check-$1/prefill.txt || { cat build/check-$1/prefill.txt; exit 1; }
endef

$(eval $(call check_build,gcc,$(CHECK_GCC),-O2,-O1))
$(eval $(call check_build,clang,$(CHECK_CLANG),-O2 -DPBS_TEST_THIN=3,-O1))
$(eval $(call check_build,san,$(or $(CHECK_GCC),$(CHECK_CLANG)),$(CHECK_SAN),-O0,$(CHECK_QUICK)))
$(eval $(call check_build,tsan,$(or $(CHECK_GCC),$(CHECK_CLANG)),$(CHECK_TSAN),-O0,$(CHECK_QUICK)))

.PHONY: check check-gcc check-clang check-san check-tsan
check-run-tsan: CHECK_ARGS = threads

# A compiler that is not there: one loud line for a user, an error for CI.
check_missing = echo "*** $1: not found, its checks were NOT run ***" >&2; test "$${CI:-0}" = 0
check_make = $(MAKE) --no-print-directory -s -j$(shell nproc) --output-sync=target -f check.mk
CHECK_ANY := $(or $(CHECK_GCC),$(CHECK_CLANG))

# One make for all: where one build runs its tests, on one core, the others compile.
check: ## the C core and its tests: gcc, clang, sanitizers
	@$(if $(CHECK_ANY),$(check_make) $(if $(CHECK_GCC),check-run-gcc) \
		$(if $(CHECK_CLANG),check-run-clang) check-run-san check-run-tsan)
	@$(if $(CHECK_GCC),:,$(call check_missing,gcc))
	@$(if $(CHECK_CLANG),:,$(call check_missing,clang))

check-gcc: ## the same, gcc alone
	@$(if $(CHECK_GCC),$(check_make) check-run-gcc,$(call check_missing,gcc))

check-clang: ## the same, clang alone
	@$(if $(CHECK_CLANG),$(check_make) check-run-clang,$(call check_missing,clang))

check-san: ## the same under the address and undefined-behaviour sanitizers
	@$(if $(CHECK_ANY),$(check_make) check-run-san,$(call check_missing,cc))

check-tsan: ## what threads share, under the thread sanitizer
	@$(if $(CHECK_ANY),$(check_make) check-run-tsan,$(call check_missing,cc))
