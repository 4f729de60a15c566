/* SPDX-License-Identifier: Apache-2.0
 *
 * What the Python module asks of the torch binding.
 */
#ifndef PBS_TORCH_KEEP_H
#define PBS_TORCH_KEEP_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The largest workspace that calls on a CPU leave for the next one (workspace.h). Returns the bytes
 * that were kept until now and are given back. */
size_t pbs_torch_keep_workspace(size_t bytes);

#ifdef __cplusplus
}
#endif

#endif /* PBS_TORCH_KEEP_H */
