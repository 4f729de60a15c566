# SPDX-License-Identifier: Apache-2.0
"""The paper's numbers: cited, consistent with themselves, and never mixed with ours."""

import pytest
import report_runs

from pbs_attn import methods
from pbs_attn.cli import CommandError
from pbs_attn.eval import recipes
from pbs_attn.eval.report import document, paper

TABLES = {table["id"]: table for table in paper.data()["tables"]}


@pytest.mark.parametrize("name", TABLES)
def test_every_value_has_a_citation(name):
    table = TABLES[name]
    assert table["source"].startswith("https://arxiv.org/abs/2510.21270")
    assert table["where"].startswith("Table ") and table["harness"] and table["unit"]
    assert table["model"] and table["match"] and table["note"]
    assert paper.fits(table, table["model"])
    assert table["rows"]
    for method, values in table["rows"].items():
        assert len(values) == len(table["columns"])
        assert all(isinstance(value, float) and value > 0 for value in values)
        assert method.partition(":")[0] in methods.METHODS


@pytest.mark.parametrize(
    "name", [x for x, table in TABLES.items() if "average" in table["columns"]]
)
def test_averages_follow_from_their_columns(name):
    """A slip of the pen in any value would show: printed values are rounded to .005."""
    for method, values in TABLES[name]["rows"].items():
        mean = sum(values[:-1]) / (len(values) - 1)
        assert values[-1] == pytest.approx(mean, abs=0.0101), method


def test_scores_of_503_questions_are_whole_questions():
    for name in ("longbench2-llama", "longbench2-qwen2.5-7b"):
        for method, (value,) in TABLES[name]["rows"].items():
            questions = round(value * 5.03)
            assert value == pytest.approx(100 * questions / 503, abs=0.0051), method


def test_columns_are_ours():
    for table in TABLES.values():
        if table["bench"] == "longbench":
            assert set(table["columns"]) == {*recipes.CATEGORIES.values(), "average"}


def test_speed_up_of_the_paper():
    """Table 9 prints 2.22x at 128K and 2.72x at 256K."""
    table = TABLES["ttft-qwen3-8b"]
    ratio = [a / b for a, b in zip(table["rows"]["full"], table["rows"]["pbs"], strict=True)]
    found = dict(zip(table["columns"], ratio, strict=True))
    assert found["131072"] == pytest.approx(2.22, abs=0.005)
    assert found["262144"] == pytest.approx(2.72, abs=0.005)


def columns(tmp_path, beside, bench="longbench2", make=report_runs.longbench2, slug="accuracy",
            **options):  # fmt: skip
    folder = report_runs.write(tmp_path / "run", bench, make(), **options)
    (part,) = document.parts(document.views([folder], None, False, beside))
    table = next(table for table in part.tables if table.slug == slug)
    return table, [column.name for column in table.columns]


def test_without_paper_nothing_of_it(tmp_path):
    table, names = columns(tmp_path, None)
    assert not any("paper" in name for name in names)
    assert "arXiv" not in table.markdown()


def test_block_stands_behind_ours_and_names_its_harness(tmp_path):
    table, names = columns(tmp_path, "", identity={"recipe": "official"}, model="SmolLM2-135M")
    start = names.index("paper: OpenCompass 0.4.2, Llama-3.1-8B-Instruct")
    assert names[2:start] == ["full", "pbs", "meanpool"]  # ours, all of them, first
    assert names[start + 1 :] == ["paper full", "paper pbs", "paper meanpool"]
    assert table.rows[0][start:] == ["", 28.83, 29.82, 29.42]
    assert table.rows[1][0] == "easy" and table.rows[1][start + 1 :] == [None] * 3
    text = table.notes[-1]
    assert "2510.21270v2, Table 2 (https://arxiv.org/abs/2510.21270v2)" in text
    assert "another model (ours SmolLM2-135M, the paper's Llama-3.1-8B-Instruct)" in text
    assert "another harness (ours pbs_attn eval, recipe official; the paper's OpenCompass" in text


def test_same_model_and_recipe_are_said_to_be(tmp_path):
    table, names = columns(tmp_path, "", identity={"recipe": "opencompass"},
                           model="Qwen2.5-7B-Instruct-1M")  # fmt: skip
    assert "paper: OpenCompass 0.4.2, Qwen2.5-7B-Instruct-1M" in names
    assert table.rows[0][names.index("paper full")] == 35.19
    assert "another model" not in table.notes[-1]
    assert "our own rebuilding of OpenCompass's recipe" in table.notes[-1]


def test_a_model_of_the_paper_by_name(tmp_path):
    _, names = columns(tmp_path, "qwen2.5-7b")
    assert "paper: OpenCompass 0.4.2, Qwen2.5-7B-Instruct-1M" in names
    with pytest.raises(CommandError, match="--paper is 'mistral'; allowed: Llama-3.1-8B"):
        columns(tmp_path, "mistral")


def test_parameters_of_our_own_are_said(tmp_path):
    labels = ("full", "pbs:tau=0.8", "streaming")
    table, names = columns(tmp_path, "", make=lambda: report_runs.longbench2(labels))
    assert names[-2:] == ["paper full", "paper pbs"]
    assert "parameters of our own in pbs:tau=0.8" in table.notes[-1]


def test_ruler_lengths_and_average(tmp_path):
    table, names = columns(tmp_path, "", "ruler", report_runs.ruler, "lengths")
    at = names.index("paper meanpool")
    found = {row[0]: row[at] for row in table.rows}
    assert found["4096"] == 94.15 and found["16384"] == 89.94
    assert found["wAvg inc"] is None
    assert found["Avg"] is None  # ours is over three lengths, theirs over six


def test_ruler_average_of_the_same_lengths(tmp_path):
    def make():
        return report_runs.ruler(("full",), ("vt",), 1, tuple(4096 << i for i in range(6)))

    table, names = columns(tmp_path, "", "ruler", make, "lengths")
    assert {row[0]: row[-1] for row in table.rows}["Avg"] == 88.09
    assert "6 of 39,000 official rows; rows made here" in table.notes[-1]


def test_times_in_seconds(tmp_path):
    table, names = columns(tmp_path, "", "ttft", report_runs.ttft, "ttft")
    assert names[-1] == "paper mean s" and "Qwen3-8B" in names[-2]
    found = {(row[0], row[1]): row[-1] for row in table.rows}
    assert found[131072, "full"] == pytest.approx(18.628)
    assert found[8192, "pbs"] == pytest.approx(0.3689)
    assert found[8192, "meanpool"] is None


def test_longbench_categories_beside_the_right_rows(tmp_path):
    def make():
        return report_runs.longbench(("full", "pbs"), rows=2)

    table, names = columns(tmp_path, "", "longbench", make, "categories")
    at = names.index("paper pbs")
    found = {row[0]: row[at] for row in table.rows}
    assert found["single-doc qa"] == 48.0 and found["code"] == 24.25
    assert found["synthetic"] == 63.8 and found["average: opencompass"] == 37.37
    assert found["average: official EN"] is None and found["average: flat-16"] is None
