# SPDX-License-Identifier: Apache-2.0
"""BSFA: true logits against calibrated thresholds, block by block.

Every causal block of 128 rows x 64 keys gets its exact Q K^T; a block whose largest scaled logit
lies below the threshold of its layer, head and query block is dropped before exp, sum and P V. The
blocks that hold positions of the query block itself are always kept. (Block-Sparse Flash Attention,
arXiv 2512.07011; flash_fwd_kernel.h and thresholds/calibrate.py at c3ee81e.)

Thresholds come from `python -m pbs_attn eval calibrate --method bsfa`, a JSON file:

    {"method": "bsfa", "block_q": 128, "block_k": 64, "layers": {"64": [[[t, ...]]]}, ...}

layers[k][layer][head][m] is the threshold of query block m for a budget of k blocks; null is -inf:
everything kept. Query blocks past the last entry take the last one, as the authors' kernel does.
The authors' own tables (`thresholds_*.pt`) are read as well; nothing pickled in them is run.
"""

import functools
import json
import math
import os
import pickle
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..geometry import ceil_div
from .base import BlockMethod, causal_pairs, own_blocks, widen
from .blockmath import logits, strips

BLOCK_Q, BLOCK_K = 128, 64
CALIBRATE = (
    "python -m pbs_attn eval calibrate --method bsfa --k 64 --text FILES --length 32k "
    "--out thresholds.json"
)


def maxima(call, block_q=BLOCK_Q, block_k=BLOCK_K):
    """Yields (first query block, fp32 or fp64 [Hq, R, Tk]): the largest scaled logit of each block.

    Walks over strips of R query blocks; Tk = ceil(Nk / block_k). No causal mask is laid over the
    logits: meaningful are the blocks that lie wholly before the first position of their query
    block (`history_blocks`). Blocks after the strip's last position are -inf.
    """
    q, k = widen(call.q), widen(call.k)
    num_k, num_k_blocks = k.shape[1], ceil_div(k.shape[1], block_k)
    for begin, end in strips(call, block_q, num_k, whole_blocks=True):
        seen = min(ceil_div(max(call.q_offset + end, 0), block_k) * block_k, num_k)
        found = q.new_full((q.shape[0], ceil_div(end - begin, block_q), num_k_blocks), -math.inf)
        if seen:
            scores = logits(q[:, begin:end], k[:, :seen], call.scale)
            pad = (0, -seen % block_k, 0, (begin - end) % block_q)
            scores = torch.nn.functional.pad(scores, pad, value=-math.inf)
            tiles = scores.unflatten(2, (-1, block_k)).unflatten(1, (-1, block_q))
            found[:, :, : tiles.shape[3]] = tiles.amax((2, 4))
        yield begin // block_q, found


def first_positions(call, block_q=BLOCK_Q):
    """int64 [Tq]: position of the first row of each query block; 0 where it is before key 0."""
    row = torch.arange(ceil_div(call.q.shape[1], block_q), device=call.q.device) * block_q
    return (call.q_offset + row).clamp(min=0)


def history_blocks(call, block_q=BLOCK_Q, block_k=BLOCK_K):
    """int64 [Tq]: key blocks that lie wholly before the first position of each query block."""
    return first_positions(call, block_q) // block_k


def _refuse(path, got, allowed):
    raise ValueError(f"bsfa: thresholds {path} {got}; allowed: {allowed}")


def _open(path):
    """(method, block_q, block_k, {budget: [layer][head][query block]}) of a file."""
    if path.endswith(".pt"):  # the authors' format
        document = torch.load(path, map_location="cpu", weights_only=True)
        budgets = [str(int(k)) for k in document["k_values"]]
        tables = dict(zip(budgets, document["thresholds"].double().tolist(), strict=True))
        return "bsfa", document["q_block_size"], document["k_block_size"], tables
    with open(path, encoding="utf-8") as file:
        document = json.load(file)
    return (*(document[name] for name in ("method", "block_q", "block_k")), document["layers"])


