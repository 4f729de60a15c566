# SPDX-License-Identifier: Apache-2.0
"""Permuted block-sparse attention on tensors: ten lines."""

import torch

import pbs_attn

q = torch.randn(1, 8, 8192, 64)  # batch, query heads, tokens, head_dim
k = torch.randn(1, 2, 8192, 64)  # two key/value heads: four query heads share one
v = torch.randn(1, 2, 8192, 64)

with pbs_attn.record() as calls:
    out = pbs_attn.pbs_attention(q, k, v, config=pbs_attn.PBSConfig(tau=0.5))

print(f"{tuple(out.shape)}, {calls.density:.0%} of the causal blocks")
