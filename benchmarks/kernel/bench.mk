# SPDX-License-Identifier: Apache-2.0
# build/bench/libpbs_bench.so: the C core as the product compiles it (-O3), and what the benchmarks
# ask of it beyond the torch ops. Emulated vector units are there to be linked, so -O0 will do.
# From the repository's root: make -f benchmarks/kernel/bench.mk

.DEFAULT_GOAL := build/bench/libpbs_bench.so
include check.mk

BENCH_FLAGS := $(filter-out -Werror,$(CHECK_FLAGS)) -O3 -fPIC -fvisibility=hidden
BENCH_CORE := $(addprefix build/bench/,$(CHECK_LIB:.c=.o))
BENCH_OWN := $(addprefix build/bench/,$(patsubst %.c,%.o,$(wildcard benchmarks/kernel/*.c)))

build/bench/%.o: %.c $(filter-out tests/%,$(CHECK_DEPS)) benchmarks/kernel/bench.mk
	@mkdir -p $(@D)
	$(CC) $(BENCH_FLAGS) $(call check_isa,$(notdir $*),-O0) -c $< -o $@

$(BENCH_OWN): benchmarks/kernel/bench.h

build/bench/libpbs_bench.so: $(BENCH_CORE) $(BENCH_OWN)
	$(CC) -shared -Wl,-Bsymbolic $^ -lm -o $@.new
	@mv $@.new $@
