# SPDX-License-Identifier: Apache-2.0
"""What `eval frontier` computes, from made-up records whose values are worked out by hand."""

import csv
import math

import pytest
import report_runs
from frontier_runs import DENSE, METHODS, everything, folder, place_fixture, record, setting  # noqa: F401

from pbs_attn.cli import CommandError
from pbs_attn.eval.report import frontier_data as data
from pbs_attn.eval.report import frontier_read, frontier_tables

# ---- sums by hand --------------------------------------------------------------------------------


def test_change_is_the_mean_over_all_blocks_of_all_texts(place):
    """0.2, 0, 0.1, 0.1: mean 0.1, squares 0.02, error sqrt(0.02 * 4/3) / 4."""
    change = place.point(setting("pbs:tau=0.8")).change
    assert (change.value, change.n) == (pytest.approx(0.1), 4)
    assert change.se == pytest.approx(math.sqrt(0.02 * 4 / 3) / 4)
    assert place.point(setting("pbs:tau=0.8"), ["b"]).change.value == pytest.approx(0.1)
    assert place.point(setting("pbs:tau=0.8"), ["b"]).change.se == pytest.approx(0)


def test_copied_tokens_pool_by_their_number(place):
    """(100 * 0.1 + 200 * 0.4) / 300 and sqrt(3^2 + 8^2) / 300."""
    copied = place.point(setting("pbs")).copied
    assert copied.value == pytest.approx(0.3)
    assert copied.se == pytest.approx(math.sqrt(73) / 300)


def test_time_is_a_ratio_of_sums(place):
    """(1 + 3) / (2 + 4); residuals 1 - 4/3 and 3 - 8/3, each a third."""
    time = place.point(setting("pbs:tau=0.8")).time
    assert time.value == pytest.approx(4 / 6)
    assert time.se == pytest.approx(math.sqrt(2 * 2 / 9) / 6)
    assert place.point(setting("pbs")).time.se == pytest.approx(0)
    assert place.point(setting("pbs"), ["a"]).time == data.stats.Delta(0.5, None, 1)


def test_interpolation_is_between_two_measured_points_only(place):
    points = place.curves()["pbs"]
    middle = data.delta(data.interpolate(points, 0.25))  # a quarter of the way: 0.75 * 0.1 + ...
    assert middle.value == pytest.approx(0.75 * 0.1 + 0.25 * 0.05)
    # Blocks 0.175, 0, 0.0875, 0.0875 around 0.0875.
    assert middle.se == pytest.approx(math.sqrt(2 * 0.0875**2 * 4 / 3) / 4)
    for at, value in ((0.2, 0.1), (0.4, 0.05)):
        assert data.delta(data.interpolate(points, at)).value == pytest.approx(value)
    for at in (0.19, 0.41):
        assert data.interpolate(points, at) is None
    assert data.interpolate(points, 0.55, data.time_of) is not None  # 0.5 to 0.667
    assert data.interpolate(points, 0.49, data.time_of) is None


def test_incomplete_settings_are_no_ends_of_a_line(tmp_path):
    records = [r for r in everything() if (r["method"], r["task"]) != ("pbs", "b")]
    (place,) = frontier_read.read([folder(tmp_path / "run", records)]).places
    points = place.curves()["pbs"]
    assert [point.complete for point in points] == [True, False]
    assert data.interpolate(points, 0.25) is None
    assert data.interpolate(place.curves(["a"])["pbs"], 0.25) is not None


def test_the_cheapest_setting_within_a_budget_is_chosen(place):
    points = place.curves()["pbs"]
    assert data.choose(points, 0.2).setting == setting("pbs:tau=0.8")
    assert data.choose(points, 0.07).setting == setting("pbs")
    assert data.choose(points, 0.01) is None
    half = [data.Point(p.setting, {("a", "0"): p.samples["a", "0"]}, 2) for p in points]
    assert data.choose(half, 1.0) is None


def test_differences_of_two_methods_are_paired(place):
    """pbs minus identity on both texts: 0.096, -0.008, -0.25, 0.15."""
    blocks = data.minus(place.point(setting("pbs")).blocks, place.point(setting("identity")).blocks)
    found, values = data.delta(blocks), [0.096, -0.008, -0.25, 0.15]
    assert found.value == pytest.approx(sum(values) / 4)
    squares = sum((x - sum(values) / 4) ** 2 for x in values)
    assert found.se == pytest.approx(math.sqrt(squares * 4 / 3) / 4)


