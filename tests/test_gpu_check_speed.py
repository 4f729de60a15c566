# SPDX-License-Identifier: Apache-2.0
"""What tools/gpu_check.sh measures: its benchmarks, and the first token of a large model."""

import json
from pathlib import Path

import pytest
from fake_gpu import FakeGpu, arguments
from test_gpu_check import ROOT, machine, steps

import pbs_attn
from benchmarks import harness, paper, prefill, targets_gpu, variants
from benchmarks import work as works

from gpu_check import ttft  # isort: skip  # found by test_gpu_check

K = 1024


# ---- steps ------------------------------------------------------------------------------------
def test_results_of_the_benchmarks_go_where_asked(tmp_path):
    found = [*steps.benchmarks(machine(results=tmp_path)), steps.ttft(machine(results=tmp_path))]
    kept = [Path(s.command[-1]) for s in found]
    assert [path.parent for path in kept] == [tmp_path] * 5 and len(set(kept)) == 5
    found = [*steps.benchmarks(machine()), steps.ttft(machine())]
    assert [s.command[-1] for s in found] == ["results"] * 5


def test_variants_reach_the_gpu(monkeypatch, tmp_path):
    """Built beside the others where there is nvcc, else carried; what is not there is said."""
    assert steps.build(machine()).environment["PBS_BUILD_VARIANTS"] == "1"
    assert "PBS_BUILD_VARIANTS" not in steps.build(machine(capability="8.0")).environment
    assert (ROOT / steps.VARIANTS) == variants.LIBRARY
    assert f" {steps.VARIANTS}\n" in (ROOT / "Makefile").read_text()
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    found = {s.name: s for s in steps.benchmarks(machine(prebuilt=True))}
    assert f"(no {steps.VARIANTS}: without them)" in found["variants"].what
    assert "without" not in {s.name: s for s in steps.benchmarks(machine())}["variants"].what
    words = found["variants"].command[3:]
    assert variants.parse(words).seconds < found["variants"].limit


def test_judges_of_variants_and_first_token():
    judge = steps._bench_judge("variants")
    fine = "D=64 N=4096 dense\nD=64: best slack (slack x1.020)\nsaved x.json"
    assert judge(0, fine) == ("passed", "D=64: best slack (slack x1.020); saved x.json")
    assert judge(0, "saved x.json")[0] == "failed"
    status, said = judge(None, fine)
    assert status == "failed" and "best slack" in said
    assert "; target: x 1; must 2: not met" in judge(0, fine + "\n target: x 1; must 2: not met")[1]
    line = "32768 tokens: dense 2 s, sparse 1 s"
    assert steps._ttft_judge(0, f"x\n{line}") == ("passed", line)
    assert steps._ttft_judge(1, f"{line}\nproblem: 32768 tokens: routes") == (
        "failed",
        f"exit status 1: problem: 32768 tokens: routes; {line}; problem: 32768 tokens: routes",
    )


