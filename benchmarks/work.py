# SPDX-License-Identifier: Apache-2.0
"""One shape with all that the verbs hand to each other: made once, timed by the rows."""

from __future__ import annotations

import pbs_attn
from benchmarks import inputs
from pbs_attn import PBSConfig, ops
from pbs_attn import geometry as geo


class Work:
    """q, k, v (1, H, N, D) and, of the configuration, score, order, packed K/V and selection."""

    def __init__(self, shape: inputs.Shape, args):
        self.config = PBSConfig(
            block_size=args.block_size, segment_size=args.segment_size, tau=args.tau
        )
        if args.capture:
            from benchmarks.capture import capture

            self.q, self.k, self.v = capture(args.capture, shape.length, shape.dtype)
            shape = inputs.Shape(
                self.q.shape[2], self.q.shape[1], self.k.shape[1], self.q.shape[3], shape.dtype
            )
        else:
            self.q, self.k, self.v = inputs.structured(shape)
        self.shape = shape
        self.isa = pbs_attn.build_info()["isa"][str(shape.dtype).removeprefix("torch.")]
        self.sizes = {
            "block_size": self.config.block_size,
            "segment_size": self.config.segment_size,
        }
        self.s = self.score()
        self.k_perm, _, self.k_pool, _, self.packed = self.permute()
        self.bits, self.count, _ = self.select()
        blocks = self._blocks("segment")
        selected, computed, causal = geo.selected_blocks(self.count, blocks)
        self.causal = int(causal.sum()) * shape.heads
        self.computed, self.density = int(computed.sum()), int(selected.sum()) / self.causal

    def _blocks(self, own: str):
        n, size = self.shape.length, self.config.block_size
        seqs = geo.sequences(geo.Geometry(), 1, n, n, self.q.device)
        return geo.blocks(seqs, -(-n // size), size, size, self.config.segment_size, own)

    def score(self):
        return ops.score(self.q, self.k, **self.sizes)

    def permute(self):
        return ops.permute(self.q, self.k, self.v, self.s, **self.sizes)

    def select(self):
        return ops.select(
            self.q, self.k, self.k_pool, k_perm=self.k_perm, tau=self.config.tau, **self.sizes
        )

    def attend(self):
        size, segment = self.config.block_size, self.config.segment_size
        return ops.attend(
            self.q,
            self.k,
            self.v,
            self.bits,
            packed=self.packed,
            block_q=size,
            block_k=size,
            segment_size=segment,
        )

    def attend_bits(self, bits):
        """Given history bits on natural order: K/V are packed inside the call."""
        size, segment = self.config.block_size, self.config.segment_size
        return ops.attend(
            self.q, self.k, self.v, bits, block_q=size, block_k=size, segment_size=segment
        )

    def dense(self):
        size = self.config.block_size
        return ops.attend(self.q, self.k, self.v, own="all", block_q=size, block_k=size)

    def prefill(self):
        return ops.prefill(self.q, self.k, self.v, self.config)

    def forced(self, share: float):
        """(bits, blocks computed, density) of random history blocks at a density."""
        from pbs_attn.selection import mask_to_bits

        size, segment = self.config.block_size, self.config.segment_size
        keep = inputs.mask_of_density(self.shape, share, size, segment)
        count = keep.sum(-1)
        selected, computed, _ = geo.selected_blocks(count, self._blocks("segment"))
        return mask_to_bits(keep), int(computed.sum()), int(selected.sum()) / self.causal
