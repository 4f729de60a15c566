# SPDX-License-Identifier: Apache-2.0
"""The reference of what peak adds, against a brute force (fp64): shares of the whole row, and one
mean token per dropped block."""

import brute_force
import cases
import pytest
import torch
from test_reference import PAIRS, SMALL, B, S, close, dense, inputs

from pbs_attn import reference

ROW = {"method": "antidiagonal", "stride": 2, "normalize": "row"}


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("permute", ["identity", "keys"])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(29, 29), (31, 31), (5, 29), (11, 30), (29, 13)])
def test_shares_of_the_row_by_hand(reduce, permute, seqlen_q, seqlen_k):
    q, k, v = inputs(4, (2, 1), seqlen_q, seqlen_k)
    k_perm = reference.prefill(q, k, v, permute=permute, **SMALL).k_perm
    found = reference.select(
        q, k, k_perm=k_perm, permute=permute, reduce=reduce, rule="absolute", tau=0.15, **ROW,
        **SMALL,
    )  # fmt: skip
    offset = seqlen_k - seqlen_q
    for h in range(2):
        order = k_perm[h].tolist()
        for m in range(-(-seqlen_q // B)):
            rows = list(range(m * B, min((m + 1) * B, seqlen_q)))
            start = brute_force.first_own_key(m * B, offset, "segment", B, S, 0)
            end = max(offset + rows[-1] + 1, 0)
            history = {n: order[n * B : (n + 1) * B] for n in range(start // B)}
            own = {
                n: range(n * B, min(n * B + B, seqlen_k)) for n in range(start // B, -(-end // B))
            }
            expected, kept = torch.zeros(found.mass.size(2), dtype=torch.float64), set()
            if history:
                mass = brute_force.antidiagonal_row(
                    q[h], k[0], rows, history, 8**-0.5, 2, reduce, offset, False, own
                )
                expected[list(mass)] = torch.tensor(list(mass.values()), dtype=torch.float64)
                kept = brute_force.choose("absolute", 0.15, mass) | {order.index(0) // B}
            close(found.mass[h, m], expected)
            assert set(found.bits[h, m].nonzero().flatten().tolist()) == kept, (h, m)


def test_shares_of_the_row_leave_room_for_the_own_span():
    """history: masses add up to 1; row: to less, by one factor for all of a single row group."""
    q, k, _ = inputs(5, (2, 1), 29)
    how = {"method": "antidiagonal", "stride": B, "permute": "identity"}
    history, row = (reference.select(q, k, normalize=x, **how, **SMALL) for x in ("history", "row"))
    sums = row.mass.sum(-1)[:, 2:]
    close(history.mass.sum(-1)[:, 2:], torch.ones_like(sums))
    assert (sums < 1).all() and (sums > 0).all()
    close(row.mass[:, 2:] / sums[..., None], history.mass[:, 2:])


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(29, 29), (16, 31), (9, 29), (5, 29)])
def test_segments_of_one_block_give_natural_order(seqlen_q, seqlen_k):
    """XAttention is the case of segments that are blocks, where blocks of rows and keys align."""
    seqlen_k = seqlen_q + (seqlen_k - seqlen_q) // B * B
    q, k, _ = inputs(6, (2, 1), seqlen_q, seqlen_k)
    how = {"rule": "absolute", "tau": 0.1, "block_size": B, "segment_size": B, **ROW}
    one, other = (reference.select(q, k, permute=x, **how) for x in ("identity", "none"))
    assert torch.equal(one.bits, other.bits)
    close(one.mass, other.mass.masked_fill(~one.eligible, 0.0))


def brute_prefill(q, k, v, plan, own, block=B, segment=S):
    heads, seqlen_q, scale = q.size(0), q.size(1), q.size(2) ** -0.5
    rows = []
    for h in range(heads):
        k_perm = plan.k_perm[h * plan.k_perm.size(0) // heads].tolist()
        q_perm = None if plan.q_perm is None else plan.q_perm[h].tolist()
        call = (seqlen_q, k.size(1), k_perm, q_perm, own, block, block, segment)
        mask = brute_force.token_mask(plan.selection.bits[h], *call)
        means = brute_force.dropped_blocks(plan.selection.bits[h], *call)
        kv = h * k.size(0) // heads
        rows.append(brute_force.add_means(q[h], k[kv], v[kv], mask, means, scale))
    return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


@pytest.mark.parametrize("gqa", ["per_head", "group"])
@pytest.mark.parametrize("permute", cases.PERMUTES)
@pytest.mark.parametrize("seqlen_q, seqlen_k", PAIRS)
def test_a_mean_token_for_every_dropped_block(gqa, permute, seqlen_q, seqlen_k):
    q, k, v = inputs(1, (2, 1), seqlen_q, seqlen_k)
    options = {"permute": permute, "tau": 0.5, "gqa": gqa, **SMALL}
    plan = reference.prefill(q, k, v, correction="mean", **options)
    out, lse = brute_prefill(q, k, v, plan, "block" if permute == "none" else "segment")
    close(plan.out, out)
    close(plan.lse, lse)
    if seqlen_k == 29:
        assert not torch.equal(plan.out, reference.prefill(q, k, v, **options).out)


@pytest.mark.parametrize("own", ["segment", "block", "mask", "none"])
@pytest.mark.parametrize("block_q, block_k", [(4, 4), (8, 4), (4, 8)])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(29, 29), (7, 29), (29, 13)])
def test_own_span_modes(own, block_q, block_k, seqlen_q, seqlen_k):
    q, k, v = inputs(2, (2, 2), seqlen_q, seqlen_k)
    shape = (2, -(-seqlen_q // block_q), -(-seqlen_k // block_k))
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    cut = {"block_q": block_q, "block_k": block_k, "segment_size": S}
    out, lse = reference.attend(q, k, v, bits, own=own, correction="mean", **cut)
    for h in range(2):
        call = (seqlen_q, seqlen_k, range(seqlen_k), None, own, block_q, block_k, S)
        mask = brute_force.token_mask(bits[h], *call)
        means = brute_force.dropped_blocks(bits[h], *call)
        expected = brute_force.add_means(q[h], k[h], v[h], mask, means, q.size(2) ** -0.5)
        close(out[h], expected[0])
        close(lse[h], expected[1])


@pytest.mark.parametrize("permute", cases.PERMUTES)
def test_equal_keys_make_the_correction_exact(permute):
    q, k, v = inputs(3, (2, 1), 29)
    k = k[:, torch.arange(29) // B * B]  # a block's keys are all its first one
    plan = reference.prefill(q, k, v, permute=permute, tau=0.0, correction="mean", **SMALL)
    assert plan.selection.bits.sum() < plan.selection.eligible.sum()
    if plan.k_perm is not None and permute in ("keys", "both"):
        assert (plan.k_perm != torch.arange(29)).any()
    for got, want in zip((plan.out, plan.lse), dense(q, k, v), strict=True):
        close(got, want)


def test_means_are_rounded_to_the_dtype_of_the_keys():
    q, k, v = (x.bfloat16() for x in inputs(7, (1, 1), 12))
    bits = torch.zeros(1, 3, 3, dtype=torch.bool)
    cut = {"block_q": B, "block_k": B, "segment_size": B, "own": "none", "correction": "mean"}
    out, _ = reference.attend(q.float(), k.float(), v.float(), bits, **cut)
    means = [x.float().unflatten(1, (3, B)).mean(2).bfloat16().float() for x in (k, v)]
    rounded = [x.repeat_interleave(B, 1) for x in means]
    want, _ = reference.attend(q.float(), *rounded, bits, **cut)
    got, _ = reference.attend(q, k, v, bits, **cut)
    assert not torch.equal(out, want)
    assert torch.equal(got[:, B : 2 * B], want[:, B : 2 * B].bfloat16())  # one block: its value
