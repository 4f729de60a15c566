# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks run on.

Gaussian q and k give every key the same share, so at tau 0.9 nearly every block is kept: such
inputs measure nothing that a language model does. `structured` is the opposite of that in three
strokes, each seen in real attention:

  first key   every query gives key 0 a large share (the attention sink)
  topics      the text is runs of 48..384 tokens, each run on one of 24 topics; a query looks for
              keys of its own topic, so mass lies in few, scattered runs
  heavy keys  1 key in 64 is looked at by all queries (the vertical lines of an attention map)

The strengths are chosen so that the default configuration's density falls with length roughly as
measured on a small language model (0.66 / 0.51 / 0.35 at 2K / 4K / 8K); the density that a run
really had stands in every row. `mask_of_density` forces a density instead.

`normal` is q, k, v without structure, for the dense end of the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOPICS = 24
SINK, TOPIC, HEAVY = 4.0, 13.0, 5.0  # logits above the noise, whose own logits have deviation 1
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    length: int
    heads: int = 8
    heads_k: int = 2
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} N={self.length} H={self.heads}/{self.heads_k} D={self.head_dim}"


def make(kind: str, shape: Shape, device=_CPU, seed: int = 0):
    """q (1, Hq, N, D), k and v (1, Hk, N, D) on `device`; kind: structured or normal."""
    q, k, v = {"structured": structured, "normal": normal}[kind](shape, device, seed)
    return tuple(t[None].to(shape.dtype).contiguous() for t in (q, k, v))


def _generators(device, seed: int):
    """For small draws and for large ones: the same on a CPU, the device's own elsewhere, which is
    quicker there by minutes at 128K. So a seed's inputs differ between kinds of device."""
    g = torch.Generator().manual_seed(seed)
    return g, g if device.type == "cpu" else torch.Generator(device).manual_seed(seed)


def normal(shape: Shape, device=_CPU, seed: int = 0):
    """No structure at all: nearly every block is kept, and the tensor cores draw most power."""
    _, large = _generators(device, seed)
    heads = (shape.heads, shape.heads_k, shape.heads_k)
    size = (shape.length, shape.head_dim)
    return tuple(torch.randn(h, *size, generator=large, device=device) for h in heads)


def structured(shape: Shape, device=_CPU, seed: int = 0):
    g, large = _generators(device, seed)
    n, d, group = shape.length, shape.head_dim, shape.heads // shape.heads_k
    directions = torch.linalg.qr(torch.randn(d, min(TOPICS + 2, d), generator=g))[0].T.to(device)
    sink, heavy, topics = directions[0], directions[1], directions[2:]

    def noise(heads: int) -> torch.Tensor:
        return torch.randn(heads, n, d, generator=large, device=device)

    k = noise(shape.heads_k)
    q = noise(shape.heads)
    unit = d**0.25  # q . k * d^-0.5 = strength, when both carry sqrt(strength) * unit
    for head in range(shape.heads_k):  # heads of one group share keys, so share the text's runs
        topic = _runs(n, len(topics), g).to(device)
        own = topics[topic] * TOPIC**0.5 * unit
        k[head] += own
        chosen = torch.randperm(n, generator=g)[: max(n // 64, 1)].to(device)
        k[head, chosen] += heavy * HEAVY**0.5 * unit
        k[head, 0] = sink * SINK**0.5 * unit
        rows = slice(head * group, (head + 1) * group)
        q[rows] += own + heavy * HEAVY**0.5 * unit + sink * SINK**0.5 * unit
    return q, k, noise(shape.heads_k)


def _runs(n: int, topics: int, g: torch.Generator) -> torch.Tensor:
    """Topic of every token: runs of 48..384 tokens."""
    lengths = torch.randint(48, 385, (n // 48 + 1,), generator=g)
    which = torch.randint(0, topics, (len(lengths),), generator=g)
    return torch.repeat_interleave(which, lengths)[:n]


def mask_of_density(
    shape: Shape, share: float, block: int, segment: int, device=_CPU, seed: int = 0
):
    """bool [1, Hq, T, T] of random history blocks, so that with the own span about `share` of the
    causal blocks are computed. The own span alone is more than that at short lengths.
    """
    _, g = _generators(device, seed)
    t = -(-shape.length // block)
    rows = torch.arange(t)
    history = rows * block // segment * segment // block  # key blocks before the own segment
    own = int((rows + 1 - history).sum())
    wanted = max(share * t * (t + 1) / 2 - own, 0.0) / max(int(history.sum()), 1)
    keep = torch.rand(1, shape.heads, t, t, generator=g, device=device) < wanted
    return keep & (torch.arange(t) < history[:, None]).to(device)
