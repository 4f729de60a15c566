# SPDX-License-Identifier: Apache-2.0
"""What Python does with a GPU's tensors, without a GPU: tests/meta_gpu.py stands in for one."""

import logging
import types

import pytest
import torch
from meta_gpu import BF16, GPU, SPARSE, int32, tensors

from pbs_attn import (
    PBSConfig,
    _load,
    dense,
    devices,
    env,
    geometry,
    pbs_attention,
    record,
    routing,
    stats,
    supports,
)

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


@pytest.mark.parametrize("refused", [None, "too old"])
@pytest.mark.parametrize("min_q", [0, 1000])
def test_one_graph(gpu, monkeypatch, min_q, refused):
    asked = []
    monkeypatch.setattr(_load.CUDA, "refuses", lambda index: asked.append(index) or refused)
    torch._dynamo.reset()
    config = SPARSE.replace(min_q=min_q, strict=refused is None)
    call = torch.compile(
        lambda q, k, v: pbs_attention(q, k, v, config=config), fullgraph=True, backend="eager"
    )
    assert call(*tensors()).shape == (1, 4, 700, 64)
    assert bool(asked) or min_q, "the library itself is asked where the call could run sparse"
