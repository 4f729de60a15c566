# SPDX-License-Identifier: Apache-2.0
"""q, k, v as a real model makes them: one layer over the text that the package ships.

Any name that `python -m pbs_attn run --model` takes; the head counts and head_dim are the model's.
The length is the text's own if it is shorter than what was asked for.
"""

from __future__ import annotations

import functools

import torch

from pbs_attn.cli import measure, models

LAYER_SHARE = 1 / 3  # which layer: a third of the way up


@functools.lru_cache(maxsize=1)
def _load(name: str):
    return models.load(name, dtype="float32")


@functools.lru_cache(maxsize=1)
def _layer(name: str, length: int):
    model, tokenizer = _load(name)
    ids = models.token_ids(tokenizer, models.demo_text()[1], length)
    layer = int(model.config.get_text_config().num_hidden_layers * LAYER_SHARE)
    taken, _ = measure.capture(model, ids, {layer})
    return taken[layer]


def capture(name: str, length: int, dtype: torch.dtype):
    """q (1, Hq, N, D), k and v (1, Hk, N, D)."""
    return tuple(t.to(dtype).clone().contiguous() for t in _layer(name, length))
