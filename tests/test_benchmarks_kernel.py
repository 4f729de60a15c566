# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that look inside a CPU call: one block, 128 keys, the steps, threads, targets."""

import json
import shutil
from types import SimpleNamespace

import fake_gpu
import pytest
import torch
from fake_gpu import TINY, arguments, work_of

from benchmarks import (
    attend,
    baselines,
    block,
    devices,
    harness,
    kernel,
    options,
    prefill,
    report,
    steps,
    targets,
)
from benchmarks.inputs import Shape, mask_of_density
from pbs_attn import ops

no_tools = fake_gpu.no_tools  # for every test here
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="no make")
BF16, FP32 = torch.bfloat16, torch.float32


# ---- the library ------------------------------------------------------------------------------
@needs_make
@pytest.mark.parametrize("dtype, head_dim", [(FP32, 64), (BF16, 80), (torch.float16, 8)])
def test_a_block_is_attention(dtype, head_dim):
    made = kernel.Block("c", dtype, head_dim, blocks=3)
    assert made.blocks >= 3
    made.run()
    q, kv = made.tensor("q").double(), made.tensor("kv", 256).double()
    # every panel holds the same keys, so more of them change nothing
    right = (q @ kv[:128].T * head_dim**-0.5).softmax(-1) @ kv[128:]
    off = (made.tensor("out").double() - right).abs().max()
    assert off < max(4 * torch.finfo(dtype).eps, 1e-5)
    assert right.abs().max() > 0.05


@needs_make
def test_a_set_that_does_not_take_the_dtype_says_so():
    assert kernel.takes("c", FP32) and kernel.takes("emu_avx512bf16", BF16)
    assert not kernel.takes("emu_avx512bf16", FP32)
    for make in (lambda *a: kernel.Block(*a, 64), lambda *a: kernel.Pack(*a, 64, 128, 128)):
        with pytest.raises(RuntimeError, match="emu_avx512bf16 does not take it"):
            make("emu_avx512bf16", FP32)


