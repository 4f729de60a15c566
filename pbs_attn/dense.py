# SPDX-License-Identifier: Apache-2.0
"""The dense route: exact attention for whatever the sparse kernels do not do.

It is the fastest exact kernel there is for a call. On CPUs that is our own `attend` with every
block; torch's SDPA takes calls of a single row and what our kernels lack. On GPUs it is SDPA's
flash or cuDNN kernel wherever one of them says what the call means, which is without padding and
without lse, and then our `attend`. A mask handed to SDPA is always built from the geometry: SDPA's
own `is_causal` is aligned to the top left and would be wrong for every cached prefix.
"""

import math

import torch
import torch.nn.functional as F

from . import devices, ops
from .devices import BLOCK_SIZES, kernel_lacks
from .geometry import selected_mask, sequences, visible_mask
from .selection import bits_to_mask

# Decoding reads K and V once and SDPA does that as well; from 2 rows on our kernel was the faster
# one (one Zen 3 core, 2,048 to 8,192 keys, fp32 and bf16).
MIN_ROWS = 2
# Rows of q per SDPA call: bounds the mask and the scores at a slice of N x N.
CHUNK = 1024
CELLS = 2**24  # scores held at a time where torch computes the correction, all heads together
# With other dtypes SDPA may hold all of N x N on a GPU.
FLASH_DTYPES = (torch.float16, torch.bfloat16)


def attention(q, k, v, geometry, softmax_scale=0.0, return_lse=False, backend="auto"):
    """Exact causal attention on (B, H, N, D): (out over (B, N, H, D) memory, lse or None)."""
    if devices.kind(q.device) == "cuda" and geometry.whole and not return_lse:
        out = _flash(q, k, v, softmax_scale or None)
        if out is not None:
            return out, None
    if q.shape[2] >= MIN_ROWS and backend != "ref" and kernel_lacks(q, k, v) is None:
        out, lse = ops.attend(
            q,
            k,
            v,
            geometry=geometry,
            softmax_scale=softmax_scale,
            own="all",
            return_lse=return_lse,
        )
        return out, lse if return_lse else None
    return torch_attention(q, k, v, geometry, softmax_scale, return_lse)


def _flash(q, k, v, scale):
    """SDPA on a call that fills its tensors, or None where it has no fused kernel for it."""
    seqlen_q, seqlen_k, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if q.dtype not in FLASH_DTYPES or not q.shape[3] == v.shape[3] <= devices.MAX_HEAD_DIM:
        return None
    if q.numel() == 0 or not 1 <= seqlen_q <= seqlen_k:
        return None
    q, k, v = (x if devices.aligned(x) else x.contiguous() for x in (q, k, v))
    options = {"scale": scale, "enable_gqa": grouped}
    if seqlen_q == seqlen_k or seqlen_q == 1:  # one row sees every key: no mask at all
        out = F.scaled_dot_product_attention(q, k, v, is_causal=seqlen_q > 1, **options)
    elif not torch.compiler.is_compiling() and _flash_aligns_right(q, k, v, grouped):
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(seqlen_q, seqlen_k)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    else:
        return None
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _flash_aligns_right(q, k, v, grouped):
    """True if torch would run `causal_lower_right` by its flash kernel, which needs no mask."""
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    return can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, grouped))


def selected(
    q,
    k,
    v,
    bits,
    num_k_blocks,
    geometry,
    softmax_scale,
    block_q,
    block_k,
    return_lse,
    correction="none",
):
    """Exact causal attention over a bitmask alone, [B, Hq or Hk, Tq, W]: (out, lse or None).

    correction="mean" adds a token for every key block that all rows of the query block see and
    that is not in the mask: its means in the dtype of k, its logit raised by ln(block_k)."""
    if kernel_lacks(q, k, v) is None and block_q in BLOCK_SIZES and block_k in BLOCK_SIZES:
        out, lse = ops.attend(
            q,
            k,
            v,
            bits,
            geometry=geometry,
            softmax_scale=softmax_scale,
            block_q=block_q,
            block_k=block_k,
            own="mask",
            correction=correction,
            return_lse=return_lse,
        )
        return out, lse if return_lse else None
    mask = bits_to_mask(bits, num_k_blocks)
    mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    if correction == "mean":
        return corrected(q, k, v, geometry, softmax_scale, return_lse, mask, block_q, block_k)
    return torch_attention(q, k, v, geometry, softmax_scale, return_lse, mask, block_q, block_k)


