# SPDX-License-Identifier: Apache-2.0
"""How large a test is on an instruction set: half as large where vector units are emulated."""

import cases
import torch
from harness import config_of
from numerics import pack
from test_attend import random_blocks

from pbs_attn import ops

PREFILL = {"return_lse": True, "return_plan": True}


class Cut:
    """Two blocks a segment, of 128 tokens, or of 64 where vector units are emulated and take their
    time: as many blocks, segments and ragged ends. Whole sizes on those: test_prefill.py."""

    def __init__(self, isa):
        self.isa, self.block = isa, 64 if isa.startswith("emu") else 128
        self.sizes = {"block_size": self.block, "segment_size": 2 * self.block}
        self.attend_sizes = {"block_q": self.block, "block_k": self.block,
                             "segment_size": 2 * self.block}  # fmt: skip
        self.cases = cases.geometries(self.block, 2 * self.block)

    def tokens(self, n):
        """As far into a block as n is in one of 128."""
        return n * self.block // 128

    def case(self, name):
        return next(case for case in self.cases if case.name == name)

    def config(self, **changes):
        return config_of(**self.sizes, **changes)

    def peak(self, **changes):
        return self.config(**(cases.PEAK | changes))

    def random_blocks(self, seqlen_q, seqlen_k, density):
        return random_blocks(2, seqlen_q, seqlen_k, self.block, self.block, density)

    def attend(self, inputs, blocks, own="segment", correction="mean", **options):
        num = options["geometry"].num_sequences(len(inputs[0])) if "geometry" in options else 1
        bits = pack(blocks)[None].expand(num, -1, -1, -1).contiguous()
        options |= {"own": own, "correction": correction, "return_lse": True}
        return ops.attend(*inputs, bits, isa=self.isa, **self.attend_sizes, **options)

    def prefill(self, inputs, config, **options):
        return ops.prefill(*inputs, config, isa=self.isa, **PREFILL, **options)

    def equal_keys(self, k):
        """Each block's keys become its first, with so few digits that their sum is exact."""
        place = torch.arange(k.shape[2]) // self.block * self.block
        return k[:, :, place].bfloat16().to(k.dtype)
