/* SPDX-License-Identifier: Apache-2.0
 *
 * The mathematics once more, in fp64 and with the plainest loops, from docs/algorithm.md.
 */
#include <math.h>
#include <stdlib.h>

#include "cpu/convert.h"
#include "harness.h"

static double dot(const problem *p, int32_t b, int32_t hq, int32_t row, int32_t hk, int32_t key) {
    double sum = 0.0;
    for (int32_t d = 0; d < p->head_dim; d++)
        sum += element(&p->q, b, hq, p->q_start[b] + row, d) *
               element(&p->k.view, b, hk, p->kv_start[b] + key, d);
    return sum * (double)p->scale;
}

/* Logit of one probe vector, averaged over the query heads that share the permutation, and over
 * the rows themselves if mean_first. */
static double probe_logit(const problem *p, int32_t b, int32_t hp, const int32_t *probe,
                          int32_t rows, int32_t key) {
    int32_t heads = p->heads_q / problem_heads_p(p), group = p->heads_q / p->heads_k;
    double sum = 0.0;
    for (int32_t g = 0; g < heads; g++) {
        int32_t hq = hp * heads + g;
        for (int32_t r = 0; r < rows; r++) sum += dot(p, b, hq, probe[r], hq / group, key);
    }
    return sum / (double)(heads * rows);
}

void brute_score(const problem *p, int32_t b, int32_t hp, const int32_t *probe, int32_t probe_rows,
                 int mean_first, double *score) {
    int32_t complete = p->kv_len[b] / p->segment * p->segment;
    int32_t vectors = mean_first ? 1 : probe_rows, each = mean_first ? probe_rows : 1;
    double *logit = (double *)filled((size_t)(complete + 1) * sizeof *logit, 0);
    for (int32_t j = 0; j < p->seqlen_k; j++) score[j] = 0.0;
    for (int32_t r = 0; r < vectors; r++) {
        double max = -INFINITY, sum = 0.0;
        for (int32_t j = 0; j < complete; j++) {
            logit[j] = probe_logit(p, b, hp, probe + r, each, j);
            max = fmax(max, logit[j]);
        }
        for (int32_t j = 0; j < complete; j++) sum += exp(logit[j] - max);
        for (int32_t j = 0; j < complete; j++) score[j] += exp(logit[j] - max) / sum / vectors;
    }
    free(logit);
}

void brute_order(const problem *p, int32_t b, const float *score, int32_t *k_perm) {
    int32_t S = p->segment;
    for (int32_t j = 0; j < p->seqlen_k; j++) k_perm[j] = j;
    if (p->kv_len[b] <= S) return;
    for (int32_t first = 0; first + S <= p->kv_len[b]; first += S)
        for (int32_t j = first; j < first + S; j++) {
            int32_t rank = 0; /* keys that come before j */
            for (int32_t i = first; i < first + S; i++) {
                int nan_i = isnan(score[i]), nan_j = isnan(score[j]);
                if (nan_i || nan_j)
                    rank += (nan_j && !nan_i) || (nan_i && nan_j && i < j);
                else
                    rank += score[i] > score[j] || (score[i] == score[j] && i < j);
            }
            k_perm[first + rank] = j;
        }
}

void brute_prefix(const double *mass, int32_t n, double tau, unsigned char *kept) {
    double total = 0.0, sum = 0.0;
    for (int32_t i = 0; i < n; i++) {
        kept[i] = 0;
        total += mass[i];
    }
    for (int32_t taken = 0; taken < n && (tau >= 1.0 || sum < tau * total); taken++) {
        int32_t best = -1;
        for (int32_t i = 0; i < n; i++)
            if (!kept[i] && (best < 0 || mass[i] > mass[best])) best = i;
        kept[best] = 1;
        sum += mass[best];
    }
}

int32_t brute_own_start(const problem *p, int32_t b, int32_t m, int32_t block_q, int32_t block_k,
                        int32_t row_segment, pbs_own own) {
    int32_t row = m * block_q;
    while (row_segment && row % row_segment) row--;
    int32_t position = row + p->kv_len[b] - p->q_len[b];
    int32_t step = own == PBS_OWN_BLOCK ? block_k : p->segment, start = 0;
    if (own == PBS_OWN_ALL || own == PBS_OWN_MASK) return 0;
    while (start + step <= position) start += step;
    return start;
}

