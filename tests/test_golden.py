# SPDX-License-Identifier: Apache-2.0
"""The vectors made with the authors' code: reproduced by the reference and by every kernel.

And each deviation from that code by a test of its own, which shows that the difference is what
docs/algorithm.md says it is: with the authors' way put in, their result comes out exactly.
"""

import functools

import golden_files
import numerics
import pytest
import torch
import verbs
from golden_files import BLOCK, SEGMENT

from pbs_attn import reference

GOLDEN = golden_files.load_all()
TAUS = {"tau5": 0.5, "tau9": 0.9, "tau99": 0.99, "tau1": 1.0}


def implementations():
    """The reference, and the compiled ops under every instruction set that runs here.

    The emulated vector units are slow: they take the shipped cuts only.
    """
    pairs = []
    for label in GOLDEN:
        pairs.append(pytest.param(label, verbs.Reference(), id=f"{label}-reference"))
        for isa in verbs.available_isas():
            if not isa.startswith("emu_") or label.startswith("cut-"):
                pairs.append(pytest.param(label, verbs.Ops(isa), id=f"{label}-ops-{isa}"))
    return pairs


every_implementation = pytest.mark.parametrize("label, verb", implementations())
every_file = pytest.mark.parametrize("label", GOLDEN)
ragged = pytest.mark.parametrize(
    "label", [x for x, g in GOLDEN.items() if g["q"].size(1) % BLOCK and g.differs["select.tau9"]]
)
groups = pytest.mark.parametrize("gqa", ["per_head", "group"])


def inputs(golden, verb):
    """Widened exactly to fp64 for the reference, as they are for kernels."""
    return golden.inputs(torch.float64 if isinstance(verb, verbs.Reference) else None)


def expected(golden, gqa, name):
    """spec.NAME or spec.group.NAME; a cut file may hold a part of a group only, then None."""
    key = f"spec.{'group.' if gqa == 'group' else ''}{name}"
    return golden[key] if key in golden else None


def has_group(golden):
    return "spec.group.k_perm" in golden


@functools.cache
def geometry(label, own="segment"):
    seqlen = GOLDEN[label]["q"].size(1)
    return reference.Geometry(seqlen, seqlen, own, BLOCK, BLOCK, SEGMENT)


def computed(label, bits, own="segment"):
    """As the golden `final`: history plus own span. There it runs on above the diagonal."""
    return geometry(label, own).computed(bits)


def final(label, golden, key, own="segment"):
    return golden[key] & geometry(label, own).causal()


# ---- reproduced ----------------------------------------------------------------------------------


@groups
@every_implementation
def test_importance(label, verb, gqa):
    golden = GOLDEN[label]
    exact = expected(golden, gqa, "importance")
    if exact is None:
        return
    q, k, _ = inputs(golden, verb)
    s = verb.score(q, k, gqa=gqa)
    complete = exact.size(1)
    assert (s[:, complete:] == 0).all()
    low = numerics.low_precision_score(q, k, gqa=gqa)[:, :complete]
    judge(verb, s[:, :complete], exact, low, f"importance {label}")
    # the order of the paper's own code, from our scores: its scores are the same numbers
    if gqa == "per_head":
        torch.testing.assert_close(golden["orig.importance"].double(), exact, rtol=1e-5, atol=1e-9)


