/* SPDX-License-Identifier: Apache-2.0
 *
 * What benchmarks/kernel/__init__.py calls through ctypes, and what its files share. A function
 * that fails returns NULL, 0 or a status; pbs_last_error() says why.
 */
#ifndef PBS_BENCH_H
#define PBS_BENCH_H

#include "cpu/kernels.h"

/* ---- common.c -------------------------------------------------------------------------------- */
PBS_API int32_t bench_takes(int32_t isa, int32_t dtype);
/* The table of exactly that instruction set, or NULL. */
const pbs_cpu_kernels *bench_table(int32_t isa, int32_t dtype);
void *bench_memory(size_t bytes); /* zeros, at a page's start, for free() */
void bench_randomise(void *rows, pbs_dtype dtype, int64_t elements, float size);

/* ---- block.c: a block of 128 queries against at least `blocks` panels in L2 ------------------ */
typedef struct bench_block bench_block;
PBS_API bench_block *bench_block_new(int32_t isa, int32_t dtype, int32_t head_dim, int32_t blocks);
PBS_API int32_t bench_block_count(const bench_block *b); /* blocks of one run */
/* [128, head_dim] queries; keys, which all panels hold alike, then values; output. */
PBS_API const void *bench_block_q(const bench_block *b);
PBS_API const void *bench_block_kv(const bench_block *b);
PBS_API const void *bench_block_out(const bench_block *b);
PBS_API void bench_block_run(bench_block *b, int32_t repeat);
PBS_API void bench_block_free(bench_block *b);

/* ---- pack.c: permute's part of the work on one head's keys ----------------------------------- */
enum {
    BENCH_COPY,          /* memcpy of as many bytes as packing reads and writes, halved */
    BENCH_PACK,          /* K and V into panels, keys in order */
    BENCH_PACK_PERMUTED, /* the same, permuted inside segments */
    BENCH_PERMUTE        /* permuted, and the means of every block of keys */
};
typedef struct bench_pack bench_pack;
PBS_API bench_pack *bench_pack_new(int32_t isa, int32_t dtype, int32_t head_dim, int32_t keys,
                                   int32_t segment);
PBS_API void bench_pack_run(bench_pack *p, int32_t what, int32_t repeat);
PBS_API void bench_pack_free(bench_pack *p);

/* ---- call.c: whole calls, verb by verb ------------------------------------------------------- */
/* q, out [heads, seqlen, head_dim], k, v [heads_k, seqlen, head_dim], contiguous. */
typedef struct bench_call {
    const void *q, *k, *v;
    void *out;
    void *parallel_for; /* address of torch_parallel_for; NULL = serial */
    int32_t heads, heads_k, seqlen, head_dim, dtype, isa;
    int32_t block_size, segment_size, threads;
    int32_t mode, method, stride, reduce, rule, normalize, correction; /* of pbs.h */
    float tau;
} bench_call;
enum { BENCH_SCORE, BENCH_ORDER, BENCH_SELECT, BENCH_ATTEND, BENCH_STEPS };
typedef struct bench_steps bench_steps;
PBS_API bench_steps *bench_steps_new(const bench_call *call);
/* bits [heads, Tq, W]: attended to instead of what select chose; or NULL. seconds [BENCH_STEPS];
 * counters [threads] or NULL, added to. */
PBS_API pbs_status bench_steps_run(bench_steps *s, const uint32_t *bits, double *seconds,
                                   pbs_work_counters *counters);
/* score and sort alone, of the whole call's heads; seconds, or -1. */
PBS_API double bench_score_run(bench_steps *s, int32_t repeat);
PBS_API double bench_sort_run(bench_steps *s, int32_t repeat);
PBS_API void bench_steps_free(bench_steps *s);

#endif /* PBS_BENCH_H */
