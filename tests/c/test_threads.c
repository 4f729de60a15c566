/* SPDX-License-Identifier: Apache-2.0
 *
 * Who runs the work, and in which floating-point state, changes no bit; and nobody's state is
 * changed.
 */
#include <stdlib.h>
#include <string.h>

#include "calls.h"

enum { REPEATS = 20 / PBS_TEST_THIN };

/* Emulated units are slow: one head, short sequences. */
static problem small_problem(pbs_isa isa) {
    problem p = three_sequences(isa, 180, 290);
    if (is_emulated(isa)) p.heads_q = p.heads_k = 1;
    return p;
}

static options options_of(size_t method) {
    options o = {.mode = PBS_PERMUTE_BOTH, .tau = 0.7f, .correction = PBS_CORRECTION_MEAN};
    o.method = (pbs_select_method)method;
    return o;
}

static void check_calls(const problem *p, options o, const result *expected, const char *what) {
    result whole = prefill(p, o), parts = verbs(p, o);
    check_same(expected, &whole, what);
    check_same(expected, &parts, what);
    drop_result(&whole);
    drop_result(&parts);
}

/* One call with everything: one thread drains it all. */
static void one_parallel_for(void *pool, int64_t begin, int64_t end, pbs_task_fn task, void *arg) {
    (void)pool;
    task(begin, end, arg);
}

/* A call per slot, last first: all but the first one find nothing left. */
static void late_parallel_for(void *pool, int64_t begin, int64_t end, pbs_task_fn task, void *arg) {
    (void)pool;
    for (int64_t slot = end - 1; slot >= begin; slot--) task(slot, slot + 1, arg);
}

static void test_counts(pbs_isa isa, size_t method) {
    static const int counts[] = {2, 3, 8, 1};
    problem p = small_problem(isa);
    problem_make(&p, 21);
    options o = options_of(method);
    result serial = verbs(&p, o);
    o.parallel_for = pool_parallel_for;
    for (size_t repeat = 0; repeat < REPEATS; repeat++)
        for (size_t t = 0; t < (repeat ? 3 : 4); t++) {
            o.threads = counts[t];
            result r = (repeat + t) % 2 ? prefill(&p, o) : verbs(&p, o);
            check_same(&serial, &r, "threads");
            drop_result(&r);
        }
    o.threads = 16; /* more than there are cores, or items here and there */
    check_calls(&p, o, &serial, "16 threads");
    o.parallel_for = reverse_parallel_for;
    check_calls(&p, o, &serial, "two calls with many slots each, last first");
    o.parallel_for = one_parallel_for;
    check_calls(&p, o, &serial, "one call with all slots");
    o.parallel_for = late_parallel_for;
    check_calls(&p, o, &serial, "a call per slot, one after another");
    drop_result(&serial);
    problem_free(&p);
}

/* ---- several calls at once ------------------------------------------------------------------- */
enum { CALLERS = 4 };

typedef struct callers {
    const problem *p;
    options o;
    result r[CALLERS];
} callers;

static void call_task(int64_t begin, int64_t end, void *arg) {
    callers *all = (callers *)arg;
    for (int64_t i = begin; i < end; i++)
        all->r[i] = i % 2 ? prefill(all->p, all->o) : verbs(all->p, all->o);
}

static void test_callers(pbs_isa isa) {
    problem p = small_problem(isa);
    problem_make(&p, 22);
    callers all = {.p = &p, .o = options_of(0)};
    result serial = verbs(&p, all.o);
    int threads = CALLERS;
    all.o.parallel_for = pool_parallel_for; /* inside the tasks of another one */
    all.o.threads = 2;
    pool_parallel_for(&threads, 0, CALLERS, call_task, &all);
    for (int i = 0; i < CALLERS; i++) {
        check_same(&serial, &all.r[i], "several calls at once, each with threads");
        drop_result(&all.r[i]);
    }
    drop_result(&serial);
    problem_free(&p);
}

/* ---- floating-point state -------------------------------------------------------------------- */
#if defined(__x86_64__)

#include <xmmintrin.h>

static const unsigned STATES[] = {
    0x3f80,        0x5f80, 0x7f80, /* rounding down, up, towards zero */
    0x9fc0,                        /* FTZ and DAZ */
    0x1f80 | 0x3f,                 /* all flags are up */
    0x1000,                        /* every exception but "inexact" is a signal */
};
enum { NUM_STATES = sizeof STATES / sizeof *STATES, CONTROL = 0xffc0 };

