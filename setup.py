# SPDX-License-Identifier: Apache-2.0
"""Build pbs_attn/_C.abi3.so: the C core with the C compiler, the torch binding with the C++ one.
Where nvcc is found, pbs_attn/_C_cuda.abi3.so too: the same core, the kernels of csrc/cuda.

Needs compilers, Python.h and torch's headers; no torch import, no network, no GPU. Environment:
CC, CXX, CFLAGS, CXXFLAGS, LDFLAGS  as usual; NVCCFLAGS for nvcc
MAX_JOBS            compilers at once (default: usable cores)
PBS_TORCH_INCLUDE   include folder of any torch >= 2.10 (default: the one of this environment)
PBS_BUILD_CUDA      auto (default): with nvcc if there is one; 0 = never; 1 = no nvcc is an error
PBS_CUDA_HOME       the toolkit; else CUDA_HOME, CUDA_PATH, nvcc on PATH, /usr/local/cuda
PBS_CUDA_ARCHS      targets (default 80;90;80+PTX); 80 alone is quick, for developers
PBS_BUILD_VARIANTS  1: also build/variants/_C_cuda.abi3.so, with what benchmarks.variants compares
"""

import os
import platform
import shlex
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

import cuda  # noqa: E402
import torch_headers  # noqa: E402
from compiling import BuildError, Job, compile_all, compiler_id, max_jobs, run  # noqa: E402

PYTHON_FLOOR = "0x030a0000"  # limited API of 3.10
TORCH_FLOOR = "0x020a000000000000"  # stable ABI of 2.10
EXPORTS = "build_tools/exports.map"
OBJECTS = Path("build/objects")  # not build_temp: editable builds throw that away
CUDA_LIBRARY = "pbs_attn._C_cuda"
VARIANTS = Path("build/variants")  # a second CUDA library, not for users
NVCC, NO_CUDA = cuda.choose_nvcc()

C_FLAGS = (
    "-std=c11 -O3 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra -Icsrc/include -Icsrc"
)
CXX_FLAGS = (
    "-std=c++17 -O2 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wextra "
    "-Wno-missing-field-initializers "  # PBS_INIT: the fields left out are zero
    f"-DTORCH_TARGET_VERSION={TORCH_FLOOR} -DUSE_CUDA -Icsrc/include"
)
# -Bsymbolic-functions: both libraries hold the core, each calls its own.
LINK_FLAGS = (
    f"--exclude-libs=ALL -Bsymbolic-functions -z relro --version-script={EXPORTS} -s".split()
)
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl"
# First match by file name wins. Emulated vector units (emu_*) are plain C for tests: -O3 takes gcc
# a minute each and gains nothing, -O1 runs up to ten times slower.
ISA_FLAGS = {
    "emu_": "-O2",
    "isa_amx": f"{AVX512} -mavx512bf16",
    "avx512bf16": f"{AVX512} -mavx512bf16",
    "avx512": AVX512,
    "avx2": "-mavx2 -mfma -mf16c",
}


def isa_flags(name: str) -> str:
    return next((flags for part, flags in ISA_FLAGS.items() if part in name), "")


def core_sources() -> list[str]:
    """csrc/core and csrc/cpu, slow to compile first; other machines leave the x86 kernels out."""
    os.chdir(ROOT)
    files = [*Path("csrc/core").glob("*.c"), *Path("csrc/cpu").glob("*.c")]
    if platform.machine() not in ("x86_64", "AMD64"):
        files = [f for f in files if "-m" not in isa_flags(f.name)]
    return [str(f) for f in sorted(files, key=lambda f: ("isa_emu_" not in f.name, f))]


def extensions() -> list[Extension]:
    binding = ["csrc/python/module.c", "csrc/python/sizes.c", "csrc/torch/ops.cpp"]
    core = core_sources()
    found = [Extension("pbs_attn._C", sources=[*core, *binding], py_limited_api=True)]
    if NVCC:
        shared = [name for name in core if name.startswith("csrc/core/")]
        files = [*cuda.sources(ROOT), *shared, *binding]
        found.append(Extension(CUDA_LIBRARY, sources=files, py_limited_api=True))
    return found


def c_string(name: str, value: str) -> str:
    text = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'-D{name}="{text}"'


class BuildPBS(build_ext):
    def run(self):
        # An older build in another mode must not leave a library behind for the wheel to pack, nor
        # in the checkout.
        ours = {Path(self.get_ext_filename(ext.name)).name for ext in self.extensions}
        folders = [Path(self.build_lib) / "pbs_attn", *([ROOT / "pbs_attn"] * self.inplace)]
        for old in (file for folder in folders for file in folder.glob("_C*.so")):
            if old.name not in ours:
                old.unlink()
        super().run()

    def build_extension(self, ext):
        os.chdir(ROOT)
        try:
            self._build(ext)
        except BuildError as error:
            raise CompileError(str(error)) from error

    def _build(self, ext):
        if not sys.platform.startswith("linux"):
            raise BuildError(f"platform {sys.platform!r}: only Linux is supported")
        target = Path(self.get_ext_fullpath(ext.name))
        build = Library(ext.name, torch_headers.require())
        print(f"pbs_attn: {target.name} with {build.tools}", flush=True)
        if not NVCC:
            print(f"pbs_attn: no CUDA library: {NO_CUDA}", flush=True)
        jobs = [build.job(Path(name)) for name in ext.sources]
        compile_all(jobs)
        build.link([str(job.object) for job in jobs], target)
        if build.toolkit and os.environ.get("PBS_BUILD_VARIANTS") == "1":
            jobs = [build.variants(job) for job in jobs]
            compile_all(jobs)
            build.link([str(job.object) for job in jobs], VARIANTS / target.name)


