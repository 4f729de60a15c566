# SPDX-License-Identifier: Apache-2.0
"""Block methods through `pbs_attention`: batches with padding, dtypes, dense where all is kept."""

import cases
import pytest
import torch
from harness import check_attention, sequences_of

import pbs_attn
from pbs_attn import methods

ALL = [
    "streaming:sink=64,window=100",
    "oracle:tau=0.6",
    "flashprefill:alpha=0.5,sink=0,window=1,last=0",
    "flashprefill:alpha=0.5,sink=0,window=1,last=0,gqa=group,block=64",
    "flexprefill:gamma=0.5,min_budget=1,block=64",
    "meanpool:recipe=authors,tau=0.5",
    "xattention:recipe=authors,tau=0.5,block=256",
]
KEEP_ALL = [
    *(f"{text.partition(':')[0]}:{methods.get(text).KEEP_ALL}" for text in ALL[:3]),
    "oracle:tau=1,reduce=max,block=64",
    "oracle:rule=budget,tau=1000",
    "oracle:rule=absolute,tau=0",
    "flashprefill:alpha=0",
    "flashprefill:alpha=0,sink=0,window=1,last=0,gqa=group,block=64",
    "flexprefill:gamma=1",
    "flexprefill:min_budget=100000",
    "meanpool:recipe=authors,tau=1",
    "xattention:recipe=authors,tau=1,block=64",
]
CASES = {case.name: case for case in cases.geometries()}


def attention(text, inputs, case):
    """(out, lse, record) of the real call; every length is sparse."""
    method = methods.get(text).replace(min_q=0, min_kv=0, strict=True)
    with pbs_attn.record() as record:
        out, lse = pbs_attn.pbs_attention(
            *inputs, config=method, return_lse=True, **case.geometry()
        )
    return out, lse, record


def check(text, case, heads, dtype, everything=False):
    inputs = cases.make_inputs(0, heads, head_dim=16, dtype=dtype, case=case, nan_padding=True)
    out, lse, record = attention(text, inputs, case)
    method, computed, causal = methods.get(text), 0.0, 0
    live = torch.zeros(out.shape[0], out.shape[2], dtype=torch.bool)
    for seq in sequences_of(*inputs, case):
        if not (seq.q.shape[1] and seq.k.shape[1]):
            continue
        live[seq.row, seq.rows] = True
        call = methods.Call(seq.q, seq.k, seq.v, 16**-0.5)
        blocks = method.blocks(call)
        check_attention(
            out[seq.row, :, seq.rows],
            lse[seq.row, :, seq.rows],
            seq,
            blocks,
            block_q=method.block_q,
            block_k=method.block_k,
            own="all" if everything else "mask",
            what=f"{text} {case.name}",
        )
        shared = blocks.repeat_interleave(heads[0] // len(blocks), 0)
        computed += methods.base.block_pairs(call, shared, method.block_q, method.block_k).mean()
        causal += methods.base.causal_pairs(call)
    assert (out.transpose(1, 2)[~live] == 0).all()
    assert record.calls == {"pbs": 1, "dense": 0}
    assert record.density == (1.0 if everything else pytest.approx(float(computed) / causal))
    return record.density


PADDED = ["right_padding", "left_padding", "static_cache", "chunk", "q_longer", "no_keys"]


@pytest.mark.parametrize("case", PADDED)
@pytest.mark.parametrize("text", ALL)
def test_every_sequence_of_a_batch_is_a_call_of_its_own(text, case):
    check(text, CASES[case], (4, 1), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ALL)
def test_low_precision(text, dtype):
    assert check(text, CASES["whole"], (3, 1), dtype) < 1


@pytest.mark.parametrize(
    "case, heads", [("left_padding", (3, 1)), ("chunk", (2, 2)), ("q_longer", (4, 1))]
)
@pytest.mark.parametrize("text", KEEP_ALL)
def test_everything_kept_is_full(text, case, heads):
    """By the rule of numerics.py, and the density is exactly 1."""
    check(text, CASES[case], heads, torch.float32, everything=True)


@pytest.mark.parametrize("text", ALL)
def test_what_the_kernels_lack_runs_through_torch(text):
    """A head dimension that is no multiple of 8 and fp64."""
    for head_dim, dtype in ((12, torch.float32), (16, torch.float64)):
        q, k, v = cases.make_inputs(1, (4, 2), 300, head_dim=head_dim, dtype=dtype)
        method = methods.get(text)
        blocks = method.blocks(methods.Call(q[0], k[0], v[0], head_dim**-0.5))
        out, _, _ = methods.run(method, q, k, v)
        exact = pbs_attn.attend(
            *(x.double() for x in (q, k, v)), blocks[None],
            block_q=method.block_q, block_k=method.block_k,
        )  # fmt: skip
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", KEEP_ALL)
def test_everything_is_kept_where_masses_vanish(text):
    """Logits so far apart that most blocks have a mass of 0, and the others sum to 1 early."""
    inputs = cases.make_inputs(2, (4, 2), 333, 1100, head_dim=16)
    call = methods.Call(*(x[0] for x in inputs), 100.0)
    method = methods.get(text)
    causal = methods.base.causal_blocks(call, method.block_q, method.block_k)
    assert (method.blocks(call) == causal).all()
