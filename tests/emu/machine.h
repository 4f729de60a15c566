/* SPDX-License-Identifier: Apache-2.0
 *
 * The emulated machine from inside: what fiber.cc, schedule.cc, warp.cc, shared.cc and async.cc
 * share. One machine per OS thread; it runs one launch at a time.
 *
 * A CUDA thread is a fiber that runs until an instruction blocks it. Then the ready thread of the
 * warp of highest priority goes on; priorities are random and change now and then, so one warp may
 * run far ahead or starve. The same seed gives the same run.
 *
 * An error ends the launch, not the process: fail() leaves all fibers where they stand. Nothing is
 * unwound, so kernels and the functions here that may fail own no heap memory while they may.
 */
#ifndef EMU_MACHINE_H
#define EMU_MACHINE_H

#include "emu.h"

#include <memory>
#include <string>
#include <vector>

namespace emu {

constexpr int LANES = 32;
constexpr int MAX_THREADS = 1024;
constexpr size_t MAX_SHARED = 227 << 10;
/* Of fresh or in-flight bytes: NaN as fp32 and, in both halves, as bf16 and fp16. */
constexpr uint32_t POISON = 0xFFFDFFFDu;
/* Shared address of the first byte of dynamic shared memory, as on the device; so 0 is no address.
 */
constexpr uint32_t SHARED_BASE = 1024;
/* In block.in_flight, beside 1 + the number of the copying thread: the copy engine does it. */
constexpr uint16_t BULK_COPY = 0x8000;

struct thread;
struct warp;
struct block;
struct machine;
struct hopper; /* hopper.h */

/* What a thread waits for. The texts are made for a report only: formatting them at every wait
 * would cost a third of the time. Threads with equal reasons share a line of the report. */
struct wait_reason {
    const char *what;                      /* the instruction */
    std::string (*detail)(const thread &); /* the state of its object, or NULL */
    const void *object;
    uint64_t value;
};

struct wait_queue {
    thread *first = nullptr;
};

/* cp.async of one thread: indices of machine.copies in the order of issue, and where its committed
 * groups end. */
struct copy_queue {
    std::vector<uint32_t> issued;
    std::vector<uint32_t> group_ends;
};

struct thread {
    indices where; /* first: `here` points to it */
    void *context; /* of the fiber while it does not run; see fiber.cc */
    unsigned char *stack;
    size_t stack_bytes;
    int number; /* in its block */
    warp *team;
    block *home;
    wait_reason waits;
    thread *next_waiter;
    bool waited; /* for the launches before this one */
    copy_queue copies;
};

/* A warp collective. `aligned`: all 32 lanes of the mask must live. compute runs once, when the
 * last lane has arrived: args[lane] is what that lane gave, lanes are those that came. */
struct collective {
    const char *name;
    bool aligned;
    void (*compute)(void *const *args, uint32_t lanes, const warp &);
};

/* Lanes that wait for each other; a warp may hold several with disjoint masks. */
struct meeting {
    const collective *what;
    uint32_t mask, arrived;
};

struct warp {
    block *home;
    thread *threads; /* of lane 0 */
    int number;
    int rank;             /* 0 runs first */
    uint32_t live, ready; /* lanes */
    int meetings;
    meeting open[LANES];
    void *args[LANES];
};

/* Named barrier: threads arrive, some of them wait. */
struct barrier {
    int arrived, expected; /* expected = 0: all that live */
    int yes, answer;
    wait_queue waiting;
};

struct block {
    int64_t number;
    int rank; /* in its cluster */
    unsigned char *shared;
    size_t shared_bytes;
    int live; /* threads */
    int copies_in_flight;
    std::vector<uint16_t> in_flight; /* per 16 bytes of shared: 1 + number of the copying thread */
    std::vector<thread> threads;
    std::vector<warp> warps;
    barrier barriers[16];
    std::shared_ptr<hopper> sm90; /* NULL until a block needs it */
};

/* One cp.async. `to` is an offset in the block's shared memory. */
struct copy {
    thread *owner;
    const void *from;
    uint32_t to, bytes;
    bool landed;
    int64_t loose; /* its place in machine.loose_copies, or -1 */
};

/* Something that hardware finishes by itself some time: a bulk copy that lands, a store that is
 * read. happen() may wake threads; wanted() says whether somebody waits for it. */
struct event {
    virtual ~event() = default;
    virtual void happen() = 0;
    virtual bool wanted() const { return false; }
};

struct machine {
    launch_shape shape;
    void (*call)(void *);
    void *kernel;
    uint64_t seed, random_state;
    int delivery;

