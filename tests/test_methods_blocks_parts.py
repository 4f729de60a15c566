# SPDX-License-Identifier: Apache-2.0
"""Numbers that block methods compare with thresholds: what a mask alone would not show."""

import block_methods as brute
import pytest
import torch
from test_methods_blocks import CHUNK, EMPTY_ROWS, ODD, call_of, heads_of

from pbs_attn import methods
from pbs_attn.methods import blockmath
from pbs_attn.methods.oracle import true_mass


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("shape", [ODD, CHUNK, EMPTY_ROWS])
def test_true_mass(shape, reduce):
    """The shares themselves; averages over rows that see a key sum to 1."""
    call = call_of(shape, (3, 1), seed=1)
    mass = true_mass(call, 64, reduce)
    for h, head in enumerate(heads_of(call)):
        for (m, n), share in brute.oracle_mass(head, 64, reduce).items():
            assert mass[h, m, n].item() == pytest.approx(share, rel=1e-9, abs=1e-15)
    if reduce == "mean":
        live = torch.arange(mass.shape[1]) * 64 + 63 + call.q_offset >= 0
        torch.testing.assert_close(mass.sum(-1)[:, live], torch.ones_like(mass.sum(-1)[:, live]))


@pytest.mark.parametrize("shape", [ODD, CHUNK, EMPTY_ROWS, (1100, 1100)])
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_energies_of_flashprefill(shape, gqa):
    """Up to the factor of each query block; heads of a group differ in the size of their logits."""
    call = call_of(shape, (4, 2), seed=2)
    call.q[1] *= 2.5
    energy, scored = methods.get(f"flashprefill:gqa={gqa},block=64")._energy(call)
    heads = heads_of(call)
    groups = [heads[:2], heads[2:]] if gqa == "group" else [[head] for head in heads]
    for h, group in enumerate(groups):
        for m in range(energy.shape[1]):
            exact = brute.energies(group, 64, m)
            assert scored[m].nonzero().flatten().tolist() == sorted(exact)
            top = max(exact.values(), default=1.0)
            for n, e in exact.items():
                share = energy[h, m, n] / energy[h, m].max()
                assert share.item() == pytest.approx(e / top, rel=1e-9)


def test_flexprefill_counts_one_more_than_stays_within_gamma():
    """128 equal shares: 64 of them are one half, so 65 exceed it, which is 65 // 64 + 1 blocks."""
    share = torch.full((1, 128), 1 / 128)
    for gamma, blocks in ((0.5, 2), (0.49, 1), (0.0, 1), (0.75, 2), (0.9999, 3)):
        method = methods.get(f"flexprefill:gamma={gamma},block=64")
        assert method._count(share, 0).item() == blocks
        assert method._count(share, 9).item() == 9


def test_block_means_are_wide_and_of_the_rows_there_are():
    x = call_of((300, 300), (1, 1), dtype=torch.bfloat16).k
    means = blockmath.block_means(x, 128)
    exact = torch.stack([part.double().mean(1) for part in x.split(128, 1)], 1)
    assert means.dtype == torch.float32 and means.shape == (1, 3, x.shape[2])
    torch.testing.assert_close(means.double(), exact, rtol=1e-6, atol=1e-7)
    assert blockmath.block_means(x.double(), 128).dtype == torch.float64


def test_fill_to_by_hand():
    mass = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.1])
    forced = torch.tensor([True, False, False, False, False])
    eligible = torch.tensor([True, True, True, True, False])  # 0.9 in all

    def kept(share, **options):
        return (
            blockmath.fill_to(mass, forced, eligible, share, **options).nonzero().flatten().tolist()
        )

    assert kept(0.0) == [0]
    assert kept(0.2) == [0, 1], "equal masses by index"
    assert kept(0.5) == [0, 1, 3]
    assert kept(0.8) == [0, 1, 2, 3] == kept(1.0)
    late = torch.tensor([True])
    assert kept(0.0, late=late) == [0]
    assert kept(0.05, late=late) == [0, 1], "one is always looked at"
    assert kept(0.2, late=late) == [0, 1, 3]
