/* SPDX-License-Identifier: Apache-2.0
 *
 * Which kernel table a call gets. isa_list.inc is in ascending order of preference: a wanted set
 * that does not take the dtype (bf16 dot products and fp32) falls to the next one before it, the
 * emulated ones among themselves.
 */
#include "cpu.h"
#include "tile_permission.h"

#include <stdlib.h>
#include <string.h>

#define PBS_CPU_ISA(isa, table, name) extern const pbs_cpu_kernels table;
#include "isa_list.inc"
#undef PBS_CPU_ISA

static const pbs_cpu_kernels *const tables[] = {
#define PBS_CPU_ISA(isa, table, name) &table,
#include "isa_list.inc"
#undef PBS_CPU_ISA
};

enum { TABLES = sizeof tables / sizeof *tables };

/* Where a set stands in the list; -1: not built. */
static int index_of(pbs_isa isa) {
    for (int i = 0; i < TABLES; i++)
        if (tables[i]->isa == isa) return i;
    return -1;
}

static int emulated(int index) { return strncmp(tables[index]->name, "emu_", 4) == 0; }

static int available(pbs_isa isa) {
    int index = index_of(isa);
    return index >= 0 && tables[index]->runs_here();
}

static const char *missing(pbs_isa isa) {
    if (available(isa)) return NULL;
    if (index_of(isa) < 0) return "not in this build";
    if (isa == PBS_ISA_AMX) return pbs_tiles_missing();
    return "this CPU does not have it";
}

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
                                "PBS_ATTN_ISA: \"%s\"; auto, c, avx2, avx512, avx512bf16, amx and "
                                "emu_* are allowed",
                                name);
        }
    }
    int index = wanted == PBS_ISA_AUTO ? TABLES - 1 : index_of(wanted);
    const char *lack = wanted == PBS_ISA_AUTO ? NULL : missing(wanted);
    if (lack) return pbs_fail(PBS_ERR_UNSUPPORTED, "%s: %s; %s", from, pbs_isa_name(wanted), lack);
    const int may_emulate = wanted != PBS_ISA_AUTO && emulated(index);
    for (; index >= 0; index--) {
        if (emulated(index) != may_emulate) continue;
        if (!tables[index]->takes(dtype) || !tables[index]->runs_here()) continue;
        *kernels = tables[index];
        *chosen = tables[index]->isa;
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
    .missing = missing,
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
