/* SPDX-License-Identifier: Apache-2.0
 *
 * What a block of threads of attend has to do, whatever instructions it does it with: which rows,
 * which keys, in which order. A row block is BLOCK_M rows of one query block; a tile is BLOCK_N
 * keys, BLOCK_N a divisor of block_k.
 *
 *   keys   0                     own_begin      clean_end        end
 *          |  history: set bits      |    own span    | own, masked |
 *   tiles  <------------------------------------------------------- from high to low
 *
 * The own span comes first: it begins on the diagonal, so that (almost) every row has a finite
 * maximum after the first tile, and the masked tiles are the first ones of every walk.
 */
#ifndef PBS_CUDA_ATTEND_CUH
#define PBS_CUDA_ATTEND_CUH

#include "../core/bits.h"
#include "packed.cuh"
#include "rows.cuh"

namespace pbs {

/* The kernel's arguments; all pointers are the device's. */
struct attend_args {
    pbs_dims dims;
    pbs_view q, k, v;
    pbs_view out, lse;           /* lse.data may be NULL */
    const unsigned char *packed; /* or NULL: natural order everywhere */
    packed_layout permuted;      /* of a buffer that holds permuted keys */
    uint64_t natural_call;       /* fingerprint of one that does not */
    int32_t takes_permuted;      /* the own mode reads permuted history, and the buffer has room */
    const uint32_t *bits;        /* [B, heads_sel, Tq, W]; not read for PBS_OWN_ALL */
    const int32_t *q_perm;       /* [B, Hq, Nq] or NULL */
    const int32_t *order;        /* [B * Hq * Tq] items, see order.cuh */
    float softmax_scale_log2;
    int32_t heads_sel;
    pbs_own own;
};

/* An item is one query block: (b * Hq + hq) * Tq + m. */
struct attend_item {
    int32_t b, hq, m;
};

PBS_DEVICE attend_item item_at(const pbs_dims &d, int32_t item) {
    const int32_t head = item / d.blocks_q;
    return {head / d.heads_q, head % d.heads_q, item % d.blocks_q};
}

PBS_DEVICE const uint32_t *bits_of(const attend_args &a, attend_item i) {
    const int32_t sel = a.heads_sel == a.dims.heads_q ? i.hq : i.hq / a.dims.group;
    const int64_t row = (static_cast<int64_t>(i.b) * a.heads_sel + sel) * a.dims.blocks_q + i.m;
    return a.bits + row * a.dims.words;
}

/* ---- which keys ------------------------------------------------------------------------------ */
struct key_span {
    int32_t end;       /* no row of the row block sees keys from here on */
    int32_t clean_end; /* every row sees all keys before this one; a multiple of tile */
    int32_t own_begin; /* all keys from here to end are read */
    int32_t hist_end;  /* key blocks before this one are read where their bit is set */
};

/* Of rows [first, first + rows) of query block m; tile = the granularity of clean_end. */
PBS_DEVICE key_span span_of(const attend_args &a, const pbs_seq &s, int32_t m, int32_t first,
                            int32_t rows, int32_t tile) {
    const pbs_dims &d = a.dims;
    const int32_t row_segment = a.q_perm ? d.segment_size : 0;
    const int32_t lowest = row_segment ? first / row_segment * row_segment : first;
    const int32_t last = pbs_min_i32(first + rows, s.q_len);
    key_span span;
    span.end =
        row_segment ? pbs_own_end(s, m, d.block_q, row_segment) : pbs_max_i32(s.q_offset + last, 0);
    span.clean_end = pbs_floor_to(s.q_offset + lowest + 1, tile);
    if (a.own == PBS_OWN_MASK) { /* bits decide about all keys, up to the last visible one */
        span.own_begin = span.end;
        span.hist_end = pbs_ceil_div(span.end, d.block_k);
        return span;
    }
    span.own_begin = pbs_own_start(s, m, d.block_q, d.block_k, d.segment_size, row_segment, a.own);
    span.hist_end = span.own_begin / d.block_k;
    if (a.own == PBS_OWN_NONE) span.end = span.own_begin;
    return span;
}

/* ---- in which order -------------------------------------------------------------------------- */
/* The tiles of a row block, from high to low. One thread walks, for all: the state lies in shared
 * memory, and the word of bits that it looks at came to L1 with the 31 beside it. */
struct key_walk {
    int32_t key;     /* first key of the tile; negative: there are no more */
    int32_t stop;    /* lowest key of the span or block that the tile is part of */
    uint32_t blocks; /* bits of the current word that are still to come */
    int32_t word;    /* its number; bit 0 is block 32 * word */
};

PBS_DEVICE int32_t highest_bit(uint32_t word) { return 31 - __clz(static_cast<int>(word)); }

/* The tile after the current one. */
template <int BLOCK_N>
PBS_DEVICE void walk_next(key_walk &walk, const uint32_t *bits, const key_span &span,
                          int32_t block_k) {
    walk.key -= BLOCK_N;
    if (walk.key >= walk.stop) return;
    while (!walk.blocks) {
        if (walk.word == 0) {
            walk.key = walk.stop = -1;
            return;
        }
        walk.word--;
        walk.blocks = bits[walk.word] & pbs_bits_below(span.hist_end, walk.word);
    }
    const int32_t n = highest_bit(walk.blocks);
    walk.blocks ^= 1u << n;
    walk.stop = (32 * walk.word + n) * block_k;
    /* Only under PBS_OWN_MASK can a block reach beyond end. */
    const int32_t top = pbs_min_i32(walk.stop + block_k, span.end + BLOCK_N - 1);
    walk.key = top / BLOCK_N * BLOCK_N - BLOCK_N;
}

/* At the first tile. */
template <int BLOCK_N>
PBS_DEVICE void walk_start(key_walk &walk, const uint32_t *bits, const key_span &span,
                           int32_t block_k) {
    const bool own = span.own_begin < span.end;
    walk.stop = own ? span.own_begin : 0;
    walk.key = own ? pbs_ceil_div(span.end, BLOCK_N) * BLOCK_N : 0;
    walk.blocks = 0;
    walk.word = pbs_ceil_div(span.hist_end, 32);
    walk_next<BLOCK_N>(walk, bits, span, block_k);
}

/* ---- where they lie -------------------------------------------------------------------------- */
struct key_source {
    head_rows k, v;
};

/* Uniform over the threads, so it lives in shared memory and not in everybody's registers. */
struct attend_job {
    key_source own, history;
    key_walk walk;
    head_rows q, out;
    float *lse; /* of the sequence's first row, or NULL */
    const uint32_t *bits;
    key_span span;
    pbs_seq seq;
    attend_item item;
    int32_t first;  /* row of the block's first row, in the order of q_perm */
    int32_t usable; /* packed is NULL, or what this call needs */
};

/* Does the history of this head come from permuted rows? Sets usable. */
PBS_DEVICE bool reads_permuted(const attend_args &a, attend_job &job) {
    job.usable = 1;
    if (!a.packed) return false;
    const packed_header *header = reinterpret_cast<const packed_header *>(a.packed);
    const bool natural = header->call == a.natural_call;
    const bool permuted = a.takes_permuted && header->call == a.permuted.call;
    job.usable = header->magic == PBS_CUDA_PACKED_MAGIC && (natural || permuted);
    if (!job.usable || natural) return false;
    const int32_t *heads = reinterpret_cast<const int32_t *>(a.packed + a.permuted.heads);
    return heads[pbs_owner_head(&a.dims, job.item.hq)] != 0;
}

PBS_DEVICE key_source permuted_rows(const attend_args &a, attend_item i) {
    const int64_t head = static_cast<int64_t>(i.b) * a.dims.heads_p + pbs_owner_head(&a.dims, i.hq);
    const int64_t at = head * a.permuted.rows * a.dims.head_dim;
    uint16_t *k =
        reinterpret_cast<uint16_t *>(const_cast<unsigned char *>(a.packed) + a.permuted.k);
    uint16_t *v =
        reinterpret_cast<uint16_t *>(const_cast<unsigned char *>(a.packed) + a.permuted.v);
    return {{k + at, a.dims.head_dim}, {v + at, a.dims.head_dim}};
}

/* Row block `part` of a query block: rows [part * BLOCK_M, (part + 1) * BLOCK_M) of it. */
template <int BLOCK_M, int BLOCK_N>
PBS_DEVICE void make_job(const attend_args &a, int32_t item, int32_t part, attend_job &job) {
    const pbs_dims &d = a.dims;
    const attend_item i = item_at(d, item);
    const pbs_seq s = pbs_dims_seq_clamped(&d, i.b);
    const int32_t hk = i.hq / d.group;
    job.item = i;
    job.seq = s;
    job.first = i.m * d.block_q + part * BLOCK_M;
    job.span = span_of(a, s, i.m, job.first, BLOCK_M, BLOCK_N);
    job.bits = a.own == PBS_OWN_ALL ? nullptr : bits_of(a, i);
    job.q = rows_of(a.q, i.b, i.hq, s.q_start);
    job.out = rows_of(a.out, i.b, i.hq, s.q_start);
    job.lse = reinterpret_cast<float *>(pbs_view_at(&a.lse, i.b, i.hq, s.q_start));
    job.own = {rows_of(a.k, i.b, hk, s.kv_start), rows_of(a.v, i.b, hk, s.kv_start)};
    job.history = reads_permuted(a, job) ? permuted_rows(a, i) : job.own;
    walk_start<BLOCK_N>(job.walk, job.bits, job.span, d.block_k);
    if (!job.usable) job.walk.key = -1;
}

/* Original index of row i of the block, relative to q_start; -1 if there is no such row. */
PBS_DEVICE int32_t original_row(const attend_args &a, const attend_job &job, int32_t i) {
    const int32_t row = job.first + i, q_len = job.seq.q_len;
    if (row >= q_len) return -1;
    if (!a.q_perm) return row;
    const int64_t head = static_cast<int64_t>(job.item.b) * a.dims.heads_q + job.item.hq;
    const int32_t original = a.q_perm[head * a.dims.max_q + row];
    return original >= 0 && original < q_len ? original : -1; /* no host has checked q_perm */
}

} // namespace pbs

#endif /* PBS_CUDA_ATTEND_CUH */
