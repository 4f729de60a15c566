/* SPDX-License-Identifier: Apache-2.0
 *
 * Panels: K and V of `keys` keys as the micro-kernel streams them.
 *
 *   K part   [keys / GROUP][words of a row][GROUP keys]      word = fp32, or two bf16 along d
 *   V part   [columns / GROUP][steps][GROUP columns]         step = a key, or two keys
 *
 * columns = head_dim padded to GROUP. bf16 and fp16 are widened to fp32 here, once, where the unit
 * has no product for them. A permuted key costs what any row costs: its address comes from a table.
 *
 * With tiles, 16 words or steps of one half of a group are a B tile, its rows GROUP words apart; so
 * words are padded with zeros to whole tiles. keys and columns are whole ones anyway.
 */
#ifndef PBS_CPU_KERNEL_PACK_H
#define PBS_CPU_KERNEL_PACK_H

#include "cpu/vec.h"

INLINE int32_t panel_columns(int32_t head_dim) { return round_up(head_dim, GROUP); }

/* Words of a row of q or k: those it has, and those of a panel. And steps over `keys` keys. */
INLINE int32_t row_words(int32_t head_dim) { return VEC_PAIRS ? head_dim / 2 : head_dim; }
INLINE int32_t panel_words(int32_t head_dim) {
    return VEC_TILES ? round_up(row_words(head_dim), VL) : row_words(head_dim);
}
INLINE int32_t panel_steps(int32_t keys) { return VEC_PAIRS ? keys / 2 : keys; }

/* Both parts, in words. */
INLINE int64_t k_part(int32_t head_dim, int32_t keys) {
    return (int64_t)panel_words(head_dim) * keys;
}
INLINE int64_t v_part(int32_t head_dim, int32_t keys) {
    return (int64_t)panel_columns(head_dim) * panel_steps(keys);
}

static size_t kernel_panel_bytes(int32_t head_dim, int32_t keys) {
    return 4 * (size_t)(k_part(head_dim, keys) + v_part(head_dim, keys));
}

/* Keys [first, first + GROUP) transposed to [words][GROUP]; keys from count on are zeros. Elements
 * are of `dtype`, which is FP32 also for pairs: a word is copied as it is. */
INLINE void pack_k_group(const pbs_dtype dtype, const pbs_rows *k, int32_t first, int32_t count,
                         int32_t words, float *group) {
    static const char no_key[4 * PBS_MAX_HEAD_DIM];
    const size_t bytes = dtype_bytes(dtype);
    for (int32_t half = 0; half < GROUP; half += VL) {
        const char *row[VL];
        for (int32_t i = 0; i < VL; i++)
            row[i] = first + half + i < count ? row_at(k, first + half + i, dtype_bytes(k->dtype))
                                              : no_key;
        float *out = group + half;
        int32_t w = 0;
        for (; w + VL <= words; w += VL, out += VL * GROUP) {
            vf t[VL];
            UNROLL for (int i = 0; i < VL; i++) t[i] =
                vf_load_as(dtype, row[i] + (size_t)w * bytes, VL);
            vf_transpose(t);
            UNROLL for (int i = 0; i < VL; i++) vf_store(out + i * GROUP, t[i]);
        }
        if (w == words) continue;
        vf t[VL];
        UNROLL for (int i = 0; i < VL; i++) t[i] =
            vf_load_as(dtype, row[i] + (size_t)w * bytes, words - w);
        vf_transpose(t);
        for (int i = 0; i < words - w; i++) vf_store(out + i * GROUP, t[i]);
    }
}

INLINE void pack_k(const pbs_dtype dtype, const pbs_pack_job *job, float *panel) {
    const int32_t words = row_words(job->head_dim), padded = panel_words(job->head_dim);
    for (int32_t first = 0; first < job->keys; first += GROUP) {
        float *group = panel + (int64_t)first * padded;
        pack_k_group(dtype, &job->k, first, job->count, words, group);
        memset(group + words * GROUP, 0, (size_t)(padded - words) * GROUP * 4);
    }
}

INLINE void pack_v(const pbs_dtype dtype, const pbs_rows *v, const pbs_pack_job *job,
                   float *panel) {
    const int64_t group_words = (int64_t)job->keys * GROUP;
    const size_t bytes = dtype_bytes(dtype);
    const int32_t whole = job->head_dim / GROUP * GROUP;
    for (int32_t key = 0; key < job->keys; key++) {
        float *out = panel + (int64_t)key * GROUP;
        if (key >= job->count) {
            for (int32_t d = 0; d < job->head_dim; d += GROUP, out += group_words)
                memset(out, 0, GROUP * sizeof *out);
            continue;
        }
        const char *row = row_at(v, key, bytes);
        for (int32_t d = 0; d < whole; d += GROUP, out += group_words) {
            vf_store(out, vf_load_as(dtype, row + (size_t)d * bytes, VL));
            vf_store(out + VL, vf_load_as(dtype, row + (size_t)(d + VL) * bytes, VL));
        }
        if (whole == job->head_dim) continue;
        const int32_t left = job->head_dim - whole;
        vf_store(out, vf_load_as(dtype, row + (size_t)whole * bytes, left));
        vf_store(out + VL, vf_load_as(dtype, row + (size_t)(whole + VL) * bytes, left - VL));
    }
}

