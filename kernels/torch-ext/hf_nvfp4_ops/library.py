"""How a function becomes an operator of torch.

The operators' namespace is this package's name, so that several versions can be loaded. They are defined with
torch.library.Library, whose calls cost half of custom_op's.
"""

import functools
from collections.abc import Callable

import torch

from .spec import NAMESPACE

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(schema: str, fake: Callable) -> Callable:
    """Make a function the operator of this schema, on GPUs and in the interpreter. fake: shapes and dtypes alone."""

    def decorate(function: Callable) -> Callable:
        _LIBRARY.define(schema)
        name = schema.split("(")[0]
        for key in ("CUDA", "CPU"):
            _LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"{_LIBRARY.ns}::{name}", fake, lib=_LIBRARY)
        operator = getattr(getattr(torch.ops, _LIBRARY.ns), name).default
        return functools.wraps(function)(lambda *args: operator(*args))

    return decorate
