/* SPDX-License-Identifier: Apache-2.0
 *
 * mbarrier: a phase ends when all arrivals and all expected bytes are in. What the manual leaves
 * undefined is an error: use before init, init of a live barrier, one arrival too many, a store
 * into the object.
 */
#include "hopper.h"

#include <string.h>

namespace emu {

constexpr uint64_t OBJECT = 0xFFFDB0B0FFFDB0B0ull;
constexpr int64_t LIMIT = (1 << 20) - 1; /* of arrivals and of bytes. 9.7.13.15.2 */

#define STATE_TEXT "mbarrier at byte %u: phase %llu, %lld of %lld arrivals missing, %lld bytes"
#define STATE_OF(m)                                                                              \
    (m).offset, static_cast<unsigned long long>((m).phase), static_cast<long long>((m).pending), \
        static_cast<long long>((m).count), static_cast<long long>((m).bytes)

static std::string wait_state(const thread &t) {
    const mbarrier &m = *static_cast<const mbarrier *>(t.waits.object);
    return format("parity %d; " STATE_TEXT, static_cast<int>(t.waits.value & 1), STATE_OF(m));
}

/* Without a string: fail() unwinds nothing. */
[[noreturn]] static void fail_at(const char *name, const char *what, const mbarrier &m) {
    fail("%s: %s: " STATE_TEXT, name, what, STATE_OF(m));
}

static mbarrier *find(hopper &h, uint32_t offset) {
    for (mbarrier &m : h.barriers)
        if (m.offset == offset) return &m;
    return nullptr;
}

mbarrier &mbarrier_at(block &b, const char *what, uint32_t offset) {
    mbarrier *m = find(hopper_of(b), offset);
    if (!m || !m->valid)
        fail("%s: the mbarrier at byte %u of block %lld is not initialised", what, offset,
             static_cast<long long>(b.number));
    if (memcmp(b.shared + offset, &OBJECT, sizeof OBJECT))
        fail("%s: the mbarrier at byte %u was overwritten", what, offset);
    return *m;
}

static void complete_if_over(mbarrier &m) {
    if (m.pending || m.bytes) return;
    m.phase++;
    m.pending = m.count;
    wake_all(m.waiting);
}

void mbarrier_complete_bytes(block &, mbarrier &m, uint32_t bytes) {
    m.bytes -= bytes;
    complete_if_over(m);
}

/* Whoever was waiting may run before the one that arrived goes on. */
static void perhaps_yield() {
    if (next_random(*the_machine) & 1) return;
    make_ready(self());
    wait_for({"ready", nullptr, nullptr, 0});
}

void mbarrier_init(uint32_t address, uint32_t count) {
    thread &t = self();
    const uint32_t offset = shared_offset(t, "mbarrier.init", address, 8, 8);
    if (count < 1 || count > LIMIT) fail("mbarrier.init: count %u; 1 to 2^20 - 1", count);
    check_in_flight(t, "mbarrier.init", offset, 8);
    hopper &h = here90();
    mbarrier *m = find(h, offset);
    if (m && m->valid) fail("mbarrier.init: byte %u holds an mbarrier already", offset);
    if (!m) {
        h.barriers.emplace_back();
        m = &h.barriers.back();
    }
    *m = {offset, true, count, count, 0, 0, false, wait_queue()};
    memcpy(t.home->shared + offset, &OBJECT, sizeof OBJECT);
}

void mbarrier_inval(uint32_t address) {
    thread &t = self();
    const uint32_t offset = shared_offset(t, "mbarrier.inval", address, 8, 8);
    mbarrier &m = mbarrier_at(*t.home, "mbarrier.inval", offset);
    if (m.waiting.first || m.bytes) fail_at("mbarrier.inval", "in use", m);
    m.valid = false;
    memcpy(t.home->shared + offset, &POISON, 4);
    memcpy(t.home->shared + offset + 4, &POISON, 4);
}

void mbarrier_arrive(const char *name, uint32_t address, bool expect, uint32_t bytes) {
    thread &t = self();
    block &home = block_at(name, *t.home, address);
    const uint32_t offset = shared_offset(t, name, address, 8, 8);
    mbarrier &m = mbarrier_at(home, name, offset);
    if (expect) m.bytes += bytes;
    if (m.bytes > LIMIT) fail_at(name, "more than 2^20 - 1 bytes", m);
    if (!m.pending) fail_at(name, "an arrival beyond the count", m);
    m.pending--;
    complete_if_over(m);
    perhaps_yield();
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
    thread &t = self();
    const char *name = "mbarrier.try_wait";
    const uint32_t offset = shared_offset(t, name, address, 8, 8);
    mbarrier &m = mbarrier_at(*t.home, name, offset);
    if (parity > 1) fail("%s: parity %u", name, parity);
    while ((m.phase & 1) == parity) wait_in(m.waiting, {name, wait_state, &m, parity});
    if (m.spoilt) fail_at(name, "the destination of a bulk copy was written in flight", m);
}

} // namespace emu
