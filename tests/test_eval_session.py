# SPDX-License-Identifier: Apache-2.0
"""Prompts as tokens, and generation under a method: `full` is the model's own, token for token."""

import eval_models
import pytest
import torch
import transformers

from pbs_attn import methods
from pbs_attn.cli import CommandError, models
from pbs_attn.cli import eval as cli_eval
from pbs_attn.cli.models import demo_text
from pbs_attn.eval import session as sessions
from pbs_attn.eval.session import PromptTooLong, Session, Tokens, seed_all

NEW = 12


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return models.load(eval_models.tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def tokens(loaded):
    return Tokens(loaded[1], eval_models.WINDOW, name="tiny")


@pytest.fixture
def session(loaded, tokens):
    return Session(loaded[0], tokens, name="tiny")


@pytest.fixture(scope="module")
def ids(loaded):
    return loaded[1](demo_text()[1][:4000]).input_ids[:700]


def method(text):
    return methods.get(text)


def plain(model, ids, count):
    """Greedy tokens by whole forwards of the unpatched model."""
    found = list(ids)
    with torch.no_grad():
        for _ in range(count):
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


# ---- generation ------------------------------------------------------------------------------


@pytest.mark.tf457
@pytest.mark.parametrize("length", [1, 127, 128, 129, 257, 700])
def test_full_equals_the_unpatched_model_token_for_token(session, loaded, ids, length):
    prompt = torch.tensor([ids[:length]])
    want = loaded[0].generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                              max_new_tokens=NEW, pad_token_id=2)[0, length:].tolist()  # fmt: skip
    full = session.generate(ids[:length], method("full"), max_new_tokens=NEW)
    stock = session.generate(ids[:length], method("sdpa"), max_new_tokens=NEW)
    assert full.tokens == stock.tokens == want
    assert full.text == loaded[1].decode(want, skip_special_tokens=True)
    assert full.calls["dense"] == 2 * NEW and full.density == 1.0
    assert stock.calls == {"stock": 2} and stock.reasons == {}


def test_generation_is_greedy(session, loaded, ids):
    out = session.generate(ids[:100], method("sdpa"), max_new_tokens=4)
    assert out.tokens == plain(loaded[0], ids[:100], 4)


def test_a_sparse_method_counts_its_prefill_and_leaves_the_model_as_it_was(session, ids):
    before = session.model.config._attn_implementation
    out = session.generate(ids, method("pbs:min_q=0,min_kv=0,tau=0.3"), max_new_tokens=3)
    assert out.calls["pbs"] == 2 and out.calls["dense"] == 4 and out.reasons == {"short_q": 4}
    assert 0 < out.density < 1 and out.density <= out.computed
    assert session.model.config._attn_implementation == before
    assert 0 < out.prefill_s <= out.total_s and out.peak_gb is None


def test_sparse_methods_change_the_tokens(session, ids):
    """Weights are such that these tests see a method that is not applied."""
    with session.using(method("pbs:min_q=0,min_kv=0,tau=0")), torch.no_grad():
        sparse = session.model(session.tensor(ids)).logits
    with torch.no_grad():
        dense = session.model(session.tensor(ids)).logits
    assert (sparse - dense).abs().max() > 0.1 * dense.abs().max()


@pytest.fixture
def ends(loaded):
    """Set the generation config's end tokens for one test."""
    config = loaded[0].generation_config
    before = config.eos_token_id

    def put(value):
        config.eos_token_id = value

    yield put
    put(before)


def test_it_stops_at_every_end_token_and_says_so(session, ids, ends):
    free = session.generate(ids, method("full"), max_new_tokens=NEW).tokens
    place = next(i for i in range(1, NEW) if free[i] not in free[:i])
    ends([2, free[place]])  # the second of the list
    out = session.generate(ids, method("full"), max_new_tokens=NEW)
    assert out.tokens == free[: place + 1] and out.stop == "eos"
    ends(free[place])
    assert session.generate(ids, method("full"), max_new_tokens=NEW).tokens == out.tokens
    ends(2)
    assert session.generate(ids, method("full"), max_new_tokens=NEW).stop == "length"
    extra = session.generate(ids, method("full"), max_new_tokens=NEW, extra_eos=(free[place],))
    assert extra.tokens == out.tokens and extra.stop == "eos"
    assert session.eos() == [2]


def test_a_least_number_of_tokens_holds_back_the_end(session, ids):
    first = session.generate(ids, method("full"), max_new_tokens=NEW).tokens[0]
    ended = session.generate(ids, method("full"), max_new_tokens=NEW, extra_eos=(first,))
    assert ended.tokens == [first] and ended.stop == "eos"
    out = session.generate(
        ids, method("full"), max_new_tokens=NEW, extra_eos=(first,), min_new_tokens=1
    )
    assert out.tokens[0] != first


def test_without_an_end_token_of_the_config_the_tokenizers_counts(session, ends):
    ends(None)
    assert session.eos() == [session.tokens.tokenizer.eos_token_id]
    ends([7, 2])
    assert session.eos() == [7, 2]


@pytest.mark.tf457
def test_the_checkpoints_sampling_settings_do_not_matter(session, ids):
    config = session.model.generation_config
    want = session.generate(ids, method("full"), max_new_tokens=NEW).tokens
    config.do_sample, config.temperature, config.top_k, config.max_length = True, 5.0, 3, 30
    try:
        assert session.generate(ids, method("full"), max_new_tokens=NEW).tokens == want
        assert session.habits() == []
        config.repetition_penalty = 1.2
        assert session.habits() == [("repetition_penalty", 1.2, 1.0)]
    finally:
        config.do_sample = config.temperature = config.top_k = config.max_length = None
        config.repetition_penalty = None


