# SPDX-License-Identifier: Apache-2.0
"""The model class of docs/harnesses.md, as it stands there, over a stand-in for OpenCompass's own.

The stand-in loads a model the way HuggingFacewithChatTemplate of 0.4.2 does, which is all that the
class relies on.
"""

import re
import sys
import types
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
import transformers

import pbs_attn
from pbs_attn.integrations import registry

PAGE = Path(__file__).parents[1] / "docs" / "harnesses.md"


class Chat:
    """HuggingFacewithChatTemplate, as far as loading goes."""

    def __init__(self, path, model_kwargs=dict(), tokenizer_only=False, **other):  # noqa: B006, C408
        self.other = other
        if not tokenizer_only:
            load = transformers.AutoModelForCausalLM.from_pretrained
            self.model = load(path, **({"device_map": "cpu"} | model_kwargs)).eval()


@pytest.fixture
def model_class(monkeypatch):
    package = types.ModuleType("opencompass")
    package.models = types.ModuleType("opencompass.models")
    package.models.HuggingFacewithChatTemplate = Chat
    monkeypatch.setitem(sys.modules, "opencompass", package)
    monkeypatch.setitem(sys.modules, "opencompass.models", package.models)
    code = re.search(r"```python\n(# pbs_opencompass.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    found = {}
    exec(code[1], found)
    before = registry._registered.get(registry.DEFAULT_NAME)
    yield found["PBSAttention"]
    registry._registered[registry.DEFAULT_NAME] = before


def test_the_documented_class(model_class, tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids, kwargs = tiny.prompt(), {"attn_implementation": "sdpa"}
    with torch.no_grad():
        expected = plain(ids).logits
        for method, calls in (("full", {"pbs": 0, "dense": 2}),
                              ("pbs:tau=1,min_q=0,min_kv=0", {"pbs": 2, "dense": 0})):  # fmt: skip
            found = model_class(tmp_path, method=method, model_kwargs=kwargs, max_seq_len=99)
            with pbs_attn.record() as counted:
                logits = found.model(ids).logits
            assert counted.calls == calls
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert found.other == {"max_seq_len": 99} and kwargs == {"attn_implementation": "sdpa"}


def test_a_process_that_only_counts_tokens_registers_nothing(model_class, monkeypatch):
    monkeypatch.setattr(pbs_attn, "register", None, raising=False)
    assert not hasattr(model_class("nowhere", tokenizer_only=True), "model")
