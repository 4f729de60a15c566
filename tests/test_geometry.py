# SPDX-License-Identifier: Apache-2.0
"""geometry.py against the formulas of csrc/core/geometry.h, one query block at a time."""

import pytest
import torch

from pbs_attn import geometry as geo

LENGTHS = [(1, 1), (6, 22), (128, 128), (129, 1000), (700, 700), (515, 300), (300, 515), (0, 9)]
OWNS = ("segment", "block", "mask", "none", "all")


def floor_to(a, step):
    return a // step * step if a > 0 else 0


def visible_keys(q_len, offset, row_end):
    return max(offset + min(row_end, q_len), 0)


def brute_blocks(q_len, kv_len, m, block_q, block_k, segment, own, permuted):
    """(causal, own, own_computed, own_start) as the C header says them."""
    offset = kv_len - q_len
    if m * block_q >= q_len:
        return 0, 0, 0, None
    visible = visible_keys(q_len, offset, (m + 1) * block_q)
    row = m * block_q
    if permuted:
        row = row // segment * segment
    start = {
        "segment": floor_to(offset + row, segment),
        "none": floor_to(offset + row, segment),
        "block": floor_to(offset + row, block_k),
        "mask": visible,
        "all": 0,
    }[own]
    end = visible_keys(q_len, offset, row + segment) if permuted else visible
    causal = -(-visible // block_k)
    if own in ("mask", "none"):
        return causal, 0, 0, start
    first = start // block_k
    return causal, max(causal - first, 0), max(-(-end // block_k) - first, 0), start


@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("block_q, block_k, segment", [(4, 4, 8), (64, 128, 256), (128, 128, 384)])
def test_blocks_equal_the_header(own, permuted, block_q, block_k, segment):
    q_len = torch.tensor([q for q, _ in LENGTHS])
    kv_len = torch.tensor([k for _, k in LENGTHS])
    seqs = geo.Sequences(torch.zeros_like(q_len), q_len, torch.zeros_like(q_len), kv_len)
    num_q_blocks = -(-max(q for q, _ in LENGTHS) // block_q)
    counts = geo.blocks(seqs, num_q_blocks, block_q, block_k, segment, own, permuted)
    tk = -(-max(k for _, k in LENGTHS) // block_k)
    mask = counts.own_mask(tk)
    for b, (q, k) in enumerate(LENGTHS):
        for m in range(num_q_blocks):
            want = brute_blocks(q, k, m, block_q, block_k, segment, own, permuted)
            got = tuple(int(x[b, m]) for x in counts[:3])
            assert got == want[:3], (own, permuted, q, k, m)
            blocks = mask[b, m].nonzero().flatten().tolist()
            first = 0 if want[3] is None else want[3] // block_k
            assert blocks == list(range(first, first + want[1])), (own, q, k, m)


@pytest.mark.parametrize("blocks", [1, 2, 5, 8])
def test_causal_blocks_are_a_triangle(blocks):
    seqs = geo.sequences(geo.Geometry(), 1, blocks * 128, blocks * 128)
    counts = geo.blocks(seqs, blocks, 128, 128, 256, "segment")
    assert int(counts.causal.sum()) == blocks * (blocks + 1) // 2
    every = torch.arange(blocks) // 2 * 2
    assert geo.density(every.view(1, 1, -1), counts).item() == 1.0


def test_density_of_sequences_without_keys_is_one():
    seqs = geo.sequences(geo.Geometry(kv_len=torch.tensor([0, 256])), 2, 128, 256)
    counts = geo.blocks(seqs, 1, 128, 128, 256, "segment")
    assert geo.density(torch.zeros(2, 3, 1), counts).tolist() == [[1.0] * 3, [1.0] * 3]


def test_sequences_fill_in_what_is_not_given():
    geometry = geo.Geometry(q_start=torch.tensor([0, 3]), kv_len=torch.tensor([9, 4]))
    seqs = geo.sequences(geometry, 2, 10, 20)
    assert [x.tolist() for x in seqs] == [[0, 3], [10, 7], [0, 0], [9, 4]]
    assert seqs.q_offset.tolist() == [-1, -3]
    assert geometry.num_sequences(1) == 2 and not geometry.whole
    assert geo.Geometry().num_sequences(5) == 5 and geo.Geometry().whole


def test_visible_mask_per_token():
    geometry = geo.Geometry(*(torch.tensor(x) for x in ([0, 5], [5, 4], [1, 6], [5, 7])))
    seqs = geo.sequences(geometry, 1, 10, 14)
    mask = geo.visible_mask(seqs, 1, torch.arange(10), 14)
    assert mask.shape == (1, 10, 14)
    for i in range(10):
        for j in range(14):
            want = False
            for q0, n, k0, m in ((0, 5, 1, 5), (5, 4, 6, 7)):
                inside = q0 <= i < q0 + n and k0 <= j < k0 + m
                want |= inside and j - k0 <= i - q0 + m - n
            assert bool(mask[0, i, j]) == want, (i, j)


def test_selected_mask_needs_the_block_too():
    seqs = geo.sequences(geo.Geometry(), 2, 6, 6)
    listed = torch.rand(2, 3, 2, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = geo.selected_mask(seqs, 2, torch.arange(6), 6, listed, 4, 2)
    token = listed.repeat_interleave(4, 2).repeat_interleave(2, 3)[:, :, :6, :6]
    assert torch.equal(mask, token & torch.ones(6, 6, dtype=torch.bool).tril())
