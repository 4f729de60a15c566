# SPDX-License-Identifier: Apache-2.0
"""Where sequences lie, and the block arithmetic of csrc/core/geometry.h over whole tensors.

Everything here is vectorised over sequences and query blocks and stays on the device. Query row i
of a sequence has absolute position i + kv_len - q_len; blocks of queries are anchored at q_start,
blocks and segments of keys at kv_start.
"""

from typing import NamedTuple

import torch


class Geometry(NamedTuple):
    """int32 [B] tensors on the device of q, or None = from 0 / whole tensor; max 0 = tensor size.

    With batch 1 and vectors of length B > 1 the call is packed: B sequences in one row."""

    q_start: torch.Tensor | None = None
    q_len: torch.Tensor | None = None
    kv_start: torch.Tensor | None = None
    kv_len: torch.Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    @property
    def vectors(self):
        return self[:4]

    @property
    def whole(self):
        """True if every sequence fills its row of q and k."""
        return all(vector is None for vector in self.vectors)

    def num_sequences(self, batch):
        return next((v.numel() for v in self.vectors if v is not None), batch)


def ceil_div(a, b):
    return (a + b - 1) // b


def floor_to(a, step):
    """Largest multiple of step <= a; 0 for negative a, as no key lies before 0."""
    return a.clamp(min=0) // step * step


class Sequences(NamedTuple):
    """int64 [B] each, None filled in."""

    q_start: torch.Tensor
    q_len: torch.Tensor
    kv_start: torch.Tensor
    kv_len: torch.Tensor

    @property
    def q_offset(self):
        return self.kv_len - self.q_len


def sequences(geometry, batch, seqlen_q, seqlen_k, device=None):
    """The sequences of a call whose tensors hold batch x seqlen_q rows and seqlen_k keys."""
    device = next((v.device for v in geometry.vectors if v is not None), device)
    num = geometry.num_sequences(batch)

    def full(vector, value):
        if vector is not None:
            return vector.to(torch.int64)
        if isinstance(value, torch.Tensor):
            return value
        return torch.full((num,), value, dtype=torch.int64, device=device)

    q_start, kv_start = full(geometry.q_start, 0), full(geometry.kv_start, 0)
    q_len = full(geometry.q_len, seqlen_q - q_start)
    kv_len = full(geometry.kv_len, seqlen_k - kv_start)
    return Sequences(q_start, q_len, kv_start, kv_len)


def max_lengths(geometry, seqlen_q, seqlen_k):
    """(Nq, Nk): what plans are sized by."""
    return geometry.max_seqlen_q or seqlen_q, geometry.max_seqlen_k or seqlen_k


class Blocks(NamedTuple):
    """Key blocks per query block, int64 [B, Tq]; 0 in query blocks that hold no row."""

    causal: torch.Tensor  # with a visible key: the 100% of density
    own: torch.Tensor  # of the own span, none above the diagonal: what adds to history
    own_computed: torch.Tensor  # of the own span as the kernels run it
    own_start: torch.Tensor  # first key of the own span
    block_k: int

    def own_mask(self, num_k_blocks):
        """bool [B, Tq, Tk]: key blocks of the own span, none above the diagonal."""
        first = (self.own_start // self.block_k)[..., None]
        n = torch.arange(num_k_blocks, device=first.device)
        return (n >= first) & (n < first + self.own[..., None])


def blocks(seqs, num_q_blocks, block_q, block_k, segment_size, own, permuted_queries=False):
    """Block counts of every query block. own: "segment", "block", "mask", "none" or "all"."""
    device = seqs.q_len.device
    row = torch.arange(num_q_blocks, device=device) * block_q  # [Tq] first rows
    q_len, offset = seqs.q_len[:, None], seqs.q_offset[:, None]
    exists = row < q_len
    visible = _visible_keys(row + block_q, q_len, offset)
    first_row = row // segment_size * segment_size if permuted_queries else row
    last_row = first_row + segment_size if permuted_queries else row + block_q
    own_end = _visible_keys(last_row, q_len, offset)
    if own in ("segment", "none"):
        own_start = floor_to(offset + first_row, segment_size)
    elif own == "block":
        own_start = floor_to(offset + first_row, block_k)
    elif own == "mask":
        own_start = visible
    elif own == "all":
        own_start = torch.zeros_like(visible)
    else:
        raise ValueError(f"own is {own!r}; allowed: segment, block, mask, none, all")
    causal = ceil_div(visible, block_k)
    history = own_start // block_k
    own_blocks, own_computed = causal - history, ceil_div(own_end, block_k) - history
    if own in ("mask", "none"):  # bits alone decide
        own_blocks, own_computed = torch.zeros_like(causal), torch.zeros_like(causal)
    keep = lambda count: torch.where(exists, count.clamp(min=0), 0)  # noqa: E731
    return Blocks(keep(causal), keep(own_blocks), keep(own_computed), own_start, block_k)


def _visible_keys(row_end, q_len, offset):
    """Keys visible to the last existing row before row_end."""
    return (offset + torch.minimum(row_end, q_len)).clamp(min=0)


def selected_blocks(count, block_counts):
    """(selected, computed, causal): int64 [B, H], [B, H], [B] sums of history and own span."""
    history = count.to(torch.int64).sum(-1)
    selected = history + block_counts.own.sum(-1)[:, None]
    computed = history + block_counts.own_computed.sum(-1)[:, None]
    return selected, computed, block_counts.causal.sum(-1)


def density(count, block_counts):
    """fp64 [B, H]: selected causal blocks, own span included, over causal blocks; 1 if none."""
    selected, _, causal = selected_blocks(count, block_counts)
    share = selected.to(torch.float64) / causal.clamp(min=1)[:, None]
    return torch.where(causal[:, None] > 0, share, 1.0)


def visible_mask(seqs, batch, rows, seqlen_k):
    """bool [batch, len(rows), seqlen_k]: which keys each row of q sees; rows int64 indices.

    For exact dense attention. Packed sequences share the one row of the batch."""
    return _over_sequences(_causal_mask(seqs, rows, seqlen_k)[0], batch)


def selected_mask(seqs, batch, rows, seqlen_k, block_mask, block_q, block_k):
    """bool [batch, H, len(rows), seqlen_k]: visible, and in a block that block_mask allows.

    block_mask bool [B, H, Tq, Tk], anchored at q_start and kv_start of each sequence."""
    mask, row, key = _causal_mask(seqs, rows, seqlen_k)
    m = (row // block_q).clamp(0, block_mask.shape[2] - 1)
    n = (key // block_k).clamp(0, block_mask.shape[3] - 1)
    num = torch.arange(block_mask.shape[0], device=rows.device)[:, None, None]
    listed = block_mask[num, :, m[..., None], n[:, None, :]].movedim(3, 1)
    return _over_sequences(mask[:, None] & listed, batch)


def _causal_mask(seqs, rows, seqlen_k):
    """(mask [B, rows, Nk], rows [B, rows] and keys [B, Nk] counted from their sequence's start)."""
    key = torch.arange(seqlen_k, device=rows.device) - seqs.kv_start[:, None]
    row = rows - seqs.q_start[:, None]
    exists = (key >= 0) & (key < seqs.kv_len[:, None])
    live = (row >= 0) & (row < seqs.q_len[:, None])
    position = row + seqs.q_offset[:, None]
    mask = (key[:, None, :] <= position[..., None]) & exists[:, None, :] & live[..., None]
    return mask, row, key


def _over_sequences(mask, batch):
    return mask if mask.shape[0] == batch else mask.any(0, keepdim=True)
