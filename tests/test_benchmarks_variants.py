# SPDX-License-Identifier: Apache-2.0
"""benchmarks.variants on a fake GPU whose attend is that of the emulated one."""

import json
import os
import re
from types import SimpleNamespace

import emu_backend
import fake_gpu
import pytest
import torch
from fake_gpu import ROOT, FakeGpu

from benchmarks import harness, targets_gpu, variants, work

no_tools = fake_gpu.no_tools  # for every test here
TINY = ["--lengths", "384", "--forced", "640", "--share", "0.6", "--heads", "2", "--heads-k", "1"]
TINY += ["--samples", "2", "--probe-ms", "0.1", "--warmup-ms", "0", "--threads", "1"]
TINY += ["--device", "cuda"]


@pytest.fixture
def emulated(monkeypatch):
    """attend of the benchmarks runs the kernels for 9.0, variants and all."""
    backend, seen, kept = emu_backend.get("emu"), [], {}

    def attend(*tensors, isa="auto", **options):
        seen.append((os.environ.get(variants.VARIABLE), isa))
        isa = "sm90" if isa == "auto" else isa
        return backend.ops.attend(*tensors, isa=isa, **options | packed_there(tensors, options))

    def packed_there(tensors, options):
        """K and V packed by the emulated permute: the CPU's panels are others."""
        if options.get("packed") is None:
            return {}
        q, k, v = tensors[:3]
        cut = {"block_size": options["block_k"], "segment_size": options["segment_size"]}
        key = (q.data_ptr(), q.shape)
        if key not in kept:
            score = backend.ops.score(q, k, **cut)
            kept[key] = backend.ops.permute(q, k, v, score, **cut)[4]
        return {"packed": kept[key]}

    monkeypatch.setattr(work.ops, "attend", attend)
    monkeypatch.setattr(variants, "LONG_ROW", 1)
    monkeypatch.delenv(variants.VARIABLE, raising=False)
    monkeypatch.setattr(variants, "LIBRARY", ROOT / "absent.so")
    return SimpleNamespace(seen=seen, backend=backend)


def run(tmp_path, *more):
    out = tmp_path / "out.json"
    status = variants.main([*TINY, "--json", str(out), *more], FakeGpu)
    return status, json.loads(out.read_text())


