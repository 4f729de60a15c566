/* SPDX-License-Identifier: Apache-2.0
 *
 * The library without Python: one sparse prefill, and the dense result beside it.
 *
 *     make check                      builds this with the C core (build/check-gcc/prefill)
 *     build/check-gcc/prefill 4096    tokens; prints density and the difference from dense
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "pbs/pbs.h"

enum { HEADS = 4, HEADS_K = 2, HEAD_DIM = 64, BLOCK = 128, SEGMENT = 256 };

static void *allocate(size_t bytes) {
    void *memory = malloc(bytes);
    if (!memory && bytes) exit(1);
    return memory;
}

static void need(pbs_status status) {
    if (status == PBS_OK) return;
    fprintf(stderr, "%s: %s\n", pbs_status_name(status), pbs_last_error());
    exit(1);
}

/* A contiguous [1, heads, tokens, HEAD_DIM] tensor; numbers in [-1, 1), or zeros if scale is 0. */
static pbs_view tensor(int heads, int tokens, float scale) {
    static unsigned state = 1;
    size_t count = (size_t)heads * (size_t)tokens * HEAD_DIM;
    float *data = (float *)allocate(count * sizeof *data);
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        data[i] = scale * ((float)(state >> 8) * 0x1p-23f - 1.0f);
    }
    pbs_view view = {data, PBS_DTYPE_FP32, {1, heads, tokens, HEAD_DIM}, {0}};
    view.stride[3] = 1;
    view.stride[2] = HEAD_DIM;
    view.stride[1] = (int64_t)tokens * HEAD_DIM;
    view.stride[0] = heads * view.stride[1];
    return view;
}

static double largest_difference(const pbs_view *a, const pbs_view *b) {
    const float *x = (const float *)a->data, *y = (const float *)b->data;
    double most = 0.0;
    for (int64_t i = 0; i < a->stride[0]; i++) most = fmax(most, fabs((double)(x[i] - y[i])));
    return most;
}

/* Runs p with one threshold; returns the selected share of the causal blocks. */
static double prefill(pbs_prefill_params *p, float tau) {
    int tokens = p->q.size[2], blocks = (tokens + BLOCK - 1) / BLOCK;
    int32_t *count = (int32_t *)allocate((size_t)(HEADS * blocks) * sizeof *count);
    p->tau = tau;
    p->count = count;
    need(pbs_prefill_workspace_size(p, &p->workspace_bytes));
    p->workspace = allocate(p->workspace_bytes);
    need(pbs_prefill(p));
    double selected = 0.0;
    for (int i = 0; i < HEADS * blocks; i++) {
        int m = i % blocks, own = m - m * BLOCK / SEGMENT * (SEGMENT / BLOCK) + 1;
        selected += count[i] + own; /* the own segment is always computed */
    }
    free(p->workspace);
    free(count);
    return selected / (HEADS * (blocks * (blocks + 1.0) / 2.0));
}

int main(int argc, char **argv) {
    int tokens = argc > 1 ? atoi(argv[1]) : 2048;
    if (tokens < 1 || tokens > 1 << 20) {
        fprintf(stderr, "usage: prefill [TOKENS], 1..1048576\n");
        return 1;
    }
    pbs_prefill_params p = PBS_INIT(pbs_prefill_params);
    p.q = tensor(HEADS, tokens, 4.0f);
    p.k.view = tensor(HEADS_K, tokens, 2.0f);
    p.v.view = tensor(HEADS_K, tokens, 1.0f);
    p.out = tensor(HEADS, tokens, 0.0f);
    p.block_size = BLOCK;
    p.segment_size = SEGMENT;
    p.mode = PBS_PERMUTE_KEYS;

    pbs_attend_params dense = PBS_INIT(pbs_attend_params); /* every block: the exact answer */
    dense.q = p.q;
    dense.k = p.k;
    dense.v = p.v;
    dense.block_q = dense.block_k = BLOCK;
    dense.own = PBS_OWN_ALL;
    dense.out = tensor(HEADS, tokens, 0.0f);
    need(pbs_attend_workspace_size(&dense, &dense.workspace_bytes));
    dense.workspace = allocate(dense.workspace_bytes);
    need(pbs_attend(&dense));

    printf("%d tokens, kernels: %s\n", tokens,
           pbs_isa_name(pbs_isa_for(PBS_ISA_AUTO, PBS_DTYPE_FP32)));
    const float taus[] = {0.5f, 0.9f, 1.0f};
    double difference = 0.0;
    for (int i = 0; i < 3; i++) {
        double density = prefill(&p, taus[i]);
        difference = largest_difference(&p.out, &dense.out);
        printf("tau %.1f: density %5.1f%%, largest difference from dense %.2e\n", (double)taus[i],
               100.0 * density, difference);
    }
    free(dense.workspace);
    void *tensors[] = {p.q.data, p.k.view.data, p.v.view.data, p.out.data, dense.out.data};
    for (int i = 0; i < 5; i++) free(tensors[i]);
    return difference < 1e-5 ? 0 : 1; /* tau = 1 keeps every block */
}
