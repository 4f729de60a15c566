# SPDX-License-Identifier: Apache-2.0
"""What run and plot measure: losses, copied tokens, captured q and k, masses; no command line."""

import byte_models
import pytest
import torch
import torch.nn.functional as F
import transformers

from pbs_attn import PBSConfig, pbs_attention
from pbs_attn.cli import mass, measure, plot


@pytest.mark.parametrize("family", ("llama", "gemma2"))
def test_losses_are_those_of_the_whole_model(family):
    """By chunks of the head, softcapped logits included, nothing left behind in the model."""
    model = byte_models.llama()
    if family == "gemma2":
        config = transformers.Gemma2Config(
            vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            final_logit_softcapping=0.05, attn_implementation="eager",
        )  # fmt: skip
        model = transformers.Gemma2ForCausalLM(config).eval()
    ids = torch.randint(256, (1, measure.HEAD_CHUNK + 100), generator=torch.Generator())
    result = measure.prefill(model, ids)
    losses, best = measure.token_losses(model, ids, result)
    with torch.inference_mode():
        logits = model(ids).logits[0]
    assert torch.allclose(losses, F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none"))
    assert torch.equal(best, logits.argmax(-1))
    assert result.next_token == int(best[-1])
    assert "forward" not in model.base_model.__dict__
    assert result.attention_seconds <= result.seconds


def test_generation_continues_the_prefill():
    model = byte_models.llama()
    ids = torch.arange(100)[None]
    tokens = measure.generate(model, measure.prefill(model, ids), 6)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert tokens == expected[0, 100:].tolist()


def test_copied_tokens():
    ids = torch.randint(4, (1, 300), generator=torch.Generator().manual_seed(1))
    found = measure.copied_tokens(ids, 40)
    tokens = ids[0].tolist()
    for end in range(1, 300):
        trigram, expected = tokens[max(end - 2, 0) : end + 1], False
        for before in range(end - 1, 1, -1):
            if len(trigram) == 3 and tokens[before - 2 : before + 1] == trigram:
                expected = end - before > 40
                break
        assert bool(found[end - 1]) == expected, end


def test_capture_leaves_the_attention_table_alone():
    model, ids = byte_models.llama(), torch.arange(100)[None]
    before = measure.attention_functions()["sdpa"]
    taken, _ = measure.capture(model, ids, {1})
    assert list(taken) == [1]
    assert [x.shape for x in taken[1]] == [(1, 4, 100, 64), (1, 2, 100, 64), (1, 2, 100, 64)]
    assert measure.attention_functions()["sdpa"] is before
    assert "sdpa" not in measure.attention_functions()._local_mapping


def test_masses():
    """Per key and per block, against plain softmax attention."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads, 37, 8, generator=generator) for heads in (4, 2))
    found = mass.key_mass(q, k, 8)
    logits = q @ k.repeat_interleave(2, 0).transpose(1, 2) * 8**-0.5
    hidden = torch.ones(37, 37, dtype=torch.bool).triu(1)
    p = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    expected = torch.stack([rows.mean(1) for rows in p.split(8, 1)], 1)
    assert torch.allclose(found, expected, atol=1e-6)

    k_perm = torch.stack([torch.randperm(37, generator=generator) for _ in range(4)])
    blocks = mass.block_mass(found, k_perm, 8)
    for h in range(4):
        for n in range(5):
            keys = k_perm[h, 8 * n : 8 * n + 8]
            assert torch.allclose(blocks[h, :, n], found[h][:, keys].sum(1), atol=1e-6)
    own = mass.own_blocks(5, 8, 16)
    assert own.int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]
    ]  # fmt: skip
    everything = mass.causal_blocks(5).expand(4, -1, -1)
    natural = torch.arange(37).expand(4, -1)
    assert torch.allclose(mass.kept_mass(found, natural, everything, own, 8), torch.ones(4, 5))


def test_head_map_counts_what_the_kernels_compute():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1000, 32, generator=generator) for _ in range(2))
    config = PBSConfig(tau=0.5)
    found = plot.head_map(q, k, config)
    _, plan = pbs_attention(q, k, k, config=config.replace(min_q=0, min_kv=0), return_plan=True)
    density = found["computed"].sum() / found["causal"].sum()
    assert float(density) == pytest.approx(float(plan.density()))
    assert found["blocks"].sum(1) == pytest.approx(torch.ones(8), abs=1e-4)
    assert 0.5 < found["kept"] < 1
