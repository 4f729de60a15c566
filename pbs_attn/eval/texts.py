# SPDX-License-Identifier: Apache-2.0
"""Long texts as token ids: files of the user, or the one the package ships, cut into windows."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from ..cli import CommandError, models


class Text(NamedTuple):
    name: str  # short, unique among the texts of a command
    path: str  # "" for the shipped text
    sha256: str  # of its UTF-8 bytes
    text: str


DEMO = "demo"  # what a command line calls the text that the package ships


def load(paths):
    """The texts of `paths` (UTF-8 files, "demo", "-"); without any, what the package ships.

    Raises CommandError for a file that cannot be read, is empty, or is given twice.
    """
    found = []
    for path in paths or [DEMO]:
        shipped = path == DEMO
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
