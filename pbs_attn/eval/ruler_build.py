# SPDX-License-Identifier: Apache-2.0
"""The texts of RULER's 13 tasks: one builder per family, written from RULER's description.

A builder turns (rng, index, units) into the text of one row. A unit is what the text is made longer
by: a line of noise or of needles, a word, a document. All randomness comes from `rng`.
"""

import math
import string
import uuid
from typing import NamedTuple

from . import ruler_tasks, ruler_text
from .ruler_text import distinct

# Where needles may stand in an essay, in percent: 40 depths from start to end (niah.py).
DEPTHS = [round(i * 100 / 39) for i in range(40)]
SHORT = 4096  # below this RULER makes its lists of words easier


class Text(NamedTuple):
    """input: the user's turn; prefix: the start of the reply; outputs: the references."""

    input: str
    prefix: str
    outputs: tuple


class Builder:
    """`task`: its ruler_tasks.Task; `length`: the nominal length in tokens; `sources`: a dict of
    what task.needs names ("words", "haystack", "squad", "hotpot")."""

    def __init__(self, task, length, sources):
        self.task, self.length, self.sources = task, length, sources

    def prepare(self, plain, fit):
        """Called once before rows. plain(text): its tokens; fit: see ruler_generate.fit."""

    def least(self, index):
        """The fewest units that row `index` can be made of."""
        return 1

    def build(self, rng, index, units):
        raise NotImplementedError


def _insert(lines, places, extra):
    """`lines` with extra[i] before line places[i] (ascending)."""
    result, start = [], 0
    for place, line in zip(places, extra, strict=True):
        result += [*lines[start:place], line]
        start = place
    return result + lines[start:]


class Needles(Builder):
    """niah: keys with values hidden in lines of noise, in other needles, or in an essay."""

    def least(self, index):
        settings = self.task.settings
        return self._keys() * settings["num_needle_v"]

    def _keys(self):
        return max(self.task.settings["num_needle_k"], self.task.settings["num_needle_q"])

    def build(self, rng, index, units):
        settings = self.task.settings
        kinds = settings["type_needle_k"], settings["type_needle_v"]
        count, each = self._keys(), settings["num_needle_v"]
        others = units if settings["type_haystack"] == "needle" else 0
        # Different keys and values throughout: a second value of the asked key has no right answer.
        keys = self._draw(rng, kinds[0], count + others)
        values = self._draw(rng, kinds[1], count * each + others, keys)
        line = ruler_tasks.texts()["needle"]
        pairs = [(keys[i // each], values[i]) for i in range(count * each)]
        pairs += zip(keys[count:], values[count * each :], strict=True)
        lines = [line.format(type_needle_v=kinds[1], key=k, value=v) for k, v in pairs]
        needles, hay = lines[: count * each], lines[count * each :]
        rng.shuffle(needles)
        context = self._context(rng, needles, hay, units)
        asked = rng.sample(range(count), settings["num_needle_q"])
        outputs = tuple(v for i in asked for v in values[i * each : (i + 1) * each])
        return self._question(context, [keys[i] for i in asked], outputs, kinds[1])

    def _draw(self, rng, kind, count, taken=()):
        """`count` different words (pairs), numbers of seven digits or uuids."""
        if kind == "words":
            return self.sources["words"].keys(rng, count, taken)
        if kind == "numbers":
            return distinct(count, lambda: str(rng.randint(10**6, 10**7 - 1)), taken)
        draw = lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))  # noqa: E731
        return distinct(count, draw, taken)

    def _context(self, rng, needles, hay, units):
        if self.task.settings["type_haystack"] == "essay":
            lines = ruler_text.sentences(self.sources["haystack"].text(units))
            depths = sorted(rng.sample(DEPTHS, len(needles)))
            places = [int(len(lines) * depth / 100) for depth in depths]
            return " ".join(_insert(lines, places, needles))
        lines = hay or [ruler_tasks.texts()["noise"]] * units
        places = sorted(rng.sample(range(units), len(needles)))
        return "\n".join(_insert(lines, places, needles))

    def _question(self, context, keys, outputs, kind):
        template, prefix = self.task.template, self.task.answer_prefix
        if len(outputs) == 1:
            template, prefix = ruler_tasks.singular(template), ruler_tasks.singular(prefix)
            kind = kind[:-1]
        query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        fields = {"type_needle_v": kind, "query": query}
        return Text(template.format(context=context, **fields), prefix.format(**fields), outputs)


class Variables(Builder):
    """vt: a chain of assignments in noise, after one solved example of at most 500 tokens."""

    EXAMPLE = 500  # tokens of the example (variable_tracking.py)
    example_units = None

    def prepare(self, plain, fit):
        # Lengths that RULER cannot make get a shorter example, or it alone would be too long.
        budget = self.EXAMPLE if self.length >= 2 * self.EXAMPLE else self.length // 2
        import random

        def tokens(units):
            return plain(self._example(random.Random("example"), units))

        self.example_units = fit(tokens, self.least(0), budget) or self.least(0)

    def least(self, index):
        return self.task.settings["num_hops"] + 1  # as many lines of noise as assignments

    def build(self, rng, index, units):
        text = self._chain(rng, units, letters=5)
        example = self._example(rng, self.example_units)
        return text._replace(input=f"{example}\n\n{text.input}")

    def _example(self, rng, units):
        text = self._chain(rng, units, letters=3)
        return f"{text.input}{text.prefix} {' '.join(text.outputs)}"

    def _chain(self, rng, units, letters):
        hops = self.task.settings["num_hops"]
        draw = lambda: "".join(rng.choices(string.ascii_uppercase, k=letters))  # noqa: E731
        names = tuple(distinct(hops + 1, draw, ("VAR",)))
        value = str(rng.randint(10000, 99998))
        # The space after a copied name is RULER's.
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:], strict=False)]
        noise = [ruler_tasks.texts()["noise"]] * units
        places = sorted(rng.sample(range(units), len(lines)))
        context = "\n".join(_insert(noise, places, lines))
        fields = {"query": value, "num_v": hops + 1}
        return Text(
            self.task.template.format(context=context, **fields),
            self.task.answer_prefix.format(**fields),
            names,
        )


