# SPDX-License-Identifier: Apache-2.0
"""The bench ruler: official and written files, scores and averages, errors by name, a whole run."""

import json
import os
import pathlib
import re

import eval_models
import pytest
import ruler_sources

from pbs_attn import cli
from pbs_attn.cli import CommandError
from pbs_attn.cli import eval as frame
from pbs_attn.eval import ruler, ruler_files, ruler_generate, ruler_scores, ruler_tasks, session
from pbs_attn.eval import store as stores
from pbs_attn.eval.jobs import BadRow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ruler")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return eval_models.tiny_checkpoint(folder / "tiny")


def arguments(*words):
    """The parsed command line of the bench."""
    _, parser = frame.bench_parser("ruler")
    return parser.parse_args([*words])


def prepare(*words):
    return ruler.prepare(arguments(*words), ruler_sources.tokens())


class Parrot:
    """A session that answers every prompt with what `reply(row)` says."""

    def __init__(self, reply):
        self.tokens, self.reply, self.prompts = ruler_sources.tokens(), reply, []

    def generate(self, ids, method, *, max_new_tokens):
        self.prompts.append((ids, max_new_tokens))
        return session.Generated([1], self.reply, "length", 0.1, 0.2)


def run(plan, reply):
    """Records of all jobs of a plan, answered by reply(row) -> text."""
    records = []
    for job in plan.jobs:
        fields = ruler.work(Parrot(reply(ruler._row(job))), None, job, None)
        head = {"bench": "ruler", "task": job.task, "id": job.id, "length": job.length}
        records.append(head | {"method": "full", "status": "ok", "error": None} | fields)
    return records


def every_source(folder):
    ruler_sources.sources(folder)
    names = {"haystack": "essays.txt", "squad": "squad.json", "hotpot": "hotpot.json"}
    return [word for option, file in names.items() for word in (f"--{option}", str(folder / file))]


# ---- scores --------------------------------------------------------------------------------------
def test_perfect_replies_score_100_and_empty_ones_0(folder):
    plan = prepare("--lengths", "1100,1200", "--samples", "1", *every_source(folder))
    assert len(plan.jobs) == 13 * 2
    good = run(plan, lambda row: f" surely:\x07{' and '.join(row.outputs).upper()}.")
    assert {record["score"] for record in good} == {1.0}
    assert all("\x07" not in record["pred_used"] for record in good)
    bad = run(plan, lambda row: "")
    assert {record["score"] for record in bad} == {0.0}
    # A part of the answers: a share for all tasks but QA, where any reference counts.
    part = {r["task"]: r["score"] for r in run(plan, lambda row: row.outputs[-1])}
    assert part["qa_1"] == part["qa_2"] == part["niah_single_1"] == 1.0
    assert part["niah_multiquery"] == 0.25 and part["cwe"] == 0.1 and part["vt"] == 0.2
    text = ruler.summary(good, ["full"])
    assert "mean of 13 of 13  full      100.0    100.0" in text
    assert "Avg 100.0, wAvg inc 100.0, wAvg dec 100.0 (over 2 lengths and 13 of 13" in text
    assert "no RULER average" not in text and "INCOMPLETE" not in text


def test_prompt_is_the_users_turn_and_the_cue_in_the_reply(folder):
    plan = prepare("--lengths", "1100", "--samples", "1", *every_source(folder))
    for job in plan.jobs:
        row, parrot = ruler._row(job), Parrot("x")
        ruler.work(parrot, None, job, None)
        ids, new = parrot.prompts[0]
        text = ruler_sources.tokens().tokenizer.decode(ids)
        turn = f"<|im_start|>user\n{row.input}<|im_end|>\n<|im_start|>assistant\n"
        assert text.endswith(turn + row.answer_prefix)
        assert new == ruler_tasks.tasks()[job.task].new_tokens
    plain = session.Tokens(eval_models.smollm2_tokenizer(), 8192, use_chat=False)
    ids = ruler_generate.prompt_ids(plain, row.input, row.answer_prefix)
    assert plain.tokenizer.decode(ids) == row.input + row.answer_prefix


