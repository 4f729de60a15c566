/* SPDX-License-Identifier: Apache-2.0
 *
 * Packing, permuting and pooling, beside a copy that moves as many bytes. With few keys all of it
 * stays in L2; with many it passes through memory.
 */
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "core/geometry.h"
#include "core/view.h"

enum { KEYS = PBS_MAX_PANEL_KEYS };

struct bench_pack {
    const pbs_cpu_kernels *k;
    pbs_dtype dtype;
    int32_t head_dim, keys, segment;
    size_t panel_bytes, copy_bytes; /* per KEYS keys */
    char *rows;                     /* K [keys, head_dim], then V */
    char *panels, *copied;
    float *pool; /* [keys / KEYS, head_dim] */
    int32_t *order;
};

static void fill_order(struct bench_pack *p) {
    uint64_t state = 99;
    for (int32_t i = 0; i < p->keys; i++) p->order[i] = i;
    for (int32_t first = 0; first < p->keys; first += p->segment)
        for (int32_t i = p->segment - 1; i > 0; i--) {
            state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            int32_t *a = p->order + first + i, *b = p->order + first;
            b += (int32_t)((state >> 33) % (uint64_t)(i + 1));
            const int32_t swapped = *a;
            *a = *b;
            *b = swapped;
        }
}

bench_pack *bench_pack_new(int32_t isa, int32_t dtype, int32_t head_dim, int32_t keys,
                           int32_t segment) {
    const pbs_cpu_kernels *k = bench_table(isa, dtype);
    if (!k) return NULL;
    bench_pack *p = (bench_pack *)calloc(1, sizeof *p);
    if (!p) return NULL;
    p->k = k;
    p->dtype = (pbs_dtype)dtype;
    p->head_dim = head_dim;
    p->keys = keys;
    p->segment = segment;
    const size_t read = (size_t)2 * KEYS * (size_t)head_dim * pbs_dtype_size(p->dtype);
    const size_t panels = (size_t)(keys / KEYS);
    p->panel_bytes = k->panel_bytes(head_dim, KEYS);
    p->copy_bytes = (read + p->panel_bytes) / 2;
    p->rows = (char *)bench_memory(panels * read);
    p->panels = (char *)bench_memory(panels * p->panel_bytes);
    p->copied = (char *)bench_memory(panels * p->copy_bytes);
    p->pool = (float *)bench_memory(panels * (size_t)head_dim * sizeof(float));
    p->order = (int32_t *)bench_memory((size_t)keys * sizeof(int32_t));
    if (!p->rows || !p->panels || !p->copied || !p->pool || !p->order) {
        bench_pack_free(p);
        return NULL;
    }
    bench_randomise(p->rows, p->dtype, (int64_t)2 * keys * head_dim, 1.0f);
    fill_order(p);
    return p;
}

static pbs_rows rows_at(const bench_pack *p, int values, int permuted, int32_t first) {
    const size_t row = (size_t)p->head_dim * pbs_dtype_size(p->dtype);
    const char *base = p->rows + (values ? (size_t)p->keys * row : 0);
    pbs_rows rows = {base, p->head_dim, p->order + first, p->dtype};
    if (!permuted) {
        rows.base = base + (size_t)first * row;
        rows.index = NULL;
    }
    return rows;
}

/* K or V alone: the other one has no base. */
static void pack_panel(const bench_pack *p, int permuted, int32_t first, int keys, int values) {
    const pbs_rows none = {.dtype = p->dtype};
    const pbs_pack_job job = {.k = keys ? rows_at(p, 0, permuted, first) : none,
                              .v = values ? rows_at(p, 1, permuted, first) : none,
                              .count = KEYS,
                              .keys = KEYS,
                              .head_dim = p->head_dim,
                              .panel = p->panels + (size_t)(first / KEYS) * p->panel_bytes};
    p->k->pack(&job);
}

static void pool_panel(const bench_pack *p, int32_t first) {
    const pbs_rows rows = rows_at(p, 0, 1, first);
    float *mean = p->pool + (int64_t)(first / KEYS) * p->head_dim;
    memset(mean, 0, (size_t)p->head_dim * sizeof *mean);
    p->k->pool_add(&rows, KEYS, p->head_dim, mean);
}

/* As csrc/cpu/permute.c does it: a sweep over K, then one over V, each fetched in order first. */
static void permute_segment(const bench_pack *p, int32_t first) {
    const size_t bytes = (size_t)p->segment * (size_t)p->head_dim * pbs_dtype_size(p->dtype);
    for (int values = 0; values < 2; values++) {
        const char *rows = (const char *)rows_at(p, values, 0, first).base;
        for (size_t at = 0; at < bytes; at += PBS_ALIGN) __builtin_prefetch(rows + at);
        for (int32_t i = first; i < first + p->segment; i += KEYS) {
            if (!values) pool_panel(p, i);
            pack_panel(p, 1, i, !values, values);
        }
    }
}

static void run_once(const bench_pack *p, int32_t what) {
    const int32_t step = what == BENCH_PERMUTE ? p->segment : KEYS;
    for (int32_t first = 0; first < p->keys; first += step) {
        const size_t at = (size_t)(first / KEYS) * p->copy_bytes;
        if (what == BENCH_PERMUTE)
            permute_segment(p, first);
        else if (what == BENCH_COPY) /* from the panels: of rows there may be too few bytes */
            memcpy(p->copied + at, p->panels + at, p->copy_bytes);
        else
            pack_panel(p, what == BENCH_PACK_PERMUTED, first, 1, 1);
    }
}

void bench_pack_run(bench_pack *p, int32_t what, int32_t repeat) {
    pbs_cpu_state saved;
    p->k->enter(&saved);
    for (int32_t i = 0; i < repeat; i++) run_once(p, what);
    p->k->leave(&saved);
}

void bench_pack_free(bench_pack *p) {
    if (!p) return;
    free(p->rows);
    free(p->panels);
    free(p->copied);
    free(p->pool);
    free(p->order);
    free(p);
}
