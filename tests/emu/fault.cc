/* SPDX-License-Identifier: Apache-2.0
 *
 * A kernel that touches an inaccessible page or divides by zero ends its launch, not the process:
 * the handler runs on a stack of its own and leaves it for the launch's.
 */
#include "hidden.h"
#include "machine.h"

#include <mutex>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

namespace emu {

namespace {

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction before[3]; /* what these signals meant */
std::mutex installing;

/* Where a handler runs when the stack is what ran out. */
struct signal_stack {
    std::vector<char> memory;

    void provide() {
        stack_t now;
        if (!memory.empty() || (sigaltstack(nullptr, &now) == 0 && !(now.ss_flags & SS_DISABLE)))
            return;
        memory.resize(64 << 10);
        stack_t own = {};
        own.ss_sp = memory.data();
        own.ss_size = memory.size();
        sigaltstack(&own, nullptr);
    }

    ~signal_stack() {
        if (memory.empty()) return;
        stack_t off = {};
        off.ss_flags = SS_DISABLE;
        sigaltstack(&off, nullptr);
    }
};

thread_local signal_stack own_stack;

void explain(int signal, const void *at) {
    const thread &t = self();
    const block &home = *t.home;
    const unsigned char *byte = static_cast<const unsigned char *>(at);
    const ptrdiff_t offset = byte - home.shared;
    const ptrdiff_t near = 64 << 10;
    if (signal == SIGFPE) fail("integer division by zero, or of INT_MIN by -1");
    if (byte < t.stack && byte >= t.stack - near) fail("the thread's stack is full");
    if (offset >= -near && offset < static_cast<ptrdiff_t>(home.shared_bytes) + near)
        fail("access to byte %td of shared memory; the launch asked for %zu bytes", offset,
             home.shared_bytes);
    fail("access to the invalid address %p", at);
}

void handle(int signal, siginfo_t *info, void *) {
    if (here) explain(signal, info->si_addr);
    static const char host[] = "host code touches the memory of the emulated GPU\n";
    if (in_hidden_memory(info->si_addr) && write(2, host, sizeof host - 1) < 0) abort();
    /* Not a kernel's fault: it happens again, under the handler of before. */
    for (int i = 0; i < 3; i++)
        if (SIGNALS[i] == signal) sigaction(signal, &before[i], nullptr);
}

} // namespace

void catch_faults() {
    own_stack.provide();
    std::lock_guard<std::mutex> lock(installing);
    for (int i = 0; i < 3; i++) {
        struct sigaction now;
        sigaction(SIGNALS[i], nullptr, &now);
        if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == handle) continue;
        before[i] = now;
        struct sigaction own = {};
        own.sa_sigaction = handle;
        /* NODEFER: the handler is left without returning, so nothing would unblock the signal. */
        own.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGNALS[i], &own, nullptr);
    }
}

} // namespace emu
