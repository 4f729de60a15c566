# SPDX-License-Identifier: Apache-2.0
"""What the tests of LongBench share: SmolLM2's tokens; of v1 rows of every task and arguments."""

import argparse

from eval_models import WINDOW, smollm2_tokenizer
from test_eval_sources import lines, row, zip_of

from pbs_attn.eval import longbench, recipes
from pbs_attn.eval.session import Tokens

TASKS = list(recipes.TASKS)


def tokens(**options):
    return Tokens(smollm2_tokenizer(), WINDOW, **options)


def arguments(*words):
    parser = argparse.ArgumentParser()
    longbench.add_arguments(parser)
    return parser.parse_args(words)


def all_tasks(tmp_path):
    """Path of a zip of all tasks, three rows each; contexts of some 60 to 200 tokens."""
    folder = tmp_path / "data"
    folder.mkdir()
    for task in TASKS:
        rows = [
            row(task, i, context=f"The number of {task} is {i}. " * (6 + 4 * i)) for i in (0, 1, 2)
        ]
        (folder / f"{task}.jsonl").write_bytes(lines(rows))
    return str(zip_of(tmp_path / "data.zip", folder))
