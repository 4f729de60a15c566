# SPDX-License-Identifier: Apache-2.0
"""Names, patching and the exact way back; models that are more than one decoder."""

import gc

import pytest
import tiny_models as tiny
import torch
import transformers
from tiny_models import CONFIG
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

import pbs_attn

pytestmark = pytest.mark.tf457


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture
def name():
    """A name of its own, forgotten afterwards."""
    from pbs_attn.integrations import registry

    chosen = "pbs_attn_test"
    yield chosen
    registry._registered.pop(chosen, None)
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(chosen, None)


def implementations(model):
    """Every implementation that any config in the model names, by path."""
    found = {}
    for path, module in model.named_modules():
        if getattr(module, "config", None) is not None:
            found[path] = module.config._attn_implementation
    for key in model.config.sub_configs:
        found[f"config.{key}"] = getattr(model.config, key)._attn_implementation
    return found


def attributes(model):
    return {path: sorted(vars(module)) for path, module in model.named_modules()}


# --- register


def test_register_puts_both_functions_under_the_name(name):
    pbs_attn.register(name, CONFIG)
    assert name in AttentionInterface._global_mapping
    assert name in AttentionMaskInterface._global_mapping


def test_register_is_idempotent(name):
    pbs_attn.register(name, CONFIG)
    first = AttentionInterface._global_mapping[name]
    pbs_attn.register(name, CONFIG)
    pbs_attn.register(name)  # no config: whatever the name has
    assert AttentionInterface._global_mapping[name] is first


def test_another_config_needs_overwrite(name):
    pbs_attn.register(name, CONFIG)
    other = CONFIG.replace(tau=0.5)
    with pytest.raises(ValueError, match=f"{name}.*overwrite=True"):
        pbs_attn.register(name, other)
    pbs_attn.register(name, other, overwrite=True)
    with pytest.raises(ValueError, match="overwrite=True"):
        pbs_attn.register(name, CONFIG)


def test_a_name_of_another_package_needs_overwrite(name):
    AttentionInterface.register(name, lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="another package"):
        pbs_attn.register(name, CONFIG)
    pbs_attn.register(name, CONFIG, overwrite=True)


@pytest.mark.parametrize(
    "bad", ["pbs_flash", "my_sdpa", "flex_attention_2", "eager", "org/pbs", "paged|pbs", "", "a b"]
)
def test_names_that_mean_something_else_to_transformers_are_refused(bad):
    with pytest.raises(ValueError, match="name is"):
        pbs_attn.register(bad)


def test_wrong_types_are_refused(name):
    with pytest.raises(TypeError, match="name is a int"):
        pbs_attn.register(3)
    with pytest.raises(TypeError, match="config is a dict"):
        pbs_attn.register(name, {"tau": 0.5})


# --- loading


def test_from_pretrained_takes_a_registered_name(name, tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=name):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    pbs_attn.register(name, CONFIG)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids, mask = tiny.padded([300, 270], "left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    with pbs_attn.record() as calls:
        tokens = model.generate(ids, **options)
    assert torch.equal(tokens, plain.generate(ids, **options))
    assert calls.calls["pbs"] == 2


def test_set_attn_implementation_on_a_loaded_model(name):
    pbs_attn.register(name, CONFIG)
    model = tiny.build("llama")
    expected = model(tiny.prompt()).logits
    model.set_attn_implementation(name)
    with pbs_attn.record() as calls:
        logits = model(tiny.prompt()).logits
    assert calls.calls == {"pbs": 2, "dense": 0}
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_default_name_is_registered_by_register_and_by_patch_model(tmp_path):
    pbs_attn.register()
    model = tiny.build("llama", attn_implementation="pbs_attn")
    with pbs_attn.record() as calls:
        model(tiny.prompt(40))
    assert calls.reasons == {"short_q": 2}  # the measured lengths of the device


# --- patch_model


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_undo_is_exact(before):
    model = tiny.build("llama", attn_implementation=before)
    ids = tiny.prompt()
    logits, names, members = model(ids).logits, implementations(model), attributes(model)
    patch = pbs_attn.patch_model(model, CONFIG, layers={0: CONFIG.replace(tau=0.2)})
    assert set(implementations(model).values()) == {"pbs_attn"}
    assert not torch.equal(model(ids).logits, logits)
    patch.undo()
    assert implementations(model) == names and attributes(model) == members
    assert torch.equal(model(ids).logits, logits)
    patch.undo()  # nothing left to undo
    assert torch.equal(model(ids).logits, logits)


def test_patches_nest_and_come_off_in_order():
    model = tiny.build("llama")
    ids = tiny.prompt(640)
    expected = model(ids).logits
    outer = pbs_attn.patch_model(model, CONFIG)
    with pbs_attn.patch_model(model, CONFIG.replace(tau=0.2)) as inner:
        with pbs_attn.record() as calls:
            model(ids)
        assert calls.density < 0.9
        with pytest.raises(RuntimeError, match="newer patch"):
            outer.undo()
    assert not inner.active and outer.active
    with pbs_attn.record() as calls:
        model(ids)
    assert calls.calls["pbs"] == 2 and calls.density == 1.0
    outer.undo()
    assert torch.equal(model(ids).logits, expected)


def test_unpatch_model_takes_every_patch_off():
    model = tiny.build("qwen3")
    expected = model(tiny.prompt()).logits
    pbs_attn.patch_model(model, CONFIG)
    pbs_attn.patch_model(model, CONFIG.replace(tau=0.3))
    pbs_attn.unpatch_model(model)
    assert torch.equal(model(tiny.prompt()).logits, expected)
    with pytest.raises(ValueError, match="not patched"):
        pbs_attn.unpatch_model(model)


def test_an_error_inside_the_block_still_reverts():
    model = tiny.build("llama")
    with pytest.raises(ZeroDivisionError), pbs_attn.patch_model(model, CONFIG):
        raise ZeroDivisionError
    assert set(implementations(model).values()) == {"eager"}


def test_two_models_have_configs_of_their_own():
    ids = tiny.prompt(640)
    first, second = tiny.build("llama"), tiny.build("llama")
    pbs_attn.patch_model(first, CONFIG)
    pbs_attn.patch_model(second, CONFIG.replace(tau=0.2))
    densities = []
    for model in (first, second):
        with pbs_attn.record() as calls:
            model(ids)
        densities.append(calls.density)
    assert densities[0] == 1.0 and densities[1] < 0.9


def test_a_patched_model_can_be_forgotten():
    model = tiny.build("llama")
    pbs_attn.patch_model(model, CONFIG)
    from pbs_attn.integrations import patching

    count = len(patching._patches)
    del model
    gc.collect()
    assert len(patching._patches) < count


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"config": {"tau": 1}}, TypeError, "config is a dict"),
        ({"layers": [CONFIG]}, TypeError, "layers is a list"),
        ({"layers": {2: CONFIG}}, ValueError, r"layers has the key 2; allowed: 0 to 1"),
        ({"layers": {"0": CONFIG}}, TypeError, "layers has the key '0'"),
        ({"layers": {0: "sparse"}}, TypeError, r"layers\[0\] is 'sparse'"),
    ],
)
def test_wrong_arguments_leave_the_model_alone(arguments, error, match):
    model = tiny.build("llama")
    with pytest.raises(error, match=match):
        pbs_attn.patch_model(model, **arguments)
    assert set(implementations(model).values()) == {"eager"}


