# SPDX-License-Identifier: Apache-2.0
"""The build's own promises: what the library needs, what the module says, what errors look like."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_files import (
    CUDA_LIBRARY,
    ROOT,
    compiling,
    copy_package,
    load_file,
    symbols,
    torch_headers,
)

from pbs_attn import _load

C = _load.load()
OPS = torch.ops.pbs_attn
WHOLE = (None, None, None, None, 0, 0)  # geometry: whole tensors
DTYPES = ("float32", "float16", "bfloat16")


# ---- pbs_attn._C ---------------------------------------------------------------------------------
def test_module_is_a_limited_api_extension():
    assert Path(C.__file__).name == "_C.abi3.so"
    assert C.__name__ == "pbs_attn._C"
    assert C.abi_version() == _load.ABI_VERSION


def test_build_info_says_what_was_built():
    info = C.build_info()
    assert info["torch_headers"].startswith("2.")
    assert "compiler" in info
    assert (info["no_cuda"] is None) == CUDA_LIBRARY.is_file()
    libraries = _load.libraries()
    assert libraries["cpu"] == {"file": C.__file__, "reason": None}
    assert (libraries["cuda"]["file"] is None) == isinstance(libraries["cuda"]["reason"], str)
    if not torch.version.cuda:
        assert libraries["cuda"]["file"] is None


def test_cpu_capabilities():
    capabilities = C.cpu_capabilities()
    assert capabilities["c"] is True
    assert all(isinstance(value, bool) for value in capabilities.values())
    assert "sm80" not in capabilities and "sm90" not in capabilities
    for dtype in DTYPES:
        assert capabilities[C.isa(dtype)]
    missing = C.missing_isas()
    assert set(missing) == {name for name, runs in capabilities.items() if not runs}
    assert all(missing.values())


def test_forced_isa_is_seen_in_a_new_process():
    code = "from pbs_attn import _load; c = _load.load(); print(c.forced_isa(), c.isa('float32'))"
    env = {**os.environ, "PBS_ATTN_ISA": "c"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["c", "c"], done.stderr


def test_unknown_dtype_names_what_is_allowed():
    with pytest.raises(ValueError, match="'int8'.*float32, float16 or bfloat16"):
        C.isa("int8")


def test_last_error_is_that_of_the_failing_call():
    with pytest.raises(ValueError) as error:
        C.prefill_workspace_size(1, 3, 2, 512, 512, 64, "float32", 1, 128, 256, 0, 2, 0, 0, 8)
    assert str(error.value) == C.last_error() != ""


def test_workspace_grows_with_the_threads_and_not_with_the_batch_alone():
    def size(threads):
        shape = (1, 4, 2, 2048, 2048, 64, "bfloat16")
        return C.prefill_workspace_size(*shape, threads, 128, 256, 0, 2, 0, 0, 8)

    assert 0 < size(1) <= size(2) <= size(8)


# ---- the binding ---------------------------------------------------------------------------------
def score(q, k, *geometry, block_size=128, order=0, seed=0, scale=0.0):
    return OPS.score(q, k, *(geometry or WHOLE), scale, block_size, 256, 0, order, seed)


@pytest.fixture(scope="module")
def qk():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 512, 64, generator=generator)
    return q, torch.randn(1, 2, 512, 64, generator=generator)


def test_float_arguments_arrive(qk):
    """A C++ float for a schema's float compiles and reads 0.0; 0.0 means D**-0.5 here."""
    assert torch.equal(score(*qk, scale=0.125), score(*qk))
    assert not torch.equal(score(*qk, scale=0.5), score(*qk))


def test_all_64_bits_of_a_seed_arrive(qk):
    random = 3
    assert not torch.equal(
        score(*qk, order=random, seed=1), score(*qk, order=random, seed=1 + 2**32)
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda q, k: score(q.double(), k), "q has dtype Double: Float, Half or BFloat16"),
        (lambda q, k: score(q[0], k), r"q has shape \[4, 512, 64\]: 4 dimensions"),
        (lambda q, k: score(q, k, block_size=2**40), "block_size is 1099511627776"),
        (
            lambda q, k: score(q, k, torch.zeros(1, dtype=torch.int64), *WHOLE[1:]),
            "q_start has dtype Long: Int is allowed",
        ),
        (
            lambda q, k: score(
                torch.cat([q] * 2), torch.cat([k] * 2), torch.ones(3).int(), *WHOLE[1:]
            ),
            r"q_start has shape \[3\]: \[2\] is needed",
        ),
        (
            lambda q, k: OPS.permute(
                q, k, k, torch.zeros(3), None, None, *WHOLE, 128, 256, 0, 2, 0
            ),
            r"score has shape \[3\]: \[1, 4, 512\] is needed",
        ),
    ],
)
def test_bad_tensors_are_value_errors(qk, call, message):
    with pytest.raises(ValueError, match=message):
        call(*qk)


def test_errors_of_the_core_keep_their_text(qk):
    with pytest.raises(ValueError) as error:
        score(*qk, order=9)
    assert str(error.value) == C.last_error()
    assert "order: 9" in str(error.value)


def test_what_no_kernel_does_is_unsupported(qk):
    with pytest.raises(RuntimeError) as error:
        score(*qk, block_size=100)
    assert str(error.value) == "unsupported: " + C.last_error()
    assert "64, 128 and 256" in str(error.value)


# ---- the library ---------------------------------------------------------------------------------
def test_library_needs_only_what_the_floor_offers():
    errors, _, _ = symbols.check_library(C.__file__)
    assert errors == []


