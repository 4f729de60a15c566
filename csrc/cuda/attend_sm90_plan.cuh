/* SPDX-License-Identifier: Apache-2.0
 *
 * What the roles of attend_sm90.cuh share: tiles as the copy engine writes and wgmma reads them,
 * the kernel's shared memory, its barriers and its arguments.
 *
 * A shape S names HEAD_DIM (of the tiles; head_dim is padded to it with zeros), BLOCK_N, KV_STAGES,
 * Q_STAGES, CORRECTED (does a walk end in tiles of means?), PING_PONG (groups take turns), DYNAMIC
 * (row blocks go to who asks first), SLACK (log2 units by which a row's maximum may grow before
 * what was summed under the old one is rescaled) and RESCALE_FIRST (O is rescaled while the next S
 * is under way, not after P V).
 */
#ifndef PBS_CUDA_ATTEND_SM90_PLAN_CUH
#define PBS_CUDA_ATTEND_SM90_PLAN_CUH

#include "attend.cuh"

namespace pbs {
namespace sm90 {

constexpr int CONSUMERS = 2;                    /* warpgroups that compute */
constexpr int GROUP_THREADS = 128;              /* of a warpgroup */
constexpr int GROUP_ROWS = 64;                  /* rows of one wgmma */
constexpr int BLOCK_M = CONSUMERS * GROUP_ROWS; /* a row block */
constexpr int THREADS = (1 + CONSUMERS) * GROUP_THREADS;

/* (1 + CONSUMERS) * 168 registers a lane are there at the launch: 56 + 2 * 224 of 504. */
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;

/* Named barriers; 0 is __syncthreads. Each is followed by one per consumer group. */
constexpr uint32_t GROUP_BARRIER = 1, TURN_BARRIER = GROUP_BARRIER + CONSUMERS;

/* ---- tiles ----------------------------------------------------------------------------------- */
/* ROWS rows of D elements, cut into chunks as wide as the swizzle: [chunk][row][CHUNK]. One box of
 * a tensor map is one chunk. D 96 is three chunks of 32: 64 does not divide it. */
template <int ROWS, int D> struct matrix {
    static constexpr swizzle MODE = D % 64 == 0 ? SWIZZLE_128B : SWIZZLE_64B;
    static constexpr uint32_t WIDTH = swizzle_width(MODE); /* bytes of a row of a chunk */
    static constexpr int CHUNK = WIDTH / 2;
    static constexpr int CHUNKS = D / CHUNK;
    static constexpr uint32_t CHUNK_BYTES = ROWS * WIDTH;
    static constexpr uint32_t EIGHT_ROWS = 8 * WIDTH; /* stride of a descriptor */
    alignas(1024) uint16_t element[ROWS * D];

    PBS_HD constexpr uint32_t offset(uint32_t row, uint32_t column) {
        return tile_offset(MODE, ROWS, row, column);
    }

    static_assert(D % CHUNK == 0, "whole chunks");
    static_assert(CHUNK_BYTES % swizzle_period(MODE) == 0, "chunks start where the pattern does");
};

/* ---- arguments ------------------------------------------------------------------------------- */
/* Tensors as (head_dim, row, head, batch); a box is one chunk of a tile. */
struct kv_maps {
    tensor_map k, v;
};

struct maps {
    tensor_map q, out;
    kv_maps original, permuted;
    kv_maps means[2]; /* of packed.cuh's natural and permuted layouts; without packed, the first */
};

struct arguments {
    attend_args attend;
    maps map;
    int32_t row_blocks; /* all there are: those of order[0], of order[1], ... */
    int32_t parts;      /* row blocks of a query block */
    int32_t *taken;     /* 0: row blocks given out beyond the first of every block of the grid */
};

/* Coordinate of a batch or head in a map: dimensions that views do not step are not there. */
PBS_DEVICE int32_t coordinate(const pbs_view &view, int dimension, int32_t at) {
    return view.stride[dimension] == 0 ? 0 : at;
}

/* ---- plan ------------------------------------------------------------------------------------ */
/* Where tiles of one kind lie: tile `key` starts at row first + key of its maps. */
struct tile_source {
    const kv_maps *map;
    int32_t first;
    int32_t head[2], batch[2]; /* coordinates in K's map and in V's */
};

/* A row block as its consumers see it, and where the producer finds its tiles. */
struct row_block {
    attend_job job;
    int32_t key;     /* of the first tile; attend_job's walk is the producer's */
    int32_t no_more; /* there is no row block: the kernel ends */
    tile_source own, history, means;
};

/* Beside the K tile of a stage. */
struct step_word {
    int32_t next;        /* key of the tile after this one, WALK_END: there is none */
    uint32_t dropped[4]; /* a tile of means: those that count */
};

template <class S> struct plan {
    matrix<GROUP_ROWS, S::HEAD_DIM> q[S::Q_STAGES][CONSUMERS]; /* in the end: out */
    matrix<S::BLOCK_N, S::HEAD_DIM> k[S::KV_STAGES];
    matrix<S::BLOCK_N, S::HEAD_DIM> v[S::KV_STAGES];
    row_block block[S::Q_STAGES]; /* comes and goes with Q */
    step_word step[S::KV_STAGES]; /* comes and goes with K */
    /* full: 1 arrival and the bytes of the tile; empty: one arrival of each consumer group. */
    uint64_t q_full[S::Q_STAGES], q_empty[S::Q_STAGES];
    uint64_t k_full[S::KV_STAGES], k_empty[S::KV_STAGES];
    uint64_t v_full[S::KV_STAGES], v_empty[S::KV_STAGES];
    uint64_t v_landed; /* a V tile that the producer corrects before it is full */

    static_assert(S::HEAD_DIM % 16 == 0 && S::BLOCK_N % 32 == 0, "steps of wgmma, words of bits");
    static_assert(S::BLOCK_N / 32 <= 4, "step_word::dropped");
    static_assert(S::KV_STAGES >= 2, "K of a step is loaded before V of the one before it");
};

constexpr size_t SHARED_LIMIT = 227 << 10; /* of a block on 9.0 */

/* A place in a ring of stages, and the parity of its phase. */
template <int STAGES> struct ring {
    int stage;
    uint32_t phase;
};

/* The producer's first round passes empty barriers: it waits for the phase before the first. */
template <int STAGES> PBS_DEVICE ring<STAGES> ring_start(bool producer) {
    return {0, producer ? 1u : 0u};
}

template <int STAGES> PBS_DEVICE void advance(ring<STAGES> &r) {
    if (++r.stage < STAGES) return;
    r.stage = 0;
    r.phase ^= 1;
}

template <int STAGES> PBS_DEVICE void wait(uint64_t (&barrier)[STAGES], const ring<STAGES> &at) {
    ptx::mbarrier_wait(ptx::shared_address(&barrier[at.stage]), at.phase);
}

template <int STAGES> PBS_DEVICE void arrive(uint64_t (&barrier)[STAGES], const ring<STAGES> &at) {
    ptx::mbarrier_arrive(ptx::shared_address(&barrier[at.stage]));
}

} // namespace sm90
} // namespace pbs

#endif /* PBS_CUDA_ATTEND_SM90_PLAN_CUH */
