# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.score: importance of every key (csrc/cpu/score.c)."""

import sys

from benchmarks import harness
from benchmarks.harness import Row


def rows(work) -> list[Row]:
    return [Row("score", work.score)]


if __name__ == "__main__":
    sys.exit(harness.main("score", rows))
