# SPDX-License-Identifier: Apache-2.0
"""One prefill of a model and what it is worth: time, loss of every token, next tokens.

Everything goes through the model's own forward, so it holds for any decoder of transformers.
"""

import contextlib
import inspect
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import CommandError

HEAD_CHUNK = 512  # rows of logits at a time: 8K x 49,152 of them would be 1.6 GB
COPY_DISTANCE = 512  # a token is copied if its trigram was last seen more than this before


@dataclass
class Prefill:
    seconds: float  # until the next token is known
    attention_seconds: float  # of them inside the attention function
    hidden: torch.Tensor  # [1, N, hidden_size], after the last norm
    output_type: type  # of the decoder's output
    cache: object  # past_key_values
    next_token: int


def attention_functions():
    """transformers' table of attention functions: name -> function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


@contextlib.contextmanager
def wrapped_attention(model, wrap):
    """Replace the attention function that `model` uses by wrap(function) inside the block.

    Models on "eager" call a function of their own module, which this cannot reach.
    """
    table, name = attention_functions(), model.config.get_text_config()._attn_implementation
    if name not in table:
        yield
        return
    function, had_local = table[name], name in table._local_mapping
    table[name] = wrap(function)
    try:
        yield
    finally:
        if had_local:
            table[name] = function
        else:
            del table[name]


class Stopwatch:
    """Seconds inside the attention function; calls `tick` after every call."""

    def __init__(self, device, tick=lambda: None):
        self.cuda = torch.device(device).type == "cuda"
        self.tick, self.total, self.events = tick, 0.0, []

    def wrap(self, function):
        def timed(*args, **kwargs):
            if self.cuda:  # events, so that the timing adds no synchronisation
                pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
                result = function(*args, **kwargs)
                pair[1].record()
                self.events.append(pair)
            else:
                start = time.perf_counter()
                result = function(*args, **kwargs)
                self.total += time.perf_counter() - start
            self.tick()
            return result

        return timed

    def seconds(self):
        return self.total + sum(a.elapsed_time(b) for a, b in self.events) / 1e3


def last_row_only(model):
    """The keyword that keeps the head from computing every row, where the model has it."""
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


@torch.inference_mode()
def prefill(model, ids, tick=lambda: None, cache=None):
    """Run `ids` [1, N] through the model, after what `cache` holds if one is given."""
    seen = []
    hook = model.base_model.register_forward_hook(lambda m, args, output: seen.append(output))
    clock = Stopwatch(ids.device, tick)
    try:
        with wrapped_attention(model, clock.wrap):
            start = time.perf_counter()
            output = model(
                ids, past_key_values=cache, use_cache=True, return_dict=True,
                **last_row_only(model),
            )  # fmt: skip
            next_token = int(output.logits[0, -1].argmax())  # waits for the device
            seconds = time.perf_counter() - start
    finally:
        hook.remove()
    hidden = seen[-1][0]
    return Prefill(
        seconds, clock.seconds(), hidden, type(seen[-1]), output.past_key_values, next_token
    )


@contextlib.contextmanager
def lm_head(model, output_type):
    """Yields a function: hidden rows [1, n, hidden_size] -> their logits fp32 [n, vocabulary].

    They go through the model's own forward, whose decoder is swapped for one that returns those
    rows: softcaps and scalings of logits stay the model's. output_type: of the decoder's output.
    """
    base = model.base_model
    own = base.__dict__.get("forward")  # set by hooks of accelerate; mostly there is none

    def logits(rows):
        base.forward = lambda *args, **kwargs: output_type(last_hidden_state=rows)
        ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
        return model(ids, return_dict=True).logits[0].float()

    try:
        yield logits
    finally:
        if own is not None:
            base.forward = own
        else:
            base.__dict__.pop("forward", None)


@torch.inference_mode()
def token_losses(model, ids, run):
    """(loss fp32 [N - 1], best next token [N]) from the hidden states of a prefill.

    The head runs a few hundred rows at a time.
    """
    losses, best = [], []
    with lm_head(model, run.output_type) as head:
        for start in range(0, ids.shape[1], HEAD_CHUNK):
            logits = head(run.hidden[:, start : start + HEAD_CHUNK])
            best.append(logits.argmax(-1))
            targets = ids[0, start + 1 : start + HEAD_CHUNK + 1]
            losses.append(F.cross_entropy(logits[: len(targets)], targets, reduction="none"))
    return torch.cat(losses).cpu(), torch.cat(best).cpu()


def copied_tokens(ids, distance=COPY_DISTANCE):
    """bool [N - 1]: the target's trigram occurred before, last more than `distance` tokens ago."""
    tokens, last = ids[0].tolist(), {}
    copied = torch.zeros(len(tokens) - 1, dtype=torch.bool)
    for end in range(2, len(tokens)):
        trigram = tuple(tokens[end - 2 : end + 1])
        copied[end - 1] = end - last.get(trigram, end) > distance
        last[trigram] = end
    return copied


@torch.inference_mode()
def generate(model, run, count):
    """`count` greedy tokens after a prefill; extends its cache."""
    tokens = [run.next_token]
    device = run.hidden.device
    while len(tokens) < count:
        step = torch.tensor([[tokens[-1]]], device=device)
        output = model(step, past_key_values=run.cache, use_cache=True, return_dict=True)
        tokens.append(int(output.logits[0, -1].argmax()))
    return tokens[:count]


@torch.inference_mode()
def capture(model, ids, layers=None):
    """{layer: (q, k, v)} of one prefill with the model's present attention, heads as [1, H, N, D].

    For pictures and checks of single heads; all layers of SmolLM2 at 8K are 0.9 GB.
    """
    taken = {}

    def wrap(function):
        def keep(module, query, key, value, *args, **kwargs):
            layer = module.layer_idx
            if layers is None or layer in layers:
                taken[layer] = tuple(x.detach().clone() for x in (query, key, value))
            return function(module, query, key, value, *args, **kwargs)

        return keep

    with wrapped_attention(model, wrap):
        run = prefill(model, ids)
    if not taken:
        raise CommandError("this model does not use transformers' attention interface")
    return taken, run
