/* SPDX-License-Identifier: Apache-2.0
 *
 * The producer of attend_sm90.cuh: one warp. It takes row blocks, walks the bits of each and keeps
 * the copy engine busy; consumers never see a list.
 *
 * All 32 lanes walk, so that they agree without a word; lane 0 alone waits for stages, writes what
 * the consumers read and issues the copies.
 */
#ifndef PBS_CUDA_ATTEND_SM90_LOAD_CUH
#define PBS_CUDA_ATTEND_SM90_LOAD_CUH

#include "attend_sm90_plan.cuh"

namespace pbs {
namespace sm90 {

template <class S> struct producer {
    const arguments &a;
    plan<S> &shared;
    ring<S::Q_STAGES> q;
    ring<S::KV_STAGES> k, v;
    uint32_t landed; /* phase of v_landed */
    int lane;
};

/* ---- copies ---------------------------------------------------------------------------------- */
/* A tile, chunk by chunk; what lies outside the tensor is zeros. One thread. */
template <int ROWS, int D>
PBS_DEVICE void load(matrix<ROWS, D> &to, const tensor_map &map, uint64_t &barrier, int32_t row,
                     int32_t head, int32_t batch, uint64_t policy) {
    using tile = matrix<ROWS, D>;
    PBS_NO_UNROLL
    for (int c = 0; c < tile::CHUNKS; c++)
        ptx::tma_load(ptx::shared_address(to.element) + c * tile::CHUNK_BYTES, &map,
                      ptx::shared_address(&barrier), {c * tile::CHUNK, row, head, batch}, policy);
}

/* Where this row block's tiles lie; one thread. */
template <class S> PBS_DEVICE void find_sources(const arguments &a, row_block &block) {
    const attend_args &args = a.attend;
    const attend_item i = block.job.item;
    const int32_t owner = pbs_owner_head(&args.dims, i.hq), hk = i.hq / args.dims.group;
    block.own = {&a.map.original,
                 static_cast<int32_t>(block.job.seq.kv_start),
                 {coordinate(args.k, 1, hk), coordinate(args.v, 1, hk)},
                 {coordinate(args.k, 0, i.b), coordinate(args.v, 0, i.b)}};
    block.history = block.own;
    if (block.job.history.k.first != block.job.own.k.first)
        block.history = {&a.map.permuted, 0, {owner, owner}, {i.b, i.b}};
    if (!S::CORRECTED) return;
    const packed_header *header = reinterpret_cast<const packed_header *>(args.packed);
    const bool permuted = header && header->call != args.natural.call;
    const int32_t head = header ? owner : hk;
    block.means = {&a.map.means[permuted], 0, {head, head}, {i.b, i.b}};
}

template <class S> PBS_DEVICE const tile_source &source_of(const row_block &block, int32_t key) {
    if (S::CORRECTED && key < 0) return block.means;
    return key < block.job.span.own_begin ? block.history : block.own;
}

/* First row of the tile at `key`. */
template <class S> PBS_DEVICE int32_t row_of(const tile_source &from, int32_t key) {
    return S::CORRECTED && key < 0 ? mean_at(key) : from.first + key;
}

/* Rows of a tile that hold keys or means of this sequence, and not what lies behind it: padding,
 * another sequence, means that nobody wrote. K of those is masked, but 0 * V must not be NaN. */
template <class S>
PBS_DEVICE int32_t rows_that_count(const arguments &a, const row_block &block, int32_t key) {
    const attend_job &job = block.job;
    if (S::CORRECTED && key < 0) return job.mean_end - mean_at(key);
    /* Beyond the tensor there are zeros already. */
    if (job.seq.kv_start + job.seq.kv_len >= a.attend.dims.seqlen_k) return S::BLOCK_N;
    return job.seq.kv_len - key;
}

/* Zeros in rows [first, ROWS), by the whole warp. */
template <int ROWS, int D>
PBS_DEVICE void clear_rows(matrix<ROWS, D> &to, int32_t first, int lane) {
    using tile = matrix<ROWS, D>;
    const uint32_t zeros[4] = {0, 0, 0, 0};
    for (int c = 0; c < tile::CHUNKS; c++)
        for (uint32_t at = first * tile::WIDTH + 16 * lane; at < tile::CHUNK_BYTES; at += 16 * 32)
            ptx::st_shared_x4(ptx::shared_address(to.element) + c * tile::CHUNK_BYTES + at, zeros);
    ptx::fence_proxy_async();
    __syncwarp();
}

/* K of the tile at `key`, and what its consumers need to know besides. */
template <class S>
PBS_DEVICE void load_k(producer<S> &p, const row_block &block, int32_t key, int32_t next) {
    plan<S> &s = p.shared;
    if (p.lane == 0) {
        const tile_source &from = source_of<S>(block, key);
        wait(s.k_empty, p.k);
        step_word &step = s.step[p.k.stage];
        step.next = next;
        if (S::CORRECTED && key < 0) {
            PBS_UNROLL
            for (int w = 0; w < S::BLOCK_N / 32; w++) {
                const int32_t word = mean_at(key) / 32 + w;
                const uint32_t below = pbs_bits_below(block.job.mean_end, word);
                step.dropped[w] = below ? ~block.job.bits[word] & below : 0;
            }
        }
        uint64_t &full = s.k_full[p.k.stage];
        ptx::mbarrier_arrive_expect_tx(ptx::shared_address(&full), sizeof s.k[0].element);
        load(s.k[p.k.stage], from.map->k, full, row_of<S>(from, key), from.head[0], from.batch[0],
             ptx::policy_evict_last());
    }
    advance(p.k);
}

template <class S> PBS_DEVICE void load_v(producer<S> &p, const row_block &block, int32_t key) {
    plan<S> &s = p.shared;
    const int32_t count = rows_that_count<S>(p.a, block, key);
    const bool whole = count >= S::BLOCK_N;
    uint64_t &full = s.v_full[p.v.stage], &target = whole ? full : s.v_landed;
    if (p.lane == 0) {
        const tile_source &from = source_of<S>(block, key);
        wait(s.v_empty, p.v);
        ptx::mbarrier_arrive_expect_tx(ptx::shared_address(&target), sizeof s.v[0].element);
        load(s.v[p.v.stage], from.map->v, target, row_of<S>(from, key), from.head[1], from.batch[1],
             ptx::policy_evict_last());
    }
    if (!whole) { /* once in the last row blocks of a sequence */
        ptx::mbarrier_wait(ptx::shared_address(&s.v_landed), p.landed);
        p.landed ^= 1;
        clear_rows(s.v[p.v.stage], count, p.lane);
        if (p.lane == 0) arrive(s.v_full, p.v);
    }
    advance(p.v);
}

/* ---- row blocks ------------------------------------------------------------------------------ */
/* The block of row block `tile` and its Q; false: it has no rows. */
template <class S> PBS_DEVICE bool load_q(producer<S> &p, int32_t tile) {
    plan<S> &s = p.shared;
    const attend_args &a = p.a.attend;
    row_block &block = s.block[p.q.stage];
    if (p.lane == 0) {
        wait(s.q_empty, p.q);
        make_job<BLOCK_M, S::BLOCK_N, S::CORRECTED>(a, a.order[tile / p.a.parts], tile % p.a.parts,
                                                    block.job);
        block.key = block.job.walk.key;
        find_sources<S>(p.a, block);
        block.no_more = 0;
    }
    __syncwarp();
    const attend_job &job = block.job;
    if (job.first >= job.seq.q_len) return false;
    if (p.lane == 0 && a.q_perm) {
        arrive(s.q_full, p.q); /* consumers gather it */
    } else if (p.lane == 0) {
        const int32_t row = static_cast<int32_t>(job.seq.q_start) + job.first;
        const int32_t head = coordinate(a.q, 1, job.item.hq),
                      batch = coordinate(a.q, 0, job.item.b);
        uint64_t &full = s.q_full[p.q.stage];
        ptx::mbarrier_arrive_expect_tx(ptx::shared_address(&full),
                                       CONSUMERS * sizeof s.q[0][0].element);
        PBS_UNROLL
        for (int g = 0; g < CONSUMERS; g++)
            load(s.q[p.q.stage][g], p.a.map.q, full, row + g * GROUP_ROWS, head, batch,
                 ptx::policy_evict_first());
    }
    return true;
}

/* The tile after the current one. */
template <class S>
PBS_DEVICE void walk_on(key_walk &walk, const attend_job &job, const attend_args &a) {
    if (S::CORRECTED && walk.key < WALK_END) {
        walk_means<S::BLOCK_N>(walk, job.bits, job.mean_end);
        return;
    }
    walk_next<S::BLOCK_N>(walk, job.bits, job.span, a.dims.block_k);
    if (S::CORRECTED) walk_to_means<S::BLOCK_N>(walk, job.bits, job.mean_end);
}

/* K one step ahead of V, as the consumers take them. */
template <class S> PBS_DEVICE void load_tiles(producer<S> &p, const row_block &block) {
    key_walk walk = block.job.walk;
    int32_t before = WALK_END;
    while (walk.key != WALK_END) {
        const int32_t key = walk.key;
        walk_on<S>(walk, block.job, p.a.attend);
        load_k(p, block, key, walk.key);
        if (before != WALK_END) load_v(p, block, before);
        before = key;
    }
    if (before != WALK_END) load_v(p, block, before);
}

/* The number of the next row block, asked for by lane 0 well before it is needed. */
template <class S> PBS_DEVICE int32_t take_row_block(const producer<S> &p, int32_t current) {
    if (!S::DYNAMIC) return current + static_cast<int32_t>(gridDim.x);
    return p.lane == 0 ? static_cast<int32_t>(gridDim.x) + atomicAdd(p.a.taken, 1) : 0;
}

/* ---- the role -------------------------------------------------------------------------------- */
template <class S> PBS_DEVICE void produce(const arguments &a, plan<S> &shared) {
    producer<S> p = {a,
                     shared,
                     ring_start<S::Q_STAGES>(true),
                     ring_start<S::KV_STAGES>(true),
                     ring_start<S::KV_STAGES>(true),
                     0,
                     static_cast<int>(threadIdx.x % 32)};
    if (p.lane == 0) {
        ptx::prefetch_tensor_map(&a.map.original.k);
        ptx::prefetch_tensor_map(&a.map.original.v);
        if (!a.attend.q_perm) {
            ptx::prefetch_tensor_map(&a.map.q);
            ptx::prefetch_tensor_map(&a.map.out);
        }
    }
    int32_t tile = static_cast<int32_t>(blockIdx.x);
    while (tile < a.row_blocks) {
        const int32_t next = take_row_block(p, tile);
        if (load_q(p, tile)) {
            load_tiles(p, shared.block[p.q.stage]);
            advance(p.q);
        }
        tile = __shfl_sync(0xffffffffu, next, 0);
    }
    if (p.lane == 0) {
        wait(shared.q_empty, p.q);
        shared.block[p.q.stage].no_more = 1;
        arrive(shared.q_full, p.q);
    }
}

} // namespace sm90
} // namespace pbs

#endif /* PBS_CUDA_ATTEND_SM90_LOAD_CUH */
