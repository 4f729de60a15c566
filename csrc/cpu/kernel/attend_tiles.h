/* SPDX-License-Identifier: Apache-2.0
 *
 * attend on tiles (tiles.h): the same loop as attend.h, cut into items and run as a pipeline.
 *
 *   item = a strip of 32 rows against a panel that it sees; panels outside, strips inside
 *
 *   step t    products        Q K^T of item t + 1  |  P V of item t - 1
 *             softmax         rows of item t, one after every four TDP, as long as there are any
 *
 * The tile unit and the vector units work at the same time only if both find work in the out-of-
 * order window, so the interleaving is done here, in program order. Scores of three items exist at
 * once: one being written, one being softmaxed, one being read as P.
 *
 *   registers   C00 C01   32 rows x 32 keys or columns, fp32        A0 = rows 0-15,  B0 B1 = the
 *               C10 C11                                             A1 = rows 16-31  32 keys
 *
 * The four C tiles of a group are stored where the next group starts, each just before its tile is
 * needed again, so that the stores run beside products. What a product has written may therefore be
 * read only after the next product's first step, or after put_down().
 */
#ifndef PBS_CPU_KERNEL_ATTEND_TILES_H
#define PBS_CPU_KERNEL_ATTEND_TILES_H

#include "cpu/kernel/attend_common.h"
#include "cpu/tiles.h"

_Static_assert((int)VL == TMM_ROWS && (int)GROUP == STRIP, "a strip x a group is 2 x 2 tiles");

#define C00 0
#define C01 1
#define C10 2
#define C11 3
#define A0 4
#define A1 5
#define B0 6
#define B1 7

/* ---- items ----------------------------------------------------------------------------------- */
typedef struct tile_item {
    strip_job strip;
    int32_t n;     /* keys: those visible, rounded up to whole groups */
    float *scores; /* [STRIP][keys]; row by row they become P: n bf16 at the start of the row */
} tile_item;

/* Four C tiles in the unit, and where they belong; at = NULL: nowhere. */
typedef struct held_tiles {
    float *at;
    int64_t ld;
} held_tiles;

typedef struct pipeline {
    const attend_state *state;
    tile_unit *unit;
    held_tiles held;
    /* which item comes next */
    panel_ref panel, after;
    int32_t row; /* first one of its strip */
    prefetch ahead;
    /* softmax, handed out in rows */
    const tile_item *item;
    int32_t next_row, rows, quanta, credit;
} pipeline;

/* Groups of four TDP, the quanta of the pipeline, in the two products of an item. */
INLINE int32_t score_quanta(const attend_state *state, int32_t n) {
    return n / GROUP * (panel_words(state->job->head_dim) / VL);
}
INLINE int32_t output_quanta(const attend_state *state, int32_t n) {
    return panel_columns(state->job->head_dim) / GROUP * (n / GROUP);
}

static void start_panel(pipeline *p, panel_ref panel) {
    const attend_state *state = p->state;
    const size_t bytes = kernel_panel_bytes(state->job->head_dim, state->keys);
    const int32_t strips = pbs_ceil_div(state->job->rows, STRIP);
    const int32_t quanta =
        strips * (score_quanta(state, state->keys) + output_quanta(state, state->keys));
    p->row = 0;
    p->panel = panel;
    if (!panel.at) return;
    p->after = next_panel(state, panel);
    p->ahead = (prefetch){p->after.at, p->after.at ? p->after.at + bytes : NULL,
                          pbs_ceil_div((int32_t)(bytes / PBS_ALIGN), quanta)};
}

/* The next strip that sees a key of its panel; 0: there is none. */
static int next_item(pipeline *p, tile_item *item) {
    const attend_state *state = p->state;
    while (p->panel.at) {
        item->strip = (strip_job){.row = p->row};
        item->strip.rows = pbs_min_i32(state->job->rows - p->row, STRIP);
        if (item->strip.rows <= 0) {
            start_panel(p, p->after);
            continue;
        }
        p->row += STRIP;
        look_at_panel(state, p->panel, &item->strip);
        item->n = round_up(item->strip.visible, GROUP);
        if (item->n) return 1;
    }
    return 0;
}

/* ---- softmax between the products ------------------------------------------------------------ */
/* Seldom: hardly any row is raised after its first panel. */
NOINLINE __attribute__((cold)) void raise_row(const pipeline *p, int32_t row, float top) {
    raise_row_max(&p->state->softmax, row, top);
}

