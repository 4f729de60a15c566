# SPDX-License-Identifier: Apache-2.0
"""LongBench v1: what a session is asked for and what a record keeps; the whole bench on a tiny
model."""

import pytest
from eval_models import smollm2_tokenizer as tokenizer
from eval_models import tiny_checkpoint
from longbench_data import TASKS, all_tasks, arguments, tokens
from test_eval_sources import folder_of, lines, row

from pbs_attn import cli
from pbs_attn.eval import longbench, recipes, store
from pbs_attn.eval.jobs import BadRow
from pbs_attn.eval.session import Generated


@pytest.fixture
def data(tmp_path):
    return all_tasks(tmp_path)


# work


class Fake:
    """A session that answers with given ids and remembers what it was asked for."""

    def __init__(self, text="", ids=None, eos=(2,)):
        self.tokens, self.asked, self.text = tokens(), [], text
        self.ids, self.ends = ids or [1], list(eos)

    def eos(self):
        return self.ends

    def generate(self, ids, method, **options):
        self.asked.append(options)
        return Generated(self.ids, self.text, "eos", 0.1, 0.2)


def one(data, task, session, *words):
    args = arguments("--data", data, "--tasks", task, *words)
    return longbench.work(session, None, longbench.prepare(args, session.tokens).jobs[0], args)


def test_samsum_ends_at_a_line_end_after_one_token(data):
    newline = tokenizer().encode("\n", add_special_tokens=False)[-1]
    for task in TASKS:
        for recipe in recipes.RECIPES:
            one(data, task, session := Fake(), "--recipe", recipe)
            ends = recipe == "official" and task == "samsum"
            assert session.asked == [{
                "max_new_tokens": recipes.RECIPES[recipe].new_tokens(task),
                "extra_eos": (newline,) if ends else (), "min_new_tokens": int(ends),
                "past_window": recipe == "opencompass",
            }]  # fmt: skip


def test_a_record_holds_reply_and_score(data):
    record = one(data, "triviaqa", Fake("\n\none\nmore"))
    assert record["pred"] == "\n\none\nmore" and record["pred_used"] == "one"
    assert record["score"] == 1.0 and record["metric"] == "qa_f1"
    assert record["answers"] == ["one", "two"] and record["recipe"] == "official"
    assert record["meta"] == {"category": "few-shot", "language": "en", "words": 6}
    assert one(data, "qasper", Fake("three"))["score"] == 0.0
    assert one(data, "passage_retrieval_zh", Fake("段落7"))["score"] == 1.0


def test_opencompass_keeps_special_tokens_up_to_the_stop_word(data):
    text = tokenizer()
    start, end = (text.convert_tokens_to_ids(x) for x in ("<|im_start|>", "<|im_end|>"))
    ids = [*text.encode("one", add_special_tokens=False), start, *text.encode("two"), end]
    session = Fake("one two", ids, [end])
    assert one(data, "qasper", session)["pred"] == "one two"
    assert one(data, "qasper", session, "--recipe", "opencompass")["pred"] == "one<|im_start|>two"


def test_a_bad_row_raises_with_its_place(tmp_path):
    (tmp_path / "qasper.jsonl").write_bytes(lines([row("qasper", 0, answers=[]), row("qasper", 1)]))
    args = arguments("--data", str(tmp_path), "--tasks", "qasper")
    plan = longbench.prepare(args, tokens())
    assert any("line 1: field answers" in note for note in plan.notes)
    with pytest.raises(BadRow, match=r"qasper\.jsonl: line 1: field answers is \[\]"):
        longbench.work(Fake(), None, plan.jobs[0], args)


# the whole bench


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def short(monkeypatch):
    """Replies of three tokens."""
    monkeypatch.setattr(recipes.Recipe, "new_tokens", lambda self, task: 3)


def evaluate(*words):
    return cli.main(["eval", "longbench", *map(str, words)])


def records(folder):
    return list(store.read(folder)[1].values())


