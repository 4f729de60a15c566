/* SPDX-License-Identifier: Apache-2.0
 *
 * What a block of the emulated machine has on sm_90a beside machine.h: mbarriers, bulk copies,
 * register counts, clusters; shared by mbarrier.cc, tma.cc, wgmma.cc, wgmma_product.cc, cluster.cc.
 * A block that uses none of it pays nothing.
 */
#ifndef EMU_HOPPER_H
#define EMU_HOPPER_H

#include "hopper_ops.h"
#include "machine.h"
#include "tensor_host.h"

#include <deque>

namespace emu {

/* Its 8 bytes in shared memory hold a pattern, so that a store into them is seen at the next use.
 */
struct mbarrier {
    uint32_t offset;
    bool valid;
    int64_t count, pending, bytes; /* bytes: expected minus arrived */
    uint64_t phase;
    bool spoilt; /* a box that landed here found its destination written */
    wait_queue waiting;
};

/* A box on its way from shared to global memory. It is read no later than its thread's
 * wait_group.read returns, and written later still. */
struct bulk_store {
    thread *owner;
    tensor_box map;
    int32_t at[5];
    uint32_t from;
    bool read, written, changed, waited;
    std::vector<unsigned char> data; /* the source when the store was issued */
};

typedef std::vector<std::shared_ptr<bulk_store>> store_group;

/* The stores of one thread: not committed yet; committed groups, oldest first. */
struct store_queue {
    store_group open;
    std::deque<store_group> groups;
    wait_queue waiting;
};

struct wgmma_state; /* wgmma.cc */

struct hopper {
    bool used; /* by this block; the rest is from an earlier one if not */
    std::deque<mbarrier> barriers;
    int loads_in_flight;            /* boxes on their way into this block */
    int stores_in_flight;           /* boxes that have not been read yet */
    std::vector<uint16_t> unfenced; /* per 16 bytes: 1 + the thread whose store no fence followed */
    int unfenced_chunks;            /* of them */
    std::vector<std::vector<uint32_t>> stored; /* per thread: its entries in unfenced */
    std::vector<store_queue> stores;           /* per thread */
    std::shared_ptr<wgmma_state> wgmma;
    std::vector<int> registers; /* per warp: what each thread of it may use */
    int free_registers;         /* of the block's pool: per lane, so in the same unit */
    wait_queue register_waiting;
    /* Of the whole cluster, in its block of rank 0. */
    int cluster_arrived;
    uint64_t cluster_phase;
    wait_queue cluster_waiting;
    std::vector<uint64_t> cluster_arrivals; /* per thread of this block: phases it arrived for */
};

/* The block's state, fresh at the first use. */
hopper &hopper_of(block &b);
inline hopper &here90() { return hopper_of(*self().home); }

/* ---- mbarrier.cc ----------------------------------------------------------------------------- */
/* The barrier at this offset; none, or one that was overwritten, is an error of the caller's. */
mbarrier &mbarrier_at(block &b, const char *what, uint32_t offset);
void mbarrier_complete_bytes(block &b, mbarrier &m, uint32_t bytes);

/* ---- tma.cc ---------------------------------------------------------------------------------- */
/* The async proxy reads: bytes whose writer has not fenced are an error. */
void check_fenced(block &b, const char *what, uint32_t offset, uint32_t bytes);
void stores_thread_ended(thread &t);

/* ---- wgmma.cc -------------------------------------------------------------------------------- */
void wgmma_reset(hopper &h, const block &b);
void wgmma_thread_ended(hopper &h, const thread &t);

/* ---- wgmma_product.cc ------------------------------------------------------------------------ */
/* rows x 16 of k. K-major: to[row][k]; MN-major: to[k][row]. check: copies under way to them and
 * stores without a fence are errors of the caller's. */
void read_wgmma_operand(block &b, const char *name, uint64_t descriptor, bool mn_major,
                        uint32_t rows, uint16_t *to, bool check);
/* c[64, columns] = [c +] A B, operands as read_wgmma_operand gives them. */
void wgmma_product(const wgmma_operands &what, const uint16_t *a, const uint16_t *b, float *c);

/* ---- cluster.cc ------------------------------------------------------------------------------ */
/* The block of this rank in b's cluster; one that has ended, or never was, is an error. */
block &block_of_cluster(const char *what, const block &b, uint32_t rank);
/* An address of shared::cluster -> its block; the address becomes that of the block itself. */
block &block_at(const char *what, block &b, uint32_t &address);

} // namespace emu

#endif /* EMU_HOPPER_H */
