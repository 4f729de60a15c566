# SPDX-License-Identifier: Apache-2.0
"""What tools/gpu_check.sh runs.

cli.py      the command line, and one step after another
runner.py   a step as a process group under a limit; the time that is left; the JSON
steps.py    which steps there are, and what their output means
probe.py    which GPU, torch, driver, commit
report.py   the summary in Markdown
kernels.py  every verb once on small ragged shapes: what compute-sanitizer watches
model.py    a model of transformers, sparse beside dense
"""
