# SPDX-License-Identifier: Apache-2.0
"""Reports over made-up run folders of every bench: the numbers, and what gaps make of them."""

import csv
import io
import itertools
import json
import math

import pytest
import report_runs
from report_runs import failed, parts, rows, scored, section, table, write

from pbs_attn import cli
from pbs_attn.eval.report import document, titles
from pbs_attn.eval.report.table import Column, Table, shown

TWO = ("full", "pbs")
GROUPS = {  # the 21 tasks by category: English (and code), Chinese
    "single-doc qa": (["narrativeqa", "qasper", "multifieldqa_en"], ["multifieldqa_zh"]),
    "multi-doc qa": (["hotpotqa", "2wikimqa", "musique"], ["dureader"]),
    "summarization": (["gov_report", "qmsum", "multi_news"], ["vcsum"]),
    "few-shot": (["trec", "triviaqa", "samsum"], ["lsht"]),
    "synthetic": (["passage_count", "passage_retrieval_en"], ["passage_retrieval_zh"]),
    "code": (["lcc", "repobench-p"], []),
}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ---- numbers ----------------------------------------------------------------------------------
def test_longbench_tasks_categories_and_averages(tmp_path):
    records = report_runs.longbench(TWO, rows=3)
    part = section(write(tmp_path / "run", "longbench", records))
    score = {
        label: {
            task: 100 * mean(r["score"] for r in records
                             if r["task"] == task and r["method"] == label)
            for english, chinese in GROUPS.values() for task in english + chinese
        }
        for label in TWO
    }  # fmt: skip
    found = rows(part, "categories")
    for label in TWO:
        by_task = score[label]
        assert {t: row[label] for t, row in rows(part, "tasks").items()} == pytest.approx(by_task)
        pooled = {n: mean(by_task[t] for t in en + zh) for n, (en, zh) in GROUPS.items()}
        english = mean(mean(by_task[t] for t in en) for en, _ in GROUPS.values())
        chinese = mean(mean(by_task[t] for t in zh or en) for en, zh in GROUPS.values())
        flat = mean(by_task[t] for en, _ in GROUPS.values() for t in en)
        expected = pooled | {
            "average: official EN": english, "average: official ZH": chinese,
            "average: opencompass": mean(pooled.values()), "average: flat-16": flat,
        }  # fmt: skip
        assert {name: found[name][label] for name in expected} == pytest.approx(expected)
    tests = rows(part, "tests", 2)
    for name in ("trec", "code", "average: opencompass", "mean of the 21 tasks run"):
        line = tests[name, "pbs"]
        assert line["difference"].value == pytest.approx(line["score"] - line["full"])


def test_an_average_without_all_its_tasks_is_not_printed(tmp_path):
    tasks = [task for english, _ in GROUPS.values() for task in english]
    records = report_runs.longbench(TWO, tasks=tasks, rows=2)
    names = rows(section(write(tmp_path / "run", "longbench", records)), "categories")
    assert [name for name in names if name.startswith("average")] == [
        "average: official EN", "average: flat-16"
    ]  # fmt: skip


def test_longbench_bands_by_prompt_length(tmp_path):
    scores = {("qasper", 0): {"full": [0.1, 0.2], "pbs": [0.3, 0.5]}}
    records = scored("longbench", scores, TWO)
    for entry in records:
        entry["prompt_tokens"] = 4096 if entry["id"] == "1" else 4095
        entry["density"] = 0.25 if entry["id"] == "1" else 0.75
    found = rows(section(write(tmp_path / "run", "longbench", records)), "bands")
    assert found["under 4K tokens"]["pbs"] == pytest.approx(30)
    assert found["4K to 8K tokens"]["pbs"] == pytest.approx(50)
    assert found["4K to 8K tokens"]["d pbs"] == 0.25


def test_longbench_e_buckets_are_means_over_tasks(tmp_path):
    records = []
    for task, words, score in (("qasper_e", 3999, 0.2), ("qasper_e", 3998, 0.4),
                               ("trec_e", 10, 1.0), ("trec_e", 8000, 0.5)):  # fmt: skip
        records += scored("longbench", {(task, 0): {"full": [score]}}, ("full",))
        records[-1] |= {"id": str(words), "meta": {"words": words}}
    (part,) = parts(write(tmp_path / "run", "longbench", records))
    found = rows(part, "buckets")
    assert found["E 0-4k"]["full"] == pytest.approx((30 + 100) / 2)
    assert found["E 8k+"]["full"] == pytest.approx(50) and "E 4-8k" not in found
    assert "LongBench-E" in titles.heading(part.view.section)


