# SPDX-License-Identifier: Apache-2.0
"""Names under which transformers knows our attention: function and mask function together.

A name that has only the function loses padding without a word: transformers makes no mask at all
for names that its mask interface does not know.
"""

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from .. import env, methods
from . import forward, masks

DEFAULT_NAME = "pbs_attn"
POLICY = "_pbs_attn_policy"  # of an attention module: PBSConfig, Method, forward.DENSE or None

# transformers gives names with these parts a meaning of their own (substring tests).
_TRAPS = ("flash", "sdpa", "flex_attention", "eager", "paged", "/", "|", ":", "@")
_registered = {}  # name -> PBSConfig or Method, or None for the default config


def register(name=DEFAULT_NAME, config=None, *, overwrite=False):
    """Register `attn_implementation=name` with transformers. Call it before from_pretrained.

    config: PBSConfig, or a method or its text ("xattention:stride=16"), of every model that uses
    the name; None = PBS_ATTN_CONFIG or the defaults, or what the name already has. Another config
    than the name has needs overwrite=True and takes effect at once, in loaded models too.
    """
    _check_name(name)
    config = check_config("config", config)
    if name in _registered:
        if config is None or config == _registered[name]:
            return
        if not overwrite:
            raise ValueError(
                f"register: {name!r} is registered with {_registered[name] or 'the default config'}"
                "; allowed: the same config, another name, or overwrite=True"
            )
    elif name in AttentionInterface._global_mapping and not overwrite:
        raise ValueError(
            f"register: {name!r} is another package's attention; allowed: another name, or "
            "overwrite=True"
        )
    _registered[name] = config
    AttentionInterface.register(name, _attention_function(name))
    AttentionMaskInterface.register(name, masks.attention_mask_function)


def _check_name(name):
    if not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}; allowed: a string")
    for trap in _TRAPS:
        if trap in name.lower():
            raise ValueError(f"name is {name!r}; allowed: without {trap!r}, which has a meaning")
    if not name.isidentifier():
        raise ValueError(f"name is {name!r}; allowed: letters, digits and underscores")


def check_config(argument, config):
    """The policy that `config` says: PBSConfig, Method or None; a method's text becomes one."""
    return None if config is None else methods.policy(argument, config)


def _attention_function(name):
    def pbs_attention_forward(module, query, key, value, attention_mask, **kwargs):
        policy = getattr(module, POLICY, None) or _registered[name] or env.default_config()
        return forward.attention_forward(
            module, query, key, value, attention_mask, policy, **kwargs
        )

    return pbs_attention_forward
