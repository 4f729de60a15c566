# SPDX-License-Identifier: Apache-2.0
"""Scores: what the official scripts gave, and each of their quirks by itself."""

import json
import lzma
import os
import pathlib
import random
import sys
import threading

import pytest

from pbs_attn.cli import CommandError
from pbs_attn.eval import metrics, recipes

HERE = pathlib.Path(__file__).parent
GOLDEN = pathlib.Path(os.environ.get("PBS_ATTN_DATA", "")) / "golden" / "longbench_metrics.jsonl"


def check_golden(lines):
    """Every line's score to 1e-9; returns the tasks met."""
    wrong, tasks = [], set()
    for line in lines:
        row = json.loads(line)
        task = row["dataset"]
        tasks.add(task)
        got = metrics.score(recipes.TASKS[task].metric, metrics.used(task, row["prediction"]),
                            row["answers"], row["all_classes"])  # fmt: skip
        if abs(got - row["score"]) > 1e-9:
            wrong.append((task, got, row["score"], row["prediction"][:80]))
    assert not wrong, f"{len(wrong)} differ, first {wrong[:3]}"
    return tasks


def test_shipped_scores_of_the_official_scripts():
    lines = lzma.open(HERE / "data" / "longbench_metrics.jsonl.xz", "rt", encoding="utf-8")
    with lines:
        assert check_golden(lines) == set(recipes.TASKS)


def golden_lines():
    if not GOLDEN.is_file():
        pytest.skip("PBS_ATTN_DATA has no longbench_metrics.jsonl")
    lines = GOLDEN.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 866
    return lines


def test_all_scores_of_the_official_scripts_but_the_slow_ones():
    """ROUGE-L of a pair of whole reports takes a second: every fourth of those 44 rows."""
    lines = golden_lines()
    reports = [line for line in lines if '"gov_report"' in line[:40]]
    assert check_golden([x for x in lines if x not in reports] + reports[::4]) == set(recipes.TASKS)


@pytest.mark.long
def test_all_866_scores_of_the_official_scripts():
    assert check_golden(golden_lines()) == set(recipes.TASKS)


def test_rouge_is_over_sets_and_sentences():
    assert metrics.rouge("the the the the cat", "the cat the cat the cat") == pytest.approx(1)
    assert metrics.rouge("The cat", "the cat") == pytest.approx(0.5)  # case is kept
    # the union over sentences: b a is no subsequence of a b, but a and b are
    assert metrics.rouge("b a", "a b") == pytest.approx(0.5)
    assert metrics.rouge("b. a", "a b") == pytest.approx(1)
    # beta 1, with 1e-8 in the denominator: gold scores a little below 1
    assert 1 - 1e-8 < metrics.rouge("a b c.", "a b c.") < 1
    for prediction in ("", "...", " "):
        assert metrics.rouge(prediction, "a b") == metrics.rouge("a b", prediction) == 0.0


@pytest.fixture
def deep_pair():
    """Two texts on which the package recurses 450 deep, under a limit of 400."""
    limit, gold = sys.getrecursionlimit(), [f"w{i}" for i in range(300)]
    sys.setrecursionlimit(400)
    yield " ".join(w if i % 2 else "x" + w for i, w in enumerate(gold)), " ".join(gold)
    sys.setrecursionlimit(limit)


def test_long_texts_raise_in_the_package_and_score_here(deep_pair):
    prediction, gold = deep_pair
    assert metrics.rouge(prediction, gold) == pytest.approx(0.5)
    assert sys.getrecursionlimit() == 400
    assert metrics.rouge(prediction, gold, official_zero=True) == 0.0
    assert metrics.score("rouge", prediction, [gold], zero=True) == 0.0


def test_the_big_stack_of_python_310(monkeypatch, deep_pair):
    prediction, gold = deep_pair
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    stack = threading.stack_size()
    assert metrics.rouge(prediction, gold) == pytest.approx(0.5)
    with pytest.raises(ZeroDivisionError):
        metrics._on_big_stack(lambda: 1 / 0, 1000)
    assert threading.stack_size() == stack


def test_a_failure_of_rouge_is_an_error_not_a_zero(monkeypatch, deep_pair):
    monkeypatch.setattr(metrics, "_deep", lambda function, frames: function())
    with pytest.raises(metrics.MetricError, match="RecursionError"):
        metrics.rouge(*deep_pair)


def test_classification_skips_the_name_after_a_dropped_one():
    classes = ["Num", "Number", "Other number", "Other"]
    # Num and Number are parts of the gold name; dropping Num hides Number from the loop
    assert metrics.classification("Number of something", "Number of something",
                                  ["Num", "Number", "Number of something"]) == 0.5  # fmt: skip
    assert metrics.classification("Other number", "Other number", classes[2:]) == 1.0
    assert metrics.classification("Num, Other", "Other", classes) == 0.5
    assert metrics.classification("none of them", "Other", classes) == 0.0


def test_counts_and_paragraphs():
    assert metrics.count("12 or 13, say 12", "12") == pytest.approx(2 / 3)
    assert metrics.count("twelve", "12") == 0.0
    assert metrics.retrieval("Paragraph 3", "Paragraph 3") == 1.0
    assert metrics.retrieval("It is 3, not 4", "Paragraph 3") == 0.5
    assert metrics.retrieval_zh("段落3", "段落3") == 1.0
    assert metrics.retrieval("Paragraph 30", "Paragraph 3") == 0.0


