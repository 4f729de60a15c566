# SPDX-License-Identifier: Apache-2.0
"""GPU: the whole call at the densities that the paper reports, and its phases.

"prefill paper" is the fused call with the rule `budget`: the best blocks of each row, as many as
make the mean row as long as the paper's at that length (targets_gpu.PAPER_BLOCKS), whatever tau
would have kept of these inputs. "permutation" is score and permute together, "permutation shared"
the same with one order per K/V head.
"""

from __future__ import annotations

import functools

from benchmarks.harness import Row
from benchmarks.targets_gpu import PAPER_BLOCKS
from pbs_attn import geometry as geo
from pbs_attn import ops


def rows(work) -> list[Row]:
    made = []
    if work.shape.length in PAPER_BLOCKS and work.args.method == "pbs":
        made.append(whole(work, PAPER_BLOCKS[work.shape.length]))
    if work.config.permute == "keys":
        for name, gqa in (("permutation", "per_head"), ("permutation shared", "group")):
            made.append(Row(name, functools.partial(permutation, work, gqa)))
    return made


def whole(work, blocks: float) -> Row:
    budget = budget_for(work.blocks(), blocks)
    config = work.config.replace(rule="budget", tau=budget)
    _, count, _ = work.select(rule="budget", tau=budget)
    selected, computed, _ = geo.selected_blocks(count, work.blocks())
    call = functools.partial(ops.prefill, work.q, work.k, work.v, config)
    density = int(selected.sum()) / work.causal
    row = Row("prefill paper", call, int(computed.sum()), density, diagonal=work.diagonal)
    row.extra = {"budget": budget}
    return row


def budget_for(found: geo.Blocks, blocks: float) -> int:
    """The smallest number of history blocks a row, at least 1, by which the mean row computes
    `blocks`, its own span included; all there are, where that is fewer."""
    own, history = found.own.double(), (found.causal - found.own).long()
    for budget in range(1, int(history.max()) + 1):
        if float((own + history.clamp(max=budget)).mean()) >= blocks:
            return budget
    return max(int(history.max()), 1)


def permutation(work, gqa: str):
    score = ops.score(work.q, work.k, gqa=gqa, **work.sizes)
    return ops.permute(work.q, work.k, work.v, score, mode="keys", gqa=gqa, **work.sizes)
