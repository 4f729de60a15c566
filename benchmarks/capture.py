# SPDX-License-Identifier: Apache-2.0
"""q, k, v as a real model makes them: one layer over the shipped text, or over yours.

Any name that `python -m pbs_attn run --model` takes; the head counts and head_dim are the model's.
The length is the text's own if it is shorter than what was asked for. What was captured can be kept
in a file and measured on another machine: a prefix of it is what the model makes of a prefix of the
text, so one file serves every length.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

LAYER_SHARE = 1 / 3  # which layer: a third of the way up
SUFFIX = ".safetensors"
_CPU = torch.device("cpu")


@functools.lru_cache(maxsize=1)
def _load(name: str, device: torch.device):
    from pbs_attn.cli import models

    # fp32 where it is affordable; a GPU's model is as long as its prompt, so in its own dtype
    dtype = "float32" if device.type == "cpu" else "auto"
    return models.load(name, dtype=dtype, device=str(device))


@functools.lru_cache(maxsize=1)
def _layer(name: str, text: str | None, length: int, device: torch.device):
    from pbs_attn.cli import measure, models

    model, tokenizer = _load(name, device)
    model = model.to(device)
    ids = models.token_ids(tokenizer, models.read_text(text)[1], length).to(device)
    layer = int(model.config.get_text_config().num_hidden_layers * LAYER_SHARE)
    taken, _ = measure.capture(model, ids, {layer})
    return taken[layer], layer


@functools.lru_cache(maxsize=1)
def _file(path: str):
    from safetensors.torch import load_file

    try:
        saved = load_file(path)
        return tuple(saved[name] for name in "qkv")
    except (OSError, KeyError) as error:
        raise SystemExit(f"--capture {path}: {error}") from None


def capture(
    source: str, length: int, dtype: torch.dtype, device: torch.device = _CPU, longest: int = 0
):
    """q (1, Hq, N, D), k and v (1, Hk, N, D) on `device`. source: MODEL[,TEXT], or a saved file.

    longest: of all lengths that will be asked for; the model reads so much, once."""
    if source.endswith(SUFFIX):
        taken = tuple(t[:, :, :length] for t in _file(source))
    else:
        name, _, text = source.partition(",")
        whole = _layer(name, text or None, max(length, longest), device)[0]
        taken = tuple(t[:, :, :length] for t in whole)
    return tuple(t.to(device, dtype, copy=True).contiguous() for t in taken)


def save(source: str, length: int, path: Path, device: torch.device = _CPU) -> str:
    """What `capture` would give, as bf16, for another machine; a line about it."""
    from safetensors.torch import save_file

    if source.endswith(SUFFIX):
        raise SystemExit(f"--save-capture: --capture {source} is saved already")
    q, k, v = capture(source, length, torch.bfloat16, device)
    name, _, text = source.partition(",")
    layer = _layer(name, text or None, length, device)[1]
    about = {"model": name, "text": text or "shipped", "layer": str(layer)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.cpu() for n, t in zip("qkv", (q, k, v), strict=True)}, path, metadata=about)
    return f"saved {path}: q {tuple(q.shape)}, k and v {tuple(k.shape)}, layer {layer} of {name}"
