# SPDX-License-Identifier: Apache-2.0
"""python -m pbs_attn VERB: see pbs_attn/cli."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
