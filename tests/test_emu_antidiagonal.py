# SPDX-License-Identifier: Apache-2.0
"""Antidiagonal scores on CUDA's kernels, emulated or real: groups of every size, shares of a whole
row, rows without a number. The grid of shapes is in test_emu_select.py."""

import cases
import pytest
import torch
from harness import config_of, geometry_of
from test_emu_select import SMALL, check, plan

from pbs_attn import ops

BF16 = torch.bfloat16


@pytest.mark.parametrize("block_size, stride", [
    (64, 1), (64, 2), (64, 4), (64, 32), (64, 64), (128, 1), (128, 8), (128, 16), (256, 1),
    (256, 2), (256, 256),
])  # fmt: skip
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize(
    "permute, normalize", [("none", "history"), ("both", "history"), ("keys", "row")]
)
def test_antidiagonal_strides(backend, block_size, stride, reduce, permute, normalize):
    """1 to 256 groups in a block: many blocks to a tile of groups, and many tiles to a block."""
    inputs = cases.make_inputs(23, (1, 1), block_size + 37, 2 * block_size + 99, 16, BF16)
    config = config_of(
        select="antidiagonal", stride=stride, reduce=reduce, permute=permute, normalize=normalize,
        block_size=block_size, segment_size=block_size,
    )  # fmt: skip
    check(backend, *inputs, config)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("seqlen_q", [37, 130, 400])
def test_shares_of_rows_over_many_segments(backend, reduce, stride, seqlen_q):
    """Own spans in the original order behind permuted history, where query blocks of a strip differ
    in which is which."""
    inputs = cases.make_inputs(39, (2, 1), seqlen_q, 769, 16, BF16)
    config = config_of(
        **cases.ROW, reduce=reduce, stride=stride, rule="absolute", tau=0.05, **SMALL
    )
    check(backend, *inputs, config)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("seqlen_q", [129, 449])
def test_rows_of_segments_of_one_block_are_those_of_mode_none(backend, reduce, seqlen_q):
    """Equal masses and equal blocks, bit for bit, where a chunk starts on a block."""
    inputs = cases.make_inputs(40, (2, 1), seqlen_q, seqlen_q + 320, 32, BF16)
    base = {"select": "antidiagonal", "reduce": reduce, "rule": "absolute", "tau": 0.05}
    cut = {"block_size": 64, "segment_size": 64}
    none = config_of(permute="none", **base, **cut)
    rows = config_of(permute="identity", normalize="row", **base, **cut)
    (bits, count, mass), want = (
        backend.ops.select(*inputs[:2], **plan(*inputs, config, geometry_of(None)))
        for config in (rows, none)
    )
    assert torch.equal(bits, want[0]) and torch.equal(count, want[1])
    history = mass > 0
    assert history.any() and torch.equal(mass[history], want[2][history])


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("rule, tau", cases.RULES)
@pytest.mark.parametrize("permute, normalize", [
    ("none", "history"), ("keys", "history"), ("keys", "row"), ("identity", "row"),
])  # fmt: skip
def test_a_query_that_is_no_number(backend, reduce, rule, tau, permute, normalize):
    """Its query block keeps every block, and no other block sees it: as on the CPU."""
    q, k, v = cases.make_inputs(41, (2, 1), 200, 500, 16, BF16)
    config = config_of(
        select="antidiagonal", reduce=reduce, rule=rule, tau=tau, permute=permute,
        normalize=normalize, **SMALL,
    )  # fmt: skip
    options = plan(q, k, v, config, geometry_of(None))
    clean = backend.ops.select(q, k, **options)
    q[0, 1, 70, 3] = torch.nan
    got, want = backend.ops.select(q, k, **options), ops.select(q, k, **options)
    assert torch.equal(got[2].isnan(), want[2].isnan()) and got[2][0, 1, 1].isnan().any()
    assert torch.equal(got[0][0, 1, 1], want[0][0, 1, 1])
    others = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3)]
    for h, m in others:
        assert torch.equal(got[0][0, h, m], clean[0][0, h, m])
