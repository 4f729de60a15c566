/* SPDX-License-Identifier: Apache-2.0
 *
 * The copy engine: boxes of tensors between global and shared memory, and what it sees of ordinary
 * stores. A load poisons its destination when it is issued and lands when the machine says; a store
 * reads its source as late as its thread's wait_group.read allows.
 */
#include "hopper.h"

#include "cuda/descriptor.cuh"

#include <string.h>

namespace emu {

constexpr uint32_t CHUNK = 16;

/* ---- stores of threads, and the fence behind them ------------------------------------------- */
static void check_pending_stores(const thread &t, const char *what, uint32_t offset,
                                 uint32_t bytes);

static void store_chunk(thread &t, const char *name, uint32_t address, const void *data,
                        uint32_t bytes) {
    const uint32_t offset = shared_offset(t, name, address, bytes, bytes);
    check_in_flight(t, name, offset, bytes);
    hopper &h = hopper_of(*t.home);
    check_pending_stores(t, name, offset, bytes);
    memcpy(t.home->shared + offset, data, bytes);
    uint16_t &mark = h.unfenced[offset / CHUNK];
    const uint16_t me = static_cast<uint16_t>(t.number + 1);
    if (mark != me) h.stored[static_cast<size_t>(t.number)].push_back(offset / CHUNK);
    h.unfenced_chunks += !mark;
    mark = me;
}

void st_shared(uint32_t to, const uint32_t *words, int count) {
    store_chunk(self(), "st.shared", to, words, static_cast<uint32_t>(4 * count));
}

namespace {

struct stmatrix_args {
    uint32_t row;
    const uint32_t *r;
};

void compute_stmatrix(void *const *args, uint32_t, const warp &w) {
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t row[4]; /* of matrix lane / 8: two columns from each of four lanes */
        for (int i = 0; i < 4; i++)
            row[i] = static_cast<stmatrix_args *>(args[lane % 8 * 4 + i])->r[lane / 8];
        store_chunk(w.threads[lane], "stmatrix", static_cast<stmatrix_args *>(args[lane])->row, row,
                    CHUNK);
    }
}

const collective STMATRIX = {"stmatrix", true, compute_stmatrix};

} // namespace

void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
    stmatrix_args a = {row, r};
    meet(STMATRIX, 0xffffffffu, &a);
}

void fence_proxy_async() {
    thread &t = self();
    hopper &h = here90();
    std::vector<uint32_t> &stored = h.stored[static_cast<size_t>(t.number)];
    for (uint32_t chunk : stored)
        if (h.unfenced[chunk] == t.number + 1) {
            h.unfenced[chunk] = 0;
            h.unfenced_chunks--;
        }
    stored.clear();
}

void check_fenced(block &b, const char *what, uint32_t offset, uint32_t bytes) {
    hopper &h = hopper_of(b);
    if (!h.unfenced_chunks) return;
    for (uint32_t i = offset / CHUNK; i <= (offset + bytes - 1) / CHUNK; i++)
        if (h.unfenced[i])
            fail("%s reads byte %u of shared memory: thread %d wrote it without fence.proxy.async",
                 what, i * CHUNK, h.unfenced[i] - 1);
}

