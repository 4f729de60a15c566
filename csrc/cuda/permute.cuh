/* SPDX-License-Identifier: Apache-2.0
 *
 * permute, paper eq. 8, in one pass over a segment of keys: order it by score, then gather its rows
 * in that order into the packed buffer and into the means of its blocks (fp32 for select, rounded
 * to the dtype of the keys for attend's correction). K and V are read from memory once for all
 * heads that share them: those are neighbours in the grid. Bound by memory: every K and V row is
 * written once per head, 16 bytes a thread, whole rows a warp.
 *
 *   segment  [b, hk, segment, hp]      k_perm, packed rows and means, k_pool, v_pool, pool_len;
 *                                      the first block: fingerprint and heads of the packed buffer
 *
 * In prefill the same launch also scores the keys that it orders (score_permute.cuh).
 */
#ifndef PBS_CUDA_PERMUTE_CUH
#define PBS_CUDA_PERMUTE_CUH

#include "kernel.cuh"
#include "packed.cuh"
#include "rank.cuh"
#include "row_sums.cuh"

namespace pbs {

/* Rows of K and of V that a thread has under way: hides the memory's latency, and takes 80
 * registers a thread, so three blocks of a segment share an SM. */
constexpr int GATHER = 4;

/* Arguments of every kernel. Outputs that nobody wants are NULL. */
struct permute_run {
    pbs_view q, k, v;
    pbs_dims d;
    pbs_permute_mode mode;
    const float *score;           /* [B, Hp, Nk] */
    const int32_t *k_perm_in;     /* [B, Hp, Nk] */
    const int32_t *permute_heads; /* [Hp] */
    int32_t *k_perm;              /* [B, Hp, Nk] */
    int32_t *q_perm;              /* [B, Hq, Nq] */
    float *k_pool, *v_pool;       /* [B, Hp, Tk, D] */
    int32_t *pool_len;            /* [B, Tk] */
    packed_header *packed;
    packed_layout layout;
};

PBS_DEVICE bool head_on(const permute_run &run, int32_t hp) {
    return !run.permute_heads || run.permute_heads[hp] != 0;
}

/* By one block of threads. */
PBS_DEVICE void write_header(const permute_run &run) {
    int32_t *heads = reinterpret_cast<int32_t *>(run.packed + 1);
    for (int32_t hp = static_cast<int32_t>(threadIdx.x); hp < run.d.heads_p; hp += SUM_THREADS)
        heads[hp] = pbs_permutes_keys(run.mode) && head_on(run, hp);
    if (threadIdx.x) return;
    packed_header header = {};
    header.magic = PBS_CUDA_PACKED_MAGIC;
    header.call = run.layout.call;
    header.means = run.layout.k_mean != 0;
    *run.packed = header;
}

/* A segment of one head. */
struct segment_item {
    int32_t b, hk, hp;
    int64_t head; /* b * Hp + hp */
    int32_t first, end;
    bool moves; /* a complete segment, not the only one, of a head that is permuted */
};

struct segment_plan {
    uint32_t key[PBS_MAX_SEGMENT_SIZE];
    uint16_t order[PBS_MAX_SEGMENT_SIZE]; /* place in the new order -> place in the old one */
    partial_sums k, v;
};

PBS_DEVICE segment_item segment_item_of(const permute_run &run, int32_t index) {
    const pbs_dims &d = run.d;
    const int32_t each = d.heads_p / d.heads_k, segments = pbs_ceil_div(d.max_k, d.segment_size);
    segment_item item;
    const int32_t g = index % each;
    index /= each;
    item.first = index % segments * d.segment_size;
    index /= segments;
    item.hk = index % d.heads_k;
    item.b = index / d.heads_k;
    item.hp = item.hk * each + g;
    item.head = static_cast<int64_t>(item.b) * d.heads_p + item.hp;
    item.end = pbs_min_i32(item.first + d.segment_size, d.max_k);
    return item;
}

PBS_DEVICE bool is_moved(const permute_run &run, const segment_item &item, const pbs_seq &s) {
    return pbs_permutes_keys(run.mode) && head_on(run, item.hp) && s.kv_len > run.d.segment_size &&
           item.first + run.d.segment_size <= s.kv_len;
}

/* What a block of threads of a launch over segments has to do; the first writes the header. Returns
 * false, and nothing is left to do, where there are no keys. */
PBS_DEVICE bool start_segment(const permute_run &run, segment_item &item, pbs_seq &s) {
    if (run.packed && blockIdx.x == 0) write_header(run);
    if (run.d.max_k == 0) return false;
    item = segment_item_of(run, static_cast<int32_t>(blockIdx.x));
    s = pbs_dims_seq_clamped(&run.d, item.b);
    item.moves = is_moved(run, item, s);
    return true;
}

/* Scores of the segment -> key. */
PBS_DEVICE void read_keys(const permute_run &run, const segment_item &item, uint32_t *key) {
    const float *score = run.score + item.head * run.d.max_k + item.first;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < item.end - item.first; i += SUM_THREADS)
        key[i] = descending_key(score[i]);
    __syncthreads();
}

