# SPDX-License-Identifier: Apache-2.0
"""Methods so simple that what they give is known: all blocks, drawn blocks, all tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pbs_attn.methods import base


@dataclass(frozen=True, kw_only=True)
class Everything(base.BlockMethod):
    """All blocks, those above the diagonal included: the core has to drop them."""

    NAME: ClassVar[str] = "everything"
    per_key_head: bool = False

    def blocks(self, call):
        causal = base.causal_blocks(call, self.block_q, self.block_k)
        heads = call.k if self.per_key_head else call.q
        return torch.ones_like(causal).expand(heads.shape[0], -1, -1)


@dataclass(frozen=True, kw_only=True)
class Some(base.BlockMethod):
    """A mask that differs by head, drawn anew for each shape."""

    NAME: ClassVar[str] = "some"
    rows: int = 128
    keys: int = 128
    block_q = property(lambda self: self.rows)
    block_k = property(lambda self: self.keys)

    def blocks(self, call):
        causal = base.causal_blocks(call, self.rows, self.keys)
        generator = torch.Generator().manual_seed(causal.numel())
        return torch.rand(call.q.shape[0], *causal.shape, generator=generator) < 0.5


@dataclass(frozen=True, kw_only=True)
class Softmax(base.TokenMethod):
    """All keys, one token after another; the layer that it sees is kept."""

    NAME: ClassVar[str] = "softmax"
    layers: ClassVar[list] = []

    def attention(self, call):
        self.layers.append(call.layer)
        row = torch.arange(call.q.shape[1])[:, None] + call.q_offset
        visible = torch.arange(call.k.shape[1]) <= row
        k, v = (base.expand(base.widen(x), call.q.shape[0]) for x in (call.k, call.v))
        logits = call.scale * (base.widen(call.q) @ k.transpose(1, 2))
        p = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
        cells = visible.expand(call.q.shape[0], -1, -1)
        return (p @ v).to(call.q.dtype), base.cell_pairs(call, cells, 0)


def sparse(cls, **values):
    return cls(min_q=0, min_kv=0, strict=True, **values)
