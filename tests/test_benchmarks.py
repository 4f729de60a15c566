# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' arithmetic, and their GPU paths on CPU tensors under a fake torch.cuda."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    attend,
    baselines,
    break_even,
    capture,
    devices,
    flex,
    harness,
    machine,
    options,
    prefill,
    report,
    table,
)
from benchmarks.inputs import Shape  # noqa: E402
from benchmarks.peak import mma  # noqa: E402
from benchmarks.peak.cuda import CudaPeak  # noqa: E402
from benchmarks.work import Work  # noqa: E402
from pbs_attn import dense as exact  # noqa: E402
from pbs_attn.geometry import Geometry  # noqa: E402

TINY = ["--lengths", "600", "--dtypes", "bf16", "--heads", "4", "--heads-k", "2"]
TINY += ["--head-dim", "32", "--samples", "2", "--probe-ms", "0.1", "--warmup-ms", "0"]
TINY += ["--threads", "1"]
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=1 << 37,
    L2_cache_size=4 << 20,
    uuid="12345678",
)


class FakeCuda:
    """What devices.py needs of torch.cuda, on the CPU's clock; `log` is what was queued."""

    def __init__(self):
        self.log, self.made = [], 0

    def Event(self, enable_timing=False):  # noqa: N802
        assert enable_timing
        event = SimpleNamespace(at=None)

        def record():
            self.log.append("record")
            event.at = time.perf_counter()

        event.record, event.synchronize = record, lambda: self.log.append("wait")
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def get_device_properties(self, device):
        return PROPERTIES

    def set_device(self, device):
        pass

    def synchronize(self):
        pass

    def current_stream(self):
        return SimpleNamespace(cuda_stream=0)

    def _sleep(self, cycles):
        self.log.append("hold")

    def reset_peak_memory_stats(self, device):
        pass

    def memory_stats(self, device):
        self.made += 1 << 30
        return {"requested_bytes.all.current": 0, "requested_bytes.all.peak": self.made}


class FakeGpu(devices.Cuda):
    def __init__(self, args):
        self.log = FakeCuda()
        cpu = torch.device("cpu")
        super().__init__(args, self.log, cpu, lambda *a: CudaPeak(*a, size=32, copy_bytes=1 << 16))

    def flush(self):
        super().flush()
        self.log.log.append("flush")


@pytest.fixture(autouse=True)
def no_tools(monkeypatch):
    """No nvcc, no nvidia-smi, no compiler for FlexAttention; threads stay as they are."""
    monkeypatch.setattr(mma, "load", lambda *a: (None, "no nvcc"))
    monkeypatch.setattr(devices, "LOAD_MS", 1.0)
    monkeypatch.setattr(machine, "nvidia_smi", lambda p: {"clocks.sm": "1980"})

    def refuse(function):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(flex, "_compiled", refuse)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(*more, verb="prefill"):
    return options.parse(verb, [*TINY, *more])


def work_of(*more, seqlen_q=None, fake=False):
    args = arguments(*more)
    device = (
        FakeGpu(args) if fake else SimpleNamespace(kind="cpu", torch_device=torch.device("cpu"))
    )
    shape = Shape(600, args.heads, args.heads_k, args.head_dim)
    return Work(shape, args, device, seqlen_q)


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
        probe=lambda units: {"fma": next(rates)},
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


# ---- baselines --------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [600, 200])
def test_the_definition_accepts_dense_attention_only(rows):
    work = work_of(seqlen_q=rows)
    right = exact.torch_attention(work.q, work.k, work.v, Geometry())[0]
    assert baselines.error_of_last_rows(work, right) < 0.02
    assert baselines.error_of_last_rows(work, work.dense()) < 0.02
    k, v = (t.repeat_interleave(2, 1) for t in (work.k, work.v))
    seen = slice(0, 600 - rows + 1)  # a mask that starts too early
    wrong = torch.nn.functional.scaled_dot_product_attention(work.q, k[:, :, seen], v[:, :, seen])
    assert baselines.error_of_last_rows(work, wrong) > baselines.BOUND
    wrong = right.clone()
    wrong[0, 1, -1, 0] = float("nan")
    assert not baselines.error_of_last_rows(work, wrong) <= baselines.BOUND


def test_a_chunk_has_the_dense_rows_that_it_should():
    work = work_of(seqlen_q=200)
    assert [row.name for row in baselines.rows(work)] == ["dense", "sdpa"]
    for row in baselines.rows(work):
        assert baselines.error_of_last_rows(work, row.call()) < 0.02


