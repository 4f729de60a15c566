# SPDX-License-Identifier: Apache-2.0
"""The command line that every benchmark has, and what it means per device where nothing is said."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULTS = {
    "cpu": {"lengths": "1k,2k,4k,8k,16k", "dtypes": "bf16,fp32", "heads": 8, "heads_k": 2},
    "cuda": {"lengths": "8k,32k,128k", "dtypes": "bf16", "heads": 32, "heads_k": 8},
}
QUICK = {
    "cpu": {"lengths": "1k", "dtypes": "bf16", "samples": 3},
    # for tools/gpu_check.sh: every verb at every default length, in about a minute on an H200
    "cuda": {"dtypes": "bf16", "samples": 3, "warmup_ms": 10.0, "probe_ms": 5.0, "seconds": 60.0},
}
# What --break-even tries, in this order.
LADDER = {"cpu": "512,1k,2k,4k,8k,16k", "cuda": "512,1k,2k,4k,8k,16k,32k,64k"}

EXAMPLES = """\
examples:
  python -m benchmarks.{verb} --quick
  python -m benchmarks.{verb} --device cpu --lengths 2k --dtypes bf16
  python -m benchmarks.{verb} --device cuda --lengths 32k --head-dim 64 --json results
  python -m benchmarks.{verb} --lengths 4k --capture smollm2
"""
MORE = """\
  python -m benchmarks.{verb} --lengths 4k --baseline mine.py:attention
"""
PREFILL = """\
  python -m benchmarks.prefill --capture smollm2 --lengths 8k --save-capture qkv.safetensors
  python -m benchmarks.prefill --capture qkv.safetensors --lengths 4k
  python -m benchmarks.prefill --method peak --lengths 2k,4k,8k,16k,32k --dtypes fp32
  python -m benchmarks.prefill --break-even --samples 5
  python -m benchmarks.prefill --threads 1,2 --lengths 4k,8k,16k,32k,64k --heads 1 --heads-k 1
  python -m benchmarks.prefill --lengths 128k --heads 1 --heads-k 1 --max-dense 32k
"""
VARIANTS = """\
examples:
  python -m benchmarks.variants --device cuda --json results
  python -m benchmarks.variants --device cuda --head-dims 128 --names three-stages,slack
  python -m benchmarks.variants --device cuda --lengths 16k --forced 64k --share 0.2
