# SPDX-License-Identifier: Apache-2.0
"""benchmarks.prefill --method peak: steps that are no attention, beside their share of FLOPs."""

import json
import shutil

import fake_gpu
import pytest
import torch
from fake_gpu import TINY, arguments, work_of

from benchmarks import harness, kernel, overhead, prefill, report, steps, table, targets, work
from pbs_attn import PBSConfig

no_tools = fake_gpu.no_tools  # for every test here
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="no make")
METHODS = ["peak", "peak:permute=keys", "xattention:stride=16", "pbs:correction=mean"]


@needs_make
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_the_fused_call_of_any_method(method):
    made = work_of("--method", method)
    run = kernel.Run(steps.open_steps(made))
    assert torch.equal(run(), made.prefill()[0]) and not made.failures
    assert run.summary()["counted_blocks"] == made.computed
    assert torch.equal(made.attend()[0], run.steps.out)  # the verbs one by one


def test_the_method_of_the_command_line():
    assert work.config_of(arguments()) == PBSConfig()
    found = work.config_of(arguments("--method", "peak", "--block-size", "64", "--tau", "0.5"))
    assert (found.normalize, found.correction, found.block_size, found.tau) == (
        "row", "mean", 64, 0.5,
    )  # fmt: skip
    for wrong in ("full", "pbs:permute=both", "nonsense"):
        with pytest.raises(SystemExit, match=f"--method {wrong}"):
            work.config_of(arguments("--method", wrong))
    for wrong in ("8,x", "24", ""):
        with pytest.raises(SystemExit, match="divisors of --block-size 128"):
            arguments("--strides", wrong)


def test_rows_only_where_the_method_has_the_step():
    assert overhead.rows(work_of()) == []
    chosen = [row.name for row in overhead.rows(work_of("--method", "xattention"))]
    assert chosen == [f"antidiagonal {t}" for t in (8, 16, 32, 64)]
    corrected = overhead.rows(work_of("--method", "pbs:correction=mean"))
    assert [row.name for row in corrected] == ["attend 30% plain", "attend 30% means"]
    assert [bool(row.flops) for row in corrected] == [False, True]


def test_the_means_are_what_differs():
    made = work_of("--method", "peak", "--segment-size", "128", "--block-size", "64")
    plain, means = overhead.correction(made)
    (without, _), (with_means, _) = plain.call(), means.call()
    own = 128  # rows that have no history yet
    assert torch.equal(without[:, :, :own], with_means[:, :, :own])
    assert not torch.equal(without[:, :, -64:], with_means[:, :, -64:])
    assert (plain.blocks, plain.density) == (means.blocks, means.density)


