# SPDX-License-Identifier: Apache-2.0
"""LongBench v1: prompts, cuts, template rule and averages against independent statements of them;
real rows of all tasks where PBS_ATTN_DATA is. test_eval_longbench_run.py has the bench itself."""

import importlib.util
import json
import os
import pathlib

import pytest
from eval_models import smollm2_tokenizer as tokenizer
from longbench_data import TASKS, all_tasks, arguments, tokens
from test_eval_sources import row

from pbs_attn.cli import CommandError
from pbs_attn.eval import longbench, metrics, recipes, sources
from pbs_attn.eval.session import Tokens

PLAIN = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}  # pred.py at 2e00731
DATA = pathlib.Path(os.environ.get("PBS_ATTN_DATA", "")) / "data" / "longbench_mini"
HAVE_DATA = bool(os.environ.get("PBS_ATTN_DATA")) and DATA.is_dir()


@pytest.fixture
def data(tmp_path):
    return all_tasks(tmp_path)


# tasks


def test_task_table_is_the_published_one():
    assert len(TASKS) == 21 and sum(task.rows for task in recipes.TASKS.values()) == 4750
    languages = [task.language for task in recipes.TASKS.values()]
    assert [languages.count(x) for x in ("en", "zh", "code")] == [14, 5, 2]
    assert set(recipes.prompts("official")) == set(TASKS)
    assert len(recipes.TASKS_E) == 13
    assert not [name for name in recipes.TASKS_E if recipes.TASKS[name].language == "zh"]
    assert {task.metric for task in recipes.TASKS.values()} == set(metrics.METRICS)


def test_parse_tasks():
    parse = longbench.parse_tasks
    assert parse("all") == (TASKS, "")
    assert len(parse("qa")[0]) == 8 and len(parse("summarization")[0]) == 4
    assert parse("code, qasper") == (["qasper", "lcc", "repobench-p"], "")
    assert len(parse("few-shot,synthetic")[0]) == 7 and len(parse("zh")[0]) == 5
    assert parse("e") == (list(recipes.TASKS_E), "_e")
    assert parse("e,code") == (["lcc", "repobench-p"], "_e")
    with pytest.raises(CommandError, match="--tasks has 'quasper'; allowed: all, qa, .*qasper"):
        parse("quasper")
    with pytest.raises(CommandError, match="--tasks e has no lsht"):
        parse("e,lsht")
    with pytest.raises(CommandError, match="--tasks has ''"):
        parse(" ,")


# recipes


def test_opencompass_differs_in_three_prompts_and_one_length():
    official, other = recipes.prompts("official"), recipes.prompts("opencompass")
    assert {t for t in TASKS if official[t] != other[t]} == {"qasper", "narrativeqa", "multi_news"}
    assert other["qasper"] == official["hotpotqa"]
    assert other["multi_news"] == official["multi_news"] + "\n"
    assert other["narrativeqa"] == official["narrativeqa"].replace("asconcisely", "as concisely")
    lengths = {n: [r.new_tokens(t) for t in TASKS] for n, r in recipes.RECIPES.items()}
    assert [t for t, a, b in zip(TASKS, *lengths.values(), strict=True) if a != b] == ["qasper"]
    assert [recipes.RECIPES[n].new_tokens("qasper") for n in ("official", "opencompass")] == [
        128,
        32,
    ]


def test_prompts_are_filled_and_nothing_else(data):
    odd = row("repobench-p", 0, context="{input} {0} {{x}}", input="a {context} b")
    official = recipes.RECIPES["official"].prompt("repobench-p", odd)
    assert official == (
        "Please complete the code given below. \n{input} {0} {{x}}a {context} bNext line of code:\n"
    )
    # OpenCompass replaces input first, then context, in the whole text
    other = recipes.RECIPES["opencompass"].prompt("repobench-p", odd)
    assert "b{input}" not in other and other.count("{input} {0} {{x}}") == 2
    for task in TASKS:
        text = recipes.RECIPES["official"].prompt(task, row(task, 5))
        uses = "{input}" in recipes.prompts("official")[task]
        assert "text 5" in text and ("question 5?" in text) == uses and "{" not in text
    unused = {t for t in TASKS if "{input}" not in recipes.prompts("official")[t]}
    assert unused == {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}


def test_prompt_limits():
    limit = recipes.RECIPES["official"].limit
    # config/model2maxlen.json of LongBench v1 and v2: window -> what it leaves
    published = {4096: 3500, 8192: 7500, 16384: 15500, 32768: 31500, 131072: 120000}
    assert {window: limit(window, 512) for window in published} == published
    for window in (1024, 2048, 5000, 40960, 65536, 100_000, 1 << 20):
        assert 0 < limit(window, 512) <= min(120_000, window - 592)
    assert recipes.RECIPES["opencompass"].limit(131072, 512) == 131072
    assert longbench.prompt_limit(recipes.RECIPES["official"], tokens(max_prompt=777)) == 777