"""


def length(text: str) -> int:
    number = text.lower().removesuffix("k")
    value = int(number) * (1024 if number != text.lower() else 1)
    if value < 1:
        raise argparse.ArgumentTypeError(f"length must be at least 1, got {text}")
    return value


def thread_counts(text: str) -> list[int]:
    counts = [int(part) if part.isdigit() else 0 for part in str(text).split(",")]
    if min(counts) < 1:
        raise SystemExit(f"--threads {text}: numbers of at least 1, separated by commas")
    return counts


def strides(text: str, block: int) -> list[int]:
    steps = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    if min(steps) < 1 or any(block % step for step in steps):
        raise SystemExit(f"--strides {text}: divisors of --block-size {block}, with commas between")
    return steps


def parser(verb: str) -> argparse.ArgumentParser:
    examples = EXAMPLES + (MORE if verb in ("attend", "prefill") else "")
    examples = VARIANTS if verb == "variants" else examples
    p = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{verb}",
        description=f"Measure {verb}: see benchmarks/README.md for how to read the table.",
        epilog=(examples + (PREFILL if verb == "prefill" else "")).format(verb=verb),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cpu, gpu = DEFAULTS["cpu"], DEFAULTS["cuda"]

    def both(name: str) -> str:
        return f"({cpu[name]} on a CPU, {gpu[name]} on a GPU)"

    default = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", default=default, help="cpu, cuda or cuda:N (here: %(default)s)")
    p.add_argument("--lengths", help=f"comma separated {both('lengths')}")
    p.add_argument("--dtypes", help=f"of bf16, fp16, fp32 {both('dtypes')}")
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--heads", type=int, help=both("heads"))
    p.add_argument("--heads-k", type=int, help=both("heads_k"))
    kinds = "a kernel method: pbs, peak, xattention:stride=16 (%(default)s)"
    p.add_argument("--method", default="pbs", metavar="TEXT", help=kinds)
    p.add_argument("--tau", type=float, help="in place of the method's own")
    p.add_argument("--block-size", type=int, default=128)
    p.add_argument("--segment-size", type=int, default=256)
    several = "of the CPU; 1,2: also attend on 1 thread, for the speed-up (here: %(default)s)"
    steps = "of the antidiagonal rows, for methods that choose so (%(default)s)"
    p.add_argument("--strides", default="8,16,32,64", help=steps)
    p.add_argument("--threads", default=str(torch.get_num_threads()), metavar="N[,M]", help=several)
    p.add_argument("--max-dense", metavar="LENGTH", help="CPU: no dense and sdpa rows above this")
    clocks = "CPU: wall, or this process's CPU time: one thread, for a machine that does other work"
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall", help=clocks)
    p.add_argument("--samples", type=int, default=9, help="rounds per shape (%(default)s)")
    enough = "no further round is begun when a shape's share of this is used up"
    p.add_argument("--seconds", type=float, help=enough)
    p.add_argument("--warmup-ms", type=float, default=50.0, help="GPU: per row (%(default)s)")
    p.add_argument("--probe-ms", type=float, default=10.0, help="length of a peak probe")
    share = "CPU: but at least this share of the samples beside it, up to 200 ms (%(default)s)"
    p.add_argument("--probe-share", type=float, default=0.05, help=share)
    where = "'results' = benchmarks/results/<cpu or gpu>/"
    p.add_argument("--json", type=Path, metavar="OUT", help=where)
    kinds = ("structured", "normal")
    p.add_argument("--inputs", choices=kinds, default="structured", help="see benchmarks/README.md")
    real = "real q, k, v instead: of a model (smollm2) over the shipped or another text, or saved"
    p.add_argument("--capture", metavar="MODEL[,TEXT]|FILE.safetensors", help=real)
    keep = "write what --capture MODEL made at the longest length, and stop"
    p.add_argument("--save-capture", type=Path, metavar="FILE.safetensors", help=keep)
    other = "another dense attention, (q, k, v) to out; may be given again"
    yours = {"action": "append", "default": [], "metavar": "FILE.py:FUNCTION"}
    p.add_argument("--baseline", **yours, help=other)
    quick = "does it run? CPU: 1k, bf16; GPU: the default lengths, about a minute; three rounds"
    p.add_argument("--quick", action="store_true", help=quick)
    if verb == "prefill":
        even = "from which length on is the sparse call the faster one? For pbs_attn/routing.py"
        p.add_argument("--break-even", action="store_true", help=even)
    if verb == "variants":
        p.add_argument("--head-dims", default="64,96,128,256", help="(%(default)s)")
        p.add_argument("--names", help="of the table, with commas between (all)")
        long = "lengths with random history blocks at a forced density (%(default)s)"
        p.add_argument("--forced", default="32k", help=long)
        p.add_argument("--share", type=float, default=0.3, help="that density (%(default)s)")
        p.set_defaults(inputs="normal")
    return p


def parse(verb: str, arguments=None) -> argparse.Namespace:
    """Arguments with the device's defaults filled in, checked as far as one can without it."""
    args = parser(verb).parse_args(arguments)
    kind = args.device.partition(":")[0]
    if kind not in DEFAULTS:
        raise SystemExit(f"--device {args.device}: allowed are cpu, cuda, cuda:N")
    if args.device == "cuda":
        args.device = "cuda:0"
    if getattr(args, "break_even", False) and args.lengths is None:
        args.lengths = LADDER[kind]
    if verb == "variants":
        args.lengths, args.dtypes = args.lengths or "4k,16k", args.dtypes or "bf16"
    if args.quick:
        vars(args).update(QUICK[kind] | ({"lengths": args.lengths} if args.lengths else {}))
    for name, value in DEFAULTS[kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.thread_list = thread_counts(args.threads)
    args.threads = max(args.thread_list)
    if len(args.thread_list) > 1 and (kind != "cpu" or verb not in ("attend", "prefill")):
        raise SystemExit("--threads N,M: attend and prefill on a CPU only")
    args.stride_list = strides(args.strides, args.block_size)
    if args.samples < 1:
        raise SystemExit(f"--samples {args.samples}: at least 1")
    if args.max_dense is not None:
        args.max_dense = length(args.max_dense)
    unknown = set(args.dtypes.split(",")) - set(DTYPES)
    if unknown:
        raise SystemExit(f"--dtypes: unknown {', '.join(sorted(unknown))}; of {', '.join(DTYPES)}")
    if args.clock == "cpu" and (args.threads != 1 or kind != "cpu"):
        raise SystemExit(f"--clock cpu --threads {args.threads}: only --threads 1 is allowed")
    if args.save_capture and not args.capture:
        raise SystemExit("--save-capture needs --capture MODEL")
    return args


BLOCK = """\
examples:
  python -m benchmarks.block --quick
  python -m benchmarks.block --json results
  python -m benchmarks.block --isa avx2 --dtypes bf16 --head-dims 64,128 --no-parts
  python -m benchmarks.block --isa c --head-dims 64 --samples 3
"""
QUICK_BLOCK = {"samples": 3, "sample_ms": 2.0, "probe_ms": 2.0, "keys": 2048, "blocks": 8}


def parse_block(arguments=None) -> argparse.Namespace:
    """The command line of benchmarks.block: one thread of a CPU."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.block",
        description="Measure one 128 x 128 block, and what is done to 128 keys before it: see "
        "benchmarks/README.md.",
        epilog=BLOCK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--isa", help="of pbs_isa_name, comma separated (every native vector one)")
    p.add_argument("--dtypes", default="bf16,fp16,fp32", help="(%(default)s)")
    p.add_argument("--head-dims", default="64,80,96,128,256", help="(%(default)s)")
    p.add_argument("--blocks", type=int, default=64, help="listed in a call (%(default)s)")
    away = "keys of the parts that pass through memory (%(default)s)"
    p.add_argument("--keys", type=int, default=32 << 10, help=away)
    parts = "pack beside a copy, score, sort (at head_dim 64 and 128)"
    p.add_argument("--parts", action=argparse.BooleanOptionalAction, default=True, help=parts)
    p.add_argument("--samples", type=int, default=9, help="rounds (%(default)s)")
    p.add_argument("--sample-ms", type=float, default=20.0, help="about (%(default)s)")
    p.add_argument("--probe-ms", type=float, default=10.0, help="of a peak probe (%(default)s)")
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time")
    p.add_argument("--json", type=Path, metavar="OUT", help="'results' = benchmarks/results/<cpu>/")
    p.add_argument("--quick", action="store_true", help="does it run? seconds; three rounds")
    args = p.parse_args(arguments)
    if args.quick:
        vars(args).update(QUICK_BLOCK)
    unknown = set(args.dtypes.split(",")) - set(DTYPES)
    if unknown:
        raise SystemExit(f"--dtypes: unknown {', '.join(sorted(unknown))}; of {', '.join(DTYPES)}")
    dims = [int(d) if d.isdigit() else 0 for d in args.head_dims.split(",")]
    if any(d % 8 or not 8 <= d <= 256 for d in dims):
        raise SystemExit(f"--head-dims {args.head_dims}: multiples of 8 from 8 to 256 are allowed")
    if args.samples < 1 or args.blocks < 1 or args.keys < 256 or args.keys % 256:
        raise SystemExit("--samples, --blocks: at least 1; --keys: a multiple of 256")
    args.head_dims, args.threads, args.probe_share = dims, 1, 0.5
    return args