# ---- settings and families -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("described", "label", "wanted"),
    [
        ({"method": "pbs", "tau": 0.8, "stride": 8}, "", ("pbs", 0.8, "tau")),
        ({"method": "pbs", "tau": 0.8, "stride": 16}, "", ("pbs:stride=16", 0.8, "tau")),
        ({"method": "pbs", "tau": 0.8, "min_q": 0, "strict": False}, "", ("pbs", 0.8, "tau")),
        ({"method": "pbs", "tau": 0.8, "min_q": 64}, "", ("pbs:min_q=64", 0.8, "tau")),
        ({"method": "flashprefill", "alpha": 0.1, "tau": 3}, "",
         ("flashprefill:tau=3", 0.1, "alpha")),
        ({"method": "meanpool", "tau": 0.9}, "meanpool:recipe=authors,tau=0.9",
         ("meanpool:recipe=authors", 0.9, "tau")),
        ({"method": "oracle", "tau": 0.1, "reduce": "max", "rule": "absolute"}, "",
         ("oracle:reduce=max,rule=absolute", 0.1, "eps")),
        ({"method": "of-later", "tau": 0.5, "x": 1}, "", ("of-later:x=1", 0.5, "tau")),
        ({"method": "s2o"}, "", ("s2o", None, "")),
    ],
)  # fmt: skip
def test_settings_of_a_family_differ_in_their_threshold_alone(described, label, wanted):
    assert frontier_read.setting(described, label) == wanted


def test_a_setting_is_written_as_on_the_command_line():
    assert data.Setting("pbs", 0.8, "tau").text == "pbs:tau=0.8"
    assert data.Setting("oracle:reduce=max", 0.1, "eps").text == "oracle:reduce=max,eps=0.1"
    assert data.Setting("best", None, "").text == "best"


def test_points_of_a_family_are_in_order_of_threshold(place):
    assert {f: [s.threshold for s in each] for f, each in place.families().items()} == {
        "pbs": [0.8, 0.9], "identity": [0.9],
    }  # fmt: skip


# ---- folders -------------------------------------------------------------------------------------


def test_folders_of_one_model_are_put_together(tmp_path):
    """Two methods each; every time is a share of dense in its own folder; a prefix is a place."""
    first = folder(tmp_path / "1", everything(labels=("full", "pbs")))
    slower = [record("full", text, attention_s=10.0) for text in DENSE]
    second = folder(tmp_path / "2", slower + everything(labels=("identity",)))
    third = folder(tmp_path / "3", everything(prefix=128), prefix=128)
    runs = frontier_read.read([first, second, third])
    assert [(p.length, p.prefix, p.slug) for p in runs.places] == [
        (256, 0, "256"), (384, 128, "384-prefix-128"),
    ]  # fmt: skip
    place = runs.places[0]
    assert list(place.families()) == ["pbs", "identity"]
    assert place.point(setting("pbs")).time.value == pytest.approx(3 / 6)
    assert place.point(setting("identity")).time.value == pytest.approx(3 / 20)
    assert frontier_read.read([tmp_path]).places[0].windows == place.windows  # a folder of folders


def test_times_may_come_from_some_of_the_folders(tmp_path):
    """Losses are those of the last folder, times those of the timed one, whichever comes first."""
    quiet = folder(tmp_path / "quiet", everything(labels=("full", "pbs")))
    busy = [record(label, "a", attention_s=50.0) for label in ("full", "pbs")]
    busy = folder(tmp_path / "busy", busy + everything(labels=("identity",)))
    for order in ([quiet, busy], [busy, quiet]):
        runs = frontier_read.read(order, [quiet])
        point = runs.places[0].point(setting("pbs"))
        assert point.time.value == pytest.approx(3 / 6)
        assert runs.places[0].point(setting("identity")).time is None
        assert runs.notes == ["Times are those of the windows of quiet alone"]
    assert frontier_read.read([quiet, busy]).places[0].point(setting("pbs")).time.value > 0.5
    with pytest.raises(CommandError, match="--times .*busy is not one of the run folders"):
        frontier_read.read([quiet], [busy])


def test_dense_may_be_in_another_folder_but_times_are_not(tmp_path):
    first = folder(tmp_path / "1", everything(labels=("full",)))
    second = folder(tmp_path / "2", everything(labels=("pbs",)))
    point = frontier_read.read([first, second]).places[0].point(setting("pbs"))
    assert point.change.value == pytest.approx(0.05)
    assert point.time is None


@pytest.mark.parametrize(
    ("bench", "options", "wanted"),
    [
        ("ttft", {}, "is a run of ttft; allowed: ppl, frontier"),
        ("ppl", {"dtype": "float32"}, "differs from .* in dtype: 'bfloat16' there, 'float32'"),
        ("ppl", {"texts": {"a": "other"}}, "has another text by the name a"),
    ],
)
def test_what_cannot_be_put_together_is_refused(tmp_path, bench, options, wanted):
    first = folder(tmp_path / "1", everything())
    identity = {"texts": {"b": "sha-b"}, "prefix": 0} | options
    report_runs.write(tmp_path / "2", bench, everything(), identity=identity)
    with pytest.raises(CommandError, match=wanted):
        frontier_read.read([first, tmp_path / "2"])


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(CommandError, match="nothing to draw yet"):
        frontier_read.read([folder(tmp_path / "1", everything(labels=("full",)))])
    with pytest.raises(CommandError, match="nothing to draw yet"):
        frontier_read.read([folder(tmp_path / "2", everything(labels=("pbs",)))])


