# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report: score and loss against density, time against length, equal outputs.

PNG at the width of a README. Colours are those of Okabe and Ito, which colour-blind people tell
apart; every method has a marker of its own too, and its name stands beside its point.
"""

import contextlib

import numpy as np

from . import load, stats, task_tables, titles, token_tables

COLOURS = {
    "full": "#000000", "pbs": "#0072B2", "pbs+": "#56B4E9", "identity": "#CC79A7",
    "meanpool": "#D55E00", "xattention": "#009E73", "flexprefill": "#E69F00",
    "minference": "#8C6D1F", "oracle": "#7F7F7F", "peak": "#882255", "flashprefill": "#332288",
}  # fmt: skip
MARKERS = {
    "full": "D", "pbs": "o", "pbs+": "P", "identity": "s", "meanpool": "v", "xattention": "^",
    "flexprefill": "<", "minference": ">", "oracle": "*", "peak": "X",
    "flashprefill": "h",
}  # fmt: skip
SPARE = ("#44AA99", "#999933", "#AA4499", "#661100")
SPARE_MARKERS = ("p", "d", "8", "H")
STYLE = {
    "font.size": 11, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True, "figure.dpi": 130,
    "savefig.dpi": 130, "axes.titlelocation": "left",
}  # fmt: skip
WIDTH = 7.5  # inches: 975 pixels


@contextlib.contextmanager
def figure(path, rows=1, columns=1, height=4.2, width=WIDTH, **options):
    """(figure, axes) drawn without a screen, written to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        fig, axes = pyplot.subplots(
            rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
        )
        try:
            yield fig, axes
            temporary = path.with_name(path.name + ".part")
            fig.savefig(temporary, format="png", metadata={"Software": None})
            temporary.replace(path)
        finally:
            pyplot.close(fig)


def style(label, labels):
    """(colour, marker, fill) of a method: fixed for the known ones, so that pictures agree.

    Methods of one name with other parameters share colour and marker; every second is hollow.
    """
    name = label.partition(":")[0]
    names = list(dict.fromkeys(x.partition(":")[0] for x in labels))
    if name in COLOURS:
        colour, marker = COLOURS[name], MARKERS[name]
    else:
        place = [x for x in names if x not in COLOURS].index(name) % len(SPARE)
        colour, marker = SPARE[place], SPARE_MARKERS[place]
    same = [x for x in labels if x.partition(":")[0] == name]
    return colour, marker, "white" if same.index(label) % 2 else colour


def ink(label, labels):
    """How a method's name is written: its colour, darker to be read as text, on a white edge."""
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    colour = tuple(0.72 * part for part in to_rgb(style(label, labels)[0]))
    return {"color": colour, "path_effects": [withStroke(linewidth=2.5, foreground="white")]}


def spread(heights, gap):
    """Heights [n] moved apart to at least `gap`, in their order, as little as they must."""
    order = np.argsort(heights, kind="stable")
    placed = np.asarray(heights, np.float64)[order]
    for _ in range(500):
        overlap = gap - np.diff(placed)
        if not (overlap > 0.01).any():
            break
        push = np.clip(overlap, 0, None) / 2
        placed[:-1] -= push
        placed[1:] += push
    result = np.empty_like(placed)
    result[order] = placed
    return result


