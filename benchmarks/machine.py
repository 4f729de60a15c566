# SPDX-License-Identifier: Apache-2.0
"""The banner that stands over every number: machine, build, versions, commit, command."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# The flags that say which of our paths could run; a full list would be two lines of noise.
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16")


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def banner(threads: int) -> dict:
    cpu = _cpuinfo()
    import pbs_attn

    info = pbs_attn.build_info()
    changed = _git("status", "--porcelain", "--untracked-files=no", "csrc", "pbs_attn")
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "vendor": cpu.get("vendor_id", ""),
        "family": cpu.get("cpu family", ""),
        "model": cpu.get("model", ""),
        "flags": [flag for flag in FLAGS if flag in cpu.get("flags", "").split()],
        "cpus": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "build": info["core"],
        "isa": info["isa"],
        "forced_isa": os.environ.get("PBS_ATTN_ISA", ""),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted": bool(changed),
        "command": command(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def command() -> str:
    """The command line that made the numbers, as a person would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else "python " + sys.argv[0]
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def slug(about: dict) -> str:
    """Folder name below results/: what a reader compares, not where the machine stands."""
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(about["vendor"], "cpu")
    parts = [vendor]
    if about["family"]:
        parts.append(f"family{about['family']}-model{about['model']}")
    else:
        parts.append(re.sub(r"[^a-z0-9]+", "-", about["cpu"].lower()).strip("-"))
    return "-".join([*parts, f"{about['cpus']}cpu"])


def describe(about: dict) -> str:
    kind = f"family {about['family']} model {about['model']}"
    state = " + uncommitted changes" if about["uncommitted"] else ""
    lines = [
        f"{about['cpu']}, {kind}, {about['cpus']} CPUs, {about['threads']} threads",
        f"flags {' '.join(about['flags'])}; torch {about['torch']} ({about['torch_cpu']})",
        f"Python {about['python']}, commit {about['commit']}{state}",
        about["command"],
    ]
    return "\n".join(lines)
