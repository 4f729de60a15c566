/* SPDX-License-Identifier: Apache-2.0
 *
 * attend where its order of work matters: strips of all sizes, every pattern of listed panels, row
 * maxima that rise from panel to panel. attend_tiles.h runs items of a strip and a panel in a
 * pipeline, so these are its turns; the other instruction sets must pass as well.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/convert.h"
#include "harness.h"

static const double LIMIT = 8e-3; /* as in test_attend.c: P and the output are bf16 */

typedef struct calls {
    pbs_own own;
    uint32_t bits; /* of the only query block */
    pbs_correction correction;
    int brute_every; /* rows between those that are compared with the brute force */
} calls;

static void attend(problem *p, const calls *c, pbs_isa isa) {
    pbs_attend_params s = PBS_INIT(pbs_attend_params);
    uint32_t bits[16];
    for (int i = 0; i < 16; i++) bits[i] = c->bits;
    s.q = p->q, s.k = p->k, s.v = p->v;
    s.bits = c->own == PBS_OWN_ALL ? NULL : bits;
    s.geometry = p->geometry;
    s.softmax_scale = p->scale;
    s.block_q = s.block_k = p->block;
    s.segment_size = p->segment;
    s.heads_sel = 1;
    s.own = c->own;
    s.correction = c->correction;
    s.out = p->out, s.lse = p->lse;
    s.exec.isa = isa;
    RUN(pbs_attend_workspace_size(&s, &s.workspace_bytes));
    s.workspace = filled(s.workspace_bytes, 0xff);
    RUN(pbs_attend(&s));
    free(s.workspace);
}

static void compare_brute(const problem *p, const calls *c, pbs_isa isa) {
    uint32_t bits[16];
    for (int i = 0; i < 16; i++) bits[i] = c->bits;
    brute_attend_args a = {.bits = bits, .block_q = p->block, .block_k = p->block};
    a.heads_sel = 1;
    a.own = c->own;
    a.correction = c->correction;
    double out[PBS_MAX_HEAD_DIM], lse;
    for (int32_t row = 0; row < p->seqlen_q; row += c->brute_every) {
        brute_attend_row(p, &a, 0, 0, row, out, &lse);
        const double got = element(&p->lse, 0, 0, row, 0);
        CHECK(got == lse || fabs(got - lse) < 2e-3,
              "%s: %d rows, own %d, bits %x: lse %d: %g, not %g", pbs_isa_name(isa), p->seqlen_q,
              (int)c->own, c->bits, row, got, lse);
        for (int32_t d = 0; d < p->head_dim; d++)
            CHECK(fabs(element(&p->out, 0, 0, row, d) - out[d]) < LIMIT,
                  "%s: %d rows, own %d, bits %x, D %d: out [%d, %d]: %g, not %g", pbs_isa_name(isa),
                  p->seqlen_q, (int)c->own, c->bits, p->head_dim, row, d,
                  element(&p->out, 0, 0, row, d), out[d]);
    }
}

/* Every row against the portable twin. */
static void compare_twin(const problem *p, const calls *c, pbs_isa isa, const uint16_t *twin) {
    const uint16_t *out = (const uint16_t *)p->out.data;
    int32_t worst = 0;
    double error = 0.0;
    for (int32_t i = 0; i < p->seqlen_q * p->head_dim; i++) {
        double e = fabs((double)pbs_bf16_to_fp32(out[i]) - (double)pbs_bf16_to_fp32(twin[i]));
        if (!(e <= error)) error = e, worst = i; /* a NaN is the worst */
        if (isnan(e)) break;
    }
    CHECK(error < LIMIT, "%s: %d rows, own %d, bits %x, D %d: out [%d, %d]: %g, %g by the twin",
          pbs_isa_name(isa), p->seqlen_q, (int)c->own, c->bits, p->head_dim, worst / p->head_dim,
          worst % p->head_dim, (double)pbs_bf16_to_fp32(out[worst]),
          (double)pbs_bf16_to_fp32(twin[worst]));
}

