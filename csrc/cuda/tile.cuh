/* SPDX-License-Identifier: Apache-2.0
 *
 * Tiles of 16-bit rows in shared memory, and the products of two of them on the tensor cores.
 *
 * A tile is ROWS x COLS, row after row; a row is cut into chunks of 16 bytes, which cp.async writes
 * and ldmatrix reads whole. Chunk c of row r lies at chunk c ^ swizzle(r) of that row, so that the
 * eight rows of an 8x8 matrix lie in eight different bank groups:
 *
 *   COLS % 64 == 0   swizzle(r) = r % 8            rows of 128 bytes, or multiples
 *   COLS % 64 == 32  swizzle(r) = (r / 2) % 4      odd rows begin half a line further on
 *
 *   tile_fill        rows from global memory, zeros where there are none
 *   tile_operand     one lane's ldmatrix addresses
 *   gemm_nt          acc += A B^T     Q K^T: both operands from tiles, rows of head_dim
 *   gemm_pn          acc += P B       P V: P from accumulators, V as it is stored
 *
 * m_tile is a tensor core's 16 rows, n_tile its 8 columns, k_step its 16 products. With
 * g = lane / 4 and q = lane % 4, acc[m_tile][n_tile][i] is row 16 m_tile + g + 8 (i / 2), column
 * 8 n_tile + 2 q + i % 2.
 */
#ifndef PBS_CUDA_TILE_CUH
#define PBS_CUDA_TILE_CUH

#include "ptx.cuh"