@needs_make
@pytest.mark.parametrize("threads", [1, 2])
def test_steps_are_the_fused_call_and_count_its_work(threads):
    torch.set_num_threads(threads)
    work = work_of("--threads", str(threads))
    run = kernel.Run(steps.open_steps(work))
    assert torch.equal(run(), work.prefill()[0]) and not work.failures
    found = run.summary()
    rows = -(-600 // 128)
    assert found["items"] == 4 * rows and found["counted_blocks"] == work.computed
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["overhead"] == pytest.approx(1 - found["shares"]["attend"])
    assert found["rescales_per_row_panel"] == found["rescales"] / (work.computed * 128)
    seconds, counters = run.runs[0]
    assert len(seconds) == 4 and min(seconds) > 0 and len(counters) == threads
    busy = sum(c.busy_ns for c in counters) * 1e-9
    assert 0 < busy <= threads * seconds[3] and 1 <= found["busy_spread"] <= threads


@needs_make
def test_steps_attend_to_the_bits_that_are_given():
    work = work_of("--block-size", "64", "--segment-size", "128")
    bits, computed, density = work.forced(0.5)
    assert not torch.equal(bits, work.bits)
    run = kernel.Run(steps.open_steps(work), bits)
    right = ops.attend(
        work.q, work.k, work.v, bits, packed=work.packed, block_q=64, block_k=64, segment_size=128
    )
    assert torch.equal(run(), right[0])
    assert run.summary()["counted_blocks"] == computed
    (_, row, _) = steps.forced(work, run.steps)
    assert row.name == "prefill 30%" and row.blocks == work.forced(0.3)[1]


def test_without_make_the_rows_are_left_out_and_why_is_said(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    kernel.library.cache_clear()
    work = work_of()
    assert steps.forced(work, steps.open_steps(work)) == [] and "no make" in work.failures["steps"]
    with pytest.raises(SystemExit, match="no make"):
        block.main(["--quick"])


# ---- benchmarks.block -------------------------------------------------------------------------
SMALL = ["--isa", "c", "--dtypes", "fp32", "--head-dims", "64,128", "--samples", "3"]
SMALL += ["--sample-ms", "0.1", "--probe-ms", "0.1", "--blocks", "1", "--keys", "256"]


@needs_make
def test_block_program(tmp_path, capsys):
    out = tmp_path / "block.json"
    assert block.main([*SMALL, "--json", str(out)]) == 0
    saved = json.loads(out.read_text())
    (shape,) = saved["shapes"]
    assert saved["complete"] and (shape["isa"], shape["unit"]) == ("c", "fma-c")
    assert [row["row"] for row in shape["rows"]] == ["fp32 D=64", "fp32 D=128"]
    for row in shape["rows"]:
        assert len(row["samples"]) == 3 and 0 < row["of_peak_p10"] <= row["of_peak_p90"]
        ghz = row["samples"][0].get("ghz")
        assert not ghz or row["cycles_per_block"] > 4 * 128 * 128 * 64 / 64  # flop a cycle
    ratios = [part["row"] for part in shape["parts"] if "over_copy" in part]
    assert ratios[:4] == [
        f"fp32 D=64 {what}, {at}" for at in ("L2", "memory") for what in ("pack", "pack+pool")
    ]
    assert {"fp32 D=128 score", "fp32 D=128 sort, a key"} < {p["row"] for p in shape["parts"]}
    assert len(shape["targets"]) == 4  # "c" has no block to reach, but a copy to be compared to
    assert "softmax and all else" in capsys.readouterr().out
    lines = [line for line in report.blocks(saved) if line]
    assert lines[0].count("|") == 5 and any("pack+pool, L2, over copy" in x for x in lines)
    assert "D =" not in report.origin(saved | {"file": "x"})


@needs_make
def test_ctrl_c_keeps_the_blocks_measured(tmp_path, monkeypatch, capsys):
    calls, time = [], devices.Cpu.time

    def stop(self, call):
        calls.append(call)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return time(self, call)

    monkeypatch.setattr(devices.Cpu, "time", stop)
    out = tmp_path / "block.json"
    assert block.main([*SMALL, "--no-parts", "--json", str(out)]) == 130
    saved = json.loads(out.read_text())
    assert not saved["complete"] and "stopped" in capsys.readouterr().out
    assert [len(row["samples"]) for row in saved["shapes"][0]["rows"]] == [2, 1]


def test_a_pack_is_compared_to_its_own_copy_by_rounds():
    def taken(*ms):
        return [harness.Sample(x, (1.0, 1.0), False, ghz=2.0) for x in ms]

    row = harness.Row("", None)
    rows = {"bf16 D=64 copy, L2": (row, 10), "bf16 D=64 pack, L2": (row, 5)}
    rows["bf16 D=64 copy, memory"] = (row, 1)
    samples = [taken(1, 2, 4), taken(1, 4, 4), taken(9, 9, 9)]
    copy, pack, _ = block.over_copies(rows, dict(zip(rows, samples, strict=True)))
    # per 128 keys: twice the time of the copy's in a round of equal times
    assert pack["over_copy"] == pytest.approx(2.0) and "over_copy" not in copy
    assert pack["us"] == pytest.approx(800) and pack["cycles"] == pytest.approx(1.6e6)


@pytest.mark.parametrize(
    "wrong", [["--dtypes", "int8"], ["--head-dims", "60"], ["--keys", "100"], ["--samples", "0"]]
)
def test_block_refuses(wrong):
    with pytest.raises(SystemExit):
        options.parse_block(wrong)


def test_block_examples_parse():
    for line in options.BLOCK.splitlines()[1:]:
        python, flag, module, *words = line.split()
        assert (python, flag, module) == ("python", "-m", "benchmarks.block")
        assert options.parse_block(words).threads == 1
    with pytest.raises(SystemExit, match="--isa nonsense"):
        block.isas("nonsense")


# ---- threads, probes, lengths -----------------------------------------------------------------
def test_attend_on_fewer_threads_is_compared_to_the_probe(tmp_path, capsys):
    out = tmp_path / "out.json"
    argv = [*TINY, "--device", "cpu", "--threads", "1,2", "--json", str(out)]
    assert harness.main("prefill", prefill.rows, argv) == 0
    saved = json.loads(out.read_text())
    (shape,) = saved["shapes"]
    rows = {row["row"]: row for row in shape["rows"]}
    one, two = rows["attend, 1 thread"], rows["attend"]
    assert one["blocks"] == two["blocks"] and "vs_threads" not in one
    assert two["vs_threads"]["1"] == pytest.approx(one["ms"] / two["ms"])
    assert two["vs_threads"]["1 of probe"] == pytest.approx(two["of_peak"] / one["of_peak"])
    assert saved["banner"]["threads"] == 2 and torch.get_num_threads() == 2
    assert any(t["what"].startswith("attend over 1 thread") for t in shape["targets"])
    assert "times as fast as on 1 thread" in capsys.readouterr().out
    tables = [report.long(saved), report.short(saved)]
    for lines in tables:
        assert len({line.count("|") for line in lines[:4]}) == 1
    assert any(line.startswith("| bf16 | 600 | prefill 20% |") for line in tables[0])
    assert any("attend over 1 thread" in line for line in tables[0])


def test_a_row_with_own_threads_runs_and_is_probed_on_them():
    torch.set_num_threads(2)
    seen = []
    args = arguments("--device", "cpu", "--threads", "1,3")
    work = SimpleNamespace(args=args, computed=1, density=1.0, diagonal=1)
    work.attend = lambda: seen.append(torch.get_num_threads())
    (row,) = steps.fewer_threads(work)
    row.call()
    assert (row.name, row.threads, args.threads) == ("attend, 1 thread", 1, 3)
    assert seen == [1] and torch.get_num_threads() == 2
    cpu = devices.Cpu(args)
    asked = []
    cpu.peak = SimpleNamespace(run=lambda *a: asked.append(a) or 1.0)
    units = [cpu.unit(r, "avx2") for r in (row, harness.Row("x", None))]
    assert units == ["fma-avx2 x1", "fma-avx2"]
    assert set(cpu.probe(units)) == set(units)
    assert asked == [("fma-avx2", 0.1, 1), ("fma-avx2", 0.1, 0)]
    names = [row.name for row in attend.with_baselines(work_of("--threads", "1,3"))]
    assert names[:3] == ["attend", "attend, 1 thread", "attend 20%"]
    with pytest.raises(SystemExit, match="--threads 1,x"):
        arguments("--threads", "1,x")
    with pytest.raises(SystemExit, match="attend and prefill on a CPU only"):
        arguments("--threads", "1,2", verb="score")
    with pytest.raises(SystemExit, match="attend and prefill on a CPU only"):
        arguments("--threads", "1,2", "--device", "cuda")


def test_probes_last_their_share_of_the_samples_beside_them():
    cpu = devices.Cpu(arguments("--device", "cpu"))
    asked = []
    cpu.peak = SimpleNamespace(run=lambda unit, ms, threads: asked.append(ms) or 1.0)
    for beside in (0.0, 1.0, 100.0, 1e6):
        cpu.probe(["fma-c"], beside)
    assert asked == [0.1, 0.1, 5.0, 200.0]

    beside = []
    times = {"short": 1.0, "long": 50.0}
    device = SimpleNamespace(
        kind="cpu",
        unit=lambda row, isa: "fma",
        warm_up=lambda call: None,
        probe=lambda units, ms: beside.append(ms) or {"fma": 1.0},
        time=lambda call: devices.Timing(times[call()]),
    )
    rows = [harness.Row(name, lambda name=name: name) for name in times]
    harness.measure(rows, device, "c", SimpleNamespace(samples=2), lambda: None)
    assert beside[0] < 1 and beside[2:] == [50.0, 50.0, 50.0]  # the first two know no long one


def test_the_clock_is_plausible():
    ghz = devices.Cpu(arguments("--device", "cpu")).peak.ghz()
    assert ghz is None or 0.3 < ghz < 8


def test_long_calls_can_leave_out_what_is_dense():
    work = work_of("--max-dense", "512")
    assert baselines.rows(work) == []
    assert work.failures == {"dense, sdpa": "more than --max-dense 512 tokens"}
    assert [row.name for row in baselines.rows(work_of("--max-dense", "600"))] == ["dense", "sdpa"]


def test_forced_lists_of_long_calls_are_small():
    keep = mask_of_density(Shape(128 << 10, heads=1), 0.2, 128, 256)
    assert keep.shape == (1, 1, 1024, 1024) and keep.dtype == torch.bool


# ---- targets ----------------------------------------------------------------------------------
def test_verdicts():
    def verdict(value, *rest, **more):
        return targets.Check("x", value, *rest, **more).verdict

    assert [verdict(v, 2.0, 3.0) for v in (1.9, 2.0, 3.0)] == ["not met", "met", "met, good"]
    assert [verdict(v, 0.08, 0.05, at_most=True) for v in (0.09, 0.08, 0.05)] == [
        "not met",
        "met",
        "met, good",
    ]
    assert verdict(1.0, 0.95) == "met"
    line = str(targets.Check("overhead", 0.09, 0.08, 0.05, at_most=True, noisy=True))
    assert line == "target: overhead 0.09; must at most 0.08, good 0.05: not met (noisy)"


def test_what_the_issue_asks_of_a_block():
    assert targets.block("avx512bf16", 96) == (0.80, 0.89) and targets.block("amx", 80) is None
    assert {targets.block("avx2", d) for d in (64, 80, 256)} == {(0.80, 0.91)}
    assert targets.block("c", 64) is None


def shape_of(length=32 << 10, head_dim=128, isa="avx2", **rows):
    found = []
    for name, row in rows.items():
        name = name.replace("prefill_20", "prefill 20%").replace("prefill_40", "prefill 40%")
        found.append({"row": name, "flagged_used": False} | row)
    return {"length": length, "head_dim": head_dim, "isa": isa, "dtype": "bf16", "rows": found}


def test_targets_of_a_whole_call():
    rows = {"prefill_20": {"vs_sdpa": 4.6}, "prefill_40": {"vs_sdpa": 2.4, "overhead": 0.07}}
    found = {check.what: check.verdict for check in targets.of_shape(shape_of(**rows))}
    assert found == {
        "sparse 20% over sdpa": "met",
        "sparse 40% over sdpa": "not met",
        "overhead at 40%": "met",
    }
    assert targets.of_shape(shape_of(length=4096, **rows)) == []
    assert targets.of_shape(shape_of(head_dim=64, **rows)) == []
    dense = {"dense": {"vs_sdpa": 4.4, "of_peak": 0.7}}
    found = targets.of_shape(shape_of(length=8192, isa="avx512bf16", **dense))
    assert [check.verdict for check in found] == ["not met", "met"]


def test_growth_is_of_the_time_of_a_block_from_4k_to_64k():
    shapes = [
        shape_of(length, prefill_20={"attend_of_peak": share}, prefill={"attend_of_peak": length})
        for length, share in ((2048, 1.2), (65536, 0.9), (4096, 0.99), (16384, 0.8), (131072, 0.1))
    ]
    (check,) = targets.growth(shapes)
    assert check.value == pytest.approx(0.99 / 0.8 - 1) and check.verdict == "not met"
    assert (
        check.what == "bf16 D=128 prefill 20%: time per block over the probe, 4k to 64k, grows by"
    )
    assert targets.growth(shapes[:3]) and not targets.growth(shapes[:2])
