# SPDX-License-Identifier: Apache-2.0
"""longbench2: LongBench v2, 503 four-choice questions over 8K to 2M words.

One question is 0.2 points and the standard error of a score 2 points: read paired comparisons
(`report --against full`), not the score. Failed rows stay in the denominator; the official script
drops them.
"""

import torch

from ..cli import CommandError, measure
from . import metrics, recipes, sources
from .jobs import BadRow, Job, Plan, prompt_cost, row_score
from .longbench import generated, reply
from .recipes import RECIPES

NAME = "longbench2"
HELP = "LongBench v2, 503 four-choice questions: official, with reasoning, or by log-likelihood"
DEFAULT_METHODS = "full,pbs"
EXAMPLES = """\
  python -m pbs_attn eval longbench2 --model DIR --data data.json --method full,pbs,pbs+
  python -m pbs_attn eval longbench2 --model DIR --data data.json --mode cot --temperature 0.1
      the official second protocol, at the official temperature (greedy without it)
  python -m pbs_attn eval longbench2 --model DIR --data hub --mode loglik
      one prefill a row, no decoding: cheap, sensitive, and not the official protocol"""

ROWS = 503
PROMPTS = {"0shot": "0shot", "cot": "0shot_cot", "no-context": "0shot_no_context",
           "rag": "0shot_rag", "loglik": "0shot"}  # fmt: skip
NEW_TOKENS, REASONING_TOKENS = 128, 1024  # official; OpenCompass runs to its model's max_out_len
OPENCOMPASS_TOKENS = 2048
COLUMNS = {"easy": "difficulty", "hard": "difficulty",
           "short": "length", "medium": "length", "long": "length"}  # fmt: skip


def add_arguments(parser):
    parser.add_argument("--data", required=True, metavar="PATH|hub", help="data.json, a .jsonl or "
                        ".parquet file, or hub: the Hugging Face cache")  # fmt: skip
    parser.add_argument("--mode", choices=list(PROMPTS), default="0shot",
                        help="protocol; loglik is not an official one (%(default)s)")  # fmt: skip
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="official",
                        help="opencompass: its prompt, left cut and lenient extraction, as in the "
                        "paper (%(default)s)")  # fmt: skip
    parser.add_argument("--chunks", type=int, default=5, metavar="N", help="--mode rag: the best N "
                        "of a row's `retrieved_context` (%(default)s)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T",
                        help="0: greedy (default); official: 0.1")  # fmt: skip


def prepare(args, tokens):
    """A job per question; see jobs.Plan. Raises CommandError."""
    recipe = RECIPES[args.recipe]
    if args.recipe == "opencompass" and args.mode != "0shot":
        raise CommandError(f"--mode {args.mode} has no --recipe opencompass; allowed: 0shot")
    if not args.temperature >= 0:
        raise CommandError(f"--temperature is {args.temperature}; allowed: 0 or more")
    if args.chunks < 1:
        raise CommandError(f"--chunks is {args.chunks}; allowed: 1 or more")
    if args.mode == "loglik":
        _letters(tokens)
    else:
        tokens.chat([{"role": "user", "content": "?"}])  # a model without template: now, not later
    table = sources.longbench2(args.data, sources.CHUNKS if args.mode == "rag" else None)
    if not table.rows:
        raise CommandError(f"--data {args.data} has no rows")
    limit = prompt_limit(args, tokens)
    jobs = [_job(row, args, limit) for row in table.rows]
    identity = {"recipe": recipe.name, "mode": args.mode, "prompt_limit": limit,
                "temperature": args.temperature, "data": {NAME: table.sha256}}  # fmt: skip
    if args.mode == "rag":
        identity["chunks"] = args.chunks
    return Plan(jobs, identity, _notes(args, limit, table))


def _notes(args, limit, table):
    protocol = f"mode {args.mode}, recipe {args.recipe}"
    if args.mode == "loglik":
        protocol += ": log-likelihood of A-D after 'Answer:'; not the official protocol"
    elif args.recipe == "official" and args.temperature != 0.1:
        protocol += f", temperature {args.temperature:g} (official: 0.1)"
    side = "on the left" if args.recipe == "opencompass" else "in the middle"
    notes = [protocol, f"prompts of more than {limit:,} tokens are cut {side}"]
    if len(table.rows) != ROWS:
        notes.append(f"a part of the benchmark: {len(table.rows)} of {ROWS} questions")
    bad = [row.error for row in table.rows if row.error]
    notes += [f"bad row: {error}" for error in bad[:5]]
    if len(bad) > 5:
        notes.append(f"bad rows: {len(bad)} in all")
    return notes


