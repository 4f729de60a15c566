# SPDX-License-Identifier: Apache-2.0
"""Tiny random decoders of many families, built from configs: nothing is downloaded.

`FAMILIES[name]` says how each layer is expected to route a long causal prefill: None = sparse,
otherwise the reason for the dense route. Weights are larger than usual, so that attention decides
the logits and a wrong mask cannot hide in a nearly constant output.
"""

import copy

import pytest
import torch
import transformers

from pbs_attn import PBSConfig

VOCAB = 96
WINDOW = 200  # of sliding layers; prompts in these tests are longer
# Blocks of 64 in segments of 128: a prompt above 256 tokens has history outside its own segment.
CONFIG = PBSConfig(block_size=64, segment_size=128, tau=1.0, min_q=0, min_kv=0)
PROMPT = 300

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts_per_tok": 2, "output_router_logits": False}
_HYBRID = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 16,
}

# name: (config class, extra options, [reason per layer])
FAMILIES = {
    "llama": ("LlamaConfig", {}, [None, None]),
    "qwen2": ("Qwen2Config", {}, [None, None]),
    "qwen3": ("Qwen3Config", {"head_dim": 24}, [None, None]),
    "mistral": ("MistralConfig", {"sliding_window": None}, [None, None]),
    "mistral_window": ("MistralConfig", {"sliding_window": WINDOW}, ["sliding_window"] * 2),
    "mistral_wide_window": ("MistralConfig", {"sliding_window": 4096}, [None, None]),
    "gemma2": (
        "Gemma2Config",
        {**_HYBRID, "query_pre_attn_scalar": 16},
        ["sliding_window", "softcap"],
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**_HYBRID, "query_pre_attn_scalar": 16},
        ["sliding_window", None],
    ),
    "phi3": ("Phi3Config", {"num_key_value_heads": 4}, [None, None]),
    "mixtral": ("MixtralConfig", {**_MOE, "num_local_experts": 4}, [None, None]),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_MOE, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
        [None, None],
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_HYBRID, **_MOE, "num_local_experts": 4},
        ["sliding_window", "sinks"],
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 2,
        },
        ["head_dim_v"] * 2,
    ),
}

# transformers 4.57 runs these again: one of each kind.
_AGAIN = ("llama", "mistral_window", "gemma2", "gemma3", "gpt_oss", "qwen3_moe")
FAMILY_PARAMS = [
    pytest.param(name, marks=pytest.mark.tf457 if name in _AGAIN else ()) for name in FAMILIES
]


def sparse_layers(family):
    return FAMILIES[family][2].count(None)


def reasons(family):
    """{reason: layers} of one long prefill."""
    words = [word for word in FAMILIES[family][2] if word is not None]
    return {word: words.count(word) for word in words}


def config(family, **options):
    cls, extra, _ = FAMILIES[family]
    return getattr(transformers, cls)(**{**_COMMON, **extra, **options})


def randomize(model, seed):
    """Every weight drawn anew: class defaults leave some at one or zero, sinks and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.15 * noise)
    return model.eval()


def build(family, seed=0, attn_implementation="eager", **options):
    """A model in fp32. eager, as it is the one implementation that every family has."""
    cfg = config(family, **options)
    model = transformers.AutoModelForCausalLM.from_config(
        cfg, attn_implementation=attn_implementation
    )
    model.family = family
    return randomize(model, seed)


def exact_copy(model):
    """The same model in fp64: the reference for logits. None where only eager attention can run
    it, whose softmax is fp32 in any dtype."""
    if any(reason in ("softcap", "sinks") for reason in FAMILIES[model.family][2]):
        return None
    exact = copy.deepcopy(model)
    exact.set_attn_implementation("sdpa")
    if hasattr(exact, "set_experts_implementation"):  # the default has no fp64
        exact.set_experts_implementation("eager")
    return exact.double()


def prompt(length=PROMPT, batch=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, length), generator=generator)


def padded(lengths, side, width=None, seed=1):
    """(input_ids, attention_mask) of a batch with these lengths, padded on one side."""
    width = width or max(lengths)
    ids = prompt(width, len(lengths), seed)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        span = slice(width - length, width) if side == "left" else slice(0, length)
        mask[row, span] = 1
    return torch.where(mask.bool(), ids, 0), mask


def positions(mask):
    """Position ids of a left- or right-padded batch, as generate makes them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
