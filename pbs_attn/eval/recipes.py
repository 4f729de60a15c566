# SPDX-License-Identifier: Apache-2.0
"""What LongBench's tasks are, and the two ways of running them, as tables.

`official` is the procedure of THUDM/LongBench (pred.py, eval.py at 2e00731); `opencompass` that of
OpenCompass 0.4.2, with which the paper's numbers were made. Same data, other numbers: never compare
across recipes. Prompts are data files with their notices in eval/data/.
"""

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

from . import metrics


class Task(NamedTuple):
    """One LongBench v1 task: its place in the averages, its full size and its metric."""

    category: str
    language: str  # "en", "zh" or "code" (counts in both languages)
    rows: int
    metric: str


TASKS = {
    "narrativeqa": Task("single-doc qa", "en", 200, "qa_f1"),
    "qasper": Task("single-doc qa", "en", 200, "qa_f1"),
    "multifieldqa_en": Task("single-doc qa", "en", 150, "qa_f1"),
    "multifieldqa_zh": Task("single-doc qa", "zh", 200, "qa_f1_zh"),
    "hotpotqa": Task("multi-doc qa", "en", 200, "qa_f1"),
    "2wikimqa": Task("multi-doc qa", "en", 200, "qa_f1"),
    "musique": Task("multi-doc qa", "en", 200, "qa_f1"),
    "dureader": Task("multi-doc qa", "zh", 200, "rouge_zh"),
    "gov_report": Task("summarization", "en", 200, "rouge"),
    "qmsum": Task("summarization", "en", 200, "rouge"),
    "multi_news": Task("summarization", "en", 200, "rouge"),
    "vcsum": Task("summarization", "zh", 200, "rouge_zh"),
    "trec": Task("few-shot", "en", 200, "classification"),
    "triviaqa": Task("few-shot", "en", 200, "qa_f1"),
    "samsum": Task("few-shot", "en", 200, "rouge"),
    "lsht": Task("few-shot", "zh", 200, "classification"),
    "passage_count": Task("synthetic", "en", 200, "count"),
    "passage_retrieval_en": Task("synthetic", "en", 200, "retrieval"),
    "passage_retrieval_zh": Task("synthetic", "zh", 200, "retrieval_zh"),
    "lcc": Task("code", "code", 500, "code_sim"),
    "repobench-p": Task("code", "code", 500, "code_sim"),
}
CATEGORIES = {name: task.category for name, task in TASKS.items()}
TASKS_E = (  # LongBench-E; files are called <task>_e.jsonl
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
)
BUCKETS = ("0-4k", "4-8k", "8k+")  # LongBench-E, by the data's `length`


def bucket(length):
    """LongBench-E's bucket of a row of `length` words."""
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


@dataclass(frozen=True)
class Recipe:
    """How prompts are built and cut, how replies end, and how they are scored."""

    name: str
    about: str
    plain: frozenset  # tasks without the chat template
    truncate: str  # "middle": before the chat template; "left": after it
    newline_ends: frozenset  # tasks in which a line end ends the reply, after at least one token
    keep_special: bool  # the reply keeps special tokens up to the first EOS
    formatted: bool  # prompts are filled by str.format; False: placeholder by placeholder
    average: str  # the label of averages() that belongs to it
    cap: int  # longest prompt in tokens, whatever the model's window

    def prompt(self, task, row):
        """The prompt of one row, a text, before any cut or template."""
        template = prompts(self.name)[task]
        if self.formatted:
            return template.format(context=row["context"], input=row["input"])
        return template.replace("{input}", row["input"]).replace("{context}", row["context"])

    def new_tokens(self, task):
        """The longest reply of a task in tokens."""
        return _new_tokens(self.name)[task]

    def limit(self, window, new_tokens):
        """The longest prompt in tokens for a model of `window` positions."""
        if self.truncate == "left":  # OpenCompass cuts to the window and generates past it
            return min(self.cap, window)
        known = OFFICIAL_LIMITS.get(window, window - max(600, window // 32))
        return max(1, min(self.cap, known, window - new_tokens - 80))  # 80: a chat template's part


OFFICIAL_LIMITS = {4096: 3500, 8192: 7500, 16384: 15500, 32768: 31500, 131072: 120000}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="official",
            about="THUDM/LongBench 2e00731: cut in the middle, no chat template on the few-shot "
            "and code tasks, best answer counts",
            plain=frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}),
            truncate="middle",
            newline_ends=frozenset({"samsum"}),
            keep_special=False,
            formatted=True,
            average="official EN",
            cap=120_000,
        ),
        Recipe(
            name="opencompass",
            about="OpenCompass 0.4.2, the paper's harness: cut on the left, chat template on every "
            "task, its prompts for qasper, narrativeqa and multi_news, sums over answers",
            plain=frozenset(),
            truncate="left",
            newline_ends=frozenset(),
            keep_special=True,
            formatted=False,
            average="opencompass",
            cap=131_072,
        ),
    )
}


def data(folder, name):
    """The text of a file of eval/data/<folder>/."""
    file = resources.files("pbs_attn.eval") / "data" / folder / name
    return file.read_text(encoding="utf-8")


@functools.cache
def prompts(recipe):
    """{task: prompt with {context} and {input}} of a recipe."""
    official = json.loads(data("longbench", "dataset2prompt.json"))
    if recipe == "official":
        return official
    return {**official, **json.loads(data("opencompass", "longbench.json"))["prompts"]}


@functools.cache
def _new_tokens(recipe):
    official = json.loads(data("longbench", "dataset2maxlen.json"))
    if recipe == "official":
        return official
    return {**official, **json.loads(data("opencompass", "longbench.json"))["max_new_tokens"]}


def _mean(values):
    values = list(values)
    return None if not values or None in values else sum(values) / len(values)


def averages(task_scores):
    """The four averages in use, each under its own label; None where a task is missing.

    - "official EN", "official ZH": the leaderboard's: mean of the six category means of one
      language; the two code tasks count in both.
    - "opencompass": mean of six category means, both languages pooled: the paper's "Avg.".
    - "longbench_en", "longbench_zh": OpenCompass' flat means over 16 and 7 tasks.
    - "flat-16": flat mean of the 16 English and code tasks, as papers on KV caches print it: by
      definition the same tasks as longbench_en.

    Args:
        task_scores: {task: score}, any scale; other keys are ignored.
    """
    order = list(dict.fromkeys(CATEGORIES.values()))

    def by_category(chosen):
        groups = ([t for t in chosen if CATEGORIES[t] == category] for category in order)
        return _mean(_mean(task_scores.get(t) for t in group) for group in groups if group)

    english = [name for name, task in TASKS.items() if task.language != "zh"]
    chinese = [name for name, task in TASKS.items() if task.language != "en"]
    flat = _mean(task_scores.get(name) for name in english)
    return {
        "official EN": by_category(english),
        "official ZH": by_category(chinese),
        "opencompass": by_category(TASKS),
        "longbench_en": flat,
        "longbench_zh": _mean(task_scores.get(name) for name in chinese),
        "flat-16": flat,
    }


def language_packages(tasks, variant):
    """The optional packages that scoring these tasks needs."""
    return metrics.packages({TASKS[name].metric for name in tasks}, variant)
