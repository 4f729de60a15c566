# SPDX-License-Identifier: Apache-2.0
"""longbench: LongBench v1 (21 tasks) and LongBench-E, by the official recipe or by OpenCompass'.

Numbers of the two recipes differ by tens of points on the same model; a record says which one it
is of, a run folder holds one, and every average carries its label.
"""

import importlib.util

from ..cli import CommandError, missing
from . import metrics, recipes, sources
from .jobs import BadRow, Job, Plan, prompt_cost, row_score
from .recipes import BUCKETS, CATEGORIES, RECIPES, TASKS, TASKS_E, averages

__all__ = ["CATEGORIES", "TASKS", "averages"]

NAME = "longbench"
HELP = "LongBench v1, 21 tasks, and LongBench-E: official recipe, or OpenCompass' as in the paper"
DEFAULT_METHODS = "full,pbs"
EXAMPLES = """\
  python -m pbs_attn eval longbench --model DIR --data data.zip --method full,pbs,pbs+
      everything: 4,750 rows a method; --limit 20 for a first look
  python -m pbs_attn eval longbench --model DIR --data data.zip --tasks qa,code --dry-run
      one whole prompt per task with its tokens and cuts; no weights are loaded
  python -m pbs_attn eval longbench --model DIR --data hub --recipe opencompass
      the paper's harness; data from the Hugging Face cache
  python -m pbs_attn eval longbench --model DIR --data data.zip --tasks e
      LongBench-E: 13 tasks by length"""

GROUPS = {
    "all": lambda name, task: True,
    "qa": lambda name, task: task.category.endswith(" qa"),
    "single-doc": lambda name, task: task.category == "single-doc qa",
    "multi-doc": lambda name, task: task.category == "multi-doc qa",
    "summarization": lambda name, task: task.category == "summarization",
    "few-shot": lambda name, task: task.category == "few-shot",
    "synthetic": lambda name, task: task.category == "synthetic",
    "code": lambda name, task: task.category == "code",
    "en": lambda name, task: task.language == "en",
    "zh": lambda name, task: task.language == "zh",
}


def add_arguments(parser):
    parser.add_argument("--data", required=True, metavar="PATH|hub", help="data.zip, a folder with "
                        "<task>.jsonl, one such file, or hub: the Hugging Face cache")  # fmt: skip
    parser.add_argument("--tasks", default="all", metavar="LIST",
                        help="tasks, or qa, summarization, few-shot, synthetic, code, en, zh, all; "
                        "e: LongBench-E (%(default)s)")  # fmt: skip
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="official",
                        help="prompts, cuts, template rule and metrics (%(default)s)")  # fmt: skip
    parser.add_argument("--official-zero", action="store_true", help="score ROUGE as the harnesses "
                        "do: Python's recursion limit, failures are 0")  # fmt: skip