def test_the_bench_runs_and_resumes(data, model, short, tmp_path, capsys):
    common = ["--model", model, "--data", data, "--method", "full,pbs", "--limit", "2",
              "--tasks", "qasper,samsum,lcc", "--out", tmp_path / "out"]  # fmt: skip
    assert evaluate(*common, "--show", "1") == 0
    shown = capsys.readouterr()
    assert "A sample of LongBench rows (6 of 4,750), recipe official" in shown.out
    assert "compare methods with each other, not with published scores" in shown.out
    found = records(tmp_path / "out")
    assert len(found) == 12 and {r["status"] for r in found} == {"ok"}
    for r in found:
        assert r["new_tokens"] <= 3 and 0 <= r["score"] <= 1 and r["cut_tokens"] == 0
        assert r["stop"] in ("eos", "length") and 0 < r["density"] <= 1
        assert r["meta"]["category"] == recipes.CATEGORIES[r["task"]]
        assert r["prompt_tokens"] > 60
    assert evaluate(*common) == 0
    assert "12 done, 0 to do" in capsys.readouterr().out
    assert evaluate(*common[:6], *common[8:], "--tasks", "qasper,trec", "--limit", "1") == 0
    assert len(records(tmp_path / "out")) == 14  # more tasks in the same folder
    assert evaluate(*common, "--recipe", "opencompass") == 2
    assert "recipe" in capsys.readouterr().err


def test_a_bad_row_and_a_prompt_beyond_the_window_count_zero(model, short, tmp_path, capsys):
    rows = [row("lcc", 0), row("lcc", 1, length="x"), row("lcc", 2, context="word " * 9000)]
    (tmp_path / "lcc.jsonl").write_bytes(lines(rows))
    assert (
        evaluate(
            "--model",
            model,
            "--data",
            tmp_path / "lcc.jsonl",
            "--tasks",
            "lcc",
            "--method",
            "full",
            "--out",
            tmp_path / "out",
            "--max-prompt",
            8192,
        )
        == 3
    )
    shown = capsys.readouterr()
    assert "bad row:" in shown.out and 'lcc.jsonl: line 2: field length is "x"' in shown.out
    assert "INCOMPLETE: full failed on 2 of 3 rows (1 bad_row, 1 error); they count 0" in shown.out
    found = {r["id"]: r for r in records(tmp_path / "out")}
    assert found["lcc-1"]["status"] == "bad_row" and "window" in found["lcc-2"]["error"]
    assert found["lcc-2"]["meta"]["category"] == "code"


def test_longbench_e_by_length(model, short, tmp_path, capsys):
    folder = folder_of(tmp_path / "data", [], "_e")
    rows = [row("lcc", i, length=n) for i, n in enumerate((100, 5000, 9000, 10))]
    (folder / "lcc_e.jsonl").write_bytes(lines(rows))
    assert evaluate("--model", model, "--data", folder, "--tasks", "e,lcc", "--method", "full",
                    "--out", tmp_path / "out") == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "LongBench-E, recipe official, by length in words" in shown
    table = [line.split() for line in shown.splitlines() if line.startswith("lcc ")]
    assert [(cells[1], cells[2]) for cells in table] == [("0-4k", "2"), ("4-8k", "1"), ("8k+", "1")]
    assert {r["task"] for r in records(tmp_path / "out")} == {"lcc_e"}


def test_dry_run_and_data_errors(data, model, capsys, tmp_path):
    assert evaluate("--model", model, "--data", data, "--tasks", "qasper,lcc", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>user\nYou are given a scientific article" in shown
    assert "cut_tokens 0" in shown and "Next line of code:" in shown
    assert evaluate("--model", model, "--data", tmp_path / "absent", "--dry-run") == 2
    assert "does not exist; allowed: a data.zip" in capsys.readouterr().err
    folder_of(tmp_path / "some", ["lcc"])
    assert evaluate("--model", model, "--data", tmp_path / "some") == 2
    assert "has no narrativeqa.jsonl" in (shown := capsys.readouterr().err)
    assert "--tasks lcc" in shown


# real rows
