# SPDX-License-Identifier: Apache-2.0
"""The torch binding of the CUDA library, as far as a machine without a GPU can see it: on the CPU's
tensors, over the emulated GPU."""

import emu_backend
import pytest
import torch

from pbs_attn.geometry import Geometry

F16 = torch.bfloat16


@pytest.fixture(scope="module")
def emu():
    return emu_backend.get("emu")


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 200, 32), (1, 1, 200, 32), (1, 1, 200, 32))
    return [torch.randn(shape, generator=generator).to(F16) for shape in shapes]


@pytest.mark.parametrize("name", emu_backend.VERBS)
def test_schemas_are_those_of_the_cpu_library(emu, name):
    ours, theirs = (getattr(ops, name).default for ops in (emu.namespace, torch.ops.pbs_attn))
    assert str(ours._schema).replace("pbs_attn_emu::", "pbs_attn::") == str(theirs._schema)


def test_auto_is_sm80_and_nothing_else_is_taken(emu, qkv):
    q, k, _ = qkv
    cut = {"block_size": 64, "segment_size": 128}
    auto = emu.ops.score(q, k, **cut)
    assert torch.equal(auto, emu.namespace.score(q, k, *Geometry(), 0.0, 64, 128, 0, 0, 0, 8))
    with pytest.raises(RuntimeError, match="unsupported: exec.isa: avx2; CUDA calls run sm80"):
        emu.ops.score(q, k, isa="avx2", **cut)
    with pytest.raises(RuntimeError, match=r"unsupported: dtype: 1; fp16 \(2\) and bf16 \(3\)"):
        emu.ops.score(q.float(), k.float(), **cut)


def test_packed_is_the_same_bytes_each_time(emu, qkv):
    """Also where no key is: memory that torch hands out again is not clean."""
    q, k, v = qkv
    score = emu.ops.score(q, k, block_size=64, segment_size=128)

    def packed():
        cut = {"block_size": 64, "segment_size": 128}
        geometry = Geometry(kv_len=torch.tensor([100], dtype=torch.int32))
        return emu.ops.permute(q, k, v, score, geometry=geometry, **cut)[4]

    first = packed()
    for _ in range(3):
        torch.empty_like(first).fill_(0xFF)
        assert torch.equal(packed(), first)


def test_rows_outside_every_sequence_read_0(emu, qkv):
    q, k, v = qkv
    lens = [torch.tensor([150], dtype=torch.int32) for _ in range(2)]
    geometry = Geometry(q_len=lens[0], kv_len=lens[1])
    out, lse = emu.ops.attend(
        q, k, v, geometry=geometry, block_q=64, block_k=64, own="all", return_lse=True
    )
    assert out[:, :, :150].abs().sum(-1).all() and lse[:, :, :150].isfinite().all()
    assert not out[:, :, 150:].any() and torch.isneginf(lse[:, :, 150:]).all()
