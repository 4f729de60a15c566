# SPDX-License-Identifier: Apache-2.0
"""PBSConfig: validation, conversions, and what the environment may say."""

import dataclasses
import json

import pytest

from pbs_attn import PBSConfig
from pbs_attn.env import read_environment

BAD = [
    ({"block_size": 0}, ValueError, "block_size is 0"),
    ({"block_size": 128.0}, TypeError, "block_size is 128.0"),
    ({"block_size": True}, TypeError, "block_size is True"),
    ({"segment_size": 200}, ValueError, "segment_size is 200.*multiple of block_size"),
    ({"segment_size": -256}, ValueError, "segment_size is -256"),
    ({"tau": float("nan")}, ValueError, "tau is nan"),
    ({"tau": float("inf")}, ValueError, "tau is inf"),
    ({"tau": -0.1}, ValueError, "tau is -0.1"),
    ({"tau": "0.9"}, TypeError, "tau is '0.9'"),
    ({"permute": "values"}, ValueError, "permute is 'values'.*none, identity, keys"),
    ({"order": None}, ValueError, "order is None.*last_block"),
    ({"gqa": "heads"}, ValueError, "gqa is 'heads'.*per_head, group"),
    ({"select": "topk"}, ValueError, "select is 'topk'.*mean_pool, antidiagonal"),
    ({"select": "antidiagonal", "stride": 24}, ValueError, "stride is 24.*divisor of block_size"),
    ({"stride": 0}, ValueError, "stride is 0"),
    ({"reduce": "mean"}, ValueError, "reduce is 'mean'.*sum, max"),
    ({"rule": "best"}, ValueError, "rule is 'best'.*prefix, relative"),
    ({"normalize": "rows"}, ValueError, "normalize is 'rows'.*history, row"),
    ({"normalize": "row"}, ValueError, "normalize is 'row'.*select=mean_pool"),
    (
        {"normalize": "row", "select": "antidiagonal", "permute": "both"},
        ValueError,
        "normalize is 'row'.*permute=both",
    ),
    ({"correction": True}, ValueError, "correction is True.*none, mean"),
    ({"seed": -1}, ValueError, "seed is -1"),
    ({"seed": 2**63}, ValueError, "seed is 9223372036854775808"),
    ({"min_q": -1}, ValueError, "min_q is -1"),
    ({"min_kv": 1.5}, TypeError, "min_kv is 1.5"),
    ({"strict": 1}, TypeError, "strict is 1"),
]


@pytest.mark.parametrize("values, error, text", BAD, ids=[str(bad[0]) for bad in BAD])
def test_bad_values_are_named(values, error, text):
    with pytest.raises(error, match=text):
        PBSConfig(**values)
    with pytest.raises(error, match=text):
        PBSConfig().replace(**values)


def test_paper_defaults():
    config = PBSConfig()
    assert (config.block_size, config.segment_size, config.tau) == (128, 256, 0.9)
    assert (config.permute, config.order, config.gqa) == ("keys", "last_block", "per_head")
    assert (config.select, config.rule, config.stride) == ("mean_pool", "prefix", 8)


def test_row_shares_where_they_can_be_made():
    for permute in ("none", "identity", "keys"):
        config = PBSConfig(normalize="row", select="antidiagonal", permute=permute)
        assert PBSConfig.from_json(config.to_json()) == config
    assert PBSConfig(normalize="row", permute="none").select == "mean_pool"  # as it always does
    assert PBSConfig().normalize == "history" and PBSConfig().correction == "none"


def test_frozen_and_hashable():
    config = PBSConfig(tau=1)
    assert isinstance(config.tau, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tau = 0.5
    assert {config: 1}[PBSConfig(tau=1.0)] == 1
    assert config.replace(tau=0.5) == PBSConfig(tau=0.5)


def test_dict_and_json_both_ways(tmp_path):
    config = PBSConfig(block_size=64, tau=0.25, permute="both", seed=2**63 - 1, min_kv=0)
    assert PBSConfig.from_dict(config.to_dict()) == config
    assert PBSConfig.from_json(config.to_json()) == config
    assert PBSConfig.from_dict({"tau": 0.5}) == PBSConfig(tau=0.5)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert PBSConfig.from_json(str(path)) == config


def test_unknown_fields_and_broken_json():
    with pytest.raises(TypeError, match="no field 'threshold'.*tau"):
        PBSConfig.from_dict({"threshold": 0.9})
    with pytest.raises(TypeError, match="no field 'threshold'"):
        PBSConfig().replace(threshold=0.9)
    with pytest.raises(TypeError, match="list.*dictionary"):
        PBSConfig.from_dict([1])
    with pytest.raises(ValueError, match="not valid JSON"):
        PBSConfig.from_json("{tau: 0.9}")


def test_environment(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"tau": 0.5}))
    values = {"PBS_ATTN_CONFIG": str(path), "PBS_ATTN_STRICT": "1", "PBS_ATTN_BACKEND": "ref"}
    found = read_environment(values)
    assert found.config == PBSConfig(tau=0.5)
    assert found.strict and not found.disable and found.backend == "ref"
    assert read_environment({}) == read_environment({"PBS_ATTN_STRICT": "0"})


@pytest.mark.parametrize(
    "values, text",
    [
        ({"PBS_ATTN_STRICT": "maybe"}, "PBS_ATTN_STRICT is 'maybe'"),
        ({"PBS_ATTN_BACKEND": "tpu"}, "PBS_ATTN_BACKEND is 'tpu'.*auto, cpu, cuda, ref"),
        ({"PBS_ATTN_LOG": "loud"}, "PBS_ATTN_LOG is 'loud'"),
        ({"PBS_ATTN_CONFIG": '{"tau": -1}'}, "PBS_ATTN_CONFIG.*tau is -1"),
        ({"PBS_ATTN_CONFIG": "/no/such/file"}, "PBS_ATTN_CONFIG.*/no/such/file"),
    ],
)
def test_bad_environment_is_named(values, text):
    with pytest.raises(ValueError, match=text):
        read_environment(values)
