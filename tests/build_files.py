# SPDX-License-Identifier: Apache-2.0
"""The programs that build and check the libraries, for the tests of the build."""

import importlib.util
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA_LIBRARY = ROOT / "pbs_attn" / "_C_cuda.abi3.so"


def load_file(path):
    """A module that is no part of the package."""
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


def copy_package(folder):
    """pbs_attn without its library."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    return Path(shutil.copytree(ROOT / "pbs_attn", folder / "pbs_attn", ignore=ignore))


symbols = load_file(ROOT / "tools" / "check_symbols.py")
torch_headers = load_file(ROOT / "build_tools" / "torch_headers.py")
compiling = load_file(ROOT / "build_tools" / "compiling.py")
cuda = load_file(ROOT / "build_tools" / "cuda.py")
resources = load_file(ROOT / "tools" / "kernel_resources.py")