@pytest.mark.parametrize("task", TASKS)
def test_template_rule_and_bos(data, task):
    """Official: six tasks are plain. OpenCompass: none. A template's text gets no second BOS."""
    text = tokenizer()
    for recipe in recipes.RECIPES:
        args = arguments("--data", data, "--tasks", task, "--recipe", recipe)
        job = longbench.prepare(args, tokens()).jobs[0]
        prompt = recipes.RECIPES[recipe].prompt(task, job.payload["row"])
        rendered = text.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        plain = recipe == "official" and task in PLAIN
        expected = (text(prompt) if plain else text(rendered, add_special_tokens=False)).input_ids
        ids, info = longbench.prompt(tokens(), job, args)
        assert ids == expected and info == {"prompt_tokens": len(ids), "cut_tokens": 0}
        bare, _ = longbench.prompt(tokens(use_chat=False), job, args)
        assert bare == text(prompt).input_ids


@pytest.mark.parametrize("limit", [40, 41, 64])
@pytest.mark.parametrize("task", ["qasper", "lcc"])
def test_official_cut_is_in_the_middle_and_before_the_template(data, task, limit):
    args = arguments("--data", data, "--tasks", task)
    given = tokens(max_prompt=limit)
    job = longbench.prepare(args, given).jobs[0]
    text = recipes.RECIPES["official"].prompt(task, job.payload["row"])
    # pred.py, stated again: both ends of the tokens of the plain prompt
    all_ids = tokenizer()(text).input_ids
    half = limit // 2
    assert len(all_ids) > limit
    cut = tokenizer().decode(all_ids[:half], skip_special_tokens=True)
    cut += tokenizer().decode(all_ids[len(all_ids) - half :], skip_special_tokens=True)
    if task == "qasper":
        chat = [{"role": "user", "content": cut}]
        cut = tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids, info = longbench.prompt(given, job, args)
    assert ids == tokenizer()(cut, add_special_tokens=task != "qasper").input_ids
    assert info["cut_tokens"] == len(all_ids) - 2 * half
    assert cut.startswith("<|im_start|>" if task == "qasper" else "Please complete")


def test_opencompass_cut_is_on_the_left_and_after_the_template(data):
    args = arguments("--data", data, "--tasks", "qasper", "--recipe", "opencompass")
    whole = tokens()
    job = longbench.prepare(args, whole).jobs[0]
    everything, _ = longbench.prompt(whole, job, args)
    ids, info = longbench.prompt(tokens(max_prompt=50), job, args)
    assert ids == everything[-50:] and info["cut_tokens"] == len(everything) - 50
    assert "<|im_start|>system" not in tokenizer().decode(ids)  # its head is what is lost


# averages


# LongBench/README.md at 2e00731: task scores in the order of TASKS, then the leaderboard's Avg of
# English and Chinese, which it rounds to one decimal.
LEADERBOARD = {
    "GPT-3.5-Turbo-16k": (
        [23.6, 43.3, 52.3, 61.2, 51.6, 37.7, 26.9, 28.7, 29.5, 23.4, 26.7, 16.0, 68.0, 91.4, 41.7,
         29.2, 4.5, 71.0, 77.5, 54.7, 53.6], 44.0, 44.5),
    "Llama2-7B-chat-4k": (
        [18.7, 19.2, 36.8, 11.9, 25.4, 32.8, 9.4, 5.2, 27.3, 20.8, 25.8, 0.2, 61.5, 77.8, 40.7,
         19.8, 2.1, 9.8, 0.5, 52.4, 43.8], 31.0, 14.3),
    "ChatGLM3-6B-32k": (
        [26.0, 43.3, 51.7, 62.3, 54.4, 44.9, 40.4, 44.78, 36.8, 23.9, 27.9, 17.8, 79.0, 87.1, 38.2,
         42.0, 2.0, 99.0, 94.0, 57.66, 54.76], 48.5, 52.8),
}  # fmt: skip


@pytest.mark.parametrize("model", LEADERBOARD)
def test_averages_give_the_published_leaderboard(model):
    scores, english, chinese = LEADERBOARD[model]
    found = longbench.averages(dict(zip(TASKS, scores, strict=True)))
    assert found["official EN"] == pytest.approx(english, abs=0.051)
    assert found["official ZH"] == pytest.approx(chinese, abs=0.051)


