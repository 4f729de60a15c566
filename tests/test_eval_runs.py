# SPDX-License-Identifier: Apache-2.0
"""Runs of python -m pbs_attn eval that are complete, shared, repeated, failing, stopped, killed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import eval_dummy
import pytest
import torch
from eval_frame import (  # noqa: F401
    ROWS,
    checkpoint_fixture,
    lines,
    loaded_fixture,
    loads_fixture,
    records,
    start_fixture,
)

from pbs_attn import cli
from pbs_attn.cli import eval as cli_eval
from pbs_attn.eval import gpus, store

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


def test_a_method_is_known_by_what_is_in_its_file(start, tmp_path):
    file = tmp_path / "taus.json"
    method = f"pbs:thresholds={file}"
    file.write_text(json.dumps([[1.0] * 4] * 2))
    assert start("--method", "full")[0] == 0
    assert start("--method", method)[0] == 0  # a method with a file may come later
    file.write_text(json.dumps([[0.5] * 4] * 2))
    status, _, error = start("--method", method)
    assert status == 2 and "method_files" in error and "--out" in error
    status, _, error = start("--method", "full,identity")
    assert status == 0, error


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


@pytest.fixture
def two_gpus(monkeypatch):
    """--gpus 0,1 where there is none: its processes are calls, one after the other."""

    def spread(words, chosen):
        statuses = []
        for env in gpus.environments(chosen):
            with monkeypatch.context() as patch:
                for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                    patch.setenv(name, env[name])
                statuses.append(cli.main(words))
        return statuses

    monkeypatch.setattr(gpus.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cli_eval, "_device", lambda args: "cpu")
    monkeypatch.setattr(gpus, "spread", spread)


def test_a_process_per_gpu_and_one_table(start, tmp_path, two_gpus, monkeypatch):
    status, out, _ = start("--gpus", "0,1", "--fail", "a3=error")
    assert status == 3 and len(records(tmp_path)) == ROWS == len(eval_dummy.seen)
    assert {path.name for path in (tmp_path / "run").glob("*.jsonl")} == {
        "records-0of2.jsonl", "records-1of2.jsonl"}  # fmt: skip
    assert out.count("\nfull ") == out.count("INCOMPLETE") == 1
    assert start("--gpus=0,1", "--retry", "failed")[0] == 0
    assert start("--gpus", "0,1", "--shard", "1/2", out="half")[0] == 0
    assert 0 < len(records(tmp_path, "half")) < ROWS
    monkeypatch.setattr(gpus, "spread", lambda words, chosen: [0, -9])
    status, out, _ = start("--gpus", "0,1", out="other")
    assert status == 3 and "1 of 2 processes ended with -9" in out and "of 8" not in out
    assert start("--gpus", "0,2")[0] == start("--gpus", "0,0")[0] == 2


def test_processes_of_gpus_see_one_each_and_stop_together(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    code = "import os, sys; e = os.environ; sys.exit(int(e['CUDA_VISIBLE_DEVICES'] + e['RANK']))"
    program = (sys.executable, "-S", "-c", code + " if 'MASTER_ADDR' not in e else 1")
    assert gpus.spread(["x"], [2, 0], program) == [70, 41]
    assert gpus.without(["a", "--gpus", "0,1", "b", "--gpus=3"]) == ["a", "b"]


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