/* order[place] of the segment, and k_perm: by key, ascending. */
PBS_DEVICE void order_by_key(const permute_run &run, const segment_item &item,
                             segment_plan &shared) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x), count = item.end - item.first;
    int32_t *k_perm = run.k_perm ? run.k_perm + item.head * run.d.max_k + item.first : nullptr;
    for (int32_t i = thread; i < count; i += SUM_THREADS)
        shared.order[rank_of(shared.key, count, i)] = static_cast<uint16_t>(i);
    __syncthreads();
    for (int32_t i = thread; k_perm && i < count; i += SUM_THREADS)
        k_perm[i] = item.first + shared.order[i];
}

/* The same: as given, or natural. */
PBS_DEVICE void order_as_given(const permute_run &run, const segment_item &item,
                               segment_plan &shared) {
    const int64_t at = item.head * run.d.max_k + item.first;
    int32_t *k_perm = run.k_perm ? run.k_perm + at : nullptr;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < item.end - item.first;
         i += SUM_THREADS) {
        const int32_t given = item.moves ? run.k_perm_in[at + i] : item.first + i;
        /* Nobody has checked a given order: no row outside its segment is read whatever it says. */
        const int32_t key = pbs_min_i32(pbs_max_i32(given, item.first), item.end - 1);
        shared.order[i] = static_cast<uint16_t>(key - item.first);
        if (k_perm) k_perm[i] = given;
    }
    __syncthreads();
}

/* What a thread does with the rows of its segment; NULL = not wanted. */
struct gather_job {
    head_rows k, v;
    uint4 *packed_k, *packed_v; /* this head's row 0 */
    bool sums_v;
    row_team team;
    int32_t first;         /* key of the segment */
    const uint16_t *order; /* of the segment */
};

PBS_DEVICE uint4 *packed_rows(const permute_run &run, const segment_item &item, int64_t part) {
    unsigned char *base = reinterpret_cast<unsigned char *>(run.packed) + part;
    return reinterpret_cast<uint4 *>(base) + item.head * run.layout.rows * (run.d.head_dim / PIECE);
}

/* Row of block n in the part of the packed buffer that holds means; NULL without a correction. */
PBS_DEVICE uint16_t *mean_row(const permute_run &run, int64_t block, int64_t part) {
    if (!run.packed || !part) return nullptr;
    unsigned char *base = reinterpret_cast<unsigned char *>(run.packed) + part;
    return reinterpret_cast<uint16_t *>(base) + block * run.d.head_dim;
}

PBS_DEVICE bool packs_means(const permute_run &run) { return run.packed && run.layout.k_mean; }

/* Does anybody want sums of V? */
PBS_DEVICE bool sums_values(const permute_run &run) { return run.v_pool || packs_means(run); }

PBS_DEVICE gather_job gather_job_of(const permute_run &run, const segment_item &item,
                                    const pbs_seq &s, const segment_plan &shared) {
    const bool packs = run.packed && item.moves;
    gather_job job = {};
    job.k = rows_of(run.k, item.b, item.hk, s.kv_start);
    if (packs || sums_values(run)) job.v = rows_of(run.v, item.b, item.hk, s.kv_start);
    if (packs) job.packed_k = packed_rows(run, item, run.layout.k);
    if (packs) job.packed_v = packed_rows(run, item, run.layout.v);
    job.sums_v = sums_values(run);
    job.team = row_team_of(run.d.head_dim, static_cast<int32_t>(threadIdx.x));
    job.first = item.first;
    job.order = shared.order;
    return job;
}

