# SPDX-License-Identifier: Apache-2.0
"""RULER's 13 tasks: names, settings, texts (data of NVIDIA/RULER, see data/ruler/NOTICE.md), and
what a row of any of them is.

The texts are read from the shipped JSON, whose SHA-256 is checked: a changed letter in a template
is another benchmark.
"""

import functools
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..cli import CommandError

FILE = Path(__file__).parent / "data" / "ruler" / "tasks.json"
SHA256 = "526c49ff05f8abde30f9fcfab4cdee3c768c02b3f7f930a6d364584ea162e3e5"
LENGTHS = tuple(4096 << i for i in range(6))  # the official lengths, 4K to 128K
OFFICIAL_SAMPLES = 500  # rows per task and length in the official runs (config_tasks.sh)


@dataclass(frozen=True)
class Task:
    """One of the 13: `template` and `answer_prefix` are Python format strings, `new_tokens` the
    official number of tokens to generate, `settings` the task's parameters in synthetic.yaml."""

    name: str
    family: str
    template: str
    answer_prefix: str
    new_tokens: int
    settings: dict = field(hash=False)

    @property
    def needs(self):
        """What the generator needs from outside: of "words", "haystack", "squad", "hotpot"."""
        if self.family == "qa":
            return {"squad"} if self.settings["dataset"] == "squad" else {"hotpot"}
        if self.family == "common_words_extraction":
            return {"words"}
        needs = set()
        if self.settings.get("type_haystack") == "essay":
            needs.add("haystack")
        if self.settings.get("type_needle_k") == "words":
            needs.add("words")
        return needs

    @property
    def metric(self):
        """Any reference for QA, else the share of them (scripts/eval/synthetic/constants.py)."""
        return "string_match_part" if self.family == "qa" else "string_match_all"


@dataclass(frozen=True)
class Row:
    """One prompt: `input` (the user's turn), `answer_prefix` (the start of the assistant's turn),
    `outputs` (references), `meta` (where it comes from)."""

    input: str
    answer_prefix: str
    outputs: tuple
    meta: dict = field(default_factory=dict, compare=False)

    def depth(self):
        """Where the first answer stands in the input, 0 (start) to 1 (end); None where it does not.
        Says something where it stands there once: in the needle tasks."""
        found = self.input.find(self.outputs[0])
        return None if found < 0 else round(found / max(1, len(self.input)), 4)


@functools.lru_cache(maxsize=1)
def _data():
    raw = FILE.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != SHA256:
        raise CommandError(
            f"{FILE.name} of RULER has SHA-256 {digest}, not {SHA256}: reinstall pbs_attn"
        )
    return json.loads(raw)


def texts():
    """{"needle", "noise", "document"}: the sentences that RULER hides, repeats and numbers."""
    return _data()["texts"]


@functools.lru_cache(maxsize=1)
def tasks():
    """{name: Task} of the 13 tasks, in RULER's order."""
    found = {}
    for name, entry in _data()["tasks"].items():
        family = _data()["families"][entry["task"]]
        found[name] = Task(
            name,
            entry["task"],
            family["template"],
            family["answer_prefix"],
            family["tokens_to_generate"],
            entry["args"],
        )
    return found


def groups():
    """{group: [task names]}: what --tasks accepts beside the names."""
    every = tasks()
    return {
        "all": list(every),
        "self": [n for n, t in every.items() if t.needs <= {"words"}],
        "essay": [n for n, t in every.items() if "haystack" in t.needs],
        "niah": [n for n, t in every.items() if t.family == "niah"],
        "qa": [n for n, t in every.items() if t.family == "qa"],
    }


def chosen(text):
    """Task names of '--tasks TEXT' (names and groups, commas), in RULER's order, without doubles.

    Raises CommandError that names the word and what is allowed."""
    wanted = set()
    for word in filter(None, (w.strip() for w in text.split(","))):
        if word in tasks():
            wanted.add(word)
        elif word in groups():
            wanted.update(groups()[word])
        else:
            raise CommandError(
                f"--tasks: {word!r} is no RULER task; allowed: {', '.join(tasks())}, "
                f"or the groups {', '.join(groups())}"
            )
    if not wanted:
        raise CommandError("--tasks is empty; allowed: task names or groups, separated by commas")
    return [name for name in tasks() if name in wanted]


def split_prefix(task, text):
    """(input, answer_prefix) of a row whose input still ends with the answer cue, as older official
    files have it; (text, "") where it does not.

    The cue's fields ({query}, {num_v}) hold any text, and niah's singular form counts too."""
    plural = task.answer_prefix
    for cue in (plural, singular(plural)):
        pattern = re.escape(cue.rstrip())
        pattern = re.sub(r"\\\{(\w+)\\\}", "[^\n]+?", pattern) + r"\s*\Z"
        start = text.rfind(cue[:10])  # the cue's first ten letters hold no field
        if start >= 0 and re.match(pattern, text[start:]):
            return text[:start], text[start:]
    return text, ""


def singular(text):
    """RULER's grammar for one needle: 'Some ... are' becomes 'A ... is' (niah.py)."""
    for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(old, new)
    return text
