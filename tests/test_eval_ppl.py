# SPDX-License-Identifier: Apache-2.0
"""eval ppl: losses against transformers' own, pairs against formulas written down a second time."""

import math

import byte_models
import numpy
import pytest
import scipy.stats
import torch

from pbs_attn import cli, methods, patch_model
from pbs_attn.cli import CommandError, measure, models
from pbs_attn.eval import ppl, scores, store, tables, texts

LENGTH = 700
SPARSE = "pbs:tau=0.3,block=64,segment=128"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return byte_models.checkpoint(tmp_path_factory.mktemp("ppl") / "tiny")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    """(model, ids [1, LENGTH] of the shipped text)"""
    model, tokenizer = models.load(checkpoint)
    return model, models.token_ids(tokenizer, models.demo_text()[1], LENGTH)


def run(checkpoint, out, *words):
    """{(method, length): record} after `eval ppl`; its status must be 0."""
    words = [str(word) for word in words]
    status = cli.main(["eval", "ppl", "--model", checkpoint, "--out", str(out), *words])
    assert status == 0
    found = store.read(out)[1].values()
    return {(record["method"], record["length"]): record for record in found}


@pytest.fixture(scope="module")
def records(checkpoint, tmp_path_factory):
    """Of one run over LENGTH tokens: everything kept, nearly nothing kept, torch's attention."""
    names = f"full,sdpa,pbs:tau=1,xattention:tau=1,{SPARSE}"
    out = tmp_path_factory.mktemp("ppl") / "run"
    found = run(checkpoint, out, "--lengths", LENGTH, "--method", names)
    return {method: record for (method, _), record in found.items()}


# ---- formulas ------------------------------------------------------------------------------------


def test_error_of_equal_blocks_is_the_error_of_their_means():
    delta = torch.randn(40 * 16, generator=torch.Generator().manual_seed(0))
    mean, error = scores.difference(delta, block=16)
    means = delta.double().reshape(40, 16).mean(1).numpy()
    assert mean == pytest.approx(means.mean(), rel=1e-12)
    assert error == pytest.approx(scipy.stats.sem(means), rel=1e-12)


def test_error_of_chosen_tokens_is_that_of_a_ratio():
    generator = numpy.random.default_rng(0)
    delta, chosen = generator.normal(size=301), generator.random(301) < 0.2
    chosen[32:64] = False  # a block without any
    mean, error = scores.difference(torch.tensor(delta), torch.tensor(chosen), block=32)
    wanted = delta[chosen].mean()
    residuals = []
    for start in range(0, 301, 32):
        inside = [i for i in range(start, min(start + 32, 301)) if chosen[i]]
        if inside:
            residuals.append(sum(delta[i] - wanted for i in inside))
    blocks = len(residuals)
    assert blocks == 9
    variance = blocks / (blocks - 1) * sum(x * x for x in residuals) / chosen.sum() ** 2
    assert (mean, error) == pytest.approx((wanted, math.sqrt(variance)), rel=1e-12)


def test_error_is_the_spread_of_the_mean_where_neighbours_share_a_cause():
    generator = numpy.random.default_rng(1)
    shape = (400, 30, 16)  # draws, blocks, tokens
    draws = generator.normal(size=shape[:2])[..., None] + generator.normal(size=shape)
    found = [scores.difference(torch.tensor(draw.ravel()), block=16) for draw in draws]
    means, errors = numpy.array(found).T
    assert errors.mean() == pytest.approx(means.std(), rel=0.1)
    alone = draws.reshape(400, -1).std(1) / math.sqrt(30 * 16)  # as if tokens were independent
    assert alone.mean() < 0.5 * means.std()


def test_error_needs_two_blocks_and_a_token():
    ones = torch.ones(20)
    assert scores.difference(ones, block=32) == (1.0, None)
    assert scores.difference(ones, torch.zeros(20, dtype=torch.bool), block=8) == (None, None)


@pytest.mark.parametrize(("count", "first"), [(1, 0), (1024, 0), (5000, 0), (3000, 900)])
def test_bands_cover_every_token_once(count, first):
    losses = torch.rand(count, generator=torch.Generator().manual_seed(count))
    found = scores.bands(losses, first)
    assert found[0][0] == first
    assert found[-1][1] == first + count
    assert all(a[1] == b[0] for a, b in zip(found, found[1:], strict=False))
    assert all(end & (end - 1) == 0 and end >= 1024 for _, end, _ in found[:-1])
    total = sum((end - start) * mean for start, end, mean in found)
    assert total / count == pytest.approx(float(losses.double().mean()), rel=1e-9)


