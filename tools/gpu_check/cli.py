# SPDX-License-Identifier: Apache-2.0
"""The command line of tools/gpu_check.sh."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from . import probe, report, runner, steps

LOGS = steps.ROOT / "build" / "gpu_check"
EXAMPLES = """\
examples:
  tools/gpu_check.sh                          everything, in at most 10 minutes
  tools/gpu_check.sh --prebuilt               with the libraries and programs that lie here
  tools/gpu_check.sh --list                   the steps
  tools/gpu_check.sh --dry-run                their commands and limits; needs no GPU
  tools/gpu_check.sh --only ptx --only tests  a part of it: writes gpu_check-partial.json
  tools/gpu_check.sh --model ~/models/llama --minutes 20
  PYTHON=~/torch/bin/python PBS_CUDA_ARCHS=80 tools/gpu_check.sh --out ~/check

Results: benchmarks/results/<gpu>/gpu_check.json, rewritten whole after every step, gpu_check.md
beside it, and what the benchmarks save. Whole outputs of the steps: build/gpu_check/<step>.log.

exit status: 0 all that must pass passed; 1 not so; 2 wrong arguments; 3 no GPU that torch can use;
128 + number of the signal that stopped it (130: Ctrl-C). What was measured by then is kept."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="tools/gpu_check.sh",
        description="Check pbs_attn on this machine's NVIDIA GPU: build, test_ptx, GPU tests, "
        "compute-sanitizer, a model, benchmarks. Needs torch with CUDA; installs nothing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several = "run this step alone; may be given again (--list has the names)"
    p.add_argument("--only", action="append", default=[], metavar="STEP", help=several)
    p.add_argument("--list", action="store_true", help="print the steps and stop")
    dry = "print commands and limits and stop; nothing is run"
    p.add_argument("--dry-run", action="store_true", help=dry)
    built = "build nothing; so it is anyway where there is no nvcc"
    p.add_argument("--prebuilt", action="store_true", help=built)
    where = "where results go (benchmarks/results/<gpu>)"
    p.add_argument("--out", type=Path, metavar="DIR", help=where)
    total = "time for all steps together (%(default)s); what no longer fits is recorded as such"
    p.add_argument("--minutes", type=float, default=10.0, help=total)
    real = "folder of a transformers model, instead of 1B random weights"
    p.add_argument("--model", metavar="PATH", help=real)
    commit = "what this tree is, where git cannot say it (a copy without .git)"
    p.add_argument("--commit", metavar="NAME", help=commit)
    return p


def main(arguments=None) -> int:
    args = parser().parse_args(arguments)
    if args.minutes <= 0:
        parser().error(f"--minutes is {args.minutes}; allowed: more than 0")
    if args.model and not Path(args.model).expanduser().is_dir():
        parser().error(f"--model {args.model}: no such folder")
    if args.model:
        args.model = str(Path(args.model).expanduser().resolve())
    if args.list or args.dry_run:
        return show(args)
    try:
        facts = probe.ask()
    except probe.NoGpu as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 3
    return check(args, facts, chosen(args, facts))


def chosen(args, facts: dict) -> list[runner.Step]:
    out = args.out.resolve() if args.out else None
    machine = steps.this_machine(
        facts["gpu"]["capability"], facts["cpus"], args.prebuilt, args.model, out
    )
    every = steps.all_steps(machine)
    names = [step.name for step in every]
    for name in args.only:
        if name not in names:
            parser().error(f"--only {name}: no such step; allowed: {', '.join(names)}")
    return [step for step in every if not args.only or step.name in args.only]


def show(args) -> int:
    facts = {"gpu": {"capability": "9.0"}, "cpus": 1}
    if args.dry_run:
        try:
            facts = probe.ask()
            print(f"on {facts['gpu']['name']}, capability {facts['gpu']['capability']}")
        except probe.NoGpu as error:
            print(f"{error}: commands as for capability 9.0")
    for step in chosen(args, facts):
        kind = "must pass" if step.required else "must not fail" if step.blocks else ""
        print(f"{step.name:<12} {step.what}" + (f" ({kind})" if kind else ""))
        if args.dry_run:
            print(f"{'':<12} at most {step.limit:.0f} s, not begun with less than {step.least:.0f}")
            print(f"{'':<12} {'not here: ' + step.missing if step.missing else step.shown()}")
    if args.dry_run:
        print(f"all together at most {args.minutes:g} minutes")
    return 0


def check(args, facts: dict, todo: list[runner.Step]) -> int:
    """Runs `todo`; prints and writes what came of it."""
    folder = args.out or steps.ROOT / "benchmarks" / "results" / facts["slug"]
    name = "gpu_check-partial" if args.only else "gpu_check"
    about = {key: facts[key] for key in ("gpu", "torch", "python", "cpus", "commit", "uncommitted")}
    about["commit"] = about["commit"] or args.commit or ""
    about["command"] = shlex.join(["tools/gpu_check.sh", *sys.argv[1:]])
    about |= {"minutes": args.minutes, "partial": bool(args.only)}
    path = folder / f"{name}.json"
    required = [step for step in steps.REQUIRED if not args.only or step in args.only]
    work = runner.Check(path, about, required, 60 * args.minutes, LOGS)
    runner.stop_on_signals()
    stopped = 0
    try:
        print(report.heading(work.report), flush=True)
        stopped = work.run(todo, steps.ROOT)
    except runner.Stopped as stop:  # between two steps
        stopped = stop.number
    text = report.markdown(work.report)
    runner.write_whole(path.with_suffix(".md"), text)
    print(f"\n{text}\nsaved {path}")
    return 128 + stopped if stopped else int(not work.report["ok"])
