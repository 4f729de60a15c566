/* SPDX-License-Identifier: Apache-2.0
 *
 * prefill = score, permute, select, attend on one wave of heads after another. A wave is a
 * rectangle of the call: all heads of some sequences, some K/V heads of one, or, where each has a
 * permutation of its own, some query heads of one K/V head. Each verb sees it as a smaller call on
 * the same memory, so the result is what the four verbs give, bit for bit.
 */
#include "arena.h"
#include "backend.h"

/* Sequences [batch, batch + batches), K/V heads [head, head + heads), and of those that share each
 * of them the query heads [query, query + queries): all, unless there is one K/V head. */
typedef struct wave {
    int32_t batch, batches;
    int32_t head, heads;
    int32_t query, queries;
} wave;

typedef struct prefill_run {
    const pbs_prefill_params *p;
    const pbs_dims *d;
    const pbs_backend *backend;
    const void *k;
    pbs_dims dims; /* of the wave */
    float *score;
    int32_t *k_perm, *q_perm, *count;
    float *k_pool;
    uint32_t *bits;
    void *packed;
    size_t packed_bytes;
    void *verbs; /* workspace of whichever verb runs */
    size_t verbs_bytes;
} prefill_run;

static pbs_view part_of(const pbs_view *v, const wave *w, int32_t first_head, int32_t heads) {
    pbs_view part = *v;
    part.size[0] = w->batches;
    part.size[1] = heads;
    part.data = pbs_view_at(v, w->batch, first_head, 0);
    return part;
}

static const int32_t *from(const int32_t *array, int64_t first) {
    return array ? array + first : NULL;
}

static pbs_geometry geometry_of(const pbs_dims *d, const wave *w) {
    pbs_geometry g = d->geometry;
    g.q_start = from(g.q_start, w->batch);
    g.q_len = from(g.q_len, w->batch);
    g.kv_start = from(g.kv_start, w->batch);
    g.kv_len = from(g.kv_len, w->batch);
    return g;
}

/* Nothing depends on the permutation's heads in natural order: pool once per K/V head. */
static int is_natural(pbs_permute_mode mode) {
    return mode == PBS_PERMUTE_NONE || mode == PBS_PERMUTE_IDENTITY;
}

/* Every query head has its own permutation. */
static int is_per_head(const prefill_run *run) {
    return run->d->heads_p == run->d->heads_q && !is_natural(run->p->mode);
}

static pbs_dims dims_of(const prefill_run *run, const wave *w) {
    pbs_dims d = *run->d;
    d.geometry = geometry_of(run->d, w);
    d.batch = w->batches;
    d.heads_k = w->heads;
    d.group = w->queries;
    d.heads_q = w->heads * w->queries;
    d.heads_p = is_per_head(run) ? d.heads_q : d.heads_k;
    return d;
}

/* First query head, and first owner of a permutation. */
static int32_t first_q(const prefill_run *run, const wave *w) {
    return w->head * run->d->group + w->query;
}

static int32_t first_p(const prefill_run *run, const wave *w) {
    return run->d->heads_p == run->d->heads_q ? first_q(run, w) : w->head;
}

static int needs_score(const pbs_prefill_params *p) {
    return pbs_permutes_keys(p->mode) && !p->k_perm_in;
}

static pbs_score_params score_params(const prefill_run *run, const wave *w) {
    const pbs_prefill_params *p = run->p;
    pbs_score_params v = PBS_INIT(pbs_score_params);
    v.q = part_of(&p->q, w, first_q(run, w), run->dims.heads_q);
    v.k.view = part_of(&p->k.view, w, w->head, run->dims.heads_k);
    v.geometry = run->dims.geometry;
    v.softmax_scale = p->softmax_scale;
    v.block_size = p->block_size;
    v.segment_size = p->segment_size;
    v.gqa = p->gqa;
    v.order = p->order;
    v.seed = p->seed;
    v.score = run->score;
    v.exec = p->exec;
    v.workspace = run->verbs;
    return v;
}

static pbs_permute_params permute_params(const prefill_run *run, const wave *w) {
    const pbs_prefill_params *p = run->p;
    int64_t perm = (int64_t)w->batch * run->d->heads_p + first_p(run, w);
    pbs_permute_params v = PBS_INIT(pbs_permute_params);
    v.q = part_of(&p->q, w, first_q(run, w), run->dims.heads_q);
    v.k.view = part_of(&p->k.view, w, w->head, run->dims.heads_k);
    v.v.view = part_of(&p->v.view, w, w->head, run->dims.heads_k);
    v.score = run->score;
    v.k_perm_in = from(p->k_perm_in, perm * run->d->max_k);
    v.permute_heads = is_natural(p->mode) ? NULL : from(p->permute_heads, first_p(run, w));
    v.geometry = run->dims.geometry;
    v.block_size = p->block_size;
    v.segment_size = p->segment_size;
    v.gqa = p->gqa;
    v.mode = p->mode;
    v.k_perm = run->k_perm;
    v.q_perm = pbs_permutes_queries(p->mode) ? run->q_perm : NULL;
    v.k_pool = run->k_pool;
    v.packed = run->packed;
    v.packed_bytes = run->packed_bytes;
    v.correction = p->correction;
    v.exec = p->exec;
    v.workspace = run->verbs;
    return v;
}

