# SPDX-License-Identifier: Apache-2.0
"""The block methods once more, in plain loops over one head: what pbs_attn.methods is checked with.

Nothing here comes from pbs_attn. All of it is fp64 and dense on purpose, for some hundred tokens.
Every function takes one Head and returns bool [Tq, Tk] without blocks above the diagonal.
"""

import functools
import math
from typing import NamedTuple

import torch


class _Head(NamedTuple):
    q: torch.Tensor  # [Nq, D]
    k: torch.Tensor  # [Nk, D]
    scale: float


class Head(_Head):
    """One head; its rows stand at the end of the keys."""

    @property
    def offset(self):
        return len(self.k) - len(self.q)

    @functools.cached_property
    def attention(self):
        """[Nq, Nk], rows that see no key are 0."""
        logit = self.scale * (self.q @ self.k.T)
        a = torch.zeros_like(logit)
        for i in range(max(-self.offset, 0), len(self.q)):
            weight = torch.exp(logit[i, : self.offset + i + 1])
            a[i, : len(weight)] = weight / weight.sum()
        return a


class Grid:
    """Blocks of one head."""

    def __init__(self, head, size):
        self.offset, self.size = head.offset, size
        self.num_q, self.num_k = -(-len(head.q) // size), -(-len(head.k) // size)
        self.rows = [range(m * size, min((m + 1) * size, len(head.q))) for m in range(self.num_q)]
        self.keys = [range(n * size, min((n + 1) * size, len(head.k))) for n in range(self.num_k)]

    def last(self, m):
        """Position of the last row of block m."""
        return self.offset + self.rows[m][-1]

    def causal(self, m, n):
        return self.keys[n][0] <= self.last(m)

    def own(self, m):
        """Key blocks in which rows of block m stand."""
        positions = (self.offset + i for i in self.rows[m])
        return {p // self.size for p in positions if p >= 0}

    def mask(self, chosen):
        """chosen: {m: key blocks}"""
        mask = torch.zeros(self.num_q, self.num_k, dtype=torch.bool)
        for m, blocks in chosen.items():
            for n in blocks:
                mask[m, n] = self.causal(m, n)
        return mask

    def everything(self):
        return self.mask({m: range(self.num_k) for m in range(self.num_q)})


def part(x, rows):
    return x[rows[0] : rows[-1] + 1]


def streaming(head, size, sink, window):
    grid = Grid(head, size)
    position = (head.offset + torch.arange(len(head.q)))[:, None]
    key = torch.arange(len(head.k))
    asked = (key <= position) & ((key < sink) | (key > position - window))
    return grid.mask(
        {
            m: [
                n
                for n in range(grid.num_k)
                if part(part(asked, grid.rows[m]).T, grid.keys[n]).any()
            ]
            for m in range(grid.num_q)
        }
    )


def oracle_mass(head, size, reduce):
    """{(m, n): mass}"""
    grid, mass = Grid(head, size), {}
    for m in range(grid.num_q):
        live = [i for i in grid.rows[m] if head.offset + i >= 0]
        for n in range(grid.num_k):
            shares = part(head.attention[live].T, grid.keys[n]).sum(0).tolist()
            if reduce == "max":
                mass[m, n] = max(shares, default=0.0)
            else:
                mass[m, n] = sum(shares) / max(len(live), 1)
    return mass


def oracle(head, size, tau, mass, rule="prefix"):
    """mass: what oracle_mass gave"""
    grid, chosen = Grid(head, size), {}
    for m in range(grid.num_q):
        kept = grid.own(m)
        if rule == "absolute":
            chosen[m] = kept | {n for n in range(grid.num_k) if mass[m, n] >= tau}
            continue
        total = sum(mass[m, n] for n in range(grid.num_k))
        others = sorted(set(range(grid.num_k)) - kept, key=lambda n, m=m: (-mass[m, n], n))
        for place, n in enumerate(others):
            if rule == "budget" and place >= tau:
                break
            if rule == "prefix" and sum(mass[m, x] for x in kept) >= tau * total:
                break
            kept = kept | {n}
        chosen[m] = kept
    return grid.mask(chosen)


def energies(group, size, m):
    """{n: E} of query block m, over exp(0); group: heads that share a key head and a selection."""
    grid, k, scale = Grid(group[0], size), group[0].k, group[0].scale
    energy = {}
    for n, keys in enumerate(grid.keys):
        if keys[0] + size - 1 <= grid.last(m):  # wholly before or at the last row
            rows = [i for i in grid.rows[m] if grid.offset + i >= keys[0]]
            mean = part(k, keys).mean(0)
            energy[n] = sum(float((scale * (x.q[rows] @ mean)).exp().sum()) for x in group)
    return energy


def flashprefill(group, size, alpha, sink, window, last):
    grid = Grid(group[0], size)
    dense_from = grid.num_q - -(-last // size)
    chosen = {}
    for m in range(grid.num_q):
        energy = energies(group, size, m)
        bar = alpha * max(energy.values(), default=0.0)
        kept = {n for n, e in energy.items() if e >= bar}
        own = grid.own(m) or {0}
        kept |= {n for n in range(grid.num_k) if n < -(-sink // size)}
        kept |= {n for n in range(grid.num_k) if n > min(own) - -(-window // size)}
        chosen[m] = set(range(grid.num_k)) if m >= dense_from else kept
    return grid.mask(chosen)


def flexprefill(head, size, gamma, tau, min_budget):
    """(blocks, whether the head is query-aware; None where all is dense)."""
    (q, k, scale), grid = head, Grid(head, size)
    budget = -(-min_budget // size)
    if len(k) <= max(2 * size, budget * size):
        return grid.everything(), None
    probe = range(max(0, len(q) - size), len(q))
    a = part(head.attention, probe) / len(probe)
    column = a.sum(0).tolist()
    nearest = grid.offset + probe[0]  # key at the place of the first probe row
    distance = [float(a.diagonal(nearest - d).sum()) for d in range(len(k))]
    by_column = [sum(column[j] for j in keys) for keys in grid.keys]
    by_distance = [0.0] * grid.num_k  # of blocks: the short one holds the smallest distances
    for d, share in enumerate(distance):
        by_distance[grid.num_k - 1 - (len(k) - 1 - d) // size] += share
    means = torch.stack([part(k, keys).mean(0) for keys in grid.keys])
    middle = part(q, probe).mean(0)
    p = torch.softmax(scale * (means @ middle), 0).tolist()
    divergence = 0.0
    for x, y in zip(p, by_column, strict=True):
        for z in (x, y):
            divergence += 0.5 * z * math.log(2 * z / (x + y)) if z > 0 else 0.0
    aware = math.sqrt(max(divergence, 0.0)) < tau
    columns, distances = (
        budget if aware else max(budget, _covering(x, gamma) // size + 1)
        for x in (column, distance)
    )
    kept_columns = _largest(by_column, columns, first=0)
    kept_distances = _largest(by_distance, distances, first=0)
    chosen = {}
    for m in range(grid.num_q):
        chosen[m] = grid.own(m) | kept_columns
        for home in grid.own(m):
            chosen[m] |= {home - d for d in kept_distances if home >= d}
    if aware:
        for m, n in _pooled_prefix(q, means, grid, scale, gamma):
            chosen[m].add(n)
    return grid.mask(chosen), aware


def _covering(shares, gamma):
    """Entries of the falling order up to the first sum above gamma, that one included."""
    total = 0.0
    for count, share in enumerate(sorted(shares, reverse=True), 1):
        total += share
        if total > gamma:
            return count
    return len(shares) + 1


def _largest(shares, count, first):
    order = sorted(range(len(shares)), key=lambda n: (n != first, -shares[n], n))
    return set(order[:count])


def _pooled_prefix(q, means, grid, scale, gamma):
    """Entries of the largest pooled shares of the whole head, at most gamma per query block."""
    entries, rows = [], 0
    for m in range(grid.num_q):
        seen = [n for n in range(grid.num_k) if grid.causal(m, n)]
        rows += bool(seen)
        pooled = part(q, grid.rows[m]).mean(0)
        weight = [math.exp(scale * float(pooled @ means[n])) for n in seen]
        entries += [(w / sum(weight), m, n) for w, n in zip(weight, seen, strict=True)]
    total = 0.0
    for share, m, n in sorted(entries, reverse=True):
        total += share
        if total > gamma * rows:
            return
        yield m, n


def authors_mean_pool(head, size, tau):
    (q, k, scale), grid = head, Grid(head, size)
    q_mean = [part(q, rows).sum(0) / size for rows in grid.rows]
    k_mean = [part(k, keys).sum(0) / size for keys in grid.keys]
    chosen = {}
    for m in range(grid.num_q):
        seen = [n for n in range(grid.num_k) if grid.causal(m, n)]
        weight = {n: math.exp(scale * float(q_mean[m] @ k_mean[n])) for n in seen}
        kept, total = grid.own(m) | {0}, 0.0
        for n in sorted(seen, key=lambda n: (-weight[n], n)):
            kept.add(n)
            total += weight[n] / sum(weight.values())
            if total >= tau:
                break
        chosen[m] = kept
    return grid.mask(chosen)


def authors_xattention(head, size, tau, mass, first_chunk):
    """mass: of antidiagonal_mass; rows before first_chunk: chosen as the authors' first chunk."""
    grid, chosen = Grid(head, size), {}
    for m in range(grid.num_q):
        total = sum(mass[m])
        chunk = grid.offset == 0 and m * size < first_chunk
        forced = grid.own(m) if chunk else grid.own(m) | {0}
        rest = sorted(set(range(grid.num_k)) - forced, key=lambda n, m=m: (-mass[m][n], n))
        have = sum(mass[m][n] for n in forced)
        # What each entry of `rest` is compared with: the mass in front of it; in the first chunk
        # the mass in front of its predecessor, and for the very first nothing.
        sums = [have + sum(mass[m][x] for x in rest[:place]) for place in range(len(rest))]
        if chunk:
            sums = [0.0, *sums[:-1]] if sums else []
        kept = {n for n, before in zip(rest, sums, strict=True) if before < tau * total}
        chosen[m] = forced | kept | {0}
    return grid.mask(chosen)


def antidiagonal_mass(head, size, stride):
    """[Tq][Tk]: sums of the softmax of antidiagonal scores over groups of `stride`."""
    (q, k, scale), grid = head, Grid(head, size)
    product = q @ k.T
    mass = [[0.0] * grid.num_k for _ in range(grid.num_q)]
    for start in range(0, len(q), stride):
        last = grid.offset + min(start + stride, len(q)) - 1
        score = {}
        for key in range(0, min(last + 1, len(k)), stride):
            pairs = [(start + stride - 1 - i, key + i) for i in range(stride)]
            inside = [(i, j) for i, j in pairs if i < len(q) and j < len(k)]
            rows, keys = [i for i, _ in inside], [j for _, j in inside]
            score[key] = scale / stride * float(product[rows, keys].sum())
        weight = {key: math.exp(z) for key, z in score.items()}
        for key, w in weight.items():
            mass[start // size][key // size] += w / sum(weight.values())
    return mass


def peak(head, size, segment, stride, tau):
    """The blocks of `peak`: history that one group of rows needs, block 0 and the own segments."""
    (q, k, scale), grid = head, Grid(head, size)
    product, chosen = q @ k.T, {}
    for m, rows in enumerate(grid.rows):
        own = max(grid.offset + rows[0], 0) // segment * segment  # first key of the own span
        share = dict.fromkeys(range(own // size), 0.0)
        for start in range(rows[0], rows[-1] + 1, stride):
            group = range(start, min(start + stride, rows[-1] + 1))
            weight = {}
            for key in range(0, len(k), stride):
                if key >= own and key > grid.offset + group[-1]:
                    continue
                pairs = [(start + stride - 1 - i, key + i) for i in range(stride)]
                inside = [(i, j) for i, j in pairs if i in group and j < len(k)]
                z = sum(float(product[i, j]) for i, j in inside)
                weight[key] = math.exp(scale / stride * z)
            for n in share:
                here = sum(w for key, w in weight.items() if key // size == n)
                share[n] = max(share[n], here / sum(weight.values()))
        kept = {n for n, x in share.items() if x >= tau or n == 0}
        chosen[m] = kept | set(range(own // size, grid.num_k))
    return grid.mask(chosen)


def attend(head, v, mask, block_q, block_k, correction="none", own=None, dtype=torch.float64):
    """(out [Nq, Dv], lse [Nq]) over mask [Tq][Tk], row by row and block by block.

    own: f(m), first key of the span that a correction leaves alone; default: what not all rows of
    the query block see. dtype: what the means are rounded to."""
    q, k, scale = head
    whole = range(len(k) // block_k)
    means = [
        [part(x, range(n * block_k, (n + 1) * block_k)).mean(0).to(dtype).double() for n in whole]
        for x in (k, v)
    ]
    out, lse = torch.zeros(len(q), v.shape[1], dtype=torch.float64), []
    for i, row in enumerate(q):
        m = i // block_q
        seen = range(min(max(head.offset + i + 1, 0), len(k)))
        keys = [j for j in seen if mask[m][j // block_k]]
        history = head.offset + m * block_q + 1 if own is None else own(m)
        gone = [n for n in whole if (n + 1) * block_k <= history and not mask[m][n]]
        gone = gone if correction == "mean" else []
        logit = (scale * (k[keys] @ row)).tolist()
        logit += [scale * float(means[0][n] @ row) + math.log(block_k) for n in gone]
        value = [v[keys], *(means[1][n][None] for n in gone)]
        if not logit:
            lse.append(-math.inf)
            continue
        weight = torch.tensor([math.exp(z - max(logit)) for z in logit], dtype=torch.float64)
        lse.append(max(logit) + math.log(weight.sum()))
        out[i] = weight @ torch.cat(value) / weight.sum()
    return out, torch.tensor(lse, dtype=torch.float64)


def density(mask, head, size, pair=128):
    """Mean over causal pairs of 128 rows and keys of the share of their causal tiles in `mask`."""
    fine, whole = Grid(head, min(size, pair)), Grid(head, pair)
    per_pair, shares = pair // fine.size, []
    for m in range(whole.num_q):
        for n in range(whole.num_k):
            if not whole.causal(m, n):
                continue
            tiles = [
                bool(mask[a * fine.size // size, b * fine.size // size])
                for a in range(m * per_pair, min((m + 1) * per_pair, fine.num_q))
                for b in range(n * per_pair, min((n + 1) * per_pair, fine.num_k))
                if fine.causal(a, b)
            ]
            shares.append(sum(tiles) / len(tiles))
    return sum(shares) / len(shares) if shares else 1.0
