/* SPDX-License-Identifier: Apache-2.0
 *
 * A whole prefill on a problem, in one call and verb by verb, with everything that comes out.
 */
#ifndef PBS_TEST_CALLS_H
#define PBS_TEST_CALLS_H

#include "harness.h"

typedef struct options {
    pbs_permute_mode mode;
    pbs_order order;
    pbs_select_method method;
    pbs_correction correction;
    pbs_normalize normalize;
    size_t cap;
    pbs_parallel_for_fn parallel_for;
    int threads;
    const int32_t *permute_heads;
    const float *tau_heads;
    float tau;
} options;

enum { OUT, LSE, BITS, COUNT, K_PERM, Q_PERM, SCORE, K_POOL, V_POOL, MASS, PARTS };

/* Parts that a call does not give are NULL. */
typedef struct result {
    void *part[PARTS];
    size_t bytes[PARTS];
} result;

result prefill(const problem *p, options o);
/* The four verbs one after another. */
result verbs(const problem *p, options o);
void drop_result(result *r);
/* Are the parts that both have the same, bit for bit? */
void check_same(const result *a, const result *b, const char *what);

/* Three sequences: one whole, one with fewer rows and keys than the tensors, one that starts with a
 * prefix and is shorter than a segment. */
problem three_sequences(pbs_isa isa, int32_t seqlen_q, int32_t seqlen_k);

#endif /* PBS_TEST_CALLS_H */
