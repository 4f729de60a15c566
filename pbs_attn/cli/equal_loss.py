# SPDX-License-Identifier: Apache-2.0
"""Methods at equal loss: what a budget of perplexity is, and the settings to look for it in.

A threshold means something else to every method, so methods are compared at the first setting of a
short ladder, from sparse to dense, whose loss is within the budget.
"""

import math

from ..methods import ALIASES
from . import CommandError

# {method: (its threshold, settings from sparse to dense)}. What is not here has one setting.
LADDERS = {
    "pbs": ("tau", (0.9, 0.95, 0.98, 0.99)),
    "pbs+": ("tau", (0.9, 0.95, 0.98, 0.99)),
    "identity": ("tau", (0.9, 0.95, 0.98, 0.99)),
    "meanpool": ("tau", (0.95, 0.98, 0.99)),
    "xattention": ("tau", (0.9, 0.95, 0.97, 0.99)),
    "flashprefill": ("alpha", (0.1, 0.03, 0.01)),
    "peak": ("eps", (0.02, 0.01, 0.005, 0.0025)),
}


def parse_budget(text, option):
    """Nats per token of '1%' of perplexity: ln(1.01). Raises CommandError that names `option`."""
    number, percent, rest = str(text).strip().partition("%")
    try:
        value = float(number) if percent and not rest else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise CommandError(f"{option} is {text!r}; allowed: percent of perplexity such as 1%")
    return math.log1p(value / 100)


def percent(delta):
    """'+1.2%': a change of the loss in nats as a change of the perplexity."""
    text = f"{100 * math.expm1(delta):+.1f}%"
    return "+0.0%" if text == "-0.0%" else text


def ladder(method):
    """[Method]: settings of a method from sparse to dense; [] where its text says the threshold.

    A method that has no threshold here is its own only setting.
    """
    if method.NAME not in LADDERS:
        return [method]
    name, values = LADDERS[method.NAME]
    words = [pair.partition("=")[0].strip() for pair in method.label.partition(":")[2].split(",")]
    if {name, ALIASES.get(name, name)} & set(words):
        return []
    mark = "," if ":" in method.label else ":"
    return [
        method.replace(
            **{ALIASES.get(name, name): value}, label=f"{method.label}{mark}{name}={value}"
        )
        for value in values
    ]
