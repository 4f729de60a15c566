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
 * maximum after the first tile, and the masked tiles are the first ones of every walk. With a
 * correction the tiles of means come last, BLOCK_N block means to a tile, those alone in which a
 * block of history is not listed: by then every row knows its maximum but for a few blocks' means,
 * and the walk over keys has nothing to know of them.
 */
#ifndef PBS_CUDA_ATTEND_CUH
#define PBS_CUDA_ATTEND_CUH

#include "../core/bits.h"
#include "kernel.cuh"
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
    packed_layout natural;       /* of one that does not */
    int32_t takes_permuted;      /* the own mode reads permuted history, and the buffer has room */
    uint16_t *k_mean, *v_mean;   /* [B, Hk, Tk, D], for a correction without packed */
    float mean_bias;             /* log2 of block_k: a mean stands for so many keys */
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

/* Key blocks [0, n) that every row of query block m sees whole and outside the own span: those that
 * are corrected where their bit is not set. */
PBS_DEVICE int32_t mean_end_of(const attend_args &a, const pbs_seq &s, int32_t m,
                               const key_span &span) {
    const pbs_dims &d = a.dims;
    if (a.own != PBS_OWN_MASK) return span.hist_end;
    return pbs_floor_to(s.q_offset + m * d.block_q + 1, d.block_k) / d.block_k;
}

/* ---- in which order -------------------------------------------------------------------------- */
/* Where a walk is. Below WALK_END: at the tile of means from mean_at(key) on. */
enum : int32_t { WALK_END = -1 };
PBS_DEVICE int32_t key_of_mean(int32_t mean) { return INT32_MIN + mean; }
PBS_DEVICE int32_t mean_at(int32_t key) { return key - INT32_MIN; }

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
            walk.key = walk.stop = WALK_END;
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

/* The next tile of means below word walk.word of the bits, if it has a block that is not listed. */
template <int BLOCK_N>
PBS_DEVICE void walk_means(key_walk &walk, const uint32_t *bits, int32_t mean_end) {
    static_assert(BLOCK_N % 32 == 0, "a tile of means is whole words of bits");
    constexpr int WORDS = BLOCK_N / 32;
    while (walk.word > 0) {
        walk.word--;
        if (!(~bits[walk.word] & pbs_bits_below(mean_end, walk.word))) continue;
        walk.word -= walk.word % WORDS;
        walk.key = key_of_mean(32 * walk.word);
        return;
    }
    walk.key = WALK_END;
}

/* The first one, when there are no more keys. */
template <int BLOCK_N>
PBS_DEVICE void walk_to_means(key_walk &walk, const uint32_t *bits, int32_t mean_end) {
    if (walk.key != WALK_END) return;
    walk.word = pbs_ceil_div(mean_end, 32);
    walk_means<BLOCK_N>(walk, bits, mean_end);
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
    /* For a correction: */
    key_source means;
    int32_t mean_end; /* key blocks [0, n) may be corrected */
};

/* Does the history of this head come from permuted rows? Sets usable. */
template <bool CORRECTED> PBS_DEVICE bool reads_permuted(const attend_args &a, attend_job &job) {
    job.usable = 1;
    if (!a.packed) return false;
    const packed_header *header = reinterpret_cast<const packed_header *>(a.packed);
    const bool natural = header->call == a.natural.call;
    const bool permuted = a.takes_permuted && header->call == a.permuted.call;
    job.usable = header->magic == PBS_CUDA_PACKED_MAGIC && (natural || permuted);
    if (CORRECTED && header->means != 1) job.usable = 0;
    if (!job.usable || natural) return false;
    const int32_t *heads = reinterpret_cast<const int32_t *>(a.packed + a.permuted.heads);
    return heads[pbs_owner_head(&a.dims, job.item.hq)] != 0;
}

/* Rows of the owner of this head's permutation in two parts of the packed buffer, `rows` a head. */
PBS_DEVICE key_source packed_rows(const attend_args &a, attend_item i, int64_t k_part,
                                  int64_t v_part, int32_t rows) {
    const int64_t head = static_cast<int64_t>(i.b) * a.dims.heads_p + pbs_owner_head(&a.dims, i.hq);
    const int64_t at = head * rows * a.dims.head_dim;
    uint16_t *k = reinterpret_cast<uint16_t *>(const_cast<unsigned char *>(a.packed) + k_part);
    uint16_t *v = reinterpret_cast<uint16_t *>(const_cast<unsigned char *>(a.packed) + v_part);
    return {{k + at, a.dims.head_dim}, {v + at, a.dims.head_dim}};
}

PBS_DEVICE key_source permuted_rows(const attend_args &a, attend_item i) {
    return packed_rows(a, i, a.permuted.k, a.permuted.v, a.permuted.rows);
}

/* Means of this head's key blocks, in the order of its history. */
PBS_DEVICE key_source means_of(const attend_args &a, attend_item i) {
    const pbs_dims &d = a.dims;
    if (a.packed) {
        const uint64_t call = reinterpret_cast<const packed_header *>(a.packed)->call;
        const packed_layout &l = call == a.natural.call ? a.natural : a.permuted;
        return packed_rows(a, i, l.k_mean, l.v_mean, d.blocks_k);
    }
    const int64_t head = static_cast<int64_t>(i.b) * d.heads_k + i.hq / d.group;
    const int64_t at = head * d.blocks_k * d.head_dim;
    return {{a.k_mean + at, d.head_dim}, {a.v_mean + at, d.head_dim}};
}

/* Row block `part` of a query block: rows [part * BLOCK_M, (part + 1) * BLOCK_M) of it. */
template <int BLOCK_M, int BLOCK_N, bool CORRECTED>
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
    job.history = reads_permuted<CORRECTED>(a, job) ? permuted_rows(a, i) : job.own;
    walk_start<BLOCK_N>(job.walk, job.bits, job.span, d.block_k);
    if (CORRECTED) {
        job.means = means_of(a, i);
        job.mean_end = mean_end_of(a, s, i.m, job.span);
        walk_to_means<BLOCK_N>(job.walk, job.bits, job.mean_end);
    }
    if (!job.usable) job.walk.key = WALK_END;
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
