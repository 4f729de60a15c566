# SPDX-License-Identifier: Apache-2.0
"""What python -m pbs_attn eval says before it works: wrong options, other runs, dry runs, help."""

import json
from pathlib import Path

import eval_dummy
import pytest
from eval_frame import (  # noqa: F401
    checkpoint_fixture,
    loaded_fixture,
    loads_fixture,
    records,
    start_fixture,
)

from pbs_attn import cli
from pbs_attn.cli import eval as cli_eval
from pbs_attn.cli import models
from pbs_attn.eval import launch, store
from pbs_attn.eval.jobs import record_key

# ---- said before work starts -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--recipe", "opencompass"], ["recipe", "'official'", "'opencompass'", "--out"]),
        (["--seed", "7"], ["seed", "42", "7", "--out"]),
        (["--no-chat"], ["chat", "True", "False"]),
        (["--max-prompt", "1k"], ["max_prompt", "None", "1024"]),
        (["--min-kv", "2048"], ["method pbs.min_kv", "0", "2048"]),
        (["--dtype", "bfloat16"], ["dtype", "'float32'", "'bfloat16'"]),
    ],
)
def test_another_run_in_the_folder_is_refused(start, loads, words, expected):
    start("--limit", 1)
    loads.clear()
    status, _, err = start("--limit", 1, *words)
    assert status == 2 and not loads
    for word in expected:
        assert word in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "nosuch"], "allowed: sdpa, full, pbs"),
        (["--method", "pbs:tau=-1"], "tau is -1"),
        (["--method", "pbs,pbs"], "'pbs' twice"),
        (["--method", ""], "no method"),
        (["--model", "/no/such/dir"], "--model /no/such/dir: no such directory"),
        (["--model", "nosuchmodel"], "no such directory; allowed"),
        (["--model", "no.gguf"], "--model no.gguf: no such file"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--rows", "0"], "no rows"),
        (["--tasks", "a,a"], "two rows have the id 'a0'"),
    ],
)
def test_wrong_options_are_a_sentence(start, loads, tmp_path, words, expected):
    status, _, err = start(*words)
    assert status == 2 and expected in err and "Traceback" not in err
    assert not loads and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [["--shard", "3/3"], ["--shard", "1"], ["--limit", "0"], ["--retry", "ok"], ["--tp", "1"],
     ["--max-prompt", "x"], ["--template-args", "[1]"], ["--nosuch"]],
)  # fmt: skip
def test_usage_exits_with_2(start, words):
    with pytest.raises(SystemExit) as stop:
        start(*words)
    assert stop.value.code == 2


def test_an_unknown_bench_and_a_missing_package_are_named(start, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "nosuch"])
    assert stop.value.code == 2 and "longbench2" in capsys.readouterr().err

    def work(*args):
        raise ModuleNotFoundError("No module named 'jieba'", name="jieba")

    monkeypatch.setattr(eval_dummy, "work", work)
    status, _, err = start()
    assert status == 2 and "jieba" in err and "pbs_attn[eval]" in err


def test_a_model_without_chat_template_names_no_chat(start, checkpoint, tmp_path, monkeypatch):
    tokenizer, config = models.load_tokenizer(checkpoint)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        status, _, err = start()
        assert status == 2 and "has no chat template" in err and "--no-chat" in err
        assert start("--no-chat", out="plain")[0] == 0
    finally:
        tokenizer.chat_template = template


def test_a_method_that_cannot_run_here_is_said_before_the_rows(start, tmp_path, monkeypatch):
    def using(model, method):
        raise ValueError("block_size is 128; allowed: a moon")

    monkeypatch.setattr(launch.Session, "using", lambda self, method: using(None, method))
    status, _, err = start()
    assert status == 2 and "--method full cannot run here" in err and "a moon" in err
    assert not records(tmp_path)


# ---- dry run, show, folders ------------------------------------------------------------------


def test_dry_run_prints_a_prompt_per_task_and_loads_nothing(start, loads, tmp_path):
    status, out, _ = start("--dry-run")
    assert status == 0 and not loads and not (tmp_path / "run").exists()
    assert out.count("====") == 2 and out.count("Row a0.") == out.count("Row b0.") == 1
    assert "<|im_start|>assistant" in out and "cut_tokens 0, new_tokens 3" in out
    assert "8 rows x 2 methods" in out and "prompt_tokens" in out


def test_show_prints_rows_as_they_come(start):
    _, _, err = start("--show", 3)
    assert err.count("SHOWN") == 3 and "-- a a3 full\nSHOWN" in err


def test_the_default_folder_is_named_after_bench_and_model(
    loads, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "dummy", "--model", checkpoint, "--limit", "1"]) == 0
    assert (tmp_path / "pbs-eval" / "dummy-tiny" / "run.json").exists()


def test_methods_run_at_every_length_unless_told(start, tmp_path):
    start("--limit", 1, "--method", "full,pbs:min_kv=64,identity", "--min-q", 5)
    run, _ = store.read(tmp_path / "run")
    assert [run["methods"][x]["min_kv"] for x in ("pbs:min_kv=64", "identity")] == [64, 0]
    assert run["methods"]["identity"]["min_q"] == 5
    start("--limit", 1, "--routed", out="routed")
    run, _ = store.read(tmp_path / "routed")
    assert run["methods"]["pbs"]["min_kv"] is None


def test_help_of_every_bench_has_examples(capsys):
    for name in cli_eval.BENCHES:
        if not (Path(cli_eval.__file__).parents[1] / "eval" / f"{name}.py").exists():
            continue
        with pytest.raises(SystemExit) as stop:
            cli.main(["eval", name, "--help"])
        out = capsys.readouterr().out
        assert stop.value.code == 0 and f"python -m pbs_attn eval {name}" in out, name
        assert "--model" in out and ("--retry" in out or name == "calibrate")


def test_records_have_the_fields_of_the_frame(start, tmp_path):
    start("--limit", 1, "--fail", "b0=error")
    for line in (tmp_path / "run" / "records-0of1.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert {"bench", "task", "id", "length", "method", "shard", "status", "error", "seed",
                "time"} <= set(record)  # fmt: skip
        assert record_key(record)[1] == "dummy" and record["shard"] == "0/1"
