# SPDX-License-Identifier: Apache-2.0
"""run: one model, one text, several attention methods, one table."""

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace

import torch

from ..eval.attention import using
from . import CommandError, equal_loss, measure, methods, models

EXAMPLES = """\
examples:
  python -m pbs_attn run
      SmolLM2-135M on 8,000 tokens of Newton's Opticks
  python -m pbs_attn run --model ~/models/Llama-3.1-8B --text book.txt --length 32k --dtype bfloat16
  python -m pbs_attn run --method full,pbs:tau=0.8,segment_size=512,identity --json result.json
  python -m pbs_attn run --equal-loss 1%
      beside those: pbs, peak and best at the first setting, from sparse to dense, whose perplexity
      is at most 1% above that of dense

methods:
"""
EXAMPLES += methods.listing()
EXAMPLES += """
Parameters come after a colon: pbs:tau=0.95,block=64; docs/methods.md has those of each method.

density: selected causal blocks, all of them = 100%. same next token: positions whose most likely
next token is the one of the first dense method. copied: tokens whose trigram was last seen more
than 512 tokens before; sparse attention hurts these first. Ctrl-C keeps the finished methods."""

DENSE_KINDS = ("stock", "dense")
METHODS = "sdpa,full,identity,pbs"
METHODS_EQUAL = "sdpa,full,identity:tau=0.9,pbs:tau=0.9,pbs,peak,best"


@dataclass
class Row:
    method: str
    config: dict | None  # {"method": name, parameter: value}; None of dense ones
    ttft_s: float
    attention_s: float
    density: float
    computed: float
    calls: dict  # by route
    reasons: dict  # of the dense route
    loss: float
    copied_loss: float | None
    same_next: float | None = None
    loss_delta: float | None = None
    copied_delta: float | None = None
    tokens: list = field(default_factory=list)
    continuation: str = ""
    tried: list = field(default_factory=list)  # with --equal-loss: [setting, loss_delta] before it
    within: bool | None = None  # the budget; None without one


def add_arguments(parser):
    parser.epilog = EXAMPLES
    models.add_model_arguments(parser)
    parser.add_argument("--method", metavar="LIST", help="comma-separated (default: "
                        f"{METHODS}; with --equal-loss: {METHODS_EQUAL})")  # fmt: skip
    parser.add_argument("--equal-loss", metavar="PERCENT",
                        help="of each method whose threshold is not said, run the settings of a "
                             "short ladder, from sparse to dense, until its perplexity is within "
                             "PERCENT, such as 1%%, of dense")  # fmt: skip
    parser.add_argument("--length", default="8000", help="tokens, e.g. 8000 or 8k (= 8192)")
    parser.add_argument("--new-tokens", type=int, default=10, help="greedy tokens (default 10)")
    parser.add_argument("--repeat", type=int, default=1, help="prefills; the fastest counts")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    methods.add_config_arguments(parser)


