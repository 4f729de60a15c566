# SPDX-License-Identifier: Apache-2.0
# The sm_90a half of emu.mk, which includes this file.
#
#   ptx-check     with nvcc: the conformance program and the tests' own kernels compile for every
#                 target, without spills and without ptxas notes on wgmma (C75xx)
