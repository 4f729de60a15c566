# SPDX-License-Identifier: Apache-2.0
"""One shape with all that the verbs hand to each other: made once, timed by the rows."""

from __future__ import annotations

import dataclasses
import os

import torch

from benchmarks import inputs, options
from pbs_attn import PBSConfig, _load, devices, ops
from pbs_attn import geometry as geo
from pbs_attn.selection import PERMUTES_QUERIES, mask_to_bits, own_of


class Work:
    """q, k, v (1, H, N, D) and, of the configuration, score, order, packed K/V and selection.

    seqlen_q: a chunk, the last rows of the prompt; None = the whole prompt."""

    def __init__(self, shape: inputs.Shape, args, device, seqlen_q: int | None = None):
        self.args, self.device, self.failures = args, device, {}
        self.config = config_of(args)
        if args.capture:
            from benchmarks.capture import capture

            longest = max(map(options.length, args.lengths.split(",")))
            q, k, v = capture(args.capture, shape.length, shape.dtype, device.torch_device, longest)
            n, heads, heads_k = q.shape[2], q.shape[1], k.shape[1]
            shape = inputs.Shape(n, heads, heads_k, q.shape[3], shape.dtype)
        else:
            q, k, v = inputs.make(args.inputs, shape, device.torch_device)
        self.shape = dataclasses.replace(shape, length=k.shape[2])
        self.seqlen_q = seqlen_q or shape.length
        self.q, self.k, self.v = q[:, :, shape.length - self.seqlen_q :].contiguous(), k, v
        del q
        self.isa = self._isa()
        self.sizes = {
            "block_size": self.config.block_size,
            "segment_size": self.config.segment_size,
        }
        self.s = self.score() if self.config.permute == "keys" else None
        self.k_perm, _, self.k_pool, _, self.packed = self.permute()
        self.bits, self.count, _ = self.select()
        blocks = self.blocks()
        selected, computed, causal = geo.selected_blocks(self.count, blocks)
        self.causal = int(causal.sum()) * shape.heads
        self.computed, self.density = int(computed.sum()), int(selected.sum()) / self.causal
        # one per query block and head: half of what a diagonal block computes is masked
        self.diagonal = self.count.numel()

    @property
    def own(self) -> str:
        return own_of(self.config.permute)

    def _isa(self) -> str:
        """Which kernels a call takes. On a GPU: attend's; all else is the same on every one."""
        ask = getattr(_load.of(self.q.device), "isa", None)
        if ask:
            return ask(str(self.shape.dtype).removeprefix("torch."))
        hopper = devices.capability(self.q.device) == (9, 0)
        return "sm90" if hopper and os.environ.get("PBS_ATTN_ISA") != "sm80" else "sm80"

    def blocks(self, own: str | None = None):
        own = own or self.own
        n, size = self.seqlen_q, self.config.block_size
        seqs = geo.sequences(geo.Geometry(), 1, n, self.shape.length, self.q.device)
        return geo.blocks(seqs, -(-n // size), size, size, self.config.segment_size, own)

    def score(self):
        return ops.score(self.q, self.k, **self.sizes)

    def permute(self):
        mode, correction = self.config.permute, self.config.correction
        return ops.permute(
            self.q, self.k, self.v, self.s, mode=mode, correction=correction, **self.sizes
        )

    def select(self, stride: int | None = None, rule: str | None = None, tau: float | None = None):
        c = self.config
        return ops.select(
            self.q,
            self.k,
            self.k_pool,
            k_perm=self.k_perm if c.permute == "keys" else None,
            mode=c.permute,
            method=c.select,
            stride=stride or c.stride,
            reduce=c.reduce,
            rule=rule or c.rule,
            normalize=c.normalize,
            tau=c.tau if tau is None else tau,
            **self.sizes,
        )

    def attend(self, bits=None, correction: str | None = None, isa: str = "auto"):
        """Over the blocks chosen, or over `bits`, with the method's correction or another."""
        size, segment = self.config.block_size, self.config.segment_size
        return ops.attend(
            self.q,
            self.k,
            self.v,
            self.bits if bits is None else bits,
            packed=self.packed,
            block_q=size,
            block_k=size,
            segment_size=segment,
            own=self.own,
            correction=correction or self.config.correction,
            isa=isa,
        )

    def attend_bits(self, bits):
        """Given history bits on natural order: K/V are packed inside the call."""
        size, segment = self.config.block_size, self.config.segment_size
        return ops.attend(
            self.q,
            self.k,
            self.v,
            bits,
            block_q=size,
            block_k=size,
            segment_size=segment,
            own=self.own,
        )

    def dense(self, isa: str = "auto"):
        size = self.config.block_size
        return ops.attend(self.q, self.k, self.v, own="all", block_q=size, block_k=size, isa=isa)

    def prefill(self):
        return ops.prefill(self.q, self.k, self.v, self.config)

    def forced(self, share: float):
        """(bits, blocks computed, density) of random history blocks at a density."""
        size, segment = self.config.block_size, self.config.segment_size
        step = segment if self.own == "segment" else size
        keep = inputs.mask_of_density(self.shape, share, size, step, self.device.torch_device)
        count = keep.sum(-1)
        selected, computed, _ = geo.selected_blocks(count, self.blocks())
        # head by head: the conversion takes 8 bytes a block
        bits = torch.cat([mask_to_bits(head) for head in keep.split(1, 1)], 1)
        return bits, int(computed.sum()), int(selected.sum()) / self.causal

    # Bytes that a verb cannot avoid: every input read once, every output written once. What it
    # reads again comes on top, so GB/s made of these is a lower bound of the traffic.
    def score_bytes(self) -> int:
        block = self.q[:, :, -self.config.block_size :]
        return nbytes(block, self.k, self.s)

    def permute_bytes(self) -> int:
        return nbytes(self.k, self.v, self.s, self.packed, self.k_perm, self.k_pool)

    def select_bytes(self) -> int:
        return nbytes(self.q, self.k_pool, self.bits, self.count)

    def copy_bytes(self) -> int:
        return 2 * nbytes(self.k, self.v)


def config_of(args) -> PBSConfig:
    """Of --method, with the sizes of the command line; PBSConfig refuses what does not go."""
    sizes = {"block_size": args.block_size, "segment_size": args.segment_size}
    try:
        config = PBSConfig.from_method(args.method).replace(**sizes)
        config = config if args.tau is None else config.replace(tau=args.tau)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--method {args.method}: {error}") from error
    if config.permute in PERMUTES_QUERIES:
        raise SystemExit(f"--method {args.method}: queries in their order are needed")
    return config


def nbytes(*tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
