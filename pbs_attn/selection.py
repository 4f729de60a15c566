# SPDX-License-Identifier: Apache-2.0
"""Names and formats of a selection.

`NAMES` maps each option's names to the enum values of pbs.h; this is the only place in Python
that knows them. A selection travels as a bitmask (bit n % 32 of word n / 32 is key block n); the
conversions below give a bool mask or block lists (CSR) and take them back.
"""

from typing import NamedTuple

import torch

NAMES = {
    "permute": {"none": 0, "identity": 1, "keys": 2, "queries": 3, "both": 4},
    "order": {"last_block": 0, "mean_query": 1, "random_query": 2, "random": 3},
    "gqa": {"per_head": 0, "group": 1},
    "select": {"mean_pool": 0, "antidiagonal": 1},
    "reduce": {"sum": 0, "max": 1},
    "rule": {"prefix": 0, "relative": 1, "absolute": 2, "budget": 3},
    "normalize": {"history": 0, "row": 1},
    "correction": {"none": 0, "mean": 1},
    "own": {"segment": 0, "block": 1, "mask": 2, "none": 3, "all": 4},
    "isa": {
        "auto": 0,
        "c": 1,
        "avx2": 2,
        "avx512": 3,
        "avx512bf16": 4,
        "emu_avx2": 5,
        "emu_avx512": 6,
        "emu_avx512bf16": 7,
        "sm80": 8,
        "amx": 9,
        "emu_amx": 10,
        "sm90": 11,
    },
}
CONFIG_NAMES = (
    "permute", "order", "gqa", "select", "reduce", "rule", "normalize", "correction",
)  # fmt: skip
PERMUTES_QUERIES = ("queries", "both")
WORD = 32  # blocks per word of a bitmask


def enum_id(option, name):
    """The enum value of pbs.h for one of an option's names."""
    try:
        return NAMES[option][name]
    except (KeyError, TypeError):
        allowed = ", ".join(NAMES[option])
        raise ValueError(f"{option} is {name!r}; allowed: {allowed}") from None


def own_of(permute):
    """Name of the own-span mode that goes with a permute mode."""
    return "block" if permute == "none" else "segment"


class BlockCSR(NamedTuple):
    """Block lists: query block m of (b, h) reads indices[offsets[b, h, m]:offsets[b, h, m + 1]]."""

    offsets: torch.Tensor  # int64 [B, H, Tq + 1], into indices
    indices: torch.Tensor  # int32 [total], ascending inside a list


def num_words(num_blocks):
    return (num_blocks + WORD - 1) // WORD


def mask_to_bits(mask):
    """bool [..., Tk] -> int32 [..., ceil(Tk / 32)]: uint32 bit patterns."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; allowed: torch.bool")
    pad = -mask.shape[-1] % WORD
    words = torch.nn.functional.pad(mask, (0, pad)).unflatten(-1, (-1, WORD))
    shift = torch.arange(WORD, device=mask.device)
    unsigned = (words.to(torch.int64) << shift).sum(-1)
    # The same 32 bits as a signed word: int32 is what torch handles everywhere.
    return (unsigned - ((unsigned >> (WORD - 1)) << WORD)).to(torch.int32)


def bits_to_mask(bits, num_blocks):
    """int32 [..., W] -> bool [..., num_blocks]."""
    if bits.dtype != torch.int32:
        raise TypeError(f"bits is {bits.dtype}; allowed: torch.int32")
    if bits.shape[-1] != num_words(num_blocks):
        raise ValueError(
            f"bits has {bits.shape[-1]} words per row; "
            f"{num_blocks} key blocks need {num_words(num_blocks)}"
        )
    shift = torch.arange(WORD, device=bits.device, dtype=torch.int32)
    return ((bits.unsqueeze(-1) >> shift) & 1).bool().flatten(-2)[..., :num_blocks]


def mask_to_csr(mask):
    """bool [B, H, Tq, Tk] -> BlockCSR."""
    if mask.ndim != 4 or mask.dtype != torch.bool:
        raise TypeError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; allowed: torch.bool [B, H, Tq, Tk]"
        )
    batch, heads, rows, _ = mask.shape
    ends = mask.sum(-1).reshape(-1).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    row = torch.arange(batch * heads, device=mask.device).view(batch, heads, 1) * rows
    offsets = starts[row + torch.arange(rows + 1, device=mask.device)]
    return BlockCSR(offsets, mask.nonzero()[:, 3].to(torch.int32))


def csr_to_mask(csr, num_blocks):
    """BlockCSR -> bool [B, H, Tq, num_blocks]."""
    offsets, indices = csr
    if offsets.ndim != 3 or indices.ndim != 1:
        raise ValueError(
            f"BlockCSR has offsets {tuple(offsets.shape)} and indices {tuple(indices.shape)}; "
            "allowed: [B, H, Tq + 1] and [total]"
        )
    for name, tensor in (("offsets", offsets), ("indices", indices)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"BlockCSR {name} is {tensor.dtype}; allowed: int32, int64")
    counts = (offsets[..., 1:] - offsets[..., :-1]).reshape(-1).to(torch.int64)
    total = indices.numel()
    starts = offsets[..., :-1].reshape(-1).to(torch.int64)
    if counts.numel() and (counts.min() < 0 or starts.min() < 0 or offsets.max() > total):
        raise ValueError(f"BlockCSR offsets must ascend inside [0, {total}], the size of indices")
    if total and (indices.min() < 0 or indices.max() >= num_blocks):
        raise ValueError(
            f"BlockCSR indices span [{int(indices.min())}, {int(indices.max())}]; "
            f"allowed: [0, {num_blocks})"
        )
    rows = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts  # place of each row's first entry among all entries
    entry = torch.arange(rows.numel(), device=rows.device) - first[rows] + starts[rows]
    mask = torch.zeros(counts.numel(), num_blocks, dtype=torch.bool, device=indices.device)
    mask[rows, indices[entry].to(torch.int64)] = True
    return mask.view(*offsets.shape[:2], offsets.shape[2] - 1, num_blocks)


def bits_to_csr(bits, num_blocks):
    """int32 [B, H, Tq, W] -> BlockCSR."""
    return mask_to_csr(bits_to_mask(bits, num_blocks))


def csr_to_bits(csr, num_blocks):
    """BlockCSR -> int32 [B, H, Tq, W]."""
    return mask_to_bits(csr_to_mask(csr, num_blocks))
