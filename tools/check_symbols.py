# SPDX-License-Identifier: Apache-2.0
"""Prove what a built library needs and offers: `python tools/check_symbols.py pbs_attn/_C.abi3.so`.

Imports may come from LibTorch (only what torch 2.10 offers), from CPython (only the limited API of
3.10) and from the C and C++ runtime (versioned names). Exports are PyInit__C and pbs_*. A library
that passes runs on any torch >= 2.10 and any CPython >= 3.10. Symbol lists: tools/symbols/.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

SYMBOLS = Path(__file__).parent / "symbols"
# Weak hooks that the linker's start files name in every library.
START_FILES = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
NEEDED = re.compile(
    r"(libtorch_cpu|libstdc\+\+|libc\+\+|libm|libgcc_s|libc|libpthread|ld-linux.*)\.so"
)


def read_list(name):
    lines = (SYMBOLS / name).read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def run(*argv):
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def dynamic_symbols(library, which):
    lines = run("nm", "--dynamic", which, str(library)).splitlines()
    return {line.split()[-1] for line in lines if line.strip()}


def check_imports(names, torch_names, python_names):
    """One line for every imported name that is not allowed."""
    errors = []
    for name in sorted(names):
        if re.match(r"(aoti_)?torch_", name):
            if name not in torch_names:
                errors.append(f"imports {name}, which torch 2.10 does not offer")
        elif re.match(r"_?Py", name):
            if name not in python_names:
                errors.append(f"imports {name}, which is not in the limited API of CPython 3.10")
        elif "@" not in name and name not in START_FILES:
            errors.append(f"imports {name}, which no library is known to offer")
    return errors


def check_library(library):
    imports = dynamic_symbols(library, "--undefined-only")
    exports = {name.partition("@")[0] for name in dynamic_symbols(library, "--defined-only")}
    errors = check_imports(imports, read_list("torch_2_10.txt"), read_list("python_3_10.txt"))
    errors += [
        f"exports {name}; only PyInit__C and pbs_* may be seen"
        for name in sorted(exports)
        if name != "PyInit__C" and not name.startswith("pbs_")
    ]
    if "PyInit__C" not in exports:
        errors.append("does not export PyInit__C")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "--dynamic", "-W", str(library)))
    if not any(name.startswith("libtorch_cpu.so") for name in needed):
        errors.append("does not need libtorch_cpu.so: it would not find LibTorch")
    errors += [f"needs {name}" for name in needed if not NEEDED.match(name)]
    return errors, len(imports), len(exports)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("library", type=Path, nargs="+")
    failed = False
    for library in parser.parse_args().library:
        errors, imports, exports = check_library(library)
        for error in errors:
            print(f"{library}: {error}")
        failed |= bool(errors)
        if not errors:
            print(f"{library}: ok ({imports} imports, {exports} exports)")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
