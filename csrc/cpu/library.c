/* SPDX-License-Identifier: Apache-2.0
 *
 * The CPU library: every call is the CPU's.
 */
#include "cpu.h"

const pbs_backend *pbs_backend_for(pbs_isa isa) {
    (void)isa;
    return &pbs_cpu_backend;
}
