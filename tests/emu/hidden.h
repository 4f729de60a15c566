/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory like a GPU's: while it is hidden, nothing but a running kernel can touch it, so a driver
 * that looks at its caller's tensors ends the test. For one OS thread at a time.
 */
#ifndef EMU_HIDDEN_H
#define EMU_HIDDEN_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Zeros, aligned as by cudaMalloc; there until pbs_emu_device_reset. NULL: no room. */
void *pbs_emu_device_alloc(size_t bytes);
void pbs_emu_device_reset(void);
void pbs_emu_device_hide(int hidden);

#ifdef __cplusplus
}

namespace emu {

/* Around the kernels of a launch. */
struct device_memory_visible {
    device_memory_visible();
    ~device_memory_visible();
};

bool in_hidden_memory(const void *at);

} // namespace emu
#endif

#endif /* EMU_HIDDEN_H */