class Progress:
    """A bar per prefill on a terminal (with tqdm), else a line per step; nothing when quiet."""

    def __init__(self, is_quiet):
        self.quiet = is_quiet
        self.bar = None
        if not is_quiet and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm

    def say(self, text):
        if not self.quiet:
            print(f"... {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def layers(self, text, total):
        """Yields a function to be called once a layer."""
        if self.bar is None:
            self.say(text)
            yield lambda: None
            return
        with self.bar(total=total, desc=text, unit="layer", leave=False) as bar:
            yield bar.update


def _mean(values, chosen=None):
    if chosen is not None:
        values = values[chosen]
    return float(values.double().mean()) if len(values) else None


def measure_method(model, tokenizer, ids, method, args, progress):
    """(Row, losses, best next tokens) of one method."""
    layers = model.config.get_text_config().num_hidden_layers
    with using(model, method):  # threads, caches and page faults are not what is measured
        measure.prefill(model, ids[:, :512])
    run = None
    for _ in range(max(args.repeat, 1)):
        text = f"{method.label}: prefill of {ids.shape[1]:,} tokens"
        with progress.layers(text, layers) as tick, using(model, method) as calls:
            again = measure.prefill(model, ids, tick)
        run = again if run is None or again.seconds < run.seconds else run
    progress.say(f"{method.label}: loss of every token, {args.new_tokens} new tokens")
    losses, best = measure.token_losses(model, ids, run)
    with using(model, method):
        tokens = measure.generate(model, run, args.new_tokens)
    row = Row(
        method=method.label,
        config=None if method.kind in DENSE_KINDS else method.to_dict(),
        ttft_s=run.seconds,
        attention_s=run.attention_seconds,
        density=1.0 if calls is None else calls.density,
        computed=1.0 if calls is None else calls.computed,
        calls={"stock": layers} if calls is None else dict(calls.calls),
        reasons={} if calls is None else dict(calls.reasons),
        loss=_mean(losses),
        copied_loss=_mean(losses, measure.copied_tokens(ids.cpu())),
        tokens=tokens,
        continuation=tokenizer.decode(tokens),
    )
    return row, losses, best


def measure_within(settings, budget, measure_row, progress):
    """The first Row of `settings`, from sparse to dense, whose loss is within `budget` nats of
    dense; the last if none is. measure_row(setting) gives the Row of one."""
    tried = []
    for setting in settings:
        row = replace(measure_row(setting), tried=list(tried))
        row.within = row.loss_delta <= budget
        change = f"perplexity {equal_loss.percent(row.loss_delta)}"
        progress.say(f"{row.method}: {change}, {'within' if row.within else 'over'} the budget")
        if row.within:
            break
        tried.append([row.method, row.loss_delta])
    return row


def compare(row, best, base_row, base_best):
    """Fill in what is relative to the first dense method."""
    row.same_next = float((best == base_best).double().mean())
    row.loss_delta = row.loss - base_row.loss
    if row.copied_loss is not None:
        row.copied_delta = row.copied_loss - base_row.copied_loss


def _routes(row):
    if "stock" in row.calls:
        return "stock"
    total = sum(row.calls.values()) or 1
    parts = [f"{count / total:.0%} {route}" for route, count in row.calls.items() if count]
    reasons = ", ".join(sorted(row.reasons))
    return ", ".join(parts) + (f" ({reasons})" if reasons else "")


def table(rows):
    """The rows as aligned text."""
    head = ["method", "TTFT", "attention", "density", "calls", "same next", "loss", "copied"]
    lines = [head]
    for row in rows:
        name = row.method + {None: "", True: " (within)", False: " (over)"}[row.within]
        loss, copied = f"{row.loss:.4f}", "-"
        if row.copied_loss is not None:
            copied = f"{row.copied_loss:.3f}"
        if row.loss_delta is not None:
            loss += f" {row.loss_delta:+.4f}"
            copied += "" if row.copied_delta is None else f" {row.copied_delta:+.3f}"
        same = "-" if row.same_next is None else f"{row.same_next:.2%}"
        lines.append(
            [name, f"{row.ttft_s:.2f} s", f"{row.attention_s:.2f} s", f"{row.density:.1%}",
             _routes(row), same, loss, copied]
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in text)


def budget_note(text, rows):
    """What the rows of --equal-loss are, and what was tried before them."""
    found = [row for row in rows if row.within is not None]
    shown = ", ".join(row.method for row in found if row.within) or "none"
    lines = [f"At equal loss, the first setting from sparse to dense whose perplexity is at most "
             f"{text} above dense: {shown}."]  # fmt: skip
    over = [each for row in found for each in row.tried]
    over += [(row.method, row.loss_delta) for row in found if not row.within]
    if over:
        tried = ", ".join(f"{name} {equal_loss.percent(delta)}" for name, delta in over)
        lines.append(f"Over it: {tried}.")
    return "\n".join(lines)


def write_json(path, value, indent=1):
    """`value` as JSON in `path`: the old file or the new one, never half of one."""
    folder = os.path.dirname(os.path.abspath(path))
    handle, part = tempfile.mkstemp(prefix=".pbs_attn-", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=indent)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def cpu_name():
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(args):
    base = methods.base_config(args)
    chosen = methods.parse(args.method or (METHODS_EQUAL if args.equal_loss else METHODS), base)
    budget = chosen_budget(args, chosen)
    length = models.parse_length(args.length)
    if args.threads:
        torch.set_num_threads(args.threads)
    progress = Progress(args.quiet)
    name, text = models.read_text(args.text)
    model, tokenizer = models.load(
        args.model, dtype=args.dtype, device=args.device, say=progress.say,
        trust_remote_code=args.trust_remote_code, allow_pickle=args.allow_pickle,
    )  # fmt: skip
    ids = models.token_ids(tokenizer, text, length).to(args.device)
    if ids.shape[1] < length:
        progress.say(f"the text has {ids.shape[1]:,} tokens, fewer than --length {length:,}")
    from .. import build_info

    info = build_info()
    dtype = str(model.dtype).removeprefix("torch.")
    document = {
        "command": "python -m pbs_attn " + shlex.join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": args.model,
        "dtype": dtype,
        "device": args.device,
        "text": {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "tokens": ids.shape[1],
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        "build": info,
        "rows": [],
    }
    print(f"model    {args.model}, {dtype}, {model.num_parameters() / 1e6:,.0f} M parameters")
    print(f"text     {name}: {ids.shape[1]:,} tokens")
    kernels = "reference.py" if info["backend"] == "ref" else info["isa"].get(dtype, "none")
    print(f"machine  {cpu_name()}, {torch.get_num_threads()} threads, "
          f"kernels {kernels}, torch {torch.__version__}")  # fmt: skip
    sys.stdout.flush()
    if budget is not None:
        document["equal_loss"] = args.equal_loss
    return _measure_all(model, tokenizer, ids, chosen, args, progress, document, budget)


def chosen_budget(args, chosen):
    """Nats of --equal-loss, None without it; CommandError where there is no dense to compare to."""
    if args.equal_loss is None:
        return None
    dense = next((i for i, method in enumerate(chosen) if method.kind in DENSE_KINDS), len(chosen))
    if dense > 0:
        raise CommandError(f"--method begins with {chosen[0].label}; allowed with --equal-loss: a "
                           "dense one first, full or sdpa")  # fmt: skip
    return equal_loss.parse_budget(args.equal_loss, "--equal-loss")


def _measure_all(model, tokenizer, ids, chosen, args, progress, document, budget):
    rows, base, status, known = [], None, 0, {}

    def measure_row(method):
        nonlocal base
        row, _, best = measure_method(model, tokenizer, ids, method, args, progress)
        if base is None and method.kind in DENSE_KINDS:
            base = (row, best)
        elif base is not None:
            compare(row, best, *base)
        known[method] = row
        return row

    def measure_once(method):  # a ladder may come by a setting that has a row of its own
        return replace(known.get(method) or measure_row(method), method=method.label)

    try:
        for method in chosen:
            dense = method.kind in DENSE_KINDS
            settings = [] if budget is None or dense else equal_loss.ladder(method)
            if settings:
                row = measure_within(settings, budget, measure_once, progress)
            else:
                row = measure_row(method)
            rows.append(row)
            document["rows"] = [asdict(row) for row in rows]
            if args.json:
                write_json(args.json, document)
    except KeyboardInterrupt:
        progress.say("interrupted; these had finished:")
        status = 130
    finally:
        if rows:
            copied = int(measure.copied_tokens(ids.cpu()).sum())
            print(f"\n{table(rows)}\n")
            print(f"copied: {copied} of {ids.shape[1] - 1:,} tokens. "
                  "loss and copied: nats per token, then the change.")  # fmt: skip
            if budget is not None:
                print(budget_note(args.equal_loss, rows))
            width = max(len(row.method) for row in rows)
            for row in rows:
                print(f"{row.method:<{width}}  {row.continuation!r}")
    return status
