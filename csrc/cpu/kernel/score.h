/* SPDX-License-Identifier: Apache-2.0
 *
 * score: softmax of the probe rows over the keys, one chunk of keys at a time and always in fp32.
 * stats gives each probe row's maximum (a whole number near it) and sum over the chunk; columns,
 * with those of all keys, the mean over the probe rows of every key's probability.
 */
#ifndef PBS_CPU_KERNEL_SCORE_H
#define PBS_CPU_KERNEL_SCORE_H

#include "cpu/kernel/pack.h"
#include "cpu/kernel/softmax.h"
#include "cpu/kernel/tile.h"

enum { SCORE_KEYS = 128, SCORE_STRIP = 64 };

typedef struct score_scratch {
    float *k;       /* [SCORE_KEYS / GROUP][head_dim][GROUP] */
    float *scores;  /* [SCORE_STRIP][SCORE_KEYS] */
    float *columns; /* [SCORE_KEYS] */
    float *row_sum; /* [probe_rows][VL] */
} score_scratch;

INLINE score_scratch carve_score_scratch(void *base, int32_t head_dim) {
    score_scratch s;
    s.k = base;
    s.scores = s.k + SCORE_KEYS * head_dim;
    s.columns = s.scores + SCORE_STRIP * SCORE_KEYS;
    s.row_sum = s.columns + SCORE_KEYS;
    return s;
}

static size_t kernel_score_scratch(int32_t head_dim, int32_t probe_rows) {
    int32_t words = SCORE_KEYS * head_dim + SCORE_STRIP * SCORE_KEYS + SCORE_KEYS + probe_rows * VL;
    return 4 * (size_t)words;
}

/* Keys [first, first + n) of the chunk, n <= SCORE_KEYS, packed. */
static void score_pack(const pbs_score_job *job, int32_t first, int32_t n, float *panel) {
    for (int32_t i = 0; i < n; i += GROUP) {
        float *group = panel + (int64_t)i * job->head_dim;
        switch (job->k.dtype) {
        case PBS_DTYPE_FP32:
            pack_k_group(PBS_DTYPE_FP32, &job->k, first + i, job->count, job->head_dim, group);
            break;
        case PBS_DTYPE_FP16:
            pack_k_group(PBS_DTYPE_FP16, &job->k, first + i, job->count, job->head_dim, group);
            break;
        case PBS_DTYPE_BF16:
            pack_k_group(PBS_DTYPE_BF16, &job->k, first + i, job->count, job->head_dim, group);
            break;
        }
    }
}

/* Probe rows [row, row + rows) against n packed keys; keys that do not exist score -inf. */
static void score_strip(const pbs_score_job *job, int32_t row, int32_t rows, int32_t n,
                        const score_scratch *s) {
    for (int32_t i = 0; i < n; i += GROUP) {
        const gemm g = {.a = job->probe + (int64_t)row * job->head_dim,
                        .lda = job->head_dim,
                        .b = s->k + (int64_t)i * job->head_dim,
                        .c = s->scores + i,
                        .ldc = SCORE_KEYS,
                        .rows = rows,
                        .steps = job->head_dim};
        gemm_group(0, 0, &g, NULL);
    }
    for (int32_t r = 0; r < rows; r++) mask_row(s->scores + r * SCORE_KEYS, n, round_up(n, GROUP));
}

static void kernel_score_stats(const pbs_score_job *job) {
    const score_scratch s = carve_score_scratch(job->scratch, job->head_dim);
    const softmax_state state = {
        .row_max = job->row_max, .row_sum = s.row_sum, .scale_log2 = job->scale_log2};
    for (int32_t r = 0; r < job->probe_rows; r++) {
        job->row_max[r] = NO_ROW_MAX;
        vf_store(s.row_sum + r * VL, vf_zero());
    }
    for (int32_t first = 0; first < job->count; first += SCORE_KEYS) {
        const int32_t n = job->count - first < SCORE_KEYS ? job->count - first : SCORE_KEYS;
        score_pack(job, first, n, s.k);
        for (int32_t row = 0; row < job->probe_rows; row += SCORE_STRIP) {
            const int32_t left = job->probe_rows - row;
            const int32_t rows = left < SCORE_STRIP ? left : SCORE_STRIP;
            score_strip(job, row, rows, n, &s);
            softmax_rows(0, EXP2_FINEST, &state, row, rows, s.scores, SCORE_KEYS,
                         round_up(n, GROUP));
        }
    }
    for (int32_t r = 0; r < job->probe_rows; r++)
        job->row_sum[r] = vf_hadd(vf_load(s.row_sum + r * VL));
}

/* columns[i] += sum over the strip's rows of 2^(score - row_max) / row_sum */
static void add_columns(const pbs_score_job *job, int32_t row, int32_t rows, int32_t n,
                        const score_scratch *s) {
    const vf scale = vf_set1(job->scale_log2);
    for (int32_t i = 0; i < n; i += VL) {
        vf strip = vf_zero();
        for (int32_t r = 0; r < rows; r++) {
            const vf shift = vf_set1(-job->row_max[row + r]);
            const vf p =
                vf_exp2(EXP2_FINEST, vf_fma(vf_load(s->scores + r * SCORE_KEYS + i), scale, shift));
            strip = vf_fma(p, vf_set1(1.0f / job->row_sum[row + r]), strip);
        }
        vf_store(s->columns + i, vf_add(vf_load(s->columns + i), strip));
    }
}

static void kernel_score_columns(const pbs_score_job *job) {
    const score_scratch s = carve_score_scratch(job->scratch, job->head_dim);
    const vf mean = vf_set1(1.0f / (float)job->probe_rows);
    for (int32_t first = 0; first < job->count; first += SCORE_KEYS) {
        const int32_t n = job->count - first < SCORE_KEYS ? job->count - first : SCORE_KEYS;
        score_pack(job, first, n, s.k);
        memset(s.columns, 0, SCORE_KEYS * sizeof *s.columns);
        for (int32_t row = 0; row < job->probe_rows; row += SCORE_STRIP) {
            const int32_t left = job->probe_rows - row;
            const int32_t rows = left < SCORE_STRIP ? left : SCORE_STRIP;
            score_strip(job, row, rows, n, &s);
            add_columns(job, row, rows, n, &s);
        }
        for (int32_t i = 0; i < n; i += VL)
            vf_store_as(PBS_DTYPE_FP32, job->score + first + i, n - i,
                        vf_mul(vf_load(s.columns + i), mean));
    }
}

#endif /* PBS_CPU_KERNEL_SCORE_H */
