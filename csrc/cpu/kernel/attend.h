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

#include "cpu/kernel/pack.h"
#include "cpu/kernel/softmax.h"
#include "cpu/kernel/tile.h"

enum { STRIP = 64 };

/* Columns of scratch, each a multiple of 64 bytes for any whole number of strips. */
typedef struct attend_scratch {
    float *q;          /* [rows][panel_words] */
    float *acc_o;      /* [rows][panel_columns] */
    float *row_sum;    /* [rows][VL] */
    float *row_weight; /* [rows][VL] with pairs, else NULL: see softmax_state */
    float *acc_s;      /* [STRIP][PBS_MAX_PANEL_KEYS] */
    float *row_max;    /* [rows] */
    int32_t *seen;     /* [rows]: keys that the row sees, counted from key 0 */
} attend_scratch;

INLINE size_t carve_attend_scratch(attend_scratch *s, void *base, int32_t head_dim,
                                   int32_t block_q) {
    const size_t rows = (size_t)round_up(block_q, STRIP);
    const size_t q = rows * (size_t)panel_words(head_dim);
    const size_t o = rows * (size_t)panel_columns(head_dim);
    const size_t sum = rows * VL, strip = STRIP * PBS_MAX_PANEL_KEYS;
    if (s) {
        s->q = base;
        s->acc_o = s->q + q;
        s->row_sum = s->acc_o + o;
        s->row_weight = VEC_PAIRS ? s->row_sum + sum : NULL;
        s->acc_s = s->row_sum + (1 + VEC_PAIRS) * sum;
        s->row_max = s->acc_s + strip;
        s->seen = (int32_t *)(s->row_max + rows);
    }
    return 4 * (q + o + (1 + VEC_PAIRS) * sum + strip + rows + rows);
}

static size_t kernel_attend_scratch(int32_t head_dim, int32_t block_q) {
    return carve_attend_scratch(NULL, NULL, head_dim, block_q);
}

typedef struct attend_state {
    const pbs_attend_job *job;
    attend_scratch s;
    softmax_state softmax;
    int32_t keys; /* of a panel */
} attend_state;

/* ---- which panels ---------------------------------------------------------------------------- */
typedef struct panel_ref {
    const char *at; /* NULL: there are no more */
    int32_t index;  /* of the panel: its first key is index * keys */
    int own;
} panel_ref;

INLINE int bit_at(const uint32_t *bits, int32_t n) { return bits[n / 32] >> (n % 32) & 1; }

/* The panel after `last` in ascending order, history before own span. */
static panel_ref next_panel(const attend_state *state, panel_ref last) {
    const pbs_attend_job *job = state->job;
    const int32_t per_block = job->block_k / state->keys;
    const size_t bytes = kernel_panel_bytes(job->head_dim, state->keys);
    int32_t i = last.index + 1;
    if (!last.own) {
        for (; i < job->hist_end * per_block; i++)
            if (bit_at(job->bits, i / per_block))
                return (panel_ref){job->hist_panels + (size_t)i * bytes, i, 0};
        i = job->own_begin / state->keys;
    }
    for (; i < pbs_ceil_div(job->own_end, state->keys); i++)
        if (!job->own_bits || bit_at(job->own_bits, i / per_block))
            return (panel_ref){job->own_panels + (size_t)i * bytes, i, 1};
    return (panel_ref){NULL, i, 1};
}

/* ---- one strip and one panel ----------------------------------------------------------------- */
typedef struct strip_job {
    int32_t row, rows;
    const float *panel;
    int32_t visible; /* keys of the panel that some row sees */
    int masked;      /* some row sees fewer */
    int32_t first_key;
} strip_job;

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
    const int32_t n = round_up(strip->visible, GROUP), *seen = state->s.seen + strip->row;
    for (int32_t r = 0; strip->masked && r < strip->rows; r++)
        mask_row(state->s.acc_s + r * state->keys, seen[r] - strip->first_key, n);
    softmax_rows(VEC_PAIRS, degree, &state->softmax, strip->row, strip->rows, state->s.acc_s,
                 state->keys, n);
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

