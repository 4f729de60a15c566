/* SPDX-License-Identifier: Apache-2.0
 *
 * The floating-point state of a thread while it works for us. All kernels of x86-64, the portable
 * and the emulated ones too, compute in the same one: rounding to nearest, exceptions masked, and
 * denormals as zeros (products of two of them cost hundreds of cycles on some cores). What the
 * thread's owner had is put back, sticky flags included.
 */
#ifndef PBS_CPU_STATE_H
#define PBS_CPU_STATE_H

#include "kernels.h"

#if defined(__x86_64__)

#include <xmmintrin.h>

enum { PBS_MXCSR = 0x1f80 /* at power-on */ | 0x8000 /* FTZ */ | 0x0040 /* DAZ */ };

static inline void pbs_enter_mxcsr(pbs_cpu_state *saved) {
    saved->mxcsr = _mm_getcsr();
    _mm_setcsr(PBS_MXCSR);
}

static inline void pbs_leave_mxcsr(const pbs_cpu_state *saved) { _mm_setcsr(saved->mxcsr); }

#else

static inline void pbs_enter_mxcsr(pbs_cpu_state *saved) { saved->mxcsr = 0; }
static inline void pbs_leave_mxcsr(const pbs_cpu_state *saved) { (void)saved; }

#endif

#endif /* PBS_CPU_STATE_H */
