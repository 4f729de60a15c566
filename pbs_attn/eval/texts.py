# SPDX-License-Identifier: Apache-2.0
"""Long texts as token ids: files of the user, or the one the package ships, cut into windows."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from ..cli import CommandError, models
from . import sources


class Text(NamedTuple):
    name: str  # short, unique among the texts of a command
    path: str  # "" for the shipped text
    sha256: str  # of the text in UTF-8, so a row and a plain file with the same text agree
    text: str


DEMO = "demo"  # what a command line calls the text that the package ships


def load(paths):
    """The texts of `paths` (UTF-8 files, "demo", "-", FILE.jsonl#ROW); without any, what the
    package ships.

    Raises CommandError for a file that cannot be read, is empty, or is given twice.
    """
    found = []
    for path in paths or [DEMO]:
        shipped = path == DEMO
        file, row = split_row(path)
        if row is not None:
            text, name = read_row(path, file, row), f"{Path(file).stem}-{row}"
        else:
            _, text = models.read_text(None if shipped else str(path))
            name = "opticks" if shipped else Path(path).stem.strip("-") or "stdin"
        digest = hashlib.sha256(text.encode()).hexdigest()
        if any(digest == other.sha256 for other in found):
            raise CommandError(f"--text {path}: the same text is given twice")
        taken = [other.name for other in found]
        while name in taken:
            name += "+"
        found.append(Text(name, "" if shipped else str(path), digest, text))
    return found


def split_row(path):
    """(FILE, ROW) of FILE.jsonl#ROW, (path, None) of anything else.

    FILE ends as benchmark data does, .jsonl, .json or .parquet; a file that exists under the whole
    name is that file.
    """
    file, mark, row = str(path).rpartition("#")
    if not mark or Path(file).suffix not in sources.SUFFIXES or Path(str(path)).is_file():
        return path, None
    return file, row


def read_row(path, file, row):
    """The field `context` of a row of benchmark data, its line ends as in a text file.

    file: .jsonl, .json or .parquet, or DATA.zip/MEMBER.jsonl; row: its number, the first is 0, or
    its _id. Raises CommandError that names file, row and field.
    """
    zipped, inside, member = file.partition(".zip/")
    where, stem = (zipped + ".zip", Path(member).stem) if inside else (file, Path(file).stem)
    try:
        files = sources.Files(where)
        if stem not in files.names:
            raise CommandError(f"--data {where} has no {stem}; it has {', '.join(files.names)}")
        with files.open(stem) as (opened, name):
            schema = {"context": sources.V1["context"]}
            rows = sources.read(opened, name, lambda row: schema).rows
    except CommandError as error:
        raise CommandError(f"--text {path}:{str(error).removeprefix('--data')}") from error
    number = int(row) if row.isascii() and row.isdigit() else len(rows)
    found = rows[number] if number < len(rows) else next((r for r in rows if r.id == row), None)
    if found is None:
        raise CommandError(
            f"--text {path}: {file} has no row {row!r}; allowed: 0 to {len(rows) - 1}, or an _id"
        )
    if found.error:
        raise CommandError(f"--text {path}: row {row}: {found.error}")
    return found.data["context"].replace("\r\n", "\n").replace("\r", "\n")


def parse_lengths(text):
    """'2k,3000,8k..64k' -> [2048, 3000, 8192, 16384, 32768, 65536], sorted, once each.

    8k..64k doubles from the one to the other. Raises CommandError for anything else.
    """
    found = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        low, dots, high = part.partition("..")
        try:
            length, last = models.parse_length(low), models.parse_length(high if dots else low)
        except CommandError as error:
            raise CommandError(
                f"--lengths has {part!r}; allowed: tokens >= 2 like 3000 or 8k, or 8k..64k"
            ) from error
        if last < length:
            raise CommandError(f"--lengths has {part!r}; allowed: the smaller length first")
        while length <= last:
            found.add(length)
            length *= 2
    if not found:
        raise CommandError("--lengths is empty; allowed: 2k,4k or 8k..64k")
    return sorted(found)


def token_ids(tokens, text):
    """(bos [b], ids [n]) int64: what the tokenizer puts first, and the text without it."""
    with models.quiet():
        plain = tokens.encode(text, special=False)
        bare, special = tokens.encode("a", special=False), tokens.encode("a", special=True)
    start = next((i for i in range(len(special)) if special[i : i + len(bare)] == bare), 0)
    return torch.tensor(special[:start]), torch.tensor(plain)


def window(bos, ids, start, length):
    """[length] tokens: `bos`, then the text from token `start` on; fewer where the text ends."""
    return torch.cat([bos, ids[start : start + length - len(bos)]]).long()


def starts(available, length, first=0, count=1):
    """Starts of at most `count` windows side by side that fit in `available` tokens."""
    room = (available - first) // max(length, 1)
    return [first + i * length for i in range(max(min(count, room), 0))]


def tiled(bos, ids, length):
    """(tokens [length], times): the text from its start, repeated as often as needed.

    times > 1 deserves a warning: periodic text is easier to cover than any real one.
    """
    need = max(length - len(bos), 0)
    times = -(-need // max(len(ids), 1))
    return torch.cat([bos, ids.repeat(max(times, 1))[:need]]).long(), times
