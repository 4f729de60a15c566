# SPDX-License-Identifier: Apache-2.0
"""The verbs on one sequence, by the reference or by the compiled ops: one interface to test both.

q [Hq, Nq, D], k and v [Hk, Nk, D]; blocks are bool [Hq, Tq, Tk]; permutations int64.
"""

import numerics
import torch

import pbs_attn
from pbs_attn import reference

ENUMS = {  # the numbers of csrc/include/pbs/pbs.h
    "gqa": ("per_head", "group"),
    "permute": ("none", "identity", "keys", "queries", "both"),
    "order": ("last_block", "mean_query", "random_query", "random"),
    "method": ("mean_pool", "antidiagonal"),
    "reduce": ("sum", "max"),
    "rule": ("prefix", "relative", "absolute", "budget"),
    "own": ("segment", "block", "mask", "none", "all"),
    "normalize": ("history", "row"),
    "correction": ("none", "mean"),
}
ISAS = {
    "c": 1, "avx2": 2, "avx512": 3, "avx512bf16": 4, "amx": 9,
    "emu_avx2": 5, "emu_avx512": 6, "emu_avx512bf16": 7, "emu_amx": 10,
}  # fmt: skip
WHOLE = (None, None, None, None, 0, 0)  # no geometry


def available_isas():
    """Every instruction set that is compiled in and that this CPU can run."""
    able = pbs_attn._C.cpu_capabilities()
    assert set(able) == set(ISAS), f"{sorted(able)} are not {sorted(ISAS)}"
    return [name for name in ISAS if able[name]]


def number(kind, name):
    return ENUMS[kind].index(name)


class Reference:
    """At the dtype of the inputs: pass fp64 for the truth."""

    def score(self, q, k, *, gqa="per_head", order="last_block", seed=0, block=128, segment=256):
        return reference.score(
            q, k, gqa=gqa, order=order, seed=seed, block_size=block, segment_size=segment
        )

    def permute(self, q, k, s, *, gqa="per_head", permute="keys", block=128, segment=256):
        """(k_perm, q_perm, k_pool)"""
        k_perm, q_perm = reference.permute(
            q, k, s, permute=permute, gqa=gqa, block_size=block, segment_size=segment
        )
        shared = k.repeat_interleave(k_perm.size(0) // k.size(0), 0)
        return k_perm, q_perm, reference.pool(shared, block, k_perm)

    def select(self, q, k, *, gqa="per_head", block=128, segment=256, **options):
        """(bits, mass)"""
        found = reference.select(q, k, block_size=block, segment_size=segment, **options)
        return found.bits, found.mass

    def attend(self, q, k, v, bits, *, gqa="per_head", segment=256, **options):
        return reference.attend(q, k, v, bits, segment_size=segment, **options)

    def prefill(self, q, k, v, *, block=128, segment=256, **options):
        """(out, lse, bits, k_perm)"""
        plan = reference.prefill(q, k, v, block_size=block, segment_size=segment, **options)
        return plan.out, plan.lse, plan.selection.bits, plan.k_perm


class Ops:
    """The ops of a namespace under one instruction set. Tensors come and go on the CPU, whatever
    device the ops run on."""

    def __init__(self, isa=None, namespace=torch.ops.pbs_attn, device="cpu"):
        self.isa = ISAS[isa] if isa else 0
        self.namespace = namespace
        self.device = torch.device(device)

    def run(self, verb, *args):
        there = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in args]
        result = getattr(self.namespace, verb)(*there)
        if isinstance(result, tuple):
            return tuple(x.cpu() for x in result)
        return result.cpu()

    def score(self, q, k, *, gqa="per_head", order="last_block", seed=0, block=128, segment=256):
        return self.run(
            "score", q[None], k[None], *WHOLE, 0.0, block, segment,
            number("gqa", gqa), number("order", order), seed, self.isa,
        )[0]  # fmt: skip

    def _permute(
        self, q, k, v, s, k_perm, gqa, permute, block, segment, pack, correction="none"
    ):  # fmt: skip
        return self.run(
            "permute", q[None], k[None], v[None], None if s is None else s.float()[None],
            None if k_perm is None else k_perm.int()[None], None, *WHOLE, block, segment,
            number("gqa", gqa), number("permute", permute), pack, self.isa,
            number("correction", correction),
        )  # fmt: skip

    def permute(self, q, k, s, *, gqa="per_head", permute="keys", block=128, segment=256):
        k_perm, q_perm, k_pool, _, _ = self._permute(
            q, k, k, s, None, gqa, permute, block, segment, False
        )
        shuffled = permute in ("queries", "both")
        return k_perm[0].long(), q_perm[0].long() if shuffled else None, k_pool[0]

    def select(
        self, q, k, *, k_perm=None, q_perm=None, gqa="per_head", permute="keys",
        method="mean_pool", stride=8, reduce="sum", rule="prefix", normalize="history", tau=0.9,
        block=128, segment=256,
    ):  # fmt: skip
        keyed = "keys" if k_perm is not None else "identity"
        k_pool = self._permute(q, k, k, None, k_perm, gqa, keyed, block, segment, False)[2]
        bits, count, mass = self.run(
            "select", q[None], k[None], k_pool, None if k_perm is None else k_perm.int()[None],
            None if q_perm is None else q_perm.int()[None], None, *WHOLE, 0.0, block, segment,
            number("gqa", gqa), number("permute", permute), number("method", method), stride,
            number("reduce", reduce), number("rule", rule), tau, True, self.isa,
            number("normalize", normalize),
        )  # fmt: skip
        blocks = numerics.unpack(bits[0], -(-k.size(1) // block))
        assert torch.equal(blocks.sum(-1), count[0].long()), "count is not the number of bits"
        return blocks, mass[0]

    def attend(
        self, q, k, v, bits, *, k_perm=None, q_perm=None, gqa="per_head", own="segment",
        correction="none", block_q=128, block_k=128, segment=256,
    ):  # fmt: skip
        packed = None
        if k_perm is not None:
            packed = self._permute(
                q, k, v, None, k_perm, gqa, "keys", block_k, segment, True, correction
            )[4]
        out, lse = self.run(
            "attend", q[None], k[None], v[None], packed,
            None if bits is None else numerics.pack(bits)[None],
            None if q_perm is None else q_perm.int()[None], *WHOLE, 0.0, block_q, block_k,
            segment, number("gqa", gqa), number("own", own), True, self.isa,
            number("correction", correction),
        )  # fmt: skip
        return out[0].transpose(0, 1), lse[0]

    def prefill(
        self, q, k, v, *, k_perm=None, gqa="per_head", permute="keys", order="last_block", seed=0,
        select="mean_pool", stride=8, reduce="sum", rule="prefix", normalize="history",
        correction="none", tau=0.9, block=128, segment=256,
    ):  # fmt: skip
        out, lse, count, bits, k_perm = self.run(
            "prefill", q[None], k[None], v[None],
            None if k_perm is None else k_perm.int()[None], None, None, *WHOLE, 0.0, block,
            segment, number("gqa", gqa), number("permute", permute), number("order", order), seed,
            number("method", select), stride, number("reduce", reduce), number("rule", rule), tau,
            True, True, self.isa, number("normalize", normalize), number("correction", correction),
        )  # fmt: skip
        blocks = numerics.unpack(bits[0], -(-k.size(1) // block))
        assert torch.equal(blocks.sum(-1), count[0].long()), "count is not the number of bits"
        return out[0].transpose(0, 1), lse[0], blocks, k_perm[0].long()