@functools.lru_cache(maxsize=8)
def _read(path, _changed, k):
    """fp64 [layers, heads, M] of a thresholds file for the budget k."""
    try:
        method, block_q, block_k, tables = _open(path)
        budgets = ", ".join(tables)
    except (KeyError, TypeError, AttributeError) as error:
        _refuse(path, f"is no such file ({error!r})", f"one made by `{CALIBRATE}`")
    if (method, block_q, block_k) != ("bsfa", BLOCK_Q, BLOCK_K):
        got = f"is for {method} with blocks of {block_q} x {block_k}"
        _refuse(path, got, f"bsfa with blocks of {BLOCK_Q} x {BLOCK_K}")
    if str(k) not in tables:
        raise ValueError(f"bsfa: k is {k}; allowed: a budget of {path}: {budgets}")
    try:
        lowest = functools.partial(map, lambda t: -math.inf if t is None else float(t))
        rows = [[list(lowest(head)) for head in layer] for layer in tables[str(k)]]
        values = torch.tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        _refuse(path, f"has no table for k={k} ({error})", "[layer][head][query block], no gaps")
    if values.ndim != 3 or 0 in values.shape or values.isnan().any():
        got = f"has a table of shape {tuple(values.shape)} for k={k}"
        _refuse(path, got, "[layer][head][query block], none empty, no NaN")
    return values


@dataclass(frozen=True, kw_only=True)
class BSFA(BlockMethod):
    """k           blocks before the diagonal that the thresholds were calibrated to keep
    thresholds  the file; needed
    correction  none: what is dropped has its exact logits already, means of them add nothing

    Raises ValueError where the file is missing, is of another method or lacks k, and at the call
    where it is of another model."""

    NAME: ClassVar[str] = "bsfa"
    ABOUT: ClassVar[str] = "true block maxima against calibrated thresholds; needs thresholds=FILE"
    SOURCE: ClassVar[str] = "BSFA, arXiv 2512.07011, code c3ee81e"
    FILES: ClassVar[tuple] = ("thresholds",)
    CORRECTIONS: ClassVar[tuple] = ("none",)
    KEEP_ALL: ClassVar[str] = "thresholds=FILE with null everywhere"
    DENSITY: ClassVar[str] = "(1 + kept) / 2: Q K^T of all blocks, P V of the kept ones"
    block_q: ClassVar[int] = BLOCK_Q
    block_k: ClassVar[int] = BLOCK_K

    k: int = 64
    thresholds: str | None = None

    def check(self):
        super().check()
        self.check_int("k", 1)
        if not isinstance(self.thresholds, str) or not self.thresholds:
            self.fail("thresholds", f"a file made by `{CALIBRATE}`")
        self._table()

    def _table(self):
        path = os.path.expanduser(self.thresholds)
        try:
            return _read(path, os.stat(path).st_mtime_ns, self.k)
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, pickle.UnpicklingError) as error:
            why = getattr(error, "strerror", None) or error
            _refuse(path, f"cannot be read: {why}", f"a file made by `{CALIBRATE}`")

    def _limits(self, call):
        """fp64 [Hq, Tq]: thresholds of the call's query blocks, by the position of their rows."""
        table, layer, num_heads = self._table(), call.layer, call.q.shape[0]
        if layer is None:
            if len(table) > 1:
                _refuse(self.thresholds, "is per layer", "in a model, or a file of one layer")
            layer = 0
        if layer >= len(table) or table.shape[1] != num_heads:
            got = f"has {len(table)} layers of {table.shape[1]} heads"
            needed = f"layer {layer} of {num_heads} query heads (`{CALIBRATE}`)"
            raise ValueError(f"bsfa: thresholds {self.thresholds} {got}; needed: {needed}")
        place = (first_positions(call) // BLOCK_Q).clamp(max=table.shape[2] - 1)
        return table[layer].to(place.device)[:, place]

    def blocks(self, call):
        """bool [Hq, Tq, Tk]: the blocks of the row's own positions, and those before them whose
        largest logit is not below the threshold."""
        limit, own = self._limits(call), own_blocks(call, BLOCK_Q, BLOCK_K)
        key_block = torch.arange(own.shape[1], device=own.device)
        before = key_block < history_blocks(call)[:, None]
        kept = own.repeat(call.q.shape[0], 1, 1)
        for first, found in maxima(call):
            rows = slice(first, first + found.shape[1])
            kept[:, rows] |= (found.double() >= limit[:, rows, None]) & before[rows]
        return kept

    def pairs(self, call, blocks):
        """float64 [Hq]: half of a pair is its Q K^T, which is always computed, half its P V."""
        return (causal_pairs(call) + super().pairs(call, blocks)) / 2
