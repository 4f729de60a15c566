# SPDX-License-Identifier: Apache-2.0
"""minference: the vertical-slash pattern against loops over single keys, and its pattern files."""

import json

import pytest
import token_methods as tm
import torch

import pbs_attn
from pbs_attn import methods
from pbs_attn.methods import minference

CASES = {  # rows, keys, (query heads, key heads), dtype
    "square": (512, 512, (2, 2), torch.float32),
    "ragged": (701, 701, (3, 1), torch.float32),
    "chunk": (200, 777, (4, 2), torch.float32),
    "rows_before_key_0": (300, 190, (2, 1), torch.float32),
    "few_rows": (5, 600, (2, 2), torch.float32),
    "fewer_keys_than_forced": (40, 40, (2, 2), torch.float32),
    "bf16": (640, 640, (2, 2), torch.bfloat16),
    "fp16": (450, 450, (2, 1), torch.float16),
}


def chosen(q, k, vertical, slash):
    """({key}, {distance}) of one query head: loops over the last rows, as the paper says."""
    num_q, num_k = q.shape[1], k.shape[1]
    rows = min(64, num_q, num_k)
    p = tm.scores(q, k)[0]
    p = p.masked_fill(~tm.causal(num_q, num_k), -torch.inf)[num_q - rows :].softmax(-1)
    by_key, by_distance = p.sum(0).tolist(), [0.0] * num_k
    for i in range(rows):
        position = num_k - rows + i
        for key in range(position + 1):
            by_distance[position - key] += float(p[i, key])

    def pick(mass, forced, count):
        best = sorted(range(num_k), key=lambda x: (x >= forced, x if x < forced else -mass[x]))
        return set(best[:count])

    return pick(by_key, 30, max(vertical, 30)), pick(by_distance, 100, max(slash, 50))


def tiled_keys(start, distances):
    """Keys that the authors' kernel reads for the rows from position start on: tiles of 64 from the
    farthest diagonal to the nearest."""
    keys, end = set(), None
    for distance in sorted(distances, reverse=True):
        if distance >= start + 64:
            continue
        stop = max(start + 64 - distance, 64)
        if end is None or stop > end + 64:
            keys |= set(range(stop - 64, stop))
            end = stop
        elif stop > end:
            keys |= set(range(end, end + 64))
            end += 64
    return keys