def test_averages_are_rulers():
    """RULER's README, Llama-3.1-8B: 88.3, 85.4 with rising and 91.3 with falling weights."""
    scores = dict(zip(ruler_tasks.LENGTHS, (95.5, 93.8, 91.6, 87.4, 84.7, 77.0), strict=True))
    found = {name: round(value, 1) for name, value in ruler_scores.averages(scores).items()}
    assert found == {"Avg": 88.3, "wAvg inc": 85.4, "wAvg dec": 91.3}


def test_missing_tasks_and_failed_rows_are_said():
    def record(task, length, score, status="ok"):
        meta = {"label": "ruler-generated"}
        return {"task": task, "length": length, "method": "pbs", "score": score,
                "status": status, "meta": meta, "density": 0.25}  # fmt: skip

    records = [record("vt", 4096, 1.0), record("vt", 4096, 0.5, "oom"), record("cwe", 4096, 0.25)]
    text = ruler.summary(records, ["pbs"])
    assert re.search(
        r"vt +pbs +50\.0 +25\.0%", text
    )  # the failed row counts 0, whatever else it holds
    assert re.search(r"mean of 2 of 13 +pbs +37\.5", text)
    assert "INCOMPLETE: pbs has 2 of 3 rows (oom)" in text
    assert "no RULER average: without niah_single_1, " in text
    text = ruler.summary([*records, record("vt", 8192, 1.0)], ["pbs"])
    assert "no mean over lengths, without cwe at 8192" in text
    assert re.search(r"mean of 2 of 13 +pbs +37\.5 +- ", text)


# ---- files ---------------------------------------------------------------------------------------
def old_row(value="0123"):
    """As files of 2024 have it: the cue still stands at the end of the input."""
    text = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I "
        "will quiz you about the number afterwards.\nOne of the special magic numbers for a-b is: "
        f"{value}.\nWhat is the special magic number for a-b mentioned in the provided text?"
    )
    cue = " The special magic number for a-b mentioned in the provided text is"
    return text, cue, {"index": 7, "input": text + cue, "outputs": [value], "length": 3900}


def test_old_rows_give_their_cue_to_the_reply(tmp_path):
    text, cue, row = old_row()
    path = tmp_path / "niah_single_1_4096.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row | {"index": 9}) + "\n")
    table = ruler_files.find(path)["niah_single_1", 4096]
    assert (len(table), table.label) == (2, "ruler-official")
    found = table.row(1)
    assert (found.input, found.answer_prefix, found.outputs) == (text, cue, ("0123",))
    assert found.meta == {"line": 3, "index": 9}


@pytest.mark.parametrize("task", ruler_tasks.tasks())
def test_every_cue_is_found_at_the_end_of_an_input(folder, task):
    row = ruler_sources.made(folder, task, 1200).row(0)
    found = ruler_files.ruler_tasks.split_prefix(
        ruler_tasks.tasks()[task], row.input + row.answer_prefix
    )
    assert found == (row.input, row.answer_prefix)
    assert ruler_tasks.split_prefix(ruler_tasks.tasks()[task], row.input) == (row.input, "")


@pytest.mark.parametrize(
    "path, expected",
    (
        ("synthetic/8192/data/niah_multikey_1/validation.jsonl", ("niah_multikey_1", 8192)),
        ("vt_16k.jsonl", ("vt", 16384)),
        ("cwe.jsonl", ("cwe", None)),
        ("131072/qa_2.jsonl", ("qa_2", 131072)),
        ("vtune/notes.jsonl", (None, None)),
    ),
)
def test_paths_say_task_and_length(path, expected):
    assert ruler_files.task_of(pathlib.Path(path)) == expected


