# SPDX-License-Identifier: Apache-2.0
"""`flexprefill`: per head, either columns and diagonals that the last queries like, or those and
blocks by pooled queries and keys."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import causal_blocks, own_blocks, widen
from .blockmath import (
    SquareBlocks,
    block_means,
    blocks_of,
    heaviest,
    logits,
    row_blocks,
    strips,
)


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(SquareBlocks):
    """FlexPrefill (arXiv 2502.20766, code a24b27b), as the code does it.

    A is the causal attention of the last B rows, B = block_size; `vertical` its mean per key,
    `slash` its mean per distance of row and key, both summed over blocks of B. Distances are
    blocked from the far end, so that with a ragged N the nearest block of them is the short one.

    1. Smallest number of keys whose vertical exceeds gamma (strictly, so one more than reaches it),
       // B, + 1: that many key blocks; the same for slash; both at least min_budget, in blocks.
    2. p = softmax of the mean of those rows against block means of the keys, d = sqrt of the
       Jensen-Shannon divergence (natural logarithm) of p and the blocked vertical. d < tau: the
       head is query-aware, and both numbers become min_budget.
    3. Key block 0 and the own diagonal, and the heaviest blocks and block distances up to those
       numbers, for every query block.
    4. Query-aware heads besides: softmax per query block of pooled queries against pooled keys, all
       entries of the head sorted together, the prefix with sum <= gamma * (number of query blocks).

    gamma      share to cover; >= 1 keeps everything (ours: the code's sums may miss 1 by rounding)
    tau        threshold of d; 0 makes no head query-aware, above 0.8326 every one
    min_budget tokens, rounded up to blocks; the official runs have 1024 and gamma 0.95 (Llama, GLM)
               or 0.9 (Qwen2, Yi), the code's README 512, PBS-Attn's runs of it none (=1)
    Everything is kept where Nk <= max(2 B, min_budget rounded up).

    Ours, where the code asserts one-shot prompts: query blocks that are not aligned with key blocks
    (a chunk at any offset) take a block distance from both key blocks that hold their positions,
    and a probe of fewer than B rows is averaged over what there is. 0 log 0 is 0, where the code
    has NaN and so a head that is not query-aware. The code counts // 128 whatever the block size.
    """

    NAME: ClassVar[str] = "flexprefill"
    ABOUT: ClassVar[str] = "columns and diagonals of the last queries, or pooled blocks, per head"
    SOURCE: ClassVar[str] = "FlexPrefill, arXiv 2502.20766, algorithms 1 to 4; code a24b27b"
    KEEP_ALL: ClassVar[str] = "gamma=1"

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024

    def check(self):
        super().check()
        self.check_number("gamma")
        self.check_number("tau")
        self.check_int("min_budget", 1)

    def blocks(self, call):
        """bool [Hq, Tq, Tk]."""
        size = self.block_size
        causal = causal_blocks(call, size, size)
        budget = blocks_of(self.min_budget, size)
        if self.gamma >= 1 or call.k.size(1) <= max(2, budget) * size:
            return causal.expand(call.q.size(0), -1, -1)
        vertical, slash = probe(call, size)
        columns = self._count(vertical, budget)
        distances = self._count(slash, budget)
        vertical, slash = _sum_blocks(vertical, size), _sum_blocks(slash, size).flip(1)
        key_means = block_means(call.k, size)
        aware = self._query_aware(call, key_means, vertical)
        columns, distances = (x.masked_fill(aware, budget) for x in (columns, distances))
        vertical[:, 0] = slash[:, 0] = math.inf
        near = heaviest(slash, distances)  # by block distance from the own block, 0 the own
        kept = heaviest(vertical, columns)[:, None] | _diagonals(call, size, near)
        if aware.any():
            kept[aware] |= self._pooled_blocks(call, key_means, causal)[aware]
        return kept & causal

    def _count(self, share, budget):
        """int64 [H]: blocks that cover gamma of `share` [H, N], at least `budget`."""
        total = share.double().sort(dim=1, descending=True).values.cumsum(1)
        covered = (total <= self.gamma).sum(1) + 1
        return (covered // self.block_size + 1).clamp(min=budget)

    def _query_aware(self, call, key_means, vertical):
        """bool [Hq]: heads whose pooled estimate is close to the true attention of the probe."""
        mean = widen(call.q[:, -self.block_size :]).mean(1, keepdim=True)
        p = logits(mean, key_means, call.scale).squeeze(1).double().softmax(1)
        q = vertical.double()
        middle = (p + q) / 2
        divergence = sum((torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(1) for x in (p, q)) / 2
        return divergence.clamp(min=0).sqrt() < self.tau

    def _pooled_blocks(self, call, key_means, causal):
        """bool [Hq, Tq, Tk]: the prefix of all entries of a head's pooled attention together."""
        scores = logits(block_means(call.q, self.block_size), key_means, call.scale)
        share = scores.masked_fill(~causal, -math.inf).softmax(-1)
        share = share.masked_fill(~causal, 0.0).double().flatten(1)
        value, index = share.sort(dim=1, descending=True, stable=True)
        keep = value.cumsum(1) <= self.gamma * causal.any(1).sum()
        return torch.zeros_like(keep).scatter(1, index, keep).view(scores.shape)


def probe(call, block_size):
    """(vertical, slash) [Hq, Nk]: mean attention of the last block_size rows (or all) per key, and
    per distance, farthest first: slash[:, Nk - 1 - d] is for keys d before a row."""
    k = widen(call.k)
    rows = min(block_size, call.q.size(1))
    vertical, slash = (k.new_zeros(call.q.size(0), k.size(1)) for _ in range(2))
    first = call.q.size(1) - rows
    for begin, end in strips(call, block_size, k.size(1)):
        begin = max(begin, first)
        if begin >= end:
            continue
        position = torch.arange(begin, end, device=k.device) + call.q_offset
        hidden = torch.arange(k.size(1), device=k.device) > position[:, None]
        a = logits(widen(call.q[:, begin:end]), k, call.scale).masked_fill_(hidden, -math.inf)
        a = a.softmax(-1).masked_fill_(hidden, 0.0)
        vertical += a.sum(1)
        # Row i of the call moves right by Nq - 1 - i, which puts equal distances into one column.
        slash += _skew(a.flip(1), call.q.size(1) - end)[:, :, : k.size(1)].sum(1)
    return vertical / rows, slash / rows


def _skew(x, shift):
    """[H, R, N] with row r moved right by r + shift."""
    rows = x.size(1)
    x = torch.nn.functional.pad(x, (shift, rows)).flatten(1)[:, :-rows]
    return x.view(x.size(0), rows, -1)


def _sum_blocks(x, size):
    return torch.nn.functional.pad(x, (0, -x.size(1) % size)).unflatten(1, (-1, size)).sum(2)


def _diagonals(call, size, near):
    """bool [H, Tq, Tk]: key blocks whose distance from a block of the row's position is in near."""
    n = torch.arange(near.size(1), device=near.device)
    kept = own_blocks(call, size, size).expand(near.size(0), -1, -1).clone()
    for position in row_blocks(call, size):
        distance = position.clamp(min=0)[:, None] // size - n
        kept |= near[:, distance.clamp(min=0)] & (distance >= 0)
    return kept
