# SPDX-License-Identifier: Apache-2.0
"""Plan: what a call selected, for people who want to see or reuse it."""

from typing import NamedTuple

import torch

from . import geometry as geo
from .config import PBSConfig
from .selection import (
    PERMUTES_QUERIES,
    BlockCSR,
    bits_to_mask,
    mask_to_bits,
    mask_to_csr,
    own_of,
)


class Plan(NamedTuple):
    """The selection of one call; B sequences, Hq query heads, Tq x Tk blocks.

    bits hold history only: a query block also reads its own span, whose blocks `mask` adds.
    """

    bits: torch.Tensor  # int32 [B, Hq, Tq, W]: bit n % 32 of word n / 32 is key block n
    count: torch.Tensor  # int32 [B, Hq, Tq]: bits set
    k_perm: torch.Tensor  # int32 [B, Hp, Nk]: permuted -> original key, relative to kv_start
    sequences: geo.Sequences  # where each sequence lies
    num_k_blocks: int  # Tk
    config: PBSConfig

    @property
    def _permutes_queries(self):
        return self.config.permute in PERMUTES_QUERIES

    def _blocks(self):
        return geo.blocks(
            self.sequences,
            self.count.shape[2],
            self.config.block_size,
            self.config.block_size,
            self.config.segment_size,
            own_of(self.config.permute),
            self._permutes_queries,
        )

    def density(self):
        """fp64 [B, Hq]: selected causal blocks, own span included, over causal blocks."""
        return geo.density(self.count, self._blocks())

    def computed(self):
        """fp64 [B, Hq]: the same for the blocks that the kernels ran."""
        counts = self._blocks()
        return geo.density(self.count, counts._replace(own=counts.own_computed))

    def causal(self):
        """int64 [B]: causal blocks, the 100% of the densities."""
        return self._blocks().causal.sum(-1)

    def mask(self, own=True):
        """bool [B, Hq, Tq, Tk]: key blocks that each query block reads, by permuted place."""
        mask = bits_to_mask(self.bits, self.num_k_blocks)
        return mask | self._blocks().own_mask(self.num_k_blocks)[:, None] if own else mask

    def csr(self, own=True) -> BlockCSR:
        """The same as block lists."""
        return mask_to_csr(self.mask(own))


def dense_plan(seqs, num_heads, num_perms, max_q, max_k, config):
    """The plan of a call that took the dense route: natural order, every block of history."""
    tq, tk = geo.ceil_div(max_q, config.block_size), geo.ceil_div(max_k, config.block_size)
    device, num = seqs.q_len.device, seqs.q_len.shape[0]
    counts = geo.blocks(
        seqs,
        tq,
        config.block_size,
        config.block_size,
        config.segment_size,
        own_of(config.permute),
        config.permute in PERMUTES_QUERIES,
    )
    exists = torch.arange(tq, device=device) * config.block_size < seqs.q_len[:, None]
    end = torch.where(exists, counts.own_start // config.block_size, 0)
    history = torch.arange(tk, device=device) < end[..., None]
    bits = mask_to_bits(history)[:, None].expand(-1, num_heads, -1, -1).contiguous()
    count = history.sum(-1).to(torch.int32)[:, None].expand(-1, num_heads, -1).contiguous()
    identity = torch.arange(max_k, device=device, dtype=torch.int32)
    k_perm = identity.expand(num, num_perms, max_k).contiguous()
    return Plan(bits, count, k_perm, seqs, tk, config)
