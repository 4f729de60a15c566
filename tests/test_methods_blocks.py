# SPDX-License-Identifier: Apache-2.0
"""streaming, oracle, flashprefill, flexprefill: each against its definition in loops."""

import block_methods as brute
import cases
import pytest
import torch
from numerics import assert_same_blocks

from pbs_attn import methods
from pbs_attn.methods import blockmath

# (Nq, Nk): around block edges, an odd length, chunks at aligned and other offsets, one row, rows
# in front of the first key; with them in turn 1, 3 and 4 query heads per key head.
LENGTHS = (1, 127, 128, 129, 255, 256, 257, 701)
SHAPES = [
    *((n, n) for n in LENGTHS),
    (256, 640), (200, 701), (1, 400), (300, 250), (700, 395),
]  # fmt: skip
HEADS = ((2, 2), (3, 1), (8, 2))
ODD, CHUNK, EMPTY_ROWS = (701, 701), (200, 701), (300, 250)
D = 16


def call_of(shape, heads=None, seed=0, dtype=torch.float64):
    """One call, by default of fp64 inputs, so that masks can be compared exactly."""
    heads = heads or HEADS[SHAPES.index(shape) % 3]
    inputs = cases.make_inputs(seed, heads, *shape, head_dim=D, dtype=dtype)
    return methods.Call(*(x[0] for x in inputs), D**-0.5)


