/* SPDX-License-Identifier: Apache-2.0
 *
 * What attend says it did: blocks as the lists have them, an item per query block, a rescale
 * wherever a row's maximum rose after its first keys, and no other bit of the result.
 */
#include <stdlib.h>
#include <string.h>

#include "harness.h"

enum { SLOTS = 3, KEYS = 300, BLOCK = 64, SEGMENT = 128 };

static problem base(pbs_isa isa) {
    problem p = {.batch = 2, .heads_q = 2, .heads_k = 1, .seqlen_q = KEYS, .seqlen_k = KEYS};
    p.head_dim = 16;
    p.block = BLOCK;
    p.segment = SEGMENT;
    p.dtype = pbs_isa_for(isa, PBS_DTYPE_FP32) == isa ? PBS_DTYPE_FP32 : PBS_DTYPE_BF16;
    p.isa = isa;
    return p;
}

static pbs_attend_params params_of(const problem *p, pbs_own own, const uint32_t *bits) {
    pbs_attend_params s = PBS_INIT(pbs_attend_params);
    s.q = p->q;
    s.k = p->k;
    s.v = p->v;
    s.bits = bits;
    s.geometry = p->geometry;
    s.block_q = s.block_k = BLOCK;
    s.segment_size = SEGMENT;
    s.own = own;
    s.out = p->out;
    s.exec.isa = p->isa;
    return s;
}

static pbs_work_counters run(pbs_attend_params *s, pbs_work_counters counters[SLOTS]) {
    pbs_work_counters sum = {0, 0, 0, 0};
    s->counters = counters;
    RUN(pbs_attend_workspace_size(s, &s->workspace_bytes));
    s->workspace = filled(s->workspace_bytes, 0xff);
    RUN(pbs_attend(s));
    free(s->workspace);
    for (int i = 0; counters && i < SLOTS; i++) {
        sum.items += counters[i].items;
        sum.blocks += counters[i].blocks;
        sum.rescales += counters[i].rescales;
        sum.busy_ns += counters[i].busy_ns;
    }
    return sum;
}

static int is_set(const uint32_t *row, int32_t n) { return (int)(row[n / 32] >> n % 32 & 1); }

/* Key blocks of one head by the definitions of pbs_own. */
static uint64_t blocks_of_lists(pbs_own own, const uint32_t *bits, int32_t rows) {
    uint64_t blocks = 0;
    for (int32_t m = 0; m * BLOCK < rows; m++) {
        int32_t begin = own == PBS_OWN_BLOCK ? m : m * BLOCK / SEGMENT * (SEGMENT / BLOCK);
        for (int32_t n = 0; n <= m; n++) {
            int own_block = (own == PBS_OWN_SEGMENT || own == PBS_OWN_BLOCK) && n >= begin;
            int listed = is_set(bits + m, n) && (own == PBS_OWN_MASK || n < begin);
            blocks += own == PBS_OWN_ALL || own_block || listed;
        }
    }
    return blocks;
}

static void test_work(pbs_isa isa) {
    for (int own = PBS_OWN_SEGMENT; own <= PBS_OWN_ALL; own++) {
        problem p = base(isa);
        p.has_geometry = 1;
        p.kv_len[0] = p.q_len[0] = 211;
        p.kv_len[1] = p.q_len[1] = KEYS;
        problem_make(&p, 3);
        uint32_t bits[2 * 2 * 5]; /* [B, Hq, Tq, W]: heads and sequences alike */
        rng r = {9};
        for (int i = 0; i < 5; i++) bits[i] = rng_next(&r);
        for (int i = 5; i < 20; i++) bits[i] = bits[i - 5];
        pbs_attend_params s = params_of(&p, (pbs_own)own, bits);
        run(&s, NULL);
        char *plain = (char *)filled(p.out_bytes, 0);
        memcpy(plain, p.out.data, p.out_bytes);
        memset(p.out.data, 0xff, p.out_bytes);

        int threads = SLOTS;
        s.exec.parallel_for = pool_parallel_for;
        s.exec.pool = &threads;
        s.exec.num_threads = SLOTS;
        pbs_work_counters c[SLOTS] = {{1, 2, 3, 4}}; /* added to */
        pbs_work_counters sum = run(&s, c);
        uint64_t blocks = blocks_of_lists((pbs_own)own, bits, 211);
        blocks = 2 * (blocks + blocks_of_lists((pbs_own)own, bits, KEYS));
        CHECK(memcmp(plain, p.out.data, p.out_bytes) == 0, "own %d: counting changed a bit", own);
        CHECK(sum.items == 1 + 2 * (4 + 5), "own %d: %d items", own, (int)sum.items);
        CHECK(sum.blocks == 2 + blocks, "own %d: %d blocks, not 2 + %d", own, (int)sum.blocks,
              (int)blocks);
        CHECK(sum.busy_ns > 4, "own %d: no time passed", own);

        pbs_work_counters by_slot[SLOTS] = {{0, 0, 0, 0}};
        s.exec.parallel_for = reverse_parallel_for; /* slot 1 finds all the work */
        run(&s, by_slot);
        CHECK(by_slot[1].items == 2 * (4 + 5) && by_slot[0].items + by_slot[2].items == 0,
              "own %d: items of another slot", own);
        pbs_work_counters corrected[SLOTS] = {{0, 0, 0, 0}};
        s.correction = own == PBS_OWN_ALL ? PBS_CORRECTION_NONE : PBS_CORRECTION_MEAN;
        sum = run(&s, corrected);
        CHECK(sum.items == 2 * (4 + 5) && sum.blocks == blocks, "own %d: means are no blocks", own);
        free(plain);
        problem_free(&p);
    }
}

