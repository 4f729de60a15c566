# SPDX-License-Identifier: Apache-2.0
"""The mask function says the same as transformers' sdpa mask, in a form that fits in 16 bytes."""

import random

import pytest
import torch
import transformers
from transformers import masking_utils

import pbs_attn
from pbs_attn.integrations import masks

pytestmark = pytest.mark.tf457

OLD = transformers.__version__.startswith("4.")


def call(function, batch, q_length, kv_length, q_offset=0, attention_mask=None, **options):
    """As transformers 4.57 or 5 calls a mask function."""
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
    arguments = {"batch_size": batch, "kv_length": kv_length, "attention_mask": attention_mask}
    arguments |= {"kv_offset": 0, "mask_function": masking_utils.causal_mask_function}
    if OLD:
        arguments["cache_position"] = torch.arange(q_length) + q_offset
    else:
        arguments |= {"q_length": q_length, "q_offset": q_offset, "device": torch.device("cpu")}
    return function(**{**arguments, **options})


def ours(*args, **kwargs):
    return call(masks.attention_mask_function, *args, **kwargs)


def sdpa(*args, **kwargs):
    """The full 4-D mask that transformers itself would build."""
    return call(masking_utils.sdpa_mask, *args, **{**kwargs, "allow_is_causal_skip": False})


def expand(mask, batch, q_length, kv_length):
    """What the attention function makes of any form: bool (B, 1, Nq, Nk)."""
    geometry, other = masks.read_mask(mask, q_length, kv_length)
    if other is not None:
        return other
    query, key = torch.zeros(batch, 1, q_length, 8), torch.zeros(batch, 1, kv_length, 8)
    return masks.explicit_mask(geometry, query, key).expand(batch, 1, q_length, kv_length)


def real_rows(attention_mask, batch, q_length, q_offset):
    """bool (B, Nq): queries that are tokens, not padding."""
    if attention_mask is None:
        return torch.ones(batch, q_length, dtype=torch.bool)
    return attention_mask[:, q_offset : q_offset + q_length].bool()


def same_on_real_rows(mask, expected, real):
    batch, _, q_length, kv_length = expected.shape
    got = expand(mask, batch, q_length, kv_length)
    assert torch.equal(got.expand_as(expected)[:, 0][real], expected[:, 0][real])


def test_no_mask_for_plain_causal_with_or_without_a_prefix():
    assert ours(2, 12, 12) is None
    assert ours(2, 5, 12, q_offset=7) is None
    assert ours(2, 12, 12, attention_mask=torch.ones(2, 12)) is None
    assert ours(2, 5, 12, q_offset=7, attention_mask=torch.ones(2, 12)) is None


def test_none_means_bottom_right():
    got = expand(None, 1, 3, 8)
    assert got[0, 0].sum(-1).tolist() == [6, 7, 8]


def test_an_empty_static_cache_never_gives_none():
    """transformers' own mask may be None here and would mean top left: ours is a geometry."""
    for attention_mask in (None, torch.ones(2, 6)):
        mask = ours(2, 6, 20, attention_mask=attention_mask)
        assert masks.is_geometry(mask)
        assert torch.equal(expand(mask, 2, 6, 20), sdpa(2, 6, 20).expand(2, 1, 6, 20))


def test_a_static_cache_offset_may_be_a_tensor():
    mask = ours(1, 4, 20, q_offset=torch.tensor(9))
    assert masks.is_geometry(mask)
    assert mask.flatten().tolist() == [0, 4, 0, 13]
    assert torch.equal(expand(mask, 1, 4, 20), sdpa(1, 4, 20, q_offset=9))


def test_left_padding_is_four_numbers_per_row():
    attention_mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    mask = ours(2, 6, 6, attention_mask=attention_mask)
    assert mask.flatten(1).tolist() == [[3, 3, 3, 3], [0, 6, 0, 6]]


def test_right_padding_is_four_numbers_per_row():
    attention_mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    mask = ours(2, 6, 6, attention_mask=attention_mask)
    assert mask.flatten(1).tolist() == [[0, 3, 0, 3], [0, 6, 0, 6]]


