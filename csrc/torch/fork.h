/* SPDX-License-Identifier: Apache-2.0
 *
 * Are torch's threads gone? A child made by fork() has the memory of its parent but only the thread
 * that forked. An OpenMP pool that the parent had started never answers there: torch's own
 * operators wait for it forever. So in such a child ours run on the one thread that is left.
 */
#ifndef PBS_TORCH_FORK_H
#define PBS_TORCH_FORK_H

#include <pthread.h>
#include <string.h>
#include <sys/stat.h>

#include "convert.h"

namespace pbs {

class Fork {
    static inline bool had_threads = false, lost_threads = false;

    /* A link for every thread, beside the directory's own two. */
    static void before() {
        struct stat tasks;
        had_threads = stat("/proc/self/task", &tasks) != 0 || tasks.st_nlink > 3;
    }

    static void in_child() { lost_threads |= had_threads; }

    static inline const int watched = pthread_atfork(&before, nullptr, &in_child);

  public:
    static bool lost() { return lost_threads; }
};

/* fp32 or zeros, contiguous. What lies on a device is torch's to fill, in a child too. */
inline void fill(Tensor &t, float value) {
    if (!Fork::lost() || t.is_cuda()) {
        torch::stable::fill_(t, static_cast<double>(value));
    } else if (value == 0.0f) {
        memset(t.mutable_data_ptr(), 0, static_cast<size_t>(t.numel()) * t.element_size());
    } else {
        auto *to = static_cast<float *>(t.mutable_data_ptr());
        for (int64_t i = 0; i < t.numel(); i++) to[i] = value;
    }
}

} // namespace pbs

#endif /* PBS_TORCH_FORK_H */
