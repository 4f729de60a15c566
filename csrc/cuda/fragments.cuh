/* SPDX-License-Identifier: Apache-2.0
 *
 * Matrices of 16-bit rows kept in the order in which tensor cores read them, for products of whole
 * rows (Q K^T). Against tile.cuh: any head_dim at run time, no ldmatrix, and an operand that many
 * blocks share needs no shared memory, because a warp reads it from the cache as 512 bytes in a
 * row.
 *
 * A matrix is cut into blocks of 8 rows x 32 columns. Lane 4 g + q of a warp owns columns
 * [8 q, 8 q + 8) of row g of a block, one piece of 16 bytes:
 *
 *   piece ((row / 8) * strips + column / 32) * 32 + 4 (row % 8) + (column % 32) / 8
 *
 * mma wants columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of a k_step in lane q. A sum over k may be
 * taken in any order that both operands share: here a block is two k_steps, and of its piece the
 * words 0, 1 are the first and 2, 3 the second.
 */
#ifndef PBS_CUDA_FRAGMENTS_CUH
#define PBS_CUDA_FRAGMENTS_CUH

#include "rows.cuh"
#include "tile.cuh"

namespace pbs {

enum {
    STRIP = 32,                   /* columns of a block */
    STRIP_PIECES = STRIP / PIECE, /* of one row */
    BLOCK_ROWS = 8,
    BLOCK_PIECES = BLOCK_ROWS * STRIP_PIECES,
};

PBS_HD int32_t strips_of(int32_t head_dim) { return pbs_ceil_div(head_dim, STRIP); }

/* Where a block of 8 rows begins; count in pieces. */
PBS_HD int64_t fragment_rows(int64_t row, int32_t strips) {
    return row / BLOCK_ROWS * strips * BLOCK_PIECES;
}

/* The first operand of a product: a matrix of fragments from its first block on, or rows of a head
 * where they lie, zeros from row `end` and column head_dim on. */
struct fragment_matrix {
    const uint4 *first;
    int32_t strips;
};

struct plain_rows {
    head_rows rows;
    int32_t first, end;
    int32_t pieces; /* of a row */
};

/* What `lane` holds of a block of 8 rows x 32 columns. */
PBS_DEVICE uint4 piece_at(const fragment_matrix &a, int32_t block, int32_t strip, int lane) {
    return a.first[(block * a.strips + strip) * BLOCK_PIECES + lane];
}

PBS_DEVICE uint4 piece_at(const plain_rows &a, int32_t block, int32_t strip, int lane) {
    const int32_t row = a.first + block * BLOCK_ROWS + lane / STRIP_PIECES;
    const int32_t piece = strip * STRIP_PIECES + lane % STRIP_PIECES;
    if (row >= a.end || piece >= a.pieces) return make_uint4(0, 0, 0, 0);
    return *piece_of(a.rows, row, piece);
}

/* acc[M][8] += A[16 M, :] B[64, :]^T; b: its first block. Element i of acc[m][n] is row
 * 16 m + g + 8 (i / 2) of A, row 8 n + 2 q + i % 2 of B. */
template <class T, int M, class A>
PBS_DEVICE void fragment_product(float (&acc)[M][8][4], const A &a, const uint4 *b, int32_t strips,
                                 int lane) {
    const int32_t next_rows = strips * BLOCK_PIECES;
    b += lane;
    PBS_NO_UNROLL
    for (int32_t strip = 0; strip < strips; strip++, b += BLOCK_PIECES) {
        uint4 rows[2 * M];
        PBS_UNROLL
        for (int i = 0; i < 2 * M; i++) rows[i] = piece_at(a, i, strip, lane);
        uint32_t a_first[M][4], a_second[M][4]; /* of the two k_steps */
        PBS_UNROLL
        for (int m = 0; m < M; m++) {
            const uint4 low = rows[2 * m], high = rows[2 * m + 1];
            a_first[m][0] = low.x, a_first[m][1] = high.x;
            a_first[m][2] = low.y, a_first[m][3] = high.y;
            a_second[m][0] = low.z, a_second[m][1] = high.z;
            a_second[m][2] = low.w, a_second[m][3] = high.w;
        }
        PBS_UNROLL
        for (int n = 0; n < 8; n++) {
            const uint4 column = b[n * next_rows];
            PBS_UNROLL
            for (int m = 0; m < M; m++) {
                ptx::mma_m16n8k16<T>(acc[m][n], a_first[m], column.x, column.y);
                ptx::mma_m16n8k16<T>(acc[m][n], a_second[m], column.z, column.w);
            }
        }
    }
}

/* Rows [first, first + 8 blocks) of a head into blocks, asynchronously, by `warps` warps; zeros
 * beyond head_dim. All rows exist. */
PBS_DEVICE void fragment_load(uint4 *to, const head_rows &rows, int64_t first, int32_t blocks,
                              int32_t head_dim, int32_t warp, int32_t warps, int lane) {
    const int32_t strips = strips_of(head_dim), pieces = head_dim / PIECE;
    const int32_t g = lane / STRIP_PIECES, q = lane % STRIP_PIECES;
    for (int32_t i = warp; i < blocks; i += warps) {
        const uint4 *from = piece_of(rows, first + i * BLOCK_ROWS + g, 0);
        uint32_t at = ptx::shared_address(to + i * strips * BLOCK_PIECES + lane);
        for (int32_t piece = q; piece < strips * STRIP_PIECES; piece += STRIP_PIECES) {
            const bool exists = piece < pieces;
            ptx::cp_async_16(at, from + (exists ? piece : 0), exists ? 16 : 0);
            at += BLOCK_PIECES * sizeof(uint4);
        }
    }
}

} // namespace pbs

#endif /* PBS_CUDA_FRAGMENTS_CUH */
