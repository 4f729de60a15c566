# SPDX-License-Identifier: Apache-2.0
"""Benchmark data: the same rows from zip, folder and file; what is wrong with it is named."""

import hashlib
import json
import os
import pathlib
import zipfile

import pytest

from pbs_attn.cli import CommandError
from pbs_attn.eval import recipes, sources

TASKS = list(recipes.TASKS)
DATA = pathlib.Path(os.environ.get("PBS_ATTN_DATA", "")) / "data"
HAVE_DATA = bool(os.environ.get("PBS_ATTN_DATA")) and DATA.is_dir()


def row(task, number, **changes):
    """A good row of a task; values of `changes` replace its fields, `...` deletes one."""
    answers = {"passage_retrieval_en": ["Paragraph 7"], "passage_retrieval_zh": ["段落7"]}
    found = {
        "_id": f"{task}-{number}", "input": f"question {number}?", "context": f"text {number}",
        "answers": answers.get(task, ["one", "two"]), "length": 6, "dataset": task,
        "language": "en", "all_classes": ["one", "two"] if task in ("trec", "lsht") else None,
    }  # fmt: skip
    return {k: v for k, v in {**found, **changes}.items() if v is not ...}


def question(number, **changes):
    """A good row of LongBench v2."""
    found = {"_id": f"q{number}", "domain": "d", "sub_domain": "s", "difficulty": "easy",
             "length": "short", "question": "which?", "answer": "ABCD"[number % 4],
             "context": f"text {number} 文"}  # fmt: skip
    found |= {f"choice_{letter}": f"choice {letter}" for letter in "ABCD"}
    return {k: v for k, v in {**found, **changes}.items() if v is not ...}


def lines(rows):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


def folder_of(path, tasks, suffix="", rows=3):
    path.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        (path / f"{task}{suffix}.jsonl").write_bytes(lines(row(task, i) for i in range(rows)))
    return path


