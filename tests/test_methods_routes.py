# SPDX-License-Identifier: Apache-2.0
"""Methods as policies of a call and of a model: what runs, what goes dense, what is counted."""

from dataclasses import dataclass
from typing import ClassVar

import cases
import pytest
import torch
from harness import sequences_of
from numerics import assert_close, low_precision_attend
from toy_methods import Everything, Softmax, Some, sparse

from pbs_attn import PBSConfig, attend, env, methods, pbs_attention, reference, routing, supports
from pbs_attn import record as recording
from pbs_attn.methods import base

KERNELS = ("pbs", "pbs+", "identity", "meanpool", "xattention", "peak")
ALL_LENGTHS = ",min_q=0,min_kv=0"
GEOMETRIES = pytest.mark.parametrize("case", cases.geometries(), ids=lambda case: case.name)


def check_dense(out, lse, inputs, case=None):
    """out is exact dense attention of every sequence."""
    for seq in sequences_of(*inputs, case):
        exact = reference.attend(seq.q.double(), seq.k.double(), seq.v.double(), own="all")
        low = low_precision_attend(seq.q, seq.k, seq.v, None, own="all")
        assert_close(out[seq.row, :, seq.rows], exact[0], low[0])
        if lse is not None:
            assert_close(lse[seq.row, :, seq.rows], exact[1], low[1], what="lse")


# ---- what runs -----------------------------------------------------------------------------------


@GEOMETRIES
@pytest.mark.parametrize(
    "method", (sparse(Everything), sparse(Everything, per_key_head=True), sparse(Softmax)),
    ids=("block", "block-gqa", "token"),
)  # fmt: skip
def test_padding_batches_and_chunks(method, case):
    """Each sequence alone, whatever lies around it: nan there, and no key of its neighbour."""
    inputs = cases.make_inputs(21, (4, 2), case=case, nan_padding=True)
    wants_lse = method.kind == "block"
    with recording() as calls:
        found = pbs_attention(*inputs, config=method, return_lse=wants_lse, **case.geometry())
    out, lse = found if wants_lse else (found, None)
    assert out.transpose(1, 2).is_contiguous()
    check_dense(out, lse, inputs, case)
    assert calls.calls == {"pbs": 1, "dense": 0}
    assert calls.density == calls.computed == 1.0
    outside = torch.ones(out.shape[0], out.shape[2], dtype=torch.bool)
    for seq in sequences_of(*inputs, case):
        outside[seq.row, seq.rows] = False
    assert (out.transpose(1, 2)[outside] == 0).all()


@pytest.mark.parametrize("sizes", ((128, 128), (64, 64), (64, 128), (256, 128), (256, 256)))
@GEOMETRIES
def test_blocks_and_their_count(case, sizes):
    """A method's mask is what `attend` runs, and its density is that of a count by hand."""
    method = sparse(Some, rows=sizes[0], keys=sizes[1])
    inputs = cases.make_inputs(22, (4, 2), case=case, nan_padding=True)
    with recording() as calls:
        out, lse = pbs_attention(*inputs, config=method, return_lse=True, **case.geometry())
    kept, total = torch.zeros(4, dtype=torch.float64), 0
    for seq in sequences_of(*inputs, case):
        call = base.Call(seq.q, seq.k, seq.v, 64**-0.5)
        blocks = method.blocks(call)
        part = attend(
            seq.q[None], seq.k[None], seq.v[None], blocks[None],
            block_q=sizes[0], block_k=sizes[1], return_lse=True,
        )  # fmt: skip
        assert torch.equal(out[seq.row, :, seq.rows], part[0][0])
        assert torch.equal(lse[seq.row, :, seq.rows], part[1][0])
        for head in range(4):
            pairs = count_pairs(blocks[head], seq.q.shape[1], seq.k.shape[1], *sizes)
            kept[head] += sum(pairs.values())
        total += len(pairs)
    heads = calls.layers[None]
    assert heads == pytest.approx((kept / total).tolist() if total else [1.0] * 4, rel=1e-12)


