# SPDX-License-Identifier: Apache-2.0
"""The mask function of the transformers integration, and how its result is read back.

transformers builds one mask per forward and layer type and hands it to every layer. Ours is

    None                           plain causal, queries at the end of the keys (bottom right)
    int32 (B, 1, 1, 4), "geometry" plain causal inside each row's sequence: q_start, q_len,
                                   kv_start, kv_len as in pbs.h. Padding and static caches.
    bool (B, 1, Nq, Nk)            whatever else transformers' own sdpa mask says: the dense route

A 4-D tensor passes through a second round of transformers' mask code untouched, so a mask that
`generate` prepared for a static cache keeps its meaning. A 2-D mask (True = a key that exists) may
come from another mask function, flash attention's for one; it is read as padding too.
"""

import torch
from transformers import masking_utils

from ..geometry import Geometry, sequences

GEOMETRY_SIZE = 4  # q_start, q_len, kv_start, kv_len


def is_tracing():
    """True where values must not be read and nothing may be counted."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def attention_mask_function(
    *,
    kv_length,
    q_length=None,
    q_offset=0,
    cache_position=None,
    kv_offset=0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask=None,
    allow_is_causal_skip=True,
    **kwargs,
):
    """What transformers calls, once per forward and layer type, with keywords only.

    transformers 5 gives q_length and q_offset (an int, or a 0-d tensor for a static cache), 4.57
    gives cache_position instead. At most one host read, and none while tracing.
    """
    old_call = q_length is None
    if old_call:
        q_length, q_offset = cache_position.shape[0], cache_position[0]

    def delegate():
        # sdpa_mask may answer None for an empty static cache, meaning top-left alignment. Our None
        # means bottom right, so let it do so only where the two agree.
        query = {"cache_position": cache_position}
        if not old_call:
            query = {"q_length": q_length, "q_offset": q_offset}
        return masking_utils.sdpa_mask(
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length),
            **query,
            **kwargs,
        )

    # In 4.57 a plain causal mask that may not be skipped only says "static cache"; in 5 it says
    # that the caller wants to read the mask.
    wants_mask = not allow_is_causal_skip and not old_call
    if q_length == 1 or wants_mask or not _is_plain_causal(mask_function, kv_length):
        return delegate()
    offset = q_offset - kv_offset  # key index of the first query
    if attention_mask is None:
        if isinstance(offset, torch.Tensor) and offset.device.type == "cpu" and not is_tracing():
            offset = int(offset)
        if not isinstance(offset, torch.Tensor) and offset + q_length >= kv_length:
            return None if offset + q_length == kv_length else delegate()
        device = kwargs.get("device") if not old_call else cache_position.device
        return _row_geometry(offset, q_length, kwargs["batch_size"], device)
    if is_tracing():
        return delegate()  # holes cannot be looked for
    padding = _fit(attention_mask, kv_length, kv_offset).expand(kwargs["batch_size"], -1)
    geometry, whole, holes = _padded_geometry(padding, offset, q_length)
    if holes:
        return delegate()
    return None if whole else geometry


def _is_plain_causal(function, kv_length):
    """True if the mask function cuts nothing but the future from kv_length keys."""
    if function is masking_utils.causal_mask_function:
        return True
    if is_tracing():
        return False
    parts = _conjunction(function)
    return masking_utils.causal_mask_function in parts and all(
        _cuts_nothing(part, kv_length) for part in parts
    )


def _closure(function):
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _conjunction(function):
    """The parts of a mask function made by transformers' and_masks, nested ones included."""
    if getattr(function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        return [function]
    parts = _closure(function).get("mask_functions", ())
    return [leaf for part in parts for leaf in _conjunction(part)]


def _cuts_nothing(part, kv_length):
    if part is masking_utils.causal_mask_function:
        return True
    maker, values = getattr(part, "__qualname__", "").split(".")[0], _closure(part)
    if maker == "sliding_window_overlay":  # a window that holds every key
        return isinstance(values.get("sliding_window"), int) and (
            values["sliding_window"] >= kv_length
        )
    if maker == "packed_sequence_mask_function":  # 4.57 adds it to unpacked input too
        sequence = values.get("packed_sequence_mask")
        return sequence is not None and bool((sequence == sequence[:, :1]).all())
    return False


def _fit(attention_mask, kv_length, kv_offset):
    """The columns of a 2-D mask that stand for the keys at hand; those it does not know are out."""
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length].bool()


def _row_geometry(offset, q_length, batch, device):
    """Geometry without padding: keys [0, offset + q_length) of a longer buffer."""
    if isinstance(offset, torch.Tensor):
        offset = offset.to(device, torch.int32)
    else:  # filled in place: a number copied to a GPU would be a synchronisation
        offset = torch.full((), offset, dtype=torch.int32, device=device)
    zero = torch.zeros_like(offset)
    row = torch.stack([zero, zero + q_length, zero, offset + q_length])
    return row.expand(batch, 1, 1, GEOMETRY_SIZE)


