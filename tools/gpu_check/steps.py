# SPDX-License-Identifier: Apache-2.0
"""Which steps there are on this machine, and what their output means."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .runner import FAILED, PASSED, RECORDED, Step, by_exit

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TESTS = ["tests", "tests-gpu", "tests-large", "tests-models"]
REQUIRED = ["build", "ptx", "doctor", *TESTS, "model"]
SANITIZERS = ("memcheck", "racecheck", "synccheck")
VARIANTS = "build/variants/_C_cuda.abi3.so"
FINDINGS = 86  # exit status of compute-sanitizer where it found something


@dataclass
class Machine:
    """What the steps are made of. `results`: None = benchmarks/results/<gpu>."""

    capability: str  # "9.0"
    python: str = sys.executable
    jobs: int = 1
    nvcc: str | None = None
    no_nvcc: str = ""
    sanitizer: str | None = None
    make: str | None = None
    modules: frozenset = frozenset()  # of those that tests and model want, what is installed
    prebuilt: bool = False
    model: str | None = None
    results: Path | None = None


def this_machine(capability: str, cpus: int, prebuilt: bool, model, results) -> Machine:
    sys.path.insert(0, str(ROOT / "build_tools"))
    import cuda  # build_tools/cuda.py

    nvcc, where = cuda.find_nvcc()
    wanted = ("pytest", "hypothesis", "xdist", "transformers", "setuptools")
    return Machine(
        capability=capability,
        jobs=int(os.environ.get("MAX_JOBS", cpus)),
        nvcc=str(nvcc) if nvcc else None,
        no_nvcc="" if nvcc else where,
        sanitizer=_sanitizer(nvcc),
        make=shutil.which("make"),
        modules=frozenset(name for name in wanted if importlib.util.find_spec(name)),
        prebuilt=prebuilt or nvcc is None,
        model=model,
        results=results,
    )


def _sanitizer(nvcc) -> str | None:
    beside = [str(Path(nvcc).parent)] if nvcc else []
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join([*beside, "/usr/local/cuda/bin"])
    )


def target(machine: Machine) -> str:
    """PBS_CUDA_ARCHS for this GPU alone; PTX of 8.0 where this nvcc does not know it."""
    given = os.environ.get("PBS_CUDA_ARCHS")
    if given:
        return given
    number = machine.capability.replace(".", "")
    command = [machine.nvcc or "nvcc", "--list-gpu-code"]
    try:
        known = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return number
    if known.returncode or f"sm_{number}" in known.stdout.split():
        return number
    return "80+PTX"


def all_steps(m: Machine) -> list[Step]:
    """In the order in which they run: what says most in little time first. The sanitizers look for
    what the emulation looks for too; they get what is left."""
    first = [build(m), ptx(m), doctor(m), kernels(m)]
    cases, on_gpu, large, models = tests(m)
    bench, kernels_of_9, peak, break_even = benchmarks(m)
    rest = [large, models, kernels_of_9, ttft(m), peak, break_even, *sanitizers(m)]
    return [*first, cases, on_gpu, bench, model(m), *rest]


# ---- build, test_ptx, doctor ---------------------------------------------------------------------


def build(m: Machine) -> Step:
    if m.prebuilt:
        # What is there must load and have code for this GPU; doctor says the rest.
        code = "import pbs_attn; print(pbs_attn.build_info()['libraries']['cuda'])"
        what = "the libraries as they are" + (f" ({m.no_nvcc})" if m.no_nvcc else "")
        return Step("build", what, [m.python, "-c", code], 60, required=True, judge=_loaded)
    command = [m.python, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {
        "PBS_BUILD_CUDA": "1",
        "PBS_CUDA_ARCHS": target(m),
        "MAX_JOBS": str(m.jobs),
    }
    missing = None if "setuptools" in m.modules else f"{m.python} has no setuptools; --prebuilt"
    if m.capability == "9.0":
        environment["PBS_BUILD_VARIANTS"] = "1"
    what = f"both libraries, with {m.nvcc}"
    return Step("build", what, command, 240, 20, True, environment=environment, missing=missing)


def _loaded(status, output):
    if status == 0 and "'file': None" in output:
        return FAILED, output.strip().splitlines()[-1]
    return by_exit(status, output)


def ptx(m: Machine) -> Step:
    """The emulation says what a GPU should answer; its file is made by the same make rule."""
    program, expected = "build/ptx/test_ptx", "build/ptx_expected.bin"
    step = Step("ptx", "every PTX function against the emulation", [], 120, 10, True)
    step.judge = _ptx_judge
    there = all((ROOT / name).is_file() for name in (program, expected))
    if (m.prebuilt and there) or not (m.nvcc and m.make):
        step.command = [program, expected]
        if not there:
            why = m.no_nvcc or "no make"
            step.missing = f"no {program} and {expected}, and {why} to build them"
    else:
        step.command = [m.make, "-s", f"-j{m.jobs}", "ptx-gpu", f"NVCC={m.nvcc}"]
    return step


def _ptx_judge(status, output):
    outcome = by_exit(status, output)
    found = re.search(r"(\d+) passed, (\d+) failed.*", output)
    if not found or status not in (0, 1, 2):
        return (FAILED, "no result was printed") if status == 0 else outcome
    fine = status == 0 and int(found[1]) and not int(found[2])
    return PASSED if fine else FAILED, found[0]


def doctor(m: Machine) -> Step:
    what = "self test of the kernels through the library"
    command = [m.python, "-m", "pbs_attn", "doctor"]
    return Step("doctor", what, command, 60, 10, True, judge=_doctor_judge)


def _doctor_judge(status, output):
    if status == 0 and not re.search(r"GPU 0 .*: kernels run", output):
        reasons = re.findall(r"GPU 0 .*|library +cuda: .*", output)
        return FAILED, "no kernels for this GPU: " + "; ".join(reasons)
    outcome, why = by_exit(status, output)
    tests = re.findall(r"self test +(.*)", output)
    return outcome, "; ".join(tests) if outcome == PASSED else why


# ---- tests, sanitizers, model --------------------------------------------------------------------


def kernels(m: Machine) -> Step:
    command = [m.python, str(HERE.relative_to(ROOT) / "kernels.py"), "--device", "cuda"]
    return Step("kernels", "every verb once beside the CPU's", command, 60, 10, blocks=True)


def tests(m: Machine) -> list[Step]:
    """The cases of the emulation in parallel; the others alone on the GPU, for its memory."""
    pytest = [m.python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    # A kernel that hangs takes its process along: the log says before that where it was.
    pytest += ["-o", "faulthandler_timeout=45"]
    parallel = ["-n", str(min(m.jobs, 8))] if "xdist" in m.modules and m.jobs > 1 else []
    parts = {"tests": [], "tests-gpu": [], "tests-large": [], "tests-models": []}
    parts["tests"] = sorted((ROOT / "tests").glob("test_emu_*.py"))
    for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        part = "tests-" + file.stem.removeprefix("test_gpu_")
        parts[part if part in parts else "tests-gpu"].append(file)
    missing = None
    if "pytest" not in m.modules:
        missing = f"{m.python} has no pytest; the steps doctor and kernels are what ran instead"
    more = {"required": True, "judge": _pytest_judge, "missing": missing}

    def step(name: str, what: str, limit: float, least: float, *words: str) -> Step:
        files = [str(file.relative_to(ROOT)) for file in parts[name]]
        return Step(name, what, [*pytest, *words, *files], limit, least, **more)

    return [
        step("tests", "the emulation's tests on the GPU", 150, 20, "--maxfail=20", *parallel),
        step("tests-gpu", "streams, graphs, memory, routes", 90, 15),
        step("tests-large", "16k to 1M tokens, far strides", 120, 20, "--durations=5"),
        step("tests-models", "small models, and one of 1B", 90, 20, "-s"),
    ]


def _pytest_judge(status, output):
    found = re.findall(
        r"^=*\s*(.*\d+ (?:passed|failed|error|skipped|deselected).*?)=*$", output, re.M
    )
    summary = found[-1].strip() if found else ""
    if status == 0 and "passed" not in summary:
        return FAILED, f"no GPU test ran: {summary or 'no summary'}"
    if status == 5:
        return FAILED, "no GPU test was found"
    if status in (0, 1, 2) and summary:
        return PASSED if status == 0 else FAILED, summary
    return by_exit(status, output)


# Where the tool says one of these it does not work here: no word about our kernels.
UNUSABLE = re.compile(
    r"^=========.*(?:not supported|Failed to initialize|Unable to|Internal Sanitizer Error|"
    r"insufficient permission|terminated before first instrumented).*",
    re.IGNORECASE | re.MULTILINE,
)


def sanitizers(m: Machine) -> list[Step]:
    program = [m.python, str(HERE.relative_to(ROOT) / "kernels.py"), "--device", "cuda", "--few"]
    steps = []
    for tool in SANITIZERS:
        command = [m.sanitizer or "compute-sanitizer", "--tool", tool, "--print-limit", "20"]
        command += ["--error-exitcode", str(FINDINGS)]
        # A cudaMalloc for each tensor: behind the allocator's cache nothing is out of bounds.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if tool == "memcheck":
            command += ["--report-api-errors", "no"]  # torch asks for attributes that may be absent
        missing = None if m.sanitizer else "there is no compute-sanitizer on PATH"
        step = Step(tool, f"compute-sanitizer {tool}", [*command, *program], 90, 10)
        step.blocks, step.environment, step.missing = True, environment, missing
        step.judge = _sanitizer_judge
        steps.append(step)
    return steps


def _sanitizer_judge(status, output):
    lines = re.findall(r"=========\s(.*SUMMARY.*)", output)
    summary = lines[-1].strip() if lines else ""
    unusable = UNUSABLE.search(output)
    if unusable:
        return RECORDED, f"unusable here: {unusable[0].strip()[:300]}"
    if status == FINDINGS:
        return FAILED, summary or "it found something"
    if status == 0 and re.search(r"SUMMARY: 0 (errors|hazards)", summary):
        return PASSED, summary
    if status == 0:
        return RECORDED, f"no summary with 0 errors: {summary or 'none at all'}"
    return RECORDED, by_exit(status, output)[1]


def model(m: Machine) -> Step:
    command = [m.python, str(HERE.relative_to(ROOT) / "model.py"), "--device", "cuda"]
    command += ["--model", m.model] if m.model else []
    what = f"{m.model or 'a Llama of 1B random weights'}, sparse beside dense"
    missing = None if "transformers" in m.modules else f"{m.python} has no transformers"
    return Step("model", what, command, 120, 30, True, judge=_model_judge, missing=missing)


def _model_judge(status, output):
    outcome, why = by_exit(status, output)
    lines = [line for line in output.splitlines() if line.startswith(("tau ", "problem: "))]
    return outcome, "; ".join(lines) if lines else why


def ttft(m: Machine) -> Step:
    """16 GB of weights, 17 GB of cache at 128k, activations beside them."""
    command = [m.python, str(HERE.relative_to(ROOT) / "ttft.py"), "--device", "cuda", "--json"]
    command += [str(m.results / "ttft-8b.json") if m.results else "results"]
    missing = None if "transformers" in m.modules else f"{m.python} has no transformers"
    what = "first token of a Llama of 8B random weights, 32k and 128k"
    return Step("ttft", what, command, 180, 60, judge=_ttft_judge, missing=missing)


def _ttft_judge(status, output):
    outcome, why = by_exit(status, output)
    lines = re.findall(r"^(?:\d+ tokens: |problem: ).*", output, re.M)
    return outcome, "; ".join([why, *lines] if why else lines)


# ---- benchmarks ----------------------------------------------------------------------------------


def benchmarks(m: Machine) -> list[Step]:
    """`prefill` has the rows of score, permute, select and attend, too."""
    found = []
    quick = ["--device", "cuda", "--quick"]
    peak = ["--method", "peak"]
    of_all = "attend at every head_dim, and its variants for 9.0"
    if m.prebuilt and not (ROOT / VARIANTS).is_file():
        of_all += f" (no {VARIANTS}: without them)"
    # Gains of 1% want more rounds than --quick has.
    rounds = ["--device", "cuda", "--seconds", "90", "--warmup-ms", "10", "--probe-ms", "5"]
    for name, module, file, what, more, limit in (
        ("bench", "prefill", "prefill-d128-quick", "every verb at 8k, 32k, 128k beside dense",
         quick, 150),
        ("variants", "variants", "variants", of_all, rounds, 180),
        ("bench-peak", "prefill", "prefill-d128-peak-quick", "the same of the method peak",
         [*quick, *peak], 120),
        ("break-even", "prefill", "break-even-d128-quick", "from which length on sparse is faster",
         [*quick, "--break-even"], 90),
    ):  # fmt: skip
        command = [m.python, "-m", f"benchmarks.{module}", *more]
        kept = str(m.results / f"{file}.json") if m.results else "results"
        environment = {"NVCC": m.nvcc} if m.nvcc else {}
        step = Step(name, what, [*command, "--json", kept], limit, 30, environment=environment)
        step.judge = _bench_judge(name)
        found.append(step)
    return found


def _bench_judge(name: str) -> Callable:
    wanted = r"saved .*|D=\d+: best .*|.*Lengths\(.*|no length tried.*|.*not met.*"

    def judge(status, output):
        outcome, why = by_exit(status, output)
        lines = [line.strip() for line in re.findall(wanted, output)]
        if name == "variants" and status == 0 and not any("best" in line for line in lines):
            outcome, why = FAILED, "no head_dim was measured"
        return outcome, "; ".join([why, *lines] if why else lines)

    return judge
