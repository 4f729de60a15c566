# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness under our attention: the command of docs/harnesses.md, on a local task.

Nothing is downloaded: the tasks are YAML and JSON files, the model is random. What is tested is the
way through the harness, so answers are compared with those of dense attention, never with gold.
"""

import functools
import json
import random
import subprocess
import sys

import pytest
import transformers

if int(transformers.__version__.split(".")[0]) < 5:  # the second environment, behind the first
    pytest.skip("lm_eval wants the hub package of transformers 5", allow_module_level=True)

evaluator = pytest.importorskip("lm_eval.evaluator")
manager = pytest.importorskip("lm_eval.tasks.manager")

import eval_models  # noqa: E402

from pbs_attn import cli  # noqa: E402
from pbs_attn.cli.exec import STATUS_UNUSED  # noqa: E402

NAME = "pbs_attn_test_lm_eval"  # of its own: other tests of this process use the default one
EVERYTHING = "pbs:tau=1,min_q=0,min_kv=0"
TASKS = ("pbs_tiny_generate", "pbs_tiny_choice")
GENERATE = """\
task: pbs_tiny_generate
output_type: generate_until
doc_to_target: "{{{{key}}}}"
generation_kwargs: {{max_gen_toks: 6, do_sample: false, until: []}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOICE = """\
task: pbs_tiny_choice
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
COMMON = """\
doc_to_text: "{{{{context}}}}\\nThe key is"
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}, cache_dir: "{cache}"}}
test_split: test
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, tasks/ and rows.jsonl: prompts of 300 to 500 tokens with a number somewhere."""
    path = tmp_path_factory.mktemp("lm_eval")
    draw = random.Random(0)
    words = "one two three four ship lamp river stone cloud green blue under over north".split()
    rows = []
    for i in range(3):
        keys = [str(draw.randrange(10000, 99999)) for _ in range(2)]
        text = [draw.choice(words) for _ in range(300 + 80 * i)]
        text.insert(draw.randrange(250), f"The key is {keys[0]}.")
        rows.append({"context": " ".join(text), "key": keys[0], "choices": keys})
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "tasks").mkdir()
    for name, text in zip(TASKS, (GENERATE, CHOICE), strict=True):
        text = (text + COMMON).format(rows=path / "rows.jsonl", cache=path / "cache")
        (path / "tasks" / f"{name}.yaml").write_text(text)
    eval_models.tiny_checkpoint(path / "model")
    return path


def command(folder, attention, out):
    args = f"pretrained={folder / 'model'},dtype=float32,attn_implementation={attention}"
    return [
        "-m", "lm_eval", "run", "--model", "hf", "--model_args", args, "--device", "cpu",
        "--tasks", ",".join(TASKS), "--include_path", str(folder / "tasks"), "--batch_size", "1",
        "--log_samples", "--output_path", str(out),
    ]  # fmt: skip


def results(out):
    """({task: scores}, {task: answers}) of a run."""
    (file,) = out.glob("*/results_*.json")
    scores = json.loads(file.read_text())["results"]
    scores = {task: {k: v for k, v in scores[task].items() if "," in k} for task in TASKS}
    answers = {}
    for task in TASKS:
        (file,) = out.glob(f"*/samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        answers[task] = [line["resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    return scores, answers


@pytest.fixture(scope="module")
def run(folder):
    """run(method or None): status and results of `python -m pbs_attn exec ... -m lm_eval`."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    # What takes most of a run: asking pip and gcc, and reading 14,000 task files for two.
    patch.setattr(evaluator, "add_env_info", lambda found: None)
    whole = manager.TaskManager.__init__
    own = functools.partialmethod(whole, include_defaults=False)
    patch.setattr(manager.TaskManager, "__init__", own)
    known = {}

    def once(method):
        if method not in known:
            out = folder / f"out{len(known)}"
            options = ["--name", NAME, *(["--method", method, "--require-used"] if method else [])]
            attention = NAME if method else "sdpa"
            status = cli.main(["exec", *options, *command(folder, attention, out)])
            known[method] = (status, *results(out))
        return known[method]

    yield once
    patch.undo()


def values(answers):
    return [float(pair[0][0]) for line in answers["pbs_tiny_choice"] for pair in line]


def test_keeping_everything_gives_the_dense_results(run):
    (status, dense, expected), (kept_status, kept, found) = run(None), run(EVERYTHING)
    assert status == kept_status == 0
    assert kept == dense and all(dense[task] for task in TASKS)
    assert found["pbs_tiny_generate"] == expected["pbs_tiny_generate"]
    assert values(found) == pytest.approx(values(expected), abs=1e-3)


def test_a_sparse_method_answers_otherwise(run):
    """So the model of the harness does run it."""
    status, _, found = run("streaming:sink=0,window=1,min_q=0,min_kv=0")
    assert status == 0
    assert values(found) != pytest.approx(values(run(None)[2]), abs=1e-2)


def test_unused_is_told(folder, run, capsys):
    """Shorter than the method asks for: status 3, and the reason."""
    status, dense, _ = run("pbs:min_kv=9999,min_q=0")
    assert status == STATUS_UNUSED
    assert dense == run(None)[1]
    assert "dense because short_kv" in capsys.readouterr().err


def test_the_command_as_it_is_written(folder):
    """In a process of its own, under the default name."""
    words = ["exec", "--require-used", "--method", EVERYTHING]
    out = folder / "out-command"
    result = subprocess.run(
        [sys.executable, "-m", "pbs_attn", *words, *command(folder, "pbs_attn", out),
         "--limit", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "pbs_tiny_choice" in result.stdout
    assert "density 100.0%" in result.stderr
    assert results(out)[1]["pbs_tiny_generate"]
