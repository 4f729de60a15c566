# SPDX-License-Identifier: Apache-2.0
"""python -m pbs_attn eval: runs that are stopped, killed, shared, repeated, and wrong."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import eval_dummy
import eval_models
import pytest
import torch

from pbs_attn import cli
from pbs_attn.cli import eval as cli_eval
from pbs_attn.cli import models
from pbs_attn.eval import launch, runner, store
from pbs_attn.eval.jobs import record_key

ROWS = 16  # 2 tasks x 4 rows x 2 methods


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return eval_models.tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return models.load(checkpoint), models.load_tokenizer(models.locate(checkpoint))


@pytest.fixture
def loads(monkeypatch, loaded):
    """The checkpoint is loaded once for all tests; yields the names of loads of weights."""
    names = []

    def load(name, **options):
        names.append(name)
        return loaded[0]

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "load_tokenizer", lambda path, **options: loaded[1])
    monkeypatch.setitem(cli_eval.BENCHES, "dummy", eval_dummy.HELP)
    monkeypatch.setitem(sys.modules, "pbs_attn.eval.dummy", eval_dummy)
    monkeypatch.setattr(eval_dummy, "tries", {})
    monkeypatch.setattr(eval_dummy, "seen", [])
    monkeypatch.setattr(runner.gc, "collect", lambda: None)  # 0.2 s of every row without memory
    return names


@pytest.fixture
def start(loads, checkpoint, tmp_path, capsys):
    """start(words..., out="run") -> (status, stdout, stderr)."""

    def run(*words, out="run"):
        words = ["eval", "dummy", "--model", checkpoint, "--out", tmp_path / out, *words]
        status = cli.main([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


def records(tmp_path, out="run"):
    return eval_dummy.records(tmp_path / out)


def lines(tmp_path, out="run"):
    return sum(len(p.read_bytes().splitlines()) for p in (tmp_path / out).glob("records-*.jsonl"))


# ---- complete, again, and in parts -----------------------------------------------------------


def test_a_run_keeps_every_row_and_says_what_it_does(start, tmp_path, checkpoint):
    status, out, err = start()
    assert status == 0
    found = records(tmp_path)
    assert len(found) == ROWS and all(record["status"] == "ok" for record in found.values())
    for words in ("recipe official", "data     sha256", "16: 0 done, 16 to do", "window 8,192",
                  "patched 2 layers", "2 of them sparse", "decoding is dense"):  # fmt: skip
        assert words in out
    assert "INCOMPLETE" not in out and "of 8\n" in out and "16 of 16 rows" in err
    run, _ = store.read(tmp_path / "run")
    assert run["identity"]["recipe"] == "official" and run["identity"]["seed"] == 42
    assert run["methods"]["pbs"]["tau"] == 0.9 and run["methods"]["pbs"]["min_kv"] == 0
    assert run["expected"]["pbs"] == {"a": {"0": 4}, "b": {"0": 4}}
    assert run["command"].startswith("python -m pbs_attn eval dummy --model")
    assert run["model"]["path"] == checkpoint and run["versions"]["torch"] == torch.__version__
    assert run["machine"]["cpu"] and run["start"] and "git_commit" in run


def test_rows_come_longest_first_with_all_methods_of_a_row(start):
    start()
    order = [row for row, _ in eval_dummy.seen]
    assert order == sorted(order, key=lambda row: -int(row[1]))
    assert eval_dummy.seen[::2] == [(row, "full") for row in order[::2]]
    assert eval_dummy.seen[1::2] == [(row, "pbs") for row in order[::2]]


def test_a_complete_run_starts_again_without_the_model(start, tmp_path, loads):
    _, first, _ = start()
    before = (tmp_path / "run" / "records-0of1.jsonl").read_bytes()
    status, again, _ = start()
    assert status == 0 and len(loads) == 1 and "16 done, 0 to do" in again
    assert (tmp_path / "run" / "records-0of1.jsonl").read_bytes() == before
    assert again.splitlines()[-2:] == first.splitlines()[-2:]


def test_methods_tasks_and_limit_grow_in_one_folder(start, tmp_path):
    start("--limit", 2, "--tasks", "a", "--method", "full")
    assert len(records(tmp_path)) == 2
    start("--method", "full,pbs,identity")
    assert len(records(tmp_path)) == 24
    assert len(eval_dummy.seen) == 24  # nothing twice
    run, _ = store.read(tmp_path / "run")
    assert [each["limit"] for each in run["runs"]] == [2, None]


def test_three_shards_are_one_run(start, tmp_path):
    assert start(out="whole")[0] == 0
    parts, outs = [], []
    for i in range(3):
        eval_dummy.seen.clear()
        status, out, _ = start("--shard", f"{i}/3", out="parts")
        assert status == 0  # its own part is complete
        parts.append({*eval_dummy.seen})
        outs.append(out)
    assert sum(map(len, parts)) == ROWS == len(set.union(*parts)) and all(parts)
    assert records(tmp_path, "parts") == records(tmp_path, "whole")
    assert "not done yet" in outs[0] and "pbs_attn report" in outs[0]
    assert "INCOMPLETE" not in outs[2] and "of 8" in outs[2]  # the last prints the table
    assert len([*(tmp_path / "parts").glob("records-*of3.jsonl")]) == 3


def test_another_number_of_shards_goes_on(start, tmp_path):
    start("--shard", "1/3")
    start("--shard", "0/2")
    start()
    assert len(records(tmp_path)) == ROWS == len(eval_dummy.seen)


def test_ranks_of_torchrun_are_shards(start, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        status, out, err = start("--shard", "0/1")
        assert status == 0 and bool(out) == bool(err) == (rank == 0)
    assert len(records(tmp_path)) == ROWS == len(eval_dummy.seen)
    assert {path.name for path in (tmp_path / "run").glob("*.jsonl")} == {
        "records-0of2.jsonl", "records-1of2.jsonl"}  # fmt: skip


def test_tp_needs_torchrun(start):
    status, _, err = start("--tp", 2)
    assert status == 2 and "torchrun --nproc-per-node 2" in err


def test_the_seed_does_not_depend_on_the_rows_before(start, tmp_path):
    start()
    start("--limit", 1, "--tasks", "b", out="one")
    whole, one = records(tmp_path), records(tmp_path, "one")
    assert one and all(whole[key] == record for key, record in one.items())


# ---- rows that fail --------------------------------------------------------------------------

FAILURES = "a0=bad,a1=error,a2=oom,a3=cpu-oom,b0=memory,b1=oom-once,b2=tensor"


def test_failed_rows_are_kept_counted_as_zero_and_said(start, tmp_path):
    status, out, err = start("--fail", FAILURES)
    assert status == 3
    found = {record["id"]: record for record in records(tmp_path).values()}
    states = {name: record["status"] for name, record in sorted(found.items())}
    assert states == {"a0": "bad_row", "a1": "error", "a2": "oom", "a3": "oom", "b0": "oom",
                      "b1": "ok", "b2": "error", "b3": "ok"}  # fmt: skip
    assert found["a0"]["error"] == "data.jsonl line 7: a0 has no field 'answers'"
    assert found["a1"]["error"].startswith("KeyError: 'answers' (eval_dummy.py:")
    assert "object" in found["b2"]["error"]
    tries = {name: eval_dummy.tries[name, "pbs"] for name in found}
    assert tries == {"a0": 1, "a1": 1, "a2": 2, "a3": 2, "b0": 2, "b1": 2, "b2": 1, "b3": 1}
    assert "INCOMPLETE: 12 of 16 rows failed (6 oom" in out and "count as zero" in out
    assert "--retry failed" in out and "a0 full: bad_row" in err
    mean = sum(r.get("score", 0.0) for r in records(tmp_path).values() if r["method"] == "full")
    assert f"full {100 * mean / 8:.3f} of 8" in out


def test_allow_missing_means_over_the_rows_that_worked(start, tmp_path):
    start("--fail", FAILURES)
    status, out, _ = start("--fail", FAILURES, "--allow-missing")
    good = [r["score"] for r in records(tmp_path).values()
            if r["method"] == "full" and r["status"] == "ok"]  # fmt: skip
    assert status == 3 and f"full {50 * sum(good):.3f} of 2" in out
    assert "rows that worked (--allow-missing)" in out and "INCOMPLETE" in out


def test_failed_rows_run_again_only_when_asked(start, tmp_path):
    start("--fail", FAILURES)
    eval_dummy.seen.clear()
    assert start()[0] == 3 and not eval_dummy.seen
    status, out, _ = start("--retry", "failed")
    assert status == 0 and len(eval_dummy.seen) == 12 and "INCOMPLETE" not in out
    assert start(out="whole")[0] == 0
    assert records(tmp_path) == records(tmp_path, "whole")


def test_what_fails_every_row_stops_the_run(start, tmp_path):
    status, _, err = start("--fail", "b3=stop")
    assert status == 2 and "this cannot work for any row" in err
    assert len(records(tmp_path)) == 2  # a3 came first
    assert start()[0] == 0 and len(records(tmp_path)) == ROWS


def test_a_lost_gpu_fails_its_row_and_stops(start, tmp_path):
    status, _, err = start("--fail", "b3=lost")
    assert status == 2 and "illegal memory access" in err and "goes on after it" in err
    assert [r["status"] for r in records(tmp_path).values()] == ["ok", "ok", "error"]


def test_a_prompt_longer_than_the_window_is_a_row_that_says_so(start, tmp_path, loaded):
    config = loaded[1][1]
    short, config.max_position_embeddings = config.max_position_embeddings, 60
    try:
        assert start("--method", "full")[0] == 3
    finally:
        config.max_position_embeddings = short
    errors = [r["error"] for r in records(tmp_path).values() if r["status"] != "ok"]
    assert errors and all("--max-prompt" in e and "window of 60" in e for e in errors)


# ---- stopped and killed ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(checkpoint, tmp_path_factory):
    """(folder, what eval_dummy as a program says): real signals to real processes."""
    folder = tmp_path_factory.mktemp("stopped")
    sizes = [0, *sorted(random.Random(20261121).sample(range(7000), 4))]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    words = [eval_dummy.__file__, checkpoint, folder, *sizes]
    done = subprocess.run([sys.executable, *map(str, words)], env=env, timeout=500,
                          capture_output=True, text=True, cwd=Path(__file__).parent)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_killed_at_any_moment_it_ends_the_same(stopped, start, tmp_path):
    folder, said = stopped
    assert start(out="whole")[0] == 0
    assert said["killed"] == [-9] * 5 + [0]
    assert records(folder, "killed") == records(tmp_path, "whole")
    assert lines(folder, "killed") == ROWS  # rows that were written are not run again


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_stopped_by_hand_it_says_how_to_go_on(stopped, signal):
    folder, said = stopped
    status, text = said[signal]["status"], said[signal]["said"]
    assert status == 130 and "of 16 rows are done and kept in" in text
    assert f"--out {folder / signal}" in text.split("stopped:")[1]
    assert "Traceback" not in text
    assert 3 <= len(records(folder, signal)) < ROWS


def test_two_starts_in_one_folder_do_not_mix(stopped):
    said = stopped[1]["together"]
    assert said["status"] == 2
    assert "another process (pid" in said["said"] and "--shard i/n" in said["said"]


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
    assert err.count("SHOWN") == 3 and "SHOWN a3 full" in err


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
