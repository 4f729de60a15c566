# SPDX-License-Identifier: Apache-2.0
"""What each kind of device can run. `takes` is the one place that says so: routing, `supports`, the
dense route and the support matrix of `doctor` all ask it.

A device's family is "cpu" or "cuda:8.0", "cuda:9.0", ... after its compute capability.
"""

import torch

from . import _load, env

CAPABILITY_FLOOR = (8, 0)  # mma.sync on bf16, cp.async
BLOCK_SIZES = (64, 128, 256)
MAX_SEGMENT_SIZE = 2048
MAX_HEAD_DIM = 256  # and multiples of 8 up to that
DTYPES = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
}
ROW_BYTES = 16  # a GPU moves rows in pieces of this size, so they start on multiples of it

# What a build compiles unless PBS_CUDA_ARCHS says otherwise; a library says itself what it holds.
DEFAULT_ARCHS = "80+PTX;90"

_capabilities = {}


def kind(device):
    """ "cpu" or "cuda", or what torch calls a device that pbs_attn has no kernels for."""
    return device.type


def takes(kind, capability, dtype, head_dim, head_dim_v):
    """Why kernels of such a device do not take such tensors, as a routing reason, or None.

    kind "cpu" or "cuda"; capability (major, minor) of a GPU, None on a CPU."""
    if kind not in DTYPES or (kind == "cuda" and capability < CAPABILITY_FLOOR):
        return "device"
    if dtype not in DTYPES[kind]:
        return "dtype"
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        return "head_dim"
    if head_dim_v != head_dim:
        return "head_dim_v"
    return None


def kernel_lacks(q, k, v):
    """Why our kernels cannot take these (B, H, N, D) tensors here, as a routing reason, or None."""
    if refusal(q.device) is not None:
        return "device"
    on_gpu = kind(q.device) == "cuda"
    known = capability(q.device) if on_gpu else None
    lack = takes(kind(q.device), known, q.dtype, q.shape[3], v.shape[3])
    if lack is None and on_gpu and not all(aligned(x) for x in (q, k, v)):
        return "alignment"
    return lack


def refusal(device):
    """Why nothing of ours runs on the device, as a sentence, or None."""
    if kind(device) not in DTYPES:
        return f"pbs_attn has no kernels for devices of type {device.type}"
    if env.current.backend in DTYPES and env.current.backend != kind(device):
        return f"PBS_ATTN_BACKEND is {env.current.backend}"
    if kind(device) == "cpu":
        return None
    if _load.CUDA is None:
        return f"pbs_attn's CUDA library is not loaded: {_load.NO_CUDA}"
    found = capability(device)
    if found is None:
        return "torch finds no such GPU"
    ask = library_refusal
    if torch.compiler.is_compiling():
        from .tracing import library_refusal as ask
    return gpu_refusal(found, _load.CUDA_ARCHS) or ask(device.index or 0)


def library_refusal(index):
    """What the library's own CUDA runtime says: a driver that serves torch's may be too old."""
    return _load.CUDA.refuses(index)


def gpu_refusal(capability, archs):
    """Why a library with code for archs ("80+PTX;90") runs nothing on such a GPU, or None."""
    name = f"{capability[0]}.{capability[1]}"
    if capability < CAPABILITY_FLOOR:
        return f"its compute capability is {name}, and 8.0 is the least"
    if not any(_holds(arch, capability) for arch in archs.split(";")):
        return f"its compute capability is {name}, and the CUDA library was built for {archs}"
    return None


def _holds(arch, capability):
    """Machine code runs on its own major version from its minor on, PTX on all that follow; what
    is compiled for 90a runs on 9.0 alone."""
    number = arch.removesuffix("+PTX")
    exact = number.endswith("a")
    built = divmod(int(number.removesuffix("a")), 10)
    if exact:
        return capability == built
    return built <= capability and (built[0] == capability[0] or arch.endswith("+PTX"))


def capability(device):
    """(major, minor) of a GPU, None where torch finds none. Asked once per device."""
    index = 0 if device.index is None else device.index
    if index not in _capabilities:
        _capabilities[index] = _ask(index)
    return _capabilities[index]


def _ask(index):
    if not torch.version.cuda or not torch.cuda.is_available():
        return None
    # Not get_device_capability: of the two, only this one is known to torch.compile.
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.minor


def family(device):
    """Key of tables by device."""
    if kind(device) != "cuda":
        return kind(device)
    found = capability(device)
    return "cuda" if found is None else f"cuda:{found[0]}.{found[1]}"


def aligned(x):
    """True if every row of a (.., .., .., D) tensor starts on a multiple of 16 bytes.

    Fake and meta tensors have no address: their storage is taken to begin where torch's own
    allocator begins one, on a multiple of 512 bytes. torch.compile knows strides alone; should
    the address be odd after all, the kernels refuse the call with an error."""
    if x.numel() == 0:
        return True
    steps = [x.stride(i) for i in range(x.ndim - 1) if x.shape[i] > 1]
    if not all(step * x.element_size() % ROW_BYTES == 0 for step in steps):
        return False
    if torch.compiler.is_compiling():
        return True
    if type(x) is torch.Tensor and not x.is_meta:
        return x.data_ptr() % ROW_BYTES == 0
    return x.storage_offset() * x.element_size() % ROW_BYTES == 0
