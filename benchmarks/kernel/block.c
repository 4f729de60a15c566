/* SPDX-License-Identifier: Apache-2.0
 *
 * One kernel table at work on panels that stay in L2, or pass through memory. benchmarks/kernel/
 * __init__.py calls this through ctypes; errors are pbs_last_error()'s.
 */
#define _GNU_SOURCE /* memfd_create */
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/geometry.h"
#include "core/view.h"

enum { KEYS = PBS_MAX_PANEL_KEYS };

/* ---- one block of queries against panels that it finds in L2 --------------------------------- */
struct bench_block {
    const pbs_cpu_kernels *k;
    pbs_attend_job job;
    char *panels; /* [blocks] panels, of which the first few are mapped again and again */
    size_t panels_bytes;
    void *q, *out, *scratch, *rows; /* rows: the keys of every panel, then their values */
    uint32_t *bits;
};

/* bytes of address space over `period` bytes of memory. */
static char *map_repeated(size_t bytes, size_t period) {
    const int file = memfd_create("pbs_bench", 0);
    if (file < 0) return NULL;
    char *at = (char *)MAP_FAILED;
    if (!ftruncate(file, (off_t)period))
        at = (char *)mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int good = at != (char *)MAP_FAILED;
    for (size_t done = 0; good && done < bytes; done += period)
        good = mmap(at + done, period, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED | MAP_POPULATE, file, 0) != MAP_FAILED;
    close(file);
    if (!good && at != (char *)MAP_FAILED) munmap(at, bytes);
    return good ? at : NULL;
}

/* Panels that fit beside the block's own rows, at least one, a whole number of pages. */
static int32_t panels_in_l2(const pbs_cpu_kernels *k, int32_t head_dim, size_t panel) {
    long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    const size_t room = (size_t)(l2 > 0 ? l2 : 512 << 10) / 4 * 3;
    const size_t own = k->attend_scratch(head_dim, KEYS);
    int32_t count = room > own + panel ? (int32_t)((room - own) / panel) : 1;
    if (count > 4) count = 4;
    while ((size_t)count * panel % (size_t)sysconf(_SC_PAGESIZE)) count++;
    return count;
}

static int fill_panels(bench_block *b, pbs_dtype dtype, int32_t head_dim, int32_t count) {
    const size_t row = (size_t)head_dim * pbs_dtype_size(dtype);
    b->rows = bench_memory(2 * KEYS * row);
    if (!b->rows) return 0;
    bench_randomise(b->rows, dtype, (int64_t)2 * KEYS * head_dim, 1.5f);
    for (int32_t i = 0; i < count; i++) {
        pbs_pack_job job = {.k = {b->rows, head_dim, NULL, dtype},
                            .v = {(char *)b->rows + KEYS * row, head_dim, NULL, dtype},
                            .count = KEYS,
                            .keys = KEYS,
                            .head_dim = head_dim,
                            .panel = b->panels + (size_t)i * b->k->panel_bytes(head_dim, KEYS)};
        b->k->pack(&job);
    }
    return 1;
}

bench_block *bench_block_new(int32_t isa, int32_t dtype_id, int32_t head_dim, int32_t blocks) {
    const pbs_dtype dtype = (pbs_dtype)dtype_id;
    const pbs_cpu_kernels *k = bench_table(isa, dtype_id);
    if (!k) return NULL;
    bench_block *b = (bench_block *)calloc(1, sizeof *b);
    if (!b) return NULL;
    const size_t panel = k->panel_bytes(head_dim, KEYS);
    const int32_t count = panels_in_l2(k, head_dim, panel);
    blocks = (blocks + count - 1) / count * count;
    const size_t rows = (size_t)KEYS * (size_t)head_dim * pbs_dtype_size(dtype);
    b->k = k;
    b->panels_bytes = (size_t)blocks * panel;
    b->panels = map_repeated(b->panels_bytes, (size_t)count * panel);
    b->q = bench_memory(rows);
    b->out = bench_memory(rows);
    b->scratch = bench_memory(k->attend_scratch(head_dim, KEYS));
    b->bits = (uint32_t *)bench_memory((size_t)(blocks / 32 + 1) * sizeof *b->bits);
    if (!b->panels || !b->q || !b->out || !b->scratch || !b->bits ||
        !fill_panels(b, dtype, head_dim, count)) {
        bench_block_free(b);
        return NULL;
    }
    bench_randomise(b->q, dtype, (int64_t)KEYS * head_dim, 1.5f);
    memset(b->bits, 0xff, (size_t)(blocks / 32 + 1) * sizeof *b->bits);
    b->job = (pbs_attend_job){.q = {b->q, head_dim, NULL, dtype},
                              .rows = KEYS,
                              .q_offset = blocks * KEYS,
                              .head_dim = head_dim,
                              .scale_log2 = PBS_LOG2_E / sqrtf((float)head_dim),
                              .block_k = KEYS,
                              .bits = b->bits,
                              .hist_end = blocks,
                              .hist_panels = b->panels,
                              .own_begin = blocks * KEYS,
                              .own_end = blocks * KEYS,
                              .own_panels = b->panels,
                              .out = b->out,
                              .out_stride = head_dim,
                              .scratch = b->scratch};
    return b;
}

int32_t bench_block_count(const bench_block *b) { return b->job.hist_end; }

const void *bench_block_q(const bench_block *b) { return b->q; }
const void *bench_block_kv(const bench_block *b) { return b->rows; }
const void *bench_block_out(const bench_block *b) { return b->out; }

void bench_block_run(bench_block *b, int32_t repeat) {
    pbs_cpu_state saved;
    b->k->enter(&saved);
    for (int32_t i = 0; i < repeat; i++) b->k->attend_block(&b->job);
    b->k->leave(&saved);
}

void bench_block_free(bench_block *b) {
    if (!b) return;
    if (b->panels) munmap(b->panels, b->panels_bytes);
    free(b->q);
    free(b->out);
    free(b->scratch);
    free(b->rows);
    free(b->bits);
    free(b);
}
