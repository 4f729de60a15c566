# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.select: pool, score blocks, choose (csrc/{cpu,cuda}/select.*)."""

import sys

from benchmarks import harness
from benchmarks.harness import Row


def rows(work) -> list[Row]:
    return [Row("select", work.select, density=work.density, bytes=work.select_bytes())]


if __name__ == "__main__":
    sys.exit(harness.main("select", rows))
