# SPDX-License-Identifier: Apache-2.0
"""frontier: what every method loses at what density and in what time, over a grid of settings.

The rows are those of ppl and so is the run folder, which either of the two goes on with. At its
end, and when it is stopped, it draws what is there.
"""

import importlib.util
import sys
from pathlib import Path

from ..cli import CommandError, equal_loss, missing
from . import ppl
from .report import document, frontier_plot, frontier_read, frontier_tables, load

NAME = ppl.NAME
HELP = "loss against density and against time of attention, every method over its thresholds"
DEFAULT_METHODS = "grid"
# What `grid` stands for: every method from sparse to dense, dense first.
GRID = {
    "pbs": ("tau", (0.7, 0.8, 0.9, 0.95)),
    "pbs+": ("tau", (0.8, 0.9, 0.95)),
    "identity": ("tau", (0.7, 0.8, 0.9, 0.95)),
    "meanpool": ("tau", (0.9, 0.95, 0.98)),
    "xattention": ("tau", (0.9, 0.95, 0.97)),
    "flashprefill": ("alpha", (0.3, 0.1, 0.03)),
    "flashprefill:correction=mean": ("alpha", (0.3, 0.1, 0.03)),
    "peak:stride=8": ("eps", (0.06, 0.03, 0.015, 0.007)),
    "peak:stride=16": ("eps", (0.04, 0.02, 0.01, 0.005)),
    "peak:stride=32": ("eps", (0.03, 0.015, 0.0075, 0.004)),
    "peak:stride=8,correction=none": ("eps", (0.06, 0.03, 0.015, 0.007)),
    "peak:stride=16,correction=none": ("eps", (0.04, 0.02, 0.01, 0.005)),
    "peak:stride=32,correction=none": ("eps", (0.03, 0.015, 0.0075, 0.004)),
    "oracle": ("tau", (0.8, 0.9, 0.95)),
    "oracle:reduce=max,rule=absolute": ("eps", (0.1, 0.04, 0.015)),
}
EXAMPLES = """\
  python -m pbs_attn eval frontier --lengths 8k --prefix 4k --out runs/frontier
      the whole grid on the text that the package ships
  python -m pbs_attn eval frontier --lengths 8k --text a.txt b.txt data.zip/lcc.jsonl#3 \\
      --kinds essay=a,b code=lcc-3 --choose a,lcc-3 --method grid,flexprefill
      every kind by itself; settings chosen on two texts and reported on the others
  python -m pbs_attn eval frontier --runs runs/ppl runs/frontier --draw docs/frontier
      draws what ppl and frontier runs of one model hold, and runs nothing

grid: full, and
"""
EXAMPLES += "\n".join(
    f"  {name:<32} {parameter} {', '.join(f'{value:g}' for value in values)}"
    for name, (parameter, values) in GRID.items()
)
INTRO = """\
Loss against density and against the time of attention, every method over its thresholds.
Densities are computed causal 128 x 128 block pairs over all of them, the same unit for every
method. Times are single prefills beside dense on the same window; of methods written in torch
(docs/methods.md) they are those of that code. Errors say how far other blocks of such texts would
differ, not how far another model would."""


def grid():
    """The methods that `grid` stands for, as --method wants them."""
    found = ["full"]
    for name, (parameter, values) in GRID.items():
        mark = "," if ":" in name else ":"
        found += [f"{name}{mark}{parameter}={value:g}" for value in values]
    return ",".join(found)


def add_arguments(parser):
    ppl.add_arguments(parser)
    parser.set_defaults(lengths="8k")
    group = parser.add_argument_group("frontier")
    group.add_argument("--kinds", nargs="+", default=[], metavar="NAME=TEXT,TEXT",
                       help="names of texts; every kind is shown by itself, too")  # fmt: skip
    group.add_argument("--choose", default="", metavar="TEXT,TEXT",
                       help="texts on which a setting of every method is chosen; it is reported "
                            "on the others")  # fmt: skip
    group.add_argument("--budget", default="1%", metavar="PERCENT",
                       help="perplexity above dense that a chosen setting may lose "
                            "(%(default)s)")  # fmt: skip
    group.add_argument("--against", default="peak", metavar="METHOD",
                       help="method that the others are paired with (%(default)s)")  # fmt: skip
    group.add_argument("--draw", metavar="DIR",
                       help="frontier.md, .csv and .png go there (the run folder)")  # fmt: skip
    group.add_argument("--runs", nargs="+", metavar="DIR",
                       help="run nothing; draw what these run folders of ppl and frontier "
                            "hold")  # fmt: skip
    group.add_argument("--times", nargs="+", metavar="DIR",
                       help="with --runs: those of them whose times count, if others ran beside "
                            "other work")  # fmt: skip


