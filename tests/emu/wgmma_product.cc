/* SPDX-License-Identifier: Apache-2.0
 *
 * What one wgmma reads through its descriptors, and its arithmetic: fp32, in the order of k. (The
 * device aligns products to the largest exponent and truncates: compare by an error bound.)
 */
#include "hopper.h"

#include "cuda/descriptor.cuh"
#include "float16.h"

#include <string.h>

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && defined(__GNUC__) && \
    !defined(__clang__)
#define EMU_FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EMU_FOR_EVERY_CPU
#endif

namespace emu {

constexpr int ROWS = 64, STEP = 16, MAX_COLUMNS = 256;

namespace {

struct matrix {
    pbs::swizzle mode;
    uint32_t start, leading, stride;
};

matrix decode(const char *name, uint64_t descriptor) {
    matrix m;
    m.mode = static_cast<pbs::swizzle>(descriptor >> 62);
    m.start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    m.leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
    m.stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 49 & 7) fail("%s: a descriptor with a base offset", name);
    const uint32_t period = pbs::swizzle_period(m.mode), width = pbs::swizzle_width(m.mode);
    if (m.start % period >= width)
        fail("%s: a matrix at shared address %u whose swizzle does not start on %u bytes", name,
             m.start, period);
    return m;
}

/* 16 bytes, swizzled, at this offset from the matrix' start. check: for the copies, the fences. */
void read_chunk(block &b, const char *name, const matrix &m, uint32_t offset, uint16_t *to,
                bool check) {
    const uint32_t address = pbs::swizzled(m.mode, m.start + offset);
    if (check) {
        const uint32_t at = shared_offset(self(), name, address, 16, 16);
        check_in_flight(self(), name, at, 16);
        check_fenced(b, name, at, 16);
    }
    memcpy(to, b.shared + (address - SHARED_BASE), 16);
}

} // namespace

void read_wgmma_operand(block &b, const char *name, uint64_t descriptor, bool mn_major,
                        uint32_t rows, uint16_t *to, bool check) {
    const matrix m = decode(name, descriptor);
    if (!mn_major) {
        for (uint32_t row = 0; row < rows; row++)
            for (uint32_t k = 0; k < STEP; k += 8)
                read_chunk(b, name, m, pbs::k_major_offset(m.mode, m.leading, m.stride, row, k),
                           to + row * STEP + k, check);
    } else {
        for (uint32_t k = 0; k < STEP; k++)
            for (uint32_t row = 0; row < rows; row += 8)
                read_chunk(b, name, m, pbs::mn_major_offset(m.mode, m.leading, m.stride, row, k),
                           to + k * rows + row, check);
    }
}

namespace {

/* c[64][n] += a[64][16] b[16][n] */
EMU_FOR_EVERY_CPU
void multiply(float *__restrict c, const float *__restrict a, const float *__restrict b, int n) {
    for (int row = 0; row < ROWS; row++)
        for (int j = 0; j < n; j += 32) {
            float sum[32];
            for (int i = 0; i < 32; i++) sum[i] = c[row * n + j + i];
            for (int k = 0; k < STEP; k++)
                for (int i = 0; i < 32; i++) sum[i] += a[row * STEP + k] * b[k * n + j + i];
            for (int i = 0; i < 32; i++) c[row * n + j + i] = sum[i];
        }
}

template <float (*to_float)(uint16_t)>
void convert(const wgmma_operands &what, const uint16_t *from_a, const uint16_t *from_b,
             float *__restrict a, float *__restrict b) {
    const int n = what.columns;
    for (int i = 0; i < ROWS * STEP; i++) a[i] = to_float(from_a[i]);
    if (what.transpose_b) {
        for (int i = 0; i < STEP * n; i++) b[i] = to_float(from_b[i]);
    } else {
        for (int j = 0; j < n; j++)
            for (int k = 0; k < STEP; k++) b[k * n + j] = to_float(from_b[j * STEP + k]);
    }
}

} // namespace

void wgmma_product(const wgmma_operands &what, const uint16_t *a, const uint16_t *b, float *c) {
    const int n = what.columns;
    float a_values[ROWS * STEP], b_values[STEP * MAX_COLUMNS];
    (what.is_bf16 ? convert<bf16_to_float> : convert<fp16_to_float>)(what, a, b, a_values,
                                                                     b_values);
    if (!what.accumulate) memset(c, 0, sizeof *c * static_cast<size_t>(ROWS * n));
    multiply(c, a_values, b_values, n);
}

} // namespace emu
