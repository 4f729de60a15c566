/* SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE /* pthread_barrier_t */
#include "harness.h"

#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cpu/convert.h"

const char *test_name = "";
atomic_int test_checks, test_failures;

void check_that(int good, const char *file, int line, const char *format, ...) {
    test_checks++;
    if (good) return;
    if (++test_failures > 20) return; /* the first ones say enough */
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s:%d: %s: ", file, line, test_name);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
}

uint32_t rng_next(rng *r) {
    r->state = r->state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    uint64_t x = r->state;
    return (uint32_t)((x ^ x >> 29) >> 16);
}

float rng_uniform(rng *r, float low, float high) {
    return low + (high - low) * (float)(rng_next(r) >> 8) * 0x1p-24f;
}

int32_t rng_below(rng *r, int32_t end) { return (int32_t)(rng_next(r) % (uint32_t)end); }

typedef struct range {
    int64_t begin, end;
    pbs_task_fn task;
    void *arg;
    pthread_barrier_t *start;
} range;

static void *run_range(void *arg) {
    range *r = (range *)arg;
    pthread_barrier_wait(r->start); /* all at once: the work is small */
    r->task(r->begin, r->end, r->arg);
    return NULL;
}

void pool_parallel_for(void *pool, int64_t begin, int64_t end, pbs_task_fn task, void *arg) {
    enum { MOST = 16 };
    int threads = *(int *)pool;
    pthread_t id[MOST];
    range part[MOST];
    int64_t step = (end - begin + threads - 1) / threads;
    int count = 0;
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, (unsigned)((end - begin + step - 1) / step));
    for (int64_t at = begin; at < end; at += step, count++) {
        part[count] = (range){at, at + step < end ? at + step : end, task, arg, &start};
        if (pthread_create(&id[count], NULL, run_range, &part[count])) abort();
    }
    for (int i = 0; i < count; i++) pthread_join(id[i], NULL);
    pthread_barrier_destroy(&start);
}

void reverse_parallel_for(void *pool, int64_t begin, int64_t end, pbs_task_fn task, void *arg) {
    (void)pool;
    int64_t middle = begin + (end - begin) / 2;
    task(middle, end, arg);
    task(begin, middle, arg);
}

static void put(const pbs_view *v, int64_t at, float x) {
    char *to = (char *)v->data + at * (int64_t)pbs_dtype_size(v->dtype);
    pbs_store(to, v->dtype, 1, &x);
}

static int64_t offset(const pbs_view *v, int32_t b, int32_t h, int64_t row, int32_t d) {
    return b * v->stride[0] + h * v->stride[1] + row * v->stride[2] + d;
}

double element(const pbs_view *v, int32_t b, int32_t h, int64_t row, int32_t d) {
    float x;
    const char *from =
        (const char *)v->data + offset(v, b, h, row, d) * (int64_t)pbs_dtype_size(v->dtype);
    pbs_load(from, v->dtype, 1, &x);
    return (double)x;
}

void set_element(const pbs_view *v, int32_t b, int32_t h, int64_t row, int32_t d, double x) {
    put(v, offset(v, b, h, row, d), (float)x);
}

static void set_strides(pbs_view *v, layout how) {
    int64_t h = v->size[1], n = v->size[2], d = v->size[3];
    int64_t gap = how == LAYOUT_GAPS ? 8 : 0;
    v->stride[3] = 1;
    if (how == LAYOUT_BNHD) {
        v->stride[1] = d;
        v->stride[2] = h * d;
        v->stride[0] = n * h * d;
    } else {
        v->stride[2] = d + gap;
        v->stride[1] = n * v->stride[2] + 3 * gap;
        v->stride[0] = h * v->stride[1];
    }
}

size_t view_bytes(const pbs_view *v) {
    int64_t last = 0;
    for (int i = 0; i < 4; i++) {
        if (v->size[i] == 0) return 0;
        last += (v->size[i] - 1) * v->stride[i];
    }
    return (size_t)(last + 1) * pbs_dtype_size(v->dtype);
}

static pbs_view new_view(const problem *p, int32_t heads, int32_t rows, int32_t dim,
                         pbs_dtype dtype) {
    pbs_view v = {NULL, dtype, {p->batch, heads, rows, dim}, {0}};
    set_strides(&v, p->layout);
    v.data = filled(view_bytes(&v), 0xff); /* NaN in every dtype */
    return v;
}

