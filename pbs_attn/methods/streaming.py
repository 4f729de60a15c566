# SPDX-License-Identifier: Apache-2.0
"""`streaming`: the first tokens and a window of recent ones, the same for every head and input."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import causal_blocks
from .blockmath import SquareBlocks, row_blocks


@dataclass(frozen=True, kw_only=True)
class Streaming(SquareBlocks):
    """StreamingLLM's pattern (Xiao et al., arXiv 2309.17453) as prefill, on whole blocks.

    A row at position p asks for the keys j < sink and p - window < j <= p. Computed are all key
    blocks of which any row of the query block asks for a key: a superset of those tokens, by up to
    two blocks per row. The paper keeps 4 sink tokens; FlexPrefill's runs of it 1024 and a window of
    8192. Here the default is one block of sink and 1024 tokens.

    sink       first tokens, >= 0
    window     recent tokens with the row's own, >= 1
    block_size 64, 128, 256
    Everything is kept where window >= number of keys.
    """

    NAME: ClassVar[str] = "streaming"
    ABOUT: ClassVar[str] = "sink and sliding window, rounded up to blocks; looks at no input"
    SOURCE: ClassVar[str] = "StreamingLLM, arXiv 2309.17453, section 3; block superset"
    KEEP_ALL: ClassVar[str] = "window=2147483647"

    sink: int = 128
    window: int = 1024

    def check(self):
        super().check()
        self.check_int("sink", 0)
        self.check_int("window", 1)

    def blocks(self, call):
        """bool [Hk, Tq, Tk], equal for all heads."""
        first, _ = row_blocks(call, self.block_size)
        causal = causal_blocks(call, self.block_size, self.block_size)
        start = torch.arange(causal.size(1), device=causal.device) * self.block_size
        recent = start + self.block_size - 1 > first[:, None] - self.window
        return (causal & (recent | (start < self.sink))).expand(call.k.size(0), -1, -1)
