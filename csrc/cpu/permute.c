/* SPDX-License-Identifier: Apache-2.0
 *
 * permute over batches, K/V heads and segments: order the keys of a segment for every head that
 * shares them, then pool and pack them in one sweep over K and one over V; then the panels of
 * means, and query rows last.
 */
#include "cpu.h"
#include "means.h"
#include "packed.h"
#include "permute_queries.h"
#include "threads.h"

/* Of a segment of K or V that is fetched before it is read in permuted order: half of a small L2.
 */
enum { READ_AHEAD_BYTES = 256 << 10 };

typedef struct permute_run {
    const pbs_permute_params *p;
    const pbs_dims *d;
    const pbs_cpu_kernels *k;
    int32_t *k_perm; /* [B, Hp, Nk]: the caller's, or the workspace's */
    pbs_packed *packed;
    float *k_pool, *v_pool; /* [B, Hp, Tk, D]: the caller's, or the workspace's, or NULL */
    int32_t segments;       /* per head, tail included */
    char *scratch;          /* [num_threads, scratch_bytes] for permuted queries and for means */
    size_t scratch_bytes;
} permute_run;

static size_t cut(permute_run *run, void *workspace) {
    const pbs_permute_params *p = run->p;
    const pbs_dims *d = run->d;
    int64_t heads = (int64_t)d->batch * d->heads_p;
    pbs_arena arena = pbs_arena_at(workspace);
    /* Taken even if the caller wants k_perm: sizes may be asked for before outputs exist. */
    run->k_perm = (int32_t *)pbs_arena_take(&arena, heads, d->max_k, sizeof(int32_t));
    if (p->k_perm) run->k_perm = p->k_perm;
    run->segments = pbs_ceil_div(d->max_k, d->segment_size);
    if (p->correction) {
        size_t mean = (size_t)d->head_dim * sizeof(float);
        run->k_pool = (float *)pbs_arena_take(&arena, heads, d->blocks_k, mean);
        run->v_pool = (float *)pbs_arena_take(&arena, heads, d->blocks_k, mean);
        run->scratch_bytes = pbs_means_scratch(d);
    }
    if (p->k_pool || !p->packed) run->k_pool = p->k_pool;
    if (p->v_pool || !p->packed) run->v_pool = p->v_pool;
    if (pbs_permutes_queries(p->mode)) {
        size_t bytes = pbs_permute_queries_scratch(d);
        if (bytes > run->scratch_bytes) run->scratch_bytes = bytes;
    }
    run->scratch = (char *)pbs_arena_take(&arena, p->exec.num_threads, 1, run->scratch_bytes);
    return pbs_arena_bytes(&arena);
}

size_t pbs_cpu_permute_bytes(const pbs_permute_params *p, const pbs_dims *d, const void *k) {
    permute_run run = {.p = p, .d = d, .k = k};
    return cut(&run, NULL);
}

size_t pbs_cpu_packed_bytes(const pbs_dims *d, pbs_permute_mode mode, pbs_correction correction,
                            const void *k) {
    pbs_packed header;
    return pbs_packed_layout(d, pbs_permutes_keys(mode), correction == PBS_CORRECTION_MEAN, k,
                             &header);
}

static int head_on(const permute_run *run, int32_t hp) {
    return !run->p->permute_heads || run->p->permute_heads[hp] != 0;
}

/* Descending floats as ascending integers: -0 is 0, NaN comes last. No arithmetic, to which
 * denormals are zeros here. */
