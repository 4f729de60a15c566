# SPDX-License-Identifier: Apache-2.0
"""Tables of a frontier: every setting, the loss at equal density and at equal time, settings chosen
on some texts and reported on the others."""

from dataclasses import dataclass, field

from . import frontier_data as data
from .table import Column, Table

DENSITIES = (0.15, 0.25, 0.35)
TIMES = (0.25, 0.35, 0.5)
ALL = "all texts"
NOTE_SETTINGS = (
    "Change: loss minus that of dense on the same tokens, nats per token (x 100 is about % of "
    "perplexity), ± its standard error over blocks of 128 tokens of all texts. Copied: tokens "
    "whose trigram was last seen more than 512 tokens before. Time: of the attention calls, as a "
    "share of dense on this machine, ± its standard error over the windows. INCOMPLETE: the "
    "setting lacks windows that others have, so its mean is of other text."
)
NOTE_AT = (
    "Straight line between the two measured settings next to it, block by block, so that errors "
    "are those of the same tokens; the curves bend, so the line lies a little above them. - : not "
    "measured on both sides; nothing is extrapolated."
)
NOTE_LEAST = (
    "Above: loss of the next method minus that of the least, paired over blocks of 128 tokens; \\* "
    "where its 95% interval is without 0. The least of many is a little lucky. Oracles cost more "
    "than dense attention and are left out."
)


@dataclass(frozen=True)
class Wanted:
    """What the user asked for. kinds: {name: [text]}; chosen: texts that settings are chosen on;
    budget: nats above dense that a chosen setting may lose; against: family of the paired column.
    """

    kinds: dict = field(default_factory=dict)
    chosen: tuple = ()
    budget: float = 0.00995
    budget_text: str = "1%"
    against: str = "peak"

    def groups(self):
        """{name: texts}, None for all of them."""
        return {ALL: None} | self.kinds


def tables(runs, wanted):
    """(Table of everything, {place: [Table]} for people)."""
    shown = {}
    for place in runs.places:
        found = [
            at(place, wanted, DENSITIES, data.density_of, "density"),
            at(place, wanted, TIMES, data.time_of, "time"),
        ]
        found = [table for pair in found for table in pair if table.rows]
        if any(text in wanted.chosen for text, _ in place.windows):
            found.append(held_out(place, wanted))
        shown[place.slug] = [*found, settings(place)]
    return everything(runs.places, wanted), shown


# ---- every setting -------------------------------------------------------------------------------

COLUMNS = [
    Column("texts", "d"), Column("windows"), Column("blocks", "d"), Column("change", "+.4f"),
    Column("copied tokens", "d"), Column("copied change", "+.3f"), Column("density", ".3f"),
    Column("computed", ".3f"), Column("time", ".3f"),
]  # fmt: skip


def cells(point):
    """Values of COLUMNS."""
    change, windows = point.change, f"{len(point.samples)}/{point.of}"
    return [
        len({text for text, _ in point.samples}),
        windows if point.complete else f"{windows} INCOMPLETE", change.n, change,
        sum(sample.copied[2] for sample in point.samples.values()), point.copied, point.density,
        point.computed, point.time,
    ]  # fmt: skip


def everything(places, wanted):
    """A row per place, group of texts and setting; the group of each text by itself, too."""
    rows = []
    for place in places:
        texts = dict.fromkeys(text for text, _ in place.windows)
        groups = wanted.groups() | sides(place, wanted)
        groups |= {f"text {text}": [text] for text in texts if len(texts) > 1}
        for group, names in groups.items():
            for family, points in place.curves(names).items():
                rows += [
                    [place.length, place.prefix, group, family, point.setting.threshold,
                     point.setting.text, *cells(point)]
                    for point in points
                ]  # fmt: skip
    columns = [
        Column("length", "d"), Column("prefix", "d"), Column("group"), Column("method"),
        Column("threshold", "g"), Column("setting"), *COLUMNS,
    ]  # fmt: skip
    return Table("frontier", "Every setting", columns, rows, [NOTE_SETTINGS])


def settings(place):
    """A row per setting, over all texts."""
    rows = [
        [family, point.setting.short, *cells(point)]
        for family, points in place.curves().items()
        for point in points
    ]
    columns = [Column("method"), Column("setting"), *COLUMNS]
    title = f"Every setting, {place.name}"
    return Table(f"{place.slug}-settings", title, columns, rows, [NOTE_SETTINGS])


# ---- at equal density, at equal time -------------------------------------------------------------


