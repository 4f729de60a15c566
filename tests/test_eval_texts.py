# SPDX-License-Identifier: Apache-2.0
"""Rows of benchmark data as texts: --text FILE.jsonl#ROW."""

import json
import zipfile

import pytest

from pbs_attn.cli import CommandError
from pbs_attn.eval import texts

ROWS = [
    {"_id": "aa", "input": "?", "context": "one\r\nand two\r"},
    {"_id": "1", "input": "?", "context": "the second row"},
    {"_id": "cc", "input": "?", "context": ""},
    {"_id": "dd", "input": "?"},
]


@pytest.fixture(name="file")
def file_fixture(tmp_path):
    path = tmp_path / "gov_report.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def test_a_row_is_named_after_file_and_row(file):
    assert [t.name for t in texts.load([f"{file}#1", f"{file}#aa"])] == [
        "gov_report-1", "gov_report-aa",
    ]  # fmt: skip


def test_a_row_is_the_text_that_a_plain_file_with_its_context_is(file, tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_bytes(ROWS[0]["context"].encode())
    (row,), (same,) = texts.load([f"{file}#0"]), texts.load([plain])
    assert row.text == same.text == "one\nand two\n"
    assert row.sha256 == same.sha256
    with pytest.raises(CommandError, match="twice"):
        texts.load([plain, f"{file}#0"])


def test_a_number_is_a_place_from_0_before_it_is_an_id(file):
    assert texts.load([f"{file}#1"])[0].text == "the second row"
    assert texts.load([f"{file}#0"])[0].text != "the second row"
    assert texts.load([f"{file}#aa"]) == texts.load([f"{file}#aa"])
    assert texts.load([f"{file}#aa"])[0].sha256 == texts.load([f"{file}#0"])[0].sha256


def test_a_member_of_a_zip(file, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(file, "data/gov_report.jsonl")
    (found,) = texts.load([f"{tmp_path}/data.zip/gov_report.jsonl#1"])
    assert (found.name, found.text) == ("gov_report-1", "the second row")
    with pytest.raises(CommandError, match=r"--text .*data.zip has no qasper; it has gov_report"):
        texts.load([f"{tmp_path}/data.zip/qasper.jsonl#1"])


def test_a_file_whose_name_has_the_mark_is_that_file(tmp_path):
    path = tmp_path / "a.jsonl#1"
    path.write_text("plain", encoding="utf-8")
    assert texts.load([path])[0].text == "plain"
    path.unlink()
    with pytest.raises(CommandError, match="a.jsonl does not exist"):
        texts.load([path])


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ("2", 'line 3: field context is ""; allowed: a non-empty text'),
        ("dd", "row dd: "),
        ("3", "line 4: field context is missing"),
        ("4", "no row '4'; allowed: 0 to 3, or an _id"),
        ("-1", "no row '-1'"),
    ],
)
def test_errors_name_file_row_and_field(file, row, wanted):
    with pytest.raises(CommandError) as error:
        texts.load([f"{file}#{row}"])
    assert f"--text {file}#{row}" in str(error.value) and wanted in str(error.value)
