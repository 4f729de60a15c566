# SPDX-License-Identifier: Apache-2.0
"""ruler: needles, variable chains, word counts and questions in texts of a given length.

Reads RULER's own files (labelled ruler-official) or makes rows by itself (ruler-generated): six
tasks from a word list, five more from essays, two from SQuAD and HotpotQA files. Prompts, new
tokens and scores are RULER's; the random draws are not, so a generated row is no official row.
"""

import hashlib

from ..cli import CommandError
from . import (
    metrics,
    ruler_files,
    ruler_generate,
    ruler_scores,
    ruler_tasks,
    ruler_text,
    texts,
)
from .jobs import BadRow, Job, Plan, prompt_cost, row_score
from .longbench import generated
from .tables import average, number

NAME = "ruler"
HELP = "RULER: needles, chains, counts and questions at 4K to 128K; official files or generated"
DEFAULT_METHODS = "full,pbs"
EXAMPLES = """\
  python -m pbs_attn eval ruler --lengths 2k --tasks niah_single_1 --samples 3
      SmolLM2-135M on generated needles
  python -m pbs_attn eval ruler --model DIR --lengths 4k..128k --haystack essays/ \\
          --squad dev-v2.0.json --hotpot hotpot_dev_distractor_v1.json
      all 13 tasks
  python -m pbs_attn eval ruler --model DIR --data RULER/synthetic/
  python -m pbs_attn eval ruler --model DIR --lengths 8k --write rows/
      only writes the rows, as RULER's jsonl"""
SOURCES = {  # what tasks need: option and reader
    "words": ruler_text.read_words,
    "haystack": ruler_text.read_haystack,
    "squad": ruler_text.read_squad,
    "hotpot": ruler_text.read_hotpot,
}


def add_arguments(parser):
    add = parser.add_argument_group("RULER").add_argument
    add("--data", metavar="FILE|DIR", help="RULER's own jsonl; without it rows are generated")
    add("--tasks", metavar="LIST", help="task names, or all, self (six that need no files), niah, "
        "essay, qa (default: all that the given files allow)")  # fmt: skip
    add("--lengths", metavar="LIST", help="tokens, new ones and chat template included: 4k,8k or "
        "4k..128k, which doubles (default: RULER's six that fit the window)")  # fmt: skip
    add("--samples", type=int, default=100, metavar="N", help="rows per task and length "
        f"(%(default)s; RULER has {ruler_tasks.OFFICIAL_SAMPLES})")  # fmt: skip
    add("--words", metavar="FILE|DIR", help="word list (default: the package wonderwords)")
    add("--haystack", metavar="FILE|DIR", help="essays: PaulGrahamEssays.json, a text file, or a "
        "folder of .txt; for five niah tasks")  # fmt: skip
    add("--squad", metavar="FILE", help="dev-v2.0.json, for qa_1")
    add("--hotpot", metavar="FILE", help="hotpot_dev_distractor_v1.json, for qa_2")
    add("--write", metavar="DIR", help="write the generated rows as RULER's jsonl, DIR/LENGTH/TASK/"
        "validation.jsonl, and run nothing")  # fmt: skip


def prepare(args, tokens):
    """A job per task, length and sample. Raises CommandError for what cannot be had."""
    if args.samples < 1:
        raise CommandError(f"--samples is {args.samples}; allowed: 1 or more")
    tables, identity, notes = (_official if args.data else _generated)(args, tokens)
    if args.write:
        return _write(args, tables, notes)
    tokens.chat([{"role": "user", "content": ""}])  # says at once if there is no chat template
    jobs = []
    for (task, length), table in tables.items():
        new = ruler_tasks.tasks()[task].new_tokens
        rows = min(args.samples, len(table)) if args.data else args.samples
        jobs += [
            Job(NAME, task, str(i), length, prompt_cost(length - new, new), {"table": table})
            for i in range(rows)
        ]
    missing = [task for task in ruler_tasks.tasks() if all(task != name for name, _ in tables)]
    if missing:
        notes.append(
            f"without {', '.join(missing)}: means are over {13 - len(missing)} of 13 tasks"
        )
    return Plan(jobs, {"templates": ruler_tasks.SHA256, **identity}, notes)


