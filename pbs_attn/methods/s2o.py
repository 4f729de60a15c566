# SPDX-License-Identifier: Apache-2.0
"""S2O, our reading of the published description: ranked history, read until it adds too little.

The description (S2O, arXiv 2602.22575, ACL 2026) leaves details open and no code is public. What we
read is exact below; what it leaves open is a parameter. Queries are cut into segments of positions
[gS, (g + 1)S). The history of a segment are the keys before it, so any order of them is causal.

    1. queries of a segment are ordered by q_i . guide, where the guide is one vector per segment:
       the mean of the 64 history keys that rank first (guide=keys); guide=identity leaves them
    2. history keys are ranked by r_j = mean of the segment's queries . k_j, token 0 before all
       others (sink=False: in its own place), and cut into tiles of `tile`
    3. pass 1: dense causal attention inside the segment gives l, the sum of exp
    4. pass 2: `rows` queries at a time read tile after tile. After tile t the gain of a row is
       (l_t - l_{t-1}) / l_t, both relative to one maximum. Once it is below tau for all rows
       (reduce=all; any: for one; mean: their mean is), the remaining tiles are dropped

The tile after which the reading stops is read. Ranks, order and gain are fp32, or fp64.
An exact reference in torch: it gathers, and looks at a segment's ranked keys a few tiles at a time.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..geometry import ceil_div
from .base import PAIR, TokenMethod, widen
from .blockmath import logits

GUIDE_KEYS = 64  # history keys that the guide is the mean of
STRIP_CELLS = 2**24  # logits held at a time: 64 MB in fp32


def rank(q, k, sink=True):
    """int64 [Hq, n]: history keys k [Hk, n, D] by falling r_j for the queries q [Hq, S, D] of a
    segment, equals by position; token 0 first if sink."""
    r = logits(q.mean(1, keepdim=True), k, 1.0)[:, 0]
    if sink:
        r[:, 0] = math.inf
    return r.argsort(dim=-1, descending=True, stable=True)


def order(q, k, ranked):
    """int64 [Hq, S]: queries of a segment by falling q . guide, the mean of the best keys."""
    best = _gather(k, ranked[:, :GUIDE_KEYS]).mean(1, keepdim=True)  # [Hq, 1, D]
    return (q @ best.transpose(1, 2))[..., 0].argsort(dim=-1, descending=True, stable=True)


def _gather(k, index):
    """Rows index [Hq, n] of k [Hk, N, D], the key head of each query head: [Hq, n, D]."""
    head = torch.arange(index.shape[0], device=index.device) // (index.shape[0] // k.shape[0])
    return k[head[:, None], index]


def visible_cells(call):
    """int64 [Tq, Tk]: entries (row, key) of each pair that the causal mask lets through."""

    def edges(count, shift):
        block = torch.arange(ceil_div(count, PAIR) + 1, device=call.q.device)
        return ((block * PAIR).clamp(max=count) + shift).clamp(min=0)

    # `below` counts the entries with position < p, key < j and key <= position; a pair is what lies
    # between its corners.
    p = edges(call.q.shape[1], call.q_offset)[:, None]
    j = edges(call.k.shape[1], 0)
    both = torch.minimum(p, j)
    below = both * (both + 1) // 2 + (p - both) * j
    return below[1:, 1:] - below[:-1, 1:] - below[1:, :-1] + below[:-1, :-1]


@dataclass(frozen=True, kw_only=True)
class S2O(TokenMethod):
    """segment_size  queries that share a ranking (S)
    tau           relative gain below which the reading stops; 0 reads everything
    tile          ranked keys per tile
    rows          queries that stop together, in their order inside the segment
    guide         keys | identity: what orders the queries
    reduce        all | mean | any: of the rows' gains
    sink          token 0 stands in the first tile
    """

    NAME: ClassVar[str] = "s2o"
    ABOUT: ClassVar[str] = (
        "our reading of the published description of S2O: ranked history with early stop "
        "(exact reference in torch)"
    )
    SOURCE: ClassVar[str] = "S2O, arXiv 2602.22575 (no code published); open details are parameters"
    KEEP_ALL: ClassVar[str] = "tau=0"

    segment_size: int = 256
    tau: float = 0.003
    tile: int = 64
    rows: int = PAIR
    guide: str = "keys"
    reduce: str = "all"
    sink: bool = True

    def check(self):
        for name in ("segment_size", "tile", "rows"):
            self.check_int(name, 1)
        self.check_number("tau", 0.0, 1.0)
        self.check_choice("guide", ("keys", "identity"))
        self.check_choice("reduce", ("all", "mean", "any"))
        self.check_flag("sink")

    def attention(self, call):
        """(out [Hq, Nq, Dv], float64 [Hq] computed causal pairs)."""
        num_heads, num_q, num_k = call.q.shape[0], call.q.shape[1], call.k.shape[1]
        out = call.q.new_zeros(num_heads, num_q, call.v.shape[2])
        whole = visible_cells(call)
        cells = torch.zeros(num_heads, *whole.shape, dtype=torch.int32, device=whole.device)
        wide = Wide(widen(call.q), widen(call.k), widen(call.v), call.scale, call.q_offset)
        position = max(call.q_offset, 0)
        while position < num_k and num_q:
            start = position // self.segment_size * self.segment_size
            end = min(start + self.segment_size, num_k)
            begin, position = position, end
            self._segment(wide, start, begin, end, out, cells)
        share = cells.to(torch.float64) / whole.clamp(min=1)
        return out, share.sum((1, 2))

    def _segment(self, wide, start, begin, end, out, cells):
        """Positions [begin, end) of the segment that starts at `start`: writes their rows of out
        and adds what they read to cells int32 [Hq, Tq, Tk]."""
        q = wide.q[:, begin - wide.offset : end - wide.offset]
        num_heads, num_rows = q.shape[:2]
        place = torch.arange(num_rows, device=q.device).expand(num_heads, -1)
        history = wide.k[:, :start]
        if start:
            ranked = rank(q, history, self.sink)
            if self.guide == "keys":
                place = order(q, history, ranked)
                q = q.gather(1, place[..., None].expand_as(q))
        # Pass 1. `running` is the state of an online softmax: maximum, sum, weighted values.
        position = begin + place[..., None]  # [Hq, rows, 1]
        key = torch.arange(start, end, device=q.device)
        scores = logits(q, wide.k[:, start:end], wide.scale)
        running = Running(q, wide.v.shape[2])
        running.add(scores.masked_fill_(key > position, -math.inf), wide.v[:, start:end])
        row = begin - wide.offset + place  # in the call
        _count_window(row, start, wide.offset, cells)
        if start:
            self._history(wide, q, ranked, row, running, cells)
        result = running.result().to(out.dtype)
        out.scatter_(1, row[..., None].expand_as(result), result)

    def _history(self, wide, q, ranked, row, running, cells):
        """Pass 2: adds ranked tiles to `running` until every group of rows has stopped."""
        num_heads, num_rows = q.shape[:2]
        groups = ceil_div(num_rows, self.rows)
        step = max(STRIP_CELLS // (num_heads * num_rows * self.tile), 1) * self.tile
        going = torch.ones(num_heads, groups, dtype=torch.bool, device=q.device)
        for first in range(0, ranked.shape[1], step):
            index = ranked[:, first : first + step]
            scores = (q * wide.scale) @ _gather(wide.k, index).transpose(1, 2)
            read = self._read(scores, running.lse(), going)  # [Hq, groups, tiles]
            keys = read.repeat_interleave(self.tile, 2)[..., : index.shape[1]]
            allowed = keys.repeat_interleave(self.rows, 1)[:, :num_rows]
            running.add(scores.masked_fill_(~allowed, -math.inf), _gather(wide.v, index))
            _count_ranked(row, keys, index, self.rows, cells)
            if not going.any():
                break

    def _read(self, scores, lse, going):
        """bool [Hq, groups, tiles] tiles that are read; `going` [Hq, groups] is updated in place.

        scores [Hq, rows, n] of the next ranked keys, lse [Hq, rows] of all read before."""
        pad = (0, -scores.shape[2] % self.tile)
        tiles = torch.nn.functional.pad(scores, pad, value=-math.inf)
        tiles = tiles.unflatten(2, (-1, self.tile)).logsumexp(3)  # [Hq, rows, tiles]
        total = torch.cat([lse[..., None], tiles], 2).logcumsumexp(2)[..., 1:]
        gain = self._reduce((tiles - total).exp())
        stopped = (gain < self.tau).long().cumsum(2)
        before = stopped - (gain < self.tau).long()  # stops before this tile
        read = going[..., None] & (before == 0)
        going &= stopped[..., -1] == 0
        return read

    def _reduce(self, gain):
        """gain [Hq, rows, tiles] -> [Hq, groups, tiles]; rows that do not exist have no say."""
        num_rows = gain.shape[1]
        pad = (0, 0, 0, -num_rows % self.rows)
        fill = {"all": -math.inf, "any": math.inf, "mean": 0.0}[self.reduce]
        gain = torch.nn.functional.pad(gain, pad, value=fill).unflatten(1, (-1, self.rows))
        if self.reduce == "all":
            return gain.amax(2)
        if self.reduce == "any":
            return gain.amin(2)
        group = torch.arange(gain.shape[1], device=gain.device)[:, None] * self.rows
        return gain.sum(2) / (num_rows - group).clamp(max=self.rows)


def _count_window(row, start, offset, cells):
    """Adds the cells of pass 1: each row reads the keys from start to its own position."""
    edge = torch.arange(cells.shape[2] + 1, device=row.device) * PAIR
    seen = edge.clamp(min=start) - start  # keys of the segment before each edge
    seen = torch.minimum(seen, row[..., None] + offset + 1 - start)
    counts = (seen[..., 1:] - seen[..., :-1]).to(cells.dtype)
    cells.scatter_add_(1, (row // PAIR)[..., None].expand_as(counts), counts)


def _count_ranked(row, keys, index, rows, cells):
    """Adds the cells of one step of pass 2: keys bool [Hq, groups, n] says which ranked keys
    index [Hq, n] each group of `rows` rows read; row int64 [Hq, num_rows] in the call."""
    blocks = torch.zeros(*keys.shape[:2], cells.shape[2], dtype=cells.dtype, device=cells.device)
    place = (index // PAIR)[:, None].expand_as(keys)
    blocks.scatter_add_(2, place, keys.to(cells.dtype))  # keys that a group read of each block
    counts = blocks.repeat_interleave(rows, 1)[:, : row.shape[1]]
    cells.scatter_add_(1, (row // PAIR)[..., None].expand_as(counts), counts)


@dataclass(frozen=True, eq=False)
class Wide:
    """A call in fp32 or wider."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    offset: int


class Running:
    """The state of an online softmax over [Hq, rows]: nothing is read twice."""

    def __init__(self, q, head_dim_v):
        self.peak = q.new_full(q.shape[:2], -math.inf)
        self.sum = q.new_zeros(q.shape[:2])
        self.value = q.new_zeros(*q.shape[:2], head_dim_v)

    def add(self, scores, v):
        """scores [Hq, rows, n], -inf where not read; v [Hk or Hq, n, Dv]."""
        peak = torch.maximum(self.peak, scores.amax(2))
        old = (self.peak - peak).exp()
        p = (scores - peak[..., None]).exp_()
        stacked = p.unflatten(0, (v.shape[0], -1)).flatten(1, 2) @ v
        self.value = self.value * old[..., None] + stacked.view(*p.shape[:2], -1)
        self.sum = self.sum * old + p.sum(2)
        self.peak = peak

    def lse(self):
        return self.peak + self.sum.log()

    def result(self):
        return self.value / self.sum[..., None]
