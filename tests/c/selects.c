/* SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "selects.h"

void select_sequences(problem *p) {
    static const int32_t geometry[4][4] = {
        {3, 0, 9, 0}, {150, 0, 291, 290}, {0, 30, 2, 1}, {400, 300, 390, 170}};
    p->batch = 4;
    p->seqlen_q = 300;
    p->seqlen_k = 410;
    p->has_geometry = 1;
    for (int b = 0; b < 4; b++) {
        p->q_start[b] = geometry[0][b];
        p->q_len[b] = geometry[1][b];
        p->kv_start[b] = geometry[2][b];
        p->kv_len[b] = geometry[3][b];
    }
}

enum { MAX_BLOCKS = 80 };

setup select_setup(const problem *p, pbs_permute_mode mode, uint64_t seed) {
    size_t heads = (size_t)(p->batch * problem_heads_p(p)), N = (size_t)p->seqlen_k;
    size_t rows = (size_t)(p->batch * p->heads_q * problem_blocks_q(p));
    rng r = {seed};
    setup u;
    u.k_perm = (int32_t *)filled(heads * N * sizeof(int32_t), 0xff);
    u.q_perm =
        (int32_t *)filled((size_t)(p->batch * p->heads_q * p->seqlen_q) * sizeof(int32_t), 0xff);
    u.k_pool = (float *)filled(
        heads * (size_t)problem_blocks_k(p) * (size_t)p->head_dim * sizeof(float), 0xff);
    float *score = (float *)filled(heads * N * sizeof(float), 0);
    for (size_t i = 0; i < heads * N; i++) score[i] = rng_uniform(&r, 0.0f, 1.0f);
    pbs_permute_params t = PBS_INIT(pbs_permute_params);
    t.q = p->q;
    t.k = p->k;
    t.score = score;
    t.geometry = p->geometry;
    t.block_size = p->block;
    t.segment_size = p->segment;
    t.gqa = p->gqa;
    t.mode = mode;
    t.k_perm = u.k_perm;
    t.q_perm = u.q_perm;
    t.k_pool = u.k_pool;
    RUN(pbs_permute_workspace_size(&t, &t.workspace_bytes));
    t.workspace = filled(t.workspace_bytes, 0xff);
    RUN(pbs_permute(&t));
    free(t.workspace);
    free(score);
    u.s = PBS_INIT(pbs_select_params);
    u.s.q = p->q;
    u.s.k = p->k;
    u.s.k_pool = u.k_pool;
    u.s.k_perm = u.k_perm;
    u.s.q_perm = mode == PBS_PERMUTE_QUERIES || mode == PBS_PERMUTE_BOTH ? u.q_perm : NULL;
    u.s.geometry = p->geometry;
    u.s.softmax_scale = p->scale;
    u.s.block_size = p->block;
    u.s.segment_size = p->segment;
    u.s.gqa = p->gqa;
    u.s.mode = mode;
    u.s.stride = 8;
    u.s.tau = 0.8f;
    u.s.exec.isa = p->isa;
    u.s.bits = (uint32_t *)filled(rows * (size_t)problem_words(p) * sizeof(uint32_t), 0xff);
    u.s.count = (int32_t *)filled(rows * sizeof(int32_t), 0xff);
    u.s.mass = (float *)filled(rows * (size_t)problem_blocks_k(p) * sizeof(float), 0xff);
    return u;
}

void select_run(setup *u) {
    RUN(pbs_select_workspace_size(&u->s, &u->s.workspace_bytes));
    u->s.workspace = filled(u->s.workspace_bytes, 0xff);
    RUN(pbs_select(&u->s));
    free(u->s.workspace);
}

void select_drop(setup *u) {
    free(u->k_perm);
    free(u->q_perm);
    free(u->k_pool);
    free(u->s.bits);
    free(u->s.count);
    free(u->s.mass);
}

static double query(const view_of_row *w, int32_t row, int32_t d) {
    const problem *p = w->p;
    if (row >= p->q_len[w->b]) return 0.0;
    int64_t at = ((int64_t)w->b * p->heads_q + w->hq) * p->seqlen_q + row;
    int32_t from = w->s->q_perm ? w->s->q_perm[at] : row;
    return element(&p->q, w->b, w->hq, p->q_start[w->b] + from, d);
}

/* Softmax over a whole row? */
static int whole_row(const pbs_select_params *s) {
    return s->mode == PBS_PERMUTE_NONE || s->normalize == PBS_NORMALIZE_ROW;
}