static int is_listed(const problem *p, const brute_attend_args *a, int32_t b, int32_t hq, int32_t m,
                     int32_t block) {
    int32_t sel = a->heads_sel == p->heads_q ? hq : hq / (p->heads_q / p->heads_k);
    int32_t blocks_q = (p->seqlen_q + a->block_q - 1) / a->block_q;
    int32_t words = ((p->seqlen_k + a->block_k - 1) / a->block_k + 31) / 32;
    const uint32_t *bits = a->bits + (((int64_t)b * a->heads_sel + sel) * blocks_q + m) * words;
    return (int)(bits[block / 32] >> (block % 32) & 1);
}

/* Is the key (original index) read by the row? */
static int reads(const problem *p, const brute_attend_args *a, int32_t b, int32_t hq, int32_t m,
                 int32_t row, int32_t key, const int32_t *permuted_place) {
    int32_t position = row + p->kv_len[b] - p->q_len[b];
    int32_t own =
        brute_own_start(p, b, m, a->block_q, a->block_k, a->q_perm ? p->segment : 0, a->own);
    if (key > position) return 0;
    if (a->own == PBS_OWN_ALL) return 1;
    int listed = is_listed(p, a, b, hq, m, permuted_place[key] / a->block_k);
    if (a->own == PBS_OWN_MASK) return listed;
    if (key >= own) return a->own != PBS_OWN_NONE;
    return listed;
}

/* First key block that is no history of query block m. */
static int32_t history_end(const problem *p, const brute_attend_args *a, int32_t b, int32_t m) {
    int32_t first = m * a->block_q + p->kv_len[b] - p->q_len[b], end = 0;
    int32_t own =
        brute_own_start(p, b, m, a->block_q, a->block_k, a->q_perm ? p->segment : 0, a->own);
    if (a->own == PBS_OWN_MASK) own = first + 1; /* keys that the first row sees */
    while ((end + 1) * a->block_k <= own) end++;
    return end;
}

/* Mean of the keys or values of block n in the head's order, in fp32 as they come, rounded. */
static void block_mean(const problem *p, const brute_attend_args *a, const pbs_view *v, int32_t b,
                       int32_t hq, int32_t n, double *mean) {
    int32_t hk = hq / (p->heads_q / p->heads_k);
    int32_t hp = problem_heads_p(p) == p->heads_q ? hq : hk;
    for (int32_t d = 0; d < p->head_dim; d++) {
        float sum = 0.0f, back;
        char rounded[4];
        for (int32_t j = n * a->block_k; j < (n + 1) * a->block_k; j++) {
            int64_t at = ((int64_t)b * problem_heads_p(p) + hp) * p->seqlen_k + j;
            sum += (float)element(v, b, hk, p->kv_start[b] + (a->k_perm ? a->k_perm[at] : j), d);
        }
        sum *= 1.0f / (float)a->block_k;
        pbs_store(rounded, v->dtype, 1, &sum);
        pbs_load(rounded, v->dtype, 1, &back);
        mean[d] = (double)back;
    }
}

/* A row so far; max in natural units. */
typedef struct softmax_sum {
    double max, sum;
    double *out; /* [D] */
} softmax_sum;

static void add_token(const problem *p, softmax_sum *s, double logit, const double *value) {
    double max = fmax(s->max, logit), shrink = exp(s->max - max), e = exp(logit - max);
    s->max = max;
    s->sum = s->sum * shrink + e;
    for (int32_t d = 0; d < p->head_dim; d++) s->out[d] = s->out[d] * shrink + e * value[d];
}

/* All keys of block n as one token. */
static void add_mean(const problem *p, const brute_attend_args *a, int32_t b, int32_t hq,
                     int32_t row, int32_t n, softmax_sum *s) {
    double k[PBS_MAX_HEAD_DIM], v[PBS_MAX_HEAD_DIM], logit = 0.0;
    block_mean(p, a, &p->k.view, b, hq, n, k);
    block_mean(p, a, &p->v.view, b, hq, n, v);
    for (int32_t d = 0; d < p->head_dim; d++)
        logit += element(&p->q, b, hq, p->q_start[b] + row, d) * k[d];
    add_token(p, s, logit * (double)p->scale + log((double)a->block_k), v);
}

