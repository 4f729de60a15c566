# SPDX-License-Identifier: Apache-2.0
"""exec: register the attention, run somebody else's program, say what was used."""

import argparse
import runpy
import sys

from . import CommandError, methods

EXAMPLES = """\
The program still has to ask for attn_implementation="pbs_attn"; it needs no import of ours.

examples:
  python -m pbs_attn exec --tau 0.95 --require-used -m lm_eval --model hf \\
      --model_args pretrained=DIR,attn_implementation=pbs_attn --tasks niah_single_1
  python -m pbs_attn exec --config pbs.json my_script.py --its-option 3
  python -m pbs_attn exec --method flexprefill:gamma=0.9 my_script.py

exit status: the program's; 3 if it was 0, --require-used was given and no call was sparse."""

STATUS_UNUSED = 3


def add_arguments(parser):
    parser.epilog = EXAMPLES
    parser.usage = "%(prog)s [options] (-m MODULE | SCRIPT.py) ARGS..."
    parser.add_argument("--require-used", action="store_true",
                        help="fail if no call took the sparse route")  # fmt: skip
    parser.add_argument("--method", metavar="METHOD",
                        help="what runs, with parameters: xattention:stride=16 (default: pbs, or "
                             "what PBS_ATTN_CONFIG says; docs/methods.md has them)")  # fmt: skip
    parser.add_argument("--name", default="pbs_attn", help="name to register (pbs_attn)")
    methods.add_config_arguments(parser)
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE ARGS...",
                        help="module to run as __main__; the rest is its own")  # fmt: skip
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT.py ARGS...",
                        help="or a script")  # fmt: skip


def run_program(module, script):
    """Run it as __main__ with its own sys.argv; its exit status."""
    argv = module or script
    saved, sys.argv = sys.argv, list(argv)
    try:
        if module:
            sys.path.insert(0, "")
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    finally:
        sys.argv = saved
    return 0


def main(args):
    if not args.module and not args.script:
        raise CommandError("nothing to run; allowed: -m MODULE ARGS... or SCRIPT.py ARGS...")
    policy = methods.base_config(args)
    if args.method is not None:
        policy = methods.policy(args.method, policy)
    from .. import record, register

    register(args.name, policy, overwrite=True)
    try:
        with record() as calls:
            status = run_program(args.module, args.script)
    finally:
        print(f"\npbs_attn\n{calls.summary()}", file=sys.stderr)
    if status == 0 and args.require_used and not calls.calls.get("pbs"):
        print('pbs_attn exec: no call was sparse; is attn_implementation="pbs_attn" set, '
              "are the inputs long enough?", file=sys.stderr)  # fmt: skip
        return STATUS_UNUSED
    return status
