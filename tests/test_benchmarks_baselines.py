# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks compare to, on what inputs, and the search for the break-even length."""

import json
from types import SimpleNamespace

import fake_gpu
import pytest
import torch
from fake_gpu import TINY, FakeGpu, arguments, work_of

from benchmarks import attend, baselines, break_even, capture, flex, harness, prefill
from pbs_attn import dense as exact
from pbs_attn.geometry import Geometry

no_tools = fake_gpu.no_tools  # for every test here


# ---- baselines --------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [600, 200])
def test_the_definition_accepts_dense_attention_only(rows):
    work = work_of(seqlen_q=rows)
    right = exact.torch_attention(work.q, work.k, work.v, Geometry())[0]
    assert baselines.error_of_last_rows(work, right) < 0.02
    assert baselines.error_of_last_rows(work, work.dense()) < 0.02
    k, v = (t.repeat_interleave(2, 1) for t in (work.k, work.v))
    seen = slice(0, 600 - rows + 1)  # a mask that starts too early
    wrong = torch.nn.functional.scaled_dot_product_attention(work.q, k[:, :, seen], v[:, :, seen])
    assert baselines.error_of_last_rows(work, wrong) > baselines.BOUND
    wrong = right.clone()
    wrong[0, 1, -1, 0] = float("nan")
    assert not baselines.error_of_last_rows(work, wrong) <= baselines.BOUND


def test_a_chunk_has_the_dense_rows_that_it_should():
    work = work_of(seqlen_q=200)
    assert [row.name for row in baselines.rows(work)] == ["dense", "sdpa"]
    for row in baselines.rows(work):
        assert baselines.error_of_last_rows(work, row.call()) < 0.02


MINE = """
import torch.nn.functional as F

def right(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

def not_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v[:, :, :1].expand_as(v), enable_gqa=True)

def broken(q, k, v):
    raise ValueError("only sm_100")
"""


def test_your_own_baseline(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    given = [
        x for name in ("right", "not_causal", "broken") for x in ("--baseline", f"{file}:{name}")
    ]
    work = work_of(*given)
    assert [row.name for row in baselines.rows(work)] == ["dense", "sdpa", "right"]
    assert "wrong result" in work.failures["not_causal"]
    assert work.failures["broken"] == "ValueError: only sm_100"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("mine.py", "allowed is FILE.py:FUNCTION"),
        ("mine.py:a b", "allowed is FILE.py:FUNCTION"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("{dir}/mine.py:nothing", "AttributeError"),
        ("{dir}/bad.py:f", "ZeroDivisionError"),
    ],
)
def test_a_wrong_baseline_flag_is_said(tmp_path, spec, message):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(SystemExit, match=message):
        baselines.load(spec.format(dir=tmp_path))


def test_every_failure_on_a_gpu_is_kept_with_its_message():
    work = work_of(fake=True)
    names = {row.name for row in attend.with_baselines(work)}
    assert {"attend", "attend 30%", "dense"} <= names
    # CPU tensors: no cuDNN; the packages are not installed here
    expected = set(baselines.ON_GPU) | {"flex"}
    assert expected == (expected & names) | set(work.failures)
    assert work.failures["flex"] == "RuntimeError: no compiler"
    assert "flash_attn_interface" in work.failures.get("fa3", "flash_attn_interface")


