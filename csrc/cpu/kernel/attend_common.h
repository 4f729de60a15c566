/* SPDX-License-Identifier: Apache-2.0
 *
 * What the two skeletons of attend share, attend.h over vectors and attend_tiles.h over tiles: the
 * state of a query block, which panels it reads, what a strip of rows sees of one, rows in and out.
 */
#ifndef PBS_CPU_KERNEL_ATTEND_COMMON_H
#define PBS_CPU_KERNEL_ATTEND_COMMON_H

#include "core/bits.h"
#include "cpu/kernel/pack.h"
#include "cpu/kernel/softmax.h"
#include "cpu/kernel/tile.h"

/* Rows of a strip, and how many strips' scores are kept. */
enum { STRIP = VEC_TILES ? 32 : 64, STRIPS_HELD = VEC_TILES ? 3 : 1 };

/* Columns of scratch, each a multiple of 64 bytes for any whole number of strips. */
typedef struct attend_scratch {
    float *q;          /* [rows][panel_words], in the order of q_at */
    float *acc_o;      /* [rows][panel_columns] */
    float *row_sum;    /* [rows][VL] */
    float *row_weight; /* [rows][VL] with pairs, else NULL: see softmax_state */
    float *acc_s;      /* [STRIPS_HELD][STRIP][PBS_MAX_PANEL_KEYS] */
    float *row_max;    /* [rows] */
    int32_t *seen;     /* [rows]: keys that the row sees, counted from key 0 */
} attend_scratch;

