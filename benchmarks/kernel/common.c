/* SPDX-License-Identifier: Apache-2.0 */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

#include "cpu/convert.h"
#include "cpu/cpu.h"

const pbs_cpu_kernels *bench_table(int32_t isa, int32_t dtype) {
    const pbs_exec exec = {.isa = (pbs_isa)isa};
    const void *kernels;
    pbs_isa chosen;
    if (pbs_cpu_backend.choose(&exec, (pbs_dtype)dtype, &kernels, &chosen)) return NULL;
    if ((int32_t)chosen == isa) return (const pbs_cpu_kernels *)kernels;
    pbs_fail(PBS_ERR_UNSUPPORTED, "dtype: %d; %s does not take it", dtype,
             pbs_isa_name((pbs_isa)isa));
    return NULL;
}

int32_t bench_takes(int32_t isa, int32_t dtype) { return bench_table(isa, dtype) != NULL; }

void *bench_memory(size_t bytes) {
    void *memory = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (memory) memset(memory, 0, bytes); /* pages exist before anything is timed */
    return memory;
}

void bench_randomise(void *rows, pbs_dtype dtype, int64_t elements, float size) {
    uint64_t state = 12345;
    for (int64_t i = 0; i < elements; i++) {
        state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        const float x = size * ((float)(uint32_t)(state >> 40) * 0x1p-23f - 1.0f);
        pbs_store((char *)rows + i * (int64_t)pbs_dtype_size(dtype), dtype, 1, &x);
    }
}
