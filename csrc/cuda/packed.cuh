/* SPDX-License-Identifier: Apache-2.0
 *
 * The packed K/V buffer of pbs_permute on CUDA, opaque to callers:
 *
 *   header 64 bytes | int32 heads[heads_p] | K [B, Hp, Nc, D] | V [B, Hp, Nc, D]
 *                   | means of K [B, Hp, Tk, D] | means of V [B, Hp, Tk, D]
 *
 * 16-bit rows, contiguous; Nc = the complete keys of max_k. Row r of head (b, hp) is key k_perm[r],
 * and is written only where that head moves (heads[hp] = 1, r in a complete segment of a sequence
 * with more than one). Everything else is read from the caller's K and V: no copies. Without
 * permuted keys there is neither K nor V part. Means are those of key blocks in the order in which
 * the head's history is read, of every head, and only where permute was asked for a correction.
 *
 * No host can read the header, so the reader on the device compares `call` with what it expects,
 * and looks whether there are means before it reads them.
 */
#ifndef PBS_CUDA_PACKED_CUH
#define PBS_CUDA_PACKED_CUH

#include "../core/arena.h"
#include "../core/check.h"
#include "../core/random.h"
#include "../core/view.h"

namespace pbs {

#define PBS_CUDA_PACKED_MAGIC UINT64_C(0x31445543534250ff) /* "\xffPBSCUD1" */

struct packed_header {
    uint64_t magic;
    uint64_t call;  /* fingerprint of the shapes */
    uint64_t means; /* 1: there are means */
    uint64_t reserved[5];
};
static_assert(sizeof(packed_header) == 64, "heads start on a cache line");

/* Offsets in bytes from the header. */
struct packed_layout {
    uint64_t call;
    int64_t heads;
    int64_t k, v;
    int64_t k_mean, v_mean; /* 0: there are none */
    int32_t rows;           /* Nc; 0 without permuted keys */
    size_t bytes;           /* SIZE_MAX = cannot be counted */
};

/* What must agree between the call that packs and the call that reads. A buffer without permuted
 * keys holds no rows, so it fits any segment_size. */
static inline uint64_t packed_call(const pbs_dims *d, int permutes) {
    uint64_t x = PBS_CUDA_PACKED_MAGIC;
    const int32_t fields[] = {permutes != 0,
                              permutes ? d->segment_size : 0,
                              static_cast<int32_t>(d->dtype),
                              d->batch,
                              d->heads_k,
                              d->heads_p,
                              d->max_k,
                              d->head_dim,
                              d->block_k};
    int32_t at = 0;
    for (int32_t field : fields) x = pbs_hash(x, at++, field);
    return x;
}

/* Room for `rows` rows of every head; where it starts. Every part starts on 1024 bytes after the
 * header: whole swizzle patterns of a bulk copy. */
static inline int64_t packed_part(packed_layout *l, const pbs_dims *d, int32_t rows) {
    const size_t align = 1024;
    size_t part = static_cast<size_t>(d->head_dim) * sizeof(uint16_t);
    if (!pbs_size_mul(&part, static_cast<size_t>(d->batch) * static_cast<size_t>(d->heads_p)) ||
        !pbs_size_mul(&part, static_cast<size_t>(rows)) || part > SIZE_MAX / 8 ||
        l->bytes == SIZE_MAX) {
        l->bytes = SIZE_MAX;
        return 0;
    }
    const size_t at = (l->bytes + align - 1) / align * align;
    l->bytes = at + part;
    return static_cast<int64_t>(at);
}

/* K and V of a layout with means lie where they lie without. */
static inline packed_layout packed_layout_of(const pbs_dims *d, int permutes, int means) {
    packed_layout l = {};
    l.call = packed_call(d, permutes);
    l.heads = sizeof(packed_header);
    l.bytes = sizeof(packed_header) + static_cast<size_t>(d->heads_p) * sizeof(int32_t);
    if (permutes) {
        l.rows = pbs_complete_keys(d->max_k, d->segment_size);
        l.k = packed_part(&l, d, l.rows);
        l.v = packed_part(&l, d, l.rows);
    }
    if (means) {
        l.k_mean = packed_part(&l, d, d->blocks_k);
        l.v_mean = packed_part(&l, d, d->blocks_k);
    }
    return l;
}

} // namespace pbs

#endif /* PBS_CUDA_PACKED_CUH */
