/* SPDX-License-Identifier: Apache-2.0
 *
 * Key-aware query permutation (paper 4.3): each key block's centroid in turn takes the block_size
 * free rows of the segment that are most cosine-similar to it; ties go to the earlier row, and rows
 * stay ascending inside a block.
 */
#include "permute_queries.h"

#include <math.h>

#include "../core/arena.h"
#include "convert.h"
#include "packed.h"

typedef struct scratch {
    float *unit;       /* [S, D] rows divided by their norms */
    float *centroid;   /* [S / B, D] mean keys */
    float *similarity; /* [S / B, S]; the centroid's own norm cannot change an order */
    int32_t *row;      /* [S] free rows, then a heap of candidates */
    int32_t *taken;    /* [S] 1 = already in a block */
} scratch;

static size_t cut(const pbs_dims *d, void *memory, scratch *s) {
    pbs_arena arena = pbs_arena_at(memory);
    int32_t blocks = d->segment_size / d->block_k;
    s->unit = (float *)pbs_arena_take(&arena, d->segment_size, d->head_dim, sizeof(float));
    s->centroid = (float *)pbs_arena_take(&arena, blocks, d->head_dim, sizeof(float));
    s->similarity = (float *)pbs_arena_take(&arena, blocks, d->segment_size, sizeof(float));
    s->row = (int32_t *)pbs_arena_take(&arena, d->segment_size, 1, sizeof(int32_t));
    s->taken = (int32_t *)pbs_arena_take(&arena, d->segment_size, 1, sizeof(int32_t));
    return arena.used;
}

size_t pbs_permute_queries_scratch(const pbs_dims *d) {
    scratch s;
    return cut(d, NULL, &s);
}

static void load_unit_rows(const pbs_dims *d, const pbs_query_segment *job, float *unit) {
    for (int32_t i = 0; i < d->segment_size; i++, unit += d->head_dim) {
        float square = 0.0f;
        pbs_load_row(&job->q, job->first_row + i, d->head_dim, unit);
        for (int32_t c = 0; c < d->head_dim; c++) square += unit[c] * unit[c];
        float norm = sqrtf(square); /* a zero row is similar to nothing: 0 everywhere */
        for (int32_t c = 0; c < d->head_dim; c++) unit[c] = norm > 0.0f ? unit[c] / norm : 0.0f;
    }
}

static void load_centroids(const pbs_dims *d, const pbs_cpu_kernels *k,
                           const pbs_query_segment *job, float *centroid) {
    for (int32_t at = 0; at < d->segment_size; at += d->block_k, centroid += d->head_dim) {
        pbs_rows rows = pbs_rows_from(job->k, job->first_key + at);
        for (int32_t c = 0; c < d->head_dim; c++) centroid[c] = 0.0f;
        k->pool_add(&rows, d->block_k, d->head_dim, centroid);
        for (int32_t c = 0; c < d->head_dim; c++) centroid[c] *= 1.0f / (float)d->block_k;
    }
}

/* Is row a a worse match than row b? Unequal rows never tie. */
static int worse(const float *similarity, int32_t a, int32_t b) {
    float x = similarity[a], y = similarity[b];
    if (x != x || y != y) return x != x && (y == y || a > b); /* NaN matches worst */
    return x < y || (x == y && a > b);
}

/* Heap of the best rows so far with the worst of them on top. */
static void sift_down(const float *similarity, int32_t *heap, int32_t count, int32_t at) {
    for (int32_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && worse(similarity, heap[child + 1], heap[child])) child++;
        if (!worse(similarity, heap[child], heap[at])) return;
        int32_t row = heap[at];
        heap[at] = heap[child];
        heap[child] = row;
    }
}

/* Marks the block's rows in taken with its mark, 1 + block. */
static void take_best(const pbs_dims *d, const scratch *s, const float *similarity, int32_t mark) {
    int32_t count = 0, size = d->block_q;
    for (int32_t i = 0; i < d->segment_size; i++) {
        if (s->taken[i]) continue;
        if (count < size) {
            s->row[count++] = i;
            if (count == size)
                for (int32_t at = size / 2; at-- > 0;) sift_down(similarity, s->row, size, at);
        } else if (worse(similarity, s->row[0], i)) {
            s->row[0] = i;
            sift_down(similarity, s->row, size, 0);
        }
    }
    for (int32_t i = 0; i < count; i++) s->taken[s->row[i]] = mark;
}

void pbs_permute_query_segment(const pbs_dims *d, const pbs_cpu_kernels *k,
                               const pbs_query_segment *job) {
    scratch s;
    int32_t size = d->segment_size, blocks = size / d->block_k, dim = d->head_dim;
    cut(d, job->scratch, &s);
    load_unit_rows(d, job, s.unit);
    load_centroids(d, k, job, s.centroid);
    k->gemm_nt(blocks, size, dim, 1.0f, s.centroid, dim, s.unit, dim, s.similarity, size);
    for (int32_t i = 0; i < size; i++) s.taken[i] = 0;
    int32_t *out = job->q_perm + job->first_row;
    for (int32_t n = 0; n < blocks; n++) {
        take_best(d, &s, s.similarity + (int64_t)n * size, n + 1);
        for (int32_t i = 0; i < size; i++)
            if (s.taken[i] == n + 1) *out++ = job->first_row + i;
    }
}
