# SPDX-License-Identifier: Apache-2.0
"""Sizes that only a GPU can do in a test: 16K to 1M tokens, offsets above 2^31 elements."""

import abi
import gpu_checks
import pytest
import torch
from gpu_checks import GPU
from harness import config_of

from pbs_attn import _load

pytestmark = gpu_checks.needs_gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_16k_against_fp64(dtype, head_dim):
    inputs = gpu_checks.make(GPU, (8, 2), 16384, head_dim=head_dim, dtype=dtype)
    gpu_checks.check_rows(inputs, config_of(), 48, what=f"16K {dtype} {head_dim}")


@pytest.mark.parametrize(
    "changes",
    [
        {"select": "antidiagonal"},
        {"permute": "none"},
        {"permute": "identity", "gqa": "group"},
        {"block_size": 64, "segment_size": 2048},
        {"rule": "relative", "tau": 0.1},
    ],
    ids=str,
)
def test_16k_of_each_kind(changes):
    if changes.get("permute") == "none":
        inputs = gpu_checks.make(GPU, (8, 2), 16384)
        out = gpu_checks.prefill(inputs, config_of(**changes))[0]
        assert torch.isfinite(out).all()
        return
    inputs = gpu_checks.make(GPU, (8, 2), 16384)
    gpu_checks.check_rows(inputs, config_of(**changes), what=f"16K {changes}")


def test_a_chunk_over_a_long_prefix():
    inputs = gpu_checks.make(GPU, (8, 2), 4001, 65537)
    gpu_checks.check_rows(inputs, config_of(), what="4001 rows over 64K")


def test_128k():
    gpu_checks.room(16)
    inputs = gpu_checks.make(GPU, (32, 8), 131072)
    gpu_checks.check_rows(inputs, config_of(), 64, what="128K")


def test_one_million_tokens_in_waves():
    gpu_checks.room(16)
    inputs = gpu_checks.make(GPU, (4, 4), 1 << 20, head_dim=64)
    config = config_of(tau=0.3)
    library = abi.Library(_load.CUDA.__file__)
    *whole, most = library.prefill(*inputs, config)
    *waves, least = library.prefill(*inputs, config, workspace_cap=1)
    assert least < most and gpu_checks.equal(whole, waves)
    gpu_checks.check_rows(inputs, config, 12, what="1M")


def test_heads_further_apart_than_32_bits():
    gpu_checks.room(44)
    gpu_checks.check_far_apart(GPU, 2**31 + 64)


def test_more_than_32_bits_of_elements():
    """q, out and the packed keys of 32 heads x 512K x 128 have 2^31 elements each."""
    gpu_checks.room(60)
    inputs = gpu_checks.make(GPU, (33, 33), 524288)
    gpu_checks.check_rows(inputs, config_of(tau=0.2), 36, what="33 heads of 512K")
