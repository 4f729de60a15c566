# SPDX-License-Identifier: Apache-2.0
"""Models through transformers on a GPU, with random weights."""

import time

import gpu_checks
import pytest
import torch
from gpu_checks import GPU

pytestmark = gpu_checks.needs_gpu
pytest.importorskip("transformers")

import tiny_models  # noqa: E402

import pbs_attn  # noqa: E402


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral_window"])
def test_tiny_models_route_as_on_a_cpu(family):
    pbs_attn.register()
    model = tiny_models.build(family).to(GPU, torch.bfloat16)
    ids = tiny_models.prompt().to(GPU)
    with torch.inference_mode():
        dense = model(ids, use_cache=False).logits.float()
    with torch.inference_mode(), pbs_attn.patch_model(model, tiny_models.CONFIG):
        with pbs_attn.record() as calls:
            got = model(ids, use_cache=False).logits.float()
    assert calls.reasons == tiny_models.reasons(family)
    assert calls.calls["pbs"] == tiny_models.sparse_layers(family)
    close = torch.nn.functional.cosine_similarity(got, dense, dim=-1)
    assert close.median() > 0.99, close.median()


def test_generate_with_left_padding():
    pbs_attn.register()
    model = tiny_models.build("llama").to(GPU, torch.bfloat16)
    ids, mask = (x.to(GPU) for x in tiny_models.padded((300, 200), "left"))
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    with torch.inference_mode(), pbs_attn.patch_model(model, tiny_models.CONFIG):
        with pbs_attn.record() as calls:
            out = model.generate(ids, **options)
    assert out.shape == (2, 304) and calls.calls["pbs"] == 2


def test_16k_through_a_model_of_a_billion_parameters():
    gpu_checks.room(16)
    model = gpu_checks.llama(GPU, torch.bfloat16, **gpu_checks.ONE_BILLION)
    ids = torch.randint(0, 4096, (1, 16384), device=GPU)
    density = gpu_checks.check_model(model, ids, 1e-2)
    print(f"16K tokens, 16 layers, density {density:.2f}")
    for name in ("sdpa", "pbs_attn"):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        gpu_checks.model_logits(model, ids, name)
        torch.cuda.synchronize()
        print(f"prefill with {name}: {(time.perf_counter() - begin) * 1000:.0f} ms")
