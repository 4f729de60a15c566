# SPDX-License-Identifier: Apache-2.0
"""ppl: the loss of every token of a text, method by method, paired with dense.

Every token is a sample, nothing is generated, no template and no metric stands in between: the
most sensitive of the benches, and the one that says something on small models. Tokens that repeat
something said long before (`copied`) get a column of their own; sparse prefill hurts them first.
"""

import copy
import statistics

from .. import methods
from ..cli import CommandError, measure
from . import parallel, scores, tables, texts
from .jobs import Job, Plan, prompt_cost

NAME = "ppl"
HELP = "loss of any text per token, whole, by position and on copied tokens, paired with dense"
DEFAULT_METHODS = "full,identity,pbs"
EXAMPLES = """\
  python -m pbs_attn eval ppl --lengths 1k
      SmolLM2-135M on the text that the package ships
  python -m pbs_attn eval ppl --model DIR --text book.txt --lengths 8k..64k --method full,pbs,pbs+
  python -m pbs_attn eval ppl --text book.txt --lengths 8k --prefix 4k
      the second half of 8K by the method, behind a dense prefix"""


def add_arguments(parser):
    add_text_arguments(parser, "2k,4k", 1)
    parser.add_argument("--prefix", metavar="N", help="prefill the first N tokens dense, the rest "
                        "by the method behind that cache; loss of the rest")  # fmt: skip


def add_text_arguments(parser, lengths, windows):
    """--text, --lengths, --start, --windows: also agreement's."""
    parser.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 texts; FILE.jsonl#ROW: "
                        "the field context of a row (a number from 0, or its _id), also in "
                        "DATA.zip/FILE.jsonl; demo: Newton's Queries, shipped with the package "
                        "(default)")  # fmt: skip
    parser.add_argument("--lengths", default=lengths, metavar="LIST",
                        help="tokens: 2k,3000 or 8k..64k, which doubles (%(default)s)")  # fmt: skip
    parser.add_argument("--start", type=int, default=0, metavar="N",
                        help="first token of the first window (0)")  # fmt: skip
    parser.add_argument("--windows", type=int, default=windows, metavar="N",
                        help="windows side by side per text and length (%(default)s)")  # fmt: skip


def prepare(args, tokens):
    """A job per text, length and window; too short texts are skipped and said."""
    found = texts.load(args.text)
    lengths = texts.parse_lengths(args.lengths)
    prefix = parse_prefix(args.prefix, lengths)
    check_window(lengths, tokens.window)
    jobs, notes = [], []
    for text, start, ids in windows(found, lengths, args, tokens, notes):
        # A prefill and the head over every row.
        cost = prompt_cost(len(ids))
        jobs.append(Job(NAME, text.name, str(start), len(ids), cost, {"ids": ids}))
    if not jobs:
        raise CommandError("no text is long enough:\n  " + "\n  ".join(notes))
    identity = {"texts": {text.name: text.sha256 for text in found}, "prefix": prefix}
    notes.insert(0, "reference: full; loss in nats per token; copied: trigram last seen more than "
                 f"{measure.COPY_DISTANCE} tokens before; errors over blocks of "
                 f"{scores.BLOCK} tokens")  # fmt: skip
    if prefix:
        notes.insert(1, f"the first {prefix:,} tokens are prefilled dense; loss of the rest")
    return Plan(jobs, identity, notes)


def parse_prefix(text, lengths):
    """Tokens of --prefix, 0 for None; below every length by 2 or more."""
    if text is None:
        return 0
    try:
        prefix = texts.parse_lengths(text)
    except CommandError:
        prefix = []
    if len(prefix) != 1 or prefix[0] > lengths[0] - 2:
        raise CommandError(f"--prefix is {text!r}; allowed: 2 to {lengths[0] - 2} tokens, "
                           "2 below the shortest of --lengths")  # fmt: skip
    return prefix[0]


def check_window(lengths, window, new_tokens=0):
    """Raises CommandError for lengths that the model has no positions for."""
    if window is not None and lengths[-1] + new_tokens > window:
        room = f", less the {new_tokens} new tokens" if new_tokens else ""
        raise CommandError(f"--lengths has {lengths[-1]:,}; allowed: up to {window:,}, the window "
                           f"of the model{room}")  # fmt: skip


def windows(found, lengths, args, tokens, notes):
    """Yields (text, start, ids [length]) of every window; appends to `notes` what does not fit."""
    if args.windows < 1 or args.start < 0:
        raise CommandError(f"--windows is {args.windows}, --start is {args.start}; "
                           "allowed: at least 1 window, a start >= 0")  # fmt: skip
    for text in found:
        bos, ids = texts.token_ids(tokens, text.text)
        for length in lengths:
            step = length - len(bos)
            chosen = texts.starts(len(ids), step, args.start, args.windows)
            if len(chosen) < args.windows:
                notes.append(
                    f"{text.name} has {len(ids):,} tokens: {len(chosen)} of {args.windows} windows "
                    f"of {length:,}"
                )
            for start in chosen:
                yield text, start, texts.window(bos, ids, start, length)


