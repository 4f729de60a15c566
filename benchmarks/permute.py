# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.permute: sort, pack and pool, beside a plain copy of K and V."""

import sys

from benchmarks import harness
from benchmarks.harness import Row


def rows(work) -> list[Row]:
    return [Row("permute", work.permute, bytes=work.permute_bytes())]


def with_copy(work) -> list[Row]:
    copy = Row("copy K, V", lambda: (work.k.clone(), work.v.clone()), bytes=work.copy_bytes())
    return [*rows(work), copy]


if __name__ == "__main__":
    sys.exit(harness.main("permute", with_copy))
