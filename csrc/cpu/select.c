/* SPDX-License-Identifier: Apache-2.0
 *
 * select over batches, heads and strips of query blocks: score the strip, apply the rule, then
 * force token 0's block and clear the own span.
 */
#include <math.h>

#include "../core/arena.h"
#include "../core/bits.h"
#include "cpu.h"
#include "select_methods.h"
#include "threads.h"

typedef struct select_run {
    const pbs_select_params *p;
    const pbs_dims *d;
    const pbs_cpu_kernels *k;
    int32_t strips; /* per head */
    size_t slot_bytes;
    char *slots; /* [num_threads, slot_bytes] */
} select_run;

/* One thread's scratch. */
typedef struct slot {
    float *log_mass;    /* [STRIP_ROWS, Tk] */
    uint32_t *eligible; /* [STRIP_ROWS, W] */
    uint32_t *rule;     /* [2 Tk] */
    void *method;
} slot;

static size_t method_scratch(const select_run *run) {
    switch (run->p->method) {
#define PBS_SELECT_METHOD(method, scratch_bytes, strip_fn) \
    case method:                                           \
        return scratch_bytes(run->p, run->d, run->k);
#include "select_methods.inc"
#undef PBS_SELECT_METHOD
    }
    return 0;
}

static void method_strip(const pbs_strip_job *job) {
    switch (job->p->method) {
#define PBS_SELECT_METHOD(method, scratch_bytes, strip_fn) \
    case method:                                           \
        strip_fn(job);                                     \
        break;
#include "select_methods.inc"
#undef PBS_SELECT_METHOD
    }
}

static size_t cut_slot(const select_run *run, void *memory, slot *s) {
    const pbs_dims *d = run->d;
    pbs_arena arena = pbs_arena_at(memory);
    s->log_mass = (float *)pbs_arena_take(&arena, PBS_STRIP_ROWS, d->blocks_k, sizeof(float));
    s->eligible = (uint32_t *)pbs_arena_take(&arena, PBS_STRIP_ROWS, d->words, sizeof(uint32_t));
    s->rule = (uint32_t *)pbs_arena_take(&arena, 2, d->blocks_k, sizeof(uint32_t));
    s->method = pbs_arena_take(&arena, 1, 1, method_scratch(run));
    return arena.overflow ? SIZE_MAX : arena.used;
}

static size_t cut(select_run *run, void *workspace) {
    slot s;
    pbs_arena arena = pbs_arena_at(workspace);
    run->strips = pbs_ceil_div(run->d->blocks_q, PBS_STRIP_ROWS);
    run->slot_bytes = cut_slot(run, NULL, &s);
    run->slots = (char *)pbs_arena_take(&arena, run->p->exec.num_threads, 1, run->slot_bytes);
    return pbs_arena_bytes(&arena);
}

size_t pbs_cpu_select_bytes(const pbs_select_params *p, const pbs_dims *d, const void *k) {
    select_run run = {.p = p, .d = d, .k = k};
    return cut(&run, NULL);
}

static void score_strip(const select_run *run, int32_t b, int32_t hq, int32_t row_begin,
                        const pbs_strip *strip, void *scratch) {
    const pbs_dims *d = run->d;
    pbs_strip_job job = {.p = run->p, .d = d, .k = run->k, .seq = pbs_dims_seq(d, b), .batch = b};
    job.head = hq;
    job.row_begin = row_begin;
    job.strip = strip;
    job.scratch = scratch;
    for (int32_t r = 0; r < strip->rows; r++) {
        float *log_mass = strip->log_mass + r * strip->log_mass_stride;
        uint32_t *eligible = strip->eligible + r * strip->eligible_stride;
        int32_t n = pbs_eligible_blocks(run->p, d, job.seq, row_begin + r);
        for (int32_t i = 0; i < d->blocks_k; i++) log_mass[i] = -INFINITY;
        for (int32_t w = 0; w < d->words; w++) eligible[w] = pbs_bits_below(n, w);
    }
    method_strip(&job);
}