def work_all(session, chosen, job, args):
    """Dense once, whether its record is wanted or not, then every method beside it."""
    ids = session.tensor(job.payload["ids"])
    prefix = parse_prefix(args.prefix, [job.length])
    dense = next((m for m in chosen if m.kind == "dense"), None) or methods.get("full")
    cache = None
    if prefix:
        with session.using(dense):
            cache = measure.prefill(session.model, ids[:, :prefix]).cache
    ranks = parallel.Group(args.tp, session.device)
    run, counts = _prefill(session, dense, ids, prefix, cache)
    cost = _cost(run, ranks.over_heads(counts))
    base = scores.score(session.model, ids[:, prefix:], run)
    reference = scores.Reference(run)
    copied = measure.copied_tokens(ids.cpu())[prefix:]
    for method in sorted(chosen, key=lambda m: m is not dense):
        try:
            if method is dense:
                yield method, fields(base, None, copied, prefix) | cost
                continue
            run, counts = _prefill(session, method, ids, prefix, cache)
            found = scores.score(session.model, ids[:, prefix:], run, reference)
            record = fields(found, base, copied, prefix)
            yield method, record | _cost(run, ranks.over_heads(counts))
            del run
        except Exception as error:
            yield method, error


def _prefill(session, method, ids, prefix, cache):
    """(Prefill of the rows from `prefix` on, counts); a cache that is given stays as it is."""
    with session.using(method) as calls:
        run = measure.prefill(session.model, ids[:, prefix:], cache=copy.deepcopy(cache))
    run.cache = None  # nothing is generated
    return run, session.counts(calls)


def _cost(run, counts):
    return {"prefill_s": run.seconds, "attention_s": run.attention_seconds, **counts}


def fields(found, base, copied, first=0):
    """Record fields of Scores beside those of dense; base None: these are dense's own.

    copied bool [n - 1]; first: position of the first row.
    """
    record = {
        "tokens": len(found.losses),
        "loss": scores.mean(found.losses),
        "block_losses": scores.block_means(found.losses),
        "bands": scores.bands(found.losses, first),
        "copied_loss": scores.mean(found.losses, copied),
        "copied_tokens": int(copied.sum()),
        "prefix": first,
    }
    if base is None:
        same = {"delta": 0.0, "delta_se": 0.0, "kl": 0.0, "same_next": 1.0}
        some = 0.0 if record["copied_tokens"] else None
        return record | same | {"copied_delta": some, "copied_delta_se": some, "worst": 0.0}
    delta = found.losses.double() - base.losses.double()
    record["delta"], record["delta_se"] = scores.difference(delta)
    record["copied_delta"], record["copied_delta_se"] = scores.difference(delta, copied)
    record["band_deltas"] = [
        [start, end, *scores.difference(delta[start - first : end - first])]
        for start, end, _ in record["bands"]
    ]
    record["kl"] = scores.mean(found.kl)
    record["same_next"] = scores.mean(found.best == base.best)
    record["worst"] = float(delta.max())
    return record


def prompt(tokens, job, args):
    """(ids, info) for --dry-run."""
    prefix = parse_prefix(args.prefix, [job.length])
    return job.payload["ids"].tolist(), {"tokens": job.length, "prefix": prefix, "cut": 0}


def describe(job, record):
    """One line for --show."""
    return (f"{job.task} @{job.id} {job.length:,}: loss {record['loss']:.4f} "
            f"{record['delta']:+.4f}, density {record['density']:.1%}")  # fmt: skip


def running(records):
    """For the progress bar: the mean change of the loss."""
    found = [r["delta"] for r in records if r["status"] == "ok"]
    return f"loss {statistics.mean(found):+.4f}" if found else ""


def summary(records, labels):
    """A table per length: means over the windows that every method finished."""
    heads = ["method", "loss", "change", "copied", "change", "KL", "same next", "density",
             "computed", "prefill"]  # fmt: skip
    return tables.by_length(records, labels, heads, _line)


def _line(rows):
    return [
        tables.number(tables.average(rows, "loss"), ".4f"),
        tables.with_error(*tables.pooled(rows, "delta", "tokens")),
        tables.number(tables.average(rows, "copied_loss", "copied_tokens"), ".3f"),
        tables.with_error(*tables.pooled(rows, "copied_delta", "copied_tokens"), digits=3),
        tables.number(tables.average(rows, "kl"), ".4f"),
        tables.number(tables.average(rows, "same_next"), ".2%"),
        tables.number(tables.average(rows, "density"), ".1%"),
        tables.number(tables.average(rows, "computed"), ".1%"),
        tables.number(tables.average(rows, "prefill_s"), ".2f") + " s",
    ]