def test_longbench2_accuracy_and_mcnemar(tmp_path):
    records = report_runs.longbench2(TWO, rows=60)
    part = section(write(tmp_path / "run", "longbench2", records))
    by_id = {label: {r["id"]: r for r in records if r["method"] == label} for label in TWO}
    found = rows(part, "accuracy")
    for label in TWO:
        here = by_id[label].values()
        for name, field in (("easy", "difficulty"), ("hard", "difficulty"), ("long", "length")):
            chosen = [r["score"] for r in here if r["meta"][field] == name]
            assert found[name][label] == pytest.approx(100 * mean(chosen))
            assert found[name]["rows"] == len(chosen)
        assert found["compensated"][label] == pytest.approx(100 * mean(
            r["score"] if r["pred_used"] else 0.25 for r in here))  # fmt: skip
    pairs = [(by_id["pbs"][i]["score"], by_id["full"][i]["score"]) for i in by_id["full"]]
    better, worse = pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
    n, seen = better + worse, min(better, worse)
    p = min(1.0, 2 * sum(math.comb(n, k) for k in range(seen + 1)) / 2**n)
    line = rows(part, "tests", 2)["overall", "pbs"]
    assert (line["better"], line["worse"]) == (better, worse) and n > 5
    assert line["p, McNemar's exact test"] == pytest.approx(p)


def test_ruler_by_task_and_length(tmp_path):
    records = report_runs.ruler(TWO)
    part = section(write(tmp_path / "run", "ruler", records))

    def cell(label, task, length):
        chosen = (r for r in records if (r["method"], r["task"]) == (label, task))
        return 100 * mean(r["score"] for r in chosen if r["length"] == length)

    tasks, lengths = ("niah_single_1", "niah_multikey_3", "vt"), (4096, 8192, 16384)
    for label, task in itertools.product(TWO, tasks):
        line = rows(part, "tasks", 2)[label, task]
        assert [line[str(n)] for n in lengths] == pytest.approx([cell(label, task, n)
                                                                 for n in lengths])  # fmt: skip
    by_length = {n: mean(cell("pbs", task, n) for task in tasks) for n in lengths}
    found = rows(part, "lengths")
    assert [found[str(n)]["pbs"] for n in lengths] == pytest.approx(list(by_length.values()))
    assert found["Avg"]["pbs"] == pytest.approx(mean(by_length.values()))
    rising = sum(by_length[n] * w for n, w in zip(lengths, (1, 2, 3), strict=True)) / 6
    assert found["wAvg inc"]["pbs"] == pytest.approx(rising)


def test_ruler_has_no_average_over_lengths_that_lack_a_task(tmp_path):
    records = [r for r in report_runs.ruler(TWO) if (r["task"], r["length"]) != ("vt", 16384)]
    part = section(write(tmp_path / "run", "ruler", records))
    assert "Avg" not in rows(part, "lengths")
    assert "No mean over lengths: no row of vt at 16384." in table(part, "lengths").notes
    assert rows(part, "tasks", 2)["pbs", "vt"]["Avg"] is None


