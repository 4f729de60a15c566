# SPDX-License-Identifier: Apache-2.0
"""Which route a call takes and why, strict mode, and what `record` counts."""

import json
import logging

import cases
import pytest
import torch
from harness import config_of

from pbs_attn import PBSConfig, env, pbs_attention, record, reference, routing, supports
from pbs_attn.selection import bits_to_mask

SPARSE = config_of()
Q, K, V = cases.make_inputs(111, (4, 2), 700)

REASONS = [
    ("non_causal", {"is_causal": False}),
    ("mask_4d", {"attn_mask": torch.ones(1, 1, 700, 700)}),
    ("sliding_window", {"sliding_window": 512}),
    ("softcap", {"softcap": 30.0}),
    ("sinks", {"sinks": torch.zeros(4)}),
    ("block_indices", {"block_indices": torch.zeros(1)}),
    ("dropout", {"dropout": 0.1}),
    ("short_q", {"config": PBSConfig(min_q=701, min_kv=0)}),
    ("short_kv", {"config": PBSConfig(min_q=0, min_kv=701)}),
    ("grad", {"q": Q.clone().requires_grad_()}),
    ("device", {"q": Q.to("meta"), "k": K.to("meta"), "v": V.to("meta")}),
    ("dtype", {"q": Q.double(), "k": K.double(), "v": V.double()}),
    ("head_dim", {"q": Q[..., :12], "k": K[..., :12], "v": V[..., :12]}),
    ("head_dim_v", {"v": V[..., :32]}),
    ("block_size", {"config": PBSConfig(block_size=32, min_q=0, min_kv=0)}),
    ("segment_size", {"config": PBSConfig(segment_size=4096, min_q=0, min_kv=0)}),
    (None, {"sliding_window": 700}),
    (None, {"attn_mask": torch.ones(1, 700)}),
    (None, {}),
]


@pytest.mark.parametrize("reason, changes", REASONS, ids=[str(reason) for reason, _ in REASONS])
def test_supports_names_the_reason(reason, changes):
    call = {"q": Q, "k": K, "v": V, "config": SPARSE} | changes
    assert supports(call.pop("q"), call.pop("k"), call.pop("v"), **call) == reason
    assert reason is None or reason in routing.REASONS


def test_every_reason_is_explained_and_short():
    assert all(word == word.lower() and text for word, text in routing.REASONS.items())
    assert set(routing.BY_DESIGN) < set(routing.REASONS)


def test_default_lengths():
    least = routing.min_lengths(PBSConfig(), torch.device("cpu"))
    assert least == routing.MIN_LENGTHS["cpu"]
    assert routing.min_lengths(SPARSE, torch.device("cpu")) == (0, 0)
    elsewhere = routing.min_lengths(PBSConfig(min_q=3), torch.device("cuda"))
    assert elsewhere == (3, routing.MIN_LENGTHS_ELSEWHERE.min_kv)


def test_disabled(monkeypatch):
    monkeypatch.setattr(env, "current", env.Environment(disable=True, strict=True))
    assert supports(Q, K, V, SPARSE) == "disabled"
    with record() as calls:
        out = pbs_attention(Q, K, V, config=SPARSE)
    assert calls.reasons == {"disabled": 1}  # asked for, so strict mode does not mind
    exact = reference.attend(Q[0].double(), K[0].double(), V[0].double(), own="all")[0]
    torch.testing.assert_close(out[0].double(), exact, atol=1e-5, rtol=1e-5)


def test_strict_mode(monkeypatch):
    args = [x.double() for x in (Q, K, V)]
    with pytest.raises(NotImplementedError, match="strict mode.*reason dtype: the dtype is not"):
        pbs_attention(*args, config=SPARSE)
    loose = SPARSE.replace(strict=False)
    pbs_attention(*args, config=loose)
    monkeypatch.setattr(env, "current", env.Environment(strict=True))
    with pytest.raises(NotImplementedError, match="strict mode"):
        pbs_attention(*args, config=loose)
    pbs_attention(Q[:, :, :1], K, V)  # decoding is no lack of support