def test_symbol_check_catches_what_it_is_for():
    offered = symbols.read_list("torch_2_10.txt"), symbols.read_list("python_3_10.txt")
    fine = {"torch_parallel_for", "PyLong_FromLong", "memcpy@GLIBC_2.14", "__gmon_start__"}
    assert symbols.check_imports(fine, *offered) == []
    for bad in ("torch_from_blob", "PyUnicode_AsUTF8", "pbs_missspelt"):  # 2.11; not limited
        assert len(symbols.check_imports(fine | {bad}, *offered)) == 1


def run_in(folder, code, python=sys.executable):
    """Run code where the package that is imported is the one in folder, whole."""
    # An editable install would find what the folder lacks in the checkout.
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]\n" + code
    )
    env = {**os.environ, "PYTHONPATH": str(folder)}
    argv = [python, "-c", code]
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True)


def other_pythons():
    """Every CPython >= 3.10 that is at hand, this one included."""
    found = [sys.executable]
    found += filter(None, (shutil.which(f"python3.{minor}") for minor in range(10, 16)))
    found += map(str, Path.home().glob(".pyenv/versions/3.1[0-9]*/bin/python3"))
    versions = {}
    for python in found:
        query = (
            "import sys; print(*sys.version_info[:2]); assert not hasattr(sys, 'gettotalrefcount')"
        )
        done = subprocess.run([python, "-c", query], capture_output=True, text=True)
        if done.returncode == 0:
            versions.setdefault(done.stdout.strip(), python)
    return versions


@pytest.mark.parametrize("version, python", other_pythons().items())
def test_one_library_for_every_python(tmp_path, version, python):
    """Without torch for that Python: LibTorch itself does not know Python, so load it directly."""
    package = tmp_path / "pbs_attn"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(C.__file__, package)
    libtorch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    code = (
        f"import ctypes; ctypes.CDLL({str(libtorch)!r}, ctypes.RTLD_GLOBAL)\n"
        "import pbs_attn._C as C\n"
        "print(C.abi_version(), C.isa(), C.build_info()['torch_headers'], C.cpu_capabilities())\n"
        "print(C.prefill_workspace_size(1, 2, 2, 512, 512, 64, 'float32', num_threads=1,\n"
        "      block_size=128, segment_size=256, gqa=0, mode=2, order=0, method=0, stride=8))\n"
    )
    done = run_in(tmp_path, code, python)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{C.abi_version()} {C.isa()} ")


def test_missing_library_names_the_cure(tmp_path):
    copy_package(tmp_path)
    done = run_in(tmp_path, "import pbs_attn")
    assert done.returncode != 0
    assert "pbs_attn is not built" in done.stderr and "make build" in done.stderr


def test_library_for_another_platform_names_the_cure(tmp_path):
    (copy_package(tmp_path) / "_C.abi3.so").write_bytes(b"\x7fELF of another machine")
    done = run_in(tmp_path, "import pbs_attn")
    assert done.returncode != 0
    assert "build it again here" in done.stderr


# ---- build_tools ---------------------------------------------------------------------------------
def test_headers_are_found_without_importing_torch(monkeypatch, tmp_path):
    monkeypatch.delenv("PBS_TORCH_INCLUDE", raising=False)
    include = torch_headers.find()
    assert (include / "torch/csrc/stable/library.h").is_file()
    assert torch.__version__.startswith(torch_headers.version(include))

    monkeypatch.setenv("PBS_TORCH_INCLUDE", str(tmp_path))
    assert torch_headers.find() is None
    with pytest.raises(SystemExit, match="PBS_TORCH_INCLUDE"):
        torch_headers.require()


def test_backend_asks_for_torch_only_where_there_is_none(monkeypatch, tmp_path):
    backend = load_file(ROOT / "build_tools" / "backend.py")
    assert backend._torch_if_absent() == []
    monkeypatch.setenv("PBS_TORCH_INCLUDE", str(tmp_path))
    assert backend._torch_if_absent() == ["torch>=2.10"]


def make_job(folder, *flags):
    command = (os.environ.get("CC", "cc"), f"-I{folder}", *flags)
    return compiling.Job(folder / "a.c", folder / "out" / "a.o", command, "cc 1")


def test_only_stale_objects_are_compiled(tmp_path, capsys):
    (tmp_path / "a.h").write_text("#define A 1\n")
    (tmp_path / "a.c").write_text('#include "a.h"\nint a = A;\n')
    job = make_job(tmp_path)
    assert not job.is_fresh()
    assert compiling.compile_all([job])
    assert "[1/1]" in capsys.readouterr().out
    assert job.is_fresh()
    assert not compiling.compile_all([job])

    assert not make_job(tmp_path, "-O1").is_fresh()
    later = job.object.stat().st_mtime_ns + 1
    os.utime(tmp_path / "a.h", ns=(later, later))
    assert not job.is_fresh()


def test_a_failed_compile_shows_the_command_and_leaves_nothing_fresh(tmp_path):
    (tmp_path / "a.c").write_text("this is not C\n")
    job = make_job(tmp_path)
    with pytest.raises(compiling.BuildError, match=r"compiling .*a\.c failed(.|\n)*-I"):
        compiling.compile_all([job])
    assert not job.is_fresh()


def test_missing_compiler_names_the_cure():
    with pytest.raises(compiling.BuildError, match="no-such-cc.*build-essential"):
        compiling.compiler_id("no-such-cc")


@pytest.mark.parametrize("value", ["0", "-1", "many", ""])
def test_bad_max_jobs(monkeypatch, value):
    monkeypatch.setenv("MAX_JOBS", value)
    with pytest.raises(compiling.BuildError, match="MAX_JOBS"):
        compiling.max_jobs()
