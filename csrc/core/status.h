/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PBS_CORE_STATUS_H
#define PBS_CORE_STATUS_H

#include "pbs/pbs.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define PBS_PRINTF_LIKE __attribute__((format(printf, 2, 3)))
#else
#define PBS_PRINTF_LIKE
#endif

/* Keeps the sentence for pbs_last_error of this thread and returns status. */
pbs_status pbs_fail(pbs_status status, const char *format, ...) PBS_PRINTF_LIKE;

#ifdef __cplusplus
}
#endif

#define PBS_TRY(call)                              \
    do {                                           \
        pbs_status pbs_try_status = (call);        \
        if (pbs_try_status) return pbs_try_status; \
    } while (0)

#endif /* PBS_CORE_STATUS_H */
