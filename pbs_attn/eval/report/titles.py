# SPDX-License-Identifier: Apache-2.0
"""What a section may be called. The one place that decides whether a heading names a benchmark.

A heading like "LongBench" is read as a result that can be compared with other people's. It is used
only where the model is of a size that such results are made with and every official row was run;
everything else is a smoke run and says what it is short of.
"""

from .. import recipes, ruler_tasks
from .load import meta, model_name, parameters

SCORED = ("longbench", "longbench2", "ruler")  # the benches with a score per row
SMALL = 1_000_000_000  # parameters; below, task scores are near zero and say nothing of a method
NAMES = {
    "longbench": "LongBench",
    "longbench2": "LongBench v2",
    "ruler": "RULER",
    "ppl": "Perplexity",
    "agreement": "Agreement with dense",
    "ttft": "Time to first token",
}
LONGBENCH2_ROWS = 503  # data.json


E_TASKS = tuple(f"{task}_e" for task in recipes.TASKS_E)


def name(section):
    """The name of what the rows are from."""
    return "LongBench-E" if is_e(section) else NAMES.get(section.bench, section.bench)


def is_e(section):
    """Is this a run of LongBench-E? The size of its official set is not in its documents."""
    tasks = section.tasks()
    return section.bench == "longbench" and bool(tasks) and all(t.endswith("_e") for t in tasks)


def official_rows(section):
    """(rows of the official set in this run, rows of that set); None: there is no such set."""
    if section.bench == "longbench2":
        return len(section.keys), LONGBENCH2_ROWS
    if section.bench == "ruler":
        official = (
            len(ruler_tasks.tasks()) * ruler_tasks.OFFICIAL_SAMPLES * len(ruler_tasks.LENGTHS)
        )
        return sum(length in ruler_tasks.LENGTHS for *_, length in section.keys), official
    if section.bench == "longbench" and not is_e(section):
        rows = sum(task in recipes.TASKS for task, *_ in section.keys)
        return rows, sum(task.rows for task in recipes.TASKS.values())
    return None


def shortcomings(section):
    """Why this run is no result of its benchmark: phrases, empty where it is one."""
    found = []
    count = parameters(section.info)
    if count is None:
        found.append("size of the model not recorded")
    elif count < SMALL:
        found.append(f"{count / 1e6:,.0f}M parameters")
    rows = official_rows(section)
    if rows is not None and rows[0] < rows[1]:
        found.append(f"{rows[0]:,} of {rows[1]:,} official rows")
    limits = [run.get("limit") for run in section.runs if run.get("limit") is not None]
    if limits and (rows is None or rows[0] >= rows[1]):
        found.append(f"--limit {max(limits)}")
    missing = set(E_TASKS) - set(section.tasks())
    if is_e(section) and missing:
        found.append(f"{len(E_TASKS) - len(missing)} of {len(E_TASKS)} tasks")
    made = {meta(record)["label"] for record in section.records() if "label" in meta(record)}
    if section.bench == "ruler" and made != {"ruler-official"}:
        found.append("rows made here")
    if section.identity.get("mode") == "loglik":
        found.append("mode loglik, not the official protocol")
    if not section.complete():
        found.append("INCOMPLETE")
    return found


def short(section):
    """What a picture is headed with, which may be shown without its report."""
    model = model_name(section.info)
    if section.bench in SCORED and shortcomings(section):
        return f"smoke run on {name(section)} rows, {model}"
    return f"{name(section)}, {model}"


def heading(section):
    """The heading of a section: "RULER: Llama-3.1-8B", or a smoke run with its reasons."""
    bench, model = name(section), model_name(section.info)
    if section.bench not in SCORED:
        return f"{bench}: {model}" + ("" if section.complete() else " (INCOMPLETE)")
    reasons = shortcomings(section)
    if not reasons:
        return f"{bench}: {model}"
    return f"Smoke run on {bench} rows, not a {bench} result: {model} ({'; '.join(reasons)})"