def zip_of(path, folder, inside="data"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{inside}/{file.name}")
        archive.writestr(f"__MACOSX/{inside}/._qasper.jsonl", b"\0\1")
    return path


def facts(tables):
    return {task: (table.sha256, table.rows) for task, table in tables.items()}


def test_zip_folder_and_file_hold_the_same_rows(tmp_path):
    folder = folder_of(tmp_path / "data", TASKS)
    expected = facts(sources.longbench(folder, TASKS, TASKS))
    zipped = zip_of(tmp_path / "data.zip", folder)
    assert facts(sources.longbench(zipped, TASKS, TASKS)) == expected
    assert facts(sources.longbench(tmp_path, TASKS, TASKS)) == expected  # the folder above data/
    (snapshot := tmp_path / "snapshot").mkdir()
    zipped.rename(snapshot / "data.zip")
    assert facts(sources.longbench(snapshot, TASKS, TASKS)) == expected  # a folder with the zip
    file = folder / "qasper.jsonl"
    one = sources.longbench(file, ["qasper"], TASKS)
    assert facts(one) == {"qasper": expected["qasper"]}
    assert one["qasper"].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    (listed := tmp_path / "qasper.json").write_text(
        json.dumps([row("qasper", i) for i in range(3)])
    )
    assert sources.longbench(listed, ["qasper"], TASKS)["qasper"].rows == expected["qasper"][1]


def test_one_file_of_several_tasks_is_told_apart_by_dataset(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [row(task, i) for i in range(2) for task in ("lcc", "trec", "qasper")]
    rows[3].pop("answers")  # lcc-1 stays a row of lcc
    file.write_bytes(lines(rows))
    found = sources.longbench(file, ["trec", "lcc"], TASKS)
    assert [r.id for r in found["trec"].rows] == ["trec-0", "trec-1"]
    assert [r.error is None for r in found["lcc"].rows] == [True, False]
    with pytest.raises(CommandError, match=r"has no vcsum\.jsonl.*--tasks qasper,trec,lcc"):
        sources.longbench(file, ["vcsum"], TASKS)
    file.write_bytes(lines([row("lcc", 0, dataset="other")]))
    with pytest.raises(CommandError, match=r"rows\.jsonl: row lcc-0: field dataset is \"other\""):
        sources.longbench(file, ["lcc"], TASKS)


def test_longbench_e_reads_its_own_files(tmp_path):
    folder_of(tmp_path, ["qasper"])
    folder_of(tmp_path, ["lcc"], "_e", rows=2)
    assert len(sources.longbench(tmp_path, ["lcc"], TASKS, "_e")["lcc"].rows) == 2
    with pytest.raises(CommandError, match=r"no qasper_e\.jsonl; it has 1 tasks: --tasks lcc"):
        sources.longbench(tmp_path, ["qasper"], TASKS, "_e")


def test_a_missing_task_names_those_that_are_there(tmp_path):
    folder = folder_of(tmp_path / "data", ["lcc", "qasper"])
    for where in (folder, zip_of(tmp_path / "data.zip", folder)):
        with pytest.raises(CommandError) as error:
            sources.longbench(where, ["qasper", "trec", "vcsum"], TASKS)
        assert "no trec.jsonl, vcsum.jsonl; it has 2 tasks: --tasks qasper,lcc" in str(error.value)


@pytest.mark.parametrize(
    "task, changes, wrong",
    [
        ("qasper", {"answers": ...}, "field answers is missing; allowed: a list of one or more"),
        ("qasper", {"answers": []}, "field answers is []; allowed"),
        ("qasper", {"answers": ["a", 3]}, 'field answers is ["a", 3]'),
        ("qasper", {"length": "6"}, 'field length is "6"; allowed: a whole number'),
        ("qasper", {"length": True}, "field length is true"),
        ("qasper", {"context": ""}, 'field context is ""'),
        ("qasper", {"input": None}, "field input is null; allowed: a text"),
        ("qasper", {"_id": ...}, "field _id is missing"),
        ("trec", {"all_classes": None}, "field all_classes is null; allowed: a list"),
        ("passage_retrieval_en", {"answers": ["7"]}, "allowed: a list of texts with Paragraph N"),
        (
            "passage_retrieval_zh",
            {"answers": ["Paragraph 7"]},
            "allowed: a list of texts with 段落N",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, task, changes, wrong):
    file = tmp_path / f"{task}.jsonl"
    file.write_bytes(lines([row(task, 0), row(task, 1, **changes), row(task, 2)]))
    first, bad, last = sources.longbench(tmp_path, [task], TASKS)[task].rows
    assert first.error is None and last.error is None
    assert bad.data is None and bad.error.startswith(f"{file}: line 2: ") and wrong in bad.error
    assert bad.id == (f"{task}-1" if "_id" not in changes else "line-2")


def test_torn_lines_and_doubled_ids_are_rows_too(tmp_path):
    file = tmp_path / "qasper.jsonl"
    whole = lines([row("qasper", 0), row("qasper", 1), row("qasper", 0)])
    file.write_bytes(b"\xef\xbb\xbf" + whole + b"\n\n[1, 2]\n\xff\xfe\n" + whole[:40])
    rows = sources.longbench(tmp_path, ["qasper"], TASKS)["qasper"].rows
    assert [r.id for r in rows] == [
        "qasper-0", "qasper-1", "qasper-0@line-3", "line-6", "line-7", "line-8",
    ]  # fmt: skip
    assert [r.error is None for r in rows] == [True] * 3 + [False] * 3
    assert "line 6: is [1, 2]; allowed: an object with _id, input" in rows[3].error
    assert "line 7: is not UTF-8 (byte 0)" in rows[4].error
    assert "line 8: is not JSON (column " in rows[5].error


def test_places_that_cannot_be_read(tmp_path):
    with pytest.raises(CommandError, match="does not exist; allowed: a data.zip, a folder"):
        sources.longbench(tmp_path / "absent", TASKS, TASKS)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CommandError, match=r"has suffix '\.txt'; allowed: \.zip, \.jsonl"):
        sources.longbench(tmp_path / "notes.txt", TASKS, TASKS)
    with pytest.raises(CommandError, match=r"no file of a LongBench task, such as narrativeqa\.js"):
        sources.longbench(tmp_path, TASKS, TASKS)
    zipped = zip_of(tmp_path / "data.zip", folder_of(tmp_path / "data", ["qasper"], rows=200))
    raw = bytearray(zipped.read_bytes())
    raw[80:120] = bytes(40)  # inside the compressed file; the directory at the end is whole
    zipped.write_bytes(raw)
    with pytest.raises(CommandError, match=r"data/qasper\.jsonl is damaged"):
        sources.longbench(zipped, ["qasper"], TASKS)
    zipped.write_bytes(raw[:-30])  # half downloaded
    with pytest.raises(CommandError):
        sources.longbench(zipped, ["qasper"], TASKS)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_longbench2_json_is_parsed_item_by_item(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    rows = [question(i) for i in range(5)]
    (tmp_path / "data.jsonl").write_bytes(lines(rows))
    expected = [sources.Row(r["_id"], r) for r in rows]
    assert sources.longbench2(tmp_path).rows == expected
    (tmp_path / "data.jsonl").unlink()
    file = tmp_path / "data.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False) + "\n\n"):
        file.write_text(text, encoding="utf-8")
        table = sources.longbench2(file)
        assert table.rows == expected and sources.longbench2(tmp_path).rows == expected
        assert table.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    whole = json.dumps(rows)
    for end, ids, wrong in (
        (len(whole) - 1, [f"q{i}" for i in range(5)] + ["item-6"], "item 6: is missing: the file"),
        (len(whole) - 9, [f"q{i}" for i in range(4)] + ["item-5"], "item 5: is not JSON"),
    ):
        file.write_text(whole[:end])
        found = sources.longbench2(file).rows
        assert [r.id for r in found] == ids and wrong in found[-1].error
    file.write_text('{"_id": "q0"}')
    with pytest.raises(CommandError, match="no row can be used; .*its start: is not a list"):
        sources.longbench2(file)


@pytest.mark.parametrize(
    "changes, wrong",
    [
        ({"answer": "E"}, 'field answer is "E"; allowed: A, B, C or D'),
        ({"answer": ["A"]}, 'field answer is ["A"]'),
        ({"difficulty": "medium"}, "allowed: easy or hard"),
        ({"length": 12000}, "field length is 12000; allowed: short, medium or long"),
        ({"choice_C": ...}, "field choice_C is missing"),
    ],
)
def test_longbench2_bad_rows(tmp_path, changes, wrong):
    (tmp_path / "data.json").write_text(json.dumps([question(0), question(1, **changes)]))
    good, bad = sources.longbench2(tmp_path).rows
    assert good.error is None and "data.json: item 2: " in bad.error and wrong in bad.error


def test_longbench2_rag_needs_chunks(tmp_path):
    chunks = [{"content": "a", "c_idx": 3}]
    (tmp_path / "data.json").write_text(
        json.dumps([question(0), question(1, retrieved_context=chunks)])
    )
    without, with_chunks = sources.longbench2(tmp_path, sources.CHUNKS).rows
    assert "field retrieved_context is missing" in without.error and with_chunks.error is None
    (tmp_path / "data.json").write_text(json.dumps([question(0), question(1)]))  # as published
    with pytest.raises(CommandError, match="no row can be used; .*retrieved_context is missing"):
        sources.longbench2(tmp_path, sources.CHUNKS)


def test_the_hub_cache_is_read_without_a_network(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(CommandError) as error:
        sources.longbench("hub", ["qasper"], TASKS)
    for words in (
        "data.zip", str(tmp_path), "THUDM/LongBench: no route to host", "zai-org/LongBench: ",
        "/datasets/THUDM/LongBench/resolve/main/data.zip", "--data data.zip",
    ):  # fmt: skip
        assert words in str(error.value)
    assert "and more" not in str(error.value)
    home = tmp_path / "datasets--zai-org--LongBench"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("c0ffee")
    (home / "snapshots" / "c0ffee").mkdir(parents=True)
    zip_of(home / "snapshots" / "c0ffee" / "data.zip", folder_of(tmp_path / "x", ["qasper"]))
    assert len(sources.longbench("hub", ["qasper"], TASKS)["qasper"].rows) == 3


def test_parquet_without_pyarrow_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(CommandError, match="pyarrow"):
        sources.longbench2(tmp_path)


def test_prompt_files_are_the_published_ones():
    folder = pathlib.Path(recipes.__file__).parent / "data"
    for name in ("longbench", "longbench2", "opencompass"):
        sums = (folder / name / "SHA256SUMS").read_text().splitlines()
        assert sums and (folder / name / "NOTICE").is_file()
        for line in sums:
            digest, file = line.split()
            assert hashlib.sha256((folder / name / file).read_bytes()).hexdigest() == digest, file
        listed = {line.split()[1] for line in sums} | {"NOTICE", "SHA256SUMS", "LICENSE"}
        assert {file.name for file in (folder / name).iterdir()} <= listed
    # of the published files themselves, so that a changed SHA256SUMS is seen, too
    published = {
        "longbench/dataset2prompt.json": "56d22ad4f382169c",
        "longbench/dataset2maxlen.json": "72966b3c0933e214",
        "longbench2/0shot.txt": "68a162252bc9ff71",
        "longbench2/0shot_cot.txt": "6cc33d92fd8f6116",
        "longbench2/0shot_cot_ans.txt": "85ec59df4ac0e27a",
        "longbench2/0shot_no_context.txt": "125fb44183af01ff",
        "longbench2/0shot_rag.txt": "5c50ce4fa24d297b",
    }
    for file, start in published.items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest().startswith(start), file


@pytest.mark.skipif(not HAVE_DATA, reason="PBS_ATTN_DATA names no folder with data/")
def test_real_rows_of_all_tasks_are_good():
    tables = sources.longbench(DATA / "longbench_mini", TASKS, TASKS)
    for task, table in tables.items():
        assert table.rows and not [r.error for r in table.rows if r.error], task
        assert {r.data["dataset"] for r in table.rows} == {task}
    for task in ("multi_news", "multifieldqa_zh", "passage_retrieval_zh"):
        rows = sources.longbench(DATA / "longbench", [task], TASKS)[task].rows
        assert len(rows) == 50 and not any(r.error for r in rows)
    rows = sources.longbench2(DATA / "longbench_v2").rows
    assert len(rows) == 12 and not any(r.error for r in rows)