# ---- first token ------------------------------------------------------------------------------
def test_first_token_on_a_cpu(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "ttft.json"
    argv = ["--device", "cpu", "--tiny", "--lengths", "1000,1k", "--samples", "2"]
    monkeypatch.setattr(targets_gpu, "PAPER_BLOCKS", {1024: 4.0})
    assert ttft.main([*argv, "--json", str(out)]) == 0
    saved = json.loads(out.read_text())
    assert saved["complete"] and [made["length"] for made in saved["lengths"]] == [1000, 1024]
    for made in saved["lengths"]:
        assert len(made["dense_samples"]) == len(made["sparse_samples"]) == 2
        assert made["routes"] == {"pbs": 2, "dense": 0} and 0 < made["density"] < 1
        assert made["targets"][0]["value"] == made["dense_s"] / made["sparse_s"]
    assert "times as fast, density" in capsys.readouterr().out

    def dense(*args):
        return pbs_attn.PBSConfig(min_q=10**6)

    monkeypatch.setattr(ttft, "config_at", dense)  # what is timed then is no sparse call
    assert ttft.main(argv) == 1
    assert "problem: 1024 tokens: routes {'pbs': 0, 'dense': 2}" in capsys.readouterr().out


def test_budgets_make_the_rows_of_the_paper():
    for length, blocks in targets_gpu.PAPER_BLOCKS.items():
        budget, rows = int(ttft.config_at(length).tau), range(length // 128)
        of_rows = [min(i // 2 * 2, budget) + i % 2 + 1 for i in rows]
        assert 0 <= sum(of_rows) / len(of_rows) - blocks < 1, length


# ---- whole calls as the paper has them --------------------------------------------------------
TINY = [
    "--lengths",
    "1152",
    "--dtypes",
    "bf16",
    "--heads",
    "4",
    "--heads-k",
    "2",
    "--head-dim",
    "32",
]
TINY += ["--samples", "2", "--probe-ms", "0.1", "--warmup-ms", "0", "--threads", "1"]


def test_rows_of_the_paper(tmp_path, monkeypatch):
    """9 query blocks: own spans are 13 of the 45 causal blocks, 4 of history make 13 + 20."""
    monkeypatch.setattr(paper, "PAPER_BLOCKS", {1152: 33 / 9})
    out = tmp_path / "out.json"
    argv = [*TINY, "--device", "cuda", "--json", str(out)]
    assert harness.main("prefill", prefill.rows, argv, FakeGpu) == 0
    (shape,) = json.loads(out.read_text())["shapes"]
    rows = {row["row"]: row for row in shape["rows"]}
    whole = rows["prefill paper"]
    assert whole["budget"] == 4 and whole["density"] == pytest.approx(33 / 45, abs=0.1)
    assert whole["blocks"] > 0 and whole["vs_best"] > 0
    assert rows["permutation"]["ms"] > 0 and rows["permutation shared"]["ms"] > 0
    assert rows["dense"]["dense_kernel"] and "dense_kernel" not in whole


def test_shared_and_own_orders_are_timed(monkeypatch):
    """The permutation phase is score and permute, once per query head and once per K/V head."""
    args = arguments()
    seen = []
    for verb in ("score", "permute"):
        whole = getattr(works.ops, verb)

        def spy(*tensors, verb=verb, whole=whole, **options):
            seen.append((verb, options.get("gqa", "per_head")))
            return whole(*tensors, **options)

        monkeypatch.setattr(paper.ops, verb, spy)
    made = works.Work(works.inputs.Shape(600, 4, 2, 32), args, FakeGpu(args))
    monkeypatch.setattr(paper, "PAPER_BLOCKS", {})
    seen.clear()
    for row in paper.rows(made):
        row.call()
    ways = ("per_head", "group")
    assert seen == [(verb, gqa) for gqa in ways for verb in ("score", "permute")]
    assert [row.name for row in paper.rows(made)] == ["permutation", "permutation shared"]


def shape_of(length, **rows):
    named = {name.replace("_", " "): row for name, row in rows.items()}
    made = [{"row": name, "flagged_used": False} | row for name, row in named.items()]
    about = {"heads": 32, "heads_k": 8, "head_dim": 128, "method": "pbs", "length": length}
    return about | {"rows": made}


def verdicts(shape, family="cuda:9.0"):
    return {check.what: check.verdict for check in targets_gpu.of_prefill(shape, family)}


def test_targets_of_whole_calls():
    rows = {"prefill_paper": {"ms": 53.0, "vs_best": 3.9}, "select": {"ms": 0.3}}
    rows |= {"permutation": {"ms": 1.3}, "permutation_shared": {"ms": 0.45}}
    shape = shape_of(128 * K, **rows)
    assert verdicts(shape) == {
        "whole call at 128k, ms": "met",
        "whole call over the best dense kernel": "met",
        "permutation at 128k, ms": "not met",
        "permutation shared at 128k, ms": "met",
        "select at 128k, ms": "met, good",
    }
    assert verdicts(shape, "cuda:8.0") == {} and verdicts(shape | {"heads": 8}) == {}
    slow = shape_of(8 * K, prefill_paper={"ms": 0.76, "vs_best": 0.99})
    assert set(verdicts(slow).values()) == {"not met"} and len(verdicts(slow)) == 2
    assert verdicts(slow | {"method": "peak"}) == {}


def test_targets_of_rates():
    blocks = 40 * 32 * 256  # 40 a row
    rows = {"attend 20%": {"gflops": 630e3, "blocks": blocks // 2}}  # rows too short to judge
    rows |= {"attend 30%": {"gflops": 579e3, "blocks": blocks}}
    found = verdicts(shape_of(32 * K, **rows))
    assert found == {"sparse D=128 30%, 40 blocks a row, TFLOP/s": "not met"}
    dense = {"dense": {"gflops": 660e3, "ms": 3.4, "dense_kernel": True}}
    dense |= {"fa3": {"gflops": 690e3, "ms": 3.3, "dense_kernel": True}}
    found = verdicts(shape_of(16 * K, **dense))
    assert found == {"dense D=128 16k, TFLOP/s": "met, good", "dense D=128 16k over fa3": "met"}