def test_each_reason_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(routing, "_said", set())
    loose = SPARSE.replace(strict=False)
    with caplog.at_level(logging.DEBUG, "pbs_attn"):
        for _ in range(3):
            pbs_attention(*(x.double() for x in (Q, K, V)), config=loose)
            pbs_attention(Q[:, :, -1:], K, V)
    said = [(r.levelname, r.getMessage().split("reason ")[1].split(":")[0]) for r in caplog.records]
    assert said == [("WARNING", "dtype"), ("DEBUG", "short_q")]


def test_the_default_config_of_the_environment(monkeypatch):
    monkeypatch.setattr(env, "current", env.Environment(config=SPARSE.replace(tau=0.3)))
    want = pbs_attention(Q, K, V, config=SPARSE.replace(tau=0.3))
    assert torch.equal(pbs_attention(Q, K, V), want)


# ---- record --------------------------------------------------------------------------------------


def test_record_counts_routes_and_reasons():
    with record() as outer:
        pbs_attention(Q, K, V, config=SPARSE)
        with record() as inner:
            pbs_attention(Q, K, V, config=SPARSE)
            pbs_attention(Q[:, :, -1:], K, V)
        pbs_attention(*(x.double() for x in (Q, K, V)), config=SPARSE.replace(strict=False))
    pbs_attention(Q, K, V, config=SPARSE)
    assert inner.calls == {"pbs": 1, "dense": 1} and inner.reasons == {"short_q": 1}
    assert outer.calls == {"pbs": 2, "dense": 2}
    assert outer.reasons == {"short_q": 1, "dtype": 1}
    assert outer.seconds == {}


@pytest.mark.parametrize("permute", cases.PERMUTES)
def test_record_density_is_that_of_the_plan(permute):
    config = config_of(permute=permute, tau=0.5)
    inputs = cases.make_inputs(112, (4, 2), 1100)
    with record() as calls:
        _, plan = pbs_attention(*inputs, config=config, return_plan=True)
    density, computed = plan.density()[0], plan.computed()[0]
    assert calls.layers[None] == pytest.approx(density.tolist())
    assert calls.density == pytest.approx(density.mean().item())
    assert calls.computed == pytest.approx(computed.mean().item())
    place = reference.Geometry(
        1100,
        1100,
        own="block" if permute == "none" else "segment",
        row_segment=256 if permute in ("queries", "both") else 0,
    )
    bits = bits_to_mask(plan.bits, plan.num_k_blocks)[0]
    assert calls.density == pytest.approx(reference.density(bits, place))
    assert calls.computed == pytest.approx(reference.computed(bits, place))


def test_record_density_over_a_padded_batch():
    case = next(case for case in cases.geometries() if case.name == "left_padding")
    inputs = cases.make_inputs(113, (4, 2), case=case)
    with record() as calls:
        _, plan = pbs_attention(*inputs, config=SPARSE, return_plan=True, **case.geometry())
    causal = torch.tensor([n * (n + 1) // 2 for n in (-(-x // 128) for x in case.q_len)])
    want = (plan.density() * causal[:, None]).sum(0) / causal.sum()
    assert calls.layers[None] == pytest.approx(want.tolist())


def test_record_in_words_and_numbers():
    with record(time=True) as calls:
        assert "no attention call" in calls.summary()
        pbs_attention(Q, K, V, config=SPARSE)
        pbs_attention(Q[:, :, -1:], K, V)
    assert set(calls.seconds) == {"pbs", "dense"} and min(calls.seconds.values()) > 0
    numbers = calls.to_dict()
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["calls"] == {"pbs": 1, "dense": 1} and len(numbers["layers"]["None"]) == 4
    text = calls.summary()
    for part in ("pbs", "50.0%", "dense because short_q: 1", "density", "seconds"):
        assert part in text


def test_record_ends_with_an_error():
    with pytest.raises(RuntimeError), record() as calls:
        pbs_attention(Q, K, V, config=SPARSE)
        raise RuntimeError
    assert calls.density < 1.01 and calls.layers
    pbs_attention(Q, K, V, config=SPARSE)
    assert calls.calls["pbs"] == 1


def test_nothing_is_counted_while_compiling():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: pbs_attention(q, k, v, config=SPARSE), fullgraph=True, backend="eager"
    )
    with record() as calls:
        compiled(Q, K, V)
    assert calls.calls == {"pbs": 0, "dense": 0}
