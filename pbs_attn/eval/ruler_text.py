# SPDX-License-Identifier: Apache-2.0
"""What RULER's texts are made of: word lists, essays, questions with documents, sentences.

Everything read here has a SHA-256 that goes into the run's identity: other words are other prompts.
"""

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..cli import CommandError, missing

# nounlist, adjectivelist, verblist of wonderwords 3.0.1, as `pip install wonderwords` gives them.
WONDERWORDS_SHA256 = "7f0e1ee164c1e654af395706e7d795816cdba95c4853c2aedb3916a6bd2a03d9"
LISTS = {"nouns": "nounlist.txt", "adjectives": "adjectivelist.txt", "verbs": "verblist.txt"}


@dataclass(frozen=True)
class Words:
    """Word lists. Keys of needles are adjective-noun pairs; lists of common words use all of them.
    `origin` says where they come from, `digest` is the SHA-256 of the three lists."""

    nouns: tuple
    adjectives: tuple
    verbs: tuple
    origin: str

    @property
    def digest(self):
        lists = (self.nouns, self.adjectives, self.verbs)
        return hashlib.sha256("\n\n".join("\n".join(words) for words in lists).encode()).hexdigest()

    @functools.cached_property
    def every(self):
        """All distinct words, sorted. Not to be changed."""
        return sorted({*self.nouns, *self.adjectives, *self.verbs})

    @functools.cached_property
    def pairs(self):
        return len(set(self.adjectives)) * len(set(self.nouns))

    def key(self, rng):
        return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"

    def sample(self, rng, count):
        """`count` distinct words in random order. Where the list is too short (about 200K tokens of
        cwe), adjective-noun pairs fill it up; RULER turns to a file of 8.6 MB there."""
        words = self.every
        if count <= len(words):
            return rng.sample(words, count)
        words = words + self.keys(rng, count - len(words), taken=words)
        rng.shuffle(words)
        return words

    def keys(self, rng, count, taken=()):
        """`count` different adjective-noun pairs, none of them in `taken`.

        Raises CommandError where that is more than half of all pairs: drawing would not end."""
        if 2 * count > self.pairs:
            raise CommandError(
                f"--words {self.origin}: {self.pairs:,} pairs of its words are too few for "
                f"{count:,} different ones; a longer list is needed"
            )
        return distinct(count, lambda: self.key(rng), taken)


def distinct(count, draw, taken=()):
    """`count` different values of draw(), none of them in `taken`."""
    found, seen = [], set(taken)
    while len(found) < count:
        value = draw()
        if value not in seen:
            seen.add(value)
            found.append(value)
    return found


def read_words(path=None):
    """Words of --words PATH, else of the package wonderwords.

    PATH: a text file with one word per line, a JSON list or object of words (RULER's
    english_words.json), a JSON object with the lists "nouns", "adjectives", "verbs", or a folder
    with nounlist.txt, adjectivelist.txt, verblist.txt. Raises CommandError naming the file."""
    if path is None:
        return _wonderwords()
    path = Path(path)
    if path.is_dir():
        lists = {name: _lines(path / file) for name, file in LISTS.items()}
    else:
        lists = _word_file(path)
    words = Words(**{name: tuple(lists[name]) for name in LISTS}, origin=path.name)
    if len(words.every) < 100:
        raise CommandError(f"--words {path}: {len(words.every)} words; at least 100 are needed")
    return words


def _lines(path):
    lines = [line.strip() for line in read_text(path, "--words").splitlines()]
    return [line for line in lines if line]


def _word_file(path):
    if path.suffix != ".json":
        words = list(dict.fromkeys(_lines(path)))
        return {"nouns": words, "adjectives": words, "verbs": []}
    data = read_json(path, "--words")
    if isinstance(data, dict) and set(LISTS) <= set(data):
        lists = {name: data[name] for name in LISTS}
    else:
        words = list(data.values()) if isinstance(data, dict) else data
        lists = {"nouns": words, "adjectives": words, "verbs": []}
    for words in lists.values():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise CommandError(f"--words {path}: expected lists of words as text")
    return {name: list(dict.fromkeys(words)) for name, words in lists.items()}


def _wonderwords():
    """The lists are data files of the package; its own reader is private, so we read them."""
    import importlib.util

    spec = importlib.util.find_spec("wonderwords")
    if spec is None:
        raise missing("wonderwords")
    folder = Path(spec.submodule_search_locations[0]) / "assets"
    lists = {name: tuple(dict.fromkeys(_lines(folder / file))) for name, file in LISTS.items()}
    return Words(**lists, origin="wonderwords")


