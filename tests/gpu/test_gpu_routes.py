# SPDX-License-Identifier: Apache-2.0
"""Every reason for the dense route on a real device, and that each gives what attention is."""

import gpu_checks
import pytest
import torch
from gpu_checks import GPU
from harness import config_of

from pbs_attn import PBSConfig, build_info, dense, pbs_attention, record, reference, supports
from pbs_attn.cli import doctor

pytestmark = gpu_checks.needs_gpu
LOOSE = config_of().replace(strict=False)


def inputs(**changes):
    options = {"head_dim": 64, "dtype": torch.bfloat16} | changes
    return gpu_checks.make(GPU, (4, 2), 600, **options)


def odd_rows():
    q, k, v = inputs()
    wide = torch.zeros(1, 2, 600, 68, dtype=k.dtype, device=GPU)
    return q, wide[..., :64].copy_(k), v


CALLS = [
    ("short_q", inputs, {"config": LOOSE.replace(min_q=601)}),
    ("short_kv", inputs, {"config": LOOSE.replace(min_kv=601)}),
    ("dtype", lambda: inputs(dtype=torch.float32), {}),
    ("dtype", lambda: inputs(dtype=torch.float64), {}),
    ("head_dim", lambda: inputs(head_dim=12), {}),
    ("head_dim", lambda: inputs(head_dim=264), {}),
    ("alignment", odd_rows, {}),
    ("block_size", inputs, {"config": PBSConfig(block_size=32, min_q=0, min_kv=0)}),
    ("segment_size", inputs, {"config": PBSConfig(segment_size=4096, min_q=0, min_kv=0)}),
    (None, inputs, {}),
]


@pytest.mark.parametrize("reason, make, options", CALLS, ids=[str(call[0]) for call in CALLS])
def test_reasons(reason, make, options):
    q, k, v = make()
    options = {"config": LOOSE} | options
    assert supports(q, k, v, **options) == reason
    with record() as calls:
        out = pbs_attention(q, k, v, **options)
    assert calls.reasons == ({reason: 1} if reason else {})
    if reason:
        exact = reference.attend(*(x[0].cpu().double() for x in (q, k, v)), own="all")[0]
        torch.testing.assert_close(out[0].cpu().double(), exact, rtol=0, atol=3e-2)


def test_without_further_ado():
    q, k, v = inputs()
    assert supports(q, k, v) == "short_q"
    assert torch.equal(pbs_attention(q, k, v), dense._flash(q, k, v, None))


@pytest.mark.parametrize("lengths", [(1, 600), (70, 600), (600, 600)])
@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"kv_len": [555]}])
def test_dense_kernels_agree(lengths, options):
    q, k, v = gpu_checks.make(GPU, (4, 2), *lengths, head_dim=64)
    call = dict(options)
    if "kv_len" in call:
        call["kv_len"] = torch.tensor(call["kv_len"], dtype=torch.int32, device=GPU)
        lengths = (lengths[0], 555)
    dense_config = LOOSE.replace(min_q=10**6)
    result = pbs_attention(q, k, v, config=dense_config, **call)
    out = result[0] if isinstance(result, tuple) else result
    seen = (x[0, :, : lengths[1]].cpu().double() for x in (k, v))
    exact, lse = reference.attend(q[0].cpu().double(), *seen, own="all")
    torch.testing.assert_close(out[0].cpu().double(), exact, rtol=0, atol=3e-2)
    if "return_lse" in options:
        torch.testing.assert_close(result[1][0].cpu().double(), lse, rtol=0, atol=3e-2)


def test_doctor_finds_the_gpu_and_its_kernels():
    found = doctor.examine()
    assert found["ok"], found.get("problem", found.get("self_test"))
    gpus = build_info(gpus=True)["gpus"]
    assert len(gpus) == torch.cuda.device_count() and gpus[0]["refusal"] is None
    assert any(test["isa"] == gpus[0]["name"] for test in found["self_test"])
