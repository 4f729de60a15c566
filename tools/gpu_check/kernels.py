# SPDX-License-Identifier: Apache-2.0
"""Every verb and prefill once on small ragged shapes, beside the same on the CPU.

Small enough for compute-sanitizer, which runs it with --few, and needs nothing but torch and the
libraries. Each verb gets what the CPU's verb before it made, so that one wrong verb is one line.

python tools/gpu_check/kernels.py --device cuda
python tools/gpu_check/kernels.py --device cpu --few     its own logic, where there is no GPU
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pbs_attn import PBSConfig, devices, ops  # noqa: E402
from pbs_attn.geometry import Geometry  # noqa: E402
from pbs_attn.selection import PERMUTES_QUERIES, own_of  # noqa: E402

# Largest difference over largest value: of outputs in the inputs' dtype, and of what is fp32. The
# numeric rule is in tests/numerics.py; this tells a wrong row from rounding.
OUTPUTS = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
FP32 = 1e-4
GARBAGE = float("nan")  # rows outside the sequences; with one of them read nothing agrees


@dataclass
class Case:
    """q_len, kv_len per sequence, each at the end of what its row holds before a gap."""

    dtype: torch.dtype
    head_dim: int
    lengths: tuple[tuple[int, int], ...]
    config: PBSConfig
    heads: int = 4
    heads_k: int = 2

    def __str__(self):
        c, name = self.config, str(self.dtype).removeprefix("torch.")
        return (
            f"{name} D={self.head_dim} lengths {self.lengths} permute={c.permute} gqa={c.gqa} "
            f"select={c.select} normalize={c.normalize} correction={c.correction} "
            f"order={c.order} block {c.block_size}/{c.segment_size}"
        )


def _config(**options) -> PBSConfig:
    return PBSConfig(**{"tau": 0.6, "min_q": 0, "min_kv": 0, "strict": True, **options})


def cases(few: bool) -> list[Case]:
    """At least three segments of keys in each. The first two, one of each dtype, run every verb."""
    bf16, fp16 = torch.bfloat16, torch.float16
    small = {"block_size": 64, "segment_size": 128}
    row = {"select": "antidiagonal", "normalize": "row", "correction": "mean"}
    peak = {**row, "permute": "identity", "reduce": "max", "stride": 16, "rule": "absolute"}
    ragged = ((129, 769), (1, 430))
    found = [
        Case(bf16, 64, ragged, _config(**small)),
        Case(fp16, 128, ((200, 391), (77, 77)), _config(**row, **small)),
    ]
    if few:
        return found
    return [
        *found,
        Case(bf16, 128, ((300, 900), (0, 5)), _config()),
        Case(fp16, 96, ragged, _config(permute="both", order="mean_query", **small)),
        Case(bf16, 256, ((65, 520),), _config(gqa="group", **small)),
        Case(fp16, 40, ragged, _config(permute="identity", **small)),
        Case(bf16, 72, ((129, 600),), _config(permute="none", rule="budget", tau=0.4)),
        Case(fp16, 64, ragged, _config(select="antidiagonal", **small)),
        Case(bf16, 128, ((300, 1700), (90, 1200)), _config(**{**peak, "tau": 0.1})),
    ]


def make(case: Case):
    """(q, k, v, Geometry) on the CPU: sequences start at 3 and 7, after and before garbage."""
    generator = torch.Generator().manual_seed(0)
    batch = len(case.lengths)
    q_len, kv_len = zip(*case.lengths, strict=True)
    q_rows, k_rows = max(q_len) + 8, max(kv_len) + 16
    shapes = [(case.heads, q_rows), (case.heads_k, k_rows), (case.heads_k, k_rows)]
    q, k, v = (
        torch.randn(batch, heads, rows, case.head_dim, generator=generator).to(case.dtype)
        for heads, rows in shapes
    )
    for x, start, length in ((q, 3, q_len), (k, 7, kv_len), (v, 7, kv_len)):
        for b, count in enumerate(length):
            x[b, :, :start] = x[b, :, start + count :] = GARBAGE
    vectors = ([3] * batch, q_len, [7] * batch, kv_len)
    return q, k, v, Geometry(*(torch.tensor(x, dtype=torch.int32) for x in vectors))


class Verbs:
    """One case on one device. Inputs come from the CPU and results go there."""

    def __init__(self, case: Case, device: torch.device):
        self.device, self.config = device, case.config
        q, k, v, geometry = make(case)
        self.q, self.k, self.v = (x.to(device) for x in (q, k, v))
        self.geometry = Geometry(*(x.to(device) for x in geometry.vectors))
        self.cut = {
            "geometry": self.geometry,
            "block_size": case.config.block_size,
            "segment_size": case.config.segment_size,
            "gqa": case.config.gqa,
        }

    def to(self, x):
        return None if x is None else x.to(self.device)

    def score(self):
        c = self.config
        return ops.score(self.q, self.k, order=c.order, seed=c.seed, **self.cut)

    def permute(self, score, k_perm=None):
        return ops.permute(
            self.q,
            self.k,
            self.v,
            self.to(score),
            k_perm_in=self.to(k_perm),
            mode=self.config.permute,
            correction=self.config.correction,
            **self.cut,
        )

    def select(self, k_pool, k_perm, q_perm):
        c = self.config
        return ops.select(
            self.q,
            self.k,
            self.to(k_pool),
            k_perm=self.to(k_perm),
            q_perm=self.to(q_perm),
            mode=c.permute,
            method=c.select,
            stride=c.stride,
            reduce=c.reduce,
            rule=c.rule,
            normalize=c.normalize,
            tau=c.tau,
            return_mass=True,
            **self.cut,
        )

    def attend(self, bits, packed, q_perm):
        c = self.config
        return ops.attend(
            self.q,
            self.k,
            self.v,
            self.to(bits),
            packed=packed,
            q_perm=self.to(q_perm),
            geometry=self.geometry,
            block_q=c.block_size,
            block_k=c.block_size,
            segment_size=c.segment_size,
            gqa=c.gqa,
            own=own_of(c.permute),
            correction=c.correction,
            return_lse=True,
        )

    def prefill(self):
        return ops.prefill(self.q, self.k, self.v, self.config, geometry=self.geometry)[0]


def rows_of(x: torch.Tensor, case: Case) -> torch.Tensor:
    """The rows of the sequences, of [B, H, Nq, ...] tensors; what lies between says nothing."""
    x = x.cpu()
    return _flat([x[b, :, 3 : 3 + count] for b, (count, _) in enumerate(case.lengths)])


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest, over the largest expected value; infinite where a value is not finite."""
    got, expected = got.cpu().float().flatten(), expected.cpu().float().flatten()
    live = expected.isfinite()  # -inf: a row or key that there is not
    if not got[live].isfinite().all() or not torch.equal(got.isfinite(), live):
        return float("inf")
    if not live.any():
        return 0.0
    largest = expected[live].abs().max().clamp(min=1e-30)
    return float((got[live] - expected[live]).abs().max() / largest)