@groups
@every_implementation
def test_k_perm(label, verb, gqa):
    golden = GOLDEN[label]
    exact = expected(golden, gqa, "k_perm")
    if exact is None:
        return
    q, k, _ = inputs(golden, verb)
    given = torch.zeros(exact.shape, dtype=torch.float64)
    importance = expected(golden, gqa, "importance")
    given[:, : importance.size(1)] = importance
    k_perm, _, k_pool = verb.permute(q, k, given, gqa=gqa)
    assert torch.equal(k_perm, exact.long()), "from the golden scores"
    k_perm, _, _ = verb.permute(q, k, verb.score(q, k, gqa=gqa), gqa=gqa)
    assert torch.equal(k_perm, exact.long()), "through our own scores"
    shared = k.repeat_interleave(exact.size(0) // k.size(0), 0)
    pooled = reference.pool(shared.double(), BLOCK, exact)
    numerics.assert_close(
        k_pool, pooled, reference.pool(shared.float(), BLOCK, exact), what=f"k_pool {label}"
    )


@groups
@pytest.mark.parametrize("tau", TAUS)
@every_implementation
def test_blocks(label, verb, gqa, tau):
    golden = GOLDEN[label]
    k_perm = expected(golden, gqa, "k_perm")
    if k_perm is None:
        return
    q, k, _ = inputs(golden, verb)
    bits, mass = verb.select(q, k, k_perm=k_perm.long(), gqa=gqa, tau=TAUS[tau])
    key = f"spec.{'group.' if gqa == 'group' else ''}"
    torch.testing.assert_close(
        mass.float(), golden[f"{key}block_scores"], rtol=0, atol=1e-6, msg=f"mass {label}"
    )
    what = f"final.{tau} {label}"
    numerics.assert_same_blocks(
        computed(label, bits), final(label, golden, f"{key}final.{tau}"), what=what
    )
    history = computed(label, torch.zeros_like(bits))
    chosen = golden[f"{key}select.{tau}"]
    assert (bits >= (chosen & ~history)).all(), "the forced block is all that is added"
    assert ((bits & ~chosen).sum(-1) <= 1).all()


@every_implementation
def test_mean_pooling(label, verb):
    golden = GOLDEN[label]
    q, k, _ = inputs(golden, verb)
    bits, _ = verb.select(q, k, permute="none")
    numerics.assert_same_blocks(
        computed(label, bits, "block"), golden["spec.meanpool.tau9"], what=f"meanpool {label}"
    )


@pytest.mark.parametrize("method", ["xattn", "pbsplus"])
@every_implementation
def test_antidiagonal(label, verb, method):
    golden = GOLDEN[label]
    q, k, _ = inputs(golden, verb)
    if method == "xattn":
        bits, mass = verb.select(q, k, permute="none", method="antidiagonal")
    else:
        bits, mass = verb.select(q, k, k_perm=golden["spec.k_perm"].long(), method="antidiagonal")
    # Tensor cores cut where they should round: half of 1e-6 here, were it their only error.
    allowed = 4e-6 if getattr(verb, "name", None) == "cuda" else 1e-6
    torch.testing.assert_close(
        mass.float(), golden[f"spec.{method}_scores"], rtol=0, atol=allowed, msg=f"mass {label}"
    )
    own = "block" if method == "xattn" else "segment"
    numerics.assert_same_blocks(
        computed(label, bits, own),
        final(label, golden, f"spec.{method}.final.tau9", own),
        what=f"{method} {label}",
    )


def history_bits(label):
    """The golden `final` without the own span."""
    mask = GOLDEN[label]["spec.final.tau9"] & geometry(label).causal()
    return mask & ~computed(label, torch.zeros_like(mask))


@functools.cache
def low_precision(label):
    """(out, lse) of plain torch at the dtype of the file."""
    golden = GOLDEN[label]
    return numerics.low_precision_attend(
        *golden.inputs(), history_bits(label), k_perm=golden["spec.k_perm"].long()
    )


def judge(verb, actual, exact, low, what):
    """fp64 must reproduce fp64; kernels are under the rule, whose measure is the reference."""
    if isinstance(verb, verbs.Reference):
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-13, msg=what)
    else:
        numerics.assert_close(actual, exact, low, what=what)


def assert_outputs(verb, label, out, lse, what):
    golden = GOLDEN[label]
    rows, columns = golden["rows"].long(), golden.columns
    low_out, low_lse = low_precision(label)
    exact = golden["spec.out"][..., :columns]
    judge(verb, out[:, rows, :columns], exact, low_out[:, rows, :columns], what)
    judge(verb, lse[:, rows], golden["spec.lse"], low_lse[:, rows], f"lse {what}")


@every_implementation
def test_attend(label, verb):
    golden = GOLDEN[label]
    q, k, v = inputs(golden, verb)
    k_perm = golden["spec.k_perm"].long()
    out, lse = verb.attend(q, k, v, history_bits(label), k_perm=k_perm)
    assert_outputs(verb, label, out, lse, f"attend {label}")