# ---- FlexAttention ----------------------------------------------------------------------------
def dense_mask_of(blocks, seqlen_q, seqlen_k):
    """bool [1, H, Nq, Nk] of a BlockMask: full blocks as they are, partial ones under mask_mod."""
    size = blocks.BLOCK_SIZE[0]
    q = torch.arange(seqlen_q)[:, None]
    k = torch.arange(seqlen_k)
    seen = blocks.mask_mod(0, 0, q, k)

    def tokens(count, order):
        listed = torch.arange(order.shape[-1]) < count[..., None]
        chosen = torch.zeros(order.shape, dtype=torch.bool).scatter(-1, order.long(), listed)
        chosen = chosen.repeat_interleave(size, 2).repeat_interleave(size, 3)
        return chosen[:, :, :seqlen_q, :seqlen_k]

    partial = tokens(blocks.kv_num_blocks, blocks.kv_indices)
    full = tokens(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (partial & full).any()
    return (partial & seen) | full, full


@pytest.mark.parametrize("rows", [600, 88])
def test_block_mask_is_what_attend_computes(rows):
    work = work_of("--block-size", "64", "--segment-size", "128", seqlen_q=rows)
    blocks = flex.block_mask(work, work.bits)
    assert blocks.seq_lengths == (rows, 600)
    mask, full = dense_mask_of(blocks, rows, 600)
    k, v = (t.repeat_interleave(2, 1).float() for t in (work.k, work.v))
    right = torch.nn.functional.scaled_dot_product_attention(work.q.float(), k, v, attn_mask=mask)
    got = work.attend_bits(work.bits)[0].float()
    assert (got - right).abs().max() < 0.02 * right.abs().max()
    assert full.any() and mask.sum() < torch.ones(rows, 600).tril(600 - rows).sum() * 4
    assert flex.error(work, right) < 0.02 < flex.error(work, right.roll(1, 2))


def test_quick_compiles_once():
    assert flex.middle("8k,128k,32k") == 32768 and flex.middle("4k") == 4096


# ---- captures ---------------------------------------------------------------------------------
def test_a_capture_can_be_kept_and_cut(tmp_path, monkeypatch):
    made = [torch.randn(1, h, 300, 32) for h in (4, 2, 2)]
    asked = []

    def layer(name, text, length, device):
        asked.append((name, text, length))
        return tuple(t[:, :, :length] for t in made), 3

    monkeypatch.setattr(capture, "_layer", layer)
    file = tmp_path / "qkv.safetensors"
    said = capture.save("tiny,book.txt", 300, file)
    assert asked[0] == ("tiny", "book.txt", 300) and "layer 3 of tiny" in said
    for length in (100, 300, 5000):
        q, k, v = capture.capture(str(file), length, torch.bfloat16)
        for got, whole in zip((q, k, v), made, strict=True):
            assert torch.equal(got, whole[:, :, :length].bfloat16())
    asked.clear()  # one reading of the model serves every length and dtype
    for length, dtype in ((100, torch.bfloat16), (250, torch.float32)):
        q, k, v = capture.capture("tiny", length, dtype, longest=300)
        assert torch.equal(v, made[2][:, :, :length].to(dtype))
    assert {length for _, _, length in asked} == {300}
    assert work_of("--capture", "tiny", "--lengths", "100,200").q.shape == (1, 4, 300, 32)
    work = work_of("--capture", str(file))
    assert str(work.shape) == "bfloat16 N=300 H=4/2 D=32"
    with pytest.raises(SystemExit, match="saved already"):
        capture.save(str(file), 300, tmp_path / "other.safetensors")


# ---- break-even -------------------------------------------------------------------------------
def crossing(at):
    """Dense over sparse time that crosses 1 at `at`."""
    return lambda n: n / at


@pytest.mark.parametrize("at", [300, 1000, 1025, 3000, 5000, 7000])
def test_search_finds_the_crossing_to_a_quarter(at):
    ladder = [512, 1024, 2048, 4096, 8192, 16384]
    won, seen = break_even.search(ladder, crossing(at), 256)
    assert seen[won] > 1 and (won == 512 or at <= won <= 1.34 * at)
    assert len(seen) <= 9


def test_search_needs_two_wins_running_and_says_when_there_is_none():
    lucky = {512: 1.2, 1024: 0.8, 2048: 1.1, 4096: 2.0}
    won, seen = break_even.search(lucky, lambda n: lucky.get(n, 0.9), 256)
    assert won == 2048 and 1024 in seen
    assert break_even.search([512, 1024], lambda n: 0.5, 256)[0] is None
    assert break_even.search([512, 1024], crossing(1000), 256)[0] == 1024


def test_break_even_prints_the_line(capsys):
    args = arguments("--lengths", "512,1k,2k,4k,8k,16k", "--block-size", "128")

    def at(rows, keys):  # sparse: overhead for every key, and a third of dense's work
        dense = rows * keys
        return dense / (dense / 3 + 1500 * keys)

    found = break_even.find(args, "bf16", at)
    assert 2250 <= found[0] <= 2250 * 1.34 and 2250 <= found[1] <= 2250 * 1.34
    device = SimpleNamespace(family="cuda:9.0")
    line = break_even.line(device, {"bf16": found, "fp16": (256, 16384)})
    assert f'"cuda:9.0": Lengths({found[0]}, 16384),' in line
    assert "breaks even for fp16" in break_even.line(device, {"bf16": found, "fp16": (None, None)})


@pytest.mark.parametrize("device, opened", [("cpu", None), ("cuda", FakeGpu)])
def test_break_even_program(device, opened, tmp_path, capsys):
    out = tmp_path / "even.json"
    argv = [*TINY, "--device", device, "--break-even", "--json", str(out)]
    argv[1] = "256,512"
    assert harness.main("prefill", prefill.rows, argv, opened) == 0
    saved = json.loads(out.read_text())
    assert saved["complete"] and {s["keys"] for s in saved["sizes"]} <= set(range(256, 513))
    assert "256 rows of     256" in capsys.readouterr().out
    for size in saved["sizes"]:
        assert size["dense_ms"] > 0 and size["sparse_ms"] > 0 and size["dense"] != "prefill"
