/* SPDX-License-Identifier: Apache-2.0
 *
 * Rows of q, k and v on a device: where a sequence lies, where a row starts, 16 bytes of it at a
 * time. Offsets are 64-bit.
 */
#ifndef PBS_CUDA_ROWS_CUH
#define PBS_CUDA_ROWS_CUH

#include "../core/check.h"
#include "ptx.cuh"

namespace pbs {

/* array[b] or, without an array, `absent`; cut to [0, most]. */
PBS_DEVICE int32_t clamped(const int32_t *array, int32_t b, int32_t absent, int32_t most) {
    const int32_t given = array ? array[b] : absent;
    return pbs_max_i32(pbs_min_i32(given, most), 0);
}

} // namespace pbs

/* pbs_dims_seq, cut to what the tensors hold: geometry arrays are a device's, so no host has
 * checked them. Garbage gives garbage but reads nothing else. */
PBS_DEVICE pbs_seq pbs_dims_seq_clamped(const pbs_dims *d, int32_t b) {
    const pbs_geometry &g = d->geometry;
    const int32_t q_start = pbs::clamped(g.q_start, b, 0, d->seqlen_q);
    const int32_t kv_start = pbs::clamped(g.kv_start, b, 0, d->seqlen_k);
    const int32_t rows = d->seqlen_q - q_start, keys = d->seqlen_k - kv_start;
    pbs_seq s;
    s.q_start = q_start;
    s.kv_start = kv_start;
    s.q_len = pbs::clamped(g.q_len, b, rows, pbs_min_i32(rows, d->max_q));
    s.kv_len = pbs::clamped(g.kv_len, b, keys, pbs_min_i32(keys, d->max_k));
    s.q_offset = s.kv_len - s.q_len;
    return s;
}

namespace pbs {

enum { PIECE = 8 }; /* elements of 16 bytes: what one thread moves at a time */

/* Rows of one head of one sequence; row 0 is the sequence's first. Every row starts on 16 bytes. */
struct head_rows {
    uint16_t *first;
    int64_t stride; /* elements */
};

PBS_DEVICE head_rows rows_of(const pbs_view &v, int32_t b, int32_t h, int64_t start) {
    const int64_t at = b * v.stride[0] + h * v.stride[1] + start * v.stride[2];
    return {static_cast<uint16_t *>(v.data) + at, v.stride[2]};
}

/* Piece `piece` of a row: elements [8 piece, 8 piece + 8). */
PBS_DEVICE const uint4 *piece_of(const head_rows &rows, int64_t row, int32_t piece) {
    return reinterpret_cast<const uint4 *>(rows.first + row * rows.stride) + piece;
}

/* One word is two elements, the first in its low half. */
template <class T> PBS_DEVICE void word_to_floats(uint32_t word, float *x) {
    x[0] = ptx::to_float<T>(static_cast<uint16_t>(word & 0xffff));
    x[1] = ptx::to_float<T>(static_cast<uint16_t>(word >> 16));
}

template <class T> PBS_DEVICE void to_floats(const uint4 &piece, float (&x)[PIECE]) {
    word_to_floats<T>(piece.x, x);
    word_to_floats<T>(piece.y, x + 2);
    word_to_floats<T>(piece.z, x + 4);
    word_to_floats<T>(piece.w, x + 6);
}

} // namespace pbs

#endif /* PBS_CUDA_ROWS_CUH */