def heads_of(call):
    return [brute.Head(call.q[h], call.k[h // call.group], call.scale) for h in range(len(call.q))]


def assert_blocks(text, call, exact):
    """Blocks and density of the method are those of exact, a list of bool [Tq, Tk] per head."""
    method = methods.get(text)
    blocks = method.blocks(call)
    shared = blocks.repeat_interleave(len(exact) // len(blocks), 0)
    assert_same_blocks(shared, torch.stack(exact), what=f"{text} {tuple(call.q.shape)}")
    if causal := methods.base.causal_pairs(call):
        for head, mask, pairs in zip(
            heads_of(call), exact, method.pairs(call, blocks), strict=True
        ):
            by_hand = brute.density(mask, head, method.block_size)
            assert pairs.item() / causal == pytest.approx(by_hand, rel=1e-12)


shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


# ---- streaming -----------------------------------------------------------------------------------


@shapes
def test_streaming(shape):
    call = call_of(shape)
    for size in (64, 128, 256):
        for sink, window in ((0, 1), (1, 65), (128, 200), (130, 128), (0, 4096)):
            exact = brute.streaming(heads_of(call)[0], size, sink, window)
            text = f"streaming:sink={sink},window={window},block={size}"
            assert_blocks(text, call, [exact] * len(call.q))


def test_streaming_by_hand():
    """1,024 tokens, 128 of sink and 256 of window: block 0 and the last three."""
    call = call_of((1024, 1024), (1, 1))
    blocks = methods.get("streaming:window=256").blocks(call)
    for m in range(8):
        kept = sorted({0} | {*range(max(m - 2, 0), m + 1)})
        assert blocks[0, m].nonzero().flatten().tolist() == kept


# ---- oracle --------------------------------------------------------------------------------------


@shapes
def test_oracle(shape):
    call, size = call_of(shape, seed=1), (64, 64, 128, 256)[SHAPES.index(shape) % 4]
    for reduce in ("mean", "max"):
        masses = [brute.oracle_mass(head, size, reduce) for head in heads_of(call)]
        for rule, tau in (
            *(("prefix", tau) for tau in (0.0, 0.5, 0.9, 0.99)),
            *(("budget", count) for count in (0, 1, 2.5, 99)),
            *(("absolute", tau) for tau in (0.0, 0.02, 0.3, 2.0)),
        ):
            exact = [
                brute.oracle(head, size, tau, mass, rule)
                for head, mass in zip(heads_of(call), masses, strict=True)
            ]
            text = f"oracle:tau={tau},reduce={reduce},rule={rule},block={size}"
            assert_blocks(text, call, exact)


@pytest.mark.parametrize("tau", [0.3, 0.9, 0.999])
def test_oracle_covers_tau_with_nothing_to_spare(tau):
    """The kept blocks hold tau of the true mass; without the lightest not own one they do not."""
    call = call_of(ODD, (3, 1), seed=4)
    blocks = methods.get(f"oracle:tau={tau},block=64").blocks(call)
    for h, head in enumerate(heads_of(call)):
        mass = brute.oracle_mass(head, 64, "mean")
        own = brute.Grid(head, 64).own
        for m in range(blocks.shape[1]):
            kept = blocks[h, m].nonzero().flatten().tolist()
            held = sum(mass[m, n] for n in kept)
            assert held >= tau - 1e-12
            others = [mass[m, n] for n in kept if n not in own(m)]
            assert not others or held - min(others) < tau


def test_no_prefix_of_blocks_is_smaller_than_the_oracles():
    """Any other natural-order selection of the same mass computes as many blocks or more."""
    call = call_of(ODD, (2, 1), seed=5)
    other = methods.get("flashprefill:alpha=0.3,window=64,sink=64,last=0,block=64").blocks(call)
    for h, head in enumerate(heads_of(call)):
        mass = brute.oracle_mass(head, 64, "mean")
        for m in range(other.shape[1]):
            held = sum(mass[m, n] for n in other[h, m].nonzero().flatten().tolist())
            tau = max(held - 1e-12, 0.0)
            best = methods.get(f"oracle:tau={tau!r},block=64").blocks(call)[h, m]
            assert best.sum() <= other[h, m].sum()


# ---- flashprefill --------------------------------------------------------------------------------


@shapes
def test_flashprefill(shape):
    call = call_of(shape, seed=6)
    for size in (64, 128):
        for alpha, sink, window, last in (
            (0.0, 0, 1, 0), (0.1, 0, 1, 0), (0.6, 64, 128, 70), (1.0, 0, 130, 1), (3.0, 1, 64, 0)
        ):  # fmt: skip
            arguments = (size, alpha, sink, window, last)
            exact = [brute.flashprefill([head], *arguments) for head in heads_of(call)]
            text = f"flashprefill:alpha={alpha},sink={sink},window={window},last={last}"
            assert_blocks(f"{text},block={size}", call, exact)


@pytest.mark.parametrize("shape", [ODD, CHUNK, EMPTY_ROWS])
def test_flashprefill_of_a_group(shape):
    """One selection for the heads of a group, of the shape of a key head's."""
    call = call_of(shape, (8, 2), seed=7)
    heads = heads_of(call)
    exact = [brute.flashprefill(heads[h : h + 4], 64, 0.4, 0, 1, 0) for h in (0, 4)]
    text = "flashprefill:alpha=0.4,gqa=group,sink=0,window=1,last=0,block=64"
    assert methods.get(text).blocks(call).shape[0] == 2
    assert_blocks(text, call, [mask for mask in exact for _ in range(4)])


def test_flashprefill_defaults():
    """256 of sink, 512 of window with the own block, the last 256 rows dense, by hand."""
    call = call_of((2048, 2048), (1, 1), seed=8)
    blocks = methods.get("flashprefill:alpha=1e9").blocks(call)
    for m in range(14):
        local = {*range(max(m - 3, 0), m + 1), 0, min(1, m)}
        assert blocks[0, m].nonzero().flatten().tolist() == sorted(local)
    assert blocks[:, 14, :15].all() and blocks[:, 15].all()


def test_flashprefill_sink_block_takes_part_in_the_maximum():
    """As in the authors' code: what is forced sets the bar like everything else."""
    call = call_of((1024, 1024), (2, 1), seed=9)
    k = call.k.clone()
    k[:, :128] = 3.0 * call.q.mean(1, keepdim=True)[:1]  # the first block outshines all others
    hot = methods.Call(call.q, k, call.v, call.scale)
    method = methods.get("flashprefill:alpha=0.1,window=128,last=0")
    assert method.blocks(hot).sum() < method.blocks(call).sum()


# ---- flexprefill ---------------------------------------------------------------------------------

FLEX = ((0.95, 0.0, 1), (0.9, 0.1, 1), (0.6, 0.9, 100), (0.3, 0.07, 200))


@shapes
def test_flexprefill(shape):
    call = call_of(shape, seed=10)
    for gamma, tau, min_budget in FLEX:
        found = [brute.flexprefill(head, 64, gamma, tau, min_budget) for head in heads_of(call)]
        text = f"flexprefill:gamma={gamma},tau={tau},min_budget={min_budget},block=64"
        assert_blocks(text, call, [blocks for blocks, _ in found])


def test_flexprefill_heads_of_these_tests_are_of_both_kinds():
    calls = [call_of(shape, seed=10) for shape in (CHUNK, (256, 640), (700, 395))]
    heads = [head for call in calls for head in heads_of(call)]
    assert {brute.flexprefill(head, 64, *FLEX[1])[1] for head in heads} == {True, False}


@pytest.mark.parametrize("size", [64, 128, 256])
def test_flexprefill_is_dense_up_to_two_blocks_or_the_budget(size):
    for min_budget, length in ((1, 2 * size), (3 * size - 5, 3 * size)):
        text = f"flexprefill:gamma=0.1,tau=0,block={size},min_budget={min_budget}"
        for n, dense in ((length, True), (length + 4 * size, False)):
            call = call_of((n, n), (1, 1), seed=11)
            every = brute.Grid(heads_of(call)[0], size).everything()
            assert torch.equal(methods.get(text).blocks(call)[0], every) is dense


def test_flexprefill_query_aware_heads_add_pooled_blocks():
    """Above sqrt(ln 2) every head is query-aware, at 0 none is."""
    call = call_of((1100, 1100), (4, 2), seed=12)
    text = "flexprefill:gamma=0.9,min_budget=1,block=64,tau="
    plain = methods.get(text + "0").blocks(call)
    aware = methods.get(text + "0.84").blocks(call)
    assert not torch.equal(plain, aware)
    assert torch.equal(methods.get(text + "0.8326").blocks(call), aware)
    budget = methods.get("flexprefill:gamma=0.0,min_budget=1,block=64,tau=0").blocks(call)
    assert (budget <= aware).all(), "columns and diagonals of the budget stay"


# ---- all of them ---------------------------------------------------------------------------------

SPARSE = [
    "streaming:sink=64,window=100",
    "oracle:tau=0.6",
    "oracle:tau=0.6,reduce=max,block=64",
    "oracle:rule=budget,tau=1",
    "oracle:rule=absolute,reduce=max,tau=0.3",
    "flashprefill:alpha=0.5,sink=0,window=1,last=0",
    "flashprefill:alpha=0.5,sink=0,window=64,last=0,gqa=group,block=64",
    "flexprefill:gamma=0.5,tau=0,min_budget=1",
    "flexprefill:gamma=0.6,tau=0.9,min_budget=1,block=64",
    "meanpool:recipe=authors,tau=0.5",
    "xattention:recipe=authors,tau=0.5,block=64",
]


@pytest.mark.parametrize("text", SPARSE)
@pytest.mark.parametrize("shape", [(1300, 1300), (333, 1300), (700, 395)])
def test_strips_do_not_change_a_selection(text, shape, monkeypatch):
    """Rows one at a time, parts of a block, some blocks, all at once."""
    method, call = methods.get(text), call_of(shape, (4, 2), seed=13)
    whole = method.blocks(call)
    for cells in (1, 4 * 1300 * 32, 4 * 1300 * 256):
        monkeypatch.setattr(blockmath, "STRIP_CELLS", cells)
        assert_same_blocks(method.blocks(call), whole, what=f"{text}, strips of {cells}")


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that was made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("text", SPARSE)
def test_nothing_is_n_by_n(text, monkeypatch):
    """4,096 tokens: no tensor larger than a strip, the inputs, or 64 rows of scores."""
    monkeypatch.setattr(blockmath, "STRIP_CELLS", 2**17)
    call = call_of((4096, 4096), (2, 1), dtype=torch.bfloat16)
    with Largest() as largest:
        methods.get(text).blocks(call)
    assert largest.numel <= 2 * 64 * 4096 + 2 * 4096 * 64


@pytest.mark.parametrize("text", SPARSE)
def test_keys_are_shared_and_low_precision_is_widened(text):
    """Repeating key heads changes nothing; bf16 inputs are their fp32 values."""
    method, call = methods.get(text), call_of(ODD, (6, 2), 14, torch.bfloat16)
    blocks = method.blocks(call)
    wide = methods.Call(call.q.float(), call.k.float(), call.v.float(), call.scale)
    assert_same_blocks(method.blocks(wide), blocks, what=text)
    if "group" not in text:
        k, v = (x.repeat_interleave(3, 0) for x in (call.k, call.v))
        repeated = method.blocks(methods.Call(call.q, k, v, call.scale))
        shared = blocks.repeat_interleave(len(repeated) // len(blocks), 0)
        assert_same_blocks(repeated, shared, what=text)


@pytest.mark.parametrize("text", SPARSE)
def test_own_blocks_and_nothing_above_the_diagonal(text):
    for shape in (ODD, CHUNK, EMPTY_ROWS):
        method, call = methods.get(text), call_of(shape, (3, 1), seed=15)
        blocks = method.blocks(call)
        grid = brute.Grid(heads_of(call)[0], method.block_size)
        assert not (blocks & ~grid.everything()).any()
        assert blocks[:, grid.mask({m: grid.own(m) for m in range(grid.num_q)})].all()


MONOTONE = [  # (text, parameter, values), every value keeps at least what the one before keeps
    ("streaming", "window", [1, 64, 65, 300, 1000]),
    ("streaming:window=1", "sink", [0, 1, 64, 128, 2000]),
    ("oracle", "tau", [0.0, 0.2, 0.5, 0.9, 0.99, 1.0, 2.0]),
    ("oracle:reduce=max", "tau", [0.0, 0.2, 0.5, 0.9, 0.99, 1.0]),
    ("oracle:rule=budget", "tau", [0, 1, 2, 5, 100]),
    ("oracle:rule=absolute,reduce=max", "tau", [2.0, 0.9, 0.3, 0.1, 0.02, 0.0]),
    ("flashprefill:sink=0,window=1,last=0", "alpha", [2.0, 1.0, 0.5, 0.1, 0.01, 0.0]),
    ("flashprefill:alpha=0.5", "window", [1, 64, 300, 1000]),
    ("flashprefill:alpha=0.5", "last", [0, 1, 64, 65, 2000]),
    ("flexprefill:tau=0,min_budget=1", "gamma", [0.0, 0.3, 0.6, 0.9, 0.99, 1.0]),
    ("flexprefill:tau=0.9,min_budget=1", "gamma", [0.0, 0.3, 0.6, 0.9, 0.99, 1.0]),
    ("flexprefill:tau=0,gamma=0.2", "min_budget", [1, 64, 200, 2000]),
    ("meanpool:recipe=authors", "tau", [0.0, 0.2, 0.5, 0.9, 0.99, 1.0]),
    ("xattention:recipe=authors", "tau", [0.0, 0.2, 0.5, 0.9, 0.99, 1.0]),
]


@pytest.mark.parametrize("text, name, values", MONOTONE, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("shape", [(1100, 1100), (333, 1100)])
def test_more_of_a_parameter_never_removes_a_block(shape, text, name, values):
    call, before, counts = call_of(shape, (4, 2), seed=16), None, []
    for value in values:
        method = methods.get(text).replace(block_size=64, **{name: value})
        blocks = method.blocks(call)
        assert before is None or (before <= blocks).all(), f"{text} {name}={value}"
        before = blocks
        counts.append(int(blocks.sum()))
    assert counts[0] < counts[-1], "and it does something"


REFUSED = [
    ("streaming:sink=-1", "sink"), ("streaming:window=0", "window"),
    ("streaming:window=1.5", "window"), ("streaming:block=96", "block_size"),
    ("oracle:tau=-0.1", "tau"), ("oracle:tau=nan", "tau"), ("oracle:reduce=sum", "reduce"),
    ("oracle:rule=relative", "rule"),
    ("flashprefill:alpha=-1", "alpha"), ("flashprefill:sink=-1", "sink"),
    ("flashprefill:window=0", "window"), ("flashprefill:last=-1", "last"),
    ("flashprefill:gqa=shared", "gqa"), ("flashprefill:correction=max", "correction"),
    ("flexprefill:gamma=-0.1", "gamma"), ("flexprefill:tau=inf", "tau"),
    ("flexprefill:min_budget=0", "min_budget"), ("flexprefill:max_budget=4", "max_budget"),
    ("meanpool:recipe=authors,tau=-1", "tau"), ("meanpool:recipe=theirs", "recipe"),
    ("xattention:recipe=authors,stride=3", "stride"), ("xattention:recipe=authors,tau=x", "tau"),
    ("xattention:recipe=authors,segment=256", "segment"),
]  # fmt: skip


@pytest.mark.parametrize("text, name", REFUSED)
def test_parameters_are_refused_by_name(text, name):
    with pytest.raises(
        (TypeError, ValueError), match=rf"{text.partition(':')[0]}.*{name}.*allowed"
    ):
        methods.get(text)
