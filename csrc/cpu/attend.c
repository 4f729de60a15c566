/* SPDX-License-Identifier: Apache-2.0
 *
 * attend over batches, heads and query blocks, the longest lists first.
 */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#include <time.h>

#include "../core/bits.h"
#include "cpu.h"
#include "means.h"
#include "packed.h"
#include "threads.h"

typedef struct attend_run {
    const pbs_attend_params *p;
    const pbs_dims *d;
    const pbs_cpu_kernels *k;
    const pbs_packed *packed; /* the caller's, or own */
    pbs_packed *own;          /* natural order only, in the workspace; NULL if packed is given */
    float *k_pool, *v_pool;   /* [B, Hk, Tk, D] for the means of own; NULL: without */
    uint32_t *all;            /* [W] ones: what OWN_ALL reads before the diagonal */
    int64_t *order;           /* [B * Hq * Tq] items by descending number of blocks */
    int64_t *start;           /* [Tk + 2] counting sort */
    char *scratch;            /* [num_threads, scratch_bytes] */
    size_t scratch_bytes;
} attend_run;

static size_t cut(attend_run *run, void *workspace) {
    const pbs_dims *d = run->d;
    pbs_packed header;
    pbs_arena arena = pbs_arena_at(workspace);
    int means = run->p->correction == PBS_CORRECTION_MEAN && !run->p->packed;
    size_t scratch = run->k->attend_scratch(d->head_dim, d->block_q);
    if (means && scratch < pbs_means_scratch(d)) scratch = pbs_means_scratch(d);
    run->scratch_bytes = (scratch + PBS_ALIGN - 1) / PBS_ALIGN * PBS_ALIGN;
    run->scratch = (char *)pbs_arena_take(&arena, run->p->exec.num_threads, 1, run->scratch_bytes);
    run->order = (int64_t *)pbs_arena_take(&arena, (int64_t)d->batch * d->heads_q, d->blocks_q,
                                           sizeof(int64_t));
    run->start = (int64_t *)pbs_arena_take(&arena, (int64_t)d->blocks_k + 2, 1, sizeof(int64_t));
    run->all = (uint32_t *)pbs_arena_take(&arena, d->words, 1, sizeof(uint32_t));
    run->packed = (const pbs_packed *)run->p->packed;
    if (!run->p->packed) {
        size_t bytes = pbs_packed_layout(d, 0, means, run->k, &header);
        run->own = (pbs_packed *)pbs_arena_take(&arena, 1, 1, bytes);
        run->packed = run->own;
    }
    if (means) {
        int64_t heads = (int64_t)d->batch * d->heads_k;
        size_t mean = (size_t)d->head_dim * sizeof(float);
        run->k_pool = (float *)pbs_arena_take(&arena, heads, d->blocks_k, mean);
        run->v_pool = (float *)pbs_arena_take(&arena, heads, d->blocks_k, mean);
    }
    return pbs_arena_bytes(&arena);
}

size_t pbs_cpu_attend_bytes(const pbs_attend_params *p, const pbs_dims *d, const void *k) {
    attend_run run = {.p = p, .d = d, .k = k};
    return cut(&run, NULL);
}