static void set_rows(const pbs_view *v, float first, float step) {
    for (int32_t i = 0; i < v->size[2]; i++)
        for (int32_t d = 0; d < v->size[3]; d++) {
            float x = d == 0 ? first + step * (float)(i / 128) : 0.0f;
            uint32_t word;
            memcpy(&word, &x, sizeof word);
            for (int32_t h = 0; h < v->size[1]; h++) {
                int64_t at = h * v->stride[1] + i * v->stride[2] + d;
                if (v->dtype == PBS_DTYPE_FP32)
                    ((float *)v->data)[at] = x;
                else
                    ((uint16_t *)v->data)[at] = (uint16_t)(word >> 16);
            }
        }
}

/* Scores of keys [128 i, 128 (i + 1)): first + step * i. */
static uint64_t rescales(pbs_isa isa, float first, float step, pbs_permute_mode through) {
    problem p = base(isa);
    p.batch = 1;
    problem_make(&p, 1);
    set_rows(&p.q, 1.0f, 0.0f);
    set_rows(&p.k.view, first, step);
    pbs_work_counters c[SLOTS] = {{0, 0, 0, 0}};
    uint64_t count;
    if (through == PBS_PERMUTE_NONE) {
        pbs_attend_params s = params_of(&p, PBS_OWN_ALL, NULL);
        s.softmax_scale = 1.0f;
        count = run(&s, c).rescales;
    } else {
        pbs_prefill_params s = PBS_INIT(pbs_prefill_params);
        s.q = p.q, s.k = p.k, s.v = p.v, s.out = p.out, s.softmax_scale = 1.0f;
        s.block_size = BLOCK, s.segment_size = SEGMENT, s.mode = through,
        s.rule = PBS_RULE_ABSOLUTE;
        s.exec.isa = isa, s.counters = c, s.workspace_cap = 1; /* a wave per K/V head */
        RUN(pbs_prefill_workspace_size(&s, &s.workspace_bytes));
        s.workspace = filled(s.workspace_bytes, 0xff);
        RUN(pbs_prefill(&s));
        CHECK(c[0].items == 2 * 5 && c[0].blocks > 0, "%d items", (int)c[0].items);
        free(s.workspace);
        count = c[0].rescales;
    }
    problem_free(&p);
    return count;
}

static void test_rescales(pbs_isa isa) {
    const pbs_permute_mode ways[] = {PBS_PERMUTE_NONE, PBS_PERMUTE_KEYS};
    for (int i = 0; i < 2; i++) {
        CHECK(rescales(isa, 3.0f, 0.0f, ways[i]) == 0, "constant scores");
        CHECK(rescales(isa, 70.0f, -32.0f, ways[i]) == 0, "falling scores");
        /* Rows 128 to 255 meet a second level, 256 to 299 a third; two heads. */
        CHECK(rescales(isa, -30.0f, 32.0f, ways[i]) == 2 * (128 + 2 * 44), "rising scores");
    }
}

static void test_misaligned(void) {
    problem p = base(PBS_ISA_AUTO);
    problem_make(&p, 1);
    uint32_t bits[20] = {0};
    pbs_work_counters c[2] = {{0, 0, 0, 0}};
    pbs_attend_params s = params_of(&p, PBS_OWN_SEGMENT, bits);
    s.counters = (pbs_work_counters *)(uintptr_t)((char *)c + 4);
    size_t bytes;
    CHECK(pbs_attend_workspace_size(&s, &bytes) == PBS_ERR_VALUE, "%s", pbs_last_error());
    CHECK(strstr(pbs_last_error(), "counters") != NULL, "%s", pbs_last_error());
    problem_free(&p);
}

void test_counters(void) {
    for (int dtype = PBS_DTYPE_FP32; dtype <= PBS_DTYPE_BF16; dtype += 2) {
        pbs_isa isas[PBS_ISA_COUNT];
        int count = available_isas((pbs_dtype)dtype, isas);
        for (int i = 0; i < count; i++) {
            if (base(isas[i]).dtype != (pbs_dtype)dtype) continue;
            test_work(isas[i]);
            test_rescales(isas[i]);
        }
    }
    test_misaligned();
}
