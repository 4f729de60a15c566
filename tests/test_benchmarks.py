# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks time, count and report, on a CPU and on a fake GPU."""

import json
import shutil
import subprocess
import time
from types import SimpleNamespace

import fake_gpu
import pytest
import torch
from fake_gpu import PROPERTIES, ROOT, TINY, FakeCuda, FakeGpu, arguments

from benchmarks import devices, harness, machine, options, prefill, report, table
from benchmarks.inputs import Shape
from benchmarks.peak import mma

no_tools = fake_gpu.no_tools  # for every test here


# ---- timing -----------------------------------------------------------------------------------
def test_only_the_call_is_between_the_events():
    gpu = FakeGpu(arguments())
    gpu.log.log.clear()
    timing = gpu.time(lambda: gpu.log.log.append("call"))
    assert gpu.log.log == ["flush", "hold", "record", "call", "record", "wait"]
    assert 0 <= timing.host_ms <= timing.ms


def test_flush_is_larger_than_the_cache():
    gpu = FakeGpu(arguments())
    for buffer in (gpu._written, gpu._read):
        assert buffer.nbytes >= 2 * PROPERTIES.L2_cache_size
    gpu._written.fill_(1.0)
    gpu.flush()
    assert not gpu._written.any() and float(gpu._total) == 0.0


def test_warm_up_lasts_and_calls_at_least_once():
    gpu, calls = FakeGpu(arguments()), []
    gpu.warm_up(lambda: calls.append(1))
    assert len(calls) == 1
    gpu.warmup_ms = 20.0
    began = time.perf_counter()
    gpu.warm_up(lambda: time.sleep(0.002))
    assert time.perf_counter() - began >= 0.02


def test_probes_flag_a_sample_between_unlike_ones():
    rates = iter([100.0, 100.0, 80.0, 80.0])
    device = SimpleNamespace(
        kind="cpu",
        unit=lambda row, isa: "fma",
        warm_up=lambda call: call(),
        probe=lambda units, beside_ms: {"fma": next(rates)},
        time=lambda call: devices.Timing(1.0),
    )
    row = harness.Row("x", lambda: None)
    args = SimpleNamespace(samples=3)
    taken, stopped = harness.measure([row], device, "c", args, lambda: None)
    assert [s.flagged for s in taken["x"]] == [False, True, False] and not stopped


def test_no_round_begins_after_the_time_is_up():
    gpu, args = FakeGpu(arguments()), SimpleNamespace(samples=50)
    row = harness.Row("x", lambda: None)
    taken, _ = harness.measure([row], gpu, "sm80", args, lambda: None, until=0.0)
    assert len(taken["x"]) == 1  # the first always


# ---- numbers ----------------------------------------------------------------------------------
def sample(ms, gemm=500e3, host_ms=0.1, flagged=False):
    probes = {"gemm": (gemm, gemm), "copy": (4000.0, 4000.0), "mma": (2 * gemm, 2 * gemm)}
    return harness.Sample(ms, probes["gemm"], flagged, host_ms, probes)


def test_rates_count_computed_blocks_and_half_of_the_diagonal():
    shape = Shape(1024, head_dim=128)
    row = harness.Row("attend", lambda: None, blocks=100, diagonal=20, bytes=8_000_000)
    got = table.summarise(row, [sample(ms) for ms in (1.0, 2.0, 4.0)], shape, 128)
    flop = 4 * 128 * 128 * 128 * 100
    assert got["ms"] == 2.0 and got["gflops"] == pytest.approx(flop / 2e6)
    assert got["useful_gflops"] == pytest.approx(0.9 * got["gflops"])
    assert got["of_peak"] == pytest.approx(got["gflops"] / 500e3)
    assert got["of_mma"] == pytest.approx(got["of_peak"] / 2)
    assert got["gbytes_per_s"] == pytest.approx(4.0) and got["of_copy"] == pytest.approx(1e-3)
    assert len(got["samples"]) == 3 and not got["launch_bound"]
    assert table.summarise(row, [sample(1.0, host_ms=3.0)], shape, 128)["launch_bound"]


