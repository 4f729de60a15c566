# SPDX-License-Identifier: Apache-2.0
import os

# The profiler that sums up memory (prefill.py) announces itself on stderr below this level.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