def read_text(path, option):
    """UTF-8 text of a file; raises CommandError naming the option and the file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{option} {path}: {error}") from error


def read_json(path, option):
    try:
        return json.loads(read_text(path, option))
    except ValueError as error:
        raise CommandError(f"{option} {path}: no JSON: {error}") from error


@dataclass(frozen=True)
class Haystack:
    """The words of the essays in order; `digest` is the SHA-256 of them joined by spaces."""

    words: tuple
    origin: str

    @property
    def digest(self):
        return hashlib.sha256(" ".join(self.words).encode()).hexdigest()

    def text(self, count):
        """The first `count` words; the essays start again where they end."""
        repeats = -(-count // len(self.words))
        return " ".join((self.words * repeats)[:count])


def read_haystack(path):
    """Haystack of --haystack: RULER's PaulGrahamEssays.json (one "text"), any text file, or a
    folder of .txt files, taken by name. Raises CommandError naming the file."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise CommandError(f"--haystack {path}: no .txt file in this folder")
        text = "\n".join(read_text(file, "--haystack") for file in files)
    elif path.suffix == ".json":
        data = read_json(path, "--haystack")
        if not isinstance(data, dict) or not isinstance(data.get("text"), str):
            raise CommandError(f'--haystack {path}: expected {{"text": "..."}}')
        text = data["text"]
    else:
        text = read_text(path, "--haystack")
    words = tuple(text.split())
    if len(words) < 100:
        raise CommandError(f"--haystack {path}: {len(words)} words; at least 100 are needed")
    return Haystack(words, path.name)


# A sentence ends at . ! ? (and closing quotes) before a space and a capital, a digit or a quote.
_END = re.compile(r"[.!?][\"'”’)\]]*(?= [\"'“‘(\[]*[A-Z0-9])")
_NO_END = re.compile(
    r"(?:^|[ (\"'])(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|cf|No|Fig|[A-Z])\.$"
)


def sentences(text):
    """`text` (single spaces) cut into sentences; joined by spaces they are `text` again.

    Ours, not NLTK's punkt, so needles may stand at other sentences than in the official files."""
    parts, start = [], 0
    for match in _END.finditer(text):
        if _NO_END.search(text[max(start, match.end() - 8) : match.end()]):
            continue
        parts.append(text[start : match.end()])
        start = match.end() + 1
    parts.append(text[start:])
    return [part for part in parts if part]


@dataclass(frozen=True)
class Questions:
    """`docs`: distinct documents; `items`: (question, answers, own documents, related documents),
    the last two as indices of `docs`; `digest`: SHA-256 of the file."""

    docs: tuple
    items: tuple
    origin: str
    digest: str


def read_squad(path):
    """Questions of SQuAD 2.0's dev-v2.0.json: answerable ones; documents are paragraphs, related
    ones those of the same article. Raises CommandError naming the file and the missing field."""
    data = read_json(path, "--squad")
    try:
        articles = [[p["context"] for p in article["paragraphs"]] for article in data["data"]]
        docs, place = _numbered(text for article in articles for text in article)
        items = []
        for article, texts in zip(data["data"], articles, strict=True):
            for paragraph in article["paragraphs"]:
                own = place[paragraph["context"]]
                related = [place[text] for text in texts if place[text] != own]
                for qa in paragraph["qas"]:
                    if not _impossible(qa):
                        answers = tuple(answer["text"] for answer in qa["answers"])
                        items.append(
                            (qa["question"], answers, (own,), tuple(dict.fromkeys(related)))
                        )
    except (KeyError, TypeError) as error:
        raise CommandError(f"--squad {path}: not SQuAD's dev-v2.0.json: missing {error}") from error
    return _questions(docs, items, path, "--squad")


def _impossible(qa):
    """SQuAD 2.0 marks questions without an answer; SQuAD 1.1 has none."""
    return qa.get("is_impossible", False) or not qa["answers"]


def read_hotpot(path):
    """Questions of HotpotQA's hotpot_dev_distractor_v1.json: a document is title and paragraph, a
    question brings its ten. Raises CommandError naming the file and the missing field."""
    data = read_json(path, "--hotpot")
    try:
        own = [
            [f"{title}\n{''.join(lines)}" for title, lines in entry["context"]] for entry in data
        ]
        docs, place = _numbered(text for texts in own for text in texts)
        items = [
            (
                entry["question"],
                (entry["answer"],),
                tuple(dict.fromkeys(place[t] for t in texts)),
                (),
            )
            for entry, texts in zip(data, own, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(
            f"--hotpot {path}: not hotpot_dev_distractor_v1.json: missing {error}"
        ) from error
    return _questions(docs, items, path, "--hotpot")


def _numbered(texts):
    docs = tuple(sorted(set(texts)))
    return docs, {text: index for index, text in enumerate(docs)}


def _questions(docs, items, path, option):
    if not items:
        raise CommandError(f"{option} {path}: no question with an answer in it")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Questions(docs, tuple(items), Path(path).name, digest)