def test_failed_rows_are_missing_and_a_rare_window_is_left_out(tmp_path):
    """Stopped in window b: of three settings one ran it."""
    records = everything()
    cut = [r for r in records if (r["method"], r["task"]) not in
           {("pbs", "b"), ("pbs:tau=0.8", "b")}]  # fmt: skip
    failed = [report_runs.failed(r) for r in records if r["method"] == "pbs" and r["task"] == "b"]
    expected = {label: {text: {"256": 1} for text in DENSE} for label in METHODS}
    runs = frontier_read.read([folder(tmp_path / "1", cut + failed, expected=expected)])
    assert (runs.missing, runs.total) == (2, 8)
    assert runs.places[0].windows == [("a", "0")]
    assert all(point.complete for points in runs.places[0].curves().values() for point in points)
    assert "b @0" in runs.notes[0] and "1 of 3 settings" in runs.notes[0]


# ---- tables --------------------------------------------------------------------------------------

WANTED = frontier_tables.Wanted({"prose": ["b"]}, ("a",), 0.06, "6%", "identity")


def test_loss_at_equal_density_by_kind_and_who_has_the_least(tmp_path):
    """identity gets a second setting, so that both cross 0.4."""
    more = [
        dict(record("identity", text), method="identity:tau=0.5", density=0.3)
        for text in DENSE
    ]  # fmt: skip
    methods = METHODS | {"identity:tau=0.5": {"method": "identity", "tau": 0.5}}
    (place,) = frontier_read.read(
        [folder(tmp_path / "1", everything() + more, methods=methods)]
    ).places
    table, least = frontier_tables.at(place, WANTED, (0.1, 0.4), data.density_of, "density")
    values = {(row[0], row[1]): row[2:] for row in table.rows}
    assert values["all texts", "pbs"][0] is None
    assert values["all texts", "pbs"][1].value == pytest.approx(0.05)
    assert values["all texts", "identity"][1].value == pytest.approx(0.053)
    assert values["prose", "identity"][1].value == pytest.approx(0.1)
    rows = {row[0]: row for row in least.rows}
    assert list(rows) == ["all texts", "prose"]  # at 0.4; nobody is measured at 0.1
    group, at, first, change, other, above, verdict, count = rows["all texts"]
    assert (at, first, other, count) == (0.4, "pbs", "identity", 2)
    assert (change.value, above.value) == (pytest.approx(0.05), pytest.approx(0.003))
    assert verdict == "too few blocks"


def test_an_oracle_is_never_the_least(place):
    blocks = place.point(setting("pbs")).blocks
    assert frontier_tables._least("x", 0.1, {"pbs": blocks, "oracle": blocks}) == []
    assert frontier_tables._least("x", 0.1, {"pbs": blocks, "oracle": blocks, "peak": blocks})


def test_settings_are_chosen_on_some_texts_and_reported_on_the_others(place):
    """On a: pbs 0.8 loses 0.1, pbs 0.9 0.05, identity 0.006; 0.06 is the budget."""
    table = frontier_tables.held_out(place, WANTED)
    names = [column.name for column in table.columns]
    rows = {row[0]: dict(zip(names, row, strict=True)) for row in table.rows}
    pbs, identity = rows["pbs"], rows["identity"]
    assert (pbs["setting"], identity["setting"]) == ("tau=0.9", "tau=0.9")
    assert pbs["change, chosen on"].value == pytest.approx(0.05)
    assert (pbs["texts"], pbs["windows"], pbs["blocks"]) == (1, "1/1", 2)
    assert pbs["change"].value == pytest.approx(0.05)
    assert pbs["copied change"].value == pytest.approx(0.4)
    assert pbs["time"].value == pytest.approx(0.5)
    paired = pbs["identity minus this"]  # 0.3 - 0.05 and -0.1 - 0.05
    assert paired.value == pytest.approx(0.05)
    assert paired.se == pytest.approx(math.sqrt(2 * 0.2**2 * 2) / 2)
    assert identity["identity minus this"] is None


def test_a_method_without_a_setting_in_the_budget_says_so(place):
    table = frontier_tables.held_out(place, frontier_tables.Wanted(chosen=("a",), budget=0.01))
    assert [row[1] for row in table.rows] == ["none within", "tau=0.9"]
    assert len({len(row) for row in table.rows}) == 1


def test_csv_has_a_row_per_setting_and_group(place):
    table = frontier_tables.everything([place], WANTED)
    rows = list(csv.DictReader(table.csv().splitlines()))
    groups = ["all texts", "prose", "chosen on", "held out", "text a", "text b"]
    assert [row["group"] for row in rows] == [group for group in groups for _ in range(3)]
    first = rows[0]
    assert (first["setting"], first["threshold"], first["windows"]) == ("pbs:tau=0.8", "0.8", "2/2")
    assert float(first["change"]) == pytest.approx(0.1)
    assert float(first["change se"]) == pytest.approx(math.sqrt(0.02 * 4 / 3) / 4)
    assert float(first["time"]) == pytest.approx(2 / 3)
    assert float(rows[12]["change"]) == pytest.approx(0.1)  # text a
    assert rows[12]["time se"] == ""
