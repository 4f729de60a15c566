/* SPDX-License-Identifier: Apache-2.0
 *
 * Instructions that the host twins of ptx.cuh call; defined in tensor.cc, shared.cc and async.cc.
 */
#ifndef EMU_TENSOR_H
#define EMU_TENSOR_H

#include <stdint.h>

namespace emu {

uint32_t shared_address(const void *pointer);

void cp_async(uint32_t to, const void *from, uint32_t bytes);
void cp_async_commit();
void cp_async_wait(int pending);

void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, bool transposed);
void mma_m16n8k16(bool fp16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

} // namespace emu

#endif /* EMU_TENSOR_H */
