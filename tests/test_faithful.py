# SPDX-License-Identifier: Apache-2.0
"""Is it the method, on a real model? SmolLM2-135M in fp32 on real text.

Density, coverage and loss of permuted block-sparse attention have to be those of the paper's
algorithm, not just those of a working kernel: a wrong order of keys, a wrong gather or a forgotten
forced block would pass every comparison with dense attention at tau = 1. `identity` (the same rule
on unpermuted keys) is the control that shows what the permutation itself gives; it is printed
beside every number, but beside losses in long runs alone. Two texts: the one the package ships (2K
and 4K, always), and, marked `long`, the same at 8K and an essay of PBS_ATTN_DATA.

Means are over all 30 layers x 9 heads. Density: selected causal blocks / causal blocks. Coverage:
share of the dense attention that lies in what is computed.
"""

import dataclasses
import functools
import os
from pathlib import Path

import pytest
import torch

from pbs_attn import PBSConfig, patch_model, pbs_attention, record
from pbs_attn.cli import mass, measure, models

pytestmark = pytest.mark.xdist_group("faithful")  # one process: dense prefills are shared
PBS = PBSConfig(tau=0.9, min_q=0, min_kv=0, strict=True)
IDENTITY = PBS.replace(permute="identity")
RANDOM = PBS.replace(order="random")


@dataclasses.dataclass
class Dense:
    """One dense prefill: what attention saw, and the loss of every token."""

    ids: torch.Tensor
    qkv: dict  # {layer: (q, k, v)}
    losses: torch.Tensor
    key_mass: list  # per layer [Hq, T, N]


@functools.cache
def smollm2():
    return models.load("smollm2")


def text_of(name):
    if name == "demo":
        return models.demo_text()[1]
    root = os.environ.get("PBS_ATTN_DATA")
    if not root:
        pytest.skip("PBS_ATTN_DATA, the folder with data/essays/, is not set")
    return (Path(root) / "data" / "essays" / f"{name}.txt").read_text(encoding="utf-8")


@functools.lru_cache(maxsize=2)  # 4K: 0.6 GB; 8K: 1.5 GB; tests stand in an order that needs two
def dense(text, length):
    model, tokenizer = smollm2()
    ids = models.token_ids(tokenizer, text_of(text), length)
    assert ids.shape[1] == length, f"{text} is too short for {length} tokens"
    qkv, run = measure.capture(model, ids)
    losses, _ = measure.token_losses(model, ids, run)
    key_mass = [mass.key_mass(q[0], k[0]) for q, k, _ in qkv.values()]
    return Dense(ids, qkv, losses, key_mass)


@functools.cache
def selection(text, length, config):
    """(density, coverage) [layers, heads] of the kernels' plans on dense activations."""
    found = dense(text, length)
    densities, coverages = [], []
    for (q, k, v), key_mass in zip(found.qkv.values(), found.key_mass, strict=True):
        _, plan = pbs_attention(q, k, v, config=config, return_plan=True)
        own = mass.own_blocks(key_mass.size(1), config.block_size, config.segment_size)
        history = plan.mask(own=False)[0]
        selected = (history | own) & mass.causal_blocks(len(own))
        densities.append(selected.sum((1, 2)) / mass.causal_blocks(len(own)).sum())
        coverages.append(mass.kept_mass(key_mass, plan.k_perm[0], history, own).mean(1))
    return torch.stack(densities), torch.stack(coverages)


@functools.cache
def loss_change(text, length, config):
    """(change of the mean loss, largest change of a token, density) with all layers sparse."""
    model, _ = smollm2()
    found = dense(text, length)
    with patch_model(model, config), record() as calls:
        run = measure.prefill(model, found.ids)
    assert calls.calls == {"pbs": 30, "dense": 0}
    change = measure.token_losses(model, found.ids, run)[0].double() - found.losses
    copied = measure.copied_tokens(found.ids)
    return float(change.mean()), float(change.abs().max()), float(change[copied].mean()), calls


@pytest.fixture
def say(capsys):
    """Print to the terminal although pytest captures output: these numbers are meant to be read."""

    def say(text):
        with capsys.disabled():
            print(f"\n  {text}", end="", flush=True)

    return say


def check_selection(text, length, say, density, coverage, gain):
    """The bands of one text; densities as (low, high), gain in points of density."""
    (pbs, kept), (control, control_kept) = (
        selection(text, length, config) for config in (PBS, IDENTITY)
    )
    points = 100 * float((control - pbs).mean())
    say(
        f"{text} {length}: density pbs {pbs.mean():.3f}, identity {control.mean():.3f} "
        f"({points:+.1f} points); coverage {kept.mean():.4f}, {control_kept.mean():.4f}"
    )
    assert density[0] <= float(pbs.mean()) <= density[1]
    assert float(kept.mean()) >= coverage
    assert float(kept.mean()) >= float(control_kept.mean())
    assert points >= gain


