/* SPDX-License-Identifier: Apache-2.0
 *
 * score: softmax of the probe rows over the keys, one chunk of keys at a time and always in fp32.
 * stats gives each probe row's maximum (a whole number near it) and sum over the chunk; columns,
 * with those of all keys, the mean over the probe rows of every key's probability. What lies
 * between is 2^(s - row_max), row_max being the one of its step of keys: stats keeps it where there
 * is room, and columns only weighs its rows, by a power of two over the sum.
 */
#ifndef PBS_CPU_KERNEL_SCORE_H
#define PBS_CPU_KERNEL_SCORE_H

#include "cpu/kernel/pack.h"
#include "cpu/kernel/softmax.h"
#include "cpu/kernel/tile.h"

enum { SCORE_KEYS = PBS_SCORE_STEP, SCORE_STRIP = 64 };

typedef struct score_scratch {
    float *k;       /* [SCORE_KEYS / GROUP][head_dim][GROUP] */
    float *scores;  /* [SCORE_STRIP][SCORE_KEYS] */
    float *columns; /* [SCORE_KEYS] */
    float *weight;  /* [SCORE_STRIP] */
    float *row_sum; /* [probe_rows][VL] */
} score_scratch;

INLINE score_scratch carve_score_scratch(void *base, int32_t head_dim) {
    score_scratch s;
    s.k = base;
    s.scores = s.k + SCORE_KEYS * head_dim;
    s.columns = s.scores + SCORE_STRIP * SCORE_KEYS;
    s.weight = s.columns + SCORE_KEYS;
    s.row_sum = s.weight + SCORE_STRIP;
    return s;
}

