# SPDX-License-Identifier: Apache-2.0
"""Inputs, exact attention over a token mask and its density, for tests of methods: all of N x N,
and loops where the code under test has none."""

import math

import numerics
import torch

from pbs_attn.methods import base

PAIR = 128


def inputs(num_q, num_k, heads=(2, 2), head_dim=16, dtype=torch.float32, seed=0, peak=1.0):
    """q [Hq, Nq, D], k and v [Hk, Nk, D]; peak > 1 makes attention less even."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda h, n: torch.randn(h, n, head_dim, generator=generator)  # noqa: E731
    q, k, v = draw(heads[0], num_q) * peak, draw(heads[1], num_k), draw(heads[1], num_k)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def call(q, k, v, layer=None):
    return base.Call(q, k, v, q.shape[-1] ** -0.5, layer)


def causal(num_q, num_k):
    """bool [Nq, Nk]"""
    return torch.arange(num_k) <= torch.arange(num_q)[:, None] + num_k - num_q


def attention(q, k, v, mask):
    """Softmax attention over mask bool [Hq, Nq, Nk] in the dtype of q; 0 in empty rows."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
    p = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return p.masked_fill(~mask, 0.0) @ v


def scores(q, k):
    """fp64 [Hq, Nq, Nk] scaled logits"""
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0).double()
    return (q.double() @ k.transpose(1, 2)) * q.shape[-1] ** -0.5


def assert_attention(actual, q, k, v, mask, what):
    """`actual` is attention over the mask, as exact as torch in the dtype of q."""
    assert actual.dtype == q.dtype, f"{what}: {actual.dtype}"
    exact = attention(q.double(), k.double(), v.double(), mask)
    numerics.assert_close(actual, exact, attention(q, k, v, mask), what=what)


def computed_pairs(mask, num_q, num_k):
    """fp64 [H]: sum over 128 x 128 pairs of the computed share of their visible cells."""
    seen, total = causal(num_q, num_k), torch.zeros(mask.shape[0], dtype=torch.float64)
    for i in range(0, num_q, PAIR):
        for j in range(0, num_k, PAIR):
            pair = seen[i : i + PAIR, j : j + PAIR]
            if pair.any():
                kept = mask[:, i : i + PAIR, j : j + PAIR] & pair
                total += kept.sum((1, 2)).double() / pair.sum()
    return total


def assert_pairs(actual, mask, num_q, num_k, what):
    expected = computed_pairs(mask, num_q, num_k)
    assert actual.dtype == torch.float64, f"{what}: {actual.dtype}"
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0, msg=lambda m: f"{what}: {m}")


def assert_devices_are_named(method, given):
    """No tensor is made on the default device: on a GPU it would be the wrong one."""

    def run():
        if method.kind == "token":
            return method.attention(given)
        blocks = method.blocks(given)
        return blocks, method.pairs(given, blocks)

    expected = run()
    with torch.device("meta"):
        actual = run()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