# {tokens: (density of pbs, least coverage, least gain over identity in points)} at tau = 0.9.
# ENGLISH holds for essays, reports and stories alike (measured when the method was studied); DEMO
# is narrower, around what the shipped text gives: density .663 and .508, coverage .9876 and .9726,
# gain 9.0 and 5.6 points, the same with reference.py as with the kernels.
ENGLISH = {
    2048: ((0.60, 0.70), 0.98, 5.0),
    4096: ((0.47, 0.56), 0.96, 4.0),
    8192: ((0.30, 0.38), 0.94, 2.0),
}
DEMO = {2048: ((0.645, 0.680), 0.985, 8.0), 4096: ((0.490, 0.525), 0.970, 4.8)}


@pytest.mark.parametrize("length", (2048, 4096))
def test_density_coverage_and_gain(length, say):
    check_selection("demo", length, say, *DEMO[length])


@pytest.mark.parametrize("length", (2048, 4096))
def test_random_order_is_worse_than_none(length, say):
    """The measure works: an order without meaning spreads the mass and costs blocks."""
    random, control = (selection("demo", length, x)[0].mean() for x in (RANDOM, IDENTITY))
    say(f"demo {length}: density random order {random:.3f}, identity {control:.3f}")
    assert random > control


def oracle_density(key_mass, k_perm, share=0.95, block_size=128, segment_size=256):
    """[Hq]: density if blocks are taken by their true mass until `share` of each row is reached."""
    own = mass.own_blocks(key_mass.size(1), block_size, segment_size)
    causal = mass.causal_blocks(len(own))
    history = causal & ~own
    blocks = mass.block_mass(key_mass, k_perm, block_size) * history
    kept = (mass.block_mass(key_mass, None, block_size) * own).sum(2)
    ordered = blocks.sort(dim=2, descending=True).values
    before = kept[..., None] + ordered.cumsum(2) - ordered
    taken = ((before < share) & (ordered > 0)).sum((1, 2))
    return (taken + own.sum()) / causal.sum()


def test_oracle_gain(say):
    """Per head, with the best possible choice of blocks: permuted keys need fewer of them."""
    found = dense("demo", 2048)
    gains = []
    for (q, k, v), key_mass in zip(found.qkv.values(), found.key_mass, strict=True):
        _, plan = pbs_attention(q, k, v, config=PBS, return_plan=True)
        natural = oracle_density(key_mass, None)
        gains.append(100 * (natural - oracle_density(key_mass, plan.k_perm[0])))
    gains = torch.stack(gains)
    helped, harmed = ((gains > 1).float().mean(), (gains < -1).float().mean())
    say(
        f"demo 2048, oracle at 95% of the mass: {gains.mean():+.1f} points, "
        f"helped {helped:.1%}, harmed {harmed:.1%} of the heads"
    )
    assert gains.mean() >= 8.0  # other texts: at least 4; here 9.2 and .7%
    assert harmed < 0.03


def check_loss(text, length, say, limits, control=True):
    say(f"{text} {length}: change of the mean loss (of copied tokens), density")
    for label, config in (("pbs", PBS), ("identity", IDENTITY))[: 1 + control]:
        for tau in limits if label == "pbs" else (0.9,):
            mean, _, copied, calls = loss_change(text, length, config.replace(tau=tau))
            say(f"  {label} {tau}: {mean:+.4f} ({copied:+.3f}), {calls.density:.3f}")
            if label == "pbs":
                assert mean <= limits[tau]


def test_loss(say):
    """Wiring and masks: with all layers sparse the model still reads as well, almost."""
    check_loss("demo", 4096, say, {0.9: 0.035, 0.99: 0.005}, control=False)


@pytest.mark.parametrize(
    ("name", "length"),
    [("pbs", 2048), ("pbs+", 600), ("meanpool", 600), ("xattention", 600), ("identity", 600)],
)
def test_tau_one_is_dense(name, length):
    """tau = 1 keeps every block, so every method is dense attention, token by token: of eight
    segments, and of two and a tail."""
    from pbs_attn.cli import methods

    (method,) = methods.parse(f"{name}:tau=1.0,min_q=0,min_kv=0,strict=true")
    mean, largest, _, calls = loss_change("demo", length, method.config)
    assert calls.density == 1.0
    assert abs(mean) <= 1e-6
    assert largest <= 1e-4


@pytest.mark.long
def test_8k(say):
    check_selection("demo", 8192, say, *ENGLISH[8192])
    check_loss("demo", 8192, say, {0.9: 0.06})


@pytest.mark.long
@pytest.mark.parametrize("length", (2048, 4096))
def test_essay(length, say):
    check_selection("popular", length, say, *ENGLISH[length])


@pytest.mark.long
def test_essay_loss(say):
    check_loss("popular", 4096, say, {0.9: 0.025, 0.99: 0.005})