def test_best_dense_is_the_fastest_and_ratios_are_per_round():
    shape = Shape(1024)

    times = {"prefill": (1.0, 2.0, 3.0), "dense": (4.0, 8.0, 12.0), "fa3": (2.0, 4.0, 6.0)}
    rows = [harness.Row(n, lambda: None, blocks=10, dense=n != "prefill") for n in times]
    results = [
        table.summarise(row, [sample(ms) for ms in times[row.name]], shape, 128) for row in rows
    ]
    assert table.best_dense(rows, results) == "fa3"
    assert table.best_dense(rows[:1], results[:1]) is None
    table.compare(results, "fa3", "best")
    assert [r["vs_best"] for r in results] == [2.0, 0.5, 1.0]


# ---- whole programs ---------------------------------------------------------------------------
@pytest.mark.parametrize("verb", ["score", "permute", "select", "attend", "prefill"])
def test_program_on_a_fake_gpu(verb, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    rows = {"permute": "with_copy", "attend": "with_baselines"}.get(verb, "rows")
    module = __import__(f"benchmarks.{verb}", fromlist=[verb])
    argv = [*TINY, "--device", "cuda", "--json", str(out)]
    assert harness.main(verb, getattr(module, rows), argv, FakeGpu) == 0
    saved = json.loads(out.read_text())
    assert saved["complete"] and saved["banner"]["gpu"]["state_at_end"] == {"clocks.sm": "1980"}
    assert set(saved["peak_gflops"]) == {"gemm", "copy"}
    (shape,) = saved["shapes"]
    for row in shape["rows"]:
        assert len(row["samples"]) == 2 and row["ms"] > 0
        assert (row["gbytes_per_s"] is None) == (
            row["row"] not in ("score", "permute", "select", "copy K, V")
        )
        assert not row["blocks"] or verb not in ("attend", "prefill") or row["vs_best"] > 0
    printed = capsys.readouterr().out
    assert (
        "NVIDIA H200, capability 9.0, 132 SMs" in printed and "no mma.sync peak: no nvcc" in printed
    )
    if verb == "prefill":
        assert shape["best_dense"] in {"dense", "sdpa flash"}
        assert "not run: flex: RuntimeError: no compiler" in printed
        lines = report.short(saved | {"file": "x"}) + report.long_gpu(saved)
        assert len({line.count("|") for line in report.long_gpu(saved)}) == 1
        assert any(f"({shape['best_dense']})" in line for line in lines)
        assert "NVIDIA H200" in report.origin(saved | {"file": "x"})


def test_program_on_the_cpu_keeps_its_columns(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert (
        harness.main("prefill", prefill.rows, [*TINY, "--device", "cpu", "--json", str(out)]) == 0
    )
    saved = json.loads(out.read_text())
    (shape,) = saved["shapes"]
    names = ["prefill", "prefill 20%", "prefill 30%", "prefill 40%"]
    names += ["score", "permute", "select", "attend", "dense", "sdpa"]
    assert [row["row"] for row in shape["rows"]] == names
    clock = {"ghz"} & set(shape["rows"][0]["samples"][0])  # where the latency is known
    assert set(shape["rows"][0]) - {"cycles_per_block"} == {
        *("row", "ms", "ms_p10", "ms_p90", "density", "blocks", "gflops", "of_peak", "used"),
        *("flagged", "flagged_used", "samples", "peak_extra_bytes", "workspace_size"),
        *("vs_sdpa", "vs_dense", "steps_ms", "shares", "overhead", "items", "counted_blocks"),
        *("rescales", "rescales_per_row_panel", "busy_spread", "attend_of_peak"),
    }
    assert set(shape["rows"][0]["samples"][0]) - clock == {"ms", "probe", "flagged"}
    assert bool(clock) == ("cycles_per_block" in shape["rows"][0])
    assert "GFLOP/s  of peak cycles/block  x sdpa x dense  flagged" in capsys.readouterr().out


def test_results_go_to_a_folder_per_machine():
    gpu = {"gpu": {"name": "NVIDIA H100 80GB HBM3"}}
    assert machine.slug(gpu) == "nvidia-h100-80gb-hbm3"
    assert machine.slug({"gpu": {"name": "GeForce RTX 4090"}}) == "nvidia-geforce-rtx-4090"
    args = arguments("--json", "results")
    path = harness.where(args, gpu, "prefill")
    assert path.relative_to(ROOT / "benchmarks/results").as_posix() == (
        "nvidia-h100-80gb-hbm3/prefill-d32.json"
    )
    args.quick = True
    assert harness.where(args, gpu, "prefill").name == "prefill-d32-quick.json"
    args = arguments("--json", "results", "--capture", "models/smollm2,book.txt")
    assert harness.where(args, gpu, "prefill").name == "prefill-smollm2.json"
    single = options.parse_block(["--json", "results"])
    assert harness.where(single, gpu, "block").name == "block.json"


def test_report_takes_quick_files_only_without_full_ones(tmp_path):
    for name in ("a/prefill-d128.json", "a/prefill-d128-quick.json", "b/prefill-d64-quick.json"):
        harness.save(tmp_path / "benchmarks/results" / name, {"name": name})
    names = [r["name"] for r in report.reports(tmp_path)]
    assert names == ["a/prefill-d128.json", "b/prefill-d64-quick.json"]


def test_pages_hold_the_saved_numbers():
    pages = {page: text for page, text in report.pages().items() if text}
    assert {"README.md", "docs/cpu-kernel.md", "docs/peak.md"} <= set(pages)
    for page, text in pages.items():
        _, begin, rest = (ROOT / page).read_text().partition(report.BEGIN)
        held, end, _ = rest.partition(report.END)
        assert begin and end and held.strip() == text, page


def test_defaults_follow_the_device():
    cpu, gpu = (options.parse("attend", ["--device", d]) for d in ("cpu", "cuda"))
    assert (cpu.lengths, cpu.dtypes, cpu.heads, cpu.heads_k) == (
        "1k,2k,4k,8k,16k",
        "bf16,fp32",
        8,
        2,
    )
    assert (gpu.lengths, gpu.dtypes, gpu.heads, gpu.heads_k) == ("8k,32k,128k", "bf16", 32, 8)
    assert options.parse("prefill", ["--device", "cuda", "--quick"]).seconds
    assert options.parse("prefill", ["--device", "cpu", "--quick"]).lengths == "1k"
    for wrong in (["--device", "tpu"], ["--dtypes", "int8"], ["--save-capture", "x"]):
        with pytest.raises(SystemExit):
            options.parse("prefill", wrong)


@pytest.mark.parametrize("verb", ["score", "attend", "prefill"])
def test_the_examples_of_help_parse(verb):
    examples = options.parser(verb).epilog.splitlines()[1:]
    assert examples
    for line in examples:
        python, flag, module, *words = line.split()
        assert (python, flag, module) == ("python", "-m", f"benchmarks.{verb}")
        options.parse(verb, words)


def test_without_a_gpu_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        devices.open_device(SimpleNamespace(device="cuda:0"))


# ---- machine ----------------------------------------------------------------------------------
def test_nvidia_smi(monkeypatch):
    monkeypatch.undo()
    values = ["570.1", "P0", "1980", "3201", "1980", "[N/A]", "700.00", "40"]

    def run(command, **options):
        assert "--id=GPU-12345678" in command
        return subprocess.CompletedProcess(command, 0, ", ".join(values) + "\n", "")

    seen = machine.nvidia_smi(PROPERTIES, run)
    assert seen["clocks.sm"] == "1980" and "power.draw" not in seen and len(seen) == 7
    failed = subprocess.CompletedProcess([], 9, "", "No devices were found")
    assert machine.nvidia_smi(PROPERTIES, lambda *a, **k: failed) == {
        "unavailable": "No devices were found"
    }

    def missing(*a, **k):
        raise FileNotFoundError("nvidia-smi")

    assert machine.nvidia_smi(PROPERTIES, missing) == {"unavailable": "nvidia-smi"}


def test_mma_peak_is_absent_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(mma.shutil, "which", lambda name: None)
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.delenv("PBS_PEAK_MMA", raising=False)
    monkeypatch.setattr(mma, "LIBRARY", tmp_path / "mma.so")
    assert mma.load(torch.device("cpu"), FakeCuda()) == (None, "no nvcc")
    monkeypatch.setenv("PBS_PEAK_MMA", str(tmp_path / "absent.so"))
    loop, why = mma.load(torch.device("cpu"), FakeCuda())
    assert loop is None and "absent.so" in why


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_mma_peak_is_built_and_counts_its_flop(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(mma, "TARGETS", ())  # PTX alone: seconds less
    assert mma.build(tmp_path / "mma.so") is None
    loop = mma.Loop(tmp_path / "mma.so", torch.device("cpu"), FakeCuda())
    # blocks, warps, products of 16 x 8 x 16
    assert loop.flop == 264 * mma.ROUNDS * 8 * 8 * 4096
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="mma.cu: "):
            loop.run()
