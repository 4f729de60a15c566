# SPDX-License-Identifier: Apache-2.0
"""Tables of the benches with a score per row: LongBench, LongBench v2, RULER.

A maker returns (scopes, tables). A scope is what a score and a difference are taken over: {name:
[(weight, keys)]}; its score is the sum of weight x mean score of the rows of each part.
"""

from .. import recipes, ruler_scores, ruler_tasks
from .load import meta
from .table import Column, Table

BANDS = (0, 4096, 8192, 16384, 32768, 65536, None)  # prompt tokens
AVERAGES = {  # label of recipes.averages: what it is
    "official EN": "mean of the six category means, English (code counts in both languages)",
    "official ZH": "the same, Chinese",
    "opencompass": "mean of six category means, languages pooled: the paper's Avg.",
    "flat-16": "flat mean of the 16 English and code tasks, as KV-cache papers print it",
}
NOTE_AVERAGES = "No average is the average: " + "; ".join(f"{k}: {v}" for k, v in AVERAGES.items())
ALL_TASKS, OVERALL, AVERAGE = "mean of the {} tasks run", "overall", "Avg"


def weighted(view, label, strata):
    """The score of a scope, or None where a part has no row."""
    means = [(weight, view.mean(label, keys)) for weight, keys in strata if weight]
    if not means or any(mean is None for _, mean in means):
        return None
    return sum(weight * mean for weight, mean in means)


def mean_of(parts):
    """The scope that is the plain mean of several lists of keys."""
    parts = [keys for keys in parts if keys]
    return [(1 / len(parts), keys) for keys in parts]


def keys_of(strata):
    return [key for _, keys in strata for key in keys]


def main_scope(scopes):
    """The scope that a picture shows: all that ran; None where there is no scope."""
    names = [name for name in scopes if name in (OVERALL, AVERAGE) or name.startswith("mean of")]
    return names[0] if names else None


def main_scopes(scopes):
    """All that ran, and every average: what a reader looks at first."""
    averages = [name for name in scopes if name.startswith(("average: ", "wAvg"))]
    return [name for name in (main_scope(scopes), *averages) if name]


def by_scope(view, slug, title, scopes, spec=".2f", notes=()):
    """A table of scores, scope x method, and the paper's columns after ours where asked for."""
    columns = [Column("scope"), Column("rows", "d")]
    columns += [Column(label, spec) for label in view.labels]
    rows = [
        [scope, len(keys_of(strata)), *(weighted(view, label, strata) for label in view.labels)]
        for scope, strata in scopes.items()
    ]
    keys = list(dict.fromkeys(key for strata in scopes.values() for key in keys_of(strata)))
    return Table(slug, title, columns, rows, [view.caption(keys), *notes])


# ---- LongBench --------------------------------------------------------------------------------
def longbench(view):
    """Tasks, categories with the averages, length bands, and LongBench-E's buckets."""
    section = view.section
    present = section.tasks()
    order = [*recipes.TASKS, *(f"{task}_e" for task in recipes.TASKS_E)]
    tasks = [task for task in order if task in present] + [t for t in present if t not in order]
    by_task = {task: [(1.0, section.where(task))] for task in tasks}
    categories = _categories(section, [task for task in tasks if task in recipes.TASKS])
    means = averages(section)
    whole = {ALL_TASKS.format(len(tasks)): mean_of([section.where(task) for task in tasks])}
    found = [_task_table(view, by_task)]
    if categories:
        table = by_scope(view, "categories", "Categories and averages", {**categories, **means},
                         notes=[NOTE_AVERAGES])  # fmt: skip
        found.append(view.beside(table))
    bands = length_bands(view)
    found.append(band_table(view, bands))
    buckets = _buckets(section, [task for task in tasks if task.endswith("_e")])
    if buckets:
        found.append(by_scope(view, "buckets", "LongBench-E: by the length of the row", buckets))
    scopes = {**by_task, **categories, **means, **whole, **buckets}
    return scopes | {f"prompts {name}": strata for name, strata in bands.items()}, found


def _task_table(view, by_task):
    table = by_scope(view, "tasks", "Tasks", by_task)
    table.columns.insert(1, Column("category"))
    table.columns.insert(2, Column("metric"))
    for row in table.rows:
        task = recipes.TASKS.get(row[0].removesuffix("_e"))
        row[1:1] = [task.category, task.metric] if task else [None, None]
    return table


def _categories(section, tasks):
    """{category: mean of its tasks that ran}, both languages pooled."""
    names = dict.fromkeys(recipes.CATEGORIES.values())
    groups = {n: [t for t in tasks if recipes.CATEGORIES[t] == n] for n in names}
    return {n: mean_of([section.where(t) for t in group]) for n, group in groups.items() if group}


def averages(section):
    """{"average: <label>": scope} of the averages whose tasks are all there.

    An average is linear in the task scores, so its weights are its values on unit vectors.
    """
    tasks = [task for task in section.tasks() if task in recipes.TASKS]
    unit = {t: recipes.averages({other: float(other == t) for other in tasks}) for t in tasks}
    found = {}
    for label in AVERAGES:
        weights = [(unit[task][label], section.where(task)) for task in tasks]
        if weights and all(weight is not None for weight, _ in weights):
            found[f"average: {label}"] = [part for part in weights if part[0]]
    return found