/* History as the permutation has it, the own span as the caller has it. */
static double key(const view_of_row *w, int32_t j, int32_t d) {
    const problem *p = w->p;
    if (j >= p->kv_len[w->b]) return 0.0;
    int64_t at = ((int64_t)w->b * problem_heads_p(p) + w->hp) * p->seqlen_k + j;
    int32_t from = whole_row(w->s) && j >= w->history * p->block ? j : w->s->k_perm[at];
    return element(&p->k.view, w->b, w->hk, p->kv_start[w->b] + from, d);
}

static int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }

view_of_row select_look(const problem *p, const pbs_select_params *s, int32_t b, int32_t hq,
                        int32_t m) {
    int32_t group = p->heads_q / p->heads_k;
    view_of_row w = {.p = p, .s = s, .b = b, .hq = hq, .hk = hq / group, .m = m};
    w.hp = p->gqa == PBS_GQA_GROUP ? hq / group : hq;
    pbs_own own = s->mode == PBS_PERMUTE_NONE ? PBS_OWN_BLOCK : PBS_OWN_SEGMENT;
    int32_t last = min_of((m + 1) * p->block, p->q_len[b]) + p->kv_len[b] - p->q_len[b];
    if (m * p->block >= p->q_len[b]) return w;
    w.history =
        brute_own_start(p, b, m, p->block, p->block, s->q_perm ? p->segment : 0, own) / p->block;
    w.eligible = w.history;
    if (s->mode == PBS_PERMUTE_NONE) w.eligible = last > 0 ? (last + p->block - 1) / p->block : 0;
    return w;
}

static void softmax(double *x, int32_t n) {
    double max = -INFINITY, sum = 0.0;
    for (int32_t i = 0; i < n; i++) max = fmax(max, x[i]);
    for (int32_t i = 0; i < n; i++) sum += exp(x[i] - max);
    for (int32_t i = 0; i < n; i++) x[i] = exp(x[i] - max) / sum;
}

static void brute_mean_pool(const view_of_row *w, double *mass) {
    const problem *p = w->p;
    int32_t rows = min_of(p->block, p->q_len[w->b] - w->m * p->block);
    for (int32_t n = 0; n < w->eligible; n++) {
        int32_t keys = min_of(p->block, p->kv_len[w->b] - n * p->block);
        mass[n] = 0.0;
        for (int32_t d = 0; d < p->head_dim; d++) {
            double q = 0.0, k = 0.0;
            for (int32_t i = 0; i < rows; i++) q += query(w, w->m * p->block + i, d) / rows;
            for (int32_t j = 0; j < keys; j++) k += key(w, n * p->block + j, d) / keys;
            mass[n] += q * k * (double)p->scale;
        }
    }
    softmax(mass, w->eligible);
}

/* One group of queries against the groups of keys that it sees; adds to mass. */
static void brute_group(const view_of_row *w, int32_t first_row, double *mass) {
    const problem *p = w->p;
    int32_t t = w->s->stride, count = 0, last_row = min_of(first_row + t, p->q_len[w->b]) - 1;
    int32_t position = last_row + p->kv_len[w->b] - p->q_len[w->b];
    int32_t end = whole_row(w->s) ? position + 1 : w->history * p->block;
    double *z = (double *)filled((size_t)(end > 0 ? end : 1) * sizeof *z, 0);
    for (int32_t first = 0; first < end; first += t, count++)
        for (int32_t i = 0; i < t; i++)
            for (int32_t d = 0; d < p->head_dim; d++)
                z[count] += query(w, first_row + t - 1 - i, d) * key(w, first + i, d) *
                            (double)p->scale / t;
    softmax(z, count);
    double block[MAX_BLOCKS] = {0};
    for (int32_t g = 0; g < count; g++) block[g * t / p->block] += z[g];
    for (int32_t n = 0; n < w->eligible; n++)
        mass[n] = w->s->reduce == PBS_REDUCE_MAX ? fmax(mass[n], block[n]) : mass[n] + block[n];
    free(z);
}

static void brute_antidiagonal(const view_of_row *w, double *mass) {
    const problem *p = w->p;
    int32_t groups = 0, end = min_of((w->m + 1) * p->block, p->q_len[w->b]);
    for (int32_t n = 0; n < w->eligible; n++) mass[n] = 0.0;
    for (int32_t row = w->m * p->block; row < end; row += w->s->stride, groups++)
        brute_group(w, row, mass);
    for (int32_t n = 0; n < w->eligible && w->s->reduce == PBS_REDUCE_SUM; n++)
        mass[n] /= groups ? groups : 1;
}