/* ---- boxes ----------------------------------------------------------------------------------- */
namespace {

uint32_t box_bytes(const tensor_box &map) {
    uint32_t bytes = 2;
    for (int i = 0; i < map.rank; i++) bytes *= map.box[i];
    return bytes;
}

/* Global address and bytes of a row of the box, and how many bytes before them lie outside; no
 * bytes: the row lies outside as a whole. Rows count through dimensions 1, 2, ... */
struct row_place {
    char *global;
    uint32_t skip, bytes;
};

row_place place_of(const tensor_box &map, const int32_t *at, uint32_t row) {
    char *global = map.base;
    for (int i = 1; i < map.rank; i++) {
        const int64_t c = static_cast<int64_t>(at[i]) + row % map.box[i];
        row /= map.box[i];
        if (c < 0 || c >= static_cast<int64_t>(map.size[i])) return {nullptr, 0, 0};
        global += c * static_cast<int64_t>(map.stride[i]);
    }
    const int64_t first = at[0], end = first + map.box[0], size = static_cast<int64_t>(map.size[0]);
    const int64_t from = first < 0 ? 0 : first, to = end < size ? end : size;
    if (from >= to) return {nullptr, 0, 0};
    return {global + 2 * from, static_cast<uint32_t>(2 * (from - first)),
            static_cast<uint32_t>(2 * (to - from))};
}

/* Rows of shared memory follow each other; their 16-byte chunks are exchanged by the swizzle of the
 * address, which is that of the offset: shared memory starts on 1024 bytes. */
void load_box(const tensor_box &map, const int32_t *at, unsigned char *shared, uint32_t offset) {
    const uint32_t bytes = box_bytes(map), width = 2u * map.box[0];
    unsigned char line[512];
    for (uint32_t row = 0; row < bytes / width; row++) {
        const row_place place = place_of(map, at, row);
        memset(line, 0, width);
        if (place.bytes) memcpy(line + place.skip, place.global, place.bytes);
        for (uint32_t i = 0; i < width; i += CHUNK)
            memcpy(shared +
                       pbs::swizzled(static_cast<pbs::swizzle>(map.mode), offset + row * width + i),
                   line + i, CHUNK);
    }
}

/* data: what lay at the shared offset `from`. */
void store_box(const bulk_store &s) {
    const uint32_t width = 2u * s.map.box[0];
    unsigned char line[512];
    for (uint32_t row = 0; row < s.data.size() / width; row++) {
        const row_place place = place_of(s.map, s.at, row);
        if (!place.bytes) continue;
        for (uint32_t i = 0; i < width; i += CHUNK)
            memcpy(line + i,
                   &s.data[pbs::swizzled(static_cast<pbs::swizzle>(s.map.mode),
                                         s.from + row * width + i) -
                           s.from],
                   CHUNK);
        memcpy(place.global, line + place.skip, place.bytes);
    }
}

tensor_box box_of(const char *name, const uint64_t *words, int rank) {
    tensor_box map;
    if (reinterpret_cast<uintptr_t>(words) % 64)
        fail("%s: the tensor map does not lie on 64 bytes", name);
    if (!decode_tensor_map(map, words)) fail("%s: this is no tensor map", name);
    if (rank && map.rank != rank)
        fail("%s: %d coordinates for a map of rank %d", name, rank, map.rank);
    return map;
}

/* 5.5.3.1: a box starts on 16 bytes of global memory. */
void check_start(const char *name, const int32_t *at) {
    if (at[0] % 8) fail("%s: coordinate %d: the box does not start on 16 bytes", name, at[0]);
}

uint32_t alignment_of(const tensor_box &map) {
    const uint32_t period = pbs::swizzle_period(static_cast<pbs::swizzle>(map.mode));
    return period < 128 ? 128 : period;
}

void set_flight(block &b, uint32_t offset, uint32_t bytes, uint16_t mark) {
    for (uint32_t i = offset / CHUNK; i < (offset + bytes) / CHUNK; i++) b.in_flight[i] = mark;
    const int chunks = static_cast<int>(bytes / CHUNK);
    b.copies_in_flight += mark ? chunks : -chunks;
}

} // namespace

void check_tensor_map(const uint64_t *map) { box_of("prefetch.tensormap", map, 0); }

/* ---- loads ----------------------------------------------------------------------------------- */
namespace {

void poison(block &b, uint32_t offset, uint32_t bytes) {
    for (uint32_t i = 0; i < bytes; i += 4) memcpy(b.shared + offset + i, &POISON, 4);
}

bool is_poison(const block &b, uint32_t offset, uint32_t bytes) {
    const unsigned char *at = b.shared + offset;
    return !memcmp(at, &POISON, 4) && !memcmp(at, at + 4, bytes - 4);
}

struct load_event : event {
    thread *issuer;
    tensor_box map;
    int32_t at[5];
    uint32_t offset, bytes;
    int count;
    block *homes[16];
    mbarrier *barriers[16];

    bool wanted() const override {
        for (int i = 0; i < count; i++)
            if (barriers[i]->waiting.first) return true;
        return false;
    }
    void happen() override {
        for (int i = 0; i < count; i++) {
            block &home = *homes[i];
            set_flight(home, offset, bytes, 0);
            if (!is_poison(home, offset, bytes)) barriers[i]->spoilt = true; /* who waits says so */
            load_box(map, at, home.shared, offset);
            hopper_of(home).loads_in_flight--;
            mbarrier_complete_bytes(home, *barriers[i], bytes);
        }
    }
};

} // namespace

void tma_load(uint32_t to, const uint64_t *words, uint32_t barrier, uint32_t blocks, int rank,
              const int32_t *at) {
    thread &t = self();
    const char *name = blocks ? "cp.async.bulk.tensor (multicast)" : "cp.async.bulk.tensor";
    const tensor_box map = box_of(name, words, rank);
    const uint32_t bytes = box_bytes(map);
    const uint32_t offset = shared_offset(t, name, to, bytes, alignment_of(map));
    const uint32_t barrier_offset = shared_offset(t, name, barrier, 8, 8);
    check_start(name, at);
    if (blocks && !(blocks & 0xffff)) fail("%s: to no block", name);

    load_event e;
    e.issuer = &t;
    e.map = map;
    memcpy(e.at, at, static_cast<size_t>(rank) * sizeof *at);
    e.offset = offset;
    e.bytes = bytes;
    e.count = 0;
    for (uint32_t rank_of_block = 0; rank_of_block < 16; rank_of_block++) {
        if (blocks && !(blocks >> rank_of_block & 1)) continue;
        block &home = blocks ? block_of_cluster(name, *t.home, rank_of_block) : *t.home;
        e.homes[e.count] = &home;
        e.barriers[e.count++] = &mbarrier_at(home, name, barrier_offset);
        check_in_flight(home.threads[0], name, offset, bytes);
        check_pending_stores(home.threads[0], name, offset, bytes);
        if (!blocks) break;
    }
    for (int i = 0; i < e.count; i++) {
        poison(*e.homes[i], offset, bytes);
        set_flight(*e.homes[i], offset, bytes, static_cast<uint16_t>(t.number + 1) | BULK_COPY);
        hopper_of(*e.homes[i]).loads_in_flight++;
    }
    post(std::make_unique<load_event>(e));
}