static pbs_select_params select_params(const prefill_run *run, const wave *w) {
    const pbs_prefill_params *p = run->p;
    pbs_select_params v = PBS_INIT(pbs_select_params);
    v.q = part_of(&p->q, w, first_q(run, w), run->dims.heads_q);
    v.k.view = part_of(&p->k.view, w, w->head, run->dims.heads_k);
    v.k_pool = run->k_pool;
    v.k_perm = run->k_perm;
    v.q_perm = pbs_permutes_queries(p->mode) ? run->q_perm : NULL;
    v.tau_heads = p->tau_heads ? p->tau_heads + first_q(run, w) : NULL;
    v.geometry = run->dims.geometry;
    v.softmax_scale = p->softmax_scale;
    v.block_size = p->block_size;
    v.segment_size = p->segment_size;
    v.gqa = p->gqa;
    v.mode = p->mode;
    v.method = p->method;
    v.stride = p->stride;
    v.reduce = p->reduce;
    v.normalize = p->normalize;
    v.rule = p->rule;
    v.tau = p->tau;
    v.bits = run->bits;
    v.count = run->count;
    v.exec = p->exec;
    v.workspace = run->verbs;
    return v;
}

static pbs_attend_params attend_params(const prefill_run *run, const wave *w) {
    const pbs_prefill_params *p = run->p;
    pbs_attend_params v = PBS_INIT(pbs_attend_params);
    v.q = part_of(&p->q, w, first_q(run, w), run->dims.heads_q);
    v.k.view = part_of(&p->k.view, w, w->head, run->dims.heads_k);
    v.v.view = part_of(&p->v.view, w, w->head, run->dims.heads_k);
    v.packed = run->packed;
    v.packed_bytes = run->packed_bytes;
    v.bits = run->bits;
    v.q_perm = pbs_permutes_queries(p->mode) ? run->q_perm : NULL;
    v.geometry = run->dims.geometry;
    v.softmax_scale = p->softmax_scale;
    v.block_q = p->block_size;
    v.block_k = p->block_size;
    v.segment_size = p->segment_size;
    v.heads_sel = run->dims.heads_q;
    v.gqa = p->gqa;
    v.own = pbs_own_of_mode(p->mode);
    v.out = part_of(&p->out, w, first_q(run, w), run->dims.heads_q);
    if (p->lse.data) v.lse = part_of(&p->lse, w, first_q(run, w), run->dims.heads_q);
    v.counters = p->counters;
    v.correction = p->correction;
    v.exec = p->exec;
    v.workspace = run->verbs;
    return v;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

/* packed is set to a mark while sizing: attend must not count room to pack for itself. */
static size_t verbs_bytes(prefill_run *run, const wave *w) {
    pbs_score_params score = score_params(run, w);
    pbs_permute_params permute = permute_params(run, w);
    pbs_select_params select = select_params(run, w);
    pbs_attend_params attend = attend_params(run, w);
    attend.packed = run;
    const pbs_backend *be = run->backend;
    size_t bytes = be->permute_bytes(&permute, &run->dims, run->k);
    if (needs_score(run->p)) bytes = larger(bytes, be->score_bytes(&score, &run->dims, run->k));
    bytes = larger(bytes, be->select_bytes(&select, &run->dims, run->k));
    return larger(bytes, be->attend_bytes(&attend, &run->dims, run->k));
}

static size_t cut(prefill_run *run, const wave *w, void *workspace) {
    pbs_arena arena = pbs_arena_at(workspace);
    run->dims = dims_of(run, w);
    const pbs_dims *d = &run->dims;
    int64_t p_heads = (int64_t)d->batch * d->heads_p, q_heads = (int64_t)d->batch * d->heads_q;
    if (needs_score(run->p))
        run->score = (float *)pbs_arena_take(&arena, p_heads, d->max_k, sizeof(float));
    run->k_perm = (int32_t *)pbs_arena_take(&arena, p_heads, d->max_k, sizeof(int32_t));
    if (pbs_permutes_queries(run->p->mode))
        run->q_perm = (int32_t *)pbs_arena_take(&arena, q_heads, d->max_q, sizeof(int32_t));
    run->k_pool =
        (float *)pbs_arena_take(&arena, p_heads * d->blocks_k, d->head_dim, sizeof(float));
    run->count = (int32_t *)pbs_arena_take(&arena, q_heads, d->blocks_q, sizeof(int32_t));
    run->bits =
        (uint32_t *)pbs_arena_take(&arena, q_heads * d->blocks_q, d->words, sizeof(uint32_t));
    run->packed_bytes = run->backend->packed_bytes(d, run->p->mode, run->p->correction, run->k);
    run->packed = pbs_arena_take(&arena, 1, 1, run->packed_bytes);
    run->verbs_bytes = verbs_bytes(run, w);
    run->verbs = pbs_arena_take(&arena, 1, 1, run->verbs_bytes);
    return pbs_arena_bytes(&arena);
}

/* One step larger: query heads, then K/V heads, then sequences. 0: there is nothing larger. */
static int grow(const pbs_dims *d, wave *w) {
    if (w->queries < d->group)
        w->queries++;
    else if (w->heads < d->heads_k)
        w->heads++;
    else if (w->batches < d->batch)
        w->batches++;
    else
        return 0;
    return 1;
}

/* The largest wave under the cap; the smallest one is always allowed: a query head of one sequence,
 * or a K/V head where its query heads share their permutation. */
static wave largest_wave(prefill_run *run, size_t *bytes) {
    const pbs_dims *d = run->d;
    size_t cap = run->p->workspace_cap;
    if (!cap) cap = run->backend->wave_cap(&run->p->exec);
    wave best = {0, 1, 0, 1, 0, is_per_head(run) ? 1 : d->group}, next = best;
    *bytes = cut(run, &best, NULL);
    while (grow(d, &next)) {
        size_t needed = cut(run, &next, NULL);
        if (needed > cap) break;
        best = next;
        *bytes = needed;
    }
    return best;
}

static int nothing_to_do(const pbs_dims *d) { return d->batch == 0 || d->heads_k == 0; }

size_t pbs_prefill_bytes(const pbs_prefill_params *p, const pbs_dims *d, const void *kernels) {
    prefill_run run = {.p = p, .d = d, .backend = d->backend, .k = kernels};
    size_t bytes;
    if (nothing_to_do(d)) return 0;
    largest_wave(&run, &bytes);
    return bytes;
}

/* Plan outputs that the caller wants are written in place: a wave is contiguous in them. */
static void use_caller_outputs(prefill_run *run, const wave *w) {
    const pbs_prefill_params *p = run->p;
    const pbs_dims *d = run->d;
    int64_t q_head = (int64_t)w->batch * d->heads_q + first_q(run, w);
    int64_t p_head = (int64_t)w->batch * d->heads_p + first_p(run, w);
    if (p->count) run->count = p->count + q_head * d->blocks_q;
    if (p->bits) run->bits = p->bits + q_head * d->blocks_q * d->words;
    if (p->k_perm && !is_natural(p->mode)) run->k_perm = p->k_perm + p_head * d->max_k;
    if (p->q_perm && pbs_permutes_queries(p->mode)) run->q_perm = p->q_perm + q_head * d->max_q;
}

static pbs_status one_by_one(const pbs_verbs *v, const pbs_dims *d, const prefill_run *run) {
    if (v->score) PBS_TRY(run->backend->score(v->score, d, run->k, v->first_head));
    PBS_TRY(run->backend->permute(v->permute, d, run->k));
    PBS_TRY(run->backend->select(v->select, d, run->k));
    return run->backend->attend(v->attend, d, run->k);
}

static pbs_status run_wave(prefill_run *run, const wave *w) {
    const pbs_score_params score = score_params(run, w);
    const pbs_permute_params permute = permute_params(run, w);
    const pbs_select_params select = select_params(run, w);
    const pbs_attend_params attend = attend_params(run, w);
    const pbs_verbs verbs = {
        .score = needs_score(run->p) ? &score : NULL,
        .first_head = first_p(run, w),
        .permute = &permute,
        .select = &select,
        .attend = &attend,
    };
    if (run->backend->wave) return run->backend->wave(&verbs, &run->dims, run->k);
    return one_by_one(&verbs, &run->dims, run);
}

/* Orders that the caller wants to see, where the mode leaves them natural. */
static pbs_status fill_natural_orders(const prefill_run *run) {
    const pbs_prefill_params *p = run->p;
    const pbs_dims *d = run->d;
    if (p->k_perm && is_natural(p->mode))
        PBS_TRY(run->backend->fill_identity(&p->exec, p->k_perm, (int64_t)d->batch * d->heads_p,
                                            d->max_k));
    if (p->q_perm && !pbs_permutes_queries(p->mode))
        PBS_TRY(run->backend->fill_identity(&p->exec, p->q_perm, (int64_t)d->batch * d->heads_q,
                                            d->max_q));
    return PBS_OK;
}

pbs_status pbs_prefill_run(const pbs_prefill_params *p, const pbs_dims *d, const void *kernels) {
    prefill_run run = {.p = p, .d = d, .backend = d->backend, .k = kernels};
    size_t bytes;
    if (nothing_to_do(d)) return PBS_OK;
    PBS_TRY(fill_natural_orders(&run));
    wave w = largest_wave(&run, &bytes), step = w;
    for (w.batch = 0; w.batch < d->batch; w.batch += step.batches) {
        w.batches = pbs_min_i32(step.batches, d->batch - w.batch);
        for (w.head = 0; w.head < d->heads_k; w.head += step.heads) {
            w.heads = pbs_min_i32(step.heads, d->heads_k - w.head);
            for (w.query = 0; w.query < d->group; w.query += step.queries) {
                w.queries = pbs_min_i32(step.queries, d->group - w.query);
                cut(&run, &w, p->workspace);
                use_caller_outputs(&run, &w);
                PBS_TRY(run_wave(&run, &w));
            }
        }
    }
    return PBS_OK;
}
