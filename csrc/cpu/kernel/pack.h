/* SPDX-License-Identifier: Apache-2.0
 *
 * Panels: K and V of `keys` keys as the micro-kernel streams them.
 *
 *   K part   [keys / GROUP][words of a row][GROUP keys]      word = fp32, or two bf16 along d
 *   V part   [columns / GROUP][steps][GROUP columns]         step = a key, or two keys
 *
 * columns = head_dim padded to GROUP. bf16 and fp16 are widened to fp32 here, once, where the unit
 * has no product for them. A permuted key costs what any row costs: its address comes from a table.
 */
#ifndef PBS_CPU_KERNEL_PACK_H
#define PBS_CPU_KERNEL_PACK_H

#include "cpu/vec.h"

INLINE int32_t panel_columns(int32_t head_dim) { return round_up(head_dim, GROUP); }

/* Words of a row of q or k, and steps over `keys` keys. */
INLINE int32_t panel_words(int32_t head_dim) { return VEC_PAIRS ? head_dim / 2 : head_dim; }
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
    const char *row[GROUP];
    for (int32_t i = 0; i < GROUP; i++)
        row[i] = first + i < count ? row_at(k, first + i, dtype_bytes(k->dtype)) : NULL;

    for (int32_t w = 0; w < words; w += VL) {
        for (int32_t half = 0; half < GROUP; half += VL) {
            vf t[VL];
            UNROLL for (int i = 0; i < VL; i++) {
                const char *at = row[half + i];
                t[i] = at ? vf_load_as(dtype, at + (size_t)w * dtype_bytes(dtype), words - w)
                          : vf_zero();
            }
            vf_transpose(t);
            float *out = group + (int64_t)w * GROUP + half;
            UNROLL for (int i = 0; i < VL; i++) if (i < words - w) vf_store(out + i * GROUP, t[i]);
        }
    }
}

INLINE void pack_k(const pbs_dtype dtype, const pbs_rows *k, int32_t count, int32_t keys,
                   int32_t words, float *panel) {
    for (int32_t first = 0; first < keys; first += GROUP)
        pack_k_group(dtype, k, first, count, words, panel + (int64_t)first * words);
}

INLINE void pack_v(const pbs_dtype dtype, const pbs_rows *v, const pbs_pack_job *job,
                   float *panel) {
    const int64_t group_words = (int64_t)job->keys * GROUP;
    for (int32_t key = 0; key < job->keys; key++) {
        const size_t bytes = dtype_bytes(dtype);
        const char *row = row_at(v, key < job->count ? key : 0, bytes);
        int32_t width = key < job->count ? job->head_dim : 0; /* 0: loads give zeros */
        float *out = panel + (int64_t)key * GROUP;
        for (int32_t d = 0; d < job->head_dim; d += GROUP, out += group_words) {
            vf_store(out, vf_load_as(dtype, row + (size_t)d * bytes, width - d));
            vf_store(out + VL, vf_load_as(dtype, row + (size_t)(d + VL) * bytes, width - d - VL));
        }
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
    pack_k(PBS_DTYPE_FP32, &job->k, job->count, job->keys, panel_words(job->head_dim), k_panel);
    if (job->v.base) pack_v_pairs(&job->v, job, v_panel);
    (void)dtype;
#else
    pack_k(dtype, &job->k, job->count, job->keys, job->head_dim, k_panel);
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

INLINE void pool_as(const pbs_dtype dtype, const pbs_rows *rows, int32_t count, int32_t head_dim,
                    float *sum) {
    const size_t bytes = dtype_bytes(dtype);
    for (int32_t d = 0; d < head_dim; d += VL) {
        vf total = vf_load_as(PBS_DTYPE_FP32, sum + d, head_dim - d);
        for (int32_t i = 0; i < count; i++)
            total = vf_add(
                total, vf_load_as(dtype, row_at(rows, i, bytes) + (size_t)d * bytes, head_dim - d));
        vf_store_as(PBS_DTYPE_FP32, sum + d, head_dim - d, total);
    }
}

static void kernel_pool_add(const pbs_rows *rows, int32_t count, int32_t head_dim, float *sum) {
    switch (rows->dtype) {
    case PBS_DTYPE_FP32: pool_as(PBS_DTYPE_FP32, rows, count, head_dim, sum); break;
    case PBS_DTYPE_FP16: pool_as(PBS_DTYPE_FP16, rows, count, head_dim, sum); break;
    case PBS_DTYPE_BF16: pool_as(PBS_DTYPE_BF16, rows, count, head_dim, sum); break;
    }
}

#endif /* PBS_CPU_KERNEL_PACK_H */
