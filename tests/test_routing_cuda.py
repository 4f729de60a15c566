# SPDX-License-Identifier: Apache-2.0
"""What Python does with a GPU's tensors, without a GPU. Meta tensors stand in for them: they have
shapes and strides but no values, so that every read of a value, which on a GPU would be a
synchronisation, raises here."""

import logging
import types

import pytest
import torch
from harness import config_of

from pbs_attn import (
    PBSConfig,
    _load,
    build_info,
    dense,
    devices,
    env,
    geometry,
    pbs_attention,
    record,
    routing,
    stats,
    supports,
    workspace_size,
)
from pbs_attn.cli import doctor

GPU = torch.device("meta")
BF16 = torch.bfloat16
SPARSE = config_of()


def library(archs="80+PTX;90"):
    """What pbs_attn._C_cuda looks like to Python; sizes are those of the CPU's library."""
    return types.SimpleNamespace(
        __file__="_C_cuda.abi3.so",
        build_info=lambda: {"archs": archs, "nvcc": "13.0"},
        kv_packed_bytes=_load.load().kv_packed_bytes,
        prefill_workspace_size=_load.load().prefill_workspace_size,
        refuses=lambda index: None,
    )


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes a GPU of the meta device, with a library for it."""

    def put(capability=(9, 0), archs="80+PTX;90"):
        monkeypatch.setattr(_load, "CUDA", library(archs))
        monkeypatch.setattr(_load, "CUDA_ARCHS", archs)
        monkeypatch.setattr(_load, "NO_CUDA", None)
        monkeypatch.setattr(devices, "_capabilities", {0: capability})

    monkeypatch.setattr(devices, "kind", lambda x: "cuda" if x.type == "meta" else x.type)
    put()
    return put


def tensors(seqlen_q=700, seqlen_k=700, head_dim=64, dtype=BF16, heads=(4, 2), batch=1):
    q = torch.empty(batch, heads[0], seqlen_q, head_dim, dtype=dtype, device=GPU)
    k, v = (torch.empty(batch, heads[1], seqlen_k, head_dim, dtype=dtype, device=GPU) for _ in "kv")
    return q, k, v


def int32(*values):
    return torch.empty(len(values), dtype=torch.int32, device=GPU)


# ---- which route, and why ------------------------------------------------------------------------


def test_a_supported_call_is_sparse(gpu):
    assert supports(*tensors(), SPARSE) is None
    assert supports(*tensors(dtype=torch.float16, head_dim=200), SPARSE) is None


@pytest.mark.parametrize("config", [{"block_size": 32}, {"segment_size": 4096}])
def test_sizes_that_no_kernel_has(gpu, config):
    changed = PBSConfig(min_q=0, min_kv=0, **config)
    assert supports(*tensors(), changed) == next(iter(config))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": torch.float32}, "dtype"),
        ({"dtype": torch.float64}, "dtype"),
        ({"head_dim": 12}, "head_dim"),
        ({"head_dim": 264}, "head_dim"),
    ],
)
def test_dtypes_and_head_dims(gpu, changes, reason):
    assert supports(*tensors(**changes), SPARSE) == reason


def strided(seqlen=700, row=64, head=None, offset=0):
    """k and v alike: [1, 2, seqlen, 64] with the given strides."""
    head = head or row * seqlen
    memory = torch.empty(2 * head + offset + 64, dtype=BF16, device=GPU)
    return memory.as_strided((1, 2, seqlen, 64), (2 * head, head, row, 1), offset)


@pytest.mark.parametrize(
    "layout, aligned",
    [
        ({}, True),
        ({"row": 72}, True),
        ({"row": 68}, False),
        ({"head": 64 * 700 + 4}, False),
        ({"offset": 8}, True),
        ({"offset": 4}, False),
    ],
)
def test_rows_start_on_16_bytes(gpu, layout, aligned):
    q, k, v = tensors()
    reason = None if aligned else "alignment"
    assert supports(q, strided(**layout), v, SPARSE) == reason
    assert supports(q, k, strided(**layout), SPARSE) == reason
    assert "16 bytes" in routing.REASONS["alignment"]


def test_strides_of_single_rows_and_heads_mean_nothing(gpu):
    q, k, v = tensors(heads=(1, 1))
    odd = torch.empty(99, dtype=BF16, device=GPU).as_strided((1, 1, 1, 64), (5, 3, 7, 1), 8)
    assert devices.aligned(odd) and devices.aligned(odd[:, :, :0])
    assert supports(odd, k, v, SPARSE) is None


def test_real_tensors_are_judged_by_their_address():
    memory = torch.empty(64 * 4 + 8, dtype=BF16)
    start = -memory.data_ptr() // 2 % 8
    for offset in range(8):
        rows = memory[start + offset :][: 64 * 3].view(1, 1, 3, 64)
        assert devices.aligned(rows) == (offset == 0)


@pytest.mark.parametrize(
    "capability, archs, said",
    [
        ((7, 5), "80+PTX;90", "7.5, and 8.0 is the least"),
        ((8, 6), "90", "8.6, and the CUDA library was built for 90"),
        ((8, 0), "86+PTX", "8.0, and the CUDA library was built for 86"),
        ((10, 0), "80;90a", "10.0, and"),
        ((8, 9), "80", None),
        ((9, 0), "90a", None),
        ((12, 0), "80+PTX", None),
    ],
)
def test_capabilities(gpu, capability, archs, said):
    gpu(capability, archs)
    assert supports(*tensors(), SPARSE) == (said and "device")
    refusal = devices.refusal(GPU)
    assert refusal is None if said is None else said in refusal


def test_a_driver_that_is_too_old_for_the_library(gpu, monkeypatch):
    monkeypatch.setattr(_load.CUDA, "refuses", lambda index: f"driver of GPU {index} too old")
    assert devices.refusal(GPU) == "driver of GPU 0 too old"
    assert supports(*tensors(), SPARSE) == "device"


@pytest.mark.parametrize("said", [None, "too old"])
def test_what_the_library_says_is_asked_while_tracing(gpu, monkeypatch, said):
    asked = []
    monkeypatch.setattr(_load.CUDA, "refuses", lambda index: asked.append(index) or said)
    config = SPARSE.replace(strict=False)
    torch._dynamo.reset()
    call = torch.compile(
        lambda q, k, v: pbs_attention(q, k, v, config=config), fullgraph=True, backend="eager"
    )
    q, k, v = tensors()
    assert call(q, k, v).shape == q.shape and asked


def test_without_the_library_the_reason_is_the_loaders(gpu, monkeypatch, caplog):
    monkeypatch.setattr(_load, "CUDA", None)
    monkeypatch.setattr(_load, "NO_CUDA", "no nvcc in PATH")
    monkeypatch.setattr(routing, "_said", set())
    assert supports(*tensors(), SPARSE) == "device"
    with pytest.raises(NotImplementedError, match="reason device.*meta.*no nvcc in PATH"):
        pbs_attention(*tensors(), config=SPARSE)
    with caplog.at_level(logging.WARNING, "pbs_attn"):
        out = pbs_attention(*tensors(), config=SPARSE.replace(strict=False))
    assert out.shape == (1, 4, 700, 64) and "no nvcc in PATH" in caplog.text


@pytest.mark.parametrize("backend, reason", [("cpu", "device"), ("cuda", None), ("auto", None)])
def test_backend_of_the_environment(gpu, monkeypatch, backend, reason):
    monkeypatch.setattr(env, "current", env.Environment(backend=backend))
    assert supports(*tensors(), SPARSE) == reason
    on_cpu = [torch.empty(1, 2, 700, 64) for _ in "qkv"]
    assert supports(*on_cpu, SPARSE) == ("device" if backend == "cuda" else None)


def test_lengths_by_family(gpu, monkeypatch):
    assert devices.family(torch.device("cpu")) == "cpu" and devices.family(GPU) == "cuda:9.0"
    safe = routing.MIN_LENGTHS_ELSEWHERE
    assert routing.min_lengths(PBSConfig(), GPU) == safe
    assert supports(*tensors(safe.min_q - 1, safe.min_kv)) == "short_q"
    assert supports(*tensors(safe.min_q, safe.min_kv - 1)) == "short_kv"
    assert supports(*tensors(safe.min_q, safe.min_kv)) is None
    measured = {"cuda:9.0": routing.Lengths(512, 4096)}
    monkeypatch.setattr(routing, "MIN_LENGTHS", routing.MIN_LENGTHS | measured)
    assert supports(*tensors(512, 4096)) is None
    gpu((8, 0))
    assert supports(*tensors(512, 4096)) == "short_q"
    assert all(name == "cpu" or name.startswith("cuda:") for name in routing.MIN_LENGTHS)


# ---- no value of a tensor is read on the way -----------------------------------------------------


def calls():
    n = 700
    yield "whole", tensors(), {}
    yield "lse and plan", tensors(), {"return_lse": True, "return_plan": True}
    vectors = {name: int32(0, 0) for name in ("q_start", "q_len", "kv_start", "kv_len")}
    yield "padded", tensors(batch=2), vectors
    yield "chunk", tensors(200), {"kv_len": int32(0)}
    packed = [x.squeeze(0).transpose(0, 1) for x in tensors()]
    yield "packed", packed, {"cu_seqlens_q": int32(0, 0, 0)}
    bounds = {"max_seqlen_q": 300, "max_seqlen_k": 300}
    yield "packed, bounded", packed, {"cu_seqlens_q": int32(0, 0, 0), **bounds}
    heads = {"tau": torch.empty(4, device=GPU), "permute_heads": int32(0, 0, 0, 0)}
    yield "per head", tensors(), heads
    out = torch.empty(1, 4, n, 64, dtype=BF16, device=GPU)
    yield "out", tensors(), {"out": out}
    yield "padded out", tensors(), {"out": out, "q_len": int32(0), "kv_len": int32(0)}
    shifted = torch.empty(4 * n * 64 + 4, dtype=BF16, device=GPU)[4:].view(1, 4, n, 64)
    yield "out of odd address", tensors(), {"out": shifted}
    yield "bnhd", [x.transpose(1, 2) for x in tensors()], {"layout": "bnhd"}


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("route", ["pbs", "dense"])
def test_no_call_reads_a_value(gpu, monkeypatch, route, counted):
    monkeypatch.setattr(stats.Record, "_finish", lambda self: None)  # the one place that may
    lengths = {} if route == "pbs" else {"min_q": 1000}
    for name, args, options in calls():
        config = SPARSE.replace(**lengths)
        if counted:
            with record() as found:
                result = pbs_attention(*args, config=config, **options)
            assert found.calls[route] == 1, name
        else:
            result = pbs_attention(*args, config=config, **options)
        first = result[0] if isinstance(result, tuple) else result
        assert first.shape == args[0].shape and first.device == GPU, name
        if options.get("return_plan"):
            assert result[2].density().shape == (1, 4), name


def test_a_read_would_be_seen(gpu):
    """That meta tensors do catch it."""
    for read in (torch.Tensor.item, torch.Tensor.tolist, bool):
        with pytest.raises(Exception, match="meta"):
            read(tensors()[0].sum())


def test_an_own_mask_reads_no_value(gpu):
    from pbs_attn import attend

    q, k, v = tensors()
    mask = torch.empty(1, 4, 6, 6, dtype=torch.bool, device=GPU)
    out, lse = attend(q, k, v, mask, return_lse=True, kv_len=int32(0))
    assert out.shape == q.shape and lse.shape == (1, 4, 700)
    assert attend(q, k, v, mask[..., :3, :3], block_q=256, block_k=256).shape == q.shape


def test_mask_functions_read_no_value(gpu):
    pytest.importorskip("transformers")
    from pbs_attn.integrations import masks

    mask = masks.attention_mask_function(
        kv_length=512, q_length=100, q_offset=100, batch_size=2, device=GPU
    )
    assert masks.is_geometry(mask) and mask.device == GPU
    assert masks.read_mask(mask, 100, 512)[0].q_len.shape == (2,)


# ---- the dense route -----------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """What the dense route calls: [(kernel, its mask or own mode)]."""
    called = []
    sdpa, attend = torch.nn.functional.scaled_dot_product_attention, dense.ops.attend

    def watched_sdpa(q, k, v, attn_mask=None, is_causal=False, **options):
        called.append(("sdpa", type(attn_mask).__name__ if attn_mask is not None else is_causal))
        return sdpa(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **options)

    def watched_attend(*args, own="segment", **options):
        called.append(("attend", own))
        return attend(*args, own=own, **options)

    functional = types.SimpleNamespace(scaled_dot_product_attention=watched_sdpa)
    monkeypatch.setattr(dense, "F", functional)
    monkeypatch.setattr(dense.ops, "attend", watched_attend)
    return called


PADDED = {"q_len": (0,), "kv_len": (0,)}


@pytest.mark.parametrize(
    "lengths, options, dtype, flash, called",
    [
        ((700, 700), {}, BF16, True, ("sdpa", True)),
        ((1, 700), {}, BF16, True, ("sdpa", False)),
        ((1, 1), {}, BF16, True, ("sdpa", False)),
        ((200, 700), {}, BF16, True, ("sdpa", "CausalBias")),
        ((200, 700), {}, BF16, False, ("attend", "all")),
        ((700, 200), {}, BF16, True, ("attend", "all")),
        ((700, 700), {"return_lse": True}, BF16, True, ("attend", "all")),
        ((700, 700), PADDED, BF16, True, ("attend", "all")),
        ((200, 700), PADDED, BF16, True, ("attend", "all")),
        ((700, 700), {}, torch.float32, True, ("sdpa", "Tensor")),
        ((700, 700), PADDED, torch.float32, True, ("sdpa", "Tensor")),
    ],
)
def test_dense_kernels(gpu, kernels, monkeypatch, lengths, options, dtype, flash, called):
    monkeypatch.setattr(dense, "_flash_aligns_right", lambda *args: flash)
    options = {name: int32(*x) if isinstance(x, tuple) else x for name, x in options.items()}
    config = PBSConfig(min_q=1000)
    pbs_attention(*tensors(*lengths, dtype=dtype), config=config, **options)
    assert kernels == [called]


def test_below_break_even_the_call_is_the_dense_call(gpu, kernels):
    q, k, v = tensors()
    with record() as found:
        pbs_attention(q, k, v)
    assert kernels == [("sdpa", True)] and found.reasons == {"short_q": 1}


@pytest.mark.parametrize("lengths", [(1, 300), (70, 300), (300, 300)])
def test_sdpa_means_what_the_mask_means(monkeypatch, lengths):
    """_flash, on CPU tensors, against the route that spells the mask out."""
    monkeypatch.setattr(dense, "_flash_aligns_right", lambda *args: True)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 64, generator=g).to(BF16) for h, n in zip(
        (4, 2, 2), (lengths[0], lengths[1], lengths[1]), strict=True))  # fmt: skip
    got = dense._flash(q, k, v, 0.2)
    want, _ = dense.torch_attention(
        q.double(), k.double(), v.double(), geometry.Geometry(), softmax_scale=0.2
    )
    assert got.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-2)


def test_calls_that_sdpa_has_no_fused_kernel_for():
    x = torch.zeros(1, 2, 8, 64)
    assert dense._flash(x, x, x, None) is None  # float32
    half = x.to(BF16)
    assert dense._flash(half, half[:, :, :4], half[:, :, :4], None) is None  # rows without a key
    assert dense._flash(half[:, :, :0], half, half, None) is None
    assert dense._flash(half, half, half[..., :32], None) is None
    wide = torch.zeros(1, 2, 8, 264, dtype=BF16)
    assert dense._flash(wide, wide, wide, None) is None


# ---- compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_q", [0, 1000])
def test_one_graph(gpu, min_q):
    torch._dynamo.reset()
    config = SPARSE.replace(min_q=min_q)
    call = torch.compile(
        lambda q, k, v: pbs_attention(q, k, v, config=config), fullgraph=True, backend="eager"
    )
    assert call(*tensors()).shape == (1, 4, 700, 64)


# ---- sizes, matrix, doctor -----------------------------------------------------------------------


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