def parse_tasks(text):
    """(task names in the benchmark's order, "_e" for LongBench-E or "").

    'qa,lcc' -> the eight QA tasks and lcc; 'e' -> LongBench-E; 'e,qa' -> its QA tasks.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    e = "e" in words
    words = [word for word in words if word != "e"] or (["all"] if e else [])
    unknown = [word for word in words if word not in TASKS and word not in GROUPS]
    if unknown or not words:
        raise CommandError(
            f"--tasks has {unknown[0] if unknown else ''!r}; allowed: {', '.join(GROUPS)}, e, "
            + ", ".join(TASKS)
        )
    chosen = [
        name for name, task in TASKS.items()
        if any(word == name or (word in GROUPS and GROUPS[word](name, task)) for word in words)
    ]  # fmt: skip
    absent = [word for word in words if e and word in TASKS and word not in TASKS_E]
    if absent:
        raise CommandError(f"--tasks e has no {absent[0]}; allowed: {', '.join(TASKS_E)}")
    return [name for name in chosen if not e or name in TASKS_E], "_e" if e else ""


def prepare(args, tokens):
    """A job per row of the chosen tasks; see jobs.Plan. Raises CommandError."""
    tasks, suffix = parse_tasks(args.tasks)
    recipe = RECIPES[args.recipe]
    need_packages(tasks, recipe.name)
    if any(task not in recipe.plain for task in tasks):
        tokens.chat([{"role": "user", "content": "?"}])  # a model without template: now, not later
    tables = sources.longbench(args.data, tasks, list(TASKS), suffix)
    limit = prompt_limit(recipe, tokens)
    jobs = [
        _job(task, suffix, row, limit, recipe) for task in tasks for row in tables[task].rows
    ]  # fmt: skip
    if not jobs:
        raise CommandError(f"--data {args.data} has no rows")
    identity = {
        "recipe": recipe.name,
        "prompt_limit": limit,
        "official_zero": bool(args.official_zero),
        "data": {task + suffix: tables[task].sha256 for task in tasks},
    }
    return Plan(jobs, identity, _notes(recipe, limit, tasks, tables, suffix))


def _notes(recipe, limit, tasks, tables, suffix):
    notes = [f"recipe {recipe.name}: {recipe.about}",
             f"prompts of more than {limit:,} tokens are cut "
             + ("in the middle" if recipe.truncate == "middle" else "on the left")]  # fmt: skip
    part = [f"{task} {len(tables[task].rows)} of {TASKS[task].rows}" for task in tasks
            if not suffix and len(tables[task].rows) != TASKS[task].rows]  # fmt: skip
    if part:
        notes.append("a part of the benchmark: " + ", ".join(part))
    bad = [row.error for task in tasks for row in tables[task].rows if row.error]
    notes += [f"bad row: {error}" for error in bad[:5]]
    if len(bad) > 5:
        notes.append(f"bad rows: {len(bad)} in all")
    return notes


def need_packages(tasks, variant):
    """Raises CommandError if a package that scores one of `tasks` is not installed."""
    for name in recipes.language_packages(tasks, variant):
        if importlib.util.find_spec(name) is None:
            users = [task for task in tasks if name in recipes.language_packages([task], variant)]
            raise CommandError(f"{', '.join(users)} cannot be scored: {missing(name)}; "
                               "or leave them out with --tasks")  # fmt: skip


def prompt_limit(recipe, tokens):
    """The longest prompt in tokens: --max-prompt, else the recipe's for the model's window."""
    if tokens.max_prompt is not None:
        return tokens.max_prompt
    longest = max(recipe.new_tokens(task) for task in TASKS)
    return recipe.limit(tokens.window or recipe.cap + longest + 80, longest)


def _job(task, suffix, row, limit, recipe):
    meta = {"category": CATEGORIES[task], "language": TASKS[task].language}
    size = 0
    if row.data is not None:
        meta["words"] = row.data["length"]
        size = min(limit, len(row.data["context"].encode()) // 4)  # about a token
        if suffix:
            meta["bucket"] = recipes.bucket(row.data["length"])
    payload = {"row": row.data, "error": row.error, "meta": meta, "task": task}
    cost = prompt_cost(size, recipe.new_tokens(task))
    return Job(NAME, task + suffix, row.id, cost=cost, payload=payload)


def prompt(tokens, job, args):
    """(ids of the prompt, {"prompt_tokens", "cut_tokens"}) of one row. Raises BadRow."""
    recipe, task, row = RECIPES[args.recipe], job.payload["task"], job.payload["row"]
    if row is None:
        raise BadRow(job.payload["error"])
    text, cut, limit = recipe.prompt(task, row), 0, prompt_limit(recipe, tokens)
    if recipe.truncate == "middle":
        text, cut = tokens.truncate_middle(text, limit)
    if task in recipe.plain:
        ids = tokens.encode(text)
    else:
        ids = tokens.chat([{"role": "user", "content": text}])
    if recipe.truncate == "left":
        ids, cut = tokens.truncate_left(ids, limit)
    return ids, {"prompt_tokens": len(ids), "cut_tokens": cut}


def work(session, method, job, args):
    """Generate and score one row; the fields of its record. Raises BadRow, MetricError."""
    recipe, task = RECIPES[args.recipe], job.payload["task"]
    ids, info = prompt(session.tokens, job, args)
    row, ends = job.payload["row"], ()
    if task in recipe.newline_ends:
        ends = (session.tokens.encode("\n", special=False)[-1],)
    out = session.generate(
        ids, method, max_new_tokens=recipe.new_tokens(task), extra_eos=ends,
        min_new_tokens=1 if ends else 0, past_window=recipe.truncate == "left",
    )  # fmt: skip
    pred = reply(session, out, recipe.keep_special)
    used = metrics.used(task, pred)
    metric = TASKS[task].metric
    score = metrics.score(metric, used, row["answers"], row["all_classes"],
                          variant=recipe.name, zero=args.official_zero)  # fmt: skip
    return {
        "score": score, "metric": metric, "recipe": recipe.name, "pred": pred, "pred_used": used,
        "answers": row["answers"], **info, **generated(out), "meta": job.payload["meta"],
    }  # fmt: skip


def reply(session, out, keep_special):
    """The text of a generation; keep_special: as OpenCompass, up to the first end token's text."""
    if not keep_special:
        return out.text
    tokenizer = session.tokens.tokenizer
    text = tokenizer.decode(out.tokens)
    for stop in {tokenizer.decode([token]) for token in session.eos()} | {tokenizer.eos_token}:
        text = text.split(stop)[0] if stop else text
    return text


