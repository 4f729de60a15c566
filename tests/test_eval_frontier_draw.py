# SPDX-License-Identifier: Apache-2.0
"""eval frontier: its pictures, from made-up records, and the bench on a tiny model."""

import csv
import json

import byte_models
import pytest
from frontier_runs import everything, folder, place_fixture  # noqa: F401
from test_report_plots import coloured, pixels

from pbs_attn import cli
from pbs_attn.eval import frontier, ppl, store
from pbs_attn.eval.report import frontier_plot, frontier_read, plots

# ---- pictures ------------------------------------------------------------------------------------


def draw(paths, out, *words):
    paths = [str(path) for path in paths]
    words = [str(word) for word in words]
    return cli.main(["eval", "frontier", "--runs", *paths, "--draw", str(out), *words])


def test_existing_runs_are_drawn_without_a_model(tmp_path):
    first = folder(tmp_path / "1", everything(labels=("full", "pbs", "pbs:tau=0.8")))
    second = folder(tmp_path / "2", everything(labels=("full", "identity")))
    out = tmp_path / "out"
    assert draw([first, second], out, "--kinds", "prose=b", "code=a", "--choose", "a") == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"frontier.md", "frontier.csv", "frontier.png", "frontier-kinds.png"}
    text = (out / "frontier.md").read_text()
    for name in ("frontier.png", "frontier-kinds.png"):
        image = pixels(out / name)
        assert image.shape[1] == 1430
        for method in ("pbs", "identity"):
            assert coloured(image, plots.COLOURS[method]) > 100
        assert text.count(f"]({name})") == 1
    assert "All columns but the third are of the other texts: b." in text
    assert "INCOMPLETE**" not in text


def test_every_length_and_prefix_has_its_picture(tmp_path):
    first = folder(tmp_path / "1", everything())
    second = folder(tmp_path / "2", everything(prefix=128), prefix=128)
    assert draw([first, second], tmp_path / "out") == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["frontier-256.png", "frontier-384-prefix-128.png"]


def test_windows_that_were_not_timed_have_no_panel_of_time(tmp_path):
    """--times names the runs whose times are drawn; the others show density alone."""
    first = folder(tmp_path / "1", everything())
    second = folder(tmp_path / "2", everything(prefix=128), prefix=128)
    out = tmp_path / "out"
    assert draw([first, second], out, "--times", first) == 0
    text = (out / "frontier.md").read_text()
    assert text.count("![Change of the loss against density and time, 256 tokens;") == 1
    assert text.count("![Change of the loss against density, ") == 1
    left = []
    for name in ("256", "384-prefix-128"):
        dark = (pixels(out / f"frontier-{name}.png")[300] < 0.1).all(-1)
        left.append(int(dark.sum()))
    assert left[0] > left[1] > 0  # axes that cross a row of pixels


def test_a_length_names_the_texts_that_it_has(tmp_path):
    """Texts to choose on may be missing at some length: b's row is of another prefix alone."""
    both = folder(tmp_path / "1", everything())
    alone = [record for record in everything(prefix=128) if record["task"] == "b"]
    other = folder(tmp_path / "2", alone, prefix=128)
    assert draw([both, other], tmp_path / "out", "--choose", "a,b") == 0
    text = (tmp_path / "out" / "frontier.md").read_text()
    assert text.count("the texts to choose on, a, b, is") == 1
    assert text.count("the texts to choose on, b, is") == 1


def test_families_of_a_method_look_different():
    families = ["pbs", "flashprefill", "flashprefill:correction=mean", "oracle",
                "oracle:reduce=max,rule=absolute", "peak", "peak:correction=none", "peak:stride=8",
                "peak:stride=32", "peak:stride=8,correction=none"]  # fmt: skip
    looks = [frontier_plot.look(family, families) for family in families]
    shown = {(x["color"], x["marker"], str(x["ls"]), x["mfc"]) for x in looks}
    assert len(shown) == len(families)
    assert len({look["color"] for look in looks}) == 4
    solid = [f for f, look in zip(families, looks, strict=True) if look["ls"] == "-"]
    wanted = ["pbs", "flashprefill:correction=mean", "peak", "peak:stride=8", "peak:stride=32"]
    assert solid == wanted


def test_what_is_slower_than_dense_is_named_not_drawn(place):
    from matplotlib import pyplot

    _, axes = pyplot.subplots()
    beyond = frontier_plot._panel(axes, place.curves(), frontier_plot._time, 0.6)
    assert beyond == ["pbs 0.7"]
    assert sorted(len(bars[0].get_xdata()) for bars in axes.containers) == [1, 1]
    pyplot.close()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--kinds", "x"], "--kinds has 'x'; allowed: NAME=TEXT,TEXT"),
        (["--kinds", "x=a", "x=b"], "--kinds has 'x=b'"),
        (["--kinds", "x=a,c"], "--kinds names the text 'c'; allowed: a, b"),
        (["--choose", "c"], "--choose names the text 'c'; allowed: a, b"),
        (["--budget", "1"], "--budget is '1'; allowed: percent of perplexity such as 1%"),
    ],
)
def test_wrong_words_are_a_sentence(tmp_path, capsys, words, wanted):
    run = folder(tmp_path / "1", everything())
    assert draw([run], tmp_path / "out", *words) == 2
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- the bench -----------------------------------------------------------------------------------

