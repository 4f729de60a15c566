# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder as the package gpu_check

from gpu_check import cli  # noqa: E402

if __name__ == "__main__":
    sys.exit(cli.main())