def test_averages_by_hand():
    scores = {task: float(i) for i, task in enumerate(TASKS)}
    found = longbench.averages(scores)
    # 4 + 4 + 4 + 4 + 3 + 2 tasks in order, pooled: 1.5, 5.5, 9.5, 13.5, 17, 19.5
    assert found["opencompass"] == pytest.approx((1.5 + 5.5 + 9.5 + 13.5 + 17 + 19.5) / 6)
    chinese = [3, 7, 11, 15, 18, 19, 20]
    assert found["longbench_zh"] == pytest.approx(sum(chinese) / 7)
    assert found["longbench_en"] == found["flat-16"] == pytest.approx((210 - sum(chinese[:5])) / 16)
    # without one English task only what does not need it is left
    found = longbench.averages({k: v for k, v in scores.items() if k != "trec"})
    assert {name for name, value in found.items() if value is not None} == {
        "official ZH", "longbench_zh",
    }  # fmt: skip
    assert set(longbench.averages({}).values()) == {None}


# prepare


def test_plan_and_identity(data):
    plan = longbench.prepare(arguments("--data", data, "--tasks", "qasper,lcc"), tokens())
    assert [job.id for job in plan.jobs] == [
        f"{t}-{i}" for t in ("qasper", "lcc") for i in range(3)
    ]
    assert {job.bench for job in plan.jobs} == {"longbench"}
    assert plan.identity["recipe"] == "official" and plan.identity["prompt_limit"] == 7500
    assert set(plan.identity["data"]) == {"qasper", "lcc"}
    costs = [job.cost for job in plan.jobs]
    assert costs[0] < costs[1] < costs[2]  # longer contexts cost more
    assert "qasper 3 of 200, lcc 3 of 500" in " ".join(plan.notes)


def test_no_template_is_said_before_the_model_is_loaded(data):
    import copy

    bare = copy.deepcopy(tokenizer())
    bare.chat_template = None
    with pytest.raises(CommandError, match="--no-chat"):
        longbench.prepare(arguments("--data", data, "--tasks", "qasper"), Tokens(bare, 8192))
    longbench.prepare(arguments("--data", data, "--tasks", "lcc"), Tokens(bare, 8192))
    longbench.prepare(arguments("--data", data), Tokens(bare, 8192, use_chat=False))


def test_chinese_tasks_without_jieba_say_so(data, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "jieba" else find(n))
    with pytest.raises(CommandError) as error:
        longbench.prepare(arguments("--data", data), tokens())
    for words in ("multifieldqa_zh, dureader, vcsum cannot be scored", "jieba", "--tasks"):
        assert words in str(error.value)
    longbench.prepare(arguments("--data", data, "--tasks", "en"), tokens())


def test_buckets_of_longbench_e():
    assert [recipes.bucket(n) for n in (0, 3999, 4000, 7999, 8000)] == [
        "0-4k", "0-4k", "4-8k", "4-8k", "8k+",
    ]  # fmt: skip


# real rows


@pytest.mark.skipif(not HAVE_DATA, reason="PBS_ATTN_DATA names no folder with data/longbench_mini")
@pytest.mark.parametrize("task", TASKS)
def test_gold_answers_score_100_and_another_rows_answers_less(task):
    """Every accepted answer of these rows, given as prediction, scores 100 on all 21 tasks.

    Not a law of the metrics: an answer that is only an article or punctuation scores 0 by qa_f1, a
    gold line of code with `, # or // scores 0, and rouge stops at 1 - 5e-9. None of the first two
    is among these rows; test_eval_metrics states them.
    """
    rows = [r.data for r in sources.longbench(DATA, [task], TASKS)[task].rows]
    metric = recipes.TASKS[task].metric
    if metric == "rouge" and task != "samsum":
        rows = rows[:2]  # up to a second per pair of reports

    def score(prediction, like, variant="official"):
        used = metrics.used(task, prediction)
        return metrics.score(metric, used, like["answers"], like["all_classes"], variant=variant)

    for like in rows:
        for answer in like["answers"][:5]:
            assert score(answer, like) == pytest.approx(1, abs=1e-8), answer
            assert score(answer, like, "opencompass") >= 1 - 1e-8
    other = [score(rows[i - 1]["answers"][0], like) for i, like in enumerate(rows)]
    assert sum(other) / len(other) < 0.5 and other.count(1.0) < len(other)
    if rows[0]["all_classes"]:  # no class name holds another: gold is safe from the loop's quirk
        names = rows[0]["all_classes"]
        assert all(metrics.classification(name, name, names) == 1.0 for name in names)


@pytest.mark.skipif(not HAVE_DATA, reason="PBS_ATTN_DATA names no folder with data/longbench_mini")
def test_real_prompts_fit_and_are_cut(tmp_path):
    args = arguments("--data", str(DATA))
    given = tokens(max_prompt=700)
    plan = longbench.prepare(args, given)
    first = {job.task: job for job in reversed(plan.jobs)}
    assert set(first) == set(TASKS)
    for job in first.values():
        ids, info = longbench.prompt(given, job, args)
        text = recipes.RECIPES["official"].prompt(job.task, job.payload["row"])
        assert info["cut_tokens"] == len(tokenizer()(text).input_ids) - 700
        assert 650 < len(ids) < 800 and json.dumps(info)
