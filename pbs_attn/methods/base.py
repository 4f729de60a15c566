# SPDX-License-Identifier: Apache-2.0
"""What a method is, what it is given, and how one is run and counted.

A Method is a frozen dataclass whose fields are its parameters. Of its kinds,

    stock   is the model's own attention: nothing of ours runs
    dense   is exact dense attention by our fastest exact kernel
    kernel  is a PBSConfig: selection and attention run in C or CUDA
    block   gives a block mask in torch; our own `attend` runs it
    token   computes attention itself in torch, exactly by its definition: slow, for reference

Density has one unit for all: over the causal pairs of 128 rows and 128 keys, anchored at the first
row and the first key of a sequence, the mean share of a pair that is computed. A pair or part of a
pair is causal if the last of its rows sees one of its keys.
"""

import math
import os
import typing
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import ClassVar

import torch

from ..geometry import Geometry, ceil_div, sequences
from ..selection import mask_to_bits

PAIR = 128  # rows and keys of a block pair, the unit of density
BLOCK_SIZES = (64, 128, 256)
ROUTING = ("min_q", "min_kv", "strict")  # fields of every method and of PBSConfig
_WHOLE = Geometry()
KINDS = ("stock", "dense", "kernel", "block", "token")


@dataclass(frozen=True, eq=False)
class Call:
    """One sequence of one attention call: any floating dtype, device and strides.

    q [Hq, Nq, D], k [Hk, Nk, D], v [Hk, Nk, Dv]; Hk divides Hq. Row i of q stands at position
    q_offset + i, key j at position j; a row sees the keys up to its own position.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float  # of the logits
    layer: int | None = None  # index in the model; None where it is not known

    @property
    def q_offset(self):
        """Position of the first row; negative if rows see no key."""
        return self.k.shape[1] - self.q.shape[1]

    @property
    def group(self):
        """Query heads per key head."""
        return self.q.shape[0] // self.k.shape[0]


def widen(x):
    """x in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand(k, num_heads):
    """[Hk, ...] as [num_heads, ...]: each key head repeated for its query heads. A copy."""
    return k.repeat_interleave(num_heads // k.shape[0], 0)


def causal_blocks(call, block_q=PAIR, block_k=PAIR):
    """bool [Tq, Tk]: key blocks of which the last row of a query block sees a key."""
    seqlen_q, seqlen_k, device = call.q.shape[1], call.k.shape[1], call.q.device
    m = torch.arange(ceil_div(seqlen_q, block_q), device=device)
    n = torch.arange(ceil_div(seqlen_k, block_k), device=device)
    last = (m + 1) * block_q - 1 + call.q_offset  # past the end, where every key is seen as well
    return n * block_k <= last[:, None]


def own_blocks(call, block_q=PAIR, block_k=PAIR):
    """bool [Tq, Tk]: key blocks that hold the position of a row of the query block."""
    seqlen_q, device = call.q.shape[1], call.q.device
    m = torch.arange(ceil_div(seqlen_q, block_q), device=device)
    n = torch.arange(ceil_div(call.k.shape[1], block_k), device=device)
    first = m * block_q + call.q_offset
    return causal_blocks(call, block_q, block_k) & ((n + 1) * block_k > first[:, None])


def causal_pairs(call):
    """Number of causal pairs: the 100% of a density."""
    return int(causal_blocks(call).sum())


def block_pairs(call, blocks, block_q=PAIR, block_k=PAIR):
    """float64 [H]: computed pairs of blocks [H, Tq, Tk] of block_q rows and block_k keys.

    Sizes 64, 128, 256. A larger block computes all pairs in it that are causal; of smaller ones a
    pair holds several, and the share of its causal ones counts."""
    fine_q, fine_k = min(block_q, PAIR), min(block_k, PAIR)
    causal = causal_blocks(call, fine_q, fine_k)
    kept = blocks.repeat_interleave(block_q // fine_q, 1).repeat_interleave(block_k // fine_k, 2)
    kept = kept[:, : causal.shape[0], : causal.shape[1]] & causal
    if fine_q == fine_k == PAIR:
        return kept.sum((1, 2)).to(torch.float64)
    kept, causal = (_by_pair(x, PAIR // fine_q, PAIR // fine_k) for x in (kept, causal[None]))
    return (kept / causal.clamp(min=1)).sum((1, 2))


def cell_pairs(call, cells, first_row):
    """float64 [H]: computed pairs of single cells, bool [H, R, Nk], in rows from first_row on.

    first_row is a multiple of 128, and so is R unless the rows are the last. Cells above the
    diagonal do not count; a pair counts by the share of its visible cells. For token methods,
    which walk over strips of rows and add up."""
    row = torch.arange(cells.shape[1], device=cells.device) + first_row + call.q_offset
    visible = torch.arange(cells.shape[2], device=cells.device) <= row[:, None]
    kept, visible = (_by_pair(x, PAIR, PAIR) for x in (cells & visible, visible[None]))
    return (kept / visible.clamp(min=1)).sum((1, 2))


def _by_pair(mask, rows, keys):
    """float64 [H, Pq, Pk]: sums over tiles of rows x keys entries."""
    pad = (0, -mask.shape[2] % keys, 0, -mask.shape[1] % rows)
    tiles = torch.nn.functional.pad(mask, pad).unflatten(2, (-1, keys)).sum(3)
    return tiles.unflatten(1, (-1, rows)).sum(2).to(torch.float64)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method and its parameters, checked when it is made. Immutable and hashable.

    min_q, min_kv shorter calls take the dense route; None = measured default of the device
    strict        raise where a call cannot be done by the method, instead of the dense route
    label         as the user wrote it; the canonical text if empty
    """

    NAME: ClassVar[str] = ""
    ABOUT: ClassVar[str] = ""  # one line
    SOURCE: ClassVar[str] = ""  # paper, section, commit
    RECIPE: ClassVar[str] = ""  # of NAME:recipe=RECIPE
    KEEP_ALL: ClassVar[str] = ""  # parameters that keep everything, "tau=1"; "" = see the docs
    DENSITY: ClassVar[str] = ""  # how a call is counted in pairs of 128 x 128
    FILES: ClassVar[tuple] = ()  # parameters that name a file
    kind: ClassVar[str] = ""

    min_q: int | None = None
    min_kv: int | None = None
    strict: bool = False
    label: str = field(default="", compare=False)

    def __post_init__(self):
        for name in ("min_q", "min_kv"):
            if getattr(self, name) is not None:
                self.check_int(name, 0)
        self.check_flag("strict")
        self.check()
        if not self.label:
            object.__setattr__(self, "label", self.text)

    def check(self):
        """Raises for a parameter that is not allowed; methods override it."""

    def fail(self, name, allowed, error=ValueError):
        """Raise for the parameter `name`, saying its value and what is allowed."""
        raise error(f"{self.NAME}: {name} is {getattr(self, name)!r}; allowed: {allowed}")

    def check_int(self, name, low, high=None):
        """The parameter is an integer in [low, high]."""
        value = getattr(self, name)
        span = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(name, span, TypeError)
        if value < low or (high is not None and value > high):
            self.fail(name, span)

    def check_number(self, name, low=0.0, high=math.inf):
        """The parameter is a finite number in [low, high]; kept as a float."""
        value = getattr(self, name)
        span = f"a finite number >= {low}" if high == math.inf else f"a number in [{low}, {high}]"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(name, span, TypeError)
        if not math.isfinite(value) or not low <= value <= high:
            self.fail(name, span)
        object.__setattr__(self, name, float(value))

    def check_choice(self, name, allowed):
        """The parameter is one of `allowed`."""
        if getattr(self, name) not in allowed:
            self.fail(name, ", ".join(str(each) for each in allowed))

    def check_flag(self, name):
        """The parameter is True or False."""
        if not isinstance(getattr(self, name), bool):
            self.fail(name, "True or False", TypeError)

    @classmethod
    def parameters(cls):
        """{name: default} of what a text may set."""
        found = {each.name: each.default for each in fields(cls) if each.name != "label"}
        return {name: None if value is MISSING else value for name, value in found.items()}

    @classmethod
    def value(cls, name, text):
        """`text` as the type of the field `name`; what cannot be read stays a text."""
        kinds = typing.get_type_hints(cls)[name]
        kinds = typing.get_args(kinds) or (kinds,)
        word = text.strip().lower()
        if type(None) in kinds and word == "none":
            return None
        if bool in kinds:
            words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
            return words.get(word, text)
        for kind in (int, float):
            if kind in kinds or (kind is int and float in kinds):
                try:
                    return kind(text)
                except ValueError:
                    pass
        return text

    @classmethod
    def from_base(cls, base):
        """What a method takes of the PBSConfig that the user gave for all: {name: value}."""
        return {} if base is None else {name: getattr(base, name) for name in ROUTING}

    @property
    def files(self):
        """Paths of the files that this method reads."""
        named = (getattr(self, name) for name in self.FILES)
        return [os.path.expanduser(path) for path in named if path is not None]

    @property
    def text(self):
        """Canonical text: the name and every parameter that is not the default."""
        changed = [f"recipe={self.RECIPE}"] if self.RECIPE else []
        for name, default in self.parameters().items():
            if getattr(self, name) != default:
                changed.append(f"{name}={getattr(self, name)}")
        return self.NAME + (":" + ",".join(changed) if changed else "")

    def replace(self, **changes):
        """A copy with some parameters changed, checked again. The label stays if only routing
        (min_q, min_kv, strict) changes."""
        known = [each.name for each in fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(f"{self.NAME}: no field {name!r}; allowed: {', '.join(known)}")
        if not set(changes) <= {*ROUTING, "label"}:
            changes.setdefault("label", "")
        return replace(self, **changes)

    def to_dict(self):
        """{"method": name, parameter: value, ...}: plain values, as JSON wants them."""
        return {"method": self.NAME, **{name: getattr(self, name) for name in self.parameters()}}


@dataclass(frozen=True, kw_only=True)
class BlockMethod(Method):
    """A selection of blocks that our own `attend` runs exactly.

    block_q and block_k are 64, 128 or 256: class attributes, properties or fields.

    correction  none, or mean: every key block that all rows of a query block see whole and that is
                not selected stands as one token, its mean key and mean value, the logit raised by
                ln(block_k); means are rounded to the dtype of k. Not counted in the density."""

    kind: ClassVar[str] = "block"
    DENSITY: ClassVar[str] = "computed causal blocks"
    CORRECTIONS: ClassVar[tuple] = ("none", "mean")
    block_q: ClassVar[int] = PAIR
    block_k: ClassVar[int] = PAIR

    correction: str = "none"

    def check(self):
        self.check_choice("correction", self.CORRECTIONS)

    def blocks(self, call):
        """bool [Hq or Hk, Tq, Tk]: blocks to compute, the own span included as the method defines;
        Tq = ceil(Nq / block_q), Tk = ceil(Nk / block_k). Entries above the diagonal are dropped."""
        raise NotImplementedError

    def pairs(self, call, blocks):
        """float64 [Hq]: computed causal pairs of the blocks that `blocks` gave."""
        return block_pairs(call, expand(blocks, call.q.shape[0]), self.block_q, self.block_k)


@dataclass(frozen=True, kw_only=True)
class TokenMethod(Method):
    """Attention that no block mask says: computed in torch, exactly as defined, and slowly."""

    kind: ClassVar[str] = "token"
    DENSITY: ClassVar[str] = "computed visible cells of each pair"

    def attention(self, call):
        """(out [Hq, Nq, Dv] in the dtype of q, float64 [Hq] computed causal pairs).

        Rows that see no key are 0."""
        raise NotImplementedError


def checked_blocks(method, call):
    """What `blocks` of the method gives, checked, without entries above the diagonal."""
    blocks = method.blocks(call)
    causal = causal_blocks(call, method.block_q, method.block_k)
    heads = (call.q.shape[0], call.k.shape[0])
    if (
        blocks.dtype != torch.bool
        or blocks.shape[0] not in heads
        or blocks.shape[1:] != causal.shape
    ):
        raise TypeError(
            f"{method.NAME}: blocks gave {blocks.dtype} {tuple(blocks.shape)}; allowed: torch.bool "
            f"[{heads[0]} or {heads[1]}, {causal.shape[0]}, {causal.shape[1]}]"
        )
    return blocks & causal


def run_call(method, call, return_lse=False):
    """One sequence by a block or token method: (out [Hq, Nq, Dv], lse fp32 [Hq, Nq] or None,
    float64 [Hq] computed causal pairs). Token methods have no lse."""
    if method.kind == "token":
        out, pairs = method.attention(call)
        return out, None, pairs
    from .. import dense  # here, as dense needs env, and env may need a method

    blocks = checked_blocks(method, call)
    pairs = method.pairs(call, blocks)
    q, k, v = (
        x[None] if x.stride(-1) == 1 else x[None].contiguous() for x in (call.q, call.k, call.v)
    )
    out, lse = dense.selected(
        q,
        k,
        v,
        mask_to_bits(blocks)[None].contiguous(),
        blocks.shape[2],
        _WHOLE,
        call.scale,
        method.block_q,
        method.block_k,
        return_lse,
        method.correction,
    )
    return out[0], lse[0] if return_lse else None, pairs


def run(method, q, k, v, geometry=_WHOLE, scale=None, layer=None, return_lse=False):
    """A whole attention call by a block or token method, sequence by sequence.

    q (B, Hq, Nq, D), k and v (B, Hk, Nk, D); geometry as for the kernels, its lengths are read on
    the host; scale of the logits, default D ** -0.5. Returns (out (B, Hq, Nq, Dv) over
    (B, Nq, Hq, Dv) memory, lse fp32 (B, Hq, Nq) or None, (float64 [Hq] computed causal pairs,
    causal pairs) summed over the sequences). Rows outside the sequences are 0, their lse -inf.
    """
    batch, num_heads, seqlen_q, head_dim = q.shape
    scale = scale or head_dim**-0.5
    out = q.new_zeros(batch, seqlen_q, num_heads, v.shape[3]).transpose(1, 2)
    lse = None
    if return_lse:
        lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    pairs = torch.zeros(num_heads, dtype=torch.float64, device=q.device)
    causal = 0
    with torch.no_grad():
        for _, call, (b, rows) in _calls(q, k, v, geometry, scale, layer):
            part, part_lse, computed = run_call(method, call, return_lse)
            out[b, :, rows] = part
            if return_lse:
                lse[b, :, rows] = part_lse
            pairs += computed
            causal += causal_pairs(call)
    return out, lse, (pairs, causal)


def plan_pairs(plan, q, k, v, geometry):
    """(selected [Hq], computed [Hq], causal) in pairs, of a kernel's plan with any block size.

    A pair counts by the share of its causal blocks that are selected; blocks above the diagonal,
    which only `computed` has, count by their area."""
    size, mask = plan.config.block_size, plan.mask()
    selected, causal = 0.0, 0
    for i, call, _ in _calls(q, k, v, geometry):
        tq, tk = ceil_div(call.q.shape[1], size), ceil_div(call.k.shape[1], size)
        selected = selected + block_pairs(call, mask[i, :, :tq, :tk], size, size)
        causal += causal_pairs(call)
    beyond = (plan.computed() - plan.density()) * plan.causal()[:, None]
    return selected, selected + beyond.sum(0) * (size / PAIR) ** 2, causal


def _calls(q, k, v, geometry, scale=1.0, layer=None):
    """(index, Call, (row of the batch, slice of its rows)) of every sequence with rows and keys."""
    seqs = sequences(geometry, q.shape[0], q.shape[2], k.shape[2], torch.device("cpu"))
    for i, spans in enumerate(zip(*(x.tolist() for x in seqs), strict=True)):
        q_start, q_len, kv_start, kv_len = spans
        if q_len and kv_len:
            b = i if q.shape[0] > 1 else 0
            rows, keys = slice(q_start, q_start + q_len), slice(kv_start, kv_start + kv_len)
            yield i, Call(q[b, :, rows], k[b, :, keys], v[b, :, keys], scale, layer), (b, rows)
