# SPDX-License-Identifier: Apache-2.0
"""q, k, v as a real model makes them: one layer over the text that the package ships.

Any name that `python -m pbs_attn run --model` takes; the head counts and head_dim are the model's.
The length is the text's own if it is shorter than what was asked for.
"""

from __future__ import annotations

import functools

import torch

LAYER_SHARE = 1 / 3  # which layer: a third of the way up


class _Done(Exception):
    pass


@functools.lru_cache(maxsize=1)
def _load(name: str):
    from pbs_attn.cli import models

    return models.load(name, dtype="float32")


@functools.lru_cache(maxsize=2)
def _forward(name: str, length: int):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    from pbs_attn.cli import models

    model, tokenizer = _load(name)
    wanted = int(model.config.num_hidden_layers * LAYER_SHARE)
    taken = []

    def attention(module, query, key, value, mask, **options):
        if module.layer_idx == wanted:
            taken.extend((query.clone(), key.clone(), value.clone()))
            raise _Done
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("pbs_benchmark_capture", attention)
    AttentionMaskInterface.register("pbs_benchmark_capture", sdpa_mask)
    model.set_attn_implementation("pbs_benchmark_capture")
    ids = models.token_ids(tokenizer, models.demo_text()[1], length)
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    except _Done:
        return tuple(taken)
    raise RuntimeError(f"{name}: layer {wanted} never called the attention interface")


def capture(name: str, length: int, dtype: torch.dtype):
    """q (1, Hq, N, D), k and v (1, Hk, N, D)."""
    return tuple(t.to(dtype).contiguous() for t in _forward(name, length))
