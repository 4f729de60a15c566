/* SPDX-License-Identifier: Apache-2.0
 *
 * Where this library's calls run: torch's threads, or the current stream of q's device. An Exec
 * lives as long as its call.
 */
#ifndef PBS_TORCH_EXEC_H
#define PBS_TORCH_EXEC_H

#include <torch/csrc/stable/accelerator.h>

#include "fork.h"
#include "workspace.h"

namespace pbs {

#if defined(PBS_CUDA_LIBRARY)

/* Nothing here waits for the device, so a call may be captured into a graph. */
class Exec {
    torch::stable::accelerator::DeviceGuard guard;

  public:
    pbs_exec c{};

    Exec(const Tensor &q, int64_t isa) : guard(q.get_device_index()) {
        c.isa = to_enum<pbs_isa>("isa", isa);
        c.device = q.get_device_index();
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(c.device, &c.stream));
    }

    void finish() const {}
};

#else

/* torch's thread pool as pbs_parallel_for_fn. Nothing may be thrown through the C core, so a
 * failure is noted and thrown by finish(). */
class Exec {
    bool failed = false;

    static void parallel_for(void *pool, int64_t begin, int64_t end, pbs_task_fn task, void *arg) {
        if (torch_parallel_for(begin, end, 1, task, arg) != 0) {
            static_cast<Exec *>(pool)->failed = true;
        }
    }

  public:
    pbs_exec c{};

    Exec(const Tensor &, int64_t isa) {
        uint32_t threads = 1;
        TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
        c.parallel_for = &Exec::parallel_for;
        c.pool = this;
        c.num_threads = Fork::lost() ? 1 : static_cast<int32_t>(threads);
        c.isa = to_enum<pbs_isa>("isa", isa);
    }
    Exec(const Exec &) = delete; /* c.pool points here */

    void finish() const {
        if (failed) throw std::runtime_error("torch_parallel_for failed; outputs are not valid");
    }
};

#endif

/* Runs one verb, p.exec being exec's. */
template <class Params>
void run(Params &p, pbs_status (*size)(const Params *, size_t *),
         pbs_status (*verb)(const Params *), const Tensor &like, const Exec &exec) {
    check(size(&p, &p.workspace_bytes));
    Workspace memory(like, p.workspace_bytes);
    p.workspace = memory.data();
    check(verb(&p));
    exec.finish();
}

} // namespace pbs

#endif /* PBS_TORCH_EXEC_H */
