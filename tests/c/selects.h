/* SPDX-License-Identifier: Apache-2.0
 *
 * A select call on a problem, and the definition of its masses in fp64.
 */
#ifndef PBS_TEST_SELECTS_H
#define PBS_TEST_SELECTS_H

#include "harness.h"

/* A select call with the order and pools that pbs_permute made for it. */
typedef struct setup {
    int32_t *k_perm, *q_perm;
    float *k_pool;
    pbs_select_params s;
} setup;

/* Four sequences: prefix, padding, no rows, more queries than keys. */
void select_sequences(problem *p);

/* Keys in a random order where the mode permutes them; for the caller to change before it runs. */
setup select_setup(const problem *p, pbs_permute_mode mode, uint64_t seed);
void select_run(setup *u);
void select_drop(setup *u);

/* One query block, seen by the brute force. */
typedef struct view_of_row {
    const problem *p;
    const pbs_select_params *s;
    int32_t b, hq, hp, hk, m;
    int32_t eligible; /* key blocks [0, eligible) */
    int32_t history;
} view_of_row;

view_of_row select_look(const problem *p, const pbs_select_params *s, int32_t b, int32_t hq,
                        int32_t m);

/* Runs it; masses, bits and counts are those of the definition, a strip alone is what select saw.
 */
void select_check(const problem *p, setup *u);

#endif /* PBS_TEST_SELECTS_H */
