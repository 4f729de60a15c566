# SPDX-License-Identifier: Apache-2.0
"""The evaluation on a trained model, end to end: SmolLM2-135M, few rows, short.

What is asserted is agreement with dense, never a score: a model of 135M parameters says nothing
about LongBench. Larger runs of the same commands: `make eval-demo`.
"""

import json

import pytest

from pbs_attn.cli import main
from pbs_attn.eval.store import read_records

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("eval_smollm2")]  # runs are shared
METHODS = "full,identity,pbs,pbs:tau=1"
# One row in the fields of LongBench; short enough for seconds, answered by its first words.
ROWS = [
    {
        "input": "What does the text call light?",
        "context": "Passage 1: The author of this text calls light a body of rays. " * 30,
        "answers": ["a body of rays"],
        "length": 390,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
        "_id": "row-1",
    }
]


def records(folder):
    """{(method, task, length): record} of a run folder without repeats."""
    found = read_records(folder)
    return {(r["method"], r["task"], r["length"]): r for r in found}


def run(*arguments):
    return main(["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One run of each bench."""
    root = tmp_path_factory.mktemp("eval")
    data = root / "hotpotqa.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    methods = ("--method", METHODS)
    assert run("ppl", "--lengths", "640", *methods, "--out", root / "ppl") == 0
    ruler = ("--tasks", "niah_single_1", "--lengths", "768", "--samples", 1)
    assert run("ruler", *ruler, "--method", "full,pbs:tau=1", "--out", root / "ruler") == 0
    longbench = ("--data", data, "--method", "full,pbs:tau=1", "--tasks", "hotpotqa")
    assert run("longbench", *longbench, "--out", root / "longbench") == 0
    return root


def test_losses_stand_beside_dense(folders):
    found = records(folders / "ppl")
    full, all_kept = (found[label, "opticks", 640] for label in ("full", "pbs:tau=1"))
    assert 2.0 < full["loss"] < 5.0  # a trained model on English text
    assert abs(all_kept["delta"]) < 1e-5 and all_kept["density"] == 1.0
    assert all_kept["kl"] < 1e-6 and all_kept["same_next"] == 1.0
    pbs, identity = (found[label, "opticks", 640] for label in ("pbs", "identity"))
    assert pbs["density"] < identity["density"] < 1.0  # what the permutation is for
    assert pbs["delta"] != 0.0 and abs(pbs["delta"]) < 0.2 and pbs["delta_se"] > 0.0


@pytest.mark.parametrize("bench", ["ruler", "longbench"])
def test_replies_at_tau_1_are_those_of_dense(folders, bench):
    found = records(folders / bench)
    assert len(found) == 2
    full, sparse = (next(r for key, r in found.items() if key[0] == label)
                    for label in ("full", "pbs:tau=1"))  # fmt: skip
    assert full["pred"] == sparse["pred"] and full["score"] == sparse["score"]
    assert sparse["calls"]["pbs"] == 30 and sparse["density"] == 1.0


def test_the_needle_is_found(folders):
    """A sanity check of prompt, template and decoding: short needles are easy even at 135M."""
    assert records(folders / "ruler")["full", "niah_single_1", 768]["score"] == 1.0


def test_report_of_all(folders, capsys):
    out = folders / "report"
    runs = [folders / name for name in ("ppl", "ruler", "longbench")]
    assert main(["report", *map(str, runs), "--against", "full", "--out", str(out)]) == 0
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "pbs:tau=1" in text and "INCOMPLETE" not in text
    assert any(out.glob("*.png")) and any(out.glob("*.csv"))
    assert "smoke" in text.lower()  # toy scores carry no heading of a leaderboard


def test_running_again_does_nothing(folders, capsys):
    before = read_records(folders / "ppl")
    assert run("ppl", "--lengths", "640", "--method", METHODS, "--out", folders / "ppl") == 0
    assert read_records(folders / "ppl") == before
