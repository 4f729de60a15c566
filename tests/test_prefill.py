# SPDX-License-Identifier: Apache-2.0
"""The fused prefill: bit for bit the four verbs, exact attention over its own plan, and the same
bits on every run, for any thread count and at any place in a batch."""

import cases
import pytest
import torch
from harness import (
    ISAS,
    check_prefill,
    config_of,
    four_verbs,
    geometry_of,
    sequences_of,
    takes,
)
from numerics import pack, unpack

from pbs_attn import ops
from pbs_attn.selection import PERMUTES_QUERIES


def check(q, k, v, config, case=None, isa="auto", **heads):
    """prefill with its plan, compared with the four verbs and with the reference."""
    geometry = geometry_of(case)
    got = ops.prefill(
        q, k, v, config, geometry=geometry, return_lse=True, return_plan=True, isa=isa, **heads
    )
    out, lse, count, bits, k_perm = got
    run = four_verbs(q, k, v, config, geometry, isa=isa, **heads)
    assert torch.equal(bits, run.bits) and torch.equal(count, run.count)
    assert torch.equal(k_perm, run.k_perm)
    assert torch.equal(out, run.out) and torch.equal(lse, run.lse)
    q_perm = run.q_perm if config.permute in PERMUTES_QUERIES else None
    words = f"{config.permute} {config.select} {config.normalize} {config.correction}"
    what = f"prefill {words} {case and case.name} {isa}"
    check_prefill(out, lse, q, k, v, bits, k_perm, config, case, q_perm, what)
    return got


@pytest.mark.parametrize("words", [{"permute": "keys"}, {"permute": "both"}, cases.PEAK], ids=str)
@pytest.mark.parametrize("seqlen", cases.lengths())
def test_lengths(words, seqlen):
    check(*cases.make_inputs(61, (2, 1), seqlen), config_of(**words))


@pytest.mark.parametrize("permute", ["none", "identity", "queries"])
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
@pytest.mark.parametrize("seqlen", [1, 257, 811])
def test_other_modes(permute, correction, seqlen):
    inputs = cases.make_inputs(61, (2, 1), seqlen)
    check(*inputs, config_of(permute=permute, correction=correction, tau=0.7))


@pytest.mark.parametrize("case", cases.geometries(), ids=lambda case: case.name)
@pytest.mark.parametrize("permute", ["none", "keys", "both"])
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_geometries_and_nan_padding(case, permute, correction):
    inputs = cases.make_inputs(62, (2, 1), case=case, nan_padding=True)
    check(*inputs, config_of(permute=permute, correction=correction), case)


@pytest.mark.parametrize("case", cases.geometries(), ids=lambda case: case.name)
def test_geometries_and_nan_padding_of_peak(case):
    inputs = cases.make_inputs(62, (2, 1), case=case, nan_padding=True)
    check(*inputs, config_of(**cases.PEAK), case)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("head_dim", [8, 80, 256])
@pytest.mark.parametrize("words", [{}, cases.PEAK], ids=["paper", "peak"])
def test_head_dims_and_dtypes(dtype, head_dim, words):
    inputs = cases.make_inputs(63, (2, 1), 600, head_dim=head_dim, dtype=dtype)
    check(*inputs, config_of(**words))


@pytest.mark.parametrize("heads", cases.HEAD_RATIOS)
@pytest.mark.parametrize("gqa", ["per_head", "group"])
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_head_ratios(heads, gqa, correction):
    check(*cases.make_inputs(64, heads, 530), config_of(gqa=gqa, correction=correction))


@pytest.mark.parametrize("scorer", cases.SCORERS)
@pytest.mark.parametrize("rule, tau", cases.RULES)
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_scorers_and_rules(scorer, rule, tau, correction):
    inputs = cases.make_inputs(65, (2, 1), 1100)
    check(*inputs, config_of(rule=rule, tau=tau, correction=correction, **scorer))


@pytest.mark.parametrize("order", cases.ORDERS)
def test_orders(order):
    check(*cases.make_inputs(66, (2, 1), 900), config_of(order=order, seed=3))


@pytest.mark.parametrize("block_size, segment_size", [(64, 64), (64, 192), (256, 512), (128, 1024)])
def test_sizes(block_size, segment_size):
    inputs = cases.make_inputs(67, (1, 1), 2 * segment_size + 99)
    for words in ({}, cases.PEAK):
        check(*inputs, config_of(block_size=block_size, segment_size=segment_size, **words))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout):
    laid = check(*cases.make_inputs(68, (4, 2), 700, batch=2, layout=layout), config_of())
    plain = check(*cases.make_inputs(68, (4, 2), 700, batch=2), config_of())
    assert all(map(torch.equal, laid, plain))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("words", [{"permute": "keys"}, {"permute": "both"}, cases.PEAK], ids=str)
def test_every_isa(isa, dtype, words):
    inputs = cases.make_inputs(69, (2, 1), 600, head_dim=40, dtype=dtype)
    if takes(isa, dtype):
        check(*inputs, config_of(**words), isa=isa)


