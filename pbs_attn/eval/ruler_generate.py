# SPDX-License-Identifier: Apache-2.0
"""Rows of one RULER task at one length, made to fit: as many units as the budget holds.

The budget is the nominal length. It includes the new tokens and the model's chat template, as
RULER's does. A row depends on seed, task, length, index and tokenizer, and on no other row: every
shard makes the same ones.
"""

import functools
import random

from ..cli import CommandError
from . import ruler_build, ruler_tasks
from .jobs import BadRow

VERSION = "pbs_attn ruler 1"  # changes whenever the rows do
PROBE = -1  # index of the row by which the size is found


def fit(tokens, least, budget):
    """The most units for which tokens(units) <= budget, None if not even `least`.

    tokens: int -> int, nearly linear. A search between two bounds that guesses along the line and
    halves every third time, because every look costs a tokenisation of the whole text."""
    low, used = least, tokens(least)
    if used > budget:
        return None
    high = max(2 * least, 16)
    while (top := tokens(high)) <= budget:
        low, used = high, top
        high *= 2
    for look in range(200):
        if high - low <= 1:
            break
        guess = (low + high) // 2
        if look % 3 != 2:
            guess = low + int((budget - used) * (high - low) / (top - used))
        guess = min(max(guess, low + 1), high - 1)
        found = tokens(guess)
        if found <= budget:
            low, used = guess, found
        else:
            high, top = guess, found
    return low


class Measure:
    """Counts tokens: `plain` of a text alone, `prompt` of the prompt with its chat template."""

    def __init__(self, tokens):
        self.tokens = tokens

    def plain(self, text):
        return len(self.tokens.encode(text, special=False))

    def prompt(self, text, prefix):
        return len(prompt_ids(self.tokens, text, prefix))


def prompt_ids(tokens, text, prefix):
    """Token ids of a row: the user's turn, then the answer cue inside the reply."""
    return tokens.chat([{"role": "user", "content": text}], prefix)


class Generated:
    """All rows of one task at one length, labelled ruler-generated.

    sources: what task.needs names; tokens: the frame's Tokens. Raises CommandError with the least
    length where `length` is too short; RULER itself would look for a size for ever."""

    label, version = "ruler-generated", VERSION

    def __init__(self, name, length, sources, tokens, seed=42):
        self.task, self.length, self.seed = ruler_tasks.tasks()[name], length, seed
        self.measure = Measure(tokens)
        self.builder = ruler_build.BUILDERS[self.task.family](self.task, length, sources)
        self.builder.prepare(self.measure.plain, fit)
        if self._tokens(PROBE, self.builder.least(0)) > length:
            raise CommandError(self._too_short())
        self._last = None

    @functools.cached_property
    def units(self):
        """Units that the probe row holds: where every row begins. Found at the first row."""
        return fit(lambda units: self._tokens(PROBE, units), self.builder.least(0), self.length)

    def row(self, index):
        """Row `index` (>= 0), the same in every process. Raises BadRow where it cannot fit."""
        if self._last is None or self._last[0] != index:
            self._last = index, self._make(index)
        return self._last[1]

    def _make(self, index):
        least = self.builder.least(index)
        units = max(self.units, least)
        text = self._text(index, units)
        while (used := self._count(text)) > self.length:
            if units <= least:
                raise BadRow(
                    f"{self.task.name} row {index}: {used} tokens with as little text as it can "
                    f"have; --lengths of {self.length} is too short for it"
                )
            units = max(least, units - max(1, (used - self.length) * units // used))
            text = self._text(index, units)
        return ruler_tasks.Row(*text, {"units": units})

    def _text(self, index, units):
        rng = random.Random(f"{VERSION}/{self.seed}/{self.task.name}/{self.length}/{index}")
        return self.builder.build(rng, max(index, 0), units)

    def _tokens(self, index, units):
        return self._count(self._text(index, units))

    def _count(self, text):
        """Tokens of prompt and reply together."""
        return self.measure.prompt(text.input, text.prefix) + self.task.new_tokens

    def _too_short(self):
        need = self._tokens(PROBE, self.builder.least(0))
        need = -(-(need + need // 20) // 16) * 16  # rows differ by a few tokens
        return (
            f"--lengths {self.length}: {self.task.name} needs about {need} tokens with this "
            f"tokenizer (shortest text, chat template and {self.task.new_tokens} new tokens)"
        )
