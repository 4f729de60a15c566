# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.prefill: the whole call, verb by verb, beside dense attention.

The headline benchmark; benchmarks/README.md says how to read its table.
"""

import sys

import pbs_attn
from benchmarks import (
    attend,
    baselines,
    flex,
    harness,
    overhead,
    paper,
    permute,
    score,
    select,
    steps,
)
from benchmarks.harness import Row


def rows(work) -> list[Row]:
    if work.device.kind == "cpu":
        return on_cpu(work)
    return [
        call(work, memory(work)),
        *(row for verb in (score, permute, select, attend) for row in verb.rows(work)),
        *attend.forced(work),
        *paper.rows(work),
        *overhead.rows(work),
        *baselines.rows(work),
        *flex.rows(work),
    ]


def on_cpu(work) -> list[Row]:
    taken, held = steps.open_steps(work), memory(work)
    calls = min(work.args.samples, 3)
    return [
        call(work, lambda: held | steps.of_method(taken, calls)),
        *steps.forced(work, taken),
        *(row for verb in (score, permute, select, attend) for row in verb.rows(work)),
        *overhead.rows(work),
        *steps.fewer_threads(work),
        *baselines.rows(work),
    ]


def call(work, extra=None) -> Row:
    row = Row("prefill", work.prefill, work.computed, work.density, diagonal=work.diagonal)
    row.extra = extra or {}
    return row


def memory(work) -> dict:
    """Peak of live bytes that one call allocates, its results left out, beside workspace_size."""
    q, k = work.q, work.k
    said = pbs_attn.workspace_size(q.shape, k.shape, q.dtype, work.config, device=q.device)
    return {
        "peak_extra_bytes": work.device.peak_extra_bytes(work.prefill),
        "workspace_size": said,
    }


if __name__ == "__main__":
    sys.exit(harness.main("prefill", rows))
