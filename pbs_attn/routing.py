# SPDX-License-Identifier: Apache-2.0
"""Which calls run sparse. What the kernels do not do exactly goes to exact dense attention, is
counted with its reason, said once, and raises in strict mode."""

from typing import NamedTuple

import torch

from . import checks, devices, env, methods
from .methods import Method

# Every reason for the dense route, in the order in which they are looked for.
REASONS = {
    "disabled": "PBS_ATTN_DISABLE is set, or the layer is configured dense",
    "asked": "the method that was asked for is dense attention",
    "non_causal": "the call is not causal",
    "mask_4d": "a 4-D mask was given",
    "sliding_window": "a sliding window cuts keys off",
    "softcap": "logits are soft-capped",
    "sinks": "attention sinks are learned",
    "position_bias": "a position bias is added to the logits",
    "block_indices": "the model selects blocks itself",
    "cu_seqlens": "sequences are packed by the caller",
    "dropout": "dropout is on",
    "grad": "an input requires grad and there is no backward",
    "short_q": "fewer query rows than min_q",
    "short_kv": "fewer keys than min_kv",
    "tracing": "torch.jit.trace cannot follow what the method reads on the host",
    "device": "no sparse kernels run on the device",
    "dtype": "the dtype is not float32, bfloat16 or float16, or on a GPU not one of the last two",
    "head_dim": "head_dim is not a multiple of 8 up to 256",
    "head_dim_v": "values have another head_dim than keys",
    "alignment": "rows of q, k or v do not start on multiples of 16 bytes",
    "block_size": "block_size is not 64, 128 or 256",
    "segment_size": "segment_size is above 2048",
    "stride": "stride does not divide block_size",
}
# Reasons that are no lack of support: strict mode does not raise for them.
BY_DESIGN = ("disabled", "asked", "short_q", "short_kv")


class Lengths(NamedTuple):
    min_q: int
    min_kv: int


# Below these lengths the sparse call is the dense call: speed, never correctness. By family of
# device (devices.family: "cpu", "cuda:8.0", "cuda:9.0", ...). On one Zen 3 core (8 query heads, 2
# key heads, tau 0.9, fp32 D 64 and bf16 D 128) a one-shot prefill breaks even near 2,048 keys; a
# chunk over 4,096 or 8,192 keys needs 1,024 to 2,048 rows to pay for ordering and packing them.
MIN_LENGTHS = {"cpu": Lengths(1024, 2048)}
# No GPU is measured yet. This is on the safe side of what the paper reports (slower than dense at
# 8K, faster from 16K on); tools/gpu_check.sh prints a GPU's own line for the table.
MIN_LENGTHS_ELSEWHERE = Lengths(2048, 16384)

_said = set()


class Decision(NamedTuple):
    route: str  # "pbs" or "dense"
    reason: str | None = None  # why dense


def min_lengths(config, device):
    """The config's min_q and min_kv, or the measured defaults of the device."""
    default = MIN_LENGTHS.get(devices.family(device), MIN_LENGTHS_ELSEWHERE)
    return Lengths(
        default.min_q if config.min_q is None else config.min_q,
        default.min_kv if config.min_kv is None else config.min_kv,
    )


def reason_for_dense(q, k, v, config, seqlen_q=None, seqlen_k=None):
    """First reason why a causal (B, H, N, D) call should not run sparse, or None.

    config: PBSConfig or Method. seqlen_q, seqlen_k: the longest sequence, if shorter than the
    tensors."""
    if env.current.disable:
        return "disabled"
    if isinstance(config, Method) and config.kind == "dense":
        return "asked"
    seqlen_q, seqlen_k = seqlen_q or q.shape[2], seqlen_k or k.shape[2]
    if isinstance(config, Method) and config.kind == "kernel":
        config = config.config_at(seqlen_k)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "grad"
    least = min_lengths(config, q.device)
    if seqlen_q < least.min_q:
        return "short_q"
    if seqlen_k < least.min_kv:
        return "short_kv"
    if isinstance(config, Method):  # torch takes any tensor, and so does attention under a mask
        return "tracing" if torch.jit.is_tracing() else None
    if env.current.backend != "ref":
        lack = devices.kernel_lacks(q, k, v)
        if lack is not None:
            return lack
        if config.block_size not in devices.BLOCK_SIZES:
            return "block_size"
        if config.segment_size > devices.MAX_SEGMENT_SIZE:
            return "segment_size"
    elif v.shape[3] != q.shape[3]:
        return "head_dim_v"
    return None


def decide(q, k, v, config, seqlen_q=None, seqlen_k=None):
    """The route of a causal (B, H, N, D) call."""
    reason = reason_for_dense(q, k, v, config, seqlen_q, seqlen_k)
    return Decision("pbs") if reason is None else Decision("dense", reason)


def fall_back(reason, strict=False, device=None):
    """Say once that calls go dense for `reason`; in strict mode raise, unless it is by design.

    device: of the call, so that the reason "device" can say what is wrong with it."""
    if reason not in BY_DESIGN and (strict or env.current.strict):
        raise NotImplementedError(
            f"strict mode: no sparse kernel for this call, reason {reason}: "
            f"{_explain(reason, device)}"
        )
    if torch.compiler.is_compiling() or reason in _said:
        return
    _said.add(reason)
    say = env.logger.debug if reason in BY_DESIGN else env.logger.warning
    text = _explain(reason, device)
    say("dense attention from here on for calls with reason %s: %s", reason, text)


def _explain(reason, device):
    detail = devices.refusal(device) if reason == "device" and device is not None else None
    return REASONS[reason] if detail is None else f"{REASONS[reason]} {device}: {detail}"


def supports(
    q,
    k,
    v,
    config=None,
    *,
    layout="bhnd",
    is_causal=True,
    attn_mask=None,
    sliding_window=None,
    softcap=None,
    sinks=None,
    block_indices=None,
    dropout=0.0,
):
    """Why a call would take the dense route: a word of `routing.REASONS`, or None for sparse.

    q, k, v as for `pbs_attention`; the keyword arguments describe what else the caller's attention
    asks for. attn_mask: a 4-D mask goes dense, 2-D padding does not. Raises ValueError or TypeError
    where `pbs_attention` would.

    >>> import torch, pbs_attn
    >>> q = torch.randn(1, 2, 4096, 64)
    >>> pbs_attn.supports(q, q, q) is None
    True
    >>> pbs_attn.supports(q[:, :, :1], q, q)
    'short_q'
    """
    config = env.default_config() if config is None else methods.policy("config", config)
    q, k, v = checks.to_bhnd(q, k, v, layout, packed=False)
    if env.current.disable:
        return "disabled"
    if isinstance(config, Method) and config.kind == "dense":
        return "asked"
    asked = {
        "non_causal": not is_causal,
        "mask_4d": attn_mask is not None and attn_mask.ndim == 4,
        "sliding_window": sliding_window is not None and k.shape[2] > sliding_window,
        "softcap": softcap is not None,
        "sinks": sinks is not None,
        "block_indices": block_indices is not None,
        "dropout": dropout > 0.0,
    }
    found = next((reason for reason, is_asked in asked.items() if is_asked), None)
    return found or reason_for_dense(q, k, v, config)