def test_ppl_pools_blocks_over_texts(tmp_path):
    records = report_runs.ppl(TWO, lengths=(2000,))  # the last block has 79 tokens
    part = section(write(tmp_path / "run", "ppl", records))
    pairs = [
        (a - b, 128 if i < 15 else 79)
        for text in ("worked", "popular")
        for i, (a, b) in enumerate(zip(*(
            next(r["block_losses"] for r in records
                 if r["task"] == text and r["method"] == label) for label in ("pbs", "full")
        ), strict=True))
    ]  # fmt: skip
    assert len(pairs) == 32
    total = sum(n for _, n in pairs)
    change = sum(x * n for x, n in pairs) / total
    error = math.sqrt(32 / 31 * sum((n * (x - change)) ** 2 for x, n in pairs)) / total
    line = rows(part, "loss", 2)[2000, "pbs"]
    assert line["change"].value == pytest.approx(change)
    assert line["change"].se == pytest.approx(error)
    loss = mean(r["loss"] for r in records if r["method"] == "pbs")
    assert line["loss"] == pytest.approx(loss)
    assert line["perplexity"] == pytest.approx(math.exp(loss))
    copied = [r["copied_delta"] for r in records if r["method"] == "pbs"]
    assert line["copied change"].value == pytest.approx(mean(copied))
    assert line["copied change"].se == pytest.approx(0.02 / math.sqrt(2))
    bands = rows(part, "bands", 2)
    first = [x for i, (x, _) in enumerate(pairs) if i % 16 < 8]
    assert bands[2000, "0 to 1,024"]["pbs"].value == pytest.approx(mean(first))
    assert bands[2000, "0 to 1,024"]["pbs"].n == 16


def test_ppl_without_base_prints_what_the_run_recorded(tmp_path):
    records = report_runs.ppl(("pbs", "identity"), texts=("worked",), lengths=(2048,))
    part = section(write(tmp_path / "run", "ppl", records))
    line = rows(part, "loss", 2)[2048, "pbs"]
    assert line["change"].value == pytest.approx(records[0]["delta"])
    assert line["change"].se == records[0]["delta_se"]
    assert "minus that of the dense run beside it" in table(part, "loss").notes[1]


def test_agreement(tmp_path):
    records = report_runs.agreement(TWO)
    line = rows(section(write(tmp_path / "run", "agreement", records)), "agreement", 2)
    here = [r for r in records if r["method"] == "pbs" and r["length"] == 4096]
    assert line[4096, "pbs"]["same first token"].value == mean(r["first_same"] for r in here)
    assert line[4096, "pbs"]["identical reply"].value == mean(r["same_tokens"] == 16 for r in here)
    assert line[4096, "full"]["identical reply"].value == 1
    assert line[4096, "pbs"]["prefix, mean"] == pytest.approx(mean(r["same_tokens"] for r in here))


def test_ttft_medians_speed_up_and_warnings(tmp_path):
    records = report_runs.ttft(TWO, lengths=(8192, 16384), samples=7)
    next(r for r in records if r["length"] == 16384)["tiled"] = 3
    part = section(write(tmp_path / "run", "ttft", records))
    line = rows(part, "ttft", 2)
    times = {r["method"]: sorted(r["samples"]) for r in records if r["length"] == 8192}
    assert line[8192, "pbs"]["median s"] == pytest.approx(times["pbs"][3])
    assert line[8192, "pbs"]["min"] == times["pbs"][0]
    speed = line[8192, "pbs"]["speed-up"]
    assert speed.value == pytest.approx(times["full"][3] / times["pbs"][3])
    assert line[8192, "pbs"]["verdict"] == "faster *" and speed.low > 1
    assert line[8192, "full"]["speed-up"] is None
    assert sum("WARNING: book is repeated to fill 16,384" in x for x in
               table(part, "ttft").notes) == 1  # fmt: skip


def test_identical_outputs_and_first_tokens(tmp_path):
    scores = {("qasper", 0): {"full": [0.1, 0.2, 0.3, 0.4], "pbs": [0.1, 0.2, 0.3, 0.9]}}
    records = scored("longbench", scores, TWO)
    for entry in records:
        entry["first_token"] = 5 if entry["method"] == "full" or int(entry["id"]) < 2 else 6
    line = rows(section(write(tmp_path / "run", "longbench", records)), "tests", 2)["qasper", "pbs"]
    assert line["identical output"].value == 0.75
    assert line["same first token"].value == 0.5