/* ---- stores ---------------------------------------------------------------------------------- */
namespace {

store_queue &queue_of(const thread &t) {
    return hopper_of(*t.home).stores[static_cast<size_t>(t.number)];
}

struct store_event : event {
    std::shared_ptr<bulk_store> store;
    bool writes; /* the second half */

    /* Events do not outlive the blocks that run with them, so the owner's queue is still there. */
    bool wanted() const override { return queue_of(*store->owner).waiting.first; }
    void happen() override {
        bulk_store &s = *store;
        hopper &h = hopper_of(*s.owner->home);
        if (writes) {
            store_box(s);
            s.written = true;
        } else {
            const unsigned char *source = s.owner->home->shared + s.from;
            s.changed = memcmp(source, s.data.data(), s.data.size()) != 0;
            s.read = true;
            h.stores_in_flight--;
            auto next = std::make_unique<store_event>();
            next->store = store;
            next->writes = true;
            post(std::move(next));
        }
        wake_all(queue_of(*s.owner).waiting);
    }
};

std::string store_state(const thread &t) { return format("%zu groups", queue_of(t).groups.size()); }

bool finished(const store_group &group, bool read_only) {
    for (const auto &s : group)
        if (!(read_only ? s->read : s->written)) return false;
    return true;
}

} // namespace

/* A write to bytes that a store has yet to read. */
static void check_pending_stores(const thread &t, const char *what, uint32_t offset,
                                 uint32_t bytes) {
    const hopper &h = hopper_of(*t.home);
    if (!h.stores_in_flight) return;
    for (const store_queue &q : h.stores) {
        for (const auto &s : q.open)
            if (!s->read && offset < s->from + s->data.size() && s->from < offset + bytes)
                fail_as(t, "%s to byte %u of shared memory, which a bulk store has yet to read",
                        what, offset);
        for (const store_group &g : q.groups)
            for (const auto &s : g)
                if (!s->read && offset < s->from + s->data.size() && s->from < offset + bytes)
                    fail_as(t, "%s to byte %u of shared memory, which a bulk store has yet to read",
                            what, offset);
    }
}

void tma_store(const uint64_t *words, uint32_t from, int rank, const int32_t *at) {
    thread &t = self();
    const char *name = "cp.async.bulk.tensor (store)";
    const tensor_box map = box_of(name, words, rank);
    const uint32_t bytes = box_bytes(map);
    const uint32_t offset = shared_offset(t, name, from, bytes, alignment_of(map));
    check_start(name, at);
    check_in_flight(t, name, offset, bytes);
    check_fenced(*t.home, name, offset, bytes);

    const unsigned char *source = t.home->shared + offset;
    auto s = std::make_shared<bulk_store>();
    s->owner = &t;
    s->map = map;
    memcpy(s->at, at, static_cast<size_t>(rank) * sizeof *at);
    s->from = offset;
    s->read = s->written = s->changed = s->waited = false;
    s->data.assign(source, source + bytes);
    here90().stores_in_flight++;
    queue_of(t).open.push_back(s);
    auto e = std::make_unique<store_event>();
    e->store = std::move(s);
    e->writes = false;
    post(std::move(e));
}

void tma_store_commit() {
    here90();
    store_queue &q = queue_of(self());
    q.groups.push_back(std::move(q.open));
    q.open.clear();
}

void tma_store_wait(int pending, bool read_only) {
    here90();
    store_queue &q = queue_of(self());
    const size_t done = q.groups.size() - std::min(q.groups.size(), static_cast<size_t>(pending));
    const char *name = read_only ? "cp.async.bulk.wait_group.read" : "cp.async.bulk.wait_group";
    for (size_t i = 0; i < done; i++)
        while (!finished(q.groups[i], read_only)) wait_in(q.waiting, {name, store_state, &q, 0});
    for (size_t i = 0; i < done; i++)
        for (const auto &s : q.groups[i]) {
            s->waited = true;
            if (s->changed)
                fail("%s: bytes %u and on were written before the store had read them", name,
                     s->from);
        }
    while (!q.groups.empty() && finished(q.groups.front(), false)) q.groups.pop_front();
}

/* That it happened to be read in time is luck. */
void stores_thread_ended(thread &t) {
    store_queue &q = queue_of(t);
    bool waited = q.open.empty();
    for (const store_group &g : q.groups)
        for (const auto &s : g) waited = waited && s->waited;
    if (!waited) fail("the thread ends with a bulk store whose read nobody waited for");
    q.groups.clear();
}

} // namespace emu
