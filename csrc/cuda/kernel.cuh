/* SPDX-License-Identifier: Apache-2.0
 *
 * What every kernel begins with.
 */
#ifndef PBS_CUDA_KERNEL_CUH
#define PBS_CUDA_KERNEL_CUH

#include "ptx.cuh"

namespace pbs {

/* Before a kernel reads or writes device memory, by all its threads: on 9.0 a launch may overtake
 * the end of the one before it (launch.cuh), and waits here until that one is over and all that it
 * wrote is there. The launch behind this one may come to the multiprocessors as soon as all blocks
 * of this one have. */
PBS_DEVICE void begin_kernel() {
    ptx::griddepcontrol_wait();
    ptx::griddepcontrol_launch_dependents();
}

} // namespace pbs

#endif /* PBS_CUDA_KERNEL_CUH */
