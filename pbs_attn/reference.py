# SPDX-License-Identifier: Apache-2.0
"""Permuted block-sparse attention as mathematics: one function per verb, einsum and sort.

    score -> permute -> (pool) -> select -> attend        (and prefill: all of them)

Every kernel is tested against this file, which imports nothing but torch (select and what the verbs
share stand beside it), and docs/algorithm.md maps it to the paper (PBS-Attn, arXiv 2510.21270 v2).
One sequence at a time:

    q [Hq, Nq, D], k and v [Hk, Nk, D]; G = Hq / Hk query heads share a key head
    Hp = Hq (gqa="per_head") or Hk ("group"): heads that own a permutation
    B block_size, S segment_size (a multiple of B), Tq = ceil(Nq / B), Tk = ceil(Nk / B)

Query row i has absolute position q_offset + i, q_offset = Nk - Nq (negative positions see no key).
Blocks are cut from the first row and the first key on; the last block may be short; no length is a
precondition. Permutations map permuted place -> original place and are int64.

Precision: score, pool and select compute in at least fp32 whatever the inputs are (ruling: pooled
vectors, masses and importance are fp32 everywhere) and in fp64 for fp64 inputs. attend multiplies
in the dtype of its inputs: in fp64 it is the truth, in bf16 it is what tests/numerics.py calls the
low-precision torch of the same maths. No speed was sought; only N x N per head is never built.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .reference_parts import (  # noqa: F401
    Geometry,
    computed,
    density,
    expand,
    masked_softmax,
    permuted,
    pool,
    product,
    scale_of,
    widen,
)
from .reference_select import (  # noqa: F401
    Selection,
    antidiagonal,
    choose,
    mean_pool,
    select,
)


class Prefill(NamedTuple):
    out: Tensor  # [Hq, Nq, D] in the dtype of q
    lse: Tensor  # [Hq, Nq] natural logarithm; -inf where no key is visible
    score: Tensor  # [Hp, Nk]
    k_perm: Tensor  # [Hp, Nk]
    q_perm: Tensor | None  # [Hq, Nq], permute = "queries" and "both" only
    selection: Selection


# ---- score: which keys matter (paper eq. 7) ------------------------------------------------------


def score(
    q: Tensor, k: Tensor, *, block_size: int = 128, segment_size: int = 256,
    gqa: str = "per_head", order: str = "last_block", seed: int = 0,
    softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """s_j = mean over probe rows r of softmax_j(scale q_r . k_j), j in the complete segments.

    Returns [Hp, Nk], fp32 or fp64; 0 beyond the complete segments. The probe is the last
    min(B, Nq) rows ("last_block", the paper), the mean of all rows ("mean_query") or one row drawn
    at random ("random_query"); "random" has none and draws s itself. No causal mask inside the
    probe. gqa="group" averages the group's probe rows before the softmax.
    """
    q, k, scale = widen(q), widen(k), scale_of(q, softmax_scale)
    seqlen_q, complete = q.size(1), k.size(1) // segment_size * segment_size
    heads = q.size(0) if gqa == "per_head" else k.size(0)
    result = q.new_zeros(heads, k.size(1))
    if order == "random":
        for h in range(heads):
            drawn = [(_hash(seed, h, j) >> 40) * 2.0**-24 for j in range(complete)]
            result[h, :complete] = torch.tensor(drawn).to(result)
    elif complete and seqlen_q:
        if order == "last_block":
            probe = q[:, -block_size:]
        elif order == "mean_query":
            probe = q.mean(1, keepdim=True)
        else:
            shared = q.size(0) // heads  # one row for each permutation, whatever the group's size
            rows = [_hash(seed, h // shared, 0) % seqlen_q for h in range(q.size(0))]
            probe = q[torch.arange(q.size(0)), rows].unsqueeze(1)
        if gqa == "group":
            probe = probe.unflatten(0, (k.size(0), -1)).mean(1)
        logits = scale * torch.einsum("hrd,hjd->hrj", probe, expand(k[:, :complete], heads))
        result[:, :complete] = logits.softmax(-1).mean(1)
    return result


# ---- permute: bring them together (eq. 8; section 4.3 for queries) -------------------------------


def permute(
    q: Tensor, k: Tensor, s: Tensor | None = None, *, permute: str = "keys",
    block_size: int = 128, segment_size: int = 256, gqa: str = "per_head",
    k_perm: Tensor | None = None, permute_heads: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(k_perm [Hp, Nk], q_perm [Hq, Nq] or None).

    k_perm: inside every complete segment, keys by s descending, ties by position ascending (a
    stable sort; the authors' is not); the incomplete tail keeps its order. q_perm: inside every
    complete segment of rows, the key blocks of the segment where its first row stands take in turn
    the B free rows that are closest to the block's mean key by cosine, ties by row; rows stay
    ascending inside a block. Identity where Nk <= S and for heads with permute_heads[hp] = 0.
    k_perm given: taken as it is instead of sorting s.
    """
    heads = q.size(0) if gqa == "per_head" else k.size(0)
    seqlen_q, seqlen_k, width = q.size(1), k.size(1), segment_size
    active = torch.ones(heads) if permute_heads is None else permute_heads
    keys = torch.arange(seqlen_k).repeat(heads, 1)
    if permute in ("keys", "both") and seqlen_k > width:
        complete = seqlen_k // width * width
        if k_perm is not None:
            ordered = k_perm.long()
        else:
            by_segment = s[:, :complete].unflatten(1, (-1, width))
            ordered = by_segment.argsort(dim=-1, descending=True, stable=True)
            ordered = (ordered + torch.arange(0, complete, width)[:, None]).flatten(1)
            ordered = torch.cat([ordered, keys[:, complete:]], 1)
        keys = torch.where(active[:, None] != 0, ordered, keys)
    if permute not in ("queries", "both"):
        return keys, None

    rows = torch.arange(seqlen_q).repeat(q.size(0), 1)
    geometry = Geometry(seqlen_q, seqlen_k, "segment", block_size, block_size, width, width)
    pooled = expand(pool(expand(k, heads), block_size, keys), q.size(0))
    unit = torch.nn.functional.normalize(widen(q), dim=-1, eps=0.0).nan_to_num(0.0)
    for h in range(q.size(0) if seqlen_k > width else 0):
        if not active[h * heads // q.size(0)]:
            continue
        for begin in range(0, seqlen_q // width * width, width):
            first = geometry.own_start(begin // block_size) // block_size
            free = list(range(begin, begin + width))
            for c in range(width // block_size):
                n = first + c
                centroid = pooled[h, n] if n < pooled.size(1) else torch.zeros_like(unit[h, 0])
                near = (unit[h, free] @ centroid).argsort(descending=True, stable=True)
                taken = sorted(free[i] for i in near[:block_size].tolist())
                place = begin + c * block_size
                rows[h, place : place + block_size] = torch.tensor(taken)
                free = [r for r in free if r not in set(taken)]
    return keys, rows


# ---- attend: exact attention over what was selected (Algorithm 1) --------------------------------


def attend(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None = None, *, k_perm: Tensor | None = None,
    q_perm: Tensor | None = None, own: str = "segment", block_q: int = 128, block_k: int = 128,
    segment_size: int = 256, softmax_scale: float | None = None, correction: str = "none",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [Hq, Nq, Dv] in q's dtype, lse [Hq, Nq] fp32 or fp64): softmax over the kept keys.

    bits [Hq or Hk, Tq, Tk] lists history blocks of permuted keys. Permuted place j is read by row i
    of block m iff bits[m, j / block_k] and j is before the own span, or j is in the own span and
    k_perm[j] <= p(i) (kernels read that span from the original keys, where it is plain causality).
    own="mask": bits alone decide, causally, in natural order. A row without keys: 0 and -inf.
    correction="mean": every block of history that all rows of m see and bits do not list adds one
    pseudo-token: the block's mean key and mean value, with logit scale q . kbar + ln block_k.
    Both products are rounded to q's dtype, the softmax is taken in at least fp32.
    """
    (num_heads, seqlen_q, _), seqlen_k, scale = q.shape, k.size(1), scale_of(q, softmax_scale)
    geometry = Geometry(
        seqlen_q, seqlen_k, own, block_q, block_k, segment_size,
        0 if q_perm is None else segment_size,
    )  # fmt: skip
    out = q.new_zeros(num_heads, seqlen_q, v.size(2))
    lse = widen(q).new_full((num_heads, seqlen_q), -math.inf)
    place = torch.arange(seqlen_k)
    means = None
    if correction == "mean":  # of the blocks as history reads them, rounded as a kernel keeps them
        heads = k.size(0) if k_perm is None else k_perm.size(0)
        means = [pool(expand(x, heads), block_k, k_perm).to(x.dtype) for x in (k, v)]
    for h in range(num_heads):
        kv = h * k.size(0) // num_heads
        token = place if k_perm is None else k_perm[h * k_perm.size(0) // num_heads].long()
        for m in range(-(-seqlen_q // block_q)):
            rows = torch.arange(m * block_q, min((m + 1) * block_q, seqlen_q))
            if q_perm is not None:
                rows = q_perm[h, rows].long()
            start = geometry.own_start(m)
            causal = token <= (seqlen_k - seqlen_q + rows)[:, None]
            if own == "all":
                seen = causal
            else:
                listed = bits[h * bits.size(0) // num_heads, m][place // block_k]
                seen = listed & ((place < start) & (causal | (own != "mask")))
                if own in ("segment", "block"):
                    seen = seen | ((place >= start) & causal)
            kept = seen.any(0)  # keys that no row of the block reads do not enter at all
            keys = token[kept]
            logits = widen(scale * product(q[h, rows], k[kv, keys].T))
            seen, values = seen[:, kept], v[kv, keys]
            if means is not None:
                dropped = ~bits[h * bits.size(0) // num_heads, m, : geometry.history_blocks(m)]
                kbar, vbar = (x[h * x.size(0) // num_heads][: len(dropped)][dropped] for x in means)
                pseudo = widen(scale * product(q[h, rows], kbar.T)) + math.log(block_k)
                logits, values = torch.cat([logits, pseudo], 1), torch.cat([values, vbar])
                seen = torch.nn.functional.pad(seen, (0, len(kbar)), value=True)
            logits = logits.masked_fill(~seen, -math.inf)
            lse[h, rows] = logits.logsumexp(-1)
            p = masked_softmax(logits, seen).to(v.dtype)
            out[h, rows] = product(p, values)
    return out, lse


# ---- prefill: all verbs in a row, and many sequences ---------------------------------------------


def prefill(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int = 128, segment_size: int = 256,
    tau: float | Tensor = 0.9, permute: str = "keys", order: str = "last_block",
    gqa: str = "per_head", select: str = "mean_pool", stride: int = 8,  # noqa: F811
    reduce: str = "sum", rule: str = "prefix", normalize: str = "history",
    correction: str = "none", seed: int = 0, softmax_scale: float | None = None,
    k_perm: Tensor | None = None, permute_heads: Tensor | None = None,
) -> Prefill:  # fmt: skip
    """The whole method on one sequence; the options are those of PBSConfig."""
    verbs = globals()  # the option names select and permute hide the verbs of that name
    cut = {"block_size": block_size, "segment_size": segment_size}
    s = score(q, k, gqa=gqa, order=order, seed=seed, softmax_scale=softmax_scale, **cut)
    k_perm, q_perm = verbs["permute"](
        q, k, s, permute=permute, gqa=gqa, k_perm=k_perm, permute_heads=permute_heads, **cut
    )
    selection = verbs["select"](
        q, k, k_perm=k_perm, q_perm=q_perm, permute=permute, method=select, stride=stride,
        reduce=reduce, rule=rule, normalize=normalize, tau=tau, softmax_scale=softmax_scale, **cut,
    )  # fmt: skip
    out, lse = attend(
        q, k, v, selection.bits, k_perm=k_perm, q_perm=q_perm,
        own="block" if permute == "none" else "segment", block_q=block_size, block_k=block_size,
        segment_size=segment_size, softmax_scale=softmax_scale, correction=correction,
    )  # fmt: skip
    return Prefill(out, lse, s, k_perm, q_perm, selection)


def sequences(q: Tensor, k: Tensor, q_start=None, q_len=None, kv_start=None, kv_len=None):
    """For each sequence of a batch: (row of q, slice of its queries, row of k, slice of its keys).

    q [B, Hq, N, D], k [B, Hk, N, D]; geometry vectors as in pbs.h, None = from 0, whole tensor. One
    row of q with longer vectors is packed varlen: all sequences lie in that row.
    """
    vectors = [x if x is None else x.tolist() for x in (q_start, q_len, kv_start, kv_len)]
    count = next((len(x) for x in vectors if x is not None), q.size(0))

    def span(starts, sizes, b, seqlen):
        start = starts[b] if starts is not None else 0
        return slice(start, start + sizes[b] if sizes is not None else seqlen)

    for b in range(count):
        rows, keys = span(*vectors[:2], b, q.size(2)), span(*vectors[2:], b, k.size(2))
        yield (b if q.size(0) > 1 else 0), rows, (b if k.size(0) > 1 else 0), keys


def prefill_batch(
    q: Tensor, k: Tensor, v: Tensor, *, q_start=None, q_len=None, kv_start=None, kv_len=None,
    **options,
) -> tuple[Tensor, Tensor, list[Prefill]]:  # fmt: skip
    """(out like q, lse [B, Hq, Nq], one Prefill per sequence); 0 and -inf outside the sequences."""
    out = q.new_zeros(*q.shape[:3], v.size(3))
    lse = widen(q).new_full(q.shape[:3], -math.inf)
    plans = []
    for b, rows, b_kv, keys in sequences(q, k, q_start, q_len, kv_start, kv_len):
        plans.append(prefill(q[b, :, rows], k[b_kv, :, keys], v[b_kv, :, keys], **options))
        out[b, :, rows], lse[b, :, rows] = plans[-1].out, plans[-1].lse
    return out, lse, plans


# ---- small things --------------------------------------------------------------------------------


def _hash(seed: int, head: int, index: int) -> int:
    """64 random bits by (seed, head of the permutation, index): csrc/core/random.h's pbs_hash."""
    golden, bits = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & bits
        x = (x ^ x >> 27) * 0x94D049BB133111EB & bits
        return x ^ x >> 31

    return mix((mix((seed + golden * (head + 1)) & bits) + golden * (index + 1)) & bits)
