/* SPDX-License-Identifier: Apache-2.0
 *
 * attend: one query block against its listed panels and its own span.
 *
 *   for each panel that counts, the next one on its way into L2 meanwhile
 *     for each strip of rows that sees a key of it
 *       acc_s = Q K^T              a group of keys at a time, all rows inside
 *       P     = softmax(acc_s)     in place, rescaling acc_o where a row maximum rose
 *       acc_o += P V               a group of columns at a time
 *   out = acc_o / row_sum
 *
 * Panels outside and strips inside: K and V come from L3 or memory once per query block. acc_s of a
 * strip (32 KiB) lives in L2, which costs nothing as long as the loads are in order.
 */
#ifndef PBS_CPU_KERNEL_ATTEND_H
#define PBS_CPU_KERNEL_ATTEND_H

#include "cpu/kernel/attend_common.h"

NOINLINE void strip_scores(const attend_state *state, const strip_job *strip, prefetch *next) {
    const int32_t words = panel_words(state->job->head_dim);
    gemm g = {.a = state->s.q + (int64_t)strip->row * words,
              .lda = words,
              .b = strip->panel,
              .c = state->s.acc_s,
              .ldc = state->keys,
              .rows = strip->rows,
              .steps = words};
    for (int32_t key = 0; key < strip->visible; key += GROUP) {
        gemm_group(VEC_PAIRS, 0, &g, next);
        g.b += (int64_t)words * GROUP;
        g.c += GROUP;
    }
}

INLINE void strip_softmax(const exp2_degree degree, const attend_state *state,
                          const strip_job *strip) {
    const int32_t n = round_up(strip->visible, GROUP);
    if (strip->masked) mask_strip(state, strip, state->s.acc_s, n);
    softmax_rows(VEC_PAIRS, degree, &state->softmax, strip->bias, strip->row, strip->rows,
                 state->s.acc_s, state->keys, n);
}

NOINLINE void strip_output(const attend_state *state, const strip_job *strip, prefetch *next) {
    const int32_t columns = panel_columns(state->job->head_dim);
    gemm g = {.a = state->s.acc_s,
              .lda = state->keys,
              .b = strip->panel + k_part(state->job->head_dim, state->keys),
              .c = state->s.acc_o + (int64_t)strip->row * columns,
              .ldc = columns,
              .rows = strip->rows,
              .steps = panel_steps(round_up(strip->visible, GROUP))};
    for (int32_t d = 0; d < columns; d += GROUP) {
        gemm_group(VEC_PAIRS, 1, &g, next);
        g.b += (int64_t)panel_steps(state->keys) * GROUP;
        g.c += GROUP;
    }
}

INLINE void attend_panels(const exp2_degree degree, const attend_state *state) {
    const pbs_attend_job *job = state->job;
    const size_t bytes = kernel_panel_bytes(job->head_dim, state->keys);
    /* Tiles that one panel runs through, tails not counted. */
    const int32_t tiles =
        job->rows / TILE_ROWS * (state->keys / GROUP + panel_columns(job->head_dim) / GROUP);
    panel_ref panel = next_panel(state, before_all_panels);
    while (panel.at) {
        const panel_ref after = next_panel(state, panel);
        prefetch next = {after.at, after.at ? after.at + bytes : NULL,
                         (int32_t)(bytes / PBS_ALIGN) / pbs_max_i32(tiles, 1) + 1};
        for (int32_t row = 0; row < job->rows; row += STRIP) {
            strip_job strip = {.row = row, .rows = pbs_min_i32(job->rows - row, STRIP)};
            look_at_panel(state, panel, &strip);
            if (!strip.visible) continue;
            strip_scores(state, &strip, &next);
            strip_softmax(degree, state, &strip);
            strip_output(state, &strip, &next);
        }
        panel = after;
    }
}

static void kernel_attend_block(const pbs_attend_job *job) {
    attend_state state = start_attend(job);
    switch (job->q.dtype) {
    case PBS_DTYPE_FP32:
        load_rows(PBS_DTYPE_FP32, &state);
        attend_panels(EXP2_FINE, &state);
        store_rows(PBS_DTYPE_FP32, &state);
        break;
    case PBS_DTYPE_FP16:
        load_rows(PBS_DTYPE_FP16, &state);
        attend_panels(EXP2_FINE, &state);
        store_rows(PBS_DTYPE_FP16, &state);
        break;
    case PBS_DTYPE_BF16:
        load_rows(VEC_PAIRS ? PBS_DTYPE_FP32 : PBS_DTYPE_BF16, &state);
        attend_panels(EXP2_COARSE, &state);
        store_rows(PBS_DTYPE_BF16, &state);
        break;
    }
}

#endif /* PBS_CPU_KERNEL_ATTEND_H */