def test_written_rows_are_read_again_and_stay_generated(folder, tmp_path, capsys):
    words = ["--tasks", "niah_single_1,fwe", "--lengths", "512,600", "--samples", "3"]
    path = ["--model", eval_models.tiny_checkpoint(folder / "tiny"), "--write", str(tmp_path / "w")]
    assert cli.main(["eval", "ruler", *words, *path]) == 0
    assert "512/fwe/validation.jsonl" in capsys.readouterr().out
    tables = ruler_files.find(tmp_path / "w")
    assert set(tables) == {(t, n) for t in ("niah_single_1", "fwe") for n in (512, 600)}
    for (task, length), table in tables.items():
        assert table.label == "ruler-generated"
        source = ruler_sources.made(folder, task, length)
        assert [table.row(i) for i in range(3)] == [source.row(i) for i in range(3)]
    line = (tmp_path / "w/512/niah_single_1/validation.jsonl").read_text().splitlines()[1]
    fields = json.loads(line)
    alone = ruler_sources.tokens().encode(fields["input"] + fields["answer_prefix"], special=False)
    assert fields["index"] == 1 and fields["length"] == len(alone) + 128
    assert fields["length"] < fields["length_w_model_temp"] <= 512
    before = ruler_sources.tokens().encode(fields["input"], special=False)
    text = ruler_sources.tokens().decode(before[: fields["token_position_answer"]])
    assert fields["input"].startswith(text) and text.endswith(" is: ")


def test_the_real_file():
    """Official rows of niah_multikey_3: every one names its answer's uuid once and asks for it."""
    root = os.environ.get("PBS_ATTN_DATA")
    path = pathlib.Path(root or "", "data/ruler/niah_multikey_3_4096.jsonl")
    if not root or not path.is_file():
        pytest.skip("PBS_ATTN_DATA, the folder with data/ruler/, is not set")
    plan = prepare("--data", str(path))
    assert len(plan.jobs) == 100 and "ruler-official: 100 of 100 rows" in plan.notes[0]
    made = ruler_generate.Generated("niah_multikey_3", 1024, {}, ruler_sources.tokens()).row(0)
    uuid = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    shape = re.sub(uuid, "U", made.input).split("\n")
    for job in plan.jobs:
        row = ruler._row(job)
        lines = re.sub(uuid, "U", row.input).split("\n")
        assert (lines[0], lines[-1], {*lines[1:-1]}) == (shape[0], shape[-1], {*shape[1:-1]})
        assert re.sub(uuid, "U", row.answer_prefix) == re.sub(uuid, "U", made.answer_prefix)
        asked = re.search(uuid, row.answer_prefix)[0]
        assert f"uuids for {asked} is: {row.outputs[0]}." in row.input
    good = run(plan._replace(jobs=plan.jobs[:20]), lambda row: row.outputs[0])
    assert all(record["score"] == 1.0 for record in good)
    others = iter([ruler._row(job).outputs[0] for job in plan.jobs[1:21]])
    wrong = run(plan._replace(jobs=plan.jobs[:20]), lambda row: next(others))
    assert all(record["score"] == 0.0 for record in wrong)


# ---- errors --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, message",
    (
        (("--tasks", "niah"), "niah_single_2 needs --haystack"),
        (("--tasks", "qa_2"), "qa_2 needs --hotpot"),
        (("--tasks", "niha"), "'niha' is no RULER task; allowed: niah_single_1"),
        (("--samples", "0"), "--samples is 0"),
        (("--lengths", "16k"), "a length is 16,384, the window is 8,192"),
        (("--lengths", "128"), "--lengths 128: niah_single_1 needs about"),
        (("--lengths", "1k", "--words", "none.txt"), "--words none.txt"),
        (("--lengths", "1k", "--squad", "SQUAD"), "not SQuAD's dev-v2.0.json: missing 'data'"),
        (("--lengths", "1k", "--haystack", "SHORT"), "--haystack .*3 words; at least 100"),
        (("--data", "nowhere"), "--data nowhere: no such file"),
        (("--data", "FILE", "--tasks", "vt"), "has no vt; it has niah_single_1 at 4096"),
        (("--data", "FILE", "--lengths", "8k"), "has no length 8192"),
        (("--data", "FILE", "--squad", "x.json"), "--squad is for generated rows"),
        (("--data", "UNKNOWN"), "the path names no RULER task"),
    ),
)
def test_errors_name_the_option(tmp_path, words, message):
    places = {name: tmp_path / file for name, file in (
        ("FILE", "niah_single_1_4096.jsonl"), ("UNKNOWN", "some.jsonl"),
        ("SQUAD", "squad.json"), ("SHORT", "short.txt"))}  # fmt: skip
    for name in ("FILE", "UNKNOWN"):
        places[name].write_text(json.dumps(old_row()[2]) + "\n")
    places["SQUAD"].write_text("{}")
    places["SHORT"].write_text("only three words")
    words = [str(places.get(word, word)) for word in words]
    with pytest.raises(CommandError, match=message):
        prepare(*words)


