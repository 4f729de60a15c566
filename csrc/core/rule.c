/* SPDX-License-Identifier: Apache-2.0
 *
 * Rules: a strip of log masses into bits (Alg. 2). Nothing here knows how the masses were made.
 *
 * PREFIX takes blocks by descending mass, ties by ascending index, and adds their masses up in fp64
 * in that order, until the sum reaches tau times the sum over all eligible blocks (in index order):
 * masses of any normalisation will do. If rounding never gets there, tau >= 1, or a mass is not a
 * number, every eligible block stays.
 */
#include <math.h>
#include <string.h>

#include "bits.h"
#include "check_common.h"

typedef struct row {
    const float *log_mass;
    const uint32_t *eligible;
    int32_t cols;
    float *mass;   /* [cols] 1 at the largest, in scratch */
    int32_t *heap; /* [cols] eligible blocks, in scratch */
    uint32_t *bits;
} row;

static int is_eligible(const row *r, int32_t n) {
    return (int)(r->eligible[n / 32] >> (n % 32) & 1);
}

static void keep(const row *r, int32_t n) { r->bits[n / 32] |= UINT32_C(1) << (n % 32); }

static void keep_all(const row *r) {
    for (int32_t n = 0; n < r->cols; n++)
        if (is_eligible(r, n)) keep(r, n);
}

/* Does block a come before block b? Two blocks never tie. */
static int before(const row *r, int32_t a, int32_t b) {
    return r->mass[a] > r->mass[b] || (r->mass[a] == r->mass[b] && a < b);
}

static void sift_down(const row *r, int32_t count, int32_t at) {
    for (int32_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && before(r, r->heap[child + 1], r->heap[child])) child++;
        if (!before(r, r->heap[child], r->heap[at])) return;
        int32_t n = r->heap[at];
        r->heap[at] = r->heap[child];
        r->heap[child] = n;
    }
}

/* Fills mass and heap (unordered) with the eligible blocks; the largest log mass, NaN if any is. */
static float load(const row *r, int32_t *count) {
    float max = -INFINITY;
    *count = 0;
    for (int32_t n = 0; n < r->cols; n++) {
        if (!is_eligible(r, n)) continue;
        r->heap[(*count)++] = n;
        if (!(r->log_mass[n] <= max)) max = max != max ? max : r->log_mass[n];
    }
    for (int32_t i = 0; i < *count; i++) {
        int32_t n = r->heap[i];
        r->mass[n] = max > -INFINITY ? expf(r->log_mass[n] - max) : 0.0f;
    }
    return max;
}

static int32_t pop(const row *r, int32_t *count) {
    int32_t best = r->heap[0];
    r->heap[0] = r->heap[--*count];
    sift_down(r, *count, 0);
    return best;
}

static void make_heap(const row *r, int32_t count) {
    for (int32_t at = count / 2; at-- > 0;) sift_down(r, count, at);
}

static void prefix(const row *r, float tau) {
    int32_t count;
    float max = load(r, &count);
    if (max != max || tau >= 1.0f) {
        keep_all(r);
        return;
    }
    double total = 0.0, sum = 0.0;
    for (int32_t i = 0; i < count; i++) total += (double)r->mass[r->heap[i]];
    make_heap(r, count);
    while (count && sum < (double)tau * total) {
        int32_t n = pop(r, &count);
        sum += (double)r->mass[n];
        keep(r, n);
    }
}

/* mass >= tau * scale; expf is monotone, so this agrees with comparing exp(log_mass). */
static void at_least(const row *r, float tau, int relative) {
    float max = 0.0f;
    int32_t count;
    if (relative) max = load(r, &count);
    for (int32_t n = 0; n < r->cols; n++) {
        if (!is_eligible(r, n)) continue;
        float mass = expf(r->log_mass[n] - (max > -INFINITY ? max : 0.0f));
        if (!(mass < tau)) keep(r, n); /* NaN stays */
    }
}

static void budget(const row *r, float tau) {
    int32_t count;
    float max = load(r, &count);
    if (max != max || tau >= (float)count) {
        keep_all(r);
        return;
    }
    make_heap(r, count);
    for (float taken = 0.0f; taken < tau; taken += 1.0f) keep(r, pop(r, &count));
}

static pbs_status check_strip(pbs_rule rule, float tau, const pbs_strip *strip,
                              const uint32_t *bits, const uint32_t *scratch) {
    PBS_TRY(pbs_check_enum("rule", (int)rule, 4));
    PBS_TRY(pbs_check_tau(tau, NULL, NULL));
    PBS_TRY(pbs_check_pointer("strip", strip, 1));
    if (strip->rows < 0 || strip->cols < 0)
        return pbs_fail(PBS_ERR_SHAPE, "strip: %d rows, %d cols; 0 or more is allowed", strip->rows,
                        strip->cols);
    int32_t words = pbs_ceil_div(strip->cols, 32);
    if (strip->rows > 1 && (strip->log_mass_stride < strip->cols || strip->eligible_stride < words))
        return pbs_fail(PBS_ERR_STRIDE,
                        "strip: strides %lld and %lld; at least %d and %d are needed",
                        (long long)strip->log_mass_stride, (long long)strip->eligible_stride,
                        strip->cols, words);
    int64_t elements = (int64_t)strip->rows * strip->cols;
    PBS_TRY(pbs_check_pointer("strip.log_mass", strip->log_mass, elements));
    PBS_TRY(pbs_check_pointer("strip.eligible", strip->eligible, elements));
    PBS_TRY(pbs_check_pointer("bits", bits, elements));
    return pbs_check_pointer("scratch", scratch, elements);
}

pbs_status pbs_apply_rule(pbs_rule rule, float tau, const pbs_strip *strip, uint32_t *bits,
                          int32_t *count, uint32_t *scratch) {
    PBS_TRY(check_strip(rule, tau, strip, bits, scratch));
    int32_t words = pbs_ceil_div(strip->cols, 32);
    for (int32_t i = 0; i < strip->rows; i++) {
        row r = {
            .log_mass = strip->log_mass + i * strip->log_mass_stride,
            .eligible = strip->eligible + i * strip->eligible_stride,
            .cols = strip->cols,
            .mass = (float *)(void *)scratch,
            .heap = (int32_t *)(void *)(scratch + strip->cols),
            .bits = bits + (int64_t)i * words,
        };
        for (int32_t w = 0; w < words; w++) r.bits[w] = 0;
        switch (rule) {
        case PBS_RULE_PREFIX: prefix(&r, tau); break;
        case PBS_RULE_RELATIVE: at_least(&r, tau, 1); break;
        case PBS_RULE_ABSOLUTE: at_least(&r, tau, 0); break;
        case PBS_RULE_BUDGET: budget(&r, tau); break;
        }
        if (count) count[i] = pbs_count_bits(r.bits, strip->cols);
    }
    return PBS_OK;
}
