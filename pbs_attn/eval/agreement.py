# SPDX-License-Identifier: Apache-2.0
"""agreement: does the model say the same as with dense attention?

The first tokens of greedy replies to many prompts, dense beside every method; needs no gold answer.
Dense is run twice, so its own record says how far two runs of the same thing agree.
"""

import hashlib
import json
import statistics
from pathlib import Path

from .. import methods
from ..cli import CommandError, measure
from . import parallel, ppl, scores, tables, texts
from .jobs import BadRow, Job, Plan, prompt_cost

NAME = "agreement"
HELP = "greedy tokens that equal dense attention's, and KL at the first of them"
DEFAULT_METHODS = "full,identity,pbs"
EXAMPLES = """\
  python -m pbs_attn eval agreement --lengths 1k --windows 4 --new-tokens 8
      SmolLM2-135M on windows of the text that the package ships
  python -m pbs_attn eval agreement --model DIR --data hotpotqa.jsonl --limit 50
      rows with a prompt, or with context and question or input, or with an input alone"""


def add_arguments(parser):
    ppl.add_text_arguments(parser, "2k", 4)
    parser.add_argument("--data", nargs="+", metavar="FILE",
                        help="rows of JSON lines instead of texts: prompt, or context with "
                             "question or input, or input (LongBench, RULER)")  # fmt: skip
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N",
                        help="greedy tokens per prompt (%(default)s)")  # fmt: skip


def prepare(args, tokens):
    """A job per window of a text, or per row of --data."""
    if args.new_tokens < 1:
        raise CommandError(f"--new-tokens is {args.new_tokens}; allowed: 1 or more")
    if args.data and args.text:
        raise CommandError("--text and --data are given; allowed: one of them")
    jobs, notes, digests = [], [], {}
    if args.data:
        for path in args.data:
            name, digest, lines = read_rows(path, digests)
            digests[name] = digest
            jobs += [_row_job(name, path, number, line, args) for number, line in lines]
    else:
        found = texts.load(args.text)
        digests = {text.name: text.sha256 for text in found}
        lengths = texts.parse_lengths(args.lengths)
        ppl.check_window(lengths, tokens.window, args.new_tokens)
        for text, start, ids in ppl.windows(found, lengths, args, tokens, notes):
            cost = prompt_cost(len(ids), args.new_tokens)
            jobs.append(Job(NAME, text.name, str(start), len(ids), cost, {"ids": ids.tolist()}))
    if not jobs:
        raise CommandError("nothing to run:\n  " + "\n  ".join(notes or ["the data is empty"]))
    notes.insert(0, "reference: full, run twice: its own line says how far two runs agree; plain "
                 "prompts, no chat template; replies end at the model's end tokens")  # fmt: skip
    return Plan(jobs, {"texts": digests, "new_tokens": args.new_tokens}, notes)


def read_rows(path, taken=()):
    """(task name, SHA-256, [(line number, text)]) of a JSON lines file."""
    try:
        raw = Path(path).read_bytes()
        lines = raw.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--data {path}: {error}") from error
    name = Path(path).stem
    while name in taken:
        name += "+"
    found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return name, hashlib.sha256(raw).hexdigest(), found


def _row_job(name, path, number, line, args):
    """The row is parsed by work: one bad line is a failed record. Four characters a token."""
    cost = prompt_cost(len(line) / 4, args.new_tokens)
    return Job(NAME, name, str(number), 0, cost, {"path": str(path), "line": line})


