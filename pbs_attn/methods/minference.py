# SPDX-License-Identifier: Apache-2.0
"""MInference's vertical-slash pattern: some columns, some diagonals, chosen by the last rows.

The attention of the last 64 rows says which keys (columns) and which distances (diagonals) matter;
the first 30 columns and the 100 nearest distances are forced and count towards the sizes. All rows
then read those. (MInference 1.0, arXiv 2407.02490, section 3.2; minference_forward.py,
pit_sparse_flash_attention_v2.py and vertical_slash_index.cu at fb56c91.)

This is an exact reference in torch. It reads what the authors' kernel reads, which is more than the
chosen diagonals: for every 64 rows the diagonals are covered by 64 x 64 tiles, from the farthest to
the nearest, a tile beginning where the last one ended unless there is a gap. Columns are single.

`minference` alone is what the PBS-Attn paper ran: 1000 columns and 6096 diagonals in every head,
nearly dense below 8K. `pattern=FILE` takes sizes per head from the authors' search results: a list
over layers of {"head": ["vertical_and_slash", columns, diagonals, score]}. Their "stream_llm" (the
first tokens and a window, exact to the token) is done too; other types are refused by name. Heads
and layers that the file leaves out take `vertical` and `slash`, as theirs do.

In a chunked prefill the last rows of the chunk choose, among all keys so far.
"""

import functools
import json
import math
import os
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..geometry import ceil_div
from .base import PAIR, TokenMethod, cell_pairs, widen
from .blockmath import heaviest, logits, strips

LAST_ROWS = 64  # rows that choose
FIRST_COLUMNS, NEAREST = 30, 100  # always among the chosen
LEAST_VERTICAL, LEAST_SLASH = 30, 50  # smaller sizes are raised to these
TILE = 64  # rows and keys of a tile that covers diagonals
TYPES = ("vertical_and_slash", "stream_llm")
STARTS = 2**24  # tile starts held at a time


def estimate(call):
    """(columns, diagonals), wide [Hq, Nk] each: attention of the last rows summed over them, by
    key and by distance (position of the row minus the key)."""
    num_k = call.k.shape[1]
    rows = min(LAST_ROWS, call.q.shape[1], num_k)  # rows before the first key see nothing
    scores = logits(widen(call.q[:, call.q.shape[1] - rows :]), widen(call.k), call.scale)
    position = torch.arange(num_k - rows, num_k, device=scores.device)[:, None]
    future = torch.arange(num_k, device=scores.device) > position
    p = scores.masked_fill_(future, -math.inf).softmax(-1)  # [Hq, rows, Nk]
    # Keys from the newest to the oldest, rows from the last to the first: row r of these has
    # distance n - r in place n, so row r is read from place r on. One longer rows of the same
    # memory do that.
    p = torch.nn.functional.pad(p.flip((1, 2)), (0, rows))
    skewed = torch.nn.functional.pad(p.flatten(1), (0, rows)).unflatten(1, (rows, -1))
    return p.sum(1)[:, :num_k].flip(1), skewed[:, :, :num_k].sum(1)


def choose(call, vertical, slash):
    """bool [Hq, Nk] twice: the chosen columns, the chosen distances; vertical, slash int64 [Hq]."""
    columns, diagonals = estimate(call)
    columns[:, :FIRST_COLUMNS] = math.inf
    diagonals[:, :NEAREST] = math.inf
    vertical = vertical.clamp(min=LEAST_VERTICAL)
    return heaviest(columns, vertical), heaviest(diagonals, slash.clamp(min=LEAST_SLASH))


