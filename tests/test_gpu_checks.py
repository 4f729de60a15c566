# SPDX-License-Identifier: Apache-2.0
"""The checks of tests/gpu, tiny, on a CPU: they pass what is right and catch what is not."""

import gpu_checks
import pytest
import torch
from harness import config_of

from pbs_attn import ops

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", [(700, 700), (130, 900)])
def test_rows(lengths):
    inputs = gpu_checks.make(CPU, (4, 2), *lengths, head_dim=64)
    config = config_of(block_size=64, segment_size=128, tau=0.5)
    assert gpu_checks.check_rows(inputs, config) == 24
    assert gpu_checks.prefill(inputs, config)[2].sum() > 0, "nothing but the own span was tested"


def test_rows_catch_a_wrong_result(monkeypatch):
    inputs = gpu_checks.make(CPU, (4, 2), 700, head_dim=64)
    right = gpu_checks.prefill(inputs, config_of())
    for change in (
        (right[0].roll(1, 2), *right[1:]),
        (right[0], right[1] + 1.0, *right[2:]),
        (*right[:3], right[3] ^ 1, right[4]),
    ):
        monkeypatch.setattr(gpu_checks, "prefill", lambda *args, change=change: change)
        with pytest.raises(AssertionError):
            gpu_checks.check_rows(inputs, config_of())


def test_far_apart():
    gpu_checks.check_far_apart(CPU, 2**17)


def test_reruns():
    gpu_checks.check_reruns(CPU, gpu_checks.make(CPU, (2, 1), 600, head_dim=64), config_of(), 2)


def test_reruns_catch_a_difference(monkeypatch):
    inputs = gpu_checks.make(CPU, (2, 1), 600, head_dim=64)
    runs = iter([[torch.zeros(1)], [torch.ones(1)]])
    monkeypatch.setattr(gpu_checks, "prefill", lambda *args: next(runs))
    with pytest.raises(AssertionError, match="run 0"):
        gpu_checks.check_reruns(CPU, inputs, config_of(), 1)


@pytest.mark.parametrize("permute", ["keys", "both"])
def test_poisoned_padding(permute):
    gpu_checks.check_poisoned_padding(CPU, config_of(permute=permute))


@pytest.mark.slow
def test_compiled():
    gpu_checks.check_compiled(CPU, config_of(), "aot_eager")


def test_model():
    pytest.importorskip("transformers")
    shape = gpu_checks.ONE_BILLION | {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    model = gpu_checks.llama(CPU, torch.float32, **shape)
    ids = torch.arange(700)[None] * 31 % 96
    assert 0 < gpu_checks.check_model(model, ids, 1e-5) <= 1


def test_a_cap_on_the_workspace_makes_waves():
    """The C entry point that the GPU tests use, on the CPU's library."""
    import abi

    from pbs_attn import _load

    inputs = gpu_checks.make(CPU, (4, 4), 600, head_dim=64)
    library = abi.Library(_load.load().__file__)
    *whole, most = library.prefill(*inputs, config_of())
    *waves, least = library.prefill(*inputs, config_of(), workspace_cap=1)
    assert least < most and gpu_checks.equal(whole, waves)
    want = ops.prefill(*inputs, config_of(), return_lse=True, return_plan=True)
    assert gpu_checks.equal(whole, want)
