# SPDX-License-Identifier: Apache-2.0
"""eval agreement: replies against transformers' generate, rows of data, and what is counted."""

import json

import byte_models
import pytest
import torch

from pbs_attn import cli, methods, patch_model
from pbs_attn.cli import models
from pbs_attn.eval import agreement, store
from pbs_attn.eval.jobs import BadRow
from pbs_attn.eval.session import Session, Tokens

SPARSE = "pbs:tau=0.3,block=64,segment=128"
COUNT = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return byte_models.checkpoint(tmp_path_factory.mktemp("agreement") / "tiny")


@pytest.fixture(scope="module")
def session(checkpoint):
    model, tokenizer = models.load(checkpoint)
    return Session(model, Tokens(tokenizer, byte_models.WINDOW), name="tiny")


def run(checkpoint, out, *words, status=0):
    """[record] of `eval agreement`."""
    words = [
        "eval",
        "agreement",
        "--model",
        checkpoint,
        "--out",
        out,
        "--new-tokens",
        COUNT,
        *words,
    ]
    assert cli.main([str(word) for word in words]) == status
    return list(store.read(out)[1].values())


@pytest.fixture(scope="module")
def records(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("agreement") / "run"
    names = f"full,sdpa,identity:tau=1,{SPARSE}"
    return run(checkpoint, out, "--lengths", 600, "--windows", 4, "--method", names)


# ---- comparing two replies -----------------------------------------------------------------------


def reply(tokens, logits=(1.0, 2.0, 3.0)):
    return {"tokens": tokens, "first": torch.tensor(logits).log_softmax(-1)}


@pytest.mark.parametrize(
    ("ours", "theirs", "same", "first", "identical"),
    [
        ([1, 2, 3], [1, 2, 3], 3, True, True),
        ([1, 2, 4], [1, 2, 3], 2, True, False),
        ([4, 2, 3], [1, 2, 3], 0, False, False),
        ([1, 2], [1, 2, 3], 2, True, False),
    ],
)
def test_common_prefix(ours, theirs, same, first, identical):
    found = agreement.compare(reply(ours), reply(theirs))
    assert (found["same_tokens"], found["first_same"]) == (same, first)
    assert (found["identical"], found["n"]) == (identical, len(theirs))
    assert found["kl_first"] == 0


def test_divergence_is_of_dense_from_the_method():
    found = agreement.compare(reply([2], (0.0, 1.0, 5.0)), reply([2]))
    p, q = (torch.tensor(x).double().softmax(-1) for x in ((1.0, 2.0, 3.0), (0.0, 1.0, 5.0)))
    assert found["kl_first"] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


# ---- replies of a model --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", SPARSE])
def test_reply_is_what_generate_says(session, name):
    method = methods.get(name)
    if method.kind != "dense":
        method = method.replace(min_q=0, min_kv=0)
    ids = session.tokens.encode(models.demo_text()[1])[:500]
    found = agreement.reply(session, method, ids, COUNT)
    prompt = session.tensor(ids)
    with patch_model(session.model, method), torch.inference_mode():
        wanted = session.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=COUNT, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0, 500:].tolist()  # fmt: skip
        logits = session.model(prompt).logits[0, -1]
    assert found["tokens"] == wanted
    torch.testing.assert_close(found["first"], logits.log_softmax(-1), rtol=1e-4, atol=1e-5)
    assert (found["cost"]["density"] < 1) == (name == SPARSE)
    assert found["cost"]["calls"]["dense"] == (0 if name == SPARSE else 2)  # decoding not counted


def test_reply_ends_at_an_end_token(session, monkeypatch):
    full = methods.get("full")
    ids = session.tokens.encode(models.demo_text()[1])[:300]
    whole = agreement.reply(session, full, ids, COUNT)["tokens"]
    monkeypatch.setattr(session, "eos", lambda: [whole[2]])
    ended = agreement.reply(session, full, ids, COUNT)["tokens"]
    assert ended == whole[: whole.index(whole[2]) + 1]


# ---- the bench -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "sdpa", "identity:tau=1"])
def test_dense_agrees_with_itself(records, method):
    found = [record for record in records if record["method"] == method]
    assert len(found) == 4
    for record in found:
        assert record["first_same"] and record["identical"]
        assert record["same_tokens"] == record["n"] == len(record["tokens"])
        assert abs(record["kl_first"]) < 1e-5
        assert record["density"] == 1


