# SPDX-License-Identifier: Apache-2.0
"""tau = 1: a patched model says what the unpatched one says, in every situation of a forward pass.

Logits are judged by the numeric rule against the model in fp64, and the record must show that the
sparse kernels really ran: no test here can pass by falling back.
"""

import numerics
import pytest
import tiny_models as tiny
import torch
import transformers
from tiny_models import CONFIG

import pbs_attn

OLD = transformers.__version__.startswith("4.")


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def patched(model, call, config=CONFIG, **options):
    """(result, record) of call(model) with the model patched."""
    with pbs_attn.patch_model(model, config, **options), pbs_attn.record() as calls:
        return call(model), calls


def check_logits(model, call, rows=slice(None)):
    """Logits of the patched model pass the numeric rule; returns the record."""
    logits, calls = patched(model, lambda m: call(m).logits)
    assert torch.isfinite(logits).all()
    low, exact = call(model).logits, tiny.exact_copy(model)
    if exact is None:  # the same eager function with our mask
        torch.testing.assert_close(logits[rows], low[rows], rtol=1e-5, atol=1e-5)
    else:
        numerics.assert_close(logits[rows], call(exact).logits[rows], low[rows], what=model.family)
    return calls


@pytest.mark.parametrize("family", tiny.FAMILY_PARAMS)
def test_one_shot(family):
    ids = tiny.prompt(batch=2)
    calls = check_logits(tiny.build(family), lambda m: m(ids))
    sparse = tiny.sparse_layers(family)
    assert calls.calls == {"pbs": sparse, "dense": 2 - sparse}
    assert calls.reasons == tiny.reasons(family)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_wide_window", "gpt_oss"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(family, side):
    ids, mask = tiny.padded([300, 260, 97], side)
    arguments = {"attention_mask": mask, "position_ids": tiny.positions(mask)}
    calls = check_logits(tiny.build(family), lambda m: m(ids, **arguments), mask.bool())
    assert calls.calls["pbs"] == tiny.sparse_layers(family)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows_one_by_one(side):
    ids, mask = tiny.padded([300, 260, 129], side)
    model = tiny.build("llama")
    arguments = {"attention_mask": mask, "position_ids": tiny.positions(mask)}
    together, calls = patched(model, lambda m: m(ids, **arguments).logits)
    assert calls.calls == {"pbs": 2, "dense": 0}
    for row, real in enumerate(mask.bool()):
        alone, calls = patched(model, lambda m, r=row, x=real: m(ids[r][x][None]).logits)
        assert calls.calls == {"pbs": 2, "dense": 0}
        torch.testing.assert_close(together[row][real], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.tf457
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_scoring_without_a_cache(family):
    """lm-eval's log-likelihoods: with and without a mask of ones."""
    ids = tiny.prompt(batch=2)
    for options in ({}, {"attention_mask": torch.ones_like(ids)}):
        calls = check_logits(tiny.build(family), lambda m, o=options: m(ids, use_cache=False, **o))
        assert calls.calls["pbs"] == tiny.sparse_layers(family)


@pytest.mark.tf457
def test_second_chat_turn():
    """A prefix cache: queries stand at the end of the keys."""
    ids = tiny.prompt(430)

    def call(model):
        past = model(ids[:, :230], use_cache=True).past_key_values
        return model(ids[:, 230:], past_key_values=past, use_cache=True)

    calls = check_logits(tiny.build("llama"), call)
    assert calls.calls == {"pbs": 4, "dense": 0}


@pytest.mark.tf457
def test_second_chat_turn_of_a_left_padded_batch():
    ids, mask = tiny.padded([430, 390, 250], "left")
    place = tiny.positions(mask)

    def call(model):
        options = {"use_cache": True, "attention_mask": mask[:, :230]}
        past = model(ids[:, :230], position_ids=place[:, :230], **options).past_key_values
        options = {"use_cache": True, "attention_mask": mask, "past_key_values": past}
        return model(ids[:, 230:], position_ids=place[:, 230:], **options)

    calls = check_logits(tiny.build("llama"), call, mask[:, 230:].bool())
    assert calls.calls == {"pbs": 4, "dense": 0}


@pytest.mark.tf457
@pytest.mark.parametrize("lengths", [[300, 300], [300, 261]])
def test_static_cache_in_two_chunks(lengths):
    """The cache hands over its whole buffer: where the keys end is for the mask to say."""
    ids, mask = tiny.padded(lengths, "left")
    place = tiny.positions(mask)

    def call(model):
        cache = transformers.StaticCache(config=model.config, max_cache_len=512)
        for begin, end in ((0, 170), (170, 300)):
            options = {"past_key_values": cache, "use_cache": True}
            if OLD:
                options["cache_position"] = torch.arange(begin, end)
            out = model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=place[:, begin:end],
                **options,
            )
        return out

    calls = check_logits(tiny.build("llama"), call, mask[:, 170:].bool())
    assert calls.calls == {"pbs": 4, "dense": 0}


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_four_dimensional_mask_is_obeyed(kind):
    ids = tiny.prompt()
    mask = torch.ones(1, 1, 300, 300, dtype=torch.bool).tril()
    mask[..., 50:90] &= torch.eye(300, dtype=torch.bool)[:, 50:90]

    def call(model):
        given = mask
        if kind == "additive" or model.config._attn_implementation == "eager":
            lowest = torch.finfo(model.dtype).min
            given = torch.where(mask, torch.zeros((), dtype=model.dtype), lowest)
        return model(ids, attention_mask=given)

    calls = check_logits(tiny.build("llama"), call)
    assert calls.calls == {"pbs": 0, "dense": 2} and calls.reasons == {"mask_4d": 2}


