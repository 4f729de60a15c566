# SPDX-License-Identifier: Apache-2.0
"""Dense causal attention: ours with every block, torch's, what else is installed, and yours.

Queries stand at the end of the keys: with fewer queries than keys the mask is aligned bottom right.
On a GPU, and for yours, a baseline is a row only if it runs and its last rows are right; otherwise
the reason goes to work.failures. On a CPU "dense" and "sdpa" are always there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.harness import Row

ROWS = 16  # last rows compared with the definition
BOUND = 0.05  # of the largest value: 16-bit kernels are off by 0.01, another mask by 0.5


def rows(work) -> list[Row]:
    limit = work.args.max_dense
    if work.device.kind == "cpu" and limit and work.shape.length > limit:
        work.failures["dense, sdpa"] = f"more than --max-dense {limit} tokens"
        return []
    makers = {"dense": lambda work: work.dense} | (
        {"sdpa": _sdpa} if work.device.kind == "cpu" else ON_GPU
    )
    trusted = set(makers) if work.device.kind == "cpu" else set()
    makers |= {name: yours(function) for name, function in map(load, work.args.baseline)}
    made = []
    for name, make in makers.items():
        call = make(work) if name in trusted else attempt(work, name, make)
        if call:
            # whole blocks on the diagonal, so that the rates compare
            row = Row(name, call, work.causal, 1.0, diagonal=work.diagonal, dense=True)
            made.append(row)
    return made


def attempt(work, name: str, make, error=None) -> Callable | None:
    """The call, run once and found right; else None, and why in work.failures.

    error(work, out): how far off, of the largest value."""
    error = error or error_of_last_rows
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # SDPA gives its reasons as warnings
        try:
            call = make(work)
            off = error(work, call())
        except Exception as raised:  # whatever a foreign kernel raises, the others are measured
            why = [f"{type(raised).__name__}: {raised}", *(str(w.message) for w in said)]
            work.failures[name] = " | ".join(line.strip().split("\n")[0] for line in why)[:400]
            return None
    if not off <= BOUND:
        work.failures[name] = f"wrong result: the last rows are off by {off:.3g} of the maximum"
        return None
    return call


def error_of_last_rows(work, out) -> float:
    """Largest difference to fp32 attention by the definition, over the largest value."""
    count, n = min(ROWS, work.q.shape[2]), work.k.shape[2]
    q, group = work.q[:, :, -count:].float(), work.q.shape[1] // work.k.shape[1]
    last = torch.arange(n - count, n, device=q.device)[:, None]
    future = torch.arange(n, device=q.device) > last
    worst = largest = 0.0
    for head in range(work.k.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        k, v = (t[:, head : head + 1].float() for t in (work.k, work.v))
        scores = q[:, heads] @ k.transpose(2, 3) * q.shape[3] ** -0.5
        right = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        off = (_first(out)[:, heads, -count:].float() - right).abs().max()
        # fmax would hide a NaN
        worst = max(worst, float(off)) if off == off else float("nan")
        largest = max(largest, float(right.abs().max()))
        if worst != worst:
            break
    return worst / largest


def _first(out):
    return out[0] if isinstance(out, (tuple, list)) else out


# ---- torch ------------------------------------------------------------------------------------
def _causal_sdpa(work, k, v, **options) -> Callable:
    q = work.q
    if q.shape[2] == k.shape[2]:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    # is_causal is aligned top left; only flash has a kernel for this
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(q.shape[2], k.shape[2])
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options)


def _sdpa(work) -> Callable:
    if work.q.shape[2] == work.k.shape[2]:
        return _causal_sdpa(work, work.k, work.v, enable_gqa=True)
    n, rows = work.k.shape[2], work.q.shape[2]
    mask = torch.ones(rows, n, dtype=torch.bool).tril(n - rows)
    q, k, v = work.q, work.k, work.v
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _torch(backend: str):
    """One backend of SDPA alone. Where it takes no grouped heads, K and V are copied beforehand."""

    def make(work) -> Callable:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        only = getattr(SDPBackend, backend)
        if only != SDPBackend.FLASH_ATTENTION and work.q.shape[2] != work.k.shape[2]:
            raise NotImplementedError("no causal mask aligned bottom right")

        def alone(call):
            def run():
                with sdpa_kernel(only):
                    return call()

            return run

        grouped = alone(_causal_sdpa(work, work.k, work.v, enable_gqa=True))
        try:
            grouped()
            return grouped
        except RuntimeError:
            group = work.q.shape[1] // work.k.shape[1]
            k, v = (t.repeat_interleave(group, 1) for t in (work.k, work.v))
            return alone(_causal_sdpa(work, k, v))

    return make


# ---- packages and files -----------------------------------------------------------------------
def _package(*modules: str):
    """flash_attn_func(q, k, v, causal=True) on (B, N, H, D), of the first module there is."""

    def make(work) -> Callable:
        missing = None
        for name in modules:
            try:
                function = importlib.import_module(name).flash_attn_func
                break
            except ModuleNotFoundError as error:
                missing = missing or error
        else:
            raise missing
        q, k, v = (t.transpose(1, 2) for t in (work.q, work.k, work.v))
        return lambda: _first(function(q, k, v, causal=True)).transpose(1, 2)

    return make


ON_GPU = {
    "sdpa flash": _torch("FLASH_ATTENTION"),
    "sdpa cudnn": _torch("CUDNN_ATTENTION"),
    "fa2": _package("flash_attn"),
    "fa3": _package("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
    "fa4": _package("flash_attn.cute"),
}


def load(spec: str) -> tuple[str, Callable]:
    """(name, function) of FILE.py:FUNCTION; SystemExit says what is wrong with it."""
    file, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        raise SystemExit(f"--baseline {spec}: allowed is FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise SystemExit(f"--baseline {spec}: no file {file}")
    described = importlib.util.spec_from_file_location(f"baseline_{Path(file).stem}", file)
    if described is None:
        raise SystemExit(f"--baseline {spec}: {file} is no Python file")
    module = importlib.util.module_from_spec(described)
    sys.modules[described.name] = module
    try:
        described.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:
        raise SystemExit(f"--baseline {spec}: {type(error).__name__}: {error}") from error
    return name, function


def yours(function: Callable):
    return lambda work: lambda: _first(function(work.q, work.k, work.v))
