# SPDX-License-Identifier: Apache-2.0
"""What torch.compile is told of functions that it cannot trace.

A module of its own, imported while a graph is traced: torch.compiler's decorators import
torch._dynamo, which takes a second that nobody should pay who does not compile.
"""

import torch

from . import devices, prefill

# The same for as long as the process lives, so a trace may take it for a constant.
library_refusal = torch.compiler.assume_constant_result(devices.library_refusal)

by_method = torch.compiler.disable(
    prefill.by_method, reason="block and token methods read lengths and choices on the host"
)
