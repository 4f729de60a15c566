# SPDX-License-Identifier: Apache-2.0
"""Where the attention of captured heads goes: per key, per block, and how much a selection keeps.

One-shot causal prefill of one sequence; q [Hq, N, D], k [Hk, N, D], T = ceil(N / block_size).
"""

import math

import torch
import torch.nn.functional as F


def key_mass(q, k, block_size=128, softmax_scale=None):
    """fp32 [Hq, T, N]: attention of every key, averaged over the rows of each query block."""
    scale = softmax_scale or q.size(-1) ** -0.5
    num_heads, length, _ = q.shape
    group = num_heads // k.size(0)
    q, k = q.float().unflatten(0, (k.size(0), group)) * scale, k.float()
    mass = torch.zeros(num_heads, math.ceil(length / block_size), length)
    for m in range(mass.size(1)):
        start, end = m * block_size, min((m + 1) * block_size, length)
        rows = q[:, :, start:end].flatten(1, 2)  # [Hk, G * rows, D]
        logits = (rows @ k[:, :end].transpose(1, 2)).view(num_heads, end - start, end)
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        logits[:, :, start:].masked_fill_(future, -math.inf)
        mass[:, m, :end] = logits.softmax(-1).mean(1)
    return mass


def block_mass(mass, k_perm=None, block_size=128):
    """[Hq, T, Tk]: `mass` [Hq, T, N] summed over blocks of the keys in the order k_perm [Hp, N]."""
    if k_perm is not None:
        index = k_perm.long().repeat_interleave(mass.size(0) // k_perm.size(0), 0)
        mass = mass.gather(2, index[:, None].expand_as(mass))
    missing = -mass.size(2) % block_size
    return F.pad(mass, (0, missing)).unflatten(2, (-1, block_size)).sum(3)


def causal_blocks(num_blocks):
    """bool [T, T]: the 100% of a density."""
    return torch.ones(num_blocks, num_blocks, dtype=torch.bool).tril()


def own_blocks(num_blocks, block_size=128, segment_size=256):
    """bool [T, T]: causal blocks of each query block's own segment; segment_size = block_size for
    the methods in natural order, whose own span is the diagonal block."""
    ratio = segment_size // block_size
    first = torch.arange(num_blocks) // ratio * ratio
    return causal_blocks(num_blocks) & (torch.arange(num_blocks) >= first[:, None])


def kept_mass(mass, k_perm, history, own, block_size=128):
    """[Hq, T]: share of each query block's attention that lies in what is computed.

    history [Hq, T, Tk] are selected blocks of permuted keys; the own span is in natural order.
    """
    permuted = block_mass(mass, k_perm, block_size)
    natural = block_mass(mass, None, block_size)
    return (permuted * (history & ~own)).sum(2) + (natural * own).sum(2)
