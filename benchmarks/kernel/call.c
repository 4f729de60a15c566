/* SPDX-License-Identifier: Apache-2.0
 *
 * A prefill as pbs_prefill does it, a K/V head at a time in the same memory, with the time of every
 * verb and attend's counters; attend may get other bits than those that select chose, with all the
 * steps before it really run.
 */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "bench.h"
#include "core/status.h"
#include "core/view.h"

struct bench_steps {
    bench_call call;
    int32_t group, blocks, words;
    pbs_score_params score;
    pbs_permute_params permute;
    pbs_select_params select;
    pbs_attend_params attend;
    void *memory[7];
};

typedef int (*torch_parallel_for)(int64_t begin, int64_t end, int64_t grain, pbs_task_fn task,
                                  void *arg);

static void in_torch(void *pool, int64_t begin, int64_t end, pbs_task_fn task, void *arg) {
    union {
        void *address;
        torch_parallel_for function;
    } torch = {.address = pool};
    torch.function(begin, end, 1, task, arg);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static pbs_view view_of(const bench_call *c, const void *data, int32_t heads) {
    const int64_t row = c->head_dim, head = row * c->seqlen;
    return (pbs_view){(void *)(uintptr_t)data,
                      (pbs_dtype)c->dtype,
                      {1, heads, c->seqlen, c->head_dim},
                      {heads * head, head, row, 1}};
}

static const void *head_at(const bench_call *c, const void *data, int32_t head) {
    return (const char *)data + (size_t)head * (size_t)c->seqlen * (size_t)c->head_dim *
                                    pbs_dtype_size((pbs_dtype)c->dtype);
}

static void *take(bench_steps *s, int which, size_t bytes) {
    return s->memory[which] = bench_memory(bytes ? bytes : 1);
}

static int permutes(const bench_call *c) { return c->mode == PBS_PERMUTE_KEYS; }

static void fill_plan(bench_steps *s) {
    const bench_call *c = &s->call;
    const size_t keys = (size_t)s->group * (size_t)c->seqlen;
    const size_t rows = (size_t)s->group * (size_t)s->blocks;
    const pbs_exec exec = {.parallel_for = c->parallel_for ? in_torch : NULL,
                           .pool = c->parallel_for,
                           .num_threads = c->threads,
                           .isa = (pbs_isa)c->isa};
    s->score = PBS_INIT(pbs_score_params);
    s->score.q = view_of(c, c->q, s->group);
    s->score.k.view = view_of(c, c->k, 1);
    s->score.block_size = c->block_size;
    s->score.segment_size = c->segment_size;
    s->score.score = (float *)take(s, 0, keys * sizeof(float));
    s->score.exec = exec;

    s->permute = PBS_INIT(pbs_permute_params);
    s->permute.q = s->score.q;
    s->permute.k = s->permute.v = s->score.k;
    if (permutes(c)) s->permute.score = s->score.score;
    s->permute.block_size = c->block_size;
    s->permute.segment_size = c->segment_size;
    s->permute.mode = (pbs_permute_mode)c->mode;
    s->permute.correction = (pbs_correction)c->correction;
    s->permute.k_perm = (int32_t *)take(s, 1, keys * sizeof(int32_t));
    s->permute.k_pool = (float *)take(s, 2, rows * (size_t)c->head_dim * sizeof(float));
    s->permute.exec = exec;

    s->select = PBS_INIT(pbs_select_params);
    s->select.q = s->score.q;
    s->select.k = s->score.k;
    s->select.k_pool = s->permute.k_pool;
    s->select.k_perm = s->permute.k_perm;
    s->select.block_size = c->block_size;
    s->select.segment_size = c->segment_size;
    s->select.mode = (pbs_permute_mode)c->mode;
    s->select.method = (pbs_select_method)c->method;
    s->select.stride = c->stride;
    s->select.reduce = (pbs_reduce)c->reduce;
    s->select.rule = (pbs_rule)c->rule;
    s->select.normalize = (pbs_normalize)c->normalize;
    s->select.tau = c->tau;
    s->select.bits = (uint32_t *)take(s, 3, rows * (size_t)s->words * sizeof(uint32_t));
    s->select.count = (int32_t *)take(s, 4, rows * sizeof(int32_t));
    s->select.exec = exec;

    s->attend = PBS_INIT(pbs_attend_params);
    s->attend.q = s->score.q;
    s->attend.k = s->attend.v = s->score.k;
    s->attend.block_q = s->attend.block_k = c->block_size;
    s->attend.segment_size = c->segment_size;
    s->attend.own = c->mode == PBS_PERMUTE_NONE ? PBS_OWN_BLOCK : PBS_OWN_SEGMENT;
    s->attend.correction = (pbs_correction)c->correction;
    s->attend.out = view_of(c, c->out, s->group);
    s->attend.exec = exec;
}

/* Packed K/V, and one workspace for whichever verb runs. */
static pbs_status fill_workspace(bench_steps *s) {
    size_t bytes[4], most = 0;
    PBS_TRY(pbs_kv_packed_bytes(&s->permute, &s->permute.packed_bytes));
    s->permute.packed = take(s, 5, s->permute.packed_bytes);
    s->attend.packed = s->permute.packed;
    s->attend.packed_bytes = s->permute.packed_bytes;
    PBS_TRY(pbs_score_workspace_size(&s->score, &bytes[0]));
    PBS_TRY(pbs_permute_workspace_size(&s->permute, &bytes[1]));
    PBS_TRY(pbs_select_workspace_size(&s->select, &bytes[2]));
    PBS_TRY(pbs_attend_workspace_size(&s->attend, &bytes[3]));
    for (int i = 0; i < 4; i++) most = bytes[i] > most ? bytes[i] : most;
    void *workspace = take(s, 6, most);
    s->score.workspace = s->permute.workspace = workspace;
    s->select.workspace = s->attend.workspace = workspace;
    s->score.workspace_bytes = s->permute.workspace_bytes = most;
    s->select.workspace_bytes = s->attend.workspace_bytes = most;
    for (int i = 0; i < 7; i++)
        if (!s->memory[i]) return pbs_fail(PBS_ERR_WORKSPACE, "no memory");
    return PBS_OK;
}

bench_steps *bench_steps_new(const bench_call *call) {
    bench_steps *s = (bench_steps *)calloc(1, sizeof *s);
    if (!s) return NULL;
    s->call = *call;
    s->group = call->heads / call->heads_k;
    s->blocks = (call->seqlen + call->block_size - 1) / call->block_size;
    s->words = (s->blocks + 31) / 32;
    fill_plan(s);
    if (fill_workspace(s) == PBS_OK) return s;
    bench_steps_free(s);
    return NULL;
}

/* The wave of K/V head hk. */
static void move_to(bench_steps *s, int32_t hk, const uint32_t *bits) {
    const bench_call *c = &s->call;
    const int32_t hq = hk * s->group;
    s->score.q = view_of(c, head_at(c, c->q, hq), s->group);
    s->score.k.view = view_of(c, head_at(c, c->k, hk), 1);
    s->permute.k = s->select.k = s->attend.k = s->score.k;
    s->permute.q = s->select.q = s->attend.q = s->score.q;
    s->permute.v.view = s->attend.v.view = view_of(c, head_at(c, c->v, hk), 1);
    s->attend.out = view_of(c, head_at(c, c->out, hq), s->group);
    s->attend.bits =
        bits ? bits + (int64_t)hq * s->blocks * s->words : (const uint32_t *)s->select.bits;
}

pbs_status bench_steps_run(bench_steps *s, const uint32_t *bits, double *seconds,
                           pbs_work_counters *counters) {
    for (int i = 0; i < BENCH_STEPS; i++) seconds[i] = 0;
    s->attend.counters = counters;
    for (int32_t hk = 0; hk < s->call.heads_k; hk++) {
        double at[BENCH_STEPS + 1];
        move_to(s, hk, bits);
        at[BENCH_SCORE] = now();
        if (permutes(&s->call)) PBS_TRY(pbs_score(&s->score));
        at[BENCH_ORDER] = now();
        PBS_TRY(pbs_permute(&s->permute));
        at[BENCH_SELECT] = now();
        PBS_TRY(pbs_select(&s->select));
        at[BENCH_ATTEND] = now();
        PBS_TRY(pbs_attend(&s->attend));
        at[BENCH_STEPS] = now();
        for (int i = 0; i < BENCH_STEPS; i++) seconds[i] += at[i + 1] - at[i];
    }
    return PBS_OK;
}

double bench_score_run(bench_steps *s, int32_t repeat) {
    const double begin = now();
    for (int32_t i = 0; i < repeat; i++)
        if (pbs_score(&s->score)) return -1;
    return now() - begin;
}

/* permute without packed K/V, means and values: the order alone. */
double bench_sort_run(bench_steps *s, int32_t repeat) {
    pbs_permute_params sort = s->permute;
    sort.packed = NULL;
    sort.k_pool = NULL;
    const double begin = now();
    for (int32_t i = 0; i < repeat; i++)
        if (pbs_permute(&sort)) return -1;
    return now() - begin;
}

void bench_steps_free(bench_steps *s) {
    if (!s) return;
    for (int i = 0; i < 7; i++) free(s->memory[i]);
    free(s);
}
