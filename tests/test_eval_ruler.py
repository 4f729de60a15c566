# SPDX-License-Identifier: Apache-2.0
"""Generated RULER rows: answers stand where they should, lengths fit, all processes agree."""

import collections
import functools
import random
import re

import pytest
import ruler_sources

from pbs_attn.cli import CommandError
from pbs_attn.eval import ruler_build, ruler_generate, ruler_tasks, ruler_text
from pbs_attn.eval.jobs import BadRow

LENGTHS = (512, 1024, 2048, 4096)
NEEDLES = ruler_tasks.groups()["niah"]
# task -> (needles of keys that count, values per needle that are asked for), synthetic.yaml
COUNTS = {name: (1, 1) for name in NEEDLES} | {
    "niah_multikey_1": (4, 1), "niah_multivalue": (4, 4), "niah_multiquery": (4, 4),
}  # fmt: skip
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (.+?) is: (\S+)\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ruler")


@pytest.fixture(scope="module")
def make(folder):
    """made(...) once for all tests; its rows are kept, too."""

    @functools.cache
    def make(task, length):
        table = ruler_sources.made(folder, task, length)
        table.row = functools.cache(table.row)
        return table

    return make


def least(error):
    """The length that a refusal names."""
    return int(re.search(r"needs about (\d+) tokens", str(error.value))[1])


