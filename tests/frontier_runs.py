# SPDX-License-Identifier: Apache-2.0
"""Made-up records of `eval frontier`, few and round enough to work values out by hand."""

import pytest
import report_runs

from pbs_attn.eval.report import frontier_data as data
from pbs_attn.eval.report import frontier_read

# Two windows of two blocks of 128 tokens; losses of dense, then differences by setting.
DENSE = {"a": [3.0, 3.0], "b": [2.0, 2.0]}
METHODS = {
    "full": {"method": "full"},
    "pbs": {"method": "pbs", "tau": 0.9, "min_q": 0, "permute": "keys"},
    "pbs:tau=0.8": {"method": "pbs", "tau": 0.8, "min_q": 0, "permute": "keys"},
    "identity": {"method": "identity", "tau": 0.9, "min_q": 0},
}
DIFFERENCES = {
    "full": {"a": [0, 0], "b": [0, 0]},
    "pbs:tau=0.8": {"a": [0.2, 0], "b": [0.1, 0.1]},
    "pbs": {"a": [0.1, 0], "b": [0.05, 0.05]},
    "identity": {"a": [0.004, 0.008], "b": [0.3, -0.1]},
}
DENSITY = {"full": 1.0, "pbs:tau=0.8": 0.2, "pbs": 0.4, "identity": 0.5}
SECONDS = {"full": {"a": 2.0, "b": 4.0}, "pbs:tau=0.8": {"a": 1.0, "b": 3.0},
           "pbs": {"a": 1.0, "b": 2.0}, "identity": {"a": 1.0, "b": 2.0}}  # fmt: skip
COPIED = {"a": (0.1, 0.03, 100), "b": (0.4, 0.04, 200)}  # of every sparse setting


def record(label, text, prefix=0, **changes):
    blocks = [x + y for x, y in zip(DENSE[text], DIFFERENCES[label][text], strict=True)]
    change, error, tokens = COPIED[text] if label != "full" else (0.0, 0.0, COPIED[text][2])
    fields = {
        "tokens": 256, "loss": sum(blocks) / 2, "block_losses": blocks, "prefix": prefix,
        "density": DENSITY[label], "computed": DENSITY[label], "copied_delta": change,
        "copied_delta_se": error, "copied_tokens": tokens, "attention_s": SECONDS[label][text],
    } | changes  # fmt: skip
    return report_runs.record("ppl", text, 0, label, 256 + prefix, **fields)


def folder(path, records, prefix=0, texts=None, **options):
    identity = {"texts": texts or {"a": "sha-a", "b": "sha-b"}, "prefix": prefix}
    options = {"methods": METHODS} | options
    return report_runs.write(path, "ppl", records, identity=identity, **options)


def everything(prefix=0, labels=METHODS):
    return [record(label, text, prefix) for label in labels for text in DENSE]


@pytest.fixture(name="place")
def place_fixture(tmp_path):
    (place,) = frontier_read.read([folder(tmp_path / "run", everything())]).places
    return place


def setting(text):
    name, _, tau = text.partition(":tau=")
    return data.Setting(name, float(tau or 0.9), "tau")