def torch_attention(
    q, k, v, geometry, softmax_scale=0.0, return_lse=False, block_mask=None, block_q=0, block_k=0
):
    """The same through torch alone; block_mask bool [B, H, Tq, Tk] further restricts what is read.

    Rows outside the sequences and rows without a visible key: 0 and -inf. Values of keys outside
    the sequences never reach a result, NaN included.
    """
    batch, num_heads, seqlen_q, head_dim = q.shape
    seqlen_k, scale = k.shape[2], softmax_scale or head_dim**-0.5 if head_dim else 1.0
    out = q.new_zeros(batch, seqlen_q, num_heads, v.shape[3])
    lse = None
    if return_lse:
        lse = q.new_full((batch, num_heads, seqlen_q), -math.inf, dtype=_accumulate(q.dtype))
    if out.numel() == 0 or seqlen_k == 0:
        return out.transpose(1, 2), lse
    seqs = sequences(geometry, batch, seqlen_q, seqlen_k, q.device)
    if not geometry.whole:
        k, v = (_without_padding(x, seqs, batch) for x in (k, v))
    for begin in range(0, seqlen_q, CHUNK):
        rows = torch.arange(begin, min(begin + CHUNK, seqlen_q), device=q.device)
        if block_mask is None:
            mask = visible_mask(seqs, batch, rows, seqlen_k)[:, None]
        else:
            mask = selected_mask(seqs, batch, rows, seqlen_k, block_mask, block_q, block_k)
        q_rows = q[:, :, begin : begin + CHUNK]
        part = F.scaled_dot_product_attention(
            q_rows, k, v, attn_mask=mask, scale=scale, enable_gqa=num_heads != k.shape[1]
        )
        empty = ~mask.any(-1, keepdim=True)
        out[:, begin : begin + CHUNK] = part.masked_fill(empty, 0.0).transpose(1, 2)
        if return_lse:
            scores = _scores(q_rows, k, scale).masked_fill(~mask, -math.inf)
            lse[:, :, begin : begin + CHUNK] = scores.logsumexp(-1)
    return out.transpose(1, 2), lse


def corrected(q, k, v, geometry, softmax_scale, return_lse, block_mask, block_q, block_k):
    """`torch_attention` over block_mask with the mean correction, of whole sequences.

    Strip by strip of rows: the means stand behind the keys as more of them. Scores, softmax and
    its product are fp32 or wider."""
    if not geometry.whole:
        raise NotImplementedError(
            "correction is 'mean' for padded or packed sequences that torch computes; allowed: "
            "'none', or sequences that fill their rows"
        )
    (batch, num_heads, seqlen_q, head_dim), seqlen_k = q.shape, k.shape[2]
    scale, wide = softmax_scale or head_dim**-0.5, _accumulate(q.dtype)
    out = q.new_zeros(batch, seqlen_q, num_heads, v.shape[3])
    lse = q.new_full((batch, num_heads, seqlen_q), -math.inf, dtype=wide)
    seqs = sequences(geometry, batch, seqlen_q, seqlen_k, q.device)
    dropped = _dropped(block_mask, seqlen_q, seqlen_k, block_q, block_k)
    k, v = (_with_means(x, block_k).to(wide) for x in (k, v))
    step = min(max(CELLS // max(batch * num_heads * k.shape[2], 1), 1), CHUNK)
    for begin in range(0, seqlen_q, step):
        rows = torch.arange(begin, min(begin + step, seqlen_q), device=q.device)
        mask = selected_mask(seqs, batch, rows, seqlen_k, block_mask, block_q, block_k)
        mask = torch.cat([mask, dropped[:, :, rows // block_q]], 3)
        scores = _scores(q[:, :, begin : begin + step], k, scale)
        scores[..., seqlen_k:] += math.log(block_k)
        scores = scores.masked_fill_(~mask, -math.inf)
        lse[:, :, begin : begin + step] = scores.logsumexp(3)
        weight = scores.softmax(3).masked_fill_(~mask, 0.0)
        out[:, begin : begin + step] = _by_key_head(weight, v).transpose(1, 2).to(out.dtype)
    return out.transpose(1, 2), lse if return_lse else None


def _dropped(block_mask, seqlen_q, seqlen_k, block_q, block_k):
    """bool [B, H, Tq, whole key blocks]: those that all rows see and that are not in the mask."""
    num_q, num_k = block_mask.shape[2], seqlen_k // block_k
    first = torch.arange(num_q, device=block_mask.device) * block_q + seqlen_k - seqlen_q
    history = (first + 1).clamp(min=0) // block_k
    seen = torch.arange(num_k, device=block_mask.device) < history[:, None]
    return seen & ~block_mask[..., :num_k]


def _with_means(x, block_k):
    """[B, H, N, D] -> [B, H, N + whole blocks, D]: the means of its blocks behind x, rounded."""
    whole = x.shape[2] // block_k
    means = x[:, :, : whole * block_k].unflatten(2, (whole, block_k))
    return torch.cat([x, means.mean(3, dtype=_accumulate(x.dtype)).to(x.dtype)], 2)


def _accumulate(dtype):
    return torch.promote_types(dtype, torch.float32)


def _scores(q, k, scale):
    wide = _accumulate(q.dtype)
    return scale * _by_key_head(q.to(wide), k.to(wide).transpose(2, 3))


def _by_key_head(x, y):
    """x [B, Hq, R, n] times y [B, Hk, n, m] of its key head, which is not repeated."""
    stacked = x.unflatten(1, (y.shape[1], -1)).flatten(2, 3)
    return (stacked @ y).view(*x.shape[:3], y.shape[3])


def _without_padding(x, seqs, batch):
    """x with keys outside every sequence set to 0: a masked NaN would still poison a product."""
    key = torch.arange(x.shape[2], device=x.device) - seqs.kv_start[:, None]
    seen = (key >= 0) & (key < seqs.kv_len[:, None])
    seen = seen if seen.shape[0] == batch else seen.any(0, keepdim=True)
    return x.masked_fill(~seen[:, None, :, None], 0.0)
