# SPDX-License-Identifier: Apache-2.0
"""What tests/gpu does, as functions of a device, so that test_gpu_checks.py can run each of them
tiny on a CPU: a GPU test that is wrong should not be found out on the GPU."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from harness import config_of
from numerics import assert_close

from pbs_attn import ops, pbs_attention
from pbs_attn.selection import bits_to_mask

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GPU = torch.device("cuda", 0)


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def room(gigabytes):
    """Skips where the GPU has less memory free."""
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, there are {free / 2**30:.0f}")


def make(device, heads, seqlen_q, seqlen_k=None, head_dim=128, dtype=torch.bfloat16, seed=0):
    """Inputs made on the device: 12 topics that move through the text, heavy keys, a sink."""
    seqlen_k = seqlen_k or seqlen_q
    g = torch.Generator(device).manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=g, device=device, dtype=dtype)

    topics = noise(12, head_dim)
    of = torch.arange(seqlen_k, device=device) // 170 * 5 % 12
    k = noise(1, heads[1], seqlen_k, head_dim) + topics[of]
    k[:, :, ::23] += topics.sum(0) / 3
    k[:, :, 0] += 2 * topics.sum(0)
    q = noise(1, heads[0], seqlen_q, head_dim) + topics[of[seqlen_k - seqlen_q :]]
    return Inputs(q, k, noise(1, heads[1], seqlen_k, head_dim))


def prefill(inputs, config, **options):
    """(out, lse, count, bits, k_perm)"""
    return ops.prefill(*inputs, config, return_lse=True, return_plan=True, **options)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_rows(inputs, config, count=24, seed=1, what=""):
    """A prefill of batch 1 against fp64 on some rows: their own blocks, chosen by the kernels."""
    q, k, v = inputs
    out, lse, _, bits, k_perm = prefill(inputs, config)
    heads, seqlen_q, seqlen_k = q.shape[1], q.shape[2], k.shape[2]
    block, segment = config.block_size, config.segment_size
    per_k, per_p = heads // k.shape[1], heads // k_perm.shape[1]
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(seqlen_q, (count,), generator=g).tolist()
    rows[:3] = [0, seqlen_q // 2, seqlen_q - 1]
    got, exact, low = [], [], []
    for i, row in enumerate(rows):
        head, m = i % heads, row // block
        position = row + seqlen_k - seqlen_q
        first = (m * block + seqlen_k - seqlen_q) // segment * segment  # of the own span
        listed = bits_to_mask(bits[0, head, m], -(-seqlen_k // block)).nonzero().flatten()
        places = (listed[:, None] * block + torch.arange(block, device=q.device)).flatten()
        assert (places < first).all(), f"{what}: row {row} lists a block of its own span"
        own = torch.arange(first, position + 1, device=q.device)
        keys = torch.cat([k_perm[0, head // per_p, places].long(), own])
        rows_kv = k[0, head // per_k, keys], v[0, head // per_k, keys]
        got.append(torch.cat([out[0, head, row].double(), lse[0, head, row].double()[None]]))
        exact.append(_attend(q[0, head, row].double(), *(x.double() for x in rows_kv)))
        low.append(_attend(q[0, head, row], *rows_kv).double())
    got, exact, low = (torch.stack(x).cpu() for x in (got, exact, low))
    dtype = q.dtype
    assert_close(got[:, :-1].to(dtype), exact[:, :-1], low[:, :-1], what=f"{what} out")
    assert_close(got[:, -1].float(), exact[:, -1], low[:, -1], what=f"{what} lse")
    return count


def _attend(q, k, v):
    """[out, lse] of one row over these keys, products in the dtype of the inputs."""
    logits = ((k @ q) * q.shape[0] ** -0.5).to(torch.promote_types(q.dtype, torch.float32))
    p = logits.softmax(0).to(v.dtype)
    return torch.cat([(p @ v).to(logits.dtype), logits.logsumexp(0)[None]])


def check_far_apart(device, gap, seqlen=530):
    """q, k, v and out whose heads lie `gap` elements apart give the bits of compact ones."""
    inputs = make(device, (2, 2), seqlen, head_dim=64)
    want = prefill(inputs, config_of())
    size = 2 * gap

    def spread(x):
        memory = torch.empty(size, dtype=x.dtype, device=device)
        view = memory.as_strided(x.shape, (size, gap, x.shape[3], 1))
        return view.copy_(x)

    far = Inputs(*(spread(x) for x in inputs))
    assert equal(prefill(far, config_of()), want)
    out = spread(torch.zeros_like(inputs.q))
    ops.prefill_out(*far, config_of(), out.transpose(1, 2))
    assert torch.equal(out, want[0])


def check_reruns(device, inputs, config, times):
    """The same bits on every run, whatever the allocator's memory held before."""
    want = prefill(inputs, config)
    for i in range(times):
        poison(device, 1 << 24)
        assert equal(prefill(inputs, config), want), f"run {i}"


