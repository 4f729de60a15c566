/* SPDX-License-Identifier: Apache-2.0
 *
 * The caller's workspace, cut into 64-byte aligned pieces. The same cutting function is run twice:
 * with base NULL to learn the size, with memory to get pointers; so the two cannot disagree.
 */
#ifndef PBS_CORE_ARENA_H
#define PBS_CORE_ARENA_H

#include <stddef.h>
#include <stdint.h>

enum { PBS_ARENA_ALIGN = 64 };

typedef struct pbs_arena {
    char *base; /* aligned, or NULL while sizing */
    size_t used;
    int overflow; /* a size did not fit size_t */
} pbs_arena;

static inline pbs_arena pbs_arena_at(void *memory) {
    uintptr_t skip = (uintptr_t)0 - (uintptr_t)memory;
    pbs_arena arena = {NULL, 0, 0};
    if (memory) arena.base = (char *)memory + skip % PBS_ARENA_ALIGN;
    return arena;
}

static inline int pbs_size_mul(size_t *product, size_t factor) {
    if (factor && *product > SIZE_MAX / factor) return 0;
    *product *= factor;
    return 1;
}

/* count * times items of size bytes each. */
static inline void *pbs_arena_take(pbs_arena *arena, int64_t count, int64_t times, size_t size) {
    size_t start = arena->used, bytes = size;
    if (!pbs_size_mul(&bytes, (size_t)count) || !pbs_size_mul(&bytes, (size_t)times) ||
        bytes > SIZE_MAX / 2 - start) {
        arena->overflow = 1;
        return NULL;
    }
    arena->used = start + (bytes + PBS_ARENA_ALIGN - 1) / PBS_ARENA_ALIGN * PBS_ARENA_ALIGN;
    return arena->base ? arena->base + start : NULL;
}

/* What the caller must bring, with room to align any pointer; SIZE_MAX = cannot be counted. */
static inline size_t pbs_arena_bytes(const pbs_arena *arena) {
    if (arena->overflow) return SIZE_MAX;
    return arena->used ? arena->used + PBS_ARENA_ALIGN : 0;
}

#endif /* PBS_CORE_ARENA_H */
