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
  python -m benchmarks.prefill --break-even --samples 5
"""


def length(text: str) -> int:
    number = text.lower().removesuffix("k")
    value = int(number) * (1024 if number != text.lower() else 1)
    if value < 1:
        raise argparse.ArgumentTypeError(f"length must be at least 1, got {text}")
    return value


def parser(verb: str) -> argparse.ArgumentParser:
    examples = EXAMPLES + (MORE if verb in ("attend", "prefill") else "")
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
    p.add_argument("--tau", type=float, default=0.9)
    p.add_argument("--block-size", type=int, default=128)
    p.add_argument("--segment-size", type=int, default=256)
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    clocks = "CPU: wall, or this process's CPU time: one thread, for a machine that does other work"
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall", help=clocks)
    p.add_argument("--samples", type=int, default=9, help="rounds per shape (%(default)s)")
    enough = "no further round is begun when a shape's share of this is used up"
    p.add_argument("--seconds", type=float, help=enough)
    p.add_argument("--warmup-ms", type=float, default=50.0, help="GPU: per row (%(default)s)")
    p.add_argument("--probe-ms", type=float, default=10.0, help="length of a peak probe")
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
    if args.quick:
        vars(args).update(QUICK[kind] | ({"lengths": args.lengths} if args.lengths else {}))
    for name, value in DEFAULTS[kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.threads < 1 or args.samples < 1:
        raise SystemExit(f"--threads {args.threads} --samples {args.samples}: at least 1 each")
    unknown = set(args.dtypes.split(",")) - set(DTYPES)
    if unknown:
        raise SystemExit(f"--dtypes: unknown {', '.join(sorted(unknown))}; of {', '.join(DTYPES)}")
    if args.clock == "cpu" and (args.threads != 1 or kind != "cpu"):
        raise SystemExit(f"--clock cpu --threads {args.threads}: only --threads 1 is allowed")
    if args.save_capture and not args.capture:
        raise SystemExit("--save-capture needs --capture MODEL")
    return args
