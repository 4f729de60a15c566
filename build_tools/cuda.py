# SPDX-License-Identifier: Apache-2.0
"""The CUDA library's part of a build: which nvcc, for which targets, or why there is none.

`python build_tools/cuda.py` says which, or fails with the reason.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from compiling import BuildError, compiler_id

MODES = ("auto", "0", "1")
# Machine code for 8.x and 9.0, and PTX for what comes after them. PBS_CUDA_ARCHS=80 is the quick
# build of a developer: one target instead of three.
DEFAULT_ARCHS = "80;90;80+PTX"
MIN_ARCH = 80
HOPPER_FILE = "sm90"  # in the name of a source that needs the instructions of 9.0a
# What a GPU is to decide between: csrc/cuda/attend_instances_sm90.inc.
VARIANTS_FILE, VARIANTS_FLAG = "attend_sm90.cu", "-DPBS_ATTEND_VARIANTS"

# -Xptxas -v: registers and spills of every kernel, kept in the log beside the object file.
NVCC_FLAGS = (
    "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas "
    "-Xptxas -v -Icsrc/include -Icsrc"
)


@dataclass(frozen=True)
class Arch:
    """One entry of PBS_CUDA_ARCHS: machine code for cc, with +PTX also code to translate later."""

    cc: str
    ptx: bool

    def flags(self) -> list[str]:
        codes = [f"sm_{self.cc}", *([f"compute_{self.cc}"] if self.ptx else [])]
        return [f"-gencode=arch=compute_{self.cc},code=[{','.join(codes)}]"]


def parse_archs(text: str) -> list[Arch]:
    """'80;90;80+PTX' -> one Arch for each cc, in order; an entry may come twice."""
    found: dict[str, bool] = {}
    for entry in text.split(";"):
        match = re.fullmatch(r"(\d+)(a?)(\+PTX)?", entry.strip())
        if not match or int(match[1]) < MIN_ARCH:
            raise BuildError(
                f"PBS_CUDA_ARCHS is {text!r}, with an entry {entry!r}: compute capabilities from "
                f"{MIN_ARCH} up, each with +PTX or without, separated by ';' are allowed"
            )
        cc = match[1] + match[2]
        found[cc] = found.get(cc, False) or bool(match[3])
    return [Arch(cc, ptx) for cc, ptx in found.items()]


def archs_for(source: Path, archs: list[Arch]) -> list[Arch]:
    """A file of Hopper kernels is compiled for 9.0a alone where 9.0 is wanted; where it is not, for
    the same targets as all others, for which its kernels have no body."""
    if HOPPER_FILE in source.name and any(arch.cc in ("90", "90a") for arch in archs):
        return [Arch("90a", False)]
    return archs


def find_nvcc() -> tuple[Path | None, str]:
    """nvcc, or None and where it was looked for."""
    for name in ("PBS_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(name)
        if home:
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise SystemExit(f"pbs_attn: {name} is {home!r}, but there is no {nvcc}")
            return nvcc, name
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path), "PATH"
    default = Path("/usr/local/cuda/bin/nvcc")
    if default.is_file():
        return default, "the default folder"
    return None, "no nvcc in PBS_CUDA_HOME, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"


def choose_nvcc() -> tuple[Path | None, str]:
    """nvcc to build the CUDA library with; or None and one line why there is none, which
    `pbs-attn doctor` repeats. PBS_BUILD_CUDA=1 makes that an error."""
    mode = os.environ.get("PBS_BUILD_CUDA", "auto")
    if mode not in MODES:
        raise SystemExit(f"pbs_attn: PBS_BUILD_CUDA is {mode!r}: one of {', '.join(MODES)}")
    if mode == "0":
        return None, "PBS_BUILD_CUDA=0"
    nvcc, where = find_nvcc()
    if nvcc is None and mode == "1":
        raise SystemExit(f"pbs_attn: PBS_BUILD_CUDA=1, but {where}")
    return nvcc, "" if nvcc else where


def sources(root: Path) -> list[str]:
    """csrc/cuda, slow to compile first."""
    files = [f.relative_to(root) for f in (root / "csrc" / "cuda").glob("*.c*")]
    kept = [f for f in files if f.suffix in (".c", ".cu")]
    return [str(f) for f in sorted(kept, key=lambda f: (not f.name.startswith("attend"), f))]


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    version: str  # "13.0.88"
    archs: list[Arch]
    host: str  # the C++ compiler behind nvcc
    identity: str  # of both compilers: others mean other objects

    def compile_command(self, source: Path) -> tuple[str, ...]:
        gencode = [flag for arch in archs_for(source, self.archs) for flag in arch.flags()]
        flags = [*NVCC_FLAGS.split(), *shlex.split(os.environ.get("NVCCFLAGS", ""))]
        return (str(self.nvcc), "-ccbin", self.host, *flags, *gencode)

    def link_command(self) -> list[str]:
        # nvcc knows where its static runtime lies. No kernel is linked with another: no -rdc.
        return [str(self.nvcc), "-ccbin", self.host, "-shared", "-cudart", "static", "-nodlink"]

    @property
    def arch_names(self) -> str:
        return ";".join(arch.cc + ("+PTX" if arch.ptx else "") for arch in self.archs)


def host_compiler(cxx: str) -> str:
    """The program that CXX names: nvcc takes neither options nor a compiler cache there."""
    words = [Path(word) for word in shlex.split(cxx) if not word.startswith("-")]
    real = [word for word in words if word.name not in ("ccache", "sccache", "distcc")]
    return str(real[0]) if real else cxx


def toolkit(nvcc: Path, cxx: str) -> Toolkit:
    archs = parse_archs(os.environ.get("PBS_CUDA_ARCHS") or DEFAULT_ARCHS)
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    match = re.search(r"\bV(\d+(?:\.\d+)+)", done.stdout)
    if done.returncode or not match:
        raise BuildError(f"{nvcc} --version says nothing of a version: {done.stdout}{done.stderr}")
    host = host_compiler(cxx)
    return Toolkit(nvcc, match[1], archs, host, f"nvcc {match[1]}, {compiler_id(host)}")


if __name__ == "__main__":
    found, reason = choose_nvcc()
    print(found or reason)
    raise SystemExit(found is None)
