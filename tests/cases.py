# SPDX-License-Identifier: Apache-2.0
"""What is tested: lengths, ratios, dtypes, geometries, and inputs that make selection matter."""

from typing import NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (8, 16, 40, 64, 80, 96, 128, 192, 256)  # any multiple of 8 up to 256
HEAD_RATIOS = ((2, 2), (3, 1), (4, 1), (8, 1), (6, 2))  # query heads, key heads
BLOCK_SIZES = (64, 128, 256)
METHODS = ("mean_pool", "antidiagonal")
ROW = {"select": "antidiagonal", "normalize": "row"}
SCORERS = ({"select": "mean_pool"}, {"select": "antidiagonal"}, ROW)
CORRECTIONS = ("none", "mean")
PEAK = {"permute": "identity", "reduce": "max", "stride": 16, "rule": "absolute", "tau": 0.3,
        "correction": "mean", **ROW}  # fmt: skip
PERMUTES = ("none", "identity", "keys", "queries", "both")
ORDERS = ("last_block", "mean_query", "random_query", "random")
RULES = (("prefix", 0.9), ("relative", 0.1), ("absolute", 0.05), ("budget", 2.0))
LAYOUTS = ("bhnd", "bnhd", "fused", "row_stride")


def lengths(block_size=128, segment_size=256):
    """Around every edge, and odd primes that divide nothing."""
    b, s = block_size, segment_size
    edges = (1, b - 1, b, b + 1, s - 1, s, s + 1, 2 * s, 2 * s + 1)
    return edges + tuple(_prime(x) for x in (b // 3, s + b // 2, 3 * s + b // 3))


def scored_orders(permutes=PERMUTES, scorers=SCORERS):
    """(scorer, permute): every scorer with every order that it works on."""
    return [
        (scorer, permute)
        for scorer in scorers
        for permute in permutes
        if scorer is not ROW or permute not in ("none", "queries", "both")
    ]


def _prime(n):
    while any(n % d == 0 for d in range(2, int(n**0.5) + 1)):
        n += 1
    return n


class Case(NamedTuple):
    """Where the sequences of a batch lie; None = from 0, whole tensor."""

    name: str
    seqlen_q: int
    seqlen_k: int
    q_start: tuple | None = None
    q_len: tuple | None = None
    kv_start: tuple | None = None
    kv_len: tuple | None = None
    batch: int = 2
    packed: bool = False  # all sequences in one row

    @property
    def rows(self):
        return 1 if self.packed else self.batch

    def geometry(self):
        """{"q_start": int32 tensor or None, ...}"""
        vectors = self._asdict()
        return {
            name: None if vectors[name] is None else torch.tensor(vectors[name], dtype=torch.int32)
            for name in ("q_start", "q_len", "kv_start", "kv_len")
        }


def geometries(block_size=128, segment_size=256):
    b, s = block_size, segment_size
    n = 3 * s + b // 2 + 5
    return (
        Case("whole", n, n),
        Case("right_padding", n, n, q_len=(n, n - s - 3), kv_len=(n, n - s - 3)),
        Case(
            "left_padding", n, n, (0, s + 3), (n, n - s - 3), (0, s + 3), (n, n - s - 3)
        ),
        Case("static_cache", s + 7, n + s, kv_len=(n, 2 * s + 9), q_len=(s + 7, b - 3)),
        Case("chunk", b + 9, n),  # a later chunk, offset a multiple of nothing
        Case("chunk_aligned", 2 * b, 4 * s),
        Case("one_row", 1, n),
        Case("q_longer", n, 2 * s + 5),  # the first rows see no key
        Case("no_keys", b, n, kv_len=(0, n)),
        Case("no_rows", b, n, q_len=(0, b)),
        Case(
            "packed", 2 * n, 2 * n, (0, n - s, n + 2), (n - s, s + 2, n - 2),
            (0, n - s, n + 2), (n - s, s + 2, n - 2), 3, True,
        ),
        Case(
            "packed_chunks", 2 * s, 2 * n, (0, s - 1), (s - 1, b + 1), (0, n), (n, n - b), 2, True,
        ),
    )  # fmt: skip


class Inputs(NamedTuple):
    q: torch.Tensor  # [rows, Hq, seqlen_q, D]
    k: torch.Tensor  # [rows, Hk, seqlen_k, D]
    v: torch.Tensor


def make_inputs(
    seed, heads=(2, 1), seqlen_q=1000, seqlen_k=None, head_dim=64, dtype=torch.float32, *,
    batch=1, case=None, layout="bhnd", nan_padding=False, device="cpu",
):  # fmt: skip
    """q, k, v for which selection is not trivial.

    A strong first key of every sequence (a sink), 5% heavy keys that all queries like, and topics
    of 170 tokens (2/3 of a segment) that queries share with the keys of earlier stretches.
    nan_padding: rows outside the sequences are nan; in strided layouts the memory between rows is
    nan as well. Whoever reads it shows it.
    """
    if case is not None:
        seqlen_q, seqlen_k, batch = case.seqlen_q, case.seqlen_k, case.rows
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    g = torch.Generator().manual_seed(seed)
    heads_q, heads_k = heads

    def noise(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float32)

    common, sink, topics = noise(head_dim), noise(head_dim), noise(7, head_dim)
    unit = head_dim**-0.25  # a unit in q times a unit in k adds about 1 to the logit
    topic_q = (torch.arange(seqlen_q) + seqlen_k - seqlen_q).clamp(min=0) // 170 * 3 % 7
    topic_k = torch.arange(seqlen_k) // 170 % 7
    k = noise(batch, heads_k, seqlen_k, head_dim) + 1.4 * unit * topics[topic_k]
    heavy = torch.rand(batch, heads_k, seqlen_k, 1, generator=g) < 0.05
    k = torch.where(heavy, k + 3.0 * unit * common, k)
    for start in (0,) if case is None or case.kv_start is None else case.kv_start:
        k[:, :, start : start + 1] += 5.0 * unit * sink
    q = noise(batch, heads_q, seqlen_q, head_dim) + unit * (1.4 * topics[topic_q] + common + sink)
    v = noise(batch, heads_k, seqlen_k, head_dim)
    tensors = [x.to(dtype) for x in (q, k, v)]
    if nan_padding and case is not None:
        _fill_outside(tensors[0], case.q_start, case.q_len, case)
        _fill_outside(tensors[1], case.kv_start, case.kv_len, case)
        _fill_outside(tensors[2], case.kv_start, case.kv_len, case)
    return Inputs(*(lay_out(x, layout).to(device) for x in tensors))


def _fill_outside(x, starts, sizes, case):
    if starts is None and sizes is None:
        return
    outside = torch.ones(x.size(0), x.size(2), dtype=torch.bool)
    for b in range(case.batch):
        begin = 0 if starts is None else starts[b]
        size = x.size(2) - begin if sizes is None else sizes[b]
        outside[0 if case.packed else b, begin : begin + size] = False
    x.masked_fill_(outside[:, None, :, None], float("nan"))


def lay_out(x, layout):
    """The same values with other strides (last = 1); gaps are nan."""
    batch, heads, seqlen, head_dim = x.shape
    if layout == "bnhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "fused":  # a slice of a wider projection, as [B, N, 3 H D] is split
        wide = x.new_full((batch, seqlen, 3, heads, head_dim), float("nan"))
        wide[:, :, 1] = x.transpose(1, 2)
        return wide[:, :, 1].transpose(1, 2)
    if layout == "row_stride":
        wide = x.new_full((batch, heads, seqlen, head_dim + 8), float("nan"))
        wide[..., :head_dim] = x
        return wide[..., :head_dim]
    return x.contiguous()
