# SPDX-License-Identifier: Apache-2.0
"""Cuts the shipped copies out of the full golden files: python tests/data/make.py GOLDEN_FOLDER."""

import json
import lzma
import pathlib
import sys

from safetensors.torch import load_file, save

HERE = pathlib.Path(__file__).parent
COLUMNS = 8  # of v and of the outputs: attention treats every column alike
# lp=1, pb=1: two-byte elements, so that high and low bytes are modelled apart
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 2, "lp": 1, "pb": 1}]


def shrink(name, tensors, entry, heads):
    """The first `heads` query heads, and what belongs to them."""
    kv_heads = max(1, heads * tensors["k"].size(0) // tensors["q"].size(0))
    partial_group = heads * tensors["k"].size(0) % tensors["q"].size(0) != 0
    small = {}
    for key, x in tensors.items():
        if "group" in key and partial_group:
            continue
        if key != "rows":
            x = x[: kv_heads if key in ("k", "v") or x.size(0) == tensors["k"].size(0) else heads]
        if key == "v" or key.endswith((".out", ".out_naive")):
            x = x[..., :COLUMNS]
        small[key] = x.contiguous()
    differs = {
        what: [x for x in where if x[0] < heads] if isinstance(where, list) else None
        for what, where in entry["orig_vs_spec"].items()
    }
    return save(small, {"name": name, "orig_vs_spec": json.dumps(differs)})


def metric_rows(lines, per_task=12, per_score=3, longest=4500):
    """The shortest rows of every task, at most `per_score` of them with the same score."""

    def size(row):
        return sum(map(len, [row["prediction"], *row["answers"], *(row["all_classes"] or [])]))

    rows, seen, kept = [json.loads(line) for line in lines], {}, []
    for number in sorted(range(len(rows)), key=lambda i: (size(rows[i]), i)):
        task, score = rows[number]["dataset"], round(rows[number]["score"], 3)
        scores = seen.setdefault(task, [])
        room = len(scores) < per_task and scores.count(score) < per_score
        if room and size(rows[number]) < longest:
            scores.append(score)
            kept.append(number)
    return [lines[number] for number in sorted(kept)]


def main(folder):
    name = "longbench_metrics.jsonl"
    rows = metric_rows((folder / name).read_text(encoding="utf-8").splitlines())
    data = "".join(f"{row}\n" for row in rows).encode()
    (HERE / f"{name}.xz").write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    print(f"{name}.xz: {len(rows)} rows")
    index = json.loads((folder / "attention_index.json").read_text())
    for name, heads in (("real_n1100_h3k1_d64_bf16", 1), ("ties_n640_h2k1_d64_fp32", 2)):
        file = f"{name}.safetensors"
        data = shrink(name, load_file(folder / file), index[file], heads)
        packed = lzma.compress(data, format=lzma.FORMAT_XZ, filters=XZ)
        (HERE / f"{file}.xz").write_bytes(packed)
        print(f"{file}.xz: {len(data)} -> {len(packed)} bytes")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