INLINE void softmax_row(const pipeline *p, int32_t r) {
    const softmax_state *softmax = &p->state->softmax;
    const int32_t row = p->item->strip.row + r, n = p->item->n;
    float *scores = p->item->scores + r * p->state->keys;
    const float top = max_of_row(scores, n) * softmax->scale_log2 + p->item->strip.bias;
    if (__builtin_expect(top > softmax->row_max[row] + RAISE_ABOVE, 0)) raise_row(p, row, top);
    exp2_row(1, EXP2_COARSE, softmax, p->item->strip.bias, row, scores, n);
}

/* Spread the item's rows evenly over as many quanta as the products of this step have. */
INLINE void begin_softmax(pipeline *p, const tile_item *item, int32_t quanta) {
    p->item = item;
    p->next_row = 0;
    p->rows = item ? item->strip.rows : 0;
    p->quanta = pbs_max_i32(quanta, 1);
    p->credit = 0;
}

INLINE void softmax_some(pipeline *p) {
    for (p->credit += p->rows; p->credit >= p->quanta; p->credit -= p->quanta)
        softmax_row(p, p->next_row++);
}

/* ---- products -------------------------------------------------------------------------------- */
/* C[STRIP][groups of GROUP] (+)= A[STRIP][steps] B[groups][steps][GROUP], a step being 32 values
 * along the sum. Strides in bytes, but ldc. */
typedef struct tile_gemm {
    const char *a;
    int64_t a_row, a_step, a_lower; /* to the next row, the next step, the rows 16-31 */
    const char *b;                  /* rows of 32 pairs; a step has 16 of them */
    int64_t b_group;                /* to the next group */
    float *c;
    int64_t ldc;
    int32_t groups, steps;
} tile_gemm;

enum { B_ROW = GROUP * 4, B_STEP = 16 * B_ROW };

INLINE float *tile_of(held_tiles c, int i, int j) { return c.at + i * VL * c.ld + j * VL; }

/* Tile (i, j) of the last group leaves, that of the next one comes in. */
#define EXCHANGE(unit, tile, i, j, held, c, add)                                   \
    do {                                                                           \
        if ((held).at) TILE_STORE(unit, tile, tile_of(held, i, j), 4 * (held).ld); \
        if (add)                                                                   \
            TILE_LOAD(unit, tile, tile_of(c, i, j), 4 * (c).ld);                   \
        else                                                                       \
            TILE_ZERO(unit, tile);                                                 \
    } while (0)

/* One step of a group: operands, then four TDP, at the first step each on a fresh tile. A comes
 * from L1; B, once per strip, from L2. */
INLINE void four_products(const int add, const int first, pipeline *p, const tile_gemm *g,
                          const char *a, const char *b, held_tiles c) {
    tile_unit *unit = p->unit;
    const held_tiles held = p->held;
    TILE_LOAD(unit, A0, a, g->a_row);
    TILE_LOAD_ONCE(unit, B0, b, B_ROW);
    if (first) EXCHANGE(unit, C00, 0, 0, held, c, add);
    TILE_DOT(unit, C00, A0, B0);
    TILE_LOAD_ONCE(unit, B1, b + B_ROW / 2, B_ROW);
    if (first) EXCHANGE(unit, C01, 0, 1, held, c, add);
    TILE_DOT(unit, C01, A0, B1);
    TILE_LOAD(unit, A1, a + g->a_lower, g->a_row);
    if (first) EXCHANGE(unit, C10, 1, 0, held, c, add);
    TILE_DOT(unit, C10, A1, B0);
    if (first) EXCHANGE(unit, C11, 1, 1, held, c, add);
    TILE_DOT(unit, C11, A1, B1);
    if (first) p->held = c;
}

INLINE void quantum(const int add, const int first, pipeline *p, const tile_gemm *g, const char *a,
                    const char *b, held_tiles c) {
    four_products(add, first, p, g, a, b, c);
    softmax_some(p);
    prefetch_some(&p->ahead);
}

INLINE void product(const int add, pipeline *p, const tile_gemm *g) {
    for (int32_t group = 0; group < g->groups; group++) {
        const held_tiles c = {g->c + group * GROUP, g->ldc};
        const char *a = g->a, *b = g->b + group * g->b_group;
        quantum(add, 1, p, g, a, b, c);
        for (int32_t step = 1; step < g->steps; step++) {
            a += g->a_step;
            b += B_STEP;
            quantum(add, 0, p, g, a, b, c);
        }
    }
}

