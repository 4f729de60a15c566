# SPDX-License-Identifier: Apache-2.0
"""Which run folders may stand in one table, and what a report over them may be called."""

import pytest
import report_runs
from report_runs import failed, parts, record, section, table, write

from pbs_attn import cli
from pbs_attn.cli import CommandError
from pbs_attn.eval import recipes
from pbs_attn.eval.report import document, load, titles

TWO = ("full", "pbs")


# ---- what belongs together ----------------------------------------------------------------------
def test_methods_in_two_folders_of_one_identity_are_compared(tmp_path):
    records = report_runs.longbench2(TWO, rows=12)
    folders = [
        write(tmp_path / label, "longbench2", [r for r in records if r["method"] == label])
        for label in TWO
    ]
    both = section(*folders)
    whole = section(write(tmp_path / "whole", "longbench2", records))
    assert table(both, "tests").rows == table(whole, "tests").rows
    assert section(tmp_path / "full", tmp_path / "pbs", tmp_path / "whole").view.section.notes


def test_other_identity_is_kept_apart_and_said(tmp_path):
    for recipe in ("official", "opencompass"):
        records = report_runs.longbench(TWO, tasks=["qasper"], rows=3)
        write(tmp_path / recipe, "longbench", records, identity={"recipe": recipe})
    found = parts(tmp_path / "official", tmp_path / "opencompass")
    assert [part.slug for part in found] == ["longbench", "longbench-2"]
    text = document.markdown(found)
    assert 'Kept apart: recipe is "opencompass", not "official"' in text
    assert "Kept apart: not averaged with the other run of this benchmark below" in text


def test_the_same_label_for_another_method_is_kept_apart(tmp_path):
    records = report_runs.longbench2(TWO, rows=3)
    for name, tau in (("a", 0.9), ("b", 0.5)):
        methods = {"full": {}, "pbs": {"tau": tau}}
        write(tmp_path / name, "longbench2", records, methods=methods)
    found = parts(tmp_path / "a", tmp_path / "b")
    assert found[1].view.section.why == "method pbs.tau is 0.5, not 0.9"


def test_a_folder_of_folders(tmp_path):
    report_runs.write_all(tmp_path)
    assert [found.bench for found in load.sections([tmp_path])] == sorted(report_runs.MAKERS)


def test_base_by_name_and_where_it_is_missing(tmp_path):
    write(tmp_path / "a", "longbench2", report_runs.longbench2(TWO, rows=4))
    write(tmp_path / "b", "ppl", report_runs.ppl(("pbs",), lengths=(2048,)))
    with pytest.raises(CommandError, match="--against is 'dense'; allowed: full, pbs"):
        parts(tmp_path / "a", tmp_path / "b", against="dense")
    first, second = parts(tmp_path / "a", tmp_path / "b", against="full")
    assert table(first, "tests") and second.view.base is None
    assert "No baseline" in document.markdown([second])
    (part,) = parts(tmp_path / "a", against="pbs")
    assert {row[1] for row in table(part, "tests").rows} == {"full"}


def test_what_is_no_run(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "empty")]) == 2
    assert "holds no run.json" in capsys.readouterr().err
    write(tmp_path / "new", "ppl", [])
    assert cli.main(["report", str(tmp_path / "new")]) == 2
    assert "no record in" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    assert cli.main(["report", str(tmp_path / "bad")]) == 2
    assert "run.json" in capsys.readouterr().err


def test_exit_status_and_out(tmp_path, capsys):
    records = report_runs.longbench2(TWO, rows=3)
    done = write(tmp_path / "done", "longbench2", records)
    part = write(tmp_path / "part", "longbench2", [*records[:-1], failed(records[-1])])
    assert cli.main(["report", str(done)]) == 0
    assert not list(tmp_path.glob("**/*.md"))
    assert cli.main(["report", str(part)]) == 3
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(done), "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


# ---- what may be called what --------------------------------------------------------------------
def heading(tmp_path, bench, records, **options):
    folder = write(tmp_path / "run", bench, records, **options)
    return titles.heading(load.sections([folder])[0])


def official(bench):
    """As many rows as the official set has, of one method."""
    if bench == "longbench2":
        return [record(bench, bench, i, "full", score=1.0) for i in range(503)]
    return [
        record(bench, task, i, "full", score=1.0)
        for task, about in recipes.TASKS.items()
        for i in range(about.rows)
    ]


@pytest.mark.parametrize(
    "bench, name", [("longbench", "LongBench"), ("longbench2", "LongBench v2")]
)
def test_only_a_whole_run_of_a_large_model_is_called_a_result(bench, name, tmp_path):
    records = official(bench)
    assert heading(tmp_path, bench, records) == f"{name}: Llama-3.1-8B-Instruct"
    small = heading(tmp_path, bench, records, model="SmolLM2-135M", parameters=134.6e6)
    assert small.startswith(f"Smoke run on {name} rows, not a {name} result: SmolLM2-135M (135M")
    unknown = heading(tmp_path, bench, records, parameters=None)
    assert unknown.startswith("Smoke run") and "size of the model not recorded" in unknown
    part = heading(tmp_path, bench, records[:-1])
    assert f"{len(records) - 1:,} of {len(records):,} official rows" in part
    assert part.startswith("Smoke run")
    gap = heading(tmp_path, bench, [*records[:-1], failed(records[-1])])
    assert gap.startswith("Smoke run") and "INCOMPLETE" in gap


def test_log_likelihood_is_no_official_protocol(tmp_path):
    found = heading(tmp_path, "longbench2", official("longbench2"), identity={"mode": "loglik"})
    assert "mode loglik, not the official protocol" in found


def test_ruler_of_our_own_making_is_no_result(tmp_path):
    found = heading(tmp_path, "ruler", report_runs.ruler(TWO))
    assert "rows made here" in found and "of 39,000 official rows" in found


@pytest.mark.parametrize("bench", ["ppl", "agreement", "ttft"])
def test_benches_without_a_leaderboard_are_named_plainly(bench, tmp_path):
    found = heading(tmp_path, bench, report_runs.MAKERS[bench](TWO), parameters=1e8)
    assert found == f"{titles.NAMES[bench]}: Llama-3.1-8B-Instruct"


@pytest.mark.parametrize("bench", report_runs.MAKERS)
def test_every_table_says_harness_model_rows_and_density(bench, tmp_path):
    records = report_runs.MAKERS[bench](TWO)
    part = section(write(tmp_path / "run", bench, records, identity={"recipe": "official"}))
    assert len(part.tables) > 1
    for found in part.tables:
        head = found.notes[0]
        assert "pbs_attn eval, recipe official · Llama-3.1-8B-Instruct bfloat16 · " in head, (
            found.slug
        )
        assert "rows" in head and "density full 1.000, pbs 0." in head, found.slug