/* What the strip's rows see of the panel; 0 keys: nothing. */
static void look_at_panel(const attend_state *state, panel_ref panel, strip_job *strip) {
    strip->panel = (const float *)(const void *)panel.at;
    strip->first_key = panel.index * state->keys;
    strip->visible = state->keys;
    strip->masked = 0;
    if (!panel.own) return;
    int32_t most = INT32_MIN, least = INT32_MAX;
    for (int32_t r = strip->row; r < strip->row + strip->rows; r++) {
        most = pbs_max_i32(most, state->s.seen[r]);
        least = pbs_min_i32(least, state->s.seen[r]);
    }
    strip->visible = pbs_max_i32(pbs_min_i32(most - strip->first_key, state->keys), 0);
    strip->masked = least - strip->first_key < round_up(strip->visible, GROUP);
}

INLINE void attend_panels(const exp2_degree degree, const attend_state *state) {
    const pbs_attend_job *job = state->job;
    const size_t bytes = kernel_panel_bytes(job->head_dim, state->keys);
    /* Tiles that one panel runs through, tails not counted. */
    const int32_t tiles =
        job->rows / TILE_ROWS * (state->keys / GROUP + panel_columns(job->head_dim) / GROUP);
    panel_ref panel = next_panel(state, (panel_ref){NULL, -1, 0});
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

/* ---- rows in and out ------------------------------------------------------------------------- */
INLINE int32_t row_of(const pbs_attend_job *job, int32_t i) {
    return job->q.index ? job->q.index[i] : job->row_begin + i;
}

/* Q as words, and the state of rows that have seen nothing. */
INLINE void load_rows(const pbs_dtype dtype, attend_state *state) {
    const pbs_attend_job *job = state->job;
    const int32_t words = panel_words(job->head_dim), columns = panel_columns(job->head_dim);
    for (int32_t i = 0; i < job->rows; i++) {
        const int64_t row = row_of(job, i);
        const char *at =
            (const char *)job->q.base + row * job->q.stride * (int64_t)dtype_bytes(job->q.dtype);
        for (int32_t w = 0; w < words; w += VL)
            vf_store_as(PBS_DTYPE_FP32, state->s.q + (int64_t)i * words + w, words - w,
                        vf_load_as(dtype, at + (size_t)w * dtype_bytes(dtype), words - w));
        state->s.seen[i] = pbs_min_i32(job->q_offset + (int32_t)row + 1, job->own_end);
        state->s.row_max[i] = NO_ROW_MAX;
        vf_store(state->s.row_sum + i * VL, vf_zero());
        if (VEC_PAIRS) vf_store(state->s.row_weight + i * VL, vf_zero());
    }
    memset(state->s.acc_o, 0, (size_t)padded_rows(job->rows) * (size_t)columns * 4);
}

INLINE void store_rows(const pbs_dtype dtype, const attend_state *state) {
    const pbs_attend_job *job = state->job;
    const int32_t columns = panel_columns(job->head_dim);
    for (int32_t i = 0; i < job->rows; i++) {
        const int64_t row = row_of(job, i);
        const float sum = vf_hadd(vf_load(state->s.row_sum + i * VL));
        const float *weights = VEC_PAIRS ? state->s.row_weight : state->s.row_sum;
        const float weight = vf_hadd(vf_load(weights + i * VL));
        const vf inverse = vf_set1(weight == 0.0f ? 0.0f : 1.0f / weight);
        char *out = (char *)job->out + row * job->out_stride * (int64_t)dtype_bytes(dtype);
        for (int32_t d = 0; d < job->head_dim; d += VL)
            vf_store_as(dtype, out + (size_t)d * dtype_bytes(dtype), job->head_dim - d,
                        vf_mul(vf_load(state->s.acc_o + (int64_t)i * columns + d), inverse));
        if (job->lse)
            job->lse[row * job->lse_stride] =
                sum == 0.0f ? -INFINITY
                            : (float)(LN2 * (double)state->s.row_max[i] + log((double)sum));
    }
}

static void kernel_attend_block(const pbs_attend_job *job) {
    attend_state state = {.job = job, .keys = pbs_min_i32(job->block_k, PBS_MAX_PANEL_KEYS)};
    carve_attend_scratch(&state.s, job->scratch, job->head_dim, job->rows);
    state.softmax = (softmax_state){.row_max = state.s.row_max,
                                    .row_sum = state.s.row_sum,
                                    .row_weight = state.s.row_weight,
                                    .acc_o = state.s.acc_o,
                                    .columns = panel_columns(job->head_dim),
                                    .scale_log2 = job->scale_log2};
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
