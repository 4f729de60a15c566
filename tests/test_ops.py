# SPDX-License-Identifier: Apache-2.0
"""What torch knows of the ops: schemas, fakes, tracing, and that gradients raise."""

import cases
import pytest
import torch
from harness import config_of, four_verbs
from torch._subclasses.fake_tensor import FakeTensorMode

from pbs_attn import fakes, ops, pbs_attention
from pbs_attn.geometry import Geometry

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
_ops = torch.ops.pbs_attn


class Recorder:
    """Stands for torch.ops.pbs_attn: what our wrappers hand to each op."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((getattr(_ops, name).default, args, kwargs))
            return getattr(_ops, name)(*args, **kwargs)

        return call


def samples(dtype=torch.float32, packed=False):
    """(op, args, kwargs) of calls that cover every op and every kind of optional argument."""
    recorder, original = Recorder(), ops._ops
    ops._ops = recorder
    try:
        for permute, geometry, case in (
            ("keys", Geometry(), None),
            ("both", None, "left_padding"),
            ("none", None, "packed"),
        ):
            case = next((c for c in cases.geometries() if c.name == case), None)
            if case is not None:
                geometry = Geometry(**case.geometry(), max_seqlen_q=0, max_seqlen_k=0)
            q, k, v = cases.make_inputs(81, (4, 2), 600, case=case, dtype=dtype)
            config = config_of(permute=permute, gqa="group" if permute == "both" else "per_head")
            run = four_verbs(q, k, v, config, geometry)
            config = config.replace(correction="mean")
            four_verbs(q, k, v, config, geometry)
            for flag in (False, True):
                ops.prefill(q, k, v, config, geometry=geometry, return_lse=flag, return_plan=flag)
                out = torch.zeros(run.out.transpose(1, 2).shape, dtype=dtype)
                lse = torch.zeros(run.lse.shape) if flag else None
                ops.prefill_out(q, k, v, config, out, lse, geometry=geometry)
                ops.attend_out(q, k, v, None, out, lse, geometry=geometry, own="all")
            ops.attend_out(
                q, k, v, run.bits, out, lse, geometry=geometry, own="mask", correction="mean"
            )
    finally:
        ops._ops = original
    return recorder.calls


SAMPLES = samples()
IDS = [f"{op.name()}-{i}" for i, (op, _, _) in enumerate(SAMPLES)]


def kinds(op, args, kwargs):
    """The op, and which of its arguments are tensors, numbers or missing."""
    given = (*args, *kwargs.values())
    return op.name(), tuple(isinstance(x, torch.Tensor) - (x is None) for x in given)


# Tracing looks at nothing else, and takes its time; what fakes tell is held against every sample.
OF_EACH_KIND = list({kinds(*sample): sample for sample in SAMPLES}.values())


def test_samples_cover_every_op():
    for samples in (SAMPLES, OF_EACH_KIND):
        assert {op.name().split("::")[1] for op, _, _ in samples} == set(fakes.OPS)


@pytest.mark.parametrize("op, args, kwargs", OF_EACH_KIND, ids=range(len(OF_EACH_KIND)))
def test_opcheck(op, args, kwargs):
    torch.library.opcheck(op, args, kwargs, test_utils=OPCHECKS)


@pytest.mark.parametrize("op, args, kwargs", SAMPLES, ids=IDS)
def test_fakes_tell_the_truth(op, args, kwargs):
    real = op(*args, **kwargs)
    with FakeTensorMode() as mode:
        to_fake = lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
        fake = op(*map(to_fake, args), **{name: to_fake(x) for name, x in kwargs.items()})
    if real is None:
        assert fake is None
        return
    real, fake = ((x,) if isinstance(x, torch.Tensor) else x for x in (real, fake))
    assert len(real) == len(fake)
    for got, want in zip(fake, real, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize(
    "isa", ["auto", "c", "emu_avx2", "emu_avx512", "emu_avx512bf16", "emu_amx"]
)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_packed_bytes_are_exact_for_every_isa(isa, dtype):
    q, k, v = cases.make_inputs(82, (4, 2), 600, head_dim=40, dtype=dtype)
    for mode, gqa, correction in (
        ("identity", "per_head", "none"),
        ("none", "group", "none"),
        ("identity", "group", "mean"),
    ):
        options = {"mode": mode, "gqa": gqa, "correction": correction, "isa": isa}
        real = ops.permute(q, k, v, **options)
        with FakeTensorMode() as fake_mode:
            fake_inputs = [fake_mode.from_tensor(x) for x in (q, k, v)]
            fake = ops.permute(*fake_inputs, **options)
        assert fake[4].shape == real[4].shape


@pytest.mark.parametrize("op, args, kwargs", SAMPLES, ids=IDS)
def test_an_input_that_requires_grad_raises(op, args, kwargs):
    q = args[0].detach().clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"pbs_attn::\w+: an input of shape .* requires grad"):
        op(q, *args[1:], **kwargs)
    with torch.no_grad():
        op(q, *args[1:], **kwargs)
    with torch.inference_mode():
        op(q, *args[1:], **kwargs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [{}, cases.PEAK], ids=["paper", "peak"])
def test_compile_fullgraph(dynamic, dtype, words):
    config = config_of(**words)

    def layer(q, k, v):
        out, lse = pbs_attention(q * 2, k, v, config=config, return_lse=True)
        return out.transpose(1, 2).flatten(2) + 1, lse

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (700, 901):
        inputs = cases.make_inputs(83, (4, 2), seqlen, dtype=dtype)
        with torch.no_grad():
            got, want = compiled(*inputs), layer(*inputs)
        assert all(map(torch.equal, got, want))


def test_calls_made_before_the_new_words_still_run():
    """A program exported by an older version passes isa last; what came later has its default."""
    q, k, v = cases.make_inputs(87, (2, 1), 600)
    want = ops.attend(q, k, v, own="all", return_lse=True)
    out, lse = _ops.attend(
        q, k, v, None, None, None, *(None,) * 4, 0, 0, 0.0, 128, 128, 256, 0, 4, True, 0
    )
    assert torch.equal(out.transpose(1, 2), want[0]) and torch.equal(lse, want[1])


def test_a_traced_module_takes_the_words():
    config = config_of(**cases.PEAK)
    inputs = cases.make_inputs(88, (2, 1), 600)
    with torch.no_grad():
        traced = torch.jit.trace(lambda q, k, v: ops.prefill(q, k, v, config)[0], inputs)
    other = cases.make_inputs(89, (2, 1), 600)
    assert torch.equal(traced(*other), ops.prefill(*other, config)[0])
    assert not torch.equal(traced(*other), ops.prefill(*other, config_of())[0])


def test_compile_dynamic_traces_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: pbs_attention(q, k, v, config=config_of()),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for seqlen in (700, 901, 1203):
        compiled(*cases.make_inputs(84, (4, 2), seqlen))
    assert counter.frame_count == 1


def test_compile_with_geometry():
    case = next(case for case in cases.geometries() if case.name == "left_padding")
    q, k, v = cases.make_inputs(85, (4, 2), case=case)
    config = config_of()
    vectors = case.geometry()

    def layer(q, k, v, vectors):
        return pbs_attention(q, k, v, config=config, **vectors)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, vectors), layer(q, k, v, vectors))


@pytest.mark.slow
def test_compile_inductor():
    """The default backend too: it passes the strides that eager mode has."""
    config = config_of()

    def layer(q, k, v):
        return (
            pbs_attention(q.transpose(1, 2) * 1.5, k, v, config=config).transpose(1, 2).flatten(2)
        )

    q, k, v = cases.make_inputs(86, (4, 2), 700)
    q = q.transpose(1, 2).contiguous()
    torch._dynamo.reset()
    got = torch.compile(layer, fullgraph=True)(q, k, v)
    torch.testing.assert_close(got, layer(q, k, v))