def count_pairs(blocks, num_q, num_k, block_q, block_k):
    """{(m, n): share} of causal pairs, cell block by cell block."""
    shares = {}
    step_q, step_k = min(block_q, 128), min(block_k, 128)
    for m in range(-(-num_q // 128)):
        for n in range(-(-num_k // 128)):
            kept = causal = 0
            for row in range(128 * m, min(128 * m + 128, num_q), step_q):
                last = min(row + step_q, num_q) - 1 + num_k - num_q
                for key in range(128 * n, min(128 * n + 128, num_k), step_k):
                    causal += key <= last
                    kept += key <= last and bool(blocks[row // block_q, key // block_k])
            if causal:
                shares[m, n] = kept / causal
    return shares


def test_density_counted_by_hand():
    """300 tokens: 6 causal pairs. Of blocks of 64, 3 of the 4 in a full pair on the diagonal are
    causal, and 1 in the last one."""
    q = torch.zeros(1, 300, 8)
    call = base.Call(q, q, q, 1.0)
    assert base.causal_pairs(call) == 6
    assert base.checked_blocks(Everything(), call).tolist() == [base.causal_blocks(call).tolist()]
    own = base.own_blocks(call, 64, 64)[None]
    assert base.block_pairs(call, own, 64, 64).tolist() == [pytest.approx(2 / 3 + 2 / 3 + 1)]
    assert base.block_pairs(call, base.own_blocks(call)[None]).tolist() == [3]
    cells = torch.eye(300, dtype=torch.bool)[None]
    pairs = base.cell_pairs(call, cells[:, :256], 0) + base.cell_pairs(call, cells[:, 256:], 256)
    assert pairs.tolist() == [pytest.approx(2 * 128 / (128 * 129 / 2) + 44 / (44 * 45 / 2))]


def test_own_and_causal_blocks_of_a_chunk():
    """40 rows at positions 260 .. 299 and keys in blocks of 128 and 64."""
    call = base.Call(torch.zeros(1, 40, 8), torch.zeros(1, 300, 8), torch.zeros(1, 300, 8), 1.0)
    assert call.q_offset == 260 and call.group == 1
    assert base.own_blocks(call).tolist() == [[False, False, True]]
    assert base.causal_blocks(call, 64, 64).tolist() == [[True] * 5]
    unseen = base.Call(torch.zeros(1, 300, 8), torch.zeros(1, 40, 8), torch.zeros(1, 40, 8), 1.0)
    assert base.causal_blocks(unseen).tolist() == [[False], [False], [True]]
    assert base.own_blocks(unseen).tolist() == [[False], [False], [True]]


@pytest.mark.parametrize("method", (Everything, Softmax), ids=("block", "token"))
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_strides_and_dtypes(method, dtype, layout):
    inputs = cases.make_inputs(23, (4, 2), 300, dtype=dtype, layout=layout)
    check_dense(pbs_attention(*inputs, config=sparse(method)), None, inputs)


def test_tensors_that_kernels_do_not_take():
    """Block methods go through torch there: other head_dims, other dtypes, slices along D."""
    q, k, v = cases.make_inputs(24, (4, 2), 300, head_dim=24)
    for inputs in ((q[..., :12], k[..., :12], v), (q.double(), k.double(), v.double())):
        with recording() as calls:
            check_dense(pbs_attention(*inputs, config=sparse(Everything)), None, inputs)
        assert calls.calls["pbs"] == 1
    inputs = (q[..., ::2], k[..., ::2], v[..., ::2])
    check_dense(pbs_attention(*inputs, config=sparse(Everything)), None, inputs)


def test_out_is_written_where_the_sequences_are():
    case = next(case for case in cases.geometries() if case.name == "left_padding")
    inputs = cases.make_inputs(25, (4, 2), case=case)
    out = torch.full_like(inputs.q, 7.0)
    found = pbs_attention(*inputs, config=sparse(Everything), out=out, **case.geometry())
    assert found is out
    check_dense(out, None, inputs, case)
    assert (out[1, :, : case.q_start[1]] == 7.0).all()


# ---- kernel methods ------------------------------------------------------------------------------


@pytest.mark.parametrize("block", (64, 128, 256))
@pytest.mark.parametrize("name", KERNELS)
def test_keeping_everything_is_full(name, block):
    inputs = cases.make_inputs(26, (4, 2), 900)
    text = f"{name}:block={block}," + methods.find(name).KEEP_ALL + ALL_LENGTHS
    with recording() as calls:
        out, lse = pbs_attention(*inputs, config=text, return_lse=True)
    check_dense(out, lse, inputs)
    assert calls.calls == {"pbs": 1, "dense": 0} and calls.density == 1.0
    check_dense(pbs_attention(*inputs, config="full"), None, inputs)


def test_every_method_can_keep_everything():
    """At the setting that it names itself; best has none, bsfa needs a file and its own test."""
    inputs = cases.make_inputs(39, (4, 2), 400)
    for name in methods.METHODS:
        cls = methods.find(name)
        if not cls.KEEP_ALL or "FILE" in cls.KEEP_ALL:
            assert name in ("sdpa", "full", "bsfa", "best")
            continue
        with recording() as calls:
            out = pbs_attention(*inputs, config=f"{name}:{cls.KEEP_ALL}" + ALL_LENGTHS)
        check_dense(out, None, inputs)
        assert calls.calls["pbs"] == 1 and calls.density == 1.0, name


@pytest.mark.parametrize(
    "text", ("pbs", "pbs:segment=512", "xattention:stride=16", "pbs:gqa=group")
)
def test_kernel_methods_are_their_config(text):
    inputs = cases.make_inputs(27, (4, 2), 900)
    config = PBSConfig.from_method(text + (":" if ":" not in text else ",") + "min_q=0,min_kv=0")
    with recording() as theirs:
        expected = pbs_attention(*inputs, config=config, return_plan=True)
    with recording() as ours:
        found = pbs_attention(
            *inputs, config=methods.get(text).replace(min_q=0, min_kv=0), return_plan=True
        )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1].bits, expected[1].bits)
    assert ours.layers == theirs.layers and ours.computed == theirs.computed


@pytest.mark.parametrize("block", (64, 256))
@pytest.mark.parametrize("name", ("pbs", "xattention"))
@GEOMETRIES
def test_kernel_methods_count_pairs_whatever_their_blocks(case, name, block):
    inputs = cases.make_inputs(28, (4, 2), case=case)
    method = methods.get(f"{name}:tau=0.5,block={block}" + ALL_LENGTHS)
    with recording() as calls:
        out, plan = pbs_attention(*inputs, config=method, return_plan=True, **case.geometry())
    assert torch.equal(out, pbs_attention(*inputs, config=method, **case.geometry()))
    mask, kept, total = plan.mask(), torch.zeros(4, dtype=torch.float64), 0
    for seq in sequences_of(*inputs, case):
        for head in range(4):
            shape = (seq.q.shape[1], seq.k.shape[1])
            pairs = count_pairs(mask[seq.index, head], *shape, block, block)
            kept[head] += sum(pairs.values())
        total += len(pairs)
    expected = (kept / total).tolist() if total else [1.0] * 4
    assert calls.layers[None] == pytest.approx(expected, rel=1e-12)
    assert calls.computed == pytest.approx(calls.density)  # natural rows: what is chosen runs


@pytest.mark.parametrize(("block", "extra"), ((64, 4 * 6 / 4), (128, 4 * 1), (256, 0)))
def test_computed_holds_what_permuted_queries_add(block, extra):
    """Above the diagonal of each of 4 segments: 3 + 2 + 1 blocks of 64, 1 of 128, none of 256."""
    inputs = cases.make_inputs(29, (2, 1), 1024)
    with recording() as calls:
        pbs_attention(*inputs, config=f"pbs:permute=both,block={block}" + ALL_LENGTHS)
    assert (calls.computed - calls.density) * 36 == pytest.approx(extra)


def test_thresholds_are_tau_per_head(tmp_path):
    path, tau = tmp_path / "tau.json", [[0.9] * 4, [0.1, 0.5, 0.9, 1.0]]
    path.write_text(str(tau))
    q, k, v = cases.make_inputs(30, (4, 2), 900)
    method = methods.get(f"xattention:thresholds={path}" + ALL_LENGTHS)
    expected = pbs_attention(q, k, v, config=method.config, tau=torch.tensor(tau[1]))
    from pbs_attn import prefill
    from pbs_attn.geometry import Geometry

    with recording() as calls:
        out, _, _ = prefill.attention(q, k, v, method, Geometry(), layer=1)
    assert torch.equal(out, expected)
    assert calls.layers[1] == sorted(calls.layers[1]) and calls.layers[1][3] == 1.0
    with pytest.raises(ValueError, match="per layer"):
        pbs_attention(q, k, v, config=method)
    given = pbs_attention(q, k, v, config=method, tau=torch.tensor(tau[1]))
    assert torch.equal(given, expected)


# ---- what does not run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "changes", "grad"),
    [
        ("short_q", {"min_q": 301}, False),
        ("short_kv", {"min_kv": 301}, False),
        ("grad", {}, True),
    ],
)
@pytest.mark.parametrize("method", (Everything, Softmax), ids=("block", "token"))
def test_reasons_for_the_dense_route(method, reason, changes, grad):
    q, k, v = cases.make_inputs(31, (4, 2), 300)
    policy = sparse(method).replace(strict=False, **changes)
    q.requires_grad_(grad)
    assert supports(q, k, v, policy) == reason
    if grad:
        return  # pbs_attention itself refuses it
    with recording() as calls:
        check_dense(pbs_attention(q, k, v, config=policy), None, (q, k, v))
    assert calls.reasons == {reason: 1} and calls.density == 1.0


def test_measured_lengths_hold_for_methods():
    q, k, v = cases.make_inputs(32, (2, 1), 300)
    assert supports(q, k, v, Everything()) == "short_q"
    assert supports(q, k, v, "streaming:min_q=0,min_kv=0") is None
    assert routing.min_lengths(Everything(), q.device) == routing.MIN_LENGTHS["cpu"]


def test_full_says_asked_and_is_never_strict():
    q, k, v = cases.make_inputs(33, (2, 1), 300)
    with recording() as calls:
        pbs_attention(q, k, v, config=methods.get("full").replace(strict=True))
    assert calls.calls == {"pbs": 0, "dense": 1} and calls.reasons == {"asked": 1}
    assert supports(q, k, v, "full") == "asked"


def test_disabled(monkeypatch):
    monkeypatch.setattr(env, "current", env.Environment(disable=True))
    q, k, v = cases.make_inputs(34, (2, 1), 300)
    with recording() as calls:
        pbs_attention(q, k, v, config=sparse(Everything))
    assert calls.reasons == {"disabled": 1}


@pytest.mark.parametrize(
    ("method", "options", "error", "said"),
    [
        (Softmax, {"return_lse": True}, NotImplementedError, "softmax is a token method"),
        (Softmax, {"return_plan": True}, NotImplementedError, "return_plan is True, and softmax"),
        (Everything, {"return_plan": True}, NotImplementedError, "everything is a block method"),
        (Everything, {"tau": 0.5}, ValueError, "tau is given; allowed: None, as config is 'every"),
        (Softmax, {"permute_heads": torch.ones(2)}, ValueError, "permute_heads is given"),
    ],
)
def test_what_methods_have_not_is_refused_by_name(method, options, error, said):
    inputs = cases.make_inputs(35, (2, 1), 300)
    for policy in (sparse(method), method()):  # the dense route promises no more
        with pytest.raises(error, match=said):
            pbs_attention(*inputs, config=policy, **options)


def test_errors_of_policies():
    inputs = cases.make_inputs(36, (2, 1), 300)
    with pytest.raises(ValueError, match="config is 'sdpa', the model's own; allowed: 'full'"):
        pbs_attention(*inputs, config="sdpa")
    with pytest.raises(ValueError, match="config is 'magic': method is 'magic'"):
        pbs_attention(*inputs, config="magic")
    with pytest.raises(TypeError, match="config is a int; allowed: a PBSConfig or None"):
        pbs_attention(*inputs, config=3)


def test_a_mask_of_the_wrong_shape_is_named():
    @dataclass(frozen=True, kw_only=True)
    class Wrong(base.BlockMethod):
        NAME: ClassVar[str] = "wrong"

        def blocks(self, call):
            return torch.ones(1, 3, 3, dtype=torch.bool)

    with pytest.raises(TypeError, match=r"wrong: blocks gave .* \[4 or 2, 3, 3\]"):
        pbs_attention(*cases.make_inputs(37, (4, 2), 300), config=sparse(Wrong))


# ---- environment ---------------------------------------------------------------------------------


def test_the_environment_names_methods():
    found = env.read_environment({"PBS_ATTN_CONFIG": "xattention:stride=16"})
    assert found.config == methods.get("xattention:stride=16")
    for text, said in (("pbs:tau=x", "tau is 'x'"), ("sdpa", "the model's own"), ("sda", "sda")):
        with pytest.raises(ValueError, match=f"PBS_ATTN_CONFIG: .*{said}"):
            env.read_environment({"PBS_ATTN_CONFIG": text})


def test_the_environment_is_the_default(monkeypatch):
    monkeypatch.setattr(env, "current", env.Environment(config=sparse(Everything)))
    inputs = cases.make_inputs(38, (2, 1), 300)
    with recording() as calls:
        check_dense(pbs_attention(*inputs), None, inputs)
    assert calls.calls == {"pbs": 1, "dense": 0}
