# SPDX-License-Identifier: Apache-2.0
"""pbs_attention, attend and workspace_size: the calls people make."""

import torch

from . import _load, checks, dense, devices, env, methods
from .fakes import refuse_grad
from .geometry import Geometry, ceil_div, max_lengths
from .prefill import attention, write_rows
from .selection import BlockCSR, csr_to_bits, enum_id, mask_to_bits, num_words


def pbs_attention(
    q,
    k,
    v,
    *,
    config=None,
    softmax_scale=None,
    q_start=None,
    q_len=None,
    kv_start=None,
    kv_len=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    tau=None,
    permute_heads=None,
    layout="bhnd",
    out=None,
    return_lse=False,
    return_plan=False,
):
    """Causal attention that reads only the key blocks that matter (PBS-Attn, arXiv 2510.21270).

    Keys are ordered by importance inside segments, key blocks are scored against query blocks, and
    exact attention runs over the chosen blocks and each query block's own segments. Calls that the
    sparse kernels do not take, or that are too short to gain, run exact dense attention (see
    `supports`, `record`). Queries stand at the end of the keys: row i of q has position
    i + kv_len - q_len. Inference only.

    q             (B, Hq, Nq, D), or (B, Nq, Hq, D) with layout "bnhd", or (total, Hq, D) with
                  cu_seqlens; float32, bfloat16 or float16, any strides. A last dimension that is
                  not contiguous is copied once.
    k, v          the same with Hk heads and Nk rows; Hk divides Hq
    config        PBSConfig, or a method or its text ("flexprefill:gamma=0.9"; pbs_attn.methods);
                  default: PBS_ATTN_CONFIG, else PBSConfig()
    softmax_scale default D ** -0.5
    q_start, q_len, kv_start, kv_len
                  int32 or int64 [B]: where each sequence lies in its row of q and of k, v (left
                  and right padding, static caches). Rows outside give 0, keys outside are not read.
    cu_seqlens_q, cu_seqlens_k
                  int32 or int64 [B + 1]: cumulative lengths of packed sequences (keys default to
                  those of the queries)
    max_seqlen_q, max_seqlen_k
                  upper bounds of the lengths; the plan is sized by them. Packed sequences on a
                  GPU should name them: their lengths are not read there, as that would be a
                  synchronisation, and all of total is taken for the bound
    tau           number, or float [Hq] per query head; default config.tau
    permute_heads bool or int [Hp]: 0 leaves a head in natural order
    out           where to write, shaped as the result; rows outside the sequences are left alone
    return_lse    also return log-sum-exp, natural log, fp32: (B, Hq, Nq) or (Hq, total)
    return_plan   also return the Plan: what was selected

    Returns out in q's layout, a view of (B, Nq, Hq, D) memory [, lse] [, plan]. Rows without a
    visible key are 0 with lse -inf.

    Raises TypeError or ValueError that names the argument, its value and what is allowed;
    RuntimeError if an input requires grad; NotImplementedError in strict mode, and for an lse or a
    plan that a method has not.

    >>> import torch, pbs_attn
    >>> q = torch.randn(1, 8, 2048, 64)
    >>> k, v = torch.randn(2, 1, 2, 2048, 64)
    >>> out, plan = pbs_attn.pbs_attention(q, k, v, return_plan=True)
    >>> out.shape, plan.density().shape
    (torch.Size([1, 8, 2048, 64]), torch.Size([1, 8]))
    """
    config = _config(config)
    packed = cu_seqlens_q is not None
    q, k, v = checks.to_bhnd(q, k, v, layout, packed)
    refuse_grad("pbs_attention", (q, k, v, tau, out))
    vectors = (q_start, q_len, kv_start, kv_len)
    geometry = _geometry(q, k, vectors, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scale = checks.softmax_scale(softmax_scale)
    heads = None
    _check_options(config, tau=tau, permute_heads=permute_heads)
    if isinstance(tau, torch.Tensor):
        heads = checks.tau_heads(tau, q.shape[1], q.device)
    elif tau is not None:
        config = config.replace(tau=tau)
    if permute_heads is not None:
        size = q.shape[1] if config.gqa == "per_head" else k.shape[1]
        permute_heads = checks.head_vector(
            "permute_heads", permute_heads, size, q.device, torch.int32
        )
    target = None if out is None else checks.out_view(out, q, v, packed, layout)
    result, lse, plan = attention(
        q,
        k,
        v,
        config,
        geometry,
        softmax_scale=scale,
        tau_heads=heads,
        permute_heads=permute_heads,
        out=target,
        return_lse=return_lse,
        return_plan=return_plan,
    )
    result = _to_layout(result, layout, packed) if out is None else out
    lse = lse.squeeze(0) if packed and return_lse else lse
    extra = ((lse,) if return_lse else ()) + ((plan,) if return_plan else ())
    return (result, *extra) if extra else result


def attend(
    q,
    k,
    v,
    block_mask,
    *,
    block_q=128,
    block_k=128,
    softmax_scale=None,
    q_start=None,
    q_len=None,
    kv_start=None,
    kv_len=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    layout="bhnd",
    out=None,
    return_lse=False,
):
    """Exact causal attention over your own block mask: query block m reads key block n or not.

    Nothing is added to the mask: a row none of whose listed blocks holds a visible key gives 0 and
    lse -inf. Two calls over disjoint masks can be merged through their lse.

    block_mask    bool [B or 1, Hq or Hk or 1, Tq, Tk], or the same as an int32 bitmask
                  [..., ceil(Tk / 32)] (bit n % 32 of word n / 32), or a BlockCSR (whose values
                  are checked: on a GPU a synchronisation);
                  Tq = ceil(Nq / block_q), Tk = ceil(Nk / block_k), where Nq and Nk are
                  max_seqlen_* or the tensors' lengths
    block_q, block_k
                  rows and keys per block: 64, 128 or 256
    The other arguments, the result and the errors are those of `pbs_attention`. What the kernels do
    not take (head_dim, dtype, device, block sizes) is computed exactly through torch.

    >>> import torch, pbs_attn
    >>> q = torch.randn(1, 2, 512, 64)
    >>> mask = torch.eye(4, dtype=torch.bool).view(1, 1, 4, 4)  # own block only
    >>> pbs_attn.attend(q, q, q, mask).shape
    torch.Size([1, 2, 512, 64])
    """
    packed = cu_seqlens_q is not None
    q, k, v = checks.to_bhnd(q, k, v, layout, packed)
    refuse_grad("attend", (q, k, v, out))
    vectors = (q_start, q_len, kv_start, kv_len)
    geometry = _geometry(q, k, vectors, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scale = checks.softmax_scale(softmax_scale)
    bits, num_k_blocks = _mask_bits(block_mask, q, k, geometry, block_q, block_k)
    target = None if out is None else checks.out_view(out, q, v, packed, layout)
    result, lse = dense.selected(
        q, k, v, bits, num_k_blocks, geometry, scale, block_q, block_k, return_lse
    )
    result = write_rows(target, result, geometry)
    result = _to_layout(result, layout, packed) if out is None else out
    return (result, lse.squeeze(0) if packed else lse) if return_lse else result


def _mask_bits(block_mask, q, k, geometry, block_q, block_k):
    """(int32 [B, Hq or Hk, Tq, W], Tk) of any allowed form of a block mask."""
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            checks.fail(name, repr(size), "64, 128 or 256")
    max_q, max_k = max_lengths(geometry, q.shape[2], k.shape[2])
    tq, tk = ceil_div(max_q, block_q), ceil_div(max_k, block_k)
    if isinstance(block_mask, BlockCSR):
        bits, last = csr_to_bits(block_mask, tk), num_words(tk)
    elif not isinstance(block_mask, torch.Tensor):
        allowed = "a bool tensor, an int32 bitmask or a BlockCSR"
        checks.fail("block_mask", type(block_mask).__name__, allowed, TypeError)
    elif block_mask.dtype == torch.bool:
        bits, last = block_mask, tk
    elif block_mask.dtype == torch.int32:
        bits, last = block_mask, num_words(tk)
    else:
        checks.fail("block_mask", block_mask.dtype, "torch.bool or torch.int32", TypeError)
    if bits.device != q.device:
        checks.fail("block_mask", f"on {bits.device}", f"the device of q, {q.device}")
    num, heads = geometry.num_sequences(q.shape[0]), (1, k.shape[1], q.shape[1])
    shape = tuple(bits.shape)
    if (
        len(shape) != 4
        or shape[0] not in (1, num)
        or shape[1] not in heads
        or shape[2:] != (tq, last)
    ):
        allowed = f"[{num} or 1, {heads[2]} or {heads[1]} or 1, {tq}, {last}]"
        checks.fail("block_mask", f"of shape {shape}", allowed)
    bits = mask_to_bits(bits) if bits.dtype == torch.bool else bits
    heads_sel = k.shape[1] if shape[1] == 1 else shape[1]
    return bits.expand(num, heads_sel, -1, -1).contiguous(), tk


def workspace_size(q_shape, k_shape, dtype, config=None, num_threads=None, device="cpu"):
    """Bytes of scratch memory that a sparse `pbs_attention` takes while it runs.

    q_shape (B, Hq, Nq, D), k_shape (B, Hk, Nk, D); num_threads: of a CPU, default
    torch.get_num_threads(). Outputs are not counted. Raises NotImplementedError for what the
    kernels do not take and for a device whose library is not loaded.

    >>> import torch, pbs_attn
    >>> pbs_attn.workspace_size((1, 8, 8192, 64), (1, 2, 8192, 64), torch.bfloat16) > 0
    True
    """
    config = _config(config)
    if isinstance(config, methods.Method):
        if config.kind != "kernel":
            raise NotImplementedError(f"config is {config.text!r}, which is no kernel method")
        config = config.config_at(k_shape[2])
    for name, shape in (("q_shape", q_shape), ("k_shape", k_shape)):
        if len(shape) != 4:
            checks.fail(name, tuple(shape), "4 sizes (B, H, N, D)")
    device = torch.device(device)
    if device.type not in devices.DTYPES:
        checks.fail("device", device, "cpu or cuda", NotImplementedError)
    library = _load.of(device)
    dtypes = devices.DTYPES[device.type]
    if dtype not in dtypes:
        checks.fail("dtype", dtype, ", ".join(str(x) for x in dtypes), TypeError)
    batch, num_heads, seqlen_q, head_dim = q_shape
    return library.prefill_workspace_size(
        batch=batch,
        num_heads=num_heads,
        num_heads_k=k_shape[1],
        seqlen_q=seqlen_q,
        seqlen_k=k_shape[2],
        head_dim=head_dim,
        dtype=str(dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads() if num_threads is None else num_threads,
        block_size=config.block_size,
        segment_size=config.segment_size,
        gqa=enum_id("gqa", config.gqa),
        mode=enum_id("permute", config.permute),
        order=enum_id("order", config.order),
        method=enum_id("select", config.select),
        stride=config.stride,
        reduce=enum_id("reduce", config.reduce),
        rule=enum_id("rule", config.rule),
        correction=enum_id("correction", config.correction),
        normalize=enum_id("normalize", config.normalize),
    )


def _config(config):
    if config is None:
        return env.default_config()
    return methods.policy("config", config)


def _check_options(config, **options):
    """Raise for options of the kernels beside a method that has none, or sets them itself."""
    if not isinstance(config, methods.Method):
        return
    if config.kind == "kernel" and not config.BY_LENGTH:
        return
    for name, value in options.items():
        if value is not None:
            checks.fail(name, "given", f"None, as config is {config.text!r}")


def _geometry(q, k, vectors, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            checks.fail("cu_seqlens_q", None, "cumulative lengths, as cu_seqlens_k is given")
        if all(x is None for x in (*vectors, max_seqlen_q, max_seqlen_k)):
            return Geometry()
        return checks.make_geometry(q, k, vectors, max_seqlen_q, max_seqlen_k)
    if any(x is not None for x in vectors):
        checks.fail("q_start .. kv_len", "given", "None, as cu_seqlens_q is given")
    return checks.packed_geometry(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def _to_layout(out, layout, packed):
    """(B, H, N, D) over (B, N, H, D) memory to the caller's layout."""
    rows = out.transpose(1, 2)
    if packed:
        return rows.squeeze(0)
    return rows if layout == "bnhd" else out


def keep_workspace(nbytes):
    """Let calls on a CPU keep up to `nbytes` of scratch memory for the next one.

    One block in the process, of the size that the largest call under the limit took; the limit is
    256 MiB unless set. The layers of a model then work on pages that they have, where malloc would
    fetch new ones for each (a seventh of a call at 8,192 tokens). 0 keeps nothing. Memory kept so
    far is given back; returns its bytes. A GPU's memory is torch's own and not touched. Raises
    ValueError for anything but an integer of at least 0.

    >>> import pbs_attn
    >>> pbs_attn.keep_workspace(0) >= 0
    True
    >>> pbs_attn.keep_workspace(256 << 20)
    0
    """
    if not isinstance(nbytes, int) or nbytes < 0:
        checks.fail("nbytes", nbytes, "an integer of at least 0")
    return _load.C.keep_workspace(nbytes)
