# SPDX-License-Identifier: Apache-2.0
"""Building the CUDA library: what nvcc is told, what is kept of what it says, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_files import CUDA_LIBRARY, ROOT, compiling, copy_package, cuda, resources, symbols

FAKE_NVCC = """#!/bin/sh
[ "$1" = --version ] && { echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; }
echo "ptxas info    : 0 bytes gmem" >&2
echo "ptxas info    : (C7510) Potential Performance Loss: wgmma is serialized" >&2
exit ${FAKE_STATUS:-0}
"""


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    """A toolkit that answers, and variables that point to it alone."""
    for name in ("PBS_BUILD_CUDA", "PBS_CUDA_HOME", "CUDA_HOME", "CUDA_PATH", "PBS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(FAKE_NVCC)
    path.chmod(0o755)
    return path


def test_modes_of_the_cuda_build(monkeypatch, nvcc):
    assert cuda.choose_nvcc() == (nvcc, "")
    monkeypatch.setenv("PBS_BUILD_CUDA", "1")
    assert cuda.choose_nvcc() == (nvcc, "")
    monkeypatch.setenv("PBS_BUILD_CUDA", "0")
    assert cuda.choose_nvcc() == (None, "PBS_BUILD_CUDA=0")
    monkeypatch.setenv("PBS_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="'yes': one of auto, 0, 1"):
        cuda.choose_nvcc()


def test_without_nvcc_auto_gives_the_reason_and_1_fails(monkeypatch):
    monkeypatch.setattr(cuda, "find_nvcc", lambda: (None, "no nvcc in these places"))
    monkeypatch.delenv("PBS_BUILD_CUDA", raising=False)
    assert cuda.choose_nvcc() == (None, "no nvcc in these places")
    monkeypatch.setenv("PBS_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="PBS_BUILD_CUDA=1, but no nvcc in these places"):
        cuda.choose_nvcc()


def test_cuda_home_without_nvcc_is_an_error(monkeypatch, nvcc, tmp_path):
    monkeypatch.setenv("PBS_CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="nowhere"):
        cuda.choose_nvcc()


@pytest.mark.parametrize(
    "text, archs",
    [
        (cuda.DEFAULT_ARCHS, [("80", True), ("90", False)]),
        ("80", [("80", False)]),
        ("90a; 120+PTX", [("90a", False), ("120", True)]),
    ],
)
def test_archs(text, archs):
    assert [(arch.cc, arch.ptx) for arch in cuda.parse_archs(text)] == archs


@pytest.mark.parametrize("text", ["", "75", "8.0", "80,90", "sm_80", "80+ptx", "80;;90"])
def test_bad_archs(text):
    with pytest.raises(compiling.BuildError, match="PBS_CUDA_ARCHS.*from 80 up"):
        cuda.parse_archs(text)


def test_flags_of_nvcc(monkeypatch, nvcc):
    monkeypatch.setenv("NVCCFLAGS", "-lineinfo")
    kit = cuda.toolkit(nvcc, "ccache c++ -m64")
    assert (kit.version, kit.host, kit.arch_names) == ("13.0.88", "c++", "80+PTX;90")
    plain, hopper = (kit.compile_command(Path(name)) for name in ("attend.cu", "attend_sm90.cu"))
    assert {"-std=c++17", "-O3", "-lineinfo"} < set(plain)
    assert plain[plain.index("-Xptxas") + 1] == "-v"
    assert plain[plain.index("-ccbin") + 1] == "c++"
    gencode = [flag for flag in plain if "gencode" in flag]
    assert gencode == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90,code=[sm_90]",
    ]
    assert "-gencode=arch=compute_90a,code=[sm_90a]" in hopper
    assert sum("gencode" in flag for flag in hopper) == 1
    assert "-rdc=true" not in plain and {"-shared", "static"} < set(kit.link_command())


def test_hopper_files_follow_the_others_where_9_0_is_not_wanted():
    archs = cuda.parse_archs("80")
    assert cuda.archs_for(Path("attend_sm90.cu"), archs) == archs


def nvcc_job(nvcc, folder, *speed):
    (folder / "a.cu").touch()
    kit = cuda.toolkit(nvcc, "c++")
    command = kit.compile_command(folder / "a.cu")
    obj = folder / "a.cu.o"
    return compiling.Job(folder / "a.cu", obj, command, kit.identity, speed, folder / "a.cu.log")


def test_log_of_a_cuda_compile_is_kept_and_remarks_are_shown(nvcc, tmp_path, capsys):
    job = nvcc_job(nvcc, tmp_path)
    compiling.compile_all([job])
    said = capsys.readouterr().err
    assert "C7510" in said and "gmem" not in said
    assert "gmem" in job.log.read_text() and "C7510" in job.log.read_text()


def test_a_failed_cuda_compile_is_an_error_in_every_mode(monkeypatch, nvcc, tmp_path):
    monkeypatch.setenv("FAKE_STATUS", "1")
    with pytest.raises(compiling.BuildError, match=r"compiling .*a\.cu failed"):
        compiling.compile_all([nvcc_job(nvcc, tmp_path)])


def test_threads_of_nvcc_do_not_make_an_object_stale(nvcc, tmp_path):
    one, two = (nvcc_job(nvcc, tmp_path, "--threads", n) for n in "12")
    assert one.record == two.record and one.argv != two.argv


@pytest.mark.skipif(not (ROOT / "build/objects").is_dir(), reason="nothing was built here")
def test_a_build_without_cuda_leaves_no_older_one(tmp_path):
    for name in ("csrc", "build_tools"):
        shutil.copytree(ROOT / name, tmp_path / name)  # with times: only what differs is compiled
    objects = Path("build/objects")
    shutil.copytree(ROOT / objects, tmp_path / objects, ignore=shutil.ignore_patterns("cuda"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package = copy_package(tmp_path)
    (package / CUDA_LIBRARY.name).touch()
    env = {**os.environ, "PBS_BUILD_CUDA": "0"}
    argv = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no CUDA library: PBS_BUILD_CUDA=0") == 1
    assert [path.name for path in package.glob("_C*.so")] == ["_C.abi3.so"]


def test_sources_of_the_cuda_library():
    names = cuda.sources(ROOT)
    assert {"csrc/cuda/backend.c", "csrc/cuda/device.cu", "csrc/cuda/library.c"} <= set(names)
    assert {Path(name).suffix for name in names} == {".c", ".cu"}


@pytest.mark.skipif(not CUDA_LIBRARY.is_file(), reason="the CUDA library was not built")
def test_cuda_library_needs_only_what_the_floor_offers():
    errors, _, _ = symbols.check_library(CUDA_LIBRARY)
    assert errors == []


LOAD = """
import ctypes, json, sys, torch
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
from pbs_attn import _load
import pbs_attn._C_cuda as cuda
shape = dict(batch=1, num_heads=2, num_heads_k=1, seqlen_q=512, seqlen_k=512, head_dim=64,
             block_size=128, segment_size=256, gqa=0, mode=2)
