# SPDX-License-Identifier: Apache-2.0
"""Hypothesis draws shapes, geometries and options; each prefill must be exact attention over its
own plan, each plan what the reference chooses, and a padded batch what its sequences give alone.

PBS_ATTN_HYPOTHESIS=thorough draws twenty times as many examples.
"""

import os

import cases
import torch
from harness import (
    ISAS,
    bits_of,
    check_prefill,
    config_of,
    cut_of,
    four_verbs,
    geometry_of,
    sequences_of,
    takes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_blocks, assert_close, low_precision_attend

from pbs_attn import ops, reference
from pbs_attn.selection import PERMUTES_QUERIES

TIMES = 20 if os.environ.get("PBS_ATTN_HYPOTHESIS") == "thorough" else 1


def examples(count):
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def configs(draw):
    block = draw(st.sampled_from([64, 128, 256]))
    rule, tau = draw(
        st.one_of(
            st.tuples(st.just("prefix"), st.floats(0.0, 1.125, width=32)),
            st.tuples(st.just("relative"), st.floats(0.0, 1.0, width=32)),
            st.tuples(st.just("absolute"), st.floats(0.0, 0.5, width=32)),
            st.tuples(st.just("budget"), st.integers(0, 6)),
        )
    )
    scorer, permute = draw(st.sampled_from(cases.scored_orders()))
    return config_of(
        block_size=block,
        segment_size=block * draw(st.integers(1, 4)),
        tau=tau,
        rule=rule,
        permute=permute,
        order=draw(st.sampled_from(cases.ORDERS)),
        gqa=draw(st.sampled_from(["per_head", "group"])),
        correction=draw(st.sampled_from(cases.CORRECTIONS)),
        **scorer,
        stride=draw(st.sampled_from([4, 8, 16])),
        reduce=draw(st.sampled_from(["sum", "max"])),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


@st.composite
def calls(draw):
    """(inputs, case): one to three sequences, padded or packed, queries and keys of any lengths."""
    batch = draw(st.integers(1, 3))
    lengths = st.integers(0, 700)
    q_len = [draw(lengths) for _ in range(batch)]
    kv_len = [draw(st.one_of(st.just(n), lengths)) for n in q_len]
    packed = draw(st.booleans())
    gaps = st.integers(0, 70)
    if packed:
        q_start, kv_start, q_end, kv_end = [], [], draw(gaps), draw(gaps)
        for n, m in zip(q_len, kv_len, strict=True):
            q_start.append(q_end)
            kv_start.append(kv_end)
            q_end, kv_end = q_end + n + draw(gaps), kv_end + m + draw(gaps)
    else:
        q_start, kv_start = [[draw(gaps) for _ in range(batch)] for _ in range(2)]
        q_end = max(a + n for a, n in zip(q_start, q_len, strict=True)) + draw(gaps)
        kv_end = max(a + n for a, n in zip(kv_start, kv_len, strict=True)) + draw(gaps)
    vectors = (tuple(x) for x in (q_start, q_len, kv_start, kv_len))
    case = cases.Case("drawn", q_end, kv_end, *vectors, batch, packed and batch > 1)
    inputs = cases.make_inputs(
        draw(st.integers(0, 2**20)),
        draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2)])),
        head_dim=8 * draw(st.integers(1, 12)),
        dtype=draw(st.sampled_from(cases.DTYPES)),
        case=case,
        layout=draw(st.sampled_from(cases.LAYOUTS)),
        nan_padding=True,
    )
    return inputs, case


@examples(150)
@given(calls(), configs(), st.sampled_from([isa for isa in ISAS if not isa.startswith("emu")]))
def test_prefill_is_exact_over_its_own_plan(call, config, isa):
    inputs, case = call
    if not takes(isa, inputs.q.dtype):
        return
    geometry = geometry_of(case)
    got = ops.prefill(
        *inputs, config, geometry=geometry, return_lse=True, return_plan=True, isa=isa
    )
    out, lse, count, bits, k_perm = got
    run = four_verbs(*inputs, config, geometry, isa=isa)
    for name in ("out", "lse", "count", "bits", "k_perm"):
        assert torch.equal(locals()[name], getattr(run, name)), f"{name}: not the four verbs'"
    q_perm = run.q_perm if config.permute in PERMUTES_QUERIES else None
    check_prefill(out, lse, *inputs, bits, k_perm, config, case, q_perm, f"{case} {config}")
    for seq in sequences_of(*inputs, case):
        check_plan(seq, run, config)


