# SPDX-License-Identifier: Apache-2.0
"""eval ttft: who runs when, what is kept, and what a time is shown beside. No time is asserted."""

import argparse
import contextlib
import itertools
import statistics

import byte_models
import numpy
import pytest
import torch

from pbs_attn import cli, methods
from pbs_attn.cli import models
from pbs_attn.eval import store, timing, ttft
from pbs_attn.eval.session import Session, Tokens

NAMES = "full,sdpa,pbs:tau=0.3"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return byte_models.checkpoint(tmp_path_factory.mktemp("ttft") / "tiny")


@pytest.fixture(scope="module")
def session(checkpoint):
    model, tokenizer = models.load(checkpoint)
    return Session(model, Tokens(tokenizer, byte_models.WINDOW), name="tiny")


def prepared(session, *words):
    """(args, plan) as the frame makes them."""
    parser = argparse.ArgumentParser()
    ttft.add_arguments(parser)
    args = parser.parse_args([str(word) for word in words])
    args.tp = args.threads = None
    args.device = "cpu"
    return args, ttft.prepare(args, session.tokens)


def chosen(names=NAMES):
    found = methods.parse(names)
    return [m if m.kind in ("stock", "dense") else m.replace(min_q=0, min_kv=0) for m in found]


def results(session, names, *words):
    """{label: record fields or exception} of the first job."""
    args, plan = prepared(session, *words)
    return {m.label: r for m, r in ttft.work_all(session, chosen(names), plan.jobs[0], args)}


def run(checkpoint, out, *words, status=0):
    """{method: record} of `eval ttft`."""
    words = ["eval", "ttft", "--model", checkpoint, "--out", out, *words]
    assert cli.main([str(word) for word in words]) == status
    return {record["method"]: record for record in store.read(out)[1].values()}


@pytest.fixture
def log(monkeypatch):
    """[(label, tokens, generate)] of every timed or warm-up run, which then takes no time."""
    calls, clock = [], itertools.count(100, 3)

    def fake(self, method, ids, generate=False):
        calls.append((method.label, ids, generate))
        return float(next(clock))  # no two agree within 2%

    monkeypatch.setattr(ttft.Bench, "_run", fake)
    return calls


# ---- parts ---------------------------------------------------------------------------------------


def test_turns():
    found = timing.rotations("ABC", 4)
    assert ["".join(turn) for turn in found] == ["ABC", "BCA", "CAB", "ABC"]


@pytest.mark.parametrize(
    ("times", "most", "runs"),
    [([9, 5, 5.09, 1], 9, 3), ([9, 5, 5.11, 1], 3, 3), ([5, 5], 1, 1), ([5, 5], 0, 0)],
)
def test_warm_up_ends_where_times_settle(times, most, runs):
    left = iter(times)
    assert timing.warm_up(lambda: next(left), most) == times[:runs]


def test_statistics_keep_to_their_names():
    samples = [3.0, 1.0, 2.0, 10.0, 4.0]
    found = timing.statistics_of(samples)
    assert (found["median"], found["min"], found["mean"]) == (3.0, 1.0, 4.0)
    assert found["std"] == pytest.approx(numpy.std(samples, ddof=1))
    assert (found["p20"], found["p80"]) == tuple(numpy.quantile(samples, [0.2, 0.8]))
    assert timing.statistics_of([2.0])["std"] is None


def test_speed_up_is_a_ratio_with_an_interval():
    generator = numpy.random.default_rng(0)
    base, fast = (list(scale * generator.lognormal(0, 0.05, 10)) for scale in (3.0, 1.0))
    ratio, low, high = timing.speedup(base, fast)
    assert ratio == pytest.approx(statistics.median(base) / statistics.median(fast))
    assert 2.5 < low <= ratio <= high < 3.5
    assert timing.speedup(base, fast) == (ratio, low, high)  # seeded
    assert timing.speedup(base, fast, mean=True)[0] == pytest.approx(sum(base) / sum(fast))
    assert timing.speedup([2.0], [1.0]) == (2.0, None, None)