# ---- gaps -------------------------------------------------------------------------------------
def test_a_failed_row_counts_zero_and_is_said(tmp_path):
    scores = {("qasper", 0): {"full": [0.8] * 4, "pbs": [0.6, 0.6, 0.9, 0.9]}}
    records = scored("longbench", scores, TWO)
    records[-1] = failed(records[-1])
    folder = write(tmp_path / "run", "longbench", records)
    part = section(folder)
    assert rows(part, "tasks")["qasper"]["pbs"] == pytest.approx(100 * 2.1 / 4)
    line = rows(part, "tests", 2)["qasper", "pbs"]
    assert line["difference"].value == pytest.approx(100 * (2.1 - 3.2) / 4)
    text = document.markdown([part])
    assert "- longbench, pbs: 3 of 4 rows ok (oom 1)" in text
    assert "pbs 3/4 rows INCOMPLETE" in text and "; INCOMPLETE)" in text.split("\n### ")[0]
    (part,) = parts(folder, allow_missing=True)
    assert rows(part, "tasks")["qasper"]["pbs"] == pytest.approx(70)
    line = rows(part, "tests", 2)["qasper", "pbs"]
    assert line["difference"].value == pytest.approx(100 * (2.1 / 3 - 0.8))
    assert "failed and missing rows are left out" in document.markdown([part])


def test_a_planned_row_that_never_ran_counts_zero(tmp_path):
    scores = {("qasper", 0): {"full": [0.5] * 4, "pbs": [0.5] * 4}}
    records = scored("longbench", scores, TWO)
    expected = {label: {"qasper": {"0": 10}, "trec": {"0": 2}} for label in TWO}
    part = section(write(tmp_path / "run", "longbench", records[:-1], expected=expected))
    assert part.view.section.counts("pbs") == (3, 12)
    assert rows(part, "tasks")["qasper"] == rows(part, "tasks")["qasper"] | {
        "rows": 10, "full": 20.0, "pbs": 15.0
    }  # fmt: skip
    assert rows(part, "tasks")["trec"]["full"] == 0
    assert rows(part, "runs")["pbs"]["failed"] == "not run 9"
    (part,) = parts(tmp_path / "run", allow_missing=True)
    assert rows(part, "tasks")["qasper"]["pbs"] == 50 and rows(part, "tasks")["trec"]["pbs"] is None


def test_rows_that_a_method_was_not_asked_for_are_not_missing(tmp_path):
    """full on four rows and two lengths, pbs on two rows of the first only."""
    scores = {("vt", n): {"full": [1.0, 0.5, 0.0, 0.0]} for n in (4096, 8192)}
    records = scored("ruler", scores, ("full",))
    records += scored("ruler", {("vt", 4096): {"pbs": [0.5, 0.5]}}, ("pbs",))
    part = section(write(tmp_path / "run", "ruler", records))
    assert part.view.section.complete() and part.view.section.counts("pbs") == (2, 2)
    lines = rows(part, "lengths")
    assert (lines["4096"]["full"], lines["4096"]["pbs"]) == (37.5, 50.0)
    assert lines["8192"]["pbs"] is None and lines["Avg"]["pbs"] is None
    line = rows(part, "tests", 2)["length 4096", "pbs"]
    assert line["rows"] == 2 and line["difference"].value == pytest.approx(-25)
    assert rows(part, "tests", 2)["Avg", "pbs"]["difference"] is None
    assert "methods were asked for different rows" in table(part, "lengths").notes[0]
    assert "INCOMPLETE" not in document.markdown([part]).partition("\n### ")[2]


def test_ppl_lengths_that_a_method_was_not_asked_for(tmp_path):
    records = [
        r for r in report_runs.ppl() if r["length"] == 2048 or r["method"] != "meanpool"
    ]  # fmt: skip
    part = section(write(tmp_path / "run", "ppl", records))
    lines = rows(part, "loss", 2)
    assert (4096, "meanpool") not in lines and lines[2048, "meanpool"]["texts"] == "2/2"
    assert "INCOMPLETE" not in document.write([part], tmp_path / "out")


def test_torn_line_retry_and_shards(tmp_path):
    records = report_runs.longbench2(TWO, rows=9)
    whole = section(write(tmp_path / "whole", "longbench2", records))
    folder = write(tmp_path / "shards", "longbench2", records, shards=3)
    first, torn = failed(records[0], "error"), report_runs.longbench2(TWO, rows=1)[0]
    file = folder / "records-0of3.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(first), *lines, json.dumps(torn)[:-40]]))
    other = section(folder)
    assert other.view.section.rows == whole.view.section.rows
    assert table(other, "accuracy").rows == table(whole, "accuracy").rows
    assert table(other, "tests").rows == table(whole, "tests").rows