class Library:
    """How the files of one library are compiled and linked. Objects of csrc/core serve both."""

    def __init__(self, name: str, torch_include: Path):
        self.cc = os.environ.get("CC", "cc")
        self.cxx = os.environ.get("CXX", "c++")
        self.cc_id, self.cxx_id = compiler_id(self.cc), compiler_id(self.cxx)
        self.torch_include = torch_include
        torch = torch_headers.version(torch_include)
        self.toolkit = cuda.toolkit(NVCC, self.cxx) if name == CUDA_LIBRARY else None
        self.tools = f"{self.cc}, {self.cxx}, headers of torch {torch}"
        self.binding_flags = [c_string("PBS_BUILD_TORCH", torch)]
        self.needed = ["torch_cpu"]
        if self.toolkit:
            self.tools += f", nvcc {self.toolkit.version} for {self.toolkit.arch_names}"
            self.binding_flags += [
                "-DPBS_CUDA_LIBRARY",
                c_string("PBS_BUILD_ARCHS", self.toolkit.arch_names),
                c_string("PBS_BUILD_NVCC", self.toolkit.version),
            ]
            self.needed.append("torch_cuda")
        else:
            self.binding_flags.append(c_string("PBS_BUILD_NO_CUDA", NO_CUDA))

    def job(self, source: Path) -> Job:
        make = {".c": self._c_job, ".cpp": self._cxx_job, ".cu": self._nvcc_job}
        return make[source.suffix](source)

    def _object(self, source: Path) -> Path:
        folder = source.parent.relative_to("csrc")
        if self.toolkit and source.parent.name in ("python", "torch"):
            folder = Path("cuda") / folder
        suffix = ".cu.o" if source.suffix == ".cu" else ".o"
        return OBJECTS / folder / (source.stem + suffix)

    def _c_job(self, source):
        cflags = shlex.split(os.environ.get("CFLAGS", ""))
        command = [*shlex.split(self.cc), *C_FLAGS.split(), *isa_flags(source.name).split()]
        if source.parent.name == "python":
            command.append(f"-DPy_LIMITED_API={PYTHON_FLOOR}")
            command += ["-isystem" + sysconfig.get_path(p) for p in ("include", "platinclude")]
            command += self.binding_flags
        if source.name == "status.c":  # pbs_build_info()
            command.append(c_string("PBS_BUILD_FLAGS", shlex.join([*C_FLAGS.split(), *cflags])))
        return Job(source, self._object(source), (*command, *cflags), self.cc_id)

    def _cxx_job(self, source):
        command = [*shlex.split(self.cxx), *CXX_FLAGS.split(), "-isystem", str(self.torch_include)]
        command += ["-DPBS_CUDA_LIBRARY"] if self.toolkit else []
        command += shlex.split(os.environ.get("CXXFLAGS", ""))
        return Job(source, self._object(source), tuple(command), self.cxx_id)

    def _nvcc_job(self, source):
        command, obj = self.toolkit.compile_command(source), self._object(source)
        threads = min(max_jobs(), len(self.toolkit.archs))
        speed, log = ("--threads", str(threads)), obj.with_suffix(".log")
        return Job(source, obj, command, self.toolkit.identity, speed, log)

    def variants(self, job: Job) -> Job:
        """The same object, but for the one file that has variants."""
        if job.source.name != cuda.VARIANTS_FILE:
            return job
        command = (*job.command, cuda.VARIANTS_FLAG)
        obj = VARIANTS / job.object.name
        return replace(job, command=command, object=obj, log=obj.with_suffix(".log"))

    def link(self, objects: list[str], target: Path) -> None:
        stubs = OBJECTS / "stubs"
        fresh = target.with_name(target.name + ".new")  # a running process keeps the old file
        link = [*self._linker(), "-o", str(fresh), *objects]
        for flag in ["-L" + str(stubs), "--no-as-needed", *("-l" + n for n in self.needed),
                     "--as-needed", *LINK_FLAGS]:  # fmt: skip
            link += ["-Xlinker", flag]
        for flag in shlex.split(os.environ.get("LDFLAGS", "")):
            link += ["-Xcompiler", flag] if self.toolkit else [flag]
        record = (VARIANTS if target.parent == VARIANTS else OBJECTS) / f"{target.name}.link"
        if target.is_file() and record.is_file() and record.read_text() == shlex.join(link):
            built = target.stat().st_mtime_ns
            if all(os.stat(p).st_mtime_ns < built for p in (*objects, EXPORTS)):
                print(f"  {target.name} is up to date", flush=True)
                return
        for name in self.needed:
            self._make_stub(stubs / f"lib{name}.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        run(link, f"linking {target.name}")
        fresh.replace(target)
        record.write_text(shlex.join(link))
        print(f"  linked {target.name}, {target.stat().st_size / 1024:.0f} KiB", flush=True)

    def _linker(self) -> list[str]:
        return self.toolkit.link_command() if self.toolkit else [*shlex.split(self.cxx), "-shared"]

    def _make_stub(self, path: Path) -> None:
        # An empty library of that name is enough: it only puts the name into DT_NEEDED, and torch
        # has the true one loaded by then. tools/check_symbols.py catches misspelt names.
        path.parent.mkdir(parents=True, exist_ok=True)
        stub = [*shlex.split(self.cc), "-shared", "-nostdlib", f"-Wl,-soname,{path.name}"]
        run([*stub, "-o", str(path), "-x", "c", "/dev/null"], "making a link stub")


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildPBS},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
