# SPDX-License-Identifier: Apache-2.0
"""Attention methods by name and parameters: `full`, `pbs:tau=0.8,segment=512`, `flexprefill`, ...

METHODS is the one list of them. Whatever takes a PBSConfig takes a Method or such a text, too:
`register`, `patch_model`, `pbs_attention`, PBS_ATTN_CONFIG and the command line. Imports torch
only.
"""

import importlib

from ..config import PBSConfig
from .base import PAIR, BlockMethod, Call, Method, TokenMethod, plan_pairs, run

# name: "module:class" inside this package; imported when the name is asked for.
METHODS = {
    "sdpa": "kernels:Sdpa",
    "full": "kernels:Full",
    "pbs": "kernels:Pbs",
    "pbs+": "kernels:PbsPlus",
    "identity": "kernels:Identity",
    "meanpool": "kernels:MeanPool",
    "xattention": "kernels:XAttention",
    "peak": "kernels:Peak",
    "best": "kernels:Best",
    "streaming": "streaming:Streaming",
    "oracle": "oracle:Oracle",
    "flashprefill": "flashprefill:FlashPrefill",
    "flexprefill": "flexprefill:FlexPrefill",
    "minference": "minference:MInference",
    "s2o": "s2o:S2O",
    "bsfa": "bsfa:BSFA",
}
# (name, recipe): the class of `NAME:recipe=RECIPE`. `recipe=spec` is the class of METHODS itself.
RECIPES = {
    ("meanpool", "authors"): "authors:MeanPool",
    ("xattention", "authors"): "authors:XAttention",
}
ALIASES = {"block": "block_size", "segment": "segment_size", "eps": "tau"}

__all__ = [
    "METHODS",
    "PAIR",
    "RECIPES",
    "BlockMethod",
    "Call",
    "Method",
    "TokenMethod",
    "find",
    "get",
    "is_method",
    "parse",
    "plan_pairs",
    "policy",
    "run",
    "split",
]


def find(name, recipe="spec"):
    """The class of a method's name; ValueError if there is none.

    >>> from pbs_attn import methods
    >>> methods.find("pbs").NAME
    'pbs'
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; allowed: {', '.join(METHODS)}")
    where = METHODS[name] if recipe == "spec" else RECIPES.get((name, recipe))
    if where is None:
        known = [each for method, each in RECIPES if method == name]
        allowed = ", ".join(["spec", *known])
        raise ValueError(f"{name}: recipe is {recipe!r}; allowed: {allowed}")
    module, _, cls = where.partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), cls)


def is_method(text):
    """True if the text begins with a method's name, whatever its parameters are."""
    return text.partition(":")[0].strip() in METHODS


def split(text):
    """Names in a comma-separated list whose parameters are comma-separated too.

    >>> from pbs_attn import methods
    >>> methods.split("full,pbs:tau=0.8,segment=512")
    ['full', 'pbs:tau=0.8,segment=512']
    """
    names = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        key, equals, _ = piece.partition("=")
        if equals and ":" not in key and names and ":" in names[-1]:
            names[-1] += "," + piece
        else:
            names.append(piece)
    return names


def parse(text, base=None):
    """[Method] of a comma-separated list.

    base: a PBSConfig that kernel methods start from; what makes them themselves (permute, select)
    stays theirs. Other methods take its min_q, min_kv and strict. Raises ValueError or TypeError
    that names the method, the parameter and what is allowed.

    >>> from pbs_attn import methods
    >>> [method.tau for method in methods.parse("pbs,pbs:tau=0.8")]
    [0.9, 0.8]
    """
    if not isinstance(text, str):
        raise TypeError(f"method is a {type(text).__name__}; allowed: a text such as 'pbs:tau=0.8'")
    found = [_one(each, base) for each in split(text)]
    if not found:
        raise ValueError(f"no method in {text!r}; allowed: {', '.join(METHODS)}")
    return found


def get(text, base=None):
    """The one Method of a text.

    >>> from pbs_attn import methods
    >>> methods.get("xattention:stride=16").stride
    16
    """
    found = parse(text, base)
    if len(found) != 1:
        raise ValueError(f"method is {text!r}, which names {len(found)}; allowed: one")
    return found[0]


def policy(argument, value):
    """A PBSConfig or Method as it is, a text as its Method: what a call or a layer can follow.

    argument names it in errors. Raises TypeError for another type and ValueError for "sdpa", the
    model's own attention, which is what runs where pbs_attn is not asked.
    """
    try:
        method = get(value) if isinstance(value, str) else value
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument} is {value!r}: {error}") from error
    if isinstance(method, Method) and method.kind == "stock":
        raise ValueError(f"{argument} is {method.text!r}, the model's own; allowed: 'full'")
    if not isinstance(method, (PBSConfig, Method)):
        kind = type(value).__name__
        raise TypeError(f"{argument} is a {kind}; allowed: a PBSConfig or None, or a method")
    return method


def _one(label, base):
    name, _, parameters = label.partition(":")
    pairs = [pair.strip() for pair in parameters.split(",") if pair.strip()]
    name, recipe = name.strip(), "spec"
    if name in (each for each, _ in RECIPES):
        recipes = [pair for pair in pairs if pair.startswith("recipe=")]
        pairs = [pair for pair in pairs if pair not in recipes]
        recipe = recipes[-1].partition("=")[2] if recipes else recipe
    cls = find(name, recipe)
    known = cls.parameters()
    if pairs and not known:
        raise ValueError(f"method {name!r} has no parameters; got {parameters!r}")
    values = cls.from_base(base)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in known and ALIASES.get(key) in known:
            key = ALIASES[key]
        if not equals or key not in known:
            allowed = f"NAME=VALUE with one of {', '.join(known)}"
            raise ValueError(f"method {name!r}: got {pair!r}; allowed: {allowed}")
        values[key] = cls.value(key, value)
    return cls(**values, label=label)
