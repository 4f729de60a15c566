/* SPDX-License-Identifier: Apache-2.0 */
#include "hidden.h"

#include <sys/mman.h>

namespace emu {

namespace {

constexpr size_t ROOM = 256 << 20;
constexpr size_t ALIGNMENT = 256;

unsigned char *memory;
size_t used;
bool hidden;

void protect(int rights) {
    if (memory) mprotect(memory, ROOM, rights);
}

} // namespace

device_memory_visible::device_memory_visible() {
    if (hidden) protect(PROT_READ | PROT_WRITE);
}

device_memory_visible::~device_memory_visible() {
    if (hidden) protect(PROT_NONE);
}

bool in_hidden_memory(const void *at) {
    const unsigned char *byte = static_cast<const unsigned char *>(at);
    return hidden && byte >= memory && byte < memory + ROOM;
}

extern "C" void *pbs_emu_device_alloc(size_t bytes) {
    if (!memory) {
        void *at = mmap(nullptr, ROOM, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) return nullptr;
        memory = static_cast<unsigned char *>(at);
    }
    const size_t size = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (size > ROOM - used) return nullptr;
    used += size;
    return memory + used - size;
}

extern "C" void pbs_emu_device_reset(void) {
    pbs_emu_device_hide(0);
    if (memory) munmap(memory, ROOM);
    memory = nullptr;
    used = 0;
}

extern "C" void pbs_emu_device_hide(int hide) {
    hidden = hide != 0;
    protect(hidden ? PROT_NONE : PROT_READ | PROT_WRITE);
}

} // namespace emu
