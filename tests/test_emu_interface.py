# SPDX-License-Identifier: Apache-2.0
"""pbs_attention, attend and a model of transformers with CUDA's kernels below, emulated or real:
what people call, beside the same call on the CPU's kernels."""

import cases
import pytest
import torch
from emu_backend import to_device
from harness import config_of

from pbs_attn import attend, ops, pbs_attention, record

BF16 = torch.bfloat16
CONFIG = config_of(block_size=64, segment_size=128, tau=0.8)
Q, K, V = cases.make_inputs(151, (4, 2), 330, dtype=BF16)


@pytest.fixture
def both(backend, monkeypatch):
    """Runs a function of the interface on either: (on the CPU's kernels, on CUDA's)."""

    def run(function, *args, **options):
        expected = function(*args, **options)
        there = [to_device(x, backend.device) for x in args]
        options = {name: to_device(x, backend.device) for name, x in options.items()}
        with monkeypatch.context() as patch:
            patch.setattr(ops, "_ops", backend.namespace)
            return expected, function(*there, **options)

    return run


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def near(got, expected, at_most=3e-2):
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=at_most)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_start": int32(3), "q_len": int32(300), "kv_start": int32(3), "kv_len": int32(300)},
        {"tau": torch.tensor([0.3, 0.6, 0.9, 1.0]), "permute_heads": int32(1, 0, 1, 0)},
        {"softmax_scale": 0.3},
    ],
    ids=["whole", "padded", "per head", "scale"],
)
def test_pbs_attention(both, options):
    options = {"config": CONFIG, "return_lse": True, "return_plan": True, **options}
    expected, got = both(pbs_attention, Q, K, V, **options)
    near(got[0], expected[0])
    near(got[1], expected[1])
    assert got[0].transpose(1, 2).is_contiguous()
    near(got[2].density(), expected[2].density(), 0.05)


def test_packed_and_bnhd(both):
    rows = [x[0].transpose(0, 1) for x in (Q, K, V)]
    expected, got = both(
        pbs_attention, *rows, config=CONFIG, cu_seqlens_q=int32(0, 150, 330), max_seqlen_q=200
    )
    near(got, expected)
    rows = [x.transpose(1, 2) for x in (Q, K, V)]
    expected, got = both(pbs_attention, *rows, config=CONFIG, layout="bnhd")
    near(got, expected)


def test_a_given_out(both):
    expected, got = both(
        pbs_attention, Q, K, V, config=CONFIG, out=torch.zeros_like(Q), q_len=int32(330)
    )
    near(got, expected)


def test_an_own_mask(both):
    mask = torch.rand(1, 2, 6, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    expected, got = both(attend, Q, K, V, mask, block_q=64, block_k=128, return_lse=True)
    near(got[0], expected[0])
    near(got[1], expected[1])


def test_a_model(backend, monkeypatch):
    """tau = 1 keeps every block: the logits of the same model with dense attention."""
    pytest.importorskip("transformers")
    import tiny_models

    from pbs_attn import patch_model, register

    register()
    model = tiny_models.build("llama").to(backend.device, BF16)
    ids = tiny_models.prompt(260).to(backend.device)
    with torch.inference_mode():
        dense = model(ids, use_cache=False).logits.float()
        monkeypatch.setattr(ops, "_ops", backend.namespace)
        with patch_model(model, tiny_models.CONFIG), record() as calls:
            got = model(ids, use_cache=False).logits.float()
    assert calls.calls == {"pbs": 2, "dense": 0} and calls.density == 1
    close = torch.nn.functional.cosine_similarity(got, dense, dim=-1)
    assert close.median() > 0.99, close.median()
