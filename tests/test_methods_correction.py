# SPDX-License-Identifier: Apache-2.0
"""correction=mean of block methods: what is not selected stands as its means. By loops, in fp64."""

from dataclasses import dataclass
from typing import ClassVar

import block_methods as brute
import cases
import pytest
import torch
from harness import sequences_of
from numerics import assert_close, low_precision_attend
from test_methods_blocks import Largest
from test_methods_blocks_calls import ALL, KEEP_ALL

import pbs_attn
from pbs_attn import dense, devices, methods, selection
from pbs_attn.geometry import Geometry
from pbs_attn.methods import base

D = 16
# (Nq, Nk): ragged on both sides, a chunk, rows before the first key, more rows than a block.
SHAPES = [(221, 221), (70, 291), (1, 200), (160, 150), (257, 330)]
SIZES = [(64, 64), (128, 64), (64, 128), (256, 128)]


@dataclass(frozen=True, kw_only=True)
class Drawn(base.BlockMethod):
    """A mask drawn for the shape, of every query head or of every key head."""

    NAME: ClassVar[str] = "drawn"
    rows: int = 64
    keys: int = 64
    per_key_head: bool = False
    share: float = 0.4
    block_q = property(lambda self: self.rows)
    block_k = property(lambda self: self.keys)

    def blocks(self, call):
        causal = base.causal_blocks(call, self.rows, self.keys)
        heads = call.k if self.per_key_head else call.q
        generator = torch.Generator().manual_seed(causal.numel())
        return torch.rand(heads.shape[0], *causal.shape, generator=generator) < self.share


