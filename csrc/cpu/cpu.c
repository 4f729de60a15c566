/* SPDX-License-Identifier: Apache-2.0
 *
 * Which kernel table a call gets. The order of pbs_isa is the order of preference: a wanted set
 * that does not take the dtype (bf16 dot products and fp32) falls to the next one below it, the
 * emulated ones among themselves.
 */
#include "cpu.h"

#include <stdlib.h>
#include <string.h>

#define PBS_CPU_ISA(isa, table, name) extern const pbs_cpu_kernels table;
#include "isa_list.inc"
#undef PBS_CPU_ISA

static const pbs_cpu_kernels *table_of(pbs_isa isa) {
    switch ((int)isa) {
#define PBS_CPU_ISA(isa_, table, name) \
    case isa_:                         \
        return table.runs_here() ? &table : NULL;
#include "isa_list.inc"
#undef PBS_CPU_ISA
    default: return NULL;
    }
}

static int available(pbs_isa isa) { return table_of(isa) != NULL; }

static pbs_status choose(const pbs_exec *exec, pbs_dtype dtype, const void **kernels,
                         pbs_isa *chosen) {
    pbs_isa wanted = exec->isa;
    const char *from = "exec.isa", *name = NULL;
    if (wanted == PBS_ISA_AUTO) {
        name = getenv("PBS_ATTN_ISA");
        if (name && *name) {
            from = "PBS_ATTN_ISA";
            wanted = pbs_isa_from_name(name);
            if (wanted == PBS_ISA_COUNT)
                return pbs_fail(PBS_ERR_VALUE,
                                "PBS_ATTN_ISA: \"%s\"; auto, c, avx2, avx512, avx512bf16 and emu_* "
                                "are allowed",
                                name);
        }
    }
    if (wanted != PBS_ISA_AUTO && !available(wanted))
        return pbs_fail(PBS_ERR_UNSUPPORTED, "%s: %s; not built, or not on this CPU", from,
                        pbs_isa_name(wanted));
    int emulated = wanted >= PBS_ISA_EMU_AVX2;
    int isa = wanted == PBS_ISA_AUTO ? PBS_ISA_AVX512_BF16 : (int)wanted;
    for (int last = emulated ? PBS_ISA_EMU_AVX2 : PBS_ISA_C; isa >= last; isa--) {
        const pbs_cpu_kernels *table = table_of((pbs_isa)isa);
        if (!table || !table->takes(dtype)) continue;
        *kernels = table;
        *chosen = table->isa;
        return PBS_OK;
    }
    return pbs_fail(PBS_ERR_UNSUPPORTED, "dtype: %d; no kernel takes it", (int)dtype);
}

/* Waves small enough that one reuses the pages (and the cache) of the last, with work for every
 * thread. */
enum { CAP_PER_THREAD = 16 << 20, CAP_AT_MOST = 256 << 20 };

static size_t wave_cap(const pbs_exec *exec) {
    size_t threads = (size_t)exec->num_threads, most = CAP_AT_MOST / CAP_PER_THREAD;
    return CAP_PER_THREAD * (threads < most ? threads : most);
}

static pbs_status fill_identity(const pbs_exec *exec, int32_t *perm, int64_t heads, int32_t len) {
    (void)exec;
    for (int64_t i = 0; i < heads * len; i++) perm[i] = (int32_t)(i % len);
    return PBS_OK;
}

const pbs_backend pbs_cpu_backend = {
    .name = "cpu",
    .available = available,
    .choose = choose,
    .score_bytes = pbs_cpu_score_bytes,
    .score = pbs_cpu_score,
    .packed_bytes = pbs_cpu_packed_bytes,
    .permute_bytes = pbs_cpu_permute_bytes,
    .permute = pbs_cpu_permute,
    .select_bytes = pbs_cpu_select_bytes,
    .select = pbs_cpu_select,
    .score_strip = pbs_cpu_score_strip,
    .check_packed = pbs_cpu_check_packed,
    .attend_bytes = pbs_cpu_attend_bytes,
    .attend = pbs_cpu_attend,
    .wave_cap = wave_cap,
    .fill_identity = fill_identity,
};
