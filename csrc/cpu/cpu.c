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

const char *pbs_isa_name(pbs_isa isa) {
    switch (isa) {
    case PBS_ISA_AUTO: return "auto";
    case PBS_ISA_C: return "c";
    case PBS_ISA_AVX2: return "avx2";
    case PBS_ISA_AVX512: return "avx512";
    case PBS_ISA_AVX512_BF16: return "avx512bf16";
    case PBS_ISA_EMU_AVX2: return "emu_avx2";
    case PBS_ISA_EMU_AVX512: return "emu_avx512";
    case PBS_ISA_EMU_AVX512_BF16: return "emu_avx512bf16";
    case PBS_ISA_COUNT: break;
    }
    return NULL;
}

pbs_isa pbs_isa_from_name(const char *name) {
    for (int isa = 0; name && isa < PBS_ISA_COUNT; isa++)
        if (strcmp(name, pbs_isa_name((pbs_isa)isa)) == 0) return (pbs_isa)isa;
    return PBS_ISA_COUNT;
}

int pbs_isa_available(pbs_isa isa) { return isa != PBS_ISA_AUTO && table_of(isa) != NULL; }

pbs_status pbs_cpu_choose(pbs_isa wanted, pbs_dtype dtype, const pbs_cpu_kernels **kernels) {
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
    if (wanted != PBS_ISA_AUTO && !pbs_isa_available(wanted))
        return pbs_fail(PBS_ERR_UNSUPPORTED, "%s: %s; not built, or not on this CPU", from,
                        pbs_isa_name(wanted));
    int emulated = wanted >= PBS_ISA_EMU_AVX2;
    int isa = wanted == PBS_ISA_AUTO ? PBS_ISA_AVX512_BF16 : (int)wanted;
    for (int last = emulated ? PBS_ISA_EMU_AVX2 : PBS_ISA_C; isa >= last; isa--) {
        *kernels = table_of((pbs_isa)isa);
        if (*kernels && (*kernels)->takes(dtype)) return PBS_OK;
    }
    return pbs_fail(PBS_ERR_UNSUPPORTED, "dtype: %d; no kernel takes it", (int)dtype);
}

const pbs_cpu_kernels *pbs_cpu_kernels_for(pbs_isa wanted, pbs_dtype dtype) {
    const pbs_cpu_kernels *kernels = NULL;
    return pbs_cpu_choose(wanted, dtype, &kernels) == PBS_OK ? kernels : NULL;
}

pbs_isa pbs_isa_for(pbs_isa wanted, pbs_dtype dtype) {
    const pbs_cpu_kernels *kernels = pbs_cpu_kernels_for(wanted, dtype);
    return kernels ? kernels->isa : PBS_ISA_COUNT;
}
