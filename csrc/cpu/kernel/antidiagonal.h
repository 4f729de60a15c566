/* SPDX-License-Identifier: Apache-2.0
 *
 * select: antidiagonal scores, always in fp32. Query groups are lanes, key groups are rows:
 *
 *     z[key group][lane] = sum over i < t of k[b t + i] . q[a t + t-1 - i]
 *
 * so a panel of queries, packed once, serves all keys; a key is copied, never transposed; maxima
 * and sums run down the lanes without a shuffle, however few key groups make a block. One i at a
 * time, for its part of the panel to stay near:
 *
 *     panel   [t][lanes / GROUP][D][GROUP]
 *
 * An element of z is one chain of products in order of (i, d).
 */
#ifndef PBS_CPU_KERNEL_ANTIDIAGONAL_H
#define PBS_CPU_KERNEL_ANTIDIAGONAL_H

#include "cpu/kernel/pack.h"
#include "cpu/kernel/softmax.h"
#include "cpu/kernel/tile.h"

typedef struct antidiagonal_scratch {
    float *k; /* [key groups][D] */
    float *z; /* [key groups, padded][lanes] */
} antidiagonal_scratch;

INLINE antidiagonal_scratch carve_antidiagonal_scratch(const pbs_antidiagonal_job *job) {
    antidiagonal_scratch s;
    s.k = job->scratch;
    s.z = s.k + round_up(job->key_groups, 2) * job->head_dim; /* head_dim: a multiple of 8 */
    return s;
}

static size_t kernel_antidiagonal_scratch(const pbs_antidiagonal_job *job) {
    const int64_t k = (int64_t)round_up(job->key_groups, 2) * job->head_dim;
    return 4 * (size_t)(k + (int64_t)round_up(job->key_groups, TAIL_ROWS) * job->lanes);
}

/* Row `at` of GROUP query groups, transposed to [D][GROUP]. */
INLINE void pack_lanes(const pbs_dtype dtype, const pbs_antidiagonal_job *job, int32_t lane,
                       int32_t at, float *to) {
    int32_t index[GROUP], count = 0;
    for (int32_t i = 0; i < GROUP; i++) {
        const int32_t row = (lane + i) * job->stride + at;
        const int exists = row < job->q_count;
        index[i] = !exists ? 0 : job->q.index ? job->q.index[row] : row;
        count += exists;
    }
    pbs_rows rows = job->q;
    rows.index = index;
    pack_k_group(dtype, &rows, 0, count, job->head_dim, to);
}

/* Rows of a group one after the other: as many streams of memory as there are lanes. */
INLINE void pack_panel(const pbs_dtype dtype, const pbs_antidiagonal_job *job) {
    const int64_t dim = job->head_dim;
    for (int32_t lane = 0; lane < job->lanes; lane += GROUP)
        for (int32_t at = 0; at < job->stride; at++) {
            float *part = job->panel + dim * job->lanes * (job->stride - 1 - at);
            pack_lanes(dtype, job, lane, at, part + dim * lane);
        }
}

static void kernel_antidiagonal_pack(const pbs_antidiagonal_job *job) {
    switch (job->q.dtype) {
    case PBS_DTYPE_FP32: pack_panel(PBS_DTYPE_FP32, job); break;
    case PBS_DTYPE_FP16: pack_panel(PBS_DTYPE_FP16, job); break;
    case PBS_DTYPE_BF16: pack_panel(PBS_DTYPE_BF16, job); break;
    }
}

/* A row of head_dim as fp32; NULL: zeros. */
INLINE void copy_key(const pbs_dtype dtype, const char *row, int32_t dim, float *to) {
    int32_t d = 0;
    const int32_t whole = row ? dim / VL * VL : 0;
    UNROLL_4 for (; d < whole; d += VL)
        vf_store(to + d, vf_load_as(dtype, row + (size_t)d * dtype_bytes(dtype), VL));
    for (; d < dim; d += VL)
        vf_store_as(PBS_DTYPE_FP32, to + d, dim - d,
                    row ? vf_load_as(dtype, row + (size_t)d * dtype_bytes(dtype), dim - d)
                        : vf_zero());
}

