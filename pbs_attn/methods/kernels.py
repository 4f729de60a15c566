# SPDX-License-Identifier: Apache-2.0
"""Methods that PBSConfig and the kernels do whole, and the two that are dense.

docs/algorithm.md states them; a kernel method takes every field of PBSConfig as a parameter.
"""

import functools
import json
import math
import os
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch

from .. import best
from ..config import PBSConfig
from .base import ROUTING, Method


class _Dense(Method):
    """Exact attention: nothing to choose."""

    DENSITY: ClassVar[str] = "1"

    @classmethod
    def parameters(cls):
        return {}

    def to_dict(self):
        return {"method": self.NAME}


@dataclass(frozen=True, kw_only=True)
class Sdpa(_Dense):
    NAME: ClassVar[str] = "sdpa"
    ABOUT: ClassVar[str] = "the model's stock attention"
    SOURCE: ClassVar[str] = "transformers"
    kind: ClassVar[str] = "stock"


@dataclass(frozen=True, kw_only=True)
class Full(_Dense):
    NAME: ClassVar[str] = "full"
    ABOUT: ClassVar[str] = "exact dense attention by our fastest exact kernel"
    SOURCE: ClassVar[str] = "pbs_attn/dense.py"
    kind: ClassVar[str] = "dense"


@dataclass(frozen=True, kw_only=True)
class _Kernel(Method):
    """What our kernels run whole."""

    kind: ClassVar[str] = "kernel"
    DENSITY: ClassVar[str] = "selected causal blocks, the own span included"
    thresholds: ClassVar[str | None] = None
    BY_LENGTH: ClassVar[bool] = False  # no config of its own: each call's length has one

    def config_at(self, seqlen_k):
        """The PBSConfig of a call whose longest sequence has seqlen_k keys."""
        raise NotImplementedError

    def tau_heads(self, layer, num_heads, device):
        """fp32 [num_heads]: tau per query head; None where the config has the one of all."""
        return None


@dataclass(frozen=True, kw_only=True)
class KernelMethod(_Kernel):
    """A PBSConfig under a name; PBSConfig explains the fields.

    thresholds: JSON file of tau per [layer][query head], in place of `tau`; for xattention
    `eval calibrate` makes one."""

    KEEP_ALL: ClassVar[str] = "tau=1"
    FILES: ClassVar[tuple] = ("thresholds",)
    OWN: ClassVar[tuple] = ()  # fields that make the method itself: no base config changes them

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
    thresholds: str | None = None

    def check(self):
        try:
            config = self.config
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.NAME}: {str(error).removeprefix('PBSConfig: ')}") from error
        object.__setattr__(self, "tau", config.tau)
        if self.thresholds is not None:
            for name, value in _read_thresholds(self.thresholds).measured_with.items():
                if getattr(self, name) != value:
                    self.fail(name, f"{value}, which {self.thresholds} was measured with")

    @functools.cached_property
    def config(self):
        """The PBSConfig that the kernels take; thresholds are not in it."""
        return PBSConfig(**{name: getattr(self, name) for name in _CONFIG_NAMES})

    def config_at(self, seqlen_k):
        """The config, whatever the length."""
        return self.config

    @classmethod
    def from_base(cls, base):
        if base is None:
            return {}
        return {name: getattr(base, name) for name in _CONFIG_NAMES if name not in cls.OWN}

    def tau_heads(self, layer, num_heads, device):
        """fp32 [num_heads]: tau per query head from the thresholds; None without them."""
        if self.thresholds is None:
            return None
        table = _read_thresholds(self.thresholds).table
        where = f"{self.NAME}: thresholds {self.thresholds}"
        if layer is None:
            raise ValueError(f"{where} are per layer; allowed: in a model, or tau=NUMBER")
        if layer >= len(table):
            raise ValueError(f"{where} has {len(table)} layers; needed: layer {layer}")
        if len(table[layer]) != num_heads:
            raise ValueError(
                f"{where} has {len(table[layer])} heads in layer {layer}; needed: {num_heads}"
            )
        return torch.tensor(table[layer], dtype=torch.float32, device=device)


_CONFIG_NAMES = tuple(each.name for each in fields(PBSConfig))


class _Thresholds(NamedTuple):
    table: tuple  # ((tau, ...), ...) by layer and query head
    measured_with: dict  # parameters that they hold for; empty where the file does not say


def _read_thresholds(path):
    """_Thresholds of a JSON file; ValueError names what is wrong."""
    try:
        path = os.path.expanduser(path)
        return _read_file(path, os.stat(path).st_mtime_ns)
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"thresholds {path}: {error}") from error


