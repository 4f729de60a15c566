/* SPDX-License-Identifier: Apache-2.0
 *
 * What the C tests share: failures that say where, random problems of any geometry with NaN
 * wherever no sequence lies, a small pthread pool, and an fp64 brute force that restates the
 * mathematics without the library's headers of formulas.
 */
#ifndef PBS_TEST_HARNESS_H
#define PBS_TEST_HARNESS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "pbs/pbs.h"

extern const char *test_name; /* printed with every failure */
extern atomic_int test_checks, test_failures;

void check_that(int good, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
#define CHECK(condition, ...) check_that((condition) != 0, __FILE__, __LINE__, __VA_ARGS__)
/* status must be PBS_OK. */
#define RUN(call)                                                                       \
    do {                                                                                \
        pbs_status run_status_ = (call);                                                \
        CHECK(run_status_ == PBS_OK, "%s: %s: %s", #call, pbs_status_name(run_status_), \
              pbs_last_error());                                                        \
    } while (0)

/* ---- random numbers -------------------------------------------------------------------------- */
typedef struct rng {
    uint64_t state;
} rng;
uint32_t rng_next(rng *r);
float rng_uniform(rng *r, float low, float high);
int32_t rng_below(rng *r, int32_t end);

/* ---- threads --------------------------------------------------------------------------------- */
/* pool: int * with the number of threads. Ranges are cut in a different way for every count. */
void pool_parallel_for(void *pool, int64_t begin, int64_t end, pbs_task_fn task, void *arg);
/* One call with everything, from the last slot down in reverse: what a busy pool may do. */
void reverse_parallel_for(void *pool, int64_t begin, int64_t end, pbs_task_fn task, void *arg);

/* ---- problems -------------------------------------------------------------------------------- */
enum { MAX_BATCH = 4 };

typedef enum layout { LAYOUT_BHND, LAYOUT_BNHD, LAYOUT_GAPS } layout;

typedef struct problem {
    int32_t batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim;
    int32_t block, segment;
    pbs_dtype dtype;
    layout layout;
    pbs_gqa gqa;
    pbs_isa isa;
    float scale;
    int has_geometry;
    int32_t q_start[MAX_BATCH], q_len[MAX_BATCH], kv_start[MAX_BATCH], kv_len[MAX_BATCH];
    /* made by problem_make */
    pbs_geometry geometry;
    pbs_view q, out, lse;
    pbs_kv k, v;
    size_t out_bytes;
} problem;

/* Fills the geometry with whole tensors unless has_geometry; NaN outside the sequences. */
void problem_make(problem *p, uint64_t seed);
void problem_free(problem *p);
int32_t problem_heads_p(const problem *p);
int32_t problem_blocks_q(const problem *p);
int32_t problem_blocks_k(const problem *p);
int32_t problem_words(const problem *p);

/* ---- memory ---------------------------------------------------------------------------------- */
/* Where filled() puts memory, for as long as this is set: on the heap, or between two pages that
 * nobody may touch, right behind the first one or right before the second. */
typedef enum guard { GUARD_NONE, GUARD_BEFORE, GUARD_AFTER } guard;
extern guard test_guard;
/* size bytes of byte, exactly, so that a sanitizer sees the first byte too many. For free(); for
 * drop() where a guard may be set. */
void *filled(size_t bytes, int byte);
void drop(void *memory);
/* Aligned to 64 bytes, which bytes is a multiple of. */
void *filled_lines(size_t bytes, int byte);
/* A workspace, of which the part that is used lies against the guard: the rest aligns pointers. */
void *filled_workspace(size_t bytes);
/* Runs it; a check fails, with these words, if it touches a page that it may not. */
void run_guarded(void (*run)(void *), void *arg, const char *what);

/* From the first element to the last. */
size_t view_bytes(const pbs_view *v);
double element(const pbs_view *v, int32_t b, int32_t h, int64_t row, int32_t d);
void set_element(const pbs_view *v, int32_t b, int32_t h, int64_t row, int32_t d, double x);
/* All ISAs that this build and CPU offer for dtype; returns how many. */
int available_isas(pbs_dtype dtype, pbs_isa isas[PBS_ISA_COUNT]);
/* fp32, or bf16 where no kernel takes it. */
pbs_dtype widest_dtype(void);
/* A grid is walked in steps: every point natively, every third one where the vector unit is
 * emulated (slow) or the sanitizers watch (PBS_TEST_THIN); first points differ by ISA. */
int is_emulated(pbs_isa isa);
#ifndef PBS_TEST_THIN
#define PBS_TEST_THIN 1
#endif
size_t grid_first(pbs_isa isa);
size_t grid_step(pbs_isa isa);

/* ---- brute force, fp64 ----------------------------------------------------------------------- */
/* score [Nk] of head hp; probe: the rows that are averaged over, relative to q_start. */
void brute_score(const problem *p, int32_t b, int32_t hp, const int32_t *probe, int32_t probe_rows,
                 int mean_first, double *score);
/* Order of one head by score: the definition, O(S^2) per segment. */
void brute_order(const problem *p, int32_t b, const float *score, int32_t *k_perm);
/* The rule PREFIX on one row. */
void brute_prefix(const double *mass, int32_t n, double tau, unsigned char *kept);
/* First own key of a query block; row_segment 0 or the segment size. */
int32_t brute_own_start(const problem *p, int32_t b, int32_t m, int32_t block_q, int32_t block_k,
                        int32_t row_segment, pbs_own own);

typedef struct brute_attend_args {
    const uint32_t *bits;  /* [B, heads_sel, Tq, W] */
    const int32_t *k_perm; /* [B, Hp, Nk] or NULL */
    const int32_t *q_perm; /* [B, Hq, Nq] or NULL */
    int32_t block_q, block_k, heads_sel;
    pbs_own own;
    pbs_correction correction;
} brute_attend_args;
/* out [D] and lse of one row (original index) of one head. */
void brute_attend_row(const problem *p, const brute_attend_args *args, int32_t b, int32_t hq,
                      int32_t row, double *out, double *lse);
/* p->out and p->lse at that row (relative to q_start) against the brute force, by one rule for all
 * shapes and data: relative to the length of the row. */
void check_attend_row(const problem *p, const brute_attend_args *args, int32_t b, int32_t hq,
                      int32_t row, const char *what);

/* ---- running ----------------------------------------------------------------------------------
 */
typedef struct test_case {
    const char *name;
    void (*run)(void);
} test_case;
/* All of them, or those that argv names; a line for each. */
void run_tests(const test_case *tests, size_t count, int argc, char **argv);

/* ---- the tests ------------------------------------------------------------------------------- */
void test_convert(void);
void test_vec(void);
void test_rule(void);
void test_score(void);
void test_permute(void);
void test_select(void);
void test_select_rows(void);
void test_attend(void);
void test_correction(void);
void test_counters(void);
void test_tiles(void);
void test_pipeline(void);
void test_prefill(void);
void test_errors(void);
void test_threads(void);
void test_numerics(void);
void test_guards(void);

#endif /* PBS_TEST_HARNESS_H */
