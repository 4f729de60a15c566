# SPDX-License-Identifier: Apache-2.0
"""s2o, as its module states it, against loops over segments, tiles and rows."""

import pytest
import token_methods as tm
import torch

import pbs_attn
from pbs_attn import methods
from pbs_attn.methods import s2o

CASES = {  # rows, keys, (query heads, key heads), dtype
    "square": (384, 384, (2, 2), torch.float32),
    "ragged": (333, 333, (3, 1), torch.float32),
    "chunk": (150, 430, (4, 2), torch.float32),  # begins and ends inside a segment
    "rows_before_key_0": (230, 170, (2, 1), torch.float32),
    "one_row": (1, 300, (2, 2), torch.float32),
    "bf16": (320, 320, (2, 2), torch.bfloat16),
    "fp16": (260, 300, (2, 1), torch.float16),
}
OPTIONS = {  # parameters beside SMALL: tau that stops some groups of rows early and others late
    "": 0.15,
    "guide=identity": 0.15,
    "reduce=mean": 0.04,
    "reduce=any": 0.004,
    "sink=no": 0.15,
    "rows=24": 0.15,
    "rows=500,tile=7": 0.12,
}
SMALL = "segment=100,tile=16,rows=32"


def expected_mask(q, k, method):
    """bool [Hq, Nq, Nk]: what is read, one row, one tile at a time in fp64."""
    (num_heads, num_q, _), num_k = q.shape, k.shape[1]
    offset, group = num_k - num_q, num_heads // k.shape[0]
    mask = torch.zeros(num_heads, num_q, num_k, dtype=torch.bool)
    for h in range(num_heads):
        for start in range(0, num_k, method.segment_size):
            end = min(start + method.segment_size, num_k)
            rows = [i for i in range(num_q) if start <= i + offset < end]
            if not rows:
                continue
            for i in rows:
                mask[h, i, start : i + offset + 1] = True
            if start:
                kept = _ranked(q[h].double(), k[h // group].double(), rows, start, method)
                for i, keys in kept:
                    mask[h, i, keys] = True
    return mask


def _ranked(q, k, rows, start, method):
    """[(row, keys read of the history)] of one segment of one head."""
    offset, scale = len(k) - len(q), q.shape[1] ** -0.5
    r = (k[:start] @ q[rows].mean(0)).tolist()
    ranked = sorted(range(start), key=lambda j: (-r[j], j))
    if method.sink:
        ranked = [0] + [j for j in ranked if j]
    if method.guide == "keys":
        guide = k[ranked[:64]].mean(0)
        rows = sorted(rows, key=lambda i: (-float(q[i] @ guide), i))
    found, weight = [], (q @ k.T * scale).exp().numpy()
    for at in range(0, len(rows), method.rows):
        group, keys = rows[at : at + method.rows], []
        total = [weight[i, start : i + offset + 1].sum() for i in group]
        for begin in range(0, start, method.tile):
            tile = ranked[begin : begin + method.tile]
            keys += tile
            gains = []
            for n, i in enumerate(group):
                new = weight[i, tile].sum()
                total[n] += new
                gains.append(new / total[n])
            gain = {"all": max(gains), "any": min(gains), "mean": sum(gains) / len(gains)}
            if gain[method.reduce] < method.tau:
                break
        found += [(i, keys) for i in group]
    return found


@pytest.mark.parametrize(
    ("case", "options"),
    [(case, "") for case in CASES]
    + [(case, o) for case in ("square", "chunk") for o in OPTIONS if o],
)
def test_reads_what_the_definition_says(case, options):
    num_q, num_k, heads, dtype = CASES[case]
    q, k, v = tm.inputs(num_q, num_k, heads, dtype=dtype, peak=2.5)
    method = methods.get(f"s2o:{SMALL},tau={OPTIONS[options]}" + (f",{options}" if options else ""))
    mask = expected_mask(q, k, method)
    out, pairs = method.attention(tm.call(q, k, v))
    tm.assert_attention(out, q, k, v, mask, f"{case} {options}")
    tm.assert_pairs(pairs, mask, num_q, num_k, f"{case} {options}")
    if case == "square":
        share = mask.sum() / (heads[0] * tm.causal(num_q, num_k).sum())
        assert 0.35 < share < 0.95, f"the case decides nothing: {share:.2f} of all cells are read"


def test_steps_change_nothing(monkeypatch):
    q, k, v = tm.inputs(300, 500, (4, 2), peak=2.5)
    method = methods.get(f"s2o:{SMALL},tau=0.05")
    whole = method.attention(tm.call(q, k, v))
    monkeypatch.setattr(s2o, "STRIP_CELLS", 1)  # one tile at a time
    out, pairs = method.attention(tm.call(q, k, v))
    torch.testing.assert_close(out, whole[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(pairs, whole[1])


@pytest.mark.parametrize("options", ["", SMALL, "segment=128,guide=identity,sink=no"])
@pytest.mark.parametrize("case", CASES)
def test_tau_zero_is_dense(case, options):
    num_q, num_k, heads, dtype = CASES[case]
    q, k, v = tm.inputs(num_q, num_k, heads, dtype=dtype, peak=2.0)
    method = methods.get("s2o:tau=0" + ("," + options if options else ""))
    out, _, (pairs, causal) = methods.base.run(method, q[None], k[None], v[None])
    assert torch.equal(pairs, torch.full_like(pairs, causal)), "density is not exactly 1"
    tm.assert_attention(out[0], q, k, v, tm.causal(num_q, num_k).expand(heads[0], -1, -1), case)


@pytest.mark.parametrize("reduce", ["all", "mean", "any"])
def test_larger_tau_never_reads_more(reduce):
    q, k, v = tm.inputs(400, 400, (4, 2), peak=2.5)
    last = None
    for tau in (0, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1):
        method = methods.get(f"s2o:{SMALL},tau={tau},reduce={reduce}")
        pairs = method.attention(tm.call(q, k, v))[1]
        assert last is None or (pairs <= last).all(), f"tau {tau} reads more"
        last = pairs
    # At tau 1 every group of rows stops after its first tile.
    mask = expected_mask(q, k, methods.get(f"s2o:{SMALL},tau=1"))
    history = mask & (torch.arange(400) < torch.arange(400)[:, None] // 100 * 100)
    assert (history[:, 100:].sum(-1) == 16).all()
    tm.assert_pairs(last, mask, 400, 400, "tau 1")


def test_density_by_hand():
    # One head, segments of 128: every row reads its own segment, then one tile of 64 of the rest.
    q, k, v = tm.inputs(384, 384, (1, 1))
    method = methods.get("s2o:segment=128,tile=64,rows=128,tau=1")
    out, _, (pairs, causal) = methods.base.run(method, q[None], k[None], v[None])
    assert causal == 6
    # 3 diagonal pairs whole; segments 1 and 2 read 64 keys of 128 rows each: half a pair each.
    torch.testing.assert_close(pairs, torch.tensor([4.0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_token_0_stands_in_the_first_tile():
    q, k, v = tm.inputs(200, 200, (1, 1), seed=3)
    k[0, 0] = -10 * q[0].mean(0)  # the last in rank
    v = torch.zeros_like(v)
    v[0, 0] = 1.0
    with_sink, _ = methods.get("s2o:segment=100,tile=10,tau=1").attention(tm.call(q, k, v))
    without, _ = methods.get("s2o:segment=100,tile=10,tau=1,sink=no").attention(tm.call(q, k, v))
    assert (with_sink[0, 100:] > 0).all() and not without[0, 100:].any()


def test_a_chunk_of_whole_segments_is_the_same_as_one_shot():
    q, k, v = tm.inputs(400, 400, (4, 2), peak=2.5)
    method = methods.get(f"s2o:{SMALL},tau=0.05")
    whole, _ = method.attention(tm.call(q, k, v))
    later, _ = method.attention(tm.call(q[:, 200:], k, v))
    torch.testing.assert_close(later, whole[:, 200:], rtol=1e-5, atol=1e-6)


def test_padded_batch_is_each_sequence_alone():
    q, k, v = (x.repeat(2, 1, 1, 1) for x in tm.inputs(300, 300, (4, 2), peak=2.0))
    lengths, starts = torch.tensor([300, 210]), torch.tensor([0, 90])
    method = methods.get(f"s2o:{SMALL},tau=0.05,min_q=0,min_kv=0")
    out = pbs_attn.pbs_attention(
        q, k, v, config=method, q_start=starts, q_len=lengths, kv_start=starts, kv_len=lengths
    )
    for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        rows = slice(start, start + length)
        alone, _ = method.attention(tm.call(q[b, :, rows], k[b, :, rows], v[b, :, rows]))
        assert torch.equal(out[b, :, rows], alone)
        assert not out[b, :, :start].any()


def test_it_says_what_it_is():
    assert "our reading of the published description" in s2o.S2O.ABOUT


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("segment=0", "s2o: segment_size is 0"),
        ("tau=-1", "s2o: tau is -1; allowed: a number in"),
        ("tau=2", "s2o: tau is 2;"),
        ("guide=best", "s2o: guide is 'best'; allowed: keys, identity"),
        ("reduce=max", "s2o: reduce is 'max'; allowed: all, mean, any"),
        ("tile=0", "s2o: tile is 0"),
    ],
)
def test_errors_name_the_parameter(text, says):
    with pytest.raises(ValueError) as error:
        methods.get(f"s2o:{text}")
    assert says in str(error.value)


def test_every_tensor_names_its_device():
    method = methods.get(f"s2o:{SMALL},tau=0.1")
    tm.assert_devices_are_named(method, tm.call(*tm.inputs(300, 400, (4, 2))))
