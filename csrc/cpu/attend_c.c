/* SPDX-License-Identifier: Apache-2.0
 *
 * attend, Alg. 1: online softmax of one query block over the listed key blocks (whole, unmasked),
 * the means of those that are not listed, and its own span (causal). Three loops share one step.
 */
#include "convert.h"
#include "isa_c.h"

#include <math.h>

/* Running state of the block's rows; row_max is in log2 units. */
typedef struct state {
    float *q;       /* [rows, head_dim] fp32 */
    float *acc;     /* [rows, head_dim] sum of 2^(s - row_max) * v */
    float *row_max; /* [rows] */
    float *row_sum; /* [rows] sum of 2^(s - row_max) */
} state;

size_t pbs_attend_scratch_c(int32_t head_dim, int32_t block_q) {
    return (2 * (size_t)head_dim + 2) * (size_t)block_q * sizeof(float);
}

static int32_t row_of(const pbs_attend_job *job, int32_t i) {
    return job->q.index ? job->q.index[i] : job->row_begin + i;
}

static state start(const pbs_attend_job *job) {
    int64_t elements = (int64_t)job->rows * job->head_dim;
    state st;
    st.q = (float *)job->scratch;
    st.acc = st.q + elements;
    st.row_max = st.acc + elements;
    st.row_sum = st.row_max + job->rows;
    pbs_rows rows = job->q;
    rows.index = NULL; /* row_of has looked it up */
    for (int32_t i = 0; i < job->rows; i++) {
        pbs_load_row(&rows, row_of(job, i), job->head_dim, st.q + (int64_t)i * job->head_dim);
        st.row_max[i] = -INFINITY;
        st.row_sum[i] = 0.0f;
    }
    for (int64_t i = 0; i < elements; i++) st.acc[i] = 0.0f;
    return st;
}

/* Row i of the block meets one key; bias: on top of its logit. */
static void step(const pbs_attend_job *job, const state *st, int32_t i, const float *k,
                 const float *v, float bias) {
    const float *q = st->q + (int64_t)i * job->head_dim;
    float *acc = st->acc + (int64_t)i * job->head_dim;
    float s = 0.0f;
    for (int32_t d = 0; d < job->head_dim; d++) s += q[d] * k[d];
    s = s * job->scale_log2 + bias;
    if (s > st->row_max[i]) {
        float shrink = exp2f(st->row_max[i] - s);
        if (job->rescales && st->row_max[i] > -INFINITY) ++*job->rescales;
        st->row_max[i] = s;
        st->row_sum[i] *= shrink;
        for (int32_t d = 0; d < job->head_dim; d++) acc[d] *= shrink;
    }
    float p = exp2f(s - st->row_max[i]);
    st->row_sum[i] += p;
    for (int32_t d = 0; d < job->head_dim; d++) acc[d] += p * v[d];
}

/* Keys [begin, end) of one panel set; causal: row i sees keys up to its own position. */
static void attend_keys(const pbs_attend_job *job, const state *st, const char *panels,
                        int32_t begin, int32_t end, int causal, float bias) {
    int32_t keys = job->block_k < PBS_MAX_PANEL_KEYS ? job->block_k : PBS_MAX_PANEL_KEYS;
    size_t panel_bytes = pbs_panel_bytes_c(job->head_dim, keys);
    for (int32_t i = 0; i < job->rows; i++) {
        int32_t visible = job->q_offset + row_of(job, i) + 1;
        int32_t stop = causal && visible < end ? visible : end;
        for (int32_t j = begin; j < stop; j++) {
            const float *k = (const float *)(panels + (size_t)(j / keys) * panel_bytes);
            const float *v = k + (int64_t)keys * job->head_dim;
            int64_t at = (int64_t)(j % keys) * job->head_dim;
            step(job, st, i, k + at, v + at, bias);
        }
    }
}

static void finish(const pbs_attend_job *job, const state *st) {
    const float ln2 = 0.69314718055994530942f;
    size_t size = pbs_dtype_size(job->q.dtype);
    for (int32_t i = 0; i < job->rows; i++) {
        float *acc = st->acc + (int64_t)i * job->head_dim;
        int64_t row = row_of(job, i);
        float sum = st->row_sum[i];
        int no_key = sum == 0.0f; /* acc is 0 as well; a NaN is not "no key" */
        for (int32_t d = 0; d < job->head_dim; d++) acc[d] = no_key ? 0.0f : acc[d] / sum;
        pbs_store((char *)job->out + row * job->out_stride * (int64_t)size, job->q.dtype,
                  job->head_dim, acc);
        if (job->lse)
            job->lse[row * job->lse_stride] =
                no_key ? -INFINITY : (st->row_max[i] + log2f(sum)) * ln2;
    }
}

static int is_set(const uint32_t *bits, int32_t n) { return (int)(bits[n / 32] >> (n % 32) & 1); }

void pbs_attend_block_c(const pbs_attend_job *job) {
    state st = start(job);
    for (int32_t n = 0; n < job->hist_end; n++)
        if (is_set(job->bits, n))
            attend_keys(job, &st, job->hist_panels, n * job->block_k, (n + 1) * job->block_k, 0,
                        0.0f);
    for (int32_t n = 0; job->mean_panels && n < job->hist_end; n++)
        if (!is_set(job->bits, n))
            attend_keys(job, &st, job->mean_panels, n, n + 1, 0, job->mean_bias);
    for (int32_t begin = job->own_begin; begin < job->own_end; begin += job->block_k) {
        int32_t end = begin + job->block_k < job->own_end ? begin + job->block_k : job->own_end;
        if (!job->own_bits || is_set(job->own_bits, begin / job->block_k))
            attend_keys(job, &st, job->own_panels, begin, end, 1, 0.0f);
    }
    finish(job, &st);
}
