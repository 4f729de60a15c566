# SPDX-License-Identifier: Apache-2.0
"""`oracle`: blocks chosen by the attention they really hold. No method of blocks in natural order
computes fewer for the same mass; it costs dense attention, so it is a bound and not a method."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import causal_blocks, own_blocks, widen
from .blockmath import SquareBlocks, by_block, fill_to, heaviest, logits, strips


@dataclass(frozen=True, kw_only=True)
class Oracle(SquareBlocks):
    """Exact attention in strips of rows gives, per query head, the share of every row that lies in
    each key block; those are reduced over the rows of a query block, and the heaviest blocks kept.

    reduce mean: average over the rows that see a key, so a row of the table sums to 1. max: the
           largest share that any row has there, for blocks that few rows need but need badly; its
           row sums exceed 1, and tau is a share of them.
    rule   prefix: own blocks first, then others by falling mass until tau of the table's row is
           kept: the fewest blocks that hold the own ones and reach tau; tau >= 1 keeps all.
           budget: own blocks and the ceil(tau) heaviest others.
           absolute: own blocks and those whose entry of the table is tau or more; tau = 0 keeps
           all. With reduce=max it is the bound of `peak`: what its scores estimate, exactly.
    tau    share, >= 0, or with rule=budget a number of blocks
    Own blocks are those that hold the position of a row; equal masses go by block index.
    """

    NAME: ClassVar[str] = "oracle"
    ABOUT: ClassVar[str] = "heaviest blocks by exact attention mass: a bound, at the cost of dense"
    SOURCE: ClassVar[str] = "definition; natural order"
    KEEP_ALL: ClassVar[str] = "tau=1"

    tau: float = 0.9
    reduce: str = "mean"
    rule: str = "prefix"

    def check(self):
        super().check()
        self.check_number("tau")
        self.check_choice("reduce", ("mean", "max"))
        self.check_choice("rule", ("prefix", "budget", "absolute"))

    def blocks(self, call):
        """bool [Hq, Tq, Tk]."""
        mass = true_mass(call, self.block_size, self.reduce)
        causal = causal_blocks(call, self.block_size, self.block_size)
        own = own_blocks(call, self.block_size, self.block_size)
        if self.rule == "absolute":
            return (causal & (mass >= self.tau)) | own
        if self.rule == "budget":
            others = mass.masked_fill(own, -1.0)
            count = torch.tensor(math.ceil(self.tau), device=mass.device)
            return (heaviest(others, count.expand(mass.shape[:2])) & causal) | own
        return fill_to(mass, own, causal, self.tau)


def true_mass(call, block_size, reduce="mean"):
    """[Hq, Tq, Tk]: exact attention in each key block, averaged over (or the largest of) the rows
    of each query block that see a key. fp32, fp64 for fp64 inputs; 0 above the diagonal."""
    q, k = widen(call.q), widen(call.k)
    num_q = -(-q.size(1) // block_size)
    mass = q.new_zeros(q.size(0), num_q, -(-k.size(1) // block_size))
    for begin, end in strips(call, block_size, k.size(1)):
        seen = call.q_offset + end  # keys that the strip's last row sees
        if seen <= 0:
            continue
        shares = _shares(call, q[:, begin:end], k[:, :seen], begin)
        shares = torch.nn.functional.pad(shares, (0, -seen % block_size))
        shares = shares.unflatten(2, (-1, block_size)).sum(3)
        shares = by_block(shares, min(block_size, end - begin))
        first, blocks = begin // block_size, shares.size(3)
        part = mass[:, first : first + shares.size(1), :blocks]
        if reduce == "max":
            part.copy_(torch.maximum(part, shares.amax(2)))
        else:
            part += shares.sum(2)
    if reduce == "mean":
        row = torch.arange(num_q * block_size, device=q.device).view(num_q, block_size)
        live = (row < q.size(1)) & (row + call.q_offset >= 0)
        mass /= live.sum(1).clamp(min=1)[:, None]
    return mass


def _shares(call, q, k, begin):
    """Softmax over the visible of the keys k for the rows q [Hq, R, D] from `begin` on: [Hq, R, n].

    0 for a row that sees none."""
    first = begin + call.q_offset  # position of the first row: all see the keys up to there
    whole = max(first + 1, 0)
    position = torch.arange(q.size(1), device=q.device) + first
    hidden = torch.arange(whole, k.size(1), device=q.device) > position[:, None]
    scores = logits(q, k, call.scale)
    scores[..., whole:].masked_fill_(hidden, -math.inf)
    shares = scores.softmax(-1)
    return shares if first >= 0 else shares.masked_fill_(hidden, 0.0)
