# SPDX-License-Identifier: Apache-2.0
"""LongBench v2: prompts, cuts and modes against independent statements of the official script; the
whole bench on a tiny model; real questions where PBS_ATTN_DATA is."""

import argparse
import json
import os
import pathlib

import pytest
import torch
from eval_models import smollm2_tokenizer as tokenizer
from eval_models import tiny_checkpoint
from longbench_data import tokens
from test_eval_sources import lines, question

from pbs_attn import cli
from pbs_attn.cli import CommandError
from pbs_attn.eval import longbench2, metrics, recipes, sources, store
from pbs_attn.eval.session import Generated, Tokens

DATA = pathlib.Path(os.environ.get("PBS_ATTN_DATA", "")) / "data" / "longbench_v2"
HAVE_DATA = bool(os.environ.get("PBS_ATTN_DATA")) and DATA.is_dir()


def arguments(data, *words):
    parser = argparse.ArgumentParser()
    longbench2.add_arguments(parser)
    return parser.parse_args(["--data", str(data), *words])


def many():
    """Six questions over all difficulties and lengths; choices and contexts with odd spaces."""
    cells = [("easy", "short"), ("easy", "medium"), ("hard", "short"), ("hard", "long"),
             ("hard", "medium"), ("easy", "long")]  # fmt: skip
    return [
        question(i, difficulty=d, length=n, context=f"  The word {i}. " * 30 + "\n",
                 choice_A=f" first {i} ", question=f"which {i}? ",
                 retrieved_context=[{"content": f"chunk {j}", "c_idx": 9 - j} for j in range(4)])
        for i, (d, n) in enumerate(cells)
    ]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(many()))
    return file


def first_prompt(data, given, *words, **options):
    args = arguments(data, *words)
    job = longbench2.prepare(args, given).jobs[0]
    return longbench2.prompt(given, job, args, **options)


def chat(text):
    text = tokenizer().apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer()(text, add_special_tokens=False).input_ids


CHOICES = "(A) first 0\n(B) choice B\n(C) choice C\n(D) choice D"
TEXT = ("The word 0.   " * 30).strip()
ASK = f"What is the correct answer to this question: which 0?\nChoices:\n{CHOICES}\n\n"
FORM = 'Format your response as follows: "The correct answer is (insert answer here)".'
READ = "Please read the following text and answer the question below."


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], f"{READ}\n\n<text>\n{TEXT}\n</text>\n\n{ASK}{FORM}"),
        (["--mode", "no-context"], f"{ASK}What is the single, most likely answer choice? {FORM}"),
        (["--mode", "cot"],
         f"{READ.replace('question', 'questions')}\n\n<text>\n{TEXT}\n</text>\n\n{ASK}"
         "Let’s think step by step:"),
        (["--mode", "rag", "--chunks", "3"],
         f"{READ.replace('text', 'retrieved text chunks')}\n\n<text>\n"
         "Retrieved chunk 1: chunk 2\n\n"
         f"Retrieved chunk 2: chunk 1\n\nRetrieved chunk 3: chunk 0\n</text>\n\n{ASK}{FORM}"),
        (["--recipe", "opencompass"],
         "Please read the following text and answer the questions below.\n <text> \n "
         f"{'  The word 0. ' * 30}\n \n </text> \n \n What is the correct answer to this "
         "question: which 0?  \n \n Choices: \n (A)  first 0  \n (B) choice B \n (C) choice C "
         "\n (D) choice D \n Let’s think step by step. Based on the above, what is the single, "
         'most likely answer choice? Format your response as follows: "The correct answer is '
         "(insert answer here)"),
    ],
)  # fmt: skip
def test_prompts_word_by_word(data, words, expected):
    ids, info = first_prompt(data, tokens(), *words)
    assert ids == chat(expected) and info["cut_tokens"] == 0


def test_the_second_turn_of_cot_omits_the_text(data):
    ids, _ = first_prompt(data, tokens(), "--mode", "cot", reasoning="$Q$ is why")
    text = tokenizer().decode(ids)
    assert "The text is too long and omitted here." in text and "The word" not in text
    assert "Let’s think step by step: $Q$ is why\n\nBased on the above" in text


def test_loglik_ends_with_answer_and_has_no_template(data):
    ids, _ = first_prompt(data, tokens(), "--mode", "loglik")
    assert ids == tokenizer()(f"{READ}\n\n<text>\n{TEXT}\n</text>\n\n{ASK}Answer:").input_ids