@every_implementation
def test_prefill(label, verb):
    golden = GOLDEN[label]
    q, k, v = inputs(golden, verb)
    out, lse, bits, k_perm = verb.prefill(q, k, v)
    assert torch.equal(k_perm, golden["spec.k_perm"].long())
    numerics.assert_same_blocks(
        computed(label, bits), final(label, golden, "spec.final.tau9"), what=f"final {label}"
    )
    assert_outputs(verb, label, out, lse, f"prefill {label}")


# ---- deviations ----------------------------------------------------------------------------------


def listed(golden, what):
    """Where the authors' mask differs, as the files' index says."""
    mask = torch.zeros(golden["spec.final.tau9"].shape, dtype=torch.bool)
    for head, m, n in golden.differs[what]:
        mask[head, m, n] = True
    return mask


@every_file
def test_nothing_else_differs_from_the_authors(label):
    golden = GOLDEN[label]
    for what in ("select.tau5", "select.tau9", "select.tau99", "final.tau9", "meanpool.tau9"):
        assert torch.equal(golden[f"orig.{what}"] ^ golden[f"spec.{what}"], listed(golden, what))
    assert torch.equal(golden["orig.select.int1"], golden["spec.select.tau1"])


def authors_pooling(x):
    """Block means with a short last block divided by B."""
    means, tail = reference.pool(x.double(), BLOCK), x.size(1) % BLOCK
    if tail:
        means[:, -1] *= tail / BLOCK
    return means


