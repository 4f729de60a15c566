# SPDX-License-Identifier: Apache-2.0
"""setuptools.build_meta that asks for torch only when no torch headers are found.

Naming torch in build-system.requires would make pip fetch the newest torch (gigabytes) for the
build alone, beside the one that is installed.
"""

from __future__ import annotations

import torch_headers
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)


def _torch_if_absent() -> list[str]:
    return [] if torch_headers.find() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_if_absent()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_if_absent()
