/* SPDX-License-Identifier: Apache-2.0
 *
 * Collectives of a warp: the masked lanes meet, the last one computes for all. On the device lanes
 * of a warp may run apart between collectives, so they do here.
 */
#include "machine.h"

namespace emu {

static std::string meeting_state(const thread &t) {
    for (int i = 0; i < t.team->meetings; i++) {
        const meeting &m = t.team->open[i];
        if (m.arrived >> t.where.lane & 1)
            return format("mask %08x, arrived %08x", m.mask, m.arrived);
    }
    return "";
}

static void close_meeting(warp &w, meeting &m) {
    const uint32_t arrived = m.arrived;
    const collective &what = *m.what;
    m = w.open[--w.meetings];
    what.compute(w.args, arrived, w);
    if (arrived) make_ready(w.threads[__builtin_ctz(arrived)]);
    w.ready |= arrived;
}

[[noreturn]] static void diverged(const warp &w, const meeting &m, const collective &what,
                                  uint32_t mask) {
    fail("divergence: %s with mask %08x while lanes %08x of warp %d wait in %s with mask %08x",
         what.name, mask, m.arrived, w.number, m.what->name, m.mask);
}

void meet(const collective &what, uint32_t mask, void *args) {
    thread &t = self();
    warp &w = *t.team;
    const uint32_t me = 1u << t.where.lane;
    if (!(mask & me)) fail("%s: the lane is not in its own mask %08x", what.name, mask);
    if (what.aligned && (mask & ~w.live))
        fail("%s: lanes %08x of the warp have ended or never were", what.name, mask & ~w.live);
    meeting *mine = nullptr;
    for (int i = 0; i < w.meetings; i++) {
        meeting &m = w.open[i];
        if (m.mask == mask && m.what == &what)
            mine = &m;
        else if (m.mask & me && mask & m.arrived)
            diverged(w, m, what, mask); /* each side waits for the other */
    }
    if (!mine) {
        mine = &w.open[w.meetings++];
        *mine = {&what, mask, 0};
    }
    mine->arrived |= me;
    w.args[t.where.lane] = args;
    if (mine->arrived != (mask & w.live)) {
        wait_for({what.name, meeting_state, &what, mask});
        return;
    }
    close_meeting(w, *mine);
    /* The last lane goes on at once. */
    w.ready &= ~me;
    if (!w.ready)
        the_machine->ready_ranks[static_cast<size_t>(w.rank) / 64] &= ~(1ull << (w.rank % 64));
}

void lane_ended(warp &w, int lane) {
    w.live &= ~(1u << lane);
    for (int i = w.meetings - 1; i >= 0; i--) {
        meeting &m = w.open[i];
        if (m.what->aligned && m.mask >> lane & 1)
            fail("the lane ends while lanes %08x wait for it in %s", m.arrived, m.what->name);
        if (m.arrived == (m.mask & w.live)) close_meeting(w, m);
    }
}

/* ---- exchange of values ---------------------------------------------------------------------- */
namespace {

struct shuffle_args {
    uint64_t value;
    int source;
    uint64_t result;
};

/* A lane that does not take part gives rubbish, as on the device. */
void compute_shuffle(void *const *args, uint32_t lanes, const warp &) {
    for (uint32_t left = lanes; left; left &= left - 1) {
        shuffle_args &a = *static_cast<shuffle_args *>(args[__builtin_ctz(left)]);
        a.result = lanes >> a.source & 1 ? static_cast<shuffle_args *>(args[a.source])->value
                                         : POISON * 0x100000001ull;
    }
}

struct ballot_args {
    bool yes;
    unsigned result;
};

void compute_ballot(void *const *args, uint32_t lanes, const warp &) {
    unsigned votes = 0;
    for (uint32_t left = lanes; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        votes |= static_cast<unsigned>(static_cast<ballot_args *>(args[lane])->yes) << lane;
    }
    for (uint32_t left = lanes; left; left &= left - 1)
        static_cast<ballot_args *>(args[__builtin_ctz(left)])->result = votes;
}

struct match_args {
    uint64_t value;
    unsigned result;
};

void compute_match(void *const *args, uint32_t lanes, const warp &) {
    for (uint32_t left = lanes; left; left &= left - 1) {
        match_args &a = *static_cast<match_args *>(args[__builtin_ctz(left)]);
        a.result = 0;
        for (uint32_t other = lanes; other; other &= other - 1) {
            const int lane = __builtin_ctz(other);
            if (static_cast<match_args *>(args[lane])->value == a.value) a.result |= 1u << lane;
        }
    }
}

void compute_nothing(void *const *, uint32_t, const warp &) {}

/* Lanes meet by the address of the collective, and messages name it: one per word. */
const collective SHUFFLES[] = {{"__shfl_sync", false, compute_shuffle},
                               {"__shfl_xor_sync", false, compute_shuffle},
                               {"__shfl_up_sync", false, compute_shuffle},
                               {"__shfl_down_sync", false, compute_shuffle}};
const collective BALLOTS[] = {{"__ballot_sync", false, compute_ballot},
                              {"__any_sync", false, compute_ballot},
                              {"__all_sync", false, compute_ballot}};
const collective SYNC_WARP = {"__syncwarp", false, compute_nothing};
const collective MATCH = {"__match_any_sync", false, compute_match};

} // namespace

uint64_t shuffle(shuffle_kind kind, unsigned mask, uint64_t value, int source) {
    shuffle_args a = {value, source, 0};
    meet(SHUFFLES[static_cast<int>(kind)], mask, &a);
    return a.result;
}

unsigned ballot(ballot_kind kind, unsigned mask, bool yes) {
    ballot_args a = {yes, 0};
    meet(BALLOTS[static_cast<int>(kind)], mask, &a);
    return a.result;
}

void sync_warp(unsigned mask) { meet(SYNC_WARP, mask, nullptr); }

unsigned match(unsigned mask, uint64_t value) {
    match_args a = {value, 0};
    meet(MATCH, mask, &a);
    return a.result;
}

} // namespace emu
