# SPDX-License-Identifier: Apache-2.0
"""recipe=authors: the masks that the authors' own code gave, exactly, and the rule in loops."""

import block_methods as brute
import cases
import golden_files
import pytest
import torch
from numerics import assert_same_blocks

from pbs_attn import methods
from pbs_attn.methods import authors

GOLDEN = golden_files.load_all()
D = 16
SHAPES = [(n, n) for n in (1, 127, 128, 129, 255, 256, 257, 701)]
CHUNKS = [(256, 640), (200, 701), (1, 400), (300, 250)]
shapes = pytest.mark.parametrize("shape", SHAPES + CHUNKS, ids=lambda s: f"{s[0]}x{s[1]}")


def call_of(shape, heads=(3, 1), seed=0, dtype=torch.float64):
    inputs = cases.make_inputs(seed, heads, *shape, head_dim=D, dtype=dtype)
    return methods.Call(*(x[0] for x in inputs), D**-0.5)


def heads_of(call):
    return [brute.Head(call.q[h], call.k[h // call.group], call.scale) for h in range(len(call.q))]


@pytest.mark.parametrize("name, key", [("meanpool", "meanpool"), ("xattention", "xattn")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label", GOLDEN)
def test_golden(label, name, key, dtype):
    q, k, v = GOLDEN[label].inputs(dtype)
    method = methods.get(f"{name}:recipe=authors")
    blocks = method.blocks(methods.Call(q, k, v, q.shape[-1] ** -0.5))
    assert_same_blocks(blocks, GOLDEN[label][f"orig.{key}.tau9"], what=f"{method.text} {label}")


@pytest.mark.parametrize("label", GOLDEN)
def test_golden_scores(label):
    q, k, v = GOLDEN[label].inputs(torch.float32)
    mass = authors.antidiagonal_mass(methods.Call(q, k, v, q.shape[-1] ** -0.5), 128, 8)
    # Rows of them sum to 16 groups, and either side is fp32.
    torch.testing.assert_close(mass, GOLDEN[label]["orig.xattn_scores"], rtol=0, atol=2e-5)


def test_golden_tells_the_recipes_apart():
    """In some shipped file the authors' rule and ours give different masks, of either method."""
    shipped = [golden for label, golden in GOLDEN.items() if label.startswith("cut-")]
    for ours, theirs in (("meanpool", "meanpool"), ("xattn.final", "xattn")):
        assert any(
            not torch.equal(golden[f"spec.{ours}.tau9"], golden[f"orig.{theirs}.tau9"])
            for golden in shipped
        )


@shapes
def test_mean_pool(shape):
    call = call_of(shape, ((2, 2), (3, 1), (4, 1))[sum(shape) % 3])
    for size in (64, 128):
        for tau in (0.1, 0.5, 0.9, 0.99):
            exact = [brute.authors_mean_pool(head, size, tau) for head in heads_of(call)]
            method = methods.get(f"meanpool:recipe=authors,tau={tau},block={size}")
            blocks = method.blocks(call)
            assert_same_blocks(blocks, torch.stack(exact), what=f"{method.text} {shape}")


@shapes
def test_xattention(shape):
    call, size, stride = call_of(shape, (2, 1), seed=1), 64, (4, 8, 16)[sum(shape) % 3]
    masses = [brute.antidiagonal_mass(head, size, stride) for head in heads_of(call)]
    for tau in (0.0, 0.5, 0.9, 0.97):
        exact = [
            brute.authors_xattention(head, size, tau, mass, first_chunk=2048)
            for head, mass in zip(heads_of(call), masses, strict=True)
        ]
        method = methods.get(f"xattention:recipe=authors,tau={tau},block={size},stride={stride}")
        assert_same_blocks(method.blocks(call), torch.stack(exact), what=f"{method.text} {shape}")


def test_xattention_beyond_the_first_chunk(monkeypatch):
    """Rows of later chunks count block 0 and the own block in front and stop in time."""
    monkeypatch.setattr(authors, "_first_chunk", lambda seqlen_k: 256)
    call = call_of((701, 701), (2, 1), seed=2)
    masses = [brute.antidiagonal_mass(head, 64, 8) for head in heads_of(call)]
    exact = [
        brute.authors_xattention(head, 64, 0.7, mass, first_chunk=256)
        for head, mass in zip(heads_of(call), masses, strict=True)
    ]
    blocks = methods.get("xattention:recipe=authors,tau=0.7,block=64").blocks(call)
    assert_same_blocks(blocks, torch.stack(exact))
    late = methods.get("xattention:recipe=authors,tau=0.7,block=64")
    monkeypatch.setattr(authors, "_first_chunk", lambda seqlen_k: 2048)
    assert (blocks <= late.blocks(call)).all() and not torch.equal(blocks, late.blocks(call))


@pytest.mark.parametrize(
    "seqlen, rows",
    [(1, 2048), (2048, 2048), (2049, 4096), (16384, 16384), (16385, 8192), (32768, 8192),
     (65536, 4096), (131072, 2048), (524288, 2048)],
)  # fmt: skip
def test_rows_of_the_first_chunk(seqlen, rows):
    """The authors' formula: max(min(max(2048, p), 2 ** 28 / p), 2048), p the next power of two."""
    assert authors._first_chunk(seqlen) == rows


def test_xattention_reaches_tau_in_every_row():
    call = call_of((701, 701), (4, 2), seed=3)
    for tau in (0.5, 0.9):
        blocks = methods.get(f"xattention:recipe=authors,tau={tau},block=64").blocks(call)
        mass = authors.antidiagonal_mass(call, 64, 8)
        assert ((mass * blocks).sum(-1) >= (tau - 1e-12) * mass.sum(-1)).all()