def test_code_line_and_the_two_similarities():
    assert metrics.code_line("\n\n# no\n`no`\n// no\n x = 1\ny") == " x = 1"
    assert metrics.code_line("```") == ""
    assert metrics.code_sim("x = 1 # why", "x = 1 # why") == 0.0  # gold with a comment cannot score
    one, two = "if x is None:", "value = self.run(names)"
    assert metrics.code_sim(one, two) != metrics.code_sim(two, one)
    assert metrics.code_sim_indel(one, two) == metrics.code_sim_indel(two, one)
    assert metrics.code_sim(one, two) != metrics.code_sim_indel(one, two)


def common(one, two):
    """Length of the longest common subsequence, by its definition."""
    row = [0] * (len(two) + 1)
    for a in one:
        last = 0
        for j, b in enumerate(two, 1):
            last, row[j] = row[j], last + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


def test_indel_similarity_is_that_of_the_common_subsequence():
    draw = random.Random(3)
    for _ in range(50):
        one, two = ("".join(draw.choices("abcd", k=draw.randint(1, 30))) for _ in range(2))
        expected = round(100 * 2 * common(one, two) / (len(one) + len(two))) / 100
        assert metrics.code_sim_indel(one, two) == pytest.approx(expected), (one, two)


def test_used_is_the_first_line_of_the_four_few_shot_tasks_only():
    for task in recipes.TASKS:
        first = recipes.CATEGORIES[task] == "few-shot"
        assert metrics.used(task, "\n\none\ntwo") == ("one" if first else "\n\none\ntwo")


def test_best_answer_counts_and_opencompass_sums():
    same = ["7", "7"]
    assert metrics.score("count", "7", same) == 1.0
    assert metrics.score("count", "7", same, variant="opencompass") == 2.0
    paragraphs = ["Paragraph 1", "Paragraph 2"]
    assert metrics.score("retrieval", "1 2", paragraphs) == 0.5
    assert metrics.score("retrieval", "1 2", paragraphs, variant="opencompass") == 1.0
    for variant in metrics.VARIANTS:  # F1 takes the best in both
        assert metrics.score("qa_f1", "a red cat", ["dog", "red cat"], variant=variant) == 1.0
    one, two = "if x is None:", "value = self.run(names)"
    assert metrics.score("code_sim", one, [two]) == metrics.code_sim(one, two)
    indel = metrics.score("code_sim", one, [two], variant="opencompass")
    assert indel == metrics.code_sim_indel(one, two) != metrics.code_sim(one, two)


def test_opencompass_cuts_chinese_predictions_again_for_every_answer(monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "_words_zh", lambda text: list(text))
    monkeypatch.setattr(metrics, "rouge", lambda p, g, official_zero: seen.append(p) or 0.0)
    monkeypatch.setitem(metrics.METRICS, "rouge_zh", metrics.rouge_zh)
    metrics.score("rouge_zh", "ab", ["c", "d"])
    assert seen == ["a b", "a b"]
    seen.clear()
    metrics.score("rouge_zh", "ab", ["c", "d"], variant="opencompass")
    assert seen == ["a b", "a   b"]


def test_the_letter_of_longbench_v2():
    for text, letter in (
        ("The correct answer is (B)", "B"),
        ("**The correct answer is** *(C)*.", "C"),
        ("The correct answer is D because (A)", "D"),
        ("The correct answer is A. The correct answer is (B)", "B"),  # brackets first
        ("the correct answer is (B)", None),
        ("The correct answer is (E)", None),
        ("The correct answer is b", None),
        ("B", None),
        ("", None),
    ):
        assert metrics.choice(text) == letter, text
    assert [metrics.compensated(x, "B") for x in ("B", "A", None)] == [1.0, 0.0, 0.25]


def test_opencompass_finds_a_letter_almost_anywhere():
    assert len(metrics._first_option_patterns()) == 52
    for text, letter in (
        ("The correct answer is (B)", "B"),
        ("the answer is C.", "C"),
        ("答案是D", "D"),
        ("Answer: A", "A"),
        ("B", "B"),
        ("Maybe C?", "C"),
        ("Because of it. 1. B", "B"),
        ("none", None),
        ("", None),
    ):
        assert metrics.first_option(text) == letter, text


def test_ruler():
    assert metrics.ruler_clean(" \x00a\tb\x1f\n ") == "a\nb"
    assert metrics.string_match_all("The Numbers 12 AND 34", ["12", "34", "and", "56"]) == 0.75
    assert metrics.string_match_part("the NUMBERS 12", ["56", "numbers"]) == 1.0
    assert metrics.string_match_part("", ["56"]) == metrics.string_match_all("", ["56"]) == 0.0


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(CommandError, match="rouge"):
        metrics.rouge("a", "b")
    assert metrics.packages({"rouge_zh", "qa_f1"}) == ["jieba", "rouge"]
    assert metrics.packages({"code_sim"}) == []
    assert metrics.packages({"code_sim"}, "opencompass") == ["rapidfuzz"]
