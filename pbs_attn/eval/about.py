# SPDX-License-Identifier: Apache-2.0
"""What ran, for run.json: model by content, versions, machine, commit."""

import hashlib
import importlib.metadata
import os
import subprocess
from pathlib import Path

import torch

from ..cli.run import cpu_name

PACKAGES = ("transformers", "tokenizers", "numpy", "scipy", "rouge", "jieba", "rapidfuzz",
            "wonderwords")  # fmt: skip
END = 1 << 16  # bytes read from both ends of a weight file
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def sha256_file(path):
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def model(path, config, tokenizer):
    """{config, weights, template}: SHA-256s by which a run knows its model, wherever it lies.

    path: what cli.models.locate gave. weights is of names, sizes and both ends of the weight
    files: enough to tell two fine-tunes apart without reading them whole; None for a hub id whose
    files are not on this machine yet.
    """
    folder = Path(path) if Path(path).exists() else _cached(path)
    text = config.to_json_string(use_diff=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    files = []
    if folder is not None and folder.is_file():
        files = [folder]
    elif folder is not None:
        digest = sha256_file(folder / "config.json")
        files = sorted(file for kind in WEIGHTS for file in folder.glob(kind))
    template = getattr(tokenizer, "chat_template", None)
    template = None if not template else hashlib.sha256(str(template).encode()).hexdigest()
    generation = None
    if folder is not None and (folder / "generation_config.json").is_file():
        generation = sha256_file(folder / "generation_config.json")
    return {"config": digest, "weights": _ends(files), "template": template,
            "generation": generation}  # fmt: skip


def parameters(config):
    """Number of parameters of the model that `config` describes; None if that cannot be told."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # no memory, no weights
            empty = AutoModelForCausalLM.from_config(config)
    except Exception:  # code of its own, or a config without a causal model
        return None
    return sum(weight.numel() for weight in empty.parameters())


def _cached(name):
    """The folder of a hub id in the local cache, None if it is not there."""
    from transformers.utils import cached_file

    try:
        found = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found).parent if found else None


def _ends(files):
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(END))
            file.seek(max(0, size - END))
            digest.update(file.read(END))
    return digest.hexdigest()


def versions():
    """{package: version} of what can change a number; absent packages are left out."""
    from .. import __version__

    found = {"pbs_attn": __version__, "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def machine(device):
    """{cpu, threads, isa or gpu ...} of the device that the model is on."""
    from .. import build_info

    device, info = torch.device(device), build_info()
    found = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "backend": info["backend"],
             "isa": info["isa"], "device": str(device)}  # fmt: skip
    if device.type == "cuda" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_gb": round(gpu.total_memory / 1e9, 1),
                  "capability": f"{gpu.major}.{gpu.minor}", "cuda": torch.version.cuda}  # fmt: skip
    return found


def commit():
    """Commit of the checkout that this package runs from, "+" if files differ; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    env = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    words = []
    for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")):
        try:
            done = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True,
                                  timeout=20, env=env)  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None
        if done.returncode:
            return None
        words.append(done.stdout.strip())
    return words[0] + ("+" if words[1] else "")