    std::vector<block> blocks; /* those that run together */
    int blocks_running;        /* of them in use; the last wave may be smaller */
    std::vector<warp *> by_rank;
    std::vector<uint64_t> ready_ranks; /* bit set of ranks with ready lanes */
    int steps_to_reshuffle;
    bool lanes_descend;

    std::vector<copy> copies;
    std::vector<uint32_t> free_copies;
    std::vector<uint32_t> loose_copies; /* in RANDOM, those that may land before their wait */
    std::vector<std::unique_ptr<event>> loose_events, late_events;

    void *main_context;
    bool failed;
    std::string error;
};

extern __thread machine *the_machine __attribute__((tls_model("initial-exec")));

/* ---- fiber.cc -------------------------------------------------------------------------------- */
/* The thread that runs; NULL between waves. */
inline thread &self() { return *reinterpret_cast<thread *>(const_cast<indices *>(here)); }
/* Makes the index-th stack of this OS thread ready to run `start` as t. */
void prepare_fiber(thread &t, int index, void (*start)());
/* From main to t; returns when a fiber calls leave_to_main. */
void enter_fiber(machine &m, thread &t);
void switch_fiber(thread &from, thread &to);
[[noreturn]] void leave_fiber(thread &from, thread &to);
[[noreturn]] void leave_to_main(machine &m);
/* First call on a fiber's own stack. */
void fiber_entered();

/* ---- schedule.cc ----------------------------------------------------------------------------- */
uint64_t next_random(machine &m);
void make_ready(thread &t);
/* The caller stops until somebody makes it ready. */
void stop();
/* Inline, so that the reason is built in place. */
inline void wait_for(const wait_reason &reason) {
    self().waits = reason;
    stop();
}
void wait_in(wait_queue &queue, const wait_reason &reason);
void wake_all(wait_queue &queue);
/* bar.arrive: counts, does not wait. */
void barrier_arrive(int id, int threads);
std::string format(const char *text, ...) __attribute__((format(printf, 1, 2)));
/* fail() for a fault of another thread than the caller. */
[[noreturn]] void fail_as(const thread &culprit, const char *text, ...)
    __attribute__((format(printf, 2, 3)));

/* ---- warp.cc --------------------------------------------------------------------------------- */
/* The caller meets the other lanes of mask in `what`. */
void meet(const collective &what, uint32_t mask, void *args);
/* A lane of w has ended: those that wait for it may go on. */
void lane_ended(warp &w, int lane);

/* ---- shared.cc ------------------------------------------------------------------------------- */
/* The index-th block's memory, `bytes` between inaccessible pages. */
unsigned char *map_shared(int index, size_t bytes);
void poison_shared(block &b);
void check_edges(const block &b);
/* 32-bit address -> pointer, for an access by t; an address outside or misaligned is an error. */
unsigned char *shared_at(const thread &t, const char *what, uint32_t address, uint32_t bytes,
                         uint32_t alignment);
uint32_t shared_offset(const thread &t, const char *what, uint32_t address, uint32_t bytes,
                       uint32_t alignment);

/* ---- fault.cc -------------------------------------------------------------------------------- */
/* Faults of this OS thread's kernels become errors of their launch. */
void catch_faults();

/* ---- async.cc -------------------------------------------------------------------------------- */
void async_begin(machine &m);
/* What arrives at this scheduling step. */
void async_step(machine &m);
/* Nothing can run: lets one event happen, a wanted one first. False: there is none. */
bool async_idle(machine &m);
/* Hands an event to the machine: it happens now, or later. */
void post(std::unique_ptr<event> e);
/* An access by t to bytes that a copy is under way to is an error. */
void check_in_flight(const thread &t, const char *what, uint32_t offset, uint32_t bytes);
void check_copies_waited(thread &t);

void cp_async(uint32_t to, const void *from, uint32_t bytes);
void cp_async_commit();
void cp_async_wait(int pending);

/* ---- cluster.cc ------------------------------------------------------------------------------ */
/* A block starts; a thread is about to end. */
void hopper_begin(block &b);
void hopper_thread_ended(thread &t);

} // namespace emu

#endif /* EMU_MACHINE_H */
