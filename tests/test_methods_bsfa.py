# SPDX-License-Identifier: Apache-2.0
"""bsfa: block maxima against thresholds, by loops; its files; its density."""

import json
import math

import pytest
import token_methods as tm
import torch

import pbs_attn
from pbs_attn import methods
from pbs_attn.methods import bsfa

CASES = {  # rows, keys, (query heads, key heads), dtype
    "square": (640, 640, (2, 2), torch.float32),
    "ragged": (701, 701, (3, 1), torch.float32),
    "chunk": (300, 777, (4, 2), torch.float32),  # blocks of rows lie across those of positions
    "rows_before_key_0": (400, 290, (2, 1), torch.float32),
    "bf16": (512, 512, (2, 2), torch.bfloat16),
    "fp16": (450, 450, (2, 1), torch.float16),
}
HIGH = 1e300


def thresholds_file(tmp_path, table, k=64, **changes):
    """A file with table [layer][head][query block] for one budget; its text as a method."""
    document = {"method": "bsfa", "block_q": 128, "block_k": 64, "layers": {str(k): table}}
    path = tmp_path / "thresholds.json"
    path.write_text(json.dumps(document | changes))
    return f"bsfa:k={k},thresholds={path}"


def expected_blocks(q, k, limits):
    """bool [Hq, Tq, Tk], loops over blocks; limits [head][query block by position]."""
    num_q, num_k = q.shape[1], k.shape[1]
    offset, scores = num_k - num_q, tm.scores(q, k)
    blocks = torch.zeros(q.shape[0], -(-num_q // 128), -(-num_k // 64), dtype=torch.bool)
    for h in range(q.shape[0]):
        for m in range(blocks.shape[1]):
            rows = range(m * 128, min(m * 128 + 128, num_q))
            first, last = offset + rows[0], offset + rows[-1]
            if last < 0:
                continue
            place = min(max(first, 0) // 128, len(limits[h]) - 1)
            limit = -math.inf if limits[h][place] is None else limits[h][place]
            for n in range(last // 64 + 1):
                if n * 64 + 63 < first:  # wholly before the rows' own positions
                    peak = scores[h, rows[0] : rows[-1] + 1, n * 64 : n * 64 + 64].max()
                    blocks[h, m, n] = bool(peak >= limit)
                else:
                    blocks[h, m, n] = True
    return blocks


def token_mask(blocks, num_q, num_k):
    mask = blocks.repeat_interleave(128, 1)[:, :num_q].repeat_interleave(64, 2)[:, :, :num_k]
    return mask & tm.causal(num_q, num_k)


def block_density(blocks, num_q, num_k):
    """fp64 [H]: computed pairs by loops: (1 + kept share of the causal sub-blocks) / 2 per pair."""
    offset, total = num_k - num_q, torch.zeros(blocks.shape[0], dtype=torch.float64)
    for m in range(blocks.shape[1]):
        last = offset + min(m * 128 + 128, num_q) - 1
        for pair in range(-(-num_k // 128)):
            parts = [n for n in (2 * pair, 2 * pair + 1) if n * 64 <= min(last, num_k - 1)]
            if parts:
                total += (1 + blocks[:, m, parts].double().mean(1)) / 2
    return total


def run(method, q, k, v, layer=0):
    out, _, (pairs, causal) = methods.base.run(method, q[None], k[None], v[None], layer=layer)
    return out[0], pairs, causal


def limits_of(heads, blocks, seed=1):
    """Thresholds among the maxima of the inputs below, and one query block without."""
    generator = torch.Generator().manual_seed(seed)
    table = (3.0 + 2.0 * torch.rand(heads, blocks, generator=generator)).tolist()
    table[-1][1] = None
    return table


@pytest.mark.parametrize("case", CASES)
def test_reads_what_the_definition_says(case, tmp_path):
    num_q, num_k, heads, dtype = CASES[case]
    q, k, v = tm.inputs(num_q, num_k, heads, dtype=dtype)
    limits = limits_of(heads[0], 4)  # fewer than query blocks: the last one holds for the rest
    method = methods.get(thresholds_file(tmp_path, [limits]))
    blocks = expected_blocks(q, k, limits)
    given = method.blocks(tm.call(q, k, v, layer=0))
    seen = torch.arange(blocks.shape[2]) * 64 <= (
        (torch.arange(blocks.shape[1])[:, None] * 128 + 128).clamp(max=num_q) - 1 + num_k - num_q
    )
    assert torch.equal(given & seen, blocks)
    if case == "square":
        assert 0.5 < (blocks.sum() / (seen.sum() * heads[0])) < 0.95, "the case decides nothing"
    out, pairs, _ = run(method, q, k, v)
    tm.assert_attention(out, q, k, v, token_mask(blocks, num_q, num_k), case)
    expected = block_density(blocks, num_q, num_k)
    torch.testing.assert_close(pairs, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_no_threshold_is_dense(case, tmp_path):
    num_q, num_k, heads, dtype = CASES[case]
    q, k, v = tm.inputs(num_q, num_k, heads, dtype=dtype)
    method = methods.get(thresholds_file(tmp_path, [[[None]] * heads[0]]))
    out, pairs, causal = run(method, q, k, v)
    assert torch.equal(pairs, torch.full_like(pairs, causal)), "density is not exactly 1"
    tm.assert_attention(out, q, k, v, tm.causal(num_q, num_k).expand(heads[0], -1, -1), case)


def test_thresholds_out_of_reach_leave_the_diagonal(tmp_path):
    q, k, v = tm.inputs(512, 512, (2, 1))
    method = methods.get(thresholds_file(tmp_path, [[[HIGH]] * 2]))
    blocks = torch.zeros(2, 4, 8, dtype=torch.bool)
    for m in range(4):
        blocks[:, m, 2 * m : 2 * m + 2] = True
    assert torch.equal(method.blocks(tm.call(q, k, v, 0)), blocks)
    out, pairs, causal = run(method, q, k, v)
    tm.assert_attention(out, q, k, v, token_mask(blocks, 512, 512), "diagonal")
    # 10 pairs: 4 diagonal ones whole, half of the other 6 for their Q K^T.
    assert (pairs.tolist(), causal) == ([7.0, 7.0], 10)


def test_a_maximum_at_its_threshold_is_kept(tmp_path):
    q, k, v = tm.inputs(256, 256, (1, 1))
    peaks = torch.cat([found for _, found in bsfa.maxima(tm.call(q, k, v))], 1)
    limit = float(peaks[0, 1, 0])
    kept = methods.get(thresholds_file(tmp_path, [[[limit]]])).blocks(tm.call(q, k, v))
    assert kept[0, 1, 0]
    above = math.nextafter(limit, math.inf)
    kept = methods.get(thresholds_file(tmp_path, [[[above]]], k=3)).blocks(tm.call(q, k, v))
    assert not kept[0, 1, 0]


def test_strips_change_nothing(tmp_path, monkeypatch):
    q, k, v = tm.inputs(600, 900, (4, 2))
    method = methods.get(thresholds_file(tmp_path, [limits_of(4, 5)]))
    whole = method.blocks(tm.call(q, k, v, 0))
    monkeypatch.setattr("pbs_attn.methods.blockmath.STRIP_CELLS", 1)
    assert torch.equal(method.blocks(tm.call(q, k, v, 0)), whole)


def test_layers_and_budgets_are_told_apart(tmp_path):
    q, k, v = tm.inputs(256, 256, (2, 2))
    everything, nothing = [[None]] * 2, [[HIGH]] * 2
    text = thresholds_file(tmp_path, [everything, nothing])
    first, second = (run(methods.get(text), q, k, v, layer)[1] for layer in (0, 1))
    assert first.tolist() == [3.0, 3.0] and second.tolist() == [2.5, 2.5]
    tables = {"64": [everything], "96": [nothing]}
    text = thresholds_file(tmp_path, None, layers=tables)
    path = text.partition("thresholds=")[2]
    assert run(methods.get(f"bsfa:thresholds={path}"), q, k, v)[1].tolist() == [3.0, 3.0]
    assert run(methods.get(f"bsfa:k=96,thresholds={path}"), q, k, v)[1].tolist() == [2.5, 2.5]


def test_the_authors_tables_are_read(tmp_path):
    q, k, v = tm.inputs(512, 512, (2, 2))
    tables = torch.full((2, 3, 2, 4), -math.inf)
    tables[1, 2] = torch.tensor(limits_of(2, 4)[:1] * 2)
    path = tmp_path / "thresholds_32k.pt"
    sizes = {"q_block_size": 128, "k_block_size": 64}
    torch.save({"thresholds": tables, "k_values": [16, 64], **sizes}, path)
    method = methods.get(f"bsfa:k=64,thresholds={path}")
    blocks = expected_blocks(q, k, tables[1, 2].tolist())
    assert torch.equal(method.blocks(tm.call(q, k, v, layer=2)), blocks)
    torch.save({"thresholds": tables, "k_values": [16, 64], "why": print, **sizes}, path)
    with pytest.raises(ValueError, match="bsfa: thresholds .*thresholds_32k.pt cannot be read"):
        methods.get(f"bsfa:k=64,thresholds={path}")


def test_without_a_file_it_names_the_command():
    with pytest.raises(ValueError, match="bsfa: thresholds is None; allowed: a file made by") as e:
        methods.get("bsfa")
    assert "python -m pbs_attn eval calibrate --method bsfa" in str(e.value)


def test_errors_name_what_is_wrong(tmp_path):
    def refused(text, says, kind=ValueError):
        with pytest.raises(kind) as error:
            methods.get(text)
        assert says in str(error.value), str(error.value)

    refused(f"bsfa:thresholds={tmp_path}/none.json", "none.json cannot be read: No such file")
    table = [[[1.0]]]
    refused(thresholds_file(tmp_path, table) + ",k=32", "k is 32; allowed: a budget of")
    refused(thresholds_file(tmp_path, table) + ",k=0", "bsfa: k is 0")
    refused(thresholds_file(tmp_path, table, method="xattention"), "is for xattention")
    refused(thresholds_file(tmp_path, table, block_k=128), "with blocks of 128 x 128")
    refused(thresholds_file(tmp_path, [[[1.0], [1.0, 2.0]]]), "has no table for k=64")
    refused(thresholds_file(tmp_path, [[["x"]]]), "has no table for k=64")
    refused(thresholds_file(tmp_path, [[[]]]), "shape (1, 1, 0)")
    refused(thresholds_file(tmp_path, [1.0]), "k=64")
    (tmp_path / "list.json").write_text("[]")
    refused(f"bsfa:thresholds={tmp_path}/list.json", "list.json is no such file")
    (tmp_path / "broken.json").write_text("{")
    refused(f"bsfa:thresholds={tmp_path}/broken.json", "broken.json cannot be read")


def test_a_file_of_another_model_is_refused_at_the_call(tmp_path):
    q, k, v = tm.inputs(256, 256, (2, 2))
    text = thresholds_file(tmp_path, [[[None]] * 2, [[None]] * 2])
    method = methods.get(text)
    for call, says in (
        (tm.call(q[:1], k[:1], v[:1], 0), "has 2 layers of 2 heads; needed: layer 0 of 1 query"),
        (tm.call(q, k, v, 2), "needed: layer 2 of 2 query heads"),
        (tm.call(q, k, v), "is per layer"),
    ):
        with pytest.raises(ValueError) as error:
            method.blocks(call)
        assert says in str(error.value)


def test_padded_batch_is_each_sequence_alone(tmp_path):
    q, k, v = (x.repeat(2, 1, 1, 1) for x in tm.inputs(600, 600, (4, 2)))
    lengths, starts = torch.tensor([600, 450]), torch.tensor([0, 90])
    text = thresholds_file(tmp_path, [limits_of(4, 3)]) + ",min_q=0,min_kv=0"
    method = methods.get(text)
    out = pbs_attn.pbs_attention(
        q, k, v, config=text, q_start=starts, q_len=lengths, kv_start=starts, kv_len=lengths
    )
    for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        rows = slice(start, start + length)
        alone, *_ = run(method, q[b, :, rows], k[b, :, rows], v[b, :, rows])
        torch.testing.assert_close(out[b, :, rows], alone, rtol=1e-6, atol=1e-6)
        assert not out[b, :, :start].any()


def test_every_tensor_names_its_device(tmp_path):
    method = methods.get(thresholds_file(tmp_path, [limits_of(4, 3)]))
    tm.assert_devices_are_named(method, tm.call(*tm.inputs(300, 400, (4, 2)), 0))