/* Permuted block of original token 0: somewhere in the first segment. */
static int32_t first_block(const select_run *run, int32_t b, int32_t hq) {
    const pbs_dims *d = run->d;
    if (!run->p->k_perm) return 0;
    int64_t owner = (int64_t)b * d->heads_p + pbs_owner_head(d, hq);
    const int32_t *k_perm = run->p->k_perm + owner * d->max_k;
    int32_t at = 0;
    while (k_perm[at] != 0) at++; /* checked: it is there */
    return at / d->block_k;
}

/* Forced and own blocks of one row; returns how many blocks of history are set. */
static int32_t finish_row(const select_run *run, pbs_seq s, int32_t m, int32_t first,
                          uint32_t *bits) {
    const pbs_dims *d = run->d;
    int32_t history = pbs_history_blocks(run->p, d, s, m);
    if (history > 0) bits[first / 32] |= UINT32_C(1) << (first % 32);
    for (int32_t w = 0; w < d->words; w++) bits[w] &= pbs_bits_below(history, w);
    return pbs_count_bits(bits, history);
}

static void copy_mass(const select_run *run, const pbs_strip *strip, int64_t row) {
    const pbs_dims *d = run->d;
    for (int32_t r = 0; r < strip->rows; r++)
        for (int32_t n = 0; n < d->blocks_k; n++)
            run->p->mass[(row + r) * d->blocks_k + n] =
                expf(strip->log_mass[r * strip->log_mass_stride + n]);
}

/* Item [b, hq, strips from the last]. */
static void strip_item(void *context, int64_t item, int32_t thread) {
    const select_run *run = (const select_run *)context;
    const pbs_select_params *p = run->p;
    const pbs_dims *d = run->d;
    int64_t head = item / run->strips;
    int32_t strips_after = (int32_t)(item % run->strips); /* the longest rows first */
    int32_t row_begin = (run->strips - 1 - strips_after) * PBS_STRIP_ROWS;
    int32_t b = (int32_t)(head / d->heads_q), hq = (int32_t)(head % d->heads_q);
    int64_t row = head * d->blocks_q + row_begin;
    slot mine;
    cut_slot(run, run->slots + (size_t)thread * run->slot_bytes, &mine);
    pbs_strip strip = {
        .rows = pbs_min_i32(PBS_STRIP_ROWS, d->blocks_q - row_begin),
        .cols = d->blocks_k,
        .log_mass = mine.log_mass,
        .log_mass_stride = d->blocks_k,
        .eligible = mine.eligible,
        .eligible_stride = d->words,
    };
    pbs_seq s = pbs_dims_seq(d, b);
    uint32_t *bits = p->bits + row * d->words;
    score_strip(run, b, hq, row_begin, &strip, mine.method);
    if (p->mass) copy_mass(run, &strip, row);
    pbs_apply_rule(p->rule, p->tau_heads ? p->tau_heads[hq] : p->tau, &strip, bits, NULL,
                   mine.rule);
    int32_t first = s.kv_len > 0 ? first_block(run, b, hq) : 0;
    for (int32_t r = 0; r < strip.rows; r++)
        p->count[row + r] = finish_row(run, s, row_begin + r, first, bits + (int64_t)r * d->words);
}

pbs_status pbs_cpu_select(const pbs_select_params *p, const pbs_dims *d, const void *k) {
    select_run run = {.p = p, .d = d, .k = k};
    cut(&run, p->workspace);
    pbs_run(&p->exec, k, (int64_t)d->batch * d->heads_q * run.strips, strip_item, &run);
    return PBS_OK;
}

pbs_status pbs_cpu_score_strip(const pbs_select_params *p, const pbs_dims *d, const void *k,
                               int32_t batch, int32_t head, int32_t row_begin, pbs_strip *strip) {
    select_run run = {.p = p, .d = d, .k = k};
    slot mine;
    pbs_cpu_state saved;
    cut(&run, p->workspace);
    cut_slot(&run, run.slots, &mine);
    run.k->enter(&saved);
    for (int32_t r = 0; r < strip->rows; r += PBS_STRIP_ROWS) {
        pbs_strip part = *strip;
        part.rows = pbs_min_i32(PBS_STRIP_ROWS, strip->rows - r);
        part.log_mass += r * strip->log_mass_stride;
        part.eligible += r * strip->eligible_stride;
        score_strip(&run, batch, head, row_begin + r, &part, mine.method);
    }
    run.k->leave(&saved);
    return PBS_OK;
}
