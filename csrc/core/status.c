/* SPDX-License-Identifier: Apache-2.0
 *
 * Status codes as text, the last error of a thread (the library's only state), and what was built.
 */
#include "status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_error[256];

pbs_status pbs_fail(pbs_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof last_error, format, args);
    va_end(args);
    return status;
}

const char *pbs_last_error(void) { return last_error; }

const char *pbs_status_name(pbs_status status) {
    switch (status) {
    case PBS_OK: return "PBS_OK";
    case PBS_ERR_NULL: return "PBS_ERR_NULL";
    case PBS_ERR_STRUCT_SIZE: return "PBS_ERR_STRUCT_SIZE";
    case PBS_ERR_SHAPE: return "PBS_ERR_SHAPE";
    case PBS_ERR_DTYPE: return "PBS_ERR_DTYPE";
    case PBS_ERR_STRIDE: return "PBS_ERR_STRIDE";
    case PBS_ERR_VALUE: return "PBS_ERR_VALUE";
    case PBS_ERR_WORKSPACE: return "PBS_ERR_WORKSPACE";
    case PBS_ERR_UNSUPPORTED: return "PBS_ERR_UNSUPPORTED";
    case PBS_ERR_DEVICE: return "PBS_ERR_DEVICE";
    }
    return "unknown pbs_status";
}

int pbs_abi_version(void) { return PBS_ABI_VERSION; }

#ifndef PBS_BUILD_FLAGS
#define PBS_BUILD_FLAGS ""
#endif
#if defined(__VERSION__)
#define PBS_BUILD_COMPILER __VERSION__
#else
#define PBS_BUILD_COMPILER "unknown"
#endif
#if defined(__clang__)
#define PBS_BUILD_VENDOR "clang"
#elif defined(__GNUC__)
#define PBS_BUILD_VENDOR "gcc"
#else
#define PBS_BUILD_VENDOR "cc"
#endif

/* Names only: whether this CPU can run one is pbs_isa_available's to say. */
#define PBS_CPU_ISA(isa, table, name) " " name
const char *pbs_build_info(void) {
    return "{\"compiler\": \"" PBS_BUILD_VENDOR " " PBS_BUILD_COMPILER
           "\", \"flags\": \"" PBS_BUILD_FLAGS "\", \"isas\": \""
#include "../cpu/isa_list.inc"
           "\"}";
}
#undef PBS_CPU_ISA
