# SPDX-License-Identifier: Apache-2.0
"""Tables of the benches whose samples are tokens or seconds: ppl, agreement, ttft.

A maker returns ({}, tables): there is no score per row, differences stand in the tables themselves.
"""

import numpy as np

from . import stats
from .table import Column, Table

NOTE_PPL = (
    "Change: mean loss minus that of {base}, in nats per token (x 100 is about % perplexity), ± "
    "its standard error over blocks of 128 tokens, paired, pooled over texts. \\* marks a change "
    "whose 95% interval is without 0. Copied: tokens whose trigram was last seen more than 512 "
    "tokens before; sparse prefill hurts them first. KL and same next: against dense, over all "
    "positions."
)
NOTE_AGREEMENT = (
    "Against dense on the same prompt, greedy; brackets: 95% Wilson interval. Prefix: tokens until "
    "the first that differs. One rounding can turn a near tie, so a few percent are no finding."
)
NOTE_TTFT = (
    "Seconds from token ids on the device to the first new token on the host. Speed-up: ratio of "
    "medians, with its 95% bootstrap interval. Density stands beside it: a time without it says "
    "nothing."
)


def ppl(view):
    """By length: loss, change against the base, copied tokens, KL; then the change by position."""
    columns = [
        Column("length", ",d"), Column("method"), Column("texts"), Column("loss", ".4f"),
        Column("perplexity", ".2f"), Column("change", "+.4f"), Column("verdict"),
        Column("copied loss", ".3f"), Column("copied change", "+.3f"), Column("copied tokens", "d"),
        Column("KL", ".4f"), Column("same next", ".2%"), Column("density", ".3f"),
        Column("computed", ".3f"), Column("prefill s", ".2f"),
    ]  # fmt: skip
    rows = [
        _ppl_row(view, label, length)
        for length in view.section.lengths()
        for label in asked(view, view.section.where(length=length))
    ]
    base = view.base or "the dense run beside it"
    notes = [view.caption(), NOTE_PPL.format(base=base)]
    found = [Table("loss", "Loss per token", columns, rows, notes)]
    return {}, found + _bands(view)


def asked(view, keys):
    """The methods that were to run any of these rows."""
    return [label for label in view.labels if view.section.asked(label, keys)]


def _ppl_row(view, label, length):
    keys = view.section.where(length=length)
    ok, planned = view.section.counts(label, keys)
    records = [r for r in (view.section.record(label, key) for key in keys) if r is not None]
    loss, change = _mean(records, "loss", "tokens"), loss_change(view, label, keys)
    return [
        length, label, f"{ok}/{planned}" + ("" if ok == planned else " INCOMPLETE"), loss,
        None if loss is None else float(np.exp(loss)), change,
        change.verdict() if change is not None and label != view.base else None,
        _mean(records, "copied_loss", "copied_tokens"), _copied_change(view, label, keys),
        sum(record.get("copied_tokens") or 0 for record in records),
        _mean(records, "kl", "tokens"), _mean(records, "same_next", "tokens"),
        _mean(records, "density"), _mean(records, "computed"), _mean(records, "prefill_s"),
    ]  # fmt: skip


def _mean(records, name, weight=None):
    """Weighted mean of a field over the records that have it; None if none has."""
    found = [(r[name], r[weight] if weight else 1) for r in records if r.get(name) is not None]
    total = sum(w for _, w in found)
    return sum(value * w for value, w in found) / total if total else None


def loss_change(view, label, keys, start=None, end=None):
    """Delta of the loss against the base over the rows ok in both; None where there is none.

    start, end: only the blocks that begin at these positions. Without a base in the section: the
    change against dense that the run itself recorded.
    """
    if view.base is None:
        if start is not None:
            return None
        records = [r for r in (view.section.record(label, key) for key in keys) if r is not None]
        return _recorded(records, "delta", "tokens")
    differences, weights = [], []
    for ours, theirs in view.pairs(label, keys):
        sizes = block_sizes(ours)
        for index, (a, b) in enumerate(
            zip(ours["block_losses"], theirs["block_losses"], strict=True)
        ):
            position = ours.get("prefix", 0) + index * max(sizes)
            if start is None or start <= position < end:
                differences.append(a - b)
                weights.append(sizes[index])
    return stats.block_delta(differences, weights)


def block_sizes(record):
    """Predicted tokens of each block of a record: 128 each, fewer in the last."""
    blocks, tokens = len(record["block_losses"]), record["tokens"]
    size = tokens if blocks == 1 else 128
    return [size] * (blocks - 1) + [tokens - size * (blocks - 1)]


def _recorded(records, name, weight):
    values = [record.get(name) for record in records]
    errors = [record.get(name + "_se") for record in records]
    return stats.pooled_delta(values, errors, [record.get(weight) or 0 for record in records])


def _copied_change(view, label, keys):
    """As recorded, against dense; None where the base is another method: it has no error then."""
    if view.base is not None:
        base = [r for r in (view.section.record(view.base, k) for k in keys) if r is not None]
        if any(record.get("delta") for record in base):
            return None
        records = [ours for ours, _ in view.pairs(label, keys)]
    else:
        records = [r for r in (view.section.record(label, k) for k in keys) if r is not None]
    return _recorded(records, "copied_delta", "copied_tokens")


