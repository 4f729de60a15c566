# SPDX-License-Identifier: Apache-2.0
"""Permuted block-sparse attention as mathematics: one function per verb, einsum and sort.

    score -> permute -> (pool) -> select -> attend        (and prefill: all of them)

Every kernel is tested against this file, which imports nothing but torch, and docs/algorithm.md
maps it to the paper (PBS-Attn, arXiv 2510.21270 v2). One sequence at a time:

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


class Selection(NamedTuple):
    """What select() found, all [Hq, Tq, Tk]."""

    bits: Tensor  # bool: the history blocks that are read, token 0's block included; own span False
    chosen: Tensor  # bool: what the rule alone chose (permute="none": own blocks among them)
    mass: Tensor  # fp32 or fp64: share of each block, 0 where not eligible
    eligible: Tensor  # bool: blocks that took part in the softmax


class Prefill(NamedTuple):
    out: Tensor  # [Hq, Nq, D] in the dtype of q
    lse: Tensor  # [Hq, Nq] natural logarithm; -inf where no key is visible
    score: Tensor  # [Hp, Nk]
    k_perm: Tensor  # [Hp, Nk]
    q_perm: Tensor | None  # [Hq, Nq], permute = "queries" and "both" only
    selection: Selection


# ---- geometry: which keys a query block sees, and which of them it always reads ------------------


class Geometry(NamedTuple):
    """One sequence cut into blocks. own says which keys a query block reads besides listed ones:

    "segment": the segments that hold any position of the block (algorithm 2's diagonal segments);
    "block": the key blocks that hold any position of it; "mask", "none": no keys (with "mask" the
    history is everything visible, with "none" as with "segment"); "all": every visible key.
    row_segment = segment_size where queries are permuted: the rows of a block then come from
    anywhere in its row segment, so that segment's first and last row count.
    """

    seqlen_q: int
    seqlen_k: int
    own: str = "segment"
    block_q: int = 128
    block_k: int = 128
    segment_size: int = 256
    row_segment: int = 0

    def visible(self, m: int, size: int = 0) -> int:
        """Keys [0, n) that the last existing row of query block m (of size rows) sees."""
        last_row = min((m + 1) * (size or self.block_q), self.seqlen_q) - 1
        return max(self.seqlen_k - self.seqlen_q + last_row + 1, 0)

    def own_start(self, m: int) -> int:
        """First key of the own span of query block m; all keys before it are history."""
        if self.own == "all":
            return 0
        if self.own == "mask":
            return self.visible(m)
        row = m * self.block_q
        row -= row % self.row_segment if self.row_segment else 0
        first = max(self.seqlen_k - self.seqlen_q + row, 0)
        return first - first % (self.block_k if self.own == "block" else self.segment_size)

    def own_end(self, m: int) -> int:
        if not self.row_segment:
            return self.visible(m)
        return self.visible(m * self.block_q // self.row_segment, self.row_segment)

    def causal(self) -> Tensor:
        """bool [Tq, Tk]: key blocks with a visible key; T(T+1)/2 of them in a one-shot prefill."""
        visible = [self.visible(m) for m in range(-(-self.seqlen_q // self.block_q))]
        first_key = torch.arange(0, self.seqlen_k, self.block_k)
        return first_key < torch.tensor(visible, dtype=torch.int64)[:, None]

    def computed(self, bits: Tensor) -> Tensor:
        """bits [H, Tq, Tk] with the own spans added: the blocks that a kernel runs."""
        blocks = bits.clone()
        for m in range(bits.size(1)) if self.own not in ("mask", "none") else ():
            end = -(-self.own_end(m) // self.block_k)
            blocks[:, m, self.own_start(m) // self.block_k : end] = True
        return blocks


def density(bits: Tensor, geometry: Geometry) -> float:
    """Selected causal blocks / causal blocks."""
    causal = geometry.causal()
    selected = geometry.computed(bits) & causal
    return selected.sum().item() / max(bits.size(0) * causal.sum().item(), 1)


def computed(bits: Tensor, geometry: Geometry) -> float:
    """Blocks that a kernel runs / causal blocks (above density only where queries are permuted)."""
    causal = geometry.causal().sum().item()
    return geometry.computed(bits).sum().item() / max(bits.size(0) * causal, 1)


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
    q, k, scale = _widen(q), _widen(k), _scale(q, softmax_scale)
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
        logits = scale * torch.einsum("hrd,hjd->hrj", probe, _expand(k[:, :complete], heads))
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
    pooled = _expand(pool(_expand(k, heads), block_size, keys), q.size(0))
    unit = torch.nn.functional.normalize(_widen(q), dim=-1, eps=0.0).nan_to_num(0.0)
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


def pool(x: Tensor, block_size: int, perm: Tensor | None = None) -> Tensor:
    """Means over the existing rows of each (permuted) block: [H, N, D] -> [H, T, D], >= fp32.

    A short last block is divided by its own length (the authors divide by B).
    """
    x = _permuted(_widen(x), perm)
    blocks = [block.mean(1) for block in x.split(block_size, 1)] if x.size(1) else []
    return torch.stack(blocks, 1) if blocks else x


# ---- select: which key blocks each query block reads (Algorithm 2) -------------------------------


def select(
    q: Tensor, k: Tensor, *, k_perm: Tensor | None = None, q_perm: Tensor | None = None,
    permute: str = "keys", method: str = "mean_pool", stride: int = 8, reduce: str = "sum",
    rule: str = "prefix", tau: float | Tensor = 0.9, block_size: int = 128,
    segment_size: int = 256, softmax_scale: float | None = None,
) -> Selection:  # fmt: skip
    """Share of mass of every block, the rule's choice, and the forced block of token 0.

    permute="none": natural order, the softmax covers all causal blocks, own block included; all
    other modes: the blocks that lie wholly in segments before the diagonal segments.
    """
    heads, natural = q.size(0), permute == "none"
    q, k = _permuted(_widen(q), q_perm), _expand(k, heads if k_perm is None else k_perm.size(0))
    k, scale = _expand(_permuted(_widen(k), k_perm), heads), _scale(q, softmax_scale)
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
        mass = antidiagonal(q, k, eligible, scale, stride, reduce, block_size, natural)
    eligible = eligible.expand_as(mass)
    tau = torch.as_tensor(tau, dtype=torch.float64).expand(heads)
    chosen = torch.stack([choose(rule, *x) for x in zip(tau.tolist(), mass, eligible, strict=True)])
    bits = chosen & history
    if causal.size(1):
        place = torch.zeros(heads, dtype=torch.int64)  # of token 0
        if k_perm is not None:
            place = _expand((k_perm == 0).int().argmax(1), heads)
        bits[torch.arange(heads), :, place // block_size] |= history[:, place // block_size].T
    return Selection(bits, chosen, mass, eligible)


def mean_pool(qbar: Tensor, kbar: Tensor, eligible: Tensor, scale: float) -> Tensor:
    """a[m, n] = softmax_n(scale qbar_m . kbar_n) over the eligible blocks; 0 elsewhere."""
    logits = scale * torch.einsum("hmd,hnd->hmn", qbar, kbar)
    return _masked_softmax(logits, eligible)


def antidiagonal(
    q: Tensor, k: Tensor, eligible: Tensor, scale: float, stride: int, reduce: str,
    block_size: int, natural: bool,
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
    """
    seqlen_q, seqlen_k, t = q.size(1), k.size(1), stride
    rows, cols = -(-seqlen_q // t), -(-seqlen_k // t)
    pad = torch.nn.functional.pad
    q_groups = pad(q, (0, 0, 0, rows * t - seqlen_q)).unflatten(1, (rows, t)).flip(2)
    k_groups = pad(k, (0, 0, 0, cols * t - seqlen_k)).unflatten(1, (cols, t))
    row_block, col_block = (
        torch.arange(rows) * t // block_size,
        torch.arange(cols) * t // block_size,
    )
    visible = eligible[row_block][:, col_block]
    if natural:
        last = (torch.arange(1, rows + 1) * t).clamp(max=seqlen_q) - 1 + seqlen_k - seqlen_q
        visible = visible & (torch.arange(cols) * t <= last[:, None])
    masses = []
    for q_head, k_head in zip(q_groups, k_groups, strict=True):
        z = scale / t * torch.einsum("aid,bid->ab", q_head, k_head)
        p = _masked_softmax(z, visible)
        p = p.new_zeros(rows, eligible.size(1)).index_add_(1, col_block, p)
        over_rows = "mean" if reduce == "sum" else "amax"
        index = row_block[:, None].expand_as(p)
        mass = p.new_zeros(eligible.shape)
        masses.append(mass.scatter_reduce(0, index, p, over_rows, include_self=False))
    return torch.stack(masses) if masses else q.new_zeros(0, *eligible.shape)


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


# ---- attend: exact attention over what was selected (Algorithm 1) --------------------------------


def attend(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None = None, *, k_perm: Tensor | None = None,
    q_perm: Tensor | None = None, own: str = "segment", block_q: int = 128, block_k: int = 128,
    segment_size: int = 256, softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [Hq, Nq, Dv] in q's dtype, lse [Hq, Nq] fp32 or fp64): softmax over the kept keys.

    bits [Hq or Hk, Tq, Tk] lists history blocks of permuted keys. Permuted place j is read by row i
    of block m iff bits[m, j / block_k] and j is before the own span, or j is in the own span and
    k_perm[j] <= p(i) (kernels read that span from the original keys, where it is plain causality).
    own="mask": bits alone decide, causally, in natural order. A row without keys: 0 and -inf.
    Both products are rounded to q's dtype, the softmax is taken in at least fp32.
    """
    (num_heads, seqlen_q, _), seqlen_k, scale = q.shape, k.size(1), _scale(q, softmax_scale)
    geometry = Geometry(
        seqlen_q, seqlen_k, own, block_q, block_k, segment_size,
        0 if q_perm is None else segment_size,
    )  # fmt: skip
    out = q.new_zeros(num_heads, seqlen_q, v.size(2))
    lse = _widen(q).new_full((num_heads, seqlen_q), -math.inf)
    place = torch.arange(seqlen_k)
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
            logits = _widen(scale * _product(q[h, rows], k[kv, keys].T))
            logits = logits.masked_fill(~seen[:, kept], -math.inf)
            lse[h, rows] = logits.logsumexp(-1)
            p = _masked_softmax(logits, seen[:, kept]).to(v.dtype)
            out[h, rows] = _product(p, v[kv, keys])
    return out, lse


# ---- prefill: all verbs in a row, and many sequences ---------------------------------------------


def prefill(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int = 128, segment_size: int = 256,
    tau: float | Tensor = 0.9, permute: str = "keys", order: str = "last_block",
    gqa: str = "per_head", select: str = "mean_pool", stride: int = 8, reduce: str = "sum",
    rule: str = "prefix", seed: int = 0, softmax_scale: float | None = None,
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
        reduce=reduce, rule=rule, tau=tau, softmax_scale=softmax_scale, **cut,
    )  # fmt: skip
    out, lse = attend(
        q, k, v, selection.bits, k_perm=k_perm, q_perm=q_perm,
        own="block" if permute == "none" else "segment", block_q=block_size, block_k=block_size,
        segment_size=segment_size, softmax_scale=softmax_scale,
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
    lse = _widen(q).new_full(q.shape[:3], -math.inf)
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


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated in at least fp32 and rounded to their dtype, as matrix units do."""
    return (_widen(a) @ _widen(b)).to(a.dtype)


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return softmax_scale if softmax_scale else q.size(-1) ** -0.5


def _expand(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.size(0), 0)


def _permuted(x: Tensor, perm: Tensor | None) -> Tensor:
    return x if perm is None else x.gather(1, perm.long()[..., None].expand_as(x))


def _masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """softmax over the last dimension where mask holds; rows without any: 0."""
    p = logits.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.where(mask, p, torch.zeros_like(p))
