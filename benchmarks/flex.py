# SPDX-License-Identifier: Apache-2.0
"""FlexAttention over the selected blocks: the block-sparse kernel that every torch has.

The bits are taken on natural order, so it computes exactly the block pairs that `attend` does with
the same bits. Blocks that every row sees whole are "full" to it and need no mask.
"""

from __future__ import annotations

import functools

import torch

from benchmarks import baselines
from benchmarks.harness import Row


def rows(work) -> list[Row]:
    """On a GPU only, as it is compiled per shape; --quick compiles once, at the middle length."""
    if work.device.kind != "cuda":
        return []
    call = None
    if work.args.quick and work.shape.length != middle(work.args.lengths):
        work.failures["flex"] = "--quick compiles it at the middle length only"
    else:
        call = baselines.attempt(work, "flex", make, error)
    row = Row("flex", call, work.computed, work.density, diagonal=work.diagonal)
    return [row] if call else []


def middle(lengths: str) -> int:
    from benchmarks.options import length

    every = sorted(map(length, lengths.split(",")))
    return every[len(every) // 2]


def error(work, out) -> float:
    """Largest difference to our own attend over the same blocks, over the largest value."""
    right = work.attend_bits(work.bits)[0][:, :, -baselines.ROWS :].float()
    off = (out[:, :, -baselines.ROWS :].float() - right).abs().max()
    return float(off / right.abs().max())


def make(work):
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(work, work.bits)
    return functools.partial(
        _compiled(flex_attention), work.q, work.k, work.v, block_mask=mask, enable_gqa=True
    )


def _compiled(function):
    torch.compiler.reset()  # every mask compiles anew, and torch gives up after eight times
    return torch.compile(function, dynamic=False)


def selected_blocks(work, bits):
    """bool [1, Hq, Tq, Tk]: history of `bits` and the own span."""
    from pbs_attn.selection import bits_to_mask

    blocks = -(-work.k.shape[2] // work.config.block_size)
    return bits_to_mask(bits, blocks) | work.blocks().own_mask(blocks)[:, None]


def block_mask(work, bits):
    """BlockMask of `bits` and the own span, causal."""
    from torch.nn.attention.flex_attention import BlockMask

    size, seqlen_q, seqlen_k = work.config.block_size, work.q.shape[2], work.k.shape[2]
    offset = seqlen_k - seqlen_q
    selected = selected_blocks(work, bits)
    rows, columns = (torch.arange(t, device=bits.device) for t in selected.shape[2:])
    # the last key of the block is seen by the first row of the query block
    full = columns * size + size - 1 <= (rows * size + offset)[:, None]

    def causal(b, h, q_index, k_index):
        return q_index + offset >= k_index

    return BlockMask.from_kv_blocks(
        *_ordered(selected & ~full),
        *_ordered(selected & full),
        BLOCK_SIZE=size,
        mask_mod=causal,
        seq_lengths=(seqlen_q, seqlen_k),
    )


def _ordered(mask):
    """(count int32 [B, H, Tq], block numbers int32 [B, H, Tq, Tk], the chosen ones first)."""
    chosen = mask.to(torch.int32)
    order = torch.argsort(chosen, dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)
