/* SPDX-License-Identifier: Apache-2.0
 *
 * What happens by itself: cp.async, and the queue of events for larger copies.
 *
 * A copy poisons its destination when it is issued. It lands, in LAZY, when its own thread waits
 * for it; in RANDOM, three of four land earlier, at a random step; in EAGER, at once. Bytes in
 * flight that a ptx:: function touches, or that have been written when the copy lands, are an
 * error.
 */
#include "machine.h"

#include <string.h>

namespace emu {

void async_begin(machine &m) {
    m.copies.clear();
    m.free_copies.clear();
    m.loose_copies.clear();
    m.loose_events.clear();
    m.late_events.clear();
}

/* ---- cp.async -------------------------------------------------------------------------------- */
constexpr uint32_t CHUNK = 16;

static uint16_t &flight_mark(const copy &c) { return c.owner->home->in_flight[c.to / CHUNK]; }

static void land(machine &m, copy &c) {
    block &home = *c.owner->home;
    unsigned char *to = home.shared + c.to;
    for (uint32_t i = 0; i < CHUNK; i += 4)
        if (memcmp(to + i, &POISON, 4))
            fail_as(*c.owner, "cp.async to byte %u: the destination was written in flight",
                    c.to + i);
    memset(to, 0, CHUNK);
    if (c.bytes) memcpy(to, c.from, c.bytes);
    flight_mark(c) = 0;
    home.copies_in_flight--;
    c.landed = true;
    if (c.loose < 0) return;
    const uint32_t last = m.loose_copies.back();
    m.loose_copies[static_cast<size_t>(c.loose)] = last;
    m.copies[last].loose = c.loose;
    m.loose_copies.pop_back();
    c.loose = -1;
}

void check_in_flight(const thread &t, const char *what, uint32_t offset, uint32_t bytes) {
    const block &home = *t.home;
    if (!home.copies_in_flight) return;
    for (uint32_t i = offset / CHUNK; i <= (offset + bytes - 1) / CHUNK; i++)
        if (home.in_flight[i])
            fail_as(t, "%s: byte %u of shared memory: a %s of thread %d is under way to it", what,
                    i * CHUNK, home.in_flight[i] & BULK_COPY ? "bulk copy" : "cp.async",
                    (home.in_flight[i] & ~BULK_COPY) - 1);
}

void cp_async(uint32_t to, const void *from, uint32_t bytes) {
    thread &t = self();
    machine &m = *the_machine;
    const uint32_t offset = shared_offset(t, "cp.async", to, CHUNK, CHUNK);
    if (reinterpret_cast<uintptr_t>(from) % CHUNK)
        fail("cp.async: the source %p is not a multiple of 16", from);
    if (bytes > CHUNK) fail("cp.async: %u of 16 bytes to be read", bytes);
    check_in_flight(t, "cp.async", offset, CHUNK);
    for (uint32_t i = 0; i < CHUNK; i += 4) memcpy(t.home->shared + offset + i, &POISON, 4);

    uint32_t index = static_cast<uint32_t>(m.copies.size());
    if (m.free_copies.empty()) {
        m.copies.emplace_back();
    } else {
        index = m.free_copies.back();
        m.free_copies.pop_back();
    }
    copy &c = m.copies[index];
    c = {&t, from, offset, bytes, false, -1};
    t.copies.issued.push_back(index);
    flight_mark(c) = static_cast<uint16_t>(t.number + 1);
    t.home->copies_in_flight++;
    if (m.delivery == EAGER) {
        land(m, c);
    } else if (m.delivery == RANDOM && next_random(m) % 4) {
        c.loose = static_cast<int64_t>(m.loose_copies.size());
        m.loose_copies.push_back(index);
    }
}

void cp_async_commit() {
    copy_queue &q = self().copies;
    q.group_ends.push_back(static_cast<uint32_t>(q.issued.size()));
}

void cp_async_wait(int pending) {
    machine &m = *the_machine;
    copy_queue &q = self().copies;
    const ptrdiff_t groups = static_cast<ptrdiff_t>(q.group_ends.size()) - pending;
    if (groups <= 0) return;
    const uint32_t end = q.group_ends[static_cast<size_t>(groups) - 1];
    for (uint32_t i = 0; i < end; i++) {
        copy &c = m.copies[q.issued[i]];
        if (!c.landed) land(m, c);
        m.free_copies.push_back(q.issued[i]);
    }
    q.issued.erase(q.issued.begin(), q.issued.begin() + end);
    q.group_ends.erase(q.group_ends.begin(), q.group_ends.begin() + groups);
    for (uint32_t &other : q.group_ends) other -= end;
}

void check_copies_waited(thread &t) {
    if (!t.copies.issued.empty())
        fail("the thread ends with %zu cp.async that nobody waited for", t.copies.issued.size());
}

/* ---- events ---------------------------------------------------------------------------------- */
void post(std::unique_ptr<event> e) {
    machine &m = *the_machine;
    if (m.delivery == EAGER)
        e->happen();
    else if (m.delivery == RANDOM && next_random(m) % 4)
        m.loose_events.push_back(std::move(e));
    else
        m.late_events.push_back(std::move(e));
}

/* Takes the i-th event out of the list first: it may post others. */
static void happen(std::vector<std::unique_ptr<event>> &list, size_t i) {
    std::unique_ptr<event> e = std::move(list[i]);
    list.erase(list.begin() + static_cast<ptrdiff_t>(i));
    e->happen();
}

void async_step(machine &m) {
    if (m.loose_copies.empty() && m.loose_events.empty()) return;
    const uint64_t random = next_random(m);
    if (!m.loose_copies.empty() && random >> 63)
        land(m, m.copies[m.loose_copies[(random & 0xffffffff) % m.loose_copies.size()]]);
    if (!m.loose_events.empty() && (random >> 32) % 64 == 0)
        happen(m.loose_events, (random & 0xffffffff) % m.loose_events.size());
}

bool async_idle(machine &m) {
    for (auto *list : {&m.late_events, &m.loose_events})
        for (size_t i = 0; i < list->size(); i++)
            if ((*list)[i]->wanted()) {
                happen(*list, i);
                return true;
            }
    for (auto *list : {&m.late_events, &m.loose_events})
        if (!list->empty()) {
            happen(*list, 0);
            return true;
        }
    return false;
}

} // namespace emu