def _padded_geometry(padding, offset, q_length):
    """(geometry, True if it is the whole tensor, True if a row's keys are not contiguous).

    padding bool [B, Nk]. Row i of q stands at key offset + i. The sequence of a row of the batch
    holds the keys that exist up to the last query, and the queries that stand on one of them."""
    key = torch.arange(padding.shape[1], device=padding.device)
    exists = padding & (key < offset + q_length)
    count = exists.sum(-1)
    first = exists.int().argmax(-1)
    end = torch.where(exists, key + 1, 0).amax(-1)
    q_start = (first - offset).clamp(0, q_length)
    q_len = ((end - offset).clamp(0, q_length) - q_start).clamp(min=0)
    fields = (q_start, q_len, first, end - first)
    geometry = torch.stack(fields, -1).to(torch.int32)[:, None, None, :]
    # Queries beyond the last key (a cache that drops keys) fit no sequence either.
    holes = (count != end - first).any() | (offset + q_length > padding.shape[1])
    whole = (q_len == q_length).all() & (count == padding.shape[1]).all()
    whole, holes = torch.stack([whole, holes]).tolist()  # the one host read
    return geometry, whole, holes


def is_geometry(mask):
    return mask.ndim == 4 and mask.dtype == torch.int32 and mask.shape[1:] == (1, 1, GEOMETRY_SIZE)


def read_mask(mask, seqlen_q, seqlen_k):
    """(geometry, None) for a plain causal call, (None, bool or additive mask) for any other."""
    if mask is None:
        return Geometry(), None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention_mask is a {type(mask).__name__}; allowed: None or a tensor")
    if is_geometry(mask):
        return Geometry(*mask.flatten(1).t().contiguous().unbind(0)), None
    if mask.ndim == 4 and mask.dtype == torch.int32:
        raise ValueError(
            f"attention_mask is int32 {tuple(mask.shape)}; "
            f"allowed: (batch, 1, 1, {GEOMETRY_SIZE}) as the mask function made it"
        )
    if mask.ndim == 4:
        return None, mask
    if mask.ndim != 2:
        raise ValueError(f"attention_mask has {mask.ndim} dimensions; allowed: 2 or 4")
    # The queries end where a 2-D mask ends: it has no columns for keys to come.
    offset = mask.shape[1] - seqlen_q
    padding = _fit(mask, seqlen_k, 0)
    if not is_tracing() and offset >= 0:
        geometry, whole, holes = _padded_geometry(padding, offset, seqlen_q)
        if whole:
            return Geometry(), None
        if not holes:
            return read_mask(geometry, seqlen_q, seqlen_k)
    row = torch.arange(seqlen_q, device=mask.device)[:, None] + offset
    causal = torch.arange(seqlen_k, device=mask.device) <= row
    return None, (causal & padding[:, None, :])[:, None]


def explicit_mask(geometry, query, key, window=None):
    """bool (B or 1, 1, Nq, Nk) of a causal call; window: only the last so many keys of each row."""
    seqlen_q, seqlen_k, device = query.shape[2], key.shape[2], query.device
    batch = query.shape[0] if not geometry.whole else 1
    seqs = sequences(geometry, batch, seqlen_q, seqlen_k, device)
    row = torch.arange(seqlen_q, device=device) - seqs.q_start[:, None]
    col = torch.arange(seqlen_k, device=device) - seqs.kv_start[:, None]
    position = (row + seqs.q_offset[:, None])[..., None]  # [B, Nq, 1]
    exists = ((row >= 0) & (row < seqs.q_len[:, None]))[..., None]
    exists = exists & ((col >= 0) & (col < seqs.kv_len[:, None]))[:, None, :]
    visible = exists & (col[:, None, :] <= position)
    if window is not None:
        visible = visible & (col[:, None, :] > position - window)
    return visible[:, None]


def additive_mask(mask, dtype):
    """What eager attention functions add to the logits, as transformers makes it."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), device=mask.device, dtype=dtype)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def packed_mask(cu_seqlens_q, cu_seqlens_k, query, key):
    """bool (1, 1, Nq, Nk): causal, bottom right, inside each of the packed sequences."""
    row = torch.arange(query.shape[2], device=query.device)
    col = torch.arange(key.shape[2], device=query.device)
    seq_q = torch.searchsorted(cu_seqlens_q[1:].contiguous(), row, right=True)
    seq_k = torch.searchsorted(cu_seqlens_k[1:].contiguous(), col, right=True)
    last_q = cu_seqlens_q[(seq_q + 1).clamp(max=cu_seqlens_q.numel() - 1)]
    last_k = cu_seqlens_k[(seq_k + 1).clamp(max=cu_seqlens_k.numel() - 1)]
    same = seq_q[:, None] == seq_k
    return (same & (last_k - col >= (last_q - row)[:, None]))[None, None]