def _official(args, tokens):
    """(tables, identity, notes) of --data."""
    for name in ("words", "haystack", "squad", "hotpot", "write"):
        if getattr(args, name):
            raise CommandError(f"--{name} is for generated rows; --data gives rows that are made")
    tables = ruler_files.find(args.data)
    there = ", ".join(f"{task} at {length}" for task, length in tables)
    if args.tasks:
        wanted = ruler_tasks.chosen(args.tasks)
        lacking = set(wanted) - {task for task, _ in tables}
        if lacking and "all" not in args.tasks:
            raise CommandError(
                f"--data {args.data} has no {', '.join(sorted(lacking))}; it has {there}"
            )
        tables = {key: table for key, table in tables.items() if key[0] in wanted}
    if args.lengths:
        lengths = texts.parse_lengths(args.lengths)
        lacking = set(lengths) - {length for _, length in tables}
        if lacking:
            raise CommandError(
                f"--data {args.data} has no length {sorted(lacking)[0]}; it has {there}"
            )
        tables = {key: table for key, table in tables.items() if key[1] in lengths}
    _check_lengths({length for _, length in tables}, tokens)
    order = list(ruler_tasks.tasks())
    tables = dict(sorted(tables.items(), key=lambda item: (item[0][1], order.index(item[0][0]))))
    data = {f"{task}@{length}": table.sha256 for (task, length), table in tables.items()}
    labels = " and ".join(sorted({table.label for table in tables.values()}))
    most = max(map(len, tables.values()))
    notes = [f"{labels}: {min(args.samples, most)} of {most} rows per task and length"]
    return tables, {"data": data, "texts": {}}, notes


def _generated(args, tokens):
    """(tables, identity, notes) of rows made here."""
    given = {name for name in ("haystack", "squad", "hotpot") if getattr(args, name)} | {"words"}
    if args.tasks:
        names = ruler_tasks.chosen(args.tasks)
        for name in names:
            for need in sorted(ruler_tasks.tasks()[name].needs - given):
                raise CommandError(f"--tasks: {name} needs --{need}; --tasks self needs no file")
    else:
        names = [name for name, task in ruler_tasks.tasks().items() if task.needs <= given]
    lengths = _lengths(args, tokens)
    needs = set().union(*(ruler_tasks.tasks()[name].needs for name in names))
    sources = {need: SOURCES[need](getattr(args, need)) for need in sorted(needs)}
    tables, data = {}, {}
    for length in lengths:
        for name in names:
            table = ruler_generate.Generated(name, length, sources, tokens, args.seed)
            tables[name, length] = table
            used = [table.version, *(sources[need].digest for need in sorted(table.task.needs))]
            data[f"{name}@{length}"] = hashlib.sha256(" ".join(used).encode()).hexdigest()
    identity = {"data": data, "texts": {need: found.digest for need, found in sources.items()}}
    return tables, identity, _generated_notes(args, sources, lengths)


def _generated_notes(args, sources, lengths):
    notes = [
        f"ruler-generated: {args.samples} of {ruler_tasks.OFFICIAL_SAMPLES} rows per task and "
        f"length, seed {args.seed}; made here, not RULER's own rows"
    ]
    if "words" in sources:
        words = sources["words"]
        same = words.digest == ruler_text.WONDERWORDS_SHA256
        which = " (3.0.1)" if same else "" if args.words else ": not those of 3.0.1"
        notes.append(f"words: {len(words.every):,} of {words.origin}{which}, {words.digest[:12]}")
    if "haystack" in sources:
        hay = sources["haystack"]
        notes.append(f"haystack: {len(hay.words):,} words of {hay.origin}, {hay.digest[:12]}; "
                     "sentences by our own rule, not NLTK's")  # fmt: skip
        if len(hay.words) < max(lengths) // 2:
            notes.append("the haystack is repeated at the longer lengths: periodic text is easier")
    for name in ("squad", "hotpot"):
        if name in sources:
            found = sources[name]
            notes.append(f"{name}: {len(found.items):,} questions, {len(found.docs):,} documents "
                         f"of {found.origin}, {found.digest[:12]}")  # fmt: skip
    return notes


def _lengths(args, tokens):
    if args.lengths:
        lengths = texts.parse_lengths(args.lengths)
        if not args.write:
            _check_lengths(lengths, tokens)
        return lengths
    fitting = [n for n in ruler_tasks.LENGTHS if n <= (tokens.window or n)]
    if not fitting:
        raise CommandError(f"the window of {tokens.name} is {tokens.window:,}; RULER's lengths "
                           "begin at 4,096: --lengths gives shorter ones")  # fmt: skip
    return fitting


def _check_lengths(lengths, tokens):
    """A RULER prompt is never cut: what is asked for may stand in the part that goes."""
    for limit, name in ((tokens.window, "the window"), (tokens.max_prompt, "--max-prompt")):
        if limit is not None and max(lengths) > limit:
            raise CommandError(f"a length is {max(lengths):,}, {name} is {limit:,}: RULER's "
                               "prompts are never cut; give shorter --lengths")  # fmt: skip


def _write(args, tables, notes):
    samples = min(args.samples, args.limit or args.samples)
    for table in tables.values():
        notes.append(f"wrote {ruler_files.write(args.write, table, samples)}")
    return Plan([], {}, notes)


def _row(job):
    return job.payload["table"].row(int(job.id))