/* Tiles always; other emulated sets, which have no pipeline, now and then. */
static void run_all(problem *p, const calls *c) {
    static unsigned turn;
    pbs_isa isas[PBS_ISA_COUNT];
    const int count = available_isas(p->dtype, isas), thin = turn++ % 8 != 0;
    attend(p, c, PBS_ISA_C);
    uint16_t *twin = (uint16_t *)filled(p->out_bytes, 0);
    memcpy(twin, p->out.data, p->out_bytes);
    for (int i = 0; i < count; i++) {
        if (thin && is_emulated(isas[i]) && isas[i] != PBS_ISA_EMU_AMX) continue;
        memset(p->out.data, 0xff, p->out_bytes);
        attend(p, c, isas[i]);
        compare_twin(p, c, isas[i], twin);
        if (c->brute_every) compare_brute(p, c, isas[i]);
    }
    free(twin);
}

static problem one_block(int32_t rows, int32_t keys, int32_t block, int32_t head_dim) {
    problem p = {.batch = 1, .heads_q = 1, .heads_k = 1, .head_dim = head_dim};
    p.seqlen_q = rows;
    p.seqlen_k = keys;
    p.block = block;
    p.segment = 2 * block;
    p.dtype = PBS_DTYPE_BF16;
    return p;
}

/* Scores of 64 keys after 64 keys are `step` times larger: with step > 1 nearly every row is raised
 * by every panel, with step < 1 none is after the first. */
static void scale_keys(problem *p, float step) {
    uint16_t *k = (uint16_t *)p->k.view.data;
    float factor = 1.0f;
    for (int32_t key = 0; key < p->seqlen_k; key++) {
        if (key && key % 64 == 0) factor *= step;
        for (int32_t d = 0; d < p->head_dim; d++, k++)
            *k = pbs_fp32_to_bf16(pbs_bf16_to_fp32(*k) * factor);
    }
}

/* History alone and own spans, for every pattern of four listed blocks of one panel each. */
static void test_patterns(void) {
    static const int32_t rows[] = {1, 15, 16, 17, 31, 32, 33, 48, 63, 64};
    static const int32_t dims[] = {8, 32, 40, 64, 24};
    static const float steps[] = {1.0f, 2.5f, 0.4f};
    int turn = 0;
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
        for (size_t s = 0; s < 3; s++, turn++) {
            if ((r + s) % grid_step(PBS_ISA_C)) continue; /* slow under sanitizers */
            problem p = one_block(rows[r], 4 * 64 + rows[r], 64, dims[turn % 5]);
            problem_make(&p, (uint64_t)turn);
            scale_keys(&p, steps[s]);
            for (uint32_t bits = 0; bits < 16; bits++) {
                const calls c = {.own = bits % 3 ? PBS_OWN_NONE : PBS_OWN_SEGMENT,
                                 .bits = bits,
                                 .correction = (pbs_correction)((bits / 2 + (uint32_t)turn) % 2),
                                 .brute_every = bits % 5 ? 0 : 9};
                run_all(&p, &c);
            }
            problem_free(&p);
        }
}

/* Strips that follow each other in one panel; blocks of two panels, of which some strips see one;
 * wide heads. */
static void test_strips(void) {
    static const int32_t rows[][2] = {{100, 128}, {128, 128}, {65, 128},  {130, 256},
                                      {96, 128},  {160, 256}, {256, 256}, {31, 256}};
    static const int32_t dims[] = {128, 80, 256, 96, 64, 40, 72, 128};
    static const pbs_own owns[] = {PBS_OWN_SEGMENT, PBS_OWN_BLOCK, PBS_OWN_ALL, PBS_OWN_NONE};
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
        for (size_t s = 0; s < 2; s++) {
            if ((r + s) % grid_step(PBS_ISA_C)) continue;
            const int32_t block = rows[r][1];
            problem p = one_block(rows[r][0], 3 * block + rows[r][0] + (int32_t)s * 7, block,
                                  dims[(r + s) % 8]);
            problem_make(&p, r + s);
            scale_keys(&p, s ? 1.3f : 1.0f);
            for (uint32_t own = 0; own < 4; own++) {
                const calls c = {.own = owns[own],
                                 .bits = (uint32_t)(5 + r + own),
                                 .correction = (pbs_correction)(owns[own] != PBS_OWN_ALL && r % 2),
                                 .brute_every = own % 2 ? 0 : 37};
                if ((own + r) % 2 == s) run_all(&p, &c);
            }
            problem_free(&p);
        }
}

void test_pipeline(void) {
    test_patterns();
    test_strips();
}