def test_sparse_does_not_always(records):
    found = [record for record in records if record["method"] == SPARSE]
    assert any(record["same_tokens"] < record["n"] for record in found)
    assert all(record["kl_first"] > 1e-4 and record["density"] < 1 for record in found)
    for record in found:
        assert record["first_same"] == (record["same_tokens"] > 0)


def test_dense_is_run_twice(session, monkeypatch):
    """The second run is compared with the first, so noise of dense would show."""
    calls, answers = [], iter([[1, 2, 3], [1, 2, 9]])

    def noisy(session, method, ids, count):
        calls.append(method.label)
        cost = {"prefill_s": 0.0, "density": 1.0, "computed": 1.0}
        return reply(next(answers)) | {"cost": cost}

    monkeypatch.setattr(agreement, "reply", noisy)
    full = methods.get("full")
    job = agreement.Job("agreement", "t", "0", 2, 1.0, {"ids": [1, 2]})
    args = type("Args", (), {"new_tokens": 3, "tp": None})
    ((method, record),) = agreement.work_all(session, [full], job, args)
    assert (method, calls) == (full, ["full", "full"])
    assert (record["same_tokens"], record["identical"]) == (2, False)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "p", "context": "c", "input": "i"}, "p"),
        ({"context": "c", "input": "i", "answers": []}, "c\n\ni"),  # LongBench
        ({"context": "c", "input": ""}, "c"),
        ({"context": "c", "question": "q", "choice_A": "a"}, "c\n\nq"),  # LongBench v2
        ({"index": 0, "input": "i", "outputs": ["o"]}, "i"),  # RULER
    ],
)
def test_prompt_of_a_row(row, wanted):
    assert agreement.prompt_of(json.dumps(row), "f, line 1") == wanted


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', "{}", '{"input": 3}', '{"prompt": ""}'])
def test_row_without_a_prompt(line):
    with pytest.raises(BadRow, match="f, line 7"):
        agreement.prompt_of(line, "f, line 7")


def test_rows_of_a_file(checkpoint, tmp_path, capsys):
    lines = [json.dumps({"context": "word " * 100, "input": "What?"}), "", "{broken",
             json.dumps({"input": "x" * byte_models.WINDOW + "tail"})]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    words = ("--data", path, "--method", "full,identity")
    found = run(checkpoint, tmp_path / "out", *words, status=3)
    records = {(record["id"], record["method"]): record for record in found}
    assert {key: record["status"] for key, record in records.items()} == {
        (line, method): status
        for line, status in (("1", "ok"), ("3", "bad_row"), ("4", "ok"))
        for method in ("full", "identity")
    }
    assert "rows.jsonl, line 3: not JSON" in records["3", "full"]["error"]
    assert records["1", "full"]["prompt_tokens"] == 507
    assert records["1", "full"]["cut_tokens"] == 0
    assert records["4", "full"]["prompt_tokens"] == byte_models.WINDOW - COUNT
    assert records["4", "full"]["cut_tokens"] == 4 + COUNT
    said = capsys.readouterr().out
    assert "INCOMPLETE" in said and "first same" in said


def test_max_prompt_keeps_the_end(session):
    row = json.dumps({"prompt": "a" * 60 + "b" * 30})
    job = agreement.Job("agreement", "t", "1", 0, 1.0, {"path": "f", "line": row})
    tokens = Tokens(session.tokens.tokenizer, byte_models.WINDOW, max_prompt=50)
    ids, info = agreement.prompt(tokens, job, type("Args", (), {"new_tokens": 2}))
    assert session.tokens.decode(ids) == "a" * 20 + "b" * 30
    assert info == {"tokens": 50, "cut": 40}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--new-tokens", "0"], "--new-tokens is 0"),
        (["--data", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--data", "a", "--text", "b"], "allowed: one of them"),
        (
            ["--lengths", "4090"],
            "4,090; allowed: up to 4,096, the window of the model, less the 16",
        ),
    ],
)
def test_bad_input_is_said_before_any_work(checkpoint, tmp_path, capsys, words, wanted):
    out = tmp_path / "x"
    words = ["eval", "agreement", "--model", checkpoint, "--out", str(out), *words]
    assert cli.main(words) == 2
    assert wanted in capsys.readouterr().err
    assert not out.exists()