def test_models_without_a_template_are_told_how(folder):
    bare = eval_models.tiny_checkpoint(folder / "bare", chat=False)
    words = ["--tasks", "niah_single_1", "--lengths", "512", "--dry-run", "--model", bare]
    assert cli.main(["eval", "ruler", *words]) == 2
    assert cli.main(["eval", "ruler", *words, "--no-chat"]) == 0


@pytest.mark.parametrize(
    "change, message",
    (
        ({"outputs": None}, "line 1: the field 'outputs' is missing"),
        ({"outputs": []}, "'outputs' is .* allowed: a list"),
        ({"input": 3}, "the field 'input' must be text"),
        (None, "line 1: no JSON"),
    ),
)
def test_bad_rows_name_file_line_and_field(tmp_path, change, message):
    row = old_row()[2] | (change or {})
    row = {name: value for name, value in row.items() if value is not None}
    path = tmp_path / "vt_4096.jsonl"
    path.write_text((json.dumps(row) if change else "{torn") + "\n" + json.dumps(old_row()[2]))
    table = ruler_files.find(path)["vt", 4096]
    assert len(table) == 2 and table.row(1).outputs == ("0123",)
    with pytest.raises(BadRow, match=message) as error:
        table.row(0)
    assert str(path) in str(error.value)


# ---- whole runs ----------------------------------------------------------------------------------
def test_a_run_from_end_to_end(folder, checkpoint, capsys):
    out = folder / "run"
    words = ["eval", "ruler", "--model", checkpoint, "--tasks", "vt,fwe", "--lengths",
             "700", "--samples", "2", "--method", "full,pbs", "--out", str(out)]  # fmt: skip
    assert cli.main([*words, "--limit", "1"]) == 0
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "ruler-generated: 2 of 500 rows per task and length, seed 42" in text
    assert "means are over 2 of 13 tasks" in text and "no RULER average: without" in text
    _, records = stores.read(out)
    assert len(records) == 2 * 2 * 2
    for record in records.values():
        assert record["status"] == "ok" and record["new_tokens"] <= 50
        assert 500 < record["prompt_tokens"] <= record["length"] - 30
        assert record["meta"]["label"] == "ruler-generated"
    cli.main([*words, "--seed", "7"])
    assert "seed" in capsys.readouterr().err


def test_bad_rows_and_long_ones_are_failed_rows(tmp_path, checkpoint, capsys):
    good, long = old_row()[2], old_row()[2]
    long = long | {"input": "word " * 8200 + long["input"]}
    path = tmp_path / "niah_single_1_4096.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (good, {"input": "x"}, long)) + "\n")
    words = ["--model", checkpoint, "--method", "full", "--out", str(tmp_path / "run")]
    assert cli.main(["eval", "ruler", "--data", str(path), *words]) == 3
    text = capsys.readouterr().out
    assert "INCOMPLETE: full has 1 of 3 rows (bad_row); the others count 0" in text
    assert f"{path} line 2: the field 'outputs' is missing" in text
    assert "RULER's prompts are never cut" in text