def test_clock_that_fell():
    assert timing.fell(1000, 969) and not timing.fell(1000, 971)
    assert not timing.fell(None, 900) and not timing.fell(900, None)


def test_kernels_by_name():
    seen = {"aten::_scaled_dot_product_cudnn_attention": 3, "pbs_attn::attend": 2,
            "pbs_attn::select": 9, "aten::_softmax": 1}  # fmt: skip
    assert timing.kernel_names(seen, "GPU") == "SDPA cuDNN x3, pbs_attn attend (GPU) x2"
    assert timing.kernel_names({"aten::_safe_softmax": 4}, "") == "unfused (SDPA math or eager) x4"
    assert timing.kernel_names({}, "") == ""


@pytest.mark.parametrize("rows", [1, 64, 100, 1000])
def test_chunked_mlps_change_nothing(session, rows):
    model, ids = session.model, torch.randint(256, (1, 300))
    with torch.inference_mode():
        wanted = model(ids).logits
        with timing.mlp_chunks(model, rows):
            found = model(ids).logits
            assert all("forward" in layer.mlp.__dict__ for layer in model.model.layers)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not any("forward" in layer.mlp.__dict__ for layer in model.model.layers)


def test_a_forward_that_a_hook_had_set_is_set_again(session):
    module = session.model.model.layers[0].mlp
    module.forward = own = module.forward  # as accelerate does
    try:
        with timing.mlp_chunks(session.model, 64):
            assert module.__dict__["forward"] is not own
        assert module.__dict__["forward"] is own
    finally:
        del module.forward


def test_chunks_are_no_longer_than_asked(session):
    seen = []
    with contextlib.ExitStack() as stack:
        hook = session.model.model.layers[0].mlp.gate_proj.register_forward_hook
        stack.callback(hook(lambda m, args, out: seen.append(args[0].shape[1])).remove)
        stack.enter_context(timing.mlp_chunks(session.model, 128))
        with torch.inference_mode():
            session.model(torch.randint(256, (1, 300)))
    assert seen == [128, 128, 44]


def test_models_without_an_mlp_are_refused():
    with pytest.raises(cli.CommandError, match="--mlp-chunk is 8"):
        with timing.mlp_chunks(torch.nn.Linear(2, 2), 8):
            pass


# ---- protocols -----------------------------------------------------------------------------------


def test_strict_takes_turns(session, log):
    found = results(session, NAMES, "--lengths", 300, "--repeat", 4)
    full, sdpa, pbs = (m.label for m in chosen())
    order = [label for label, _, _ in log]
    assert order[:9] == [full] * 3 + [sdpa] * 3 + [pbs] * 3  # warm-up, three at most
    assert order[9:] == [full, sdpa, pbs, sdpa, pbs, full, pbs, full, sdpa, full, sdpa, pbs]
    assert not any(generate for _, _, generate in log)
    assert len({tuple(ids[0].tolist()) for _, ids, _ in log}) == 1  # always the document
    for label, places in ((full, [0, 5, 7, 9]), (sdpa, [1, 3, 8, 10]), (pbs, [2, 4, 6, 11])):
        assert found[label]["order"] == places
        assert found[label]["samples"] == [100.0 + 3 * (9 + place) for place in places]
        assert len(found[label]["warmups"]) == 3
        assert found[label]["with"] == [full, sdpa, pbs]


def test_paper_warms_up_on_random_tokens(session, log, tmp_path):
    (tmp_path / "b.txt").write_text("another text " * 50, encoding="utf-8")
    (tmp_path / "a.txt").write_text(models.demo_text()[1], encoding="utf-8")
    found = results(
        session, "full,pbs", "--text", tmp_path / "a.txt", tmp_path / "b.txt", "--lengths", 300,
        "--protocol", "paper", "--repeat", 5,
    )  # fmt: skip
    assert [label for label, _, _ in log] == ["full"] * 35 + ["pbs"] * 35
    assert all(generate for _, _, generate in log)
    inputs = [tuple(ids[0].tolist()) for _, ids, _ in log]
    assert len(set(inputs[:30])) == 30
    a, b = inputs[30], inputs[31]
    assert inputs[30:35] == inputs[65:] == [a, b, a, b, a]
    assert bytes(b).startswith(b"another") or a != b
    assert found["pbs"]["mean"] == pytest.approx(statistics.mean(found["pbs"]["samples"]))
    assert len(found["pbs"]["warmups"]) == 30


