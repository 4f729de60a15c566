/* SPDX-License-Identifier: Apache-2.0
 *
 * Launches, the order in which threads run, barriers, and the report of a deadlock.
 */
#include "hidden.h"
#include "machine.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

namespace emu {

__thread machine *the_machine __attribute__((tls_model("initial-exec")));

/* ---- options --------------------------------------------------------------------------------- */
namespace {

uint64_t environment(const char *name) {
    const char *text = getenv(name);
    return text ? strtoull(text, nullptr, 0) : 0;
}

std::atomic<uint64_t> option_seed{environment("PBS_EMU_SEED")};
std::atomic<int> option_delivery{static_cast<int>(environment("PBS_EMU_DELIVERY"))};

thread_local std::unique_ptr<machine> own_machine;

std::atomic<int64_t> launches{0};

} // namespace

extern "C" int64_t pbs_emu_launches(void) { return launches; }

extern "C" void pbs_emu_set(uint64_t seed, int delivery) {
    option_seed = seed;
    option_delivery = delivery;
}

/* ---- order ----------------------------------------------------------------------------------- */
/* xorshift64* */
uint64_t next_random(machine &m) {
    uint64_t x = m.random_state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    m.random_state = x;
    return x * 0x2545F4914F6CDD1Dull;
}

void make_ready(thread &t) {
    warp &w = *t.team;
    w.ready |= 1u << t.where.lane;
    the_machine->ready_ranks[static_cast<size_t>(w.rank) / 64] |= 1ull << (w.rank % 64);
}

static void reshuffle(machine &m) {
    for (size_t i = m.by_rank.size(); i > 1; i--)
        std::swap(m.by_rank[i - 1], m.by_rank[next_random(m) % i]);
    if (m.blocks_running > 1 && next_random(m) & 1) { /* one block may run far ahead of others */
        const uint64_t turn = next_random(m);
        const auto place = [&](const warp *w) {
            return (static_cast<uint64_t>(w->home->number) * 0x9E3779B97F4A7C15ull ^ turn) >> 32;
        };
        std::stable_sort(m.by_rank.begin(), m.by_rank.end(),
                         [&](const warp *a, const warp *b) { return place(a) < place(b); });
    }
    std::fill(m.ready_ranks.begin(), m.ready_ranks.end(), 0);
    for (size_t i = 0; i < m.by_rank.size(); i++) {
        m.by_rank[i]->rank = static_cast<int>(i);
        if (m.by_rank[i]->ready) m.ready_ranks[i / 64] |= 1ull << (i % 64);
    }
    m.lanes_descend = next_random(m) & 1;
    m.steps_to_reshuffle = 1 + static_cast<int>(next_random(m) % 511);
}

/* Who runs next; NULL: nobody can, and nothing is under way. */
static thread *next_thread(machine &m) {
    if (--m.steps_to_reshuffle == 0) reshuffle(m);
    async_step(m);
    do {
        for (size_t i = 0; i < m.ready_ranks.size(); i++) {
            if (!m.ready_ranks[i]) continue;
            const int bit = __builtin_ctzll(m.ready_ranks[i]);
            warp &w = *m.by_rank[i * 64 + static_cast<size_t>(bit)];
            const int lane = m.lanes_descend ? 31 - __builtin_clz(w.ready) : __builtin_ctz(w.ready);
            w.ready &= ~(1u << lane);
            if (!w.ready) m.ready_ranks[i] &= ~(1ull << bit);
            return &w.threads[lane];
        }
    } while (async_idle(m));
    return nullptr;
}

void stop() {
    thread &t = self();
    thread *next = next_thread(*the_machine);
    if (!next) leave_to_main(*the_machine);
    if (next != &t) switch_fiber(t, *next);
}

void wait_in(wait_queue &queue, const wait_reason &reason) {
    thread &t = self();
    t.next_waiter = queue.first;
    queue.first = &t;
    wait_for(reason);
}

void wake_all(wait_queue &queue) {
    thread *t = queue.first;
    queue.first = nullptr;
    for (; t; t = t->next_waiter) make_ready(*t);
}

/* ---- errors ---------------------------------------------------------------------------------- */
static std::string format_list(const char *text, va_list list) {
    char buffer[1000];
    vsnprintf(buffer, sizeof buffer, text, list);
    return buffer;
}

std::string format(const char *text, ...) {
    va_list list;
    va_start(list, text);
    std::string s = format_list(text, list);
    va_end(list);
    return s;
}

static void keep_error(const thread &t, const std::string &text) {
    machine &m = *the_machine;
    m.failed = true;
    m.error =
        format("%s: block %lld, thread %d (warp %d, lane %d): ", m.shape.name,
               static_cast<long long>(t.home->number), t.number, t.team->number, t.where.lane) +
        text;
}

void fail(const char *text, ...) {
    va_list list;
    va_start(list, text);
    keep_error(self(), format_list(text, list));
    va_end(list);
    leave_to_main(*the_machine);
}

void fail_as(const thread &culprit, const char *text, ...) {
    va_list list;
    va_start(list, text);
    keep_error(culprit, format_list(text, list));
    va_end(list);
    leave_to_main(*the_machine);
}

static std::string lane_list(uint32_t lanes) {
    std::string s;
    for (int i = 0; i < LANES; i++) {
        if (!(lanes >> i & 1)) continue;
        int last = i;
        while (last + 1 < LANES && lanes >> (last + 1) & 1) last++;
        s += format(s.empty() ? "%d" : ",%d", i);
        if (last > i) s += format("-%d", last);
        i = last;
    }
    return s;
}

static bool same_reason(const wait_reason &a, const wait_reason &b) {
    return a.what == b.what && a.object == b.object && a.value == b.value;
}

static std::string deadlock_report(const machine &m) {
    std::string s = format("%s: deadlock: nothing can run and no copy is under way", m.shape.name);
    for (int i = 0; i < m.blocks_running; i++) {
        const block &b = m.blocks[static_cast<size_t>(i)];
        for (const warp &w : b.warps) {
            uint32_t left = w.live;
            while (left) {
                const thread &t = w.threads[__builtin_ctz(left)];
                uint32_t together = 0;
                for (int lane = 0; lane < LANES; lane++)
                    if (left >> lane & 1 && same_reason(w.threads[lane].waits, t.waits))
                        together |= 1u << lane;
                left &= ~together;
                s += format("\n  block %lld warp %d lanes %s: %s", static_cast<long long>(b.number),
                            w.number, lane_list(together).c_str(), t.waits.what);
                if (t.waits.detail) s += " (" + t.waits.detail(t) + ")";
            }
        }
    }
    return s;
}

/* ---- barriers -------------------------------------------------------------------------------- */
static std::string barrier_state(const thread &t) {
    const barrier &b = *static_cast<const barrier *>(t.waits.object);
    return format("barrier %d: %d of %d threads have arrived", static_cast<int>(t.waits.value),
                  b.arrived, b.expected ? b.expected : t.home->live);
}

static void complete_if_full(block &home, barrier &b) {
    if (!b.arrived || b.arrived < (b.expected ? b.expected : home.live)) return;
    b.answer = b.yes;
    b.arrived = b.yes = 0;
    wake_all(b.waiting);
}

static barrier &arrive(int id, int threads) {
    block &home = *self().home;
    if (id < 0 || id > 15) fail("barrier %d: ids are 0 to 15", id);
    if (threads % LANES || threads < 0 || threads > static_cast<int>(home.threads.size()))
        fail("barrier %d: %d threads in a block of %d: not whole warps of it", id, threads,
             static_cast<int>(home.threads.size()));
    barrier &b = home.barriers[id];
    if (b.arrived && b.expected != threads)
        fail("barrier %d: %d threads here, %d for those that arrived before", id, threads,
             b.expected);
    b.expected = threads;
    b.arrived++;
    return b;
}

int barrier_sync(int id, int threads, bool yes) {
    block &home = *self().home;
    barrier &b = arrive(id, threads);
    b.yes += yes;
    if (b.arrived >= (threads ? threads : home.live))
        complete_if_full(home, b);
    else
        wait_in(b.waiting, {threads ? "bar.sync" : "__syncthreads", barrier_state, &b,
                            static_cast<uint64_t>(id)});
    return b.answer;
}

void barrier_arrive(int id, int threads) {
    if (threads == 0) fail("bar.arrive on barrier %d without a number of threads", id);
    complete_if_full(*self().home, arrive(id, threads));
}

/* ---- threads --------------------------------------------------------------------------------- */
void wait_for_launches() { self().waited = true; }

static void end_thread() {
    thread &t = self();
    machine &m = *the_machine;
    if (m.shape.overtakes && !t.waited)
        fail("it ends without a griddepcontrol.wait, in a launch that may overtake");
    check_copies_waited(t);
    hopper_thread_ended(t);
    t.home->live--;
    lane_ended(*t.team, t.where.lane);
    barrier &all = t.home->barriers[0];
    if (!all.expected && t.home->live) complete_if_full(*t.home, all);
    if (!t.home->live) check_edges(*t.home);
    thread *next = next_thread(m);
    if (!next) leave_to_main(m);
    leave_fiber(t, *next);
}

/* What a fiber runs. An exception stops here: it must not unwind into another fiber's frames, and
 * its handler is left before the switch, so that the C++ runtime forgets it. */
static void run_thread() {
    fiber_entered();
    machine &m = *the_machine;
    char thrown[200] = "";
    try {
        m.call(m.kernel);
    } catch (const std::exception &e) {
        snprintf(thrown, sizeof thrown, "exception: %s", e.what());
    } catch (...) {
        snprintf(thrown, sizeof thrown, "exception that is no std::exception");
    }
    if (*thrown) fail("%s", thrown);
    end_thread();
}

/* ---- blocks ---------------------------------------------------------------------------------- */
static void make_block(machine &m, block &b) {
    const int threads = m.shape.threads;
    b.threads.resize(static_cast<size_t>(threads));
    b.warps.resize(static_cast<size_t>((threads + LANES - 1) / LANES));
    b.shared_bytes = m.shape.shared;
}

static void start_block(machine &m, int index, int64_t number) {
    block &b = m.blocks[static_cast<size_t>(index)];
    const int threads = m.shape.threads;
    b.number = number;
    b.rank = static_cast<int>(number % m.shape.cluster);
    b.shared = map_shared(index, m.shape.shared);
    b.live = threads;
    b.copies_in_flight = 0;
    b.in_flight.assign((m.shape.shared + 15) / 16, 0);
    for (barrier &named : b.barriers) named = barrier();
    poison_shared(b);
    hopper_begin(b);
    for (size_t w = 0; w < b.warps.size(); w++) {
        const int lanes = std::min(LANES, threads - static_cast<int>(w) * LANES);
        warp &team = b.warps[w];
        team.home = &b;
        team.threads = &b.threads[w * LANES];
        team.number = static_cast<int>(w);
        team.live = team.ready = lanes == LANES ? ~0u : (1u << lanes) - 1;
        team.meetings = 0;
        m.by_rank.push_back(&team);
    }
    for (int i = 0; i < threads; i++) {
        thread &t = b.threads[static_cast<size_t>(i)];
        t.number = i;
        t.home = &b;
        t.waited = false;
        t.team = &b.warps[static_cast<size_t>(i / LANES)];
        t.where.thread = {static_cast<unsigned>(i), 0, 0};
        t.where.block = {static_cast<unsigned>(number), 0, 0};
        t.where.block_dim = {static_cast<unsigned>(threads), 1, 1};
        t.where.grid_dim = {static_cast<unsigned>(m.shape.blocks), 1, 1};
        t.where.lane = i % LANES;
        t.copies.issued.clear();
        t.copies.group_ends.clear();
        prepare_fiber(t, index * threads + i, run_thread);
    }
}

/* Runs the blocks that `start_block` made; false: an error or a deadlock. */
static bool run_wave(machine &m) {
    m.ready_ranks.assign((m.by_rank.size() + 63) / 64, 0);
    reshuffle(m);
    thread *first = next_thread(m);
    enter_fiber(m, *first);
    if (m.failed) return false;
    for (int i = 0; i < m.blocks_running; i++) {
        if (!m.blocks[static_cast<size_t>(i)].live) continue;
        m.error = deadlock_report(m);
        return false;
    }
    return true;
}

static const char *refuse(machine &m, const char *what, long long value) {
    m.error = format("%s: a launch of %s %lld", m.shape.name, what, value);
    return m.error.c_str();
}

const char *launch_grid(const launch_shape &shape, void (*call)(void *), void *kernel) {
    if (!own_machine) own_machine.reset(new machine());
    machine &m = *own_machine;
    if (here) fail("a kernel launches a kernel");
    the_machine = &m;
    m.shape = shape;
    m.call = call;
    m.kernel = kernel;
    if (shape.blocks < 1 || shape.blocks > INT32_MAX) return refuse(m, "blocks", shape.blocks);
    if (shape.threads < 1 || shape.threads > MAX_THREADS)
        return refuse(m, "threads", shape.threads);
    if (shape.shared > MAX_SHARED)
        return refuse(m, "bytes of shared memory", static_cast<long long>(shape.shared));
    if (shape.cluster < 1 || shape.cluster > 16 || shape.blocks % shape.cluster)
        return refuse(m, "clusters of", shape.cluster);

    m.seed = option_seed;
    m.delivery = option_delivery;
    if (m.delivery < LAZY || m.delivery > EAGER) return refuse(m, "delivery", m.delivery);

    m.failed = false;
    m.error.clear();
    m.random_state = (m.seed + 1) * 0x9E3779B97F4A7C15ull | 1;
    for (int i = 0; i < 4; i++) next_random(m);
    async_begin(m);
    catch_faults();

    /* Blocks of a grid run in any order; which is the seed's choice. */
    const bool last_first = next_random(m) & 1;
    const int together = shape.together ? shape.together : 1 + static_cast<int>(m.seed % 3);
    const int64_t wave = static_cast<int64_t>(shape.cluster) * together;
    m.blocks.resize(static_cast<size_t>(std::min(wave, shape.blocks)));
    for (block &b : m.blocks) make_block(m, b);
    const device_memory_visible visible;
    for (int64_t first = 0; first < shape.blocks; first += wave) {
        m.blocks_running = static_cast<int>(std::min(wave, shape.blocks - first));
        m.by_rank.clear();
        for (int i = 0; i < m.blocks_running; i++) {
            const int64_t n = first + i;
            start_block(m, i, last_first ? shape.blocks - 1 - n : n);
        }
        if (!run_wave(m)) return m.error.c_str();
    }
    launches++;
    return nullptr;
}

} // namespace emu
