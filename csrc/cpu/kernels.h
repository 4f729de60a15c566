/* SPDX-License-Identifier: Apache-2.0
 *
 * The table of kernels that one instruction set provides. Drivers ({score,permute,select,attend,
 * prefill}.c) know threads, batches, heads and geometry and call these; a kernel sees one head of
 * one sequence, takes its scratch from the caller and touches nothing else.
 *
 * Panels. K and V are packed in units of `panel keys` = min(block_k, 128) consecutive (permuted or
 * original) keys. What a panel looks like inside is the ISA's own business; its size is
 * panel_bytes(), K part first, then V. Keys that do not exist are packed as zeros.
 */
#ifndef PBS_CPU_KERNELS_H
#define PBS_CPU_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "pbs/pbs.h"

enum { PBS_MAX_PANEL_KEYS = 128, PBS_SCORE_STEP = 128, PBS_ALIGN = 64 };

/* Rows of one head of one sequence, as the caller's tensor has them. Row i is
 * base + (index ? index[i] : i) * stride elements. */
typedef struct pbs_rows {
    const void *base;
    int64_t stride;
    const int32_t *index;
    pbs_dtype dtype;
} pbs_rows;

typedef struct pbs_pack_job {
    pbs_rows k, v; /* rows [0, count) are packed; base NULL: that part is not written */
    int32_t count; /* 0..keys */
    int32_t keys;  /* panel keys: 64 or 128 */
    int32_t head_dim;
    void *panel;
} pbs_pack_job;

/* One chunk of keys against the whole probe of one head. Two passes: stats, then columns. */
typedef struct pbs_score_job {
    const float *probe; /* [probe_rows, head_dim], contiguous, fp32 */
    int32_t probe_rows; /* 1..256 */
    pbs_rows k;         /* rows [0, count) are scored */
    int32_t count;
    int32_t head_dim;
    float scale_log2;         /* softmax_scale * log2(e) */
    float *row_max, *row_sum; /* [probe_rows] stats: out, of this chunk; columns: in, of all keys */
    float *step_max;          /* [steps, probe_rows] row_max as it was after PBS_SCORE_STEP keys
                                 each; stats to columns */
    float *kept;              /* [steps, probe_rows, PBS_SCORE_STEP] 2^(s - step_max), stats to
                                 columns; NULL: columns computes it again, to the same bit */
    float *score;             /* [count] columns: out, mean over probe rows of 2^(s - max) / sum */
    void *scratch;            /* score_scratch() bytes */
} pbs_score_job;

/* Antidiagonal scores: a band of query groups (lanes) against a chunk of key groups, `stride` rows
 * each. Rows count from the first of the band or chunk; those that do not exist are zeros. Arrays
 * over lanes have a multiple of antidiagonal_lanes; lanes beyond the groups that exist see nothing.
 * pack comes first, then sums for each chunk. */
typedef struct pbs_antidiagonal_job {
    pbs_rows q, k;            /* rows [0, q_count) and [0, k_count) exist */
    int32_t q_count, k_count; /* 0 or less: none */
    int32_t head_dim, stride;
    int32_t lanes;
    int32_t key_groups;     /* of the chunk: whole key blocks */
    int32_t per_block;      /* key groups in a key block */
    float scale_log2;       /* softmax_scale * log2(e) / stride */
    const int32_t *visible; /* [lanes] of the chunk, groups [0, visible) are seen */
    float *panel;           /* [lanes * stride * head_dim] pack: out; sums: in */
    float *max;             /* [lanes] out: of the chunk, in whole log2 units */
    float *sum;             /* [key blocks, lanes] out: of 2^(z - max), 0 where nothing is seen */
    void *scratch;          /* antidiagonal_scratch() bytes, for the largest chunk */
} pbs_antidiagonal_job;

/* Sums of all chunks to shares of their lane's total, in place; 0 in a lane that sees nothing. */
typedef struct pbs_antidiagonal_shares {
    int32_t lanes;
    int32_t blocks; /* key blocks */
    int32_t chunks; /* ceil(blocks / chunk_blocks) */
    int32_t chunk_blocks;
    const float *max; /* [chunks, lanes] */
    float *sum;       /* [blocks, lanes] in and out */
} pbs_antidiagonal_shares;

