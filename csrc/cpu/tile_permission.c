/* SPDX-License-Identifier: Apache-2.0
 *
 * Tiles need a CPU that has them, a system that saves them, and its permission: Linux leaves the
 * 8 KiB out of every signal frame and context until a process has asked, and refuses where an
 * alternative signal stack is too small for them. No tiles is never an error: other sets run.
 */
#define _GNU_SOURCE /* syscall */
#include "tile_permission.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_TILEDATA = 18 }; /* asm/prctl.h of Linux 5.16 */
enum { HAS_AMX_BF16 = 1 << 22, HAS_AMX_TILE = 1 << 24 };       /* cpuid 7.0 edx */
enum { TILE_STATE = 3 << 17 };                                 /* XCR0: configuration and data */

/* XCR0; the AVX-512 bits say that reading it is allowed. */
static unsigned os_saves(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static const char *look(void) {
    unsigned eax, ebx, ecx, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & HAS_AMX_TILE) ||
        !(edx & HAS_AMX_BF16))
        return "this CPU does not have it";
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return "this CPU has tiles, but no AVX-512 BF16 beside them";
    if ((os_saves() & TILE_STATE) != TILE_STATE)
        return "this CPU has it, but the system does not save tiles";
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILEDATA) != 0)
        return "this CPU has it, but the system does not permit it (arch_prctl)";
    return NULL;
}

const char *pbs_tiles_missing(void) {
    static _Atomic(const char *) answer; /* NULL: not asked yet */
    static const char none[] = "";
    const char *known = atomic_load_explicit(&answer, memory_order_relaxed);
    if (!known) { /* threads that come at once all ask, and get the same answer */
        known = look();
        if (!known) known = none;
        atomic_store_explicit(&answer, known, memory_order_relaxed);
    }
    return known == none ? NULL : known;
}

#else

const char *pbs_tiles_missing(void) { return "it exists on x86-64 Linux"; }

#endif