# ---- names ------------------------------------------------------------------------------------
def test_names_are_those_of_the_library(emulated, monkeypatch):
    """The library lists them where it refuses one; every line of the table is in some list."""
    monkeypatch.setenv(variants.VARIABLE, "?")
    for head_dim in (8, 64, 72, 96, 128, 200, 256):
        q, kv = (torch.zeros(1, 1, 128, head_dim, dtype=torch.bfloat16) for _ in "qk")
        with pytest.raises(ValueError, match="VARIANT") as refusal:
            emulated.backend.ops.attend(q, kv, kv, own="all", isa="sm90")
        said = str(refusal.value).rpartition(": ")[2]
        assert said == (", ".join(variants.names(head_dim)) or "none"), head_dim
    lines = re.findall(r"^VARIANT\(", variants.TABLE.read_text(), re.M)
    assert len(lines) == sum(len(variants.names(d)) for d in variants.widths())
    assert variants.widths() == [64, 96, 128, 256]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--names", "fast"], "--names fast: no such variant of head_dim .*; of .*three-stages"),
        (["--head-dims", "64", "--names", "three-stages"], "of head_dim 64; of no-turns, slack"),
        (["--head-dims", "100"], "multiples of 8"),
        (["--share", "2"], "--share 2.0: above 0, at most 1"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_allowed(more, said):
    with pytest.raises(SystemExit, match=said):
        variants.parse([*TINY, *more])


# ---- a run ------------------------------------------------------------------------------------
def test_a_run_compares_every_variant(emulated, tmp_path, capsys):
    status, saved = run(tmp_path, "--head-dims", "64")
    assert status == 0 and saved["complete"]
    dense, forced = saved["shapes"]
    assert (dense["kind"], forced["kind"]) == ("dense", "forced")
    wanted = ["default", *variants.names(64), "portable"]
    assert [r["row"] for r in forced["rows"]] == wanted and len(wanted) > 3
    assert [r["row"] for r in dense["rows"]][: len(wanted)] == wanted
    assert dense["best_dense"] == "sdpa flash"  # the best that is not ours
    for row in dense["rows"] + forced["rows"]:
        assert len(row["samples"]) == 2 and row["gflops"] > 0 and row["vs_default"] > 0
        assert dense["probes"]["gemm"] > 0
    (line,) = saved["best"]
    assert line["head_dim"] == 64 and set(line["means"]) == set(wanted)
    assert line["best"] in wanted and set(line["gains"]["slack"]) == {"dense 384", "forced 640"}
    printed = capsys.readouterr().out
    assert f"D=64: best {line['best']} (" in printed and "no-turns x" in printed
    # each was really asked for, by name, in every round and before it; nothing is left behind
    for name in ("", *variants.names(64)):
        assert emulated.seen.count((name, "auto")) >= 2 * 4
    assert (None, "sm80") in emulated.seen and variants.VARIABLE not in os.environ


def test_rounds_are_interleaved(emulated, tmp_path):
    run(tmp_path, "--head-dims", "64", "--forced", "")
    rounds = [name for name, isa in emulated.seen if isa == "auto"][-2 * 3 :]
    assert rounds == ["", "no-turns", "slack"] * 2


def test_a_wrong_variant_is_no_row(emulated, tmp_path, monkeypatch, capsys):
    whole = work.ops.attend

    def wrong(*tensors, **options):
        out, lse = whole(*tensors, **options)
        return (out * 1.5 if os.environ.get(variants.VARIABLE) == "slack" else out), lse

    monkeypatch.setattr(work.ops, "attend", wrong)
    status, saved = run(tmp_path, "--head-dims", "64")
    assert status == 0
    for shape in saved["shapes"]:
        assert "slack" not in [r["row"] for r in shape["rows"]]
        assert shape["not_run"]["slack"].startswith("wrong result")
    assert "slack" not in saved["best"][0]["means"]
    assert "not run: slack: wrong result" in capsys.readouterr().out


def test_without_variants_the_others_are_measured(emulated, tmp_path, monkeypatch):
    """A library for users takes any name for none."""
    whole = work.ops.attend

    def deaf(*tensors, **options):
        with variants.variant(variants.DEFAULT):
            return whole(*tensors, **options)

    monkeypatch.setattr(work.ops, "attend", deaf)
    _, saved = run(tmp_path, "--head-dims", "64", "--forced", "")
    (shape,) = saved["shapes"]
    assert [r["row"] for r in shape["rows"]][:2] == ["default", "portable"]
    assert shape["not_run"]["variants"] == "the library has none; make variants"


def test_a_library_of_another_table_is_noticed(emulated, tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "names", lambda head_dim: ["slack"])
    _, saved = run(tmp_path, "--head-dims", "64", "--forced", "")
    assert "has others than" in saved["shapes"][0]["not_run"]["variants"]


def test_short_rows_are_not_forced(emulated, tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "LONG_ROW", 32)
    _, saved = run(tmp_path, "--head-dims", "64")
    assert saved["shapes"][1]["rows"] == []
    assert "32 or more are wanted" in saved["shapes"][1]["not_run"]["forced"]


def test_the_file_is_there_after_every_shape(emulated, tmp_path, monkeypatch):
    saves, save = [], harness.save
    monkeypatch.setattr(harness, "save", lambda p, r: (saves.append(len(r["shapes"])), save(p, r)))
    run(tmp_path, "--head-dims", "64,96")
    assert saves == [1, 2, 3, 4]


# ---- who won ----------------------------------------------------------------------------------
def shape_of(kind, **gains):
    rows = [{"row": name.replace("_", "-"), "vs_default": gain} for name, gain in gains.items()]
    return {"head_dim": 128, "kind": kind, "length": 4096, "rows": rows}


def test_the_best_wins_over_all_shapes_and_by_more_than_noise():
    first = shape_of("dense", default=1.0, slack=1.2, no_turns=1.004, static=1.3, fa3=2.0)
    second = shape_of("forced", default=1.0, slack=0.9, no_turns=1.006)
    (line,) = variants.best([first, second])
    assert line["best"] == "slack" and "static" not in line["means"] and "fa3" not in line["gains"]
    assert line["means"]["slack"] == pytest.approx((1.2 * 0.9) ** 0.5)
    assert "not in every shape: static" in variants.said(line)
    (line,) = variants.best([shape_of("dense", default=1.0, no_turns=1.004)])
    assert line["best"] == "default"


def row_of(gflops, ms=1.0, **more):
    return {"gflops": gflops, "ms": ms, "flagged_used": False, **more}


def test_targets_of_variants():
    about = {"heads": 32, "heads_k": 8, "head_dim": 128, "length": 16384, "best_dense": "fa3"}
    rows = [row_of(610e3, 3.6, row="default"), row_of(690e3, 3.2, row="fa3")]
    rows.append(row_of(900e3, 1.0, row="slack"))  # no target is met by what users do not get
    dense = about | {"kind": "dense", "rows_blocks": 64.5, "rows": rows}
    found = {c.what: c.verdict for c in targets_gpu.of_variants(dense, "cuda:9.0")}
    assert found == {"dense D=128 16k, TFLOP/s": "met", "dense D=128 16k over fa3": "not met"}
    assert targets_gpu.of_variants(dense, "cuda:8.0") == []
    sparse = dense | {"kind": "forced", "length": 32768, "rows_blocks": 38.0}
    (check,) = targets_gpu.of_variants(sparse, "cuda:9.0")
    assert check.verdict == "met" and check.must == 580
    assert targets_gpu.of_variants(sparse | {"rows_blocks": 31.0}, "cuda:9.0") == []
    slow = sparse | {"head_dim": 64, "rows": [row_of(399e3, row="default")]}
    assert [c.verdict for c in targets_gpu.of_variants(slow, "cuda:9.0")] == ["not met"]
