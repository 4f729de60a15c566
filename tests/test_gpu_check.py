# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_check.sh without a GPU: steps of every outcome, time that runs out, Ctrl-C, JSON."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
if not (ROOT / "tools" / "gpu_check").is_dir() or not (ROOT / "benchmarks").is_dir():
    pytest.skip("no tools or no benchmarks here", allow_module_level=True)

from fake_gpu import PROPERTIES  # noqa: E402
from gpu_check import cli, kernels, model, probe, report, runner, steps  # noqa: E402

GPU = {"name": "NVIDIA H200", "capability": "9.0", "driver": "580.1", "memory_bytes": 141 << 30}
ABOUT = {"gpu": GPU, "torch": "2.11.0", "python": "3.12.3", "commit": "abc", "uncommitted": False}
ABOUT |= {"cpus": 4, "command": "tools/gpu_check.sh", "minutes": 10, "partial": False}
FACTS = ABOUT | {"slug": "nvidia-h200"}


def step(name, code="pass", limit=30.0, **options):
    options = {"least": 0.1, **options}
    return runner.Step(name, "a step", [sys.executable, "-c", code], limit, **options)


def check(tmp_path, todo, required=(), seconds=60.0):
    """(the saved JSON, {name: (status, detail)})"""
    path = tmp_path / "out" / "gpu_check.json"
    work = runner.Check(path, ABOUT, list(required), seconds, tmp_path / "logs")
    assert work.run(todo, tmp_path, lambda *a, **o: None) == 0
    saved = json.loads(path.read_text())
    assert saved == work.report and saved["complete"]
    return saved, {s["name"]: (s["status"], s["detail"]) for s in saved["steps"]}


# ---- steps and their outcomes --------------------------------------------------------------------


def test_pass_and_fail(tmp_path):
    todo = [step("good", "print('fine')", required=True), step("bad", "print('oh'); exit(4)")]
    saved, seen = check(tmp_path, todo, ["good"])
    assert seen == {"good": ("passed", ""), "bad": ("failed", "exit status 4: oh")}
    assert saved["ok"] and not saved["not_ok"]  # nobody asked that `bad` pass
    assert saved["steps"][0]["tail"] == "fine\n"
    assert saved["steps"][0]["command"].startswith("python -c ")
    assert saved["gpu"]["capability"] == "9.0"  # what doctor reads


def test_required_steps_decide(tmp_path):
    todo = [step("bad", "exit(1)", required=True), step("missing", missing="no such tool")]
    saved, seen = check(tmp_path, todo, ["bad", "missing", "never"])
    assert seen["missing"] == ("recorded", "no such tool")
    assert not saved["ok"]
    assert [line.split(":")[0] for line in saved["not_ok"]] == ["bad", "missing", "never"]


@pytest.mark.parametrize("code, ok", [("exit(1)", False), ("pass", True)])
def test_findings_block_and_absent_tools_do_not(tmp_path, code, ok):
    todo = [step("found", code, blocks=True), step("gone", blocks=True, missing="not here")]
    assert check(tmp_path, todo)[0]["ok"] == ok


def test_a_program_that_is_not_there(tmp_path):
    gone = runner.Step("gone", "", ["/no/such/program"], 5)
    assert check(tmp_path, [gone])[1]["gone"][0] == "recorded"


def test_limit_ends_the_whole_group(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.3)
    code = """
        import signal, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(60)
    """
    saved, seen = check(tmp_path, [step("slow", textwrap.dedent(code), 1.0), step("next")])
    assert seen["slow"] == ("failed", "stopped after 1 s: not done within its limit")
    assert seen["next"][0] == "passed"
    assert gone(int(saved["steps"][0]["tail"].split()[0]))


