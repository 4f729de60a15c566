# SPDX-License-Identifier: Apache-2.0
"""transformers 4.57 and 5: `attn_implementation="pbs_attn"`, before or after loading.

registry.py  names: attention function and mask function in one step
masks.py     what a mask says of each row's sequence
forward.py   the attention function: which call goes where, with which mask
patching.py  one model with its own config, and the way back
"""

from .patching import Patch, patch_model, unpatch_model
from .registry import register

__all__ = ["Patch", "patch_model", "register", "unpatch_model"]
