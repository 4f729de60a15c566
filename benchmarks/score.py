# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.score: importance of every key (csrc/{cpu,cuda}/score.*)."""

import sys

from benchmarks import harness
from benchmarks.harness import Row


def rows(work) -> list[Row]:
    return [] if work.s is None else [Row("score", work.score, bytes=work.score_bytes())]


if __name__ == "__main__":
    sys.exit(harness.main("score", rows))
