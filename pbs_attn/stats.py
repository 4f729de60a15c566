# SPDX-License-Identifier: Apache-2.0
"""record(): which calls ran sparse, which did not and why, and how much was computed.

Counters stay on the device while calls run; one synchronisation when the context ends. Nothing is
counted while torch.compile traces.
"""

import contextlib
import time

import torch

from . import geometry as geo
from .selection import PERMUTES_QUERIES, own_of

_active = []


class _Layer:
    """Block sums of one layer, [Hq] each, and how many sparse calls they are of."""

    def __init__(self):
        self.calls = 0
        self.selected = self.computed = self.causal = 0

    def add(self, selected, computed, causal):
        self.calls += 1
        self.selected = self.selected + selected
        self.computed = self.computed + computed
        self.causal = self.causal + causal


class Record:
    """What was counted between entering and leaving `record()`.

    calls     {"pbs": n, "dense": n}: attention calls by route; "pbs" is sparse, by any method
    reasons   {word: n}: why calls took the dense route (routing.REASONS explains the words)
    seconds   {"pbs": s, "dense": s}: wall time of the calls; empty unless record(time=True)
    layers    {layer: per-head densities} of the sparse calls; layer None where unknown
    density   selected causal blocks / causal blocks over all sparse calls; 1.0 if there were none.
              Under a method blocks are pairs of 128 rows and 128 keys, whatever its own size
    computed  the same for the blocks that the kernels ran
    """

    def __init__(self, time=False):
        self.time = time
        self.calls, self.reasons, self.seconds = {"pbs": 0, "dense": 0}, {}, {}
        self.layers = {}
        self.density = self.computed = 1.0
        self._sums = {}

    def _finish(self):
        selected = computed = causal = 0
        for layer, sums in self._sums.items():
            chosen, ran = sums.selected.tolist(), sums.computed.tolist()
            total = int(sums.causal)
            self.layers[layer] = [x / total if total else 1.0 for x in chosen]
            selected += sum(chosen)
            computed += sum(ran)
            causal += total * len(chosen)
        if causal:
            self.density, self.computed = selected / causal, computed / causal

    def to_dict(self):
        """Plain numbers, lists and words; layers by their number as text, as JSON wants it."""
        return {
            "calls": dict(self.calls),
            "reasons": dict(self.reasons),
            "seconds": dict(self.seconds),
            "density": self.density,
            "computed": self.computed,
            "layers": {str(layer): list(heads) for layer, heads in self.layers.items()},
        }

    def summary(self):
        """A table for people: calls by route, reasons, density per layer."""
        total = sum(self.calls.values())
        if not total:
            return "no attention call reached pbs_attn"
        lines = ["route  calls   share" + ("   seconds" if self.time else "")]
        for route, count in self.calls.items():
            line = f"{route:<5}  {count:>5}  {count / total:>6.1%}"
            lines.append(line + (f"  {self.seconds.get(route, 0.0):>8.3f}" if self.time else ""))
        for reason, count in sorted(self.reasons.items(), key=lambda item: -item[1]):
            lines.append(f"  dense because {reason}: {count}")
        if self.layers:
            share = f"density {self.density:.1%}, computed {self.computed:.1%}"
            lines.append(f"{share} of the causal blocks of sparse calls")
            lines.append("layer  mean    lowest  highest head")
            for layer, heads in self.layers.items():
                mean = sum(heads) / max(len(heads), 1)
                name = "-" if layer is None else layer
                low, high = min(heads, default=1.0), max(heads, default=1.0)
                lines.append(f"{name!s:>5}  {mean:>6.1%}  {low:>6.1%}  {high:>6.1%}")
        return "\n".join(lines)


@contextlib.contextmanager
def record(time=False):
    """Count the attention calls of this process inside a with-block.

    time=True also measures their wall time (a synchronisation per call on a GPU). Contexts nest:
    each counts for itself. Numbers of density are ready when the block ends.

    >>> import torch, pbs_attn
    >>> q = torch.randn(1, 2, 2048, 64)
    >>> with pbs_attn.record() as calls:
    ...     out = pbs_attn.pbs_attention(q, q, q)
    >>> calls.calls
    {'pbs': 1, 'dense': 0}
    """
    current = Record(time)
    _active.append(current)
    try:
        yield current
    finally:
        _active.remove(current)
        current._finish()


def recording():
    """True if a call should be counted now."""
    return bool(_active) and not torch.compiler.is_compiling()


def note(route, reason=None, *, layer=None, selection=None, blocks=None):
    """Count one call, and for the density of a sparse one either of

    selection (count, seqs, config): blocks of the config's size, as the kernels count them
    blocks    (selected [Hq], computed [Hq], causal []): summed over the sequences of the call, as
              methods count them, in pairs of 128 rows and 128 keys; fractions are fractions"""
    if not recording():
        return
    sums = blocks
    if selection is not None:
        sums = _block_sums(*selection)
    for current in _active:
        current.calls[route] = current.calls.get(route, 0) + 1
        if reason is not None:
            current.reasons[reason] = current.reasons.get(reason, 0) + 1
        if sums is not None:
            current._sums.setdefault(layer, _Layer()).add(*sums)


def _block_sums(count, seqs, config):
    """(selected [Hq], computed [Hq], causal []) over all sequences of a call."""
    counts = geo.blocks(
        seqs,
        count.shape[2],
        config.block_size,
        config.block_size,
        config.segment_size,
        own_of(config.permute),
        config.permute in PERMUTES_QUERIES,
    )
    selected, computed, causal = geo.selected_blocks(count, counts)
    return selected.sum(0), computed.sum(0), causal.sum()


@contextlib.contextmanager
def timed(route, device):
    """Adds the wall time of its block to `seconds` of the records that want it."""
    wanted = [current for current in _active if current.time] if recording() else []
    if not wanted:
        yield
        return
    _synchronize(device)
    begin = time.perf_counter()
    yield
    _synchronize(device)
    elapsed = time.perf_counter() - begin
    for current in wanted:
        current.seconds[route] = current.seconds.get(route, 0.0) + elapsed


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
