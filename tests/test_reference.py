# SPDX-License-Identifier: Apache-2.0
"""The reference is checked: against a brute force, and by the properties it must have (fp64)."""

import brute_force
import cases
import pytest
import torch

from pbs_attn import reference

B, S = 4, 8  # small blocks: the reference takes any size, and brute force stays quick
SMALL = {"block_size": B, "segment_size": S}
PAIRS = ((1, 1), (3, 3), (16, 16), (17, 17), (29, 29), (5, 29), (9, 20), (29, 13), (10, 8), (8, 0))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of some dozens of numbers: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(seed, heads=(2, 1), seqlen_q=29, seqlen_k=None, head_dim=8):
    x = cases.make_inputs(seed, heads, seqlen_q, seqlen_k, head_dim, torch.float64)
    return x.q[0], x.k[0], x.v[0]


def dense(q, k, v):
    return reference.attend(q, k, v, own="all")


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- brute force ---------------------------------------------------------------------------------


def brute_prefill(q, k, v, plan, own, block=B, segment=S):
    heads, seqlen_q, scale = q.size(0), q.size(1), q.size(2) ** -0.5
    rows = []
    for h in range(heads):
        kv = h * k.size(0) // heads
        k_perm = plan.k_perm[h * plan.k_perm.size(0) // heads].tolist()
        q_perm = None if plan.q_perm is None else plan.q_perm[h].tolist()
        mask = brute_force.token_mask(
            plan.selection.bits[h], seqlen_q, k.size(1), k_perm, q_perm, own, block, block, segment
        )
        rows.append(brute_force.dense_attention(q[h], k[kv], v[kv], mask, scale))
    return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


@pytest.mark.parametrize("permute", cases.PERMUTES)
@pytest.mark.parametrize("seqlen_q, seqlen_k", PAIRS)
def test_attend_is_dense_softmax_over_the_token_mask(permute, seqlen_q, seqlen_k):
    q, k, v = inputs(1, (2, 1), seqlen_q, seqlen_k)
    plan = reference.prefill(q, k, v, permute=permute, tau=0.5, **SMALL)
    out, lse = brute_prefill(q, k, v, plan, "block" if permute == "none" else "segment")
    close(plan.out, out)
    close(plan.lse, lse)


@pytest.mark.parametrize("own", ["segment", "block", "mask", "none", "all"])
@pytest.mark.parametrize("block_q, block_k", [(4, 4), (8, 4), (4, 8)])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(29, 29), (7, 29), (29, 13)])
def test_own_span_modes(own, block_q, block_k, seqlen_q, seqlen_k):
    q, k, v = inputs(2, (2, 2), seqlen_q, seqlen_k)
    shape = (2, -(-seqlen_q // block_q), -(-seqlen_k // block_k))
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    out, lse = reference.attend(
        q, k, v, bits, own=own, block_q=block_q, block_k=block_k, segment_size=S
    )
    for h in range(2):
        natural = range(seqlen_k)
        mask = brute_force.token_mask(
            bits[h], seqlen_q, seqlen_k, natural, None, own, block_q, block_k, S
        )
        expected = brute_force.dense_attention(q[h], k[h], v[h], mask, q.size(2) ** -0.5)
        close(out[h], expected[0])
        close(lse[h], expected[1])


@pytest.mark.parametrize("method", ["mean_pool", "sum", "max"])
@pytest.mark.parametrize("permute", cases.PERMUTES)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(29, 29), (31, 31), (5, 29), (11, 30), (29, 13)])
def test_select_by_hand(method, permute, seqlen_q, seqlen_k):
    q, k, v = inputs(4, (2, 1), seqlen_q, seqlen_k)
    how = {"method": "mean_pool"} if method == "mean_pool" else {
        "method": "antidiagonal", "reduce": method, "stride": 2
    }  # fmt: skip
    plan = reference.prefill(q, k, v, permute=permute, **SMALL)
    found = {}
    for rule, tau in cases.RULES:
        found[rule] = tau, reference.select(
            q, k, k_perm=plan.k_perm, q_perm=plan.q_perm, permute=permute, rule=rule, tau=tau,
            **how, **SMALL,
        )  # fmt: skip
    offset, scale, natural = seqlen_k - seqlen_q, q.size(2) ** -0.5, permute == "none"
    rows_at = range(seqlen_q)
    for h in range(2):
        keys_at = plan.k_perm[h].tolist()
        if plan.q_perm is not None:
            rows_at = plan.q_perm[h].tolist()
        for m in range(-(-seqlen_q // B)):
            rows = list(rows_at[m * B : (m + 1) * B])
            first = m * B if plan.q_perm is None else m * B // S * S
            own = "block" if natural else "segment"
            start = brute_force.first_own_key(first, offset, own, B, S, 0)
            visible = max(offset + min((m + 1) * B, seqlen_q), 0)
            blocks = range(-(-visible // B) if natural else start // B)
            key_blocks = {n: keys_at[n * B : (n + 1) * B] for n in blocks}
            mass = {}
            if key_blocks and method == "mean_pool":
                mass = brute_force.mean_pool_row(q[h], k[0], rows, key_blocks, scale)
            elif key_blocks:
                mass = brute_force.antidiagonal_row(
                    q[h], k[0], rows, key_blocks, scale, 2, method, offset, natural
                )
            for rule, (tau, got) in found.items():
                expected = torch.zeros(got.mass.size(2), dtype=torch.float64)
                for n, p in mass.items():
                    expected[n] = p
                close(got.mass[h, m], expected)
                kept = brute_force.choose(rule, tau, mass)
                assert set(got.chosen[h, m].nonzero().flatten().tolist()) == kept, (rule, h, m)
                forced = {keys_at.index(0) // B} if start else set()
                history = {n for n in kept if n < start // B} | forced
                assert set(got.bits[h, m].nonzero().flatten().tolist()) == history, (rule, h, m)


# ---- worked example of the specification ---------------------------------------------------------


def test_worked_example():
    """docs/algorithm.md: S = 8, B = 4, 16 tokens and the k_perm written there."""
    k_perm = torch.tensor([[3, 0, 6, 1, 7, 2, 5, 4, 9, 8, 12, 15, 10, 11, 13, 14]])
    q, k, v = inputs(5, (1, 1), 16)
    s = torch.zeros(1, 16, dtype=torch.float64)
    s[0, k_perm[0]] = torch.arange(16, 0, -1, dtype=torch.float64)
    found, _ = reference.permute(q, k, s, **SMALL)
    assert torch.equal(found, k_perm)
    selection = reference.select(q, k, k_perm=k_perm, tau=0.0, **SMALL)
    # nothing chosen at tau 0; token 0 sits in block 0, history of query blocks 2 and 3
    assert selection.bits[0].int().tolist() == [[0] * 4, [0] * 4, [1, 0, 0, 0], [1, 0, 0, 0]]
    assert selection.eligible[0, 2].tolist() == [True, True, False, False]
    mask = brute_force.token_mask(selection.bits[0], 16, 16, k_perm[0], None, "segment", B, B, S)
    for token in range(8, 12):  # query block 2 reads tokens 3 0 6 1 whole, and 8.. up to itself
        assert mask[token].nonzero().flatten().tolist() == [0, 1, 3, 6, *range(8, token + 1)]
    out, _ = reference.attend(
        q, k, v, selection.bits, k_perm=k_perm, block_q=B, block_k=B, segment_size=S
    )
    close(out[0], brute_force.dense_attention(q[0], k[0], v[0], mask, 8**-0.5)[0])


# ---- properties (algorithm.md, section 3) --------------------------------------------------------


@pytest.mark.parametrize("method", cases.METHODS)
@pytest.mark.parametrize("permute", cases.PERMUTES)
@pytest.mark.parametrize("seqlen_q, seqlen_k", PAIRS)
def test_tau_one_is_dense(method, permute, seqlen_q, seqlen_k):
    q, k, v = inputs(6, (3, 1), seqlen_q, seqlen_k)
    plan = reference.prefill(
        q, k, v, tau=1.0, permute=permute, select=method, stride=2, gqa="group", **SMALL
    )
    out, lse = dense(q, k, v)
    close(plan.out, out)
    close(plan.lse, lse)


@pytest.mark.parametrize("seqlen_k", cases.lengths(B, S))
@pytest.mark.parametrize("order", cases.ORDERS)
def test_k_perm_permutes_segments_and_keeps_the_tail(seqlen_k, order):
    q, k, _ = inputs(7, (3, 1), 5, seqlen_k)
    s = reference.score(q, k, order=order, seed=11, **SMALL)
    k_perm, q_perm = reference.permute(q, k, s, **SMALL)
    place = torch.arange(seqlen_k).expand(3, -1)
    complete = seqlen_k // S * S
    assert q_perm is None
    assert torch.equal(k_perm[:, complete:], place[:, complete:])
    assert torch.equal(s[:, complete:], torch.zeros_like(s[:, complete:]))
    segments = k_perm[:, :complete].unflatten(1, (-1, S)).sort(-1).values.flatten(1)
    assert torch.equal(segments, place[:, :complete])
    if complete:
        close(s.sum(1), torch.ones(3, dtype=torch.float64)) if order != "random" else None
    if seqlen_k <= S:
        assert torch.equal(k_perm, place)
    else:
        ordered = s.gather(1, k_perm)[:, :complete].unflatten(1, (-1, S))
        assert (ordered.diff(dim=-1) <= 0).all()


def test_ties_keep_position():
    s = torch.tensor([[1.0, 2, 1, 2, 0, 0, 2, 1, 3, 3, 3, 3, 3, 3, 3, 3, 9]])
    q, k, _ = inputs(8, (1, 1), 17)
    k_perm, _ = reference.permute(q, k, s, **SMALL)
    assert k_perm[0].tolist() == [1, 3, 6, 0, 2, 7, 4, 5, *range(8, 17)]
    mass = torch.tensor([[0.25, 0.25, 0.25, 0.25]])
    every = torch.ones(1, 4, dtype=torch.bool)
    assert reference.choose("prefix", 0.5, mass, every).tolist() == [[True, True, False, False]]
    assert reference.choose("budget", 1, mass, every).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("method", cases.METHODS)
@pytest.mark.parametrize("permute", cases.PERMUTES)
def test_larger_tau_never_removes_a_block(method, permute):
    q, k, v = inputs(9, (2, 1), 61)
    taus = (0.0, 0.3, 0.5, 0.9, 0.99, 1.0, 2.0)
    kept = [
        reference.prefill(q, k, v, tau=t, permute=permute, select=method, stride=2, **SMALL)
        for t in taus
    ]
    for less, more in zip(kept, kept[1:], strict=False):
        assert (less.selection.bits <= more.selection.bits).all()
    assert kept[0].selection.bits.sum() < kept[3].selection.bits.sum()
    assert kept[3].selection.bits.sum() < kept[-1].selection.bits.sum(), "selection is trivial"


@pytest.mark.parametrize("permute", cases.PERMUTES)
def test_token_zero_and_the_diagonal_are_always_there(permute):
    q, k, v = inputs(10, (2, 1), 45)
    plan = reference.prefill(q, k, v, tau=0.0, permute=permute, **SMALL)
    for h in range(2):
        mask = brute_force.token_mask(
            plan.selection.bits[h], 45, 45, plan.k_perm[h].tolist(),
            None if plan.q_perm is None else plan.q_perm[h].tolist(),
            "block" if permute == "none" else "segment", B, B, S,
        )  # fmt: skip
        assert mask[:, 0].all() and mask.diagonal().all()


def test_rule_keeps_all_at_tau_one():
    """Deviation: where rounded masses add up to less than 1, the authors keep nothing."""
    mass = torch.full((1, 10), 0.1)
    mass[0, 9] -= 1e-6
    every = torch.ones(1, 10, dtype=torch.bool)
    assert mass.sum() < 1.0
    for tau in (1.0, 1, 7.0):
        assert reference.choose("prefix", tau, mass, every).all()
    assert reference.choose("prefix", 1 - 1e-9, mass.double(), every).all()
    nothing_left = torch.tensor([[1.0, 0.0, 0.0]])  # masses may round to 0: kept all the same
    assert reference.choose("prefix", 1.0, nothing_left, every[:, :3]).all()
    assert reference.choose("prefix", 0.99, nothing_left, every[:, :3]).sum() == 1
    # masses of any normalisation: tau is a share of the row's sum
    assert reference.choose("prefix", 0.5, 7 * mass, every).sum() == 5
    empty = torch.zeros(1, 10)
    assert not reference.choose("prefix", 0.9, empty, every & False).any()


def test_group_equals_per_head_without_groups():
    q, k, v = inputs(11, (2, 2), 45)
    for order in cases.ORDERS:
        one, two = (
            reference.prefill(q, k, v, gqa=g, order=order, **SMALL) for g in ("per_head", "group")
        )
        assert torch.equal(one.score, two.score) and torch.equal(one.k_perm, two.k_perm)
        assert torch.equal(one.out, two.out)


@pytest.mark.parametrize("permute", cases.PERMUTES)
def test_repeating_key_heads_changes_nothing(permute):
    q, k, v = inputs(12, (6, 2), 45)
    shared = reference.prefill(q, k, v, permute=permute, **SMALL)
    repeated = reference.prefill(
        q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0), permute=permute, **SMALL
    )
    close(shared.out, repeated.out)
    assert torch.equal(shared.selection.bits, repeated.selection.bits)


@pytest.mark.parametrize("case", cases.geometries(B, S), ids=lambda c: c.name)
@pytest.mark.parametrize("permute", ["none", "keys", "both"])
def test_a_batch_is_its_sequences(case, permute):
    """Any padding, cache, chunk or packing gives for each sequence what it gives alone."""
    x = cases.make_inputs(13, (2, 1), case=case, head_dim=8, dtype=torch.float64, nan_padding=True)
    options = {"permute": permute, "tau": 0.6, **SMALL}
    out, lse, plans = reference.prefill_batch(*x, **case.geometry(), **options)
    assert torch.isfinite(out).all() and len(plans) == case.batch
    inside = torch.zeros(x.q.size(0), x.q.size(2), dtype=torch.bool)
    for b in range(case.batch):
        at = 0 if case.packed else b
        q0 = case.q_start[b] if case.q_start else 0
        k0 = case.kv_start[b] if case.kv_start else 0
        rows = slice(q0, q0 + case.q_len[b] if case.q_len else case.seqlen_q)
        keys = slice(k0, k0 + case.kv_len[b] if case.kv_len else case.seqlen_k)
        alone = reference.prefill(x.q[at, :, rows], x.k[at, :, keys], x.v[at, :, keys], **options)
        assert torch.equal(out[at, :, rows], alone.out)
        assert torch.equal(lse[at, :, rows], alone.lse)
        inside[at, rows] = True
    assert (out.transpose(1, 2)[~inside] == 0).all()
    assert torch.isneginf(lse.transpose(1, 2)[~inside]).all()


def test_rows_without_keys():
    q, k, v = inputs(14, (2, 1), 20, 7)
    plan = reference.prefill(q, k, v, **SMALL)
    assert (plan.out[:, :13] == 0).all() and torch.isneginf(plan.lse[:, :13]).all()
    assert torch.isfinite(plan.lse[:, 13:]).all()


def test_two_calls_merge_by_lse():
    """History alone (own="none") and the own span alone add up to the whole by their lse."""
    q, k, v = inputs(15, (2, 1), 45)
    plan = reference.prefill(q, k, v, tau=0.6, **SMALL)
    options = {"k_perm": plan.k_perm, "block_q": B, "block_k": B, "segment_size": S}
    bits = plan.selection.bits
    history, history_lse = reference.attend(q, k, v, bits, own="none", **options)
    own, own_lse = reference.attend(q, k, v, torch.zeros_like(bits), own="segment", **options)
    lse = torch.logaddexp(history_lse, own_lse)
    merged = history * (history_lse - lse).exp()[..., None] + own * (own_lse - lse).exp()[..., None]
    close(merged, plan.out)
    close(lse, plan.lse)


@pytest.mark.parametrize("permute", ["queries", "both"])
def test_query_permutation_returns_rows_to_their_place(permute):
    q, k, v = inputs(16, (2, 1), 45)
    plan = reference.prefill(q, k, v, permute=permute, tau=0.6, **SMALL)
    assert torch.equal(plan.q_perm.sort(1).values, torch.arange(45).expand(2, -1))
    assert torch.equal(plan.q_perm[:, 40:], torch.arange(40, 45).expand(2, -1))
    blocks = plan.q_perm[:, :40].unflatten(1, (-1, B))
    assert (blocks.diff(dim=-1) > 0).all(), "rows ascend inside a block"
    assert (plan.q_perm != torch.arange(45)).any(), "nothing was permuted"
    segment = plan.q_perm[:, :40] // S
    assert torch.equal(segment, torch.arange(40).expand(2, -1) // S)


def test_heads_that_are_not_permuted():
    q, k, v = inputs(17, (2, 2), 45)
    keys = reference.prefill(q, k, v, **SMALL)
    identity = reference.prefill(q, k, v, permute="identity", **SMALL)
    mixed = reference.prefill(q, k, v, permute_heads=torch.tensor([1, 0]), **SMALL)
    assert torch.equal(mixed.out[0], keys.out[0]) and torch.equal(mixed.out[1], identity.out[1])
    given = reference.prefill(q, k, v, k_perm=keys.k_perm, order="random", **SMALL)
    assert torch.equal(given.out, keys.out)


def test_tau_per_head():
    q, k, v = inputs(18, (2, 1), 61)
    taus = torch.tensor([0.3, 0.95], dtype=torch.float64)
    both = reference.prefill(q, k, v, tau=taus, **SMALL)
    for h in range(2):
        one = reference.prefill(q, k, v, tau=float(taus[h]), **SMALL)
        assert torch.equal(both.out[h], one.out[h])


@pytest.mark.parametrize("permute", cases.PERMUTES)
def test_density_counts_causal_blocks(permute):
    q, k, v = inputs(19, (2, 1), 61)
    plan = reference.prefill(q, k, v, tau=0.5, permute=permute, **SMALL)
    own = "block" if permute == "none" else "segment"
    shuffled = plan.q_perm is not None
    geometry = reference.Geometry(61, 61, own, B, B, S, S if shuffled else 0)
    assert geometry.causal().sum() == 16 * 17 // 2
    ratio = reference.density(plan.selection.bits, geometry)
    run = reference.computed(plan.selection.bits, geometry)
    assert 0 < ratio < 1 and (run > ratio if shuffled else run == ratio)
    every = torch.ones_like(plan.selection.bits) & geometry.causal()
    assert reference.density(every, geometry) == 1
    # by hand: history bits, and the own span's blocks up to the diagonal
    step = B if permute == "none" else S
    own_blocks = sum(m - m * B // step * step // B + 1 for m in range(16))
    by_hand = (plan.selection.bits.sum().item() + 2 * own_blocks) / (2 * 136)
    assert ratio == pytest.approx(by_hand)


def test_random_numbers_are_the_published_hash():
    """The numbers of csrc/core/random.h, computed there by the C compiler."""
    drawn = [reference._hash(*x) for x in ((0, 0, 0), (1, 2, 3), (2**64 - 1, 7, 1000))]
    assert drawn == [0xA706DD2F4D197E6F, 0x0EE3BB459E9E297B, 0x3E9359EE2201AAC5]


def test_low_precision_inputs_are_widened_except_in_attend():
    q, k, v = (x.bfloat16() for x in inputs(20, (2, 1), 45))
    plan = reference.prefill(q, k, v, **SMALL)
    assert plan.score.dtype == plan.selection.mass.dtype == plan.lse.dtype == torch.float32
    assert plan.out.dtype == torch.bfloat16
    exact = reference.prefill(q.double(), k.double(), v.double(), **SMALL)
    assert torch.equal(plan.selection.bits, exact.selection.bits)
