/* SPDX-License-Identifier: Apache-2.0
 *
 * ldmatrix and mma.sync. Fragments are laid out as ptx.cuh says; each instruction is one meeting of
 * a whole warp.
 */
#include "tensor.h"

#include "float16.h"
#include "machine.h"

#include <string.h>

namespace emu {

constexpr uint32_t ALL = 0xffffffffu;

/* ---- ldmatrix -------------------------------------------------------------------------------- */
namespace {

struct ldmatrix_args {
    uint32_t row;
    uint32_t *r;
};

/* Row r of matrix m, from the address that lane 8 m + r gives. */
void read_rows(void *const *args, const warp &w, const char *name, uint16_t (&rows)[4][8][8]) {
    for (int lane = 0; lane < LANES; lane++) {
        const thread &t = w.threads[lane];
        const uint32_t address = static_cast<ldmatrix_args *>(args[lane])->row;
        const uint32_t offset = shared_offset(t, name, address, 16, 16);
        check_in_flight(t, name, offset, 16);
        memcpy(rows[lane / 8][lane % 8], t.home->shared + offset, 16);
    }
}

uint32_t word(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

void compute_ldmatrix(void *const *args, uint32_t, const warp &w) {
    uint16_t rows[4][8][8];
    read_rows(args, w, "ldmatrix", rows);
    for (int lane = 0; lane < LANES; lane++)
        for (int m = 0; m < 4; m++) {
            const uint16_t *row = rows[m][lane / 4];
            static_cast<ldmatrix_args *>(args[lane])->r[m] =
                word(row[lane % 4 * 2], row[lane % 4 * 2 + 1]);
        }
}

void compute_ldmatrix_trans(void *const *args, uint32_t, const warp &w) {
    uint16_t rows[4][8][8];
    read_rows(args, w, "ldmatrix.trans", rows);
    for (int lane = 0; lane < LANES; lane++)
        for (int m = 0; m < 4; m++) {
            const int row = lane % 4 * 2, column = lane / 4;
            static_cast<ldmatrix_args *>(args[lane])->r[m] =
                word(rows[m][row][column], rows[m][row + 1][column]);
        }
}

const collective LDMATRIX = {"ldmatrix", true, compute_ldmatrix};
const collective LDMATRIX_TRANS = {"ldmatrix.trans", true, compute_ldmatrix_trans};

} // namespace

void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, bool transposed) {
    ldmatrix_args a = {row, r};
    meet(transposed ? LDMATRIX_TRANS : LDMATRIX, ALL, &a);
}

/* ---- mma.sync -------------------------------------------------------------------------------- */
namespace {

struct mma_args {
    float *c;
    const uint32_t *a;
    uint32_t b[2];
};

/* Four floats that the compiler keeps in one register. */
typedef float float_x4 __attribute__((vector_size(16), may_alias));

/* Both halves of each word; `low` and `high` are [count]. */
template <float (*to_float)(uint16_t)>
void split(const uint32_t *words, int count, float *low, float *high) {
    for (int i = 0; i < count; i++) {
        low[i] = to_float(static_cast<uint16_t>(words[i]));
        high[i] = to_float(static_cast<uint16_t>(words[i] >> 16));
    }
}

/* Words hold pairs along k: k = 2 p + half. The sum runs over k upwards, in fp32. */
template <float (*to_float)(uint16_t)> void compute_mma(void *const *args, uint32_t, const warp &) {
    alignas(16) uint32_t a[16][8], b[8][8]; /* [row][p], [p][column] */
    alignas(16) float c[16][8], a_half[2][16][8], b_half[2][8][8];
    for (int lane = 0; lane < LANES; lane++) {
        const mma_args &x = *static_cast<mma_args *>(args[lane]);
        const int g = lane / 4, q = lane % 4;
        for (int i = 0; i < 4; i++) a[g + i % 2 * 8][q + i / 2 * 4] = x.a[i];
        for (int i = 0; i < 2; i++) b[q + 4 * i][g] = x.b[i];
        for (int i = 0; i < 2; i++) memcpy(&c[g + 8 * i][2 * q], x.c + 2 * i, 8);
    }
    split<to_float>(a[0], 128, a_half[0][0], a_half[1][0]);
    split<to_float>(b[0], 64, b_half[0][0], b_half[1][0]);
    for (int i = 0; i < 16; i++) {
        float_x4 *sum = reinterpret_cast<float_x4 *>(c[i]);
        for (int p = 0; p < 8; p++)
            for (int half = 0; half < 2; half++) {
                const float_x4 *column = reinterpret_cast<float_x4 *>(b_half[half][p]);
                sum[0] += a_half[half][i][p] * column[0];
                sum[1] += a_half[half][i][p] * column[1];
            }
    }
    for (int lane = 0; lane < LANES; lane++) {
        float *x = static_cast<mma_args *>(args[lane])->c;
        for (int i = 0; i < 2; i++) memcpy(x + 2 * i, &c[lane / 4 + 8 * i][lane % 4 * 2], 8);
    }
}

const collective MMA_BF16 = {"mma.m16n8k16 bf16", true, compute_mma<bf16_to_float>};
const collective MMA_FP16 = {"mma.m16n8k16 fp16", true, compute_mma<fp16_to_float>};

} // namespace

void mma_m16n8k16(bool fp16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_args x = {c, a, {b0, b1}};
    meet(fp16 ? MMA_FP16 : MMA_BF16, ALL, &x);
}

} // namespace emu