def work(session, method, job, args):
    """Fields of the record: greedy reply of the task's number of tokens, and its score in 0..1."""
    task, row = ruler_tasks.tasks()[job.task], _row(job)
    ids = ruler_generate.prompt_ids(session.tokens, row.input, row.answer_prefix)
    window = session.tokens.window
    if window is not None and len(ids) + task.new_tokens > window:
        raise BadRow(
            f"{job.task} {job.length} row {job.id}: {len(ids)} tokens and {task.new_tokens} new "
            f"ones, the window is {window}; RULER's prompts are never cut"
        )
    out = session.generate(ids, method, max_new_tokens=task.new_tokens)
    used = metrics.ruler_clean(out.text)
    meta = {"label": job.payload["table"].label, **row.meta}
    if task.family == "niah":
        meta["depth"] = row.depth()
    return {
        "score": getattr(metrics, task.metric)(used, row.outputs),
        "metric": task.metric,
        "pred": out.text,
        "pred_used": used,
        "answers": list(row.outputs),
        "prompt_tokens": len(ids),
        "cut_tokens": 0,
        **generated(out),
        "meta": meta,
    }


def prompt(tokens, job, args):
    """(ids, info) for --dry-run."""
    task, row = ruler_tasks.tasks()[job.task], _row(job)
    ids = ruler_generate.prompt_ids(tokens, row.input, row.answer_prefix)
    info = {"new_tokens": task.new_tokens, "length": job.length}
    return ids, info | {"answers": list(row.outputs)}


def describe(job, record):
    """Question, reply, references and score, for --show."""
    row = _row(job)
    question = row.input[-200:].replace("\n", " ")
    return (f"{job.task} {job.length:,} row {job.id} {record['method']}: {record['score']:.2f}\n"
            f"  asked  ...{question}{row.answer_prefix}\n  reply  {record['pred_used']!r}\n"
            f"  wanted {', '.join(record['answers'])}")  # fmt: skip


def running(records):
    """For the progress bar: the mean score of each method so far."""
    found = {}
    for record in records:
        found.setdefault(record["method"], []).append(row_score(record))
    return ", ".join(f"{name} {100 * sum(s) / len(s):.1f}" for name, s in found.items())


def summary(records, labels):
    """Scores by task and length, every method below the other; then means, each with its tasks."""
    from tabulate import tabulate

    if not records:
        return "no rows"
    lengths = sorted({record["length"] for record in records})
    scores = {
        label: ruler_scores.by_task([r for r in records if r["method"] == label])
        for label in labels
    }
    names = [n for n in ruler_tasks.tasks() if any(n == record["task"] for record in records)]
    body = [
        [task, label, *(_cell(scores[label].get(n, {}).get(task)) for n in lengths)]
        + [_density(r for r in records if (r["task"], r["method"]) == (task, label))]
        for task in names
        for label in labels
    ]
    for label in labels:
        # A length that lacks a task has no mean: it would be over other tasks than its neighbours'.
        whole = {n: cell for n, cell in scores[label].items() if len(cell) == len(names)}
        means = ruler_scores.by_length(whole)
        body.append([f"mean of {len(names)} of 13", label, *(_cell(means.get(n)) for n in lengths)])
        body[-1].append(_density(r for r in records if r["method"] == label))
    heads = ["task", "method", *(f"{length:,}" for length in lengths), "density"]
    parts = [_title(records), tabulate(body, headers=heads, disable_numparse=True)]
    if len(lengths) > 1:
        parts += [_means(label, scores[label], lengths, names) for label in labels if scores[label]]
    missing = [name for name in ruler_tasks.tasks() if name not in names]
    if missing:
        parts.append(f"no RULER average: without {', '.join(missing)}")
    return "\n".join(parts + _gaps(records, labels))


def _cell(value):
    return "-" if value is None else f"{value:.1f}"


def _density(records):
    """Mean share of causal blocks that was kept, over the rows that worked."""
    return number(average(list(records), "density"), ".1%")


def _title(records):
    labels = sorted({r["meta"]["label"] for r in records if "label" in r.get("meta", {})})
    rows = {}
    for record in records:
        key = record["method"], record["task"], record["length"]
        rows[key] = rows.get(key, 0) + 1
    span = sorted({min(rows.values()), max(rows.values())})
    return (f"{' and '.join(labels)}: share of the answers found x 100, "
            f"{' to '.join(map(str, span))} rows per task and length")  # fmt: skip


def _means(label, scores, lengths, names):
    """One line of means over lengths; nothing is averaged over lengths that lack a task."""
    holes = [f"{task} at {n}" for n in lengths for task in names if task not in scores.get(n, {})]
    if holes:
        return f"{label}: no mean over lengths, without {', '.join(holes[:5])}"
    means = ruler_scores.averages(ruler_scores.by_length(scores))
    text = ", ".join(f"{name} {value:.1f}" for name, value in means.items())
    return f"{label}: {text} (over {len(lengths)} lengths and {len(names)} of 13 tasks)"


def _gaps(records, labels):
    lines = []
    for label in labels:
        bad = [r for r in records if r["method"] == label and r["status"] != "ok"]
        if bad:
            total = sum(r["method"] == label for r in records)
            kinds = ", ".join(sorted({r["status"] for r in bad}))
            lines.append(f"INCOMPLETE: {label} has {total - len(bad)} of {total} rows ({kinds}); "
                         "the others count 0")  # fmt: skip
    return lines