def tiles(diagonals, start):
    """First keys of the tiles that cover the diagonals of 64 rows from position start on.

    diagonals bool [H, Nk] by distance, start int64 [M] -> int32 [H, M, n]; -1: no tile.
    A diagonal of distance d needs the keys start - d to start - d + 63, from key 0 on.
    """
    num_heads, num_k = diagonals.shape
    place = torch.arange(num_k, device=diagonals.device)
    nearer = torch.where(diagonals, place, -1).cummax(1).values  # largest chosen distance <= d
    nearer = torch.nn.functional.pad(nearer, (1, 0), value=-1)  # [H, Nk + 1]: < d
    stop = (start + TILE).expand(num_heads, -1)  # positions up to here are covered in the end
    farthest = nearer.gather(1, stop.clamp(0, num_k))
    end = (stop - farthest).clamp(min=TILE)  # of the keys that are covered so far
    alive, found = farthest >= 0, []
    while alive.any():
        found.append(torch.where(alive, end - TILE, -1).to(torch.int32))
        rest = stop - end
        distance = nearer.gather(1, rest.clamp(0, num_k))
        alive &= distance >= 0
        end = torch.where(distance < rest - TILE, stop - distance, end + TILE)
    if not found:
        return torch.full((num_heads, len(start), 1), -1, dtype=torch.int32, device=start.device)
    return torch.stack(found, -1)


def cover(first_keys, num_keys):
    """bool [H, M, num_keys]: keys inside the tiles; first_keys [H, M, n] as `tiles` gives them."""
    width = num_keys + TILE + 1  # the last place is for what is no tile or lies beyond
    begin = torch.where(first_keys < 0, width - 1, first_keys.long()).clamp(max=width - 1)
    end = torch.where(first_keys < 0, width - 1, begin + TILE).clamp(max=width - 1)
    step = torch.zeros(*begin.shape[:2], width, dtype=torch.int16, device=begin.device)
    step.scatter_add_(2, begin, torch.ones_like(begin, dtype=torch.int16))
    step.scatter_add_(2, end, torch.full_like(end, -1, dtype=torch.int16))
    return step[:, :, :num_keys].cumsum(2, dtype=torch.int16) > 0


@functools.lru_cache(maxsize=8)
def _read(path, _changed):
    """[layer] -> {head: (type, columns, diagonals)} of a pattern file; ValueError says what is
    wrong."""
    with open(path, encoding="utf-8") as file:
        document = json.load(file)
    if not isinstance(document, list) or not all(isinstance(layer, dict) for layer in document):
        raise ValueError("allowed: a list over layers of objects over heads")
    return [
        {int(head): _pattern(f"layer {i}, head {head}", entry) for head, entry in layer.items()}
        for i, layer in enumerate(document)
    ]


def _pattern(where, entry):
    if not isinstance(entry, list) or len(entry) < 3:
        raise ValueError(f"{where} is {entry!r}; allowed: [type, columns, diagonals, score]")
    kind, *sizes = entry[:3]
    if kind not in TYPES:
        raise ValueError(f"{where} is of type {kind!r}; allowed: {', '.join(TYPES)}")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"{where} has size {size!r}; allowed: an integer >= 0")
    return (kind, *sizes)


