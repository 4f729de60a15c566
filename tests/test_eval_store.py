# SPDX-License-Identifier: Apache-2.0
"""The run folder: what is appended stays, what is torn is dropped, what differs is refused."""

import json
import os

import pytest

from pbs_attn.cli import CommandError
from pbs_attn.eval import store
from pbs_attn.eval.jobs import record_key


def run_of(**changes):
    run = {
        "bench": "dummy",
        "identity": {"recipe": "official", "data": {"a": "11"}, "model": {"config": "cc"}},
        "methods": {"pbs": {"method": "pbs", "tau": 0.9}},
        "expected": {"pbs": {"a": {"0": 5}}},
        "runs": [{"command": "first"}],
    }
    return run | changes


def record_of(number, **changes):
    record = {"bench": "dummy", "task": "a", "id": f"a{number}", "length": 0, "method": "pbs",
              "status": "ok", "error": None, "time": float(number), "score": 0.5}  # fmt: skip
    return record | changes


@pytest.fixture
def opened(tmp_path):
    """A function that opens a store on one folder and closes what it opened before."""
    stores = []

    def start(shard=(0, 1), **changes):
        for each in stores:
            each.close()
        said = []
        one = store.Store(tmp_path / "run", shard, said.append)
        stores.append(one)
        one.said, one.found = said, one.open(run_of(**changes))
        return one

    yield start
    for each in stores:
        each.close()


def test_what_is_appended_is_found_again(opened):
    first = opened()
    assert first.found == {}
    rows = [record_of(i, pred="北京\n\u2028\x85\x00 \"'\\ \U0001f600") for i in range(3)]
    for row in rows:
        first.append(row)
    assert list(opened().found.values()) == rows
    assert len(first.path.read_text(encoding="utf-8").splitlines()) == 3  # no reader splits a row
    assert "北京" in first.path.read_text(encoding="utf-8")


def test_half_a_surrogate_pair_is_kept(opened):
    first = opened()
    first.append(record_of(0, pred="\ud83d"))
    assert opened().found[record_key(record_of(0))]["pred"] == "\ud83d"


@pytest.mark.parametrize("cut", [1, 2, 30, "all but the newline"])
def test_a_torn_last_line_is_dropped_and_appended_over(opened, cut):
    first = opened()
    for i in range(3):
        first.append(record_of(i))
    data = first.path.read_bytes()
    last = len(data.split(b"\n")[-2]) + 1
    keep = data[:-1] if cut == "all but the newline" else data[: len(data) - last + cut]
    first.path.write_bytes(keep)
    again = opened()
    assert [key[3] for key in again.found] == ["a0", "a1"]
    assert any("torn" in text for text in again.said)
    again.append(record_of(2, score=0.25))
    found = opened().found
    assert len(found) == 3 and found[record_key(record_of(2))]["score"] == 0.25
    assert store.read_file(again.path)[1] == []


def test_another_shards_torn_line_is_not_touched(opened):
    """Its process may be alive and in the middle of a write."""
    other = opened((1, 2))
    other.append(record_of(1))
    with open(other.path, "ab") as file:
        file.write(b'{"bench": "dum')
    before = other.path.read_bytes()
    first = opened((0, 2))
    assert [key[3] for key in first.found] == ["a1"]
    assert other.path.read_bytes() == before


@pytest.mark.parametrize("line", [b"\0" * 40, b"{}", b"[1]", b'{"bench": "dummy"}', b"\xff\xfe"])
def test_a_damaged_line_is_said_and_its_row_runs_again(opened, line):
    first = opened()
    first.append(record_of(0))
    with open(first.path, "ab") as file:
        file.write(line + b"\n")
    first.append(record_of(1))
    again = opened()
    assert [key[3] for key in again.found] == ["a0", "a1"]
    assert any("line 2" in text for text in again.said)


def test_a_row_that_worked_counts_then_the_later():
    ok, late = record_of(0, time=1.0), record_of(0, status="oom", time=9.0)
    key = record_key(ok)
    assert store.final([ok, late])[key] is ok and store.final([late, ok])[key] is ok
    newer = record_of(0, time=2.0, score=1.0)
    assert store.final([newer, ok])[key] is newer
    failed = record_of(0, status="error", time=3.0)
    assert store.final([failed, late])[key] is late


def test_shards_of_any_number_are_one_run(opened):
    for shard in ((0, 1), (1, 3), (4, 5)):
        opened(shard).append(record_of(shard[1]))
    assert {key[3] for key in opened((0, 2)).found} == {"a1", "a3", "a5"}


