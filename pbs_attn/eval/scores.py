# SPDX-License-Identifier: Apache-2.0
"""What a prefill is worth: the loss of every token, and how far its predictions are from dense.

Plain functions on hidden states; the vocabulary is met a few hundred rows at a time. A difference
of two runs over the same tokens is paired, and its standard error is that of whole blocks of
tokens: neighbours share a cause and are no independent samples.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..cli import measure

BLOCK = 128  # predicted tokens that count as one sample
FIRST_BAND = 1024  # bands of positions: 0..1K, 1K..2K, 2K..4K, ...
KEPT_BYTES = 1 << 30  # log-probabilities of a reference that are kept from method to method


class Scores(NamedTuple):
    """Of n rows of one prefill; on the CPU."""

    losses: torch.Tensor  # fp32 [n - 1], nats
    best: torch.Tensor  # int64 [n], most likely next token
    kl: torch.Tensor | None  # fp32 [n], KL(reference || this) of the next token, nats


class Reference:
    """Log-probabilities of a dense prefill, a chunk of rows at a time; asked for by every method.

    On a CPU, where the head costs as much as a few layers, the first KEPT_BYTES of them are kept.
    """

    def __init__(self, run):
        """run: a measure.Prefill"""
        self.run = run
        self._kept = {}
        self._room = KEPT_BYTES if run.hidden.device.type == "cpu" else 0

    def rows(self, head, rows):
        """fp32 [n, vocabulary] of the slice `rows`; head: measure.lm_head's function."""
        found = self._kept.get(rows.start)
        if found is None:
            found = F.log_softmax(head(self.run.hidden[:, rows]), -1)
            if found.nbytes <= self._room:
                self._kept[rows.start] = found
                self._room -= found.nbytes
        return found


@torch.inference_mode()
def score(model, ids, run, reference=None):
    """Scores of the tokens `ids` [1, n], whose hidden states are those of `run`.

    reference: the Reference of the same tokens; None leaves kl out.
    """
    losses, best, divergences = [], [], []
    with measure.lm_head(model, run.output_type) as head:
        for start in range(0, ids.shape[1], measure.HEAD_CHUNK):
            rows = slice(start, start + measure.HEAD_CHUNK)
            ours = F.log_softmax(head(run.hidden[:, rows]), -1)
            best.append(ours.argmax(-1))
            targets = ids[0, start + 1 : start + measure.HEAD_CHUNK + 1]
            losses.append(F.nll_loss(ours[: len(targets)], targets, reduction="none"))
            if reference is not None:
                divergences.append(divergence(reference.rows(head, rows), ours))
    kl = None if reference is None else torch.cat(divergences).cpu()
    return Scores(torch.cat(losses).cpu(), torch.cat(best).cpu(), kl)


def divergence(p, q):
    """KL(p || q) [...] in nats of log-probabilities [..., vocabulary]."""
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


@torch.inference_mode()
def last_row(model, run):
    """Log-probabilities fp32 [vocabulary] of the token after a prefill."""
    with measure.lm_head(model, run.output_type) as head:
        return F.log_softmax(head(run.hidden[:, -1:])[-1], -1)


def mean(values, chosen=None):
    """Mean of values [n], of those at `chosen` (bool [n]) if given; None if there are none."""
    values = values if chosen is None else values[chosen]
    return float(values.double().mean()) if len(values) else None


def block_means(losses, block=BLOCK):
    """[mean loss] of every `block` tokens; the last may hold fewer."""
    return [mean(part) for part in losses.split(block)]


def difference(delta, chosen=None, block=BLOCK):
    """(mean, its standard error) of paired differences [n] of tokens in blocks of `block`.

    With S_b the sum and n_b the number of chosen tokens of block b, m = sum S_b / n and
    se^2 = B / (B - 1) * sum_b (S_b - n_b m)^2 / n^2 over the B blocks with n_b > 0: the linearised
    variance of a ratio under cluster sampling (Cochran, Sampling Techniques, 3rd ed.,
    chapter 9A). For
    blocks of equal size it is the sample deviation of block means over sqrt(B). None where there
    is no token, or no second block.
    """
    delta = delta.double()
    chosen = torch.ones_like(delta, dtype=torch.bool) if chosen is None else chosen
    sums = torch.stack([x.sum() for x in (delta * chosen).split(block)])
    counts = torch.stack([x.sum() for x in chosen.double().split(block)])
    sums, counts = sums[counts > 0], counts[counts > 0]
    number, blocks = counts.sum(), len(counts)
    if not blocks:
        return None, None
    centre = sums.sum() / number
    if blocks < 2:
        return float(centre), None
    squares = (sums - counts * centre).square().sum()
    return float(centre), math.sqrt(blocks / (blocks - 1) * squares) / float(number)


def bands(losses, first=0):
    """[[start, end, mean loss]] by position of the row that predicts: 0..1K, 1K..2K, 2K..4K, ...

    first: position of the first row. The last band ends with the text, the first with `first`.
    """
    found, begin, end = [], first, FIRST_BAND
    while begin < first + len(losses):
        if end > begin:
            stop = min(end, first + len(losses))
            found.append([begin, stop, mean(losses[begin - first : stop - first])])
            begin = stop
        end *= 2
    return found