def poison(device, size):
    """Leaves NaN in memory that the next calls will be given."""
    torch.full((size // 4,), float("nan"), device=device)


def check_poisoned_padding(device, config):
    """NaN outside the sequences reaches no bit of the result."""
    inputs = make(device, (4, 2), 700, head_dim=64)
    batch = Inputs(*(x.repeat(2, 1, 1, 1) for x in inputs))
    starts, sizes = (0, 300), (650, 400)
    vectors = [torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, sizes)]
    geometry = {"q_start": vectors[0], "q_len": vectors[1]}
    geometry |= {"kv_start": vectors[0], "kv_len": vectors[1]}
    results = []
    for filling in (0.0, float("nan")):
        padded = [x.clone() for x in batch]
        for x in padded:
            for b in range(2):
                x[b, :, : starts[b]] = filling
                x[b, :, starts[b] + sizes[b] :] = filling
        results.append(pbs_attention(*padded, config=config, return_lse=True, **geometry))
    assert equal(*results) and torch.isfinite(results[0][0]).all()
    for b in range(2):
        own = slice(starts[b], starts[b] + sizes[b])
        alone = (x[b : b + 1, :, own] for x in batch)
        assert torch.equal(pbs_attention(*alone, config=config)[0], results[0][0][b, :, own])


def check_compiled(device, config, backend):
    """One graph, fixed and dynamic lengths, the bits of the eager call."""
    torch._dynamo.reset()
    call = torch.compile(
        lambda q, k, v: pbs_attention(q, k, v, config=config), fullgraph=True, backend=backend
    )
    for seqlen in (512, 700, 811):
        inputs = make(device, (4, 2), seqlen, head_dim=64)
        assert torch.equal(call(*inputs), pbs_attention(*inputs, config=config)), seqlen


@contextlib.contextmanager
def no_synchronisation():
    """A host that waits for the GPU is an error inside."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- models --------------------------------------------------------------------------------------

ONE_BILLION = {  # the shape of Llama 3.2 1B
    "vocab_size": 4096,  # not 128,256: the head is not what is tested
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}


def llama(device, dtype, **shape):
    """A Llama with random weights and our attention."""
    import transformers

    import pbs_attn

    pbs_attn.register()
    config = transformers.LlamaConfig(**shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="pbs_attn", dtype=dtype
        )
    return model.eval()


def model_logits(model, ids, implementation, config=None):
    """(logits of the last token fp32, record) of a prefill."""
    import pbs_attn
    from pbs_attn.integrations import transformers as integration

    patch = None
    if implementation == "pbs_attn":
        patch = integration.patch_model(model, config)
    else:
        model.set_attn_implementation(implementation)
    try:
        with torch.inference_mode(), pbs_attn.record() as calls:
            last = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    finally:
        if patch is not None:
            patch.undo()
    return last, calls


def check_model(model, ids, tolerance):
    """tau = 1 keeps every block: the logits of dense attention. tau = 0.9: sparse in each layer."""
    dense, _ = model_logits(model, ids, "sdpa")
    layers = model.config.num_hidden_layers
    config = config_of(tau=1.0)
    kept, calls = model_logits(model, ids, "pbs_attn", config)
    assert calls.calls == {"pbs": layers, "dense": 0}, calls.reasons
    close = torch.nn.functional.cosine_similarity(kept, dense).min().item()
    assert close > 1 - tolerance, f"cosine of the last logits {close}"
    sparse, calls = model_logits(model, ids, "pbs_attn", config_of())
    assert torch.isfinite(sparse).all() and calls.calls["pbs"] == layers
    return calls.density
