# SPDX-License-Identifier: Apache-2.0
"""What ptxas gave every kernel: `python tools/kernel_resources.py`, after a build with nvcc.

Reads the logs that setup.py keeps in build/objects/cuda. Fails if a kernel spills registers or has
a stack frame, or if ptxas remarks on it (C75xx: wgmma made serial). Shared memory that a launch
asks for is not in the logs: see the kernels' plans in csrc/cuda.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path("csrc/cuda")
LOGS = Path("build/objects/cuda")
ENTRY = re.compile(r"ptxas info +: Compiling entry function '(\w+)' for '(\w+)'")
STACK = re.compile(r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"ptxas info +: Used (\d+) registers(.*)")
SHARED = re.compile(r"(\d+)(?:\+\d+)? bytes smem")
BARRIERS = re.compile(r"used (\d+) barriers")
REMARK = re.compile(r"ptxas .*\(C\d+\).*|ptxas warning.*")


class LogError(Exception):
    pass


@dataclass
class Kernel:
    """One kernel for one target. Sizes in bytes; shared is what the kernel declares itself."""

    name: str
    arch: str
    registers: int
    shared: int
    barriers: int
    stack: int
    spill_stores: int
    spill_loads: int


def parse(text):
    """(kernels, remarks) of one log; names are as the linker sees them. What a kernel's own
    functions need counts as the kernel's, if they are not inlined."""
    kernels, remarks, entry, memory = [], [], None, []
    for line in text.splitlines():
        if match := ENTRY.match(line):
            if entry:
                raise LogError(f"nothing is said about {entry[0]}")
            entry, memory = match.groups(), []
        elif match := STACK.match(line):
            memory.append([int(x) for x in match.groups()])
        elif match := USED.match(line):
            if not entry or not memory:
                raise LogError(f"whose is this? {line}")
            shared, barriers = (pattern.search(match[2]) for pattern in (SHARED, BARRIERS))
            numbers = [int(match[1]), *(int(m[1]) if m else 0 for m in (shared, barriers))]
            kernels.append(Kernel(*entry, *numbers, *map(sum, zip(*memory, strict=True))))
            entry = None
        elif match := REMARK.match(line):
            remarks.append(line.strip())
    if entry:
        raise LogError(f"nothing is said about {entry[0]}")
    return kernels, remarks


def demangle(names):
    """Each as people write it, without namespaces and argument types."""
    done = subprocess.run(
        ["c++filt", "--no-params"], input="\n".join(names), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"c++filt: {done.stderr.strip()}")
    return [shorten(name) for name in done.stdout.splitlines()]


def shorten(name):
    """'void pbs::attend<pbs::bf16, pbs::(anonymous namespace)::shape<64> >' -> 'attend<...>'."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\b_GLOBAL__N__\w+::", "", name)
    return re.sub(r"\bpbs::", "", name).replace(" >", ">")


def read(sources, logs):
    """All kernels of all sources, in the order of the table, and all remarks with their file."""
    kernels, remarks = [], []
    for source in sorted(sources.glob("*.cu")):
        log = logs / f"{source.name}.log"
        if not log.is_file():
            raise SystemExit(f"{log} is missing: build the CUDA library first (make cuda)")
        try:
            found, said = parse(log.read_text())
        except LogError as error:
            raise SystemExit(f"{log}: {error}") from error
        kernels += found
        remarks += [f"{source}: {line}" for line in said]
    for kernel, name in zip(kernels, demangle([k.name for k in kernels]), strict=True):
        kernel.name = name
    return sorted(kernels, key=lambda k: (k.name, k.arch)), remarks


def problems(kernels, remarks):
    """One line for everything that CI refuses."""
    found = []
    for k in kernels:
        if k.spill_stores or k.spill_loads:
            found.append(f"{k.name} for {k.arch}: {k.spill_stores + k.spill_loads} bytes of spills")
        elif k.stack:
            found.append(f"{k.name} for {k.arch}: a stack frame of {k.stack} bytes")
    return found + remarks


def table(kernels):
    """Markdown; one row a kernel, a column of registers per target."""
    archs = sorted({k.arch for k in kernels})
    rows = {}
    for k in kernels:
        rows.setdefault(k.name, {})[k.arch] = k
    yield (
        "| kernel | "
        + " | ".join(f"registers {arch}" for arch in archs)
        + (" | static shared, B | barriers | stack, B | spills, B |")
    )
    yield "| --- |" + " ---: |" * (len(archs) + 4)
    for name, by_arch in rows.items():
        there = by_arch.values()
        cells = [str(by_arch[arch].registers) if arch in by_arch else "-" for arch in archs]
        cells += [
            str(max(getattr(k, field) for k in there)) for field in ("shared", "barriers", "stack")
        ]
        cells.append(str(max(k.spill_stores + k.spill_loads for k in there)))
        yield f"| `{name}` | " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of the logs; %(default)s")
    parser.add_argument("--markdown", action="store_true", help="the table alone, for docs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    args = parser.parse_args()
    kernels, remarks = read(SOURCES, args.logs)
    found = problems(kernels, remarks)
    if args.json:
        content = {"kernels": [dataclasses.asdict(k) for k in kernels], "remarks": remarks}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(table(kernels)))
    if not args.markdown and not found:
        archs = ", ".join(sorted({k.arch for k in kernels}))
        print(f"\n{len(kernels)} kernels, for {archs}: no spills, no stack, no remarks")
    for line in found:
        print(f"REFUSED: {line}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
