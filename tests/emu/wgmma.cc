/* SPDX-License-Identifier: Apache-2.0
 *
 * wgmma. Each thread of a warpgroup issues for itself and goes on; a multiplication is computed
 * when the 128th has issued it. From the issue to a thread's own wait its accumulators are
 * poisoned.
 *
 *  - results come as late as those of copies do: in LAZY when nothing else can run
 *  - accumulators that are no longer poison at the next wgmma on them or at the wait, or changed A
 *    registers: an error
 *  - operands in shared memory are read when the 128th thread issues and once more when the first
 *    thread has waited: a difference is an error, whatever the numbers
 *  - no wgmma after a wait without a wgmma.fence
 */
#include "hopper.h"

#include "cuda/descriptor.cuh"
#include "float16.h"

#include <algorithm>
#include <string.h>

namespace emu {

constexpr int THREADS = 128, ROWS = 64, STEP = 16, MAX_COLUMNS = 256;

/* Accumulators of a warpgroup from the first wgmma on them to the wait. */
struct chain {
    uint64_t first, last;      /* numbers of operations */
    int delivered;             /* threads that have their values */
    float *registers[THREADS]; /* from a thread's first issue until it has its values */
    float value[ROWS * MAX_COLUMNS];
};

struct operation {
    wgmma_operands what; /* as the first thread gave it */
    chain *on;
    int issued, waited; /* threads */
    bool compared;
    const uint32_t *a_registers[THREADS];
    uint16_t a[ROWS][STEP];         /* [row][k] */
    uint16_t b[STEP * MAX_COLUMNS]; /* chunks of 8 as they lie in shared memory */
};

struct warpgroup {
    /* Numbers of operations: of the oldest; below which all are computed, somebody waits for them,
     * the machine has let them finish. */
    uint64_t first, complete, wanted, finished;
    std::deque<std::unique_ptr<operation>> operations;
    std::vector<std::unique_ptr<chain>> chains;
    wait_queue waiting;
};

struct wgmma_thread {
    uint64_t issued, done; /* numbers of operations */
    bool fenced;
    std::deque<uint64_t> group_ends;
};

struct wgmma_state {
    std::vector<warpgroup> groups;
    std::vector<wgmma_thread> threads;
    std::vector<std::unique_ptr<operation>> spare_operations;
    std::vector<std::unique_ptr<chain>> spare_chains;
};

void wgmma_reset(hopper &h, const block &b) {
    if (!h.wgmma) h.wgmma = std::make_shared<wgmma_state>();
    wgmma_state &s = *h.wgmma;
    s.groups = std::vector<warpgroup>(b.threads.size() / THREADS);
    s.threads.assign(b.threads.size(), wgmma_thread());
}

namespace {

template <class T> std::unique_ptr<T> take(std::vector<std::unique_ptr<T>> &spare) {
    if (spare.empty()) return std::unique_ptr<T>(new T);
    std::unique_ptr<T> one = std::move(spare.back());
    spare.pop_back();
    return one;
}

struct caller {
    thread &t;
    wgmma_state &s;
    warpgroup &g;
    wgmma_thread &w;
    int index; /* in the warpgroup */
};

caller caller_of(const char *name) {
    thread &t = self();
    wgmma_state &s = *here90().wgmma;
    const size_t group = static_cast<size_t>(t.number / THREADS);
    if (group >= s.groups.size()) fail("%s: the warpgroup has less than 128 threads", name);
    return {t, s, s.groups[group], s.threads[static_cast<size_t>(t.number)], t.number % THREADS};
}

constexpr const char *NAME = "wgmma";

void read_operands(block &b, const wgmma_operands &what, uint16_t *a, uint16_t *bs, bool check) {
    if (!what.a_in_registers) read_wgmma_operand(b, "wgmma (A)", what.a, false, ROWS, a, check);
    read_wgmma_operand(b, "wgmma (B)", what.b, what.transpose_b,
                       static_cast<uint32_t>(what.columns), bs, check);
}

void compute(block &home, operation &o) {
    read_operands(home, o.what, &o.a[0][0], o.b, true);
    wgmma_product(o.what, &o.a[0][0], o.b, o.on->value);
}

/* ---- registers ------------------------------------------------------------------------------ */
float *value_at(chain &c, int columns, int index, int e) {
    const uint32_t t = static_cast<uint32_t>(index), i = static_cast<uint32_t>(e);
    return &c.value[pbs::accumulator_row(t, i) * static_cast<uint32_t>(columns) +
                    pbs::accumulator_column(t, i)];
}

/* Accumulators of one thread, all in flight. */
const std::vector<uint32_t> POISONED(MAX_COLUMNS / 2, POISON);

void poison(float *d, int count) {
    memcpy(d, POISONED.data(), sizeof *d * static_cast<size_t>(count));
}

void check_poison(const float *d, int count) {
    if (!memcmp(d, POISONED.data(), sizeof *d * static_cast<size_t>(count))) return;
    for (int i = 0; i < count; i++)
        if (float_bits(d[i]) != POISON)
            fail("wgmma: accumulator %d was touched while a wgmma on it is in flight", i);
}

void check_a_registers(const operation &o, int index) {
    const uint32_t t = static_cast<uint32_t>(index);
    for (uint32_t i = 0; i < 8; i++)
        if (o.a[pbs::operand_row(t, i)][pbs::operand_column(t, i)] !=
            static_cast<uint16_t>(o.a_registers[index][i / 2] >> 16 * (i % 2)))
            fail("wgmma: A register %u was changed while the wgmma that reads it is in flight",
                 i / 2);
}

/* The chain that this thread's d belongs to. */
chain *chain_of(warpgroup &g, int index, const float *d) {
    for (auto &c : g.chains)
        if (c->registers[index] == d) return c.get();
    return nullptr;
}

/* ---- issue ---------------------------------------------------------------------------------- */
bool same(const wgmma_operands &x, const wgmma_operands &y) {
    return x.columns == y.columns && x.is_bf16 == y.is_bf16 && x.transpose_b == y.transpose_b &&
           x.accumulate == y.accumulate && x.a_in_registers == y.a_in_registers && x.a == y.a &&
           x.b == y.b;
}

/* The first thread to issue number n. */
operation &new_operation(caller &me, uint64_t n, const wgmma_operands &what, const float *d) {
    chain *on = chain_of(me.g, me.index, d);
    if (on && on->delivered) fail("wgmma: threads of the warpgroup wait at different places");
    if (!on) {
        me.g.chains.push_back(take(me.s.spare_chains));
        on = me.g.chains.back().get();
        on->first = n;
        on->delivered = 0;
        memset(on->registers, 0, sizeof on->registers);
    }
    on->last = n;
    me.g.operations.push_back(take(me.s.spare_operations));
    operation &o = *me.g.operations.back();
    o.what = what;
    o.on = on;
    o.issued = o.waited = 0;
    o.compared = false;
    return o;
}

void join_chain(const caller &me, uint64_t n, const operation &o, float *d) {
    chain &c = *o.on;
    const int count = o.what.columns / 2;
    if (c.registers[me.index] ? c.registers[me.index] != d
                              : c.first != n || chain_of(me.g, me.index, d))
        fail("wgmma: the thread's accumulators are others than those of its warpgroup");
    if (c.registers[me.index]) {
        check_poison(d, count);
        return;
    }
    c.registers[me.index] = d;
    if (o.what.accumulate)
        for (int e = 0; e < count; e++) *value_at(c, o.what.columns, me.index, e) = d[e];
    poison(d, count);
}

} // namespace

void wgmma_fence() { caller_of("wgmma.fence").w.fenced = true; }

void wgmma_issue(const wgmma_operands &what, float *d, const uint32_t *a) {
    caller me = caller_of(NAME);
    if (!me.w.fenced) fail("wgmma without a wgmma.fence since the start or the last wait");
    const uint64_t n = me.w.issued++;
    const bool is_new = n == me.g.first + me.g.operations.size();
    operation &o = is_new ? new_operation(me, n, what, d)
                          : *me.g.operations[static_cast<size_t>(n - me.g.first)];
    if (!same(o.what, what))
        fail("wgmma: another shape or descriptor than other threads of the warpgroup have");
    join_chain(me, n, o, d);
    o.a_registers[me.index] = a;
    const uint32_t t = static_cast<uint32_t>(me.index);
    for (uint32_t i = 0; what.a_in_registers && i < 8; i++)
        o.a[pbs::operand_row(t, i)][pbs::operand_column(t, i)] =
            static_cast<uint16_t>(a[i / 2] >> 16 * (i % 2));
    if (++o.issued < THREADS) return;
    compute(*me.t.home, o);
    me.g.complete = n + 1;
    wake_all(me.g.waiting);
}

void wgmma_commit() {
    caller me = caller_of("wgmma.commit_group");
    me.w.group_ends.push_back(me.w.issued);
}

/* ---- wait ----------------------------------------------------------------------------------- */
static std::string wait_state(const thread &t) {
    const warpgroup &g = *static_cast<const warpgroup *>(t.waits.object);
    const size_t next = static_cast<size_t>(g.complete - g.first);
    return format("%d of 128 threads have issued wgmma %llu",
                  next < g.operations.size() ? g.operations[next]->issued : 0,
                  static_cast<unsigned long long>(g.complete));
}

namespace {

struct finish_event : event {
    warpgroup *group;
    uint64_t end;