/* Key i of every key group. */
INLINE void copy_keys(const pbs_dtype dtype, const pbs_antidiagonal_job *job, int32_t i,
                      float *to) {
    for (int32_t b = 0; b < job->key_groups; b++, to += job->head_dim) {
        const int32_t key = b * job->stride + i;
        const char *row = key < job->k_count ? row_at(&job->k, key, dtype_bytes(dtype)) : NULL;
        copy_key(dtype, row, job->head_dim, to);
    }
}

/* Key groups that some lane of a group of lanes sees. */
static int32_t rows_seen(const pbs_antidiagonal_job *job, int32_t lane) {
    int32_t rows = 0;
    for (int32_t i = lane; i < lane + GROUP; i++)
        if (job->visible[i] > rows) rows = job->visible[i];
    return rows;
}

/* Key groups [at, end) whose key i comes into L2 while tiles run. */
typedef struct key_prefetch {
    int32_t i, at, end;
    int32_t rows_per_tile;
} key_prefetch;

INLINE void prefetch_keys(const pbs_antidiagonal_job *job, key_prefetch *next) {
    const size_t bytes = dtype_bytes(job->k.dtype);
    for (int32_t n = 0; n < next->rows_per_tile && next->at < next->end; n++, next->at++) {
        const int32_t key = next->at * job->stride + next->i;
        if (key >= job->k_count) return;
        const char *row = row_at(&job->k, key, bytes);
        for (size_t line = 0; line < (size_t)job->head_dim * bytes; line += PBS_ALIGN)
            __builtin_prefetch(row + line, 0, 2);
    }
}

/* gemm_group with another kind of prefetch. */
INLINE void multiply_lanes(const pbs_antidiagonal_job *job, const int add, const gemm *g,
                           key_prefetch *next) {
    const int32_t rows = padded_rows(g->rows);
    int32_t tail = 0, row = 0;
    while ((rows - tail) % TILE_ROWS) tail += TAIL_ROWS;
    for (; row < rows - tail; row += TILE_ROWS) {
        tile(TILE_ROWS, 0, add, g, row);
        prefetch_keys(job, next);
    }
    for (; row < rows; row += TAIL_ROWS) tile(TAIL_ROWS, 0, add, g, row);
}

/* Key i of every key group against every lane that sees some of them. */
INLINE void multiply_keys(const pbs_antidiagonal_job *job, const int add, int32_t i,
                          const antidiagonal_scratch *s) {
    const int32_t tiles = job->key_groups * job->lanes / (TILE_ROWS * GROUP);
    key_prefetch next = {i + 1, 0, job->key_groups, job->key_groups / (tiles + 1) + 1};
    if (next.i == job->stride) { /* the next chunk's first ones */
        next.i = 0;
        next.at += job->key_groups;
        next.end += job->key_groups;
    }
    for (int32_t lane = 0; lane < job->lanes; lane += GROUP) {
        const gemm g = {.a = s->k,
                        .lda = job->head_dim,
                        .b = job->panel + ((int64_t)i * job->lanes + lane) * job->head_dim,
                        .c = s->z + lane,
                        .ldc = job->lanes,
                        .rows = rows_seen(job, lane),
                        .steps = job->head_dim};
        if (g.rows) multiply_lanes(job, add, &g, &next);
    }
}

static void multiply_groups(const pbs_antidiagonal_job *job, const antidiagonal_scratch *s) {
    for (int32_t i = 0; i < job->stride; i++) {
        switch (job->k.dtype) {
        case PBS_DTYPE_FP32: copy_keys(PBS_DTYPE_FP32, job, i, s->k); break;
        case PBS_DTYPE_FP16: copy_keys(PBS_DTYPE_FP16, job, i, s->k); break;
        case PBS_DTYPE_BF16: copy_keys(PBS_DTYPE_BF16, job, i, s->k); break;
        }
        multiply_keys(job, i > 0, i, s);
    }
}

/* Key groups [visible, rows) of each lane score -inf. */
static void mask_lanes(const pbs_antidiagonal_job *job, int32_t lane, int32_t rows, float *z) {
    for (int32_t i = 0; i < GROUP; i++)
        for (int32_t b = job->visible[lane + i]; b < rows; b++)
            z[(int64_t)b * job->lanes + i] = -INFINITY;
}