@functools.lru_cache(maxsize=16)
def _read_file(path, _changed):
    with open(path, encoding="utf-8") as file:
        table = json.load(file)
    measured_with = {}
    if isinstance(table, dict) and table.get("method") == "xattention":  # by `eval calibrate`
        measured_with = {name: table[name] for name in ("block_size", "stride") if name in table}
        table = table.get("layers")
    if not isinstance(table, list) or not all(isinstance(row, list) for row in table) or not table:
        raise TypeError("allowed: a list over layers of lists over query heads")
    for i, row in enumerate(table):
        for j, tau in enumerate(row):
            is_number = isinstance(tau, (int, float)) and not isinstance(tau, bool)
            if not is_number or not math.isfinite(tau) or tau < 0:
                raise TypeError(f"[{i}][{j}] is {tau!r}; allowed: a finite number >= 0")
    table = tuple(tuple(float(tau) for tau in row) for row in table)
    return _Thresholds(table, measured_with)


@dataclass(frozen=True, kw_only=True)
class Pbs(KernelMethod):
    NAME: ClassVar[str] = "pbs"
    ABOUT: ClassVar[str] = "permuted keys, mean-pooled selection (the paper)"
    SOURCE: ClassVar[str] = "PBS-Attn, arXiv 2510.21270, algorithms 1 and 2; docs/algorithm.md"


@dataclass(frozen=True, kw_only=True)
class PbsPlus(KernelMethod):
    NAME: ClassVar[str] = "pbs+"
    ABOUT: ClassVar[str] = "permuted keys, antidiagonal selection"
    SOURCE: ClassVar[str] = "PBS-Attn+, arXiv 2510.21270, table 3; docs/algorithm.md"
    OWN: ClassVar[tuple] = ("select",)
    select: str = "antidiagonal"


@dataclass(frozen=True, kw_only=True)
class Identity(KernelMethod):
    NAME: ClassVar[str] = "identity"
    ABOUT: ClassVar[str] = "the rule of pbs on unpermuted keys: the control"
    SOURCE: ClassVar[str] = "docs/algorithm.md"
    OWN: ClassVar[tuple] = ("permute",)
    permute: str = "identity"


@dataclass(frozen=True, kw_only=True)
class MeanPool(KernelMethod):
    NAME: ClassVar[str] = "meanpool"
    ABOUT: ClassVar[str] = "mean-pooled selection in natural order"
    SOURCE: ClassVar[str] = "MeanPooling, the baseline of arXiv 2510.21270; docs/algorithm.md"
    OWN: ClassVar[tuple] = ("permute", "select")
    permute: str = "none"


@dataclass(frozen=True, kw_only=True)
class XAttention(KernelMethod):
    NAME: ClassVar[str] = "xattention"
    ABOUT: ClassVar[str] = "antidiagonal selection in natural order"
    SOURCE: ClassVar[str] = "XAttention, arXiv 2503.16428; docs/algorithm.md"
    OWN: ClassVar[tuple] = ("permute", "select")
    permute: str = "none"
    select: str = "antidiagonal"


@dataclass(frozen=True, kw_only=True)
class Peak(KernelMethod):
    NAME: ClassVar[str] = "peak"
    ABOUT: ClassVar[str] = "blocks that one row group needs, means for the others; natural order"
    SOURCE: ClassVar[str] = "ours; docs/peak.md"
    KEEP_ALL: ClassVar[str] = "tau=0"
    OWN: ClassVar[tuple] = (
        "permute", "select", "reduce", "stride", "rule", "tau", "normalize", "correction",
    )  # fmt: skip
    tau: float = 0.01
    permute: str = "identity"
    select: str = "antidiagonal"
    stride: int = 16
    reduce: str = "max"
    rule: str = "absolute"
    normalize: str = "row"
    correction: str = "mean"


@dataclass(frozen=True, kw_only=True)
class Best(_Kernel):
    """The setting that the evidence supports for a call's number of keys: PBSConfig.best.

    Its config is looked up for every call, by the longest sequence in it; best.ROWS has the rows
    and their sources. Calls longer than what was measured take the last row."""

    NAME: ClassVar[str] = "best"
    ABOUT: ClassVar[str] = "the recommended setting for the length of each call"
    SOURCE: ClassVar[str] = "pbs_attn/best.py names the file of evidence of each length"
    BY_LENGTH: ClassVar[bool] = True

    def check(self):
        routing = {name: getattr(self, name) for name in ROUTING}
        configs = tuple(row.config.replace(**routing) for row in best.ROWS)
        object.__setattr__(self, "_configs", configs)  # made once: calls, and graphs, only look up

    def config_at(self, seqlen_k):
        """The config of the row that holds seqlen_k keys; of the last row above all."""
        return self._configs[best.place(seqlen_k)]
