# SPDX-License-Identifier: Apache-2.0
"""The model of a run: prompts as tokens, greedy generation and prefill under a method.

Tokens needs the tokenizer and the config only (--dry-run loads no weights); Session adds the model.
"""

import contextlib
import copy
import random
import time
from dataclasses import dataclass, field

import torch

from ..cli import CommandError, measure
from . import attention, parallel

# Settings of a generation config that change what greedy decoding gives. They stay, as in the
# official scripts, which call model.generate; every run says so at its start.
HABITS = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


class PromptTooLong(ValueError):
    """The prompt and its new tokens do not fit the model's window: a failed row, not a stop."""


class Tokens:
    """A tokenizer, the window of its model, and the prompt options of the command line.

    window: positions the model knows, None if its config does not say; max_prompt: --max-prompt or
    None; use_chat: False under --no-chat; template_args: what the chat template is given.
    """

    def __init__(self, tokenizer, window=None, *, max_prompt=None, use_chat=True,
                 template_args=None, name="the model"):  # fmt: skip
        self.tokenizer, self.window, self.name = tokenizer, window, name
        self.max_prompt, self.use_chat = max_prompt, use_chat
        self.template_args = dict(template_args or {})

    def encode(self, text, special=True):
        """Token ids of `text`; special: with what the tokenizer adds by itself (BOS)."""
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids)

    def decode(self, ids):
        """The text of `ids`, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, messages, answer_prefix=""):
        """Ids of a conversation up to the reply, which begins with `answer_prefix`.

        messages: [{"role": ..., "content": ...}]. The template writes BOS itself, so nothing is
        added when its text is encoded. Under --no-chat the contents are a plain prompt.
        Raises CommandError if the model has no chat template.
        """
        if not self.use_chat:
            text = "\n\n".join(message["content"] for message in messages)
            return self.encode(text + answer_prefix)
        if not getattr(self.tokenizer, "chat_template", None):
            raise CommandError(
                f"--model {self.name} has no chat template; --no-chat gives it plain prompts"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.template_args
            )
        except Exception as error:  # whatever Jinja or the template itself raises
            raise CommandError(f"the chat template of --model {self.name} failed: {error}; "
                               "see --template-args, --no-chat") from error  # fmt: skip
        return self.encode(text + answer_prefix, special=False)

    def truncate_middle(self, text, limit):
        """(text, cut_tokens): the first and the last half of `limit` tokens, the official way.

        LongBench's pred.py: ids with BOS as the tokenizer adds it, int(limit / 2) from both ends,
        decoded without special tokens and joined. Encoding the result again may differ by a few.
        """
        ids = self.encode(text)
        if len(ids) <= limit:
            return text, 0
        half = int(limit / 2)
        if half < 1:
            raise ValueError(f"limit is {limit}; allowed: 2 or more")
        return self.decode(ids[:half]) + self.decode(ids[-half:]), len(ids) - 2 * half

    def truncate_left(self, ids, limit):
        """(ids, cut): the last `limit` ids."""
        if limit < 1:
            raise ValueError(f"limit is {limit}; allowed: 1 or more")
        return list(ids[-limit:]), max(0, len(ids) - limit)

    def check(self, prompt_tokens, new_tokens=0):
        """Raises PromptTooLong if a prompt and its new tokens do not fit the window."""
        if self.window is not None and prompt_tokens + new_tokens > self.window:
            raise PromptTooLong(
                f"the prompt has {prompt_tokens:,} tokens and asks for {new_tokens:,} new ones; "
                f"{self.name} has a window of {self.window:,}: --max-prompt "
                f"{max(self.window - new_tokens, 1)} or less cuts it"
            )


@dataclass
class Generated:
    """One greedy generation.

    tokens: new ids, the end token included; text: without special tokens; stop: "eos" | "length";
    prefill_s: until the first token is on the host; total_s: until the last; density, computed:
    shares of causal blocks (1.0 where nothing was sparse); calls by route; reasons: why calls were
    dense; peak_gb: 1e9 bytes allocated at most on the GPU, None on the CPU.
    """

    tokens: list
    text: str
    stop: str
    prefill_s: float
    total_s: float
    density: float = 1.0
    computed: float = 1.0
    calls: dict = field(default_factory=dict)
    reasons: dict = field(default_factory=dict)
    peak_gb: float | None = None


class _Clock:
    """A streamer of transformers that notes when the first new token arrives on the host."""

    def __init__(self):
        self.first, self.puts = None, 0

    def put(self, value):
        self.puts += 1  # the first is the prompt itself
        if self.puts == 2:
            self.first = time.perf_counter()

    def end(self):
        pass


def seed_all(seed):
    """Seed python, numpy and torch, so that a row does not depend on the rows before it."""
    random.seed(seed)
    torch.manual_seed(seed)
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed(seed % 2**32)


class Session:
    """A loaded model with its Tokens. name: as given by --model; dtype: word; device, seed.

    tp: ranks of torchrun that hold the model together; each calls the same methods.
    """

    def __init__(self, model, tokens, *, name="model", seed=42, tp=None):
        self.model, self.tokens, self.name, self.seed = model, tokens, name, seed
        self.device = next(model.parameters()).device
        self.ranks = parallel.Group(tp, self.device)
        self.dtype = str(model.dtype).removeprefix("torch.")

    def using(self, method):
        """Context manager: the model with the attention of `method`; yields the Record or None."""
        return attention.using(self.model, method)

    def habits(self):
        """[(name, value, plain)] of the generation config's that change greedy decoding."""
        config, found = self.model.generation_config, []
        for name, plain in HABITS.items():
            value = getattr(config, name, None)
            if value not in (None, plain, [], 0):
                found.append((name, value, plain))
        return found

    def generate(self, ids, method, *, max_new_tokens, extra_eos=(), min_new_tokens=0,
                 temperature=0.0, past_window=False):  # fmt: skip
        """Generation after the prompt `ids` (list of int), as a Generated; greedy at temperature 0.

        Stops on every end token of the generation config and on `extra_eos` (ids). past_window:
        only the prompt has to fit the window, as in harnesses that let the reply run over it.
        Raises PromptTooLong.
        """
        self.tokens.check(len(ids), 0 if past_window else max_new_tokens)
        prompt = torch.tensor([list(ids)], device=self.device)
        eos = self.eos() + [token for token in extra_eos if token not in self.eos()]
        settings = self._settings(eos, max_new_tokens, min_new_tokens, temperature)
        clock = _Clock()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.synchronize(self.device)
        with self._configured(settings), self.using(method) as calls, torch.inference_mode():
            start = time.perf_counter()
            output = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), streamer=clock
            )
            tokens = output[0, prompt.shape[1] :].tolist()
            end = time.perf_counter()
        return Generated(
            tokens=tokens,
            text=self.tokens.decode(tokens),
            stop="eos" if tokens and tokens[-1] in eos else "length",
            prefill_s=(clock.first or end) - start,
            total_s=end - start,
            peak_gb=torch.cuda.max_memory_allocated(self.device) / 1e9 if cuda else None,
            **self.ranks.over_heads(self.counts(calls)),
        )

    def prefill(self, ids, method, tick=lambda: None):
        """(measure.Prefill, counts) of one forward over `ids` with a fresh cache, no new tokens.

        counts: {density, computed, calls, reasons}. Losses: measure.token_losses(model, ids, run).
        The window is not checked: tokens.check does that.
        """
        with self.using(method) as calls:
            run = measure.prefill(self.model, self.tensor(ids), tick)
        return run, self.counts(calls)

    def tensor(self, ids):
        """`ids` as int64 [1, N] on the model's device."""
        if isinstance(ids, torch.Tensor):
            return ids.reshape(1, -1).to(self.device)
        return torch.tensor([list(ids)], device=self.device)

    def counts(self, calls):
        """What a Record counted, as fields of a record; None (stock attention) counts as dense."""
        if calls is None:
            layers = self.model.config.get_text_config().num_hidden_layers
            return {"density": 1.0, "computed": 1.0, "calls": {"stock": layers}, "reasons": {}}
        return {"density": calls.density, "computed": calls.computed,
                "calls": dict(calls.calls), "reasons": dict(calls.reasons)}  # fmt: skip

    def eos(self):
        """Every end token: the generation config's list, or the tokenizer's one."""
        found = self.model.generation_config.eos_token_id
        if found is None:
            found = self.tokens.tokenizer.eos_token_id
        if found is None:
            return []
        return list(found) if isinstance(found, (list, tuple)) else [int(found)]

    @contextlib.contextmanager
    def _configured(self, settings):
        """The model with this generation config. Given to `generate` instead, transformers 4.57
        takes do_sample=False for a default and samples if the checkpoint's own config does."""
        own = self.model.generation_config
        self.model.generation_config = settings
        try:
            yield
        finally:
            self.model.generation_config = own

    def _settings(self, eos, max_new_tokens, min_new_tokens, temperature):
        """The model's generation config, made greedy; what else it asks for stays (recorded).

        At a temperature it samples from all tokens: no top_p, no top_k.
        """
        settings = copy.deepcopy(self.model.generation_config)
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "max_length"):
            setattr(settings, name, None)
        settings.do_sample, settings.num_beams = temperature > 0, 1
        if temperature > 0:
            settings.temperature, settings.top_k = float(temperature), 0
        settings.max_new_tokens = max_new_tokens
        settings.min_new_tokens = min_new_tokens or None
        settings.eos_token_id = eos or None
        settings.pad_token_id = eos[0] if eos else 0
        settings.use_cache = True
        return settings
