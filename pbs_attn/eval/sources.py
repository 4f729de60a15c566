# SPDX-License-Identifier: Apache-2.0
"""Benchmark data as its publishers ship it: zip, folder, .jsonl, .json, .parquet, or the hub cache.

Reads what is there and says what is wrong: a task file that is missing stops the command and names
those that are there; a row that cannot be used becomes a failed row with file, line and field.
Every file's SHA-256 (of the unpacked bytes, so a zip and a folder agree) belongs to a run's
identity.
"""

import codecs
import contextlib
import hashlib
import json
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..cli import CommandError, missing

SUFFIXES = (".jsonl", ".json", ".parquet")
HUB = {  # what --data hub looks for: repositories, in this order, and the file
    "LongBench": (("THUDM/LongBench", "zai-org/LongBench"), "data.zip"),
    "LongBench v2": (("THUDM/LongBench-v2", "zai-org/LongBench-v2"), "data.json"),
}
CHUNK = 1 << 20


class Row(NamedTuple):
    """One row: its id, and its fields or what is wrong with it."""

    id: str
    data: dict | None
    error: str | None = None  # names file, line and field
    dataset: object = None  # its field `dataset`, if it has one


@dataclass
class Table:
    """The rows of one task, the file that they come from, and the SHA-256 of that file's bytes."""

    file: str
    sha256: str = ""
    rows: list = field(default_factory=list)


# Fields: name -> (is this value good, what is allowed)


def _text(value):
    return isinstance(value, str)


def _texts(value):
    return isinstance(value, list) and bool(value) and all(map(_text, value))


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


V1 = {
    "_id": (lambda value: _text(value) and bool(value), "a non-empty text"),
    "input": (_text, "a text"),
    "context": (lambda value: _text(value) and bool(value), "a non-empty text"),
    "answers": (_texts, "a list of one or more texts"),
    "length": (_whole, "a whole number"),
    "all_classes": (lambda value: value is None or _texts(value), "null or a list of texts"),
}
_CLASSES = (_texts, "a list of one or more texts")
_PARAGRAPH = {"passage_retrieval_en": r"Paragraph \d+", "passage_retrieval_zh": r"段落\d+"}
V2 = {
    **{name: (_text, "a text") for name in ("_id", "domain", "sub_domain", "question", "context")},
    **{f"choice_{letter}": (_text, "a text") for letter in "ABCD"},
    "difficulty": (lambda value: value in ("easy", "hard"), "easy or hard"),
    "length": (lambda value: value in ("short", "medium", "long"), "short, medium or long"),
    "answer": (lambda value: _text(value) and value in tuple("ABCD"), "A, B, C or D"),
}
CHUNKS = {  # with --mode rag
    "retrieved_context": (
        lambda value: (
            isinstance(value, list)
            and all(isinstance(x, dict) and _text(x.get("content")) and "c_idx" in x for x in value)
        ),
        'a list of {"content": text, "c_idx": number}',
    )
}


def fields_v1(task):
    """The schema of a LongBench v1 task."""
    schema = dict(V1)
    if task in ("trec", "lsht"):
        schema["all_classes"] = _CLASSES
    if task in _PARAGRAPH:
        pattern = _PARAGRAPH[task]
        schema["answers"] = (
            lambda value: _texts(value) and all(re.search(pattern, text) for text in value),
            "a list of texts with " + pattern.replace(r"\d+", "N"),
        )
    return schema


def _shown(value):
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _check(row, schema):
    """What is wrong with a parsed row, or None."""
    if not isinstance(row, dict):
        return f"is {_shown(row)}; allowed: an object with {', '.join(schema)}"
    for name, (good, allowed) in schema.items():
        if name not in row:
            return f"field {name} is missing; allowed: {allowed}"
        if not good(row[name]):
            return f"field {name} is {_shown(row[name])}; allowed: {allowed}"
    return None


# Bytes to (place, parsed row or what is wrong with it)


def _lines(stream, digest):
    """(place, value, error) of every line that is not blank."""
    for number, raw in enumerate(stream, 1):
        digest.update(raw)
        if not raw.strip():
            continue
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            yield f"line {number}", json.loads(text), None
        except UnicodeDecodeError as error:
            yield f"line {number}", None, f"is not UTF-8 (byte {error.start})"
        except json.JSONDecodeError as error:
            yield f"line {number}", None, f"is not JSON (column {error.colno}: {error.msg})"