/* One query block of one head.
 *   history: key blocks n < hist_end whose bit is set, whole, no mask, from hist_panels;
 *   means: one key for each key block n < hist_end whose bit is not set, key n of mean_panels, with
 *   mean_bias added to its logit; mean_panels NULL: none;
 *   own span: keys [own_begin, own_end), causal, from own_panels (original order); own_bits, if not
 *   NULL, says which of its key blocks count.
 * Panel pointers are of key 0; own_begin is a multiple of block_k. Row i of the block stands
 * at position q_offset + (q.index ? q.index[i] : row_begin + i) and sees keys <= that. */
typedef struct pbs_attend_job {
    pbs_rows q;        /* base at the sequence's first row; index at this block's first entry */
    int32_t row_begin; /* first row of the block; rows are row_begin + i where q.index is NULL */
    int32_t rows;      /* 1..256 */
    int32_t q_offset;
    int32_t head_dim;
    float scale_log2;
    int32_t block_k;
    const uint32_t *bits;
    int32_t hist_end;
    const char *hist_panels;
    const char *mean_panels;
    float mean_bias; /* log2 of the keys that a mean stands for: a whole number */
    const uint32_t *own_bits;
    int32_t own_begin;
    int32_t own_end;
    const char *own_panels;
    void *out;          /* sequence's first row; same dtype as q; row r at out + r * out_stride */
    int64_t out_stride; /* elements */
    float *lse;         /* sequence's first row, or NULL; row r at lse + r * lse_stride */
    int64_t lse_stride;
    uint64_t *rescales; /* += rows whose maximum rose after their first keys; NULL: not counted */
    void *scratch;      /* attend_scratch() bytes, 64-byte aligned */
} pbs_attend_job;

/* What enter() changed on this thread, for leave() to put back. */
typedef struct pbs_cpu_state {
    uint32_t mxcsr;
    _Alignas(PBS_ALIGN) uint8_t tiles[64];
} pbs_cpu_state;

/* One line per instruction set in isa_list.inc: PBS_CPU_ISA(enum, table symbol, name). */
typedef struct pbs_cpu_kernels {
    pbs_isa isa;
    const char *name;
    int (*runs_here)(void);        /* this CPU and OS can execute the table */
    int (*takes)(pbs_dtype dtype); /* worth choosing for this dtype (bf16 dot: bf16 only) */

    /* Around the items that a thread works on: all other entries expect the state of enter(). */
    void (*enter)(pbs_cpu_state *saved);
    void (*leave)(const pbs_cpu_state *saved);

    size_t (*panel_bytes)(int32_t head_dim, int32_t keys); /* multiple of 64; K then V */
    void (*pack)(const pbs_pack_job *job);
    /* sum[d] += rows in order; the caller zeroes before and divides after. */
    void (*pool_add)(const pbs_rows *rows, int32_t count, int32_t head_dim, float *sum);

    size_t (*score_scratch)(int32_t head_dim, int32_t probe_rows);
    void (*score_stats)(const pbs_score_job *job);
    void (*score_columns)(const pbs_score_job *job);

    /* c[i, j] = scale * sum_d a[i, d] * b[j, d]; all fp32, leading dimensions in elements. */
    void (*gemm_nt)(int32_t rows, int32_t cols, int32_t depth, float scale, const float *a,
                    int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc);
    void (*log_softmax)(float *x, int32_t n); /* in place */

    int32_t antidiagonal_lanes;                                      /* query groups at a time */
    size_t (*antidiagonal_scratch)(const pbs_antidiagonal_job *job); /* only its sizes are read */
    void (*antidiagonal_pack)(const pbs_antidiagonal_job *job);
    void (*antidiagonal_sums)(const pbs_antidiagonal_job *job);
    void (*antidiagonal_shares)(const pbs_antidiagonal_shares *job);

    size_t (*attend_scratch)(int32_t head_dim, int32_t block_q);
    void (*attend_block)(const pbs_attend_job *job);
} pbs_cpu_kernels;

#endif /* PBS_CPU_KERNELS_H */
