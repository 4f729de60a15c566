# SPDX-License-Identifier: Apache-2.0
"""Build pbs_attn/_C.abi3.so: the C core with the C compiler, the torch binding with the C++ one.

Needs compilers, Python.h and torch's headers; no torch import, no network, no GPU. Environment:
CC, CXX, CFLAGS, CXXFLAGS, LDFLAGS  as usual
MAX_JOBS            compilers at once (default: usable cores)
PBS_TORCH_INCLUDE   include folder of any torch >= 2.10 (default: the one of this environment)
PBS_BUILD_CUDA      auto (default), 0 = never, 1 = failing to build the CUDA library is an error
"""

import os
import platform
import shlex
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

import cuda  # noqa: E402
import torch_headers  # noqa: E402
from compiling import BuildError, Job, compile_all, compiler_id, run  # noqa: E402

PYTHON_FLOOR = "0x030a0000"  # limited API of 3.10
TORCH_FLOOR = "0x020a000000000000"  # stable ABI of 2.10
EXPORTS = "build_tools/exports.map"
OBJECTS = Path("build/objects")  # not build_temp: editable builds throw that away

C_FLAGS = (
    "-std=c11 -O3 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra -Icsrc/include -Icsrc"
)
CXX_FLAGS = (
    "-std=c++17 -O2 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wextra "
    "-Wno-missing-field-initializers "  # PBS_INIT: the fields left out are zero
    f"-DTORCH_TARGET_VERSION={TORCH_FLOOR} -DUSE_CUDA -Icsrc/include"
)
LINK_FLAGS = (
    "-shared -Wl,--no-as-needed -ltorch_cpu -Wl,--as-needed -Wl,--exclude-libs=ALL -Wl,-z,relro "
    f"-Wl,--version-script={EXPORTS} -s"
)
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl"
# First match by file name wins. Emulated vector units (emu_*) are plain C for tests: -O3 takes gcc
# a minute each and gains nothing, -O1 runs up to ten times slower.
ISA_FLAGS = {
    "emu_": "-O2",
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


def c_string(name: str, value: str) -> str:
    text = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'-D{name}="{text}"'


class BuildPBS(build_ext):
    def run(self):
        # An older build in another mode must not leave a library behind for the wheel to pack.
        ours = {Path(self.get_ext_fullpath(ext.name)).name for ext in self.extensions}
        for old in (Path(self.build_lib) / "pbs_attn").glob("_C*.so"):
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
        torch_include = torch_headers.require()
        target = Path(self.get_ext_fullpath(ext.name))
        cc = os.environ.get("CC", "cc")
        cxx = os.environ.get("CXX", "c++")
        no_cuda = cuda.reason_for_cpu_only(ROOT)
        torch_version = torch_headers.version(torch_include)
        print(f"pbs_attn: {target.name} with {cc}, {cxx}, headers of torch {torch_version}")
        print(f"pbs_attn: no CUDA library: {no_cuda}", flush=True)

        jobs = self._jobs(ext, cc, cxx, torch_include, no_cuda)
        compile_all(jobs)
        self._link(cc, cxx, [str(job.object) for job in jobs], target)

    def _jobs(self, ext, cc, cxx, torch_include, no_cuda):
        cc_id, cxx_id = compiler_id(cc), compiler_id(cxx)
        cflags = shlex.split(os.environ.get("CFLAGS", ""))
        cxxflags = shlex.split(os.environ.get("CXXFLAGS", ""))
        module_flags = [
            f"-DPy_LIMITED_API={PYTHON_FLOOR}",
            *("-isystem" + sysconfig.get_path(p) for p in ("include", "platinclude")),
            c_string("PBS_BUILD_NO_CUDA", no_cuda),
            c_string("PBS_BUILD_TORCH", torch_headers.version(torch_include)),
        ]
        jobs = []
        for name in ext.sources:
            source = Path(name)
            obj = OBJECTS / source.relative_to("csrc").with_suffix(".o")
            if source.suffix == ".cpp":
                command = [*shlex.split(cxx), *CXX_FLAGS.split(), "-isystem", str(torch_include)]
                jobs.append(Job(source, obj, (*command, *cxxflags), cxx_id))
                continue
            command = [*shlex.split(cc), *C_FLAGS.split(), *isa_flags(source.name).split()]
            if source.parent.name == "python":
                command += module_flags
            if source.name == "status.c":  # pbs_build_info()
                command.append(c_string("PBS_BUILD_FLAGS", shlex.join([*C_FLAGS.split(), *cflags])))
            jobs.append(Job(source, obj, (*command, *cflags), cc_id))
        return jobs

    def _link(self, cc, cxx, objects, target):
        # An empty library of that name is enough: it only puts libtorch_cpu.so into DT_NEEDED, and
        # torch has the true one loaded by then. tools/check_symbols.py catches misspelt names.
        stubs, soname = OBJECTS / "stubs", "libtorch_cpu.so"
        fresh = target.with_name(target.name + ".new")  # a running process keeps the old file
        link = [*shlex.split(cxx), "-o", str(fresh), *objects, f"-L{stubs}", *LINK_FLAGS.split()]
        link += shlex.split(os.environ.get("LDFLAGS", ""))
        record = OBJECTS / "link.cmd"
        if target.is_file() and record.is_file() and record.read_text() == shlex.join(link):
            built = target.stat().st_mtime_ns
            if all(os.stat(p).st_mtime_ns < built for p in (*objects, EXPORTS)):
                print(f"  {target.name} is up to date", flush=True)
                return
        stubs.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        stub = [*shlex.split(cc), "-shared", "-nostdlib", f"-Wl,-soname,{soname}"]
        run([*stub, "-o", str(stubs / soname), "-x", "c", "/dev/null"], "making the link stub")
        run(link, f"linking {target.name}")
        fresh.replace(target)
        record.write_text(shlex.join(link))
        print(f"  linked {target.name}, {target.stat().st_size / 1024:.0f} KiB", flush=True)


setup(
    ext_modules=[
        Extension(
            "pbs_attn._C",
            sources=[*core_sources(), "csrc/python/module.c", "csrc/torch/ops.cpp"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildPBS},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
