# SPDX-License-Identifier: Apache-2.0
"""The scores of LongBench v1 and v2 and of RULER, quirks included.

A benchmark number is comparable only if every quirk of its scorer is kept, so each function names
the one that it follows and says what is odd about it. `rouge`, `jieba` and `rapidfuzz` are imported
on use. Written anew after the public definitions; no code is copied.
"""

import functools
import importlib
import json
import logging
import re
import string
import sys
import threading
from collections import Counter
from difflib import SequenceMatcher
from importlib import resources

from ..cli import missing

LETTERS = "ABCD"
FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})  # few-shot: the reply's first line
NEEDS = {  # metric -> optional packages
    "qa_f1_zh": ("jieba",),
    "rouge": ("rouge",),
    "rouge_zh": ("rouge", "jieba"),
}
_CHINESE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙"
    "〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_DROP = str.maketrans("", "", string.punctuation)
_DROP_ZH = str.maketrans("", "", string.punctuation + _CHINESE)


class MetricError(Exception):
    """A metric that could not be computed: a failed row, not a silent zero."""


def _package(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing(error.name or name) from None


@functools.cache
def _jieba():
    module = _package("jieba")
    module.setLogLevel(logging.WARNING)
    return module


def _words_zh(text):
    return list(_jieba().cut(text, cut_all=False))


# LongBench v1, one prediction against one answer: all return 0..1


def _f1(prediction, gold):
    """F1 of two lists of tokens as bags."""
    same = sum((Counter(prediction) & Counter(gold)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def _plain(text):
    """Lower case, no ASCII punctuation, no articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_DROP)).split()


def qa_f1(prediction, gold):
    """Token F1 of two English texts (LongBench `qa_f1_score`; the rules of SQuAD)."""
    return _f1(_plain(prediction), _plain(gold))


def qa_f1_zh(prediction, gold):
    """Token F1 of two Chinese texts, words by jieba (LongBench `qa_f1_zh_score`).

    Words lose white space and punctuation after the cut, and empty ones are dropped.
    """

    def tokens(text):
        words = ("".join(word.lower().translate(_DROP_ZH).split()) for word in _words_zh(text))
        return [word for word in words if word]

    return _f1(tokens(prediction), tokens(gold))


def _on_big_stack(function, frames):
    """function() in a thread whose C stack holds `frames` Python calls (Python 3.10 needs it)."""
    result = []

    def run():
        try:
            result.append((function(), None))
        except BaseException as error:
            result.append((None, error))

    before = threading.stack_size(max(64 << 20, frames * 4096))
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value


def _deep(function, frames):
    """function() with room for `frames` more calls than the recursion limit allows."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + frames)
    try:
        if sys.version_info >= (3, 11):  # calls between Python functions take no C stack
            return function()
        return _on_big_stack(function, frames)
    finally:
        sys.setrecursionlimit(limit)


def rouge(prediction, gold, *, official_zero=False):
    """F of ROUGE-L by the package `rouge` 1.0.1 (LongBench `rouge_score`).

    Not textbook ROUGE-L: sentences end at ".", words at white space, case is kept, and the union
    of the common subsequences is taken over sets of words. The package recurses once per word, so
    at Python's default limit long texts raise RecursionError, which the official script (and every
    harness after it) turns into 0; here the limit is raised instead.

    Args:
        official_zero: score as the official script: default limit, every exception is 0. The
            result then depends on how deep the caller's stack is.

    Raises:
        MetricError: the package failed on texts that both hold a sentence.
    """
    scorer = _package("rouge").Rouge(metrics=["rouge-l"])

    def compute():
        return scorer.get_scores([prediction], [gold], avg=True)["rouge-l"]["f"]

    if official_zero:
        try:
            return compute()
        except Exception:
            return 0.0
    if not prediction.replace(".", "") or not gold.replace(".", ""):
        return 0.0  # nothing to compare: the one case in which the official 0 is meant
    try:
        return _deep(compute, len(prediction.split()) + len(gold.split()) + 200)
    except Exception as error:
        raise MetricError(f"rouge failed: {type(error).__name__}: {error}") from error


def rouge_zh(prediction, gold, *, official_zero=False):
    """ROUGE-L of two Chinese texts, words by jieba (LongBench `rouge_zh_score`)."""
    prediction, gold = (" ".join(_words_zh(text)) for text in (prediction, gold))
    return rouge(prediction, gold, official_zero=official_zero)


def classification(prediction, gold, all_classes):
    """1 / (class names found in the prediction) if gold is among them (`classification_score`).

    Found names that are part of the gold name do not count. The official loop drops them from the
    list that it walks over and so skips the name after each dropped one: kept as it is.
    """
    found = [name for name in all_classes if name in prediction]
    place = 0
    while place < len(found):
        name = found[place]
        if name in gold and name != gold:
            found.remove(name)
        place += 1
    return 1.0 / len(found) if gold in found else 0.0


def _share(prediction, number):
    """Share of all integers in the prediction that are written as `number`."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def count(prediction, gold):
    """Share of the integers in the prediction that are gold (`count_score`)."""
    return _share(prediction, gold)


def retrieval(prediction, gold):
    """Share of the integers in the prediction that are N of gold's "Paragraph N"."""
    return _share(prediction, re.findall(r"Paragraph (\d+)", gold)[0])


def retrieval_zh(prediction, gold):
    """Share of the integers in the prediction that are N of gold's "段落N"."""
    return _share(prediction, re.findall(r"段落(\d+)", gold)[0])


def code_line(prediction):
    """The first line that looks like code: without `, # and //; "" if there is none."""
    lines = prediction.lstrip("\n").split("\n")
    return next((line for line in lines if not re.search(r"`|#|//", line)), "")


def _percent(ratio):
    return int(round(100 * ratio)) / 100  # fuzzywuzzy gives whole percents


def code_sim(prediction, gold):
    """Edit similarity of the first line of code, by difflib (`code_sim_score`).

    The number of `fuzzywuzzy` without python-Levenshtein, which is what the official requirements
    install. Not symmetric: the order of the arguments is the official one.
    """
    line = code_line(prediction)
    return 1.0 if line == gold else _percent(SequenceMatcher(None, line, gold).ratio())


def code_sim_indel(prediction, gold):
    """The same by indel similarity: `fuzzywuzzy` with python-Levenshtein, as OpenCompass has it."""
    indel = _package("rapidfuzz.distance").Indel
    return _percent(indel.normalized_similarity(code_line(prediction), gold))


METRICS = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "code_sim": code_sim,
}
VARIANTS = ("official", "opencompass")
_SUMMED = frozenset({"classification", "count", "retrieval", "retrieval_zh"})  # by OpenCompass


def used(task, prediction):
    """The part of a prediction that is scored: the first line in the four few-shot tasks."""
    return prediction.lstrip("\n").split("\n")[0] if task in FIRST_LINE else prediction


def score(metric, prediction, answers, all_classes=None, *, variant="official", zero=False):
    """The score of one row, 0..1 (OpenCompass' sums may exceed 1).

    Args:
        metric: a name in METRICS.
        prediction: what used() left of the reply.
        answers: all accepted answers. Official: the best counts. OpenCompass: the same, but
            classification, count and retrieval add up over the answers.
        all_classes: the class names, for `classification`.
        variant: "official" or "opencompass".
        zero: score failures of `rouge` as 0, as both harnesses do.

    Raises:
        MetricError: from rouge(). CommandError: a package is missing.
    """
    function = METRICS[metric]
    options = {}
    if metric in ("rouge", "rouge_zh"):
        options["official_zero"] = zero
    if metric == "classification":
        options["all_classes"] = all_classes
    scores = []
    for gold in answers:
        if variant == "opencompass" and metric == "code_sim":
            function = code_sim_indel
        scores.append(float(function(prediction, gold, **options)))
        if variant == "opencompass" and metric == "rouge_zh":
            prediction = " ".join(_words_zh(prediction))  # it cuts again what it has cut
    total = sum(scores) if variant == "opencompass" and metric in _SUMMED else max(scores)
    return max(0.0, total)


def packages(metrics, variant="official"):
    """The optional packages that these metrics need, sorted."""
    names = {name for metric in metrics for name in NEEDS.get(metric, ())}
    if variant == "opencompass" and "code_sim" in metrics:
        names.add("rapidfuzz")
    return sorted(names)


# LongBench v2


def choice(text):
    """The letter of "The correct answer is (X)", else of "The correct answer is X"; None without.

    Asterisks are deleted first; case matters (LongBench v2 `extract_answer`).
    """
    text = text.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        match = re.search(pattern, text)
        if match:
            return match.group(1)
    return None


@functools.cache
def _first_option_patterns():
    file = resources.files("pbs_attn.eval") / "data" / "opencompass" / "first_option.json"
    lists = json.loads(file.read_text(encoding="utf-8"))
    texts = lists["patterns"] + lists["cushion_patterns"]
    return [re.compile(text.replace("{options}", LETTERS), re.DOTALL) for text in texts]


def first_option(text):
    """The letter by OpenCompass' `first_option_postprocess`; None where that gives nothing.

    Some 50 patterns in order, the last of which is any A, B, C or D: it credits replies that the
    official extraction calls unparsable.
    """
    text = text.strip()
    for pattern in _first_option_patterns():
        match = pattern.search(text)
        if match is None:
            continue
        letter = next((x for x in LETTERS if x in (match.group(1) or match.group(0))), None)
        if letter is not None:
            return letter
    return None


def compensated(letter, answer):
    """1 if right, 0.25 where no letter was found, else 0 (LongBench v2 `result.py`)."""
    return 0.25 if letter is None else float(letter == answer)


# RULER


def ruler_clean(prediction):
    """The reply without outer white space, control characters 0x00-0x1f as line ends."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def string_match_all(prediction, references):
    """Share of the references that stand in the prediction, whatever their case (all but QA)."""
    text = prediction.lower()
    return sum(gold.lower() in text for gold in references) / len(references)


def string_match_part(prediction, references):
    """1 if any reference stands in the prediction, whatever its case (QA)."""
    text = prediction.lower()
    return float(any(gold.lower() in text for gold in references))