def test_blocks_hold_128_tokens_and_the_rest():
    losses = torch.arange(300.0)
    assert scores.block_means(losses) == [63.5, 191.5, 277.5]


# ---- scores of a model ---------------------------------------------------------------------------


def test_scores_are_those_of_the_whole_logits(loaded, monkeypatch):
    model, ids = loaded
    monkeypatch.setattr(measure, "HEAD_CHUNK", 96)
    reference = scores.Reference(measure.prefill(model, ids))
    with patch_model(model, methods.get(SPARSE + ",min_q=0,min_kv=0")), torch.inference_mode():
        ours = scores.score(model, ids, measure.prefill(model, ids), reference)
        q = model(ids).logits[0].double().log_softmax(-1)
    with torch.inference_mode():
        p = model(ids).logits[0].double().log_softmax(-1)
    losses = -q[:-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(ours.losses.double(), losses, rtol=0, atol=2e-5)
    assert torch.equal(ours.best, q.argmax(-1))
    kl = (p.exp() * (p - q)).sum(-1)
    assert kl.mean() > 0.01
    torch.testing.assert_close(ours.kl.double(), kl, rtol=1e-3, atol=1e-5)


def test_divergence_from_itself_is_zero(loaded):
    model, ids = loaded
    dense = measure.prefill(model, ids)
    assert scores.score(model, ids, dense, scores.Reference(dense)).kl.abs().max() == 0
    assert scores.score(model, ids, dense).kl is None


def test_kept_log_probabilities_change_nothing(loaded, monkeypatch):
    """Kept for all chunks, for one and for none; the head is asked for those that are not kept."""
    model, ids = loaded
    monkeypatch.setattr(measure, "HEAD_CHUNK", 96)
    chunks = -(-ids.shape[1] // 96)
    dense = measure.prefill(model, ids)
    with patch_model(model, methods.get(SPARSE + ",min_q=0,min_kv=0")):
        sparse = measure.prefill(model, ids)
    one = 96 * model.config.vocab_size * 4
    found, calls = [], []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    for room in (scores.KEPT_BYTES, one, 0):
        monkeypatch.setattr(scores, "KEPT_BYTES", room)
        reference = scores.Reference(dense)
        for _ in range(2):
            calls.clear()
            found.append(scores.score(model, ids, sparse, reference).kl)
        assert len(calls) - chunks == {one: chunks - 1, 0: chunks}.get(room, 0)
    assert all(torch.equal(kl, found[0]) for kl in found)


def test_dense_loss_is_that_of_transformers(records, loaded):
    model, ids = loaded
    with torch.inference_mode():
        wanted = float(model(ids, labels=ids).loss)
    full = records["full"]
    assert full["loss"] == pytest.approx(wanted, abs=1e-5)
    assert full["tokens"] == LENGTH - 1
    assert (full["delta"], full["kl"], full["same_next"], full["density"]) == (0, 0, 1, 1)


@pytest.mark.parametrize("method", ["sdpa", "pbs:tau=1", "xattention:tau=1"])
def test_what_keeps_everything_is_dense(records, method):
    found = records[method]
    assert abs(found["delta"]) < 1e-6
    assert abs(found["copied_delta"]) < 1e-5
    assert abs(found["kl"]) < 1e-6
    assert found["same_next"] > 0.998  # ties
    assert found["density"] == found["computed"] == 1


def copied(tokens):
    """[n - 1]: was the trigram that each token ends last seen more than 512 tokens before?"""
    found = [False] * (len(tokens) - 1)
    for end in range(2, len(tokens)):
        before = [i for i in range(2, end) if tokens[i - 2 : i + 1] == tokens[end - 2 : end + 1]]
        found[end - 1] = bool(before) and end - before[-1] > 512
    return found


def test_sparse_record_hangs_together(records, loaded):
    _, ids = loaded
    full, found = records["full"], records[SPARSE]
    assert found["density"] < 0.9
    assert found["calls"]["pbs"] == 2
    assert found["kl"] > 0.01
    assert found["same_next"] < 1
    assert found["delta"] == pytest.approx(found["loss"] - full["loss"], abs=1e-9)
    assert found["copied_delta"] == pytest.approx(found["copied_loss"] - full["copied_loss"])
    sizes = [128] * (found["tokens"] // 128) + [found["tokens"] % 128]
    assert len(found["block_losses"]) == len(sizes)
    total = sum(n * x for n, x in zip(sizes, found["block_losses"], strict=True))
    assert total / found["tokens"] == pytest.approx(found["loss"])
    assert found["copied_tokens"] == sum(copied(ids[0].tolist())) > 0


def test_paired_error_comes_from_block_losses(records):
    """The last block is one token short of 60: weights matter in the third digit only."""
    full, found = records["full"], records[SPARSE]
    pairs = zip(found["block_losses"][:5], full["block_losses"][:5], strict=True)
    error = scipy.stats.sem([a - b for a, b in pairs])
    assert found["delta_se"] == pytest.approx(error, rel=0.5)
    assert found["delta_se"] > 0


# ---- prefix --------------------------------------------------------------------------------------


def test_rest_behind_a_dense_prefix(checkpoint, loaded, tmp_path):
    model, ids = loaded
    again = SPARSE.replace("0.3", "0.30")
    found = run(checkpoint, tmp_path, "--lengths", LENGTH, "--prefix", 300,
                "--method", f"full,{SPARSE},{again}")  # fmt: skip
    whole = measure.token_losses(model, ids, measure.prefill(model, ids))[0]
    full, sparse = found["full", LENGTH], found[SPARSE, LENGTH]
    assert full["tokens"] == LENGTH - 301
    assert full["loss"] == pytest.approx(float(whole[300:].mean()), abs=1e-5)
    assert full["bands"][0][0] == 300
    chosen = torch.tensor(copied(ids[0].tolist()))[300:]
    assert full["copied_tokens"] == int(chosen.sum()) > 0
    assert full["copied_loss"] == pytest.approx(float(whole[300:][chosen].mean()), abs=1e-5)
    assert sparse["kl"] > 0.001
    assert sparse["prefix"] == 300
    # The cache of the prefix is the same for the next method.
    assert sparse["loss"] == found[again, LENGTH]["loss"]
    with patch_model(model, methods.get("full")), torch.inference_mode():
        cache = model(ids[:, :300]).past_key_values
    with patch_model(model, methods.get(SPARSE + ",min_q=0,min_kv=0")), torch.inference_mode():
        logits = model(ids[:, 300:], past_key_values=cache).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 301:])
    assert sparse["loss"] == pytest.approx(float(wanted), abs=1e-5)


# ---- the bench -----------------------------------------------------------------------------------


def test_dense_reference_without_its_record(checkpoint, records, tmp_path):
    run(checkpoint, tmp_path, "--lengths", LENGTH, "--method", "full")
    found = run(checkpoint, tmp_path, "--lengths", LENGTH, "--method", SPARSE)
    assert len(found) == 2
    for name in ("delta", "delta_se", "kl", "same_next", "copied_delta_se"):
        assert found[SPARSE, LENGTH][name] == records[SPARSE][name], name


def test_several_windows_and_texts(checkpoint, tmp_path, capsys):
    words = models.demo_text()[1].split()
    (tmp_path / "short.txt").write_text(" ".join(words[:30]), encoding="utf-8")
    (tmp_path / "long.txt").write_text(" ".join(words[:200]), encoding="utf-8")
    names = [str(tmp_path / name) for name in ("short.txt", "long.txt")]
    status = cli.main(["eval", "ppl", "--model", checkpoint, "--out", str(tmp_path / "out"),
                       "--text", *names, "--lengths", "200", "--windows", "2", "--start", "30",
                       "--method", "full,identity"])  # fmt: skip
    said = capsys.readouterr().out
    assert status == 0
    assert "short has" in said and "0 of 2 windows of 200" in said
    found = store.read(tmp_path / "out")[1].values()
    places = sorted((r["task"], r["id"], r["method"]) for r in found)
    assert places == [("long", start, method) for start in ("230", "30")
                      for method in ("full", "identity")]  # fmt: skip
    table = said[said.index("200 tokens, 2 rows") :]
    assert all(word in table for word in ("density", "copied", "identity"))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--lengths", "20k"], "20,480; allowed: up to 4,096"),
        (["--lengths", "2k,x"], "'x'; allowed"),
        (["--lengths", "300", "--prefix", "300"], "--prefix is '300'; allowed: 2 to 298"),
        (["--lengths", "300", "--windows", "0"], "at least 1 window"),
        (["--lengths", "4k", "--start", "40000"], "no text is long enough"),
        (["--text", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_bad_input_is_said_before_any_work(checkpoint, tmp_path, capsys, words, wanted):
    status = cli.main(["eval", "ppl", "--model", checkpoint, "--out", str(tmp_path / "x"), *words])
    assert status == 2
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_failing_method_leaves_the_others(checkpoint, tmp_path, capsys, monkeypatch):
    prefill = ppl._prefill

    def failing(session, method, *args):
        if method.label == "pbs":
            raise torch.OutOfMemoryError("out of memory")
        return prefill(session, method, *args)

    monkeypatch.setattr(ppl, "_prefill", failing)
    status = cli.main(["eval", "ppl", "--model", checkpoint, "--out", str(tmp_path),
                       "--lengths", "200", "--method", "full,pbs,identity"])  # fmt: skip
    assert status == 3
    found = {record["method"]: record["status"] for record in store.read(tmp_path)[1].values()}
    assert found == {"full": "ok", "pbs": "oom", "identity": "ok"}
    assert "INCOMPLETE: pbs has 0 of 1 row" in capsys.readouterr().out


# ---- texts and tables ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2k,4k", [2048, 4096]),
        ("8k..64k", [8192, 16384, 32768, 65536]),
        ("3000, 1k..3k ,1024", [1024, 2048, 3000]),
    ],
)
def test_lengths(text, wanted):
    assert texts.parse_lengths(text) == wanted


@pytest.mark.parametrize("text", ["", ",", "8k..4k", "1", "8k..", "k"])
def test_bad_lengths(text):
    with pytest.raises(CommandError, match="allowed"):
        texts.parse_lengths(text)


class Letters:
    """Tokens that are letters, behind a beginning-of-text token 1 if asked."""

    def encode(self, text, special=True):
        return [1] * special + [ord(letter) for letter in text]


def test_every_window_begins_as_the_tokenizer_begins_a_text():
    bos, ids = texts.token_ids(Letters(), "abcdefgh")
    assert bos.tolist() == [1]
    assert texts.window(bos, ids, 0, 4).tolist() == [1, *b"abc"]
    assert texts.window(bos, ids, 3, 4).tolist() == [1, *b"def"]
    assert texts.starts(8, 3, 1, 9) == [1, 4]
    tokens, times = texts.tiled(bos, ids, 12)
    assert (bytes(tokens[1:].tolist()), times) == (b"abcdefghabc", 2)
    assert texts.tiled(bos, ids, 9)[1] == 1


def test_same_text_twice_and_same_names(tmp_path):
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.txt").write_text(text, encoding="utf-8")
    found = texts.load([tmp_path / "a/t.txt", tmp_path / "b/t.txt", "demo"])
    assert [text.name for text in found] == ["t", "t+", "opticks"]
    assert texts.load(None) == texts.load(["demo"])
    with pytest.raises(CommandError, match="twice"):
        texts.load([tmp_path / "a/t.txt", tmp_path / "c/t.txt"])


def test_windows_pool_by_their_tokens():
    rows = [
        {"delta": 1.0, "delta_se": 0.3, "tokens": 100},
        {"delta": 4.0, "delta_se": 0.4, "tokens": 200},
        {"delta": None, "tokens": 1},
    ]
    mean, error = tables.pooled(rows, "delta", "tokens")
    assert mean == pytest.approx(3.0)
    assert error == pytest.approx(math.sqrt(30**2 + 80**2) / 300)
    assert tables.pooled([{"delta": 1.0, "delta_se": None, "tokens": 9}], "delta", "tokens") == (
        1.0,
        None,
    )
    assert tables.number(-1e-9, ".4f") == "0.0000"
    assert tables.number(-1e-9, "+.3f") == "+0.000"
    assert tables.number(-0.25, "+.2f") == "-0.25"
