# SPDX-License-Identifier: Apache-2.0
"""Reports over run folders.

    load.py      run folders -> sections that may be averaged
    stats.py     paired differences and their intervals
    view.py      scores, differences and captions of one section
    *table*.py   the tables; titles.py: what a section may be called
    plots.py     the pictures
    paper.py     the paper's own numbers, in columns of their own
    document.py  report.md, CSV files, pictures
    frontier_*   the same three steps for the pictures of `eval frontier`

Two rules hold everywhere. A row that failed or is missing counts as zero and the word INCOMPLETE
stands beside its mean. A difference is called one only where its interval excludes zero.
"""
