# SPDX-License-Identifier: Apache-2.0
"""Methods inside transformers models: registered, patched, by layer, compiled, generating."""

import json

import pytest
import tiny_models as tiny
import torch
from test_transformers_compile import Layer, geometry, tensors
from tiny_models import CONFIG
from toy_methods import Everything, Softmax, sparse

import pbs_attn
from pbs_attn import methods
from pbs_attn.eval.attention import using
from pbs_attn.integrations.forward import attention_forward

pytestmark = pytest.mark.tf457
KEEP_ALL = "block=64,segment=128,tau=1,min_q=0,min_kv=0"
EXACT = [
    "full", f"pbs:{KEEP_ALL}", f"xattention:{KEEP_ALL}", "streaming:window=9999,min_q=0,min_kv=0",
    sparse(Everything), sparse(Softmax),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def close(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", EXACT, ids=str)
def test_using_is_exact_and_leaves_nothing(method):
    model, ids = tiny.build("llama"), tiny.prompt()
    expected = model(ids).logits
    with using(model, method) as calls:
        close(model(ids).logits, expected)
    route = "dense" if method == "full" else "pbs"
    assert calls.calls[route] == 2 and sum(calls.calls.values()) == 2
    assert calls.density == 1.0
    assert calls.reasons == ({"asked": 2} if method == "full" else {})
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(ids).logits, expected)


def test_using_the_stock_attention_counts_nothing():
    model, ids = tiny.build("llama"), tiny.prompt(40)
    expected = model(ids).logits
    with using(model, "sdpa") as calls:
        assert torch.equal(model(ids).logits, expected)
    assert calls is None and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("method", EXACT[1:], ids=str)
@pytest.mark.parametrize("side", ("left", "right"))
def test_padded_batches(method, side):
    model = tiny.build("llama")
    ids, mask = tiny.padded([300, 170], side)
    options = {"attention_mask": mask, "position_ids": tiny.positions(mask)}
    expected = model(ids, **options).logits[mask.bool()]
    with using(model, method) as calls:
        close(model(ids, **options).logits[mask.bool()], expected)
    assert calls.calls == {"pbs": 2, "dense": 0}


@pytest.mark.parametrize("method", EXACT[1:], ids=str)
def test_chunked_prefill_and_generation(method):
    """Two chunks of the prompt, then tokens one by one: those go dense."""
    model, ids = tiny.build("llama"), tiny.prompt()
    expected = model(ids).logits[:, -1]
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    with using(model, method) as calls:
        first = model(ids[:, :131], use_cache=True)
        second = model(ids[:, 131:], past_key_values=first.past_key_values, use_cache=True)
        close(second.logits[:, -1], expected)
    assert calls.calls == {"pbs": 4, "dense": 0} and calls.density == 1.0
    with using(model, method) as calls:
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens)
    assert calls.calls == {"pbs": 2, "dense": 6} and calls.reasons == {"short_q": 6}


@pytest.mark.parametrize("family", ("mistral_window", "gemma2", "gemma3", "gpt_oss"))
def test_what_only_the_model_can_do_stays_dense_with_its_reason(family):
    model, ids = tiny.build(family), tiny.prompt()
    expected = model(ids).logits
    with using(model, sparse(Everything).replace(strict=False)) as calls:
        close(model(ids).logits, expected)
    assert calls.reasons == tiny.reasons(family)
    assert calls.calls.get("pbs", 0) == tiny.sparse_layers(family)
    with using(model, sparse(Everything)), pytest.raises(NotImplementedError, match="strict mode"):
        model(ids)


def test_other_head_dims_of_values_run_under_a_method():
    """Kernels refuse DeepSeek's; a block mask through torch does not."""
    model, ids = tiny.build("deepseek_v3"), tiny.prompt()
    expected = model(ids).logits
    with using(model, sparse(Everything)) as calls:
        close(model(ids).logits, expected)
    assert calls.calls == {"pbs": 2, "dense": 0}


# ---- policies ------------------------------------------------------------------------------------


def test_layers_have_their_own():
    Softmax.layers.clear()
    model, ids = tiny.build("llama", num_hidden_layers=4), tiny.prompt()
    expected = model(ids).logits
    layers = {0: "dense", 1: sparse(Softmax), 2: f"pbs+:{KEEP_ALL}"}
    with pbs_attn.patch_model(model, "full", layers=layers), pbs_attn.record() as calls:
        close(model(ids).logits, expected)
    assert calls.calls == {"pbs": 2, "dense": 2}
    assert calls.reasons == {"disabled": 1, "asked": 1} and list(calls.layers) == [1, 2]
    assert Softmax.layers == [1]


