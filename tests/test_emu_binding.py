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


def test_auto_is_sm90_and_no_cpu_set_is_taken(emu, qkv, monkeypatch):
    q, k, _ = qkv
    cut = {"block_size": 64, "segment_size": 128}
    auto = emu.ops.score(q, k, **cut)
    for isa in (8, 11):
        assert torch.equal(auto, emu.namespace.score(q, k, *Geometry(), 0.0, 64, 128, 0, 0, 0, isa))
    with pytest.raises(RuntimeError, match="unsupported: exec.isa: avx2; CUDA calls run sm80"):
        emu.ops.score(q, k, isa="avx2", **cut)
    monkeypatch.setenv("PBS_ATTN_ISA", "avx2")  # the CPU's business
    assert torch.equal(auto, emu.ops.score(q, k, **cut))
    with pytest.raises(RuntimeError, match=r"unsupported: dtype: 1; fp16 \(2\) and bf16 \(3\)"):
        emu.ops.score(q.float(), k.float(), **cut)


def test_forced_set_of_kernels(emu, monkeypatch):
    """The two sets round P V in another order: bits tell which one ran."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, 300, 64, generator=generator).to(F16) for _ in range(3))
    by_isa = {isa: emu.ops.attend(q, k, v, own="all", isa=isa) for isa in ("sm80", "sm90")}
    outs = {isa: x if isinstance(x, torch.Tensor) else x[0] for isa, x in by_isa.items()}
    assert not torch.equal(outs["sm80"], outs["sm90"])
    for forced, want in (("", "sm90"), ("sm80", "sm80"), ("sm90", "sm90"), ("c", "sm90")):
        monkeypatch.setenv("PBS_ATTN_ISA", forced)
        out = emu.ops.attend(q, k, v, own="all")
        assert torch.equal(out if isinstance(out, torch.Tensor) else out[0], outs[want]), forced


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
