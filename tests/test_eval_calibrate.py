# SPDX-License-Identifier: Apache-2.0
"""eval calibrate: thresholds against loops, the files that the methods read, what is refused."""

import json
import math

import eval_models
import pytest
import tiny_models
import token_methods as tm
import torch

import pbs_attn
from pbs_attn import cli, methods
from pbs_attn.cli import models
from pbs_attn.eval import calibrate
from pbs_attn.methods import base, oracle

TEXT = "All bodies by percussion excite vibrations in the air, {} times a second. "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return eval_models.tiny_checkpoint(tmp_path_factory.mktemp("calibrate") / "model")


def text_file(tmp_path, seed, repeats=120):
    path = tmp_path / f"text{seed}.txt"
    path.write_text("".join(TEXT.format(seed * 1009 + 7 * i) for i in range(repeats)))
    return str(path)


def run(*words):
    """Exit status of `eval calibrate`."""
    return cli.main(["eval", "calibrate", *words, "--quiet"])


def half_ways(q, k, budget):
    """[head][query block], loops: half way between the budget-th and the next largest maximum."""
    scores, found = tm.scores(q, k), []
    for head in scores:
        row = []
        for m in range(-(-q.shape[1] // 128)):
            peaks = [
                float(head[m * 128 : m * 128 + 128, n * 64 : n * 64 + 64].max())
                for n in range(2 * m)
            ]
            peaks.sort(reverse=True)
            row.append(sum(peaks[budget - 1 : budget + 1]) / 2 if len(peaks) > budget else None)
        found.append(row)
    return found


def assert_thresholds(actual, expected):
    assert [[t is None for t in head] for head in actual] == [
        [t is None for t in head] for head in expected
    ]
    for got, want in zip(sum(actual, []), sum(expected, []), strict=True):
        assert want is None or math.isclose(got, want, rel_tol=1e-5), (got, want)


def fields(collector, *lengths, seed=0, heads=(4, 2)):
    """What a collector writes for one layer after texts of these lengths, and their (q, k)."""
    drawn = [tm.inputs(n, n, heads, seed=seed + i) for i, n in enumerate(lengths)]
    for q, k, v in drawn:
        collector.add({0: collector.measure(tm.call(q, k, v, 0))})
    return collector.fields(1), [(q, k) for q, k, _ in drawn]


def options(*words):
    import argparse

    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    return parser.parse_args([*words, "--out", "out.json"])


def test_bsfa_takes_the_mean_of_half_ways():
    collector = calibrate.BlockMaxima(options("--method", "bsfa", "--k", "5,2"), 900)
    written, texts = fields(collector, 900, 900, 600)
    assert list(written["layers"]) == ["2", "5"]
    for k in (2, 5):
        each = [half_ways(*text, k) for text in texts]
        expected = [means(rows) for rows in zip(*each, strict=True)]
        assert_thresholds(written["layers"][str(k)][0], expected)


def means(rows):
    """Mean per query block over those of the texts that have it."""
    found = []
    for m in range(max(map(len, rows))):
        values = [row[m] for row in rows if m < len(row)]
        found.append(None if values[0] is None else sum(values) / len(values))
    return found


@pytest.mark.parametrize("num", [1024, 901])
def test_one_text_keeps_exactly_k_blocks(num, tmp_path):
    collector = calibrate.BlockMaxima(options("--method", "bsfa", "--k", "3"), num)
    written, [(q, k)] = fields(collector, num)
    path = tmp_path / "thresholds.json"
    path.write_text(json.dumps({"method": "bsfa", **written}))
    kept = methods.get(f"bsfa:k=3,thresholds={path}").blocks(tm.call(q, k, k, 0))
    own = base.own_blocks(tm.call(q, k, k, 0), 128, 64)
    for m in range(kept.shape[1]):
        assert ((kept[:, m] & ~own[m]).sum(-1) == min(3, 2 * m)).all(), f"query block {m}"


@pytest.mark.parametrize("cover", [0.2, 0.3, 0.5, 0.8])
def test_covering_share_by_loops(cover):
    q, k, v = tm.inputs(700, 700, (4, 2))
    call = tm.call(q, k, v)
    score = calibrate.reference_mass(call, 16)
    actual = calibrate.covering_share(oracle.true_mass(call, 128), score, cover)
    torch.testing.assert_close(actual, covering(q, k, score, cover), rtol=1e-5, atol=0)


def test_xattention_takes_the_largest_share_of_the_texts():
    args = options("--method", "xattention", "--stride", "16", "--cover", "0.3", "--clip", "0.82")
    collector = calibrate.CoveringShares(args, 700)
    _, texts = fields(collector, 700, 515)
    written, _ = fields(collector, 700)  # the first one again, whose shares are smaller
    shares = [covering(q, k, calibrate.reference_mass(tm.call(q, k, k), 16), 0.3) for q, k in texts]
    expected = torch.stack(shares).amax(0).clamp(max=0.82)
    assert expected.max() == 0.82 and expected.min() < 0.75, f"decides nothing: {expected}"
    actual = torch.tensor(written["layers"][0], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def covering(q, k, score, cover):
    """fp64 [Hq], loops over blocks."""
    hidden = ~tm.causal(q.shape[1], k.shape[1])
    mass = tm.scores(q, k).masked_fill(hidden, -math.inf).softmax(-1)
    heads = [_covering(*each, cover) for each in zip(mass, score.double(), strict=True)]
    return torch.tensor(heads, dtype=torch.float64)


def _covering(mass, score, cover):
    kept = total = 0.0
    for m in range(score.shape[0]):
        row = mass[m * 128 : m * 128 + 128]
        exact = [float(row[:, n * 128 : n * 128 + 128].sum()) for n in range(score.shape[1])]
        needed, have = [], 0.0
        for n in sorted(range(len(exact)), key=lambda n: -exact[n]):
            needed.append(n)
            have += exact[n]
            if have >= cover * sum(exact):
                break
        weakest = min(float(score[m, n]) for n in needed)
        kept += sum(float(x) for x in score[m] if x >= weakest)
        total += float(score[m].sum())
    return kept / total


def test_scores_of_the_kernels_are_those_of_the_reference():
    q, k, v = tm.inputs(600, 600, (4, 2), head_dim=64)
    call = tm.call(q, k, v)
    torch.testing.assert_close(
        calibrate.score_mass(call, 8), calibrate.reference_mass(call, 8), rtol=1e-4, atol=1e-6
    )


def test_bsfa_file_keeps_k_blocks_of_the_model(checkpoint, tmp_path, capsys):
    out, text = tmp_path / "thresholds.json", text_file(tmp_path, 1)
    words = ("--method", "bsfa", "--model", checkpoint, "--length", "1k", "--k", "4,2")
    assert run(*words, "--text", text, "--out", str(out)) == 0
    assert f"use: --method bsfa:k=2,thresholds={out}" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert (document["method"], document["length"], document["model"]) == ("bsfa", 1024, checkpoint)
    assert [each["tokens"] for each in document["texts"]] == [1024]
    assert [len(layer) for layer in document["layers"]["4"]] == [4, 4]  # 2 layers, 4 heads
    method = methods.get(f"bsfa:k=4,thresholds={out},min_q=0,min_kv=0")
    # Before the diagonal blocks lie 2 m; kept are 0, 2 and 6 times 4 of them. One layer at a time,
    # as in calibration: a sparse one would change what the next one sees.
    model, tokenizer = models.load(checkpoint)
    with open(text, encoding="utf-8") as file:
        ids = models.token_ids(tokenizer, file.read(), 1024)
    for layer in (0, 1):
        assert _kept(model, ids, method, layer) == [26.0] * 4


def _kept(model, ids, method, layer):
    """[head]: blocks before the diagonal ones that the layer computes, from its densities."""
    with torch.no_grad(), pbs_attn.patch_model(model, method, layers={1 - layer: "dense"}):
        with pbs_attn.record() as calls:
            model(ids, use_cache=False)
    # density = (1 + kept share of the pairs) / 2; 36 pairs, 8 on the diagonal, 2 blocks in one
    return [round(((2 * density - 1) * 36 - 8) * 2, 6) for density in calls.layers[layer]]


def test_xattention_file_is_read_by_the_method(checkpoint, tmp_path):
    out, text = tmp_path / "taus.json", text_file(tmp_path, 2)
    words = ("--method", "xattention", "--model", checkpoint, "--length", "600", "--clip", "0.8")
    assert run(*words, "--text", text, text_file(tmp_path, 3), "--out", str(out)) == 0
    document = json.loads(out.read_text())
    assert [each["name"] for each in document["texts"]] == ["text2", "text3"]
    method = methods.get(f"xattention:stride=8,thresholds={out}")
    for layer in (0, 1):
        taus = method.tau_heads(layer, 4, torch.device("cpu"))
        assert torch.equal(taus, torch.tensor(document["layers"][layer]))
        assert (taus <= 0.8).all() and (taus > 0).all()


def test_ctrl_c_keeps_the_texts_that_are_done(checkpoint, tmp_path, monkeypatch, capsys):
    observe, seen = calibrate.observe, []

    def interrupted(*args):
        seen.append(args)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return observe(*args)

    monkeypatch.setattr(calibrate, "observe", interrupted)
    out = tmp_path / "thresholds.json"
    words = ("--method", "bsfa", "--model", checkpoint, "--length", "300", "--k", "1")
    both = text_file(tmp_path, 1), text_file(tmp_path, 2)
    assert run(*words, "--text", *both, "--out", str(out)) == 130
    assert "stopped after 1 of 2 texts" in capsys.readouterr().err
    assert [each["name"] for each in json.loads(out.read_text())["texts"]] == ["text1"]


def test_short_texts_and_missing_windows_are_said(checkpoint, tmp_path, capsys):
    out = tmp_path / "thresholds.json"
    words = ("--method", "bsfa", "--model", checkpoint, "--length", "700", "--k", "1")
    text = text_file(tmp_path, 4, repeats=25)
    assert run(*words, "--text", text, "--out", str(out)) == 0
    assert "text4 has only 476 tokens" in capsys.readouterr().out
    assert run(*words, "--text", text_file(tmp_path, 5), "--windows", "9", "--out", str(out)) == 0
    assert "text5 has only 3 windows of 700 tokens" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["texts"]) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("bsfa --k 0", "--k is '0'; allowed: integers >= 1"),
        ("bsfa --k many", "--k is 'many'"),
        ("bsfa --k 64 --length 4k", "--k 64 keeps everything in 4,096 tokens"),
        ("bsfa --length 1", "--length is '1'"),
        ("bsfa --windows 0", "--windows is 0"),
        ("bsfa --length 16k --k 2", "--length is 16k; allowed: up to the model's 8,192"),
        ("bsfa --text none.txt", "--text none.txt"),
        ("xattention --stride 3", "--stride is 3; allowed: a divisor of 128"),
        ("xattention --cover 0", "--cover is 0.0"),
        ("xattention --clip 2", "--clip is 2.0"),
    ],
)
def test_errors_say_what_is_allowed(checkpoint, tmp_path, capsys, words, says):
    out = tmp_path / "out.json"
    assert run("--model", checkpoint, "--out", str(out), "--method", *words.split()) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_is_not_there_is_said_first(checkpoint, tmp_path, capsys):
    out = tmp_path / "none" / "out.json"
    assert run("--model", checkpoint, "--method", "bsfa", "--out", str(out)) == 2
    assert f"--out {out}" in capsys.readouterr().err


def test_a_model_that_cannot_be_watched_is_said():
    model = tiny_models.build("llama", attn_implementation="eager")
    with pytest.raises(cli.CommandError, match="attention interface"):
        calibrate.observe(model, tiny_models.prompt(64), lambda call: None)


def test_the_thresholds_need_no_larger_k_than_blocks():
    q, k, v = tm.inputs(300, 300)
    found = calibrate.budget_thresholds(tm.call(q, k, v), [2, 50])
    assert found[50].isneginf().all() and found[2][:, 2].isfinite().all()