typedef struct stateful {
    pbs_task_fn task;
    void *arg;
} stateful;

static atomic_int next_state, changed_states;

/* Every task in another state. */
static void stateful_task(int64_t begin, int64_t end, void *arg) {
    const stateful *s = (const stateful *)arg;
    unsigned before = _mm_getcsr(), mine = STATES[next_state++ % NUM_STATES];
    _mm_setcsr(mine);
    s->task(begin, end, s->arg);
    changed_states += _mm_getcsr() != mine;
    _mm_setcsr(before);
}

static void stateful_parallel_for(void *pool, int64_t begin, int64_t end, pbs_task_fn task,
                                  void *arg) {
    stateful s = {task, arg};
    pool_parallel_for(pool, begin, end, stateful_task, &s);
}

static void check_state(const problem *p, options o, const result *expected, unsigned state) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(state);
    result r = state & 0x2000 ? prefill(p, o) : verbs(p, o);
    unsigned after = _mm_getcsr(); /* checks of arguments may raise the flag "inexact" */
    _mm_setcsr(before);
    CHECK((after & CONTROL) == (state & CONTROL), "%s: MXCSR %x of the caller became %x",
          pbs_isa_name(p->isa), state, after);
    check_same(expected, &r, "another state of the caller");
    drop_result(&r);
}

/* head_dim 24: 24^-0.5, the default scale, has to be rounded too. */
static void test_states(pbs_isa isa, pbs_dtype dtype, size_t method) {
    problem p = small_problem(isa);
    p.dtype = dtype;
    p.head_dim = 24;
    problem_make(&p, 23);
    p.scale = 0.0f;
    options o = options_of(method);
    _mm_setcsr(0x1f80);
    result serial = verbs(&p, o);
    for (size_t i = 0; i < NUM_STATES; i++) check_state(&p, o, &serial, STATES[i]);
    o.parallel_for = stateful_parallel_for;
    o.threads = 3;
    changed_states = 0;
    for (int i = 0; i < 2; i++) check_calls(&p, o, &serial, "other states of the threads");
    CHECK(changed_states == 0, "%s: MXCSR of %d tasks changed", pbs_isa_name(isa), changed_states);
    drop_result(&serial);
    problem_free(&p);
}

/* Denormals count as zeros on every path, threads or not, whatever the caller thinks of them. */
static void test_denormals(pbs_isa isa) {
    problem p = small_problem(isa);
    p.dtype = PBS_DTYPE_FP32;
    problem_make(&p, 24);
    float *v = (float *)p.v.view.data;
    for (size_t i = 0; i < view_bytes(&p.v.view) / sizeof *v; i++) v[i] *= 0x1p-130f;
    result r = prefill(&p, options_of(0));
    const float *out = (const float *)r.part[OUT];
    int nonzero = 0;
    for (size_t i = 0; i < r.bytes[OUT] / sizeof *out; i++)
        nonzero += out[i] != 0.0f && out[i] == out[i];
    CHECK(nonzero == 0, "%s: %d elements of out are not 0", pbs_isa_name(isa), nonzero);
    drop_result(&r);
    problem_free(&p);
}

static void test_float_state(pbs_isa isa) {
    unsigned before = _mm_getcsr();
    for (int dtype = PBS_DTYPE_FP32; dtype <= PBS_DTYPE_BF16; dtype++)
        if ((dtype == PBS_DTYPE_BF16 || !is_emulated(isa)) &&
            pbs_isa_for(isa, (pbs_dtype)dtype) == isa)
            test_states(isa, (pbs_dtype)dtype, (size_t)dtype % 2);
    if (pbs_isa_for(isa, PBS_DTYPE_FP32) == isa) test_denormals(isa);
    _mm_setcsr(before);
}

#else

static void test_float_state(pbs_isa isa) { (void)isa; }

#endif

void test_threads(void) {
    pbs_isa isas[PBS_ISA_COUNT];
    int count = available_isas(PBS_DTYPE_BF16, isas);
    for (int i = 0; i < count; i++) {
        if (is_emulated(isas[i]) && PBS_TEST_THIN > 1) continue; /* threads meet in the drivers */
        for (size_t method = grid_first(isas[i]) % 2; method < 2; method += grid_step(isas[i]))
            test_counts(isas[i], method);
        test_callers(isas[i]);
        test_float_state(isas[i]);
    }
}