BENCH = "full,pbs:tau=0.9,pbs:tau=0.5,identity"


@pytest.fixture(scope="module", name="checkpoint")
def checkpoint_fixture(tmp_path_factory):
    return byte_models.checkpoint(tmp_path_factory.mktemp("frontier") / "tiny")


def start(checkpoint, out, bench="frontier", *words):
    return cli.main(["eval", bench, "--model", checkpoint, "--out", str(out), "--lengths", "700",
                     "--method", BENCH, *words])  # fmt: skip


def test_a_frontier_is_a_ppl_run_that_draws(checkpoint, tmp_path):
    out = tmp_path / "run"
    assert start(checkpoint, out, "frontier", "--windows", "2") == 0
    run, records = store.read(out)
    assert run["bench"] == "ppl" and len(records) == 8
    rows = list(csv.DictReader((out / "frontier.csv").read_text().splitlines()))
    assert [row["setting"] for row in rows] == ["pbs:tau=0.5", "pbs:tau=0.9", "identity:tau=0.9"]
    for row in rows:
        mine = [r for r in records.values() if row["setting"].startswith(r["method"])]
        delta = sum(r["delta"] * r["tokens"] for r in mine) / sum(r["tokens"] for r in mine)
        assert float(row["change"]) == pytest.approx(delta, abs=1e-9)
        assert float(row["time"]) > 0
    # ppl has nothing left to do in the same folder.
    before = {record["time"] for record in records.values()}
    assert start(checkpoint, out, "ppl", "--windows", "2") == 0
    assert {record["time"] for record in store.read(out)[1].values()} == before


def test_a_stopped_run_draws_what_is_there(checkpoint, tmp_path, monkeypatch, capsys):
    original, seen = ppl._prefill, []

    def stopping(session, method, *args):
        seen.append(method.label)
        if len(seen) == 7:  # the second window's third method
            raise KeyboardInterrupt
        return original(session, method, *args)

    monkeypatch.setattr(ppl, "_prefill", stopping)
    out = tmp_path / "run"
    assert start(checkpoint, out, "frontier", "--windows", "2") == 130
    assert "the same command goes on" in capsys.readouterr().out
    text = (out / "frontier.md").read_text()
    assert "**INCOMPLETE**: 2 of 8 rows" in text and "is left out" in text
    assert (out / "frontier.png").exists()


def test_names_of_texts_are_checked_before_the_model_loads(checkpoint, tmp_path, capsys):
    out = tmp_path / "run"
    assert start(checkpoint, out, "frontier", "--choose", "opticks,moon") == 2
    assert "--choose names the text 'moon'; allowed: opticks" in capsys.readouterr().err
    assert not out.exists()


def test_stopped_before_anything_there_is_no_picture(checkpoint, tmp_path, monkeypatch, capsys):
    def stopping(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ppl, "_prefill", stopping)
    assert start(checkpoint, tmp_path / "run") == 130
    assert "frontier: nothing to draw yet" in capsys.readouterr().out


def test_the_default_folder_is_not_that_of_ppl(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["eval", "frontier", "--model", checkpoint, "--lengths", "300", "--method", BENCH]
    assert cli.main(words) == 0
    assert (tmp_path / "pbs-eval" / "frontier-tiny" / "frontier.png").exists()
    info = json.loads((tmp_path / "pbs-eval" / "frontier-tiny" / "run.json").read_text())
    assert info["command"].startswith("python -m pbs_attn eval frontier")


def test_the_grid_names_methods_that_there_are():
    from pbs_attn import methods

    found = methods.parse(frontier.grid())
    assert found[0].label == "full" and len(found) == 1 + sum(
        len(values) for _, values in frontier.GRID.values()
    )
    settings = [
        frontier_read.setting(method.to_dict() | {"min_q": 0, "min_kv": 0}, method.label)
        for method in found[1:]
    ]
    assert len(set(settings)) == len(settings)
    families = list(dict.fromkeys(each.family for each in settings))
    assert len(families) == len(frontier.GRID) and "peak" in families
    for family in families:  # from sparse to dense
        values = [each.threshold for each in settings if each.family == family]
        rising = family.partition(":")[0] not in ("peak", "flashprefill") and "abs" not in family
        assert values == sorted(values, reverse=not rising)