pbs_status pbs_cpu_check_packed(const pbs_attend_params *p, const pbs_dims *d, const void *k) {
    const pbs_packed *header = (const pbs_packed *)p->packed;
    if (!header) return PBS_OK;
    if ((uintptr_t)p->packed % PBS_ALIGN)
        return pbs_fail(PBS_ERR_VALUE, "packed: %p; 64-byte alignment is needed", p->packed);
    if (p->packed_bytes < sizeof *header || header->magic != PBS_PACKED_MAGIC)
        return pbs_fail(PBS_ERR_WORKSPACE, "packed: not a buffer that pbs_permute has written");
    if (header->call != pbs_packed_call(d, k))
        return pbs_fail(PBS_ERR_WORKSPACE,
                        "packed: made by a call with other shapes, geometry, dtype, gqa or ISA");
    if (p->correction && !header->has_means)
        return pbs_fail(PBS_ERR_WORKSPACE, "packed: made without correction");
    pbs_packed layout;
    pbs_dims packed_dims = *d;
    packed_dims.segment_size = header->segment_size;
    size_t bytes = pbs_packed_layout(&packed_dims, header->permutes, header->has_means, k, &layout);
    if (p->packed_bytes < bytes)
        return pbs_fail(PBS_ERR_WORKSPACE, "packed_bytes: %zu; %zu are needed", p->packed_bytes,
                        bytes);
    if (!header->any_permuted) return PBS_OK;
    if (p->own == PBS_OWN_BLOCK)
        return pbs_fail(
            PBS_ERR_VALUE,
            "own: BLOCK (1), but packed holds permuted keys; SEGMENT or NONE is needed");
    if (header->own_only && (p->own == PBS_OWN_MASK || p->own == PBS_OWN_ALL))
        return pbs_fail(PBS_ERR_VALUE,
                        "own: %d, but packed holds the history in permuted order only",
                        (int)p->own);
    if (p->correction && p->own == PBS_OWN_MASK)
        return pbs_fail(PBS_ERR_VALUE,
                        "own: MASK (2), but packed holds the means of permuted blocks");
    int segments = p->own == PBS_OWN_SEGMENT || p->own == PBS_OWN_NONE;
    if (segments && header->segment_size != d->segment_size)
        return pbs_fail(PBS_ERR_VALUE, "segment_size: %d; packed was made with %d", d->segment_size,
                        header->segment_size);
    return PBS_OK;
}

/* The key ranges of one query block. */
typedef struct span {
    int32_t hist_end; /* key blocks [0, hist_end) are read whole where the bit is set */
    int32_t own_begin, own_end;
} span;

static int32_t row_segment_of(const attend_run *run) {
    return run->p->q_perm ? run->d->segment_size : 0;
}

static span span_of(const attend_run *run, pbs_seq s, int32_t m) {
    const pbs_dims *d = run->d;
    pbs_own own = run->p->own;
    int32_t row_segment = row_segment_of(run);
    span sp;
    sp.own_end = pbs_own_end(s, m, d->block_q, row_segment);
    if (own == PBS_OWN_MASK || own == PBS_OWN_ALL) {
        /* Blocks that every row sees need no mask; bits (or ones) decide about all others too. */
        int32_t row = m * d->block_q;
        if (row_segment) row = row / row_segment * row_segment;
        sp.own_begin = pbs_floor_to(s.q_offset + row + 1, d->block_k);
    } else {
        sp.own_begin =
            pbs_own_start(s, m, d->block_q, d->block_k, d->segment_size, row_segment, own);
    }
    sp.hist_end = sp.own_begin / d->block_k;
    if (own == PBS_OWN_NONE) sp.own_end = sp.own_begin;
    return sp;
}

static const uint32_t *bits_of(const attend_run *run, int32_t b, int32_t hq, int32_t m) {
    const pbs_dims *d = run->d;
    if (run->p->own == PBS_OWN_ALL) return run->all;
    int32_t sel = run->p->heads_sel == d->heads_q ? hq : hq / d->group;
    int64_t row = ((int64_t)b * run->p->heads_sel + sel) * d->blocks_q + m;
    return run->p->bits + row * d->words;
}

static pbs_rows query_rows(const attend_run *run, pbs_seq s, int32_t b, int32_t hq, int32_t first) {
    const pbs_dims *d = run->d;
    pbs_rows rows = pbs_head_rows(&run->p->q, b, hq, s.q_start);
    if (run->p->q_perm)
        rows.index = run->p->q_perm + ((int64_t)b * d->heads_q + hq) * d->max_q + first;
    return rows;
}

static char *output_at(const pbs_view *v, int32_t b, int32_t h, int64_t start) {
    return (char *)(uintptr_t)pbs_head_rows(v, b, h, start).base;
}

/* In the order of the head's history; NULL without correction. */
static const char *mean_panels(const attend_run *run, int32_t b, int32_t hk, int32_t hp) {
    if (!run->p->correction) return NULL;
    int64_t head = (int64_t)b * run->packed->mean_heads;
    return pbs_mean_panels(run->packed, head + (run->packed->permutes ? hp : hk));
}

