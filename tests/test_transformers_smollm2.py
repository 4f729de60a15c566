# SPDX-License-Identifier: Apache-2.0
"""tau = 1 on a trained model: SmolLM2-135M says the same with every layer on the sparse kernels."""

import pytest
import torch

import pbs_attn
from pbs_attn import PBSConfig
from pbs_attn.cli import models

LENGTH, NEW = 600, 16
CONFIG = PBSConfig(tau=1.0, min_q=0, min_kv=0)  # the paper's sizes: two segments and a tail


@pytest.mark.slow
def test_smollm2_patched_equals_dense():
    model, tokenizer = models.load(models.SMOLLM2, dtype="float32")
    layers = model.config.num_hidden_layers
    ids = models.token_ids(tokenizer, models.demo_text()[1], LENGTH)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        expected, dense = model(ids).logits, model.generate(ids, **options)
        with pbs_attn.patch_model(model, CONFIG), pbs_attn.record() as calls:
            logits, sparse = model(ids).logits, model.generate(ids, **options)
        again = model(ids).logits

    assert calls.calls == {"pbs": 2 * layers, "dense": (NEW - 1) * layers}
    assert calls.reasons == {"short_q": (NEW - 1) * layers} and calls.density == 1.0
    assert torch.equal(sparse.sequences, dense.sequences)
    assert torch.equal(again, expected)  # undo is exact
    # Thirty layers of fp32: logits of 10 to 30, losses to about 2e-5.
    loss, expected_loss = (
        torch.nn.functional.cross_entropy(x[0, :-1], ids[0, 1:], reduction="none")
        for x in (logits, expected)
    )
    print(f"largest change of a logit {(logits - expected).abs().max():.2e}, "
          f"of a token's loss {(loss - expected_loss).abs().max():.2e}")  # fmt: skip
    assert (loss - expected_loss).abs().max() < 1e-4
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=5e-4)
