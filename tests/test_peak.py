# SPDX-License-Identifier: Apache-2.0
"""Properties of peak's parts (docs/peak.md): shares of the whole row, an absolute threshold, and a
mean token for every dropped block; through the ops, on every instruction set that runs here."""

import cases
import pytest
import torch
from harness import (
    ISAS,
    check_attention,
    check_prefill,
    four_verbs,
    geometry_of,
    sequences_of,
    takes,
)
from numerics import assert_close, low_precision_attend, unpack
from sizes import Cut

from pbs_attn import reference

FP32, BF16 = torch.float32, torch.bfloat16
EVERY_ISA = [(isa, FP32 if takes(isa, FP32) else BF16) for isa in ISAS]
EVERY_ISA += [(isa, BF16) for isa in ISAS if takes(isa, FP32) and not isa.startswith("emu")]
every_isa = pytest.mark.parametrize("isa, dtype", EVERY_ISA)
HISTORY_OWNS = ("segment", "block", "mask", "none")
PLAN = ("mass", "bits", "count", "out", "lse")  # of the four verbs
HISTORY = sum(m // 2 * 2 for m in range(9))  # blocks before the own segments, 8.6 blocks of tokens
MOVED = ("whole", "left_padding", "static_cache", "packed_chunks")


def make_inputs(*args, **options):
    """Small heads, for the same reason."""
    return cases.make_inputs(*args, head_dim=16, **options)


def same(got, want):
    return all(map(torch.equal, got, want))


# ---- the threshold -------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("permute", ["none", "identity", "keys"])
def test_eps_zero_is_dense(isa, dtype, permute):
    cut = Cut(isa)
    case = cut.case("left_padding")
    inputs = make_inputs(91, (2, 1), case=case, dtype=dtype, nan_padding=True)
    got = cut.prefill(inputs, cut.peak(tau=0.0, permute=permute), geometry=geometry_of(case))
    for seq in sequences_of(*inputs, case):
        exact = reference.attend(*(x.double() for x in seq[-3:]), own="all")
        low = low_precision_attend(*seq[-3:], None, own="all")
        for name, x, want, less in zip(("out", "lse"), got, exact, low, strict=False):
            assert_close(x[seq.row, :, seq.rows], want, less, what=f"{permute} {isa} {name}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("permute, reduce", [("none", "max"), ("identity", "max"), ("keys", "sum")])
def test_a_larger_eps_never_adds_a_block(isa, permute, reduce):
    cut = Cut(isa)
    inputs = make_inputs(92, (2, 1), cut.tokens(1100))
    counts, before = [], None
    for eps in (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 2.0):
        config = cut.peak(tau=eps, permute=permute, reduce=reduce)
        *_, count, bits, _ = cut.prefill(inputs, config)
        assert before is None or (bits & ~before).sum() == 0
        before = bits
        counts.append(count.sum().item())
    assert counts[0] == 2 * (sum(range(9)) if permute == "none" else HISTORY)
    assert len(set(counts)) >= 4, counts
    assert counts[-1] == (count > 0).sum().item(), "a share above 1"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", ["whole", "chunk_aligned", "left_padding"])
def test_segments_of_one_block_are_natural_order(isa, case):
    """Where rows start at a block, permute=none is the case of segments of one block: same bits."""
    cut = Cut(isa)
    case = cut.case(case)
    inputs = make_inputs(93, (2, 1), case=case, nan_padding=True)
    geometry, config = geometry_of(case), cut.peak().replace(segment_size=cut.block)
    one, other = (
        four_verbs(*inputs, config.replace(permute=permute), geometry, isa=isa)
        for permute in ("identity", "none")
    )
    history = one.mass > 0
    assert history.any() and (~history & (other.mass > 0)).any()
    assert torch.equal(one.mass[history], other.mass[history])
    for name in ("bits", "count", "out", "lse"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("isa", ISAS)
def test_an_order_that_moves_nothing_changes_no_bit(isa):
    """Masses too: a choice of blocks hides their last bits."""
    cut = Cut(isa)
    for case in map(cut.case, MOVED):
        inputs = make_inputs(94, (2, 1), case=case, nan_padding=True)
        geometry = geometry_of(case)
        given = torch.arange(case.seqlen_k, dtype=torch.int32).repeat(case.batch, 2, 1)
        keys = cut.peak(permute="keys")
        natural = four_verbs(*inputs, cut.peak(), geometry, isa=isa)
        moved = four_verbs(*inputs, keys, geometry, k_perm_in=given, isa=isa)
        for name in PLAN:
            assert torch.equal(getattr(natural, name), getattr(moved, name)), (case.name, name)
        whole = cut.prefill(inputs, keys, geometry=geometry, k_perm_in=given)
        assert same(whole[:4], (natural.out, natural.lse, natural.count, natural.bits)), case.name


# ---- the correction ------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("own", HISTORY_OWNS)
def test_equal_keys_make_the_correction_exact(isa, dtype, own):
    """A dropped block whose keys are equal gives what it would give if it were read, whatever its
    values: the result is that of the same call with every such block listed."""
    cut = Cut(isa)
    n = cut.tokens(1100)
    q, k, v = make_inputs(95, (2, 1), n, dtype=dtype)
    dropped = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 0], dtype=torch.bool)
    k = torch.where(dropped[torch.arange(n) // cut.block][:, None], cut.equal_keys(k), k)
    blocks = ~dropped.expand(2, 9, 9)
    if own == "mask":  # what a row sees a part of is read or missing
        blocks = blocks | torch.eye(9, dtype=torch.bool)
    out, lse = cut.attend((q, k, v), blocks, own)
    (seq,) = sequences_of(q, k, v)
    full, what = torch.ones_like(blocks), f"{own} {isa} {dtype}"
    check_attention(out[0], lse[0], seq, full, own=own, what=what, **cut.attend_sizes)
    plain, _ = cut.attend((q, k, v), blocks, own, correction="none")
    assert (plain - out).abs().max() > 0.05


@every_isa
@pytest.mark.parametrize("permute", ["none", "keys", "both"])
def test_equal_keys_make_every_order_exact(isa, dtype, permute):
    """The whole call: blocks move in their segment, and what the rule drops is not missed."""
    cut = Cut(isa)
    n = cut.tokens(1100)
    q, k, v = make_inputs(96, (4, 2), n, dtype=dtype)
    k = cut.equal_keys(k)
    config = cut.config(permute=permute, tau=0.4, correction="mean")
    out, lse, count, _, k_perm = cut.prefill((q, k, v), config)
    assert count.sum() < 4 * 24
    assert permute not in ("keys", "both") or (k_perm.diff() < 0).any()
    (seq,) = sequences_of(q, k, v)
    check_attention(out[0], None, seq, None, own="all", what=f"{permute} {isa} {dtype}")
    exact = reference.attend(*(x.double() for x in seq[-3:]), own="all")[1]
    low = low_precision_attend(*seq[-3:], None, own="all")[1]
    biased = n * 2.0**-24  # equal numbers added one after another round the same way
    assert_close(lse[0], exact, low, what=f"{permute} {isa} {dtype} lse", noise=biased)


@pytest.mark.parametrize("isa", ISAS)
def test_a_mean_token_never_weighs_more_than_its_block(isa):
    """exp of a mean is at most the mean of exp: lse lies between that without and that of all."""
    cut = Cut(isa)
    n = cut.tokens(1100)
    inputs = make_inputs(97, (2, 1), n)
    blocks = cut.random_blocks(n, n, 0.3)
    without, some, every = (
        cut.attend(inputs, x, correction=c)[1]
        for x, c in ((blocks, "none"), (blocks, "mean"), (torch.ones_like(blocks), "none"))
    )
    assert (without <= some + 1e-5).all() and (some <= every + 1e-5).all()
    late = slice(cut.tokens(300), None)
    assert (some - without)[..., late].max() > 0.1 and (every - some)[..., late].max() > 0.1


@every_isa
@pytest.mark.parametrize("own", HISTORY_OWNS)
def test_an_empty_dropped_set_changes_no_bit(isa, dtype, own):
    cut = Cut(isa)
    for case in map(cut.case, MOVED):
        inputs = make_inputs(98, (2, 1), case=case, dtype=dtype, nan_padding=True)
        blocks = cut.random_blocks(case.seqlen_q, case.seqlen_k, 1.0)
        none, mean = (
            cut.attend(inputs, blocks, own, correction, geometry=geometry_of(case))
            for correction in cases.CORRECTIONS
        )
        assert same(none, mean), case.name


@every_isa
@pytest.mark.parametrize("permute", ["none", "keys", "both"])
def test_nothing_dropped_by_a_prefill_changes_no_bit(isa, dtype, permute):
    cut = Cut(isa)
    inputs = make_inputs(99, (2, 1), cut.tokens(1100), dtype=dtype)
    all_kept, some = (cut.config(permute=permute, tau=tau) for tau in (1.0, 0.3))
    want = cut.prefill(inputs, all_kept)
    assert same(cut.prefill(inputs, all_kept.replace(correction="mean")), want)
    want = cut.prefill(inputs, some)
    got = cut.prefill(inputs, some.replace(correction="mean"))
    assert same(got[2:], want[2:]) and not torch.equal(got[0], want[0])


def history_end(block, own, m, seqlen_q, seqlen_k):
    """First key that is not of a whole block that all rows of query block m see."""
    first = max(seqlen_k - seqlen_q + m * block, 0)
    return (first + 1) // block * block if own == "mask" else first // (2 * block) * 2 * block


@every_isa
@pytest.mark.parametrize("own", ["mask", "none"])
def test_blocks_that_are_partly_visible_are_not_touched(isa, dtype, own):
    """Whatever numbers stand in blocks behind the history of a query block and not listed, its rows
    do not change by a bit. (Numbers: as in any masked tile, 0 times nan is nan.)"""
    cut = Cut(isa)
    seqlen_q, seqlen_k = map(cut.tokens, (397, 911))
    q, k, v = make_inputs(100, (2, 1), seqlen_q, seqlen_k, dtype=dtype)
    blocks = cut.random_blocks(seqlen_q, seqlen_k, 0.3)
    want = cut.attend((q, k, v), blocks, own)
    for m in range(blocks.shape[1]):
        end = history_end(cut.block, own, m, seqlen_q, seqlen_k)
        key = torch.arange(seqlen_k)
        listed = blocks[:, m].any(0)[key // cut.block] & (own == "mask")
        poisoned = ((key >= end) & ~listed)[:, None]
        bad = [x.masked_fill(poisoned, 1e4) for x in (k, v)]
        got = cut.attend((q, *bad), blocks, own)
        rows = slice(m * cut.block, m * cut.block + cut.block)
        assert torch.equal(got[0][:, :, rows], want[0][:, :, rows]), f"{own} block {m}"
        assert torch.equal(got[1][:, :, rows], want[1][:, :, rows]), f"{own} block {m} lse"


@every_isa
@pytest.mark.parametrize(
    "words", [cases.PEAK, {"tau": 0.5, "correction": "mean"}], ids=["peak", "pbs"]
)
def test_padding_and_what_lies_beyond_a_sequence_are_not_touched(isa, dtype, words):
    cut = Cut(isa)
    for case in map(cut.case, MOVED):
        clean = make_inputs(101, (2, 1), case=case, dtype=dtype)
        poisoned = make_inputs(101, (2, 1), case=case, dtype=dtype, nan_padding=True)
        got, want = (
            cut.prefill(x, cut.config(**words), geometry=geometry_of(case))
            for x in (poisoned, clean)
        )
        assert same(got, want), case.name


# ---- same bits -----------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize(
    "words", [cases.PEAK, {"tau": 0.5, "correction": "mean"}], ids=["peak", "pbs"]
)
def test_same_bits_on_every_run_for_any_threads_and_strides(isa, dtype, words):
    cut = Cut(isa)
    config, n = cut.config(**words), cut.tokens(700)
    inputs = make_inputs(102, (4, 2), n, dtype=dtype, batch=2)
    first = cut.prefill(inputs, config)
    threads = torch.get_num_threads()
    try:
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            assert same(first, cut.prefill(inputs, config)), f"{num} threads"
    finally:
        torch.set_num_threads(threads)
    for layout in cases.LAYOUTS:
        laid = make_inputs(102, (4, 2), n, dtype=dtype, batch=2, layout=layout)
        assert same(first, cut.prefill(laid, config)), layout


@every_isa
def test_same_bits_at_any_place_in_a_batch(isa, dtype):
    """Padded left or right, packed, behind a cache: what a call on the sequence alone gives."""
    cut = Cut(isa)
    for case in map(cut.case, (*MOVED, "right_padding", "packed")):
        inputs = make_inputs(103, (2, 1), case=case, dtype=dtype, nan_padding=True)
        geometry, config = geometry_of(case), cut.peak()
        out, lse, count, bits, _ = cut.prefill(inputs, config, geometry=geometry)
        for seq in sequences_of(*inputs, case):
            alone = cut.prefill([x[None] for x in seq[-3:]], config)
            tq, w = alone[2].shape[2], alone[3].shape[3]
            got = (
                out[seq.row, :, seq.rows], lse[seq.row, :, seq.rows], count[seq.index, :, :tq],
                bits[seq.index, :, :tq, :w],
            )  # fmt: skip
            assert same(got, (x[0] for x in alone[:4])), case.name


@every_isa
@pytest.mark.parametrize("permute", ["none", "identity"])
def test_chunks_are_the_whole(isa, dtype, permute):
    """Natural order has no probe: chunks that start at a segment select what the whole selects."""
    cut = Cut(isa)
    config, n = cut.peak(permute=permute), cut.tokens(1100)
    q, k, v = make_inputs(104, (2, 1), n, dtype=dtype)
    out, lse, count, bits, _ = cut.prefill((q, k, v), config)
    assert 0 < count.sum() < 2 * HISTORY
    for begin, end in ((0, 4), (4, 6), (6, 9)):
        blocks = slice(begin, end)
        begin, end = begin * cut.block, min(end * cut.block, n)
        chunk = (q[:, :, begin:end], k[:, :, :end], v[:, :, :end])
        got = cut.prefill(chunk, config)
        want = (out[:, :, begin:end], lse[:, :, begin:end], count[:, :, blocks], bits[:, :, blocks])
        assert same(got[:4], want), (begin, end)


@every_isa
@pytest.mark.parametrize("own", ["segment", "mask"])
def test_chunks_of_the_same_selection_are_the_whole(isa, dtype, own):
    cut = Cut(isa)
    n = cut.tokens(1100)
    q, k, v = make_inputs(105, (2, 1), n, dtype=dtype)
    blocks = cut.random_blocks(n, n, 0.4)
    out, lse = cut.attend((q, k, v), blocks, own)
    for first, last in ((0, 2), (2, 7), (7, 9)):
        begin, end = first * cut.block, min(last * cut.block, n)
        chunk = (q[:, :, begin:end], k[:, :, :end], v[:, :, :end])
        got = cut.attend(chunk, blocks[:, first:last, :last], own)
        assert same(got, (out[:, :, begin:end], lse[:, :, begin:end])), (begin, end)


@every_isa
def test_group_heads(isa, dtype):
    """Natural order has nothing that a group could share: per_head and group agree, and repeating
    K/V heads changes nothing. The verbs are called one by one too: permute then has pools and means
    of every query head, which a prefill in natural order has not."""
    cut = Cut(isa)
    q, k, v = make_inputs(106, (4, 2), cut.tokens(600), dtype=dtype)
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    calls = [
        ((q, k, v), cut.peak()),
        ((q, k, v), cut.peak(gqa="group")),
        ((q, *repeated), cut.peak()),
    ]
    (want, *others) = (four_verbs(*inputs, config, isa=isa) for inputs, config in calls)
    assert 0 < want.count.sum() < 4 * (2 + 2 + 4)
    for other in others:
        for name in PLAN:
            assert torch.equal(getattr(other, name), getattr(want, name)), name
    for inputs, config in calls:
        got = cut.prefill(inputs, config)
        assert same(got[:4], (want.out, want.lse, want.count, want.bits))


# ---- with the other parts ------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("rule, tau", cases.RULES)
def test_permuted_order_and_every_rule(isa, dtype, rule, tau):
    """One more prefill against the reference over its own plan, on keys that are out of order."""
    gqa = "group" if rule in ("prefix", "absolute") else "per_head"
    cut = Cut(isa)
    config = cut.peak(permute="keys", gqa=gqa, rule=rule, tau=tau)
    inputs = make_inputs(107, (4, 2), cut.tokens(811), dtype=dtype)
    heads = torch.tensor([1, 0], dtype=torch.int32)
    heads = heads if gqa == "group" else heads.repeat(2)
    out, lse, count, bits, k_perm = cut.prefill(inputs, config, permute_heads=heads)
    assert 0 < count.sum() < unpack(bits, 7).numel()
    check_prefill(out, lse, *inputs, bits, k_perm, config, what=f"{gqa} {rule} {isa}")


@every_isa
@pytest.mark.parametrize("permute", ["keys", "both"])
def test_the_prefix_rule_with_the_correction(isa, dtype, permute):
    """The paper's selection is as it was, and the result comes nearer to dense attention."""
    cut = Cut(isa)
    inputs = make_inputs(108, (2, 1), cut.tokens(1100), dtype=dtype)
    config = cut.config(permute=permute, tau=0.4)
    plain = cut.prefill(inputs, config)
    mean = cut.prefill(inputs, config.replace(correction="mean"))
    assert same(plain[2:], mean[2:])
    dense, _ = reference.attend(*(x[0].double() for x in inputs), own="all")
    lost, left = ((x[0][0].double() - dense).square().mean() for x in (plain, mean))
    assert left < 0.9 * lost, (left, lost)