def test_a_chunk_of_padding_only_has_no_rows():
    attention_mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    mask = ours(2, 4, 4, attention_mask=attention_mask)
    assert mask[0].flatten().tolist()[1] == 0
    assert not expand(mask, 2, 4, 4)[0].any()


@pytest.mark.parametrize("seed", range(60))
def test_random_padding_equals_sdpa_mask(seed):
    """Left and right padding, prefixes, chunks and static caches, drawn at random."""
    rng = random.Random(seed)
    batch, q_length, q_offset = rng.randint(1, 3), rng.randint(2, 9), rng.choice([0, 0, 3, 8])
    seen = q_offset + q_length
    kv_length = seen + rng.choice([0, 0, 5])
    attention_mask = None
    if rng.random() < 0.8:
        attention_mask = torch.zeros(batch, seen, dtype=torch.long)
        for row in attention_mask:
            begin = rng.choice([0, rng.randrange(seen)])
            row[begin : rng.choice([seen, rng.randint(begin + 1, seen)])] = 1
    offset = torch.tensor(q_offset) if kv_length > seen else q_offset
    mask = ours(batch, q_length, kv_length, offset, attention_mask)
    assert mask is None or masks.is_geometry(mask)
    expected = sdpa(batch, q_length, kv_length, q_offset, attention_mask)
    expected = expected.expand(batch, 1, q_length, kv_length)
    same_on_real_rows(mask, expected, real_rows(attention_mask, batch, q_length, q_offset))


def test_holes_keep_the_whole_mask():
    attention_mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    mask = ours(1, 6, 6, attention_mask=attention_mask)
    assert mask.shape == (1, 1, 6, 6) and mask.dtype == torch.bool
    assert torch.equal(mask, sdpa(1, 6, 6, attention_mask=attention_mask))


def test_one_row_keeps_transformers_own_mask():
    attention_mask = torch.tensor([[0, 1, 1, 1]])
    assert ours(1, 1, 4, q_offset=3) is None
    mask = ours(1, 1, 4, q_offset=3, attention_mask=attention_mask)
    assert mask.shape == (1, 1, 1, 4) and mask.dtype == torch.bool


def test_packed_sequences_and_overlays_keep_the_whole_mask():
    sequence = torch.tensor([[0, 0, 0, 1, 1, 1]])
    packed = masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(sequence)
    )
    mask = ours(1, 6, 6, mask_function=packed, allow_is_causal_skip=False)
    assert torch.equal(mask, sdpa(1, 6, 6, mask_function=packed))
    assert mask[0, 0, 5].tolist() == [False, False, False, True, True, True]

    def prefix(batch, head, q, k):  # a prefix language model sees its prefix both ways
        return k < 3

    overlay = masking_utils.or_masks(masking_utils.causal_mask_function, prefix)
    mask = ours(1, 6, 6, mask_function=overlay, allow_is_causal_skip=False)
    assert mask[0, 0, 0].tolist() == [True, True, True, False, False, False]


def test_a_window_that_holds_every_key_is_no_window():
    window = masking_utils.sliding_window_causal_mask_function(6)
    assert ours(1, 6, 6, mask_function=window, local_size=6, allow_is_causal_skip=True) is None
    cut = ours(1, 7, 7, mask_function=window, local_size=6, allow_is_causal_skip=True)
    assert torch.equal(cut, sdpa(1, 7, 7, mask_function=window, local_size=6))
    assert cut[0, 0, 6].tolist() == [False] + [True] * 6


def test_a_mask_that_may_not_be_skipped():
    """transformers 5: the caller wants to read it. 4.57: a static cache, or input that it calls
    packed although it is one sequence."""
    mask = ours(1, 6, 6, allow_is_causal_skip=False)
    if not OLD:
        assert torch.equal(mask, sdpa(1, 6, 6))
        return
    assert mask is None
    one_sequence = torch.zeros(1, 6, dtype=torch.long)
    packed = masking_utils.and_masks(
        masking_utils.causal_mask_function,
        masking_utils.packed_sequence_mask_function(one_sequence),
    )
    assert ours(1, 6, 6, mask_function=packed, allow_is_causal_skip=False) is None