static uint32_t descending_key(float x) {
    uint32_t bits = pbs_bits_of_float(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return UINT32_MAX;
    if (bits == 0x80000000u) bits = 0;
    return bits & 0x80000000u ? bits : 0x7fffffffu - bits;
}

enum { DIGITS = 256, PASSES = 4 }; /* of a key, a byte each */

/* order[0..count) = first + positions by descending score, ties by position: a radix sort, which
 * is stable, over the four bytes of the key. A byte that all keys share needs no pass. */
static void order_segment(const float *score, int32_t first, int32_t count, int32_t *order) {
    uint32_t key[PBS_MAX_SEGMENT_SIZE];
    uint16_t at[2][PBS_MAX_SEGMENT_SIZE], *from = at[0], *to = at[1];
    int32_t start[PASSES][DIGITS] = {{0}};
    for (int32_t i = 0; i < count; i++) {
        key[i] = descending_key(score[i]);
        from[i] = (uint16_t)i;
        for (int pass = 0; pass < PASSES; pass++) start[pass][key[i] >> (8 * pass) & 255]++;
    }
    for (int pass = 0; pass < PASSES; pass++) {
        if (start[pass][key[0] >> (8 * pass) & 255] == count) continue;
        int32_t before = 0;
        for (int digit = 0; digit < DIGITS; digit++) {
            int32_t here = start[pass][digit];
            start[pass][digit] = before;
            before += here;
        }
        for (int32_t i = 0; i < count; i++)
            to[start[pass][key[from[i]] >> (8 * pass) & 255]++] = from[i];
        uint16_t *sorted = to;
        to = from;
        from = sorted;
    }
    for (int32_t i = 0; i < count; i++) order[i] = first + from[i];
}

/* Keys [first, end) of k_perm; identity unless this is a complete segment that moves. */
static void fill_order(const permute_run *run, int64_t head, pbs_seq s, int32_t first,
                       int32_t end) {
    const pbs_permute_params *p = run->p;
    const pbs_dims *d = run->d;
    int64_t at = head * d->max_k + first;
    int32_t *k_perm = run->k_perm + at;
    int moves = pbs_permutes_keys(p->mode) && head_on(run, (int32_t)(head % d->heads_p)) &&
                s.kv_len > d->segment_size && first + d->segment_size <= s.kv_len;
    if (moves && p->k_perm_in)
        memcpy(k_perm, p->k_perm_in + at, (size_t)(end - first) * sizeof *k_perm);
    else if (moves)
        order_segment(p->score + at, first, end - first, k_perm);
    else
        for (int32_t i = first; i < end; i++) k_perm[i - first] = i;
}

/* Keys [first, end) of one K/V head, whole segments but for the last: what one item works on. */
typedef struct segment {
    const permute_run *run;
    pbs_seq s;
    int32_t b, hk;
    int32_t first, end;
} segment;

/* The K or the V half of panels [first, end); the other one has no base. */
static void pack_panels(const segment *seg, const pbs_rows *k, const pbs_rows *v, int32_t end,
                        char *panels) {
    const pbs_packed *packed = seg->run->packed;
    for (int32_t at = seg->first; at < end; at += packed->panel_keys) {
        pbs_pack_job job = {
            .k = pbs_rows_from(*k, at),
            .v = pbs_rows_from(*v, at),
            .count = pbs_min_i32(packed->panel_keys, end - at),
            .keys = packed->panel_keys,
            .head_dim = seg->run->d->head_dim,
            .panel = panels + at / packed->panel_keys * packed->panel_bytes,
        };
        seg->run->k->pack(&job);
    }
}

/* Natural panels, from where somebody reads them. */
static int packs_natural(const segment *seg) {
    const permute_run *run = seg->run;
    int32_t end = pbs_min_i32(seg->end, seg->s.kv_len);
    if (!run->packed || seg->first >= end) return 0;
    return !run->packed->own_only || end > pbs_floor_to(seg->s.q_offset, run->d->segment_size);
}

static int packs_permuted(const segment *seg, int32_t hp) {
    int32_t size = seg->run->d->segment_size;
    return seg->run->packed && pbs_packed_heads(seg->run->packed)[hp] &&
           seg->first + size <= seg->s.kv_len && seg->s.kv_len > size;
}

/* Permuted rows come in no order that hardware would guess; here they come in order once. */
static void read_ahead(const segment *seg, const pbs_rows *rows) {
    size_t bytes = (size_t)seg->run->d->head_dim * pbs_dtype_size(rows->dtype);
    int32_t end = pbs_min_i32(seg->end, seg->s.kv_len);
    if ((size_t)(seg->end - seg->first) * bytes > READ_AHEAD_BYTES) return;
    for (int32_t i = seg->first; i < end; i++)
        for (size_t at = 0; at < bytes; at += PBS_ALIGN)
            __builtin_prefetch((const char *)pbs_row(rows, i) + at);
}

static void pool_segment(const segment *seg, const pbs_rows *rows, float *pool) {
    const pbs_dims *d = seg->run->d;
    for (int32_t at = seg->first; at < seg->end; at += d->block_k, pool += d->head_dim) {
        int32_t last = pbs_min_i32(pbs_min_i32(at + d->block_k, seg->end), seg->s.kv_len);
        pbs_rows block = pbs_rows_from(*rows, at);
        pbs_mean_of_rows(seg->run->k, &block, last - at, d->head_dim, pool);
    }
}

/* Everything that reads one of K and V, while the segment is in the cache: natural panels, then the
 * pools and the permuted panels of each owner. */
static void sweep(const segment *seg, int is_v) {
    const permute_run *run = seg->run;
    const pbs_permute_params *p = run->p;
    const pbs_dims *d = run->d;
    int32_t owners = d->heads_p / d->heads_k, end = pbs_min_i32(seg->end, seg->s.kv_len);
    float *pool = is_v ? run->v_pool : run->k_pool;
    pbs_rows rows = pbs_head_rows(is_v ? &p->v.view : &p->k.view, seg->b, seg->hk, seg->s.kv_start);
    pbs_rows none = {.dtype = rows.dtype};
    if (packs_natural(seg))
        pack_panels(seg, is_v ? &none : &rows, is_v ? &rows : &none, end,
                    pbs_natural_panels(run->packed, d, seg->b, seg->hk));
    else
        read_ahead(seg, &rows);
    for (int32_t hp = seg->hk * owners; hp < (seg->hk + 1) * owners; hp++) {
        int64_t head = (int64_t)seg->b * d->heads_p + hp;
        int64_t block = head * d->blocks_k + seg->first / d->block_k;
        rows.index = run->k_perm + head * d->max_k;
        if (pool) pool_segment(seg, &rows, pool + block * d->head_dim);
        if (packs_permuted(seg, hp))
            pack_panels(seg, is_v ? &none : &rows, is_v ? &rows : &none, seg->end,
                        pbs_permuted_panels(run->packed, d, seg->b, hp));
    }
}

/* Item [b, hk, segment]: order, pools and panels of one segment, for all heads that share its K and
 * V. K first, then V: one of them at a time fits into L2 with what is written. */
static void segment_item(void *context, int64_t item, int32_t slot) {
    const permute_run *run = (const permute_run *)context;
    const pbs_dims *d = run->d;
    int64_t head = item / run->segments;
    int32_t first = (int32_t)(item % run->segments) * d->segment_size;
    segment seg = {.run = run,
                   .b = (int32_t)(head / d->heads_k),
                   .hk = (int32_t)(head % d->heads_k),
                   .first = first,
                   .end = pbs_min_i32(first + d->segment_size, d->max_k)};
    int32_t owners = d->heads_p / d->heads_k;
    seg.s = pbs_dims_seq(d, seg.b);
    (void)slot;
    for (int32_t hp = seg.hk * owners; hp < (seg.hk + 1) * owners; hp++)
        fill_order(run, (int64_t)seg.b * d->heads_p + hp, seg.s, first, seg.end);
    if (run->packed || run->k_pool) sweep(&seg, 0);
    if (run->packed || run->v_pool) sweep(&seg, 1);
}

static void start_packed(permute_run *run) {
    const pbs_dims *d = run->d;
    int permutes = pbs_permutes_keys(run->p->mode), all = permutes;
    run->packed = (pbs_packed *)run->p->packed;
    pbs_packed_layout(d, permutes, run->p->correction == PBS_CORRECTION_MEAN, run->k, run->packed);
    run->packed->call = pbs_packed_call(d, run->k);
    for (int32_t hp = 0; hp < d->heads_p; hp++) {
        int on = permutes && head_on(run, hp);
        pbs_packed_heads(run->packed)[hp] = on;
        run->packed->any_permuted |= on;
        all &= on;
    }
    run->packed->own_only = all;
}

/* Item [b, hq, row segment]. */
static void queries_item(void *context, int64_t item, int32_t slot) {
    const permute_run *run = (const permute_run *)context;
    const pbs_permute_params *p = run->p;
    const pbs_dims *d = run->d;
    int32_t row_segments = pbs_ceil_div(d->max_q, d->segment_size);
    int64_t head = item / row_segments;
    int32_t first = (int32_t)(item % row_segments) * d->segment_size;
    int32_t b = (int32_t)(head / d->heads_q), hq = (int32_t)(head % d->heads_q);
    int32_t hp = pbs_owner_head(d, hq);
    pbs_seq s = pbs_dims_seq(d, b);
    /* With more than one segment of keys, the segment where a whole row segment starts is whole. */
    int32_t key = pbs_floor_to(s.q_offset + first, d->segment_size);
    int32_t *q_perm = p->q_perm + head * d->max_q;
    if (!head_on(run, hp) || first + d->segment_size > s.q_len || s.kv_len <= d->segment_size) {
        int32_t end = pbs_min_i32(first + d->segment_size, d->max_q);
        for (int32_t i = first; i < end; i++) q_perm[i] = i;
        return;
    }
    pbs_query_segment job = {
        .q = pbs_head_rows(&p->q, b, hq, s.q_start),
        .k = pbs_head_rows(&p->k.view, b, hq / d->group, s.kv_start),
        .first_row = first,
        .first_key = key,
        .q_perm = q_perm,
        .scratch = run->scratch + (size_t)slot * run->scratch_bytes,
    };
    if (p->mode == PBS_PERMUTE_BOTH)
        job.k.index = run->k_perm + ((int64_t)b * d->heads_p + hp) * d->max_k;
    pbs_permute_query_segment(d, run->k, &job);
}

static void pack_means(const permute_run *run) {
    pbs_means_run means = {
        .d = run->d,
        .k = run->k,
        .packed = run->packed,
        .k_pool = run->k_pool,
        .v_pool = run->v_pool,
        .pool_heads = run->d->heads_p,
        .scratch = run->scratch,
        .scratch_bytes = run->scratch_bytes,
    };
    pbs_pack_means(&run->p->exec, &means);
}

static void fill_pool_len(const permute_run *run) {
    const pbs_dims *d = run->d;
    for (int32_t b = 0; b < d->batch; b++) {
        pbs_seq s = pbs_dims_seq(d, b);
        for (int32_t n = 0; n < d->blocks_k; n++) {
            int32_t count = pbs_min_i32(s.kv_len - n * d->block_k, d->block_k);
            run->p->pool_len[(int64_t)b * d->blocks_k + n] = pbs_max_i32(count, 0);
        }
    }
}

pbs_status pbs_cpu_permute(const pbs_permute_params *p, const pbs_dims *d, const void *k) {
    permute_run run = {.p = p, .d = d, .k = k};
    cut(&run, p->workspace);
    if (p->packed) start_packed(&run);
    if (p->pool_len) fill_pool_len(&run);
    pbs_run(&p->exec, k, (int64_t)d->batch * d->heads_k * run.segments, segment_item, &run);
    if (p->packed && p->correction) pack_means(&run);
    if (pbs_permutes_queries(p->mode)) {
        int64_t row_segments = pbs_ceil_div(d->max_q, d->segment_size);
        pbs_run(&p->exec, k, (int64_t)d->batch * d->heads_q * row_segments, queries_item, &run);
    }
    return PBS_OK;
}
