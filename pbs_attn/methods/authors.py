# SPDX-License-Identifier: Apache-2.0
"""`recipe=authors` of meanpool and xattention: the baselines as their authors ran them.

The default recipes are those of docs/algorithm.md, by our kernels; the differences are its
deviations D2 and D5.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import causal_blocks, own_blocks, widen
from .blockmath import SquareBlocks, block_means, fill_to, logits, row_blocks, strips


@dataclass(frozen=True, kw_only=True)
class MeanPool(SquareBlocks):
    """Pooled queries against pooled keys (xinghaow99/pbs-attn 8ce8e02, baselines/MeanPooling.py).

    A short last block of queries or keys is filled up with zeros and divided by block_size all the
    same. softmax over the causal blocks, the smallest prefix by falling mass with sum >= tau, then
    block 0 and the own block. Scores are fp32 (their bf16 inputs give bf16 scores, which creates
    ties; fed fp32 the two agree).

    tau >= 1 keeps everything (ours: their rule then depends on rounding, and keeps nothing in a row
    whose sum stays below 1). Ours too: chunks at any offset, which they refuse.
    """

    NAME: ClassVar[str] = "meanpool"
    ABOUT: ClassVar[str] = "mean-pooled selection in natural order, as PBS-Attn's authors ran it"
    SOURCE: ClassVar[str] = "PBS-Attn code 8ce8e02, baselines/MeanPooling.py"
    RECIPE: ClassVar[str] = "authors"
    KEEP_ALL: ClassVar[str] = "tau=1"

    tau: float = 0.9

    def check(self):
        super().check()
        self.check_number("tau")

    def blocks(self, call):
        """bool [Hq, Tq, Tk]."""
        size = self.block_size
        causal = causal_blocks(call, size, size)
        forced = own_blocks(call, size, size)
        forced[:, :1] |= causal[:, :1]
        q, k = (_zero_filled_means(x, size) for x in (call.q, call.k))
        mass = logits(q, k, call.scale).masked_fill(~causal, -math.inf).softmax(-1)
        mass = mass.masked_fill(~causal, 0.0)
        return fill_to(mass, torch.zeros_like(causal), causal, self.tau) | forced


@dataclass(frozen=True, kw_only=True)
class XAttention(SquareBlocks):
    """Antidiagonal sums (mit-han-lab/x-attention e379887, find_blocks_chunked; the same code is
    PBS-Attn's baseline).

    Groups of `stride` rows and of `stride` keys, missing ones zero, score
    sum_i q[a S + S-1-i] . k[b S + i] scale / S; softmax over the groups b <= a; the mass of a block
    is the sum over its groups. Block 0 and the own block come first and count; others follow by
    falling mass until tau of the row's mass is kept.

    That is the code from the second of its chunks of rows on. In the first chunk (all rows up to
    16,384 keys, 8,192 rows at 32K, 2,048 from 128K on) it overwrites the mark on block 0: the own
    block alone comes first, block 0 competes with the others and is added at the end, and as
    one mark is missing the sum is looked at one block too late. Rows there keep up to one block
    more. The published numbers were made that way, so it is done here.

    tau    threshold; >= 1 keeps everything (ours: theirs stops where rounding reaches the sum)
    stride divides block_size; PBS-Attn ran 8
    Ours: chunks of a prompt at any offset, without that first chunk (a key group is seen where its
    first key is seen by the row group's last row, which is b <= a where they are aligned).
    """

    NAME: ClassVar[str] = "xattention"
    ABOUT: ClassVar[str] = "antidiagonal selection in natural order, as its authors ran it"
    SOURCE: ClassVar[str] = "XAttention, arXiv 2503.16428; code e379887, PBS-Attn code 8ce8e02"
    RECIPE: ClassVar[str] = "authors"
    KEEP_ALL: ClassVar[str] = "tau=1"

    tau: float = 0.9
    stride: int = 8

    def check(self):
        super().check()
        self.check_number("tau")
        self.check_int("stride", 1)
        if self.block_size % self.stride:
            self.fail("stride", f"a divisor of block_size ({self.block_size})")

    def blocks(self, call):
        """bool [Hq, Tq, Tk]."""
        size = self.block_size
        causal = causal_blocks(call, size, size)
        own = own_blocks(call, size, size)
        forced = own.clone()
        forced[:, :1] |= causal[:, :1]
        first = row_blocks(call, size)[0][:, None]
        late = (first < _first_chunk(call.k.size(1))) & (call.q_offset == 0)
        mass = antidiagonal_mass(call, size, self.stride)
        return fill_to(mass, torch.where(late, own, forced), causal, self.tau, late) | forced


def _first_chunk(seqlen_k):
    """Rows of the first chunk in which the authors' code estimates."""
    power = 1 << (seqlen_k - 1).bit_length()
    return max(2048, min(power, 2**28 // power))


def antidiagonal_mass(call, block_size, stride):
    """[Hq, Tq, Tk]: XAttention's block masses; a row sums to its number of row groups that see a
    key. fp32, fp64 for fp64 inputs."""
    per_block = block_size // stride
    keys = _groups(widen(call.k), stride)
    first_key = torch.arange(keys.size(1), device=keys.device) * stride
    num_q = row_blocks(call, block_size)[0].numel()
    num_k = -(-call.k.size(1) // block_size)
    mass = keys.new_zeros(call.q.size(0), num_q, num_k)
    for begin, end in strips(call, block_size, -(-keys.size(1) // stride), whole_blocks=True):
        rows = _groups(widen(call.q[:, begin:end]), stride, reverse=True)
        first_row = torch.arange(rows.size(1), device=keys.device) * stride + begin
        hidden = first_key > (first_row + stride - 1 + call.q_offset)[:, None]
        z = logits(rows, keys, call.scale / stride).masked_fill_(hidden, -math.inf)
        p = z.softmax(-1).masked_fill_(hidden, 0.0)
        p = torch.nn.functional.pad(p, (0, -p.size(2) % per_block, 0, -p.size(1) % per_block))
        p = p.unflatten(2, (-1, per_block)).sum(3).unflatten(1, (-1, per_block)).sum(2)
        mass[:, begin // block_size : -(-end // block_size)] = p
    return mass


def _groups(x, stride, reverse=False):
    """[H, N, D] -> [H, ceil(N / stride), stride D]: `stride` rows side by side, missing ones 0."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.size(1) % stride)).unflatten(1, (-1, stride))
    return (x.flip(2) if reverse else x).flatten(2)


def _zero_filled_means(x, size):
    """Block means with a short last block divided by the whole size."""
    means, tail = block_means(x, size), x.size(1) % size
    if tail:
        means[:, -1] *= tail / size
    return means