def shared_keys(golden):
    return golden["k"].double().repeat_interleave(golden["q"].size(0) // golden["k"].size(0), 0)


@ragged
@pytest.mark.parametrize("tau", ["tau5", "tau9", "tau99"])
def test_deviation_ragged_last_query_block(label, tau):
    """The authors divide a short last block by B; the flatter softmax keeps extra blocks."""
    golden = GOLDEN[label]
    assert listed(golden, "select.tau9").any()
    extra = golden[f"orig.select.{tau}"] & ~golden[f"spec.select.{tau}"]
    assert not extra[:, :-1].any()
    assert not (golden[f"spec.select.{tau}"] & ~golden[f"orig.select.{tau}"]).any()
    history = torch.zeros_like(geometry(label).causal())
    for m in range(history.size(0)):
        history[m, : geometry(label).own_start(m) // BLOCK] = True
    scale = golden["q"].size(2) ** -0.5
    kbar = reference.pool(shared_keys(golden), BLOCK, golden["spec.k_perm"])
    mass = reference.mean_pool(authors_pooling(golden["q"]), kbar, history, scale)
    for h in range(mass.size(0)):
        theirs = reference.choose("prefix", TAUS[tau], mass[h], history)
        assert torch.equal(theirs, golden[f"orig.select.{tau}"][h])


@ragged
def test_deviation_mean_pooling_of_a_ragged_block(label):
    """MeanPooling divides short blocks by B too; its softmax also sees the short key block."""
    golden = GOLDEN[label]
    causal, scale = geometry(label).causal(), golden["q"].size(2) ** -0.5
    qbar, kbar = authors_pooling(golden["q"]), authors_pooling(shared_keys(golden))
    mass = reference.mean_pool(qbar, kbar, causal, scale)
    forced = torch.eye(causal.size(0), dtype=torch.bool)
    forced[:, 0] = True
    for h in range(mass.size(0)):
        theirs = reference.choose("prefix", 0.9, mass[h], causal) | forced
        assert torch.equal(theirs, golden["orig.meanpool.tau9"][h])


@pytest.mark.parametrize("label", [x for x in GOLDEN if "ties" in x])
def test_deviation_unstable_ties(label):
    """The authors' argsort is not stable: equal scores come in any order. Ours: by position."""
    golden = GOLDEN[label]
    ours, theirs = golden["spec.k_perm"].long(), golden["orig.k_perm"].long()
    complete = golden["orig.importance"].size(1)
    s = torch.zeros(ours.shape)
    s[:, :complete] = golden["orig.importance"]
    moved = ours != theirs
    assert moved.sum() == golden.differs["k_perm_positions"] if golden.columns > 8 else moved.any()
    assert torch.equal(s.gather(1, ours), s.gather(1, theirs)), "only equal scores change places"
    q, k, _ = golden.inputs(torch.float64)
    assert torch.equal(reference.permute(q, k, s)[0], ours), "a stable sort of theirs is ours"
    numerics.assert_k_perm(ours, s)
    with pytest.raises(AssertionError):
        numerics.assert_k_perm(theirs, s)


@every_file
def test_deviation_tau_one_as_a_float(label):
    """The authors keep nothing in a row whose rounded sum stays below 1.0; we keep all."""
    golden = GOLDEN[label]
    ours, theirs = golden["spec.select.tau1"], golden["orig.select.tau1"]
    empty = theirs.sum(-1) == 0
    assert torch.equal(theirs[~empty], ours[~empty])
    lost = (empty & (ours.sum(-1) > 0)).nonzero().tolist()
    stated = golden.differs["select.tau1_rows_empty_in_orig"]
    assert lost == [row for row in stated if row[0] < ours.size(0)]
    q, k, _ = golden.inputs(torch.float64)
    for tau in (1.0, 1, 1.5):
        found = reference.select(q, k, k_perm=golden["spec.k_perm"].long(), tau=tau)
        assert torch.equal(found.chosen, found.eligible) and torch.equal(found.chosen, ours)


def test_tau_one_rows_are_really_lost_somewhere():
    assert any(g.differs["select.tau1_rows_empty_in_orig"] for g in GOLDEN.values())


@every_file
def test_deviation_xattention_fills_after_forcing(label):
    """The authors look at the sum one block too late (pbs_attn/methods/authors.py); we take the
    prefix and force afterwards. Theirs is a superset; ours reaches tau without what it adds."""
    golden = GOLDEN[label]
    ours, theirs = golden["spec.xattn.final.tau9"], golden["orig.xattn.tau9"]
    assert (ours <= theirs).all()
    differs = torch.zeros_like(ours)
    for head, m, n in golden.differs["xattn"]:
        differs[head, m, n] = True
    assert torch.equal(ours ^ theirs, differs)
    q, k, _ = golden.inputs(torch.float64)
    found = reference.select(q, k, permute="none", method="antidiagonal")
    assert torch.equal(found.chosen, golden["spec.xattn.select.tau9"])
    for h, m in differs.any(-1).nonzero().tolist():
        prefix = found.mass[h, m][found.chosen[h, m]]
        assert prefix.sum() >= 0.9 > prefix.sum() - prefix.min()
        assert found.mass[h, m][differs[h, m]].max() <= prefix.min()
    theirs_mass = golden["orig.xattn_scores"].double()
    theirs_mass = theirs_mass / theirs_mass.sum(-1, keepdim=True)
    torch.testing.assert_close(theirs_mass, found.mass, rtol=0, atol=1e-6)


@every_file
def test_deviation_first_token_forcing(label):
    """The authors force token 0's block for every row; in the first segment it is own span."""
    golden = GOLDEN[label]
    ours, theirs = golden["spec.forced.tau9"], golden["orig.forced.tau9"]
    first = golden["spec.k_perm"].eq(0).int().argmax(1) // BLOCK
    own = computed(label, torch.zeros_like(ours))
    for h in range(ours.size(0)):
        assert theirs[h, :, first[h]].all()
        for m in range(ours.size(1)):
            assert ours[h, m, first[h]] == (not own[h, m, first[h]])
    assert torch.equal(
        (ours | own) & geometry(label).causal(), final(label, golden, "spec.final.tau9")
    )


@every_file
def test_authors_attention_is_ours(label):
    """Their plain-PyTorch attention over their own blocks, against fp64 over the same."""
    golden = GOLDEN[label]
    q, k, v = golden.inputs(torch.float64)
    mask = golden["orig.final.tau9"]
    bits = mask & ~computed(label, torch.zeros_like(mask)) & geometry(label).causal()
    out, _ = reference.attend(q, k, v, bits, k_perm=golden["orig.k_perm"].long())
    out = out[:, golden["rows"].long()][..., : golden.columns]
    torch.testing.assert_close(out, golden["orig.out"][..., : golden.columns])
    torch.testing.assert_close(
        out, golden["orig.out_naive"][..., : golden.columns].double(), rtol=0, atol=2e-6
    )
