# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.prefill: the whole call, verb by verb, beside dense attention.

The headline benchmark; benchmarks/README.md says how to read its table.
"""

import sys

import torch

import pbs_attn
from benchmarks import attend, baselines, harness, permute, score, select
from benchmarks.harness import Row


def rows(work) -> list[Row]:
    call = Row("prefill", work.prefill, work.computed, work.density, memory(work))
    verbs = [row for verb in (score, permute, select, attend) for row in verb.rows(work)]
    return [call, *verbs, *attend.forced(work), *baselines.rows(work)]


def memory(work) -> dict:
    """Peak of live bytes that one call allocates, its results left out, beside workspace_size."""
    return {
        "peak_extra_bytes": peak_extra_bytes(work.prefill),
        "workspace_size": pbs_attn.workspace_size(
            work.q.shape, work.k.shape, work.q.dtype, work.config
        ),
    }


def peak_extra_bytes(call) -> int:
    """From torch's own record of its allocator: every allocation and release of the call."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as p:
        result = call()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in result}
    return peak - sum(held.values())


if __name__ == "__main__":
    sys.exit(harness.main("prefill", rows))