def _bands(view):
    """Change of the loss by position, one line per length and band."""
    others = view.others
    if not others:
        return []
    rows = []
    for length in view.section.lengths():
        keys = view.section.where(length=length)
        spans = {
            tuple(band[:2]): None
            for label in view.labels for key in keys
            for band in (view.section.record(label, key) or {}).get("bands", [])
        }  # fmt: skip
        for start, end in sorted(spans) if len(spans) > 1 else ():
            changes = [loss_change(view, label, keys, start, end) for label in others]
            rows.append([length, f"{start:,} to {end:,}", *changes])
    if not rows:
        return []
    columns = [Column("length", ",d"), Column("positions")]
    columns += [Column(label, "+.4f") for label in others]
    title = f"Change of the loss by position, against {view.base}"
    return [Table("bands", title, columns, rows, [view.caption()])]


def agreement(view):
    """First token, whole reply and KL against dense, by length."""
    columns = [
        Column("length", ",d"), Column("method"), Column("rows"), Column("same first token", ".1%"),
        Column("identical reply", ".1%"), Column("prefix, mean", ".1f"), Column("of tokens", ".1f"),
        Column("KL of the first", ".4f"), Column("density", ".3f"), Column("computed", ".3f"),
    ]  # fmt: skip
    rows = []
    for length in view.section.lengths():
        keys = view.section.where(length=length)
        for label in asked(view, keys):
            records = [r for r in (view.section.record(label, k) for k in keys) if r is not None]
            n = len(records)
            rows.append([
                length, label, view.rows(label, keys).replace(" rows", ""),
                stats.share(sum(bool(r["first_same"]) for r in records), n),
                stats.share(sum(is_identical(r) for r in records), n),
                _mean(records, "same_tokens"), _mean(records, "n"), _mean(records, "kl_first"),
                _mean(records, "density"), _mean(records, "computed"),
            ])  # fmt: skip
    notes = [view.caption(), NOTE_AGREEMENT]
    return {}, [Table("agreement", "Agreement of greedy replies", columns, rows, notes)]


def is_identical(record):
    """Is the whole greedy reply that of dense? (agreement)"""
    return bool(record.get("identical", record["same_tokens"] == record["n"]))


def samples(view, label, keys):
    """float64 [n]: every time measured in these rows, in seconds."""
    records = (view.section.record(label, key) for key in keys)
    return np.array([x for record in records if record is not None for x in record["samples"]])


def ttft(view):
    """Times by length and method, speed-up with its interval, and what it was bought with."""
    columns = [
        Column("length", ",d"), Column("method"), Column("protocol"), Column("rows"),
        Column("samples", "d"),
        Column("median s", ".3f"), Column("p20", ".3f"), Column("p80", ".3f"), Column("min", ".3f"),
        Column("speed-up", ".2f"), Column("verdict"), Column("density", ".3f"),
        Column("computed", ".3f"), Column("first token as dense", ".0%"), Column("KL", ".4f"),
        Column("peak GB", ".1f"), Column("dense kernel"),
    ]  # fmt: skip
    rows = []
    for length, protocol in places(view.section):
        keys = [key for key in view.section.where(length=length) if key[1] == protocol]
        rows += [_ttft_row(view, label, length, protocol, keys) for label in asked(view, keys)]
    against = f" over {view.base}" if view.base else ""
    table = Table("ttft", f"Time to first token, speed-up{against}", columns, rows,
                  [view.caption(), NOTE_TTFT, *_warnings(view)])  # fmt: skip
    return {}, [view.beside(table)]


def places(section):
    """[(length, protocol)] that ran: the row's id is its protocol, `strict` or `paper`."""
    return sorted({(length, protocol) for _, protocol, length in section.keys})


def _warnings(view):
    """What the runs themselves warn of, each once."""
    found = {}
    for label in view.labels:
        for key in view.section.keys:
            record = view.section.record(label, key) or {}
            if record.get("tiled", 1) > 1:
                found[f"WARNING: {key[0]} is repeated to fill {key[2]:,} tokens; real text is "
                      "harder to cover"] = None  # fmt: skip
            if record.get("beyond_window"):
                found[f"WARNING: {key[2]:,} tokens are beyond the model's window: the answers "
                      "mean nothing"] = None  # fmt: skip
            if record.get("clock_fell"):
                found[f"WARNING: the clock fell by over 3% during {label} at {key[2]:,}"] = None
    return list(found)


def _ttft_row(view, label, length, protocol, keys):
    times = samples(view, label, keys)
    records = [r for r in (view.section.record(label, key) for key in keys) if r is not None]
    ratio = None
    if view.base is not None and label != view.base:
        ratio = stats.median_ratio(samples(view, view.base, keys), times)
    quantiles = np.percentile(times, [50, 20, 80]) if times.size else [None] * 3
    same = [bool(r["same_first"]) for r in records if r.get("same_first") is not None]
    return [
        length, label, protocol, view.rows(label, keys).replace(" rows", ""), times.size,
        *quantiles,
        times.min() if times.size else None, ratio,
        None if ratio is None else speed_verdict(ratio),
        _mean(records, "density"), _mean(records, "computed"),
        sum(same) / len(same) if same else None, _mean(records, "kl"),
        max((r["peak_gb"] for r in records if r.get("peak_gb") is not None), default=None),
        ", ".join(dict.fromkeys(str(r["backend"]) for r in records if r.get("backend"))),
    ]  # fmt: skip


def speed_verdict(ratio):
    """As Interval.verdict, around 1; five samples are enough for a time."""
    if ratio.low is None:
        return ""
    if ratio.n < 5:
        return "too few samples"
    if ratio.low > 1:
        return "faster *"
    return "slower *" if ratio.high < 1 else "within noise"
