# SPDX-License-Identifier: Apache-2.0
"""What a bench has to do: jobs, the plan that holds them, and what they roughly cost."""

from dataclasses import dataclass, field
from typing import NamedTuple

STATUSES = ("ok", "oom", "bad_row", "error")

# Prefill is linear in the prompt (the matrices) plus quadratic (attention): for 8B-class models the
# two meet near 32K tokens. A decoding step reads all weights to make one token: about 64 tokens of
# prefill. Only ratios matter: the order of rows, equal shards, the time that is left.
EQUAL_AT, DECODE_STEP = 32768, 64


class BadRow(Exception):
    """A row of the data that cannot be used. The text names file, line and field.

    Raised by a bench's `work` (or `prompt`): one bad row is a failed record, not the end of a run.
    """


@dataclass(frozen=True)
class Job:
    """One row of a bench; with a method's label it is what is done once per run folder.

    bench, task, id: words (id is unique in task and length); length: the nominal length in tokens
    where a row exists at several (ruler, ppl, ttft), else 0; cost: see prompt_cost; payload: what
    `work` needs, not part of the job's identity.
    """

    bench: str
    task: str
    id: str
    length: int = 0
    cost: float = 0.0
    payload: dict = field(default_factory=dict, compare=False)

    def key(self, method):
        """What a record of this job and the method of this label is found by."""
        return (method, self.bench, self.task, self.id, self.length)


class Plan(NamedTuple):
    """What `prepare` returns.

    jobs      every row of the chosen tasks, before --limit and --shard
    identity  all that changes the value of a record for its key, as JSON can hold it: recipe,
              modes, ... The frame adds model, dtype, prompt options and seed. Not what may grow in
              the same folder: methods, tasks, limit, shard. `data` (or `texts`), {task: SHA-256},
              may gain entries there; every other field has to stay as it is.
    notes     lines to print at the start
    """

    jobs: list
    identity: dict
    notes: list


def record_key(record):
    """The key (method, bench, task, id, length) of a record."""
    return tuple(record[name] for name in ("method", "bench", "task", "id", "length"))


def prompt_cost(prompt_tokens, new_tokens=0):
    """Relative cost of one row: prefill of `prompt_tokens`, then `new_tokens` steps."""
    return prompt_tokens * (1 + prompt_tokens / EQUAL_AT) + DECODE_STEP * new_tokens


def row_score(record):
    """The score of a record in 0..1; a failed row counts 0."""
    return float(record.get("score", 0.0)) if record["status"] == "ok" else 0.0