def compare(case: Case, device: torch.device) -> dict[str, float]:
    """{verb: difference}. Tensors are compared on the CPU: under compute-sanitizer every kernel of
    torch costs time. Selections of nearly equal masses may differ: masses are compared, and
    prefill, which selects for itself, is only looked at for values that are not finite."""
    here, there = Verbs(case, torch.device("cpu")), Verbs(case, device)
    found = {}
    score = None
    if case.config.permute in ("keys", "both"):
        score = here.score()
        keys = [score[b, :, :count] for b, (_, count) in enumerate(case.lengths)]
        far = there.score().cpu()
        got = [far[b, :, :count] for b, (_, count) in enumerate(case.lengths)]
        found["score"] = difference(_flat(got), _flat(keys))
    k_perm, q_perm, k_pool, _, packed = here.permute(score)
    far_perm, far_q_perm, far_pool, _, far_packed = there.permute(score)
    found["permute"] = difference(far_pool, k_pool)
    queries = case.config.permute in PERMUTES_QUERIES
    if not torch.equal(far_perm.cpu(), k_perm) or (
        queries and not torch.equal(far_q_perm.cpu(), q_perm)
    ):
        found["permute"] = float("inf")
    q_perm = q_perm if queries else None
    bits, _, mass = here.select(k_pool, k_perm, q_perm)
    found["select"] = difference(there.select(k_pool, k_perm, q_perm)[2], mass)
    out, lse = here.attend(bits, packed, q_perm)
    if case.config.permute == "identity":
        far_packed = None  # means of blocks are then attend's own
    far_out, far_lse = there.attend(bits, far_packed, q_perm)
    found["attend"] = max(
        difference(rows_of(far_out, case), rows_of(out, case)),
        difference(rows_of(far_lse, case), rows_of(lse, case)),
    )
    finite = rows_of(there.prefill(), case).isfinite().all()
    found["prefill"] = 0.0 if finite else float("inf")
    return found


def _flat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.float().flatten() for x in parts])


def main(arguments=None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    p.add_argument("--few", action="store_true", help="two cases: for compute-sanitizer")
    args = p.parse_args(arguments)
    device = torch.device(args.device)
    why = devices.refusal(device)
    if why:
        print(f"no kernels for {device}: {why}")
        return 1
    wrong = 0
    for case in cases(args.few):
        print(f"{case}", flush=True)  # before a kernel can hang
        found = compare(case, device)
        allowed = {"attend": OUTPUTS[case.dtype]}
        bad = [verb for verb, off in found.items() if not off <= allowed.get(verb, FP32)]
        print("   " + ", ".join(f"{verb} {off:.1e}" for verb, off in found.items()))
        if bad:
            print(f"   WRONG: {', '.join(bad)}")
        wrong += bool(bad)
    print(f"{wrong} of {len(cases(args.few))} cases differ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