void brute_attend_row(const problem *p, const brute_attend_args *a, int32_t b, int32_t hq,
                      int32_t row, double *out, double *lse) {
    int32_t group = p->heads_q / p->heads_k, len = p->kv_len[b], place = row;
    int32_t hp = problem_heads_p(p) == p->heads_q ? hq : hq / group;
    int32_t *where = (int32_t *)filled((size_t)(len + 1) * sizeof *where, 0);
    double value[PBS_MAX_HEAD_DIM];
    softmax_sum s = {-INFINITY, 0.0, out};
    for (int32_t j = 0; j < len; j++)
        where[a->k_perm ? a->k_perm[((int64_t)b * problem_heads_p(p) + hp) * p->seqlen_k + j] : j] =
            j;
    for (int32_t i = 0; a->q_perm && i < p->q_len[b]; i++)
        if (a->q_perm[((int64_t)b * p->heads_q + hq) * p->seqlen_q + i] == row) place = i;
    for (int32_t d = 0; d < p->head_dim; d++) out[d] = 0.0;
    int32_t m = place / a->block_q;
    for (int32_t j = 0; j < len; j++) {
        if (!reads(p, a, b, hq, m, row, j, where)) continue;
        for (int32_t d = 0; d < p->head_dim; d++)
            value[d] = element(&p->v.view, b, hq / group, p->kv_start[b] + j, d);
        add_token(p, &s, dot(p, b, hq, row, hq / group, j), value);
    }
    for (int32_t n = 0; a->correction && n < history_end(p, a, b, m); n++)
        if (!is_listed(p, a, b, hq, m, n)) add_mean(p, a, b, hq, row, n, &s);
    for (int32_t d = 0; d < p->head_dim && s.sum > 0.0; d++) out[d] /= s.sum;
    *lse = s.sum > 0.0 ? s.max + log(s.sum) : -INFINITY;
    free(where);
}

/* ---- when is a row right? -------------------------------------------------------------------- */
typedef struct rule {
    double row, most, lse; /* |error| / |row|; largest error of a value, of values up to 1; lse */
} rule;

static rule rule_of(pbs_dtype dtype) {
    if (dtype == PBS_DTYPE_FP32) return (rule){1e-5, 1e-5, 1e-5};
    if (dtype == PBS_DTYPE_FP16) return (rule){1e-3, 1e-3, 2e-5};
    return (rule){5e-3, 2e-2, 2e-3};
}

/* The largest score that the row may see: fp32 holds it to its last place, and what that is worth
 * in a probability no kernel can do better. */
static double largest_score(const problem *p, int32_t b, int32_t hq, int32_t row) {
    int32_t hk = hq / (p->heads_q / p->heads_k);
    double largest = 0.0;
    for (int32_t j = p->kv_start[b]; j < p->kv_start[b] + p->kv_len[b]; j++) {
        double size = 0.0;
        for (int32_t d = 0; d < p->head_dim; d++)
            size += fabs(element(&p->q, b, hq, row, d) * element(&p->k.view, b, hk, j, d));
        largest = fmax(largest, size * (double)p->scale);
    }
    return largest;
}

void check_attend_row(const problem *p, const brute_attend_args *a, int32_t b, int32_t hq,
                      int32_t i, const char *what) {
    const rule limit = rule_of(p->dtype);
    int32_t row = p->q_start[b] + i;
    double out[PBS_MAX_HEAD_DIM], lse, square = 0.0, error = 0.0, most = 0.0;
    brute_attend_row(p, a, b, hq, i, out, &lse);
    const double noise = 0x1p-22 * largest_score(p, b, hq, row);
    for (int32_t d = 0; d < p->head_dim; d++) {
        double off = element(&p->out, b, hq, row, d) - out[d];
        square += out[d] * out[d];
        error += off * off;
        if (!(fabs(off) <= most)) most = fabs(off); /* NaN stays */
    }
    double got = element(&p->lse, b, hq, row, 0);
    const char *isa = pbs_isa_name(p->isa);
    CHECK(sqrt(error) <= (limit.row + noise) * sqrt(square) && most <= limit.most + noise,
          "%s dtype %d D %d own %d %s [%d, %d, %d]: error %g of the row, at most %g; noise %g", isa,
          (int)p->dtype, p->head_dim, (int)a->own, what, b, hq, i, sqrt(error / square), most,
          noise);
    CHECK(got == lse || fabs(got - lse) <= limit.lse + noise,
          "%s dtype %d D %d own %d %s [%d, %d, %d]: lse %g, %g", isa, (int)p->dtype, p->head_dim,
          (int)a->own, what, b, hq, i, got, lse);
}
