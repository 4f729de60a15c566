# SPDX-License-Identifier: Apache-2.0
"""`peak` and `best`: what their texts mean, what they run, and how best chooses by length."""

import copy
import json
import pickle
from pathlib import Path

import block_methods as brute
import cases
import pytest
import tiny_models as tiny
import torch
from harness import sequences_of
from numerics import assert_close, assert_same_blocks, low_precision_attend
from test_transformers_compile import Layer, geometry, tensors

import pbs_attn
from pbs_attn import PBSConfig, best, methods, pbs_attention, routing, supports
from pbs_attn.cli import main as cli_main
from pbs_attn.eval.attention import using
from pbs_attn.geometry import Geometry
from pbs_attn.integrations.forward import attention_forward
from pbs_attn.methods import kernels

ALL_LENGTHS = "min_q=0,min_kv=0"
PEAK = {
    "permute": "identity", "segment_size": 256, "select": "antidiagonal", "reduce": "max",
    "stride": 16, "rule": "absolute", "tau": 0.01, "normalize": "row", "correction": "mean",
}  # fmt: skip

# ---- peak ----------------------------------------------------------------------------------------


def test_peak_is_its_fields():
    assert methods.get("peak").config == PBSConfig(**PEAK)
    found = methods.get("peak:eps=0.02,stride=32")
    assert found == kernels.Peak(tau=0.02, stride=32)
    assert found.config == PBSConfig(**PEAK | {"tau": 0.02, "stride": 32})
    assert found.label == "peak:eps=0.02,stride=32" and found.text == "peak:tau=0.02,stride=32"


@pytest.mark.parametrize("name", methods.METHODS)
def test_eps_is_tau_wherever_there_is_one(name):
    known = methods.find(name).parameters()
    if "tau" in known:
        assert methods.get(f"{name}:eps=0.125").tau == 0.125
        assert methods.get(f"{name}:tau=0.5,eps=0.25").tau == 0.25, "the last one counts"
    else:
        with pytest.raises(ValueError, match=f"{name}.*got '?eps=0.125"):
            methods.get(f"{name}:eps=0.125")


