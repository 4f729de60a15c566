# SPDX-License-Identifier: Apache-2.0
"""The pictures of a frontier: loss against density and against time, a line per method.

The loss axis is linear up to the budget and logarithmic beyond, so that what is free and what is
ruinous both show, and a loss below dense's has a place.
"""

import math
import textwrap

from . import plots
from .frontier_tables import is_bound

LINEAR = 0.01  # nats: the loss axis is linear from -LINEAR to LINEAR
TICKS = (-0.1, -0.05, -0.02, -0.01, -0.005, 0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
SLOW = 1.2  # times dense: slower ones are named below the panel, not drawn
SHAPES = {8: "^", 16: "o", 32: "s", 64: "D"}  # markers of peak, by stride
WIDTH = 11.0


def look(family, families):
    """Keywords of a family's line: colour and marker of its method. Hollow and dashed are the
    variants without correction where others of the method have it, and the bounds."""
    name, _, words = family.partition(":")
    parameters = dict(word.partition("=")[::2] for word in words.split(",") if word)
    colour, marker, _ = plots.style(name, [each.partition(":")[0] for each in families])
    same = [each for each in families if each.partition(":")[0] == name]
    corrected = any("correction=mean" in each for each in same)
    if name == "peak":
        marker = SHAPES.get(int(parameters.get("stride", 16)), "o")
        hollow = parameters.get("correction") == "none"
    elif is_bound(family):
        marker, hollow = "*" if parameters.get("reduce") == "max" else "p", True
    else:
        hollow = "correction=mean" not in family if corrected else same.index(family) % 2 == 1
    return {
        "color": colour, "marker": marker, "ms": 6.0, "mfc": "white" if hollow else colour,
        "ls": (0, (2.5, 1.5)) if hollow else "-", "lw": 1.2 if hollow else 1.6,
    }  # fmt: skip


def frontier(place, path, title, budget=None):
    """Loss against density and, where a time was taken, against time, over all texts. The caption,
    or None."""
    curves = place.curves()
    if not curves:
        return None
    timed = any(point.time is not None for points in curves.values() for point in points)
    # Alone, a panel is as wide as the legend below it wants to be.
    with plots.figure(path, 1, 1 + timed, height=6.4, width=WIDTH, sharey=True) as (figure, axes):
        panels = list(axes[0])
        _panel(panels[0], curves, lambda point: (point.density, None), math.inf)
        panels[0].set(xlabel="density: share of causal blocks computed",
                      ylabel="change of the loss against dense, nats per token")  # fmt: skip
        slow = _panel(panels[1], curves, _time, SLOW) if timed else ()
        _loss_axis(panels, budget)
        windows = f"{len(place.windows)} window{'s' * (len(place.windows) > 1)}, {place.name}"
        if timed:
            panels[0].set_title(title)
            panels[1].set(title=windows, xlabel="time of the attention calls, share of dense")
        else:
            panels[0].set_title(f"{title}, {windows}")
        if slow:
            text = textwrap.fill(f"slower than dense, not drawn: {', '.join(slow)}", 66)
            panels[1].annotate(text, (1, 0), (0, -42), fontsize=8.5, xycoords="axes fraction",
                               textcoords="offset points", ha="right", va="top", color="#555555",
                               annotation_clip=False)  # fmt: skip
        _legend(figure, panels)
    gaps = any(not point.complete for points in curves.values() for point in points)
    notes = "; pale: not of all windows" if gaps else ""
    against = "density and time" if timed else "density"
    return (f"Change of the loss against {against}, {place.name}; "
            f"bars: ± one standard error, paired with dense{notes}")  # fmt: skip


def kinds(place, groups, path, budget=None):
    """Loss against density, a panel per kind of text. The caption, or None."""
    curves = {name: place.curves(texts) for name, texts in groups.items()}
    curves = {name: found for name, found in curves.items() if found}
    if not curves:
        return None
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    with plots.figure(path, rows, columns, height=1.6 + 3.9 * rows, width=WIDTH,
                      sharey=True, sharex=True) as (figure, axes):  # fmt: skip
        for panel in axes.flat[len(curves) :]:
            panel.set_axis_off()
        for panel, (name, found) in zip(axes.flat, curves.items(), strict=False):
            _panel(panel, found, lambda point: (point.density, None), math.inf)
            texts = dict.fromkeys(w[0] for points in found.values() for p in points
                                  for w in p.samples)  # fmt: skip
            panel.set_title(f"{name}: {', '.join(texts)}")
        _loss_axis(list(axes.flat[: len(curves)]), budget)
        for i, panel in enumerate(axes.flat[: len(curves)]):
            if i + columns >= len(curves):  # nothing below it
                panel.set_xlabel("density")
                panel.tick_params(labelbottom=True)
        for panel in axes[:, 0]:
            panel.set_ylabel("change of the loss, nats per token")
        _legend(figure, list(axes.flat[: len(curves)]))
    return f"Change of the loss against density by kind of text, {place.name}"


def _time(point):
    found = point.time
    return (None, None) if found is None else (found.value, found.se)


def _panel(axes, curves, where, limit):
    """One line per family, in order of threshold. where(point) -> (x, its error). Names of the
    families that have points beyond `limit`; points that are not complete are pale, on no line."""
    beyond, families = [], list(curves)
    for family, points in curves.items():
        placed = [(*where(point), point) for point in points]
        placed = [each for each in placed if each[0] is not None]
        far = [x for x, _, _ in placed if x > limit]
        if far:
            beyond.append(f"{family} {min(far):.1f}" + f" to {max(far):.1f}" * (len(far) > 1))
        for complete in (True, False):
            shown = [p for p in placed if p[0] <= limit and p[2].complete == complete]
            if shown:
                line = look(family, families) | ({} if complete else {"ls": "none", "alpha": 0.35})
                _line(axes, shown, label=family, zorder=_depth(family), **line)
    return beyond


def _line(axes, placed, **line):
    """Points [(x, its error, Point)] with their bars."""
    x, wide, points = zip(*placed, strict=True)
    change = [point.change for point in points]
    axes.errorbar(
        x, [each.value for each in change], yerr=[each.se or 0.0 for each in change],
        xerr=[each or 0.0 for each in wide], elinewidth=0.9, capsize=2, **line,
    )  # fmt: skip


def _depth(family):
    return 5 if family.startswith("peak") else 3


def _loss_axis(panels, budget):
    """The same loss axis for all panels, with zero and the budget."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ends = [panel.dataLim.intervaly for panel in panels]
    low, high = min(a for a, _ in ends), max(b for _, b in ends)
    for axes in panels:
        axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.7)
        axes.yaxis.set_major_locator(FixedLocator(TICKS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}" if x else "0"))
        axes.set_ylim(min(1.15 * low, -0.0015), max(1.15 * high, 0.02))
        axes.set_xlim(left=0)
        axes.axhline(0, color="#777777", lw=1, zorder=1)
        if budget is not None:
            axes.axhline(budget, color="#777777", lw=1, ls=":", zorder=1)
            axes.annotate(
                f"{100 * math.expm1(budget):+.3g}% perplexity", (0.01, budget), fontsize=8.5,
                xycoords=("axes fraction", "data"), ha="left", va="bottom", color="#555555",
            )  # fmt: skip


def _legend(figure, panels):
    """Below the panels, every family once."""
    found = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", fontsize=9.5,
                  ncols=min(4, len(found)), frameon=False, handlelength=3.2)  # fmt: skip