def test_the_same_report_every_time(tmp_path, capsys):
    folder = write(tmp_path / "run", "ruler", report_runs.ruler(TWO, ("vt",), 6, (4096,)))
    for out in ("a", "b"):
        assert cli.main(["report", str(folder), "--out", str(tmp_path / out)]) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "report.md" in names and not [name for name in names if "part" in name]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert capsys.readouterr().out.startswith("# Evaluation report")


@pytest.mark.parametrize("bench", report_runs.MAKERS)
def test_one_row_and_one_method(bench, tmp_path):
    sizes = {"longbench": {"tasks": ["trec"], "rows": 1}, "longbench2": {"rows": 1},
             "ruler": {"tasks": ("vt",), "rows": 1, "lengths": (4096,)},
             "ppl": {"texts": ("a",), "lengths": (100,)}, "agreement": {"rows": 1},
             "ttft": {"lengths": (8192,), "samples": 1}}  # fmt: skip
    records = report_runs.MAKERS[bench](TWO, **sizes[bench])
    for labels in (TWO, ("pbs",)):
        chosen = [r for r in records if r["method"] in labels]
        folder = write(tmp_path / labels[0], bench, chosen)
        found = parts(folder)
        text = document.markdown(found)
        if labels == TWO:
            text = document.write(found, tmp_path / "out")
        assert "nan" not in text.lower() and " *" not in text
        assert ("No baseline" in text) == (labels == ("pbs",))


@pytest.mark.parametrize("bench", report_runs.MAKERS)
def test_all_rows_equal(bench, tmp_path):
    records = report_runs.MAKERS[bench](("full",))
    twins = [entry | {"method": "pbs"} for entry in records]
    text = document.markdown(parts(write(tmp_path / "run", bench, records + twins)))
    assert "higher *" not in text and "lower *" not in text and "faster *" not in text
    if bench in ("longbench", "longbench2", "ruler"):
        assert "no row differs" in text and "+0.00 [+0.00, +0.00]" in text


@pytest.mark.parametrize("bench", report_runs.MAKERS)
def test_everything_failed(bench, tmp_path):
    records = [failed(entry) for entry in report_runs.MAKERS[bench](TWO)]
    text = document.write(parts(write(tmp_path / "run", bench, records)), tmp_path / "out")
    assert "INCOMPLETE" in text


def test_csv_has_numbers_or_nothing(tmp_path):
    folders = [
        write(tmp_path / bench, bench, make(TWO))
        for bench, make in report_runs.MAKERS.items()
        if bench != "longbench"
    ]
    records = report_runs.longbench(TWO, tasks=["qasper", "lcc"], rows=3)
    folders.append(write(tmp_path / "longbench", "longbench", [*records[:-1], failed(records[-1])]))
    files = {
        f"{part.slug}-{found.slug}": list(csv.reader(io.StringIO(found.csv())))
        for part in parts(*folders) for found in part.tables
    }  # fmt: skip
    assert len(files) > 15
    for name, (head, *lines) in files.items():
        assert lines and len(set(head)) == len(head), name
        for line in lines:
            assert len(line) == len(head), name
            assert not {"nan", "inf", "-inf", "None", "NaN"} & set(line), name
    head, *lines = files["longbench-tests"]
    at = head.index("difference")
    assert head[at : at + 3] == ["difference", "difference low", "difference high"]
    assert all(float(x[at + 1]) <= float(x[at]) <= float(x[at + 2]) for x in lines)


# ---- cells ------------------------------------------------------------------------------------
def test_cells_cannot_break_a_table():
    found = Table("x", "X", [Column("a"), Column("b", ".1f")], [["x|y\nz", float("nan")]])
    line = found.markdown().splitlines()[-1]
    assert line.count("|") - line.count("\\|") == 3 and line.endswith("- |")
    assert found.csv().splitlines()[1:] == ['"x|y', 'z",']
    assert shown(-0.0004, ".3f") == "0.000" and shown(-0.0004, "+.2f") == "+0.00"
    assert shown(-0.004, ".1%") == "-0.4%" and shown(-0.0004, ".0%") == "0%"
    assert shown(None) == "-" and shown(0.5, ".0%") == "50%" and shown(True) == "True"