namespace pbs {

constexpr int CHUNK = 8;        /* elements of 16 bits */
constexpr int CHUNK_BYTES = 16; /* what a cp.async, a ldmatrix row and a wide store move */

/* A chunk in memory; it may be the same bytes as elements or packed pairs. */
struct __attribute__((may_alias, aligned(CHUNK_BYTES))) chunk {
    uint32_t word[4];
};

template <int ROWS, int COLS> struct alignas(128) tile {
    static_assert(COLS % 32 == 0, "a row is a whole number of half lines of 64 bytes");
    static_assert(ROWS % 8 == 0, "the swizzle repeats every 8 rows");
    uint16_t element[ROWS * COLS];
};

/* ---- swizzle --------------------------------------------------------------------------------- */
/* Only these low bits of a chunk's number are swizzled. */
template <int COLS> constexpr int SWIZZLED_BITS = COLS % 64 == 0 ? 7 : 3;

template <int COLS> PBS_DEVICE unsigned swizzle(unsigned row) {
    return COLS % 64 == 0 ? row & 7 : row >> 1 & 3;
}

/* Byte offset of chunk c of a row. */
template <int COLS> PBS_DEVICE uint32_t chunk_offset(unsigned row, unsigned c) {
    return (row * (COLS / CHUNK) + (c ^ swizzle<COLS>(row))) * CHUNK_BYTES;
}

/* ---- global -> shared ------------------------------------------------------------------------ */
/* How THREADS threads share a tile: PER_ROW of them take the chunks c, c + PER_ROW, ... of a row,
 * and then of the row ROW_STEP further on. Both steps keep the swizzle, so that all but the first
 * address of a thread are constants away from it. */
template <int COLS, int THREADS> struct fill_plan {
    static constexpr int PER_ROW = COLS % 64 == 0 ? 8 : 4;
    static constexpr int ROW_STEP = THREADS / PER_ROW;
    static constexpr int CHUNKS = COLS / CHUNK / PER_ROW;
    static_assert(THREADS % PER_ROW == 0 && ROW_STEP % 8 == 0, "steps must keep the swizzle");
};

/* Row r of the tile = row r at `from`, `stride` elements apart, for r < count; zeros for the other
 * rows and for columns >= head_dim (a multiple of 8). Called by THREADS threads, thread = 0 ...
 * THREADS - 1. The copies are under way when this returns: commit, wait, barrier are the caller's.
 */
template <int THREADS, int ROWS, int COLS>
PBS_DEVICE void tile_fill(tile<ROWS, COLS> &to, const uint16_t *from, int64_t stride, int count,
                          int head_dim, unsigned thread) {
    using plan = fill_plan<COLS, THREADS>;
    static_assert(ROWS % plan::ROW_STEP == 0, "every thread takes as many rows");
    const int row = static_cast<int>(thread / plan::PER_ROW);
    const int c = static_cast<int>(thread % plan::PER_ROW);
    const uint32_t at = ptx::shared_address(&to) + chunk_offset<COLS>(row, c);
    from += row * stride + c * CHUNK;
    PBS_UNROLL
    for (int r = 0; r < ROWS; r += plan::ROW_STEP) {
        PBS_UNROLL
        for (int i = 0; i < plan::CHUNKS; i++) {
            const int column = (c + i * plan::PER_ROW) * CHUNK;
            const bool exists = row + r < count && column < head_dim;
            ptx::cp_async_16(
                at + static_cast<uint32_t>(r * COLS * 2 + i * plan::PER_ROW * CHUNK_BYTES),
                from + i * plan::PER_ROW * CHUNK, exists ? CHUNK_BYTES : 0);
        }
        from += plan::ROW_STEP * stride;
    }
}

/* The same for scattered rows: row r of the tile = row index[r] at `from`, zeros where index[r] is
 * negative. */
template <int THREADS, int ROWS, int COLS>
PBS_DEVICE void tile_gather(tile<ROWS, COLS> &to, const uint16_t *from, int64_t stride,
                            const int32_t *index, int head_dim, unsigned thread) {
    using plan = fill_plan<COLS, THREADS>;
    const int row = static_cast<int>(thread / plan::PER_ROW);
    const int c = static_cast<int>(thread % plan::PER_ROW);
    const uint32_t at = ptx::shared_address(&to) + chunk_offset<COLS>(row, c);
    PBS_UNROLL
    for (int r = 0; r < ROWS; r += plan::ROW_STEP) {
        const int32_t source = index[row + r];
        const uint16_t *line = from + (source < 0 ? 0 : source) * stride + c * CHUNK;
        PBS_UNROLL
        for (int i = 0; i < plan::CHUNKS; i++) {
            const int column = (c + i * plan::PER_ROW) * CHUNK;
            const bool exists = source >= 0 && column < head_dim;
            ptx::cp_async_16(
                at + static_cast<uint32_t>(r * COLS * 2 + i * plan::PER_ROW * CHUNK_BYTES),
                line + i * plan::PER_ROW * CHUNK, exists ? CHUNK_BYTES : 0);
        }
    }
}

/* ---- shared -> registers --------------------------------------------------------------------- */
/* One lane's rows for ldmatrix.x4: what remains to be added is known at compile time, or is an
 * exclusive or with it. */
template <int COLS> struct tile_operand {
    uint32_t row;   /* address of the lane's row of the first matrices */
    uint32_t chunk; /* its swizzled chunk there, in bytes */
};

/* From first_row (a multiple of 8) on; lane_chunk is 0 or 1. */
template <int ROWS, int COLS>
PBS_DEVICE tile_operand<COLS> operand_at(const tile<ROWS, COLS> &t, unsigned first_row,
                                         unsigned lane_row, unsigned lane_chunk) {
    return {ptx::shared_address(&t) + (first_row + lane_row) * COLS * 2,
            (lane_chunk ^ swizzle<COLS>(lane_row)) * CHUNK_BYTES};
}

/* A of gemm_nt: a row of the tile is a row of A. */
template <int ROWS, int COLS>
PBS_DEVICE tile_operand<COLS> operand_a(const tile<ROWS, COLS> &t, unsigned first_row,
                                        unsigned lane) {
    return operand_at(t, first_row, lane % 16, lane / 16);
}

/* B of gemm_nt: a row of the tile is a column of B. Words 0 and 1 are b0 and b1 of one n_tile, 2
 * and 3 of the next: mma wants its pairs in neighbouring registers. */
template <int ROWS, int COLS>
PBS_DEVICE tile_operand<COLS> operand_b(const tile<ROWS, COLS> &t, unsigned first_row,
                                        unsigned lane) {
    return operand_at(t, first_row, lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

/* B of gemm_pn, loaded transposed: a row of the tile is a row of B. Words as in operand_b. */
template <int ROWS, int COLS>
PBS_DEVICE tile_operand<COLS> operand_b_trans(const tile<ROWS, COLS> &t, unsigned first_row,
                                              unsigned lane) {
    return operand_at(t, first_row, lane % 16, lane / 16);
}

/* Address for the 16 x 16 elements at (row, column), both multiples of 16 known when compiled. */
template <int COLS> PBS_DEVICE uint32_t operand_address(tile_operand<COLS> o, int row, int column) {
    const int c = column / CHUNK, low = c & SWIZZLED_BITS<COLS>;
    return o.row + (o.chunk ^ static_cast<uint32_t>(low * CHUNK_BYTES)) +
           static_cast<uint32_t>((c - low) * CHUNK_BYTES + row * COLS * 2);
}

/* ---- products -------------------------------------------------------------------------------- */
/* acc[16 M, 8 N] += A[16 M, COLS] B[8 N, COLS]^T; a: this warp's rows, b: all of its tile's. */
template <class T, int M, int N, int COLS>
PBS_DEVICE void gemm_nt(float (&acc)[M][N][4], tile_operand<COLS> a, tile_operand<COLS> b) {
    static_assert(N % 2 == 0, "a B fragment serves two n_tiles");
    PBS_UNROLL
    for (int k = 0; k < COLS; k += 16) {
        uint32_t fragment_a[M][4];
        PBS_UNROLL
        for (int m = 0; m < M; m++) ptx::ldmatrix_x4(fragment_a[m], operand_address(a, 16 * m, k));
        PBS_UNROLL
        for (int n = 0; n < N; n += 2) {
            uint32_t fragment_b[4];
            ptx::ldmatrix_x4(fragment_b, operand_address(b, 8 * n, k));
            PBS_UNROLL
            for (int m = 0; m < M; m++) {
                ptx::mma_m16n8k16<T>(acc[m][n], fragment_a[m], fragment_b[0], fragment_b[1]);
                ptx::mma_m16n8k16<T>(acc[m][n + 1], fragment_a[m], fragment_b[2], fragment_b[3]);
            }
        }
    }
}

/* Columns 16 k_step ... + 15 of accumulators, rounded to T, as A of mma: the accumulator layout of
 * two n_tiles is the A layout of one k_step, so no value changes its thread. */
template <class T, int N>
PBS_DEVICE void accumulator_to_a(uint32_t (&a)[4], const float (&acc)[N][4], int k_step) {
    a[0] = ptx::pack<T>(acc[2 * k_step][0], acc[2 * k_step][1]);
    a[1] = ptx::pack<T>(acc[2 * k_step][2], acc[2 * k_step][3]);
    a[2] = ptx::pack<T>(acc[2 * k_step + 1][0], acc[2 * k_step + 1][1]);
    a[3] = ptx::pack<T>(acc[2 * k_step + 1][2], acc[2 * k_step + 1][3]);
}

/* acc[16 M, 8 N] += P[16 M, 8 K] B[8 K, COLS], the first 8 N columns of B. */
template <class T, int M, int N, int K, int COLS>
PBS_DEVICE void gemm_pn(float (&acc)[M][N][4], const float (&p)[M][K][4], tile_operand<COLS> b) {
    static_assert(K % 2 == 0 && N % 2 == 0 && 8 * N <= COLS, "whole fragments");
    PBS_UNROLL
    for (int k = 0; k < K / 2; k++) {
        uint32_t fragment_p[M][4];
        PBS_UNROLL
        for (int m = 0; m < M; m++) accumulator_to_a<T>(fragment_p[m], p[m], k);
        PBS_UNROLL
        for (int n = 0; n < N; n += 2) {
            uint32_t fragment_b[4];
            ptx::ldmatrix_x4_trans(fragment_b, operand_address(b, 16 * k, 8 * n));
            PBS_UNROLL
            for (int m = 0; m < M; m++) {
                ptx::mma_m16n8k16<T>(acc[m][n], fragment_p[m], fragment_b[0], fragment_b[1]);
                ptx::mma_m16n8k16<T>(acc[m][n + 1], fragment_p[m], fragment_b[2], fragment_b[3]);
            }
        }
    }
}

template <int M, int N> PBS_DEVICE void clear(float (&acc)[M][N][4]) {
    PBS_UNROLL
    for (int m = 0; m < M; m++) {
        PBS_UNROLL
        for (int n = 0; n < N; n++) {
            PBS_UNROLL
            for (int i = 0; i < 4; i++) acc[m][n][i] = 0.0f;
        }
    }
}

} // namespace pbs

#endif /* PBS_CUDA_TILE_CUH */