def test_a_temperature_samples_by_the_seed(session, ids):
    def tokens(seed, temperature):
        seed_all(seed)
        return session.generate(
            ids, method("full"), max_new_tokens=NEW, temperature=temperature
        ).tokens

    assert tokens(1, 5.0) == tokens(1, 5.0) != tokens(2, 5.0)
    assert tokens(1, 1e-4) == session.generate(ids, method("full"), max_new_tokens=NEW).tokens


def test_prefill_gives_what_measure_wants(session, ids):
    from pbs_attn.cli import measure

    run, counts = session.prefill(ids, method("pbs:min_q=0,min_kv=0"))
    losses, best = measure.token_losses(session.model, session.tensor(ids), run)
    assert len(losses) == len(ids) - 1 and int(best[-1]) == run.next_token
    assert counts["calls"] == {"pbs": 2, "dense": 0} and run.seconds > 0
    again, _ = session.prefill(torch.tensor(ids), method("pbs:min_q=0,min_kv=0"))
    assert again.next_token == run.next_token


# ---- the window ------------------------------------------------------------------------------


def test_a_prompt_beyond_the_window_names_max_prompt(session, ids):
    session.tokens.window = 710
    with pytest.raises(PromptTooLong, match=r"700 tokens.*11 new.*window of 710.*--max-prompt 699"):
        session.generate(ids, method("full"), max_new_tokens=11)
    assert len(session.generate(ids, method("full"), max_new_tokens=10).tokens) <= 10
    past = session.generate(ids, method("full"), max_new_tokens=11, past_window=True)
    assert past.tokens
    session.tokens.window = None
    session.tokens.check(10**9)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, 2048),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 2048),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                              "original_max_position_embeddings": 2048}},
            8192,
        ),
        (
            {"max_position_embeddings": 131072,
             "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
            131072,
        ),
    ],
)  # fmt: skip
def test_the_window_counts_scaled_positions(changes, window):
    config = transformers.LlamaConfig(**{"max_position_embeddings": 2048} | changes)
    assert cli_eval.window_of(config) == window


def test_a_config_without_positions_has_no_window():
    assert cli_eval.window_of(transformers.PretrainedConfig()) is None


# ---- tokens ----------------------------------------------------------------------------------


class Tokenizer:
    """A tokenizer that adds BOS (1), one id per letter above 100; a template that writes BOS."""

    chat_template = "template"
    seen = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        body = [1 if c == "^" else 100 + ord(c) for c in text]
        return transformers.BatchEncoding({"input_ids": [1] * add_special_tokens + body})

    def decode(self, ids, skip_special_tokens=False):
        return "".join("" if i == 1 and skip_special_tokens else
                       "^" if i == 1 else chr(i - 100) for i in ids)  # fmt: skip

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **given):
        assert add_generation_prompt and not tokenize
        self.seen = given
        return "^" + "".join(f"[{m['role'][0]}:{m['content']}]" for m in messages) + "<a>"


@pytest.fixture
def letters():
    return Tokens(Tokenizer(), 100, template_args={"enable_thinking": False})


def test_plain_prompts_have_what_the_tokenizer_adds(letters):
    assert letters.encode("ab") == [1, 197, 198]
    assert letters.encode("ab", special=False) == [197, 198]
    assert letters.decode([1, 197, 1, 198]) == "ab"


def test_a_chat_has_one_bos_and_the_prefix_inside_the_reply(letters):
    ids = letters.chat([{"role": "user", "content": "hi"}], "So: ")
    assert ids.count(1) == 1 and ids[0] == 1
    assert letters.decode(ids) == "[u:hi]<a>So: "
    assert letters.tokenizer.seen == {"enable_thinking": False}


def test_no_chat_is_the_contents_as_a_plain_prompt(letters):
    letters.use_chat = False
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert letters.chat(messages, "A") == letters.encode("s\n\nuA")


def test_no_template_and_a_failing_one_name_the_options(letters):
    def fail(*args, **given):
        raise RuntimeError("System role not supported")

    letters.tokenizer.apply_chat_template = fail
    with pytest.raises(CommandError, match="System role not supported.*--template-args"):
        letters.chat([])
    letters.tokenizer.chat_template = None
    with pytest.raises(CommandError, match="the model has no chat template; --no-chat"):
        letters.chat([])


def test_the_real_template_marks_the_reply(tokens):
    text = tokens.tokenizer.decode(tokens.chat([{"role": "user", "content": "hi"}], "So"))
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nSo")


@pytest.mark.parametrize("limit", range(2, 12))
def test_the_middle_is_cut_as_pred_py_does(letters, limit):
    text = "abcdefghij"  # 11 ids with BOS
    cut, removed = letters.truncate_middle(text, limit)
    if limit >= 11:
        assert (cut, removed) == (text, 0)
        return
    half = int(limit / 2)
    assert cut == text[: half - 1] + text[-half:] and removed == 11 - 2 * half


def test_the_left_is_cut_to_the_last(letters):
    assert letters.truncate_left([1, 2, 3, 4], 3) == ([2, 3, 4], 1)
    assert letters.truncate_left([1, 2], 3) == ([1, 2], 0)
    for cut in (lambda: letters.truncate_left([1], 0), lambda: letters.truncate_middle("ab", 1)):
        with pytest.raises(ValueError, match="limit is"):
            cut()


def test_seeds_are_set_everywhere():
    import random

    import numpy

    def draw():
        return random.random(), numpy.random.rand(), float(torch.rand(()))

    seed_all(3)
    first = draw()
    assert draw() != first
    seed_all(3)
    assert draw() == first
    assert sessions.HABITS["repetition_penalty"] == 1.0