static void fill_sequences(const pbs_view *v, const int32_t *start, const int32_t *len, rng *r,
                           float size) {
    for (int32_t b = 0; b < v->size[0]; b++)
        for (int32_t h = 0; h < v->size[1]; h++)
            for (int32_t i = 0; i < len[b]; i++)
                for (int32_t d = 0; d < v->size[3]; d++)
                    put(v, offset(v, b, h, start[b] + i, d), rng_uniform(r, -size, size));
}

void problem_make(problem *p, uint64_t seed) {
    rng r = {seed * 2 + 1};
    for (int b = 0; b < p->batch && !p->has_geometry; b++) {
        p->q_start[b] = p->kv_start[b] = 0;
        p->q_len[b] = p->seqlen_q;
        p->kv_len[b] = p->seqlen_k;
    }
    memset(&p->geometry, 0, sizeof p->geometry);
    if (p->has_geometry)
        p->geometry = (pbs_geometry){p->q_start, p->q_len, p->kv_start, p->kv_len, 0, 0};
    if (p->scale == 0.0f) p->scale = 1.0f / sqrtf((float)p->head_dim);
    p->q = new_view(p, p->heads_q, p->seqlen_q, p->head_dim, p->dtype);
    p->out = new_view(p, p->heads_q, p->seqlen_q, p->head_dim, p->dtype);
    p->lse = new_view(p, p->heads_q, p->seqlen_q, 1, PBS_DTYPE_FP32);
    p->k = (pbs_kv){.view = new_view(p, p->heads_k, p->seqlen_k, p->head_dim, p->dtype)};
    p->v = (pbs_kv){.view = new_view(p, p->heads_k, p->seqlen_k, p->head_dim, p->dtype)};
    p->out_bytes = view_bytes(&p->out);
    fill_sequences(&p->q, p->q_start, p->q_len, &r, 3.0f);
    fill_sequences(&p->k.view, p->kv_start, p->kv_len, &r, 2.0f);
    fill_sequences(&p->v.view, p->kv_start, p->kv_len, &r, 1.0f);
}

void problem_free(problem *p) {
    drop(p->q.data);
    drop(p->out.data);
    drop(p->lse.data);
    drop(p->k.view.data);
    drop(p->v.view.data);
}

int32_t problem_heads_p(const problem *p) {
    return p->gqa == PBS_GQA_GROUP ? p->heads_k : p->heads_q;
}
static int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
int32_t problem_blocks_q(const problem *p) { return ceil_div(p->seqlen_q, p->block); }
int32_t problem_blocks_k(const problem *p) { return ceil_div(p->seqlen_k, p->block); }
int32_t problem_words(const problem *p) { return ceil_div(problem_blocks_k(p), 32); }

int available_isas(pbs_dtype dtype, pbs_isa isas[PBS_ISA_COUNT]) {
    int count = 0;
    for (int isa = PBS_ISA_C; isa < PBS_ISA_COUNT; isa++)
        if (pbs_isa_available((pbs_isa)isa) && pbs_isa_for((pbs_isa)isa, dtype) == (pbs_isa)isa)
            isas[count++] = (pbs_isa)isa;
    return count;
}

pbs_dtype widest_dtype(void) {
    pbs_isa isas[PBS_ISA_COUNT];
    return available_isas(PBS_DTYPE_FP32, isas) ? PBS_DTYPE_FP32 : PBS_DTYPE_BF16;
}

int is_emulated(pbs_isa isa) { return strncmp(pbs_isa_name(isa), "emu_", 4) == 0; }

size_t grid_step(pbs_isa isa) { return is_emulated(isa) ? 3 * PBS_TEST_THIN : PBS_TEST_THIN; }

size_t grid_first(pbs_isa isa) { return (size_t)isa % grid_step(isa); }

static int wanted(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], name) == 0) return 1;
    return argc == 1;
}

void run_tests(const test_case *tests, size_t count, int argc, char **argv) {
    for (size_t i = 0; i < count; i++) {
        if (!wanted(tests[i].name, argc, argv)) continue;
        int checks = test_checks, failures = test_failures;
        clock_t start = clock();
        test_name = tests[i].name;
        tests[i].run();
        printf("%-8s %7d checks %3d failed %6.2f s\n", test_name, test_checks - checks,
               test_failures - failures, (double)(clock() - start) / CLOCKS_PER_SEC);
        fflush(stdout);
    }
}