def generated(out):
    """What a Generated adds to a record."""
    return {
        "new_tokens": len(out.tokens), "stop": out.stop, "prefill_s": out.prefill_s,
        "total_s": out.total_s, "density": out.density, "computed": out.computed,
        "calls": out.calls, "reasons": out.reasons, "peak_gb": out.peak_gb,
        "first_token": out.tokens[0] if out.tokens else None,
    }  # fmt: skip


def describe(job, record):
    """Question, prediction, answers and score of one record, for --show."""
    question = (job.payload["row"]["input"] or job.payload["row"]["context"]).strip()
    return (
        f"  question    ...{question[-300:]}\n"
        f"  prediction  {record['pred_used']!r}\n"
        f"  answers     {record['answers']!r}\n"
        f"  {record['metric']}  {100 * record['score']:.2f}"
    )


def task_scores(records):
    """{task: 100 x mean score}; failed rows count 0."""
    found = {}
    for record in records:
        found.setdefault(record["task"], []).append(row_score(record))
    return {task: 100 * sum(scores) / len(scores) for task, scores in found.items()}


def running(records):
    """The mean over tasks so far, method by method."""
    parts = []
    for label in dict.fromkeys(record["method"] for record in records):
        scores = task_scores(r for r in records if r["method"] == label).values()
        parts.append(f"{label} {sum(scores) / len(scores):.1f}")
    return " ".join(parts)


def summary(records, labels):
    """Scores by task and every average under its label; what is missing is said."""
    from tabulate import tabulate

    plain = [record for record in records if not record["task"].endswith("_e")]
    parts = []
    if plain:
        by_label = {x: [r for r in plain if r["method"] == x] for x in labels}
        scores = {label: task_scores(found) for label, found in by_label.items()}
        counts = {task: max(sum(r["task"] == task for r in found) for found in by_label.values())
                  for task in TASKS}  # fmt: skip
        rows = [[task, CATEGORIES[task], count, *(scores[x].get(task) for x in labels)]
                for task, count in counts.items() if count]  # fmt: skip
        means = {label: averages(found) for label, found in scores.items()}
        known = [name for name in averages({}) if any(means[x][name] is not None for x in labels)]
        rows += [[name, "average", "", *(means[x][name] for x in labels)] for name in known]
        table = tabulate(rows, ["task", "", "rows", *labels], floatfmt=".2f", missingval="-")
        parts.append(f"{_heading(plain, counts)}\n{table}")
    if len(plain) < len(records):
        parts.append(_summary_e([r for r in records if r["task"].endswith("_e")], labels))
    return "\n\n".join(parts + _failed(records, labels))


def _heading(records, counts):
    recipe = next((r["recipe"] for r in records if "recipe" in r), "?")
    done, all_rows = sum(counts.values()), sum(task.rows for task in TASKS.values())
    if all(counts[name] in (0, task.rows) for name, task in TASKS.items()):
        return f"LongBench, recipe {recipe}, {done:,} of {all_rows:,} rows"
    return (f"A sample of LongBench rows ({done:,} of {all_rows:,}), recipe {recipe}: "
            "compare methods with each other, not with published scores")  # fmt: skip


def _summary_e(records, labels):
    from tabulate import tabulate

    rows = []
    for task in (name for name in TASKS_E if any(r["task"] == name + "_e" for r in records)):
        for name in BUCKETS:
            here = [r for r in records if r["task"] == task + "_e"]
            here = [r for r in here if r.get("meta", {}).get("bucket", BUCKETS[2]) == name]
            means = [_mean([row_score(r) for r in here if r["method"] == x]) for x in labels]
            if here:
                most = max(sum(r["method"] == x for r in here) for x in labels)
                rows.append([task, name, most, *means])
    for name in BUCKETS:
        columns = zip(*(row[3:] for row in rows if row[1] == name), strict=True)
        means = [_mean([x for x in c if x is not None], 1) for c in columns]
        rows += [["mean over tasks", name, "", *means]] if means else []
    recipe = next((r["recipe"] for r in records if "recipe" in r), "?")
    table = tabulate(rows, ["task", "words", "rows", *labels], floatfmt=".2f", missingval="-")
    return f"LongBench-E, recipe {recipe}, by length in words\n{table}"


def _mean(values, scale=100):
    return scale * sum(values) / len(values) if values else None


def _failed(records, labels):
    lines = []
    for label in labels:
        here = [r for r in records if r["method"] == label]
        bad = [r["status"] for r in here if r["status"] != "ok"]
        if bad:
            kinds = ", ".join(f"{bad.count(kind)} {kind}" for kind in dict.fromkeys(bad))
            lines.append(f"INCOMPLETE: {label} failed on {len(bad)} of {len(here)} rows ({kinds}); "
                         "they count 0")  # fmt: skip
    return lines