@pytest.mark.parametrize(
    ("length", "words", "samples", "warmups"),
    [
        (8192, (), 10, 3),
        (2**18, (), 5, 1),
        (2**18, ("--repeat", "7", "--warmups", "2"), 7, 2),
        (2**18, ("--protocol", "paper"), 5, 30),
    ],
)
def test_counts_by_length(session, length, words, samples, warmups):
    args, _ = prepared(session, "--lengths", "300", *words)
    assert (ttft.samples(args, length), ttft.warmups(args, length)) == (samples, warmups)


def test_default_lengths_are_not_all_whole_blocks(session):
    _, plan = prepared(session)
    assert any(job.length % 128 for job in plan.jobs)
    assert any(job.length % 256 == 0 for job in plan.jobs)


# ---- what stands beside a time -------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(session):
    return results(session, NAMES, "--lengths", 500, "--repeat", 2)


def test_a_time_is_a_time(real):
    for record in real.values():
        assert len(record["samples"]) == 2 and min(record["samples"]) > 0
        assert record["peak_gb"] is None  # on a CPU


def test_answer_beside_the_time(session, real):
    ids = torch.tensor([session.tokens.encode(models.demo_text()[1])[:500]])
    with torch.inference_mode():
        logits = session.model(ids).logits[0, -1]
    full, sdpa, pbs = (real[m.label] for m in chosen())
    for record in (full, sdpa):
        assert record["first_token"] == int(logits.argmax())
        assert record["same_first"] is True and abs(record["kl"]) < 1e-6
        assert record["density"] == 1
    assert full["kl"] == 0
    assert pbs["density"] < 1 and pbs["kl"] > 1e-4
    assert pbs["same_first"] == (pbs["first_token"] == full["first_token"])
    bench = ttft.Bench(session, *_args_and_job(session))
    with bench.using(chosen("full")[0]):
        assert bench._first_token(ids) == bench._generate(ids) == full["first_token"]


def _args_and_job(session):
    args, plan = prepared(session, "--lengths", 500)
    return args, plan.jobs[0]


def test_dense_kernel_is_named(session, real, checkpoint):
    full, sdpa, pbs = (real[m.label]["backend"] for m in chosen())
    assert full.startswith("pbs_attn attend (") and full.endswith(" x2")
    assert sdpa == "sdpa: SDPA flash for CPUs x2"
    assert pbs.startswith("pbs_attn prefill (")
    session.model.set_attn_implementation("eager")
    try:
        bench = ttft.Bench(session, *_args_and_job(session))
        _, fields = bench.look(chosen("sdpa")[0])
    finally:
        session.model.set_attn_implementation("sdpa")
    assert fields["backend"] == "eager: unfused (SDPA math or eager) x2"


def test_nothing_is_counted_while_timing(session, monkeypatch):
    """Counting costs time: a record may only be open in the run that is not timed."""
    from pbs_attn import stats

    open_records = []
    bench = ttft.Bench(session, *_args_and_job(session))
    method = chosen("pbs")[0]
    bench.memory[method.label] = timing.Memory(session.device)
    monkeypatch.setattr(bench, "_first_token", lambda ids: open_records.append(stats.recording()))
    bench._run(method, bench.inputs[0])
    assert open_records == [False]


def test_cache_is_measured(session):
    bench = ttft.Bench(session, *_args_and_job(session))
    _, fields = bench.look(chosen("full")[0])
    assert fields["cache_gb"] * 1e9 == 2 * 2 * 2 * 500 * 64 * 4  # layers, K and V, heads, N, D


