# SPDX-License-Identifier: Apache-2.0
"""reference.py's select: which key blocks each query block reads (Algorithm 2), and its parts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .reference_parts import Geometry, expand, masked_softmax, permuted, pool, scale_of, widen


class Selection(NamedTuple):
    """What select() found, all [Hq, Tq, Tk]."""

    bits: Tensor  # bool: the history blocks that are read, token 0's block included; own span False
    chosen: Tensor  # bool: what the rule alone chose (permute="none": own blocks among them)
    mass: Tensor  # fp32 or fp64: share of each block, 0 where not eligible
    eligible: Tensor  # bool: blocks that took part in the softmax


def select(
    q: Tensor, k: Tensor, *, k_perm: Tensor | None = None, q_perm: Tensor | None = None,
    permute: str = "keys", method: str = "mean_pool", stride: int = 8, reduce: str = "sum",
    rule: str = "prefix", normalize: str = "history", tau: float | Tensor = 0.9,
    block_size: int = 128, segment_size: int = 256, softmax_scale: float | None = None,
) -> Selection:  # fmt: skip
    """Share of mass of every block, the rule's choice, and the forced block of token 0.

    permute="none": natural order, the softmax covers all causal blocks, own block included; all
    other modes: the blocks that lie wholly in segments before the diagonal segments. With
    normalize="row" the own segments enter that softmax as well, but no choice.
    """
    heads, natural = q.size(0), permute == "none"
    q, original = permuted(widen(q), q_perm), expand(widen(k), heads)
    k = expand(k, heads if k_perm is None else k_perm.size(0))
    k, scale = expand(permuted(widen(k), k_perm), heads), scale_of(q, softmax_scale)
    geometry = Geometry(
        q.size(1), k.size(1), "block" if natural else "segment", block_size, block_size,
        segment_size, 0 if q_perm is None else segment_size,
    )  # fmt: skip
    causal = geometry.causal()
    history = torch.zeros_like(causal)
    for m in range(causal.size(0)):
        history[m, : geometry.own_start(m) // block_size] = True
    eligible = causal if natural else history

    if method == "mean_pool":
        mass = mean_pool(pool(q, block_size), pool(k, block_size), eligible, scale)
    else:
        own = None
        if normalize == "row" and not natural:
            own = original, causal & ~history
        mass = antidiagonal(q, k, eligible, scale, stride, reduce, block_size, natural, own)
    eligible = eligible.expand_as(mass)
    tau = torch.as_tensor(tau, dtype=torch.float64).expand(heads)
    chosen = torch.stack([choose(rule, *x) for x in zip(tau.tolist(), mass, eligible, strict=True)])
    bits = chosen & history
    if causal.size(1):
        place = torch.zeros(heads, dtype=torch.int64)  # of token 0
        if k_perm is not None:
            place = expand((k_perm == 0).int().argmax(1), heads)
        bits[torch.arange(heads), :, place // block_size] |= history[:, place // block_size].T
    return Selection(bits, chosen, mass, eligible)


def mean_pool(qbar: Tensor, kbar: Tensor, eligible: Tensor, scale: float) -> Tensor:
    """a[m, n] = softmax_n(scale qbar_m . kbar_n) over the eligible blocks; 0 elsewhere."""
    logits = scale * torch.einsum("hmd,hnd->hmn", qbar, kbar)
    return masked_softmax(logits, eligible)


def antidiagonal(
    q: Tensor, k: Tensor, eligible: Tensor, scale: float, stride: int, reduce: str,
    block_size: int, natural: bool, own: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Block masses from sums along antidiagonals (XAttention; on permuted keys PBS-Attn+).

    With t = stride, row group a = rows [a t, a t + t), key group b likewise:
        z[a, b] = scale / t * sum over i < t of q[a t + t - 1 - i] . k[b t + i]
    Ragged tails: rows and keys that do not exist count as zero vectors, the division is by t all
    the same, and a group takes part if it holds at least one row (key) that exists. Group b is
    visible to a if its first key is visible to a's last existing row (natural order), or if it lies
    in an eligible block (permuted order: history only). p[a, :] = softmax over the visible b.
    reduce="sum": mass[m, n] = mean over the existing a in m of (sum over b in n of p[a, b]);
    "max": the maximum over a instead of the mean.
    own = (keys in their original order, bool [Tq, Tk]): the softmax runs over the groups of these
    blocks too, visible as in natural order; they get no mass.
    """
    cols = torch.arange(-(-k.size(1) // stride)) * stride // block_size  # block of a key group
    rows = torch.arange(-(-q.size(1) // stride)) * stride // block_size
    behind = visible_groups(q.size(1), k.size(1), stride)
    visible = eligible[rows][:, cols]
    visible = visible & behind if natural else visible
    masses = []
    for h in range(q.size(0)):
        z = scale / stride * antidiagonal_sums(q[h], k[h], stride)
        if own is not None:
            own_z = scale / stride * antidiagonal_sums(q[h], own[0][h], stride)
            own_visible = own[1][rows][:, cols] & behind
            z = torch.cat([z, own_z], 1)
            p = masked_softmax(z, torch.cat([visible, own_visible], 1))[:, : len(cols)]
        else:
            p = masked_softmax(z, visible)
        p = p.new_zeros(len(rows), eligible.size(1)).index_add_(1, cols, p)
        over_rows = "mean" if reduce == "sum" else "amax"
        index = rows[:, None].expand_as(p)
        mass = p.new_zeros(eligible.shape)
        masses.append(mass.scatter_reduce(0, index, p, over_rows, include_self=False))
    return torch.stack(masses) if masses else q.new_zeros(0, *eligible.shape)


def antidiagonal_sums(q: Tensor, k: Tensor, t: int) -> Tensor:
    """sum over i < t of q[a t + t - 1 - i] . k[b t + i] for all groups a, b of one head."""

    def groups(x):
        return torch.nn.functional.pad(x, (0, 0, 0, -x.size(0) % t)).unflatten(0, (-1, t))

    return torch.einsum("aid,bid->ab", groups(q).flip(1), groups(k))


def visible_groups(seqlen_q: int, seqlen_k: int, t: int) -> Tensor:
    """bool: key groups that start no later than the last existing row of a row group."""
    last = torch.arange(t, seqlen_q + t, t).clamp(max=seqlen_q) - 1 + seqlen_k - seqlen_q
    return torch.arange(0, seqlen_k, t) <= last[:, None]


def choose(rule: str, tau: float, mass: Tensor, eligible: Tensor) -> Tensor:
    """The rule turns masses [Tq, Tk] into bits; ties go to the lower block index.

    prefix: the smallest prefix of the descending order whose mass is >= tau of the row's mass (1
    for a softmax); all if tau >= 1 or if rounding never lets the sum reach it (the authors then
    keep none). relative: mass >= tau times the row's maximum. absolute: mass >= tau. budget: the
    ceil(tau) largest.
    """
    if rule == "relative":
        return eligible & (mass >= tau * mass.amax(-1, keepdim=True))
    if rule == "absolute":
        return eligible & (mass >= tau)
    value, index = mass.masked_fill(~eligible, -1.0).sort(dim=-1, descending=True, stable=True)
    value = value.clamp(min=0.0)
    before = value.cumsum(-1) - value
    if rule == "budget":
        keep = torch.arange(mass.size(-1)).expand_as(mass) < math.ceil(tau)
    else:
        keep = torch.full_like(eligible, True) if tau >= 1 else before < tau * value.sum(-1, True)
    return torch.zeros_like(eligible).scatter(-1, index, keep) & eligible
