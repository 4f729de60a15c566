# SPDX-License-Identifier: Apache-2.0
"""Run folders with made-up records, in the format of pbs_attn/eval/store.py."""

import json
import random
import time

from pbs_attn.eval.report import document

LABELS = ("full", "pbs", "meanpool")
DENSITY = {"full": 1.0, "identity": 0.45, "pbs": 0.35, "pbs+": 0.34, "meanpool": 0.2,
           "xattention": 0.25}  # fmt: skip


def density_of(label):
    return DENSITY.get(label.partition(":")[0], 0.5)


def run_json(bench, records, *, identity=None, model="Llama-3.1-8B-Instruct", parameters=8.03e9,
             expected=None, **more):  # fmt: skip
    labels = list(dict.fromkeys(record["method"] for record in records)) or ["full"]
    if expected is None:
        expected = {}
        for record in records:
            rows = expected.setdefault(record["method"], {}).setdefault(record["task"], {})
            rows.setdefault(str(record["length"]), set()).add(record["id"])
        expected = {
            label: {t: {n: len(ids) for n, ids in x.items()} for t, x in tasks.items()}
            for label, tasks in expected.items()
        }
    return {
        "format": 1, "bench": bench,
        "identity": {"dtype": "bfloat16", "seed": 42, "chat": True} | (identity or {}),
        "methods": {label: {"method": label} for label in labels}, "expected": expected,
        "model": {"name": f"models/{model}", "parameters": parameters},
        "machine": {"cpu": "made up"}, "git_commit": "0" * 40, "runs": [{"limit": None}],
    } | more  # fmt: skip


def write(folder, bench, records, shards=1, **options):
    """A run folder; the records are dealt to `shards` files. -> the folder"""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run_json(bench, records, **options)))
    for shard in range(shards):
        lines = [json.dumps(record) + "\n" for record in records[shard::shards]]
        (folder / f"records-{shard}of{shards}.jsonl").write_text("".join(lines))
    return folder


def record(bench, task, name, method, length=0, **fields):
    density = density_of(method)
    return {
        "bench": bench, "task": task, "id": str(name), "length": length, "method": method,
        "shard": "0/1", "status": "ok", "error": None, "seed": 42, "time": time.time(),
        "density": density, "computed": density + 0.02 * (density < 1), "prefill_s": 0.5,
        "total_s": 1.0, "calls": {}, "reasons": {}, "peak_gb": None,
    } | fields  # fmt: skip


def failed(old, status="oom"):
    """The record of the same row after it failed."""
    keep = ("bench", "task", "id", "length", "method", "shard", "seed", "time")
    return {name: old[name] for name in keep} | {"status": status, "error": "made to fail"}


def scored(bench, scores, labels=LABELS, **fields):
    """Records from {(task, length): {label: [score 0..1]}}, ids in order."""
    return [
        record(bench, task, i, label, length, score=score, pred=f"{score:.3f}", metric="made up",
               prompt_tokens=fields.get("prompt_tokens", 5000), cut_tokens=0,
               **{k: v for k, v in fields.items() if k != "prompt_tokens"})
        for (task, length), by_label in scores.items()
        for label in labels
        for i, score in enumerate(by_label[label])
    ]  # fmt: skip


def noisy(rng, rows, shift=0.0):
    return [min(1.0, max(0.0, rng.random() + shift)) for _ in range(rows)]


def longbench(labels=LABELS, tasks=None, rows=4, seed=0):
    from pbs_attn.eval import recipes

    rng, found = random.Random(seed), []
    for task in tasks or recipes.TASKS:
        base = noisy(rng, rows)
        for label in labels:
            for i, score in enumerate(base):
                changed = label != "full" and rng.random() < 0.5
                value = min(1, max(0, score + rng.gauss(-0.02, 0.2))) if changed else score
                found.append(record(
                    "longbench", task, i, label, score=value, pred=f"{task} {value:.3f}",
                    metric="qa_f1", prompt_tokens=3000 * (i + 1), cut_tokens=0, answers=["x"],
                    first_token=int(7 * score) + int(changed and rng.random() < 0.3),
                    meta={"words": 900 * i, "category": "x", "language": "en"},
                ))  # fmt: skip
    return found


def longbench2(labels=LABELS, rows=60, seed=0):
    rng, found = random.Random(seed), []
    for i in range(rows):
        meta = {"difficulty": ("easy", "hard")[i % 2], "length": ("short", "medium", "long")[i % 3]}
        right = rng.random() < 0.35
        for label in labels:
            score = float(right if label == "full" or rng.random() < 0.8 else not right)
            none = score == 0 and i % 5 == 0
            found.append(record(
                "longbench2", "longbench2", f"{i:04x}", label, score=score, metric="choice",
                pred=f"({'ABCD'[int(score)]})", pred_used=None if none else "A", meta=meta,
                compensated=0.25 if none else score, prompt_tokens=20000 + 2000 * i, cut_tokens=0,
            ))  # fmt: skip
    return found


