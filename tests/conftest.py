# SPDX-License-Identifier: Apache-2.0
"""The fixture `backend`: every test that takes it runs on the emulated GPU, and on a real one where
there is one. `-k emu` or `-m gpu` picks."""

import emu_backend
import meta_gpu
import pytest
import torch


@pytest.fixture(params=emu_backend.params())
def backend(request):
    """The reference beside it runs on one thread: on tensors of this size threads only wait for
    each other, 30 times as long as one takes where something else runs too."""
    chosen = emu_backend.get(request.param)
    chosen.schedule()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield chosen
    torch.set_num_threads(threads)


@pytest.fixture(params=emu_backend.ISAS)
def isa(request, backend):
    """Each set of kernels that CUDA calls run, on devices that have it."""
    backend.require(request.param)
    return request.param


@pytest.fixture
def gpu(monkeypatch):
    return meta_gpu.install(monkeypatch)