def gone(pid):
    """True once no process has the number; one that waits for its parent is dead too."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_step_may_save_what_it_has_at_its_limit(tmp_path):
    code = """
        import time
        try:
            print("begun", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("saved")
    """
    saved, _ = check(tmp_path, [step("slow", textwrap.dedent(code), 2.0)])
    assert "saved" in saved["steps"][0]["tail"]


# ---- time ----------------------------------------------------------------------------------------


def test_allowance():
    a = step("a", limit=100.0, least=10.0)
    needed = step("b", least=30.0, required=True)
    absent = step("c", least=30.0, required=True, missing="x")
    assert runner.allowance(a, [], 600.0) == 100.0
    assert runner.allowance(a, [], 50.0) == 50.0
    assert runner.allowance(a, [], 9.0) == 0.0
    assert runner.allowance(a, [needed, absent], 50.0) == 20.0  # what `b` needs is kept
    assert runner.allowance(a, [needed], 39.0) == 0.0


def test_no_time_left(tmp_path):
    saved, seen = check(tmp_path, [step("a", least=5.0, required=True)], ["a"], seconds=1.0)
    assert seen["a"] == ("skipped", "no time left") and not saved["ok"]
    assert saved["not_ok"] == ["a: skipped, no time left"]


def test_required_steps_fit():
    needed = [s for s in steps.all_steps(machine()) if s.required]
    assert {s.name for s in needed} == set(steps.REQUIRED) and sum(s.least for s in needed) < 300


# ---- Ctrl-C and the file -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_midway(tmp_path, number):
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT / "tools")!r})
        from types import SimpleNamespace
        from gpu_check import cli, runner
        runner.GRACE, cli.LOGS = 0.3, cli.Path({str(tmp_path / "logs")!r})
        def step(name, code):
            return runner.Step(name, "", [sys.executable, "-c", code], 60, required=True)
        todo = [step("build", "pass"), step("ptx", "import os, time; print(os.getpid(), flush=True)"
                "; time.sleep(60)"), step("tests", "pass")]
        args = SimpleNamespace(out=cli.Path({str(tmp_path)!r}), only=[], commit=None, minutes=5)
        sys.exit(cli.check(args, {FACTS!r}, todo))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    log = tmp_path / "logs" / "ptx.log"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        while run.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(0.05)
        run.send_signal(number)
        rest = run.stdout.read()
    assert run.returncode == 128 + number
    saved = json.loads((tmp_path / "gpu_check.json").read_text())
    words = [s["status"] for s in saved["steps"]]
    assert words == ["passed", "failed", "skipped"]
    assert saved["steps"][1]["detail"] == f"stopped by {number.name}"
    assert not saved["ok"] and not saved["complete"]
    assert "stopped before its end" in rest and (tmp_path / "gpu_check.md").is_file()
    assert gone(int(saved["steps"][1]["tail"].split()[0]))


def test_the_file_is_there_after_every_step(tmp_path):
    path = tmp_path / "out" / "gpu_check.json"
    look = f"import json; print(len(json.load(open({str(path)!r}))['steps']))"
    saved, _ = check(tmp_path, [step("a", look), step("b", look)])
    assert [s["tail"] for s in saved["steps"]] == ["0\n", "1\n"]


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    runner.write_whole(path, "old")

    def fail(*names):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            runner.write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]
    runner.write_whole(path, "new")
    assert path.read_text() == "new"


# ---- what outputs mean ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status, output, expected",
    [
        (0, "========= ERROR SUMMARY: 0 errors", "passed"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
        (86, "========= Invalid __global__ write\n========= ERROR SUMMARY: 3 errors", "failed"),
        (86, "Unable to find a file, says torch\n========= ERROR SUMMARY: 3 errors", "failed"),
        (1, "========= Error: Device not supported. Please refer\nerror 999", "recorded"),
        (86, "========= Error: Device not supported. Please refer", "recorded"),
        (0, "no word of the tool", "recorded"),
        (1, "Traceback", "recorded"),
        (None, "========= COMPUTE-SANITIZER", "recorded"),
    ],
)
def test_sanitizers(status, output, expected):
    assert steps._sanitizer_judge(status, output)[0] == expected


@pytest.mark.parametrize(
    "status, output, expected",
    [
        (0, "....\n12 passed, 3 deselected in 4.2s", ("passed", "12 passed, 3 deselected in 4.2s")),
        (1, "== 1 failed, 9 passed in 3s ==", ("failed", "1 failed, 9 passed in 3s")),
        (0, "4 skipped in 1s", ("failed", "no GPU test ran: 4 skipped in 1s")),
        (5, "7 deselected in 1s", ("failed", "no GPU test was found")),
        (4, "ERROR: file not found", ("failed", "exit status 4: ERROR: file not found")),
        (-11, "Fatal", ("failed", "killed by signal 11: Fatal")),
    ],
)
def test_pytest_summaries(status, output, expected):
    assert steps._pytest_judge(status, output) == expected


def test_ptx_doctor_and_benchmarks():
    fine = "NVIDIA H200: 41 passed, 0 failed, 3 not for this GPU (9.0)"
    assert steps._ptx_judge(0, fine)[0] == "passed"
    assert steps._ptx_judge(1, fine.replace("0 failed", "1 failed"))[0] == "failed"
    assert steps._ptx_judge(0, "")[0] == "failed" and steps._ptx_judge(-9, fine)[0] == "failed"
    runs = "GPU 0       NVIDIA H200, sm_90, 140 GiB: kernels run\nself test   bfloat16 (X): ok"
    assert steps._doctor_judge(0, runs) == ("passed", "bfloat16 (X): ok")
    none = "library     cuda: none: no nvcc\nGPU 0       X: no kernels: no library"
    assert steps._doctor_judge(0, none)[0] == "failed"
    assert "no nvcc" in steps._doctor_judge(0, none)[1]
    assert steps._loaded(0, "{'file': None, 'reason': 'x'}")[0] == "failed"
    judge = steps._bench_judge(["--break-even"])
    line = '    "cuda:9.0": Lengths(256, 4096),'
    assert judge(0, f"{line}\nsaved x.json") == ("passed", f"{line.strip()}; saved x.json")


# ---- the steps of a machine ----------------------------------------------------------------------


def machine(**options):
    every = {"pytest", "hypothesis", "xdist", "transformers", "setuptools"}
    options = {"capability": "9.0", "jobs": 16, "nvcc": "/cuda/bin/nvcc", "make": "make"} | options
    return steps.Machine(
        **{"modules": frozenset(every), "sanitizer": "compute-sanitizer"} | options
    )


def test_order_and_commands(monkeypatch):
    monkeypatch.delenv("PBS_CUDA_ARCHS", raising=False)
    found = {s.name: s for s in steps.all_steps(machine())}
    assert list(found)[:3] == ["build", "ptx", "doctor"]
    assert list(found)[-4:] == ["break-even", *steps.SANITIZERS]  # these may find no time left
    assert list(found).index("variants") > max(list(found).index(n) for n in steps.REQUIRED)
    assert set(steps.TESTS) < set(found)
    assert found["build"].environment["PBS_CUDA_ARCHS"] == "90"  # no such nvcc: the GPU's own
    assert found["build"].environment["MAX_JOBS"] == "16"
    assert found["ptx"].command[-2:] == ["ptx-gpu", "NVCC=/cuda/bin/nvcc"]
    for each in found.values():  # programs and folders that a step names exist
        files = [a for a in each.command if a.startswith(("tests/", "tools/", "setup.py"))]
        assert all((ROOT / name).exists() for name in files), each.command
        assert not each.missing, each.missing


def test_less_is_said_not_failed(tmp_path):
    bare = machine(nvcc=None, no_nvcc="no nvcc", prebuilt=True, sanitizer=None, modules=frozenset())
    found = {s.name: s for s in steps.all_steps(bare)}
    for name in (*steps.TESTS, "model", "memcheck"):
        assert found[name].missing, name
    assert found["kernels"].missing is None and found["doctor"].missing is None
    assert "setup.py" not in found["build"].command
    if not (ROOT / "build/ptx/test_ptx").is_file():
        assert "no nvcc" in found["ptx"].missing


def test_programs_run_on_a_cpu(capsys):
    """What compute-sanitizer watches, and the model: their own logic."""
    assert kernels.main(["--device", "cpu", "--few"]) == 0
    assert "0 of 2 cases differ" in capsys.readouterr().out
    pytest.importorskip("transformers")
    assert model.main(["--device", "cpu", "--tiny", "--length", "400"]) == 0
    out = capsys.readouterr().out
    assert "tau 1: next-token agreement" in out and "routes {'pbs': 2, 'dense': 0}" in out


def test_kernels_that_differ_are_named(monkeypatch, capsys):
    whole, calls = kernels.Verbs.attend, []

    def wrong(self, *args):  # the second call of a case is the device's
        calls.append(args)
        out, lse = whole(self, *args)
        return (out, lse) if len(calls) % 2 else (out * 2, lse)

    monkeypatch.setattr(kernels.Verbs, "attend", wrong)
    assert kernels.main(["--device", "cpu", "--few"]) == 1
    assert capsys.readouterr().out.count("WRONG: attend") == 2
    assert kernels.difference(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


# ---- the command line ----------------------------------------------------------------------------


def test_probe():
    cuda = SimpleNamespace(is_available=lambda: True, get_device_properties=lambda i: PROPERTIES)
    found = probe.facts(cuda, lambda p: {"driver_version": "580.1"})
    assert found["slug"] == "nvidia-h200" and found["gpu"]["driver"] == "580.1"
    assert found["gpu"]["capability"] == "9.0"
    with pytest.raises(probe.NoGpu, match=r"^torch .* (sees no NVIDIA GPU|built without CUDA)"):
        probe.facts(SimpleNamespace(is_available=lambda: False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_sentence():
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "tools/gpu_check.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 3 and not done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("gpu_check: torch ")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--help"], "tools/gpu_check.sh --only ptx"),
        (["--list"], "break-even   from which"),
        (["--only", "x", "--list"], "no such step; allowed: build, ptx"),
        (["--model", "/no/such"], "no such folder"),
        (["--minutes", "0"], "allowed: more than 0"),
    ],
)
def test_command_line(arguments, said, capsys):
    try:
        status = cli.main(arguments)
    except SystemExit as error:
        status = error.code
    found = capsys.readouterr()
    assert said in found.out + found.err and status == (0 if len(arguments) == 1 else 2)


def test_dry_run(monkeypatch, capsys):
    monkeypatch.setattr(probe, "ask", lambda: FACTS)
    assert cli.main(["--dry-run", "--only", "ptx", "--minutes", "3"]) == 0
    out = capsys.readouterr().out
    assert "on NVIDIA H200" in out and "at most 120 s" in out and "at most 3 minutes" in out
    assert "doctor" not in out


def test_a_part_does_not_pass_for_the_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "ask", lambda: FACTS)
    monkeypatch.setattr(runner, "stop_on_signals", lambda: None)
    monkeypatch.setattr(cli, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(cli, "chosen", lambda args, facts: [step("ptx", required=True)])
    out = tmp_path / "out"
    assert cli.main(["--only", "ptx", "--out", str(out)]) == 0
    assert sorted(os.listdir(out)) == ["gpu_check-partial.json", "gpu_check-partial.md"]
    assert cli.main(["--out", str(out)]) == 1  # all the others did not run
    saved = json.loads((out / "gpu_check.json").read_text())
    assert "build: not run" in saved["not_ok"] and "NOT ok" in capsys.readouterr().out


def test_summary(tmp_path):
    todo = [step("a", "print('x | y'); exit(1)", required=True), step("bench", "print('8k  1.0')")]
    saved, _ = check(tmp_path, todo, ["a"])
    text = report.markdown(saved)
    assert text.startswith("## gpu_check: NOT ok\n")
    assert "NVIDIA H200, capability 9.0, 141 GiB, driver 580.1; torch 2.11.0" in text
    assert "| a | FAILED | " in text and "exit status 1: x \\| y |" in text
    assert "- a: failed, exit status 1" in text and "```\n8k  1.0\n```" in text
    assert (
        report.cell("a\n b" + "c" * 400).startswith("a bccc") and len(report.cell("d" * 999)) == 300
    )


def test_machine_folders_stay_out_of_the_results():
    text = runner.plain(f"{sys.executable} {ROOT}/setup.py in {ROOT} {Path.home()}/m")
    assert text == "python setup.py in . ~/m"