/* Store the last group of the last product without waiting for the next one. */
NOINLINE void put_down(pipeline *p) {
    const held_tiles held = p->held;
    p->held.at = NULL;
    if (!held.at) return;
    TILE_STORE(p->unit, C00, tile_of(held, 0, 0), 4 * held.ld);
    TILE_STORE(p->unit, C01, tile_of(held, 0, 1), 4 * held.ld);
    TILE_STORE(p->unit, C10, tile_of(held, 1, 0), 4 * held.ld);
    TILE_STORE(p->unit, C11, tile_of(held, 1, 1), 4 * held.ld);
}

/* Q K^T of an item. A: Q, tile after tile. */
NOINLINE void item_scores(pipeline *p, const tile_item *item) {
    const attend_state *state = p->state;
    const int32_t words = panel_words(state->job->head_dim);
    const tile_gemm g = {.a = (const char *)q_at(state, item->strip.row, 0),
                         .a_row = TMM_BYTES,
                         .a_step = TMM_ROWS * TMM_BYTES,
                         .a_lower = (int64_t)TMM_ROWS * words * 4,
                         .b = (const char *)item->strip.panel,
                         .b_group = (int64_t)words * B_ROW,
                         .c = item->scores,
                         .ldc = state->keys,
                         .groups = item->n / GROUP,
                         .steps = words / VL};
    product(0, p, &g);
}

/* acc_o += P V of an item. A: P, where its scores were. */
NOINLINE void item_output(pipeline *p, const tile_item *item) {
    const attend_state *state = p->state;
    const int32_t columns = panel_columns(state->job->head_dim);
    const float *v = item->strip.panel + k_part(state->job->head_dim, state->keys);
    const tile_gemm g = {.a = (const char *)item->scores,
                         .a_row = (int64_t)state->keys * 4,
                         .a_step = TMM_BYTES,
                         .a_lower = (int64_t)TMM_ROWS * state->keys * 4,
                         .b = (const char *)v,
                         .b_group = (int64_t)panel_steps(state->keys) * B_ROW,
                         .c = state->s.acc_o + (int64_t)item->strip.row * columns,
                         .ldc = columns,
                         .groups = columns / GROUP,
                         .steps = item->n / GROUP};
    product(1, p, &g);
}

/* ---- the pipeline ---------------------------------------------------------------------------- */
/* Softmax of `now` beside the scores of `ahead` and the output of `behind`; either may be NULL. */
static void pipeline_step(pipeline *p, const tile_item *behind, const tile_item *now,
                          const tile_item *ahead) {
    const attend_state *state = p->state;
    int32_t quanta = 0;
    if (behind && behind->strip.row == now->strip.row) {
        /* One strip twice: raising a row would rescale acc_o before it has what the old maximum
         * belongs to. Few rows, or panels that only the last strip sees. */
        item_output(p, behind);
        behind = NULL;
    }
    if (now->strip.masked) {
        put_down(p);
        mask_strip(state, &now->strip, now->scores, now->n);
    }
    if (ahead) quanta += score_quanta(state, ahead->n);
    if (behind) quanta += output_quanta(state, behind->n);
    begin_softmax(p, now, quanta);
    if (ahead) item_scores(p, ahead);
    if (behind) item_output(p, behind);
    if (quanta == 0) {
        put_down(p);
        softmax_some(p);
    }
    begin_softmax(p, NULL, 0);
}

static void attend_panels(const attend_state *state, tile_unit *unit) {
    tile_item item[STRIPS_HELD], *behind = NULL, *now = &item[0], *ahead = &item[1];
    pipeline p = {.state = state, .unit = unit};
    for (int i = 0; i < STRIPS_HELD; i++)
        item[i].scores = state->s.acc_s + i * STRIP * PBS_MAX_PANEL_KEYS;
    begin_softmax(&p, NULL, 0);
    start_panel(&p, next_panel(state, before_all_panels));
    if (!next_item(&p, now)) return;
    item_scores(&p, now);
    for (int more = 1; more;) {
        more = next_item(&p, ahead);
        pipeline_step(&p, behind, now, more ? ahead : NULL);
        tile_item *const spare = behind ? behind : &item[2];
        behind = now;
        now = ahead;
        ahead = spare;
    }
    item_output(&p, behind);
    put_down(&p);
}

/* bf16 alone: other types go to tables without tiles. */
static void kernel_attend_block(const pbs_attend_job *job) {
    attend_state state = start_attend(job);
    tile_unit unit;
    load_rows(PBS_DTYPE_FP32, &state);
    attend_panels(&state, &unit);
    store_rows(PBS_DTYPE_BF16, &state);
}

#endif /* PBS_CPU_KERNEL_ATTEND_TILES_H */
