# SPDX-License-Identifier: Apache-2.0
"""--gpus 0,1,2: one process per GPU, each a shard with its own records.

Like ranks of torchrun, but they never wait for each other: one that dies takes nobody along.
"""

import os
import signal
import subprocess
import sys

import torch

from ..cli import CommandError


def parse(text):
    """'0,1,3' as [0, 1, 3]; CommandError unless torch sees them all."""
    count = torch.cuda.device_count()
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = [-1]
    if len({*found}) < len(found) or not all(0 <= gpu < count for gpu in found):
        raise CommandError(f"--gpus is {text!r}; allowed: different numbers below {count}, which "
                           "is how many GPUs torch sees")  # fmt: skip
    return found


def without(words):
    """The words of a command line without --gpus and its value."""
    kept, words = [], iter(words)
    for word in words:
        if word == "--gpus":
            next(words, None)
        elif not word.startswith("--gpus="):
            kept.append(word)
    return kept


def environments(gpus):
    """The environment of each process: it sees its own GPU only, and is rank i of n."""
    visible = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    found = []
    for rank, gpu in enumerate(gpus):
        env = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}
        env["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
        found.append(env | {"RANK": str(rank), "WORLD_SIZE": str(len(gpus)), "LOCAL_RANK": "0"})
    return found


def spread(words, gpus, program=(sys.executable, "-m", "pbs_attn")):
    """Run `program words...` once per GPU; their exit statuses, when all have ended.

    Ctrl-C and SIGTERM go to every process; KeyboardInterrupt when they have ended.
    """
    children = [subprocess.Popen([*program, *words], env=env) for env in environments(gpus)]
    stopped = False
    while True:
        try:
            statuses = [child.wait() for child in children]
        except KeyboardInterrupt:
            if not stopped:  # a second time would only disturb their leaving
                for child in children:
                    child.send_signal(signal.SIGTERM)
            stopped = True
        else:
            break
    if stopped:
        raise KeyboardInterrupt
    return statuses