def _items(stream, digest):
    """The same of a JSON list, item by item: LongBench v2's file is too large to parse at once."""
    decode = codecs.getincrementaldecoder("utf-8-sig")()
    scan, text, at, number, ended = json.JSONDecoder(), "", 0, 0, False

    def more(size):
        nonlocal text, at, ended
        raw = stream.read(size)
        digest.update(raw)
        ended = not raw
        text, at = text[at:] + decode.decode(raw, final=ended), 0

    def skip(characters):
        nonlocal at
        while True:
            while at < len(text) and text[at] in characters:
                at += 1
            if at < len(text) or ended:
                return text[at : at + 1]
            more(CHUNK)

    if skip(" \t\r\n") != "[":
        yield "its start", None, "is not a list; allowed: [{...}, ...]"
        return
    at += 1
    while skip(" \t\r\n,") not in ("]", ""):
        number += 1
        while True:
            try:
                value, at = scan.raw_decode(text, at)
                break
            except json.JSONDecodeError as error:
                if ended:
                    yield f"item {number}", None, f"is not JSON ({error.msg}); the rest is not read"
                    return
                more(max(CHUNK, len(text) - at))
        yield f"item {number}", value, None
    if skip(" \t\r\n,") == "":
        yield f"item {number + 1}", None, "is missing: the file ends without ]"
    while not ended:
        at = len(text)
        more(CHUNK)


def _parquet(stream, digest):
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise missing(error.name) from None
    for raw in iter(lambda: stream.read(CHUNK), b""):
        digest.update(raw)
    stream.seek(0)
    number = 0
    for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=16):
        for value in batch.to_pylist():
            number += 1
            yield f"row {number}", value, None


_READERS = {".jsonl": _lines, ".json": _items, ".parquet": _parquet}


def read(opened, name, schema_of):
    """A Table of one file.

    Args:
        opened: binary file.
        name: how messages call it; its suffix picks the reader.
        schema_of: function of a parsed row: its schema {field: (check, what is allowed)}.

    A row without a usable id has the id "line-N"; one that occurs twice gets its place appended.
    Raises CommandError if the file as a whole cannot be read, or no row of it be used.
    """
    digest, table, seen = hashlib.sha256(), Table(name), set()
    try:
        for place, value, error in _READERS[Path(name).suffix](opened, digest):
            error = error or _check(value, schema_of(value))
            value = value if isinstance(value, dict) else {}
            key, dataset = value.get("_id"), value.get("dataset")
            key = key if isinstance(key, str) and key else place.replace(" ", "-")
            key = f"{key}@{place.replace(' ', '-')}" if key in seen else key
            seen.add(key)
            error = error and f"{name}: {place}: {error}"
            table.rows.append(Row(key, None if error else value, error, dataset))
    except UnicodeDecodeError as error:
        raise CommandError(f"--data: {name} is not UTF-8: {error.reason}") from None
    if table.rows and all(row.error for row in table.rows):
        raise CommandError(f"--data: no row can be used; {table.rows[0].error}")
    table.sha256 = digest.hexdigest()
    return table


# Where the files are


class Files:
    """The readable files of a place: {stem: name}, and how to open them."""

    def __init__(self, where):
        self.where, self.names = Path(where), {}
        if not self.where.exists():
            raise CommandError(
                f"--data {where} does not exist; allowed: a data.zip, a folder, a .jsonl, .json or "
                ".parquet file, or hub"
            )
        zipped = self.where.is_file() and zipfile.is_zipfile(self.where)
        if self.where.is_dir():
            found = [p for folder in (".", "data") for p in sorted((self.where / folder).glob("*"))]
            if not any(p.suffix in SUFFIXES for p in found) and (self.where / "data.zip").is_file():
                self.where, zipped = self.where / "data.zip", True
            else:
                self._add(p.relative_to(self.where).as_posix() for p in found if p.is_file())
        if zipped:
            try:
                with zipfile.ZipFile(self.where) as archive:
                    self._add(n for n in archive.namelist() if not n.startswith("__MACOSX"))
            except zipfile.BadZipFile as error:
                raise CommandError(f"--data {where} is no whole zip file: {error}") from None
        elif self.where.is_file():
            if self.where.suffix not in SUFFIXES:
                raise CommandError(
                    f"--data {where} has suffix {self.where.suffix!r}; allowed: .zip, "
                    + ", ".join(SUFFIXES)
                )
            self.names[self.where.stem] = self.where.name
        self.zipped, self.single = zipped, self.where.is_file() and not zipped

    def _add(self, names):
        for name in names:
            path = Path(name)
            if path.suffix in SUFFIXES and not path.name.startswith("."):
                self.names.setdefault(path.stem, name)

    @contextlib.contextmanager
    def open(self, stem):
        """(binary file, name for messages)."""
        name = self.names[stem]
        if self.single:
            with open(self.where, "rb") as file:
                yield file, str(self.where)
        elif self.zipped:
            try:
                with zipfile.ZipFile(self.where) as archive, archive.open(name) as file:
                    yield file, f"{self.where}/{name}"
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise CommandError(f"--data {self.where}: {name} is damaged: {error}") from None
        else:
            with open(self.where / name, "rb") as file:
                yield file, str(self.where / name)