def check(method, seq, out, lse, what):
    """One sequence of a call against the loops over the method's own blocks."""
    head_dim = seq.q.shape[2]
    blocks = base.checked_blocks(method, methods.Call(seq.q, seq.k, seq.v, head_dim**-0.5))
    blocks = blocks.repeat_interleave(len(seq.q) // len(blocks), 0)
    sizes = {"block_q": method.block_q, "block_k": method.block_k, "correction": method.correction}
    exact = []
    for h, q in enumerate(seq.q.double()):
        kv = h * len(seq.k) // len(seq.q)
        head = brute.Head(q, seq.k[kv].double(), head_dim**-0.5)
        v, mask = seq.v[kv].double(), blocks[h].tolist()
        exact.append(brute.attend(head, v, mask, **sizes, dtype=seq.k.dtype))
    low = low_precision_attend(seq.q, seq.k, seq.v, blocks, own="mask", **sizes)
    for name, got, place in (("out", out, 0), ("lse", lse, 1)):
        want = torch.stack([head[place] for head in exact])
        # What a sum over the keys, one after another, may walk in a kernel: as in harness.py.
        noise = seq.k.shape[1] ** 0.5 * 2.0**-24 * want[want.isfinite()].abs().amax().item()
        assert_close(got, want, low[place], what=f"{what} {name}", noise=noise)


# ---- both routes ---------------------------------------------------------------------------------

# (head_dim, dtype): what our kernels take, and what torch computes.
ROUTES = {
    "kernel": [(D, torch.float32), (D, torch.bfloat16), (D, torch.float16)],
    "torch": [(12, torch.float32), (12, torch.bfloat16), (D, torch.float64)],
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_the_definition(route, shape, sizes):
    """In turn every dtype of the route, and a selection per query head or one per key head."""
    turn = SHAPES.index(shape) + SIZES.index(sizes)
    head_dim, dtype = ROUTES[route][turn % 3]
    inputs = cases.make_inputs(turn, (4, 2), *shape, head_dim=head_dim, dtype=dtype)
    assert (devices.kernel_lacks(*inputs) is None) == (route == "kernel")
    rows, keys = sizes
    method = Drawn(rows=rows, keys=keys, per_key_head=turn % 2 > 0, correction="mean")
    out, lse, _ = methods.run(method, *inputs, return_lse=True)
    (seq,) = sequences_of(*inputs)
    check(method, seq, out[0], lse[0], f"{dtype} {shape} {method.text}")


PADDED = [
    cases.Case("left", 290, 290, (0, 60), (290, 230), (0, 60), (290, 230)),
    cases.Case("chunk", 70, 300, q_len=(70, 33), kv_len=(300, 201)),
]


@pytest.mark.parametrize("case", PADDED, ids=lambda case: case.name)
@pytest.mark.parametrize("text", ALL)
def test_every_block_method(text, case):
    """Each sequence of a batch as a call of its own; nan around them."""
    method = methods.get(text).replace(correction="mean", min_q=0, min_kv=0, strict=True)
    method = method.replace(block_size=64)
    inputs = cases.make_inputs(3, (2, 1), head_dim=D, case=case, nan_padding=True)
    out, lse = pbs_attn.pbs_attention(*inputs, config=method, return_lse=True, **case.geometry())
    for seq in sequences_of(*inputs, case):
        if seq.q.shape[1] and seq.k.shape[1]:
            part = out[seq.row, :, seq.rows], lse[seq.row, :, seq.rows]
            check(method, seq, *part, f"{text} {case.name}")


def call_both(method, inputs):
    """(out, record) without and with the correction."""
    for correction in ("none", "mean"):
        policy = method.replace(correction=correction, min_q=0, min_kv=0, strict=True)
        with pbs_attn.record() as record:
            yield pbs_attn.pbs_attention(*inputs, config=policy), record


@pytest.mark.parametrize("text", ALL)
def test_it_selects_and_counts_nothing_else(text):
    """The same blocks and the same density; another result."""
    inputs = cases.make_inputs(4, (4, 2), 900, head_dim=D)
    (plain, before), (corrected, after) = call_both(methods.get(text), inputs)
    assert before.layers == after.layers and before.density == after.density < 1
    assert before.computed == after.computed
    assert not torch.equal(plain, corrected)


@pytest.mark.parametrize("text", KEEP_ALL)
def test_nothing_dropped_changes_no_bit(text):
    inputs = cases.make_inputs(5, (4, 2), 333, 900, head_dim=D)
    (plain, _), (corrected, record) = call_both(methods.get(text), inputs)
    assert torch.equal(plain, corrected) and record.density == 1.0


@pytest.mark.parametrize("head_dim", [D, 12])
def test_equal_keys_and_any_values_are_exact(head_dim):
    """A dropped block whose keys are one and the same loses nothing: what is left is dense."""
    q, k, v = cases.make_inputs(6, (4, 2), 640, head_dim=head_dim)
    k = k.unflatten(2, (-1, 64))[:, :, :, :1].expand(-1, -1, -1, 64, -1).flatten(2, 3)

    @dataclass(frozen=True, kw_only=True)
    class Own(Drawn):
        def blocks(self, call):
            own = base.own_blocks(call, self.rows, self.keys)
            return own.expand(call.q.shape[0], -1, -1)

    out, lse, _ = methods.run(Own(correction="mean"), q, k, v, return_lse=True)
    exact = pbs_attn.reference.attend(*(x[0].double() for x in (q, k, v)), own="all")
    low = low_precision_attend(q[0], k[0], v[0], None, own="all")
    assert_close(out[0], exact[0], low[0], noise=64**0.5 * 2.0**-24)
    assert_close(lse[0], exact[1], low[1])


def test_torch_never_holds_n_by_n(monkeypatch):
    """4,096 tokens of fp64: no tensor larger than keys, values and a few strips."""
    monkeypatch.setattr(dense, "CELLS", 2**17)
    inputs = cases.make_inputs(7, (2, 1), 4096, head_dim=8, dtype=torch.float64)
    call = methods.Call(*(x[0] for x in inputs), 1.0)
    blocks = base.checked_blocks(Drawn(), call)
    bits = selection.mask_to_bits(blocks)[None]
    with Largest() as largest:
        dense.selected(*inputs, bits, blocks.shape[2], Geometry(), 1.0, 64, 64, True, "mean")
    assert largest.numel <= 2**18


# ---- what has no correction ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("minference:correction=mean", "'minference': got 'correction=mean'; allowed"),
        ("s2o:correction=mean", "'s2o': got 'correction=mean'; allowed"),
        ("full:correction=mean", "'full' has no parameters; got 'correction=mean'"),
        ("flashprefill:correction=median", "flashprefill: correction is 'median'; allowed: none"),
        ("oracle:correction=1", "oracle: correction is '1'; allowed: none, mean"),
        ("meanpool:recipe=authors,correction=1", "meanpool: correction is '1'; allowed: none"),
        ("pbs:correction=median", "pbs: correction is 'median'; allowed: none, mean"),
    ],
)  # fmt: skip
def test_refused_by_name(text, said):
    with pytest.raises(ValueError, match=said):
        methods.get(text)


def test_bsfa_has_none(tmp_path):
    """Its dropped blocks have exact logits; means of keys would add nothing."""
    path = tmp_path / "thresholds.json"
    path.write_text('{"method": "bsfa", "block_q": 128, "block_k": 64, "layers": {"64": [[[0]]]}}')
    assert methods.get(f"bsfa:thresholds={path}").correction == "none"
    with pytest.raises(ValueError, match="bsfa: correction is 'mean'; allowed: none"):
        methods.get(f"bsfa:thresholds={path},correction=mean")


def test_padding_in_one_torch_call_is_refused():
    """Methods cut sequences out first; whoever calls `dense` with padding must not get nonsense."""
    q, k, v = cases.make_inputs(8, (2, 1), 200, head_dim=12)
    mask = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    geometry = Geometry(kv_len=torch.tensor([100], dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="correction is 'mean' for padded"):
        dense.corrected(q, k, v, geometry, 1.0, False, mask, 64, 64)