def at(place, wanted, values, axis, name):
    """[Table of losses at `values` of an axis, Table of the least of them], by group."""
    columns = [Column("texts"), Column("method")]
    columns += [Column(f"{name} {value:g}", "+.4f") for value in values]
    rows, least = [], []
    for group, texts in wanted.groups().items():
        found = {
            family: [data.interpolate(points, value, axis) for value in values]
            for family, points in place.curves(texts).items()
        }
        rows += [[group, family, *map(_delta, each)] for family, each in found.items() if any(each)]
        for i, value in enumerate(values):
            each = {family: mixed[i] for family, mixed in found.items() if mixed[i]}
            least += _least(group, value, each)
    title = f"Change of the loss at equal {name}, {place.name}"
    first = Table(f"{place.slug}-at-{name}", title, columns, rows, [NOTE_AT])
    columns = [
        Column("texts"), Column(name, "g"), Column("least"), Column("change", "+.4f"),
        Column("next"), Column("above", "+.4f"), Column("verdict"), Column("methods", "d"),
    ]  # fmt: skip
    title = f"Least loss at equal {name}, {place.name}"
    return first, Table(f"{place.slug}-least-{name}", title, columns, least, [NOTE_LEAST])


def _delta(blocks):
    return None if blocks is None else data.delta(blocks)


def _least(group, value, each):
    """[row of the least-loss table]; none where fewer than two methods are measured."""
    each = {family: blocks for family, blocks in each.items() if not is_bound(family)}
    if len(each) < 2:
        return []
    order = sorted(each, key=lambda family: data.delta(each[family]).value)
    above = data.delta(data.minus(each[order[1]], each[order[0]]))
    verdict = above.verdict() if above is not None else ""
    return [[group, value, order[0], data.delta(each[order[0]]), order[1], above, verdict,
             len(each)]]  # fmt: skip


def is_bound(family):
    """Is this a bound and no method?"""
    return family.partition(":")[0] == "oracle"


# ---- chosen on some texts, reported on the others ------------------------------------------------


def sides(place, wanted):
    """{"chosen on": texts, "held out": the others} of a place; {} without --choose."""
    if not wanted.chosen:
        return {}
    texts = dict.fromkeys(text for text, _ in place.windows)
    return {"chosen on": [text for text in wanted.chosen if text in texts],
            "held out": [text for text in texts if text not in wanted.chosen]}  # fmt: skip


def held_out(place, wanted):
    """A row per method: its cheapest setting within the budget on the texts to choose on, and what
    that setting does on the others."""
    picked = chosen(place, wanted)
    reference = picked.get(wanted.against)
    columns = [
        Column("method"), Column("setting"), Column("change, chosen on", "+.4f"), *COLUMNS,
        Column(f"{wanted.against} minus this", "+.4f"), Column("verdict"),
    ]  # fmt: skip
    rows = []
    for family, (there, here) in picked.items():
        if there is None:
            rows.append([family, "none within", *[None] * (len(COLUMNS) + 2), ""])
            continue
        paired = None
        if reference and reference[1] and here and family != wanted.against:
            paired = data.delta(data.minus(reference[1].blocks, here.blocks))
        rows.append([
            family, there.setting.short or family, there.change,
            *(cells(here) if here else [None] * len(COLUMNS)), paired,
            paired.verdict() if paired else "",
        ])  # fmt: skip
    here, others = (", ".join(x) or "there are none" for x in sides(place, wanted).values())
    notes = [
        f"Of every method the setting of least density whose loss on the texts to choose on, "
        f"{here}, is at most {wanted.budget_text} of perplexity above dense ({wanted.budget:.4f} "
        f"nats). All columns but the third are of the other texts: {others}. "
        f"{wanted.against} minus this: paired over blocks of 128 tokens, at the two settings' own "
        "densities.",
    ]
    if not reference or not reference[1]:
        notes.append(f"{wanted.against} is not paired: it has no setting here that is within the "
                     "budget and ran the other texts.")  # fmt: skip
    title = f"Settings chosen on some texts, reported on the others, {place.name}"
    return Table(f"{place.slug}-held-out", title, columns, rows, notes)


def chosen(place, wanted):
    """{family: (Point on the texts to choose on, Point on the others)}; Nones where no setting is
    within the budget, or where the setting did not run the others."""
    found, groups = {}, sides(place, wanted)
    for family, points in place.curves().items():
        points = [place.point(point.setting, groups["chosen on"]) for point in points]
        there = data.choose([point for point in points if point.samples], wanted.budget)
        here = there and place.point(there.setting, groups["held out"])
        found[family] = (there, here if here and here.samples else None)
    return found
