# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.attend: the selected blocks, forced densities, and dense attention.

"attend" reads K/V packed by permute. "20%", "30%", "40%" are random history blocks at that density
of the causal blocks, given as bits on natural order; those calls pack K/V themselves.
"""

import functools
import sys

from benchmarks import baselines, harness
from benchmarks.harness import Row

SHARES = (0.2, 0.3, 0.4)


def rows(work) -> list[Row]:
    return [Row("attend", work.attend, work.computed, work.density)]


def forced(work) -> list[Row]:
    made = []
    for share in SHARES:
        bits, blocks, density = work.forced(share)
        call = functools.partial(work.attend_bits, bits)
        made.append(Row(f"attend {share:.0%}", call, blocks, density))
    return made


def with_baselines(work) -> list[Row]:
    return [*rows(work), *forced(work), *baselines.rows(work)]


if __name__ == "__main__":
    sys.exit(harness.main("attend", with_baselines))