def check_plan(seq, run, config):
    """Permutations are permutations, and select chose what the reference chooses for them."""
    seqlen_q, seqlen_k = seq.q.shape[1], seq.k.shape[1]
    k_perm = run.k_perm[seq.index, :, :seqlen_k]
    segment = config.segment_size
    complete = seqlen_k // segment * segment
    home = torch.arange(seqlen_k).expand_as(k_perm)
    inside = k_perm[:, :complete].unflatten(1, (-1, segment)).sort(-1).values.flatten(1)
    assert torch.equal(inside.long(), home[:, :complete])
    assert torch.equal(k_perm[:, complete:].long(), home[:, complete:])
    q_perm = None
    if run.q_perm is not None:
        q_perm = run.q_perm[seq.index, :, :seqlen_q]
        assert torch.equal(q_perm.sort(-1).values.long(), torch.arange(seqlen_q).expand_as(q_perm))
    bits = bits_of(run.bits, seq, config)
    if not bits.numel():
        return
    exact = reference.select(
        seq.q.double(),
        seq.k.double(),
        k_perm=k_perm,
        q_perm=q_perm,
        permute=config.permute,
        method=config.select,
        stride=config.stride,
        reduce=config.reduce,
        rule=config.rule,
        normalize=config.normalize,
        tau=float(torch.tensor(config.tau, dtype=torch.float32)),
        **cut_of(config),
    )
    assert_blocks(bits, exact, rule=config.rule, tau=config.tau, what=f"select {config}")


@examples(50)
@given(calls(), configs())
def test_a_batch_gives_what_its_sequences_give_alone(call, config):
    inputs, case = call
    whole = ops.prefill(*inputs, config, geometry=geometry_of(case), return_lse=True)
    for seq in sequences_of(*inputs, case):
        alone = ops.prefill(*(x[None] for x in seq[-3:]), config, return_lse=True)
        assert torch.equal(whole[0][seq.row, :, seq.rows], alone[0][0])
        assert torch.equal(whole[1][seq.row, :, seq.rows], alone[1][0])


@examples(50)
@given(calls(), configs(), st.integers(1, 5))
def test_threads_change_no_bit(call, config, num_threads):
    inputs, case = call
    options = {"geometry": geometry_of(case), "return_lse": True, "return_plan": True}
    want = ops.prefill(*inputs, config, **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        got = ops.prefill(*inputs, config, **options)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, got, want))


@examples(50)
@given(calls(), configs())
def test_everything_kept_is_dense(call, config):
    """tau >= 1 keeps all: order, selection and packing cancel out."""
    inputs, case = call
    config = config.replace(rule="prefix", tau=1.0)
    geometry = geometry_of(case)
    out, lse, *_ = ops.prefill(*inputs, config, geometry=geometry, return_lse=True)
    for seq in sequences_of(*inputs, case):
        exact = reference.attend(*(x.double() for x in seq[-3:]), own="all")
        low = low_precision_attend(*seq[-3:], None, own="all")
        assert_close(out[seq.row, :, seq.rows], exact[0], low[0], what=f"{case} {config} out")
        assert_close(lse[seq.row, :, seq.rows], exact[1], low[1], what=f"{case} {config} lse")


@examples(80)
@given(calls(), configs(), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_larger_tau_never_removes_a_block(call, config, first, second):
    inputs, case = call
    low, high = sorted((first, second))
    rule = config.rule if config.rule == "budget" else "prefix"
    geometry = geometry_of(case)
    bits = [
        ops.prefill(
            *inputs, config.replace(rule=rule, tau=tau), geometry=geometry, return_plan=True
        )[3]
        for tau in (low, high)
    ]
    assert (bits[0] & ~bits[1]).sum() == 0
