"""Layers whose weight the code around them multiplies by itself: a converted layer quantizes in its forward.

A layer is READ if methods of its module's class read `self.<layer>.weight` for its values and, its bias aside, do
nothing else with `self.<layer>`; if they do both, some branch goes past its forward. Whatever can't be told (no source,
a layer that is passed on, or held under another name) counts as CALLED. Knows source code; knows nothing of recipes.
"""

import functools
import inspect
import re

from torch import nn

CALLED, READ, BOTH = "called", "read", "both"
# self.<layer> and what is asked of it, unless that is assigned to, or its type is.
_USE = re.compile(r"(?<!isinstance\()\bself\.(\w++)(?:\.(\w++))?+(?:\.(\w++))?+(?:\.\w++)*+(?!\s*=[^=])")
# What is asked of a weight without multiplying by it.
_METADATA = {"data", "device", "dim", "dtype", "ndim", "numel", "requires_grad", "shape", "size"}


@functools.cache
def uses(cls: type) -> dict[str, str]:
    """Attribute -> CALLED, READ or BOTH, for what the methods of a class and its bases do with self.<attribute>.

    Methods that initialize are not looked at.
    """
    found: dict[str, set[str]] = {}
    for base in set(cls.__mro__) - set(nn.Module.__mro__):
        for name, method in vars(base).items():
            if inspect.isfunction(method) and "init" not in name:
                for attribute, of, how in _uses_of(method):
                    if of == "weight" and how not in _METADATA:
                        found.setdefault(attribute, set()).add(READ)
                    elif of not in ("weight", "bias"):
                        found.setdefault(attribute, set()).add(CALLED)
    return {name: BOTH if len(ways) > 1 else ways.pop() for name, ways in found.items()}


@functools.cache
def _uses_of(method) -> list[tuple[str, str, str]]:
    try:
        return _USE.findall(inspect.getsource(method))
    except (OSError, TypeError):
        return []
