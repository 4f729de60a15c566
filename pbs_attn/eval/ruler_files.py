# SPDX-License-Identifier: Apache-2.0
"""RULER's own jsonl files: read (labelled ruler-official) and written, for other harnesses.

A file of 128K rows has 250 MB, and a full set 10 GB: a file is looked through once, for its SHA-256
and its rows' places and faults; rows are read when they are needed.

Rows go by their line, not by `index`: RULER's niah.py overwrites that field with the place of the
answer in the text, so it is neither an order nor unique.
"""

import hashlib
import json
import re
from pathlib import Path

from ..cli import CommandError
from . import ruler_tasks
from .jobs import BadRow

MADE_HERE = "generator"  # field of rows that `write` left: they are not RULER's own
TEXTS = ("input", "outputs")


class Official:
    """The rows of one file. task: ruler_tasks.Task; length: the nominal one, if it is known."""

    def __init__(self, path, task, length=None):
        self.path, self.task = Path(path), task
        self.offsets, self.errors, self.label = [], {}, "ruler-official"
        digest, longest = hashlib.sha256(), 0
        try:
            with self.path.open("rb") as file:
                start = 0
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    if line.strip():
                        longest = max(longest, self._check(line, number))
                        self.offsets.append((start, number))
                    start += len(line)
        except OSError as error:
            raise CommandError(f"--data {path}: {error}") from error
        if not self.offsets:
            raise CommandError(f"--data {path}: no row in this file")
        self.sha256 = digest.hexdigest()
        # Without a length in the path: RULER's rows fill theirs, so the next power of two is it.
        # A number below its longest row is some other number.
        fits = length is not None and length >= longest
        self.length = length if fits else 1 << max(longest - 1, 0).bit_length()

    def _check(self, line, number):
        """`length` of the row, 0 if it has none; notes what is wrong with it under its place."""
        place = len(self.offsets)
        try:
            fields = json.loads(line)
        except ValueError as error:
            self.errors[place] = f"{self.path} line {number}: no JSON: {error}"
            return 0
        wrong = _wrong(fields)
        if wrong:
            self.errors[place] = f"{self.path} line {number}: {wrong}"
            return 0
        if MADE_HERE in fields:
            self.label = "ruler-generated"
        length = fields.get("length", 0)
        return length if isinstance(length, int) else 0

    def __len__(self):
        return len(self.offsets)

    def row(self, index):
        """ruler_tasks.Row of row `index`, in file order. Raises BadRow: file, line, field."""
        if index in self.errors:
            raise BadRow(self.errors[index])
        start, number = self.offsets[index]
        with self.path.open("rb") as file:
            file.seek(start)
            fields = json.loads(file.readline())
        text, prefix = fields["input"], fields.get("answer_prefix")
        if prefix is None:
            text, prefix = ruler_tasks.split_prefix(self.task, text)
        meta = {"line": number, "index": fields.get("index")}
        return ruler_tasks.Row(text, prefix, tuple(fields["outputs"]), meta)


def _wrong(fields):
    """What is wrong with a row: field, value and what is allowed; None if nothing is."""
    if not isinstance(fields, dict):
        return "expected a JSON object"
    for name in TEXTS:
        if name not in fields:
            return f"the field {name!r} is missing"
    if not isinstance(fields["input"], str) or not fields["input"]:
        return "the field 'input' must be text"
    outputs = fields["outputs"]
    if not isinstance(outputs, list) or not outputs or not all(isinstance(o, str) for o in outputs):
        return f"the field 'outputs' is {str(outputs)[:60]!r}; allowed: a list of one or more texts"
    if not isinstance(fields.get("answer_prefix", ""), str):
        return "the field 'answer_prefix' must be text"
    return None


def task_of(path):
    """(task name or None, length or None) as the path of a file says them.

    RULER writes .../<length>/data/<task>/validation.jsonl; <task>.jsonl and <task>_<length>.jsonl
    are in use, too."""
    name = length = None
    for part in (path.stem, *(parent.name for parent in path.parents)):
        if name is None:
            name = next((task for task in ruler_tasks.tasks() if _is(part, task)), None)
            part = part[len(name) :].strip("_-") if name else part
        if length is None and (match := re.fullmatch(r"(\d{3,}|\d+(?=[kK]))([kK]?)", part)):
            length = int(match[1]) * (1024 if match[2] else 1)
        if name and length:
            break
    return name, length


def _is(part, task):
    """`task` alone or followed by something that cannot belong to another task's name."""
    return re.match(re.escape(task) + r"(?![A-Za-z0-9])", part) is not None


def find(data):
    """{(task, length): Official} of --data FILE or DIR; raises CommandError for what is unclear."""
    data = Path(data)
    if not data.exists():
        raise CommandError(f"--data {data}: no such file or folder")
    files = [data] if data.is_file() else sorted(data.rglob("*.jsonl"))
    found = {}
    for path in files:
        # A folder `pred` holds RULER's predictions, which look like rows.
        if data.is_dir() and "pred" in path.relative_to(data).parts:
            continue
        name, length = task_of(path.resolve())
        if name is None:
            if data.is_file():
                raise CommandError(
                    f"--data {path}: the path names no RULER task; allowed: "
                    f"TASK_LENGTH.jsonl or LENGTH/TASK/validation.jsonl, TASK one of "
                    f"{', '.join(ruler_tasks.tasks())}"
                )
            continue
        table = Official(path, ruler_tasks.tasks()[name], length)
        key = name, table.length
        if key in found:
            raise CommandError(
                f"--data {data}: {found[key].path} and {path} are both {name} at {table.length}; "
                "give one of them"
            )
        found[key] = table
    if not found:
        raise CommandError(f"--data {data}: no .jsonl file of a RULER task in this folder")
    return found


def write(folder, source, samples):
    """Write the first `samples` rows of a ruler_generate.Generated as RULER does; the file's path.

    Layout LENGTH/TASK/validation.jsonl. Fields as RULER's, with a true `index`, and `generator`, by
    which the file is known not to be RULER's own when it is read again."""
    path = Path(folder) / str(source.length) / source.task.name / "validation.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            for index in range(samples):
                file.write(json.dumps(_fields(source, index)) + "\n")
        part.replace(path)
    except OSError as error:
        raise CommandError(f"--write {path}: {error}") from error
    return path


def _fields(source, index):
    row = source.row(index)
    alone = source.measure.plain(row.input + row.answer_prefix)
    prompt = source.measure.prompt(row.input, row.answer_prefix)
    fields = {
        "index": index,
        "input": row.input,
        "outputs": list(row.outputs),
        "length": alone + source.task.new_tokens,
        "length_w_model_temp": prompt + source.task.new_tokens,
        "answer_prefix": row.answer_prefix,
    }
    if source.task.family == "niah":
        before = row.input[: row.input.find(row.outputs[0])]
        fields["token_position_answer"] = source.measure.plain(before)
    return fields | {MADE_HERE: source.version}
