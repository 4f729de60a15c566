# SPDX-License-Identifier: Apache-2.0
"""Dense causal attention: ours with every block, and torch's."""

import torch

from benchmarks.harness import Row


def rows(work) -> list[Row]:
    return [
        Row("dense", work.dense, work.causal, 1.0),
        # the same block pairs as dense, so that GFLOP/s compare: whole blocks on the diagonal
        Row("sdpa", lambda: sdpa(work.q, work.k, work.v), work.causal, 1.0),
    ]


def sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