# ---- documents -----------------------------------------------------------------------------------


def test_short_text_is_repeated_with_a_warning(session, tmp_path, log):
    path = tmp_path / "short.txt"
    path.write_text("0123456789" * 25, encoding="utf-8")
    words = ("--text", path, "--lengths", "200,600,5000", "--repeat", 1)
    _, plan = prepared(session, *words)
    assert [job.payload["tiled"] for job in plan.jobs] == [1, 3, 20]
    assert [len(job.payload["inputs"][0]) for job in plan.jobs] == [200, 600, 5000]
    warnings = [note for note in plan.notes if "WARNING" in note]
    assert len(warnings) == 3
    assert "repeated 3 times to fill 600" in warnings[0]
    assert "more than the model's window of 4,096" in warnings[2]
    found = results(session, "full", "--text", path, "--lengths", 600, "--repeat", 1)
    assert found["full"]["tiled"] == 3
    record = {"method": "full", "task": "short", "id": "strict", "length": 600, "status": "ok"}
    assert "repeated 3 times" in ttft.summary([record | found["full"]], ["full"])


# ---- the bench -----------------------------------------------------------------------------------


def test_no_memory_is_a_row(checkpoint, tmp_path, monkeypatch, capsys):
    run_once = ttft.Bench._run

    def failing(self, method, ids, generate=False):
        if method.label == "sdpa":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return run_once(self, method, ids, generate)

    monkeypatch.setattr(ttft.Bench, "_run", failing)
    found = run(checkpoint, tmp_path, "--lengths", 300, "--repeat", 2, "--method",
                "full,sdpa,identity", status=3)  # fmt: skip
    assert {name: record["status"] for name, record in found.items()} == {
        "full": "ok", "sdpa": "oom", "identity": "ok"
    }  # fmt: skip
    assert len(found["identity"]["samples"]) == 2
    assert found["identity"]["with"] == ["full", "sdpa", "identity"]  # the others went on in turns
    assert "INCOMPLETE: sdpa: oom" in capsys.readouterr().out


def test_finished_methods_stay(checkpoint, tmp_path, capsys):
    words = ("--lengths", 300, "--repeat", 2)
    first = run(checkpoint, tmp_path, *words, "--method", "full")
    capsys.readouterr()
    both = run(checkpoint, tmp_path, *words, "--method", "full,pbs:tau=0.3")
    assert both["full"] == first["full"]
    assert both["pbs:tau=0.3"]["with"] == ["pbs:tau=0.3"]
    assert both["pbs:tau=0.3"]["kl"] > 0  # dense was run for it
    said = capsys.readouterr().out
    assert "1 done, 1 to do" in said
    assert "not all methods took turns" in said
    table = said[said.index("300 tokens of opticks, strict") :]
    assert all(word in table for word in ("TTFT", "speed-up", "density", "same first", "attend"))
    again = run(checkpoint, tmp_path, *words, "--method", "full,pbs:tau=0.3")
    assert again == both


def test_other_settings_need_another_folder(checkpoint, tmp_path, capsys):
    run(checkpoint, tmp_path, "--lengths", 200, "--repeat", 1, "--method", "full")
    run(checkpoint, tmp_path, "--lengths", 200, "--repeat", 2, "--method", "full", status=2)
    assert "differs in repeat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--repeat", "0"), "--repeat is 0; allowed: 1 or more"),
        (("--warmups", "-1"), "--warmups is -1; allowed: 0 or more"),
        (("--mlp-chunk", "-1"), "--mlp-chunk is -1"),
        (("--lengths", "no"), "--lengths has 'no'"),
        (("--tp", "2"), "--tp is 2"),
    ],
)
def test_bad_input_is_said_before_any_work(checkpoint, tmp_path, capsys, words, wanted):
    run_words = ["eval", "ttft", "--model", checkpoint, "--out", str(tmp_path / "x"), *words]
    assert cli.main(run_words) == 2
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