@dataclass(frozen=True, kw_only=True)
class MInference(TokenMethod):
    """vertical    columns that every row reads, the 30 forced ones among them; at least 30
    slash       diagonals, the 100 nearest among them; at least 50
    pattern     JSON file of the authors' format: types and sizes per layer and head

    Raises ValueError where the file is missing or not of that format, and at the call where it has
    heads that the model has not."""

    NAME: ClassVar[str] = "minference"
    ABOUT: ClassVar[str] = "vertical-slash pattern from the last 64 rows (exact reference in torch)"
    SOURCE: ClassVar[str] = "MInference, arXiv 2407.02490, code fb56c91"
    FILES: ClassVar[tuple] = ("pattern",)
    KEEP_ALL: ClassVar[str] = "slash=2147483647"

    vertical: int = 1000
    slash: int = 6096
    pattern: str | None = None

    def check(self):
        self.check_int("vertical", 0)
        self.check_int("slash", 0)
        if self.pattern is not None:
            self._patterns()

    def _patterns(self):
        try:
            path = os.path.expanduser(self.pattern)
            return _read(path, os.stat(path).st_mtime_ns)
        except (OSError, TypeError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"minference: pattern {self.pattern}: {why}") from error

    def _sizes(self, call):
        """int64 [Hq] (columns, diagonals) and bool [Hq]: which heads are "stream_llm"."""
        num_heads, device = call.q.shape[0], call.q.device
        found = [(TYPES[0], self.vertical, self.slash)] * num_heads
        if self.pattern is not None:
            layers, layer = self._patterns(), call.layer
            where = f"minference: pattern {self.pattern}"
            if layer is None and len(layers) > 1:
                raise ValueError(f"{where} is per layer; allowed: in a model, or a file of one")
            for head, entry in (layers[layer or 0] if (layer or 0) < len(layers) else {}).items():
                if not 0 <= head < num_heads:
                    raise ValueError(f"{where} has head {head}; the call has {num_heads}")
                found[head] = entry
        kinds, *sizes = zip(*found, strict=True)
        stream = torch.tensor([kind == TYPES[1] for kind in kinds], device=device)
        return *(torch.tensor(size, device=device) for size in sizes), stream

    def attention(self, call):
        """(out [Hq, Nq, Dv], float64 [Hq] computed causal pairs)."""
        out = call.q.new_zeros(call.q.shape[0], call.q.shape[1], call.v.shape[2])
        pairs = torch.zeros(call.q.shape[0], dtype=torch.float64, device=call.q.device)
        if out.numel() == 0 or call.k.shape[1] == 0:
            return out, pairs
        vertical, slash, stream = self._sizes(call)
        columns, diagonals = choose(call, vertical, slash)
        q, k, v = widen(call.q), widen(call.k), widen(call.v)
        for begin, end, covered in _covers(call, diagonals):
            keys = covered.shape[2]
            mask = covered.repeat_interleave(TILE, 1)[:, : end - begin] | columns[:, None, :keys]
            position = call.q_offset + torch.arange(begin, end, device=mask.device)[:, None]
            key = torch.arange(keys, device=mask.device)
            if stream.any():
                window = position - key < slash[:, None, None]
                streamed = (key < vertical[:, None, None]) | window
                mask = torch.where(stream[:, None, None], streamed, mask)
            mask &= key <= position
            pairs += cell_pairs(call, mask, begin)
            scores = logits(q[:, begin:end], k[:, :keys], call.scale)
            p = scores.masked_fill_(~mask, -math.inf).softmax(-1)
            p = p.masked_fill_(~mask, 0.0)  # nan in rows that see nothing
            stacked = p.unflatten(0, (v.shape[0], -1)).flatten(1, 2) @ v[:, :keys]
            out[:, begin:end] = stacked.view(-1, end - begin, v.shape[2]).to(out.dtype)
        return out, pairs


def _covers(call, diagonals):
    """Yields (begin, end, bool [Hq, ceil((end - begin) / 64), keys]) over strips of rows: keys that
    tiles cover, up to the last key that the strip sees. Strips without a key are left out."""
    num_heads, num_q, num_k = call.q.shape[0], call.q.shape[1], call.k.shape[1]
    start = call.q_offset + torch.arange(0, num_q, TILE, device=diagonals.device)
    # Tiles of many strips at once: finding them takes as many steps as a row has tiles.
    share = max(STARTS // (num_heads * ceil_div(num_k, TILE)), 1)
    known, first, last = None, 0, 0
    for begin, end in strips(call, PAIR, num_k, whole_blocks=True):
        rows = slice(begin // TILE, ceil_div(end, TILE))
        if rows.stop > last:
            first, last = rows.start, max(rows.start + share, rows.stop)
            known = tiles(diagonals, start[first:last])
        keys = min(call.q_offset + end, num_k)
        if keys > 0:
            yield begin, end, cover(known[:, rows.start - first : rows.stop - first], keys)
