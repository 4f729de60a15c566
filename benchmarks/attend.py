# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.attend: the selected blocks, forced densities, and dense attention.

"attend" reads K/V packed by permute. "20%", "30%", "40%" are random history blocks at that density
of the causal blocks, given as bits on natural order; those calls pack K/V themselves on a CPU.
On a GPU FlexAttention runs the selected blocks beside them.
"""

import functools
import sys

from benchmarks import baselines, flex, harness
from benchmarks.harness import Row

SHARES = (0.2, 0.3, 0.4)


def rows(work) -> list[Row]:
    return [Row("attend", work.attend, work.computed, work.density, diagonal=work.diagonal)]


def forced(work) -> list[Row]:
    made = []
    for share in SHARES:
        bits, blocks, density = work.forced(share)
        call = functools.partial(work.attend_bits, bits)
        name = f"attend {share:.0%}"
        made.append(Row(name, call, blocks, density, diagonal=work.diagonal))
    return made


def with_baselines(work) -> list[Row]:
    from benchmarks import steps

    others = steps.fewer_threads(work) if work.device.kind == "cpu" else []
    return [*rows(work), *others, *forced(work), *baselines.rows(work), *flex.rows(work)]


if __name__ == "__main__":
    sys.exit(harness.main("attend", with_baselines))
