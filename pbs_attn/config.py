# SPDX-License-Identifier: Apache-2.0
"""PBSConfig: every choice that the method leaves open, checked when it is made."""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from dataclasses import replace as _replace

from . import selection

MAX_SEED = 2**63 - 1


def _fail(name, value, allowed, error=ValueError):
    raise error(f"PBSConfig: {name} is {value!r}; allowed: {allowed}")


def _check_int(name, value, low, high=None):
    span = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        _fail(name, value, span, TypeError)
    if value < low or (high is not None and value > high):
        _fail(name, value, span)


@dataclass(frozen=True)
class PBSConfig:
    """How permuted block-sparse attention selects and when it runs. Immutable and hashable.

    block_size    tokens per query and key block; kernels exist for 64, 128, 256
    segment_size  keys are permuted inside segments of this many; a multiple of block_size
    tau           threshold of `rule`; >= 1 keeps every block with the prefix rule
    permute       keys (the paper) | queries | both | identity (the control) | none (MeanPooling)
    order         last_block | mean_query | random_query | random: what orders the keys
    gqa           per_head: one order per query head | group: one per K/V head
    select        mean_pool | antidiagonal: what scores blocks
    stride        of antidiagonal; divides block_size
    reduce        sum | max: over the query rows of a block (antidiagonal)
    rule          prefix | relative | absolute | budget: what turns scores into blocks
    normalize     history | row: what scores are shares of, the keys before the own segments or
                  all that a row group sees (row: antidiagonal, queries not permuted)
    correction    none | mean: what stands for a dropped block; mean: one token with its mean key
                  and value
    seed          of the random orders
    min_q, min_kv shorter calls take the dense route; None = measured default of the device
    strict        raise where the kernels cannot do a call, instead of the dense route
    """

    block_size: int = 128
    segment_size: int = 256
    tau: float = 0.9
    permute: str = "keys"
    order: str = "last_block"
    gqa: str = "per_head"
    select: str = "mean_pool"
    stride: int = 8
    reduce: str = "sum"
    rule: str = "prefix"
    normalize: str = "history"
    correction: str = "none"
    seed: int = 0
    min_q: int | None = None
    min_kv: int | None = None
    strict: bool = False

    def __post_init__(self):
        _check_int("block_size", self.block_size, 1)
        _check_int("segment_size", self.segment_size, 1)
        if self.segment_size % self.block_size:
            _fail(
                "segment_size",
                self.segment_size,
                f"a multiple of block_size ({self.block_size})",
            )
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)):
            _fail("tau", self.tau, "a finite number >= 0", TypeError)
        if not math.isfinite(self.tau) or self.tau < 0:
            _fail("tau", self.tau, "a finite number >= 0")
        object.__setattr__(self, "tau", float(self.tau))
        for name in selection.CONFIG_NAMES:
            value, allowed = getattr(self, name), selection.NAMES[name]
            if not isinstance(value, str) or value not in allowed:
                _fail(name, value, ", ".join(allowed))
        _check_int("stride", self.stride, 1)
        if self.select == "antidiagonal" and self.block_size % self.stride:
            _fail("stride", self.stride, f"a divisor of block_size ({self.block_size})")
        self._check_normalize()
        _check_int("seed", self.seed, 0, MAX_SEED)
        for name in ("min_q", "min_kv"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0)
        if not isinstance(self.strict, bool):
            _fail("strict", self.strict, "True or False", TypeError)

    def _check_normalize(self):
        if self.normalize == "history" or self.permute == "none":  # which sees the row anyway
            return
        if self.select != "antidiagonal":
            allowed = (
                f"history with select={self.select} (row: select=antidiagonal or permute=none)"
            )
            _fail("normalize", self.normalize, allowed)
        if self.permute in selection.PERMUTES_QUERIES:
            allowed = f"history with permute={self.permute} (row: permute=none, identity or keys)"
            _fail("normalize", self.normalize, allowed)

    def replace(self, **changes):
        """A copy with some fields changed, checked again."""
        self._check_names(changes)
        return _replace(self, **changes)

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        """The config that `to_dict` gave; missing fields take their defaults."""
        if not isinstance(values, dict):
            raise TypeError(f"PBSConfig: got {type(values).__name__}; allowed: a dictionary")
        cls._check_names(values)
        return cls(**values)

    def to_json(self):
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text):
        """From JSON text, or from the file it names (text that does not start with a brace)."""
        source = "JSON text"
        if not text.lstrip().startswith("{"):
            source = os.path.expanduser(text.strip())
            with open(source, encoding="utf-8") as file:
                text = file.read()
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"PBSConfig: {source} is not valid JSON: {error}") from error
        return cls.from_dict(values)

    @classmethod
    def from_method(cls, text):
        """The config of a kernel method: "pbs+", "xattention:stride=16", "pbs:tau=0.8,block=64".

        Raises ValueError for a method that is more than a config: pass that one itself.

        >>> import pbs_attn
        >>> pbs_attn.PBSConfig.from_method("xattention:stride=16").select
        'antidiagonal'
        """
        from . import methods  # which need PBSConfig

        method = methods.get(text)
        if method.kind != "kernel":
            raise ValueError(
                f"PBSConfig: {text!r} is a {method.kind} method; allowed: kernel methods (other "
                "methods can be given wherever a PBSConfig can)"
            )
        if method.BY_LENGTH:
            raise ValueError(
                f"PBSConfig: {text!r} has a config for each length; allowed: PBSConfig.best(seqlen)"
            )
        if method.thresholds is not None:
            raise ValueError(f"PBSConfig: {text!r} has thresholds; allowed: pass the method itself")
        return method.config

    @classmethod
    def best(cls, seqlen):
        """The setting that the evidence supports for calls with `seqlen` keys.

        seqlen  keys that the last row of a call sees, in tokens: the prompt up to the end of the
                call, cached ones included
        Rows and the file that each was measured in are in pbs_attn/best.py (best.ROWS); a length
        beyond the longest measured one takes the last row. The method "best" asks for every call.
        Raises TypeError for anything but an int, ValueError below 1.

        >>> import pbs_attn
        >>> pbs_attn.PBSConfig.best(8192).rule
        'absolute'
        """
        from . import best  # which needs PBSConfig

        _check_int("seqlen", seqlen, 1)
        return best.config(seqlen)

    @classmethod
    def _check_names(cls, values):
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise TypeError(f"PBSConfig: no field {name!r}; allowed: {', '.join(known)}")
