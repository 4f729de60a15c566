# SPDX-License-Identifier: Apache-2.0
"""eval --tp 2: two processes that share a model's heads say what one process says."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import byte_models
import pytest

from pbs_attn import cli
from pbs_attn.eval import store

pytestmark = pytest.mark.xdist_group("eval_tp")  # one process: both runs are shared
ROOT = Path(__file__).resolve().parent.parent
NAMES = "full,pbs:tau=0.3,block=64,segment=128"
BENCHES = {
    "ppl": ["--lengths", "600"],
    "agreement": ["--lengths", "500", "--windows", "2", "--new-tokens", "5"],
    "longbench": ["--data", "ROWS", "--tasks", "lcc", "--max-prompt", "500"],
    "ttft": ["--lengths", "500", "--repeat", "2"],
}
ROW = {
    "input": "", "context": "def double(x):\n    return 2 * x\n" * 20, "answers": ["y = 2"],
    "length": 100, "dataset": "lcc", "language": "python", "all_classes": None, "_id": "row",
}  # fmt: skip
# One start of torchrun for all benches: starting it is what takes time. Only the last of them may
# end the process group, which torch cannot form again and again.
DRIVER = """
import json, sys, torch
from pbs_attn import cli
from pbs_attn.eval.ranks import Ranks
commands, meet = json.loads(sys.argv[1]), Ranks.meet
for words in commands:
    Ranks.meet = meet if words is commands[-1] else lambda self: torch.distributed.barrier()
    status = cli.main(words)
    if status:
        sys.exit(status)
"""


def words(bench, checkpoint, out, tp=None):
    options = [str(out.parent / "lcc.jsonl") if x == "ROWS" else x for x in BENCHES[bench]]
    found = ["eval", bench, "--model", checkpoint, "--device", "cpu", "--method", NAMES,
             "--out", str(out / bench), *options]  # fmt: skip
    return found + (["--tp", str(tp)] if tp else [])


def torchrun(checkpoint, out, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "driver.py"
    script.write_text(DRIVER, encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-addr", "127.0.0.1", "--master-port", str(port),
        str(script), json.dumps([words(bench, checkpoint, out, 2) for bench in BENCHES]),
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        return (*process.communicate(timeout=240), process.returncode)
    finally:
        if process.poll() is None:  # the ranks too
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(records of one process, of two, what the two said) by (bench, method, id)."""
    tmp_path = tmp_path_factory.mktemp("tp")
    checkpoint = byte_models.checkpoint(tmp_path / "tiny")
    (tmp_path / "lcc.jsonl").write_text(json.dumps(ROW), encoding="utf-8")
    said, errors, status = torchrun(checkpoint, tmp_path / "two", tmp_path)
    assert status == 0, errors[-3000:]
    for bench in BENCHES:
        assert cli.main(words(bench, checkpoint, tmp_path / "one")) == 0
    found = []
    for side in ("one", "two"):
        records = (r for bench in BENCHES for r in store.read(tmp_path / side / bench)[1].values())
        found.append({(r["bench"], r["method"], r["id"]): r for r in records})
    assert found[0].keys() == found[1].keys()
    assert all(record["status"] == "ok" for side in found for record in side.values())
    return *found, said


def pairs(both, bench):
    return [(both[0][key], both[1][key]) for key in both[0] if key[0] == bench]


def test_one_rank_writes(both):
    assert len(both[1]) == 2 + 4 + 2 + 2
    assert both[2].count("same first") == 1  # the table of ttft, once
    assert "over 2 ranks" in both[2]


def test_same_losses(both):
    for one, two in pairs(both, "ppl"):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["block_losses"] == pytest.approx(one["block_losses"], abs=1e-3)
        assert two["kl"] == pytest.approx(one["kl"], abs=1e-4)
        assert two["delta_se"] == pytest.approx(one["delta_se"], abs=1e-4)


def test_density_is_over_the_heads_of_both(both):
    for bench in BENCHES:
        for one, two in pairs(both, bench):
            assert two["density"] == pytest.approx(one["density"], abs=1e-9), bench
            assert two["computed"] == pytest.approx(one["computed"], abs=1e-9), bench
    assert any(one["density"] < 0.95 for one, _ in pairs(both, "ppl"))


def test_same_tokens(both):
    for one, two in pairs(both, "agreement"):
        assert two["tokens"] == one["tokens"]
        assert two["first_same"] == one["first_same"]


def test_same_replies(both):
    for one, two in pairs(both, "longbench"):
        assert two["pred"] == one["pred"] and two["score"] == one["score"]


def test_times_are_of_both(both):
    for one, two in pairs(both, "ttft"):
        assert (one["ranks"], two["ranks"]) == (1, 2)
        assert len(two["samples"]) == 2
        assert two["first_token"] == one["first_token"]
        assert two["kl"] == pytest.approx(one["kl"], abs=1e-4)
        # Attention and MLP of each layer end in one sum over the ranks.
        assert two["comm_calls"] >= 4 and two["comm_s"] > 0
        assert two["cache_gb"] == one["cache_gb"] / 2
    assert "2 ranks, slowest counts" in both[2]
