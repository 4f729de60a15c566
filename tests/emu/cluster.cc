/* SPDX-License-Identifier: Apache-2.0
 *
 * Clusters, register counts, elect.sync; and the life of a block's sm_90a state.
 */
#include "hopper.h"

namespace emu {

constexpr uint32_t ALL = 0xffffffffu;
/* An address of shared::cluster: 1 + the rank in its top byte; 0 there: the block itself. */
constexpr int RANK_SHIFT = 24;

/* Registers that a thread has at launch: the file of 64K words shared out in steps of 8. */
static int registers_at_launch(size_t threads) {
    const size_t share = 65536 / ((threads + 31) / 32 * 32) / 8 * 8;
    return static_cast<int>(share < 256 ? share : 256);
}

/* ---- life of the state ----------------------------------------------------------------------- */
void hopper_begin(block &b) {
    if (b.sm90) b.sm90->used = false;
}

hopper &hopper_of(block &b) {
    if (b.sm90 && b.sm90->used) return *b.sm90;
    if (!b.sm90) b.sm90 = std::make_shared<hopper>();
    hopper &h = *b.sm90;
    const size_t threads = b.threads.size();
    h.used = true;
    h.barriers.clear();
    h.loads_in_flight = h.stores_in_flight = h.unfenced_chunks = 0;
    h.unfenced.assign((b.shared_bytes + 15) / 16, 0);
    h.stored.resize(threads);
    for (auto &list : h.stored) list.clear();
    h.stores.assign(threads, store_queue());
    h.registers.assign(b.warps.size(), registers_at_launch(threads));
    h.free_registers = 0;
    h.register_waiting = wait_queue();
    h.cluster_arrived = 0;
    h.cluster_phase = 0;
    h.cluster_waiting = wait_queue();
    h.cluster_arrivals.assign(threads, 0);
    wgmma_reset(h, b);
    return h;
}

/* ---- clusters -------------------------------------------------------------------------------- */
static block *find_block(const block &b, uint32_t rank) {
    machine &m = *the_machine;
    for (int i = 0; i < m.blocks_running; i++) {
        block &other = m.blocks[static_cast<size_t>(i)];
        if (other.number == b.number - b.rank + static_cast<int64_t>(rank)) return &other;
    }
    return nullptr;
}

block &block_of_cluster(const char *what, const block &b, uint32_t rank) {
    if (rank >= static_cast<uint32_t>(the_machine->shape.cluster))
        fail("%s: rank %u in a cluster of %d blocks", what, rank, the_machine->shape.cluster);
    block &other = *find_block(b, rank);
    if (!other.live)
        fail("%s: block %lld of the cluster has ended", what, static_cast<long long>(other.number));
    return other;
}

block &block_at(const char *what, block &b, uint32_t &address) {
    const uint32_t tag = address >> RANK_SHIFT;
    address &= (1u << RANK_SHIFT) - 1;
    return tag ? block_of_cluster(what, b, tag - 1) : b;
}

uint32_t cluster_rank() { return static_cast<uint32_t>(self().home->rank); }

uint32_t mapa(uint32_t address, uint32_t rank) {
    block_of_cluster("mapa", *self().home, rank);
    return (address & ((1u << RANK_SHIFT) - 1)) | (rank + 1) << RANK_SHIFT;
}

/* All that live have arrived: the next phase. */
static void complete_cluster(const block &b) {
    int live = 0;
    for (int rank = 0; rank < the_machine->shape.cluster; rank++)
        live += find_block(b, static_cast<uint32_t>(rank))->live;
    hopper &h = hopper_of(*find_block(b, 0));
    if (!h.cluster_arrived || h.cluster_arrived < live) return;
    h.cluster_arrived = 0;
    h.cluster_phase++;
    wake_all(h.cluster_waiting);
}

static std::string cluster_state(const thread &t) {
    return format("%d threads have arrived",
                  static_cast<const hopper *>(t.waits.object)->cluster_arrived);
}

void cluster_arrive() {
    thread &t = self();
    hopper &h = hopper_of(*find_block(*t.home, 0));
    uint64_t &mine = here90().cluster_arrivals[static_cast<size_t>(t.number)];
    if (mine > h.cluster_phase) fail("barrier.cluster.arrive: a second time in one phase");
    mine = h.cluster_phase + 1;
    h.cluster_arrived++;
    complete_cluster(*t.home);
}

void cluster_wait() {
    thread &t = self();
    hopper &h = hopper_of(*find_block(*t.home, 0));
    const uint64_t mine = here90().cluster_arrivals[static_cast<size_t>(t.number)];
    if (!mine) fail("barrier.cluster.wait: the thread has not arrived");
    while (h.cluster_phase < mine)
        wait_in(h.cluster_waiting, {"barrier.cluster.wait", cluster_state, &h, 0});
}

/* ---- elect, setmaxnreg ----------------------------------------------------------------------- */
namespace {

/* Any lane will do, and the same one each time. */
void compute_elect(void *const *args, uint32_t, const warp &w) {
    const uint64_t mixed = (the_machine->seed + 1) * 0x9E3779B97F4A7C15ull >> 32;
    const int chosen = static_cast<int>((mixed + static_cast<uint64_t>(w.number) * 7) % LANES);
    for (int lane = 0; lane < LANES; lane++) *static_cast<uint32_t *>(args[lane]) = lane == chosen;
}

int &registers_of(const warp &w) {
    return hopper_of(*w.home).registers[static_cast<size_t>(w.number)];
}

void compute_decrease(void *const *args, uint32_t, const warp &w) {
    hopper &h = hopper_of(*w.home);
    const int registers = *static_cast<int *>(args[0]);
    if (registers_of(w) < registers)
        fail("setmaxnreg.dec to %d: the warp has %d", registers, registers_of(w));
    h.free_registers += registers_of(w) - registers;
    registers_of(w) = registers;
    wake_all(h.register_waiting);
}

void compute_increase(void *const *args, uint32_t, const warp &w) {
    const int registers = *static_cast<int *>(args[0]);
    if (registers_of(w) > registers)
        fail("setmaxnreg.inc to %d: the warp has %d", registers, registers_of(w));
}

const collective ELECT = {"elect.sync", true, compute_elect};
const collective DECREASE = {"setmaxnreg.dec", true, compute_decrease};
const collective INCREASE = {"setmaxnreg.inc", true, compute_increase};

std::string register_state(const thread &t) {
    const hopper &h = *static_cast<const hopper *>(t.waits.object);
    return format("to %d, has %d; %d are free", static_cast<int>(t.waits.value),
                  h.registers[static_cast<size_t>(t.team->number)], h.free_registers);
}

} // namespace

uint32_t elect() {
    uint32_t chosen = 0;
    meet(ELECT, ALL, &chosen);
    return chosen;
}

void setmaxnreg(int registers, bool increase) {
    if (registers < 24 || registers > 256 || registers % 8)
        fail("setmaxnreg: %d registers; multiples of 8 from 24 to 256", registers);
    meet(increase ? INCREASE : DECREASE, ALL, &registers);
    if (!increase) return;
    thread &t = self();
    hopper &h = here90();
    int &mine = registers_of(*t.team);
    /* The first lane that finds enough takes them for its warp. */
    while (mine < registers) {
        if (h.free_registers >= registers - mine) {
            h.free_registers -= registers - mine;
            mine = registers;
            wake_all(h.register_waiting);
        } else {
            wait_in(h.register_waiting,
                    {"setmaxnreg.inc", register_state, &h, static_cast<uint64_t>(registers)});
        }
    }
}

/* ---- the end of a thread --------------------------------------------------------------------- */
static void check_block_ends(const block &b, const hopper &h) {
    if (h.loads_in_flight)
        fail("the block ends while %d bulk copies are under way into it", h.loads_in_flight);
    for (size_t i = 0; i + 4 <= h.registers.size(); i += 4)
        for (size_t w = 1; w < 4; w++)
            if (h.registers[i] != h.registers[i + w])
                fail("setmaxnreg: warps of warpgroup %zu of block %lld have different counts",
                     i / 4, static_cast<long long>(b.number));
}

/* Before the thread counts as ended. */
void hopper_thread_ended(thread &t) {
    block &home = *t.home;
    if (!home.sm90 || !home.sm90->used) return;
    hopper &h = *home.sm90;
    stores_thread_ended(t);
    wgmma_thread_ended(h, t);
    if (home.live == 1) check_block_ends(home, h);
    if (the_machine->shape.cluster == 1) return;
    hopper &first = hopper_of(*find_block(home, 0));
    if (h.cluster_arrivals[static_cast<size_t>(t.number)] > first.cluster_phase)
        first.cluster_arrived--;
    home.live--;
    complete_cluster(home);
    home.live++;
}

} // namespace emu
