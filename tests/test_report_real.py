# SPDX-License-Identifier: Apache-2.0
"""A report over what the benches themselves write: every bench, a tiny random model, a few rows."""

import csv
import json

import pytest
from eval_models import tiny_checkpoint

from pbs_attn import cli

METHODS = "full,meanpool:tau=0.5"
TEXT = "The committee met on the third of May and heard what the harbour would cost. "


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder of every bench below one folder."""
    folder = tmp_path_factory.mktemp("real")
    model = tiny_checkpoint(folder / "models" / "tiny")
    (folder / "data").mkdir()
    row = {"input": "Who met?", "context": TEXT * 20, "answers": ["The committee"], "length": 300,
           "language": "en", "all_classes": None}  # fmt: skip
    for task, count in (("hotpotqa", 2), ("lcc", 1)):
        lines = [json.dumps(row | {"dataset": task, "_id": f"{task}{i}"}) for i in range(count)]
        (folder / "data" / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    choices = {f"choice_{letter}": f"the {letter}" for letter in "ABCD"}
    question = {"_id": "q0", "domain": "x", "sub_domain": "y", "difficulty": "easy",
                "length": "short", "question": "Which?", "answer": "B", "context": TEXT * 20,
                **choices}  # fmt: skip
    (folder / "v2.jsonl").write_text(json.dumps(question) + "\n")
    benches = {
        "ppl": ["--lengths", "300"],
        "agreement": ["--lengths", "200", "--new-tokens", "2"],
        "ttft": ["--lengths", "200", "--repeat", "2", "--warmups", "1"],
        "ruler": ["--lengths", "1k", "--tasks", "vt", "--samples", "1"],
        "longbench": ["--data", str(folder / "data"), "--tasks", "hotpotqa,lcc"],
        "longbench2": ["--data", str(folder / "v2.jsonl"), "--mode", "loglik"],
    }
    for bench, options in benches.items():
        command = ["eval", bench, "--model", model, "--method", METHODS, *options]
        assert cli.main([*command, "--out", str(folder / "runs" / bench)]) == 0, bench
    return folder / "runs"


def test_report_over_real_runs(runs, tmp_path, capsys):
    assert (
        cli.main(["report", str(runs), "--against", "full", "--paper", "--out", str(tmp_path)]) == 0
    )
    text = capsys.readouterr().out
    assert text == (tmp_path / "report.md").read_text()
    assert "Smoke run on LongBench rows, not a LongBench result: tiny (13M parameters; 3 of" in text
    assert "Smoke run on RULER rows" in text and "rows made here" in text
    assert "mode loglik, not the official protocol" in text
    assert "INCOMPLETE" not in text and "nan" not in text
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {
        "equal-outputs.png", "longbench-score-density.png", "longbench2-score-density.png",
        "ppl-loss-density.png", "ruler-score-density.png", "ttft-time-length.png",
    }  # fmt: skip
    for path in tmp_path.glob("*.csv"):
        assert len(list(csv.reader(path.read_text().splitlines()))) > 1, path.name


@pytest.mark.parametrize("name, always", [
    ("ppl-loss", ("loss", "change", "KL", "same next", "density", "computed", "prefill s")),
    ("agreement-agreement", ("same first token", "identical reply", "KL of the first", "density")),
    ("ttft-ttft", ("samples", "median s", "min", "density", "KL", "dense kernel",
                   "first token as dense")),
    ("longbench-runs", ("density", "computed", "prompt tokens, mean", "prefill s, mean",
                        "total s, mean", "cut")),
    ("longbench-tests", ("difference", "better", "identical output", "same first token")),
    ("longbench2-tests", ("difference", "identical output")),
    ("ruler-tests", ("difference", "identical output", "same first token")),
])  # fmt: skip
def test_no_field_has_another_name_than_the_benches_write(runs, tmp_path, name, always):
    """A field that a table reads and no bench writes would leave its column empty."""
    cli.main(["report", str(runs / name.split("-")[0]), "--out", str(tmp_path)])
    lines = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
    for column in always:
        assert lines[-1][column] != "", column


def test_the_change_of_the_loss_is_that_of_the_run(runs, tmp_path):
    """Pooled from blocks here, computed from tokens there."""
    cli.main(["report", str(runs / "ppl"), "--out", str(tmp_path)])
    lines = csv.DictReader((tmp_path / "ppl-loss.csv").read_text().splitlines())
    found = {line["method"]: line for line in lines}
    for file in (runs / "ppl").glob("records-*.jsonl"):
        for record in map(json.loads, file.read_text().splitlines()):
            line = found[record["method"]]
            assert float(line["change"]) == pytest.approx(record["delta"], abs=1e-6)
            assert float(line["change se"]) == pytest.approx(record["delta_se"], abs=1e-6)
            assert float(line["loss"]) == pytest.approx(record["loss"], abs=1e-6)
