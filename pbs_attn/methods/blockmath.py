# SPDX-License-Identifier: Apache-2.0
"""What several block selections share: strips of rows, block means, scores, filling up to a mass.

Everything is vectorised over heads and walks query rows in strips, so nothing of size N x N is ever
held: the largest thing is one strip of scores (at most STRIP_CELLS of them, or one query block
against all block means). Keys are never copied per query head: the query heads of a group are
stacked on their key head. Scores are fp32, fp64 for fp64 inputs; sums that are compared with a
threshold are fp64.
"""

import math
from dataclasses import dataclass

import torch

from .base import BLOCK_SIZES, BlockMethod

STRIP_CELLS = 2**24  # scores held at a time, all heads together: 64 MB in fp32


@dataclass(frozen=True, kw_only=True)
class SquareBlocks(BlockMethod):
    """A block method whose query and key blocks are of one size, 64, 128 or 256."""

    block_size: int = 128

    @property
    def block_q(self):
        return self.block_size

    @property
    def block_k(self):
        return self.block_size

    def check(self):
        super().check()
        self.check_choice("block_size", BLOCK_SIZES)


def blocks_of(tokens, block_size):
    """Whole blocks that hold `tokens` tokens: a size given in tokens is rounded up."""
    return -(-tokens // block_size)


def row_blocks(call, block_size):
    """int64 [Tq] (first, last): positions of the first and the last row of every query block.

    Negative where a row stands before the first key; rows past the end of the call do not count.
    """
    first = torch.arange(0, call.q.size(1), block_size, device=call.q.device)
    last = (first + block_size - 1).clamp(max=call.q.size(1) - 1)
    return call.q_offset + first, call.q_offset + last


def block_means(x, block_size):
    """Means of blocks of rows, [H, N, D] -> [H, ceil(N / B), D]; fp32, or fp64 for fp64 input.

    A short last block is divided by its own number of rows.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    whole = x.size(1) // block_size * block_size
    means = x[:, :whole].unflatten(1, (-1, block_size)).mean(2, dtype=wide)
    if whole == x.size(1):
        return means
    return torch.cat([means, x[:, whole:].mean(1, keepdim=True, dtype=wide)], 1)


def logits(q, k, scale):
    """scale q . k for wide q [Hq, R, D] and wide k [Hk, N, D]: [Hq, R, N], keys not repeated."""
    stacked = q.unflatten(0, (k.size(0), -1)).flatten(1, 2) * scale
    return (stacked @ k.transpose(1, 2)).view(q.size(0), q.size(1), k.size(1))


def strips(call, block_size, columns, whole_blocks=False):
    """(begin, end) of strips of query rows for scores of `columns` columns per row and head.

    A strip is a power of two times block_size rows, or, unless whole_blocks, divides it.
    """
    rows = STRIP_CELLS // max(call.q.size(0) * columns, 1)
    rows = 2 ** int(math.log2(rows)) if rows else 1
    rows = max(rows, block_size) if whole_blocks else rows
    for begin in range(0, call.q.size(1), rows):
        yield begin, min(begin + rows, call.q.size(1))


def by_block(x, block_size):
    """[H, R, n] rows of one strip -> [H, blocks, B, n], the last block filled up with zeros."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.size(1) % block_size))
    return x.unflatten(1, (-1, block_size))


def fill_to(mass, forced, eligible, share, late=None):
    """Forced blocks, then eligible ones by falling mass until `share` of the row's mass is kept.

    mass [..., n] of any float dtype, forced and eligible bool broadcast to it. The set is the
    smallest one that holds every forced block and reaches share * (mass of all eligible and forced
    blocks); equal masses go by block index; share >= 1 keeps every eligible block, whatever the
    rounding of the sum says. late (bool [..., 1]): rows in which the sum is looked at one block too
    late, so that up to one block more is kept. Returns bool [..., n].
    """
    forced, eligible = forced.expand(mass.shape), eligible.expand(mass.shape)
    if share >= 1:
        return forced | eligible
    mass = mass.double().masked_fill(~(forced | eligible), 0.0)
    have = (mass * forced).sum(-1, keepdim=True)
    rest = mass.masked_fill(forced | ~eligible, -1.0)
    value, index = rest.sort(dim=-1, descending=True, stable=True)
    value = value.clamp(min=0.0)
    before = have + value.cumsum(-1) - value
    if late is not None:
        earlier = torch.nn.functional.pad(before[..., :-1], (1, 0))
        before = torch.where(late, earlier, before)
    keep = before < share * mass.sum(-1, keepdim=True)
    chosen = torch.zeros_like(forced).scatter(-1, index, keep)
    return (chosen & eligible) | forced


def heaviest(mass, count):
    """bool like mass [..., n]: the count[...] (int64) largest of each row; ties by index."""
    index = mass.sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(mass.size(-1), device=mass.device)
    keep = (place < count[..., None]).expand(mass.shape)
    return torch.zeros(mass.shape, dtype=torch.bool, device=mass.device).scatter(-1, index, keep)