def prompt_of(line, where):
    """The prompt in a row of JSON lines; BadRow names `where` and the field."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadRow(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadRow(f"{where}: not an object but a {type(row).__name__}")
    asked = [row.get(name) for name in ("question", "input")]
    asked = next((text for text in asked if isinstance(text, str) and text), None)
    if isinstance(row.get("prompt"), str) and row["prompt"]:
        return row["prompt"]
    if isinstance(row.get("context"), str) and row["context"]:
        return "\n\n".join(filter(None, (row["context"], asked)))
    if asked is None:
        raise BadRow(f"{where}: has no text in prompt, context, question or input")
    return asked


def prompt(tokens, job, args):
    """(ids, info) of one prompt; too long ones lose their head, as --max-prompt says."""
    if "ids" in job.payload:
        return job.payload["ids"], {"tokens": len(job.payload["ids"]), "cut": 0}
    where = f"{job.payload['path']}, line {job.id}"
    ids = tokens.encode(prompt_of(job.payload["line"], where))
    if len(ids) < 2:
        raise BadRow(f"{where}: the prompt has {len(ids)} tokens; allowed: 2 or more")
    room = None if tokens.window is None else tokens.window - args.new_tokens
    limit = min((x for x in (tokens.max_prompt, room) if x is not None), default=len(ids))
    if limit < 2:
        raise CommandError(f"--new-tokens {args.new_tokens} leaves no room for a prompt")
    ids, cut = tokens.truncate_left(ids, limit)
    return ids, {"tokens": len(ids), "cut": cut}


def work_all(session, chosen, job, args):
    """Dense, dense again if its own record is wanted, then every method beside it."""
    ids, info = prompt(session.tokens, job, args)
    dense = next((m for m in chosen if m.kind == "dense"), None) or methods.get("full")
    ranks = parallel.Group(args.tp, session.device)
    base = reply(session, dense, ids, args.new_tokens)
    for method in sorted(chosen, key=lambda m: m is not dense):
        try:
            found = reply(session, method, ids, args.new_tokens)
            record = compare(found, base) | {"text": session.tokens.decode(found["tokens"])}
            record |= {"prompt_tokens": len(ids), "cut_tokens": info["cut"]}
            yield method, record | ranks.over_heads(found["cost"])
        except Exception as error:
            yield method, error


def reply(session, method, ids, count):
    """{tokens: greedy, up to the first end token; first: log-probabilities; cost: fields}."""
    with session.using(method) as calls:
        run = measure.prefill(session.model, session.tensor(ids))
    cost = {"prefill_s": run.seconds, **session.counts(calls)}
    first = scores.last_row(session.model, run)
    with session.using(method):
        tokens = measure.generate(session.model, run, count)
    ends = set(session.eos())
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return {"tokens": tokens[:stop], "first": first, "cost": cost}


def compare(found, base):
    """Record fields of two replies."""
    ours, theirs = found["tokens"], base["tokens"]
    same = 0
    while same < min(len(ours), len(theirs)) and ours[same] == theirs[same]:
        same += 1
    return {
        "first_same": ours[0] == theirs[0],
        "same_tokens": same,
        "n": len(theirs),
        "identical": ours == theirs,
        "tokens": ours,
        "kl_first": float(scores.divergence(base["first"], found["first"])),
    }


def describe(job, record):
    """For --show."""
    name = f"{job.task} {job.id}" + (f" @{job.length:,}" if job.length else "")
    return (f"{name}: {record['same_tokens']} of {record['n']} tokens as dense, "
            f"KL {record['kl_first']:.4f}: {record['text']!r}")  # fmt: skip


def running(records):
    """For the progress bar."""
    found = [r["first_same"] for r in records if r["status"] == "ok"]
    return f"first same {statistics.mean(found):.0%}" if found else ""


def summary(records, labels):
    """A table per length, all rows of --data in one."""
    heads = ["method", "first same", "95%", "prefix", "identical", "KL first", "density",
             "computed", "rows"]  # fmt: skip
    return tables.by_length(records, labels, heads, _line)


def _line(rows):
    from scipy.stats import binomtest

    same = sum(r["first_same"] for r in rows)
    low, high = binomtest(same, len(rows)).proportion_ci(method="wilson")
    length = sum(r["same_tokens"] for r in rows) / len(rows)
    return [
        f"{same / len(rows):.1%}",
        f"{low:.0%} to {high:.0%}",
        f"{length:.1f} of {tables.average(rows, 'n'):.1f}",
        f"{tables.average(rows, 'identical'):.1%}",
        f"{tables.average(rows, 'kl_first'):.4f}",
        f"{tables.average(rows, 'density'):.1%}",
        f"{tables.average(rows, 'computed'):.1%}",
        str(len(rows)),
    ]