@pytest.mark.tf457
def test_packed_position_ids_keep_sequences_apart():
    ids = tiny.prompt(400)
    place = torch.cat([torch.arange(150), torch.arange(250)])[None]
    model = tiny.build("llama")
    calls = check_logits(model, lambda m: m(ids, position_ids=place, use_cache=False))
    assert calls.reasons == {"mask_4d": 2}
    logits, _ = patched(model, lambda m: m(ids, position_ids=place, use_cache=False).logits)
    alone, _ = patched(model, lambda m: m(ids[:, 150:]).logits)
    torch.testing.assert_close(logits[:, 150:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.tf457
def test_packed_lengths_of_a_collator_keep_sequences_apart():
    """cu_seq_lens_* arrive as keyword arguments, with a cache that hides the packing."""
    ids = tiny.prompt(400)
    place = torch.cat([torch.arange(150), torch.arange(250)])[None]
    cu = torch.tensor([0, 150, 400], dtype=torch.int32)
    packed = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 250, "max_length_k": 250}
    model = tiny.build("llama")
    call = {"position_ids": place, "use_cache": True, **packed}
    logits, calls = patched(model, lambda m: m(ids, **call).logits)
    assert calls.reasons == {"cu_seqlens": 2}
    alone = model(ids[:, 150:]).logits
    torch.testing.assert_close(logits[:, 150:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.tf457
def test_a_mask_with_holes_goes_dense():
    ids, mask = tiny.padded([300, 250], "left")
    mask[:, 200:230] = 0
    arguments = {"attention_mask": mask, "position_ids": tiny.positions(mask)}
    calls = check_logits(tiny.build("llama"), lambda m: m(ids, **arguments), mask.bool())
    assert calls.reasons == {"mask_4d": 2}


@pytest.mark.tf457
def test_short_calls_are_dense_by_the_defaults_of_the_device():
    ids = tiny.prompt(40)
    model = tiny.build("llama")
    logits, calls = patched(model, lambda m: m(ids).logits, pbs_attn.PBSConfig(tau=1.0))
    assert calls.reasons == {"short_q": 2}
    numerics.assert_close(logits, tiny.exact_copy(model)(ids).logits, model(ids).logits)
    _, calls = patched(model, lambda m: m(ids), CONFIG.replace(min_kv=41))
    assert calls.reasons == {"short_kv": 2}


@pytest.mark.tf457
def test_short_calls_on_a_prefix_see_the_prefix():
    """1 < q < kv on the dense route: sdpa's own causal mask would stand at the top left."""
    ids = tiny.prompt(330)

    def call(model):
        past = model(ids[:, :300], use_cache=True).past_key_values
        return model(ids[:, 300:], past_key_values=past)

    model = tiny.build("llama")
    for min_q, reasons in ((0, {}), (64, {"short_q": 2})):
        config = CONFIG.replace(min_q=min_q)
        logits, calls = patched(model, lambda m: call(m).logits, config)
        assert calls.reasons == reasons
        numerics.assert_close(logits, call(tiny.exact_copy(model)).logits, call(model).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_below_tau_one_blocks_are_left_out(family):
    ids = tiny.prompt(640)
    model = tiny.build(family)
    full, calls = patched(model, lambda m: m(ids).logits)
    assert calls.density == 1.0
    sparse, calls = patched(model, lambda m: m(ids).logits, CONFIG.replace(tau=0.2))
    assert calls.calls == {"pbs": 2, "dense": 0}
    assert 0.1 < calls.density < 0.9
    assert sorted(calls.layers) == [0, 1] and len(calls.layers[0]) == 4
    assert torch.isfinite(sparse).all() and not torch.equal(sparse, full)


def test_reduced_precision():
    ids = tiny.prompt(batch=2)
    model = tiny.build("llama").bfloat16()
    logits, calls = patched(model, lambda m: m(ids).logits)
    assert calls.calls == {"pbs": 2, "dense": 0}
    exact = tiny.exact_copy(model)(ids).logits
    numerics.assert_close(logits, exact, model(ids).logits, what="bfloat16")


@pytest.mark.tf457
def test_layers_of_their_own():
    ids = tiny.prompt(640)
    model = tiny.build("llama")
    layers = {0: "dense", 1: CONFIG.replace(tau=0.2)}
    _, calls = patched(model, lambda m: m(ids), CONFIG, layers=layers)
    assert calls.calls == {"pbs": 1, "dense": 1} and calls.reasons == {"disabled": 1}
    assert list(calls.layers) == [1] and calls.density < 0.9


@pytest.mark.tf457
@pytest.mark.parametrize(
    "family, reason",
    [
        ("mistral_window", "sliding_window"),
        ("gemma2", "softcap"),
        ("gpt_oss", "sinks"),
        ("deepseek_v3", "head_dim_v"),
    ],
)
def test_strict_mode_raises_with_the_reason(family, reason):
    model, layer = tiny.build(family), tiny.FAMILIES[family][2].index(reason)
    layers = {index: "dense" for index in range(layer)}  # what a user writes for mixed models
    with pytest.raises(NotImplementedError, match=f"reason {reason}"):
        patched(model, lambda m: m(tiny.prompt()), CONFIG.replace(strict=True), layers=layers)


@pytest.mark.tf457
def test_strict_mode_raises_for_masks_and_not_for_decoding():
    model = tiny.build("llama")
    strict = CONFIG.replace(strict=True)
    mask = torch.ones(1, 1, 300, 300, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match="reason mask_4d"):
        patched(model, lambda m: m(tiny.prompt(), attention_mask=mask), strict)
    ids, mask = tiny.padded([300, 280], "left")
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    _, calls = patched(model, lambda m: m.generate(ids, **options), strict)
    assert calls.calls == {"pbs": 2, "dense": 4} and calls.reasons == {"short_q": 4}


@pytest.mark.tf457
@pytest.mark.parametrize("length, reason", [(300, "grad"), (8, "short_q")])
def test_training_goes_dense_and_keeps_its_gradients(length, reason):
    ids = tiny.prompt(length)
    model = tiny.build("llama")
    config = CONFIG.replace(min_q=64)

    def gradient(model):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    with torch.enable_grad():
        expected = gradient(model)
        got, calls = patched(model, gradient, config)
        assert calls.reasons == {reason: 2}
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
        if reason == "grad":
            with pytest.raises(NotImplementedError, match="reason grad"):
                patched(model, gradient, config.replace(strict=True))


@pytest.mark.tf457
def test_training_on_a_prefix_sees_the_prefix():
    """Here sdpa gets a mask of ours: its own causal mask would stand at the top left."""
    ids = tiny.prompt(330)
    model = tiny.build("llama")
    past = {"use_cache": True}

    def call(model):
        prefix = model(ids[:, :300], **past).past_key_values
        with torch.enable_grad():
            return model(ids[:, 300:], past_key_values=prefix, **past).logits.detach()

    logits, calls = patched(model, call)
    assert calls.calls == {"pbs": 2, "dense": 2} and calls.reasons == {"grad": 2}
    torch.testing.assert_close(logits, call(model), rtol=1e-4, atol=1e-4)


@pytest.mark.tf457
def test_dropout_goes_dense():
    model = tiny.build("llama", attention_dropout=0.5)
    model.train()
    _, calls = patched(model, lambda m: m(tiny.prompt()))
    assert calls.reasons == {"dropout": 2}


def test_an_encoder_with_padding_runs_dense():
    pbs_attn.register()
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        attn_implementation="eager",
    )
    # 4.57 does not give this model an interface.
    model = tiny.randomize(transformers.BertModel(config), 0)
    ids, mask = tiny.padded([300, 211], "right")
    expected = model(ids, attention_mask=mask).last_hidden_state
    model.set_attn_implementation("pbs_attn")
    with pbs_attn.record() as calls:
        hidden = model(ids, attention_mask=mask).last_hidden_state
    assert calls.calls["pbs"] == 0 and set(calls.reasons) == {"non_causal"}
    real = mask.bool()
    torch.testing.assert_close(hidden[real], expected[real], rtol=1e-4, atol=1e-4)


def test_a_position_bias_is_added():
    """T5: biases in both stacks, the decoder's on a causal call."""
    pbs_attn.register("pbs_attn_t5", CONFIG)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2}
    config = transformers.T5Config(**sizes, num_layers=1, decoder_start_token_id=0)
    config._attn_implementation = "eager"
    model = tiny.randomize(transformers.T5Model(config), 0)
    inputs = {"input_ids": tiny.prompt(280), "decoder_input_ids": tiny.prompt(290, seed=7)}
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation("pbs_attn_t5")
    with pbs_attn.record() as calls:
        hidden = model(**inputs).last_hidden_state
    # the encoder's own layer and the cross attention; the decoder's own layer
    assert calls.reasons == {"non_causal": 2, "position_bias": 1} and calls.calls["pbs"] == 0
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
