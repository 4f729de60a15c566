# SPDX-License-Identifier: Apache-2.0
"""Time to first token of a Llama of 8B random weights: its sparse prefill beside torch's dense one.

The sparse one computes as many blocks a row as the paper's model at that length (rule `budget`;
benchmarks/paper.py), for attention of random weights says nothing about densities. Dense and sparse
take turns; one untimed call each warms up and counts. Saved after every length.

python tools/gpu_check/ttft.py --device cuda --json results
python tools/gpu_check/ttft.py --device cpu --tiny --lengths 1k      its own logic, without a GPU
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]

import model as models  # noqa: E402  # tools/gpu_check/model.py

import pbs_attn  # noqa: E402
from benchmarks import harness, machine, paper, targets_gpu  # noqa: E402
from benchmarks.options import length as tokens  # noqa: E402
from pbs_attn import geometry as geo  # noqa: E402
from pbs_attn.cli import measure  # noqa: E402

SAMPLES = 3
DENSE, SPARSE = "sdpa", "pbs_attn_ttft"


def config_at(length: int) -> pbs_attn.PBSConfig:
    """What computes the paper's blocks a row; between its lengths, those of the next longer one."""
    base = pbs_attn.PBSConfig(min_q=0, min_kv=0)
    rows = [b for n, b in sorted(targets_gpu.PAPER_BLOCKS.items()) if n >= length]
    wanted = rows[0] if rows else max(targets_gpu.PAPER_BLOCKS.values())
    size = base.block_size
    seqs = geo.sequences(geo.Geometry(), 1, length, length, torch.device("cpu"))
    found = geo.blocks(seqs, -(-length // size), size, size, base.segment_size, "segment")
    return base.replace(rule="budget", tau=paper.budget_for(found, wanted))


def timed(model, ids, attention: str) -> tuple[float, float]:
    """Seconds until the next token is known, and those of them inside attention."""
    model.set_attn_implementation(attention)
    run = measure.prefill(model, ids)
    return run.seconds, run.attention_seconds


@torch.inference_mode()
def at_length(model, length: int, samples: int) -> dict:
    config = config_at(length)
    pbs_attn.register(SPARSE, config, overwrite=True)
    ids = models.random_ids(model.config.vocab_size, length, model.device)
    timed(model, ids, DENSE)
    with pbs_attn.record() as calls:
        timed(model, ids, SPARSE)
    taken: dict[str, list] = {DENSE: [], SPARSE: []}
    for _ in range(samples):
        for name, runs in taken.items():
            runs.append(timed(model, ids, name))
    middle = {name: statistics.median(s for s, _ in runs) for name, runs in taken.items()}
    made = {"length": length, "budget": config.tau, "density": calls.density}
    made |= {"routes": dict(calls.calls), "reasons": dict(calls.reasons)}
    for word, name in (("dense", DENSE), ("sparse", SPARSE)):
        runs = [{"seconds": whole, "attention": part} for whole, part in taken[name]]
        made |= {f"{word}_s": middle[name], f"{word}_samples": runs}
    made["speedup"] = middle[DENSE] / middle[SPARSE]
    return made


def check(made: dict):
    what = f"first token at {made['length'] // 1024}k, dense over sparse"
    return targets_gpu.Check(what, made["speedup"], *targets_gpu.TTFT)


def problem(made: dict, layers: int) -> str | None:
    """A call that went the dense way would be timed as a sparse one."""
    expected = {"pbs": layers, "dense": 0}
    if made["routes"] == expected:
        return None
    return f"{made['length']} tokens: routes {made['routes']}, dense because {made['reasons']}"


def banner(device: torch.device) -> dict:
    about = machine.banner(torch.get_num_threads())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["gpu"] = machine.gpu_banner(properties, machine.nvidia_smi(properties))
    return about


def said(made: dict) -> str:
    return (
        f"{made['length']} tokens: dense {made['dense_s']:.3f} s, sparse {made['sparse_s']:.3f} s, "
        f"{made['speedup']:.2f} times as fast, density {made['density']:.1%}"
    )


def main(arguments=None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    p.add_argument("--lengths", default="32k,128k", help="(%(default)s)")
    p.add_argument("--samples", type=int, default=SAMPLES, help="of each (%(default)s)")
    p.add_argument("--tiny", action="store_true", help="two narrow layers")
    p.add_argument("--json", metavar="OUT", help="'results' = benchmarks/results/<gpu>/")
    args = p.parse_args(arguments)
    device, lengths = torch.device(args.device), [tokens(n) for n in args.lengths.split(",")]
    if args.samples < 1:
        p.error(f"--samples is {args.samples}; allowed: 1 or more")
    size = "tiny" if args.tiny else "8b"
    about = banner(device)
    model = models.random_llama(device, size, 2 * max(lengths))
    report = {"banner": about, "size": size, "samples": args.samples, "complete": False}
    report |= {"lengths": []}
    out = Path(args.json) if args.json else None
    if args.json == "results":
        out = machine.ROOT / "benchmarks" / "results" / machine.slug(about) / f"ttft-{size}.json"
    problems = []
    for length in lengths:
        made = at_length(model, length, args.samples)
        made["targets"] = [check(made).record()]
        report["lengths"].append(made)
        report["complete"] = length == lengths[-1]
        if out:
            harness.save(out, report)
        print(f"{said(made)}\n  {check(made)}", flush=True)
        problems += filter(None, [problem(made, model.config.num_hidden_layers)])
    for each in problems:
        print(f"problem: {each}")
    if out:
        print(f"saved {out}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