def new_tokens(args):
    """Tokens of the first reply."""
    if args.recipe == "opencompass":
        return OPENCOMPASS_TOKENS
    return {"cot": REASONING_TOKENS, "loglik": 1}.get(args.mode, NEW_TOKENS)


def prompt_limit(args, tokens):
    """The longest prompt in tokens: --max-prompt, else the recipe's for the model's window."""
    if tokens.max_prompt is not None:
        return tokens.max_prompt
    recipe = RECIPES[args.recipe]
    return recipe.limit(tokens.window or 2 * recipe.cap, new_tokens(args))


def _job(row, args, limit):
    meta, size = {}, 0
    if row.data is not None:
        meta = {name: row.data[name] for name in ("domain", "sub_domain", "difficulty", "length")}
        if args.mode != "no-context":
            size = min(limit, len(row.data["context"].encode()) // 4)  # about a token
    cost = prompt_cost(size, new_tokens(args))
    payload = {"row": row.data, "error": row.error, "meta": meta}
    return Job(NAME, NAME, row.id, cost=cost, payload=payload)


def question(row, args, reasoning=None):
    """The prompt of a row, a text. reasoning: of the first turn, for the second one of cot."""
    if args.recipe == "opencompass":  # placeholder by placeholder, nothing stripped
        text = recipes.data("opencompass", "longbench2.txt")
        for name in ("question", "context", *(f"choice_{x}" for x in metrics.LETTERS)):
            text = text.replace(f"{{{name}}}", row[name])
        return text
    context = row["context"]
    if args.mode == "rag":
        chunks = sorted(row["retrieved_context"][: args.chunks], key=lambda chunk: chunk["c_idx"])
        context = "\n\n".join(
            f"Retrieved chunk {i}: {chunk['content']}" for i, chunk in enumerate(chunks, 1)
        )
    name = PROMPTS[args.mode] if reasoning is None else "0shot_cot_ans"
    text = recipes.data("longbench2", name + ".txt")
    if args.mode == "loglik":  # in place of the words on the format of the reply
        text = text.rpartition("\n\n")[0] + "\n\nAnswer:"
    values = {"$DOC$": context, "$Q$": row["question"]}
    values |= {f"$C_{letter}$": row[f"choice_{letter}"] for letter in metrics.LETTERS}
    for mark, value in values.items():
        text = text.replace(mark, value.strip())
    return text if reasoning is None else text.replace("$COT$", reasoning)


def truncate(tokens, text, limit):
    """(text, cut_tokens) as v2's pred.py: first and last half of `limit` ids, decoded together.

    For an odd limit the last part is the longer one; v1 (Tokens.truncate_middle) differs in both.
    """
    ids = tokens.encode(text)
    if len(ids) <= limit:
        return text, 0
    return tokens.decode(ids[: limit // 2] + ids[len(ids) - (limit + 1) // 2 :]), len(ids) - limit


def prompt(tokens, job, args, reasoning=None):
    """(ids of the prompt, {"prompt_tokens", "cut_tokens"}) of one row. Raises BadRow."""
    row, limit = job.payload["row"], prompt_limit(args, tokens)
    if row is None:
        raise BadRow(job.payload["error"])
    text, cut = question(row, args, reasoning), 0
    if args.recipe == "official":
        text, cut = truncate(tokens, text, limit)
    if args.mode == "loglik":
        ids = tokens.encode(text)
    else:
        ids = tokens.chat([{"role": "user", "content": text}])
    if args.recipe == "opencompass":
        ids, cut = tokens.truncate_left(ids, limit)
    return ids, {"prompt_tokens": len(ids), "cut_tokens": cut}


def work(session, method, job, args):
    """Answer and score one question; the fields of its record. Raises BadRow, PromptTooLong."""
    ids, info = prompt(session.tokens, job, args)
    answer = job.payload["row"]["answer"]
    if args.mode == "loglik":
        found, fields = _likeliest(session, method, ids, answer)
    else:
        found, fields = _written(session, method, job, args, ids)
    return {
        "score": float(found == answer), "metric": "choice", "recipe": args.recipe,
        "mode": args.mode, "pred_used": found, "answers": [answer],
        "compensated": metrics.compensated(found, answer),
        **info, **fields, "meta": job.payload["meta"],
    }  # fmt: skip


def _written(session, method, job, args, ids):
    """(letter or None, fields) of a generated answer; with cot the second turn's."""
    lenient = args.recipe == "opencompass"
    out = session.generate(ids, method, max_new_tokens=new_tokens(args),
                           temperature=args.temperature, past_window=lenient)  # fmt: skip
    fields = {"pred": reply(session, out, lenient), **generated(out)}
    if args.mode == "cot":
        reasoning = out.text.strip()
        ids, _ = prompt(session.tokens, job, args, reasoning)
        last = session.generate(ids, method, max_new_tokens=NEW_TOKENS,
                                temperature=args.temperature)  # fmt: skip
        fields |= {"pred": last.text, "reasoning": reasoning, "stop": last.stop,
                   "new_tokens": len(out.tokens) + len(last.tokens),
                   "total_s": out.total_s + last.total_s}  # fmt: skip
    found = (metrics.first_option if lenient else metrics.choice)(fields["pred"].strip())
    return found, fields


def _letters(tokens):
    """(ids that " A" to " D" begin with, the one id in which each differs)."""
    ids = [tokens.encode(f" {letter}", special=False) for letter in metrics.LETTERS]
    shared, last = ids[0][:-1], [x[-1] for x in ids]
    if any(x[:-1] != shared for x in ids) or len(set(last)) < len(last):
        raise CommandError("--mode loglik needs a tokenizer in which the letters A to D differ in "
                           "one token")  # fmt: skip
    return shared, last


def _likeliest(session, method, ids, answer):
    """(most likely letter, fields) of one prefill."""
    shared, last = _letters(session.tokens)
    ids = ids + shared
    session.tokens.check(len(ids), 1)
    run, counts = session.prefill(ids, method)
    with torch.inference_mode(), measure.lm_head(session.model, run.output_type) as head:
        logits = head(run.hidden[:, -1:])[-1]
        chances = logits.log_softmax(-1)[last].tolist()
    found = metrics.LETTERS[max(range(4), key=chances.__getitem__)]
    fields = {"pred": found, "logprobs": dict(zip(metrics.LETTERS, chances, strict=True)),
              "new_tokens": 0, "stop": "length", "first_token": run.next_token,
              "prefill_s": run.seconds, "total_s": run.seconds, **counts}  # fmt: skip
    return found, fields


def describe(job, record):
    """Question, reply, letter and answer of one record, for --show."""
    return (
        f"  question    {job.payload['row']['question'].strip()[-300:]}\n"
        f"  prediction  {record['pred']!r}\n"
        f"  letter      {record['pred_used']}, right is {record['answers'][0]}"
    )


def accuracies(records):
    """{column: (right, rows)}: overall, by difficulty and length, and compensated.

    Failed rows count as wrong, and as such in the compensated score, too.
    """
    found = {"overall": (sum(map(row_score, records)), len(records))}
    for name, field in COLUMNS.items():
        here = [r for r in records if r.get("meta", {}).get(field) == name]
        found[name] = (sum(map(row_score, here)), len(here))
    ok = [r["compensated"] for r in records if r["status"] == "ok"]
    found["compensated"] = (sum(ok), len(records))
    return found


def running(records):
    """Questions right so far, method by method."""
    parts = []
    for label in dict.fromkeys(record["method"] for record in records):
        scores = [row_score(r) for r in records if r["method"] == label]
        parts.append(f"{label} {sum(scores):.0f}/{len(scores)}")
    return " ".join(parts)


def summary(records, labels):
    """Percent by column, one line per method, with the number of questions of every column."""
    from tabulate import tabulate

    by_label = {label: [r for r in records if r["method"] == label] for label in labels}
    first = next((r for r in records if "mode" in r), {})
    mode, recipe = first.get("mode", "?"), first.get("recipe", "?")
    rows, lines = [], []
    for label, here in by_label.items():
        columns = accuracies(here)
        unread = sum(r["status"] == "ok" and r["pred_used"] is None for r in here)
        values = [f"{100 * right / n:.1f}" if n else "-" for right, n in columns.values()]
        rows.append([label, len(here), *values, unread])
        bad = [r["status"] for r in here if r["status"] != "ok"]
        if bad:
            kinds = ", ".join(f"{bad.count(kind)} {kind}" for kind in dict.fromkeys(bad))
            lines.append(f"INCOMPLETE: {label} failed on {len(bad)} of {len(here)} questions "
                         f"({kinds}); they count as wrong")  # fmt: skip
    most = max(by_label.values(), key=len, default=[])
    sizes = ["questions", "", *(n for _, n in accuracies(most).values()), ""]
    heads = ["method", "n", *accuracies([]), "no letter"]
    align = ["left", *["right"] * (len(heads) - 1)]
    table = tabulate([sizes, *rows], heads, disable_numparse=True, colalign=align)
    name = f"LongBench v2, mode {mode}" + (f", recipe {recipe}" if mode != "loglik" else "")
    if len(most) != ROWS:
        name = f"A sample of {name} ({len(most)} of {ROWS} questions): compare methods only"
    if mode == "loglik":
        name += "; not the official protocol"
    return "\n".join([name, table, *lines])
