/* SPDX-License-Identifier: Apache-2.0
 *
 * The functions of ptx.cuh on the emulated machine: same names, same signatures, about a line each.
 * Included by ptx.cuh alone.
 */
#ifndef EMU_PTX_HOST_H
#define EMU_PTX_HOST_H

#include "float16.h"
#include "tensor.h"

#include <math.h>

namespace pbs {
namespace ptx {

/* ---- arithmetic ------------------------------------------------------------------------------ */
/* .ftz: subnormal inputs and results are zeros of their sign. */
PBS_DEVICE float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

/* A NaN comes out as the device's own, so poison (machine.h) that was computed with is seen. */
PBS_DEVICE float own_nan(float x) { return x == x ? x : emu::bits_float(0x7fffffff); }

PBS_DEVICE float ex2(float x) { return own_nan(flush(exp2f(flush(x)))); }
PBS_DEVICE float lg2(float x) { return own_nan(flush(log2f(flush(x)))); }

template <class T> PBS_DEVICE uint32_t pack(float low, float high);
template <> inline uint32_t pack<bf16>(float low, float high) {
    return emu::float_to_bf16(low) | static_cast<uint32_t>(emu::float_to_bf16(high)) << 16;
}
template <> inline uint32_t pack<fp16>(float low, float high) {
    return emu::float_to_fp16(low) | static_cast<uint32_t>(emu::float_to_fp16(high)) << 16;
}

template <class T> PBS_DEVICE float to_float(uint16_t bits);
template <> inline float to_float<bf16>(uint16_t bits) { return emu::bf16_to_float(bits); }
template <> inline float to_float<fp16>(uint16_t bits) { return emu::fp16_to_float(bits); }

/* ---- shared memory and copies ---------------------------------------------------------------- */
PBS_DEVICE uint32_t shared_address(const void *pointer) { return emu::shared_address(pointer); }

PBS_DEVICE void cp_async_16(uint32_t to, const void *from, uint32_t bytes) {
    emu::cp_async(to, from, bytes);
}
PBS_DEVICE void cp_async_commit() { emu::cp_async_commit(); }
template <int pending> PBS_DEVICE void cp_async_wait() { emu::cp_async_wait(pending); }

PBS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { emu::ldmatrix_x4(r, row, false); }
PBS_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
    emu::ldmatrix_x4(r, row, true);
}

/* ---- tensor cores ---------------------------------------------------------------------------- */
template <class T>
PBS_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
inline void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emu::mma_m16n8k16(false, c, a, b0, b1);
}
template <>
inline void mma_m16n8k16<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emu::mma_m16n8k16(true, c, a, b0, b1);
}

/* ---- launches that overlap ------------------------------------------------------------------- */
PBS_DEVICE void griddepcontrol_wait() { emu::wait_for_launches(); }
PBS_DEVICE void griddepcontrol_launch_dependents() {}

} // namespace ptx
} // namespace pbs

#include "ptx_host_sm90.h"

#endif /* EMU_PTX_HOST_H */