def test_bidirectional_masks_are_transformers_own():
    def both(batch, head, q, k):
        return q >= 0

    options = {"mask_function": both, "allow_is_causal_skip": False}
    if not OLD:
        assert ours(1, 6, 6, allow_is_bidirectional_skip=True, **options) is None
    mask = ours(1, 6, 6, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]), **options)
    assert mask[0, 0, 0].tolist() == [False] + [True] * 5


def test_the_result_passes_a_second_round_of_mask_code():
    """`generate` prepares masks for static caches; the model's forward runs the code again."""
    config = transformers.LlamaConfig(num_hidden_layers=1, attn_implementation="pbs_attn")
    pbs_attn.register()
    embeds = torch.zeros(2, 6, 0)
    geometry = ours(2, 6, 20, attention_mask=torch.tensor([[0] * 3 + [1] * 3, [1] * 6]))
    options = {"cache_position": torch.arange(6)} if OLD else {}
    embeds = {"input_embeds" if OLD else "inputs_embeds": embeds}
    again = masking_utils.create_causal_mask(
        config=config, attention_mask=geometry, past_key_values=None, **embeds, **options
    )
    assert again is geometry


@pytest.mark.parametrize("side", ["left", "right"])
def test_two_dimensional_masks_of_other_mask_functions_are_read_as_padding(side):
    attention_mask = torch.ones(2, 8, dtype=torch.long)
    attention_mask[0, :3] = 0
    if side == "right":
        attention_mask = attention_mask.flip(1)
    geometry, other = masks.read_mask(attention_mask, 8, 8)
    assert other is None and not geometry.whole
    expected = sdpa(2, 8, 8, attention_mask=attention_mask)
    same_on_real_rows(attention_mask, expected, attention_mask.bool())


def test_two_dimensional_masks_with_holes_are_expanded():
    attention_mask = torch.tensor([[1, 0, 0, 1, 1, 1]])
    _, mask = masks.read_mask(attention_mask, 4, 6)
    assert torch.equal(mask, sdpa(1, 4, 6, q_offset=2, attention_mask=attention_mask))


def test_two_dimensional_masks_shorter_than_a_static_cache():
    """Flash attention's mask of a static cache ends with the last query."""
    attention_mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    expected = sdpa(1, 4, 9, q_offset=2, attention_mask=attention_mask)
    assert torch.equal(expand(attention_mask, 1, 4, 9), expected)


@pytest.mark.parametrize(
    "mask, error",
    [
        ("causal", TypeError),
        (torch.ones(2, 3, 4), ValueError),
        (torch.ones(2, 1, 4, 9, dtype=torch.int32), ValueError),
    ],
)
def test_masks_that_mean_nothing_are_refused(mask, error):
    with pytest.raises(error, match="attention_mask is|attention_mask has"):
        masks.read_mask(mask, 4, 9)


def test_packed_mask_keeps_sequences_apart():
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    x = torch.zeros(1, 1, 7, 8)
    mask = masks.packed_mask(cu, cu, x, x)[0, 0]
    block = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool()
    assert torch.equal(mask, block.tril())
    # queries of each sequence stand at the end of its keys
    mask = masks.packed_mask(torch.tensor([0, 1, 3]), cu, torch.zeros(1, 1, 3, 8), x)[0, 0]
    assert mask.int().sum(-1).tolist() == [3, 3, 4]


def test_masks_are_made_without_reading_values_while_tracing():
    """Under torch.compile a padded mask stays whole and a static cache stays sparse."""

    def make(offset):
        return ours(1, 4, 20, q_offset=offset)

    compiled = torch.compile(make, fullgraph=True, backend="eager")
    assert compiled(torch.tensor(9)).flatten().tolist() == [0, 4, 0, 13]

    def padded(attention_mask):
        return ours(1, 6, 6, attention_mask=attention_mask)

    attention_mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    compiled = torch.compile(padded, fullgraph=True, backend="eager")
    assert torch.equal(compiled(attention_mask), sdpa(1, 6, 6, attention_mask=attention_mask))
