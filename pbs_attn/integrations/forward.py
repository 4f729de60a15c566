# SPDX-License-Identifier: Apache-2.0
"""The attention function that transformers calls: which call runs where, with which mask.

Plain causal calls, padded ones and those on a static cache included, run the sparse kernels or,
when short, our exact kernel. Everything else keeps to transformers' own sdpa or, for soft-caps and
sinks, the model's own eager function, always with a mask: sdpa's `is_causal` stands at the top
left, while the queries of a cached prefix stand at the bottom right.
"""

import sys

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .. import env, prefill, routing, stats
from ..devices import kernel_lacks
from ..geometry import Geometry
from ..methods import Method
from . import masks

DENSE = "dense"  # policy of a layer that always takes the dense route


def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    policy,
    *,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    cache=None,
    **kwargs,
):
    """query (B, Hq, Nq, D), key and value (B, Hk, Nk, D) -> ((B, Nq, Hq, Dv) contiguous, None).

    policy: PBSConfig, Method or DENSE. kwargs: whatever else the model passes.
    """
    if cache is not None:
        raise NotImplementedError(
            "cache is a paged cache (continuous batching); allowed: attn_implementation='sdpa'"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    config = env.default_config() if policy == DENSE else policy
    geometry, mask = None, attention_mask
    if causal:
        geometry, mask = masks.read_mask(attention_mask, query.shape[2], key.shape[2])
    windowed = sliding_window is not None and key.shape[2] > sliding_window
    asked = {
        "sliding_window": windowed,
        "softcap": softcap is not None,
        "sinks": s_aux is not None,
        "position_bias": kwargs.get("position_bias") is not None,
        "block_indices": kwargs.get("block_indices") is not None,
        "cu_seqlens": kwargs.get("cu_seq_lens_q") is not None,
        "mask_4d": mask is not None,
        "dropout": dropout > 0.0,
    }
    reason = _reason(policy, causal, query, key, value, config, asked)
    special = not causal or any(asked.values()) or _wants_grad(query, key, value)
    if not special and (reason is None or _kernel_takes(query, key, value, geometry)):
        query, key, value = (_unit_stride(x) for x in (query, key, value))
        out, _, _ = prefill.attention(
            query,
            key,
            value,
            config,
            geometry,
            softmax_scale=scaling or 0.0,
            layer=getattr(module, "layer_idx", None),
            reason=reason,
        )
        return out.transpose(1, 2), None

    routing.fall_back(reason, config.strict, query.device)
    with stats.timed("dense", query.device):
        if causal and mask is None:
            window = sliding_window if windowed else None
            mask = _explicit_mask(geometry, query, key, window, kwargs)
        if asked["softcap"] or asked["sinks"]:
            extras = {"softcap": softcap, "s_aux": s_aux, **kwargs}
            out = _eager(module, query, key, value, mask, causal, dropout, scaling, extras)
        else:
            out = _sdpa(module, query, key, value, mask, causal, dropout, scaling, kwargs)
    stats.note("dense", reason, layer=getattr(module, "layer_idx", None))
    return out, None


def _reason(policy, causal, query, key, value, config, asked):
    """Why the call goes dense: by design first, then what no kernel does, then capability."""
    if policy == DENSE or env.current.disable:
        return "disabled"
    if isinstance(config, Method) and config.kind == "dense":
        return "asked"
    if not causal:
        return "non_causal"
    least = routing.min_lengths(config, query.device)
    if query.shape[2] < max(least.min_q, 2):  # one row: decode, whatever min_q says
        return "short_q"
    if key.shape[2] < least.min_kv:
        return "short_kv"
    found = next((reason for reason, is_asked in asked.items() if is_asked), None)
    return found or routing.reason_for_dense(query, key, value, config)


def _wants_grad(*tensors):
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _kernel_takes(query, key, value, geometry):
    """True if the dense route of a plain causal call is ours: more than one row, and either our
    own kernel or the rows of a prefix, which sdpa can only do with a mask of Nq x Nk."""
    if query.shape[2] == 1:
        return False
    plain = geometry.whole and query.shape[2] == key.shape[2]
    return not plain or kernel_lacks(query, key, value) is None


def _unit_stride(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _explicit_mask(geometry, query, key, window, kwargs):
    """The mask of a causal call; None where sdpa's own causal mask says the same."""
    cu_seqlens_q = kwargs.get("cu_seq_lens_q")
    special = window is not None or cu_seqlens_q is not None
    if geometry.whole and not special and query.shape[2] in (1, key.shape[2]):
        return None
    mask = masks.explicit_mask(geometry, query, key, window)
    if cu_seqlens_q is not None:
        cu_seqlens_k = kwargs.get("cu_seq_lens_k")
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        mask = mask & masks.packed_mask(cu_seqlens_q, cu_seqlens_k, query, key)
    return mask


def _sdpa(module, query, key, value, mask, causal, dropout, scaling, kwargs):
    """transformers' own sdpa; mask None, 4-D, or 2-D padding where the call is not causal."""
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :].bool()
    # 4.57 obeys an explicit is_causal for one row too, which would then see the first key only.
    causal = causal and mask is None and query.shape[2] > 1
    options = {"dropout": dropout, "scaling": scaling, "is_causal": causal, **kwargs}
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]


def _eager(module, query, key, value, mask, causal, dropout, scaling, kwargs):
    """The model's own eager attention: only it knows its soft-cap or sinks."""
    owners = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    eager = next((getattr(o, "eager_attention_forward", None) for o in owners if o), None)
    if eager is None:
        raise NotImplementedError(
            f"{type(module).__name__} asks for a soft-cap or sinks and its module has no "
            "eager_attention_forward; allowed: attn_implementation='eager' for this model"
        )
    if mask is None and causal and query.shape[2] > 1:  # eager functions know no is_causal
        mask = masks.explicit_mask(Geometry(), query, key)
    mask = masks.additive_mask(mask, query.dtype)
    options = {"dropout": dropout, "scaling": scaling, **kwargs}
    return eager(module, query, key, value, mask, **options)[0]
