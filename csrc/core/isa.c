/* SPDX-License-Identifier: Apache-2.0
 *
 * Instruction sets by name, and what a backend makes of them.
 */
#include <string.h>

#include "backend.h"

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
    case PBS_ISA_SM80: return "sm80";
    case PBS_ISA_AMX: return "amx";
    case PBS_ISA_EMU_AMX: return "emu_amx";
    case PBS_ISA_SM90: return "sm90";
    case PBS_ISA_COUNT: break;
    }
    return NULL;
}

pbs_isa pbs_isa_from_name(const char *name) {
    for (int isa = 0; name && isa < PBS_ISA_COUNT; isa++)
        if (strcmp(name, pbs_isa_name((pbs_isa)isa)) == 0) return (pbs_isa)isa;
    return PBS_ISA_COUNT;
}

int pbs_isa_available(pbs_isa isa) {
    return isa != PBS_ISA_AUTO && pbs_backend_for(isa)->available(isa);
}

const char *pbs_isa_missing(pbs_isa isa) { return pbs_backend_for(isa)->missing(isa); }

pbs_isa pbs_isa_for(pbs_isa wanted, pbs_dtype dtype) {
    const void *kernels;
    pbs_isa isa;
    pbs_exec exec;
    memset(&exec, 0, sizeof exec);
    exec.isa = wanted;
    return pbs_backend_for(wanted)->choose(&exec, dtype, &kernels, &isa) == PBS_OK ? isa
                                                                                   : PBS_ISA_COUNT;
}
