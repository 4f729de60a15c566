# SPDX-License-Identifier: Apache-2.0
"""tau = 1: `generate` gives token for token what the unpatched model gives, in fp32, however the
prompt reaches the layers; the record says which calls ran sparse and why the others did not."""

import pytest
import tiny_models as tiny
import torch
from tiny_models import CONFIG

import pbs_attn

NEW = 10  # tokens


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)


def check_tokens(model, ids, reference=None, **options):
    """Patched and unpatched generate the same tokens; returns the record."""
    expected = generate(model, ids, **(options if reference is None else reference))
    with pbs_attn.patch_model(model, CONFIG), pbs_attn.record() as calls:
        tokens = generate(model, ids, **options)
    assert torch.equal(tokens, expected)
    return calls


def check_calls(calls, family, prefills=1, decodes=NEW - 1):
    """Every prefill forward as the family's table says, every decode dense for its length."""
    expected = {word: count * prefills for word, count in tiny.reasons(family).items()}
    expected["short_q"] = 2 * decodes
    assert calls.reasons == expected
    assert calls.calls == {
        "pbs": tiny.sparse_layers(family) * prefills,
        "dense": sum(expected.values()),
    }


@pytest.mark.parametrize("family", tiny.FAMILY_PARAMS)
def test_left_padded_batch(family):
    ids, mask = tiny.padded([300, 270, 133], "left")
    calls = check_tokens(tiny.build(family), ids, attention_mask=mask)
    check_calls(calls, family)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_static_cache(family):
    ids, mask = tiny.padded([300, 270], "left")
    model = tiny.build(family)
    calls = check_tokens(
        model, ids, {"attention_mask": mask}, attention_mask=mask, cache_implementation="static"
    )
    check_calls(calls, family)
    calls = check_tokens(model, ids, {}, cache_implementation="static")
    check_calls(calls, family)


# transformers 4.57 loses count of positions after a chunk (one token at a time from there on).
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_chunked_prefill(family, cache):
    """300 tokens in chunks of 128, 128 and 44: each chunk sees the earlier ones."""
    ids = tiny.prompt()
    model = tiny.build(family)
    options = {"prefill_chunk_size": 128}
    if cache == "static":
        options["cache_implementation"] = "static"
    calls = check_tokens(model, ids, {}, **options)
    if family == "gemma3":  # its window of 200 cuts nothing from the first chunk
        assert calls.calls["pbs"] >= 3
    else:
        check_calls(calls, family, prefills=3)


def test_chunked_prefill_of_a_left_padded_batch():
    """The first chunk of the last row is padding only."""
    ids, mask = tiny.padded([300, 270, 133], "left")
    calls = check_tokens(
        tiny.build("llama"),
        ids,
        {"attention_mask": mask},
        attention_mask=mask,
        prefill_chunk_size=128,
    )
    check_calls(calls, "llama", prefills=3)


@pytest.mark.tf457
def test_second_chat_turn():
    ids = tiny.prompt(430)
    model = tiny.build("llama")

    def turns(model):
        first = generate(model, ids[:, :230], return_dict_in_generate=True)
        history = torch.cat([first.sequences, ids[:, 230:]], 1)
        return generate(model, history, past_key_values=first.past_key_values)

    expected = turns(model)
    with pbs_attn.patch_model(model, CONFIG), pbs_attn.record() as calls:
        tokens = turns(model)
    assert torch.equal(tokens, expected)
    check_calls(calls, "llama", prefills=2, decodes=2 * (NEW - 1))


def test_beam_search():
    ids, mask = tiny.padded([300, 270], "left")
    calls = check_tokens(tiny.build("llama"), ids, attention_mask=mask, num_beams=3)
    check_calls(calls, "llama")


@pytest.mark.tf457
@pytest.mark.parametrize("min_q", [0, 32])
def test_assisted_decoding(min_q):
    """A few rows at the end of a long prefix, sparse or dense, verify the assistant's tokens."""
    ids = tiny.prompt()
    model, assistant = tiny.build("llama"), tiny.build("llama", seed=3)
    expected = generate(model, ids)
    config = CONFIG.replace(min_q=min_q)
    with pbs_attn.patch_model(model, config), pbs_attn.record() as calls:
        tokens = generate(model, ids, assistant_model=assistant)
    assert torch.equal(tokens, expected)
    if min_q:
        assert calls.calls["pbs"] == 2 and set(calls.reasons) == {"short_q"}
        assert calls.reasons["short_q"] > 2
    else:
        assert calls.calls["pbs"] > 2


def test_prompt_lookup_decoding():
    """The same with candidates copied from the prompt, which here repeats itself."""
    ids = tiny.prompt(75).repeat(1, 4)
    calls = check_tokens(tiny.build("llama"), ids, {}, prompt_lookup_num_tokens=4)
    assert calls.calls["pbs"] >= 2


def test_a_batch_equals_its_rows_one_by_one():
    ids, mask = tiny.padded([300, 270, 133], "left")
    model = tiny.build("llama")
    with pbs_attn.patch_model(model, CONFIG):
        together = generate(model, ids, attention_mask=mask)[:, -NEW:]
        for row in range(3):
            alone = generate(model, ids[row][mask[row].bool()][None])[:, -NEW:]
            assert torch.equal(together[row], alone[0])


@pytest.mark.tf457
def test_without_a_cache():
    """Every step is a prefill; 4.57 marks such input as packed, which must not go dense."""
    ids = tiny.prompt()
    calls = check_tokens(tiny.build("llama"), ids, use_cache=False)
    assert calls.calls == {"pbs": 2 * NEW, "dense": 0}
