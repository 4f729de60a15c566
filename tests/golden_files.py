# SPDX-License-Identifier: Apache-2.0
"""Reads the golden vectors: the shipped cuts in tests/data, and the full files where they are.

The full set lies in golden/ of the folder that PBS_ATTN_DATA names. Nothing is skipped without it:
the shipped cuts hold an instance of every check.
"""

import json
import lzma
import os
import pathlib
from typing import NamedTuple

import torch

HERE = pathlib.Path(__file__).parent
FULL_SET = pathlib.Path(os.environ.get("PBS_ATTN_DATA", HERE / "data"))
BLOCK, SEGMENT = 128, 256


class Golden(NamedTuple):
    name: str
    tensors: dict
    differs: dict  # authors' code against the specification: what -> [[head, m, n], ...]

    def __getitem__(self, key):
        return self.tensors[key]

    def __contains__(self, key):
        return key in self.tensors

    def inputs(self, dtype=None):
        """q, k, v; in a cut file v has a few columns only and is filled up with zeros."""
        q, k, v = (self.tensors[x] for x in "qkv")
        v = torch.nn.functional.pad(v, (0, q.size(2) - v.size(2)))
        return tuple(x if dtype is None else x.to(dtype) for x in (q, k, v))

    @property
    def columns(self):
        return self.tensors["v"].size(2)


def parse(data):
    """(tensors, metadata) of safetensors bytes; the format is a JSON header and raw memory."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    dtypes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "BOOL": torch.bool,
    }
    metadata = header.pop("__metadata__", {})
    body, tensors = bytearray(data[8 + size :]), {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = torch.frombuffer(bytearray(body[begin:end]), dtype=dtypes[entry["dtype"]])
        tensors[name] = raw.view(entry["shape"])
    return tensors, metadata


def _shipped(path):
    tensors, metadata = parse(lzma.decompress(path.read_bytes()))
    return Golden(metadata["name"], tensors, json.loads(metadata["orig_vs_spec"]))


def _full(path):
    index = json.loads((path.parent / "attention_index.json").read_text())
    return Golden(path.stem, parse(path.read_bytes())[0], index[path.name]["orig_vs_spec"])


def load_all():
    """{label: Golden}; shipped cuts are labelled cut-..."""
    found = {}
    for path in sorted((HERE / "data").glob("*.safetensors.xz")):
        golden = _shipped(path)
        found[f"cut-{golden.name.split('_')[0]}"] = golden
    for path in sorted((FULL_SET / "golden").glob("*.safetensors")):
        found[path.stem.split("_")[0]] = _full(path)
    return found