/* The rules but PREFIX, on the masses that select gives: where rounding decides, what it says. */
static int kept_by_rule(const view_of_row *w, const float *mass, int32_t n, int got) {
    double most = 0.0, here = (double)mass[n], tau = (double)w->s->tau;
    int32_t larger = 0;
    for (int32_t i = 0; i < w->eligible; i++) {
        most = fmax(most, (double)mass[i]);
        larger += mass[i] > mass[n] || (mass[i] == mass[n] && i < n);
    }
    if (w->s->rule == PBS_RULE_BUDGET) return (double)larger < tau;
    if (w->s->rule == PBS_RULE_ABSOLUTE) return mass[n] >= w->s->tau;
    return fabs(here / most - tau) < 1e-5 ? got : here / most >= tau;
}

static void check_row(const view_of_row *w, int64_t row) {
    const problem *p = w->p;
    double mass[MAX_BLOCKS];
    unsigned char kept[MAX_BLOCKS] = {0};
    int32_t blocks = problem_blocks_k(p), first = 0, forced, count = 0;
    if (w->s->method == PBS_SELECT_MEAN_POOL)
        brute_mean_pool(w, mass);
    else
        brute_antidiagonal(w, mass);
    for (int32_t n = 0; n < blocks; n++) {
        double got = (double)w->s->mass[row * blocks + n], want = n < w->eligible ? mass[n] : 0.0;
        CHECK(fabs(got - want) < 5e-6, "%s mode %d method %d mass [%d, %d, %d, %d]: %g, not %g",
              pbs_isa_name(p->isa), (int)w->s->mode, (int)w->s->method, w->b, w->hq, w->m, n, got,
              want);
    }
    brute_prefix(mass, w->eligible, (double)w->s->tau, kept);
    const int32_t *k_perm =
        w->s->k_perm + ((int64_t)w->b * problem_heads_p(p) + w->hp) * p->seqlen_k;
    while (w->history && k_perm[first] != 0) first++;
    forced = first / p->block;
    if (w->history) kept[forced] = 1;
    for (int32_t n = 0; n < blocks; n++) {
        int got = (int)(w->s->bits[row * problem_words(p) + n / 32] >> (n % 32) & 1);
        if (w->s->rule != PBS_RULE_PREFIX && n < w->history && n != forced)
            kept[n] = (unsigned char)kept_by_rule(w, w->s->mass + row * blocks, n, got);
        int want = n < w->history && kept[n];
        count += want;
        CHECK(got == want, "%s mode %d method %d bit [%d, %d, %d, %d]: %d, not %d",
              pbs_isa_name(p->isa), (int)w->s->mode, (int)w->s->method, w->b, w->hq, w->m, n, got,
              want);
    }
    CHECK(w->s->count[row] == count, "count %d, not %d", w->s->count[row], count);
}

/* The strip, asked for alone, is what select saw. */
static void check_strip(const problem *p, setup *u) {
    int32_t T = problem_blocks_k(p), W = problem_words(p), rows = problem_blocks_q(p);
    if (rows < 2) return;
    float *log_mass = (float *)filled((size_t)(rows * T) * sizeof(float), 0);
    uint32_t *eligible = (uint32_t *)filled((size_t)(rows * W) * sizeof(uint32_t), 0);
    pbs_strip strip = {rows - 1, T, log_mass, T, eligible, W};
    int32_t b = p->batch - 1, h = p->heads_q - 1;
    u->s.workspace = filled(u->s.workspace_bytes, 0xff);
    pbs_status status = pbs_score_strip(&u->s, b, h, 1, &strip);
    if (status != PBS_ERR_UNSUPPORTED) /* some backends keep their strips to themselves */
        CHECK(status == PBS_OK, "pbs_score_strip: %s", pbs_last_error());
    const float *mass = u->s.mass + (((int64_t)b * p->heads_q + h) * rows + 1) * T;
    for (int32_t i = 0; status == PBS_OK && i < (rows - 1) * T; i++)
        CHECK(expf(log_mass[i]) == mass[i], "strip %d: %g, not %g", i, (double)expf(log_mass[i]),
              (double)mass[i]);
    free(u->s.workspace);
    free(log_mass);
    free(eligible);
}

void select_check(const problem *p, setup *u) {
    select_run(u);
    for (int32_t b = 0; b < p->batch; b++)
        for (int32_t hq = 0; hq < p->heads_q; hq++)
            for (int32_t m = 0; m < problem_blocks_q(p); m++) {
                view_of_row w = select_look(p, &u->s, b, hq, m);
                check_row(&w, ((int64_t)b * p->heads_q + hq) * problem_blocks_q(p) + m);
            }
    check_strip(p, u);
}
