# SPDX-License-Identifier: Apache-2.0
"""Offsets beyond 2^31 elements: huge strides over one reserved mapping; the kernels really run.

The mapping is anonymous and MAP_NORESERVE: only pages that hold rows are ever backed by memory.
"""

import mmap

import cases
import pytest
import torch
from harness import check_prefill, config_of

from pbs_attn import attend, ops, pbs_attention

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
BYTES = 5 * 2**30
BIG = 2**31 + 64  # elements


@pytest.fixture(scope="module")
def mapping():
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, BYTES, flags=flags)
    yield memory
    # tensors over the mapping are gone by now, or closing would fail loudly
    memory.close()


def spread(mapping, x, dim, stride, offset=0):
    """A copy of x whose dimension dim steps by `stride` elements, far beyond 32 bits in total."""
    order = [d for d in range(4) if d != dim]
    strides, step = [0] * 4, 1
    for d in reversed(order):
        strides[d] = step
        step *= x.shape[d]
    strides[dim] = stride
    assert step <= stride or x.shape[dim] == 1
    assert (x.shape[dim] - 1) * stride + step + offset <= BYTES // x.element_size()
    base = torch.frombuffer(mapping, dtype=x.dtype, count=BYTES // x.element_size())
    view = base.as_strided(x.shape, strides, offset)
    view.copy_(x)
    return view


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.parametrize("which", ["q", "k", "v", "out"])
def test_strides_beyond_32_bits(mapping, dim, which):
    batch, heads = (2, (2, 2)) if dim < 2 else (1, (1, 1))
    seqlen = 530
    inputs = dict(
        cases.make_inputs(121, heads, seqlen, batch=batch, dtype=torch.bfloat16)._asdict()
    )
    config = config_of(permute="both", select="antidiagonal")
    want = pbs_attention(*inputs.values(), config=config, return_lse=True)
    stride = BIG if dim < 2 else -(-BIG // (seqlen - 1)) + 64
    shape = inputs["q"]
    if which == "out":
        out = spread(mapping, torch.zeros_like(shape), dim, stride)
        assert out.stride(dim) * (out.shape[dim] - 1) > 2**31
        got = pbs_attention(*inputs.values(), config=config, out=out, return_lse=True)
        assert got[0].data_ptr() == out.data_ptr()
    else:
        inputs[which] = spread(mapping, inputs[which], dim, stride)
        far = inputs[which]
        assert far.stride(dim) * (far.shape[dim] - 1) > 2**31
        got = pbs_attention(*inputs.values(), config=config, return_lse=True)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("verb", ["score", "permute", "attend"])
def test_each_verb(mapping, verb):
    q, k, v = cases.make_inputs(122, (2, 1), 530, dtype=torch.bfloat16)
    far = [spread(mapping, k, 2, 2**22 + 8), spread(mapping, v, 2, 2**22 + 8, 2**21)]
    assert far[0].stride(2) * 529 > 2**31
    if verb == "score":
        assert torch.equal(ops.score(q, far[0]), ops.score(q, k))
    elif verb == "permute":
        score = ops.score(q, k)
        got, want = ops.permute(q, *far, score), ops.permute(q, k, v, score)
        assert all(map(torch.equal, got, want))
    else:
        mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
        assert torch.equal(attend(q, *far, mask), attend(q, k, v, mask))


def test_a_late_start_in_a_long_row(mapping):
    """kv_start and q_start times the row stride leave 32 bits; so does the place in the output."""
    seqlen, length, stride = 70_000, 600, 2**15 + 64
    starts = torch.tensor([seqlen - length], dtype=torch.int32)
    inputs = cases.make_inputs(123, (1, 1), length, dtype=torch.bfloat16)
    base = torch.frombuffer(mapping, dtype=torch.bfloat16, count=BYTES // 2)
    wide = []
    for i, x in enumerate(inputs):
        row = base.as_strided((1, 1, seqlen, 64), (0, 0, stride, 1), 64 * i)
        row[:, :, seqlen - length :] = x
        wide.append(row)
    assert (seqlen - length) * stride > 2**31
    config = config_of()
    out = base.as_strided((1, 1, seqlen, 64), (stride * seqlen, 64, stride, 1), 64 * 3)
    lengths = torch.tensor([length], dtype=torch.int32)
    got = pbs_attention(
        *wide, config=config, q_start=starts, kv_start=starts, q_len=lengths, kv_len=lengths,
        max_seqlen_q=length, max_seqlen_k=length, out=out,
    )  # fmt: skip
    want, plan = pbs_attention(*inputs, config=config, return_plan=True)
    assert torch.equal(got[:, :, seqlen - length :], want)
    check_prefill(want, None, *inputs, plan.bits, plan.k_perm, config)
