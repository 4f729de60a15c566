# SPDX-License-Identifier: Apache-2.0
"""Which setting to take at which length: what the evidence says, and where it stands.

A row holds for calls with up to max_kv keys; longer calls than the last row's take the last row,
which is then a guess. Sources are files of this repository.
"""

from typing import NamedTuple

from .config import PBSConfig


class Row(NamedTuple):
    max_kv: int  # keys of the longest calls that it holds for
    config: PBSConfig
    source: str  # file of the evidence


def _peak(**fields):
    return PBSConfig(
        permute="identity",
        select="antidiagonal",
        reduce="max",
        rule="absolute",
        normalize="row",
        correction="mean",
        **fields,
    )


# The sparsest setting within +1% of perplexity on the texts that settings were chosen on; it stays
# within on the others. Whole prompts of 2K and 4K, the second half of 8K.
_FRONTIER = "benchmarks/results/cpu-smollm2/peak/frontier.md"
ROWS = (
    Row(2048, _peak(stride=16, tau=0.05), _FRONTIER),
    Row(4096, _peak(stride=16, tau=0.03), _FRONTIER),
    Row(8192, _peak(stride=16, tau=0.01), _FRONTIER),
)


def place(seqlen):
    """Index of the row for calls with `seqlen` keys; the last one beyond every max_kv."""
    for index, row in enumerate(ROWS[:-1]):
        if seqlen <= row.max_kv:
            return index
    return len(ROWS) - 1


def config(seqlen):
    """PBSConfig.best, which has the words and the checks."""
    return ROWS[place(seqlen)].config
