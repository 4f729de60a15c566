/* SPDX-License-Identifier: Apache-2.0
 *
 * The packed K/V buffer of pbs_permute, opaque to callers:
 *
 *   header | permuted_heads[heads_p] | natural panels [batch, heads_k, panels]
 *                                    | permuted panels [batch, heads_p, segment_panels]
 *                                    | mean panels [batch, mean_heads, mean_panels]
 *
 * Natural (original-order) panels serve the own span, and the history of heads that are not
 * permuted; permuted panels exist only for complete segments and modes that permute keys. Mean
 * panels, with PBS_CORRECTION_MEAN only, have a key for each whole key block, in the order that its
 * head reads history in.
 */
#ifndef PBS_CPU_PACKED_H
#define PBS_CPU_PACKED_H

#include <string.h>

#include "../core/arena.h"
#include "../core/check.h"
#include "../core/random.h"
#include "convert.h"
#include "kernels.h"

#define PBS_PACKED_MAGIC UINT64_C(0x31564b5f53425000) /* "\0PBS_KV1" */

typedef struct pbs_packed {
    uint64_t magic;
    uint64_t call; /* fingerprint of shapes, dtype, ISA and geometry */
    int32_t segment_size;
    int32_t any_permuted; /* some head has permuted panels */
    int32_t own_only;     /* natural panels before the first own block were left out */
    int32_t panel_keys;
    int32_t permutes;   /* laid out for a mode that permutes keys */
    int32_t has_means;  /* made with PBS_CORRECTION_MEAN */
    int32_t mean_heads; /* heads that have an order of their own; 0 without means */
    int32_t reserved;
    int64_t panel_bytes;
    int64_t panels, segment_panels, mean_panels; /* per head */
    int64_t natural, permuted, means;            /* offsets from the header */
} pbs_packed;

static inline int32_t pbs_panel_keys(int32_t block_k) {
    return pbs_min_i32(block_k, PBS_MAX_PANEL_KEYS);
}

/* What must agree between the call that packed and the call that reads. */
static inline uint64_t pbs_packed_call(const pbs_dims *d, const pbs_cpu_kernels *k) {
    uint64_t x = PBS_PACKED_MAGIC;
    const int32_t fields[] = {(int32_t)k->isa, (int32_t)d->dtype, d->batch,    d->heads_k,
                              d->heads_p,      d->max_k,          d->head_dim, d->block_k};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        x = pbs_hash(x, (int32_t)i, fields[i]);
    for (int32_t b = 0; b < d->batch; b++) {
        pbs_seq s = pbs_dims_seq(d, b);
        x = pbs_hash(x, (int32_t)s.kv_start, s.kv_len);
        x = pbs_hash(x, s.q_offset, b);
    }
    return x;
}

/* Offsets of a buffer for these dims; returns its size, SIZE_MAX if that cannot be counted. */
static inline size_t pbs_packed_layout(const pbs_dims *d, int permutes, int means,
                                       const pbs_cpu_kernels *k, pbs_packed *header) {
    memset(header, 0, sizeof *header);
    header->magic = PBS_PACKED_MAGIC;
    header->segment_size = d->segment_size;
    header->permutes = permutes;
    header->has_means = means;
    header->panel_keys = pbs_panel_keys(d->block_k);
    header->panel_bytes = (int64_t)k->panel_bytes(d->head_dim, header->panel_keys);
    header->panels = (int64_t)d->blocks_k * (d->block_k / header->panel_keys);
    if (permutes)
        header->segment_panels = pbs_complete_keys(d->max_k, d->segment_size) / header->panel_keys;
    if (means) {
        header->mean_heads = permutes ? d->heads_p : d->heads_k;
        header->mean_panels = pbs_ceil_div(d->max_k / d->block_k, header->panel_keys);
    }
    pbs_arena arena = pbs_arena_at(NULL);
    pbs_arena_take(&arena, 1, 1, sizeof *header + (size_t)d->heads_p * sizeof(int32_t));
    header->natural = (int64_t)arena.used;
    pbs_arena_take(&arena, (int64_t)d->batch * d->heads_k, header->panels,
                   (size_t)header->panel_bytes);
    header->permuted = (int64_t)arena.used;
    pbs_arena_take(&arena, (int64_t)d->batch * d->heads_p, header->segment_panels,
                   (size_t)header->panel_bytes);
    header->means = (int64_t)arena.used;
    pbs_arena_take(&arena, (int64_t)d->batch * header->mean_heads, header->mean_panels,
                   (size_t)header->panel_bytes);
    return arena.overflow ? SIZE_MAX : arena.used;
}

static inline int32_t *pbs_packed_heads(const pbs_packed *header) {
    return (int32_t *)((uintptr_t)header + sizeof *header);
}

/* Panel of key 0 of one head. */
static inline char *pbs_natural_panels(const pbs_packed *header, const pbs_dims *d, int32_t b,
                                       int32_t hk) {
    int64_t head = (int64_t)b * d->heads_k + hk;
    return (char *)(uintptr_t)header + header->natural +
           head * header->panels * header->panel_bytes;
}

static inline char *pbs_permuted_panels(const pbs_packed *header, const pbs_dims *d, int32_t b,
                                        int32_t hp) {
    int64_t head = (int64_t)b * d->heads_p + hp;
    return (char *)(uintptr_t)header + header->permuted +
           head * header->segment_panels * header->panel_bytes;
}

/* Panel of block 0 of a head of means, [batch, mean_heads]. */
static inline char *pbs_mean_panels(const pbs_packed *header, int64_t head) {
    return (char *)(uintptr_t)header + header->means +
           head * header->mean_panels * header->panel_bytes;
}

/* First row of one head of one sequence. */
static inline pbs_rows pbs_head_rows(const pbs_view *v, int32_t b, int32_t h, int64_t start) {
    pbs_rows rows;
    rows.base = pbs_view_at(v, b, h, start);
    rows.stride = v->stride[2];
    rows.index = NULL;
    rows.dtype = v->dtype;
    return rows;
}

/* Rows [first, ...) of rows, or of its index. */
static inline pbs_rows pbs_rows_from(pbs_rows rows, int32_t first) {
    if (rows.index)
        rows.index += first;
    else
        rows.base =
            (const char *)rows.base + first * rows.stride * (int64_t)pbs_dtype_size(rows.dtype);
    return rows;
}

#endif /* PBS_CPU_PACKED_H */
