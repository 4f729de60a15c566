/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared memory of the blocks: between inaccessible pages, poisoned at the start, reached through
 * checked 32-bit addresses or plain pointers.
 */
#include "machine.h"

#include <algorithm>
#include <new>
#include <string.h>
#include <sys/mman.h>

namespace emu {

constexpr size_t PAGE = 4096;
/* Shared memory starts and ends on such a boundary; the end touches an inaccessible page. */
constexpr size_t ALIGNMENT = 1024;
constexpr size_t ROOM = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;
constexpr size_t GUARD = 64 << 10; /* inaccessible, on either side */

namespace {

struct shared_map {
    unsigned char *base; /* GUARD | ROOM | GUARD */
    size_t bytes;
};

struct shared_pool {
    std::vector<shared_map> maps;
    ~shared_pool() {
        for (shared_map &map : maps) munmap(map.base, ROOM + 2 * GUARD);
    }
};

thread_local shared_pool pool;

size_t rounded(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

} // namespace

unsigned char *map_shared(int index, size_t bytes) {
    while (pool.maps.size() <= static_cast<size_t>(index)) {
        void *at = mmap(nullptr, ROOM + 2 * GUARD, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        pool.maps.push_back({static_cast<unsigned char *>(at), SIZE_MAX});
    }
    shared_map &map = pool.maps[static_cast<size_t>(index)];
    unsigned char *end = map.base + GUARD + ROOM;
    if (map.bytes != bytes) {
        const size_t pages = (rounded(bytes) + PAGE - 1) / PAGE * PAGE;
        mprotect(map.base, GUARD + ROOM, PROT_NONE);
        mprotect(end - pages, pages, PROT_READ | PROT_WRITE);
        map.bytes = bytes;
    }
    return end - rounded(bytes);
}

/* The accessible bytes before and behind the block's: what rounding to pages and to ALIGNMENT adds.
 */
static size_t slack_before(const block &b) {
    return (PAGE - rounded(b.shared_bytes) % PAGE) % PAGE;
}
static size_t slack_behind(const block &b) { return rounded(b.shared_bytes) - b.shared_bytes; }

void poison_shared(block &b) {
    uint32_t *word = reinterpret_cast<uint32_t *>(b.shared - slack_before(b));
    std::fill(word, reinterpret_cast<uint32_t *>(b.shared + rounded(b.shared_bytes)), POISON);
}

void check_edges(const block &b) {
    const unsigned char *poison = reinterpret_cast<const unsigned char *>(&POISON);
    for (size_t i = 1; i <= slack_before(b); i++)
        if (b.shared[-static_cast<ptrdiff_t>(i)] != poison[(ALIGNMENT - i) % 4])
            fail("%zu bytes before shared memory were written", i);
    for (size_t i = 0; i < slack_behind(b); i++)
        if (b.shared[b.shared_bytes + i] != poison[(b.shared_bytes + i) % 4])
            fail("shared memory was written at %zu; the launch asked for %zu bytes",
                 b.shared_bytes + i, b.shared_bytes);
}

void *shared_memory(size_t bytes) {
    const block &b = *self().home;
    if (bytes > b.shared_bytes)
        fail("the kernel's shared memory takes %zu bytes; the launch asked for %zu", bytes,
             b.shared_bytes);
    return b.shared;
}

uint32_t shared_address(const void *pointer) {
    const block &b = *self().home;
    const unsigned char *at = static_cast<const unsigned char *>(pointer);
    if (at < b.shared || at > b.shared + b.shared_bytes)
        fail("shared_address of a pointer that is outside the block's shared memory");
    return SHARED_BASE + static_cast<uint32_t>(at - b.shared);
}

uint32_t shared_offset(const thread &t, const char *what, uint32_t address, uint32_t bytes,
                       uint32_t alignment) {
    const size_t size = t.home->shared_bytes;
    const uint32_t offset = address - SHARED_BASE;
    if (address < SHARED_BASE || offset > size || bytes > size - offset)
        fail_as(t, "%s: shared address %u (byte %lld), %u bytes: outside the block's %zu", what,
                address, static_cast<long long>(address) - SHARED_BASE, bytes, size);
    if (address % alignment)
        fail_as(t, "%s: shared address %u (byte %u) is not a multiple of %u", what, address, offset,
                alignment);
    return offset;
}

unsigned char *shared_at(const thread &t, const char *what, uint32_t address, uint32_t bytes,
                         uint32_t alignment) {
    return t.home->shared + shared_offset(t, what, address, bytes, alignment);
}

} // namespace emu