# ---- all tasks -----------------------------------------------------------------------------------
def test_new_tokens_and_metrics_are_the_official_ones():
    new = {name: task.new_tokens for name, task in ruler_tasks.tasks().items()}
    assert len(new) == 13
    assert {new[name] for name in NEEDLES} == {128}
    others = {name: count for name, count in new.items() if name not in NEEDLES}
    assert others == {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    any_of = [n for n, t in ruler_tasks.tasks().items() if t.metric == "string_match_part"]
    assert any_of == ["qa_1", "qa_2"]
    assert ruler_tasks.groups()["self"] == [
        "niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe",
    ]  # fmt: skip


def test_changed_templates_are_refused(tmp_path, monkeypatch):
    changed = tmp_path / "tasks.json"
    changed.write_text(ruler_tasks.FILE.read_text().replace("special magic", "special"))
    monkeypatch.setattr(ruler_tasks, "FILE", changed)
    ruler_tasks._data.cache_clear()
    try:
        with pytest.raises(CommandError, match="SHA-256"):
            ruler_tasks.texts()
    finally:
        ruler_tasks._data.cache_clear()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", ruler_tasks.tasks())
def test_rows_fill_their_length(make, task, length):
    """Prompt with chat template plus new tokens: never above the length, and near it. Coarse units
    leave room: a document, a pair of uuids; the words of fwe cost one or two tokens each."""
    try:
        table = make(task, length)
    except CommandError as error:
        assert length < 1024, error  # vt, cwe and qa_2 alone have long shortest texts
        return
    near = 0.8 if table.task.family in ("qa", "freq_words_extraction") or length == 512 else 0.9
    for index in range(3):
        row = table.row(index)
        ids = ruler_generate.prompt_ids(ruler_sources.tokens(), row.input, row.answer_prefix)
        used = len(ids) + table.task.new_tokens
        assert near * length <= used <= length, (task, index, used)


@pytest.mark.parametrize("task", ruler_tasks.tasks())
def test_too_short_lengths_are_refused_with_the_one_that_fits(make, task):
    with pytest.raises(CommandError, match=task) as error:
        make(task, 64)
    length = least(error)
    for _ in range(4):  # a longer text may need a longer example
        try:
            table = make(task, length)
            break
        except CommandError as again:
            assert (bigger := int(re.search(r"about (\d+)", str(again))[1])) > length
            length = bigger
    assert table.row(0).outputs
    assert length < 1100


@pytest.mark.parametrize("task", ruler_tasks.tasks())
def test_rows_depend_on_nothing_but_their_key(folder, task):
    """Forwards in one process, backwards in another: the same rows; other keys, other rows."""
    first, second = (ruler_sources.made(folder, task, 1024) for _ in range(2))
    rows = [first.row(i) for i in range(3)]
    assert [second.row(i) for i in (2, 1, 0)] == rows[::-1]
    assert first.row(0) == rows[0]
    assert len({row.input for row in rows}) == 3
    assert ruler_sources.made(folder, task, 1024, seed=43).row(0).input != rows[0].input
    assert ruler_sources.made(folder, task, 1040).row(0).input != rows[0].input


def test_what_does_not_fit_one_row_is_that_rows_fault(make, monkeypatch):
    table = make("qa_1", 1024)
    assert table.units < 40
    monkeypatch.setattr(table.builder, "least", lambda index: 40)
    with pytest.raises(BadRow, match="qa_1 row 7.*1024 is too short"):
        table.row(7)


# ---- needles -------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", (1024, 4096))
@pytest.mark.parametrize("task", NEEDLES)
def test_needles_are_hidden_as_promised(make, task, length):
    table = make(task, length)
    settings = table.task.settings
    needles, asked = COUNTS[task]
    for index in range(3):
        row = table.row(index)
        found = NEEDLE.findall(row.input)
        hay = table.row(index).meta["units"] if settings["type_haystack"] == "needle" else 0
        assert len(found) == needles + hay
        values = collections.defaultdict(list)
        for kind, key, value in found:
            assert kind == settings["type_needle_v"]
            values[key].append(value)
        question = row.input.rsplit("\n", 1)[1]
        keys = [key for key in values if key in question]
        assert sorted(v for key in keys for v in values[key]) == sorted(row.outputs)
        assert len(row.outputs) == asked == len(set(row.outputs))
        assert all(row.input.count(value) == 1 for value in row.outputs)
        form = {"numbers": r"\d{7}", "uuids": UUID}[settings["type_needle_v"]]
        assert all(re.fullmatch(form, value) for _, _, value in found)
        if settings["type_needle_k"] == "uuids":
            assert all(re.fullmatch(UUID, key) for key in values)


def test_multiquery_asks_in_the_order_of_its_answers(make):
    row = make("niah_multiquery", 1024).row(1)
    values = {key: value for _, key, value in NEEDLE.findall(row.input)}
    keys = re.search(r"numbers for (.*) mentioned", row.answer_prefix)[1]
    first, second, third, last = re.fullmatch(r"(.+), (.+), (.+), and (.+)", keys).groups()
    assert row.outputs == tuple(values[key] for key in (first, second, third, last))
    assert f"What are all the special magic numbers for {keys} mentioned" in row.input


def test_one_needle_is_asked_in_the_singular(make):
    """The official file's first and last line (niah_multikey_3 at 4096), uuids aside."""
    row = make("niah_multikey_3", 1024).row(0)
    lines = re.sub(UUID, "U", row.input + row.answer_prefix).split("\n")
    assert lines[0] == (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards."
    )
    assert set(lines[1:-1]) == {"One of the special magic uuids for U is: U."}
    assert lines[-1] == (
        "What is the special magic uuid for U mentioned in the provided text? "
        "The special magic uuid for U mentioned in the provided text is"
    )


@pytest.mark.parametrize("task", ("niah_single_2", "niah_multivalue"))
def test_essays_stay_whole_around_the_needles(make, folder, task):
    """Without the needles the text is the haystack again, and they stand between sentences."""
    table = make(task, 2048)
    row = table.row(0)
    text = row.input.split("\n", 1)[1].rsplit("\n", 1)[0]
    hay = ruler_sources.sources(folder)["haystack"].text(row.meta["units"])
    assert " ".join(NEEDLE.sub("", text).split()) == hay
    for match in NEEDLE.finditer(text):
        assert re.search(r"(^|[.!?][\"')\]]*) $", text[: match.start()]) or match.start() == 0


def test_depths_cover_the_text(make):
    """A needle may stand anywhere: the thirds of the text get their share of 40 rows."""
    depths = [make("niah_single_1", 512).row(i).depth() for i in range(40)]
    thirds = collections.Counter(int(3 * depth) for depth in depths)
    assert all(5 < thirds[third] < 25 for third in range(3)), thirds


# ---- chains, words -------------------------------------------------------------------------------
def interpret(text):
    """{name: value} of the assignments in `text`, run line by line."""
    names = {}
    for name, _, copied, value in re.findall(r"VAR (\w+) = (VAR (\w+)|(\d+))", text):
        names[name] = value or names[copied]
    return names


@pytest.mark.parametrize("length", (700, 1024, 4096))
def test_chains_resolve_to_the_answers(make, length):
    for index in range(3):
        row = make("vt", length).row(index)
        example, text = row.input.split("\n\nMemorize", 1)
        query = re.search(r"assigned the value (\d+) in the text", text)[1]
        assert tuple(n for n, v in interpret(text).items() if v == query) == row.outputs
        assert [len(name) for name in row.outputs] == [5] * 5
        assert f"5 variables are assigned the value {query}, they are: " in row.answer_prefix
        # The example is solved, with other names.
        asked = re.search(r"assigned the value (\d+) in the text", example)[1]
        solved = example.rsplit("they are: ", 1)[1].split()
        assert [n for n, v in interpret(example).items() if v == asked] == solved
        assert [len(name) for name in solved] == [3] * 5


def entries(text):
    """Words of a numbered list, whose numbers must count from 1."""
    found = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return collections.Counter(word for _, word in found)


@pytest.mark.parametrize(
    "length, often, seldom, example", ((2048, 6, 1, (3, 1)), (4096, 30, 3, (10, 3)))
)
def test_common_words_come_as_often_as_promised(make, length, often, seldom, example):
    row = make("cwe", length).row(1)
    head, solved, text = re.fullmatch(
        r"(Below.*?)\n(?:.*?)\nQuestion.*?list\? Answer.*?list are: (.*?)\n(Below.*)",
        row.input, re.S,
    ).groups()  # fmt: skip
    counts = entries(text.split("\n")[1])
    assert {word for word, n in counts.items() if n == often} == set(row.outputs)
    assert set(counts.values()) == {often, seldom}
    assert len(row.outputs) == 10
    counts = entries(row.input.split("\n")[1])
    assert set(counts.values()) == set(example)
    assert {w for w, n in counts.items() if n == example[0]} == set(entries(solved))


@pytest.mark.parametrize("length", LENGTHS)
def test_frequent_words_are_the_three_most_frequent(make, length):
    for index in range(3):
        row = make("fwe", length).row(index)
        text = row.input.split("coded words. ", 1)[1].split("\nQuestion", 1)[0]
        counts = collections.Counter(text.split())
        dots = counts.pop("...")
        ranked = counts.most_common()
        assert dots > ranked[0][1]
        assert {word for word, _ in ranked[:3]} == set(row.outputs)
        assert ranked[2][1] > ranked[3][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts)


def test_word_lists_that_are_too_short_are_filled_with_pairs():
    words = ruler_text.Words(("sea", "sun"), ("red", "old"), ("go",), "test")
    found = words.sample(random.Random(1), 7)
    assert len(set(found)) == 7 and {"sea", "sun", "red", "old", "go"} < set(found)
    with pytest.raises(CommandError, match="--words test: 4 pairs"):
        words.sample(random.Random(1), 8)


# ---- questions -----------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ("qa_1", "qa_2"))
def test_documents_hold_the_answer_once(make, folder, task):
    table = make(task, 2048)
    questions = ruler_sources.sources(folder)["squad" if task == "qa_1" else "hotpot"]
    for index in range(3):
        row = table.row(index)
        question, answers, own, _ = questions.items[index]
        assert row.outputs == answers and row.input.endswith(f"Question: {question}")
        context = row.input.split("given documents.\n\n", 2)[1].rsplit("\n\nAnswer the", 1)[0]
        documents = re.split(r"(?:^|\n\n)Document (\d+):\n", context)[1:]
        assert [int(n) for n in documents[::2]] == list(range(1, row.meta["units"] + 1))
        assert len(set(documents[1::2])) == len(documents[1::2])
        assert {questions.docs[i] for i in own} <= set(documents[1::2])


def test_squad_takes_paragraphs_of_the_same_article_first(folder):
    questions = ruler_sources.sources(folder)["squad"]
    assert len(questions.items) == 48  # the others have no answer
    builder = ruler_build.Documents(
        ruler_tasks.tasks()["qa_1"], 2048, ruler_sources.sources(folder)
    )
    _, _, own, related = questions.items[0]
    few = builder._documents(random.Random(1), 4, list(own), list(related))
    assert set(few) <= {*own, *related} and len(set(few)) == 4
    many = builder._documents(random.Random(1), 20, list(own), list(related))
    assert {*own, *related} < set(many) and len(set(many)) == 20
    every = builder._documents(random.Random(1), 100, list(own), list(related))
    assert set(every) == set(range(48)) and len(every) == 100


# ---- parts ---------------------------------------------------------------------------------------
def test_fit_finds_what_a_slow_search_finds():
    rng = random.Random(5)
    for _ in range(200):
        base, steps = rng.randint(0, 300), [rng.choice((1, 2, 3, 40)) for _ in range(2000)]
        sums = [base]
        for step in steps:
            sums.append(sums[-1] + step)
        tokens = lambda units: sums[min(units, 2000)] + max(0, units - 2000)  # noqa: E731, B023
        low, budget = rng.randint(1, 40), rng.randint(base, sums[-1])
        slow = max((n for n in range(low, 2000) if tokens(n) <= budget), default=None)
        assert ruler_generate.fit(tokens, low, budget) == slow


def test_sentences_joined_are_the_text():
    text = (
        'He left. "Why?" she asked. Mr. Smith of St. Ives had 3.5 acres, i.e. Little. A! B (C.) D'
    )
    parts = ruler_text.sentences(text)
    assert " ".join(parts) == text
    assert parts[:3] == ["He left.", '"Why?" she asked.', parts[2]]
    assert "Mr. Smith of St. Ives had 3.5 acres, i.e. Little." in parts
