# SPDX-License-Identifier: Apache-2.0
"""A decoder of transformers: its sparse prefill beside the dense one.

Random weights of a 1B Llama, or --model FOLDER. With tau 1, where every block is computed, hidden
states may be off those of the model in fp32 by twice of what torch's attention is off; with the
default tau they are compared and printed. Every layer has to take the sparse route.

python tools/gpu_check/model.py --device cuda
python tools/gpu_check/model.py --device cpu --tiny      its own logic, where there is no GPU
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pbs_attn  # noqa: E402
from pbs_attn.cli import measure  # noqa: E402

LENGTH = 16384
CLOSE = 0.1  # off dense in bf16, where the model in fp32 does not fit into memory
SHARPER = 2.0  # q and k weights times this: attention of random weights is nearly uniform
TOPICS, RUN = 16, 256  # ids come in runs that share a word, as a text has them


# hidden, intermediate, layers, query heads, K/V heads, vocabulary
SIZES = {
    "tiny": (128, 256, 2, 4, 2, 500),
    "1b": (2048, 8192, 16, 32, 8, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}


def random_llama(device: torch.device, size: str, longest: int = 2 * LENGTH):
    import transformers

    hidden, intermediate, layers, heads, heads_k, vocab = SIZES[size]
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads_k,
        vocab_size=vocab,
        max_position_embeddings=longest,
        initializer_range=0.9 / hidden**0.5,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(SHARPER)
            layer.self_attn.k_proj.weight.mul_(SHARPER)
    return model


def random_ids(vocab: int, length: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (length,), generator=generator)
    runs = torch.randint(TOPICS, (-(-length // RUN),), generator=generator)
    words = torch.randint(vocab, (TOPICS,), generator=generator)[runs].repeat_interleave(RUN)
    own = torch.rand(length, generator=generator) < 0.5
    return torch.where(own, words[:length], ids)[None].to(device)


def load(folder: str, length: int, device: torch.device):
    """(model, ids) of a real model over the shipped text."""
    import transformers

    from pbs_attn.cli import models

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.bfloat16
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", length)
    ids = models.token_ids(tokenizer, models.demo_text()[1], min(length, longest))
    return model.eval().to(device), ids.to(device)


@torch.inference_mode()
def run(model, ids, attention: str):
    """(hidden [1, N, hidden size], mean loss, best next tokens, Record, seconds)"""
    model.set_attn_implementation(attention)
    with pbs_attn.record() as calls:
        found = measure.prefill(model, ids)
    losses, best = measure.token_losses(model, ids, found)
    return found.hidden, float(losses.mean()), best, calls, found.seconds


@torch.inference_mode()
def hidden_in_fp32(model, ids):
    """None where the memory does not suffice."""
    model.set_attn_implementation("sdpa")
    try:
        return measure.prefill(copy.deepcopy(model).float(), ids).hidden
    except torch.OutOfMemoryError:
        return None


def distance(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.float() - truth.float()).norm() / truth.float().norm())


def compare(model, ids) -> list[str]:
    """Prints both sparse runs beside the dense one; what is wrong, in sentences."""
    layers = model.config.get_text_config().num_hidden_layers
    truth = hidden_in_fp32(model, ids)
    run(model, ids[:, :64], "sdpa")  # libraries loaded, kernels chosen
    hidden, loss, best, _, seconds = run(model, ids, "sdpa")
    line, allowed = "", CLOSE
    if truth is None:
        truth = hidden
    else:
        allowed = 2 * distance(hidden, truth)
        line = f"off fp32 by {allowed / 2:.1e}, "
    print(f"dense: {ids.shape[1]} tokens, {layers} layers, loss {loss:.4f}, {line}{seconds:.3f} s")
    problems = []
    for tau in (1.0, pbs_attn.PBSConfig().tau):
        config = pbs_attn.PBSConfig(tau=tau, min_q=0, min_kv=0)
        pbs_attn.register("pbs_attn_check", config, overwrite=True)
        far, far_loss, far_best, calls, seconds = run(model, ids, "pbs_attn_check")
        off = distance(far, truth)
        agree = float((far_best == best).float().mean())
        print(
            f"tau {tau:g}: next-token agreement {agree:.2%}, loss {far_loss - loss:+.4f}, hidden "
            f"states off by {off:.1e}, density {calls.density:.1%}, routes {calls.calls}"
            f"{calls.reasons or ''}, {seconds:.3f} s"
        )
        if tau >= 1 and not off <= allowed:
            problems.append(f"with every block hidden states are off by {off:.1e} > {allowed:.1e}")
        if not torch.isfinite(far).all():
            problems.append(f"tau {tau:g}: hidden states that are not finite")
        if not calls.calls["pbs"] or calls.calls["dense"]:
            problems.append(f"tau {tau:g}: routes {calls.calls}, dense because {calls.reasons}")
    return problems


def main(arguments=None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    p.add_argument("--model", metavar="FOLDER", help="of a transformers model with its tokenizer")
    p.add_argument("--length", type=int, help=f"tokens ({LENGTH})")
    p.add_argument("--tiny", action="store_true", help="two narrow layers, 1000 tokens")
    args = p.parse_args(arguments)
    device = torch.device(args.device)
    length = args.length or (1000 if args.tiny else LENGTH)
    if args.model:
        model, ids = load(args.model, length, device)
    else:
        model = random_llama(device, "tiny" if args.tiny else "1b")
        ids = random_ids(model.config.vocab_size, length, device)
    problems = compare(model, ids)
    for problem in problems:
        print(f"problem: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
