/* SPDX-License-Identifier: Apache-2.0
 *
 * Stacks and the switch between them. Stacks belong to the OS thread and are used again by every
 * block, whatever state the last launch left them in.
 */
#include "machine.h"

#include <new>
#include <sys/mman.h>

/* Elsewhere, or on request to test it, the C library switches: slower, as it saves signal masks. */
#if !defined(__x86_64__)
#define EMU_UCONTEXT 1
#endif
#ifdef EMU_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

__thread const indices *here __attribute__((tls_model("initial-exec")));

constexpr size_t PAGE = 4096;
#ifdef EMU_ASAN
constexpr size_t STACK = 256 << 10; /* its frames are several times as large */
#else
constexpr size_t STACK = 64 << 10;
#endif
constexpr size_t STRIDE = STACK + PAGE; /* an inaccessible page below each */
constexpr int STACKS_PER_MAP = 128;
/* Equal depths of all stacks would share a few sets of the caches: 1.4x slower. */
constexpr size_t STAGGER = 576;

namespace {

struct stack_pool {
    std::vector<unsigned char *> maps;

    unsigned char *bottom(int index) {
        const size_t map = static_cast<size_t>(index / STACKS_PER_MAP);
        while (maps.size() <= map) grow();
        return maps[map] + static_cast<size_t>(index % STACKS_PER_MAP) * STRIDE + PAGE;
    }

    void grow() {
        void *at = mmap(nullptr, STRIDE * STACKS_PER_MAP, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        maps.push_back(static_cast<unsigned char *>(at));
        for (int i = 0; i < STACKS_PER_MAP; i++)
            mprotect(maps.back() + static_cast<size_t>(i) * STRIDE, PAGE, PROT_NONE);
    }

    ~stack_pool() {
        for (unsigned char *map : maps) munmap(map, STRIDE * STACKS_PER_MAP);
    }
};

thread_local stack_pool stacks;

size_t usable(int index) { return STACK - static_cast<size_t>(index) * STAGGER % PAGE / 64 * 64; }

} // namespace

/* ---- the switch ------------------------------------------------------------------------------ */
#ifndef EMU_UCONTEXT

/* Saves what the ABI lets a callee keep, on the stack that is left. Rounding mode and exception
 * masks are the same everywhere. */
extern "C" void emu_switch(void **from, void *to);
__asm__(".text\n"
        ".p2align 4\n"
        ".type emu_switch,@function\n"
        "emu_switch:\n"
        "    pushq %rbp\n"
        "    pushq %rbx\n"
        "    pushq %r12\n"
        "    pushq %r13\n"
        "    pushq %r14\n"
        "    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n"
        "    popq %r14\n"
        "    popq %r13\n"
        "    popq %r12\n"
        "    popq %rbx\n"
        "    popq %rbp\n"
        "    ret\n"
        ".size emu_switch,.-emu_switch\n");

static void *new_context(unsigned char *bottom, size_t bytes, void (*start)()) {
    void **top = reinterpret_cast<void **>(bottom + bytes);
    *--top = nullptr; /* start returns nowhere; and its frame is aligned as after a call */
    *--top = reinterpret_cast<void *>(start);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    return top;
}

#else

static void emu_switch(void **from, void *to) {
    ucontext_t left;
    *from = &left;
    swapcontext(&left, static_cast<ucontext_t *>(to));
}

/* The context lies at the top of its own stack. */
static void *new_context(unsigned char *bottom, size_t bytes, void (*start)()) {
    const size_t room = (sizeof(ucontext_t) + 63) / 64 * 64;
    ucontext_t *context = reinterpret_cast<ucontext_t *>(bottom + bytes - room);
    getcontext(context);
    context->uc_stack.ss_sp = bottom;
    context->uc_stack.ss_size = bytes - room;
    context->uc_link = nullptr;
    makecontext(context, start, 0);
    return context;
}

#endif

/* ---- what the address sanitizer must be told --------------------------------------------------
 */
#ifdef EMU_ASAN
static thread_local struct {
    const void *bottom;
    size_t bytes;
} main_stack;
static thread_local bool from_main;

static void announce(void **fake, const void *bottom, size_t bytes) {
    __sanitizer_start_switch_fiber(fake, bottom, bytes);
}
static void arrived(void *fake) {
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake, &bottom, &bytes);
    if (from_main) main_stack = {bottom, bytes};
    from_main = false;
}
#else
static void announce(void **, const void *, size_t) {}
static void arrived(void *) {}
#endif

static void announce_thread(void **fake, const thread &to) {
    announce(fake, to.stack, to.stack_bytes);
}

void fiber_entered() { arrived(nullptr); }

void prepare_fiber(thread &t, int index, void (*start)()) {
    t.stack = stacks.bottom(index);
    t.stack_bytes = usable(index);
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(t.stack, STACK); /* the last fiber may not have returned */
#endif
    t.context = new_context(t.stack, t.stack_bytes, start);
}

void enter_fiber(machine &m, thread &t) {
    void *fake = nullptr;
#ifdef EMU_ASAN
    from_main = true;
#endif
    announce_thread(&fake, t);
    here = &t.where;
    emu_switch(&m.main_context, t.context);
    here = nullptr;
    arrived(fake);
}

void switch_fiber(thread &from, thread &to) {
    void *fake = nullptr;
    announce_thread(&fake, to);
    here = &to.where;
    emu_switch(&from.context, to.context);
    arrived(fake);
}

void leave_fiber(thread &from, thread &to) {
    announce_thread(nullptr, to);
    here = &to.where;
    emu_switch(&from.context, to.context);
    __builtin_unreachable();
}

void leave_to_main(machine &m) {
    void *nowhere;
#ifdef EMU_ASAN
    announce(nullptr, main_stack.bottom, main_stack.bytes);
#endif
    emu_switch(&nowhere, m.main_context);
    __builtin_unreachable();
}

} // namespace emu