    bool wanted() const override { return true; }
    void happen() override {
        group->finished = std::max(group->finished, end);
        wake_all(group->waiting);
    }
};

} // namespace

/* The first thread behind the wait: were the operands left alone? */
static void compare_operands(block &home, operation &o) {
    uint16_t a[ROWS * STEP], b[STEP * MAX_COLUMNS];
    read_operands(home, o.what, a, b, false);
    if (!o.what.a_in_registers && memcmp(a, o.a, sizeof o.a))
        fail("wgmma: operand A changed between issue and wait");
    if (memcmp(b, o.b, sizeof *b * static_cast<size_t>(STEP * o.what.columns)))
        fail("wgmma: operand B changed between issue and wait");
    o.compared = true;
}

static void deliver(caller &me, uint64_t end) {
    for (uint64_t n = me.w.done; n < end; n++) {
        operation &o = *me.g.operations[static_cast<size_t>(n - me.g.first)];
        if (!o.compared) compare_operands(*me.t.home, o);
        if (o.what.a_in_registers) check_a_registers(o, me.index);
        chain &c = *o.on;
        o.waited++;
        float *d = c.registers[me.index];
        if (n < c.last || !d) continue;
        const int count = o.what.columns / 2;
        check_poison(d, count);
        for (int e = 0; e < count; e++) d[e] = *value_at(c, o.what.columns, me.index, e);
        c.registers[me.index] = nullptr;
        c.delivered++;
    }
    me.w.done = end;
}

/* What all 128 threads have waited for may be used again. */
static void retire(caller &me) {
    warpgroup &g = me.g;
    while (!g.operations.empty() && g.operations.front()->waited == THREADS) {
        me.s.spare_operations.push_back(std::move(g.operations.front()));
        g.operations.pop_front();
        g.first++;
    }
    for (size_t i = 0; i < g.chains.size(); i++) {
        if (g.chains[i]->delivered < THREADS) continue;
        me.s.spare_chains.push_back(std::move(g.chains[i]));
        g.chains.erase(g.chains.begin() + static_cast<ptrdiff_t>(i--));
    }
}

void wgmma_wait(int pending) {
    caller me = caller_of("wgmma.wait_group");
    me.w.fenced = false;
    uint64_t end = me.w.done;
    while (me.w.group_ends.size() > static_cast<size_t>(pending)) {
        end = me.w.group_ends.front();
        me.w.group_ends.pop_front();
    }
    while (me.g.complete < end) wait_in(me.g.waiting, {"wgmma.wait_group", wait_state, &me.g, 0});
    if (me.g.wanted < end) {
        me.g.wanted = end;
        auto e = std::make_unique<finish_event>();
        e->group = &me.g;
        e->end = end;
        post(std::move(e));
    }
    while (me.g.finished < end) wait_in(me.g.waiting, {"wgmma.wait_group", wait_state, &me.g, 0});
    deliver(me, end);
    retire(me);
}

void wgmma_thread_ended(hopper &h, const thread &t) {
    const wgmma_thread &w = h.wgmma->threads[static_cast<size_t>(t.number)];
    if (w.done < w.issued)
        fail("the thread ends with %llu wgmma that nobody waited for",
             static_cast<unsigned long long>(w.issued - w.done));
}

} // namespace emu
