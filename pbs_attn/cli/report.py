# SPDX-License-Identifier: Apache-2.0
"""report: tables, intervals and pictures from the run folders of `eval`."""

import sys

EXAMPLES = """\
examples:
  python -m pbs_attn report pbs-eval/ppl-smollm2 pbs-eval/ruler-smollm2 --against full --out report
      report.md, a CSV file per table, pictures
  python -m pbs_attn report pbs-eval
      every run folder in it, to the screen only
  python -m pbs_attn report runs/longbench-llama --paper --out report
      the paper's own row beside ours, in columns that name its harness and model

Runs of one benchmark are put together where their identity (model, recipe, data, ...) agrees,
and kept in sections of their own where it does not.

exit status: 0 complete, 2 usage, 3 rows failed or are missing"""


def add_arguments(parser):
    parser.epilog = EXAMPLES
    parser.add_argument(
        "runs", nargs="+", metavar="RUNS", help="run folders of `eval`, or a folder of such"
    )
    parser.add_argument(
        "--against", metavar="METHOD", help="label of the method to compare with (full, else sdpa)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="write report.md, *.csv and *.png there (default: text only)"
    )
    parser.add_argument(
        "--paper", nargs="?", const="", metavar="MODEL",
        help="the paper's numbers beside ours: for this model of the paper, or the one that fits",
    )  # fmt: skip
    parser.add_argument(
        "--allow-missing", action="store_true",
        help="means over the rows that are ok, instead of 0 for the rest",
    )  # fmt: skip


def main(args):
    from ..eval.report import document

    views = document.views(args.runs, args.against, args.allow_missing, args.paper)
    parts = document.parts(views)
    if args.out:
        print(document.write(parts, args.out), end="")
        print(f"pbs_attn report: wrote {args.out}/report.md", file=sys.stderr)
    else:
        print(document.markdown(parts), end="")
    return 0 if all(view.section.complete() for view in views) else 3