def test_shares_of_flops_counted_one_by_one():
    made = work_of("--method", "peak", "--strides", "16", "--block-size", "64")
    block, length, dim = 64, 600, 32
    rows = range(-(-length // block))
    dense = sum(4 * block * block * dim * (m + 1) for m in rows)
    means = sum(4 * block * dim * (m * block // 256 * 256 // block) for m in rows)
    (step,) = overhead.antidiagonal(made)
    groups = block // 16
    products = sum(2 * 16 * dim * groups * groups * (m + 1) for m in rows)
    assert step.flops == pytest.approx(products / dense)
    assert overhead.flops_of_means(made) == pytest.approx(means / dense)


def row_of(name, *ms, flagged=(), **more):
    samples = [{"ms": x, "flagged": i in flagged} for i, x in enumerate(ms)]
    return harness.Row(name, None, **more), {"row": name, "samples": samples}


def test_time_over_flops_by_hand():
    made = [
        row_of("dense", 100, 200, 100, 400),
        row_of("antidiagonal 16", 5, 10, 50, 20, flagged=(2,), flops=0.025),
        row_of("plain", 30, 60, 30, 120),
        row_of("means", 31, 63, 32, 124, flops=0.01, beyond="plain"),
        row_of("else", 1, 1, 1, 1),
        row_of("lost", 1, 1, 1, 1, flops=0.5, beyond="gone"),
    ]
    rows, results = map(list, zip(*made, strict=True))
    table.compare_flops(rows, results)
    _, step, _, means, other, lost = results
    # the flagged round is no result, and three are left
    assert step["of_dense"] == pytest.approx(0.05) and step["over_flops"] == pytest.approx(2)
    assert not step["flops_flagged_used"]
    # 1%, 1.5%, 2%, 1% of dense
    assert means["of_dense"] == pytest.approx(0.0125) and means["flop_share"] == 0.01
    assert "over_flops" not in other and "over_flops" not in lost
    noisy = [row_of("dense", 2, 4), row_of("x", 1, 1, flagged=(0,), flops=0.5)]
    rows, results = map(list, zip(*noisy, strict=True))
    table.compare_flops(rows, results)
    assert results[1]["flops_flagged_used"] and results[1]["of_dense"] == pytest.approx(0.375)
    lines = table.flops_lines(results)
    assert len(lines) == 2 and "37.50%" in lines[1] and "(noisy)" in lines[1]


def test_the_target_is_of_8k_and_stride_16():
    def found(length, step, means=None, head_dim=64):
        rows = [{"row": "antidiagonal 16", "of_dense": step, "flop_share": 1 / 32}]
        rows += [{"row": "antidiagonal 64", "of_dense": 1.0, "flop_share": 1 / 128}]
        if means:
            rows += [{"row": "attend 30% means", "of_dense": means, "flop_share": 1 / 128}]
        for row in rows:
            row |= {"over_flops": row["of_dense"] / row["flop_share"], "flagged_used": False}
            row["flops_flagged_used"] = row["row"] == "attend 30% means"
        shape = {"length": length, "head_dim": head_dim, "isa": "avx2", "method": "peak"}
        return targets.of_shape(shape | {"rows": rows})

    step, both = found(8192, 1.5 / 32, 1 / 128)
    assert step.what == "antidiagonal 16 over its share of FLOPs" and step.verdict == "met"
    assert both.value == pytest.approx((1.5 / 32 + 1 / 128) / (5 / 128)) and both.at_most
    assert (step.noisy, both.noisy) == (False, True)
    assert [check.verdict for check in found(8192, 0.05, head_dim=128)] == ["not met"]
    assert found(4096, 0.01, 0.01) == []


@needs_make
def test_peak_program(tmp_path, capsys):
    out = tmp_path / "out.json"
    argv = [*TINY, "--device", "cpu", "--method", "peak", "--strides", "16,64", "--json", str(out)]
    assert harness.main("prefill", prefill.rows, argv) == 0
    saved = json.loads(out.read_text())
    (shape,) = saved["shapes"]
    rows = {row["row"]: row for row in shape["rows"]}
    assert shape["method"] == "peak" and "score" not in rows
    assert {"prefill 30%", "select", "attend", "dense", "sdpa"} < rows.keys()
    timed = {name: row["flop_share"] for name, row in rows.items() if "over_flops" in row}
    assert timed["antidiagonal 16"] == 1 / 32 and timed["antidiagonal 64"] == 1 / 128
    assert list(timed) == ["antidiagonal 16", "antidiagonal 64", "attend 30% means"]
    for name in timed:
        assert rows[name]["over_flops"] == rows[name]["of_dense"] / rows[name]["flop_share"]
    assert rows["prefill 30%"]["steps_ms"]["select"] > 0
    assert "share of dense" in capsys.readouterr().out
    lines = report.costs(saved)
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert any("antidiagonal 64" in line for line in lines) and any(
        "prefill 30%" in x for x in lines
    )
    assert report.method_of(saved) == "peak" and report.method_of({"options": {}}) == "pbs"


def test_where_a_method_is_saved():
    cpu = {"vendor": "AuthenticAMD", "family": 25, "model": 1, "cpus": 2}

    def name(*more):
        return harness.where(arguments("--json", "results", *more), cpu, "prefill").name

    assert name("--method", "peak") == "prefill-d32-peak.json"
    assert name("--method", "peak:tau=0.5", "--quick") == "prefill-d32-peak-tau-0-5-quick.json"
    assert name() == "prefill-d32.json"


def test_on_a_gpu_the_same_rows(capsys):
    argv = [*TINY, "--device", "cuda", "--method", "peak", "--strides", "16"]
    assert harness.main("prefill", prefill.rows, argv, fake_gpu.FakeGpu) == 0
    said = capsys.readouterr().out
    assert said.count("antidiagonal 16") == 2 and said.count("attend 30% means") == 2
    assert "share of dense" in said and "attend 30% plain" in said
