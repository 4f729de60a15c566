# SPDX-License-Identifier: Apache-2.0
"""Bad input of every kind: an error that names the argument, its value and what is allowed, before
anything is written."""

import pytest
import torch

from pbs_attn import PBSConfig, attend, ops, pbs_attention, supports, workspace_size
from pbs_attn.selection import BlockCSR

N, D = 600, 64
Q, K = torch.zeros(2, 4, N, D), torch.zeros(2, 2, N, D)
SPARSE = PBSConfig(min_q=0, min_kv=0, strict=True)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


# what is changed in a good call -> error and text
BAD_CALLS = {
    "q no tensor": ({"q": [1]}, TypeError, "q is list"),
    "q rank": ({"q": Q[0]}, ValueError, r"q is 3-dimensional \(4, 600, 64\).*4 dimensions"),
    "v rank": ({"v": K[None]}, ValueError, "v is 5-dimensional"),
    "integer dtype": ({"q": Q.int()}, TypeError, "q is torch.int32.*floating point"),
    "dtypes differ": ({"k": K.half()}, TypeError, "k is torch.float16.*dtype of q, torch.float32"),
    "devices differ": ({"v": K.to("meta")}, ValueError, "v is on meta.*device of q, cpu"),
    "batches differ": ({"k": K[:1], "v": K[:1]}, ValueError, "k batch is 1.*2"),
    "k and v differ": ({"v": K[:, :, 1:]}, ValueError, r"v is \(2, 2, 599\).*\(2, 2, 600\)"),
    "head_dims differ": ({"k": K[..., :32]}, ValueError, "k head_dim is 32.*64"),
    "heads do not divide": ({"q": Q[:, :3]}, ValueError, "q heads is 3.*multiple of the 2 heads"),
    "no key heads": ({"k": K[:, :0], "v": K[:, :0]}, ValueError, "q heads is 4"),
    "layout": ({"layout": "bshd"}, ValueError, "layout is 'bshd'.*bhnd, bnhd"),
    "config": ({"config": {"tau": 0.9}}, TypeError, "config is a dict.*PBSConfig"),
    "scale 0": ({"softmax_scale": 0.0}, ValueError, "softmax_scale is 0.0"),
    "scale nan": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale is nan"),
    "scale text": ({"softmax_scale": "1"}, TypeError, "softmax_scale is '1'"),
    "tau nan": ({"tau": float("nan")}, ValueError, "tau is nan"),
    "tau shape": ({"tau": torch.ones(3)}, ValueError, r"tau is of shape \(3,\).*\[4\]"),
    "tau integers": ({"tau": ints(1, 1, 1, 1)}, TypeError, "tau is torch.int32"),
    "tau value": ({"tau": torch.tensor([1, 1, -1, 1.0])}, ValueError, r"tau\[2\] is -1"),
    "tau inf": ({"tau": torch.tensor([1, torch.inf, 1, 1])}, ValueError, r"tau\[1\] is inf"),
    "permute_heads": ({"permute_heads": ints(1, 1)}, ValueError, r"permute_heads is of.*\[4\]"),
    "permute_heads list": ({"permute_heads": [1] * 4}, TypeError, "permute_heads is list"),
    "max_seqlen_q": ({"max_seqlen_q": N + 1}, ValueError, "max_seqlen_q is 601.*0 to 600"),
    "max_seqlen_k": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k is -1"),
    "max_seqlen type": ({"max_seqlen_q": 5.0}, TypeError, "max_seqlen_q is 5.0"),
    "q_len dtype": ({"q_len": torch.ones(2)}, TypeError, "q_len is torch.float32.*int32 or int64"),
    "q_len list": ({"q_len": [1, 2]}, TypeError, "q_len is list"),
    "q_len rank": ({"q_len": ints(5, 5)[None]}, ValueError, r"q_len is \(1, 2\).*one dimension"),
    "q_len size": ({"q_len": ints(5, 5, 5)}, ValueError, "q_len is of length 3.*2"),
    "q_len long": ({"q_len": ints(5, N + 1)}, ValueError, r"q_len\[1\] is 601.*0 to 600"),
    "q_len negative": ({"q_len": ints(-1, 5)}, ValueError, r"q_len\[0\] is -1"),
    "q_len bound": (
        {"q_len": ints(5, 9), "max_seqlen_q": 8},
        ValueError,
        r"q_len\[1\] is 9.*0 to 8",
    ),
    "kv_start": ({"kv_start": ints(0, N + 1)}, ValueError, r"kv_start\[1\] is 601"),
    "kv_start huge": (
        {"kv_start": ints(0, 2**40, dtype=torch.int64)},
        ValueError,
        r"kv_start\[1\] is 1099511627776",
    ),
    "kv span": (
        {"kv_start": ints(0, 200), "kv_len": ints(600, 401)},
        ValueError,
        r"kv_len\[1\] is 401.*0 to 400",
    ),
    "out shape": ({"out": Q[:, :, 1:].clone()}, ValueError, "out is .2, 4, 599, 64"),
    "out rank": ({"out": Q[0].clone()}, ValueError, "out is 3-dimensional"),
    "out dtype": ({"out": Q.half()}, ValueError, "out is torch.float16"),
    "out stride": (
        {"out": torch.zeros(2, 4, N, 2 * D)[..., ::2]},
        ValueError,
        "out is with strides.*unit stride",
    ),
    "cu_seqlens_k alone": ({"cu_seqlens_k": ints(0, 9)}, ValueError, "cu_seqlens_q is None"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_are_named(name):
    changes, error, text = BAD_CALLS[name]
    out = torch.full(Q.shape, 7.0)
    call = {"q": Q, "k": K, "v": K, "config": SPARSE, "out": out} | changes
    q, k, v = call.pop("q"), call.pop("k"), call.pop("v")
    with pytest.raises(error, match=text):
        pbs_attention(q, k, v, **call)
    assert (out == 7).all(), "out was touched"


BAD_PACKED = {
    "rank": ({"q": torch.zeros(1, 600, 4, D)}, ValueError, "q is 4-dimensional.*3 dimensions"),
    "starts at": ({"cu_seqlens_q": ints(1, 600)}, ValueError, r"cu_seqlens_q is \[1, 600\]"),
    "ends at": ({"cu_seqlens_q": ints(0, 599)}, ValueError, r"cu_seqlens_q is \[0, 599\].*600"),
    "descends": ({"cu_seqlens_q": ints(0, 400, 300, 600)}, ValueError, "ascending from 0"),
    "dtype": ({"cu_seqlens_q": torch.ones(3)}, TypeError, "cu_seqlens_q is torch.float32"),
    "empty": ({"cu_seqlens_q": ints(0)}, ValueError, r"cu_seqlens_q is \(1,\).*B >= 1"),
    "sizes": ({"cu_seqlens_k": ints(0, 1, 600)}, ValueError, r"cu_seqlens_k is \(3,\)"),
    "list": ({"cu_seqlens_q": [0, 600]}, TypeError, "cu_seqlens_q is list"),
    "with lengths": ({"q_len": ints(600)}, ValueError, "q_start .. kv_len is given"),
    "max too small": ({"max_seqlen_q": 599}, ValueError, r"q_len\[0\] is 600.*0 to 599"),
}


@pytest.mark.parametrize("name", BAD_PACKED)
def test_bad_packed_calls_are_named(name):
    changes, error, text = BAD_PACKED[name]
    x = torch.zeros(600, 2, D)
    call = {"q": x, "k": x, "v": x, "config": SPARSE, "cu_seqlens_q": ints(0, 600)} | changes
    with pytest.raises(error, match=text):
        pbs_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


MASK = torch.ones(2, 4, 5, 5, dtype=torch.bool)
BAD_MASKS = {
    "type": ({"block_mask": [[True]]}, TypeError, "block_mask is list"),
    "dtype": ({"block_mask": MASK.float()}, TypeError, "block_mask is torch.float32"),
    "rank": (
        {"block_mask": MASK[0]},
        ValueError,
        r"of shape \(4, 5, 5\).*\[2 or 1, 4 or 2 or 1, 5",
    ),
    "batch": ({"block_mask": MASK[:0]}, ValueError, "block_mask is of shape"),
    "heads": ({"block_mask": MASK[:, :3]}, ValueError, "block_mask is of shape"),
    "rows": ({"block_mask": MASK[:, :, 1:]}, ValueError, "block_mask is of shape"),
    "columns": ({"block_mask": MASK[..., 1:]}, ValueError, "block_mask is of shape"),
    "words": ({"block_mask": torch.zeros(2, 4, 5, 2, dtype=torch.int32)}, ValueError, "of shape"),
    "device": ({"block_mask": MASK.to("meta")}, ValueError, "block_mask is on meta"),
    "lists": (
        {"block_mask": BlockCSR(torch.zeros(2, 4, 6, dtype=torch.int64) + 1, ints(9))},
        ValueError,
        "BlockCSR indices span",
    ),
    "block_q": ({"block_q": 0}, ValueError, "block_q is 0"),
    "block_k": ({"block_k": 64.0}, ValueError, "block_k is 64.0"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_block_masks_are_named(name):
    changes, error, text = BAD_MASKS[name]
    out = torch.full(Q.shape, 7.0)
    call = {"block_mask": MASK, "out": out} | changes
    with pytest.raises(error, match=text):
        attend(Q, K, K, call.pop("block_mask"), **call)
    assert (out == 7).all(), "out was touched"


def test_gradients_raise():
    q = Q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="pbs_attention: an input of shape .* requires grad"):
        pbs_attention(q, K, K)
    with pytest.raises(RuntimeError, match="attend: an input .* requires grad"):
        attend(q, K, K, MASK)
    with torch.no_grad():
        pbs_attention(q, K, K, config=SPARSE)


def test_other_functions_check_too():
    with pytest.raises(ValueError, match="q is 3-dimensional"):
        supports(Q[0], K, K)
    with pytest.raises(ValueError, match=r"q_shape is \(4, 600, 64\)"):
        workspace_size((4, 600, 64), K.shape, torch.float32)
    with pytest.raises(TypeError, match="dtype is torch.float64"):
        workspace_size(Q.shape, K.shape, torch.float64)
    with pytest.raises(NotImplementedError, match="head_dim: 12"):
        workspace_size((1, 2, 600, 12), (1, 2, 600, 12), torch.float32)


SCORE = torch.ops.pbs_attn.score
NO_GEOMETRY = (None, None, None, None, 0, 0)
BITS = torch.zeros(2, 4, 5, 1, dtype=torch.int32)
POOL = torch.zeros(2, 4, 5, D)
Q_PERM = torch.arange(N, dtype=torch.int32).repeat(2, 4, 1)

# The C core checks what reaches it by other ways: the ops called directly.
BAD_OPS = {
    "head_dim": (lambda: ops.attend(Q[..., :12], K[..., :12], K[..., :12], own="all"), "head_dim"),
    "block_q": (lambda: ops.attend(Q, K, K, own="all", block_q=32, block_k=32), "block_q"),
    "segment": (lambda: ops.score(Q, K, segment_size=200), "segment_size"),
    "large segment": (lambda: ops.score(Q, K, segment_size=4096), "segment_size"),
    "bits missing": (lambda: ops.attend(Q, K, K, own="segment"), "bits"),
    "stride": (lambda: ops.select(Q, K, method="antidiagonal", stride=7, mode="none"), "stride"),
    "dtype": (lambda: ops.score(Q.double(), K.double()), "dtype"),
    "dtypes differ": (lambda: ops.score(Q, K.half()), "dtype"),
    "heads": (lambda: ops.score(Q[:, :3], K), "heads"),
    "last stride": (lambda: ops.score(Q[..., ::2], K[..., ::2]), "stride"),
    "score shape": (lambda: ops.permute(Q, K, K, torch.zeros(2, 4, 5)), "score"),
    "score missing": (lambda: ops.permute(Q, K, K), "score"),
    "tau_heads": (
        lambda: ops.prefill(Q, K, K, SPARSE, tau_heads=torch.ones(3)),
        "tau_heads",
    ),
    "row shares of means": (
        lambda: ops.select(Q, K, k_pool=POOL, mode="identity", normalize="row"), "normalize: ROW",
    ),
    "row shares of permuted rows": (
        lambda: ops.select(Q, K, method="antidiagonal", mode="queries", q_perm=Q_PERM,
                           normalize="row"),
        "normalize: ROW",
    ),
    "normalize": (
        lambda: torch.ops.pbs_attn.select(Q, K, POOL, None, None, None, *NO_GEOMETRY, 0.0, 128,
                                          256, 0, 1, 0, 8, 0, 0, 0.9, False, 0, 2),
        "normalize: 2",
    ),
    "correction of all": (
        lambda: ops.attend(Q, K, K, own="all", correction="mean"), "correction: 1, but own is ALL",
    ),
    "packed without means": (
        lambda: ops.attend(Q, K, K, BITS, packed=ops.permute(Q, K, K, mode="identity")[4],
                           correction="mean"),
        "packed: made without correction",
    ),
    "isa": (lambda: SCORE(Q, K, *NO_GEOMETRY, 0.0, 128, 256, 0, 0, 0, 99), "isa"),
    "packed": (lambda: ops.attend(Q, K, K, BITS, packed=BITS.new_zeros(64).byte()), "packed"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OPS)
def test_ops_name_the_argument(name):
    call, text = BAD_OPS[name]
    with pytest.raises((ValueError, RuntimeError), match=text):
        call()


def test_a_failing_op_leaves_out_untouched():
    out, lse = torch.full((2, N, 4, D), 7.0), torch.full((2, 4, N), 7.0)
    bits = torch.zeros(2, 4, 5, 1, dtype=torch.int32)
    bad = {"packed": torch.zeros(64, dtype=torch.uint8)}
    for changes in (bad, {"block_q": 96}, {"block_k": 64}, {"segment_size": 100}):
        with pytest.raises((ValueError, RuntimeError)):
            ops.attend_out(Q, K, K, bits, out, lse, **changes)
    with pytest.raises((ValueError, RuntimeError), match="overlap"):
        ops.attend_out(Q, K, K, bits, out[:, :1].expand(2, N, 4, D))
    with pytest.raises((ValueError, RuntimeError)):
        ops.prefill_out(Q, K, K, SPARSE, out, lse, tau_heads=torch.full((4,), torch.nan))
    assert (out == 7).all() and (lse == 7).all()