/* Maximum of each lane as a whole number of log2 units, finite for a lane that sees nothing. */
INLINE void lane_max(const pbs_antidiagonal_job *job, const float *z, int32_t rows, float *max) {
    vf top0 = vf_set1(-INFINITY), top1 = top0;
    for (int32_t b = 0; b < rows; b++) {
        top0 = vf_max(vf_load(z + (int64_t)b * job->lanes), top0);
        top1 = vf_max(vf_load(z + (int64_t)b * job->lanes + VL), top1);
    }
    vf_store(max, top0);
    vf_store(max + VL, top1);
    for (int32_t i = 0; i < GROUP; i++) {
        const float whole = ceilf(max[i] * job->scale_log2);
        max[i] = whole > NO_ROW_MAX ? whole : NO_ROW_MAX;
    }
}

/* Sums of 2^(z - max) over the key groups of each block; z has whole blocks. */
INLINE void lane_sums(const pbs_antidiagonal_job *job, const float *z, int32_t blocks, vf max,
                      float *sum) {
    const vf scale = vf_set1(job->scale_log2), shift = vf_sub(vf_zero(), max);
    for (int32_t n = 0; n < blocks; n++) {
        vf total = vf_zero();
        for (int32_t b = 0; b < job->per_block; b++, z += job->lanes)
            total = vf_add(total, vf_exp2(EXP2_FINEST, vf_fma(vf_load(z), scale, shift)));
        vf_store(sum + (int64_t)n * job->lanes, total);
    }
}

static void kernel_antidiagonal_sums(const pbs_antidiagonal_job *job) {
    const antidiagonal_scratch s = carve_antidiagonal_scratch(job);
    multiply_groups(job, &s);
    for (int32_t lane = 0; lane < job->lanes; lane += GROUP) {
        const int32_t rows = round_up(rows_seen(job, lane), job->per_block);
        const int32_t blocks = rows / job->per_block;
        float *z = s.z + lane, *max = job->max + lane, *sum = job->sum + lane;
        mask_lanes(job, lane, rows, z);
        lane_max(job, z, rows, max);
        lane_sums(job, z, blocks, vf_load(max), sum);
        lane_sums(job, z + VL, blocks, vf_load(max + VL), sum + VL);
        for (int32_t n = blocks; n < job->key_groups / job->per_block; n++) {
            vf_store(sum + (int64_t)n * job->lanes, vf_zero());
            vf_store(sum + (int64_t)n * job->lanes + VL, vf_zero());
        }
    }
}

/* Sums of a vector of lanes to shares of the whole, in place. */
INLINE void share_lanes(const pbs_antidiagonal_shares *job, int32_t lane) {
    const float *max = job->max + lane;
    float *sum = job->sum + lane, inverse[VL];
    vf most = vf_load(max), total = vf_zero();
    for (int32_t c = 1; c < job->chunks; c++)
        most = vf_max(vf_load(max + (int64_t)c * job->lanes), most);
    for (int32_t n = 0, c = 0; n < job->blocks; c++) {
        vf chunk = vf_zero();
        for (int32_t i = 0; i < job->chunk_blocks && n < job->blocks; i++, n++)
            chunk = vf_add(chunk, vf_load(sum + (int64_t)n * job->lanes));
        const vf down = vf_sub(vf_load(max + (int64_t)c * job->lanes), most);
        total = vf_fma(chunk, vf_exp2(EXP2_FINEST, down), total); /* a power of two, exact */
    }
    vf_store(inverse, total);
    for (int32_t i = 0; i < VL; i++) inverse[i] = inverse[i] == 0.0f ? 0.0f : 1.0f / inverse[i];
    for (int32_t n = 0, c = 0; n < job->blocks; c++) {
        const vf down = vf_sub(vf_load(max + (int64_t)c * job->lanes), most);
        const vf weight = vf_mul(vf_exp2(EXP2_FINEST, down), vf_load(inverse));
        for (int32_t i = 0; i < job->chunk_blocks && n < job->blocks; i++, n++) {
            float *at = sum + (int64_t)n * job->lanes;
            vf_store(at, vf_mul(vf_load(at), weight));
        }
    }
}

static void kernel_antidiagonal_shares(const pbs_antidiagonal_shares *job) {
    for (int32_t lane = 0; lane < job->lanes; lane += VL) share_lanes(job, lane);
}

#endif /* PBS_CPU_KERNEL_ANTIDIAGONAL_H */
