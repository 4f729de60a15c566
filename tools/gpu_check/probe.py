# SPDX-License-Identifier: Apache-2.0
"""What the results stand under: GPU, driver, torch, commit. Runs before anything is built.

As a program it prints them as JSON; a child process asks, so that a driver that hangs can be
stopped and no memory of the GPU is held while the steps run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120.0  # the first touch of a GPU can take a minute


class NoGpu(Exception):
    """In one sentence."""


def facts(cuda=None, smi=None) -> dict:
    """`cuda`, `smi`: torch.cuda and machine.nvidia_smi, or what stands for them in a test."""
    try:
        import torch
    except ImportError as error:
        raise NoGpu(f"{sys.executable} has no torch: {error}") from error
    cuda = cuda or torch.cuda
    if not cuda.is_available():
        if not torch.version.cuda:
            raise NoGpu(f"torch {torch.__version__} in {sys.executable} is built without CUDA")
        raise NoGpu(f"torch {torch.__version__} in {sys.executable} sees no NVIDIA GPU")
    sys.path.insert(0, str(ROOT))
    from benchmarks import machine

    properties = cuda.get_device_properties(0)
    gpu = machine.gpu_banner(properties, (smi or machine.nvidia_smi)(properties))
    gpu["driver"] = gpu["state"].get("driver_version")
    changed = machine._git("status", "--porcelain", "--untracked-files=no")
    return {
        "slug": machine.slug({"gpu": gpu}),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "commit": machine._git("rev-parse", "--short=12", "HEAD"),
        "uncommitted": bool(changed),
    }


def ask() -> dict:
    """facts() of a child process; NoGpu with its sentence."""
    command = [sys.executable, str(Path(__file__).resolve())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise NoGpu(f"the GPU did not answer in {SECONDS:.0f} seconds") from error
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode or not lines:
        raise NoGpu(lines[-1] if lines else f"asking torch for a GPU ended with {done.returncode}")
    return json.loads(lines[-1])


if __name__ == "__main__":
    try:
        print(json.dumps(facts()))
    except NoGpu as error:
        sys.exit(str(error))
