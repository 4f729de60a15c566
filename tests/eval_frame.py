# SPDX-License-Identifier: Apache-2.0
"""Fixtures that start `python -m pbs_attn eval dummy` inside the test's process.

A test module imports those that it uses; pytest knows them by their `name`.
"""

import sys

import eval_dummy
import eval_models
import pytest

from pbs_attn import cli
from pbs_attn.cli import eval as cli_eval
from pbs_attn.cli import models
from pbs_attn.eval import runner

ROWS = 16  # 2 tasks x 4 rows x 2 methods


@pytest.fixture(scope="session", name="checkpoint")
def checkpoint_fixture(tmp_path_factory):
    return eval_models.tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session", name="loaded")
def loaded_fixture(checkpoint):
    return models.load(checkpoint), models.load_tokenizer(models.locate(checkpoint))


@pytest.fixture(name="loads")
def loads_fixture(monkeypatch, loaded):
    """The checkpoint is loaded once for all tests; yields the names of loads of weights."""
    names = []

    def load(name, **options):
        names.append(name)
        return loaded[0]

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "load_tokenizer", lambda path, **options: loaded[1])
    monkeypatch.setitem(cli_eval.BENCHES, "dummy", eval_dummy.HELP)
    monkeypatch.setitem(sys.modules, "pbs_attn.eval.dummy", eval_dummy)
    monkeypatch.setattr(eval_dummy, "tries", {})
    monkeypatch.setattr(eval_dummy, "seen", [])
    monkeypatch.setattr(runner.gc, "collect", lambda: None)  # 0.2 s of every row without memory
    return names


@pytest.fixture(name="start")
def start_fixture(loads, checkpoint, tmp_path, capsys):
    """start(words..., out="run") -> (status, stdout, stderr)."""

    def run(*words, out="run"):
        words = ["eval", "dummy", "--model", checkpoint, "--out", tmp_path / out, *words]
        status = cli.main([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


def records(tmp_path, out="run"):
    return eval_dummy.records(tmp_path / out)


def lines(tmp_path, out="run"):
    return sum(len(p.read_bytes().splitlines()) for p in (tmp_path / out).glob("records-*.jsonl"))