def test_register_takes_a_text():
    from pbs_attn.integrations import registry

    name = "pbs_attn_test_method"
    model, ids = tiny.build("llama"), tiny.prompt()
    expected = model(ids).logits
    try:
        pbs_attn.register(name, f"identity:{KEEP_ALL}")
        pbs_attn.register(name, methods.get(f"identity:{KEEP_ALL}"))  # the same: no objection
        with pytest.raises(ValueError, match="overwrite=True"):
            pbs_attn.register(name, "identity")
        model.set_attn_implementation(name)
        with pbs_attn.record() as calls:
            close(model(ids).logits, expected)
        assert calls.calls == {"pbs": 2, "dense": 0}
    finally:
        model.set_attn_implementation("eager")
        registry._registered.pop(name, None)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("sdpa",), ValueError, "config is 'sdpa', the model's own"),
        (("pbs:tau=-1",), ValueError, "config is 'pbs:tau=-1': pbs: tau is -1"),
        ((None, {0: "sdpa"}), ValueError, r"layers\[0\] is 'sdpa', the model's own"),
        ((None, {0: "pbs:tau=x"}), TypeError, r"layers\[0\] is 'pbs:tau=x'"),
        ((None, {0: "magic"}), TypeError, r"layers\[0\] is 'magic'; allowed"),
    ],
)
def test_bad_policies_leave_the_model_alone(arguments, error, said):
    model = tiny.build("llama")
    config, *layers = arguments
    with pytest.raises(error, match=said):
        pbs_attn.patch_model(model, config, layers=layers[0] if layers else None)
    assert model.config._attn_implementation == "eager"


def test_thresholds_of_every_layer(tmp_path):
    """The file's tau 1 keeps all in one layer; its tau 0 leaves the other layer the own blocks."""
    path = tmp_path / "tau.json"
    path.write_text(json.dumps([[1.0] * 4, [0.0] * 4]))
    model, ids = tiny.build("llama"), tiny.prompt()
    text = f"xattention:block=64,segment=128,thresholds={path},min_q=0,min_kv=0"
    with using(model, text) as calls:
        model(ids)
    assert calls.layers[0] == [1.0] * 4 and max(calls.layers[1]) < 0.8
    path.write_text(json.dumps([[1.0] * 4]))
    with using(model, text), pytest.raises(ValueError, match="1 layers; needed: layer 1"):
        model(ids)


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", (None, geometry([40, 260, 40, 260], [0, 300, 0, 300])))
def test_kernel_methods_and_full_are_one_graph(mask):
    layer, (q, k, v) = Layer(), tensors(300, 300)
    for method in (methods.get("pbs:block=64,segment=128,tau=0.5,min_q=0,min_kv=0"),
                   methods.get("full")):  # fmt: skip

        def call(q, k, v, method=method):
            return attention_forward(layer, q, k, v, mask, method)[0]

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, k, v), call(q, k, v))


@pytest.mark.parametrize("method", (Everything, Softmax), ids=("block", "token"))
def test_other_methods_break_the_graph_and_run(method):
    layer, (q, k, v) = Layer(), tensors(300, 300)
    policy = sparse(method)

    def call(q, k, v):
        return 2 * attention_forward(layer, 2 * q, k, v, None, policy)[0]

    torch._dynamo.reset()
    with pbs_attn.record() as calls:
        found = torch.compile(call, backend="aot_eager")(q, k, v)
    assert calls.calls["pbs"] == 1
    torch.testing.assert_close(found, call(q, k, v))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="on the host"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v)


@pytest.mark.filterwarnings("ignore")  # of jit.trace: that it is old, and about other lengths
def test_jit_trace_takes_the_dense_route():
    layer, (q, k, v) = Layer(), tensors(300, 300)
    policy = sparse(Everything).replace(strict=False)

    def call(q, k, v):
        return attention_forward(layer, q, k, v, None, policy)[0]

    with pbs_attn.record() as calls:
        traced = torch.jit.trace(call, (q, k, v), check_trace=False)
    assert calls.reasons == {"tracing": 1}
    torch.testing.assert_close(traced(q, k, v), call(q, k, v))


def test_a_patched_model_keeps_its_own_config():
    """An outer patch with a method, an inner one with a PBSConfig, and back."""
    model, ids = tiny.build("llama"), tiny.prompt()
    with using(model, sparse(Softmax)) as outer:
        Softmax.layers.clear()
        with pbs_attn.patch_model(model, CONFIG):
            model(ids)
        assert not Softmax.layers
        model(ids)
        assert Softmax.layers == [0, 1]
    assert outer.calls["pbs"] == 4
