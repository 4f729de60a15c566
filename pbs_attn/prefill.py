# SPDX-License-Identifier: Apache-2.0
"""One attention call below `pbs_attention` and the integrations: routed, run, counted."""

import math

import torch

from . import dense, devices, env, methods, ops, routing, stats
from .geometry import ceil_div, max_lengths, sequences
from .methods import Method
from .plan import Plan, dense_plan
from .selection import mask_to_bits


def attention(
    q,
    k,
    v,
    config,
    geometry,
    *,
    softmax_scale=0.0,
    tau_heads=None,
    permute_heads=None,
    out=None,
    return_lse=False,
    return_plan=False,
    layer=None,
    reason=None,
):
    """Checked (B, H, N, D) tensors to (out over (B, Nq, Hq, D) memory, lse or None, Plan or None).

    config: PBSConfig or Method. out: (B, Nq, Hq, D) to write to. layer: for `record` and for
    methods that differ by layer. reason: forces the dense route. Raises NotImplementedError for an
    lse or a plan that the method has not."""
    longest = max_lengths(geometry, q.shape[2], k.shape[2])
    if reason is None:
        reason = routing.decide(q, k, v, config, *longest).reason
    method = config if isinstance(config, Method) else None
    if method is not None:
        _check_wishes(method, return_lse, return_plan)
        if method.kind == "kernel":
            config = method.config_at(longest[1])
            if tau_heads is None and reason is None:
                tau_heads = method.tau_heads(layer, q.shape[1], q.device)
        elif reason is None:
            run = by_method
            if torch.compiler.is_compiling():
                from .tracing import by_method as run
            return run(q, k, v, method, geometry, softmax_scale, layer, out, return_lse)
    plan = seqs = None
    if return_plan or stats.recording():
        seqs = sequences(geometry, q.shape[0], q.shape[2], k.shape[2], q.device)
    if reason is not None:
        routing.fall_back(reason, config.strict, q.device)
        with stats.timed("dense", q.device):
            backend = env.current.backend
            result, lse = dense.attention(q, k, v, geometry, softmax_scale, return_lse, backend)
            result = write_rows(out, result, geometry)
        if return_plan:
            num_perms = q.shape[1] if config.gqa == "per_head" else k.shape[1]
            plan = dense_plan(seqs, q.shape[1], num_perms, *longest, config)
        stats.note("dense", reason)
        return result, lse, plan
    in_pairs = seqs is not None and method is not None and config.block_size != methods.PAIR
    run = _prefill_reference if env.current.backend == "ref" else _prefill
    with stats.timed("pbs", q.device):
        result, lse, count, bits, k_perm = run(
            q,
            k,
            v,
            config,
            geometry,
            softmax_scale,
            tau_heads,
            permute_heads,
            out,
            return_lse,
            return_plan or in_pairs,
        )
    if return_plan or in_pairs:
        plan = Plan(bits, count, k_perm, seqs, ceil_div(longest[1], config.block_size), config)
    if in_pairs and stats.recording():
        stats.note("pbs", layer=layer, blocks=methods.plan_pairs(plan, q, k, v, geometry))
    else:
        stats.note("pbs", layer=layer, selection=None if seqs is None else (count, seqs, config))
    return result, lse, plan if return_plan else None


def _check_wishes(method, return_lse, return_plan):
    """Raise for what only kernels, or only methods of blocks, can give."""
    if return_plan and method.kind != "kernel":
        raise NotImplementedError(
            f"return_plan is True, and {method.NAME} is a {method.kind} method, which has no plan; "
            "allowed: False, or a PBSConfig or kernel method"
        )
    if return_lse and method.kind == "token":
        raise NotImplementedError(
            f"return_lse is True, and {method.NAME} is a token method, which has no lse; "
            "allowed: False, or a kernel or block method"
        )


