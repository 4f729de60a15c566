# SPDX-License-Identifier: Apache-2.0
"""Formats of a selection: bool mask, bitmask and block lists, all ways."""

import re
from pathlib import Path

import pytest
import torch
from numerics import pack, unpack

from pbs_attn import selection
from pbs_attn.selection import BlockCSR

HEADER = Path(__file__).parent.parent / "csrc" / "include" / "pbs" / "pbs.h"


def random_mask(*shape, density=0.4):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density


@pytest.mark.parametrize("num_blocks", [0, 1, 31, 32, 33, 64, 100])
def test_every_way_round(num_blocks):
    mask = random_mask(2, 3, 4, num_blocks)
    bits = selection.mask_to_bits(mask)
    assert bits.dtype == torch.int32 and bits.shape == (2, 3, 4, -(-num_blocks // 32))
    assert torch.equal(bits, pack(mask)) and torch.equal(unpack(bits, num_blocks), mask)
    assert torch.equal(selection.bits_to_mask(bits, num_blocks), mask)
    csr = selection.mask_to_csr(mask)
    assert csr.offsets.dtype == torch.int64 and csr.indices.dtype == torch.int32
    assert torch.equal(selection.csr_to_mask(csr, num_blocks), mask)
    assert torch.equal(selection.csr_to_bits(csr, num_blocks), bits)
    assert all(map(torch.equal, selection.bits_to_csr(bits, num_blocks), csr))


def test_lists_say_what_the_mask_says():
    mask = random_mask(2, 3, 4, 40)
    offsets, indices = selection.mask_to_csr(mask)
    for b, h, m in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist():
        listed = indices[offsets[b, h, m] : offsets[b, h, m + 1]].tolist()
        assert listed == mask[b, h, m].nonzero().flatten().tolist()


def test_lists_in_another_place_of_indices():
    """Offsets may point anywhere: rows in any order, gaps, shared lists."""
    csr = BlockCSR(torch.tensor([[[2, 4]], [[0, 2]]]), torch.tensor([3, 1, 0, 2]))
    mask = selection.csr_to_mask(csr, 4)
    assert mask.flatten(0, 2).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize(
    "offsets, indices, error, text",
    [
        ([[[0, 1]]], [4], ValueError, r"indices span \[4, 4\].*\[0, 4\)"),
        ([[[0, 1]]], [-1], ValueError, "indices span"),
        ([[[0, 2]]], [1], ValueError, "offsets must ascend inside"),
        ([[[1, 0]]], [1], ValueError, "offsets must ascend"),
        ([[0, 1]], [1], ValueError, "BlockCSR has offsets"),
        ([[[0.0, 1.0]]], [1], TypeError, "offsets is torch.float32"),
    ],
)
def test_bad_lists_are_named(offsets, indices, error, text):
    with pytest.raises(error, match=text):
        selection.csr_to_mask(BlockCSR(torch.tensor(offsets), torch.tensor(indices)), 4)


def test_bad_masks_are_named():
    with pytest.raises(TypeError, match="mask is torch.int32"):
        selection.mask_to_bits(torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="2 words per row; 20 key blocks need 1"):
        selection.bits_to_mask(torch.zeros(3, 2, dtype=torch.int32), 20)
    with pytest.raises(TypeError, match="bits is torch.int64"):
        selection.bits_to_mask(torch.zeros(3, 1, dtype=torch.int64), 20)
    with pytest.raises(ValueError, match="rule is 'top'; allowed: prefix"):
        selection.enum_id("rule", "top")


PREFIXES = {
    "permute": "PBS_PERMUTE_",
    "order": "PBS_ORDER_",
    "gqa": "PBS_GQA_",
    "select": "PBS_SELECT_",
    "reduce": "PBS_REDUCE_",
    "rule": "PBS_RULE_",
    "normalize": "PBS_NORMALIZE_",
    "correction": "PBS_CORRECTION_",
    "own": "PBS_OWN_",
    "isa": "PBS_ISA_",
}


@pytest.mark.parametrize("option", selection.NAMES)
def test_enum_values_are_those_of_the_header(option):
    found = re.findall(rf"^ *{PREFIXES[option]}(\w+) = (\d+)", HEADER.read_text(), re.MULTILINE)
    found += re.findall(rf"[{{,] {PREFIXES[option]}(\w+) = (\d+)", HEADER.read_text())
    names = {name.lower().replace("512_bf16", "512bf16"): int(value) for name, value in found}
    assert names == selection.NAMES[option]
