# SPDX-License-Identifier: Apache-2.0
"""pbs_attention, attend and the rest of the root: layouts, packed calls, plans, the dense route."""

import doctest
import json
import subprocess
import sys

import cases
import pytest
import torch
from harness import bits_of, check_prefill, config_of, geometry_of, sequences_of
from numerics import assert_close, low_precision_attend, pack

import pbs_attn
from pbs_attn import PBSConfig, attend, dense, env, pbs_attention, reference, selection
from pbs_attn.geometry import Geometry

SPARSE = config_of()
DENSE = PBSConfig(min_q=10**6)
GEOMETRIES = pytest.mark.parametrize("case", cases.geometries(), ids=lambda case: case.name)


def test_eleven_names_and_no_transformers():
    assert len(pbs_attn.__all__) == 11 and dir(pbs_attn) == pbs_attn.__all__
    code = "import sys, pbs_attn; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        pbs_attn.flash  # noqa: B018


def check_dense(out, lse, q, k, v, case=None, scale=None):
    for seq in sequences_of(q, k, v, case):
        wide = [x.double() for x in (seq.q, seq.k, seq.v)]
        exact = reference.attend(*wide, own="all", softmax_scale=scale)
        low = low_precision_attend(seq.q, seq.k, seq.v, None, own="all", softmax_scale=scale)
        what = f"dense {case and case.name}"
        assert_close(out[seq.row, :, seq.rows], exact[0], low[0], what=what)
        if lse is not None:
            assert_close(lse[seq.row, :, seq.rows], exact[1], low[1], what=f"{what} lse")


@GEOMETRIES
def test_sparse_with_plan(case):
    inputs = cases.make_inputs(91, (4, 2), case=case, nan_padding=True)
    out, lse, plan = pbs_attention(
        *inputs, config=SPARSE, return_lse=True, return_plan=True, **case.geometry()
    )
    assert out.transpose(1, 2).is_contiguous()
    check_prefill(out, lse, *inputs, plan.bits, plan.k_perm, SPARSE, case)
    density, computed, mask = plan.density(), plan.computed(), plan.mask()
    assert torch.equal(density, computed)  # natural rows: what is chosen is what runs
    assert torch.equal(selection.csr_to_mask(plan.csr(), mask.shape[-1]), mask)
    for seq in sequences_of(*inputs, case):
        seqlen_q, seqlen_k = seq.q.shape[1], seq.k.shape[1]
        bits = bits_of(plan.bits, seq, SPARSE)
        place = reference.Geometry(seqlen_q, seqlen_k)
        final = place.computed(bits)
        tq, tk = bits.shape[1:]
        assert torch.equal(mask[seq.index, :, :tq, :tk], final)
        for h in range(4):
            want = reference.density(bits[h : h + 1], place)
            if place.causal().any():
                assert density[seq.index, h].item() == pytest.approx(want)


@pytest.mark.parametrize("permute", ["queries", "both"])
def test_computed_of_permuted_queries(permute):
    inputs = cases.make_inputs(92, (2, 1), 1100)
    config = config_of(permute=permute)
    plan = pbs_attention(*inputs, config=config, return_plan=True)[1]
    bits = selection.bits_to_mask(plan.bits, plan.num_k_blocks)[0]
    place = reference.Geometry(1100, 1100, row_segment=256)
    for h in range(2):
        own = bits[h : h + 1]
        assert plan.density()[0, h].item() == pytest.approx(reference.density(own, place))
        assert plan.computed()[0, h].item() == pytest.approx(reference.computed(own, place))
    assert (plan.computed() > plan.density()).all()


@GEOMETRIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_route(case, dtype):
    inputs = cases.make_inputs(93, (2, 1), case=case, nan_padding=True, dtype=dtype)
    out, lse, plan = pbs_attention(
        *inputs, config=DENSE, return_lse=True, return_plan=True, **case.geometry()
    )
    check_dense(out, lse, *inputs, case)
    assert (plan.density() == 1).all()
    assert torch.equal(plan.count, selection.bits_to_mask(plan.bits, plan.num_k_blocks).sum(-1))
    k_perm = torch.arange(plan.k_perm.shape[-1], dtype=torch.int32)
    assert torch.equal(plan.k_perm, k_perm.expand_as(plan.k_perm))


@GEOMETRIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dense_through_torch(case, dtype):
    """The mask for SDPA: bottom right, padding, packing; no nan from padding or empty rows."""
    inputs = cases.make_inputs(94, (2, 1), case=case, nan_padding=True, dtype=dtype)
    out, lse = dense.torch_attention(*inputs, geometry_of(case), return_lse=True)
    outside = torch.ones(out.shape[0], out.shape[2], dtype=torch.bool)
    for seq in sequences_of(*inputs, case):
        outside[seq.row, seq.rows] = False
        want = reference.attend(seq.q.double(), seq.k.double(), seq.v.double(), own="all")
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
        got = out[seq.row, :, seq.rows].double()
        torch.testing.assert_close(got, want[0], atol=tolerance, rtol=tolerance)
        got = lse[seq.row, :, seq.rows].double()
        torch.testing.assert_close(got, want[1], atol=tolerance, rtol=tolerance)
    assert (out.transpose(1, 2)[outside] == 0).all()


def test_dense_through_torch_in_pieces(monkeypatch):
    inputs = cases.make_inputs(95, (4, 2), 300, 500, dtype=torch.float64)
    whole = dense.torch_attention(*inputs, Geometry(), return_lse=True)
    monkeypatch.setattr(dense, "CHUNK", 64)
    pieces = dense.torch_attention(*inputs, Geometry(), return_lse=True)
    for got, want in zip(pieces, whole, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("head_dim, head_dim_v, dtype", [
    (12, 12, torch.float32), (64, 32, torch.float32), (64, 64, torch.float64),
    (264, 264, torch.float32), (4, 4, torch.bfloat16),
])  # fmt: skip
def test_what_kernels_lack_goes_to_torch(head_dim, head_dim_v, dtype):
    q, k, v = cases.make_inputs(96, (4, 2), 600, head_dim=head_dim, dtype=dtype)
    v = v[..., :head_dim_v]
    out, lse = pbs_attention(q, k, v, config=PBSConfig(min_q=0, min_kv=0), return_lse=True)
    assert out.shape == (1, 4, 600, head_dim_v) and out.transpose(1, 2).is_contiguous()
    exact = reference.attend(q[0].double(), k[0].double(), v[0].double(), own="all")
    low = low_precision_attend(q[0], k[0], v[0], None, own="all")
    assert_close(out[0], exact[0], low[0])
    with pytest.raises(NotImplementedError, match="strict mode.*reason (dtype|head_dim)"):
        pbs_attention(q, k, v, config=SPARSE)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_layouts(layout, config):
    inputs = cases.make_inputs(97, (4, 2), 700, batch=2)
    want = pbs_attention(*inputs, config=config, return_lse=True)
    if layout == "bnhd":
        inputs = [x.transpose(1, 2).contiguous() for x in inputs]
    out = torch.zeros_like(inputs[0])
    for given in (None, out):
        got, lse = pbs_attention(*inputs, config=config, layout=layout, out=given, return_lse=True)
        assert given is None or got is given
        assert torch.equal(got if layout == "bhnd" else got.transpose(1, 2), want[0])
        assert torch.equal(lse, want[1])


def test_a_strided_last_dimension_is_copied():
    q, k, v = cases.make_inputs(98, (4, 2), 600, head_dim=32)
    wide = [
        torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(3)[..., ::2] for x in (q, k, v)
    ]
    assert wide[0].stride(-1) == 2
    for config in (SPARSE, DENSE):
        assert torch.equal(
            pbs_attention(*wide, config=config), pbs_attention(q, k, v, config=config)
        )


def test_expanded_inputs():
    q, k, v = cases.make_inputs(99, (4, 1), 600)
    k, v = (x.expand(3, 4, 600, 64) for x in (k, v))
    q = q.expand(3, 4, 600, 64)
    out = pbs_attention(q, k, v, config=SPARSE)
    single = pbs_attention(q[:1], k[:1, :1], v[:1, :1], config=SPARSE)
    assert torch.equal(out, single.expand_as(out))


@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("max_given", [False, True])
def test_packed_sequences(config, max_given):
    lengths = [700, 1, 0, 513, 300]
    cu = torch.tensor([0, 700, 701, 701, 1214, 1514])
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in cases.make_inputs(100, (4, 2), 1514))
    options = {"max_seqlen_q": 800, "max_seqlen_k": 900} if max_given else {}
    out, lse, plan = pbs_attention(
        q, k, v, config=config, cu_seqlens_q=cu, return_lse=True, return_plan=True, **options
    )
    assert out.shape == (1514, 4, 64) and lse.shape == (4, 1514)
    assert plan.k_perm.shape == (5, 4, options.get("max_seqlen_k", 700))
    begin = 0
    for b, n in enumerate(lengths):
        rows = slice(begin, begin + n)
        begin += n
        if not n:
            continue
        alone = pbs_attention(
            *(x[rows][None] for x in (q, k, v)),
            config=config, layout="bnhd", return_lse=True, return_plan=True,
        )  # fmt: skip
        torch.testing.assert_close(out[rows], alone[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[:, rows], alone[1][0], atol=1e-5, rtol=1e-5)
        assert torch.equal(plan.count[b, :, : alone[2].count.shape[2]], alone[2].count[0])
        torch.testing.assert_close(plan.density()[b], alone[2].density()[0])
    given = torch.zeros_like(q)
    assert pbs_attention(q, k, v, config=config, cu_seqlens_q=cu, out=given) is given
    torch.testing.assert_close(given, out, atol=1e-6, rtol=1e-6)


def test_packed_chunks_with_longer_keys():
    q, k, v = cases.make_inputs(101, (4, 2), 1100)
    q = q[:, :, :300]
    cu_q, cu_k = torch.tensor([0, 100, 300]), torch.tensor([0, 500, 1100])
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    out = pbs_attention(*packed, config=SPARSE, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    first = pbs_attention(q[:, :, :100], k[:, :, :500], v[:, :, :500], config=SPARSE)
    second = pbs_attention(q[:, :, 100:], k[:, :, 500:], v[:, :, 500:], config=SPARSE)
    assert torch.equal(out.transpose(0, 1), torch.cat([first, second], 2)[0])


@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_out_leaves_rows_outside_alone(config):
    case = next(case for case in cases.geometries() if case.name == "left_padding")
    inputs = cases.make_inputs(102, (4, 2), case=case, nan_padding=True)
    want = pbs_attention(*inputs, config=config, **case.geometry())
    with pbs_attn.record():
        counted = pbs_attention(
            *inputs, config=config, out=torch.full_like(want, 7.0), **case.geometry()
        )
    out = pbs_attention(*inputs, config=config, out=torch.full_like(want, 7.0), **case.geometry())
    assert torch.equal(out, counted)
    inside = torch.zeros(2, case.seqlen_q, dtype=torch.bool)
    for seq in sequences_of(*inputs, case):
        inside[seq.row, seq.rows] = True
    rows, expected = out.transpose(1, 2), want.transpose(1, 2)
    assert torch.equal(rows[inside], expected[inside]) and (rows[~inside] == 7).all()


@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("shape", [(0, 4, 2, 600, 600), (2, 4, 2, 0, 600), (2, 4, 2, 300, 0),
                                   (1, 0, 2, 300, 300), (0, 4, 2, 0, 0)])  # fmt: skip
def test_nothing_to_do(config, shape):
    batch, heads, heads_k, seqlen_q, seqlen_k = shape
    q, k = torch.randn(batch, heads, seqlen_q, 64), torch.randn(batch, heads_k, seqlen_k, 64)
    out, lse, plan = pbs_attention(q, k, k, config=config, return_lse=True, return_plan=True)
    assert out.shape == q.shape and (out == 0).all()
    assert lse.shape == q.shape[:3] and torch.isneginf(lse).all()
    assert plan.density().shape == (batch, heads)


def test_tau_and_heads():
    inputs = cases.make_inputs(103, (4, 2), 1100)
    number = pbs_attention(*inputs, config=SPARSE, tau=0.4)
    assert torch.equal(number, pbs_attention(*inputs, config=SPARSE.replace(tau=0.4)))
    tensor = pbs_attention(*inputs, config=SPARSE, tau=torch.full((4,), 0.4))
    assert torch.equal(number, tensor)
    natural = pbs_attention(*inputs, config=SPARSE, permute_heads=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(natural, pbs_attention(*inputs, config=SPARSE.replace(permute="identity")))


@pytest.mark.parametrize("options", [
    {}, {"permute": "both", "gqa": "group"}, {"permute": "none", "select": "antidiagonal"},
    {"order": "random", "seed": 5, "rule": "budget", "tau": 2.0}, cases.PEAK,
])  # fmt: skip
def test_the_reference_as_backend(monkeypatch, options):
    case = next(case for case in cases.geometries() if case.name == "left_padding")
    inputs = cases.make_inputs(104, (4, 2), case=case)
    call = {"config": config_of(**options), "return_lse": True, "return_plan": True}
    want = pbs_attention(*inputs, **call, **case.geometry())
    monkeypatch.setattr(env, "current", env.Environment(backend="ref"))
    got = pbs_attention(*inputs, **call, **case.geometry())
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(got[2].bits, want[2].bits) and torch.equal(got[2].k_perm, want[2].k_perm)


# ---- attend with the caller's mask ---------------------------------------------------------------


def mask_of(heads, tq, tk, batch=1, density=0.6):
    g = torch.Generator().manual_seed(1)
    return torch.rand(batch, heads, tq, tk, generator=g) < density


def check_masked(out, lse, q, k, v, mask, case=None, block_q=128, block_k=128):
    for seq in sequences_of(q, k, v, case):
        tq, tk = -(-seq.q.shape[1] // block_q), -(-seq.k.shape[1] // block_k)
        blocks = mask[seq.index if mask.shape[0] > 1 else 0, :, :tq, :tk]
        blocks = blocks.expand(max(blocks.shape[0], 1), -1, -1)
        options = {"own": "mask", "block_q": block_q, "block_k": block_k}
        exact = reference.attend(*(x.double() for x in seq[-3:]), blocks, **options)
        low = low_precision_attend(*seq[-3:], blocks, **options)
        assert_close(out[seq.row, :, seq.rows], exact[0], low[0], what="attend")
        assert_close(lse[seq.row, :, seq.rows], exact[1], low[1], what="attend lse")


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", ["bool", "bits", "csr"])
def test_attend_forms_of_a_mask(heads, batch, form):
    inputs = cases.make_inputs(105, (4, 2), 600, batch=2)
    mask = mask_of(heads, 5, 5, batch)
    if form == "bits":
        given = pack(mask)
    else:
        given = selection.mask_to_csr(mask) if form == "csr" else mask
    out, lse = attend(*inputs, given, return_lse=True)
    check_masked(out, lse, *inputs, mask)


@GEOMETRIES
def test_attend_geometries(case):
    inputs = cases.make_inputs(106, (4, 2), case=case, nan_padding=True)
    mask = mask_of(4, -(-case.seqlen_q // 64), -(-case.seqlen_k // 128))
    options = {"block_q": 64, "return_lse": True}
    out, lse = attend(*inputs, mask, **options, **case.geometry())
    check_masked(out, lse, *inputs, mask, case, 64)
    wide = [x.double() for x in inputs]  # no kernel: through torch, the same function
    through_torch = attend(*wide, mask, **options, **case.geometry())
    torch.testing.assert_close(through_torch[0].float(), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(through_torch[1].float(), lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_q, block_k", [(100, 32), (128, 96), (64, 256)])
def test_attend_takes_any_block_size(block_q, block_k):
    inputs = cases.make_inputs(107, (2, 1), 600)
    mask = mask_of(2, -(-600 // block_q), -(-600 // block_k))
    out, lse = attend(*inputs, mask, block_q=block_q, block_k=block_k, return_lse=True)
    check_masked(out, lse, *inputs, mask, None, block_q, block_k)


def test_attend_packed_and_layouts():
    inputs = cases.make_inputs(108, (4, 2), 700)
    mask = mask_of(4, 6, 6)
    want = attend(*inputs, mask)
    swapped = [x.transpose(1, 2) for x in inputs]
    assert torch.equal(attend(*swapped, mask, layout="bnhd").transpose(1, 2), want)
    cu = torch.tensor([0, 700])
    out = torch.zeros(700, 4, 64)
    packed = [x[0].transpose(0, 1) for x in inputs]
    assert attend(*packed, mask, cu_seqlens_q=cu, out=out) is out
    assert torch.equal(out.transpose(0, 1), want[0])


def test_a_plan_can_be_attended_again():
    """Natural order: the plan's mask, own span included, is a block mask like any other."""
    inputs = cases.make_inputs(109, (4, 2), 900)
    config = config_of(permute="identity", tau=0.5)
    out, plan = pbs_attention(*inputs, config=config, return_plan=True)
    torch.testing.assert_close(attend(*inputs, plan.mask()), out, atol=1e-5, rtol=1e-5)


# ---- build ---------------------------------------------------------------------------------------


def test_build_info_is_plain():
    info = pbs_attn.build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["version"] == pbs_attn.__version__ and info["torch"] == torch.__version__
    assert info["isa"]["float32"] in info["cpu"] and info["cpu"]["c"] is True
    assert info["libraries"]["cpu"]["file"]


def test_examples_of_the_docstrings():
    for module in (pbs_attn.interface, pbs_attn.routing, pbs_attn.stats):
        failed, tried = doctest.testmod(module)
        assert tried and not failed, module.__name__
