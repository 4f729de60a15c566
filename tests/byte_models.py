# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint whose tokens are bytes: a vocabulary of 257, so that measuring every logit of
long prompts costs nothing."""

import functools
from pathlib import Path

import torch

EOS = 256  # "<end>"
WINDOW = 4096


@functools.cache
def tokenizer():
    import transformers
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>")


def llama(seed=0):
    """A random Llama: 2 layers, 4 query and 2 KV heads of 64."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=EOS + 1, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, initializer_range=0.1,
        max_position_embeddings=WINDOW, bos_token_id=None, eos_token_id=EOS,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def checkpoint(folder, seed=0):
    """`folder` as text, with that model, saved."""
    from pbs_attn.cli import models

    with models.quiet():
        llama(seed).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return str(Path(folder))
