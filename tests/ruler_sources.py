# SPDX-License-Identifier: Apache-2.0
"""Sources of RULER's rows for tests: SmolLM2's tokenizer, the shipped text, made-up QA files."""

import functools
import json

from eval_models import smollm2_tokenizer

from pbs_attn.cli import models
from pbs_attn.eval import ruler_generate, ruler_text, session

WINDOW = 8192


@functools.cache
def tokens():
    return session.Tokens(smollm2_tokenizer(), WINDOW, name="tiny")


def squad(path):
    """dev-v2.0.json with 8 articles of 6 paragraphs; every fifth question has no answer."""
    articles = []
    for a in range(8):
        paragraphs = []
        for p in range(6):
            town, year = f"town{a}{p}", 1000 + 10 * a + p
            text = f"The library of {town} was founded in {year}. " + "It has many old books. " * 6
            answers = [{"text": str(year)}, {"text": f"in {year}"}]
            qa = {"question": f"When was the library of {town} founded?", "answers": answers}
            none = {"question": "Who?", "answers": [], "is_impossible": True}
            paragraphs.append({"context": text, "qas": [{**qa, "is_impossible": False}, none]})
        articles.append({"title": f"article {a}", "paragraphs": paragraphs})
    path.write_text(json.dumps({"data": articles}))
    return path


def hotpot(path):
    """hotpot_dev_distractor_v1.json: 20 questions with ten documents each."""
    rows = []
    for q in range(20):
        context = [[f"Title {q} {d}", [f"Fact {d} of {q}. ", "Nothing more."]] for d in range(10)]
        rows.append({"question": f"What is {q}?", "answer": f"Fact 3 of {q}", "context": context})
    path.write_text(json.dumps(rows))
    return path


def essays(path):
    path.write_text(models.demo_text()[1])
    return path


@functools.cache
def sources(folder):
    return {
        "words": ruler_text.read_words(),
        "haystack": ruler_text.read_haystack(essays(folder / "essays.txt")),
        "squad": ruler_text.read_squad(squad(folder / "squad.json")),
        "hotpot": ruler_text.read_hotpot(hotpot(folder / "hotpot.json")),
    }


def made(folder, task, length, seed=42):
    """ruler_generate.Generated of a task with these sources."""
    return ruler_generate.Generated(task, length, sources(folder), tokens(), seed)