MINE = """
import torch.nn.functional as F

def right(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

def not_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v[:, :, :1].expand_as(v), enable_gqa=True)

def broken(q, k, v):
    raise ValueError("only sm_100")
"""


def test_your_own_baseline(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    given = [
        x for name in ("right", "not_causal", "broken") for x in ("--baseline", f"{file}:{name}")
    ]
    work = work_of(*given)
    assert [row.name for row in baselines.rows(work)] == ["dense", "sdpa", "right"]
    assert "wrong result" in work.failures["not_causal"]
    assert work.failures["broken"] == "ValueError: only sm_100"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("mine.py", "allowed is FILE.py:FUNCTION"),
        ("mine.py:a b", "allowed is FILE.py:FUNCTION"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("{dir}/mine.py:nothing", "AttributeError"),
        ("{dir}/bad.py:f", "ZeroDivisionError"),
    ],
)
def test_a_wrong_baseline_flag_is_said(tmp_path, spec, message):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(SystemExit, match=message):
        baselines.load(spec.format(dir=tmp_path))


def test_every_failure_on_a_gpu_is_kept_with_its_message():
    work = work_of(fake=True)
    names = {row.name for row in attend.with_baselines(work)}
    assert {"attend", "attend 30%", "dense"} <= names
    # CPU tensors: no cuDNN; the packages are not installed here
    expected = set(baselines.ON_GPU) | {"flex"}
    assert expected == (expected & names) | set(work.failures)
    assert work.failures["flex"] == "RuntimeError: no compiler"
    assert "flash_attn_interface" in work.failures.get("fa3", "flash_attn_interface")