class CommonWords(Builder):
    """cwe: a numbered list in which ten words come more often, after one solved example."""

    def least(self, index):
        return 2 * self.task.settings["num_cw"]

    def build(self, rng, index, units):
        settings = self.task.settings
        if self.length < SHORT:
            example, common = self._list(rng, 20, 3, 1)
            context, outputs = self._list(rng, units, 6, 1)
        else:
            example, common = self._list(rng, 40, 10, 3)
            context, outputs = self._list(rng, units, settings["freq_cw"], settings["freq_ucw"])
        template, prefix = self.task.template, self.task.answer_prefix
        solved = f"{template.format(context=example)}{prefix} {_numbered(common)}"
        return Text(f"{solved}\n{template.format(context=context)}", prefix, tuple(outputs))

    def _list(self, rng, units, often, seldom):
        """(list as text, common words) of `units` different words."""
        words = self.sources["words"].sample(rng, units)
        common = words[: self.task.settings["num_cw"]]
        every = common * often + words[len(common) :] * seldom
        rng.shuffle(every)
        return _numbered(every), common


def _numbered(words):
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


class FrequentWords(Builder):
    """fwe: coded words with counts of a zeta distribution; the most frequent one shows as dots."""

    LETTERS = 6

    def least(self, index):
        return 74  # below this the ranks 4 and 5 may have the same count, and no answer is right

    def build(self, rng, index, units):
        alpha = self.task.settings["alpha"]
        size = max(5, (self.length - self.task.new_tokens) // 50)
        draw = lambda: "".join(rng.choices(string.ascii_lowercase, k=self.LETTERS))  # noqa: E731
        vocabulary = ["...", *distinct(size - 1, draw)]
        words = []
        for rank, word in enumerate(vocabulary, 1):
            words += [word] * int(units * rank**-alpha / _zeta(alpha))
        rng.shuffle(words)
        context = " ".join(words)
        return Text(
            self.task.template.format(context=context),
            self.task.answer_prefix,
            tuple(vocabulary[1:4]),
        )


def _zeta(alpha):
    return math.pi**2 / 6 if alpha == 2.0 else sum(k**-alpha for k in range(1, 10**6))


class Documents(Builder):
    """qa: numbered documents of SQuAD or HotpotQA around those that answer the question."""

    def __init__(self, task, length, sources):
        super().__init__(task, length, sources)
        self.questions = sources["squad" if task.settings["dataset"] == "squad" else "hotpot"]

    def least(self, index):
        return len(self._item(index)[2])

    def _item(self, index):
        return self.questions.items[index % len(self.questions.items)]

    def build(self, rng, index, units):
        question, answers, own, related = self._item(index)
        chosen = self._documents(rng, units, list(own), list(related))
        rng.shuffle(chosen)
        form, docs = ruler_tasks.texts()["document"], self.questions.docs
        context = "\n\n".join(form.format(i=i, document=docs[d]) for i, d in enumerate(chosen, 1))
        text = self.task.template.format(context=context, query=question)
        return Text(text, self.task.answer_prefix, answers)

    def _documents(self, rng, units, own, related):
        """Indices of `units` documents: own, then of the same article, then any, then all again."""
        total = len(self.questions.docs)
        if units >= total:
            return [i % total for i in range(units)]
        missing = units - len(own)
        if missing <= len(related):
            return own + rng.sample(related, missing)
        used = {*own, *related}
        rest = [i for i in range(total) if i not in used]
        return own + related + rng.sample(rest, missing - len(related))


BUILDERS = {
    "niah": Needles,
    "variable_tracking": Variables,
    "common_words_extraction": CommonWords,
    "freq_words_extraction": FrequentWords,
    "qa": Documents,
}