def expected_mask(q, k, vertical, slash):
    """bool [Hq, Nq, Nk]; vertical, slash: lists per head"""
    num_q, num_k, group = q.shape[1], k.shape[1], q.shape[0] // k.shape[0]
    mask = torch.zeros(q.shape[0], num_q, num_k, dtype=torch.bool)
    for h in range(q.shape[0]):
        kv = slice(h // group, h // group + 1)
        columns, distances = chosen(q[h : h + 1], k[kv], vertical[h], slash[h])
        for first in range(0, num_q, 64):
            keys = tiled_keys(num_k - num_q + first, distances) | columns
            keys = [key for key in keys if key < num_k]
            mask[h, first : first + 64, keys] = True
    return mask & tm.causal(num_q, num_k)


@pytest.mark.parametrize("case", CASES)
def test_reads_what_the_definition_says(case):
    num_q, num_k, heads, dtype = CASES[case]
    q, k, v = tm.inputs(num_q, num_k, heads, dtype=dtype, peak=2.0)
    method = methods.get("minference:vertical=37,slash=103")
    mask = expected_mask(q, k, [37] * heads[0], [103] * heads[0])
    if num_q == num_k > 500:
        assert mask.sum() < 0.85 * heads[0] * tm.causal(num_q, num_k).sum(), "nothing is left out"
    out, pairs = method.attention(tm.call(q, k, v))
    tm.assert_attention(out, q, k, v, mask, case)
    tm.assert_pairs(pairs, mask, num_q, num_k, case)


@pytest.mark.parametrize("starts", [1, 2**24])
def test_strips_change_nothing(monkeypatch, starts):
    q, k, v = tm.inputs(700, 900, (4, 2), peak=2.0)
    method = methods.get("minference:vertical=40,slash=105")
    whole = method.attention(tm.call(q, k, v))
    monkeypatch.setattr("pbs_attn.methods.blockmath.STRIP_CELLS", 1)  # one block of rows at a time
    monkeypatch.setattr(minference, "STARTS", starts)  # tiles of one strip, of all
    out, pairs = method.attention(tm.call(q, k, v))
    torch.testing.assert_close(out, whole[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(pairs, whole[1])


@pytest.mark.parametrize("case", CASES)
def test_all_diagonals_are_dense(case):
    num_q, num_k, heads, dtype = CASES[case]
    q, k, v = tm.inputs(num_q, num_k, heads, dtype=dtype, peak=2.0)
    method = methods.get(f"minference:slash={num_k}")
    out, (pairs, causal) = _run(method, q, k, v)
    assert torch.equal(pairs, torch.full_like(pairs, causal)), "density is not exactly 1"
    tm.assert_attention(out, q, k, v, tm.causal(num_q, num_k).expand(heads[0], -1, -1), case)


def _run(method, q, k, v):
    out, _, counted = methods.base.run(method, q[None], k[None], v[None])
    return out[0], counted


def test_the_defaults_are_those_of_the_paper():
    method = methods.get("minference")
    assert (method.vertical, method.slash, method.pattern) == (1000, 6096, None)


def test_sizes_below_the_least_are_raised():
    q, k, v = tm.inputs(300, 300, (2, 1), peak=2.0)
    small = methods.get("minference:vertical=0,slash=1").attention(tm.call(q, k, v))
    least = methods.get("minference:vertical=30,slash=50").attention(tm.call(q, k, v))
    assert torch.equal(small[0], least[0]) and torch.equal(small[1], least[1])


def pattern_file(tmp_path, layers):
    path = tmp_path / "pattern.json"
    path.write_text(json.dumps(layers))
    return f"minference:pattern={path}"


def test_pattern_file_sets_heads_of_layers(tmp_path):
    num, heads = 600, (4, 2)
    q, k, v = tm.inputs(num, num, heads, peak=2.0)
    layers = [
        {"0": ["vertical_and_slash", 30, 800, 0.9]},
        {
            "0": ["vertical_and_slash", 60, 101, 0.9],
            "1": ["vertical_and_slash", 33, 110, 0.9],
            "3": ["stream_llm", 10, 70, 0.5],
        },
    ]
    method = methods.get(pattern_file(tmp_path, layers) + ",vertical=50,slash=104")
    mask = expected_mask(q, k, [60, 33, 50, 0], [101, 110, 104, 0])
    key, row = torch.arange(num), torch.arange(num)[:, None]
    mask[3] = ((key < 10) | (row - key < 70)) & tm.causal(num, num)
    out, pairs = method.attention(tm.call(q, k, v, layer=1))
    tm.assert_attention(out, q, k, v, mask, "pattern")
    tm.assert_pairs(pairs, mask, num, num, "pattern")
    beyond = method.attention(tm.call(q, k, v, layer=2))
    alone = methods.get("minference:vertical=50,slash=104").attention(tm.call(q, k, v))
    assert torch.equal(beyond[0], alone[0]), "a layer past the file takes vertical and slash"


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([{"0": ["block_sparse", 100, 1, 0.5]}], "layer 0, head 0 is of type 'block_sparse'"),
        ([{"0": ["vertical_and_slash", 100]}], "layer 0, head 0"),
        ([{"0": ["vertical_and_slash", -1, 100, 0.5]}], "size -1"),
        ({"0": []}, "a list over layers"),
        ([[1]], "a list over layers"),
        ([{"x": ["vertical_and_slash", 1, 1, 1]}], "'x'"),
    ],
)
def test_a_bad_pattern_file_is_refused_by_name(tmp_path, layers, says):
    with pytest.raises(ValueError, match="minference: pattern .*pattern.json") as error:
        methods.get(pattern_file(tmp_path, layers))
    assert says in str(error.value)


def test_other_errors_name_the_parameter(tmp_path):
    with pytest.raises(ValueError, match="minference: pattern .*none.json: No such file"):
        methods.get(f"minference:pattern={tmp_path}/none.json")
    with pytest.raises(ValueError, match="minference: vertical is -1"):
        methods.get("minference:vertical=-1")
    with pytest.raises(TypeError, match="minference: slash is 'many'"):
        methods.get("minference:slash=many")
    entry = {"7": ["vertical_and_slash", 30, 100, 1]}
    q, k, v = tm.inputs(64, 64)
    with pytest.raises(ValueError, match="has head 7; the call has 2"):
        methods.get(pattern_file(tmp_path, [entry])).attention(tm.call(q, k, v))
    with pytest.raises(ValueError, match="is per layer"):
        methods.get(pattern_file(tmp_path, [entry, entry])).attention(tm.call(q, k, v))


def test_padded_batch_is_each_sequence_alone():
    q, k, v = (x.repeat(2, 1, 1, 1) for x in tm.inputs(400, 400, (4, 2), peak=2.0))
    lengths, starts = torch.tensor([400, 260]), torch.tensor([0, 90])
    method = methods.get("minference:vertical=35,slash=102,min_q=0,min_kv=0")
    out = pbs_attn.pbs_attention(
        q, k, v, config=method, q_start=starts, q_len=lengths, kv_start=starts, kv_len=lengths
    )
    for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        rows = slice(start, start + length)
        alone, _ = method.attention(tm.call(q[b, :, rows], k[b, :, rows], v[b, :, rows]))
        assert torch.equal(out[b, :, rows], alone)
        assert not out[b, :, :start].any() and not out[b, :, start + length :].any()


def test_every_tensor_names_its_device():
    method = methods.get("minference:vertical=35,slash=105")
    tm.assert_devices_are_named(method, tm.call(*tm.inputs(300, 400, (4, 2))))