def test_per_head_tau_and_order():
    inputs = cases.make_inputs(70, (4, 2), 1100)
    tau = torch.tensor([0.2, 0.6, 0.9, 1.0])
    heads = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    check(*inputs, config_of(), tau_heads=tau, permute_heads=heads)


@pytest.mark.parametrize("permute", cases.PERMUTES)
@pytest.mark.parametrize("method", cases.METHODS)
def test_everything_kept_is_dense_attention(permute, method):
    """tau = 1: order and blocks are still made, and must cancel out."""
    case = next(case for case in cases.geometries() if case.name == "left_padding")
    inputs = cases.make_inputs(71, (2, 1), case=case, nan_padding=True)
    config = config_of(permute=permute, select=method, tau=1.0)
    out, lse, count, bits, k_perm = check(*inputs, config, case)
    identity = torch.arange(k_perm.shape[-1], dtype=torch.int32).expand_as(k_perm)
    # the same comparison, but with every block and no permutation: plain causal attention
    natural = config.replace(permute="identity")
    tk = -(-inputs.k.shape[2] // 128)
    full = torch.ones_like(unpack(bits, tk))
    for seq_index, length in enumerate(case.kv_len):
        full[seq_index, :, :, -(-length // 128) :] = False
        full[seq_index, :, -(-case.q_len[seq_index] // 128) :] = False
    check_prefill(out, lse, *inputs, pack(full), identity, natural, case, what="tau 1")


@pytest.mark.parametrize("permute", ["keys", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_every_run_and_for_any_threads(permute, dtype):
    inputs = cases.make_inputs(72, (6, 2), 1100, dtype=dtype, batch=2)
    options = {"return_lse": True, "return_plan": True}
    first = ops.prefill(*inputs, config_of(permute=permute), **options)
    threads = torch.get_num_threads()
    try:
        for num in (1, 2, 3, threads, threads):
            torch.set_num_threads(num)
            again = ops.prefill(*inputs, config_of(permute=permute), **options)
            assert all(map(torch.equal, first, again)), f"{num} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("permute", ["none", "keys", "both"])
def test_same_bits_at_any_place_in_a_batch(permute):
    """Each sequence of a padded or packed batch gives what a call on it alone gives."""
    for case in cases.geometries():
        inputs = cases.make_inputs(73, (4, 2), case=case)
        config = config_of(permute=permute)
        options = {"return_lse": True, "return_plan": True}
        out, lse, count, bits, k_perm = ops.prefill(
            *inputs, config, geometry=geometry_of(case), **options
        )
        for seq in sequences_of(*inputs, case):
            alone = ops.prefill(*(x[None] for x in (seq.q, seq.k, seq.v)), config, **options)
            assert torch.equal(out[seq.row, :, seq.rows], alone[0][0]), case.name
            assert torch.equal(lse[seq.row, :, seq.rows], alone[1][0]), case.name
            tq, w = alone[2].shape[2], alone[3].shape[3]
            assert torch.equal(count[seq.index, :, :tq], alone[2][0]), case.name
            assert torch.equal(bits[seq.index, :, :tq, :w], alone[3][0]), case.name
            assert torch.equal(k_perm[seq.index, :, : seq.k.shape[1]], alone[4][0]), case.name


def test_out_variant_equals_the_functional_op():
    case = next(case for case in cases.geometries() if case.name == "right_padding")
    inputs = cases.make_inputs(74, (4, 2), case=case, nan_padding=True)
    geometry = geometry_of(case)
    want, want_lse, *_ = ops.prefill(*inputs, config_of(), geometry=geometry, return_lse=True)
    out, lse = torch.zeros(want.transpose(1, 2).shape), torch.full_like(want_lse, -torch.inf)
    ops.prefill_out(*inputs, config_of(), out, lse, geometry=geometry)
    assert torch.equal(out, want.transpose(1, 2)) and torch.equal(lse, want_lse)
    strided = torch.full((2, 4, case.seqlen_q, 64), 0.0).transpose(1, 2)  # (B, H, N, D) memory
    ops.prefill_out(*inputs, config_of(), strided, geometry=geometry)
    assert torch.equal(strided, out)


@pytest.mark.parametrize("permute", ["keys", "queries"])
def test_repeated_key_heads_change_nothing(permute):
    q, k, v = cases.make_inputs(75, (4, 2), 900)
    config = config_of(permute=permute)
    grouped = ops.prefill(q, k, v, config, return_plan=True)
    repeated = ops.prefill(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), config, return_plan=True
    )
    assert all(map(torch.equal, grouped, repeated))


def test_a_given_order_is_used():
    inputs = cases.make_inputs(76, (2, 1), 900)
    want = ops.prefill(*inputs, config_of(), return_plan=True)
    again = ops.prefill(*inputs, config_of(), k_perm_in=want[4], return_plan=True)
    assert all(map(torch.equal, want, again))
