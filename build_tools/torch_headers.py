# SPDX-License-Identifier: Apache-2.0
"""Find LibTorch's headers without importing torch: headers are all that a build needs of it."""

from __future__ import annotations

import importlib.util
import os
import re
import sysconfig
from pathlib import Path

MARKER = Path("torch/csrc/stable/library.h")  # there since 2.9
MIN_TORCH = (2, 10)


def candidates() -> list[Path]:
    """Where headers may lie, best first. PBS_TORCH_INCLUDE, once set, is the only one."""
    given = os.environ.get("PBS_TORCH_INCLUDE")
    if given:
        return [Path(given)]
    found = []
    spec = importlib.util.find_spec("torch")
    for place in (spec.submodule_search_locations or []) if spec else []:
        found.append(Path(place) / "include")
    # pip's isolated build keeps the interpreter of the venv and only hides its packages.
    for scheme in ("purelib", "platlib"):
        found.append(Path(sysconfig.get_path(scheme)) / "torch" / "include")
    return found


def version(include: Path) -> str:
    """The torch that these headers belong to, as they say it themselves."""
    text = (include / "torch" / "headeronly" / "version.h").read_text()
    names = ("MAJOR", "MINOR", "PATCH")
    parts = [re.search(rf"define TORCH_VERSION_{name} (\d+)", text) for name in names]
    return ".".join(part.group(1) if part else "?" for part in parts)


def find() -> Path | None:
    return next((path for path in candidates() if (path / MARKER).is_file()), None)


def require() -> Path:
    """The header folder of a torch that is new enough, or an error that names the cure."""
    include = find()
    if include is None:
        searched = "".join(f"\n  {path}" for path in candidates())
        raise SystemExit(
            f"pbs_attn: no LibTorch headers ({MARKER}) in any of{searched}\n"
            "Install torch >= 2.10 into this environment, or set PBS_TORCH_INCLUDE to the "
            "include folder of any torch >= 2.10."
        )
    found = version(include)
    if tuple(int(p) for p in re.findall(r"\d+", found)[:2]) < MIN_TORCH:
        raise SystemExit(f"pbs_attn: {include} belongs to torch {found}; 2.10 or newer is needed")
    return include


if __name__ == "__main__":
    print(require())
