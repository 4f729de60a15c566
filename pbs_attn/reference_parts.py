# SPDX-License-Identifier: Apache-2.0
"""What the verbs of reference.py share: where blocks lie, block means, products, softmax."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


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

    def history_blocks(self, m: int) -> int:
        """Key blocks [0, n) that every row of query block m sees, its own span apart."""
        if self.own != "mask":
            return self.own_start(m) // self.block_k
        return max(self.seqlen_k - self.seqlen_q + m * self.block_q + 1, 0) // self.block_k

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


def pool(x: Tensor, block_size: int, perm: Tensor | None = None) -> Tensor:
    """Means over the existing rows of each (permuted) block: [H, N, D] -> [H, T, D], >= fp32.

    A short last block is divided by its own length (the authors divide by B).
    """
    x = permuted(widen(x), perm)
    blocks = [block.mean(1) for block in x.split(block_size, 1)] if x.size(1) else []
    return torch.stack(blocks, 1) if blocks else x


def widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated in at least fp32 and rounded to their dtype, as matrix units do."""
    return (widen(a) @ widen(b)).to(a.dtype)


def scale_of(q: Tensor, softmax_scale: float | None) -> float:
    return softmax_scale if softmax_scale else q.size(-1) ** -0.5


def expand(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.size(0), 0)


def permuted(x: Tensor, perm: Tensor | None) -> Tensor:
    return x if perm is None else x.gather(1, perm.long()[..., None].expand_as(x))


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """softmax over the last dimension where mask holds; rows without any: 0."""
    p = logits.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.where(mask, p, torch.zeros_like(p))