def _buckets(section, tasks):
    """{"0-4k": mean over tasks of the rows in this bucket}, by the length of the data."""
    length = {
        key: recipes.bucket(meta(record)["words"])
        for rows in section.rows.values() for key, record in rows.items()
        if "words" in meta(record)
    }  # fmt: skip
    found = {}
    for name in recipes.BUCKETS:
        parts = [[k for k in section.where(t) if length.get(k) == name] for t in tasks]
        if any(parts):
            found[f"E {name}"] = mean_of(parts)
    return found


# ---- prompt lengths ---------------------------------------------------------------------------
def length_bands(view):
    """{"4K to 8K tokens": scope} by the prompt tokens of the rows, as any method recorded them."""
    tokens = {}
    for rows in view.section.rows.values():
        for key, record in rows.items():
            if record.get("prompt_tokens") is not None:
                tokens.setdefault(key, record["prompt_tokens"])
    found = {}
    for start, end in zip(BANDS, BANDS[1:], strict=False):
        inside = [
            key for key in view.section.keys
            if key in tokens and start <= tokens[key] and (end is None or tokens[key] < end)
        ]  # fmt: skip
        if inside:
            name = f"{start // 1024}K to {end // 1024}K" if end else f"{start // 1024}K or more"
            name = name if start else f"under {end // 1024}K"
            found[f"{name} tokens"] = [(1.0, inside)]
    return found


def band_table(view, bands):
    """Scores and densities by prompt length: short rows say nothing of sparsity at long ones."""
    table = by_scope(view, "bands", "By length of the prompt", bands,
                     notes=["Mean over rows, whatever their task. `d`: density."])  # fmt: skip
    for label in view.labels:
        table.columns.append(Column(f"d {label}", ".3f"))
        for row in table.rows:
            row.append(view.average(label, "density", keys_of(bands[row[0]])))
    return table


# ---- LongBench v2 -----------------------------------------------------------------------------
def longbench2(view):
    """Overall, by difficulty and length of the data, and the compensated score; in percent."""
    known = {}
    for rows in view.section.rows.values():
        known |= {key: meta(record) for key, record in rows.items() if meta(record)}
    scopes = {OVERALL: [(1.0, list(view.section.keys))]}
    for name, values in (("difficulty", ("easy", "hard")), ("length", ("short", "medium", "long"))):
        for value in values:
            keys = [k for k in view.section.keys if known.get(k, {}).get(name) == value]
            if keys:
                scopes[value] = [(1.0, keys)]
    bands = length_bands(view)
    table = by_scope(view, "accuracy", "Accuracy, percent", scopes, ".1f",
                     ["One question of 503 is 0.2 points, the standard error of their score 2 "
                      "points. Compensated: a reply without an answer counts 0.25."])  # fmt: skip
    table.rows.append(["compensated", len(view.section.keys),
                       *(_compensated(view, label) for label in view.labels)])  # fmt: skip
    scopes |= {f"prompts {name}": strata for name, strata in bands.items()}
    return scopes, [view.beside(table), band_table(view, bands)]


def _compensated(view, label):
    """The official compensated score (result.py): 0.25 for a reply in which nothing was found."""
    scores = []
    for key in view.usable(label, view.section.keys):
        record = view.section.record(label, key)
        scores.append(0.0 if record is None else 100.0 * record["compensated"])
    return sum(scores) / len(scores) if scores else None


# ---- RULER ------------------------------------------------------------------------------------
def ruler(view):
    """Length x method, and for every method task x length; averages are means of task means."""
    section = view.section
    order, lengths = list(ruler_tasks.tasks()), section.lengths()
    tasks = sorted(section.tasks(), key=lambda t: order.index(t) if t in order else len(order))
    cells = {(t, n): section.where(t, n) for t in tasks for n in lengths}
    by_length = {str(n): mean_of([cells[t, n] for t in tasks]) for n in lengths}
    holes = [f"{task} at {n}" for (task, n), keys in cells.items() if not keys]
    average = {} if holes else _ruler_averages(by_length)
    title = f"By length: mean of {len(tasks)} of {len(order)} tasks"
    notes = ["Avg: mean over lengths; wAvg inc and dec: weights that rise and fall with length."]
    if holes:
        notes = [f"No mean over lengths: no row of {', '.join(holes)}."]
    table = by_scope(view, "lengths", title, {**by_length, **average}, notes=notes)
    found = [view.beside(table)]
    columns = [Column("method"), Column("task"), Column("rows", "d")]
    columns += [Column(str(length), ".2f") for length in lengths] + [Column("Avg", ".2f")]
    rows = []
    for label in view.labels:
        for task in tasks:
            scores = [view.mean(label, cells[task, n]) if cells[task, n] else None for n in lengths]
            mean = None if None in scores else sum(scores) / len(scores)
            rows.append([label, task, len(section.where(task)), *scores, mean])
    found.append(Table("tasks", "Tasks by length", columns, rows, [view.caption()]))
    scopes = {**average, **{f"length {name}": strata for name, strata in by_length.items()}}
    if len(tasks) > 1:
        by_task = {t: mean_of([cells[t, n] for n in lengths]) for t in tasks}
        scopes |= by_task
    return scopes, found


def _ruler_averages(by_length):
    """{"Avg", "wAvg inc", "wAvg dec": scope}: linear in the lengths, as ruler_scores has them."""
    lengths = list(by_length)
    unit = [ruler_scores.averages({int(n): float(n == m) for n in lengths}) for m in lengths]
    return {
        label: [
            (weights[label] * weight, keys)
            for weights, strata in zip(unit, by_length.values(), strict=True)
            for weight, keys in strata
        ]
        for label in unit[0]
        if len(lengths) > 1 or label == AVERAGE
    }
