# SPDX-License-Identifier: Apache-2.0
"""`flashprefill`: every query against block means of the keys, and a threshold relative to the
maximum, so that nothing is sorted or summed up."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import causal_blocks, widen
from .blockmath import (
    SquareBlocks,
    block_means,
    blocks_of,
    by_block,
    logits,
    row_blocks,
    strips,
)


@dataclass(frozen=True, kw_only=True)
class FlashPrefill(SquareBlocks):
    """FlashPrefill V2 (arXiv 2608.19758, code 0f8e791), its selection and mean correction.

    For query block I and the key blocks J that lie wholly before or at its last row,

        E_IJ = sum over rows i of exp(scale q_i . mean(K_J) - M_I),  M_I the largest of those logits

    (the code leaves out rows before J's first key; with blocks of one size there are none). Kept
    are J with E_IJ >= alpha max_J' E_IJ', the first `sink` tokens, the last `window` tokens up to
    I's first row and all of I's own blocks, and everything for the query blocks that hold the last
    `last` tokens of the call. Sizes in tokens are rounded up to blocks. Sink and window blocks take
    part in the maximum, and the own block is scored with keys that its earlier rows do not see:
    both as in the authors' code.

    alpha      relative threshold, >= 0; 0 keeps everything. V2's paper: 0.1 for all models (the
               class in its code defaults to 1.0, its examples pass 0.1). V1 (arXiv 2603.06199, code
               74e42f3): 0.18 Llama, 0.08 Qwen2, 0.12 Qwen3-MoE, on blocks that a row sees whole.
    gqa        per_head: as V1. group: query heads of a key head share E and M and so a selection,
               as V2, which packs (position, head of the group) into tiles of 128 rows, 32
               positions at 4 heads a group; here a tile is block_size positions of every head.
    sink, window, last
               tokens; V2's example has 2 and 4 blocks and 8 packed tiles, which are 256 positions
               at 4 heads a group
    correction none, or mean as in V2: a block that is not selected and that a whole tile sees is
               one token of its mean key and value, its logit raised by ln(block_size). Here a tile
               is a query block, and means are rounded to the dtype of k.
    """

    NAME: ClassVar[str] = "flashprefill"
    ABOUT: ClassVar[str] = "queries against block means of keys, threshold relative to the maximum"
    SOURCE: ClassVar[str] = "FlashPrefill V2, arXiv 2608.19758, 3.2 and 3.4; code 0f8e791"
    KEEP_ALL: ClassVar[str] = "alpha=0"

    alpha: float = 0.1
    sink: int = 256
    window: int = 512
    last: int = 256
    gqa: str = "per_head"

    def check(self):
        super().check()
        self.check_number("alpha")
        self.check_int("sink", 0)
        self.check_int("window", 1)
        self.check_int("last", 0)
        self.check_choice("gqa", ("per_head", "group"))

    def blocks(self, call):
        """bool [Hq, Tq, Tk], or [Hk, Tq, Tk] with gqa=group."""
        causal = causal_blocks(call, self.block_size, self.block_size)
        energy, scored = self._energy(call)
        relative = scored & (energy >= self.alpha * energy.amax(-1, keepdim=True))
        return causal & (relative | self._forced(call, causal))

    def _forced(self, call, causal):
        """bool [Tq, Tk]: sink, window and the last query blocks."""
        size, (num_q, num_k) = self.block_size, causal.shape
        n = torch.arange(num_k, device=causal.device)
        first = row_blocks(call, size)[0].clamp(min=0)[:, None] // size
        last = torch.arange(num_q, device=causal.device) >= num_q - blocks_of(self.last, size)
        local = n > first - blocks_of(self.window, size)
        return local | (n < blocks_of(self.sink, size)) | last[:, None]

    def _energy(self, call):
        """(E [H, Tq, Tk], 0 where nothing is scored; bool [Tq, Tk] which blocks are)."""
        size = self.block_size
        q, means = widen(call.q), block_means(call.k, size)
        heads = q.size(0) if self.gqa == "per_head" else means.size(0)
        start = torch.arange(means.size(1), device=q.device) * size
        scored = start + size <= row_blocks(call, size)[1][:, None] + 1
        energy = q.new_zeros(heads, *scored.shape)
        for begin, end in strips(call, size, means.size(1), whole_blocks=True):
            blocks = slice(begin // size, -(-end // size))
            row = torch.arange(begin, blocks.stop * size, device=q.device).view(-1, size, 1)
            seen = (row < end) & scored[blocks, None]  # [blocks, B, Tk]
            logit = by_block(logits(q[:, begin:end], means, call.scale), size)
            logit = logit.masked_fill_(~seen, -math.inf).unflatten(0, (heads, -1))
            top = logit.amax((1, 3, 4), keepdim=True)  # of a head (or group) and query block
            top = top.masked_fill_(top == -math.inf, 0.0)
            energy[:, blocks] = (logit - top).exp_().sum((1, 3))
        return energy, scored