INLINE size_t carve_attend_scratch(attend_scratch *s, void *base, int32_t head_dim,
                                   int32_t block_q) {
    const size_t rows = (size_t)round_up(block_q, STRIP);
    const size_t q = rows * (size_t)panel_words(head_dim);
    const size_t o = rows * (size_t)panel_columns(head_dim);
    const size_t sum = rows * VL, strip = STRIPS_HELD * STRIP * PBS_MAX_PANEL_KEYS;
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
typedef enum panel_kind { HISTORY, MEANS, OWN } panel_kind; /* in the order of reading */

typedef struct panel_ref {
    const char *at; /* NULL: there are no more */
    int32_t index;  /* of the panel: its first key (of MEANS: block) is index * keys */
    panel_kind kind;
} panel_ref;

static const panel_ref before_all_panels = {NULL, -1, HISTORY};

INLINE int bit_at(const uint32_t *bits, int32_t n) { return bits[n / 32] >> (n % 32) & 1; }

/* Is a block of history that has its mean in panel i left out? A panel is whole words of bits. */
static int has_dropped(const attend_state *state, int32_t i) {
    const pbs_attend_job *job = state->job;
    const int32_t end = pbs_min_i32((i + 1) * state->keys, job->hist_end);
    for (int32_t w = i * state->keys / 32; w < pbs_ceil_div(end, 32); w++)
        if (~job->bits[w] & pbs_bits_below(end, w)) return 1;
    return 0;
}

/* The panel after `last`: of each kind in ascending order. */
static panel_ref next_panel(const attend_state *state, panel_ref last) {
    const pbs_attend_job *job = state->job;
    const int32_t per_block = job->block_k / state->keys;
    const size_t bytes = kernel_panel_bytes(job->head_dim, state->keys);
    int32_t i = last.index + 1;
    if (last.kind == HISTORY) {
        for (; i < job->hist_end * per_block; i++)
            if (bit_at(job->bits, i / per_block))
                return (panel_ref){job->hist_panels + (size_t)i * bytes, i, HISTORY};
        i = 0;
    }
    if (last.kind != OWN) {
        for (; job->mean_panels && i < pbs_ceil_div(job->hist_end, state->keys); i++)
            if (has_dropped(state, i))
                return (panel_ref){job->mean_panels + (size_t)i * bytes, i, MEANS};
        i = job->own_begin / state->keys;
    }
    for (; i < pbs_ceil_div(job->own_end, state->keys); i++)
        if (!job->own_bits || bit_at(job->own_bits, i / per_block))
            return (panel_ref){job->own_panels + (size_t)i * bytes, i, OWN};
    return (panel_ref){NULL, i, OWN};
}

/* ---- one strip and one panel ----------------------------------------------------------------- */
typedef struct strip_job {
    int32_t row, rows;
    const float *panel;
    int32_t visible; /* keys of the panel that some row sees */
    int masked;      /* some row sees fewer */
    int means;       /* instead: all rows see those of blocks that are left out */
    float bias;      /* on top of every score, in log2 units */
    int32_t first_key;
} strip_job;

/* What the strip's rows see of the panel; 0 keys: nothing. */
static void look_at_panel(const attend_state *state, panel_ref panel, strip_job *strip) {
    strip->panel = (const float *)(const void *)panel.at;
    strip->first_key = panel.index * state->keys;
    strip->visible = state->keys;
    strip->masked = strip->means = 0;
    strip->bias = 0.0f;
    if (panel.kind == HISTORY) return;
    if (panel.kind == MEANS) {
        strip->visible = pbs_min_i32(state->job->hist_end - strip->first_key, state->keys);
        strip->masked = strip->means = 1;
        strip->bias = state->job->mean_bias;
        return;
    }
    int32_t most = INT32_MIN, least = INT32_MAX;
    for (int32_t r = strip->row; r < strip->row + strip->rows; r++) {
        most = pbs_max_i32(most, state->s.seen[r]);
        least = pbs_min_i32(least, state->s.seen[r]);
    }
    strip->visible = pbs_max_i32(pbs_min_i32(most - strip->first_key, state->keys), 0);
    strip->masked = least - strip->first_key < round_up(strip->visible, GROUP);
}

/* Scores of what a row does not see become -inf: n of them a row, rows keys apart. */
static void mask_strip(const attend_state *state, const strip_job *strip, float *scores,
                       int32_t n) {
    const pbs_attend_job *job = state->job;
    int32_t counts[PBS_MAX_PANEL_KEYS]; /* of means: 1 = its block is left out */
    for (int32_t i = 0; strip->means && i < n; i++) {
        const int32_t block = strip->first_key + i;
        counts[i] = block < job->hist_end && !bit_at(job->bits, block);
    }
    for (int32_t r = 0; r < strip->rows; r++, scores += state->keys) {
        if (!strip->means) mask_row(scores, state->s.seen[strip->row + r] - strip->first_key, n);
        for (int32_t i = 0; strip->means && i < n; i++)
            scores[i] = counts[i] ? scores[i] : -INFINITY;
    }
}

/* ---- rows in and out ------------------------------------------------------------------------- */
INLINE int32_t row_of(const pbs_attend_job *job, int32_t i) {
    return job->q.index ? job->q.index[i] : job->row_begin + i;
}

/* Where words [w, w + VL) of row i lie, w a multiple of VL: in rows, or tile after tile. */
INLINE float *q_at(const attend_state *state, int32_t i, int32_t w) {
    const int64_t words = panel_words(state->job->head_dim);
    if (!VEC_TILES) return state->s.q + i * words + w;
    return state->s.q + i / VL * VL * words + (w + i % VL) * VL;
}

/* Rows that are computed; those beyond job->rows are thrown away. */
INLINE int32_t computed_rows(const attend_state *state) {
    return VEC_TILES ? round_up(state->job->rows, STRIP) : padded_rows(state->job->rows);
}

/* Q as words, and the state of rows that have seen nothing. */
INLINE void load_rows(const pbs_dtype dtype, attend_state *state) {
    const pbs_attend_job *job = state->job;
    const int32_t words = panel_words(job->head_dim), columns = panel_columns(job->head_dim);
    const int32_t rows = computed_rows(state);
    for (int32_t i = 0; i < job->rows; i++) {
        const int64_t row = row_of(job, i);
        const char *at =
            (const char *)job->q.base + row * job->q.stride * (int64_t)dtype_bytes(job->q.dtype);
        for (int32_t w = 0; w < words; w += VL)
            vf_store_as(PBS_DTYPE_FP32, q_at(state, i, w), words - w,
                        vf_load_as(dtype, at + (size_t)w * dtype_bytes(dtype),
                                   row_words(job->head_dim) - w));
        state->s.seen[i] = pbs_min_i32(job->q_offset + (int32_t)row + 1, job->own_end);
        state->s.row_max[i] = NO_ROW_MAX;
        vf_store(state->s.row_sum + i * VL, vf_zero());
        if (VEC_PAIRS) vf_store(state->s.row_weight + i * VL, vf_zero());
    }
    for (int32_t i = job->rows; VEC_TILES && i < rows; i++)
        for (int32_t w = 0; w < words; w += VL) vf_store(q_at(state, i, w), vf_zero());
    memset(state->s.acc_o, 0, (size_t)rows * (size_t)columns * 4);
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

INLINE attend_state start_attend(const pbs_attend_job *job) {
    attend_state state = {.job = job, .keys = pbs_min_i32(job->block_k, PBS_MAX_PANEL_KEYS)};
    carve_attend_scratch(&state.s, job->scratch, job->head_dim, job->rows);
    state.softmax = (softmax_state){.row_max = state.s.row_max,
                                    .row_sum = state.s.row_sum,
                                    .row_weight = state.s.row_weight,
                                    .acc_o = state.s.acc_o,
                                    .columns = panel_columns(job->head_dim),
                                    .scale_log2 = job->scale_log2,
                                    .rescales = job->rescales};
    return state;
}

#endif /* PBS_CPU_KERNEL_ATTEND_COMMON_H */