try:
    cuda.kv_packed_bytes(dtype="float32", **shape)
except NotImplementedError as error:
    refused = str(error)
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps({
    "abi": cuda.abi_version() == _load.load().abi_version(),
    "ops": [has("pbs_attn::" + op, "CUDA") for op in ("score", "permute", "select", "attend",
                                                      "attend_out", "prefill", "prefill_out")],
    "info": cuda.build_info(),
    "refused": refused,
    "far": [cuda.capability(4095), cuda.refuses(4095)],
    "packed": cuda.kv_packed_bytes(dtype="bfloat16", **shape),
    "workspace": cuda.prefill_workspace_size(dtype="bfloat16", num_threads=1, order=0, method=0,
                                             stride=8, **shape),
}))
"""


@pytest.mark.skipif(not CUDA_LIBRARY.is_file(), reason="the CUDA library was not built")
@pytest.mark.skipif(bool(torch.version.cuda), reason="here torch loads it itself")
def test_cuda_library_loads_and_answers_without_a_gpu(tmp_path):
    """Over a torch without CUDA, and a library that has the one function which that lacks: every
    other name is found, the ops are registered, and questions about sizes need no driver."""
    function = "int aoti_torch_get_current_cuda_stream(int i, void **s) { return !i || !s; }\n"
    (tmp_path / "stub.c").write_text(function)
    stub = tmp_path / "libtorch_cuda.so"
    cc = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run([*cc, "-o", stub, tmp_path / "stub.c"], check=True)
    argv = [sys.executable, "-c", LOAD, stub]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["abi"] and all(answer["ops"])
    info = answer["info"]
    assert {"compiler", "flags", "torch_headers", "archs", "nvcc", "kernels"} == set(info)
    assert {dtype for dtype, *_ in info["kernels"]} <= {"fp16", "bf16"}
    assert all(size > 0 for _, *sizes in info["kernels"] for size in sizes)
    assert "fp16 (2) and bf16 (3)" in answer["refused"]
    assert answer["far"][0] == 0 and "it cannot be asked" in answer["far"][1]
    # K and V of two heads, permuted: 2 * 2 * 512 rows of 128 bytes, and a header.
    assert 2 * 2 * 512 * 128 < answer["packed"] <= answer["workspace"]


def test_symbol_check_knows_the_two_libraries():
    offered = symbols.read_list("torch_2_10.txt"), symbols.read_list("python_3_10.txt")
    stream = {"aoti_torch_get_current_cuda_stream"}
    assert symbols.check_imports(stream, *offered, "_C_cuda") == []
    assert len(symbols.check_imports(stream, *offered, "_C")) == 1
    both = ["libtorch_cpu.so", "libtorch_cuda.so", "libc.so.6", "libdl.so.2"]
    assert symbols.check_needed(both, "_C_cuda") == []
    assert symbols.check_needed(both, "_C") == ["needs libtorch_cuda.so"]
    assert symbols.check_needed([*both, "libcudart.so.13"], "_C_cuda") == ["needs libcudart.so.13"]
    assert "libtorch_cuda.so" in symbols.check_needed(both[:1], "_C_cuda")[0]
    assert symbols.check_exports({"PyInit__C_cuda", "pbs_score"}, "_C_cuda") == []
    assert len(symbols.check_exports({"PyInit__C", "pbs_score"}, "_C_cuda")) == 2


# ---- tools/kernel_resources.py -------------------------------------------------------------------
GOOD_LOG = """\
nvcc -c attend.cu
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3pbs6attendINS_4bf16ELi64EEEvNS_4argsE' for 'sm_80'
ptxas info    : Function properties for _ZN3pbs6attendINS_4bf16ELi64EEEvNS_4argsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1024+0 bytes smem, 792 bytes cmem[0]
ptxas info    : Compile time = 31.372 ms
ptxas info    : Compiling entry function '_ZN3pbs6attendINS_4bf16ELi64EEEvNS_4argsE' for 'sm_90'
ptxas info    : Function properties for _ZN3pbs6attendINS_4bf16ELi64EEEvNS_4argsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 160 registers, used 0 barriers
"""


def test_resources_of_a_clean_log():
    kernels, remarks = resources.parse(GOOD_LOG)
    assert remarks == [] and resources.problems(kernels, remarks) == []
    first, second = kernels
    assert (first.arch, first.registers, first.shared, first.barriers) == ("sm_80", 168, 1024, 2)
    assert (second.arch, second.registers, second.shared, second.barriers) == ("sm_90", 160, 0, 0)
    for kernel in kernels:
        (kernel.name,) = resources.demangle([kernel.name])
    assert first.name == "attend<bf16, 64>"
    *_, row = resources.table(kernels)
    assert row == "| `attend<bf16, 64>` | 168 | 160 | 1024 | 2 | 0 | 0 |"


def test_spills_and_stacks_are_refused():
    spilled = GOOD_LOG.replace("0 bytes spill loads", "8 bytes spill loads", 1)
    (problem,) = resources.problems(*resources.parse(spilled))
    assert "sm_80: 8 bytes of spills" in problem
    framed = GOOD_LOG.replace("    0 bytes stack", "    16 bytes stack", 1)
    (problem,) = resources.problems(*resources.parse(framed))
    assert "sm_80: a stack frame of 16 bytes" in problem


def test_spills_of_a_function_that_is_not_inlined_are_its_kernels():
    called = (
        "ptxas info    : Function properties for helper\n"
        "    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads\n"
    )
    log = GOOD_LOG.replace("ptxas info    : Used 168", called + "ptxas info    : Used 168")
    (problem,) = resources.problems(*resources.parse(log))
    assert "sm_80: 4 bytes of spills" in problem


def test_remarks_of_ptxas_are_refused():
    remark = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources for the function '_ZN3pbs6attend'\n"
    )
    kernels, remarks = resources.parse(GOOD_LOG + remark)
    assert len(kernels) == 2 and resources.problems(kernels, remarks) == [remark.strip()]


@pytest.mark.parametrize("lost", ["Used 168", "0 bytes stack frame", "Compiling entry"])
def test_a_log_with_a_line_lost_is_no_clean_log(lost):
    lines = GOOD_LOG.splitlines()
    lines.remove(next(line for line in lines if lost in line))
    with pytest.raises(resources.LogError):
        resources.parse("\n".join(lines))
