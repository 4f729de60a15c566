# SPDX-License-Identifier: Apache-2.0
"""RULER's averages: of a task, of a length, and the three over lengths."""

from .jobs import row_score


def by_task(records):
    """{length: {task: 100 x mean row score}} of records; a failed row counts 0."""
    found = {}
    for record in records:
        cell = found.setdefault(record["length"], {}).setdefault(record["task"], [])
        cell.append(row_score(record))
    return {
        length: {task: 100 * sum(scores) / len(scores) for task, scores in found[length].items()}
        for length in sorted(found)
    }


def by_length(scores):
    """{length: mean over the tasks that are there} of by_task's result."""
    return {length: sum(cell.values()) / len(cell) for length, cell in scores.items()}


def averages(lengths):
    """{"Avg", "wAvg inc", "wAvg dec"} of {length: score}: plain, and with weights that rise or fall
    by one from length to length (RULER's README: its Llama-3.1-8B row gives 88.3, 85.4, 91.3)."""
    scores = [lengths[length] for length in sorted(lengths)]
    rising = range(1, len(scores) + 1)
    return {
        "Avg": sum(scores) / len(scores),
        "wAvg inc": _weighted(scores, rising),
        "wAvg dec": _weighted(scores, rising[::-1]),
    }


def _weighted(scores, weights):
    return sum(s * w for s, w in zip(scores, weights, strict=True)) / sum(weights)