static float log2_of(int32_t power) {
    float log = 0.0f;
    for (; power > 1; power /= 2) log += 1.0f;
    return log;
}

/* Query block m of head hq of sequence b. */
static void attend_rows(const attend_run *run, int32_t b, int32_t hq, int32_t m, int32_t slot,
                        uint64_t *rescales) {
    const pbs_attend_params *p = run->p;
    const pbs_dims *d = run->d;
    int32_t first = m * d->block_q;
    int32_t hk = hq / d->group, hp = pbs_owner_head(d, hq);
    pbs_seq s = pbs_dims_seq(d, b);
    span sp = span_of(run, s, m);
    const char *natural = pbs_natural_panels(run->packed, d, b, hk);
    int permuted =
        p->own != PBS_OWN_MASK && p->own != PBS_OWN_ALL && pbs_packed_heads(run->packed)[hp];
    pbs_attend_job job = {
        .q = query_rows(run, s, b, hq, first),
        .row_begin = first,
        .rows = pbs_min_i32(d->block_q, s.q_len - first),
        .q_offset = s.q_offset,
        .head_dim = d->head_dim,
        .scale_log2 = p->softmax_scale * PBS_LOG2_E,
        .block_k = d->block_k,
        .bits = bits_of(run, b, hq, m),
        .hist_end = sp.hist_end,
        .hist_panels = permuted ? pbs_permuted_panels(run->packed, d, b, hp) : natural,
        .mean_panels = mean_panels(run, b, hk, hp),
        .mean_bias = log2_of(d->block_k),
        .own_bits = p->own == PBS_OWN_MASK ? bits_of(run, b, hq, m) : NULL,
        .own_begin = sp.own_begin,
        .own_end = sp.own_end,
        .own_panels = natural,
        .out = output_at(&p->out, b, hq, s.q_start),
        .out_stride = p->out.stride[2],
        .lse = p->lse.data ? (float *)(void *)output_at(&p->lse, b, hq, s.q_start) : NULL,
        .lse_stride = p->lse.data ? p->lse.stride[2] : 0,
        .rescales = rescales,
        .scratch = run->scratch + (size_t)slot * run->scratch_bytes,
    };
    run->k->attend_block(&job);
}

