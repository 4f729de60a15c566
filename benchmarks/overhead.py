# SPDX-License-Identifier: Apache-2.0
"""What choosing by antidiagonals and the mean correction cost, beside the FLOPs that they take.

"antidiagonal 16" is select alone at that stride t: half of (N/t)^2 products of t D, which is
1 / (2 t) of the FLOPs of dense attention. "attend 30% means" is "attend 30% plain", the same random
blocks from the same packed K/V, and one pseudo-token per block left out: the difference of the two
is the correction, 1 block of means where dense attention has B of keys. Each is timed beside
"dense", our own kernels with every block, round by round.
"""

from __future__ import annotations

import functools

from benchmarks.harness import Row

SHARE = 0.3


def rows(work) -> list[Row]:
    return [*antidiagonal(work), *correction(work)]


def antidiagonal(work) -> list[Row]:
    if work.config.select != "antidiagonal":
        return []
    return [
        Row(f"antidiagonal {t}", functools.partial(work.select, t), flops=1 / (2 * t))
        for t in work.args.stride_list
    ]


def correction(work) -> list[Row]:
    if work.config.correction == "none":
        return []
    bits, blocks, density = work.forced(SHARE)
    names = {f"attend {SHARE:.0%} plain": "none", f"attend {SHARE:.0%} means": "mean"}
    made = []
    for name, how in names.items():
        call = functools.partial(work.attend, bits, how)
        made.append(Row(name, call, blocks, density, diagonal=work.diagonal))
    plain, means = made
    means.flops, means.beyond = flops_of_means(work), plain.name
    return made


def flops_of_means(work) -> float:
    """A query block reads one mean per block of history; a causal block has B keys."""
    found = work.blocks()
    history = (found.causal - found.own).sum() * work.shape.heads
    return float(history) / (work.causal * work.config.block_size)