@pytest.mark.parametrize("limit", [60, 61])
def test_official_cut(data, limit):
    whole, _ = first_prompt(data, tokens(use_chat=False))
    ids, info = first_prompt(data, tokens(max_prompt=limit))
    # pred.py: input_ids[:max_len//2] + input_ids[-max_len//2:], where -61//2 is -31
    kept = whole[: limit // 2] + whole[-limit // 2 :]
    assert ids == chat(tokenizer().decode(kept, skip_special_tokens=True))
    assert info["cut_tokens"] == len(whole) - limit == len(whole) - len(kept)


def test_opencompass_cut(data):
    whole, _ = first_prompt(data, tokens(), "--recipe", "opencompass")
    ids, info = first_prompt(data, tokens(max_prompt=61), "--recipe", "opencompass")
    assert ids == whole[-61:] and info["cut_tokens"] == len(whole) - 61


def test_limits_leave_room_for_the_reply():
    def limit(window, *words):
        return longbench2.prompt_limit(arguments("x", *words), Tokens(tokenizer(), window))

    assert limit(131072) == limit(131072, "--mode", "cot") == limit(None) == 120_000
    assert limit(131072, "--recipe", "opencompass") == 131072
    assert limit(4096) == 3500 and limit(4096, "--mode", "cot") == 4096 - 1024 - 80


def test_bad_options_are_named(data):
    for words, wrong in (
        (["--mode", "cot", "--recipe", "opencompass"], "--mode cot has no --recipe opencompass"),
        (["--temperature", "-1"], "--temperature is -1.0; allowed: 0 or more"),
        (["--temperature", "nan"], "--temperature is nan; allowed: 0 or more"),
        (["--chunks", "0"], "--chunks is 0; allowed: 1 or more"),
    ):
        with pytest.raises(CommandError) as error:
            longbench2.prepare(arguments(data, *words), tokens())
        assert wrong in str(error.value)


# work


class Fake:
    """A session that answers with given texts, one after the other."""

    def __init__(self, *texts):
        self.tokens, self.texts, self.asked, self.prompts = tokens(), list(texts), [], []

    def eos(self):
        return [2]

    def generate(self, ids, method, **options):
        self.asked.append(options)
        self.prompts.append(self.tokens.tokenizer.decode(ids))
        text = self.texts.pop(0)
        return Generated(tokenizer().encode(text), text, "eos", 0.1, 0.2)


def one(data, session, *words):
    args = arguments(data, *words)
    return longbench2.work(session, None, longbench2.prepare(args, tokens()).jobs[0], args)


def test_letters_and_scores(data):
    right = one(data, Fake("**The correct answer is (A)**"))
    assert (right["pred_used"], right["score"], right["compensated"]) == ("A", 1.0, 1.0)
    wrong = one(data, Fake("The correct answer is (B)"))
    assert (wrong["pred_used"], wrong["score"], wrong["compensated"]) == ("B", 0.0, 0.0)
    none = one(data, session := Fake("Surely A."))
    assert (none["pred_used"], none["score"], none["compensated"]) == (None, 0.0, 0.25)
    assert session.asked == [{"max_new_tokens": 128, "temperature": 0.0, "past_window": False}]
    lenient = one(data, session := Fake("Surely A."), "--recipe", "opencompass")
    assert lenient["pred_used"] == "A" and session.asked[0]["max_new_tokens"] == 2048
    assert session.asked[0]["past_window"]
    place = {"domain": "d", "sub_domain": "s"}
    assert none["meta"] == {**place, "difficulty": "easy", "length": "short"}


def test_cot_asks_twice_and_quotes_the_reasoning(data):
    session = Fake(" it is A because \n", "The correct answer is (A).")
    record = one(data, session, "--mode", "cot", "--temperature", "0.1")
    assert [x["max_new_tokens"] for x in session.asked] == [1024, 128]
    assert [x["temperature"] for x in session.asked] == [0.1, 0.1]
    assert "step by step: it is A because\n\nBased on" in session.prompts[1]
    assert record["reasoning"] == "it is A because" and record["score"] == 1.0
    assert record["pred"] == "The correct answer is (A)." and record["total_s"] == 0.4


def test_accuracies_by_hand():
    """Failed rows stay in every denominator; the official script would drop them."""
    rows = many()
    scores = [1, 0, 1, None, 1, 0]  # None: failed
    found = [
        {"method": "full", "status": "error" if s is None else "ok", "meta": r,
         **({} if s is None else {"score": float(s), "compensated": float(s), "pred_used": "A",
                                  "mode": "0shot", "recipe": "official"})}
        for r, s in zip(rows, scores, strict=True)
    ]  # fmt: skip
    found[1] |= {"compensated": 0.25, "pred_used": None}
    assert longbench2.accuracies(found) == {
        "overall": (3, 6), "easy": (1, 3), "hard": (2, 3), "short": (2, 2), "medium": (1, 2),
        "long": (0, 2), "compensated": (3.25, 6),
    }  # fmt: skip
    text = longbench2.summary(found, ["full"])
    assert "A sample of LongBench v2, mode 0shot, recipe official (6 of 503 questions)" in text
    assert "INCOMPLETE: full failed on 1 of 6 questions (1 error); they count as wrong" in text
    line = next(line for line in text.splitlines() if line.startswith("full"))
    assert line.split() == "full 6 50.0 33.3 66.7 100.0 50.0 0.0 54.2 1".split()


# the whole bench


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def short(monkeypatch):
    """Replies of three tokens."""
    for name in ("NEW_TOKENS", "REASONING_TOKENS", "OPENCOMPASS_TOKENS"):
        monkeypatch.setattr(longbench2, name, 3)


def evaluate(*words):
    return cli.main(["eval", "longbench2", *map(str, words)])


def records(folder):
    return list(store.read(folder)[1].values())


@pytest.mark.parametrize("words", [("--mode", "cot", "--temperature", "0.7"),
                                   ("--recipe", "opencompass")])  # fmt: skip
def test_the_bench_runs(data, model, short, tmp_path, capsys, words):
    rows = many()
    rows[1].pop("answer")
    data.write_text(json.dumps(rows))
    status = evaluate("--model", model, "--data", data, "--method", "full,pbs", "--limit", 2,
                      "--out", tmp_path / "out", "--show", 1, *words)  # fmt: skip
    assert status == 3
    shown = capsys.readouterr()
    assert "data.json: item 2: field answer is missing" in shown.out
    assert "INCOMPLETE: pbs failed on 1 of 2 questions (1 bad_row)" in shown.out
    found = records(tmp_path / "out")
    assert [r["status"] for r in found].count("ok") == 2 and len(found) == 4
    good = [r for r in found if r["status"] == "ok"]
    assert all(r["metric"] == "choice" and r["new_tokens"] <= 6 for r in good)
    assert all(("reasoning" in r) == ("cot" in words) for r in good)


def test_loglik_is_the_models_own_likelihood(data, model, tmp_path):
    from transformers import AutoModelForCausalLM

    assert evaluate("--model", model, "--data", data, "--method", "full", "--mode", "loglik",
                    "--out", tmp_path / "out") == 0  # fmt: skip
    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    args, found = arguments(data, "--mode", "loglik"), records(tmp_path / "out")
    jobs = {job.id: job for job in longbench2.prepare(args, tokens()).jobs}
    assert len(found) == 6
    for record in found:
        ids, _ = longbench2.prompt(tokens(), jobs[record["id"]], args)
        with torch.no_grad():
            last = reference(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        letters = {x: float(last[tokenizer().encode(f" {x}")[-1]]) for x in "ABCD"}
        for letter, value in letters.items():
            assert record["logprobs"][letter] == pytest.approx(value, abs=1e-4)
        assert record["pred_used"] == max(letters, key=letters.get)
        assert record["score"] == float(record["pred_used"] == record["answers"][0])


# real questions


@pytest.mark.skipif(not HAVE_DATA, reason="PBS_ATTN_DATA names no folder with data/longbench_v2")
def test_real_questions():
    rows = [row.data for row in sources.longbench2(DATA).rows]
    says = "The correct answer is ({})".format
    for one_row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        assert metrics.choice(says(one_row["answer"])) == one_row["answer"]
        assert metrics.first_option(says(one_row["answer"])) == one_row["answer"]
        text = longbench2.question(one_row, arguments(DATA))
        assert one_row["question"].strip() in text and other["question"].strip() not in text
    gold = sum(metrics.choice(says(row["answer"])) == row["answer"] for row in rows)
    other = sum(
        metrics.choice(says(rows[i - 1]["answer"])) == row["answer"] for i, row in enumerate(rows)
    )
    assert other < gold == len(rows)
    given = tokens(max_prompt=1000)
    plan = longbench2.prepare(arguments(DATA), given)
    ids, info = longbench2.prompt(given, plan.jobs[0], arguments(DATA))
    assert 950 < len(ids) < 1100 and info["cut_tokens"] > 10_000
    assert recipes.RECIPES["official"].limit(8192, 128) == 7500
    assert lines(rows)  # what was read can be written again
