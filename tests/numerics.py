# SPDX-License-Identifier: Apache-2.0
"""When is a result right? One rule for numbers, one for permutations, one for selections."""

import torch

from pbs_attn import reference


def assert_close(actual, exact, low_precision, *, what="", noise=0.0):
    """max |actual - exact| <= 2 max |low_precision - exact| + 2 rounding noise; inf, nan in place.

    exact is the fp64 reference, low_precision the same maths on the same blocks by plain torch in
    the dtype of the inputs. A kernel must be as good as honest arithmetic in its dtype, whatever
    the shape and the data; no absolute tolerance can say that for all of them. The factor 2 is
    what another summation order costs, the noise term is one unit in the last place of the
    largest value, which stays when torch happens to hit the exact result.
    """
    shape = tuple(actual.shape)
    assert actual.shape == exact.shape, f"{what}: shape {shape}, reference {tuple(exact.shape)}"
    unit = torch.finfo(actual.dtype).eps
    actual, exact, low = actual.double(), exact.double(), low_precision.double()
    for kind, test in (("nan", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (test(actual) != test(exact)).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise AssertionError(
                f"{what} shape {shape}: {kind} in {len(wrong)} wrong places, first {at}: "
                f"got {actual[at]}, reference {exact[at]}"
            )
    finite = torch.isfinite(exact)
    if not finite.any():
        return
    error = torch.where(finite, (actual - exact).abs(), 0.0)
    low_error = torch.where(finite & torch.isfinite(low), (low - exact).abs(), 0.0).max().item()
    scale = exact[finite].abs().max().item()
    bound = 2 * low_error + 2 * (unit * scale + noise)
    if error.max().item() > bound:
        at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{what} shape {shape}: error {error.max():.3e} > {bound:.3e} (low precision "
            f"{low_error:.3e}) at {at}: got {actual[at]:.9g}, reference {exact[at]:.9g}"
        )


def _one_walk(q):
    """q moved by what a chain of head_dim fp32 additions walks at random, relative to a logit.

    With one probe row or one visible key the largest error is that of one single logit, and torch,
    which sums in blocks, is often lucky there. Moving q by sqrt(D) half units makes that error part
    of the low-precision result always. In bf16 and fp16 it rounds away: logits are rounded
    to those dtypes anyway.
    """
    return q * (1 + q.size(-1) ** 0.5 * 2.0**-24)


def low_precision_attend(q, k, v, bits, **options):
    """(out, lse): the same maths and the same blocks in torch at the dtype of q."""
    return reference.attend(_one_walk(q), k, v, bits, **options)


def low_precision_score(q, k, **options):
    """Importance is fp32 from any input dtype, so honest arithmetic is torch in fp32."""
    return reference.score(_one_walk(q.float()), k.float(), **options)


def assert_k_perm(actual, score, *, segment_size=256, tolerance=0.0, what=""):
    """actual sorts score inside every complete segment and leaves the tail alone.

    tolerance is the error of the scores that the kernel sorted, relative to the segment's largest:
    neighbours closer than that may stand in either order. 0 demands the stable order exactly.
    """
    heads, seqlen = score.shape
    actual = actual.long()
    assert actual.shape == score.shape, f"{what}: shape {tuple(actual.shape)}"
    complete = seqlen // segment_size * segment_size if seqlen > segment_size else 0
    place = torch.arange(seqlen).repeat(heads, 1)
    assert torch.equal(actual[:, complete:], place[:, complete:]), f"{what}: the tail moved"
    for begin in range(0, complete, segment_size):
        part = actual[:, begin : begin + segment_size]
        home = place[:, begin : begin + segment_size]
        assert torch.equal(part.sort(1).values, home), f"{what}: segment at {begin} not permuted"
        s = score.gather(1, part)
        rise = s[:, 1:] - s[:, :-1]
        limit = tolerance * s.amax(1, keepdim=True)
        wrong = rise > limit
        if tolerance == 0:
            wrong |= (rise == 0) & (part[:, 1:] < part[:, :-1])
        if wrong.any():
            h, j = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"{what} shape {tuple(score.shape)}: head {h}, permuted places {begin + j}, +1 "
                f"hold tokens {part[h, j]}, {part[h, j + 1]} with scores {s[h, j]:.9g}, "
                f"{s[h, j + 1]:.9g}"
            )


def assert_same_blocks(actual, expected, *, what=""):
    """Selections equal bit for bit: for inputs without ties and without masses near tau."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} {tuple(expected.shape)}"
    wrong = (actual != expected).nonzero()
    if len(wrong):
        h, m, n = wrong[0].tolist()
        raise AssertionError(
            f"{what} shape {tuple(actual.shape)}: {len(wrong)} blocks differ, first head {h}, "
            f"query block {m}, key block {n}: got {bool(actual[h, m, n])}, reference "
            f"{bool(expected[h, m, n])}; row {actual[h, m].nonzero().flatten().tolist()} against "
            f"{expected[h, m].nonzero().flatten().tolist()}"
        )


def assert_blocks(actual, selection, *, rule="prefix", tau=0.9, tolerance=1e-5, what=""):
    """actual [H, Tq, Tk] is what the rule gives for selection.mass, up to rounding of the masses.

    fp32 masses may lie on either side of a threshold when the exact one is nearer to it than their
    error, and two blocks of nearly equal mass may swap. Equality cannot be asked for there, but
    coverage can: with masses of the reference, every row that differs must still be a prefix that
    reaches tau and would not reach it without its smallest block, all within the tolerance.
    """
    bits, mass = selection.bits, selection.mass.double()
    assert actual.shape == bits.shape, f"{what}: shape {tuple(actual.shape)} {tuple(bits.shape)}"
    differs = actual != bits
    for h, m in differs.any(-1).nonzero().tolist():
        row, p = actual[h, m], mass[h, m]
        # what the reference forced or clears is not the rule's to decide: take it as it is there
        eligible = selection.eligible[h, m] & (selection.chosen[h, m] == bits[h, m])
        fixed = selection.chosen[h, m] & ~eligible
        tau_h = float(torch.as_tensor(tau).expand(bits.size(0))[h])
        where = f"{what} shape {tuple(bits.shape)} {rule} {tau_h}: head {h}, query block {m}"
        got, want = row.nonzero().flatten().tolist(), bits[h, m].nonzero().flatten().tolist()
        detail = f"{where}: got {got}, reference {want}"
        assert not (differs[h, m] & ~eligible).any(), f"{detail}: a forced or barred block differs"
        assert tau_h < 1 or rule in ("budget",), f"{detail}: tau keeps all"
        changed = differs[h, m]
        if rule == "relative":
            edge = tau_h * p.max()
            near = (p[changed] - edge).abs().max()
        elif rule == "absolute":
            near = (p[changed] - tau_h).abs().max()
        else:
            kept, left = p[row & eligible], p[~row & eligible]
            swap = left.max() - kept.min() if len(kept) and len(left) else p.new_tensor(0.0)
            total = p[row & eligible].sum() + p[fixed].sum()
            if rule == "budget":
                assert (row & eligible).sum() == (bits[h, m] & eligible).sum(), detail
                near = swap
            else:
                last = kept.min() if len(kept) else p.new_tensor(0.0)
                near = torch.stack([swap, tau_h - total, total - last - tau_h]).max()
        assert near <= tolerance, f"{detail}: off by {near:.3e} > {tolerance:.1e} of mass"


def unpack(bits, num_blocks):
    """int32 words [..., W], bit n % 32 of word n / 32 -> bool [..., num_blocks]."""
    shifted = bits[..., :, None] >> torch.arange(32, dtype=torch.int32)
    return (shifted & 1).bool().flatten(-2)[..., :num_blocks]


def pack(blocks):
    """bool [..., num_blocks] -> int32 words [..., W]."""
    width = -(-blocks.size(-1) // 32) * 32
    wide = torch.nn.functional.pad(blocks, (0, width - blocks.size(-1))).unflatten(-1, (-1, 32))
    words = (wide.long() << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()