def test_only_models_can_be_patched():
    with pytest.raises(TypeError, match="model is a Linear"):
        pbs_attn.patch_model(torch.nn.Linear(2, 2))


def test_a_model_of_the_old_style_is_refused():
    """It would accept the name and ignore it."""
    config = transformers.BloomConfig(hidden_size=32, n_head=2, n_layer=1, vocab_size=32)
    model = transformers.BloomForCausalLM(config)
    with pytest.raises(ValueError, match="BloomForCausalLM.*do not call"):
        pbs_attn.patch_model(model, CONFIG)


# --- more than one decoder


def llava():
    text = tiny.config("llama")
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 16}
    vision = transformers.CLIPVisionConfig(num_attention_heads=2, patch_size=4, **vision)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=9)
    model = transformers.LlavaForConditionalGeneration._from_config(
        config, attn_implementation="sdpa"
    )
    model.family = "llama"
    return tiny.randomize(model, 0)


def image_prompt():
    ids = tiny.prompt()
    ids[ids == 9] = 10
    ids[:, 5:21] = 9  # 4 x 4 patches
    generator = torch.Generator().manual_seed(5)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}


def test_a_vision_tower_keeps_its_own_attention():
    model, inputs = llava(), image_prompt()
    expected, names = model(**inputs).logits, implementations(model)
    with pbs_attn.patch_model(model, CONFIG.replace(strict=True)), pbs_attn.record() as calls:
        assert model.config.vision_config._attn_implementation == "sdpa"
        logits = model(**inputs).logits
    assert calls.calls == {"pbs": 2, "dense": 0}
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert implementations(model) == names
    assert torch.equal(model(**inputs).logits, expected)


def test_a_vision_tower_that_gets_the_name_runs_dense(name):
    """A plain string reaches every part of a composite model, the non-causal ones too."""
    pbs_attn.register(name, CONFIG)
    model, inputs = llava(), image_prompt()
    expected = model(**inputs).logits
    model.set_attn_implementation(name)
    with pbs_attn.record() as calls:
        logits = model(**inputs).logits
    # the features come from the last tower layer but one; all its layers may run
    assert calls.calls["pbs"] == 2 and set(calls.reasons) == {"non_causal"}
    assert calls.reasons["non_causal"] >= 1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_cross_attention_is_no_prefix(name):
    """Encoder and decoder in one model: queries fewer than keys, and yet not causal."""
    pbs_attn.register(name, CONFIG)
    config = transformers.BartConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        attn_implementation="eager",
    )
    model = tiny.randomize(transformers.BartModel(config), 0)
    ids, mask = tiny.padded([320, 250], "right")
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": tiny.prompt(290, 2, seed=7),
    }
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation(name)
    with pbs_attn.record() as calls:
        hidden = model(**inputs).last_hidden_state
    if transformers.__version__.startswith("4."):  # which makes 4-D masks for this model
        assert calls.reasons == {"non_causal": 2, "mask_4d": 1}
    else:
        assert calls.calls["pbs"] == 1 and calls.reasons == {"non_causal": 2}
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
