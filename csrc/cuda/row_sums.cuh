/* SPDX-License-Identifier: Apache-2.0
 *
 * fp32 sums over rows by one block of threads, in an order that only the number of rows decides.
 *
 * A thread keeps one 16-byte piece of every in_flight-th row, so a warp reads whole rows and the
 * sums of eight columns stay in registers; then the in_flight partial sums of a column are added in
 * the order of their rows.
 */
#ifndef PBS_CUDA_ROW_SUMS_CUH
#define PBS_CUDA_ROW_SUMS_CUH

#include "kernel.cuh"
#include "rows.cuh"

namespace pbs {

enum { SUM_THREADS = 256 };

struct row_team {
    int32_t pieces;    /* of a row */
    int32_t in_flight; /* rows that the block reads at a time */
    int32_t row;       /* the thread's first; in_flight or more: it has none */
    int32_t piece;
};

/* Partial sums: columns in the order [half of a piece][piece][4], so that threads side by side
 * touch neighbouring banks both when they write and when they add. */
struct partial_sums {
    float4 part[2 * SUM_THREADS]; /* [2, in_flight, pieces] */
};

PBS_DEVICE row_team row_team_of(int32_t head_dim, int32_t thread) {
    row_team team;
    team.pieces = head_dim / PIECE;
    team.in_flight = SUM_THREADS / team.pieces;
    team.row = thread / team.pieces;
    team.piece = thread % team.pieces;
    return team;
}

template <class T> PBS_DEVICE void add_piece(float (&sum)[PIECE], const uint4 &piece) {
    float x[PIECE];
    to_floats<T>(piece, x);
    PBS_UNROLL
    for (int i = 0; i < PIECE; i++) sum[i] += x[i];
}

PBS_DEVICE void put_partial(partial_sums &shared, const row_team &team, const float (&sum)[PIECE]) {
    if (team.row >= team.in_flight) return;
    float4 *at = shared.part + team.row * team.pieces + team.piece;
    at[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    at[team.in_flight * team.pieces] = make_float4(sum[4], sum[5], sum[6], sum[7]);
}

/* After a barrier: the column of a thread, and the sum of its partial sums. column < 0: it has
 * none.
 */
struct column_sum {
    int32_t column;
    float sum;
};

PBS_DEVICE column_sum add_column(const partial_sums &shared, const row_team &team, int32_t thread) {
    const int32_t half_columns = 4 * team.pieces;
    if (thread >= 2 * half_columns) return {-1, 0.0f};
    const int32_t half = thread / half_columns, rest = thread % half_columns;
    const float *part =
        &shared.part[half * team.in_flight * team.pieces].x + rest; /* row 0, this column */
    float sum = 0.0f;
    for (int32_t row = 0; row < team.in_flight; row++) sum += part[row * half_columns];
    return {rest / 4 * PIECE + half * 4 + rest % 4, sum};
}

/* out[column] = factor * its sum, for all columns. */
PBS_DEVICE void add_partials(const partial_sums &shared, const row_team &team, int32_t thread,
                             float factor, float *out) {
    const column_sum s = add_column(shared, team, thread);
    if (s.column >= 0) out[s.column] = s.sum * factor;
}

/* The same where it is wanted, and rounded to nearest even where that is. NULL = not wanted. */
template <class T>
PBS_DEVICE void add_partials(const partial_sums &shared, const row_team &team, int32_t thread,
                             float factor, float *out, uint16_t *rounded) {
    const column_sum s = add_column(shared, team, thread);
    if (s.column < 0) return;
    const float x = s.sum * factor;
    if (out) out[s.column] = x;
    if (rounded) rounded[s.column] = static_cast<uint16_t>(ptx::pack<T>(x, 0.0f) & 0xffff);
}

} // namespace pbs

#endif /* PBS_CUDA_ROW_SUMS_CUH */