def hub(benchmark):
    """The path of a benchmark's file in the Hugging Face cache, fetched first if need be.

    Raises CommandError that names the file and where to put it when there is no way to the hub.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ModuleNotFoundError as error:
        raise missing(error.name) from None
    repositories, name = HUB[benchmark]
    for repository in repositories:
        found = huggingface_hub.try_to_load_from_cache(repository, name, repo_type="dataset")
        if isinstance(found, str):
            return found
    reasons = []
    for repository in repositories:
        try:
            return huggingface_hub.hf_hub_download(repository, name, repo_type="dataset")
        except Exception as error:  # offline, proxy, moved: the hub has many
            first = str(error).strip().splitlines()
            reasons.append(f"{repository}: {first[0] if first else type(error).__name__}")
    raise CommandError(
        f"--data hub: {benchmark}'s {name} is not in the cache "
        f"({constants.HF_HUB_CACHE}) and cannot be fetched ({'; '.join(reasons)}). "
        f"Fetch https://huggingface.co/datasets/{repositories[0]}/resolve/main/{name} on a machine "
        f"with a connection, copy it here and say --data {name}"
    )


def longbench(where, tasks, known, suffix=""):
    """{task: Table} of LongBench v1 (suffix "_e": LongBench-E).

    where: data.zip, a folder of <task><suffix>.jsonl, one such file, one file with rows of several
    tasks (told apart by `dataset`), or "hub". tasks: those wanted; known: all there are.
    Raises CommandError naming the tasks that are there if one is missing.
    """
    files = Files(hub("LongBench") if where == "hub" else where)
    there = [task for task in known if task + suffix in files.names]
    if not there and files.single:
        return _mixed(files, where, tasks, known, suffix)
    absent = [task for task in tasks if task not in there]
    if absent:
        raise CommandError(_absent(where, [task + suffix for task in absent], there))
    found = {}
    for task in tasks:
        with files.open(task + suffix) as (opened, name):
            schema = fields_v1(task)
            found[task] = read(opened, name, lambda row, schema=schema: schema)
    return found


def _absent(where, absent, there):
    if not there:
        return f"--data {where} has no file of a LongBench task, such as {absent[0]}.jsonl"
    return (
        f"--data {where} has no {', '.join(name + '.jsonl' for name in absent)}; it has "
        f"{len(there)} tasks: --tasks {','.join(there)}"
    )


def _mixed(files, where, tasks, known, suffix):
    """One file with rows of several tasks, told apart by their field `dataset`."""

    def task_of(dataset):
        return dataset.removesuffix(suffix) if isinstance(dataset, str) else None

    def schema_of(row):
        return fields_v1(task_of(row.get("dataset") if isinstance(row, dict) else None))

    (stem,) = files.names
    with files.open(stem) as (opened, name):
        everything = read(opened, name, schema_of)
    by_task = {}
    for row in everything.rows:
        task = task_of(row.dataset)
        if task not in known:
            if row.error is None:
                raise CommandError(
                    f"--data {name}: row {row.id}: field dataset is {_shown(row.dataset)}; "
                    f"allowed: {', '.join(known)}"
                )
            task = tasks[0]  # nobody knows of which: a failed row all the same
        by_task.setdefault(task, Table(name, everything.sha256)).rows.append(row)
    absent = [task for task in tasks if task not in by_task]
    if absent:
        there = [task for task in known if task in by_task]
        raise CommandError(_absent(where, [task + suffix for task in absent], there))
    return {task: by_task[task] for task in tasks}


def longbench2(where, extra=None):
    """The Table of LongBench v2: data.json, a .jsonl or .parquet file, a folder or zip with one of
    them, or "hub". extra: fields beyond V2 that rows must have."""
    files = Files(hub("LongBench v2") if where == "hub" else where)
    schema = {**V2, **(extra or {})}
    if not files.names:
        raise CommandError(f"--data {where} has no {' or '.join(SUFFIXES)} file")
    stem = "data" if "data" in files.names else next(iter(files.names))
    if len(files.names) > 1 and stem != "data":
        raise CommandError(
            f"--data {where} has {len(files.names)} files; allowed: one, or one called data.json"
        )
    with files.open(stem) as (opened, name):
        return read(opened, name, lambda row: schema)