def test_a_second_process_on_a_shard_is_refused(opened, tmp_path):
    first = opened((0, 2))
    second = store.Store(tmp_path / "run", (0, 2))
    with pytest.raises(CommandError, match=rf"pid {os.getpid()} on .*records-0of2.*--shard"):
        second.open(run_of())
    other = store.Store(tmp_path / "run", (1, 2))
    other.open(run_of())
    other.close()
    first.close()
    second.open(run_of())
    second.close()


def test_a_folder_that_cannot_lock_is_used_with_a_word(opened, monkeypatch):
    def refuse(*args):
        raise OSError(store.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store.fcntl, "flock", refuse)
    assert any("cannot lock" in text for text in opened().said)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bench": "other"}, ["bench", "'dummy'", "'other'"]),
        (
            {"identity": run_of()["identity"] | {"recipe": "opencompass"}},
            ["recipe", "'official'", "'opencompass'"],
        ),
        (
            {"identity": run_of()["identity"] | {"model": {"config": "dd"}}},
            ["model.config", "'cc'", "'dd'"],
        ),
        (
            {"identity": run_of()["identity"] | {"data": {"a": "22"}}},
            ["data.a", "'11'", "'22'"],
        ),
        ({"identity": run_of()["identity"] | {"mode": "cot"}}, ["mode", "None", "'cot'"]),
        (
            {"methods": {"pbs": {"method": "pbs", "tau": 0.8}}},
            ["method pbs.tau", "0.9", "0.8"],
        ),
    ],
)
def test_another_run_in_the_folder_is_refused_by_field(opened, changes, words):
    first = opened()
    first.append(record_of(0))
    before = {path.name: path.read_bytes() for path in first.folder.glob("r*.json*")}
    with pytest.raises(CommandError) as error:
        opened(**changes)
    for word in [*words, "--out", str(first.folder)]:
        assert word in str(error.value)
    assert {path.name: path.read_bytes() for path in first.folder.glob("r*.json*")} == before


def test_methods_tasks_and_rows_may_grow(opened):
    opened()
    data = {"identity": run_of()["identity"] | {"data": {"b": "33"}}}
    second = opened(methods={"full": {"method": "full"}}, runs=[{"command": "second"}],
           expected={"full": {"a": {"0": 9}}, "pbs": {"a": {"0": 2}, "b": {"4096": 1}}},
           **data)  # fmt: skip
    run, _ = store.read(second.folder)
    assert run["identity"]["data"] == {"a": "11", "b": "33"}
    assert set(run["methods"]) == {"pbs", "full"}
    assert run["expected"] == {"pbs": {"a": {"0": 5}, "b": {"4096": 1}}, "full": {"a": {"0": 9}}}
    assert [each["command"] for each in run["runs"]] == ["first", "second"]
    assert run["identity_sha256"] == store.digest(run["identity"])


def test_other_versions_are_said_not_refused(opened):
    opened(versions={"torch": "2.12"}, machine={"gpu": "A", "threads": 1})
    again = opened(versions={"torch": "2.13"}, machine={"gpu": "B", "threads": 2})
    assert len(again.said) == 2
    assert "torch 2.12, this start has 2.13" in again.said[0] and "gpu A" in again.said[1]


def test_records_without_run_json_are_refused(opened):
    first = opened()
    first.append(record_of(0))
    (first.folder / "run.json").unlink()
    with pytest.raises(CommandError, match="no run.json"):
        opened()


def test_a_full_disk_tears_nothing(opened, monkeypatch):
    first = opened()
    first.append(record_of(0))
    before, write = first.path.read_bytes(), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
        with pytest.raises(CommandError, match=r"No space left.*kept"):
            first.append(record_of(1))
    assert first.path.read_bytes() == before
    first.append(record_of(1))
    assert len(opened().found) == 2


def test_a_file_in_the_way_is_a_sentence(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CommandError, match="--out"):
        store.Store(tmp_path / "run").open(run_of())


def test_reading_what_is_no_run_folder(tmp_path):
    with pytest.raises(CommandError, match="not a run folder"):
        store.read(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CommandError, match="format 99"):
        store.read(tmp_path)


def test_numbers_of_torch_and_numpy_are_plain():
    import numpy
    import torch

    line = store.to_line({"a": torch.ones(2), "b": numpy.float32(0.5), "c": torch.tensor(3)})
    assert json.loads(line) == {"a": [1.0, 1.0], "b": 0.5, "c": 3}
    with pytest.raises(TypeError, match="object"):
        store.to_line({"a": object()})
