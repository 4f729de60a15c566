# SPDX-License-Identifier: Apache-2.0
"""What torch must know of the ops besides their kernels: shapes, and that there is no backward.

Fakes give the shapes, dtypes and strides of the real results for symbolic sizes, so that
torch.compile and opcheck can trace them. The Autograd kernels raise for an input that requires
grad: without them torch would cut the graph without a word.
"""

import torch

from . import _load
from .geometry import ceil_div
from .selection import NAMES, PERMUTES_QUERIES, num_words

NAMESPACE = "pbs_attn"
OPS = ("score", "permute", "select", "attend", "attend_out", "prefill", "prefill_out")

_GROUP = NAMES["gqa"]["group"]
_QUERY_MODES = tuple(NAMES["permute"][name] for name in PERMUTES_QUERIES)


class _Sizes:
    """Sizes of a call: num sequences, heads, and the lengths that plans are sized by."""

    def __init__(self, q, k, vectors, max_seqlen_q, max_seqlen_k, gqa=0):
        self.batch, self.num_heads, self.seqlen_q, self.head_dim = q.shape
        self.num_heads_k = k.shape[1]
        self.num = next((v.shape[0] for v in vectors if v is not None), self.batch)
        self.num_perms = self.num_heads_k if gqa == _GROUP else self.num_heads
        self.max_q = max_seqlen_q or self.seqlen_q
        self.max_k = max_seqlen_k or k.shape[2]


def _out_and_lse(q, return_lse):
    batch, num_heads, seqlen_q, head_dim = q.shape
    out = q.new_empty(batch, seqlen_q, num_heads, head_dim)
    lse_shape = (batch, num_heads, seqlen_q) if return_lse else (0,)
    return out, q.new_empty(lse_shape, dtype=torch.float32)


def _score(
    q, k, q_start, q_len, kv_start, kv_len, max_seqlen_q, max_seqlen_k, softmax_scale,
    block_size, segment_size, gqa, order, seed, isa=0,
):  # fmt: skip
    vectors = (q_start, q_len, kv_start, kv_len)
    s = _Sizes(q, k, vectors, max_seqlen_q, max_seqlen_k, gqa)
    return q.new_empty(s.num, s.num_perms, s.max_k, dtype=torch.float32)


def _permute(
    q, k, v, score, k_perm_in, permute_heads, q_start, q_len, kv_start, kv_len, max_seqlen_q,
    max_seqlen_k, block_size, segment_size, gqa, permute_mode, pack, isa=0, correction=0,
):  # fmt: skip
    vectors = (q_start, q_len, kv_start, kv_len)
    s = _Sizes(q, k, vectors, max_seqlen_q, max_seqlen_k, gqa)
    k_perm = q.new_empty(s.num, s.num_perms, s.max_k, dtype=torch.int32)
    rows = s.max_q if permute_mode in _QUERY_MODES else 0
    q_perm = q.new_empty(s.num, s.num_heads, rows, dtype=torch.int32)
    pool_shape = (s.num, s.num_perms, ceil_div(s.max_k, block_size), s.head_dim)
    pools = [q.new_empty(pool_shape, dtype=torch.float32) for _ in range(2)]
    packed_bytes = 0
    if pack:
        packed_bytes = _load.kv_packed_bytes(
            q.device, int(s.num), int(s.num_heads), int(s.num_heads_k), int(s.max_q), int(s.max_k),
            int(s.head_dim), q.dtype, block_size, segment_size, gqa, permute_mode, isa, correction,
        )  # fmt: skip
    return k_perm, q_perm, *pools, q.new_empty(packed_bytes, dtype=torch.uint8)


def _select(
    q, k, k_pool, k_perm, q_perm, tau_heads, q_start, q_len, kv_start, kv_len, max_seqlen_q,
    max_seqlen_k, softmax_scale, block_size, segment_size, gqa, permute_mode, method, stride,
    reduce, rule, tau, return_mass, isa=0, normalize=0,
):  # fmt: skip
    vectors = (q_start, q_len, kv_start, kv_len)
    s = _Sizes(q, k, vectors, max_seqlen_q, max_seqlen_k)
    tq, tk = ceil_div(s.max_q, block_size), ceil_div(s.max_k, block_size)
    rows = (s.num, s.num_heads, tq)
    bits = q.new_empty(*rows, num_words(tk), dtype=torch.int32)
    count = q.new_empty(rows, dtype=torch.int32)
    mass_shape = (*rows, tk) if return_mass else (s.num, s.num_heads, 0, 0)
    return bits, count, q.new_empty(mass_shape, dtype=torch.float32)


def _attend(
    q, k, v, packed, bits, q_perm, q_start, q_len, kv_start, kv_len, max_seqlen_q, max_seqlen_k,
    softmax_scale, block_q, block_k, segment_size, gqa, own, return_lse, isa=0,
    correction=0,
):  # fmt: skip
    return _out_and_lse(q, return_lse)


def _prefill(
    q, k, v, k_perm_in, permute_heads, tau_heads, q_start, q_len, kv_start, kv_len, max_seqlen_q,
    max_seqlen_k, softmax_scale, block_size, segment_size, gqa, permute_mode, order, seed, method,
    stride, reduce, rule, tau, return_lse, return_plan, isa=0, normalize=0, correction=0,
):  # fmt: skip
    vectors = (q_start, q_len, kv_start, kv_len)
    s = _Sizes(q, k, vectors, max_seqlen_q, max_seqlen_k, gqa)
    rows = (s.num, s.num_heads, ceil_div(s.max_q, block_size))
    count = q.new_empty(rows, dtype=torch.int32)
    bits_shape, perm_shape = (0,), (0,)
    if return_plan:
        bits_shape = (*rows, num_words(ceil_div(s.max_k, block_size)))
        perm_shape = (s.num, s.num_perms, s.max_k)
    bits = q.new_empty(bits_shape, dtype=torch.int32)
    k_perm = q.new_empty(perm_shape, dtype=torch.int32)
    return *_out_and_lse(q, return_lse), count, bits, k_perm


def _nothing(*args, **kwargs):
    return None


_FAKES = {
    "score": _score,
    "permute": _permute,
    "select": _select,
    "attend": _attend,
    "attend_out": _nothing,
    "prefill": _prefill,
    "prefill_out": _nothing,
}


def refuse_grad(name, tensors):
    """Raise if autograd would have to differentiate through the call."""
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise RuntimeError(
                f"{name}: an input of shape {tuple(tensor.shape)} requires grad, and there is no "
                "backward; call it under torch.no_grad() or on detached tensors"
            )


def _refusing(name):
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def autograd(keyset, *args, **kwargs):
        refuse_grad(f"{NAMESPACE}::{name}", (*args, *kwargs.values()))
        below = keyset & torch._C._after_autograd_keyset
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(below, *args, **kwargs)

    return autograd


def register():
    """Register both for every op; the returned library keeps the registrations alive."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    for name in OPS:
        torch.library.register_fake(f"{NAMESPACE}::{name}", _FAKES[name], lib=library)
        library.impl(name, _refusing(name), "Autograd", with_keyset=True)
    return library