def test_a_base_leaves_peak_itself():
    """A base of the prefix rule and its tau would keep nothing under the absolute one."""
    base = PBSConfig(tau=0.5, block_size=64, permute="keys", stride=4, min_kv=7)
    (found,) = methods.parse("peak", base)
    changes = {"block_size": 64, "min_kv": 7}
    assert found.config == PBSConfig(**PEAK | changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("peak:permute=queries", "peak: normalize is 'row'; allowed: history with permute=queries"),
        ("peak:select=mean_pool", "peak: normalize is 'row'; allowed: history with select=mean"),
        ("peak:normalize=column", "peak: normalize is 'column'; allowed: history, row"),
        ("peak:correction=max", "peak: correction is 'max'; allowed: none, mean"),
        ("pbs:normalize=row", "pbs: normalize is 'row'; allowed: history with select=mean_pool"),
        ("peak:stride=3", "peak: stride is 3; allowed: a divisor of block_size"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(text, said):
    with pytest.raises(ValueError, match=said):
        methods.get(text)


def blocks_of(plan, seq):
    """bool [Hq, Tq, Tk] of one sequence."""
    size = plan.config.block_size
    tq, tk = -(-seq.q.shape[1] // size), -(-seq.k.shape[1] // size)
    return plan.mask()[seq.index, :, :tq, :tk]


def heads_of(seq):
    group, scale = len(seq.q) // len(seq.k), seq.q.shape[2] ** -0.5
    return [brute.Head(q.double(), seq.k[h // group].double(), scale) for h, q in enumerate(seq.q)]


@pytest.mark.parametrize("shape", [(461, 461), (140, 461), (1, 400), (300, 250)], ids=str)
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_peak_by_its_definition(stride, shape):
    """Blocks, output and lse from loops over groups, rows and keys."""
    inputs = cases.make_inputs(1, (2, 1), *shape, head_dim=16)
    text = f"peak:eps=0.07,stride={stride},block=64,segment=128,{ALL_LENGTHS}"
    out, lse, plan = pbs_attention(*inputs, config=text, return_lse=True, return_plan=True)
    (seq,) = sequences_of(*inputs)
    offset, exact = shape[1] - shape[0], []
    masks = torch.stack([brute.peak(head, 64, 128, stride, 0.07) for head in heads_of(seq)])
    assert_same_blocks(blocks_of(plan, seq), masks, what=f"peak {shape}")
    for h, head in enumerate(heads_of(seq)):
        exact.append(
            brute.attend(
                head, seq.v[h // 2].double(), masks[h].tolist(), 64, 64, "mean",
                own=lambda m: max(offset + 64 * m, 0) // 128 * 128,
            )
        )  # fmt: skip
    options = {"block_q": 64, "block_k": 64, "segment_size": 128, "correction": "mean"}
    low = low_precision_attend(seq.q, seq.k, seq.v, masks, **options)
    for name, got, place in (("out", out[0], 0), ("lse", lse[0], 1)):
        want = torch.stack([head[place] for head in exact])
        noise = shape[1] ** 0.5 * 2.0**-24 * want[want.isfinite()].abs().amax().item()
        assert_close(got, want, low[place], what=f"{name} {shape}", noise=noise)


@pytest.mark.parametrize("tau", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("shape", [(900, 900), (333, 1100)], ids=str)
def test_the_oracle_of_row_maxima_bounds_peak(shape, tau):
    """With groups of one row, peak scores what the oracle sums up, and so chooses what it does;
    beside that both have their forced blocks."""
    inputs = cases.make_inputs(2, (4, 2), *shape, head_dim=16)
    (seq,) = sequences_of(*inputs)
    text = f"peak:eps={tau},stride=1,block=64,segment=128,{ALL_LENGTHS}"
    _, plan = pbs_attention(*inputs, config=text, return_plan=True)
    call = methods.Call(seq.q.double(), seq.k.double(), seq.v.double(), 16**-0.5)
    bound = methods.get(f"oracle:reduce=max,rule=absolute,eps={tau},block=64").blocks(call)
    forced = f"peak:eps=99,block=64,segment=128,{ALL_LENGTHS}"
    _, least = pbs_attention(*inputs, config=forced, return_plan=True)
    least = blocks_of(least, seq)
    assert_same_blocks(blocks_of(plan, seq), bound | least, what=f"eps {tau}")
    everything = methods.base.causal_blocks(call, 64, 64).expand_as(bound)
    assert least.sum() < (bound | least).sum() < everything.sum(), "the rule decides"


@pytest.mark.parametrize("text", ["peak", "peak:stride=64", "peak:permute=keys,gqa=group"])
def test_peak_is_its_config(text):
    inputs = cases.make_inputs(3, (4, 2), 900)
    method = methods.get(text).replace(min_q=0, min_kv=0, strict=True)
    with pbs_attn.record() as ours:
        found = pbs_attention(*inputs, config=method, return_plan=True)
    with pbs_attn.record() as theirs:
        expected = pbs_attention(*inputs, config=method.config, return_plan=True)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1].bits, expected[1].bits)
    assert ours.layers == theirs.layers and ours.calls["pbs"] == 1


def test_thresholds_hold_for_peak_too(tmp_path):
    path = tmp_path / "eps.json"
    path.write_text("[[0.9, 0.4, 0.1, 0.0]]")
    inputs = cases.make_inputs(4, (4, 2), 900)
    method = methods.get(f"peak:thresholds={path},block=64,segment=128,{ALL_LENGTHS}")
    with pbs_attn.record() as calls:
        pbs_attn.prefill.attention(*inputs, method, Geometry(), layer=0)
    first, *_, last = calls.layers[0]
    assert calls.layers[0] == sorted(calls.layers[0]) and first < 0.5 and last == 1.0


# ---- best: which setting -------------------------------------------------------------------------

SMALL = {"block_size": 64, "segment_size": 128}
FIRST = PBSConfig(**PEAK | SMALL | {"stride": 8, "tau": 0.4})
SECOND = PBSConfig(**PEAK | SMALL | {"stride": 32, "tau": 0.3})
LAST = PBSConfig(**PEAK | {"stride": 8, "tau": 0.2})


@pytest.fixture
def rows(monkeypatch):
    """Rows of three lengths, whatever the evidence says today."""
    found = tuple(
        best.Row(*row) for row in ((300, FIRST, "a"), (700, SECOND, "b"), (900, LAST, "c"))
    )
    monkeypatch.setattr(best, "ROWS", found)


LENGTHS = [
    (1, FIRST), (300, FIRST), (301, SECOND), (700, SECOND), (701, LAST), (900, LAST), (10**9, LAST)
]  # fmt: skip


@pytest.mark.parametrize(("seqlen", "expected"), LENGTHS)
def test_best_by_length(rows, seqlen, expected):
    assert PBSConfig.best(seqlen) == expected
    found = methods.get("best:min_q=3,strict=yes").config_at(seqlen)
    assert found == expected.replace(min_q=3, strict=True)


def test_the_rows_of_today():
    """Ascending lengths, sources that are there, and nothing in them but a selection."""
    lengths = [row.max_kv for row in best.ROWS]
    assert lengths == sorted(set(lengths)) and lengths[0] >= 1
    for row in best.ROWS:
        assert (Path(__file__).parents[1] / row.source).is_file(), row.source
        assert row.config == PBSConfig(**row.config.to_dict() | dict.fromkeys(("min_q", "min_kv")))
        assert not row.config.strict
        assert PBSConfig.best(row.max_kv) == row.config


@pytest.mark.parametrize(
    ("seqlen", "error"),
    [(0, ValueError), (-1, ValueError), (True, TypeError), (8192.0, TypeError), ("8k", TypeError)],
)
def test_lengths_that_are_none(seqlen, error):
    with pytest.raises(error, match=f"PBSConfig: seqlen is {seqlen!r}; allowed: an integer >= 1"):
        PBSConfig.best(seqlen)


def test_best_has_no_parameters_of_selection():
    assert set(methods.find("best").parameters()) == {"min_q", "min_kv", "strict"}
    for text in ("best:tau=0.1", "best:eps=0.1", "best:stride=8", "best:thresholds=x.json"):
        with pytest.raises(ValueError, match="'best': got .*; allowed: NAME=VALUE with one of min"):
            methods.get(text)
    (found,) = methods.parse("best", PBSConfig(tau=0.5, stride=4, min_kv=7))
    assert found == kernels.Best(min_kv=7)
    with pytest.raises(ValueError, match=r"'best' has a config for each length; allowed: .*best\("):
        PBSConfig.from_method("best")


@pytest.mark.parametrize(
    "text", ["peak", "peak:eps=0.02,stride=32", "best", "best:min_q=0,min_kv=5,strict=yes",
             "oracle:rule=absolute,eps=0.02,correction=mean", "streaming:correction=mean"],
)  # fmt: skip
def test_round_trips(text):
    """Through text, JSON, pickle and copies."""
    method = methods.get(text)
    assert methods.get(method.text) == method
    values = json.loads(json.dumps(method.to_dict()))
    assert methods.find(values.pop("method"))(**values) == method
    for twin in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method), method.replace()):
        assert twin == method and hash(twin) == hash(method)
        if method.kind == "kernel":
            assert twin.config_at(500) == method.config_at(500)


# ---- best: calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("seqlen", "expected"), [(300, FIRST), (301, SECOND), (950, LAST)])
def test_best_runs_the_config_of_its_length(rows, seqlen, expected):
    """Chunks too: the keys decide, not the rows. Output, lse, plan and record are the config's."""
    inputs = cases.make_inputs(5, (4, 2), 200, seqlen)
    options = {"return_lse": True, "return_plan": True}
    with pbs_attn.record() as ours:
        out, lse, plan = pbs_attention(*inputs, config=f"best:{ALL_LENGTHS}", **options)
    theirs = pbs_attention(*inputs, config=expected.replace(min_q=0, min_kv=0), **options)
    assert torch.equal(out, theirs[0]) and torch.equal(lse, theirs[1])
    assert torch.equal(plan.bits, theirs[2].bits)
    assert plan.config == expected.replace(min_q=0, min_kv=0)
    assert ours.calls == {"pbs": 1, "dense": 0}
    if expected.block_size == methods.PAIR:
        assert ours.layers[None] == plan.density()[0].tolist()


def test_the_longest_sequence_of_a_call_decides(rows):
    inputs = cases.make_inputs(6, (4, 2), 750, batch=2)
    lengths = {"kv_len": torch.tensor([280, 400]), "q_len": torch.tensor([280, 400])}
    text = f"best:{ALL_LENGTHS}"
    _, plan = pbs_attention(*inputs, config=text, return_plan=True, **lengths)
    assert plan.config.stride == LAST.stride, "lengths are not read: the tensors say 750"
    _, plan = pbs_attention(*inputs, config=text, return_plan=True, **lengths, max_seqlen_k=400)
    assert plan.config.stride == SECOND.stride


def test_routing_of_best(rows):
    inputs = cases.make_inputs(7, (2, 1), 500)
    assert supports(*inputs, "best") == "short_q", "the measured length of the device"
    assert supports(*inputs, f"best:{ALL_LENGTHS}") is None
    assert routing.min_lengths(kernels.Best(), inputs.q.device) == routing.MIN_LENGTHS["cpu"]
    with pbs_attn.record() as calls:
        _, plan = pbs_attention(*inputs, config="best:min_q=0,min_kv=501", return_plan=True)
    assert calls.reasons == {"short_kv": 1} and plan.density().eq(1).all()
    assert plan.config.stride == SECOND.stride
    size = pbs_attn.workspace_size((1, 2, 500, 64), (1, 1, 500, 64), torch.float32, "best")
    assert size == pbs_attn.workspace_size((1, 2, 500, 64), (1, 1, 500, 64), torch.float32, SECOND)


def test_best_takes_no_options_of_a_config():
    inputs = cases.make_inputs(8, (2, 1), 300)
    for options in ({"tau": 0.5}, {"tau": torch.ones(2)}, {"permute_heads": torch.ones(2)}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} is given; allowed: None, as config is 'best"):
            pbs_attention(*inputs, config=f"best:{ALL_LENGTHS}", **options)


def test_the_environment_takes_both():
    for text in ("peak:eps=0.02", "best"):
        found = pbs_attn.env.read_environment({"PBS_ATTN_CONFIG": text})
        assert found.config == methods.get(text)


# ---- in models -----------------------------------------------------------------------------------

IN_MODELS = ["peak:block=64,segment=128,eps=0.3", "best"]


@pytest.mark.parametrize("mask", [None, geometry([40, 260, 40, 260], [0, 300, 0, 300])])
@pytest.mark.parametrize("text", IN_MODELS)
def test_one_graph(rows, text, mask):
    """And another graph, with its own row, where the length is another."""
    layer = Layer()
    method = methods.get(text).replace(min_q=0, min_kv=0)

    def call(q, k, v):
        return attention_forward(layer, q, k, v, mask, method)[0]

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for seqlen in (300, 310, 720) if mask is None else (300,):
            inputs = tensors(300, seqlen)
            assert torch.equal(compiled(*inputs), call(*inputs))


@pytest.mark.filterwarnings("ignore")  # of jit.trace: that it is old, and about other lengths
@pytest.mark.parametrize("text", IN_MODELS)
def test_traced(rows, text):
    layer, inputs = Layer(), tensors(300, 310)
    method = methods.get(text).replace(min_q=0, min_kv=0)

    def call(q, k, v):
        return attention_forward(layer, q, k, v, None, method)[0]

    with torch.no_grad():
        traced = torch.jit.trace(call, inputs, check_trace=False)
        assert torch.equal(traced(*inputs), call(*inputs))


@pytest.mark.tf457
@pytest.mark.parametrize("text", IN_MODELS)
def test_patched(rows, text):
    """Two chunks of a prompt and tokens after it: the second chunk is longer, and so is its row."""
    model, ids = tiny.build("llama"), tiny.prompt(500)
    method = methods.get(text).replace(min_q=0, min_kv=0)
    with torch.no_grad(), using(model, method) as calls:
        cache = model(ids[:, :300], use_cache=True).past_key_values
        second = model(ids[:, 300:], past_key_values=cache, use_cache=True).logits
        model.generate(ids[:, :300], max_new_tokens=3, do_sample=False)
    assert calls.calls == {"pbs": 6, "dense": 4} and calls.reasons == {"short_q": 4}
    assert set(calls.layers) == {0, 1} and calls.density < 1
    with torch.no_grad():
        with using(model, methods.get("full")):
            exact = model(ids).logits[:, 300:]
        with using(model, f"identity:block=64,segment=128,tau=0,{ALL_LENGTHS}"):
            worse = model(ids).logits[:, 300:]
    assert (second - exact).abs().mean() < (worse - exact).abs().mean()


SCRIPT = """
import tiny_models, torch
model = tiny_models.build("llama")
model.set_attn_implementation("pbs_peak_test")
with torch.no_grad():
    model(tiny_models.prompt(500))
"""


@pytest.mark.tf457
@pytest.mark.parametrize("text", IN_MODELS)
def test_exec(text, tmp_path, capsys):
    """Somebody else's program under the method, by name."""
    from pbs_attn.integrations import registry

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = ["exec", "--require-used", "--method", text, "--min-q", "0", "--min-kv", "0"]
    try:
        assert cli_main([*words, "--name", "pbs_peak_test", str(script)]) == 0
    finally:
        registry._registered.pop("pbs_peak_test", None)
    assert "pbs        2" in capsys.readouterr().err
