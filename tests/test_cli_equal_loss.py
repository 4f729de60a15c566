# SPDX-License-Identifier: Apache-2.0
"""run --equal-loss: which setting of a method is the first within a budget of perplexity."""

import json
import math

import byte_models
import pytest

from pbs_attn import cli, methods
from pbs_attn.cli import CommandError, equal_loss, run

LENGTH = 700


@pytest.mark.parametrize(
    ("text", "nats"), [("1%", math.log(1.01)), ("0.5%", math.log(1.005)), (" 25% ", math.log(1.25))]
)
def test_a_budget_is_a_share_of_perplexity(text, nats):
    assert equal_loss.parse_budget(text, "--x") == pytest.approx(nats, rel=1e-12)


@pytest.mark.parametrize("text", ["1", "0%", "-1%", "x%", "%", "1%2", "nan%", "inf%"])
def test_other_budgets_are_refused(text):
    with pytest.raises(CommandError, match="--x is .*allowed: percent of perplexity such as 1%"):
        equal_loss.parse_budget(text, "--x")


def test_nats_as_percent():
    assert equal_loss.percent(math.log(1.034)) == "+3.4%"
    assert equal_loss.percent(-0.0001) == "+0.0%"
    assert equal_loss.percent(-0.01) == "-1.0%"


@pytest.mark.parametrize("name", [name for name in equal_loss.LADDERS if name in methods.METHODS])
def test_a_ladder_goes_from_sparse_to_dense(name):
    """tau is a share to keep; eps and alpha are thresholds below which a block is dropped."""
    threshold, values = equal_loss.LADDERS[name]
    assert list(values) == sorted(values, reverse=threshold != "tau")
    field = methods.ALIASES.get(threshold, threshold)
    found = equal_loss.ladder(methods.get(name))
    assert [getattr(method, field) for method in found] == list(values)
    assert [method.label for method in found] == [f"{name}:{threshold}={x}" for x in values]


def test_other_parameters_stay():
    found = equal_loss.ladder(methods.get("pbs:segment=512,min_q=0"))
    assert {(method.segment_size, method.min_q) for method in found} == {(512, 0)}
    assert found[0].label == "pbs:segment=512,min_q=0,tau=0.9"


@pytest.mark.parametrize("text", ["pbs:tau=0.8", "pbs:segment=512,tau=0.8"])
def test_a_threshold_that_is_said_stays(text):
    assert equal_loss.ladder(methods.get(text)) == []


def test_a_method_without_a_ladder_is_its_own_setting():
    method = methods.get("streaming")
    assert equal_loss.ladder(method) == [method]


# ---- the search ----------------------------------------------------------------------------------


def search(losses, budget):
    """(row, how many ran) of settings that lose `losses`."""
    settings = [methods.get(f"pbs:tau={x}") for x in (0.5, 0.6, 0.7)][: len(losses)]
    ran = []

    def measure_row(method):
        ran.append(method)
        row = run.Row(method.label, None, 1.0, 1.0, 1.0, 1.0, {}, {}, 3.0, None)
        row.loss_delta = losses[len(ran) - 1]
        return row

    return run.measure_within(settings, budget, measure_row, run.Progress(True)), len(ran)


def test_the_first_within_the_budget_is_taken_and_no_more_are_run():
    row, ran = search([0.5, 0.1, 0.01], 0.1)  # a loss that equals the budget is within it
    assert (row.method, row.within, ran) == ("pbs:tau=0.6", True, 2)
    assert row.tried == [["pbs:tau=0.5", 0.5]]


def test_the_densest_stands_where_none_is_within():
    row, ran = search([0.5, 0.4, 0.3], 0.1)
    assert (row.method, row.within, ran) == ("pbs:tau=0.7", False, 3)
    assert [name for name, _ in row.tried] == ["pbs:tau=0.5", "pbs:tau=0.6"]
    assert "pbs:tau=0.7 (over)" in run.table([row])
    note = run.budget_note("1%", [row])
    assert "above dense: none." in note
    assert "Over it: pbs:tau=0.5 +64.9%, pbs:tau=0.6 +49.2%, pbs:tau=0.7 +35.0%." in note


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="checkpoint")
def checkpoint_fixture(tmp_path_factory):
    return byte_models.checkpoint(tmp_path_factory.mktemp("equal") / "tiny")


def start(checkpoint, *words):
    words = [str(word) for word in words]
    return cli.main(["run", "--model", checkpoint, "--length", str(LENGTH), "--new-tokens", "2",
                     "--min-q", "0", "--min-kv", "0", *words])  # fmt: skip


def test_equal_loss_beside_fixed_settings(checkpoint, tmp_path, monkeypatch, capsys):
    """A ladder that passes by tau=0.3, which has a row of its own and is not run again."""
    monkeypatch.setitem(equal_loss.LADDERS, "pbs", ("tau", (0.01, 0.3, 1.0)))
    out, ran, original = tmp_path / "out.json", [], run.measure_method

    def counted(model, tokenizer, ids, method, *args):
        ran.append(method.label)
        return original(model, tokenizer, ids, method, *args)

    monkeypatch.setattr(run, "measure_method", counted)
    status = start(checkpoint, "--method", "full,pbs:tau=0.3,pbs,streaming:window=64", "--json",
                   out, "--equal-loss", "0.01%")  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0
    assert ran == ["full", "pbs:tau=0.3", "pbs:tau=0.01", "pbs:tau=1.0", "streaming:window=64"]
    found = json.loads(out.read_text())
    full, fixed, equal, other = found["rows"]
    assert found["equal_loss"] == "0.01%"
    assert (full["within"], fixed["within"], equal["within"]) == (None, None, True)
    assert (equal["method"], equal["density"]) == ("pbs:tau=1.0", 1.0)
    assert [name for name, _ in equal["tried"]] == ["pbs:tau=0.01", "pbs:tau=0.3"]
    assert equal["tried"][1][1] == fixed["loss_delta"] > math.log(1.0001)
    assert (other["within"], other["tried"]) == (False, [])
    for text in ("pbs:tau=1.0 (within)", "streaming:window=64 (over)", "at most 0.01% above dense"):
        assert text in printed.out
    assert "over the budget" in printed.err


def test_interrupt_in_a_ladder_keeps_finished_rows(checkpoint, tmp_path, monkeypatch, capsys):
    out, ran, original = tmp_path / "out.json", [], run.measure_method

    def interrupted(model, tokenizer, ids, method, *args):
        ran.append(method.label)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return original(model, tokenizer, ids, method, *args)

    monkeypatch.setattr(run, "measure_method", interrupted)
    monkeypatch.setitem(equal_loss.LADDERS, "pbs", ("tau", (0.01, 1.0)))
    status = start(checkpoint, "--method", "full,pbs", "--equal-loss", "0.01%", "--json", out)
    assert status == 130 and ran == ["full", "pbs:tau=0.01", "pbs:tau=1.0"]
    assert [row["method"] for row in json.loads(out.read_text())["rows"]] == ["full"]
    assert "At equal loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--equal-loss", "1"], "--equal-loss is '1'; allowed: percent"),
        (["--equal-loss", "1%", "--method", "pbs,full"], "a dense one first, full or sdpa"),
    ],
)
def test_what_cannot_be_compared_is_said_before_any_work(checkpoint, capsys, words, wanted):
    assert start(checkpoint, *words) == 2
    assert wanted in capsys.readouterr().err


def test_the_default_methods_are_there():
    from pbs_attn.cli.methods import parse

    found = [method.label for method in parse(run.METHODS_EQUAL)]
    assert found[0] == "sdpa" and found[-3:] == ["pbs", "peak", "best"]