static size_t kernel_score_scratch(int32_t head_dim, int32_t probe_rows) {
    int32_t words = SCORE_KEYS * head_dim + SCORE_STRIP * SCORE_KEYS + SCORE_KEYS + SCORE_STRIP +
                    probe_rows * VL;
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

/* Step n of a chunk: keys [first, first + keys). */
typedef struct score_step {
    int32_t first, keys;
    float *row_max; /* [probe_rows], of step_max */
    float *kept;    /* [probe_rows][SCORE_KEYS], or NULL */
} score_step;

INLINE score_step step_of(const pbs_score_job *job, int32_t n) {
    const int32_t first = n * SCORE_KEYS, left = job->count - first;
    score_step step = {.first = first, .keys = left < SCORE_KEYS ? left : (int32_t)SCORE_KEYS};
    step.row_max = job->step_max + (int64_t)n * job->probe_rows;
    step.kept = job->kept ? job->kept + (int64_t)first * job->probe_rows : NULL;
    return step;
}

INLINE int32_t steps_of(const pbs_score_job *job) {
    return (job->count + SCORE_KEYS - 1) / SCORE_KEYS;
}

INLINE int32_t strip_rows(const pbs_score_job *job, int32_t row) {
    const int32_t left = job->probe_rows - row;
    return left < SCORE_STRIP ? left : (int32_t)SCORE_STRIP;
}

/* Scores of probe rows [row, row + rows) and the packed keys of a step; keys that do not exist
 * score -inf. */
NOINLINE void score_strip(const pbs_score_job *job, int32_t row, int32_t rows, int32_t keys,
                          const float *k, float *scores) {
    for (int32_t i = 0; i < keys; i += GROUP) {
        const gemm g = {.a = job->probe + (int64_t)row * job->head_dim,
                        .lda = job->head_dim,
                        .b = k + (int64_t)i * job->head_dim,
                        .c = scores + i,
                        .ldc = SCORE_KEYS,
                        .rows = rows,
                        .steps = job->head_dim};
        gemm_group(0, 0, &g, NULL);
    }
    for (int32_t r = 0; r < rows; r++)
        mask_row(scores + r * SCORE_KEYS, keys, round_up(keys, GROUP));
}

static void kernel_score_stats(const pbs_score_job *job) {
    const score_scratch s = carve_score_scratch(job->scratch, job->head_dim);
    const softmax_state state = {
        .row_max = job->row_max, .row_sum = s.row_sum, .scale_log2 = job->scale_log2};
    for (int32_t r = 0; r < job->probe_rows; r++) {
        job->row_max[r] = NO_ROW_MAX;
        vf_store(s.row_sum + r * VL, vf_zero());
    }
    for (int32_t n = 0; n < steps_of(job); n++) {
        const score_step step = step_of(job, n);
        score_pack(job, step.first, step.keys, s.k);
        for (int32_t row = 0; row < job->probe_rows; row += SCORE_STRIP) {
            const int32_t rows = strip_rows(job, row);
            score_strip(job, row, rows, step.keys, s.k, s.scores);
            softmax_rows(0, EXP2_FINEST, &state, 0.0f, row, rows, s.scores, SCORE_KEYS,
                         round_up(step.keys, GROUP));
            if (step.kept)
                memcpy(step.kept + row * SCORE_KEYS, s.scores,
                       (size_t)rows * SCORE_KEYS * sizeof *s.scores);
        }
        memcpy(step.row_max, job->row_max, (size_t)job->probe_rows * sizeof *step.row_max);
    }
    for (int32_t r = 0; r < job->probe_rows; r++)
        job->row_sum[r] = vf_hadd(vf_load(s.row_sum + r * VL));
}

/* The rows of a strip as stats had them: what it kept, or the same computed again. */
static const float *strip_powers(const pbs_score_job *job, const score_step *step, int32_t row,
                                 const score_scratch *s) {
    if (step->kept) return step->kept + row * SCORE_KEYS;
    const int32_t rows = strip_rows(job, row);
    const vf scale = vf_set1(job->scale_log2);
    score_strip(job, row, rows, step->keys, s->k, s->scores);
    for (int32_t r = 0; r < rows; r++) {
        float *at = s->scores + r * SCORE_KEYS;
        const vf shift = vf_set1(-step->row_max[row + r]);
        for (int32_t i = 0; i < round_up(step->keys, GROUP); i += VL)
            vf_store(at + i, vf_exp2(EXP2_FINEST, vf_fma(vf_load(at + i), scale, shift)));
    }
    return s->scores;
}

/* columns[i] += sum over the strip's rows of weight[r] * powers[r][i] */
static void add_columns(const float *powers, const float *weight, int32_t rows, int32_t keys,
                        float *columns) {
    for (int32_t i = 0; i < round_up(keys, GROUP); i += GROUP) {
        vf sum0 = vf_zero(), sum1 = vf_zero();
        for (int32_t r = 0; r < rows; r++) {
            const vf w = vf_broadcast(weight + r);
            sum0 = vf_fma(vf_load(powers + r * SCORE_KEYS + i), w, sum0);
            sum1 = vf_fma(vf_load(powers + r * SCORE_KEYS + i + VL), w, sum1);
        }
        vf_store(columns + i, vf_add(vf_load(columns + i), sum0));
        vf_store(columns + i + VL, vf_add(vf_load(columns + i + VL), sum1));
    }
}

static void kernel_score_columns(const pbs_score_job *job) {
    const score_scratch s = carve_score_scratch(job->scratch, job->head_dim);
    const vf mean = vf_set1(1.0f / (float)job->probe_rows);
    for (int32_t n = 0; n < steps_of(job); n++) {
        const score_step step = step_of(job, n);
        if (!step.kept) score_pack(job, step.first, step.keys, s.k);
        memset(s.columns, 0, SCORE_KEYS * sizeof *s.columns);
        for (int32_t row = 0; row < job->probe_rows; row += SCORE_STRIP) {
            const int32_t rows = strip_rows(job, row);
            for (int32_t r = row; r < row + rows; r++) /* a power of two, exactly */
                s.weight[r - row] =
                    power_of_two(step.row_max[r] - job->row_max[r]) / job->row_sum[r];
            add_columns(strip_powers(job, &step, row, &s), s.weight, rows, step.keys, s.columns);
        }
        for (int32_t i = 0; i < step.keys; i += VL)
            vf_store_as(PBS_DTYPE_FP32, job->score + step.first + i, step.keys - i,
                        vf_mul(vf_load(s.columns + i), mean));
    }
}

#endif /* PBS_CPU_KERNEL_SCORE_H */
