# SPDX-License-Identifier: Apache-2.0
"""The helpers that judge kernels must themselves say no."""

import numerics
import pytest
import torch

from pbs_attn import reference


def test_assert_close_accepts_honest_rounding_and_nothing_else():
    exact = torch.linspace(-1, 1, 500, dtype=torch.float64).view(5, 100)
    low = exact.bfloat16()
    numerics.assert_close(low, exact, low)
    wrong = low.clone()
    wrong[3, 7] += 0.05
    with pytest.raises(AssertionError, match=r"attend shape \(5, 100\): error .* at \(3, 7\): got"):
        numerics.assert_close(wrong, exact, low, what="attend")
    numerics.assert_close(exact.float(), exact, exact.float())
    with pytest.raises(AssertionError):  # bf16 accuracy is not enough for fp32
        numerics.assert_close(low.float(), exact, exact.float())
    with pytest.raises(AssertionError, match="shape"):
        numerics.assert_close(low[:4], exact, low)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_assert_close_wants_nan_and_inf_in_place(value):
    exact = torch.ones(4, dtype=torch.float64)
    exact[2] = value
    numerics.assert_close(exact.float(), exact, exact.float())
    for i, x in ((1, value), (2, 1.0), (2, -value if value == value else 0.0)):
        wrong = exact.float()
        wrong[i] = x
        with pytest.raises(AssertionError, match="wrong places"):
            numerics.assert_close(wrong, exact, exact.float())


def test_assert_k_perm():
    s = torch.tensor([[4.0, 1.0, 3.0, 3.0, 9.0, 8.0]])
    good = torch.tensor([[0, 2, 3, 1, 4, 5]])
    numerics.assert_k_perm(good, s, segment_size=4)
    bad = ([0, 3, 2, 1, 4, 5], [2, 0, 3, 1, 4, 5], [0, 2, 3, 1, 5, 4], [0, 2, 2, 1, 4, 5])
    for other in bad:
        with pytest.raises(AssertionError):
            numerics.assert_k_perm(torch.tensor([other]), s, segment_size=4)
    numerics.assert_k_perm(torch.tensor([bad[0]]), s, segment_size=4, tolerance=1e-6)


def selection(mass, tau, rule="prefix"):
    mass = torch.tensor([[mass]], dtype=torch.float64)
    every = torch.ones_like(mass, dtype=torch.bool)
    chosen = reference.choose(rule, tau, mass[0], every[0])[None]
    return reference.Selection(chosen, chosen, mass, every)


@pytest.mark.parametrize(
    "rule, tau, mass, near, far",
    [
        ("prefix", 0.9, [0.5, 0.4 - 1e-7, 0.1], [0, 1], [0, 2]),
        ("prefix", 0.6, [0.5, 0.25, 0.25 - 1e-7], [0, 2], [0]),
        ("relative", 0.5, [0.5, 0.25 - 1e-7, 0.2], [0, 1], [0, 2]),
        ("absolute", 0.25, [0.5, 0.25 - 1e-7, 0.2], [0, 1], [0, 2]),
        ("budget", 2, [0.5, 0.25, 0.25 - 1e-7], [0, 2], [0]),
        ("prefix", 1.0, [0.5, 0.5, 1e-9], [0, 1, 2], [0, 1]),
    ],
)
def test_assert_blocks_forgives_only_near_the_threshold(rule, tau, mass, near, far):
    found = selection(mass, tau, rule)
    for kept, passes in ((near, True), (far, False)):
        bits = torch.zeros(1, 1, 3, dtype=torch.bool)
        bits[0, 0, kept] = True
        if passes:
            numerics.assert_blocks(bits, found, rule=rule, tau=tau)
            continue
        with pytest.raises(AssertionError, match="head 0, query block 0"):
            numerics.assert_blocks(bits, found, rule=rule, tau=tau)
        with pytest.raises(AssertionError, match="head 0, query block 0|first head 0"):
            numerics.assert_same_blocks(bits, found.bits)


def test_pack_and_unpack():
    bits = torch.rand(2, 3, 75, generator=torch.Generator().manual_seed(1)) < 0.5
    words = numerics.pack(bits)
    assert words.dtype == torch.int32 and words.shape == (2, 3, 3)
    assert torch.equal(numerics.unpack(words, 75), bits)
    assert bool(words[1, 2, 1] >> 9 & 1) == bool(bits[1, 2, 41])