def by_method(q, k, v, method, geometry, softmax_scale, layer, out, return_lse):
    """The sparse route of a block or token method; torch.compile breaks its graph around it."""
    with stats.timed("pbs", q.device):
        result, lse, (computed, causal) = methods.run(
            method, q, k, v, geometry, softmax_scale, layer, return_lse
        )
        result = write_rows(out, result, geometry)
    stats.note("pbs", layer=layer, blocks=(computed, computed, causal))
    return result, lse, None


def _prefill(
    q, k, v, config, geometry, softmax_scale, tau_heads, permute_heads, out, return_lse, return_plan
):
    options = {
        "geometry": geometry,
        "softmax_scale": softmax_scale,
        "tau_heads": tau_heads,
        "permute_heads": permute_heads,
    }
    direct = out is not None and (devices.kind(q.device) == "cpu" or devices.aligned(out))
    if direct and not return_plan and not stats.recording():
        lse = None
        if return_lse:
            lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
        ops.prefill_out(q, k, v, config, out, lse, **options)
        return out.transpose(1, 2), lse, None, None, None
    result, lse, *plan = ops.prefill(
        q, k, v, config, return_lse=return_lse, return_plan=return_plan, **options
    )
    return write_rows(out, result, geometry), lse if return_lse else None, *plan


def _prefill_reference(
    q, k, v, config, geometry, softmax_scale, tau_heads, permute_heads, out, return_lse, return_plan
):
    """PBS_ATTN_BACKEND=ref: the same through reference.py, slowly."""
    from . import reference

    options = config.to_dict()
    if tau_heads is not None:
        options["tau"] = tau_heads
    options |= geometry._asdict()
    for name in ("min_q", "min_kv", "strict", "max_seqlen_q", "max_seqlen_k"):
        del options[name]
    device = q.device
    q, k, v, permute_heads, *rest = _on_cpu(q, k, v, permute_heads, *options.values())
    options = dict(zip(options, rest, strict=True))
    result, lse, plans = reference.prefill_batch(
        q, k, v, softmax_scale=softmax_scale, permute_heads=permute_heads, **options
    )
    max_q, max_k = max_lengths(geometry, q.shape[2], k.shape[2])
    tq, tk = ceil_div(max_q, config.block_size), ceil_div(max_k, config.block_size)
    num_perms = q.shape[1] if config.gqa == "per_head" else k.shape[1]
    mask = torch.zeros(len(plans), q.shape[1], tq, tk, dtype=torch.bool)
    k_perm = torch.arange(max_k, dtype=torch.int32).repeat(len(plans), num_perms, 1)
    for b, plan in enumerate(plans):
        chosen = plan.selection.bits
        mask[b, :, : chosen.shape[1], : chosen.shape[2]] = chosen
        k_perm[b, :, : plan.k_perm.shape[1]] = plan.k_perm.to(torch.int32)
    result = result.to(device).transpose(1, 2).contiguous().transpose(1, 2)
    lse = lse.float().to(device) if return_lse else None
    plan = (mask.sum(-1).to(torch.int32), mask_to_bits(mask), k_perm)
    return write_rows(out, result, geometry), lse, *(x.to(device) for x in plan)


def _on_cpu(*values):
    return [x.cpu() if isinstance(x, torch.Tensor) else x for x in values]


def write_rows(out, result, geometry):
    """result (B, H, N, D), written to out (B, N, H, D) if there is one, rows of sequences only."""
    if out is None:
        return result
    rows = result.transpose(1, 2)
    if not geometry.whole:
        batch, seqlen_q = rows.shape[:2]
        seqs = sequences(geometry, batch, seqlen_q, 0, rows.device)
        row = torch.arange(seqlen_q, device=rows.device) - seqs.q_start[:, None]
        live = (row >= 0) & (row < seqs.q_len[:, None])
        live = live if live.shape[0] == batch else live.any(0, keepdim=True)
        rows = torch.where(live[:, :, None, None], rows, out)
    out.copy_(rows)
    return out.transpose(1, 2)