def begin(args):
    """Before anything is loaded: words that cannot be read, and --runs, which runs nothing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise missing("matplotlib")
    options = wanted(args)
    args.method = ",".join(
        grid() if word.strip() == "grid" else word for word in args.method.split(",")
    )
    if args.runs is None:
        if args.times:
            raise CommandError("--times names some of the folders of --runs, which is not given")
        return None
    folder = args.draw or args.out
    if folder is None:
        raise CommandError("--runs needs --draw DIR, a folder for the pictures")
    draw(frontier_read.read(args.runs, args.times), options, folder)
    return 0


def finish(args):
    """At the end of a start, whole or stopped: draw what the run folder holds."""
    try:
        runs = frontier_read.read([args.out])
    except CommandError as error:
        print(f"\nfrontier: {error}")
        return
    draw(runs, wanted(args), args.draw or args.out)


def wanted(args):
    """frontier_tables.Wanted of the options; names of texts are checked by check_names."""
    kinds = {}
    for word in args.kinds:
        name, equals, names = word.partition("=")
        found = _names(names)
        if not equals or not name.strip() or not found or name in kinds:
            raise CommandError(f"--kinds has {word!r}; allowed: NAME=TEXT,TEXT, each name once")
        kinds[name] = found
    return frontier_tables.Wanted(
        kinds, tuple(_names(args.choose)), equal_loss.parse_budget(args.budget, "--budget"),
        args.budget, args.against,
    )  # fmt: skip


def _names(text):
    return [name.strip() for name in text.split(",") if name.strip()]


def check_names(options, known):
    """CommandError where --kinds or --choose names a text that is not there."""
    asked = [("--kinds", name) for names in options.kinds.values() for name in names]
    for option, name in asked + [("--choose", name) for name in options.chosen]:
        if name not in known:
            raise CommandError(f"{option} names the text {name!r}; allowed: {', '.join(known)}")


def draw(runs, options, folder):
    """frontier.md, frontier.csv and the pictures of Runs into `folder`; says where."""
    check_names(options, list(runs.texts))
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        everything, tables = frontier_tables.tables(runs, options)
        pictures = {place.slug: _pictures(runs, place, options, folder) for place in runs.places}
        document.replace(folder / "frontier.csv", everything.csv())
        document.replace(folder / "frontier.md", markdown(runs, tables, pictures))
    except OSError as error:
        raise CommandError(f"--draw {folder}: {error}") from error
    names = ", ".join(name for found in pictures.values() for name, _ in found)
    print(f"pbs_attn frontier: wrote {folder}/frontier.md, frontier.csv, {names}", file=sys.stderr)


def _pictures(runs, place, options, folder):
    """[(file, caption)] of a place; the only one has no length in its file's name."""
    stem = "frontier" if len(runs.places) == 1 else f"frontier-{place.slug}"
    model = load.model_name(runs.infos[0])
    path, found = folder / f"{stem}.png", []
    found.append((path.name, frontier_plot.frontier(place, path, model, options.budget)))
    if options.kinds:
        path = folder / f"{stem}-kinds.png"
        found.append((path.name, frontier_plot.kinds(place, options.kinds, path, options.budget)))
    return [(name, caption) for name, caption in found if caption]


def markdown(runs, tables, pictures):
    """The text of frontier.md."""
    info = runs.infos[0]
    lines = [f"# Frontier: {load.model_name(info)}", INTRO, "\n".join(_facts(runs))]
    if runs.missing:
        lines.append(f"**INCOMPLETE**: {runs.missing:,} of {runs.total:,} rows are not done or "
                     "failed.")  # fmt: skip
    for place in runs.places:
        lines.append(f"## {place.name[0].upper()}{place.name[1:]}")
        lines += [f"![{caption}]({name})\n\n{caption}." for name, caption in pictures[place.slug]]
        lines += [table.markdown().rstrip() for table in tables[place.slug]]
    return "\n\n".join(lines) + "\n"


def _facts(runs):
    lines = [f"- Texts: {', '.join(f'{name} {sha[:12]}' for name, sha in runs.texts.items())}"]
    lines += [f"- `{info['command']}`" for info in runs.infos if "command" in info]
    for info in runs.infos:
        lines += [f"- {line}" for line in document.machine(info)]
    return list(dict.fromkeys(lines + [f"- {note}" for note in runs.notes]))


def prepare(args, tokens):
    """ppl's plan; names that --kinds and --choose do not find are said before the model loads."""
    plan = ppl.prepare(args, tokens)
    check_names(wanted(args), list(plan.identity["texts"]))
    return plan


work_all = ppl.work_all
prompt = ppl.prompt
describe = ppl.describe
running = ppl.running
summary = ppl.summary
