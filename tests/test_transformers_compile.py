# SPDX-License-Identifier: Apache-2.0
"""torch.compile sees one graph: no host reads, no counters, ops with fakes."""

import pytest
import tiny_models as tiny
import torch
import transformers
from tiny_models import CONFIG

import pbs_attn
from pbs_attn.integrations import masks
from pbs_attn.integrations.forward import attention_forward


class Layer(torch.nn.Module):
    """What an attention module shows to an attention function."""

    layer_idx = 0
    is_causal = True
    num_key_value_groups = 2


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def tensors(seqlen_q, seqlen_k):
    torch.manual_seed(0)
    q = torch.randn(2, seqlen_q, 4, 16).transpose(1, 2)
    return q, torch.randn(2, 2, seqlen_k, 16), torch.randn(2, 2, seqlen_k, 16)


def geometry(*rows):
    return torch.tensor(rows, dtype=torch.int32)[:, None, None, :]


@pytest.mark.parametrize(
    "seqlen_q, seqlen_k, mask",
    [
        (300, 300, None),
        (140, 300, None),
        (300, 300, geometry([40, 260, 40, 260], [0, 300, 0, 300])),
        (140, 512, geometry([0, 140, 0, 300], [0, 140, 30, 270])),
        (1, 300, None),
        (300, 300, torch.ones(1, 1, 300, 300, dtype=torch.bool).tril()),
    ],
    ids=["one-shot", "prefix", "left-padded", "static", "decode", "4-d"],
)
def test_one_graph(seqlen_q, seqlen_k, mask):
    layer, (q, k, v) = Layer(), tensors(seqlen_q, seqlen_k)
    config = CONFIG.replace(tau=0.5)

    def call(q, k, v):
        return attention_forward(layer, q, k, v, mask, config, scaling=0.25)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))


def test_a_model_on_a_static_cache_is_one_graph():
    """As generate compiles it: masks prepared outside, q_offset a tensor inside."""
    ids, mask = tiny.padded([300, 261], "left")
    place = tiny.positions(mask)
    model = tiny.build("llama")
    expected = model(ids, attention_mask=mask, position_ids=place).logits[mask.bool()]
    with pbs_attn.patch_model(model, CONFIG):
        cache = transformers.StaticCache(config=model.config, max_cache_len=512)
        prepared = masks.attention_mask_function(
            batch_size=2, q_length=300, kv_length=512, attention_mask=mask.bool(), device="cpu"
        )
        assert masks.is_geometry(prepared)

        def call(ids, prepared):
            return model(
                ids, attention_mask=prepared, position_ids=place, past_key_values=cache
            ).logits

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        logits = compiled(ids, prepared)[mask.bool()]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
