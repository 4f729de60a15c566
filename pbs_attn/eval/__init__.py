# SPDX-License-Identifier: Apache-2.0
"""Evaluation: what a method costs in quality and gains in time, beside dense.

    jobs.py      one row to run (Job), what a bench has to do (Plan)
    session.py   the model and its tokenizer: prompts, greedy generation, prefill under a method
    store.py     the run folder: append-only records, identity, locks
    runner.py    all rows of a bench: shards, resume, out of memory, progress
    <bench>.py   one module per bench, listed in pbs_attn/cli/eval.py, which says what it must have

Imported on use only; needs the extra `eval`.
"""
