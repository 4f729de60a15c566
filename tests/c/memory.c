/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory of the tests, on the heap or against guard pages. Guard pages catch what sanitizers do not
 * see: masked vector loads, tile loads and stores, prefetches that are loads.
 */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "harness.h"

guard test_guard = GUARD_NONE;

typedef struct mapping {
    char *user, *base;
    size_t bytes;
} mapping;

static mapping mappings[64];

/* [page nobody may touch][pages][page nobody may touch] */
static char *map(size_t bytes, size_t behind) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page, i = 0;
    char *base = (char *)mmap(NULL, room + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    while (i < sizeof mappings / sizeof *mappings && mappings[i].user) i++;
    if (base == MAP_FAILED || i == sizeof mappings / sizeof *mappings) abort();
    if (room && mprotect(base + page, room, PROT_READ | PROT_WRITE)) abort();
    char *user = base + page;
    if (test_guard == GUARD_AFTER) user += room - bytes + behind;
    mappings[i] = (mapping){user, base, room + 2 * page};
    return user;
}

void *filled(size_t bytes, int byte) {
    void *memory = test_guard ? map(bytes, 0) : malloc(bytes ? bytes : 1);
    if (!memory) abort();
    memset(memory, byte, bytes);
    return memory;
}

void *filled_lines(size_t bytes, int byte) {
    if (test_guard) return filled(bytes, byte);
    void *memory = aligned_alloc(64, bytes ? bytes : 64);
    if (!memory) abort();
    memset(memory, byte, bytes);
    return memory;
}

/* What is asked for has 64 bytes more than are used. From an address that one byte takes to the
 * next line, 63 of them are left over. */
void *filled_workspace(size_t bytes) {
    if (!test_guard || bytes <= 64) return filled(bytes, 0xff);
    char *memory = map(bytes, 63);
    memset(memory, 0xff, test_guard == GUARD_AFTER ? bytes - 63 : bytes);
    return memory;
}

void drop(void *memory) {
    for (size_t i = 0; i < sizeof mappings / sizeof *mappings; i++)
        if (memory && mappings[i].user == memory) {
            munmap(mappings[i].base, mappings[i].bytes);
            mappings[i].user = NULL;
            return;
        }
    free(memory);
}

static void drop_from(const mapping *old) {
    for (size_t i = 0; i < sizeof mappings / sizeof *mappings; i++)
        if (!old[i].user) drop(mappings[i].user);
}

static sigjmp_buf before_fault;
static void *volatile fault_at;

static void on_fault(int signal, siginfo_t *info, void *context) {
    (void)signal;
    (void)context;
    fault_at = info->si_addr;
    siglongjmp(before_fault, 1);
}

/* Where a guard was touched, from the piece of memory that lies nearest. */
static void report(const char *what) {
    const char *at = (const char *)fault_at;
    for (size_t i = 0; i < sizeof mappings / sizeof *mappings; i++) {
        const mapping *m = &mappings[i];
        if (!m->user || at < m->base || at >= m->base + m->bytes) continue;
        CHECK(0, "%s: touches byte %td of memory that ends at %td", what, at - m->user,
              m->base + m->bytes - (size_t)sysconf(_SC_PAGESIZE) - m->user);
        return;
    }
    CHECK(0, "%s: touches %p", what, (const void *)at);
}

void run_guarded(void (*run)(void *), void *arg, const char *what) {
    mapping old[sizeof mappings / sizeof *mappings];
    memcpy(old, mappings, sizeof old);
    struct sigaction act = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, segv, bus;
    sigaction(SIGSEGV, &act, &segv);
    sigaction(SIGBUS, &act, &bus);
    if (sigsetjmp(before_fault, 1) == 0) {
        run(arg);
    } else {
        report(what);
        drop_from(old);
    }
    sigaction(SIGSEGV, &segv, NULL);
    sigaction(SIGBUS, &bus, NULL);
    CHECK(1, "%s", what);
}