def name_points(axes, points, bars, labels, size=10):
    """Write each method beside its point [(label, x, y)], where it covers least of the rest.

    Around every point 24 places are tried; what counts is the area shared with markers, bars
    [(below, above)], names that stand already and the world outside, then the distance.
    """
    renderer = axes.figure.canvas.get_renderer()
    axes.figure.canvas.draw()  # fixes the transform from data to pixels
    taken, centres = [], axes.transData.transform([(x, y) for _, x, y in points])
    for (_, x, y), (low, high), centre in zip(points, bars, centres, strict=True):
        ends = axes.transData.transform([(x, y - low), (x, y + high)])[:, 1]
        taken.append((3.0, (centre[0] - 7, centre[1] - 7, centre[0] + 7, centre[1] + 7)))
        taken.append((1.0, (centre[0] - 3, ends[0], centre[0] + 3, ends[1])))
    whole = axes.get_window_extent().extents
    scale = axes.figure.dpi / 72
    for (label, x, y), centre in zip(points, centres, strict=True):
        text = axes.annotate(
            label, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=size, va="center",
            zorder=5, **ink(label, labels),
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        found = [
            _try(centre, turn, reach * scale, extent.width, extent.height, taken, whole)
            for reach in (9, 18, 32)
            for turn in range(0, 360, 45)
        ]
        _, box, reach = min(found, key=lambda each: each[0])
        taken.append((10.0, box))
        offset = (box[0] - centre[0]) / scale, ((box[1] + box[3]) / 2 - centre[1]) / scale
        text.set_position(offset)
        if reach > 12 * scale:
            _leader(axes, centre, box)


def _try(centre, turn, reach, width, height, taken, whole):
    """(cost, box in pixels, reach) of a name that begins `reach` pixels off in a direction."""
    x = centre[0] + reach * np.cos(np.radians(turn))
    y = centre[1] + reach * np.sin(np.radians(turn))
    left = x - width * (0.5 - 0.5 * round(np.cos(np.radians(turn))))
    below = y - height / 2 + 0.35 * height * np.sin(np.radians(turn))
    box = (left, below, left + width, below + height)
    inside = _shared(box, whole)
    cost = 20 * (1 - inside / (width * height)) + reach / 60
    return cost + sum(w * _shared(box, other) for w, other in taken) / 100, box, reach


def _shared(box, other):
    """Area that two boxes (left, below, right, above) have in common."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(width, 0) * max(height, 0)


def _leader(axes, centre, box):
    """A thin line from a point to the nearest edge of its name."""
    end = (np.clip(centre[0], box[0], box[2]), np.clip(centre[1], box[1], box[3]))
    ends = axes.transData.inverted().transform([centre, end])
    axes.plot(*ends.T, color="#999999", lw=0.7, zorder=2, scalex=False, scaley=False)


def score_density(view, scope, strata, path):
    """Score of a scope against mean density; bars: 95% interval of the difference to the base."""
    points, bars, labels = [], [], view.labels
    keys = task_tables.keys_of(strata)
    for label in labels:
        score = task_tables.weighted(view, label, strata)
        density = view.average(label, "density", keys)
        if score is None or density is None:
            continue
        paired = view.differences if label in view.others else view.scores
        found = stats.weighted_interval([(w, paired(label, part)) for w, part in strata])
        points.append((label, density, score))
        bars.append((0.0, 0.0) if found is None or found.low is None or label == view.base
                    else (found.value - found.low, found.high - found.value))  # fmt: skip
    if not points:
        return None
    with figure(path) as (_, axes):
        axes = axes[0, 0]
        _scatter(axes, points, bars, labels)
        if view.base is not None:
            score = task_tables.weighted(view, view.base, strata)
            axes.axhline(score, color="#777777", lw=1, ls="--", zorder=1)
        axes.set(xlabel="density: share of causal blocks computed", ylabel="score, 0 to 100")
        axes.set_title(f"{titles.short(view.section)}: {scope}, {len(keys)} rows")
        _density_axis(axes, points)
        low, high = axes.get_ylim()
        if high - low < 2:  # all but equal: a point up and down, not the noise of rounding
            axes.set_ylim(max(-0.3, (low + high) / 2 - 1), (low + high) / 2 + 1)
        name_points(axes, points, bars, labels)
    text = "bars: 95% interval of the paired difference" if view.base else "bars: 95% interval"
    return f"Score against density ({scope}); {text}"


def _scatter(axes, points, bars, labels):
    for (label, x, y), (low, high) in zip(points, bars, strict=True):
        colour, marker, fill = style(label, labels)
        axes.errorbar(
            x, y, yerr=[[low], [high]], color=colour, marker=marker, ms=7, lw=1.4, mfc=fill,
            capsize=3, ls="none", zorder=4,
        )  # fmt: skip


def _density_axis(axes, points):
    """From 0 to 1 and a little more: density 1 is dense, and every picture has the same axis."""
    axes.set_xlim(0, max(1.03, 1.03 * max(x for _, x, _ in points)))
    axes.margins(y=0.15)


def loss_density(view, path):
    """Change of the loss against density, a panel per length (the four longest)."""
    panels = []
    for length in view.section.lengths()[-4:]:
        keys, points, bars = view.section.where(length=length), [], []
        for label in view.labels:
            change = token_tables.loss_change(view, label, keys)
            density = view.average(label, "density", keys)
            if change is not None and density is not None:
                points.append((label, density, change.value))
                bars.append((change.reach() or 0.0,) * 2)
        if points:
            panels.append((length, points, bars))
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with figure(path, rows, columns, height=0.4 + 3.8 * rows, sharey=True) as (_, axes):
        for panel in axes.flat[len(panels) :]:
            panel.remove()
        for panel, (length, points, bars) in zip(axes.flat, panels, strict=False):
            _scatter(panel, points, bars, view.labels)
            panel.axhline(0, color="#777777", lw=1, ls="--", zorder=1)
            panel.set_title(f"{load.model_name(view.section.info)}, {tokens(length)} tokens")
            panel.set_xlabel("density")
            _density_axis(panel, points)
        for panel in axes[:, 0]:
            panel.set_ylabel("change of the loss, nats per token")
        for panel, (_, points, bars) in zip(axes.flat, panels, strict=False):
            name_points(panel, points, bars, view.labels, size=9)
    return "Change of the loss against density; bars: 95% interval over blocks of 128 tokens"


def tokens(length):
    """ "8K" for 8192, "8000" as it is."""
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def time_length(view, path):
    """Time to first token against length, both logarithmic: every sample, a line of medians."""
    lines = {}
    for label in view.labels:
        found = [
            (n, token_tables.samples(view, label, view.section.where(length=n)))
            for n in view.section.lengths()
        ]
        found = [(n, times) for n, times in found if times.size]
        if found:
            lines[label] = found
    if not lines:
        return None
    with figure(path) as (_, axes):
        axes = axes[0, 0]
        for label, found in lines.items():
            colour, marker, fill = style(label, view.labels)
            for length, times in found:
                axes.plot([length] * times.size, times, ".", color=colour, ms=5, alpha=0.35, mew=0)
            medians = [np.median(times) for _, times in found]
            axes.plot(
                [n for n, _ in found], medians, color=colour, marker=marker, ms=6, lw=1.6, mfc=fill,
                ls="-" if fill == colour else "--",
            )  # fmt: skip
        _time_axes(axes, view.section.lengths())
        axes.set_title(titles.short(view.section))
        ends = [(label, found[-1][0], float(np.median(found[-1][1]))) for label, found in
                lines.items()]  # fmt: skip
        _name_ends(axes, ends, view.labels)
    return "Time to first token against length: every sample, lines through the medians"


def _time_axes(axes, lengths):
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="seconds to first token")
    axes.set_xticks(lengths, [tokens(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    subs = (1, 2, 5) if high / low < 1e3 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    left, right = min(lengths), max(lengths)
    axes.set_xlim(left / 1.15, right * (1.15 if left == right else (right / left) ** 0.22))


def _name_ends(axes, ends, labels):
    """Names to the right of the last points, apart from each other."""
    axes.figure.canvas.draw()
    pixels = axes.transData.transform([(x, y) for _, x, y in ends])
    heights = spread(pixels[:, 1], gap=1.25 * 10 * axes.figure.dpi / 72)
    for (label, x, y), (_, bottom), height in zip(ends, pixels, heights, strict=True):
        axes.annotate(
            label, (x, y), xytext=(12, (height - bottom) * 72 / axes.figure.dpi),
            textcoords="offset points", va="center", fontsize=10, **ink(label, labels),
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.7, "relpos": (0, 0.5)}
            if abs(height - bottom) > 2 else None,
        )  # fmt: skip


def equal_outputs(groups, path):
    """Share of outputs that are the base's, with intervals. groups: [(title, label, whole, first)],
    whole and first an Interval or None: the whole output, its first token."""
    groups = [group for group in groups if group[2] is not None or group[3] is not None]
    if not groups:
        return None
    titles = list(dict.fromkeys(title for title, *_ in groups))
    labels = [label for _, label, *_ in groups]
    lines = len(groups) + 1.2 * len(titles)
    with figure(path, height=1.3 + 0.3 * lines) as (_, axes):
        axes, y, ticks = axes[0, 0], 0.0, []
        for title in titles:
            axes.text(0, y, title, fontsize=10, va="center", weight="bold", color="#444444")
            for _, label, whole, first in (group for group in groups if group[0] == title):
                y += 1
                ticks.append((y, label))
                _share(axes, y - 0.13, whole, style(label, labels)[0], "o", filled=True)
                _share(axes, y + 0.13, first, style(label, labels)[0], "D", filled=False)
            y += 1.2
        axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
        axes.set(ylim=(y - 0.4, -0.6), xlim=(-2, 102), xlabel="percent of rows")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_title("● whole output identical   ◇ first token the same   (95% intervals)")
    return "Share of outputs that equal those of the base; bars: 95% Wilson interval"


def _share(axes, y, interval, colour, marker, filled):
    if interval is None:
        return
    reach = [[interval.value - interval.low], [interval.high - interval.value]]
    axes.errorbar(
        100 * interval.value, y, xerr=np.clip(100 * np.array(reach), 0, None), color=colour,
        marker=marker, ms=5.5, lw=1.1, mfc=colour if filled else "white", ls="none", zorder=4,
    )  # fmt: skip
