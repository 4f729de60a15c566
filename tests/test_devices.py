# SPDX-License-Identifier: Apache-2.0
"""What is said of GPUs and of the CUDA library without either: sizes, support matrix, doctor."""

import sys
import types

import pytest
import torch
from meta_gpu import BF16, SPARSE, library, tensors

from pbs_attn import _load, build_info, devices, supports, workspace_size
from pbs_attn.cli import doctor


def test_workspace_size_asks_the_devices_library(gpu, monkeypatch):
    shapes = (1, 4, 4096, 64), (1, 2, 4096, 64)
    asked = []
    stub = types.SimpleNamespace(prefill_workspace_size=lambda **sizes: asked.append(sizes) or 77)
    monkeypatch.setattr(_load, "CUDA", stub)
    assert workspace_size(*shapes, BF16, device="cuda") == 77
    assert asked[0]["dtype"] == "bfloat16" and asked[0]["seqlen_k"] == 4096
    assert workspace_size(*shapes, BF16) != 77
    with pytest.raises(TypeError, match="torch.float16, torch.bfloat16"):
        workspace_size(*shapes, torch.float32, device="cuda")
    monkeypatch.setattr(_load, "CUDA", None)
    with pytest.raises(NotImplementedError, match="CUDA library"):
        workspace_size(*shapes, BF16, device="cuda")
    with pytest.raises(NotImplementedError, match="xpu"):
        workspace_size(*shapes, BF16, device="xpu")


def test_fakes_of_packed_ask_the_devices_library(monkeypatch):
    from torch._subclasses import FakeTensorMode

    from pbs_attn import ops

    stub = types.SimpleNamespace(kv_packed_bytes=lambda *sizes: 4096)
    monkeypatch.setattr(_load, "CUDA", stub)
    with FakeTensorMode():
        x = torch.empty(1, 2, 700, 64, dtype=BF16, device="cuda")
        packed = ops.permute(x, x, x, torch.empty(1, 2, 700, device="cuda"))[4]
    assert packed.shape == (4096,) and packed.device.type == "cuda"


def test_support_matrix_is_what_supports_says(gpu):
    for capability in doctor.CAPABILITIES:
        gpu(capability)
        row = doctor.support_matrix(tested=())["{}.{}".format(*capability)]
        for dtype, word in row.items():
            reason = supports(*tensors(dtype=getattr(torch, dtype)), SPARSE)
            assert (word == "compiled") == (reason is None), (capability, dtype)


def test_support_matrix_without_a_library(monkeypatch):
    monkeypatch.setattr(_load, "CUDA_ARCHS", "")
    matrix = doctor.support_matrix(tested={"9.0"})
    assert set(matrix["7.5"].values()) == {"refused"}
    assert matrix["9.0"] == {"bfloat16": "tested", "float16": "tested", "float32": "refused"}
    assert matrix["12.0"]["bfloat16"] == "compiled"
    table = doctor.matrix_table(matrix)
    assert "| sm_90 | H100, H200 | tested | tested | refused |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_docs_have_the_matrix(monkeypatch):
    monkeypatch.setattr(_load, "CUDA_ARCHS", "")
    page = doctor.RESULTS.parents[1] / "docs" / "cuda.md"
    if not page.is_file():
        pytest.skip("no docs here")
    assert doctor.matrix_table(doctor.support_matrix()) in page.read_text(encoding="utf-8")


def test_tested_is_what_a_green_check_left_behind(tmp_path):
    for name, ok, capability in (("h200", "true", "9.0"), ("a100", "false", "8.0")):
        (tmp_path / name).mkdir()
        text = f'{{"ok": {ok}, "gpu": {{"capability": "{capability}"}}}}'
        (tmp_path / name / "gpu_check.json").write_text(text)
    assert doctor.tested_capabilities(tmp_path) == {"9.0"}
    assert doctor.tested_capabilities(tmp_path / "none") == set()


def test_default_archs_are_those_of_the_build(monkeypatch):
    monkeypatch.syspath_prepend(str(doctor.RESULTS.parents[1] / "build_tools"))
    import cuda

    built = {
        arch.cc + ("+PTX" if arch.ptx else "") for arch in cuda.parse_archs(cuda.DEFAULT_ARCHS)
    }
    assert built == set(devices.DEFAULT_ARCHS.split(";"))


@pytest.mark.skipif(bool(torch.version.cuda), reason="of a torch without CUDA")
def test_why_the_library_is_not_loaded(tmp_path, monkeypatch):
    _load.load()
    monkeypatch.setattr(_load, "_HERE", tmp_path)
    module, why = _load._import_cuda()
    assert module is None and why == (_load.C.build_info()["no_cuda"] or why) and why
    (tmp_path / "_C_cuda.abi3.so").touch()
    assert "is built without CUDA" in _load._import_cuda()[1]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "cannot load" in _load._import_cuda()[1]
    old = types.SimpleNamespace(__file__="old.so", abi_version=lambda: 0)
    monkeypatch.setattr(_load.importlib, "import_module", lambda name: old)
    assert "C ABI version 0" in _load._import_cuda()[1]


def test_another_cuda_library(monkeypatch, tmp_path):
    """PBS_ATTN_CUDA_LIBRARY: in place of the package's own, whether there is one or not."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delitem(sys.modules, "pbs_attn._C_cuda", raising=False)
    monkeypatch.setenv("PBS_ATTN_CUDA_LIBRARY", str(tmp_path / "absent.so"))
    module, why = _load._import_cuda()
    assert module is None and f"cannot load {tmp_path}/absent.so" in why
    file = tmp_path / "other.py"  # the loader goes by the suffix
    file.write_text(f"def abi_version(): return {_load.ABI_VERSION}")
    monkeypatch.setenv("PBS_ATTN_CUDA_LIBRARY", str(file))
    module, why = _load._import_cuda()
    assert why is None and module.__file__ == str(file)
    assert sys.modules.pop("pbs_attn._C_cuda") is module


def test_build_info_starts_no_gpu(monkeypatch):
    def started(*args):
        raise AssertionError("CUDA was started")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", started)
    assert "gpus" not in build_info()
    with pytest.raises(AssertionError, match="started"):
        build_info(gpus=True)


def test_doctor_names_each_gpu(gpu):
    build = {
        "gpus": [
            {"name": "H200", "capability": "9.0", "memory_bytes": 139 << 30, "refusal": None},
            {"name": "T4", "capability": "7.5", "memory_bytes": 15 << 30, "refusal": "too old"},
        ],
        "driver": "580.1",
        "cuda": library().build_info(),
    }
    text = "\n".join(doctor._gpu_lines(build))
    for part in ("GPU 0       H200, sm_90, 139 GiB: kernels run", "T4", "no kernels: too old"):
        assert part in text
    assert "driver      580.1" in text and "80+PTX;90, by 13.0" in text
