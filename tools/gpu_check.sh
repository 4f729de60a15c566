#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs an NVIDIA GPU, in one command: `tools/gpu_check.sh --help`.
#
# Takes $PYTHON, or the first of .venv, python3 and python whose torch is built with CUDA. It makes no
# environment and installs nothing.
root=$(cd "$(dirname "$0")/.." && pwd)
with_cuda='
import importlib.util, os, runpy, sys
spec = importlib.util.find_spec("torch")
path = os.path.join(spec.submodule_search_locations[0], "version.py") if spec else sys.exit(1)
sys.exit(not runpy.run_path(path)["cuda"])'

[ -z "$PYTHON" ] || exec "$PYTHON" "$root/tools/gpu_check" "$@"
for python in "$root/.venv/bin/python" python3 python; do
    command -v "$python" >/dev/null || continue
    any=${any:-$python}
    "$python" -c "$with_cuda" 2>/dev/null && exec "$python" "$root/tools/gpu_check" "$@"
done
[ -n "$any" ] || { echo "gpu_check: no Python found; set PYTHON to one that has torch" >&2; exit 3; }
exec "$any" "$root/tools/gpu_check" "$@" # --help and --list; otherwise it says what is missing