#if VEC_PAIRS
INLINE void pack_v_pairs(const pbs_rows *v, const pbs_pack_job *job, float *panel) {
    static const uint16_t no_key[PBS_MAX_HEAD_DIM];
    const int64_t group_words = (int64_t)job->keys / 2 * GROUP;
    for (int32_t key = 0; key < job->keys; key += 2) {
        const char *even = key < job->count ? row_at(v, key, 2) : (const char *)no_key;
        const char *odd = key + 1 < job->count ? row_at(v, key + 1, 2) : (const char *)no_key;
        float *out = panel + (int64_t)key / 2 * GROUP;
        for (int32_t d = 0; d < job->head_dim; d += GROUP, out += group_words) {
            for (int32_t at = d; at < d + GROUP; at += VL)
                vf_store(out + at - d,
                         vf_load_pairs(even + 2 * at, odd + 2 * at, job->head_dim - at));
        }
    }
}
#endif

INLINE void pack_as(const pbs_dtype dtype, const pbs_pack_job *job) {
    float *k_panel = job->panel, *v_panel = k_panel + k_part(job->head_dim, job->keys);
#if VEC_PAIRS
    if (job->k.base) pack_k(PBS_DTYPE_FP32, job, k_panel);
    if (job->v.base) pack_v_pairs(&job->v, job, v_panel);
    (void)dtype;
#else
    if (job->k.base) pack_k(dtype, job, k_panel);
    if (job->v.base) pack_v(dtype, &job->v, job, v_panel);
#endif
}

static void kernel_pack(const pbs_pack_job *job) {
#if VEC_PAIRS
    pack_as(PBS_DTYPE_BF16, job);
#else
    switch (job->k.dtype) {
    case PBS_DTYPE_FP32: pack_as(PBS_DTYPE_FP32, job); break;
    case PBS_DTYPE_FP16: pack_as(PBS_DTYPE_FP16, job); break;
    case PBS_DTYPE_BF16: pack_as(PBS_DTYPE_BF16, job); break;
    }
#endif
}

enum { POOL_VECTORS = 8 };

/* `vectors` of columns at once: as many chains of additions that do not wait for each other. */
INLINE void pool_columns(const int vectors, const pbs_dtype dtype, const pbs_rows *rows,
                         int32_t count, int32_t d, int64_t left, float *sum) {
    const size_t bytes = dtype_bytes(dtype);
    vf total[POOL_VECTORS];
    UNROLL for (int c = 0; c < vectors; c++) total[c] =
        vf_load_as(PBS_DTYPE_FP32, sum + d + c * VL, left - c * VL);
    for (int32_t i = 0; i < count; i++) {
        const char *at = row_at(rows, i, bytes) + (size_t)d * bytes;
        UNROLL for (int c = 0; c < vectors; c++) total[c] =
            vf_add(total[c], vf_load_as(dtype, at + (size_t)(c * VL) * bytes, left - c * VL));
    }
    UNROLL for (int c = 0; c < vectors; c++)
        vf_store_as(PBS_DTYPE_FP32, sum + d + c * VL, left - c * VL, total[c]);
}

INLINE void pool_as(const pbs_dtype dtype, const pbs_rows *rows, int32_t count, int32_t head_dim,
                    float *sum) {
    int32_t d = 0;
    for (; d + POOL_VECTORS * VL <= head_dim; d += POOL_VECTORS * VL)
        pool_columns(POOL_VECTORS, dtype, rows, count, d, POOL_VECTORS * VL, sum);
    for (; d + GROUP <= head_dim; d += GROUP) pool_columns(2, dtype, rows, count, d, GROUP, sum);
    for (; d < head_dim; d += VL) pool_columns(1, dtype, rows, count, d, head_dim - d, sum);
}

static void kernel_pool_add(const pbs_rows *rows, int32_t count, int32_t head_dim, float *sum) {
    switch (rows->dtype) {
    case PBS_DTYPE_FP32: pool_as(PBS_DTYPE_FP32, rows, count, head_dim, sum); break;
    case PBS_DTYPE_FP16: pool_as(PBS_DTYPE_FP16, rows, count, head_dim, sum); break;
    case PBS_DTYPE_BF16: pool_as(PBS_DTYPE_BF16, rows, count, head_dim, sum); break;
    }
}

#endif /* PBS_CPU_KERNEL_PACK_H */
