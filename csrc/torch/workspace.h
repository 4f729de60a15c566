/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory of one call. On a device it is torch's: its allocator keeps what it gets back for whoever
 * comes next on the stream. On a CPU it would be malloc's, who returns large blocks to the system,
 * and each layer of a model would fetch its pages anew: at 8K tokens a seventh of a call. So the
 * largest workspace up to a limit is kept for the next call, one in the process.
 */
#ifndef PBS_TORCH_WORKSPACE_H
#define PBS_TORCH_WORKSPACE_H

#include <atomic>
#include <memory>

#include "convert.h"

namespace pbs {

inline Tensor new_workspace(const Tensor &like, size_t bytes) {
    return new_tensor(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

#if defined(PBS_CUDA_LIBRARY) || defined(PBS_EMULATED_LIBRARY)

class Workspace {
    Tensor memory;

  public:
    Workspace(const Tensor &like, size_t bytes) : memory(new_workspace(like, bytes)) {}
    void *data() { return memory.mutable_data_ptr(); } /* of any alignment */
};

#else

class Workspace {
    using Memory = std::unique_ptr<Tensor>;

    /* What no call uses. Never destroyed: at exit torch may be gone before. */
    static inline std::atomic<Tensor *> spare{nullptr};
    static inline std::atomic<size_t> limit{size_t{256} << 20};

    Memory memory;

    static size_t bytes_of(const Tensor *tensor) {
        return tensor ? static_cast<size_t>(tensor->numel()) : 0;
    }

  public:
    /* Two calls at once: the second finds no spare and makes its own. */
    Workspace(const Tensor &like, size_t bytes) : memory(spare.exchange(nullptr)) {
        if (memory && bytes_of(memory.get()) >= bytes) return;
        memory.reset(); /* before the larger one is made */
        memory = std::make_unique<Tensor>(new_workspace(like, bytes));
    }

    ~Workspace() {
        if (bytes_of(memory.get()) > limit.load()) return;
        const size_t mine = bytes_of(memory.get());
        Memory other(spare.exchange(memory.release()));
        if (bytes_of(other.get()) > mine) other.reset(spare.exchange(other.release()));
    }

    Workspace(const Workspace &) = delete;
    void *data() { return memory->mutable_data_ptr(); }

    /* No more than this is kept from now on. Returns the bytes that are given back. */
    static size_t keep(size_t bytes) {
        limit.store(bytes);
        Memory other(spare.exchange(nullptr));
        return bytes_of(other.get());
    }
};

#endif

} // namespace pbs

#endif /* PBS_TORCH_WORKSPACE_H */
