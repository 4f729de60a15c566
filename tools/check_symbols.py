# SPDX-License-Identifier: Apache-2.0
"""Prove what a built library needs and offers: `python tools/check_symbols.py pbs_attn/_C*.so`.

Imports may come from LibTorch (only what torch 2.10 offers), from CPython (only the limited API of
3.10) and from the C and C++ runtime (versioned names). Exports are PyInit__C and pbs_*. A library
that passes runs on any torch >= 2.10 and any CPython >= 3.10. Symbol lists: tools/symbols/.

The CUDA library may need libtorch_cuda.so, and one function of it. Its CUDA runtime is inside.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

SYMBOLS = Path(__file__).parent / "symbols"
# Weak hooks that the linker's start files name in every library.
START_FILES = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
SYSTEM = r"(libstdc\+\+|libc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|ld-linux.*)\.so"
CUDA_ONLY = {"aoti_torch_get_current_cuda_stream"}  # what only libtorch_cuda.so has


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


def module_name(library):
    """'_C' or '_C_cuda', from the name of the file."""
    return Path(library).name.partition(".")[0]


def check_imports(names, torch_names, python_names, module="_C"):
    """One line for every imported name that is not allowed."""
    if module != "_C_cuda":
        torch_names = torch_names - CUDA_ONLY
    errors = []
    for name in sorted(names):
        if re.match(r"(aoti_)?torch_", name):
            if name not in torch_names:
                errors.append(f"imports {name}, which torch 2.10 does not offer to {module}")
        elif re.match(r"_?Py", name):
            if name not in python_names:
                errors.append(f"imports {name}, which is not in the limited API of CPython 3.10")
        elif "@" not in name and name not in START_FILES:
            errors.append(f"imports {name}, which no library is known to offer")
    return errors


def check_exports(names, module):
    init = f"PyInit_{module}"
    errors = [
        f"exports {name}; only {init} and pbs_* may be seen"
        for name in sorted(names)
        if name != init and not name.startswith("pbs_")
    ]
    return errors + ([] if init in names else [f"does not export {init}"])


def check_needed(names, module):
    """names: the libraries of DT_NEEDED."""
    torch = ["libtorch_cpu.so", *(["libtorch_cuda.so"] if module == "_C_cuda" else [])]
    errors = [
        f"does not need {lib}: it would not find LibTorch" for lib in torch if lib not in names
    ]
    allowed = {*torch, *(name for name in names if re.match(SYSTEM, name))}
    return errors + [f"needs {name}" for name in names if name not in allowed]


def check_library(library):
    module = module_name(library)
    imports = dynamic_symbols(library, "--undefined-only")
    exports = {name.partition("@")[0] for name in dynamic_symbols(library, "--defined-only")}
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "--dynamic", "-W", str(library)))
    offered = read_list("torch_2_10.txt"), read_list("python_3_10.txt")
    errors = check_imports(imports, *offered, module)
    errors += check_exports(exports, module) + check_needed(needed, module)
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
