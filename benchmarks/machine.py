# SPDX-License-Identifier: Apache-2.0
"""The banner that stands over every number: machine, build, versions, commit, command.

For a GPU also its clocks and power under load, as nvidia-smi has them.
"""

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


# Fields that every driver of the last years knows; one that is unknown fails the whole query.
SMI_FIELDS = (
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def nvidia_smi(properties, run=subprocess.run) -> dict:
    """{field: value now}, or {"unavailable": why}. Values the GPU does not give are left out."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    uuid = str(getattr(properties, "uuid", "")).removeprefix("GPU-")
    try:  # by uuid, as CUDA's index is not nvidia-smi's; some containers know it by another
        for which in ([f"--id=GPU-{uuid}"], []) if uuid else ([],):
            done = run(command + which, capture_output=True, text=True, timeout=20, check=False)
            if done.returncode == 0:
                break
    except (OSError, subprocess.SubprocessError) as error:
        return {"unavailable": str(error)}
    lines = done.stdout.strip().split("\n")
    values = [value.strip() for value in lines[0].split(",")]
    if done.returncode or len(lines) > 1 or len(values) != len(SMI_FIELDS):
        return {"unavailable": (done.stderr or done.stdout).strip()[-200:] or "no output"}
    pairs = zip(SMI_FIELDS, values, strict=True)
    return {field: value for field, value in pairs if not value.startswith("[")}


def gpu_banner(properties, state: dict) -> dict:
    """`state`: nvidia_smi() with the GPU at work, before the first sample."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "state": state,
    }


def command() -> str:
    """The command line that made the numbers, as a person would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else "python " + sys.argv[0]
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def slug(about: dict) -> str:
    """Folder name below results/: what a reader compares, not where the machine stands."""
    if "gpu" in about:
        name = re.sub(r"[^a-z0-9]+", "-", about["gpu"]["name"].lower()).strip("-")
        return name if name.startswith("nvidia") else f"nvidia-{name}"
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
    if "gpu" in about:
        lines.insert(0, describe_gpu(about["gpu"]))
    return "\n".join(lines)


def describe_gpu(gpu: dict) -> str:
    sizes = f"{gpu['memory_bytes'] / 2**30:.0f} GiB, L2 {gpu['l2_bytes'] / 2**20:.0f} MiB"
    versions = f"CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}"
    return (
        f"{gpu['name']}, capability {gpu['capability']}, {gpu['sms']} SMs, {sizes}; {versions}\n"
        f"under load: {describe_state(gpu['state'])}"
    )


def describe_state(state: dict) -> str:
    if "unavailable" in state:
        return f"nvidia-smi unavailable: {state['unavailable']}"
    return ", ".join(f"{field} {value}" for field, value in state.items())