# ---- FlexAttention ----------------------------------------------------------------------------
def dense_mask_of(blocks, seqlen_q, seqlen_k):
    """bool [1, H, Nq, Nk] of a BlockMask: full blocks as they are, partial ones under mask_mod."""
    size = blocks.BLOCK_SIZE[0]
    q = torch.arange(seqlen_q)[:, None]
    k = torch.arange(seqlen_k)
    seen = blocks.mask_mod(0, 0, q, k)

    def tokens(count, order):
        listed = torch.arange(order.shape[-1]) < count[..., None]
        chosen = torch.zeros(order.shape, dtype=torch.bool).scatter(-1, order.long(), listed)
        chosen = chosen.repeat_interleave(size, 2).repeat_interleave(size, 3)
        return chosen[:, :, :seqlen_q, :seqlen_k]

    partial = tokens(blocks.kv_num_blocks, blocks.kv_indices)
    full = tokens(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (partial & full).any()
    return (partial & seen) | full, full


@pytest.mark.parametrize("rows", [600, 88])
def test_block_mask_is_what_attend_computes(rows):
    work = work_of("--block-size", "64", "--segment-size", "128", seqlen_q=rows)
    blocks = flex.block_mask(work, work.bits)
    assert blocks.seq_lengths == (rows, 600)
    mask, full = dense_mask_of(blocks, rows, 600)
    k, v = (t.repeat_interleave(2, 1).float() for t in (work.k, work.v))
    right = torch.nn.functional.scaled_dot_product_attention(work.q.float(), k, v, attn_mask=mask)
    got = work.attend_bits(work.bits)[0].float()
    assert (got - right).abs().max() < 0.02 * right.abs().max()
    assert full.any() and mask.sum() < torch.ones(rows, 600).tril(600 - rows).sum() * 4
    assert flex.error(work, right) < 0.02 < flex.error(work, right.roll(1, 2))


def test_quick_compiles_once():
    assert flex.middle("8k,128k,32k") == 32768 and flex.middle("4k") == 4096


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
    names = ["prefill", "score", "permute", "select", "attend"]
    names += ["attend 20%", "attend 30%", "attend 40%", "dense", "sdpa"]
    assert [row["row"] for row in shape["rows"]] == names
    assert set(shape["rows"][0]) == {
        *("row", "ms", "ms_p10", "ms_p90", "density", "blocks", "gflops", "of_peak", "used"),
        *("flagged", "flagged_used", "samples", "peak_extra_bytes", "workspace_size"),
        *("vs_sdpa", "vs_dense"),
    }
    assert set(shape["rows"][0]["samples"][0]) == {"ms", "probe", "flagged"}
    assert "GFLOP/s  of peak  x sdpa x dense  flagged" in capsys.readouterr().out


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


def test_report_takes_quick_files_only_without_full_ones(tmp_path):
    for name in ("a/prefill-d128.json", "a/prefill-d128-quick.json", "b/prefill-d64-quick.json"):
        harness.save(tmp_path / "benchmarks/results" / name, {"name": name})
    names = [r["name"] for r in report.reports(tmp_path)]
    assert names == ["a/prefill-d128.json", "b/prefill-d64-quick.json"]


@pytest.mark.parametrize(
    "page, make", [("README.md", report.short), ("docs/cpu-kernel.md", report.long)]
)
def test_pages_hold_the_saved_numbers(page, make):
    found = [r for r in report.reports() if page == "README.md" or not report.on_gpu(r)]
    assert report.section(found, make, "../" if "/" in page else "") in (ROOT / page).read_text()


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


# ---- captures ---------------------------------------------------------------------------------
def test_a_capture_can_be_kept_and_cut(tmp_path, monkeypatch):
    made = [torch.randn(1, h, 300, 32) for h in (4, 2, 2)]
    asked = []

    def layer(name, text, length, device):
        asked.append((name, text, length))
        return tuple(t[:, :, :length] for t in made), 3

    monkeypatch.setattr(capture, "_layer", layer)
    file = tmp_path / "qkv.safetensors"
    said = capture.save("tiny,book.txt", 300, file)
    assert asked[0] == ("tiny", "book.txt", 300) and "layer 3 of tiny" in said
    for length in (100, 300, 5000):
        q, k, v = capture.capture(str(file), length, torch.bfloat16)
        for got, whole in zip((q, k, v), made, strict=True):
            assert torch.equal(got, whole[:, :, :length].bfloat16())
    work = work_of("--capture", str(file))
    assert str(work.shape) == "bfloat16 N=300 H=4/2 D=32"
    with pytest.raises(SystemExit, match="saved already"):
        capture.save(str(file), 300, tmp_path / "other.safetensors")


# ---- break-even -------------------------------------------------------------------------------
def crossing(at):
    """Dense over sparse time that crosses 1 at `at`."""
    return lambda n: n / at


@pytest.mark.parametrize("at", [300, 1000, 1025, 3000, 5000, 7000])
def test_search_finds_the_crossing_to_a_quarter(at):
    ladder = [512, 1024, 2048, 4096, 8192, 16384]
    won, seen = break_even.search(ladder, crossing(at), 256)
    assert seen[won] > 1 and (won == 512 or at <= won <= 1.34 * at)
    assert len(seen) <= 9


def test_search_needs_two_wins_running_and_says_when_there_is_none():
    lucky = {512: 1.2, 1024: 0.8, 2048: 1.1, 4096: 2.0}
    won, seen = break_even.search(lucky, lambda n: lucky.get(n, 0.9), 256)
    assert won == 2048 and 1024 in seen
    assert break_even.search([512, 1024], lambda n: 0.5, 256)[0] is None
    assert break_even.search([512, 1024], crossing(1000), 256)[0] == 1024


def test_break_even_prints_the_line(capsys):
    args = arguments("--lengths", "512,1k,2k,4k,8k,16k", "--block-size", "128")

    def at(rows, keys):  # sparse: overhead for every key, and a third of dense's work
        dense = rows * keys
        return dense / (dense / 3 + 1500 * keys)

    found = break_even.find(args, "bf16", at)
    assert 2250 <= found[0] <= 2250 * 1.34 and 2250 <= found[1] <= 2250 * 1.34
    device = SimpleNamespace(family="cuda:9.0")
    line = break_even.line(device, {"bf16": found, "fp16": (256, 16384)})
    assert f'"cuda:9.0": Lengths({found[0]}, 16384),' in line
    assert "breaks even for fp16" in break_even.line(device, {"bf16": found, "fp16": (None, None)})


@pytest.mark.parametrize("device, opened", [("cpu", None), ("cuda", FakeGpu)])
def test_break_even_program(device, opened, tmp_path, capsys):
    out = tmp_path / "even.json"
    argv = [*TINY, "--device", device, "--break-even", "--json", str(out)]
    argv[1] = "256,512"
    assert harness.main("prefill", prefill.rows, argv, opened) == 0
    saved = json.loads(out.read_text())
    assert saved["complete"] and {s["keys"] for s in saved["sizes"]} <= set(range(256, 513))
    assert "256 rows of     256" in capsys.readouterr().out
    for size in saved["sizes"]:
        assert size["dense_ms"] > 0 and size["sparse_ms"] > 0 and size["dense"] != "prefill"