def ruler(labels=LABELS, tasks=("niah_single_1", "niah_multikey_3", "vt"), rows=15,
          lengths=(4096, 8192, 16384), seed=0):  # fmt: skip
    rng = random.Random(seed)
    scores = {}
    for task in tasks:
        for length in lengths:
            base = [float(rng.random() < 1.1 - length / 40000) for _ in range(rows)]
            scores[task, length] = {
                label: [x if label == "full" else x * (rng.random() < 0.85) for x in base]
                for label in labels
            }
    return scored("ruler", scores, labels)


def ppl(labels=LABELS, texts=("worked", "popular"), lengths=(2048, 4096), seed=0):
    rng, found = random.Random(seed), []
    for text in texts:
        for length in lengths:
            tokens = length - 1
            sizes = [128] * (tokens // 128) + [tokens % 128] * (tokens % 128 > 0)
            base = [3 + rng.gauss(0, 0.3) for _ in sizes]
            for label in labels:
                worse = 0 if label == "full" else 0.05 * (1 - density_of(label))
                blocks = [x + (rng.gauss(worse, 0.04) if worse else 0) for x in base]
                found.append(loss_record(text, length, label, blocks, base))
    return found


def loss_record(text, length, label, blocks, base):
    tokens = length - 1
    sizes = [128] * (len(blocks) - 1) + [tokens - 128 * (len(blocks) - 1)]
    loss = sum(x * n for x, n in zip(blocks, sizes, strict=True)) / tokens
    delta = loss - sum(x * n for x, n in zip(base, sizes, strict=True)) / tokens
    bands = [[0, 1024, loss], [1024, length - 1, loss]] if length > 1024 else [[0, tokens, loss]]
    sparse = label != "full"
    return record(
        "ppl", text, 0, label, length, tokens=tokens, loss=loss, block_losses=blocks, bands=bands,
        copied_loss=2.0, copied_tokens=40, delta=delta, delta_se=0.003 * sparse, prefix=0,
        copied_delta=3 * delta, copied_delta_se=0.02 * sparse, kl=abs(delta), worst=1.0,
        same_next=1 - 2 * abs(delta),
    )  # fmt: skip


def agreement(labels=LABELS, rows=40, lengths=(2048, 4096), seed=0):
    rng, found = random.Random(seed), []
    for length in lengths:
        for i in range(rows):
            for label in labels:
                same = 16 if label == "full" else min(16, int(rng.expovariate(1 / 12)))
                found.append(record(
                    "agreement", "text", i, label, length, first_same=same > 0, same_tokens=same,
                    n=16, identical=same == 16, tokens=list(range(16)), kl_first=0.01 * (16 - same),
                    text="...", prompt_tokens=length, cut_tokens=0,
                ))  # fmt: skip
    return found


def ttft(labels=LABELS, lengths=(8192, 16384, 32768, 65536, 131072), samples=10, seed=0):
    rng, found = random.Random(seed), []
    for length in lengths:
        for label in labels:
            share = density_of(label) * (8192 / length) ** 0.2
            seconds = 1e-5 * length + 2e-9 * length**2 * min(1, share) + 0.01 * (label != "full")
            times = [seconds * (1 + 0.04 * rng.random()) for _ in range(samples)]
            found.append(record(
                "ttft", "book", "strict", label, length, samples=times, protocol="strict",
                median=sorted(times)[samples // 2], min=min(times), tiled=1, beyond_window=False,
                clock_fell=False, same_first=True, kl=0.001 * (label != "full"), backend="sdpa",
                order=list(range(samples)), peak_gb=20.0, density=min(1, share) if label != "full"
                else 1.0, warmups=[seconds],
            ))  # fmt: skip
    return found


MAKERS = {"longbench": longbench, "longbench2": longbench2, "ruler": ruler, "ppl": ppl,
          "agreement": agreement, "ttft": ttft}  # fmt: skip


def write_all(folder, **options):
    """A run folder of every bench below `folder`; -> their paths."""
    return [write(folder / name, name, make(), **options) for name, make in MAKERS.items()]


def parts(*folders, **options):
    return document.parts(document.views(folders, **options))


def table(part, slug):
    return next(found for found in part.tables if found.slug == slug)


def rows(part, slug, keys=1):
    """{first cells: {column: cell}} of a table."""
    found = table(part, slug)
    names = [column.name for column in found.columns]
    return {
        row[0] if keys == 1 else tuple(row[:keys]): dict(zip(names, row, strict=True))
        for row in found.rows
    }


def section(*folders):
    (part,) = parts(*folders)
    return part