/* Keys [at, at + count) of the new order: copies of their rows, and their sums. */
template <class T>
PBS_DEVICE void gather_block(const gather_job &job, int32_t at, int32_t count,
                             float (&k_sum)[PIECE], float (&v_sum)[PIECE]) {
    const row_team &team = job.team;
    const uint16_t *order = job.order + (at - job.first);
    if (team.row >= team.in_flight) return;
    for (int32_t row = team.row; row < count; row += GATHER * team.in_flight) {
        uint4 k_piece[GATHER], v_piece[GATHER];
        PBS_UNROLL
        for (int i = 0; i < GATHER; i++) {
            const int32_t r = row + i * team.in_flight;
            k_piece[i] = v_piece[i] = make_uint4(0, 0, 0, 0);
            if (r >= count) continue;
            const int64_t from = job.first + order[r];
            k_piece[i] = *piece_of(job.k, from, team.piece);
            if (job.v.first) v_piece[i] = *piece_of(job.v, from, team.piece);
        }
        PBS_UNROLL
        for (int i = 0; i < GATHER; i++) {
            const int32_t r = row + i * team.in_flight;
            add_piece<T>(k_sum, k_piece[i]);
            if (job.sums_v) add_piece<T>(v_sum, v_piece[i]);
            if (!job.packed_k || r >= count) continue;
            const int64_t to = static_cast<int64_t>(at + r) * team.pieces + team.piece;
            job.packed_k[to] = k_piece[i];
            job.packed_v[to] = v_piece[i];
        }
    }
}

/* Rows, means and pools of a segment whose order stands in shared memory. */
template <class T>
PBS_DEVICE void gather_segment(const permute_run &run, const segment_item &item, const pbs_seq &s,
                               segment_plan &shared) {
    const pbs_dims &d = run.d;
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    const gather_job job = gather_job_of(run, item, s, shared);
    const bool pools = run.k_pool || sums_values(run);
    for (int32_t at = item.first; at < item.end; at += d.block_k) {
        const int32_t n = at / d.block_k; /* key block */
        const int32_t end = pbs_min_i32(pbs_min_i32(at + d.block_k, item.end), s.kv_len);
        const int32_t count = pbs_max_i32(end - at, 0);
        if (run.pool_len && item.hp == 0 && thread == 0)
            run.pool_len[static_cast<int64_t>(item.b) * d.blocks_k + n] = count;
        float k_sum[PIECE] = {}, v_sum[PIECE] = {};
        if (job.packed_k || pools) gather_block<T>(job, at, count, k_sum, v_sum);
        if (!pools) continue;
        const float factor = count ? 1.0f / static_cast<float>(count) : 0.0f;
        const int64_t block = item.head * d.blocks_k + n, pool = block * d.head_dim;
        float *k_pool = run.k_pool ? run.k_pool + pool : nullptr;
        float *v_pool = run.v_pool ? run.v_pool + pool : nullptr;
        put_partial(shared.k, job.team, k_sum);
        if (job.sums_v) put_partial(shared.v, job.team, v_sum);
        __syncthreads();
        /* Up to head_dim 128, one half of the threads adds up K, the other V. */
        const int32_t other = (thread + SUM_THREADS / 2) % SUM_THREADS;
        add_partials<T>(shared.k, job.team, thread, factor, k_pool,
                        mean_row(run, block, run.layout.k_mean));
        if (job.sums_v)
            add_partials<T>(shared.v, job.team, other, factor, v_pool,
                            mean_row(run, block, run.layout.v_mean));
        __syncthreads(); /* the sums of the next block take their place */
    }
}

template <class T> PBS_KERNEL(SUM_THREADS, 3) permute_segment(const permute_run run) {
    PBS_SHARED(segment_plan, shared);
    begin_kernel();
    segment_item item;
    pbs_seq s;
    if (!start_segment(run, item, s)) return;
    if (item.moves && !run.k_perm_in) {
        read_keys(run, item, shared.key);
        order_by_key(run, item, shared);
    } else {
        order_as_given(run, item, shared);
    }
    gather_segment<T>(run, item, s, shared);
}

/* ---- drivers (permute.cu) -------------------------------------------------------------------- */
/* Arguments of a call, workspace included; refuses what is not aligned. */
pbs_status prepare(const pbs_permute_params *p, const pbs_dims *d, permute_run *run);

/* Blocks of a launch over segments: at least one, which writes the header. */
static inline int64_t segment_blocks(const permute_run &run) {
    const int64_t segments = pbs_ceil_div(run.d.max_k, run.d.segment_size);
    return static_cast<int64_t>(run.d.batch) * run.d.heads_p * (segments ? segments : 1);
}

} // namespace pbs

#endif /* PBS_CUDA_PERMUTE_CUH */