static int32_t blocks_of(const attend_run *run, pbs_seq s, int32_t b, int32_t hq, int32_t m) {
    span sp = span_of(run, s, m);
    int32_t end = pbs_max_i32(sp.own_end, sp.own_begin), block = run->d->block_k;
    if (run->p->own == PBS_OWN_MASK && end > 0)
        return pbs_count_bits(bits_of(run, b, hq, m), pbs_ceil_div(end, block));
    int32_t own = pbs_ceil_div(end - sp.own_begin, block);
    if (sp.hist_end == 0) return own;
    return own + pbs_count_bits(bits_of(run, b, hq, m), sp.hist_end);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

/* Entry of run->order. */
static void attend_item(void *context, int64_t item, int32_t slot) {
    const attend_run *run = (const attend_run *)context;
    const pbs_dims *d = run->d;
    int64_t head = run->order[item] / d->blocks_q;
    int32_t m = (int32_t)(run->order[item] % d->blocks_q);
    int32_t b = (int32_t)(head / d->heads_q), hq = (int32_t)(head % d->heads_q);
    if (!run->p->counters) {
        attend_rows(run, b, hq, m, slot, NULL);
        return;
    }
    uint64_t rescales = 0, begin = now_ns();
    attend_rows(run, b, hq, m, slot, &rescales);
    pbs_work_counters *mine = run->p->counters + slot;
    mine->items++;
    mine->blocks += (uint64_t)blocks_of(run, pbs_dims_seq(d, b), b, hq, m);
    mine->rescales += rescales;
    mine->busy_ns += now_ns() - begin;
}

/* Counting sort by descending number of blocks; equal ones stay by (batch, head, block), so that
 * threads share K/V. Returns the number of items: blocks without rows are left out. */
static int64_t sort_items(const attend_run *run) {
    const pbs_dims *d = run->d;
    int32_t most = d->blocks_k;
    int64_t items = 0;
    for (int32_t i = 0; i < most + 2; i++) run->start[i] = 0;
    for (int pass = 0; pass < 2; pass++) { /* 0 counts, 1 places */
        int64_t item = 0;
        for (int32_t b = 0; b < d->batch; b++) {
            pbs_seq s = pbs_dims_seq(d, b);
            for (int32_t hq = 0; hq < d->heads_q; hq++, item += d->blocks_q)
                for (int32_t m = 0; m * d->block_q < s.q_len; m++) {
                    int32_t at = most - blocks_of(run, s, b, hq, m);
                    if (pass == 0)
                        run->start[at + 1]++;
                    else
                        run->order[run->start[at]++] = item + m;
                }
        }
        for (int32_t i = 0; pass == 0 && i <= most; i++) run->start[i + 1] += run->start[i];
        if (pass == 0) items = run->start[most + 1];
    }
    return items;
}

/* Item [b, hk, key block]: its panels and means in original order, when no packed buffer was given.
 */
static void pack_item(void *context, int64_t item, int32_t slot) {
    const attend_run *run = (const attend_run *)context;
    const pbs_dims *d = run->d;
    int64_t head = item / d->blocks_k;
    int32_t b = (int32_t)(head / d->heads_k), hk = (int32_t)(head % d->heads_k);
    int32_t keys = run->packed->panel_keys, first = (int32_t)(item % d->blocks_k) * d->block_k;
    pbs_seq s = pbs_dims_seq(d, b);
    int32_t count = pbs_min_i32(d->block_k, s.kv_len - first);
    (void)slot;
    if (count <= 0) return;
    pbs_rows k = pbs_head_rows(&run->p->k.view, b, hk, s.kv_start + first);
    pbs_rows v = pbs_head_rows(&run->p->v.view, b, hk, s.kv_start + first);
    char *panel =
        pbs_natural_panels(run->packed, d, b, hk) + first / keys * run->packed->panel_bytes;
    for (int32_t at = 0; at < count; at += keys, panel += run->packed->panel_bytes) {
        pbs_pack_job job = {
            .k = pbs_rows_from(k, at),
            .v = pbs_rows_from(v, at),
            .count = pbs_min_i32(keys, count - at),
            .keys = keys,
            .head_dim = d->head_dim,
            .panel = panel,
        };
        run->k->pack(&job);
    }
    if (!run->k_pool || count < d->block_k) return;
    pbs_mean_of_rows(run->k, &k, count, d->head_dim, run->k_pool + item * d->head_dim);
    pbs_mean_of_rows(run->k, &v, count, d->head_dim, run->v_pool + item * d->head_dim);
}

static void pack_own(attend_run *run) {
    const pbs_dims *d = run->d;
    pbs_packed_layout(d, 0, run->k_pool != NULL, run->k, run->own);
    memset(pbs_packed_heads(run->own), 0, (size_t)d->heads_p * sizeof(int32_t));
    int64_t blocks = (int64_t)d->batch * d->heads_k * d->blocks_k;
    pbs_run(&run->p->exec, run->k, blocks, pack_item, run);
    if (!run->k_pool) return;
    pbs_means_run means = {
        .d = d,
        .k = run->k,
        .packed = run->own,
        .k_pool = run->k_pool,
        .v_pool = run->v_pool,
        .pool_heads = d->heads_k,
        .scratch = run->scratch,
        .scratch_bytes = run->scratch_bytes,
    };
    pbs_pack_means(&run->p->exec, &means);
}

pbs_status pbs_cpu_attend(const pbs_attend_params *p, const pbs_dims *d, const void *k) {
    attend_run run = {.p = p, .d = d, .k = k};
    cut(&run, p->workspace);
    for (int32_t w = 0; w < d->words; w++) run.all[w] = UINT32_MAX;
    if (run.own) pack_own(&run);
    pbs_run(&p->exec, k, sort_items(&run), attend_item, &run);
    return PBS_OK;
}
